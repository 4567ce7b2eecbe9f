/* SPDX-License-Identifier: MIT */
/*
 * Limits of device memory (kernel: mm/page_counter.c). The use of one pagemap is its `used`, under its lock. That of the process is one
 * counter for all pagemaps: atomic, never above the limit by an allocation, above it only where the limit was lowered.
 */
#include "pagemap/limit.h"

#include "debug/inject.h"

static uint64_t total_limit; /* atomic; pages, 0: none */
static uint64_t total_used;  /* atomic; pages */

static uint64_t read_word(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* The most pages that it can have at once. Caller holds the lock. */
static uint64_t capacity(const struct pagemap *pm)
{
    return pm->limit && pm->limit < pm->desc.pages ? pm->limit : pm->desc.pages;
}

/* Takes as much of `want` as the limit of the process leaves. */
static uint64_t charge_total(uint64_t want)
{
    uint64_t used = read_word(&total_used), limit = read_word(&total_limit), n;
    do {
        uint64_t left = !limit ? want : limit > used ? limit - used : 0;
        n = want < left || mutate("limit-total") ? want : left;
    } while (!__atomic_compare_exchange_n(&total_used, &used, used + n, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return n;
}

uint64_t limit_charge(const struct pagemap *pm, uint64_t want)
{
    uint64_t most = mutate("limit-device") ? pm->desc.pages : capacity(pm), left = most > pm->used ? most - pm->used : 0;
    return charge_total(want < left ? want : left);
}

void limit_uncharge(uint64_t pages)
{
    __atomic_fetch_sub(&total_used, pages, __ATOMIC_RELAXED);
}

void limit_forget(void)
{
    total_used = 0;
}

/* ---- asking and setting ---- */

void pagemap_set_limit(struct pagemap *pm, uint64_t pages)
{
    mutex_lock(&pm->lock);
    pm->limit = pages;
    mutex_unlock(&pm->lock);
}

uint64_t pagemap_limit(struct pagemap *pm)
{
    mutex_lock(&pm->lock);
    uint64_t limit = pm->limit;
    mutex_unlock(&pm->lock);
    return limit;
}

uint64_t pagemap_capacity(struct pagemap *pm)
{
    mutex_lock(&pm->lock);
    uint64_t most = capacity(pm);
    mutex_unlock(&pm->lock);
    return most;
}

void pagemap_set_total_limit(uint64_t pages)
{
    __atomic_store_n(&total_limit, pages, __ATOMIC_RELAXED);
}

uint64_t pagemap_total_limit(void)
{
    return read_word(&total_limit);
}

uint64_t pagemap_total_used(void)
{
    return read_word(&total_used);
}

int64_t pagemap_total_room(void)
{
    uint64_t limit = pagemap_total_limit();
    return limit ? (int64_t)(limit - pagemap_total_used()) : INT64_MAX;
}

struct pagemap_room pagemap_room(struct pagemap *pm)
{
    struct pagemap_room room = {.total = pagemap_total_room()};
    mutex_lock(&pm->lock);
    int64_t available = (int64_t)(pm->desc.pages - pm->used);
    room.own = (int64_t)capacity(pm) - (int64_t)pm->used;
    mutex_unlock(&pm->lock);
    room.limited = room.own < available || room.total < room.own;
    return room;
}
