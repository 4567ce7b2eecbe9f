/* SPDX-License-Identifier: MIT */
/*
 * What is given back: a region of which nothing is away is unregistered as a whole, so that the program's first touches are the
 * kernel's own again (design fact 15). Where a notifier overlaps it stays registered for its events, in WP mode, which costs no faults.
 *
 * An unread event means that something else may stand there by now: a remap may have brought missing pages, and without MISSING mode
 * they would turn into zeros. Then the region stays, and is looked at again later. It is looked for directly before each change; one
 * that came in between is seen afterwards, and the registration taken again at once: what is left to chance is two adjacent system calls.
 */
#include <errno.h>

#include "debug/inject.h"
#include "mm/arm.h"
#include "mm/event.h"

/* Something of [start, end) in the block has an entry. */
static bool block_has(struct block *b, uintptr_t start, uintptr_t end)
{
    unsigned i = block_first(b, start), stop = block_behind(b, end);
    mutex_lock(&b->lock);
    bool has = b->used && stop - i == block_pages();
    for (; i < stop && b->used && !has; i++)
        has = block_entry(b, i) != 0;
    mutex_unlock(&b->lock);
    return has;
}

/* The first block of [start, end) that has something of it, or NULL. */
static struct block *first_away(struct mm *mm, uintptr_t start, uintptr_t end)
{
    struct block *b = pagetable_next(&mm->pt, start, end);
    while (b && !block_has(b, start, end))
        b = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, end);
    return b;
}

/* The search begins where something was last: a region is as large as its mapping, and is asked for at each landing. */
bool mm_is_away(struct mm *mm, struct region *r)
{
    uintptr_t hint = __atomic_load_n(&r->hint, __ATOMIC_RELAXED);
    if (!r->missing)
        return false;
    if (hint <= r->start || hint >= r->end)
        hint = r->start;
    const struct block *b = first_away(mm, hint, r->end);
    if (!b && hint > r->start)
        b = first_away(mm, r->start, hint);
    __atomic_store_n(&r->hint, b ? b->base : 0, __ATOMIC_RELAXED);
    return b != NULL;
}

/* ---- one region; caller holds mm->as exclusively ---- */

/* While a fork() is under way without the kernel's event, too: what becomes of pages that came home is still to be told of. */
static bool is_pending(struct mm *mm)
{
    return mm->forking || os->uffd_pending(mm->uffd.fd) != 0;
}

/* The part of [*at, end) that the next mapping has: 1; 0: there is none. */
static int next_part(struct mm *mm, uintptr_t *at, uintptr_t end, uintptr_t *part_end)
{
    struct os_vma vma;
    int r = *at < end ? os->vma_query(mm->maps_fd, *at, &vma) : -ENOENT;
    if (r == -ENOENT || (!r && vma.start >= end))
        return 0;
    if (r)
        return r;
    *at = vma.start > *at ? vma.start : *at;
    *part_end = vma.end < end ? vma.end : end;
    return 1;
}

/* What answers so has not registered anything, and cannot: nothing of ours is there. */
static bool is_foreign(int err)
{
    return err == -EINVAL || err == -EBUSY || err == -EPERM;
}

/*
 * Mapping by mapping: one that is not ours would make the kernel refuse the whole range. EINVAL: it cannot be registered, or another
 * userfaultfd has it. It stands there because ours has gone, and there is nothing to give back. *stop: how far it came.
 */
static int unregister(struct mm *mm, uintptr_t start, uintptr_t end, bool missing, bool whatever, uintptr_t *stop)
{
    int first = 0, r;
    uintptr_t to = end;
    for (*stop = start; (r = next_part(mm, &start, end, &to)) > 0; *stop = start = to) {
        if (missing) /* first: a mapping that is remapped meanwhile takes its mark with it, and is told of as long as it is registered */
            region_show(mm, start, to);
        if (!whatever && is_pending(mm) && !mutate("give-up-pending"))
            return -EAGAIN;
        /* Leaving WP mode looks at every page, of which none is protected; leaving MISSING mode at none. */
        if (!missing && !mm->uffd.user_mode_only)
            os->uffd_register(mm->uffd.fd, start, to - start);
        r = os->uffd_unregister(mm->uffd.fd, start, to - start);
        if (r && r != -EINVAL && !first)
            first = r;
    }
    return r ? r : first;
}

