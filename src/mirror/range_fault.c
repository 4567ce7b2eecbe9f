/* SPDX-License-Identifier: MIT */
/*
 * hmm_range_fault() (kernel: mm/hmm.c). Goes through the range mapping by mapping: watches it, looks at its pages, and brings the
 * first that is asked for and not there, together with its neighbours; then looks again from that page on. Ends when everything that
 * is asked for is there, or the sequence number has moved.
 *
 * While it runs, requests per page are kept in bits of the words that no answer uses, so that they can be given back after an error.
 */
#include <errno.h>

#include "base/error.h"
#include "debug/inject.h"
#include "migrate/migrate.h"
#include "mirror/look.h"
#include "mirror/mirror.h"

/* Are looked at, and made, in one go: between two, the sequence number is checked. */
#define WINDOW ((uintptr_t)256 << 20)
#define POPULATE ((uintptr_t)16 << 20)
#define TRIES_MAX 64 /* for one page, without a step forward */
#define WATCH_TRIES 200

#define REQUESTS (HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)

enum need { NEED_NOTHING, NEED_READ, NEED_WRITE };

/* ---- requests ---- */

/* What is asked of a page whose word is given. */
static uint64_t request_of(const struct look *l, uint64_t pfn)
{
    return l->range->default_flags | (l->kept ? (pfn & PFN_KEPT) << KEPT_SHIFT : 0);
}

/* What is missing to it. A request to write counts only together with one to fault, as in the kernel. */
static enum need need_of(const struct look *l, uint64_t pfn)
{
    uint64_t request = request_of(l, pfn);
    if (!(request & HMM_PFN_REQ_FAULT))
        return NEED_NOTHING;
    if (request & HMM_PFN_REQ_WRITE && !(pfn & HMM_PFN_WRITE))
        return NEED_WRITE;
    return pfn & HMM_PFN_VALID ? NEED_NOTHING : NEED_READ;
}

/* What would be needed if the page were not there. */
static enum need wanted(const struct look *l, uint64_t pfn)
{
    return need_of(l, l->kept ? pfn & PFN_KEPT : 0);
}

static bool any_wanted(const struct look *l, uintptr_t start, uintptr_t end)
{
    if (!l->kept)
        return wanted(l, 0) != NEED_NOTHING;
    for (uintptr_t at = start; at < end; at += os_page_size())
        if (wanted(l, *look_pfn(l, at)) != NEED_NOTHING)
            return true;
    return false;
}

/* The first page of [start, end) that needs something, or end. */
static uintptr_t first_needy(const struct look *l, uintptr_t start, uintptr_t end)
{
    if (!l->kept && need_of(l, l->common) == NEED_NOTHING)
        return end; /* nobody */
    while (start < end && need_of(l, *look_pfn(l, start)) == NEED_NOTHING)
        start += os_page_size();
    return start;
}

/* Requests of the caller's words, in place of whatever else is in them. */
static void keep_requests(struct look *l)
{
    struct hmm_fault_range *r = l->range;
    uint64_t mask = r->pfn_flags_mask & REQUESTS;
    l->kept = mask != 0 && !(r->flags & HMM_RANGE_DEVICE_ONLY);
    if (l->kept)
        for (uint64_t *p = r->pfns, *end = look_pfn(l, r->end); p < end; p++)
            *p = (*p & mask) >> KEPT_SHIFT;
}

static void give_requests_back(const struct look *l, bool failed)
{
    if (!l->kept)
        return;
    for (uint64_t *p = l->range->pfns, *end = look_pfn(l, l->range->end); p < end; p++)
        *p = failed ? (*p & PFN_KEPT) << KEPT_SHIFT : *p & ~PFN_KEPT;
}

/* ---- bringing ---- */

/* The populated pages may be more than were missing: those between, which were asked for and are there. */
static uintptr_t populate_end(const struct look *l, uintptr_t addr, uintptr_t end, enum need need)
{
    uintptr_t last = addr + os_page_size();
    end = end - addr > POPULATE ? addr + POPULATE : end;
    for (uintptr_t at = last; at < end; at += os_page_size()) {
        uint64_t pfn = *look_pfn(l, at);
        if (wanted(l, pfn) != need || pfn & HMM_PFN_DEVICE)
            break;
        if (need_of(l, pfn) != NEED_NOTHING)
            last = at + os_page_size();
    }
    return last;
}

/* 0: look again. */
static int populate(const struct look *l, uintptr_t addr, uintptr_t end, enum need need)
{
    struct os_vma vma;
    end = populate_end(l, addr, end, need);
    int r = os->advise((void *)addr, end - addr, need == NEED_WRITE ? OS_ADVISE_POPULATE_WRITE : OS_ADVISE_POPULATE_READ);
    switch (r) {
    case -EINTR:
    case -EAGAIN: return 0;
    case -EINVAL: return -EFAULT; /* of a kind that cannot be given: memory of a device file */
    case -ENOMEM:
        /* Also says that the mapping has gone; then the next look finds out what is there instead. */
        if (os->vma_query(l->dev->mm->maps_fd, addr, &vma) || vma.start > addr || vma.end < end)
            return 0;
        return -ENOMEM;
    default: return r;
    }
}

