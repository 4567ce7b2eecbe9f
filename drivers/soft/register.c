/* SPDX-License-Identifier: MIT */
/*
 * Registrations: where the pages of a range are on the device, read once and then used without asking. What makes that right is who
 * holds them: see model.c.
 *
 * A registration keeps the notifiers of all its blocks, by keeping directories of the mirror. It is current while the sequence number
 * of each is the one at which its pages were read: as the entries of the page table are, but for a whole range at once, so that a range
 * is either known as it was at one moment, or not at all.
 *
 * Life: new (nobody else sees it) -> filled, as often as need be -> published (found by other jobs, told of invalidations) ->
 * stale (not found any more) -> unlinked, when no job uses it -> freed.
 */
#include "soft.h"

#include <string.h>

#define REFUSED_MANY 16 /* pages in a row that do not move: then only one of as many is asked for */

static size_t page_bytes(const struct soft *s)
{
    return (size_t)1 << s->memory.page_shift;
}

static unsigned count_blocks(const struct registration *r)
{
    return (unsigned)((r->end - 1) / SOFT_BLOCK - r->start / SOFT_BLOCK + 1);
}

struct registration *soft_registration_new(struct soft *s, uintptr_t start, uintptr_t end)
{
    struct registration key = {.start = start, .end = end};
    size_t pages = (end - start) >> s->memory.page_shift;
    size_t bytes = sizeof(key) + pages * sizeof(key.pages[0]) + count_blocks(&key) * sizeof(struct registered_block);
    struct registration *r = hmm_mem_alloc(bytes);
    if (!r)
        return NULL;
    r->start = start;
    r->end = end;
    r->bytes = bytes;
    r->blocks = (struct registered_block *)(r->pages + pages);
    for (unsigned i = 0; i < count_blocks(r); i++)
        hmm_mirror_dir_get(s->mirror, (start & ~(SOFT_BLOCK - 1)) + i * SOFT_BLOCK, &r->blocks[i].dir);
    return r;
}

/* ---- filling ----------------------------------------------------------------------------------------------------- */

/* The part of r in one block. */
struct part {
    uintptr_t start, end;
    uint64_t *pages; /* of start */
};

static struct part part_of(const struct soft *s, struct registration *r, unsigned i)
{
    uintptr_t base = (r->start & ~(SOFT_BLOCK - 1)) + i * SOFT_BLOCK;
    struct part part = {.start = base > r->start ? base : r->start,
                        .end = base + SOFT_BLOCK < r->end ? base + SOFT_BLOCK : r->end};
    part.pages = r->pages + ((part.start - r->start) >> s->memory.page_shift);
    return part;
}

/* Waits while an invalidation of the block is in progress. */
static void read_block(struct soft *s, struct registered_block *b, const struct part *part)
{
    b->seq = 0;
    if (hmm_mirror_dir_read(b->dir, part->start, part->end, part->pages, &b->seq))
        memset(part->pages, 0, (part->end - part->start) / page_bytes(s) * sizeof(*part->pages));
}

/* Asks for what is not there. */
static void bring_block(struct port *p, struct registered_block *b, const struct part *part)
{
    struct soft *s = p->soft;
    unsigned refused = 0;
    for (uintptr_t at = part->start; at < part->end && !soft_port_was_asked(p);) {
        if (part->pages[(at - part->start) / page_bytes(s)]) {
            refused = 0;
        } else if (soft_bus_fault(s, at, HMM_FAULT_READ) == 0) {
            refused = 0;
            read_block(s, b, part);
        } else {
            refused++;
        }
        at += refused < REFUSED_MANY ? page_bytes(s) : REFUSED_MANY * page_bytes(s);
    }
}

static uint64_t count_pages(const struct soft *s, const struct part *part)
{
    uint64_t n = 0;
    for (size_t i = 0; i < (part->end - part->start) / page_bytes(s); i++)
        n += part->pages[i] != 0;
    return n;
}

static bool block_is_current(const struct registered_block *b)
{
    return !b->dir || (b->seq && b->seq == hmm_mirror_dir_seq(b->dir));
}

void soft_registration_fill(struct port *p, struct registration *r, uint64_t *budget)
{
    struct soft *s = p->soft;
    for (unsigned i = 0; i < count_blocks(r); i++) {
        struct registered_block *b = &r->blocks[i];
        struct part part = part_of(s, r, i);
        if (block_is_current(b))
            continue;
        read_block(s, b, &part);
        if (*budget)
            bring_block(p, b, &part);
        uint64_t there = count_pages(s, &part);
        *budget -= there < *budget ? there : *budget;
    }
}

