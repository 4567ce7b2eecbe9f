/* SPDX-License-Identifier: MIT */
/*
 * The CPU reads, in order, memory that is on the device: one word of each page, so that what is measured is the pages' way home.
 * Against memcpy of as many bytes into fresh memory of the same kind. One thread.
 */
#include <inttypes.h>
#include <string.h>

#include "harness.h"

/* Touches each page once; the sum keeps the compiler from leaving it out, and is checked. */
static uint64_t touch(const char *memory, size_t bytes, size_t page_size)
{
    uint64_t sum = 0;

    for (size_t offset = 0; offset < bytes; offset += page_size)
        sum += *(const volatile uint64_t *)(memory + offset);
    return sum;
}

static uint64_t expected_sum(size_t bytes, size_t page_size, uint64_t seed)
{
    uint64_t sum = 0;

    for (size_t offset = 0; offset < bytes; offset += page_size)
        sum += bench_word(offset, seed);
    return sum;
}

/* Whether all pages came home: else nothing was measured. What a fault brought is counted after the thread that faulted has gone on,
 * so it may take a moment. */
static int came_home(struct bench_env *env, const struct hmm_stats *before)
{
    uint64_t pages = env->size / hmm_page_size();
    double start = bench_now();
    struct hmm_stats now;

    do {
        if (bench_stats(env, &now))
            return 1;
        if (now.pages_to_system - before->pages_to_system >= pages)
            return 0;
    } while (bench_now() - start < 1);
    return bench_fail(env, "only %" PRIu64 " of %" PRIu64 " pages came home by being touched",
                      now.pages_to_system - before->pages_to_system, pages);
}

static int one_run(struct bench_env *env, enum bench_page page, const char *origin, struct samples *s)
{
    char *memory = bench_map(env, env->size, page), *fresh = bench_map(env, env->size, page);
    struct hmm_stats before;
    double start, reference, ours;
    uint64_t sum;
    int failed = 1;

    if (!memory || !fresh)
        goto unmap;
    bench_fill(memory, env->size, env->seed);
    if (bench_to_device(env, memory, env->size, page) || bench_stats(env, &before))
        goto unmap;

    start = bench_now();
    memcpy(fresh, origin, env->size);
    reference = bench_now() - start;

    start = bench_now();
    sum = touch(memory, env->size, hmm_page_size());
    ours = bench_now() - start;

    if (sum != expected_sum(env->size, hmm_page_size(), env->seed)) {
        bench_fail(env, "WRONG CONTENT: the sum of what was read is not right");
        goto unmap;
    }
    if (bench_verify(env, memory, env->size, env->seed))
        goto unmap;
    if (came_home(env, &before))
        goto unmap;
    if (s)
        samples_add(s, reference, ours);
    failed = 0;
unmap:
    bench_unmap(fresh, env->size);
    bench_unmap(memory, env->size);
    return failed;
}

static int one_kind(struct bench_env *env, enum bench_page page)
{
    return bench_copies_of(env, page, one_run);
}

static int run(struct bench_env *env)
{
    return bench_each_page(env, one_kind);
}

const struct bench bench_cpu_touch_sequential = {
    .name = "cpu_touch_sequential",
    .summary = "speed of the CPU reading device memory in order, against memcpy into fresh memory",
    .run = run,
};
