/* SPDX-License-Identifier: MIT */
/*
 * hmm_range_fault() over memory that is in the CPU's page table: what an answer costs that brings nothing (range_snapshot), and one that
 * is to make everything writable and finds that it is (range_fault). Against PAGEMAP_SCAN of the same range, which is the least that
 * asking the kernel can cost. One library thread makes both calls, as a driver would.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <hmm/driver.h>

#include "harness.h"

/* Linux 6.7; newer than many headers. */
struct scan_region {
    uint64_t start, end, categories;
};
struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN _IOWR('f', 16, struct scan_arg)
#define SCAN_PRESENT (1u << 3)
#define SCAN_SWAPPED (1u << 4)
#define SCAN_ALL 0xffu /* every category of the first version */
#define REGIONS 512
#define REPEAT_PAGES (1u << 16) /* a run looks at so many pages at least: for a range of huge pages the clock is too coarse */

struct run {
    struct bench_env *env;
    struct hmm_device *dev;
    char *memory;
    uint64_t *pfns;
    uint64_t request;
    unsigned repeat;
    struct hmm_notifier notifier;
    struct samples samples;
    const char *error;
    int code;
};

static size_t pages(const struct run *r)
{
    return r->env->size / hmm_page_size();
}

static int fail(struct run *r, const char *error, int code)
{
    r->error = error;
    r->code = code;
    return 1;
}

/* The kernel's answer: every page is present. */
static int scan(struct run *r, int fd)
{
    struct scan_region v[REGIONS];
    uintptr_t start = (uintptr_t)r->memory, end = start + r->env->size;
    size_t present = 0;

    while (start < end) {
        struct scan_arg arg = {
            .size = sizeof(arg),
            .start = start,
            .end = end,
            .vec = (uintptr_t)v,
            .vec_len = REGIONS,
            .category_anyof_mask = SCAN_PRESENT | SCAN_SWAPPED,
            .return_mask = SCAN_ALL,
        };
        int n = ioctl(fd, SCAN, &arg);

        if (n < 0)
            return fail(r, "PAGEMAP_SCAN", -errno);
        for (int i = 0; i < n; i++)
            present += (v[i].end - v[i].start) / hmm_page_size();
        start = arg.walk_end;
    }
    return present == pages(r) ? 0 : fail(r, "not all of the memory is present", -ENOENT);
}

static int ask(struct run *r)
{
    struct hmm_fault_range range = {
        .size = sizeof(range),
        .notifier = &r->notifier,
        .start = (uintptr_t)r->memory,
        .end = (uintptr_t)r->memory + r->env->size,
        .pfns = r->pfns,
        .default_flags = r->request,
    };
    int code = hmm_range_fault_timeout(r->dev, &range, HMM_RANGE_DEFAULT_TIMEOUT_NS);

    return code ? fail(r, "hmm_range_fault()", code) : 0;
}

static int check(struct run *r)
{
    for (size_t i = 0; i < pages(r); i++) {
        uint64_t expected = HMM_PFN_VALID | HMM_PFN_WRITE | ((uintptr_t)r->memory / hmm_page_size() + i);

        if ((r->pfns[i] & ~(HMM_PFN_ORDER_MASK << HMM_PFN_ORDER_SHIFT)) != expected)
            return fail(r, "WRONG ANSWER of hmm_range_fault()", -EINVAL);
    }
    return 0;
}

static int one_pair(struct run *r, int fd, bool keep)
{
    double start = bench_now(), reference, ours;

    for (unsigned i = 0; i < r->repeat; i++)
        if (scan(r, fd))
            return 1;
    reference = bench_now() - start;
    memset(r->pfns, 0, pages(r) * sizeof(*r->pfns));
    start = bench_now();
    for (unsigned i = 0; i < r->repeat; i++)
        if (ask(r))
            return 1;
    ours = bench_now() - start;
    if (keep)
        samples_add(&r->samples, reference, ours);
    return check(r);
}

/* In a library thread, which has a descriptor table of its own. */
static void measure(void *arg)
{
    struct run *r = arg;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    if (fd < 0) {
        fail(r, "/proc/self/pagemap", -errno);
        return;
    }
    for (unsigned i = 0; i <= r->env->runs && !one_pair(r, fd, i > 0); i++) /* the first warms up */
        ;
    close(fd);
}

static int one_kind(struct bench_env *env, enum bench_page page, uint64_t request)
{
    static struct run r;
    struct hmm_thread *thread;
    int failed = 1;

    r = (struct run){.env = env, .dev = hmm_device_of(env->device), .request = request};
    r.memory = bench_map(env, env->size, page);
    if (!r.memory)
        return 1;
    bench_fill(r.memory, env->size, env->seed);
    r.repeat = pages(&r) < REPEAT_PAGES ? REPEAT_PAGES / (unsigned)pages(&r) : 1;
    r.pfns = hmm_mem_alloc(pages(&r) * sizeof(*r.pfns));
    if (!r.pfns) {
        bench_fail(env, "no memory for the answers");
        goto unmap;
    }
    if (hmm_notifier_insert(r.dev, &r.notifier, (uintptr_t)r.memory, (uintptr_t)r.memory + env->size, &bench_lets_go)) {
        bench_fail(env, "no notifier: %s", hmm_last_message());
        goto free;
    }
    if (hmm_thread_start(&thread, "bench", measure, &r)) {
        bench_fail(env, "no thread: %s", hmm_last_message());
        goto remove;
    }
    hmm_thread_join(thread);
    failed = r.error ? bench_fail(env, "%s: %s", r.error, strerror(-r.code)) : 0;
    if (!failed)
        samples_report(env, &r.samples, page, env->size, BENCH_NS_PER_OPERATION, (uint64_t)pages(&r) * r.repeat,
                       "ns a page, against PAGEMAP_SCAN");
remove:
    hmm_notifier_remove(&r.notifier);
free:
    hmm_mem_free(r.pfns, pages(&r) * sizeof(*r.pfns));
unmap:
    bench_unmap(r.memory, env->size);
    return failed;
}

static int snapshot_kind(struct bench_env *env, enum bench_page page)
{
    return one_kind(env, page, 0);
}

static int fault_kind(struct bench_env *env, enum bench_page page)
{
    return one_kind(env, page, HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE);
}

static int run_snapshot(struct bench_env *env)
{
    return bench_each_page(env, snapshot_kind);
}

static int run_fault(struct bench_env *env)
{
    return bench_each_page(env, fault_kind);
}

const struct bench bench_range_snapshot = {
    .name = "range_snapshot",
    .summary = "time a page of hmm_range_fault() that only looks, against PAGEMAP_SCAN",
    .run = run_snapshot,
};

const struct bench bench_range_fault = {
    .name = "range_fault",
    .summary = "time a page of hmm_range_fault() for writing over present memory, against PAGEMAP_SCAN",
    .run = run_fault,
};