/* Brings the page at addr, which is asked for and not there, and its neighbours below end. 0: look again. */
static int bring(const struct look *l, const struct os_vma *vma, uintptr_t addr, uintptr_t end)
{
    struct mm *mm = l->dev->mm;
    enum need need = need_of(l, *look_pfn(l, addr));
    uintptr_t same_end;
    uint32_t landings;
    if (need == NEED_WRITE && !vma->write)
        return -EPERM;
    switch (look_at_entry(l, addr, end, &same_end, &landings)) {
    case OBSTACLE_HERE: return 0; /* it has just come */
    case OBSTACLE_LOST: return -EHWPOISON;
    case OBSTACLE_FLIGHT: flight_wait(mm, landings); return 0;
    case OBSTACLE_OTHER_DEVICE: return migrate_range_to_system(mm, NULL, addr, same_end, NULL);
    default: return populate(l, addr, same_end, need);
    }
}

/* ---- one mapping ---- */

static bool is_watched(struct mm *mm, uintptr_t addr)
{
    rwlock_read_lock(&mm->as);
    const struct region *g = region_find(&mm->regions, addr);
    bool watched = g && g->state == REGION_PROVED;
    rwlock_read_unlock(&mm->as);
    return watched;
}

/* Makes changes of the mapping known to notifiers, as far as that goes; *end shrinks to where the answer holds. 0: they are; -EOPNOTSUPP: only
 * the wrappers tell. */
static int watch(const struct look *l, uintptr_t addr, uintptr_t *end)
{
    struct mm *mm = l->dev->mm;
    enum watch_how how = l->range->flags & HMM_RANGE_REGISTER ? WATCH_REGISTER : WATCH_FREE;
    for (unsigned tries = 0; tries < WATCH_TRIES && !mutate("range-watch"); tries++) {
        uintptr_t part_end = *end;
        int r = mm_watch(mm, addr, *end, how, &part_end);
        if (r == -EAGAIN) {
            mm_backoff(mm, tries);
            continue;
        }
        if (r == -ENOENT) /* gone since it was looked at: look again */
            return -EAGAIN;
        if (r && r != -EOPNOTSUPP && r != -EBUSY)
            return r;
        *end = part_end;
        return r ? -EOPNOTSUPP : 0;
    }
    return mutate("range-watch") ? 0 : -EBUSY;
}

/* Until somebody told of it, the mapping may have become another one, unseen. */
static int look_again(const struct look *l, const struct os_vma *seen, uintptr_t addr, uintptr_t end)
{
    struct os_vma now;
    int r = os->vma_query(l->dev->mm->maps_fd, addr, &now);
    bool same = !r && now.start <= addr && now.end >= end && now.read == seen->read && now.write == seen->write &&
                now.shared == seen->shared && now.anonymous == seen->anonymous && now.special == seen->special &&
                now.page_size == seen->page_size;
    return same || mutate("range-registered") ? 0 : -EAGAIN;
}

/* Nobody changes the mapping from now on without the notifier being told, where that can be had. */
static int settle(const struct look *l, const struct os_vma *vma, uintptr_t addr, uintptr_t *end, bool watched)
{
    int r = watch(l, addr, end);
    if (r == -EOPNOTSUPP)
        return 0;
    return r || watched ? r : look_again(l, vma, addr, *end);
}

/* [start, end) has no page that a device could have. */
static int refuse(const struct look *l, uintptr_t start, uintptr_t end)
{
    if (any_wanted(l, start, end))
        return -EFAULT;
    look_fill(l, start, end, HMM_PFN_ERROR);
    return 0;
}

/* Goes from *at on as far as one look goes, or to the page to look at again. */
static int step(struct look *l, uintptr_t *at)
{
    struct os_vma vma;
    l->at = *at;
    uintptr_t start = *at, end = l->range->end - start < WINDOW ? l->range->end : start + WINDOW;
    bool watched = is_watched(l->dev->mm, start); /* before the mapping is looked at */
    int r = os->vma_query(l->dev->mm->maps_fd, start, &vma);
    if (r && r != -ENOENT)
        return r;
    if (r || vma.start > start) {
        *at = r || vma.start > end ? end : vma.start;
        return refuse(l, start, *at);
    }
    end = vma.end < end ? vma.end : end;
    if (!vma.read || vma.special) {
        *at = end;
        return refuse(l, start, end);
    }
    SEQ_POINT("range-queried");
    r = settle(l, &vma, start, &end, watched);
    SEQ_POINT("range-watched");
    r = r ? r : look_at_mapping(l, &vma, start, end);
    if (r)
        return r == -EAGAIN ? 0 : r;
    l->at = *at = first_needy(l, start, end);
    SEQ_POINT("range-looked");
    return *at < end ? bring(l, &vma, *at, end) : 0;
}

static bool is_stale(const struct hmm_fault_range *r)
{
    return hmm_notifier_read_retry(r->notifier, r->notifier_seq) && !mutate("range-retry");
}

