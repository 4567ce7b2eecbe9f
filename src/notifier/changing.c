/* SPDX-License-Identifier: MIT */
/* See changing.h. */
#include "notifier/changing.h"

#include <errno.h>
#include <limits.h>

#include "base/error.h"
#include "base/futex.h"
#include "base/lock.h"
#include "debug/inject.h"
#include "os/own.h"

/* User addresses of 47 bits; those above are always asked about. */
#define ADDRESS_BITS 47
#define GRANULE_BITS 21
#define GRANULE ((uintptr_t)1 << GRANULE_BITS)
#define GRANULES ((uintptr_t)1 << (ADDRESS_BITS - GRANULE_BITS))
#define WORD_BITS 64
#define MARK_MAX ((uintptr_t)1 << 40) /* more than that: everything matters */

#define WAIT_NS 10000000ull /* between two looks at a slot */
uint64_t changing_wait_max_ns = 10000000000ull;

/* ENTERING: its range is being written. APART: silent, and migrations keep off. MADE: over, or given up. */
enum slot_state { SLOT_EMPTY, SLOT_ENTERING, SLOT_SILENT, SLOT_APART, SLOT_ANNOUNCED, SLOT_MADE };

static struct {
    struct mutex lock;   /* RANK_CHANGING: setting and clearing of bits */
    uint64_t *bits;      /* one per granule; atomic; NULL: everything matters. Never unmapped: readers have no lock */
    uint32_t everywhere; /* atomic: of what is there, how many are larger than MARK_MAX */
    uint64_t used[CHANGING_SLOTS / WORD_BITS]; /* bit per slot; atomic */
    struct {
        uintptr_t start, end; /* atomic; valid from SILENT on */
        uint32_t state;       /* atomic */
        uint32_t number;      /* of the change in it, so that a waiter knows whether it is still the same */
    } slot[CHANGING_SLOTS];
    uint32_t keeping; /* atomic: slots that migrations keep off: APART or ANNOUNCED */
    uint32_t waiters; /* atomic */
    uint32_t left;    /* futex: moves when a slot was left and somebody waits */
} changing = {.lock = MUTEX_INITIALIZER(RANK_CHANGING)};

int changing_start(void)
{
    void *bits = changing.bits;
    int r = bits ? os->remap_fresh(bits, GRANULES / 8, 0) : own_map(GRANULES / 8, os_page_size(), 0, &bits);
    if (r)
        return hmm_fail(r, "no address space for the map of managed memory (8 MiB): %s", hmm_strerror(r));
    __atomic_store_n(&changing.everywhere, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&changing.bits, bits, __ATOMIC_SEQ_CST);
    return 0;
}

void changing_forget(void)
{
    changing.lock = (struct mutex)MUTEX_INITIALIZER(RANK_CHANGING);
    changing.bits = NULL;
    changing.everywhere = changing.keeping = changing.waiters = 0;
    for (unsigned i = 0; i < CHANGING_SLOTS / WORD_BITS; i++)
        changing.used[i] = 0;
    for (unsigned i = 0; i < CHANGING_SLOTS; i++)
        changing.slot[i].state = SLOT_EMPTY;
}

/* ---- bits ---- */

/* Bits of word w that stand for granules of [first, last]. */
static uint64_t mask_of(uintptr_t w, uintptr_t first, uintptr_t last)
{
    uint64_t mask = ~(uint64_t)0;
    if (w == first / WORD_BITS)
        mask &= ~(uint64_t)0 << first % WORD_BITS;
    if (w == last / WORD_BITS)
        mask &= ~(uint64_t)0 >> (WORD_BITS - 1 - last % WORD_BITS);
    return mask;
}

void changing_mark(uintptr_t start, uintptr_t end)
{
    if (end > GRANULES << GRANULE_BITS) /* what is above is asked about anyway */
        end = GRANULES << GRANULE_BITS;
    if (!__atomic_load_n(&changing.bits, __ATOMIC_SEQ_CST) || start >= end)
        return;
    if (end - start > MARK_MAX) {
        __atomic_fetch_add(&changing.everywhere, 1, __ATOMIC_SEQ_CST);
        return;
    }
    uintptr_t first = start >> GRANULE_BITS, last = (end - 1) >> GRANULE_BITS;
    mutex_lock(&changing.lock);
    for (uintptr_t w = first / WORD_BITS; w <= last / WORD_BITS; w++) {
        uint64_t mask = mask_of(w, first, last);
        if ((__atomic_load_n(&changing.bits[w], __ATOMIC_RELAXED) & mask) != mask)
            __atomic_fetch_or(&changing.bits[w], mask, __ATOMIC_SEQ_CST);
    }
    mutex_unlock(&changing.lock); /* bits that others have set were set before, too: the slots are looked at after this */
}

void changing_unmark_large(uintptr_t start, uintptr_t end)
{
    if (end > GRANULES << GRANULE_BITS)
        end = GRANULES << GRANULE_BITS;
    if (__atomic_load_n(&changing.bits, __ATOMIC_SEQ_CST) && start < end && end - start > MARK_MAX)
        __atomic_fetch_sub(&changing.everywhere, 1, __ATOMIC_SEQ_CST);
}

