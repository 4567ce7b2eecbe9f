/* SPDX-License-Identifier: MIT */
/*
 * Migration of resident memory to the device, against memcpy of the same bytes into memory that was touched before. After each
 * run nothing may be left of it in system memory: neither in staging nor as resident pages. During the first run, which is not
 * measured, a second thread watches that no more than the bound of staging is in transit.
 */
#include <inttypes.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "harness.h"

#define STAGING_BOUND ((uint64_t)32 << 20) /* the library's, unless set */
/* Tables, descriptors, and what else of the process may have grown meanwhile. */
#define RESIDENT_SLACK ((uint64_t)8 << 20)

static int given_back(struct bench_env *env, uint64_t resident_before)
{
    struct hmm_stats stats;
    uint64_t resident = bench_resident();

    if (bench_stats(env, &stats))
        return 1;
    if (stats.staging_bytes)
        return bench_fail(env, "%" PRIu64 " bytes of staging were not given back", stats.staging_bytes);
    if (resident + env->size > resident_before + RESIDENT_SLACK)
        return bench_fail(env, "%" PRIu64 " KiB of %" PRIu64 " KiB that left are still resident",
                          (resident + env->size - resident_before) >> 10, env->size >> 10);
    return 0;
}

/* Looks at what is in system memory while a migration runs. */
struct watch {
    pthread_t thread;
    bool stop;
    uint64_t staging, resident; /* the most that was seen */
};

static void *watch_thread(void *arg)
{
    struct watch *w = arg;
    struct hmm_stats stats = {.size = sizeof(stats)};

    while (!__atomic_load_n(&w->stop, __ATOMIC_ACQUIRE)) {
        uint64_t resident = bench_resident();

        if (hmm_stats(&stats) == 0 && stats.staging_bytes > w->staging)
            w->staging = stats.staging_bytes;
        if (resident > w->resident)
            w->resident = resident;
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
    return NULL;
}

static int watched_to_device(struct bench_env *env, const char *source, enum bench_page page, uint64_t resident_before)
{
    struct watch w = {0};
    int failed;

    if (pthread_create(&w.thread, NULL, watch_thread, &w))
        return bench_fail(env, "no thread can be started");
    failed = bench_to_device(env, source, env->size, page);
    __atomic_store_n(&w.stop, true, __ATOMIC_RELEASE);
    pthread_join(w.thread, NULL);
    if (failed)
        return 1;
    if (w.staging > STAGING_BOUND)
        return bench_fail(env, "%" PRIu64 " KiB were in staging, of at most %" PRIu64, w.staging >> 10, STAGING_BOUND >> 10);
    if (w.resident > resident_before + STAGING_BOUND + RESIDENT_SLACK)
        return bench_fail(env, "%" PRIu64 " KiB more than before were resident during the migration",
                          (w.resident - resident_before) >> 10);
    return 0;
}

/* Without samples: not measured but watched. */
static int one_run(struct bench_env *env, enum bench_page page, char *target, struct samples *s)
{
    char *source = bench_map(env, env->size, page);
    double start, reference, ours;
    uint64_t resident;
    int failed = 1;

    if (!source)
        return 1;
    bench_fill(source, env->size, env->seed);

    start = bench_now();
    memcpy(target, source, env->size);
    reference = bench_now() - start;

    resident = bench_resident();
    start = bench_now();
    if (s ? bench_to_device(env, source, env->size, page) : watched_to_device(env, source, page, resident))
        goto unmap_source;
    ours = bench_now() - start;

    if (given_back(env, resident) || bench_verify(env, source, env->size, env->seed))
        goto unmap_source;
    if (s)
        samples_add(s, reference, ours);
    failed = 0;
unmap_source:
    bench_unmap(source, env->size);
    return failed;
}

static int one_kind(struct bench_env *env, enum bench_page page)
{
    struct samples s = {0};
    char *target = bench_map(env, env->size, page);
    int failed;

    if (!target)
        return 1;
    memset(target, 1, env->size);
    failed = one_run(env, page, target, NULL); /* warms up */
    for (unsigned i = 0; i < env->runs && !failed; i++)
        failed = one_run(env, page, target, &s);
    if (!failed)
        samples_report(env, &s, page, env->size, BENCH_GIB_PER_SECOND, 0, NULL);
    bench_unmap(target, env->size);
    return failed;
}

static int run(struct bench_env *env)
{
    return bench_each_page(env, one_kind);
}

const struct bench bench_migrate_to_device = {
    .name = "migrate_to_device",
    .summary = "speed of migration to the device, against memcpy into touched memory",
    .run = run,
};
