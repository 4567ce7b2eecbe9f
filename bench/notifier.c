/* SPDX-License-Identifier: MIT */
/*
 * Whether somebody watches an address, among 1, 1,000 and 100,000 intervals: what every munmap() of a program asks first. Against a binary
 * search of the same intervals in a sorted array, which nobody can change. The time may grow with the logarithm of their number.
 */
#include <stdio.h>
#include <stdlib.h>

#include <hmm/driver.h>

#include "harness.h"

#define LOOKUPS 200000
#define STRIDE 4 /* pages from one interval to the next; each is of one page */

struct intervals {
    struct hmm_notifier *nodes;
    uintptr_t *starts; /* sorted */
    size_t n, page;
};

/* Addresses of which about every fourth is watched; the same for both sides. */
static uintptr_t address(const struct intervals *v, uint64_t i)
{
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull;

    return (uintptr_t)((x >> 20) % (v->n * STRIDE) + 1) * v->page;
}

static bool search(const struct intervals *v, uintptr_t addr)
{
    size_t low = 0, high = v->n;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if (v->starts[middle] <= addr)
            low = middle + 1;
        else
            high = middle;
    }
    return low > 0 && addr < v->starts[low - 1] + v->page;
}

struct run {
    struct bench_env *env;
    struct hmm_device *dev;
    struct intervals v;
    struct samples samples;
    bool wrong;
};

static void one_pair(struct run *r, bool keep)
{
    const struct intervals *v = &r->v;
    uint64_t expected = 0, found = 0;
    double start = bench_now(), reference;

    for (uint64_t i = 0; i < LOOKUPS; i++)
        expected += search(v, address(v, i));
    reference = bench_now() - start;
    start = bench_now();
    for (uint64_t i = 0; i < LOOKUPS; i++)
        found += hmm_notifier_any(r->dev, address(v, i), address(v, i) + v->page);
    if (keep)
        samples_add(&r->samples, reference, bench_now() - start);
    r->wrong |= found != expected;
}

/* In a library thread, as events are applied and migrations run. (A thread of the program blocks its signals with each lock.) */
static void measure(void *arg)
{
    struct run *r = arg;

    for (unsigned i = 0; i <= r->env->runs && !r->wrong; i++)
        one_pair(r, i > 0); /* the first warms up */
}

/* In no order: as drivers come and go. */
static int insert_all(struct bench_env *env, struct hmm_device *dev, struct intervals *v)
{
    size_t step = v->n > 1 ? v->n / 2 + 1 : 1; /* made prime to n */

    while (v->n > 1 && (v->n % step == 0 || (step % 2 == 0 && v->n % 2 == 0) || (step % 5 == 0 && v->n % 5 == 0)))
        step++;
    for (size_t i = 0, k = 0; i < v->n; i++, k = (k + step) % v->n) {
        v->starts[k] = (k * STRIDE + 1) * v->page;
        if (hmm_notifier_insert(dev, &v->nodes[k], v->starts[k], v->starts[k] + v->page, &bench_lets_go))
            return bench_fail(env, "interval %zu: %s", k, hmm_last_message());
    }
    return 0;
}

static int report(struct bench_env *env, const struct run *r)
{
    const char *name = env->name;
    char full[64];

    if (r->wrong)
        return bench_fail(env, "WRONG ANSWER: another number of addresses is watched");
    snprintf(full, sizeof(full), "%s_%zu", name, r->v.n);
    env->name = full;
    samples_report(env, &r->samples, BENCH_4K, r->v.n * r->v.page, BENCH_NS_PER_OPERATION, LOOKUPS, "against a binary search");
    env->name = name;
    return 0;
}

static int with_intervals(struct bench_env *env, size_t n)
{
    static struct run r;
    struct hmm_thread *thread;
    int failed;

    r = (struct run){.env = env, .dev = hmm_device_of(env->device), .v = {.n = n, .page = hmm_page_size()}};
    r.v.nodes = hmm_mem_alloc(n * sizeof(*r.v.nodes)); /* zeroed: removing one that was not inserted is refused */
    r.v.starts = calloc(n, sizeof(*r.v.starts));
    failed = r.v.nodes && r.v.starts ? insert_all(env, r.dev, &r.v) : bench_fail(env, "no memory for %zu intervals", n);
    if (!failed && hmm_thread_start(&thread, "bench", measure, &r))
        failed = bench_fail(env, "no thread: %s", hmm_last_message());
    if (!failed) {
        hmm_thread_join(thread);
        failed = report(env, &r);
    }
    for (size_t i = 0; r.v.nodes && i < n; i++)
        hmm_notifier_remove(&r.v.nodes[i]);
    free(r.v.starts);
    hmm_mem_free(r.v.nodes, n * sizeof(*r.v.nodes));
    return failed;
}

static int run(struct bench_env *env)
{
    static const size_t counts[] = {1, 1000, 100000};
    int failed = bench_open(env);

    if (failed)
        return failed;
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]) && !failed; i++)
        failed = with_intervals(env, counts[i]);
    return bench_close(env) || failed;
}

const struct bench bench_notifier_lookup = {
    .name = "notifier_lookup",
    .summary = "time to find out whether an address is watched, among 1, 1,000 and 100,000 intervals",
    .run = run,
};
