/* SPDX-License-Identifier: MIT */
/*
 * Memory that is about to be dropped. The caller of MADV_DONTNEED drops pages only when its event has been read (design fact 5). One that a
 * migration takes in between would be back with its old content when the call has returned. But the event of MADV_FREE is the same, and
 * its pages stay: what the program writes there, as soon as the event is read, must not be thrown away. So nothing is done to the
 * pages. They are noted, and not taken while they are there, until
 *
 *   - they were seen to be absent: whatever stands there later was written later;
 *   - or they were given by us, because a touch found them absent;
 *   - or the call was announced, and has ended;
 *   - or so much time has passed that it must have been MADV_FREE. This alone is not a proof: the caller may be held up in the kernel.
 */
#include "debug/inject.h"
#include "mm/event.h"

#define SOON_NS 20000000ull
#define LATE_NS 2000000000ull

static bool meets(const struct dropping *d, uintptr_t start, uintptr_t end)
{
    return d->start < end && start < d->end;
}

/* Caller holds queue_lock for all of the following. */

static bool is_over(const struct dropping *d, uint64_t now)
{
    return d->start == d->end || now - d->since >= LATE_NS;
}

/* What is to be said of notes of which one is d. */
static enum mm_dropping worse(enum mm_dropping found, const struct dropping *d, uint64_t now)
{
    return found == DROPPING_SOON || now - d->since < SOON_NS ? DROPPING_SOON : DROPPING_LATE;
}

/* Where [start, end) grows the least; what is over grows from nothing. */
static struct dropping *best_for(struct mm *mm, uintptr_t start, uintptr_t end, uint64_t now)
{
    struct dropping *best = NULL;
    uintptr_t least = UINTPTR_MAX;
    for (unsigned i = 0; i < DROPPING_MAX && least; i++) {
        struct dropping *d = &mm->dropping[i];
        uintptr_t from = d->start < start ? d->start : start, to = d->end > end ? d->end : end;
        uintptr_t grown = is_over(d, now) ? 0 : to - from;
        if (grown < least) {
            best = d;
            least = grown;
        }
    }
    return best;
}

static void add(struct mm *mm, uintptr_t start, uintptr_t end, uint64_t since, uint64_t now)
{
    struct dropping *d = best_for(mm, start, end, now);
    if (is_over(d, now))
        *d = (struct dropping){start, end, since};
    d->start = start < d->start ? start : d->start;
    d->end = end > d->end ? end : d->end;
    d->since = since > d->since ? since : d->since;
}

/* Takes [start, end) out of what was noted until then. */
static void cut(struct mm *mm, uintptr_t start, uintptr_t end, uint64_t until)
{
    uint64_t now = os_now();
    for (unsigned i = 0; i < DROPPING_MAX; i++) {
        struct dropping *d = &mm->dropping[i], old = *d;
        if (!meets(d, start, end) || (d->since > until && !mutate("dropped-later")))
            continue;
        d->end = d->start;
        if (old.start < start)
            add(mm, old.start, start, old.since, now);
        if (end < old.end)
            add(mm, end, old.end, old.since, now);
    }
}

/* Where the first of what is there begins; end: nothing is. Little is looked at behind that: a note may be of gigabytes, and the reader waits. */
static uintptr_t first_present(struct mm *mm, uintptr_t start, uintptr_t end)
{
    struct os_region v;
    uintptr_t walked;
    for (size_t step = OS_BLOCK_SIZE; start < end; step *= 2) {
        uintptr_t stop = end - start > step ? start + step : end;
        int n = os->pagemap_scan(mm->pagemap_fd, start, stop, &v, 1, &walked);
        if (n)
            return n > 0 ? v.start : start;
        start = walked > start ? walked : stop;
    }
    return end;
}

/* Behind the last of what is there. */
static uintptr_t last_present(struct mm *mm, uintptr_t start, uintptr_t end)
{
    for (size_t step = OS_BLOCK_SIZE; start < end; step *= 2) {
        struct os_region v[32];
        uintptr_t from = end - start > step ? end - step : start, last = from;
        for (uintptr_t at = from, walked; at < end; at = walked) {
            int n = os->pagemap_scan(mm->pagemap_fd, at, end, v, ARRAY_LEN(v), &walked);
            if (n < 0 || walked <= at)
                return end;
            last = n ? v[n - 1].end : last;
        }
        if (last > from)
            return last;
        end = from;
    }
    return end;
}

static bool none_noted(const struct mm *mm)
{
    uint64_t until = __atomic_load_n(&mm->dropping_until, __ATOMIC_RELAXED);
    return until == 0 || os_now() >= until;
}

void dropping_note(struct mm *mm, uintptr_t start, uintptr_t end)
{
    uint64_t since = mm->read_at ? mm->read_at : os_now();
    mutex_lock(&mm->queue_lock);
    add(mm, start, end, since, since);
    __atomic_store_n(&mm->dropping_until, since + LATE_NS, __ATOMIC_RELAXED);
    mutex_unlock(&mm->queue_lock);
}

enum mm_dropping dropping_look(struct mm *mm, uintptr_t start, uintptr_t end)
{
    enum mm_dropping found = DROPPING_NOT;
    if (none_noted(mm))
        return found;
    uint64_t now = os_now();
    mutex_lock(&mm->queue_lock);
    for (unsigned i = 0; i < DROPPING_MAX; i++) {
        struct dropping *d = &mm->dropping[i];
        if (!meets(d, start, end))
            continue;
        if (is_over(d, now)) {
            d->end = d->start;
            continue;
        }
        d->start = first_present(mm, d->start, d->end);
        d->end = last_present(mm, d->start, d->end);
        if (meets(d, start, end))
            found = worse(found, d, now);
    }
    mutex_unlock(&mm->queue_lock);
    return found;
}

void mm_dropped(struct mm *mm, uintptr_t start, uintptr_t end, uint64_t until)
{
    if (none_noted(mm))
        return;
    mutex_lock(&mm->queue_lock);
    cut(mm, start, end, until);
    mutex_unlock(&mm->queue_lock);
}

enum mm_dropping mm_dropping(struct mm *mm, uintptr_t at, uintptr_t *stop)
{
    enum mm_dropping found = DROPPING_NOT;
    if (none_noted(mm) || mutate("take-dropping"))
        return found;
    uint64_t now = os_now();
    mutex_lock(&mm->queue_lock);
    for (unsigned i = 0; i < DROPPING_MAX; i++) {
        const struct dropping *d = &mm->dropping[i];
        if (is_over(d, now) || !meets(d, at, *stop))
            continue;
        if (d->start > at) {
            *stop = d->start;
            continue;
        }
        found = worse(found, d, now);
        *stop = d->end < *stop ? d->end : *stop;
    }
    mutex_unlock(&mm->queue_lock);
    return found;
}
