/* SPDX-License-Identifier: MIT */
/* Where pages are, and what was done. */
#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "inspect/inspect.h"
#include "migrate/staging.h"
#include "mm/hold.h"
#include "pin/pin.h"

#define REGIONS 64

static void add_present(struct hmm_page_info *pages, uintptr_t start, const struct os_region *v)
{
    for (uintptr_t a = v->start; a < v->end; a += os_page_size()) {
        struct hmm_page_info *p = &pages[(a - start) >> os_page_shift()];
        p->state = HMM_PAGE_SYSTEM;
        p->huge = (v->flags & OS_PG_HUGE) != 0;
    }
}

static int scan_present(struct mm *mm, uintptr_t start, uintptr_t end, struct hmm_page_info *pages)
{
    struct os_region v[REGIONS];
    for (uintptr_t at = start, walked; at < end;) {
        int n = os->pagemap_scan(mm->pagemap_fd, at, end, v, REGIONS, &walked);
        if (n < 0)
            return n;
        for (int i = 0; i < n; i++)
            add_present(pages, start, &v[i]);
        at = walked;
    }
    return 0;
}

static void add_entry(struct hmm_page_info *p, entry_t e, hmm_dev (*handle)(const struct hmm_device *))
{
    static const uint8_t state[] = {
        [ENTRY_DEVICE] = HMM_PAGE_DEVICE,
        [ENTRY_FLIGHT] = HMM_PAGE_MIGRATING,
        [ENTRY_POISON] = HMM_PAGE_POISONED,
    };
    p->state = state[entry_kind(e)];
    p->huge = 0;
    if (p->state != HMM_PAGE_DEVICE)
        return;
    const struct hmm_device *dev = pagemap_by_id(entry_id(e))->dev;
    if (device_memory_is_lost(dev))
        p->state = HMM_PAGE_POISONED; /* not yet in the CPU's page table, but nothing else will come of it */
    else
        p->device = handle(dev);
}

struct pinned {
    struct hmm_page_info *pages;
    uintptr_t start;
};

static void mark_pinned(uintptr_t start, uintptr_t end, void *arg)
{
    const struct pinned *p = arg;
    for (uintptr_t a = start; a < end; a += os_page_size())
        p->pages[(a - p->start) >> os_page_shift()].pinned = 1;
}

int inspect_query(struct mm *mm, uintptr_t start, uintptr_t end, struct hmm_page_info *pages,
                  hmm_dev (*handle)(const struct hmm_device *))
{
    unsigned n = (end - start) >> os_page_shift();
    memset(pages, 0, n * sizeof(*pages));
    rwlock_read_lock(&mm->as);
    struct block *b = pagetable_find(&mm->pt, start);
    if (b)
        mutex_lock(&b->lock);
    int r = scan_present(mm, start, end, pages);
    for (unsigned i = 0; b && i < n; i++) {
        entry_t e = block_entry(b, block_index(start) + i);
        if (e)
            add_entry(&pages[i], e, handle);
    }
    hold_each(start, end, mark_pinned, &(struct pinned){pages, start});
    if (b)
        mutex_unlock(&b->lock);
    rwlock_read_unlock(&mm->as);
    return r;
}

static uint64_t read_counter(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

void inspect_stats(struct mm *mm, struct hmm_stats *s)
{
#define COPY(name) s->name = read_counter(&mm->stats.name)
    COPY(cpu_faults);
    COPY(cpu_faults_slow);
    COPY(zero_filled);
    COPY(device_faults);
    COPY(pages_to_device);
    COPY(pages_to_system);
    COPY(pages_cleared);
    COPY(bytes_to_device);
    COPY(bytes_to_system);
    COPY(huge_to_device);
    COPY(huge_to_system);
    COPY(evicted);
    COPY(events_unmap);
    COPY(events_remove);
    COPY(events_remap);
    COPY(dropped);
    COPY(retries);
    COPY(rollbacks);
    COPY(pinned);
    COPY(events_fork);
    COPY(calls_unmap);
    COPY(calls_remove);
    COPY(calls_remap);
    COPY(calls_protect);
    COPY(calls_fork);
    COPY(calls_release);
    COPY(forks);
    COPY(pages_to_children);
    COPY(poisoned);
    COPY(limited);
    COPY(transit_pages);
#undef COPY
    s->invalidations = read_counter(&mm->notifiers.callbacks);
    s->invalidations_refused = read_counter(&mm->notifiers.refused);
    s->invalidation_ns = read_counter(&mm->notifiers.callback_ns);
    s->mirrored_bytes = read_counter(&mm->notifiers.bytes);
    s->device_pages = pagemap_total_used();
    s->limit_bytes = pagemap_total_limit() << os_page_shift();
    s->metadata_bytes = read_counter(&mm->pt.bytes);
    s->blocks = read_counter(&mm->pt.blocks);
    s->staging_bytes = staging_bytes();
    s->pins = pins_count();
    s->pins_dirty = pins_dirty();
}