bool region_take_again(struct mm *mm, uintptr_t start, uintptr_t end)
{
    uintptr_t at = start, to = end;
    int r, first = 0;
    if (mutate("again-whole"))
        return region_register(mm, start, end, true) == 0;
    for (; (r = next_part(mm, &at, end, &to)) > 0; at = to) {
        r = region_register(mm, at, to, true);
        first = r && !is_foreign(r) && !first ? r : first;
    }
    first = r ? r : first;
    if (first)
        hmm_log(HMM_LOG_ERROR,
                "memory at [%#lx, %#lx) cannot be registered again: %s; what the program has just moved there may be lost "
                "(raise sysctl "
                "vm.max_map_count)",
                (unsigned long)start, (unsigned long)end, hmm_strerror(first));
    return !first;
}

/* Of [start, end) nothing is away. True: it is not registered any more, and in no region. */
static bool give_up(struct mm *mm, uintptr_t start, uintptr_t end, bool missing)
{
    uintptr_t stop;
    if (is_pending(mm))
        return false;
    int r = unregister(mm, start, end, missing, false, &stop);
    bool pending = is_pending(mm);
    if (pending)
        region_take_again(mm, start, stop);
    region_cut(&mm->regions, start, end);
    if (pending || r) { /* what is registered is not known */
        region_insert_must(&mm->regions, start, end, missing || pending, REGION_UNPROVED);
        hide_managed(mm, start, end);
        return false;
    }
    region_cut(&mm->kept, start, end); /* the mark stays, and is found again */
    return true;
}

void region_drop(struct mm *mm, struct region *r)
{
    uintptr_t stop;
    unregister(mm, r->start, r->end, r->missing, true, &stop);
    region_cut(&mm->kept, r->start, r->end);
    region_cut(&mm->regions, r->start, r->end);
}

static void show_missing(struct mm *mm, uintptr_t start, uintptr_t end)
{
    for (const struct region *r = region_next(&mm->regions, start); r && r->start < end; r = region_next(&mm->regions, r->end))
        if (r->missing)
            region_show(mm, r->start > start ? r->start : start, r->end < end ? r->end : end);
}

/* Regions of [start, end) are in WP mode, or in a mode that is not known. */
static void set_mode(struct mm *mm, uintptr_t start, uintptr_t end, bool known)
{
    struct region *r;
    for (uintptr_t at = start; at < end && (r = region_next(&mm->regions, at)) != NULL && r->start < end; at = r->end) {
        if (known)
            r->missing = false;
        else if (r->state == REGION_PROVED)
            r->state = REGION_UNPROVED;
    }
}

/* From MISSING to WP in one step: no event is missed. What was proved of its events stays so either way. [start, end) is of regions that
 * touch each other. What is refused half-way, because there are too many mappings, was done in the first mappings. */
static bool only_watch(struct mm *mm, uintptr_t start, uintptr_t end)
{
    if (is_pending(mm))
        return false;
    show_missing(mm, start, end);
    int r = is_pending(mm) ? -EBUSY : os->uffd_watch(mm->uffd.fd, start, end - start);
    if (!r && !is_pending(mm)) {
        set_mode(mm, start, end, true);
        region_cut(&mm->kept, start, end); /* the mark stays, and is found again */
        os->uffd_wake(mm->uffd.fd, start, end - start);
        return true;
    }
    if (!is_foreign(r) && !mutate("watch-part") && !region_take_again(mm, start, end))
        set_mode(mm, start, end, false);
    hide_managed(mm, start, end);
    return false;
}

static bool is_wanted(struct mm *mm, uintptr_t start, uintptr_t end)
{
    return notifier_any(&mm->notifiers, start, end) && !mutate("unwatch");
}

