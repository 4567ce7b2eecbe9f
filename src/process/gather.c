/* SPDX-License-Identifier: MIT */
/* See gather.h. Everything stands still meanwhile, and half a gigabyte of which every other page is away are 65,536 runs: what was added is
 * marked page by page, in a hash table of blocks with linear probing. */
#include "process/gather.h"

#include <string.h>

#include "base/alloc.h"
#include "debug/inject.h"

#define WORD_BITS 64
#define BLOCK_WORDS 8 /* of pages of 4 KiB; of larger ones fewer are used */
#define FIRST_ROOM 64 /* a power of two */

struct marks {
    uintptr_t base; /* of the block, + 1; 0: unused */
    uint64_t bits[BLOCK_WORDS];
};

struct given {
    struct marks *v;
    size_t n, room;
};

static size_t page_bytes(uint64_t pages)
{
    return pages << os_page_shift();
}

/* Where the block is, or would be. */
static struct marks *probe(const struct given *g, uintptr_t base)
{
    size_t i = (size_t)((base / OS_BLOCK_SIZE * 0x9e3779b97f4a7c15u) >> 32);
    while (g->v[i & (g->room - 1)].base && g->v[i & (g->room - 1)].base != base + 1)
        i++;
    return &g->v[i & (g->room - 1)];
}

static void make_room(struct given *g)
{
    struct given old = *g;
    g->room = old.room ? 2 * old.room : FIRST_ROOM;
    while (!(g->v = mem_alloc(g->room * sizeof(*g->v))))
        os_sleep(1000000);
    for (size_t i = 0; i < old.room; i++)
        if (old.v[i].base)
            *probe(g, old.v[i].base - 1) = old.v[i];
    mem_free(old.v, old.room * sizeof(*old.v));
}

/* The marks of a block; NULL: none, and `must` was not said. */
static struct marks *marks_of(struct given *g, uintptr_t base, bool must)
{
    if (must && g->room < 2 * (g->n + 1))
        make_room(g);
    struct marks *m = g->room ? probe(g, base) : NULL;
    if (m && !m->base && must) {
        m->base = base + 1;
        g->n++;
    }
    return m && m->base ? m : NULL;
}

static bool is_marked(const struct marks *m, unsigned i)
{
    return m && (m->bits[i / WORD_BITS] >> i % WORD_BITS & 1) && !mutate("fork-twice");
}

/* Adds the pages [first, end) of a block, which run gives, or which are away now (NULL), but for those that are marked. */
static void add_rest(struct estate *e, const struct marks *m, uintptr_t base, unsigned first, unsigned end,
                     const struct estate_run *run)
{
    for (unsigned i = first, stop; i < end; i = stop) {
        bool marked = is_marked(m, i);
        for (stop = i + 1; stop < end && is_marked(m, stop) == marked;)
            stop++;
        if (marked)
            continue;
        uintptr_t at = base + page_bytes(i);
        if (!run) {
            estate_add_entries(e, at, base + page_bytes(stop));
            continue;
        }
        struct estate_run part = *run;
        part.addr = at;
        part.pages = stop - i;
        part.source += run->pagemap ? (at - run->addr) >> os_page_shift() : at - run->addr;
        estate_add(e, part);
    }
}

static void add_run(struct estate *e, struct given *g, const struct estate_run *run)
{
    uintptr_t end = run->addr + page_bytes(run->pages), stop;
    for (uintptr_t at = run->addr; at < end; at = stop) {
        uintptr_t base = at & BLOCK_MASK;
        stop = base + OS_BLOCK_SIZE < end ? base + OS_BLOCK_SIZE : end;
        unsigned first = (unsigned)((at - base) >> os_page_shift()), behind = (unsigned)((stop - base) >> os_page_shift());
        struct marks *m = marks_of(g, base, true);
        add_rest(e, m, base, first, behind, run);
        for (unsigned i = first; i < behind; i++)
            m->bits[i / WORD_BITS] |= 1ull << i % WORD_BITS;
    }
}

void gather(struct estate *e, const struct estate *from, size_t n)
{
    struct given g = {.n = 0};
    for (size_t k = 0; k < n; k++)
        for (size_t i = 0; i < from[k].n; i++)
            add_run(e, &g, &from[k].v[i]);
    for (struct block *b = pagetable_next(&e->mm->pt, 0, UINTPTR_MAX); b;
         b = pagetable_next(&e->mm->pt, b->base + OS_BLOCK_SIZE, UINTPTR_MAX))
        add_rest(e, marks_of(&g, b->base, false), b->base, 0, block_pages(), NULL);
    mem_free(g.v, g.room * sizeof(*g.v));
}
