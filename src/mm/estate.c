/* SPDX-License-Identifier: MIT */
/* See estate.h. */
#include "mm/estate.h"

#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "debug/inject.h"

#define FIRST_ROOM 64

static size_t page_bytes(uint64_t pages)
{
    return pages << os_page_shift();
}

static uintptr_t run_end(const struct estate_run *r)
{
    return r->addr + page_bytes(r->pages);
}

static uint64_t source_after(const struct estate_run *r, uint64_t pages)
{
    return r->source + (r->pagemap ? pages : page_bytes(pages));
}

/* ---- captures ---- */

static void *alloc_must(size_t bytes)
{
    void *p;
    while (!(p = mem_alloc(bytes)))
        os_sleep(1000000);
    return p;
}

struct capture_moved {
    struct capture_moved *next;
    struct invalidation inv;
};

struct capture *capture_new(struct mm *mm)
{
    struct capture *c = alloc_must(sizeof(*c));
    c->mm = mm;
    c->refs = 1;
    list_init(&c->link);
    return c;
}

static bool continues(const struct capture_range *last, uintptr_t start)
{
    return last->inv.event.end == start && start - last->inv.event.start < CAPTURE_BYTES;
}

/* The range that a run belongs to: the last, made longer, where it continues that one, or where there are as many as may be. */
static uint16_t note_range(struct capture *c, uintptr_t start, uintptr_t end)
{
    struct capture_range *last = c->n ? &c->range[c->n - 1] : NULL;
    if (!last || (!continues(last, start) && c->n < CAPTURE_RANGES)) {
        last = &c->range[c->n++];
        last->inv.event.start = start;
    }
    last->inv.event.end = end;
    return c->n - 1;
}

void capture_begin(struct capture *c)
{
    lock_assert_held(RANK_AS);
    for (unsigned i = 0; i < c->n; i++) {
        struct invalidation *inv = &c->range[i].inv;
        uintptr_t end = mutate("fork-devices") ? inv->event.start : inv->event.end;
        bool marked = notifier_begin(&c->mm->notifiers, inv, inv->event.start, end, HMM_EVENT_PROTECTION_PAGE, NULL);
        __atomic_store_n(&c->range[i].quiet, !marked, __ATOMIC_RELEASE);
    }
    list_add_tail(&c->mm->captures, &c->link);
}

static bool meets(const struct invalidation *inv, uintptr_t start, uintptr_t end)
{
    return inv->event.start < end && start < inv->event.end;
}

static bool captured(const struct capture *c, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < c->n; i++)
        if (meets(&c->range[i].inv, start, end) && !__atomic_load_n(&c->range[i].ended, __ATOMIC_ACQUIRE))
            return true;
    for (const struct capture_moved *m = c->moved; m; m = m->next)
        if (meets(&m->inv, start, end))
            return true;
    return false;
}

/* The devices need not be called: until now nobody can have mapped the pages there, and from now on read_begin waits. */
void captures_remapped(struct mm *mm, uintptr_t start, uintptr_t end, uintptr_t to)
{
    lock_assert_held(RANK_AS);
    list_for_each (pos, &mm->captures) {
        struct capture *c = container_of(pos, struct capture, link);
        if (!captured(c, start, end) || mutate("fork-remap"))
            continue;
        struct capture_moved *m = alloc_must(sizeof(*m));
        notifier_begin(&mm->notifiers, &m->inv, to, to + (end - start), HMM_EVENT_PROTECTION_PAGE, NULL);
        m->next = c->moved;
        c->moved = m;
    }
}

static void end_range(struct capture *c, struct capture_range *r)
{
    if (!__atomic_exchange_n(&r->ended, 1, __ATOMIC_ACQ_REL))
        notifier_end(&c->mm->notifiers, &r->inv);
}

/* A range ends when it is quiet and nobody wants it: whoever makes the second of the two true sees the first. */
static void end_if_done(struct capture *c, struct capture_range *r)
{
    if (__atomic_load_n(&r->left, __ATOMIC_SEQ_CST) == 0 && __atomic_load_n(&r->quiet, __ATOMIC_SEQ_CST))
        end_range(c, r);
}

int capture_call(struct capture *c, enum notifier_how how)
{
    int busy = 0;
    for (unsigned i = 0; i < c->n; i++) {
        struct capture_range *r = &c->range[i];
        if (__atomic_load_n(&r->quiet, __ATOMIC_ACQUIRE))
            continue;
        if (notifier_call(&c->mm->notifiers, &r->inv, how)) {
            busy = -EAGAIN;
            continue;
        }
        __atomic_store_n(&r->quiet, 1, __ATOMIC_SEQ_CST);
        end_if_done(c, r);
    }
    return busy;
}

void capture_get(struct capture *c)
{
    __atomic_fetch_add(&c->refs, 1, __ATOMIC_RELAXED);
}

