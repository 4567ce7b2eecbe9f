/* SPDX-License-Identifier: MIT */
/* Explicit migrations and other calls that need a library thread (the descriptors are there). */
#include <errno.h>
#include <string.h>

#include "api/manager.h"
#include "base/alloc.h"
#include "base/error.h"
#include "inspect/inspect.h"
#include "reclaim/reclaim.h"

size_t hmm_page_size(void)
{
    return os_page_size();
}

const char *hmm_version(void)
{
    return "0.1.0";
}

/* Above the user half of every 64-bit address space that Linux has; blocks below it do not wrap around. */
#define ADDRESS_END ((uintptr_t)1 << (sizeof(uintptr_t) == 8 ? 57 : 31))

/* [addr, addr+len) rounded outwards to pages. */
int api_page_range(const char *what, const void *addr, size_t len, uintptr_t *start, uintptr_t *end)
{
    uintptr_t a = (uintptr_t)addr, mask = os_page_size() - 1;
    if (len == 0)
        return hmm_fail(-EINVAL, "%s: the length is 0", what);
    if (a + len < a || a + len > UINTPTR_MAX - mask)
        return hmm_fail(-EINVAL, "%s: the range at %p of %zu bytes wraps around the address space", what, addr, len);
    if (a + len > ADDRESS_END)
        return hmm_fail(-EFAULT, "%s: nothing is mapped at %p and %zu bytes on: it is beyond the user address space", what,
                        addr, len);
    *start = a & ~mask;
    *end = (a + len + mask) & ~mask;
    return 0;
}

/* What library threads write while they hold locks, or a page in flight, must not stand on the caller's stack, which may be managed
 * memory (a coroutine's): records are ours, and copied out afterwards. */
static void *new_record(size_t bytes)
{
    return mem_alloc(bytes);
}

struct migrate_call {
    struct call call;
    struct mm *mm;
    struct hmm_device *dev;
    uintptr_t start, end;
    struct hmm_migrate_result res;
    int result;
};

static void add_results(struct hmm_migrate_result *sum, const struct hmm_migrate_result *r)
{
    sum->moved += r->moved;
    sum->already += r->already;
    sum->cleared += r->cleared;
    sum->huge += r->huge;
    sum->pinned += r->pinned;
    sum->unmovable += r->unmovable;
    sum->unmapped += r->unmapped;
    sum->busy += r->busy;
    sum->limited += r->limited;
    if (r->first_stayed && (!sum->first_stayed || r->first_stayed < sum->first_stayed))
        sum->first_stayed = r->first_stayed;
}

static void give_result(struct hmm_migrate_result *out, const struct hmm_migrate_result *sum)
{
    if (!out)
        return;
    uint32_t size = out->size;
    memcpy(out, sum, size < sizeof(*sum) ? size : sizeof(*sum));
    out->size = size;
}

static int check_result(const char *what, const struct hmm_migrate_result *res)
{
    if (!res || (res->size >= 8 && res->size <= 4096))
        return 0;
    return hmm_fail(-EINVAL, "%s: set result->size to sizeof(struct hmm_migrate_result)", what);
}

/* Every violation is logged. */
static void validate(struct mm *mm)
{
    struct audit_report report;
    if (manager_validates())
        inspect_audit(mm, devices_each, &report);
}

static void run_to_device(struct call *call)
{
    struct migrate_call *c = container_of(call, struct migrate_call, call);
    c->result = reclaim_migrate_to_device(c->mm, c->dev, c->start, c->end, &c->res);
    validate(c->mm);
}

int hmm_migrate_to_device(hmm_dev handle, const void *addr, size_t len, struct hmm_migrate_result *res)
{
    uintptr_t start = 0, end = 0;
    int r = api_enter();
    if (!r)
        r = check_result("hmm_migrate_to_device", res);
    if (!r)
        r = api_page_range("hmm_migrate_to_device", addr, len, &start, &end);
    if (r)
        return r;
    struct hmm_device *dev = device_get(handle);
    if (!dev)
        return -ENODEV;
    struct migrate_call *c = new_record(sizeof(*c));
    if (c) {
        *c = (struct migrate_call){.call.fn = run_to_device, .dev = dev, .mm = dev->mm, .start = start, .end = end};
        manager_call(&c->call);
    }
    struct hmm_migrate_result sum = c ? c->res : (struct hmm_migrate_result){0};
    r = c ? c->result : -ENOMEM;
    mem_free(c, sizeof(*c));
    int refused = 0;
    if (r)
        refused = device_refuse_lost(dev);
    else if (sum.limited && sum.moved + sum.already == 0)
        refused = limit_refused(dev, sum.limited);
    device_put(dev);
    if (refused)
        return refused;
    if (r)
        return hmm_fail(r, "migration of [%#lx, %#lx) to the device stopped: %s", (unsigned long)start, (unsigned long)end,
                        hmm_strerror(r));
    if (sum.unmapped == (end - start) >> os_page_shift())
        return hmm_fail(-EFAULT, "nothing is mapped in [%#lx, %#lx)", (unsigned long)start, (unsigned long)end);
    give_result(res, &sum);
    return 0;
}

static void run_to_system(struct call *call)
{
    struct migrate_call *c = container_of(call, struct migrate_call, call);
    c->result = migrate_range_to_system(c->mm, NULL, c->start, c->end, &c->res);
    validate(c->mm);
}

#define CALLS_MAX 4