/* The region that is in one mapping with r and below it, or above it, since the kernel merges mappings; NULL: there is none. */
static struct region *mate_below(struct mm *mm, const struct region *r)
{
    struct os_vma vma;
    struct region *mate = region_before(&mm->regions, r->start);
    bool touches = mate && mate->end == r->start && os->vma_query(mm->maps_fd, r->start, &vma) == 0 && vma.start < r->start;
    return touches ? mate : NULL;
}

static struct region *mate_above(struct mm *mm, const struct region *r)
{
    struct os_vma vma;
    struct region *mate = region_next(&mm->regions, r->end);
    bool touches = mate && mate->start == r->end && os->vma_query(mm->maps_fd, r->end - 1, &vma) == 0 && vma.end > r->end;
    return touches ? mate : NULL;
}

/* A region and its mates: a mapping must not be split by giving back a part of it. */
struct whole {
    uintptr_t start, end;
    bool missing; /* any of it */
    bool away;    /* something of it */
};

static struct whole whole_of(struct mm *mm, struct region *r)
{
    struct whole w = {r->start, r->end, r->missing, mm_is_away(mm, r)};
    for (struct region *mate = r; !w.away && (mate = mate_below(mm, mate)) != NULL; w.start = mate->start) {
        w.missing |= mate->missing;
        w.away = mm_is_away(mm, mate);
    }
    for (struct region *mate = r; !w.away && (mate = mate_above(mm, mate)) != NULL; w.end = mate->end) {
        w.missing |= mate->missing;
        w.away = mm_is_away(mm, mate);
    }
    return w;
}

/* What is touched where something is about to be dropped is to be given by us, to be known. */
static enum prune look_for_notes(struct mm *mm, uintptr_t start, uintptr_t end)
{
    switch (dropping_look(mm, start, end)) {
    case DROPPING_SOON: return PRUNE_AGAIN;
    case DROPPING_LATE: return PRUNE_LATER;
    default: return PRUNE_DONE;
    }
}

/* DONE: the region may be gone, or something of its mapping is away. */
static enum prune settle(struct mm *mm, struct region *r)
{
    struct whole w = whole_of(mm, r);
    if (w.away)
        return PRUNE_DONE;
    enum prune noted = look_for_notes(mm, w.start, w.end);
    if (noted != PRUNE_DONE)
        return noted;
    bool done =
        !is_wanted(mm, w.start, w.end) ? give_up(mm, w.start, w.end, w.missing) : !w.missing || only_watch(mm, w.start, w.end);
    return done ? PRUNE_DONE : PRUNE_AGAIN;
}

/* ---- ranges ---- */

static bool is_settled(struct mm *mm, struct region *r)
{
    return mm_is_away(mm, r) || (!r->missing && is_wanted(mm, r->start, r->end));
}

/* What ends or begins at the range may have been kept for what was away in it. */
static uintptr_t one_before(uintptr_t start)
{
    return start ? start - 1 : 0;
}

/* Caller holds mm->as exclusively. */
static enum prune prune(struct mm *mm, uintptr_t start, uintptr_t end)
{
    uintptr_t next;
    enum prune done = PRUNE_DONE;
    for (struct region *r = region_next(&mm->regions, one_before(start)); r && r->start <= end;
         r = region_next(&mm->regions, next)) {
        next = r->end;
        enum prune one = look_for_notes(mm, r->start, r->end);
        if (one == PRUNE_DONE && !is_settled(mm, r))
            one = settle(mm, r);
        done = one > done ? one : done;
    }
    if (mm->owes) /* until nothing is pending, and so nothing is owed */
        done = PRUNE_AGAIN;
    if (done != PRUNE_DONE) /* so that no block means: nothing is registered for its sake */
        return done;
    for (struct block *b = pagetable_next(&mm->pt, start, end), *after; b; b = after) {
        after = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, end);
        if (b->used)
            continue;
        lru_remove(mm, b);
        pagetable_remove(&mm->pt, b);
    }
    return done;
}

enum prune mm_prune(struct mm *mm, uintptr_t start, uintptr_t end)
{
    rwlock_write_lock(&mm->as);
    owed_forget(mm);
    enum prune done = prune(mm, start, end);
    rwlock_write_unlock(&mm->as);
    return done;
}

