/* SPDX-License-Identifier: MIT */
/* See hold.h. */
#include "mm/hold.h"

#include <errno.h>
#include <string.h>

#include "base/error.h"
#include "debug/inject.h"
#include "os/own.h"

#define GRANULE_BITS 21
#define BUCKET_BITS 16
#define LARGE ((uintptr_t)1 << 34) /* what is larger counts everywhere */
#define WORD_BITS 64
#define WORDS (HOLDS_MAX / WORD_BITS)

/* end 0: nothing, or not yet. */
struct hold {
    uintptr_t start, end; /* atomic */
};

static struct room {
    uint16_t count[1 << BUCKET_BITS]; /* atomic: by 2 MiB of address space, hashed: holds that have something of it */
    struct hold hold[HOLDS_MAX];
    uint64_t used[WORDS]; /* atomic: bit per hold */
} * room;                 /* atomic */

static uint32_t all;        /* atomic: holds */
static uint32_t everywhere; /* atomic: those that are not counted by granule */
static uint32_t top;        /* atomic: words of `used` that were ever used */

int holds_start(void)
{
    void *fresh;
    if (__atomic_load_n(&room, __ATOMIC_ACQUIRE))
        return 0;
    int r = own_map(sizeof(*room), os_page_size(), 0, &fresh);
    if (r)
        return hmm_fail(r, "no address space for pins (%zu KiB): %s", sizeof(*room) >> 10, hmm_strerror(r));
    __atomic_store_n(&room, fresh, __ATOMIC_RELEASE);
    return 0;
}

void holds_forget(void)
{
    room = NULL;
    all = everywhere = top = 0;
}

static bool is_counted(uintptr_t start, uintptr_t end)
{
    return end - start <= LARGE;
}

static uint16_t *bucket(struct room *r, uintptr_t granule)
{
    return &r->count[(uint64_t)granule * 0x9e3779b97f4a7c15ull >> (64 - BUCKET_BITS)];
}

/* Takes what count_in() did from the granules [first, behind). */
static void count_out(struct room *r, uintptr_t first, uintptr_t behind)
{
    for (uintptr_t g = first; g < behind; g++)
        __atomic_fetch_sub(bucket(r, g), 1, __ATOMIC_SEQ_CST);
}

static int count_in(struct room *r, uintptr_t start, uintptr_t end)
{
    if (!is_counted(start, end)) {
        __atomic_fetch_add(&everywhere, 1, __ATOMIC_SEQ_CST);
        return 0;
    }
    uintptr_t first = start >> GRANULE_BITS, last = (end - 1) >> GRANULE_BITS;
    for (uintptr_t g = first; g <= last; g++) {
        uint16_t n = __atomic_load_n(bucket(r, g), __ATOMIC_RELAXED);
        do {
            if (n == UINT16_MAX) {
                count_out(r, first, g);
                return -EOVERFLOW;
            }
        } while (!__atomic_compare_exchange_n(bucket(r, g), &n, n + 1, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    }
    return 0;
}

static int claim(struct room *r)
{
    for (uint32_t w = 0; w < WORDS; w++) {
        uint64_t used = __atomic_load_n(&r->used[w], __ATOMIC_RELAXED);
        while (~used) {
            unsigned bit = (unsigned)__builtin_ctzll(~used);
            if (!__atomic_compare_exchange_n(&r->used[w], &used, used | (uint64_t)1 << bit, true, __ATOMIC_SEQ_CST,
                                             __ATOMIC_RELAXED))
                continue;
            uint32_t before = __atomic_load_n(&top, __ATOMIC_RELAXED);
            while (before <= w && !__atomic_compare_exchange_n(&top, &before, w + 1, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
                ;
            return (int)(w * WORD_BITS + bit);
        }
    }
    return -ENFILE;
}

static void give_back(struct room *r, unsigned slot)
{
    __atomic_fetch_and(&r->used[slot / WORD_BITS], ~((uint64_t)1 << slot % WORD_BITS), __ATOMIC_SEQ_CST);
}

int hold_enter(uintptr_t start, uintptr_t end)
{
    struct room *r = __atomic_load_n(&room, __ATOMIC_ACQUIRE);
    int slot = r ? claim(r) : -ENOMEM;
    if (slot < 0)
        return slot;
    __atomic_store_n(&r->hold[slot].start, start, __ATOMIC_RELAXED);
    __atomic_store_n(&r->hold[slot].end, end, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&all, 1, __ATOMIC_SEQ_CST);
    int err = count_in(r, start, end);
    if (!err)
        return slot;
    __atomic_store_n(&r->hold[slot].end, 0, __ATOMIC_SEQ_CST);
    __atomic_fetch_sub(&all, 1, __ATOMIC_SEQ_CST);
    give_back(r, (unsigned)slot);
    return err;
}

void hold_leave(unsigned slot)
{
    struct room *r = __atomic_load_n(&room, __ATOMIC_ACQUIRE);
    uintptr_t start = r->hold[slot].start, end = r->hold[slot].end;
    __atomic_store_n(&r->hold[slot].end, 0, __ATOMIC_SEQ_CST);
    if (is_counted(start, end))
        count_out(r, start >> GRANULE_BITS, ((end - 1) >> GRANULE_BITS) + 1);
    else
        __atomic_fetch_sub(&everywhere, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_sub(&all, 1, __ATOMIC_SEQ_CST);
    give_back(r, slot);
}

/* By the counts alone. */
static bool perhaps(struct room *r, uintptr_t start, uintptr_t end)
{
    if (!r || !__atomic_load_n(&all, __ATOMIC_SEQ_CST) || mutate("hold"))
        return false;
    if (!is_counted(start, end) || __atomic_load_n(&everywhere, __ATOMIC_SEQ_CST))
        return true;
    for (uintptr_t g = start >> GRANULE_BITS; g <= (end - 1) >> GRANULE_BITS; g++)
        if (__atomic_load_n(bucket(r, g), __ATOMIC_SEQ_CST))
            return true;
    return false;
}

void hold_each(uintptr_t start, uintptr_t end, void (*fn)(uintptr_t start, uintptr_t end, void *arg), void *arg)
{
    struct room *r = __atomic_load_n(&room, __ATOMIC_ACQUIRE);
    if (start >= end || !perhaps(r, start, end))
        return;
    uint32_t words = __atomic_load_n(&top, __ATOMIC_SEQ_CST);
    for (uint32_t w = 0; w < words; w++)
        for (uint64_t used = __atomic_load_n(&r->used[w], __ATOMIC_SEQ_CST); used; used &= used - 1) {
            const struct hold *h = &r->hold[w * WORD_BITS + (unsigned)__builtin_ctzll(used)];
            uintptr_t to = __atomic_load_n(&h->end, __ATOMIC_SEQ_CST), from = __atomic_load_n(&h->start, __ATOMIC_RELAXED);
            if (from < end && start < to)
                fn(from > start ? from : start, to < end ? to : end, arg);
        }
}

static void say_yes(uintptr_t start, uintptr_t end, void *arg)
{
    (void)start, (void)end;
    *(bool *)arg = true;
}

bool hold_any(uintptr_t start, uintptr_t end)
{
    bool any = false;
    hold_each(start, end, say_yes, &any);
    return any;
}