void capture_put(struct capture *c)
{
    if (__atomic_sub_fetch(&c->refs, 1, __ATOMIC_ACQ_REL))
        return;
    rwlock_write_lock(&c->mm->as);
    list_del(&c->link);
    rwlock_write_unlock(&c->mm->as);
    for (unsigned i = 0; i < c->n; i++)
        end_range(c, &c->range[i]);
    for (struct capture_moved *m = c->moved, *next; m; m = next) {
        next = m->next;
        notifier_end(&c->mm->notifiers, &m->inv);
        mem_free(m, sizeof(*m));
    }
    mem_free(c, sizeof(*c));
}

/* ---- references ---- */

static void get_places(const struct estate *e, const struct estate_run *r)
{
    if (!r->pagemap)
        e->mm->slot_keep(r->source, r->pages);
    for (uint32_t k = 0; r->pagemap && k < r->pages; k++)
        pagemap_get(pagemap_by_id(r->pagemap), r->source + k);
    if (r->range != ESTATE_QUIET)
        __atomic_fetch_add(&e->capture->range[r->range].left, r->pages, __ATOMIC_SEQ_CST);
}

static void put_places(const struct estate *e, const struct estate_run *r, uint32_t pages)
{
    if (!r->pagemap)
        e->mm->slot_drop(r->source, pages);
    else
        pagemap_put(pagemap_by_id(r->pagemap), r->source, pages);
    if (r->range == ESTATE_QUIET)
        return;
    struct capture_range *range = &e->capture->range[r->range];
    if (__atomic_sub_fetch(&range->left, pages, __ATOMIC_SEQ_CST) == 0)
        end_if_done(e->capture, range);
}

/* ---- the list ---- */

void estate_init(struct estate *e, struct mm *mm, struct capture *capture)
{
    *e = (struct estate){.mm = mm, .capture = capture};
}

static void make_room(struct estate *e)
{
    if (e->n < e->room)
        return;
    size_t room = e->room ? 2 * e->room : FIRST_ROOM;
    struct estate_run *v = alloc_must(room * sizeof(*v));
    if (e->v) {
        memcpy(v, e->v, e->n * sizeof(*v));
        mem_free(e->v, e->room * sizeof(*v));
    }
    e->v = v;
    e->room = room;
}

/* Staging slots are counted one by one: a run must not reach from one into the next, which stands beside it. */
static bool begins_slot(const struct estate_run *run)
{
    return !run->pagemap && run->source % OS_BLOCK_SIZE == 0 && !mutate("estate-slots");
}

static bool continues_run(const struct estate_run *last, const struct estate_run *run)
{
    return last->pages && run_end(last) == run->addr && last->pagemap == run->pagemap && last->range == run->range &&
           source_after(last, last->pages) == run->source && last->pages + run->pages > last->pages && !begins_slot(run);
}

/* Without a reference. Joined with the last where it continues that one. */
static void append(struct estate *e, struct estate_run run)
{
    struct estate_run *last = e->n ? &e->v[e->n - 1] : NULL;
    e->pages += run.pages;
    if (last && continues_run(last, &run)) {
        last->pages += run.pages;
        return;
    }
    if (last && run.addr < last->addr)
        e->mixed = true;
    make_room(e);
    e->v[e->n++] = run;
}

/* Without a reference, before run i. */
static void insert(struct estate *e, size_t i, struct estate_run run)
{
    make_room(e);
    memmove(e->v + i + 1, e->v + i, (e->n - i) * sizeof(*e->v));
    e->v[i] = run;
    e->n++;
    e->pages += run.pages;
}

void estate_add(struct estate *e, struct estate_run run)
{
    get_places(e, &run);
    append(e, run);
}

/* Where the bytes of an entry are; false: nowhere, or the child sees the same without us. */
static bool source_of(struct mm *mm, entry_t entry, struct estate_run *run)
{
    if (entry_kind(entry) == ENTRY_DEVICE) {
        run->pagemap = entry_id(entry);
        run->source = entry_page(entry);
        return true;
    }
    if (entry_kind(entry) != ENTRY_FLIGHT)
        return false; /* the marker of a poisoned page is the child's, too */
    const struct flight *f = mm->flights[entry_id(entry)];
    uint64_t i = entry_page(entry);
    if (f->how[i] != FLIGHT_COPY)
        return false; /* was absent or zero: the child's is, too */
    run->pagemap = f->staging ? 0 : f->dev->pagemap->id;
    run->source = f->staging ? (uintptr_t)f->staging + page_bytes(i) : f->page[i];
    return true;
}

void estate_add_entries(struct estate *e, uintptr_t start, uintptr_t end)
{
    lock_assert_held(RANK_AS);
    for (struct block *b = pagetable_next(&e->mm->pt, start, end); b;
         b = pagetable_next(&e->mm->pt, b->base + OS_BLOCK_SIZE, end))
        for (unsigned i = block_first(b, start); i < block_behind(b, end) && b->used; i++) {
            struct estate_run run = {.addr = block_addr(b, i), .pages = 1, .range = ESTATE_QUIET};
            if (!source_of(e->mm, block_entry(b, i), &run))
                continue;
            if (e->capture && run.pagemap) /* what is staged no device writes */
                run.range = note_range(e->capture, run.addr, run.addr + os_page_size());
            estate_add(e, run);
        }
}