/* Caller holds mm->as. */
static bool has_unused(struct mm *mm, uintptr_t start, uintptr_t end)
{
    for (struct block *b = pagetable_next(&mm->pt, start, end); b; b = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, end))
        if (!block_has(b, b->base, b->base + OS_BLOCK_SIZE))
            return true;
    for (struct region *r = region_next(&mm->regions, start); r && r->start < end; r = region_next(&mm->regions, r->end))
        if (!is_settled(mm, r))
            return true;
    return false;
}

/* Most often there is nothing to do: everybody is not stopped to find out. */
void mm_trim(struct mm *mm, uintptr_t start, uintptr_t end)
{
    rwlock_read_lock(&mm->as);
    bool unused = has_unused(mm, start, end);
    rwlock_read_unlock(&mm->as);
    if (unused)
        mm_prune(mm, start, end);
}

void mm_release(struct mm *mm, uintptr_t start, uintptr_t end)
{
    struct region *r;
    rwlock_write_lock(&mm->as);
    for (uintptr_t at = start, to; at < end && (r = region_next(&mm->regions, at)) && r->start < end; at = to) {
        uintptr_t from = r->start > at ? r->start : at;
        to = r->end < end ? r->end : end;
        if (!first_away(mm, from, to))
            give_up(mm, from, to, r->missing);
    }
    rwlock_write_unlock(&mm->as);
}

/* ---- faults ---- */

/* A neighbour in the same mapping of which something is away: the mapping grew. */
static bool continues(struct mm *mm, const struct os_vma *vma, uintptr_t start, uintptr_t end)
{
    struct region *before = region_before(&mm->regions, start), *next = region_next(&mm->regions, end);
    return (before && before->end == start && start > vma->start && mm_is_away(mm, before)) ||
           (next && next->start == end && end < vma->end && mm_is_away(mm, next));
}

static void serve_unknown(struct mm *mm, uintptr_t addr)
{
    static const struct tcb_list none;
    struct os_vma vma;
    uintptr_t start, end, part_end;
    if (!region_gap(mm, addr, &vma, &start, &end))
        return;
    if (!continues(mm, &vma, start, end) || region_arm(mm, addr, &none, NULL, &part_end))
        give_up(mm, start, end, true);
}

/* Nothing of it is away, or it is only watched and its mode was not set back. Devices that rely on being told must ask anew where it can no
 * longer be watched. */
static void serve_unused(struct mm *mm, struct region *r)
{
    struct whole w = whole_of(mm, r);
    bool wanted = is_wanted(mm, w.start, w.end);
    if (w.away || look_for_notes(mm, w.start, w.end) != PRUNE_DONE || (wanted && only_watch(mm, w.start, w.end)))
        return;
    if (give_up(mm, w.start, w.end, w.missing) && wanted) {
        struct limbo *l = limbo_filling(mm);
        limbo_mark(mm, l, w.start, w.end, HMM_EVENT_MIGRATE);
        limbo_publish(mm, l);
    }
}

bool mm_fault_unused(struct mm *mm, uintptr_t addr)
{
    rwlock_write_lock(&mm->as);
    bool pending = os->uffd_pending(mm->uffd.fd) != 0; /* the thread that forks may touch such memory, too: it must not wait */
    struct region *r = region_find(&mm->regions, addr);
    if (!pending && !r && !mm->forking)
        serve_unknown(mm, addr);
    else if (!pending && r && !mm_is_away(mm, r))
        serve_unused(mm, r);
    /* Where the kernel refuses, the page gets zeros, so that the touch ends. */
    r = region_find(&mm->regions, addr);
    if (!pending && (r ? !mm_is_away(mm, r) : mm->forking))
        if (os->uffd_zeropage(mm->uffd.fd, addr, os_page_size()) > 0)
            mm_dropped(mm, addr, addr + os_page_size(), UINT64_MAX);
    rwlock_write_unlock(&mm->as);
    return !pending;
}
