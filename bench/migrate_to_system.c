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
    struct samples s = {0};
    char *origin = bench_map(env, env->size, page);
    int failed;

    if (!origin)
        return 1;
    bench_fill(origin, env->size, env->seed);
    failed = one_run(env, page, origin, NULL); /* warms up */
    for (unsigned i = 0; i < env->runs && !failed; i++)
        failed = one_run(env, page, origin, &s);
    if (!failed)
        samples_report(env, &s, page, env->size, BENCH_GIB_PER_SECOND, 0, NULL);
    bench_unmap(origin, env->size);
    return failed;
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
