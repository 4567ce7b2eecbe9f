/* SPDX-License-Identifier: MIT */
/*
 * First touch of ordinary memory while a device is open and holds other memory of the process, against the same while none is
 * open: who does not use the library must not pay for it. One thread.
 */
#include "harness.h"

/* Touches fresh memory. */
static int measure(struct bench_env *env, enum bench_page page, double *seconds)
{
    char *memory = bench_map(env, env->size, page);
    double start;
    int failed = 0;

    if (!memory)
        return 1;
    start = bench_now();
    for (size_t offset = 0; offset < env->size; offset += hmm_page_size())
        *(volatile uint64_t *)(memory + offset) = bench_word(offset, env->seed);
    *seconds = bench_now() - start;
    for (size_t offset = 0; offset < env->size && !failed; offset += hmm_page_size()) {
        if (*(volatile uint64_t *)(memory + offset) != bench_word(offset, env->seed))
            failed = bench_fail(env, "WRONG CONTENT at offset %zu of ordinary memory", offset);
    }
    bench_unmap(memory, env->size);
    return failed;
}

/* Measures with a device open and one block of memory on it, which must be right afterwards. */
static int measure_open(struct bench_env *env, enum bench_page page, double *seconds)
{
    char *managed;
    int failed = 1;

    if (bench_open(env))
        return 1;
    managed = bench_map(env, BENCH_BLOCK, page);
    if (!managed)
        goto close;
    bench_fill(managed, BENCH_BLOCK, env->seed);
    failed = bench_to_device(env, managed, BENCH_BLOCK, page) || measure(env, page, seconds) ||
             bench_verify(env, managed, BENCH_BLOCK, env->seed);
    bench_unmap(managed, BENCH_BLOCK);
close:
    return bench_close(env) || failed;
}

static int one_run(struct bench_env *env, enum bench_page page, struct samples *s)
{
    double closed, open;

    if (measure(env, page, &closed) || measure_open(env, page, &open))
        return 1;
    if (s)
        samples_add(s, closed, open);
    return 0;
}

static int one_kind(struct bench_env *env, enum bench_page page)
{
    struct samples s = {0};
    int failed = one_run(env, page, NULL); /* warms up */

    for (unsigned i = 0; i < env->runs && !failed; i++)
        failed = one_run(env, page, &s);
    if (!failed)
        samples_report(env, &s, page, env->size, BENCH_NS_PER_OPERATION, env->size / hmm_page_size(),
                       samples_overlap(&s) ? "overlaps with A/A" : "DOES NOT overlap with A/A");
    return failed;
}

static int run(struct bench_env *env)
{
    int failed = 0;

    for (enum bench_page page = BENCH_4K; page < BENCH_PAGES && !failed; page++) {
        if (bench_page_available(env, page))
            failed = one_kind(env, page);
    }
    return failed;
}

const struct bench bench_unmanaged_touch = {
    .name = "unmanaged_touch",
    .summary = "time of a first touch of ordinary memory with a device open, against none open",
    .run = run,
};
