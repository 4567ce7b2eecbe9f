/* SPDX-License-Identifier: MIT */
/*
 * Entries of a mirror: filled from core, emptied by invalidations, and handed out as runs. The argument stands in table.h.
 *
 * An invalidation empties first, then asks the driver: so a run that is handed out later is not of the old entries; and what was handed
 * out before is what the driver has to let go of. DMA mappings are taken back last, when the device has.
 */
#include "mirror/table.h"

#include <errno.h>
#include <stdio.h>

#include "base/alloc.h"
#include "base/error.h"
#include "debug/inject.h"
#include "notifier/running.h"

#define RESOLVE_TRIES 8 /* then the bus, which is right at any time */
#define FILL_TRIES 16

/* ---- entries; caller holds d->lock ------------------------------------------------------------------------------------- */

void mirror_set_entry(struct hmm_mirror_dir *d, unsigned i, uint64_t e)
{
    uint64_t old = d->entry[i];
    d->used += !!e - !!old;
    d->valid += !!(e & HMM_MIRROR_VALID) - !!(old & HMM_MIRROR_VALID);
    uint32_t dirty = d->dirty + !!(e & HMM_MIRROR_DIRTY) - !!(old & HMM_MIRROR_DIRTY);
    __atomic_store_n(&d->dirty, dirty, __ATOMIC_RELAXED);
    d->entry[i] = e;
}

void mirror_empty(struct hmm_mirror_dir *d, uintptr_t start, uintptr_t end, uint64_t keep)
{
    unsigned i, last;
    for (mirror_clip(d, start, end, &i, &last); i < last && d->used; i++) {
        uint64_t e = d->entry[i];
        if (e)
            mirror_set_entry(d, i, e & (keep | (e & ENTRY_MAPPED ? ENTRY_MAPPED | HMM_MIRROR_DEVICE | HMM_PFN_MASK : 0)));
    }
}

static void unmap_page(struct hmm_mirror_dir *d, unsigned i)
{
    uint64_t e = d->entry[i];
    if (!(e & ENTRY_MAPPED))
        return;
    if (d->m->ops.dma_unmap)
        d->m->ops.dma_unmap(d->m->priv, d->base + ((uintptr_t)i << os_page_shift()),
                            e & (ENTRY_RIGHTS | HMM_MIRROR_DIRTY | HMM_PFN_MASK));
    mirror_set_entry(d, i, e & HMM_MIRROR_DIRTY);
}

void mirror_unmap(struct hmm_mirror_dir *d, uintptr_t start, uintptr_t end)
{
    unsigned i, last;
    if (!d->origin)
        return;
    for (mirror_clip(d, start, end, &i, &last); i < last; i++)
        if (!(d->entry[i] & HMM_MIRROR_VALID))
            unmap_page(d, i);
}

/* What the driver makes of a page. A page that is mapped already keeps its mapping: the device may be using it. */
static uint64_t map_page(struct hmm_mirror_dir *d, unsigned i, uint64_t e)
{
    const struct hmm_mirror_ops *ops = &d->m->ops;
    uint64_t page = e & (HMM_MIRROR_DEVICE | HMM_PFN_MASK), bits = e & ~HMM_PFN_MASK;
    if (d->entry[i] & ENTRY_MAPPED && e & HMM_MIRROR_VALID && d->origin[i] == page)
        return bits | ENTRY_MAPPED | (d->entry[i] & HMM_PFN_MASK);
    unmap_page(d, i);
    if (!(e & HMM_MIRROR_VALID))
        return e;
    if (ops->dma_map && ops->dma_map(d->m->priv, d->base + ((uintptr_t)i << os_page_shift()), &e))
        return (bits & HMM_MIRROR_DIRTY) | ENTRY_REFUSED;
    d->origin[i] = page;
    return bits | ENTRY_MAPPED | (e & HMM_PFN_MASK);
}

/* The page that an entry is of, whatever dma_map() made of it. */
static uint64_t page_of(const struct hmm_mirror_dir *d, unsigned i)
{
    uint64_t e = d->entry[i];
    return e & ENTRY_MAPPED ? d->origin[i] : e & (HMM_MIRROR_DEVICE | HMM_PFN_MASK);
}

/*
 * What is mapped, and was not invalidated, stays, whatever core says now: runs of it are current, and the device may be using them. Core
 * may say something else of a page of system memory that came to this device, which its process address still reaches; and of one that
 * is about to leave, before the invalidation begins.
 */
