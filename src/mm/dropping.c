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

/* Takes [start, end) out of what is noted. */
static void cut(struct mm *mm, uintptr_t start, uintptr_t end)
{
    uint64_t now = os_now();
    for (unsigned i = 0; i < DROPPING_MAX; i++) {
        struct dropping *d = &mm->dropping[i], old = *d;
        if (!meets(d, start, end))
            continue;
        d->end = d->start;
        if (old.start < start)
            add(mm, old.start, start, old.since, now);
        if (end < old.end)
            add(mm, end, old.end, old.since, now);
    }
}

static bool any(const struct mm *mm, uintptr_t start, uintptr_t end)
{
    uint64_t now = os_now();
    for (unsigned i = 0; i < DROPPING_MAX; i++)
        if (meets(&mm->dropping[i], start, end) && !is_over(&mm->dropping[i], now))
            return true;
    return false;
}

/* What of a note is there lies within [*first, *last). */
static void look(struct mm *mm, const struct dropping *d, uintptr_t *first, uintptr_t *last)
{
    struct os_region v[32];
    *first = *last = d->end;
    for (uintptr_t at = d->start, walked; at < d->end; at = walked) {
        int n = os->pagemap_scan(mm->pagemap_fd, at, d->end, v, ARRAY_LEN(v), &walked);
        if (n < 0) {
            *first = *first < at ? *first : at;
            *last = d->end;
            return;
        }
        if (n && *first == d->end)
            *first = v[0].start;
        if (n)
            *last = v[n - 1].end;
    }
}

void dropping_note(struct mm *mm, uintptr_t start, uintptr_t end)
{
    uint64_t now = os_now();
    mutex_lock(&mm->queue_lock);
    add(mm, start, end, now, now);
    __atomic_store_n(&mm->dropping_until, now + LATE_NS, __ATOMIC_RELAXED);
    mutex_unlock(&mm->queue_lock);
}

bool dropping_look(struct mm *mm, uintptr_t start, uintptr_t end)
{
    if (!__atomic_load_n(&mm->dropping_until, __ATOMIC_RELAXED))
        return true;
    mutex_lock(&mm->queue_lock);
    for (unsigned i = 0; i < DROPPING_MAX; i++) {
        struct dropping *d = &mm->dropping[i];
        if (!meets(d, start, end))
            continue;
        uintptr_t first, last;
        look(mm, d, &first, &last);
        d->start = first;
        d->end = last;
    }
    bool settled = !any(mm, start, end);
    mutex_unlock(&mm->queue_lock);
    return settled;
}

void mm_dropped(struct mm *mm, uintptr_t start, uintptr_t end)
{
    if (!__atomic_load_n(&mm->dropping_until, __ATOMIC_RELAXED))
        return;
    mutex_lock(&mm->queue_lock);
    cut(mm, start, end);
    mutex_unlock(&mm->queue_lock);
}

enum mm_dropping mm_dropping(struct mm *mm, uintptr_t at, uintptr_t *stop)
{
    uint64_t until = __atomic_load_n(&mm->dropping_until, __ATOMIC_RELAXED), now = until ? os_now() : 0;
    enum mm_dropping found = DROPPING_NOT;
    if (now >= until || mutate("take-dropping"))
        return found;
    mutex_lock(&mm->queue_lock);
    for (unsigned i = 0; i < DROPPING_MAX; i++) {
        const struct dropping *d = &mm->dropping[i];
        if (is_over(d, now) || !meets(d, at, *stop))
            continue;
        if (d->start > at) {
            *stop = d->start;
            continue;
        }
        found = now - d->since < SOON_NS ? DROPPING_SOON : found == DROPPING_SOON ? found : DROPPING_LATE;
        *stop = d->end < *stop ? d->end : *stop;
    }
    mutex_unlock(&mm->queue_lock);
    return found;
}