void changing_unmark(uintptr_t start, uintptr_t end, bool (*nobody)(uintptr_t start, uintptr_t end, void *arg), void *arg)
{
    uintptr_t first = (start + GRANULE - 1) >> GRANULE_BITS, behind = end >> GRANULE_BITS;
    if (first >= behind || behind > GRANULES)
        return;
    mutex_lock(&changing.lock);
    if (changing.bits && nobody(first << GRANULE_BITS, behind << GRANULE_BITS, arg))
        for (uintptr_t w = first / WORD_BITS; w <= (behind - 1) / WORD_BITS; w++)
            __atomic_fetch_and(&changing.bits[w], ~mask_of(w, first, behind - 1), __ATOMIC_SEQ_CST);
    mutex_unlock(&changing.lock);
}

bool changing_matters(uintptr_t start, uintptr_t end)
{
    const uint64_t *bits = __atomic_load_n(&changing.bits, __ATOMIC_SEQ_CST);
    if (!bits || __atomic_load_n(&changing.everywhere, __ATOMIC_SEQ_CST) || end > GRANULES << GRANULE_BITS)
        return true;
    uintptr_t first = start >> GRANULE_BITS, last = (end - 1) >> GRANULE_BITS;
    for (uintptr_t w = first / WORD_BITS; w <= last / WORD_BITS; w++)
        if (__atomic_load_n(&bits[w], __ATOMIC_SEQ_CST) & mask_of(w, first, last))
            return true;
    return false;
}

/* ---- slots ---- */

/* Where a thread looks first: its own control block's address, so that threads do not all write to one word. */
static unsigned first_slot(void)
{
    uintptr_t x = (uintptr_t)__builtin_thread_pointer() >> 12;
    return (unsigned)(x ^ x >> 7);
}

static int claim(unsigned bound)
{
    unsigned first = first_slot();
    for (unsigned i = 0; i < bound; i++) {
        unsigned s = (first + i) % bound;
        uint64_t bit = (uint64_t)1 << s % WORD_BITS, *word = &changing.used[s / WORD_BITS];
        if (__atomic_load_n(word, __ATOMIC_RELAXED) & bit)
            continue;
        /* ENTERING before the bit: a waiter that sees the bit must not take the last change's range for this one's. */
        uint32_t empty = SLOT_EMPTY;
        if (!__atomic_compare_exchange_n(&changing.slot[s].state, &empty, SLOT_ENTERING, false, __ATOMIC_SEQ_CST,
                                         __ATOMIC_RELAXED))
            continue;
        __atomic_fetch_or(word, bit, __ATOMIC_SEQ_CST);
        return (int)s;
    }
    return -1;
}

int changing_enter_below(uintptr_t start, uintptr_t end, unsigned bound)
{
    int s = claim(bound);
    if (s < 0)
        return -1;
    __atomic_fetch_add(&changing.slot[s].number, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&changing.slot[s].start, start, __ATOMIC_RELAXED);
    __atomic_store_n(&changing.slot[s].end, end, __ATOMIC_RELAXED);
    __atomic_store_n(&changing.slot[s].state, SLOT_SILENT, __ATOMIC_SEQ_CST);
    return s;
}

int changing_enter(uintptr_t start, uintptr_t end)
{
    return changing_enter_below(start, end, CHANGING_SLOTS);
}

static void wake_waiters(void)
{
    if (!__atomic_load_n(&changing.waiters, __ATOMIC_SEQ_CST))
        return;
    __atomic_fetch_add(&changing.left, 1, __ATOMIC_SEQ_CST);
    futex_wake(&changing.left, INT_MAX);
}

static bool keeps_off(uint32_t state)
{
    return state == SLOT_APART || state == SLOT_ANNOUNCED;
}

/* The count is above the number of such slots for moments, never below. */
static void set_state(int s, enum slot_state state)
{
    if (keeps_off(state))
        __atomic_fetch_add(&changing.keeping, 1, __ATOMIC_SEQ_CST);
    if (keeps_off(__atomic_exchange_n(&changing.slot[s].state, state, __ATOMIC_SEQ_CST)))
        __atomic_fetch_sub(&changing.keeping, 1, __ATOMIC_SEQ_CST);
}

void changing_apart(int s)
{
    if (!mutate("change-apart"))
        set_state(s, SLOT_APART);
}

void changing_announce(int s)
{
    set_state(s, SLOT_ANNOUNCED);
    wake_waiters();
}

void changing_narrow(int s, uintptr_t start, uintptr_t end)
{
    __atomic_store_n(&changing.slot[s].start, start, __ATOMIC_RELAXED);
    __atomic_store_n(&changing.slot[s].end, end, __ATOMIC_RELAXED);
}

void changing_made(int s)
{
    set_state(s, SLOT_MADE);
}

