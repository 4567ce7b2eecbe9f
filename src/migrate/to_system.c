/* SPDX-License-Identifier: MIT */
/*
 * Device -> system. The entries are marked first, so that faults on both sides wait; then the devices let go; then the bytes are
 * copied, and each page is put at whatever address it has by then.
 *
 * Short runs, and whole blocks of small pages, are copied straight from device memory where the process can see it: UFFDIO_COPY
 * allocates without clearing first. Blocks that left as one huge page go through a staging slot and come home as one.
 */
#include <errno.h>

#include "debug/inject.h"
#include "migrate/migrate.h"
#include "migrate/staging.h"

static bool take_entry(struct mm *mm, struct flight *f, struct block *b, unsigned i, struct hmm_migrate_result *res)
{
    entry_t e = block_entry(b, i);
    struct pagemap *pm = pagemap_by_id(entry_id(e));
    if (pagemap_pins(pm, entry_page(e)) && !mutate("pins")) {
        res->pinned++;
        stat_add(&mm->stats.pinned, 1);
        return false;
    }
    f->how[i] = FLIGHT_COPY;
    f->page[i] = entry_page(e);
    f->home[i] = block_addr(b, i);
    block_set(b, i, entry_make(ENTRY_FLIGHT, f->id, i));
    return true;
}

unsigned depart_to_system(struct mm *mm, struct flight *f, struct hmm_device *dev, struct window w,
                          struct hmm_migrate_result *res)
{
    struct hmm_migrate_result unread = {0};
    unsigned taken = 0;
    res = res ? res : &unread;
    rwlock_read_lock(&mm->as);
    struct block *b = pagetable_find(&mm->pt, w.start);
    if (!b)
        goto unlock;
    mutex_lock(&b->lock);
    unsigned first = block_index(w.start), end = first + ((w.end - w.start) >> os_page_shift());
    flight_reset(f, dev, b->base, first, end);
    for (unsigned i = first; i < end && b->used; i++) {
        entry_t e = block_entry(b, i);
        res->unmovable += entry_kind(e) == ENTRY_POISON;
        if (entry_kind(e) != ENTRY_DEVICE)
            continue;
        struct hmm_device *on = pagemap_by_id(entry_id(e))->dev;
        if ((f->dev && on != f->dev) || !take_entry(mm, f, b, i, res))
            continue;
        f->dev = on; /* of the first that can go: pinned pages of another device must not stand in the way */
        taken++;
    }
    f->huge = b->huge && taken == block_pages();
    b->huge = b->huge && taken == 0;
    mutex_unlock(&b->lock);
unlock:
    rwlock_read_unlock(&mm->as);
    if (taken) {
        flight_departed(mm, f, taken);
        f->invalidating = true;
        notifier_begin(&mm->notifiers, &f->inv, w.start, w.end, HMM_EVENT_MIGRATE, NULL);
    }
    return taken;
}

/* Devices let go of the pages. */
static int quiesce(struct mm *mm, struct flight *f, enum landing how)
{
    static const enum notifier_how notifier_how[] = {
        [LAND_AT_ONCE] = NOTIFIER_AT_ONCE,
        [LAND_UNLESS_USED] = NOTIFIER_BRIEFLY,
        [LAND_FOR_FAULT] = NOTIFIER_WAIT,
        [LAND] = NOTIFIER_WAIT,
    };
    if (mutate("invalidate"))
        return 0;
    if (how < LAND_FOR_FAULT && __atomic_load_n(&mm->remaps_pending, __ATOMIC_SEQ_CST))
        return -EAGAIN;
    if (f->inv.marked) {
        int r = notifier_call(&mm->notifiers, &f->inv, notifier_how[how]);
        if (r)
            return r;
    }
    if (how >= LAND_FOR_FAULT)
        mm_remaps_wait(mm);
    else if (__atomic_load_n(&mm->remaps_pending, __ATOMIC_SEQ_CST)) /* one that came meanwhile */
        return -EAGAIN;
    return 0;
}

