/* SPDX-License-Identifier: MIT */
/* See reclaim.h. Victims are whole blocks, coldest first (mm->lru). */
#include "reclaim/reclaim.h"

#include <errno.h>

#define LOOK_MAX 256 /* blocks looked at for one victim */
#define USED_MAX 64  /* blocks found in use before one is waited for */

static bool on_device(const struct block *b, const struct pagemap *pm)
{
    for (unsigned i = 0; i < block_pages(); i++) {
        entry_t e = block_entry(b, i);
        if (entry_kind(e) == ENTRY_DEVICE && entry_id(e) == pm->id && !pagemap_pins(pm, entry_page(e)))
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

/* The base of a block to evict; 0: none found. Blocks that are passed over go to the hot end. */
static uintptr_t victim(struct mm *mm, struct hmm_device *dev, uintptr_t keep)
{
    uintptr_t base = 0;
    rwlock_read_lock(&mm->as);
    for (unsigned i = 0; i < LOOK_MAX && !base; i++) {
        struct block *b = pop_coldest(mm);
        if (!b)
            break;
        mutex_lock(&b->lock);
        bool useful = on_device(b, dev->pagemap), used = b->on_device > 0;
        mutex_unlock(&b->lock);
        if (useful && b->base != keep)
            base = b->base;
        if (used)
            lru_touch(mm, b);
    }
    rwlock_read_unlock(&mm->as);
    return base;
}

/* Evicts one block. One that is in use is passed over while `used` has not shown that all are. */
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
 * hot end, and the next is looked at. */
uint64_t reclaim_make_room(struct mm *mm, struct hmm_device *dev, uint64_t pages, uintptr_t keep)
{
    uint64_t freed = 0;
    unsigned failures = 0, used = 0;
    while (freed < pages && !__atomic_load_n(&dev->pagemap->dying, __ATOMIC_ACQUIRE)) {
        uintptr_t base = victim(mm, dev, keep);
        if (!base)
            break;
        unsigned before = used;
        uint64_t moved = evict(mm, dev, base, &used);
        if (moved == 0 && used == before && ++failures > 8)
            break; /* pinned, failing, or evicted by others each time: the caller goes on with less */
        freed += moved;
    }
    return freed;
}

int reclaim_migrate_to_device(struct mm *mm, struct hmm_device *dev, uintptr_t start, uintptr_t end,
                              struct hmm_migrate_result *res)
{
    struct tcb_list tcbs;
    tcb_list_read(&tcbs);
    struct cursor c = {.dev = dev, .at = start, .end = end, .tcbs = &tcbs, .res = res};
    for (unsigned failures = 0;;) {
        int r = migrate_range_to_device(mm, &c);
        if (r != -ENOSPC)
            return r;
        if (c.partial) {
            /* Not one page found room: the rest of this block stays. */
            uintptr_t next = (c.at & BLOCK_MASK) + OS_BLOCK_SIZE;
            uintptr_t stop = next < end ? next : end;
            res->busy += (stop - c.at) >> os_page_shift();
            if (!res->first_stayed)
                res->first_stayed = c.at;
            c.at = stop;
            c.partial = false;
            failures = 0;
            continue;
        }
        if (reclaim_make_room(mm, dev, c.lacking, c.at & BLOCK_MASK) == 0 || ++failures > 8)
            c.partial = true;
    }
}
