/* SPDX-License-Identifier: MIT */
/*
 * Invalidations, as messages to the engine process: process/control.c says why they work. Each has a slot of the channel from its
 * beginning to its acknowledgement. Any library thread; no lock is held while it waits.
 */
#include "link.h"

#include <errno.h>

static int claim_slot(struct link *link)
{
    for (;;) {
        uint32_t seen = __atomic_load_n(&link->slot_freed, __ATOMIC_SEQ_CST);
        uint64_t used = __atomic_load_n(&link->slots, __ATOMIC_SEQ_CST);
        if (soft_link_gone(link))
            return -1;
        if (~used == 0) {
            soft_futex_wait(&link->slot_freed, seen, LINK_PATIENCE_MS);
            continue;
        }
        unsigned i = (unsigned)__builtin_ctzll(~used);
        if (__atomic_compare_exchange_n(&link->slots, &used, used | 1ull << i, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return (int)i;
    }
}

static void free_slot(struct link *link, int i)
{
    uint64_t used = __atomic_fetch_and(&link->slots, ~(1ull << i), __ATOMIC_SEQ_CST);
    if (~used == 0) {
        __atomic_fetch_add(&link->slot_freed, 1, __ATOMIC_SEQ_CST);
        soft_futex_wake(&link->slot_freed);
    }
}

/* How long kernels may hold what they hold, one after the other at worst. */
static uint64_t patience(const struct link *link)
{
    uint64_t ms = LINK_PATIENCE_MS;
    for (unsigned i = 0; i < link->soft->nports; i++)
        ms += __atomic_load_n(&link->soft->ports[i]->talk.deadline_ms, __ATOMIC_RELAXED);
    return ms;
}

/* What the slot holds when it is no longer posted, or when the process is gone. */
static uint32_t wait_for_acknowledgement(struct link *link, struct recall_slot *slot)
{
    uint64_t since = soft_now_ms();
    for (;;) {
        uint32_t state = __atomic_load_n(&slot->state, __ATOMIC_SEQ_CST);
        if (soft_link_gone(link))
            return SLOT_QUIET;
        if (state != SLOT_POSTED && state != SLOT_ASLEEP)
            return state;
        if (soft_now_ms() - since > patience(link))
            soft_link_kill(link, "it did not acknowledge an invalidation in time");
        if (state == SLOT_ASLEEP ||
            __atomic_compare_exchange_n(&slot->state, &state, SLOT_ASLEEP, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            channel_futex_wait(&slot->state, SLOT_ASLEEP, 500);
    }
}

static bool request(struct link *link, uintptr_t start, uintptr_t end, bool nowait)
{
    int i = claim_slot(link);
    if (i < 0)
        return true;
    struct recall_slot *slot = &link->channels->slots[i];
    slot->start = start;
    slot->end = end;
    slot->nowait = nowait;
    __atomic_store_n(&slot->state, SLOT_POSTED, __ATOMIC_SEQ_CST);
    __atomic_fetch_or(&link->channels->posted, 1ull << i, __ATOMIC_SEQ_CST);
    soft_link_ring(link);
    uint32_t state = wait_for_acknowledgement(link, slot);
    if (state != SLOT_QUIET && state != SLOT_USED) {
        soft_link_kill(link, "it acknowledged an invalidation with nonsense");
        while (!soft_link_gone(link)) /* only then is it certain that it uses nothing */
            soft_futex_wait(&link->gone, 0, 1000);
        state = SLOT_QUIET;
    }
    free_slot(link, i);
    return state == SLOT_QUIET;
}

bool soft_recall(struct link *link, uintptr_t start, uintptr_t end)
{
    return request(link, start, end, false);
}

bool soft_recall_nowait(struct link *link, uintptr_t start, uintptr_t end)
{
    return request(link, start, end, true);
}

void soft_link_probe(struct link *link)
{
    request(link, 0, SOFT_BLOCK, true);
}