/* Lets the driver copy all pages of the flight into a slot. */
static int copy_to_slot(struct flight *f, char *slot)
{
    struct hmm_dma v[64];
    unsigned n = 0;
    for (unsigned i = f->first; i < f->end;) {
        if (f->how[i] != FLIGHT_COPY) {
            i++;
            continue;
        }
        unsigned k = 1;
        while (i + k < f->end && f->how[i + k] == FLIGHT_COPY && f->page[i + k] == f->page[i] + k)
            k++;
        v[n++] = (struct hmm_dma){.page = f->page[i], .pages = k, .host = slot + ((size_t)i << os_page_shift())};
        i += k;
        if (n == ARRAY_LEN(v) || i >= f->end) {
            int r = driver_copy(f, HMM_DMA_TO_SYSTEM, v, n);
            if (r)
                return r;
            n = 0;
        }
    }
    return n ? driver_copy(f, HMM_DMA_TO_SYSTEM, v, n) : 0;
}

static int through_slot(struct mm *mm, struct flight *f)
{
    enum staging_kind kind = f->huge ? STAGING_IN_HUGE : STAGING_IN;
    char *slot = staging_get(mm, kind, true);
    if (!slot)
        return -ENOMEM;
    unsigned pages = f->end - f->first;
    staging_account(pages);
    int r = copy_to_slot(f, slot);
    if (!r)
        r = put_home(mm, f, (struct put_source){.slot = slot}, true);
    staging_put(mm, kind, slot, f->huge);
    staging_account(-(int64_t)pages);
    return r;
}

static int copy_home(struct mm *mm, struct flight *f, bool blockable)
{
    char *map = f->dev->pagemap->desc.cpu_map;
    if (map && !f->huge)
        return put_home(mm, f, (struct put_source){.cpu_map = map}, blockable);
    return blockable ? through_slot(mm, f) : -EAGAIN;
}

/* Pages that were put, before free_done() forgets them. */
static unsigned count_done(const struct flight *f)
{
    unsigned n = 0;
    for (unsigned i = f->first; i < f->end; i++)
        n += f->how[i] == FLIGHT_DONE && f->home[i] != 0;
    return n;
}

/* What became of the pages is published; they wake, and their device pages are freed. */
static void finish(struct mm *mm, struct flight *f, int r, enum landing how)
{
    if (r) {
        stat_add(&mm->stats.rollbacks, 1);
        restore_entries(mm, f);
    }
    flight_end_invalidation(mm, f);
    if (r && how != LAND)
        wake_moved(mm, f);
    else
        wake_homes(mm, f);
    flight_arrived(mm, f);
    free_done(f);
    trim_window(mm, f);
}

int land_in_system(struct mm *mm, struct flight *f, enum landing how, struct hmm_migrate_result *res)
{
    struct hmm_migrate_result unread = {0};
    unsigned home = 0;
    bool blockable = how != LAND_AT_ONCE;
    res = res ? res : &unread;
    SEQ_POINT("to-system-departed");
    int r = quiesce(mm, f, how);
    SEQ_POINT("to-system-quiet");
    if (!r) {
        r = device_memory_is_lost(f->dev) && !mutate("lost-read") ? -ENODEV : copy_home(mm, f, blockable);
        home = count_done(f);
        if (r && device_memory_is_lost(f->dev))
            r = put_home(mm, f, (struct put_source){0}, blockable);
    }
    bool huge = f->huge && home == block_pages();
    finish(mm, f, r, how);
    stat_add(&mm->stats.pages_to_system, home);
    stat_add(&mm->stats.bytes_to_system, (uint64_t)home << os_page_shift());
    res->moved += home;
    if (huge && !r)
        res->huge += home;
    return r;
}

int land_as_poison(struct mm *mm, struct flight *f)
{
    int r = quiesce(mm, f, LAND_FOR_FAULT);
    if (!r)
        r = put_home(mm, f, (struct put_source){0}, true);
    finish(mm, f, r, LAND_FOR_FAULT);
    return r;
}
