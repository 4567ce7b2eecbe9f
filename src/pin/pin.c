/* SPDX-License-Identifier: MIT */
/* See pin.h. */
#include "pin/pin.h"

#include <errno.h>

#include "base/error.h"
#include "debug/inject.h"
#include "migrate/migrate.h"
#include "mm/hold.h"
#include "notifier/changing.h"
#include "os/own.h"

#define SLOT_BITS 16
_Static_assert(HOLDS_MAX == 1u << SLOT_BITS, "a slot is the lower part of a pin");

#define POPULATE ((uintptr_t)16 << 20) /* at a time */
#define HOME_MAX_NS 10000000000ull     /* that a device has to give its pages */
#define HOME_STEP_NS 100000ull

/* The owner is written before the number. */
struct pin {
    uint64_t number;   /* atomic; 0: none. One exchange tells who unpins */
    const void *owner; /* atomic */
};

static struct pin *pins; /* HOLDS_MAX; atomic */
static uint64_t numbers; /* atomic: pins so far */
static uint64_t held;    /* atomic: now */
static uint64_t dirty;   /* atomic: ended so */

int pins_start(void)
{
    void *fresh;
    int r = holds_start();
    if (r || __atomic_load_n(&pins, __ATOMIC_ACQUIRE))
        return r;
    r = own_map(HOLDS_MAX * sizeof(*pins), os_page_size(), 0, &fresh);
    if (r)
        return hmm_fail(r, "no address space for pins (%zu KiB): %s", HOLDS_MAX * sizeof(*pins) >> 10, hmm_strerror(r));
    __atomic_store_n(&pins, fresh, __ATOMIC_RELEASE);
    return 0;
}

void pins_forget(void)
{
    pins = NULL;
    held = dirty = 0;
    holds_forget();
}

/* ---- one pin ---- */

int pin_enter(uintptr_t start, uintptr_t end, const void *owner, hmm_pin *pin, bool *managed)
{
    int slot = hold_enter(start, end);
    if (slot < 0)
        return slot;
    uint64_t number = __atomic_add_fetch(&numbers, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&pins[slot].owner, owner, __ATOMIC_RELAXED);
    __atomic_store_n(&pins[slot].number, number, __ATOMIC_RELEASE);
    __atomic_fetch_add(&held, 1, __ATOMIC_RELAXED);
    *pin = number << SLOT_BITS | (unsigned)slot;
    SEQ_POINT("pin-entered");
    *managed = changing_matters(start, end) && !mutate("pin-settle");
    return 0;
}

int pin_leave(hmm_pin pin, const void *owner)
{
    struct pin *all = __atomic_load_n(&pins, __ATOMIC_ACQUIRE);
    unsigned slot = pin & (HOLDS_MAX - 1);
    uint64_t number = pin >> SLOT_BITS;
    if (!all || !number || __atomic_load_n(&all[slot].number, __ATOMIC_ACQUIRE) != number)
        return -EINVAL;
    if (__atomic_load_n(&all[slot].owner, __ATOMIC_RELAXED) != owner)
        return -EPERM;
    if (!__atomic_compare_exchange_n(&all[slot].number, &number, 0, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return -EINVAL; /* somebody was quicker */
    __atomic_fetch_sub(&held, 1, __ATOMIC_RELAXED);
    hold_leave(slot);
    return 0;
}

uint64_t pins_count(void)
{
    return __atomic_load_n(&held, __ATOMIC_RELAXED);
}

uint64_t pins_dirty(void)
{
    return __atomic_load_n(&dirty, __ATOMIC_RELAXED);
}

void pin_count_dirty(void)
{
    __atomic_fetch_add(&dirty, 1, __ATOMIC_RELAXED);
}

/* ---- pages ---- */

/* Nothing leaves any more. */
int pin_settle(struct mm *mm, uintptr_t start, uintptr_t end)
{
    mm_land_range(mm, start, end);
    for (uint64_t since = os_now();;) {
        struct hmm_migrate_result res = {0};
        int r = migrate_range_to_system(mm, NULL, start, end, &res);
        if (mm_range_has(mm, start, end, ENTRY_POISON))
            return -EHWPOISON;
        if (!mm_range_has(mm, start, end, ENTRY_NONE))
            return 0;
        if (res.pinned)
            return -EBUSY;
        if (os_now() - since > HOME_MAX_NS)
            return r ? r : -EBUSY;
        os_sleep(HOME_STEP_NS);
    }
}

int pin_populate(uintptr_t start, uintptr_t end, bool write)
{
    lock_assert_none();
    for (uintptr_t at = start, to; at < end; at = to) {
        int r;
        to = end - at > POPULATE ? at + POPULATE : end;
        do
            r = os->advise((void *)at, to - at, write ? OS_ADVISE_POPULATE_WRITE : OS_ADVISE_POPULATE_READ);
        while (r == -EINTR || r == -EAGAIN);
        if (r)
            return r;
    }
    return 0;
}

void pin_touch(uintptr_t start, uintptr_t end, bool write)
{
    lock_assert_none();
    for (uintptr_t at = start; at < end; at += os_page_size())
        if (write)
            __atomic_fetch_or((unsigned char *)at, 0, __ATOMIC_RELAXED);
        else
            (void)*(volatile unsigned char *)at;
}

int pin_explain(struct mm *mm, uintptr_t start, uintptr_t end, bool write, int err, uintptr_t *at)
{
    struct os_vma v;
    for (*at = start; *at < end; *at = v.end) {
        int r = os->vma_query(mm->maps_fd, *at, &v);
        if (r == -ENOENT || (!r && (v.start > *at || !v.read)))
            return -EFAULT;
        if (r)
            return r;
        if (write && !v.write)
            return -EPERM;
    }
    *at = start;
    if (err == -EFAULT && mm->uffd.user_mode_only)
        return 0;
    return err == -EINVAL ? -EFAULT : err; /* memory of a kind that has no pages to give */
}