int api_bring_home(struct mm *mm, uintptr_t start, uintptr_t end, struct hmm_migrate_result *sum)
{
    int r = 0;
    struct migrate_call *c = new_record(CALLS_MAX * sizeof(*c));
    if (!c)
        return -ENOMEM;
    unsigned n = end - start > API_SPLIT_BYTES ? manager_callers() : 1;
    uintptr_t part = ((end - start) / n + OS_BLOCK_SIZE - 1) & BLOCK_MASK;
    for (unsigned i = 0; i < n; i++) {
        c[i] = (struct migrate_call){.call.fn = run_to_system, .mm = mm, .start = i ? c[i - 1].end : start, .end = end};
        if (i + 1 < n && ((c[i].start & BLOCK_MASK) + part) < end)
            c[i].end = (c[i].start & BLOCK_MASK) + part;
        manager_start_call(&c[i].call);
    }
    for (unsigned i = 0; i < n; i++) {
        manager_wait_call(&c[i].call);
        add_results(sum, &c[i].res);
        r = r ? r : c[i].result;
    }
    mem_free(c, CALLS_MAX * sizeof(*c));
    return r;
}

int hmm_migrate_to_system(const void *addr, size_t len, struct hmm_migrate_result *res)
{
    struct hmm_migrate_result sum = {0};
    uintptr_t start = 0, end = 0;
    int r = api_enter();
    if (!r)
        r = check_result("hmm_migrate_to_system", res);
    if (!r)
        r = api_page_range("hmm_migrate_to_system", addr, len, &start, &end);
    if (r)
        return r;
    struct mm *mm = manager_use();
    if (!mm)
        return -ENODEV;
    r = api_bring_home(mm, start, end, &sum);
    manager_unuse();
    if (r)
        return hmm_fail(r, "bringing [%#lx, %#lx) home stopped: %s", (unsigned long)start, (unsigned long)end, hmm_strerror(r));
    uint64_t counted = sum.moved + sum.pinned + sum.unmovable + sum.busy, pages = (end - start) >> os_page_shift();
    sum.already = pages > counted ? pages - counted : 0;
    give_result(res, &sum);
    return 0;
}

/* ---- where is it ---- */

#define QUERY_PAGES 512

struct query_call {
    struct call call;
    struct mm *mm;
    uintptr_t start, end;
    struct hmm_page_info pages[QUERY_PAGES];
    int result;
};

static void run_query(struct call *call)
{
    struct query_call *c = container_of(call, struct query_call, call);
    c->result = inspect_query(c->mm, c->start, c->end, c->pages, device_handle);
}

int64_t hmm_range_query(const void *addr, size_t len, struct hmm_page_info *pages, size_t max)
{
    uintptr_t start = 0, end = 0;
    int r = api_enter();
    if (!r)
        r = api_page_range("hmm_range_query", addr, len, &start, &end);
    if (r)
        return r;
    size_t n = (end - start) >> os_page_shift();
    if (!pages || max < n)
        return hmm_fail(-ENOSPC, "hmm_range_query: %zu pages, room for %zu", n, pages ? max : 0);
    struct mm *mm = manager_use();
    if (!mm)
        return -ENODEV;
    struct query_call *c = new_record(sizeof(*c));
    r = c ? 0 : -ENOMEM;
    while (start < end && !r) {
        uintptr_t stop = (start & BLOCK_MASK) + OS_BLOCK_SIZE;
        stop = stop < end ? stop : end;
        c->call.fn = run_query;
        c->mm = mm;
        c->start = start;
        c->end = stop;
        manager_call(&c->call);
        r = c->result;
        size_t k = (stop - start) >> os_page_shift();
        if (!r)
            memcpy(pages, c->pages, k * sizeof(*pages));
        pages += k;
        start = stop;
    }
    mem_free(c, sizeof(*c));
    manager_unuse();
    return r ? hmm_fail(r, "hmm_range_query: %s", hmm_strerror(r)) : (int64_t)n;
}

struct audit_call {
    struct call call;
    struct mm *mm;
    struct audit_report report;
    int violations;
};

static void run_audit(struct call *call)
{
    struct audit_call *c = container_of(call, struct audit_call, call);
    c->violations = inspect_audit(c->mm, devices_each, &c->report);
}

int hmm_audit(void)
{
    int r = api_enter();
    if (r)
        return r;
    struct mm *mm = manager_use();
    if (!mm)
        return -ENODEV;
    struct audit_call *c = new_record(sizeof(*c));
    if (!c) {
        manager_unuse();
        return hmm_fail(-ENOMEM, "no memory for an audit");
    }
    c->call.fn = run_audit;
    c->mm = mm;
    manager_call(&c->call);
    r = c->violations;
    if (r > 0)
        hmm_fail(0, "%s", c->report.first);
    mem_free(c, sizeof(*c));
    manager_unuse();
    return r;
}

int hmm_stats(struct hmm_stats *stats)
{
    int r = api_enter();
    if (r)
        return r;
    if (!stats || stats->size < 8 || stats->size > 65536)
        return hmm_fail(-EINVAL, "hmm_stats: set stats->size to sizeof(struct hmm_stats)");
    struct mm *mm = manager_use();
    if (!mm)
        return -ENODEV;
    struct hmm_stats all = {.descriptor_bytes = devices_descriptor_bytes()};
    inspect_stats(mm, &all);
    manager_unuse();
    uint32_t size = stats->size;
    memcpy(stats, &all, size < sizeof(all) ? size : sizeof(all));
    stats->size = size;
    return 0;
}
