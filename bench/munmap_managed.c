/* SPDX-License-Identifier: MIT */
/*
 * munmap() of a range that a device has worked on and that is all in system memory again: the device still mirrors it, so somebody
 * has to be told. Announced (hmm_munmap(), which is what libhmm-preload.so does), and by a plain munmap(), which the kernel tells us of
 * by an event. Against munmap() of as much memory that the library has nothing to do with. One thread.
 */
#include <sys/mman.h>

#include "harness.h"

#define RANGE ((uint64_t)64 << 20)

enum way { PLAIN, WRAPPED, EVENT };

struct bench_range {
    char *memory;
    uint64_t bytes;
};

/* A device reads all of it, and it comes home. */
static int manage(struct bench_env *env, const struct bench_range *range)
{
    hmm_fence *fence;
    struct hmm_device_info info = {.size = sizeof(info)};
    struct hmm_migrate_result home = {.size = sizeof(home)};

    if (hmm_job_crc32c(env->device, range->memory, range->bytes, &fence))
        return bench_fail(env, "the job is refused: %s", hmm_last_message());
    int err = hmm_fence_wait(fence, -1);
    hmm_fence_put(fence);
    if (err || hmm_migrate_to_system(range->memory, range->bytes, &home) || hmm_device_info(env->device, &info))
        return bench_fail(env, "the device cannot read the range: %s", hmm_last_message());
    if (info.used_bytes || home.pinned || home.busy)
        return bench_fail(env, "not all of the range came home: there is nothing to measure");
    if (info.mirrored_bytes < range->bytes)
        return bench_fail(env, "the device does not mirror the range: there is nothing to measure");
    return 0;
}

/* The statistics when the event has been counted: its reader lets the caller go on before that. */
static int after_event(struct bench_env *env, enum way way, const struct hmm_stats *before, struct hmm_stats *after)
{
    double until = bench_now() + 1;

    do {
        if (bench_stats(env, after))
            return 1;
    } while (way == EVENT && after->events_unmap == before->events_unmap && bench_now() < until);
    return 0;
}

/* One unmapping of memory with this content in it. */
static int measure(struct bench_env *env, enum bench_page page, enum way way, double *seconds)
{
    struct bench_range range = {.bytes = env->size < RANGE ? env->size : RANGE};
    struct hmm_stats before, after;
    int failed = 1;

    range.memory = bench_map(env, range.bytes, page);
    if (!range.memory)
        return 1;
    bench_fill(range.memory, range.bytes, env->seed);
    if ((way != PLAIN && manage(env, &range)) || bench_verify(env, range.memory, range.bytes, env->seed) ||
        bench_stats(env, &before))
        goto unmap;

    double start = bench_now();
    int err = way == WRAPPED ? hmm_munmap(range.memory, range.bytes) : munmap(range.memory, range.bytes);
    *seconds = bench_now() - start;

    if (err) {
        bench_fail(env, "the range cannot be unmapped");
        goto unmap;
    }
    if (after_event(env, way, &before, &after))
        goto unmap;
    if (way == EVENT && after.events_unmap == before.events_unmap)
        bench_fail(env, "the kernel told of no unmapping: there is nothing to measure");
    else if (way == WRAPPED && after.calls_unmap == before.calls_unmap)
        bench_fail(env, "the call was not announced: there is nothing to measure");
    else
        failed = 0;
unmap:
    bench_unmap(range.memory, range.bytes); /* the pages beside it; and it, if it is still there */
    return failed;
}

static int one_way(struct bench_env *env, enum bench_page page, enum way way, const char *name)
{
    struct bench_env named = *env;
    struct samples s = {0};
    uint64_t bytes = env->size < RANGE ? env->size : RANGE;

    named.name = name;
    for (unsigned i = 0; i <= env->runs; i++) { /* the first one warms up */
        double plain, managed;

        if (measure(&named, page, PLAIN, &plain) || measure(&named, page, way, &managed))
            return 1;
        if (i)
            samples_add(&s, plain, managed);
    }
    samples_report(&named, &s, page, bytes, BENCH_NS_PER_OPERATION, bytes / hmm_page_size(),
                   "per page; reference: not managed");
    return 0;
}

static int one_kind(struct bench_env *env, enum bench_page page)
{
    return one_way(env, page, WRAPPED, "munmap_managed") || one_way(env, page, EVENT, "munmap_managed_event");
}

static int run(struct bench_env *env)
{
    return bench_each_page(env, one_kind);
}

const struct bench bench_munmap_managed = {
    .name = "munmap_managed",
    .summary = "time of munmap of a range that a device mirrors, announced and by event, against one that none does",
    .run = run,
};