void estate_add_estate(struct estate *e, const struct estate *from)
{
    if (!e->capture && from->capture) {
        capture_get(from->capture);
        e->capture = from->capture;
    }
    for (size_t i = 0; i < from->n; i++)
        if (from->v[i].pages)
            estate_add(e, from->v[i]);
    e->mixed |= from->mixed;
}

static void drop_head(struct estate *e, struct estate_run *r, uint32_t pages)
{
    r->source = source_after(r, pages);
    r->addr += page_bytes(pages);
    r->pages -= pages;
    e->pages -= pages;
}

/* Run i becomes two, the second from its page k on. */
static void split(struct estate *e, size_t i, uint32_t k)
{
    struct estate_run tail = e->v[i];
    tail.addr += page_bytes(k);
    tail.source = source_after(&e->v[i], k);
    tail.pages -= k;
    e->v[i].pages = k;
    e->pages -= tail.pages;
    insert(e, i + 1, tail);
}

void estate_take(struct estate *e, uintptr_t start, uintptr_t end, struct estate *out)
{
    for (size_t i = 0; i < e->n; i++) {
        struct estate_run *r = &e->v[i];
        if (!r->pages || r->addr >= end || run_end(r) <= start)
            continue;
        if (r->addr < start) {
            split(e, i, (start - r->addr) >> os_page_shift());
            continue;
        }
        if (run_end(r) > end) {
            split(e, i, (end - r->addr) >> os_page_shift());
            r = &e->v[i];
        }
        append(out, *r);
        drop_head(e, r, r->pages);
    }
}

/* The first run that does not begin below addr. */
static size_t lower_bound(const struct estate *e, uintptr_t addr)
{
    size_t low = 0, high = e->n;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (e->v[mid].addr < addr)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

/* A run that is inserted must not span the place of one that is used up: using it up in turn would put the two out of order. */
static void remove_used_up(struct estate *e)
{
    size_t n = 0;
    for (size_t i = 0; i < e->n; i++)
        if (e->v[i].pages)
            e->v[n++] = e->v[i];
    e->n = n;
}

void estate_move(struct estate *e, uintptr_t start, uintptr_t end, uintptr_t by)
{
    struct estate moved;
    estate_init(&moved, e->mm, NULL);
    estate_take(e, start, end, &moved);
    remove_used_up(e);
    for (size_t i = 0; i < moved.n; i++) {
        struct estate_run run = moved.v[i];
        run.addr += by;
        if (e->mixed)
            append(e, run);
        else
            insert(e, lower_bound(e, run.addr), run);
    }
    if (moved.v)
        mem_free(moved.v, moved.room * sizeof(*moved.v));
}

static bool gives(const struct estate_run *r, uintptr_t addr)
{
    return r->pages && r->addr <= addr && addr < run_end(r);
}

size_t estate_find(struct estate *e, uintptr_t addr)
{
    size_t i = 0;
    if (!e->mixed) { /* the last that begins at or below; used-up runs have no place in the order that matters */
        i = lower_bound(e, addr + 1);
        while (i > 0 && !gives(&e->v[i - 1], addr) && !e->v[i - 1].pages)
            i--;
        i = i ? i - 1 : 0;
    }
    while (i < e->n && !gives(&e->v[i], addr) && (e->mixed || e->v[i].addr <= addr))
        i++;
    if (i >= e->n || !gives(&e->v[i], addr))
        return e->n;
    if (e->v[i].addr == addr)
        return i;
    split(e, i, (addr - e->v[i].addr) >> os_page_shift());
    return i + 1;
}

uintptr_t estate_next(const struct estate *e, uintptr_t addr, uintptr_t end)
{
    for (size_t i = e->mixed ? 0 : lower_bound(e, addr); i < e->n; i++) {
        const struct estate_run *r = &e->v[i];
        if (r->pages && r->addr >= addr && r->addr < end)
            end = r->addr;
        if (!e->mixed && r->addr >= end)
            break;
    }
    return end;
}

void estate_consume(struct estate *e, size_t i, uint32_t pages)
{
    struct estate_run done = e->v[i];
    drop_head(e, &e->v[i], pages);
    put_places(e, &done, pages);
}

void estate_free(struct estate *e)
{
    for (size_t i = 0; i < e->n; i++)
        if (e->v[i].pages)
            put_places(e, &e->v[i], e->v[i].pages);
    if (e->v)
        mem_free(e->v, e->room * sizeof(*e->v));
    if (e->capture)
        capture_put(e->capture);
    *e = (struct estate){.mm = e->mm};
}

const char *estate_bytes(const struct estate_run *run)
{
    if (!run->pagemap)
        return (const char *)(uintptr_t)run->source;
    const char *map = pagemap_by_id(run->pagemap)->desc.cpu_map;
    return map ? map + page_bytes(run->source) : NULL;
}