void changing_leave(int s)
{
    set_state(s, SLOT_MADE);
    __atomic_fetch_and(&changing.used[s / WORD_BITS], ~((uint64_t)1 << s % WORD_BITS), __ATOMIC_SEQ_CST);
    __atomic_store_n(&changing.slot[s].state, SLOT_EMPTY, __ATOMIC_SEQ_CST);
    wake_waiters();
}

static bool slot_overlaps(int s, uintptr_t start, uintptr_t end)
{
    return __atomic_load_n(&changing.slot[s].start, __ATOMIC_RELAXED) < end &&
           start < __atomic_load_n(&changing.slot[s].end, __ATOMIC_RELAXED);
}

/* Whether a silent change of the range may be in the slot. */
static bool must_wait(int s, uintptr_t start, uintptr_t end)
{
    uint32_t state = __atomic_load_n(&changing.slot[s].state, __ATOMIC_SEQ_CST);
    return state == SLOT_ENTERING || ((state == SLOT_SILENT || state == SLOT_APART) && slot_overlaps(s, start, end));
}

/* Its thread does not come back: whoever comes later does not wait for it again. */
static void give_up_slot(int s)
{
    uint32_t state = __atomic_load_n(&changing.slot[s].state, __ATOMIC_SEQ_CST);
    hmm_log(HMM_LOG_ERROR, "a change of [%#lx, %#lx) did not end within %llu s; it is not waited for any more",
            (unsigned long)changing.slot[s].start, (unsigned long)changing.slot[s].end,
            (unsigned long long)(changing_wait_max_ns / 1000000000));
    bool waited = state == SLOT_ENTERING || state == SLOT_SILENT || state == SLOT_APART;
    if (waited && !mutate("changing-given-up") &&
        __atomic_compare_exchange_n(&changing.slot[s].state, &state, SLOT_MADE, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED) &&
        keeps_off(state))
        __atomic_fetch_sub(&changing.keeping, 1, __ATOMIC_SEQ_CST);
}

/* False: timeout_ns (< 0: for ever) have passed. */
static bool wait_slot(int s, uintptr_t start, uintptr_t end, int64_t timeout_ns)
{
    bool over = true;
    uint32_t number = __atomic_load_n(&changing.slot[s].number, __ATOMIC_RELAXED);
    uint32_t current = number;
    uint64_t began = os_now(), since = began; /* the change that is there now */
    __atomic_fetch_add(&changing.waiters, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint32_t left = __atomic_load_n(&changing.left, __ATOMIC_SEQ_CST);
        uint32_t seen = __atomic_load_n(&changing.slot[s].number, __ATOMIC_RELAXED);
        if (!must_wait(s, start, end) || seen - number > 1) /* by one: it was ENTERING */
            break;
        uint64_t now = os_now(), waited = now - began;
        if (seen != current && !mutate("changing-since"))
            since = now;
        current = seen;
        if (now - since > changing_wait_max_ns) {
            give_up_slot(s);
            break;
        }
        over = timeout_ns < 0 || waited < (uint64_t)timeout_ns;
        if (!over)
            break;
        int64_t rest = timeout_ns < 0 ? (int64_t)WAIT_NS : timeout_ns - (int64_t)waited;
        futex_wait(&changing.left, left, rest < (int64_t)WAIT_NS ? rest : (int64_t)WAIT_NS);
    }
    __atomic_fetch_sub(&changing.waiters, 1, __ATOMIC_SEQ_CST);
    return over;
}

bool changing_wait_timeout(uintptr_t start, uintptr_t end, int64_t timeout_ns)
{
    uint64_t since = 0;
    if (mutate("changing-wait"))
        return true;
    for (unsigned w = 0; w < CHANGING_SLOTS / WORD_BITS; w++) {
        uint64_t used = __atomic_load_n(&changing.used[w], __ATOMIC_SEQ_CST);
        for (; used; used &= used - 1) {
            int s = (int)w * WORD_BITS + __builtin_ctzll(used);
            if (!must_wait(s, start, end))
                continue;
            uint64_t now = os_now();
            since = since ? since : now;
            int64_t rest = timeout_ns < 0 ? -1 : timeout_ns - (int64_t)(now - since);
            if (!wait_slot(s, start, end, timeout_ns >= 0 && rest < 0 ? 0 : rest))
                return false;
        }
    }
    return true;
}

void changing_wait(uintptr_t start, uintptr_t end)
{
    changing_wait_timeout(start, end, -1);
}

bool changing_keeps_off(uintptr_t start, uintptr_t end)
{
    if (!__atomic_load_n(&changing.keeping, __ATOMIC_SEQ_CST))
        return false;
    for (int s = 0; s < CHANGING_SLOTS; s++)
        if (keeps_off(__atomic_load_n(&changing.slot[s].state, __ATOMIC_SEQ_CST)) && slot_overlaps(s, start, end))
            return true;
    return false;
}

bool changing_stands(int s)
{
    uint32_t state = __atomic_load_n(&changing.slot[s].state, __ATOMIC_SEQ_CST);
    return state == SLOT_SILENT || state == SLOT_APART || state == SLOT_ANNOUNCED;
}