bool soft_registration_is_current(const struct registration *r)
{
    for (unsigned i = 0; i < count_blocks(r); i++)
        if (!block_is_current(&r->blocks[i]))
            return false;
    return !r->stale;
}

/* ---- the list of those that are published; caller holds model.lock -------------------------------------------------- */

struct registration *soft_registration_find(struct soft *s, uintptr_t start, uintptr_t end)
{
    for (struct registration *r = s->model.first; r; r = r->next)
        if (r->start == start && r->end == end && !r->stale && soft_registration_is_current(r))
            return r;
    return NULL;
}

/* Runs of pages that lie together, by a call for each. */
static void each_run(struct soft *s, const struct registration *r, void (*fn)(struct hmm_device *, uint64_t, uint64_t))
{
    size_t n = (r->end - r->start) >> s->memory.page_shift;
    for (size_t i = 0, k; i < n; i = k) {
        uint64_t page = r->pages[i] & HMM_PFN_MASK;
        for (k = i + 1; k < n && r->pages[i] && r->pages[k] && (r->pages[k] & HMM_PFN_MASK) == page + (k - i); k++)
            ;
        if (r->pages[i])
            fn(s->dev, page, k - i);
    }
}

void soft_registration_publish(struct soft *s, struct registration *r, bool reference)
{
    r->referenced = reference;
    if (reference)
        each_run(s, r, hmm_page_get);
    r->next = s->model.first;
    s->model.first = r;
}

void soft_registration_unlink(struct soft *s, struct registration *r, struct registration **list)
{
    struct registration **at = &s->model.first;
    while (*at != r)
        at = &(*at)->next;
    *at = r->next;
    r->next = *list;
    *list = r;
}

void soft_registrations_free(struct soft *s, struct registration *list)
{
    while (list) {
        struct registration *r = list;
        list = r->next;
        if (r->referenced)
            each_run(s, r, hmm_page_put);
        for (unsigned i = 0; i < count_blocks(r); i++)
            if (r->blocks[i].dir)
                hmm_mirror_dir_put(r->blocks[i].dir);
        hmm_mem_free(r, r->bytes);
    }
}

/* ---- pages of one; caller holds model.lock ------------------------------------------------------------------------- */

/* The indices of [start, end) in r. */
static void clip(const struct registration *r, uintptr_t start, uintptr_t end, size_t *first, size_t *last)
{
    size_t page = hmm_page_size();
    *first = start > r->start ? (start - r->start) / page : 0;
    *last = ((end < r->end ? end : r->end) - r->start) / page;
}

bool soft_registration_covers(const struct registration *r, uintptr_t start, uintptr_t end)
{
    size_t i, last;
    if (start >= r->end || end <= r->start)
        return false;
    for (clip(r, start, end, &i, &last); i < last; i++)
        if (r->pages[i] && !(r->pages[i] & PFN_CUT))
            return true;
    return false;
}

void soft_registration_cut(struct registration *r, uintptr_t start, uintptr_t end)
{
    size_t i, last;
    if (start >= r->end || end <= r->start)
        return;
    for (clip(r, start, end, &i, &last); i < last; i++)
        if (r->pages[i])
            r->pages[i] |= PFN_CUT;
}

/* Page k lies behind page i on the device as it does in the range, with the same rights. */
static bool together(const struct registration *r, size_t i, size_t k)
{
    return r->pages[k] && (r->pages[k] & ~PFN_CUT) - (r->pages[i] & ~PFN_CUT) == k - i;
}

bool soft_registration_resolve(const struct registration *r, uintptr_t addr, bool write, struct hmm_mirror_run *run)
{
    size_t page = hmm_page_size(), first, last;
    uintptr_t base = addr & ~(SOFT_BLOCK - 1);
    if (addr < r->start || addr >= r->end)
        return false;
    size_t i = (addr - r->start) / page, low = i, high = i + 1;
    if (!r->pages[i] || (write && !(r->pages[i] & HMM_PFN_WRITE)))
        return false;
    clip(r, base, base + SOFT_BLOCK, &first, &last);
    while (low > first && together(r, low - 1, i))
        low--;
    while (high < last && together(r, i, high))
        high++;
    *run = (struct hmm_mirror_run){
        .start = r->start + low * page,
        .end = r->start + high * page,
        .page = r->pages[low] & HMM_PFN_MASK,
        .flags = r->pages[i] & HMM_PFN_WRITE,
    };
    return true;
}