static int go_through(struct look *l)
{
    unsigned tries = 0;
    int r = 0;
    for (uintptr_t at = l->range->start; !r && at < l->range->end;) {
        uintptr_t before = at;
        if (is_stale(l->range) || ++tries > TRIES_MAX)
            return -EBUSY;
        r = step(l, &at);
        if (at != before)
            tries = 0;
    }
    return r;
}

/* ---- the call ---- */

static int check(const struct hmm_device *dev, const struct hmm_fault_range *r)
{
    if (!r || r->size < sizeof(*r))
        return hmm_fail(-EINVAL, "hmm_range_fault: set size to sizeof(struct hmm_fault_range)");
    if (r->flags & ~(HMM_RANGE_DEVICE_ONLY | HMM_RANGE_REGISTER))
        return hmm_fail(-EINVAL, "hmm_range_fault: flags %#x are not known", r->flags);
    if (r->start >= r->end || (r->start | r->end) & (os_page_size() - 1))
        return hmm_fail(-EINVAL, "hmm_range_fault: [%#lx, %#lx) is empty, reversed or not aligned to pages",
                        (unsigned long)r->start, (unsigned long)r->end);
    if (!r->pfns)
        return hmm_fail(-EINVAL, "hmm_range_fault: pfns is NULL");
    if (r->default_flags & ~REQUESTS)
        return hmm_fail(-EINVAL, "hmm_range_fault: default_flags %#llx are not requests", (unsigned long long)r->default_flags);
    if (!r->notifier || __atomic_load_n(&r->notifier->dev, __ATOMIC_ACQUIRE) != dev)
        return hmm_fail(-EINVAL, "hmm_range_fault: the notifier is not inserted for device %s", dev->driver->name);
    if (r->notifier->start > r->start || r->notifier->end < r->end)
        return hmm_fail(-EINVAL, "hmm_range_fault: the notifier for [%#lx, %#lx) does not cover [%#lx, %#lx)",
                        (unsigned long)r->notifier->start, (unsigned long)r->notifier->end, (unsigned long)r->start,
                        (unsigned long)r->end);
    return 0;
}

static int explain(const struct look *l, int r)
{
    unsigned long at = l->at, start = l->range->start, end = l->range->end;
    switch (r) {
    case 0: return 0;
    case -EBUSY:
        return hmm_fail(
            r, "hmm_range_fault: [%#lx, %#lx) changed meanwhile, or a page there is not to be had now; read_begin, and again",
            start, end);
    case -EFAULT:
        return hmm_fail(r, "hmm_range_fault: from %#lx on there is no page to read: nothing is mapped, or no right to it", at);
    case -EPERM: return hmm_fail(r, "hmm_range_fault: %#lx is mapped read-only; ask without HMM_PFN_REQ_WRITE", at);
    case -EHWPOISON: return hmm_fail(r, "hmm_range_fault: the only copy of the page at %#lx was lost with a device", at);
    default: return hmm_fail(r, "hmm_range_fault: at %#lx: %s", at, hmm_strerror(r));
    }
}

int mirror_range_fault(struct hmm_device *dev, struct hmm_fault_range *range)
{
    struct look l = {.dev = dev, .range = range};
    int r = check(dev, range);
    if (r)
        return r;
    keep_requests(&l);
    r = range->flags & HMM_RANGE_DEVICE_ONLY ? look_at_device(&l, range->start, range->end) : go_through(&l);
    /* What went wrong may have gone wrong because of the change. */
    if (is_stale(range))
        r = -EBUSY;
    give_requests_back(&l, r != 0);
    SEQ_POINT("snapshot-taken");
    return explain(&l, r);
}

/* After -EBUSY. Where nothing was invalidated a page is not to be had now (pinned on another device), and will not be at once. */
static void pause_a_little(const struct hmm_device *dev, const struct hmm_fault_range *range, unsigned *tries)
{
    bool changed = !range->notifier_seq || hmm_notifier_read_retry(range->notifier, range->notifier_seq);
    if (changed)
        *tries = 0;
    else if (!mutate("range-pause"))
        mm_backoff(dev->mm, (*tries)++);
}

int mirror_range_fault_timeout(struct hmm_device *dev, struct hmm_fault_range *range, int64_t timeout_ns)
{
    uint64_t deadline = os_now() + (uint64_t)timeout_ns;
    int r = check(dev, range);
    if (r)
        return r;
    unsigned tries = 0;
    for (int64_t left = timeout_ns;;) {
        range->notifier_seq = notifier_read_begin_timeout(&dev->mm->notifiers, range->notifier, left);
        r = range->notifier_seq ? mirror_range_fault(dev, range) : -EBUSY;
        if (r != -EBUSY)
            return r;
        pause_a_little(dev, range, &tries);
        left = timeout_ns < 0 ? -1 : (int64_t)(deadline - os_now());
        if (timeout_ns >= 0 && left <= 0)
            return hmm_fail(-ETIMEDOUT,
                            "hmm_range_fault: [%#lx, %#lx) did not stay as it is for %lld ms; ask again, or for less",
                            (unsigned long)range->start, (unsigned long)range->end, (long long)(timeout_ns / 1000000));
        r = check(dev, range); /* it may have been removed */
        if (r)
            return r;
    }
}
