/* SPDX-License-Identifier: MIT */
/*
 * A device streams through memory that is in system memory when it begins: its page faults bring all of it. Each engine adds up one
 * part of it; the sums are checked. Against memcpy of the same bytes into memory that was touched before.
 */
#include <string.h>

#include "harness.h"

#define JOBS 2 /* as many as the device has engines, unless told otherwise */

static uint64_t sum_of(size_t first, size_t end, uint64_t seed)
{
    uint64_t sum = 0;

    for (size_t at = first; at < end; at += sizeof(uint64_t))
        sum += bench_word(at, seed);
    return sum;
}

static int finish(struct bench_env *env, hmm_fence *fence, uint64_t *sum)
{
    struct hmm_fence_info info = {.size = sizeof(info)};

    hmm_fence_wait(fence, -1);
    hmm_fence_info(fence, &info);
    hmm_fence_put(fence);
    *sum = info.result;
    return info.status ? bench_fail(env, "a job failed: %s", info.message) : 0;
}

/* All parts at the same time. */
static int stream(struct bench_env *env, const char *memory, uint64_t *sums)
{
    hmm_fence *fences[JOBS];
    size_t part = env->size / JOBS;
    unsigned n = 0;
    int failed = 0;

    for (; n < JOBS && !failed; n++) {
        const struct hmm_job_desc job = {
            .size = sizeof(job),
            .operation = {.kind = HMM_OP_REDUCE,
                          .reduce = {.src = memory + n * part, .count = part / 8, .type = HMM_U64, .how = HMM_SUM}}};

        if (hmm_job_submit(env->device, &job, &fences[n]))
            failed = bench_fail(env, "the job is refused: %s", hmm_last_message());
    }
    for (unsigned i = 0; i < n - (unsigned)failed; i++)
        failed = finish(env, fences[i], &sums[i]) || failed;
    return failed;
}

static int check(struct bench_env *env, const uint64_t *sums, const uint64_t *expected, const struct hmm_stats *before)
{
    struct hmm_stats after;

    if (memcmp(sums, expected, JOBS * sizeof(sums[0])))
        return bench_fail(env, "WRONG CONTENT: the sums of the device are not right");
    if (bench_stats(env, &after))
        return 1;
    if ((after.pages_to_device - before->pages_to_device) * hmm_page_size() < env->size)
        return bench_fail(env, "not all of it came to the device: there is nothing to measure");
    return 0;
}

static int one_run(struct bench_env *env, enum bench_page page, char *target, const uint64_t *expected, struct samples *s)
{
    char *source = bench_map(env, env->size, page);
    struct hmm_stats before;
    uint64_t sums[JOBS];
    double start, reference, ours;
    int failed = 1;

    if (!source)
        return 1;
    bench_fill(source, env->size, env->seed);
    start = bench_now();
    memcpy(target, source, env->size);
    reference = bench_now() - start;

    if (bench_stats(env, &before))
        goto unmap;
    start = bench_now();
    if (stream(env, source, sums))
        goto unmap;
    ours = bench_now() - start;
    failed = check(env, sums, expected, &before) || bench_verify(env, source, env->size, env->seed);
    if (!failed && s)
        samples_add(s, reference, ours);
unmap:
    bench_unmap(source, env->size);
    return failed;
}

static int one_kind(struct bench_env *env, enum bench_page page)
{
    struct samples s = {0};
    uint64_t expected[JOBS];
    size_t part = env->size / JOBS;
    char *target = bench_map(env, env->size, page);
    int failed;

    if (!target)
        return 1;
    memset(target, 1, env->size);
    for (unsigned i = 0; i < JOBS; i++)
        expected[i] = sum_of(i * part, (i + 1) * part, env->seed);
    failed = one_run(env, page, target, expected, NULL); /* warms up */
    for (unsigned i = 0; i < env->runs && !failed; i++)
        failed = one_run(env, page, target, expected, &s);
    if (!failed)
        samples_report(env, &s, page, env->size, BENCH_GIB_PER_SECOND, 0, NULL);
    bench_unmap(target, env->size);
    return failed;
}

static int run(struct bench_env *env)
{
    return bench_each_page(env, one_kind);
}

const struct bench bench_device_fault = {
    .name = "device_fault",
    .summary = "speed of a device that streams through system memory, against memcpy",
    .run = run,
    .engines = true,
};