static bool stays(const struct hmm_mirror_dir *d, unsigned i, uint64_t pfn, uint64_t seq)
{
    uint64_t e = d->entry[i], page = pfn & HMM_PFN_VALID ? pfn & (HMM_MIRROR_DEVICE | HMM_PFN_MASK) : UINT64_MAX;
    return e & HMM_MIRROR_VALID && e & ENTRY_MAPPED && d->current && d->filled == seq && page_of(d, i) != page &&
           !mutate("mirror-stays");
}

static void install(struct hmm_mirror_dir *d, const uint64_t *pfns, uint64_t seq)
{
    for (unsigned i = 0; i < block_pages(); i++) {
        uint64_t old = d->entry[i], e = old & HMM_MIRROR_DIRTY;
        if (stays(d, i, pfns[i], seq))
            continue;
        if (pfns[i] & HMM_PFN_VALID) {
            e |= pfns[i] & (ENTRY_RIGHTS | HMM_PFN_MASK);
            if (old & HMM_MIRROR_VALID && page_of(d, i) == (e & (HMM_MIRROR_DEVICE | HMM_PFN_MASK)))
                e |= old & HMM_MIRROR_SELECT;
        }
        mirror_set_entry(d, i, d->origin ? map_page(d, i, e) : e);
    }
    d->filled = seq;
    d->current = true;
    __atomic_fetch_add(&d->m->filled, 1, __ATOMIC_RELAXED);
}

/* ---- filling ----------------------------------------------------------------------------------------------------- */

static void wait_unchanging(struct hmm_mirror_dir *d)
{
    mutex_lock(&d->lock);
    d->waiters++;
    while (d->changing)
        mutex_wait(&d->lock, &d->changed, d->changed);
    d->waiters--;
    mutex_unlock(&d->lock);
}

static int fill(struct hmm_mirror_dir *d, uint64_t *pfns)
{
    for (unsigned i = 0; i < FILL_TRIES; i++) {
        wait_unchanging(d);
        uint64_t seq = hmm_notifier_read_begin(&d->notifier);
        struct hmm_fault_range range = {
            .size = sizeof(range),
            .flags = d->m->flags & HMM_MIRROR_SYSTEM ? 0 : HMM_RANGE_DEVICE_ONLY,
            .notifier = &d->notifier,
            .notifier_seq = seq,
            .start = d->base,
            .end = d->base + HMM_MIRROR_DIR,
            .pfns = pfns,
        };
        int r = hmm_range_fault(d->m->dev, &range);
        if (r == -EBUSY)
            continue;
        if (r < 0)
            return r;
        mutex_lock(&d->lock);
        bool stale = d->changing || hmm_notifier_read_retry(&d->notifier, seq);
        if (stale && mutate("mirror-retry")) {
            stale = false;
            seq = hmm_notifier_seq(&d->notifier);
        }
        if (!stale)
            install(d, pfns, seq);
        mutex_unlock(&d->lock);
        if (!stale)
            return 0;
    }
    return -EAGAIN;
}

int mirror_fill(struct hmm_mirror_dir *d)
{
    uint64_t *pfns = mem_alloc(DIR_PAGES_MAX * sizeof(*pfns));
    if (!pfns)
        return hmm_fail(-ENOMEM, "mirror '%s': no memory to read a directory", d->m->ops.name);
    int r = fill(d, pfns);
    mem_free(pfns, DIR_PAGES_MAX * sizeof(*pfns));
    return r;
}

/* ---- looking up -------------------------------------------------------------------------------------------------- */

enum look { LOOK_FOUND, LOOK_MISSING, LOOK_STALE, LOOK_REFUSED };

/* What of an entry a run depends on. With dirty tracking only what is dirty may be written, and a run for reading writes nothing. */
static uint64_t key_of(const struct hmm_mirror_dir *d, unsigned i, bool write)
{
    uint64_t e = d->entry[i], key = e & (ENTRY_RIGHTS | HMM_PFN_MASK);
    bool hide = d->m->flags & HMM_MIRROR_TRACK_DIRTY && (!write || !(e & HMM_MIRROR_DIRTY));
    return hide ? key & ~HMM_MIRROR_WRITE : key;
}

