/* SPDX-License-Identifier: MIT */
/* Limits of device memory: of one device, and of the process. What they count is in pagemap/limit.c; how room is made, in reclaim/. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "api/drivers.h"
#include "api/manager.h"
#include "base/alloc.h"
#include "base/error.h"
#include "reclaim/reclaim.h"

#define STEP_NS 100000000
#define OVERDUE_NS 1000000000 /* a callback that runs for so long is worth naming */

static uint32_t set_by_program; /* atomic: then HMM_LIMIT says nothing any more */

static unsigned long long bytes_of(uint64_t pages)
{
    return (unsigned long long)pages << os_page_shift();
}

int limits_start(void)
{
    const char *text = getenv("HMM_LIMIT");
    uint64_t bytes = 0;
    if (__atomic_load_n(&set_by_program, __ATOMIC_ACQUIRE))
        return 0;
    if (text && *text && (parse_size(text, strlen(text), &bytes) || (bytes && bytes < os_page_size())))
        return hmm_fail(-EINVAL,
                        "HMM_LIMIT='%s' is not a size of a page or more (a number with an optional K, M, G or T; 0: no limit)",
                        text);
    pagemap_set_total_limit(bytes >> os_page_shift());
    return 0;
}

/* ---- meeting a limit ---- */

struct limit_call {
    struct call call;
    struct mm *mm;
    struct hmm_device *dev; /* NULL: of the process. Kept open until the call has ended */
    uint32_t give_up;       /* atomic */
};

static uint64_t used_of(const struct limit_call *c)
{
    return c->dev ? pagemap_used(c->dev->pagemap) : pagemap_total_used();
}

static uint64_t limit_of(const struct limit_call *c)
{
    return c->dev ? pagemap_limit(c->dev->pagemap) : pagemap_total_limit();
}

static bool is_met(const struct limit_call *c)
{
    uint64_t limit = limit_of(c);
    return limit == 0 || used_of(c) <= limit;
}

/* What is in flight or in limbo comes free by itself; what a device uses may do so. */
static void run_limit(struct call *call)
{
    struct limit_call *c = container_of(call, struct limit_call, call);
    while (!reclaim_to_limit(c->mm, c->dev) && !__atomic_load_n(&c->give_up, __ATOMIC_ACQUIRE))
        os_sleep(STEP_NS / 10);
}

static void end_call(struct call *call)
{
    struct limit_call *c = container_of(call, struct limit_call, call);
    if (c->dev)
        device_put(c->dev);
    manager_unuse();
    mem_free(c, sizeof(*c));
}

static int not_met(const struct limit_call *c)
{
    struct notifier_overdue o;
    char text[128] = "pages are pinned or in use";
    if (notifier_overdue(&c->mm->notifiers, c->dev, OVERDUE_NS, &o))
        notifier_overdue_text(&c->mm->notifiers, &o, text, sizeof(text));
    if (c->dev)
        return hmm_fail(-EBUSY, "device %s has %llu bytes in use, which its limit of %llu does not allow: %s; the limit stands",
                        c->dev->driver->name, bytes_of(used_of(c)), bytes_of(limit_of(c)), text);
    return hmm_fail(-EBUSY,
                    "the process has %llu bytes on devices, which its limit of %llu does not allow: %s; the limit stands",
                    bytes_of(used_of(c)), bytes_of(limit_of(c)), text);
}

/* Evicts until the limit is met. The caller is inside manager_use() and device_get(), which end with the call: a library thread that a
 * device holds up may need them for longer than we wait. */
static int meet(struct mm *mm, struct hmm_device *dev)
{
    struct limit_call *c = mem_alloc(sizeof(*c)), now = {.mm = mm, .dev = dev};
    if (!c) {
        if (dev)
            device_put(dev);
        manager_unuse();
        return hmm_fail(-ENOMEM, "no memory to evict pages with: the limit is set, but not met yet; set it again");
    }
    *c = now;
    c->call.fn = run_limit;
    c->call.abandoned = end_call;
    manager_start_call(&c->call);
    uint64_t used = used_of(&now), until = os_now() + manager_patience_ns();
    bool done;
    while (!(done = manager_call_done_for(&c->call, STEP_NS)) && os_now() < until)
        if (used_of(&now) < used) {
            used = used_of(&now);
            until = os_now() + manager_patience_ns();
        }
    int r = is_met(&now) ? 0 : not_met(&now);
    __atomic_store_n(&c->give_up, 1, __ATOMIC_RELEASE);
    if (done || manager_wait_call_for(&c->call, STEP_NS))
        end_call(&c->call);
    return r;
}

/* ---- the calls ---- */

int hmm_device_set_limit(hmm_dev handle, uint64_t bytes)
{
    int r = api_enter();
    if (r)
        return r;
    struct mm *mm = manager_use();
    if (!mm)
        return -ENODEV;
    struct hmm_device *dev = device_get(handle);
    if (!dev) {
        manager_unuse();
        return -ENODEV;
    }
    uint64_t granule = pagemap_granule(dev->pagemap);
    if (bytes && bytes < granule) {
        r = hmm_fail(-EINVAL, "a limit of %llu bytes is less than a page of device %s (%llu bytes); 0 is no limit",
                     (unsigned long long)bytes, dev->driver->name, (unsigned long long)granule);
        device_put(dev);
        manager_unuse();
        return r;
    }
    pagemap_set_limit(dev->pagemap, bytes >> os_page_shift());
    return meet(mm, dev);
}

int hmm_set_limit(uint64_t bytes)
{
    int r = api_enter();
    if (r)
        return r;
    if (bytes && bytes < os_page_size())
        return hmm_fail(-EINVAL, "a limit of %llu bytes is less than a page (%zu bytes); 0 is no limit",
                        (unsigned long long)bytes, os_page_size());
    __atomic_store_n(&set_by_program, 1, __ATOMIC_RELEASE);
    pagemap_set_total_limit(bytes >> os_page_shift());
    struct mm *mm = manager_use();
    if (mm)
        return meet(mm, NULL);
    message_clear(); /* it is for the devices to come */
    return 0;
}

int limit_refused(struct hmm_device *dev, uint64_t pages)
{
    struct pagemap_room room = pagemap_room(dev->pagemap);
    uint64_t limit = pagemap_limit(dev->pagemap);
    if (room.total < room.own || !limit)
        return hmm_fail(-ENOSPC,
                        "none of %llu pages find room on device %s: the process has %llu of at most %llu bytes on devices, and "
                        "what is there cannot be evicted; raise hmm_set_limit() or HMM_LIMIT, or bring other memory home",
                        (unsigned long long)pages, dev->driver->name, bytes_of(pagemap_total_used()),
                        bytes_of(pagemap_total_limit()));
    return hmm_fail(
        -ENOSPC,
        "none of %llu pages find room on device %s: %llu of at most %llu bytes are in use, and what is there cannot be "
        "evicted; raise hmm_device_set_limit(), or bring other memory home",
        (unsigned long long)pages, dev->driver->name, bytes_of(pagemap_used(dev->pagemap)), bytes_of(limit));
}
