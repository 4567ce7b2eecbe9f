/* SPDX-License-Identifier: MIT */
/* The public calls for pins. */
#include <errno.h>
#include <string.h>

#include "api/manager.h"
#include "base/alloc.h"
#include "base/error.h"
#include "mm/hold.h"
#include "pin/pin.h"

struct pin_call {
    struct call call;
    struct mm *mm;
    uintptr_t start, end;
    bool write;
    int result;
    uintptr_t at;
};

static void run_settle(struct call *call)
{
    struct pin_call *c = container_of(call, struct pin_call, call);
    c->result = pin_settle(c->mm, c->start, c->end);
}

static void run_explain(struct call *call)
{
    struct pin_call *c = container_of(call, struct pin_call, call);
    c->result = pin_explain(c->mm, c->start, c->end, c->write, c->result, &c->at);
}

/* 0 and the description in full, or with message. */
static int check(const struct hmm_pin_desc *desc, struct hmm_pin_desc *full)
{
    memset(full, 0, sizeof(*full));
    if (desc && (desc->size < sizeof(*desc) || desc->size > 4096))
        return hmm_fail(-EINVAL, "hmm_pin_range: set desc->size to sizeof(struct hmm_pin_desc)");
    if (desc && desc->flags & ~(uint32_t)HMM_PIN_WRITE)
        return hmm_fail(-EINVAL, "hmm_pin_range: flags %#x are not known", desc->flags);
    if (desc)
        *full = *desc;
    return 0;
}

static int explain(const struct pin_call *c, int r)
{
    unsigned long start = c->start, end = c->end, at = c->at;
    switch (r) {
    case 0: return 0;
    case -EFAULT:
        return hmm_fail(r, "hmm_pin_range: from %#lx on there is no page to read: nothing is mapped, or no right to it", at);
    case -EPERM: return hmm_fail(r, "hmm_pin_range: %#lx is mapped read-only; pin it without HMM_PIN_WRITE", at);
    case -EHWPOISON: return hmm_fail(r, "hmm_pin_range: a page of [%#lx, %#lx) was lost with its device", start, end);
    case -EBUSY:
        return hmm_fail(r, "hmm_pin_range: a page of [%#lx, %#lx) is pinned on its device, or does not come home", start, end);
    case -EOVERFLOW:
        return hmm_fail(r, "hmm_pin_range: some 65,000 pins are in the same 2 MiB of [%#lx, %#lx): unpin some", start, end);
    case -ENFILE: return hmm_fail(r, "hmm_pin_range: %u pins, and no more: unpin some", HOLDS_MAX);
    default: return hmm_fail(r, "hmm_pin_range: [%#lx, %#lx): %s", start, end, hmm_strerror(r));
    }
}

/* In a library thread, which has the descriptors. Not on our stack, which may be managed memory. */
static int in_library(struct pin_call *c, void (*fn)(struct call *call))
{
    struct pin_call *there = mem_alloc(sizeof(*there));
    if (!there)
        return -ENOMEM;
    *there = *c;
    there->call.fn = fn;
    manager_call(&there->call);
    *c = *there;
    mem_free(there, sizeof(*there));
    return c->result;
}

static void run_land(struct call *call)
{
    const struct pin_call *c = container_of(call, struct pin_call, call);
    mm_land_range(c->mm, c->start, c->end);
}

static int settle(struct pin_call *c)
{
    struct hmm_migrate_result sum = {0};
    if (c->end - c->start > API_SPLIT_BYTES && in_library(c, run_land) == 0)
        api_bring_home(c->mm, c->start, c->end, &sum); /* by several threads; what is left is found below */
    return in_library(c, run_settle);
}

/* The pages come, and stay. */
static int bring(struct pin_call *c, bool managed)
{
    int r = managed ? settle(c) : 0;
    if (!r)
        c->result = r = pin_populate(c->start, c->end, c->write);
    else
        return r;
    if (!r || r == -EHWPOISON)
        return r;
    r = in_library(c, run_explain);
    if (!r)
        pin_touch(c->start, c->end, c->write);
    return r;
}

static int pin_pages(struct pin_call *c, const void *owner, hmm_pin *pin)
{
    bool managed;
    int r = pin_enter(c->start, c->end, owner, pin, &managed);
    if (r)
        return explain(c, r);
    r = bring(c, managed);
    if (r)
        pin_leave(*pin, owner);
    return explain(c, r);
}

int hmm_pin_range(const void *addr, size_t len, const struct hmm_pin_desc *desc, hmm_pin *pin)
{
    struct hmm_pin_desc full;
    struct pin_call c = {.at = 0};
    hmm_pin got = 0;
    int r = api_enter();
    if (!r && !pin)
        r = hmm_fail(-EINVAL, "hmm_pin_range: pin is NULL");
    if (!r)
        r = api_page_range("hmm_pin_range", addr, len, &c.start, &c.end);
    if (!r)
        r = check(desc, &full);
    if (r)
        return r;
    c.write = full.flags & HMM_PIN_WRITE;
    c.mm = manager_use();
    if (!c.mm)
        return hmm_fail(-ENODEV, "hmm_pin_range: no device is open, and nothing is managed");
    r = pin_pages(&c, full.owner, &got);
    manager_unuse();
    if (!r)
        *pin = got;
    return r;
}

int hmm_unpin(hmm_pin pin, const void *owner, bool dirty)
{
    int r = api_enter();
    if (r)
        return r;
    r = pin_leave(pin, owner);
    if (r)
        return hmm_fail(r, "hmm_unpin: %#llx %s", (unsigned long long)pin,
                        r == -EPERM ? "is of another owner" : "is not a pin (unpinned before?)");
    if (dirty)
        pin_count_dirty();
    return 0;
}

bool hmm_may_be_pinned(const void *addr, size_t len)
{
    uintptr_t start, end;
    return !api_enter() && !api_page_range("hmm_may_be_pinned", addr, len, &start, &end) && hold_any(start, end);
}
