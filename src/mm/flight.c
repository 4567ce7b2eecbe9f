/* SPDX-License-Identifier: MIT */
/*
 * Flights: records of migrations under way. A fixed pool, so that the memory in transit is bounded and nobody on the fault
 * path allocates; threads of the fault path own one each and never wait for the pool.
 */
#include <errno.h>
#include <limits.h>
#include <string.h>

#include "base/alloc.h"
#include "base/futex.h"
#include "mm/mm.h"

static void flight_free(struct flight *f)
{
    unsigned n = block_pages();
    mem_free(f->home, n * sizeof(*f->home));
    mem_free(f->page, n * sizeof(*f->page));
    mem_free(f->how, n);
    mem_free(f->dma, 2 * n * sizeof(*f->dma));
    mem_free(f, sizeof(*f));
}

struct flight *flight_new(struct mm *mm)
{
    unsigned n = block_pages();
    struct flight *f = mem_alloc(sizeof(*f));
    if (!f)
        return NULL;
    f->home = mem_alloc(n * sizeof(*f->home));
    f->page = mem_alloc(n * sizeof(*f->page));
    f->how = mem_alloc(n);
    f->dma = mem_alloc(2 * n * sizeof(*f->dma));
    list_init(&f->link);
    mutex_lock(&mm->queue_lock);
    bool room = f->home && f->page && f->how && f->dma && mm->nflights < FLIGHTS_MAX;
    if (room) {
        f->id = mm->nflights;
        mm->flights[mm->nflights++] = f;
    }
    mutex_unlock(&mm->queue_lock);
    if (!room) {
        flight_free(f);
        return NULL;
    }
    return f;
}

void flight_free_all(struct mm *mm)
{
    for (unsigned i = 0; i < mm->nflights; i++)
        flight_free(mm->flights[i]);
    mm->nflights = 0;
    list_init(&mm->free_flights);
}

struct flight *flight_get(struct mm *mm, bool wait)
{
    struct flight *f = NULL;
    mutex_lock(&mm->queue_lock);
    while (!f) {
        if (!list_empty(&mm->free_flights)) {
            f = container_of(mm->free_flights.next, struct flight, link);
            list_del(&f->link);
        } else if (wait) {
            mutex_wait(&mm->queue_lock, &mm->flights_changed, mm->flights_changed);
        } else {
            break;
        }
    }
    mutex_unlock(&mm->queue_lock);
    return f;
}

void flight_put(struct mm *mm, struct flight *f)
{
    mutex_lock(&mm->queue_lock);
    list_add_tail(&mm->free_flights, &f->link);
    mm->flights_changed++;
    mutex_unlock(&mm->queue_lock);
    futex_wake(&mm->flights_changed, 1);
}

void flight_reset(struct flight *f, struct hmm_device *dev, uintptr_t base, unsigned first, unsigned end)
{
    f->dev = dev;
    f->base = base;
    f->first = first;
    f->end = end;
    f->huge = false;
    f->staged = 0;
    memset(f->home + first, 0, (end - first) * sizeof(*f->home));
    memset(f->how + first, FLIGHT_EMPTY, end - first);
}

void flight_departed(struct mm *mm, struct flight *f, unsigned pages)
{
    f->counted = pages;
    stat_add(&f->dev->transit, pages);
    stat_add(&mm->stats.transit_pages, pages);
}

void flight_arrived(struct mm *mm, struct flight *f)
{
    stat_add(&f->dev->transit, -(uint64_t)f->counted);
    stat_add(&mm->stats.transit_pages, -(uint64_t)f->counted);
    f->counted = 0;
}

void flight_end_invalidation(struct mm *mm, struct flight *f)
{
    if (!f->invalidating)
        return;
    notifier_end(&mm->notifiers, &f->inv);
    f->invalidating = false;
}

void flight_landed(struct mm *mm)
{
    __atomic_fetch_add(&mm->landings, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&mm->landing_waiters, __ATOMIC_SEQ_CST))
        futex_wake(&mm->landings, INT_MAX);
}

void flight_wait(struct mm *mm, uint32_t seen)
{
    __atomic_fetch_add(&mm->landing_waiters, 1, __ATOMIC_SEQ_CST);
    futex_wait(&mm->landings, seen, -1);
    __atomic_fetch_sub(&mm->landing_waiters, 1, __ATOMIC_SEQ_CST);
}
