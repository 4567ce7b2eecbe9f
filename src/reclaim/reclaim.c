/* SPDX-License-Identifier: MIT */
/* See reclaim.h. Victims are whole blocks, coldest first (mm->lru). */
#include "reclaim/reclaim.h"

#include <errno.h>

#include "debug/inject.h"

#define LOOK_MAX 256   /* blocks looked at while no event can be read */
#define USED_FEW 8     /* blocks found in use before nothing is evicted, where none is to be waited for */
#define USED_MAX 64    /* blocks found in use before one is waited for */
#define FAILURES_MAX 8 /* times that nothing came of it, or that others took the room that was made */

/* pm NULL: on any. */
static bool on_device(const struct block *b, const struct pagemap *pm)
{
    for (unsigned i = 0; i < block_pages(); i++) {
        entry_t e = block_entry(b, i);
        if (entry_kind(e) != ENTRY_DEVICE || (pm && entry_id(e) != pm->id))
            continue;
        if (!pagemap_pins(pagemap_by_id(entry_id(e)), entry_page(e)))
            return true;
    }
    return false;
}

/* Unlinks and returns the coldest block, or NULL. Caller holds mm->as. */
static struct block *pop_coldest(struct mm *mm)
{
    struct block *b = NULL;
    mutex_lock(&mm->queue_lock);
    if (!list_empty(&mm->lru)) {
        b = container_of(mm->lru.next, struct block, lru);
        list_del(&b->lru);
    }
    mutex_unlock(&mm->queue_lock);
    return b;
}

/* The base of a block to evict among the next n; 0: none. Those that are passed over go to the hot end, in their order. */
static uintptr_t look_at(struct mm *mm, struct hmm_device *dev, uintptr_t keep, unsigned n)
{
    uintptr_t base = 0;
    struct block *b;
    rwlock_read_lock(&mm->as);
    for (unsigned i = 0; i < n && !base && (b = pop_coldest(mm)) != NULL; i++) {
        mutex_lock(&b->lock);
        bool useful = on_device(b, dev ? dev->pagemap : NULL), used = b->on_device > 0;
        mutex_unlock(&b->lock);
        if (useful && b->base != keep)
            base = b->base;
        if (used)
            lru_touch(mm, b);
    }
    rwlock_read_unlock(&mm->as);
    return base;
}

/* As many are looked at as there are blocks; in between, events may be read. */
static uintptr_t victim(struct mm *mm, struct hmm_device *dev, uintptr_t keep)
{
    uintptr_t base = 0;
    uint64_t blocks = __atomic_load_n(&mm->pt.blocks, __ATOMIC_RELAXED);
    for (uint64_t looked = 0; looked < blocks && !base; looked += LOOK_MAX)
        base = look_at(mm, dev, keep, LOOK_MAX);
    return base;
}

/* Evicts what one block has on dev; NULL: on any device. One that is in use is passed over while `used` has not shown that all are. */
static uint64_t evict(struct mm *mm, struct hmm_device *dev, uintptr_t base, unsigned *used)
{
    struct hmm_migrate_result res = {0};
    int r = *used < USED_MAX ? migrate_unused_to_system(mm, dev, base, &res)
                             : migrate_range_to_system(mm, dev, base, base + OS_BLOCK_SIZE, &res);
    *used += r == -EAGAIN;
    stat_add(&mm->stats.evicted, res.moved);
    return res.moved;
}

/* A device may use a block for as long as a job runs. So first those go that need not be waited for; each that is used goes to the
 * hot end, and the next is looked at. Without `wait`, that is all. */
static uint64_t evict_pages(struct mm *mm, struct hmm_device *dev, uint64_t pages, uintptr_t keep, bool wait)
{
    uint64_t freed = 0;
    unsigned failures = 0, used = 0;
    while (freed < pages && (wait || used < USED_FEW) && !(dev && __atomic_load_n(&dev->pagemap->dying, __ATOMIC_ACQUIRE))) {
        uintptr_t base = victim(mm, dev, keep);
        if (!base)
            break;
        unsigned before = used;
        uint64_t moved = evict(mm, dev, base, &used);
        if (moved == 0 && used == before && ++failures > FAILURES_MAX)
            break; /* pinned, failing, or evicted by others each time: the caller goes on with less */
        freed += moved;
    }
    return freed;
}

static uint64_t excess(int64_t room)
{
    return room < 0 ? -(uint64_t)room : 0;
}

/* What one more page would meet first decides whose pages go: the limit of the process is everybody's. But nobody waits for what another
 * device uses: that might be for ever. */
uint64_t reclaim_make_room(struct mm *mm, struct hmm_device *dev, uint64_t pages, uintptr_t keep)
{
    struct pagemap_room room = pagemap_room(dev->pagemap);
    if (__atomic_load_n(&dev->pagemap->dying, __ATOMIC_ACQUIRE))
        return 0;
    if (room.total < room.own)
        return evict_pages(mm, NULL, pages + excess(room.total), keep, mutate("limit-wait"));
    return evict_pages(mm, dev, pages + excess(room.own), keep, true);
}

bool reclaim_to_limit(struct mm *mm, struct hmm_device *dev)
{
    evict_pages(mm, dev, excess(dev ? pagemap_room(dev->pagemap).own : pagemap_total_room()), 0, false);
    return (dev ? pagemap_room(dev->pagemap).own : pagemap_total_room()) >= 0;
}

int reclaim_migrate_to_device(struct mm *mm, struct hmm_device *dev, uintptr_t start, uintptr_t end,
                              struct hmm_migrate_result *res)
{
    struct tcb_list tcbs;
    tcb_list_read(&tcbs);
    struct cursor c = {.dev = dev, .at = start, .end = end, .tcbs = &tcbs, .res = res};
    uintptr_t at = 0;
    for (unsigned failures = 0;;) {
        int r = migrate_range_to_device(mm, &c);
        if (r != -ENOSPC || c.partial)
            return r;
        failures = c.at == at ? failures + 1 : 0;
        at = c.at;
        if (reclaim_make_room(mm, dev, c.lacking, c.at & BLOCK_MASK) == 0 || failures > FAILURES_MAX)
            c.partial = true; /* what fits; the rest stays, and is counted */
    }
}