static bool follows(const struct hmm_mirror_dir *d, unsigned i, unsigned k, bool write)
{
    uint64_t key = key_of(d, i, write);
    return key & HMM_MIRROR_VALID && key_of(d, k, write) == key + 1;
}

static void make_run(struct hmm_mirror_dir *d, unsigned at, bool write, uint32_t gate, struct hmm_mirror_run *run)
{
    unsigned first = at, last = at;
    while (first > 0 && follows(d, first - 1, first, write))
        first--;
    while (last + 1 < block_pages() && follows(d, last, last + 1, write))
        last++;
    uint64_t key = key_of(d, first, write);
    *run = (struct hmm_mirror_run){
        .start = d->base + ((uintptr_t)first << os_page_shift()),
        .end = d->base + ((uintptr_t)(last + 1) << os_page_shift()),
        .page = key & HMM_PFN_MASK,
        .flags = key & ENTRY_RIGHTS,
        .seq = &d->notifier.seq,
        .seq_seen = d->filled,
        .generation = &d->generation,
        .generation_seen = __atomic_load_n(&d->generation, __ATOMIC_RELAXED),
        .gate = gate,
    };
    __atomic_store_n(&d->given, d->given + 1, __ATOMIC_RELAXED);
}

static enum look look(struct hmm_mirror_dir *d, uintptr_t addr, bool write, struct hmm_mirror_run *run)
{
    unsigned at = block_index(addr);
    uint32_t gate = __atomic_load_n(d->m->dev->mm->gate, __ATOMIC_SEQ_CST); /* before the sequence number */
    enum look found = LOOK_STALE;
    struct hmm_mirror_run answer;
    mutex_lock(&d->lock);
    if (!d->current || d->changing || d->filled != hmm_notifier_seq(&d->notifier))
        goto unlock;
    uint64_t e = d->entry[at];
    found = e & ENTRY_REFUSED ? LOOK_REFUSED : LOOK_MISSING;
    if (!(e & HMM_MIRROR_VALID) || (write && !(e & HMM_MIRROR_WRITE)))
        goto unlock;
    if (write && d->m->flags & HMM_MIRROR_TRACK_DIRTY && !mutate("mirror-dirty-mark"))
        mirror_set_entry(d, at, e | HMM_MIRROR_DIRTY);
    make_run(d, at, write, gate, &answer);
    found = LOOK_FOUND;
unlock:
    mutex_unlock(&d->lock);
    if (found == LOOK_FOUND)
        *run = answer;
    return found;
}

/* The page comes to where it has an address, and no further. */
static int fault_system(struct hmm_mirror_dir *d, uintptr_t addr, unsigned flags)
{
    uint64_t pfn;
    struct hmm_fault_range range = {
        .size = sizeof(range),
        .notifier = &d->notifier,
        .start = addr & ~(uintptr_t)(os_page_size() - 1),
        .pfns = &pfn,
        .default_flags = HMM_PFN_REQ_FAULT | (flags & HMM_FAULT_WRITE ? HMM_PFN_REQ_WRITE : 0),
    };
    range.end = range.start + os_page_size();
    int r = hmm_range_fault_timeout(d->m->dev, &range, HMM_RANGE_DEFAULT_TIMEOUT_NS);
    return r == -EPERM ? -EACCES : r == -ETIMEDOUT ? 1 : r;
}

static int fault(struct hmm_mirror_dir *d, uintptr_t addr, unsigned flags)
{
    struct hmm_mirror *m = d->m;
    if (m->flags & HMM_MIRROR_SYSTEM)
        return fault_system(d, addr, flags);
    if (!m->ops.fault)
        return mirror_device_fault(m->dev, addr, flags);
    struct mirror_inside inside;
    mirror_inside_begin(&inside, m);
    int r = m->ops.fault(m->priv, addr, flags);
    mirror_inside_end(&inside);
    return r;
}

/* No translation: 1 or the error; 0: found. Caller uses d. */
static int resolve(struct hmm_mirror_dir *d, uintptr_t addr, unsigned flags, struct hmm_mirror_run *run)
{
    struct hmm_mirror *m = d->m;
    bool write = flags & HMM_FAULT_WRITE;
    for (unsigned i = 0; i < RESOLVE_TRIES; i++) {
        enum look found = look(d, addr, write, run);
        if (found == LOOK_FOUND)
            return 0;
        if (found == LOOK_REFUSED)
            return 1;
        if (mirror_is_ending(m))
            return -ENODEV;
        int r = found == LOOK_MISSING ? fault(d, addr, flags) : 0;
        if (r)
            return r;
        if (mirror_fill(d))
            break;
    }
    return 1;
}

