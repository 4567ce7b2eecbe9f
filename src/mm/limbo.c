/* SPDX-License-Identifier: MIT */
/*
 * What events leave to do. An event is applied under the exclusive address-space lock, where no device may be waited for: it
 * takes the entries away, moves the sequence numbers of the notifiers and puts the device pages on a chain. A worker then
 * calls the devices and frees the pages.
 */
#include <limits.h>
#include <string.h>

#include "base/futex.h"
#include "debug/inject.h"
#include "mm/event.h"
#include "mm/mm.h"

#define PRUNE_TRIES 10 /* in 10 ms: then the next touch finds it registered, and gives it back */

/* A link names pagemap and page (plus one: 0 ends the chain), and looks like an address to the owner field. */
#define LINK_ID_SHIFT 52

static uint64_t link_make(uint32_t pagemap, uint64_t page)
{
    return (uint64_t)pagemap << LINK_ID_SHIFT | (page + 1) << PAGE_OWNER_SHIFT;
}

void chain_add(uint64_t *chain, uint32_t pagemap, uint64_t page)
{
    page_set_owner(&pagemap_by_id(pagemap)->pages[page], *chain);
    *chain = link_make(pagemap, page);
}

void chain_put(uint64_t chain)
{
    while (chain) {
        struct pagemap *pm = pagemap_by_id(chain >> LINK_ID_SHIFT);
        uint64_t page = ((chain & (((uint64_t)1 << LINK_ID_SHIFT) - 1)) >> PAGE_OWNER_SHIFT) - 1;
        chain = page_owner(&pm->pages[page]);
        page_set_owner(&pm->pages[page], 0);
        pagemap_put(pm, page, 1);
    }
}

struct limbo *limbo_filling(struct mm *mm)
{
    struct limbo *l = NULL;
    mutex_lock(&mm->queue_lock);
    for (unsigned i = 0; i < LIMBO_BATCHES; i++)
        if (mm->limbo[i].state == LIMBO_FILLING)
            l = &mm->limbo[i];
    for (unsigned i = 0; i < LIMBO_BATCHES && !l; i++)
        if (mm->limbo[i].state == LIMBO_FREE)
            l = &mm->limbo[i];
    if (l->state == LIMBO_FREE)
        l->number = ++mm->limbo_filled;
    l->state = LIMBO_FILLING; /* one is always free or filling: mm_limbo_take leaves the last one */
    mutex_unlock(&mm->queue_lock);
    return l;
}

void limbo_mark(struct mm *mm, struct limbo *l, uintptr_t start, uintptr_t end, enum hmm_event_type type)
{
    if (l->marks < LIMBO_MARKS) {
        struct invalidation *inv = &l->inv[l->marks];
        if (notifier_begin(&mm->notifiers, inv, start, end, type, NULL))
            l->marks++;
        else
            notifier_end(&mm->notifiers, inv);
        return;
    }
    /* No more room: the last mark widens to cover both. Who reads after the old one has ended finds his number old as soon as he
     * looks at anything, since mm->as is held. The new one covers memory of which nothing happened, too, and so must not say that this was unmapped: pages change place, which makes no promise about them. */
    struct invalidation *last = &l->inv[LIMBO_MARKS - 1], old = *last;
    uintptr_t from = old.event.start < start ? old.event.start : start;
    uintptr_t to = old.event.end > end ? old.event.end : end;
    notifier_end(&mm->notifiers, last);
    notifier_begin(&mm->notifiers, last, from, to, HMM_EVENT_MIGRATE, NULL);
}

void limbo_prune(struct limbo *l, uintptr_t start, uintptr_t end)
{
    if (l->ranges < LIMBO_MARKS) {
        l->range[l->ranges].start = start;
        l->range[l->ranges++].end = end;
        return;
    }
    if (start < l->range[0].start)
        l->range[0].start = start;
    if (end > l->range[0].end)
        l->range[0].end = end;
}

static bool has_work(const struct limbo *l)
{
    return l->marks || l->chain || l->remaps || l->ranges;
}

void limbo_publish(struct mm *mm, const struct limbo *l)
{
    if (has_work(l))
        mm->limbo_ready(mm);
}

/* Whether a batch that is filled now may be taken. Caller holds queue_lock. */
static bool may_overtake(const struct mm *mm, uint64_t now, bool *later)
{
    bool late = true;
    for (unsigned i = 0; i < LIMBO_BATCHES; i++) {
        const struct limbo *l = &mm->limbo[i];
        if (l->state != LIMBO_TAKEN)
            continue;
        if (l->remaps || mutate("limbo-order"))
            return false; /* when it has landed, limbo_ready() is called */
        late &= now - l->taken >= LIMBO_LATE_NS;
    }
    *later = !late;
    return late;
}

struct limbo *mm_limbo_take(struct mm *mm, bool *later)
{
    struct limbo *l = NULL;
    unsigned unused = 0;
    uint64_t now = os_now();
    *later = false;
    rwlock_read_lock(&mm->as); /* a batch is filled under the exclusive lock */
    mutex_lock(&mm->queue_lock);
    for (unsigned i = 0; i < LIMBO_BATCHES; i++) {
        if (mm->limbo[i].state == LIMBO_FILLING)
            l = &mm->limbo[i];
        unused += mm->limbo[i].state == LIMBO_FREE;
    }
    if (l && unused && has_work(l) && may_overtake(mm, now, later)) {
        l->state = LIMBO_TAKEN;
        l->taken = now;
    } else {
        l = NULL;
    }
    mutex_unlock(&mm->queue_lock);
    rwlock_read_unlock(&mm->as);
    return l;
}

