/* SPDX-License-Identifier: MIT */
/* See mirror.h. */
#include "mirror/mirror.h"

#include <errno.h>

#include "migrate/migrate.h"
#include "policy/policy.h"
#include "reclaim/reclaim.h"

#define FAULT_TRIES 32
#define REFUSED_MAX 3 /* times that the page was busy: no room, or somebody was quicker each time */

/* What the CPU may do at addr, the device may do. 0: memory that can migrate; 1: it can be reached, but stays. */
static int check_access(struct mm *mm, uintptr_t addr, unsigned flags, struct os_vma *vma)
{
    int r = os->vma_query(mm->maps_fd, addr, vma);
    if (r && r != -ENOENT)
        return r;
    if (r || vma->start > addr)
        return -EFAULT;
    if (!vma->read || (flags & HMM_FAULT_WRITE && !vma->write))
        return -EACCES;
    return vma->anonymous && !vma->shared && vma->write && !vma->exec && !vma->stack && !vma->special ? 0 : 1;
}

static unsigned pages_on_device(struct mm *mm, uintptr_t addr)
{
    struct block *b = pagetable_find(&mm->pt, addr);
    if (!b)
        return 0;
    mutex_lock(&b->lock);
    unsigned n = b->on_device;
    mutex_unlock(&b->lock);
    return n;
}

static bool is_on(struct hmm_device *dev, entry_t e)
{
    return entry_kind(e) == ENTRY_DEVICE && entry_id(e) == dev->pagemap->id;
}

static bool maps_huge(struct mm *mm, uintptr_t addr)
{
    struct os_region v;
    uintptr_t base = addr & BLOCK_MASK, walked;
    return os->pagemap_scan(mm->pagemap_fd, base, base + OS_BLOCK_SIZE, &v, 1, &walked) == 1 && v.flags & OS_PG_HUGE;
}

/* The neighbours to bring along, clipped to the mapping. True: the page is there already. */
static bool choose_window(struct hmm_device *dev, uintptr_t addr, const struct os_vma *vma, struct window *w)
{
    struct mm *mm = dev->mm;
    struct policy_device_fault in = {
        .pages = block_pages(),
        .page = block_index(addr),
        .device_pages = pagemap_capacity(dev->pagemap),
        .granule = pagemap_granule(dev->pagemap) >> os_page_shift(),
    };
    bool there = false;
    rwlock_read_lock(&mm->as);
    struct block *b = pagetable_find(&mm->pt, addr);
    if (b) {
        mutex_lock(&b->lock);
        there = is_on(dev, block_entry(b, in.page));
        in.on_device = b->on_device;
        lru_touch(mm, b);
        mutex_unlock(&b->lock);
    }
    if (addr > OS_BLOCK_SIZE)
        in.previous = pages_on_device(mm, addr - OS_BLOCK_SIZE);
    rwlock_read_unlock(&mm->as);
    in.huge = in.on_device == 0 && maps_huge(mm, addr);
    struct policy_range r = policy_device_fault(&in);
    uintptr_t base = addr & BLOCK_MASK;
    w->start = base + ((uintptr_t)r.first << os_page_shift());
    w->end = base + ((uintptr_t)r.end << os_page_shift());
    if (w->start < vma->start)
        w->start = vma->start;
    if (w->end > vma->end)
        w->end = vma->end;
    return there;
}

enum place { PLACE_SYSTEM, PLACE_DEVICE, PLACE_TRANSIT, PLACE_NOWHERE };

static enum place place_by_entry(struct hmm_device *dev, entry_t e)
{
    switch (entry_kind(e)) {
    case ENTRY_DEVICE: return is_on(dev, e) ? PLACE_DEVICE : PLACE_SYSTEM;
    case ENTRY_FLIGHT: return PLACE_TRANSIT;
    case ENTRY_POISON: return PLACE_NOWHERE;
    default: return PLACE_SYSTEM;
    }
}

static enum place place_of(struct hmm_device *dev, uintptr_t addr, uint32_t *landings)
{
    struct mm *mm = dev->mm;
    enum place place = PLACE_SYSTEM;
    rwlock_read_lock(&mm->as);
    struct block *b = pagetable_find(&mm->pt, addr);
    if (b) {
        mutex_lock(&b->lock);
        place = place_by_entry(dev, block_entry(b, block_index(addr)));
        *landings = __atomic_load_n(&mm->landings, __ATOMIC_SEQ_CST);
        mutex_unlock(&b->lock);
    }
    rwlock_read_unlock(&mm->as);
    return place;
}

bool mirror_is_poisoned(struct hmm_device *dev, uintptr_t addr)
{
    uint32_t unused;
    return place_of(dev, addr & ~(uintptr_t)(os_page_size() - 1), &unused) == PLACE_NOWHERE;
}

/*
 * Another engine, or a migration, may be moving the page at the same time: its landing is waited for, and the page looked for
 * again. It stays in system memory where it was really refused, and where the migration failed: the bus needs neither memory nor a
 * copy by the driver.
 */
int mirror_device_fault(struct hmm_device *dev, uintptr_t addr, unsigned flags)
{
    struct os_vma vma;
    struct window w;
    addr &= ~(uintptr_t)(os_page_size() - 1);
    stat_add(&dev->mm->stats.device_faults, 1);
    unsigned refused = 0;
    for (unsigned tries = 0; tries < FAULT_TRIES; tries++) {
        uint32_t landings;
        int r = check_access(dev->mm, addr, flags, &vma);
        if (r < 0)
            return r;
        if (r) /* what came before the protection changed is there for reading, and stays */
            return place_of(dev, addr, &landings) != PLACE_DEVICE;
        if (device_is_lost(dev))
            return mirror_is_poisoned(dev, addr) ? -EHWPOISON : 1;
        if (choose_window(dev, addr, &vma, &w))
            return 0;
        struct hmm_migrate_result res = {0};
        r = reclaim_migrate_to_device(dev->mm, dev, w.start, w.end, &res);
        enum place place = place_of(dev, addr, &landings);
        if (place == PLACE_NOWHERE)
            return -EHWPOISON;
        if (r)
            return 1;
        if (place == PLACE_DEVICE)
            return 0;
        if (place == PLACE_TRANSIT)
            flight_wait(dev->mm, landings);
        else if (res.busy == 0 || ++refused >= REFUSED_MAX)
            return 1;
    }
    return 1;
}