int hmm_mirror_resolve(struct hmm_mirror *m, uintptr_t addr, unsigned flags, struct hmm_mirror_run *run)
{
    int r = mirror_enter(m);
    if (r)
        return r;
    struct hmm_mirror_dir *d = mirror_dir_find(m, addr, true);
    r = d ? resolve(d, addr, flags, run) : 1;
    if (d)
        mirror_dir_drop(d);
    mirror_leave(m);
    return r;
}

int hmm_mirror_lookup(struct hmm_mirror *m, uintptr_t addr, unsigned flags, struct hmm_mirror_run *run)
{
    int r = mirror_enter(m);
    if (r)
        return r;
    struct hmm_mirror_dir *d = mirror_dir_find(m, addr, false);
    r = d && look(d, addr, flags & HMM_FAULT_WRITE, run) == LOOK_FOUND ? 0 : -ENOENT;
    if (d)
        mirror_dir_drop(d);
    mirror_leave(m);
    return r;
}

/* ---- invalidation ------------------------------------------------------------------------------------------------ */

/* Asks the driver. */
static int tell(struct hmm_mirror *m, const struct hmm_mirror_change *change)
{
    struct mirror_inside inside;
    char who[128];
    mirror_inside_begin(&inside, m);
    int r = m->ops.invalidate(m->priv, change);
    mirror_inside_end(&inside);
    if (answer_is_right(change->event, r))
        return r;
    snprintf(who, sizeof(who), "invalidate %p of the mirror '%s'", (void *)(uintptr_t)m->ops.invalidate, m->ops.name);
    return answer_is_wrong(change->event, r, who);
}

/* Locks d, or says -EAGAIN where it must not wait. */
static int lock_for(struct hmm_mirror_dir *d, const struct hmm_event *event)
{
    if (event->blockable)
        mutex_lock(&d->lock);
    else if (!mutex_trylock(&d->lock))
        return -EAGAIN;
    return 0;
}

/* Dirty bits go with the content, not with the place. */
static uint64_t kept_by(enum hmm_event_type type)
{
    return type == HMM_EVENT_UNMAP || type == HMM_EVENT_CLEAR ? 0 : HMM_MIRROR_DIRTY;
}

/* The range as far as it is the directory's, which it is as long as the notifier is in the tree. */
static int invalidate(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct hmm_mirror_dir *d = container_of(n, struct hmm_mirror_dir, notifier);
    struct hmm_mirror_change change = {
        .start = event->start > n->start ? event->start : n->start,
        .end = event->end < n->end ? event->end : n->end,
        .event = event,
        .word = &d->word,
    };
    if (lock_for(d, event))
        return -EAGAIN;
    if (!mutate("mirror-empty"))
        mirror_empty(d, change.start, change.end, kept_by(event->type));
    change.given = d->given;
    mutex_unlock(&d->lock);
    int r = tell(d->m, &change);
    if (r || !d->origin)
        return r;
    if (lock_for(d, event))
        return -EAGAIN;
    mirror_unmap(d, change.start, change.end);
    mutex_unlock(&d->lock);
    return 0;
}

const struct hmm_notifier_ops mirror_notifier_ops = {.invalidate = invalidate};

int mirror_change_begin(struct hmm_mirror_dir *d, uintptr_t start, uintptr_t end, enum hmm_event_type type, bool brief)
{
    struct hmm_event event = {.start = start, .end = end, .type = type, .blockable = true, .brief = brief};
    struct hmm_mirror_change change = {.start = start, .end = end, .event = &event, .word = &d->word};
    mutex_lock(&d->lock);
    d->changing++;
    if (!mutate("mirror-generation"))
        __atomic_fetch_add(&d->generation, 1, __ATOMIC_SEQ_CST);
    change.given = d->given;
    mutex_unlock(&d->lock);
    return tell(d->m, &change);
}

void mirror_change_end(struct hmm_mirror_dir *d)
{
    mutex_lock(&d->lock);
    if (--d->changing == 0 && d->waiters) {
        __atomic_fetch_add(&d->changed, 1, __ATOMIC_RELEASE);
        mutex_wake_all(&d->changed);
    }
    mutex_unlock(&d->lock);
}