/* Whether a batch waits for a worker in which there is more to do than to prune. */
static bool has_filled(struct mm *mm)
{
    bool filled = false;
    rwlock_read_lock(&mm->as);
    mutex_lock(&mm->queue_lock);
    for (unsigned i = 0; i < LIMBO_BATCHES; i++) {
        const struct limbo *l = &mm->limbo[i];
        filled |= l->state == LIMBO_FILLING && (l->marks || l->chain || l->remaps);
    }
    mutex_unlock(&mm->queue_lock);
    rwlock_read_unlock(&mm->as);
    return filled;
}

/* Of n ranges, those for which it is of use to try again soon. */
static unsigned prune_all(struct mm *mm, struct limbo_range *range, unsigned n)
{
    unsigned left = 0;
    for (unsigned i = 0; i < n; i++)
        if (mm_prune(mm, range[i].start, range[i].end) == PRUNE_AGAIN)
            range[left++] = range[i];
    return left;
}

/* They become work of the batch that is being filled, as far as it has room for more ranges. */
static void hand_on(struct mm *mm, const struct limbo_range *range, unsigned n)
{
    rwlock_write_lock(&mm->as);
    struct limbo *l = limbo_filling(mm);
    for (unsigned i = 0; i < n && l->ranges < LIMBO_MARKS; i++)
        limbo_prune(l, range[i].start, range[i].end);
    limbo_publish(mm, l);
    rwlock_write_unlock(&mm->as);
}

/* The caller of the event may not have run again since it was read, and its event is pending until it has: memory that stays registered for
 * that would cost the program a fault. But a batch that is ready is not kept waiting. */
static void prune_soon(struct mm *mm, struct limbo_range *range, unsigned n)
{
    for (unsigned attempt = 0; n && attempt < PRUNE_TRIES && !mutate("prune-again"); attempt++) {
        if (has_filled(mm) && !mutate("prune-first")) {
            hand_on(mm, range, n);
            return;
        }
        mm_backoff(mm, attempt);
        n = prune_all(mm, range, n);
    }
}

/* Devices have let go: whoever waits for that may go on. */
static void set_freed(struct mm *mm, struct limbo *l)
{
    if (l->remaps) {
        __atomic_fetch_sub(&mm->remaps_pending, l->remaps, __ATOMIC_SEQ_CST);
        futex_wake(&mm->remaps_pending, INT_MAX);
    }
    mutex_lock(&mm->queue_lock);
    l->remaps = 0;
    l->freed = true;
    __atomic_fetch_add(&mm->limbo_landed, 1, __ATOMIC_SEQ_CST);
    mutex_unlock(&mm->queue_lock);
    futex_wake(&mm->limbo_landed, INT_MAX);
}

void mm_limbo_land(struct mm *mm, struct limbo *l)
{
    for (unsigned i = 0; i < l->marks; i++)
        notifier_call(&mm->notifiers, &l->inv[i], NOTIFIER_WAIT);
    for (unsigned i = 0; i < l->marks; i++)
        notifier_end(&mm->notifiers, &l->inv[i]);
    chain_put(l->chain);
    set_freed(mm, l);
    struct limbo_range range[LIMBO_MARKS];
    unsigned n = l->ranges;
    memcpy(range, l->range, n * sizeof(*range));
    n = prune_all(mm, range, n);
    mutex_lock(&mm->queue_lock);
    l->marks = l->ranges = 0;
    l->chain = 0;
    l->freed = false;
    l->state = LIMBO_FREE;
    mutex_unlock(&mm->queue_lock);
    mm->limbo_ready(mm); /* a batch that found no free one behind it may be taken now */
    prune_soon(mm, range, n);
}

void mm_remaps_wait(struct mm *mm)
{
    uint32_t n;
    while ((n = __atomic_load_n(&mm->remaps_pending, __ATOMIC_SEQ_CST)) != 0)
        futex_wait(&mm->remaps_pending, n, -1);
}

/* Whether one of the first `filled` batches has something to do, or is at it. */
static bool has_older(struct mm *mm, uint32_t filled)
{
    bool any = false;
    mutex_lock(&mm->queue_lock);
    for (unsigned i = 0; i < LIMBO_BATCHES; i++) {
        const struct limbo *l = &mm->limbo[i];
        any |= l->state != LIMBO_FREE && !l->freed && has_work(l) && (int32_t)(l->number - filled) <= 0;
    }
    mutex_unlock(&mm->queue_lock);
    return any;
}

void mm_limbo_wait(struct mm *mm, uint64_t timeout_ns)
{
    uint64_t since = os_now(), waited = 0;
    mm_sync(mm); /* what was read is applied */
    mutex_lock(&mm->queue_lock);
    uint32_t filled = mm->limbo_filled;
    mutex_unlock(&mm->queue_lock);
    for (uint32_t landed; waited < timeout_ns; waited = os_now() - since) {
        landed = __atomic_load_n(&mm->limbo_landed, __ATOMIC_SEQ_CST);
        if (!has_older(mm, filled))
            break;
        futex_wait(&mm->limbo_landed, landed, (int64_t)(timeout_ns - waited));
    }
}
