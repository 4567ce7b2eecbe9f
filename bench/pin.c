/* SPDX-License-Identifier: MIT */
/*
 * Pins. pin_system: of memory that was never touched and is not managed, against mlock() of as much, which faults it in, too.
 * pin_private: of memory that is on a device, against hmm_migrate_to_system() of as much. One thread.
 */
#include <sys/mman.h>

#include "harness.h"

static const struct hmm_pin_desc for_writing = {.size = sizeof(for_writing), .flags = HMM_PIN_WRITE};

static int pin(struct bench_env *env, const void *memory, hmm_pin *out, double *seconds)
{
    double start = bench_now();

    if (hmm_pin_range(memory, env->size, &for_writing, out))
        return bench_fail(env, "the range cannot be pinned: %s", hmm_last_message());
    *seconds = bench_now() - start;
    return 0;
}

static int system_run(struct bench_env *env, enum bench_page page, struct samples *s)
{
    char *locked = bench_map(env, env->size, page), *memory = bench_map(env, env->size, page);
    double start, reference, ours;
    hmm_pin held;
    int failed = 1;

    if (!locked || !memory)
        goto unmap;
    start = bench_now();
    if (mlock(locked, env->size)) {
        bench_fail(env, "mlock() of %llu MiB is refused (ulimit -l)", (unsigned long long)(env->size >> 20));
        goto unmap;
    }
    reference = bench_now() - start;
    if (pin(env, memory, &held, &ours))
        goto unmap;
    failed = hmm_unpin(held, NULL, true) ? bench_fail(env, "unpinning is refused") : 0;
    if (!failed && s)
        samples_add(s, reference, ours);
unmap:
    bench_unmap(memory, env->size);
    bench_unmap(locked, env->size);
    return failed;
}

static int private_run(struct bench_env *env, enum bench_page page, struct samples *s)
{
    char *memory = bench_map(env, env->size, page);
    double start, reference, ours;
    hmm_pin held;
    int failed = 1;

    if (!memory)
        return 1;
    bench_fill(memory, env->size, env->seed);
    if (bench_to_device(env, memory, env->size, page))
        goto unmap;
    start = bench_now();
    if (bench_to_system(env, memory, env->size))
        goto unmap;
    reference = bench_now() - start;
    if (bench_to_device(env, memory, env->size, page) || pin(env, memory, &held, &ours))
        goto unmap;
    failed =
        hmm_unpin(held, NULL, true) ? bench_fail(env, "unpinning is refused") : bench_verify(env, memory, env->size, env->seed);
    if (!failed && s)
        samples_add(s, reference, ours);
unmap:
    bench_unmap(memory, env->size);
    return failed;
}

static int measure(struct bench_env *env, enum bench_page page, const char *note,
                   int (*one_run)(struct bench_env *env, enum bench_page page, struct samples *s))
{
    struct samples s = {0};

    for (unsigned i = 0; i <= env->runs; i++) /* the first one warms up */
        if (one_run(env, page, i ? &s : NULL))
            return 1;
    samples_report(env, &s, page, env->size, BENCH_NS_PER_OPERATION, env->size / hmm_page_size(), note);
    return 0;
}

static int system_kind(struct bench_env *env, enum bench_page page)
{
    return measure(env, page, "ns a page, against mlock", system_run);
}

static int private_kind(struct bench_env *env, enum bench_page page)
{
    return measure(env, page, "ns a page, against migrating home", private_run);
}

static int run_system(struct bench_env *env)
{
    return bench_each_page(env, system_kind);
}

static int run_private(struct bench_env *env)
{
    return bench_each_page(env, private_kind);
}

const struct bench bench_pin_system = {
    .name = "pin_system",
    .summary = "time to pin memory that is not managed, against mlock",
    .run = run_system,
};

const struct bench bench_pin_private = {
    .name = "pin_private",
    .summary = "time to pin memory that is on a device, against migrating it home",
    .run = run_private,
};
