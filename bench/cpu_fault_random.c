/* SPDX-License-Identifier: MIT */
/*
 * The time of one CPU fault on a page that is on the device. Pages are touched in random order, each at most once, and far enough
 * apart that one fault brings one of the touched pages home: what comes along with it is never touched. The statistics tell
 * whether that held.
 *
 * Reference: a bare round trip of the same touches through a userfaultfd, MISSING and COPY, where the thread that answers is on
 * the CPU of the thread that touches. In both, the thread that touches stays on one CPU.
 */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "uffd.h"

#define SHARE_OF_FAULTS 0.95 /* at least so many of the touches must be faults */

/* Touches in an order of their own. */
struct touches {
    size_t count;
    size_t *offsets;
};

static int touches_plan(struct bench_env *env, struct touches *t, size_t stride)
{
    uint64_t state = env->seed;

    t->count = env->size / stride;
    t->offsets = calloc(t->count, sizeof(*t->offsets));
    if (!t->offsets)
        return bench_fail(env, "no memory");
    for (size_t i = 0; i < t->count; i++) {
        size_t j = bench_random(&state) % (i + 1);

        t->offsets[i] = t->offsets[j];
        t->offsets[j] = i * stride;
    }
    return 0;
}

/* Seconds for all touches. */
static double touch(const struct touches *t, const char *memory, uint64_t *sum)
{
    double start = bench_now();

    *sum = 0;
    for (size_t i = 0; i < t->count; i++)
        *sum += *(const volatile uint64_t *)(memory + t->offsets[i]);
    return bench_now() - start;
}

static int check_sum(struct bench_env *env, const struct touches *t, uint64_t sum, const char *whose)
{
    for (size_t i = 0; i < t->count; i++)
        sum -= bench_word(t->offsets[i], env->seed);
    return sum ? bench_fail(env, "WRONG CONTENT: the sum of what was read from %s is not right", whose) : 0;
}

static int measure_reference(struct bench_env *env, const struct touches *t, const char *origin, double *seconds)
{
    char *memory = bench_map(env, env->size, BENCH_4K);
    struct bare_pager *pager;
    uint64_t sum;
    int failed = 1;

    if (!memory)
        return 1;
    pager = bare_pager_start(env, memory, origin, env->size, t->count);
    if (!pager)
        goto unmap;
    *seconds = touch(t, memory, &sum);
    failed = bare_pager_stop(env, pager) || check_sum(env, t, sum, "the reference");
unmap:
    bench_unmap(memory, env->size);
    return failed;
}

static int measure_ours(struct bench_env *env, const struct touches *t, double *seconds, uint64_t *faults)
{
    char *memory = bench_map(env, env->size, BENCH_4K);
    struct hmm_stats before, after;
    uint64_t sum;
    int failed = 1;

    if (!memory)
        return 1;
    bench_fill(memory, env->size, env->seed);
    if (bench_to_device(env, memory, env->size, BENCH_4K) || bench_stats(env, &before))
        goto unmap;
    *seconds = touch(t, memory, &sum);
    if (bench_stats(env, &after))
        goto unmap;
    *faults = after.cpu_faults - before.cpu_faults;
    failed = check_sum(env, t, sum, "the device") || bench_verify(env, memory, env->size, env->seed);
unmap:
    bench_unmap(memory, env->size);
    return failed;
}

static int one_run(struct bench_env *env, const struct touches *t, const char *origin, struct samples *s, uint64_t *faults)
{
    double reference, ours;

    if (measure_reference(env, t, origin, &reference) || measure_ours(env, t, &ours, faults))
        return 1;
    if (s)
        samples_add(s, reference, ours);
    return 0;
}

/* With one stride. *faulted: whether as good as every touch was a fault. Reports only then. */
static int with_stride(struct bench_env *env, size_t stride, const char *origin, bool *faulted)
{
    struct touches t;
    struct samples s = {0};
    uint64_t faults = 0;
    int failed;

    if (touches_plan(env, &t, stride))
        return 1;
    failed = one_run(env, &t, origin, NULL, &faults); /* warms up */
    *faulted = (double)faults >= SHARE_OF_FAULTS * (double)t.count;
    for (unsigned i = 0; *faulted && i < env->runs && !failed; i++) {
        failed = one_run(env, &t, origin, &s, &faults);
        *faulted = (double)faults >= SHARE_OF_FAULTS * (double)t.count;
    }
    if (!failed && *faulted)
        samples_report(env, &s, BENCH_4K, env->size, BENCH_NS_PER_OPERATION, t.count, NULL);
    free(t.offsets);
    return failed;
}

static int run(struct bench_env *env)
{
    char *origin = bench_map(env, env->size, BENCH_4K);
    bool faulted = false;
    int cpu, failed = 1;

    if (!origin)
        return 1;
    bench_fill(origin, env->size, env->seed);
    if (bench_open(env))
        goto unmap;
    if (bench_pin_cpu(env, &cpu))
        goto close;
    failed = 0;
    for (size_t stride = (size_t)64 << 10; stride <= BENCH_BLOCK && !failed && !faulted; stride *= 2)
        failed = with_stride(env, stride, origin, &faulted);
    if (!failed && !faulted)
        failed = bench_fail(env, "touches one block apart did not all fault: there is nothing to measure");
    bench_unpin_cpu();
close:
    failed = bench_close(env) || failed;
unmap:
    bench_unmap(origin, env->size);
    return failed;
}

const struct bench bench_cpu_fault_random = {
    .name = "cpu_fault_random",
    .summary = "time of one CPU fault on a device page, against a bare userfaultfd round trip",
    .run = run,
};
