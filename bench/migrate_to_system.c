/* SPDX-License-Identifier: MIT */
/* Migration from the device to the system, against memcpy of as many bytes into fresh memory of the same kind. One thread. */
#include <string.h>

#include "harness.h"

static int one_run(struct bench_env *env, enum bench_page page, const char *origin, struct samples *s)
{
    char *memory = bench_map(env, env->size, page), *fresh = bench_map(env, env->size, page);
    double start, reference, ours;
    int failed = 1;

    if (!memory || !fresh)
        goto unmap;
    bench_fill(memory, env->size, env->seed);
    if (bench_to_device(env, memory, env->size, page))
        goto unmap;

    start = bench_now();
    memcpy(fresh, origin, env->size);
    reference = bench_now() - start;

    start = bench_now();
    if (bench_to_system(env, memory, env->size))
        goto unmap;
    ours = bench_now() - start;

    if (bench_verify(env, memory, env->size, env->seed))
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

const struct bench bench_migrate_to_system = {
    .name = "migrate_to_system",
    .summary = "speed of migration to the system, against memcpy into fresh memory",
    .run = run,
};
