/* SPDX-License-Identifier: MIT */
/*
 * Bytes of the library's own memory for each page on a device: tables, and the page descriptor. Dense: all pages of the range.
 * Sparse: one page in each block of 2 MiB. The reference is the budget. One thread.
 */
#include <inttypes.h>

#include "harness.h"

#define DENSE_BUDGET 24
#define SPARSE_BUDGET 1024

/* Bytes of one page descriptor: the device has one for each of its pages from the beginning. 0 after bench_fail(). */
static double descriptor_bytes(struct bench_env *env)
{
    struct hmm_device_info info = {.size = sizeof(info)};
    struct hmm_stats stats;
    double bytes;

    if (hmm_device_info(env->device, &info)) {
        bench_fail(env, "the device's memory is not known: %s", hmm_last_message());
        return 0;
    }
    if (bench_stats(env, &stats))
        return 0;
    bytes = (double)stats.descriptor_bytes * info.page_size / (double)info.memory_bytes;
    if (bytes < 1) {
        bench_fail(env, "a page descriptor of %.3g bytes cannot be", bytes);
        return 0;
    }
    return bytes;
}

/* Migrates the first `part` bytes of each block. */
static int measure(struct bench_env *env, const char *bench, size_t part, double budget)
{
    char *memory = bench_map(env, env->size, BENCH_4K);
    size_t blocks = env->size / BENCH_BLOCK, page = hmm_page_size();
    struct hmm_stats before, after;
    uint64_t pages;
    double value, descriptor;
    int failed = 1;

    if (!memory)
        return 1;
    descriptor = descriptor_bytes(env);
    if (!descriptor)
        goto unmap;
    for (size_t i = 0; i < blocks; i++)
        bench_fill(memory + i * BENCH_BLOCK, part, env->seed + i);
    if (bench_stats(env, &before))
        goto unmap;
    for (size_t i = 0; i < blocks; i++) {
        if (bench_to_device(env, memory + i * BENCH_BLOCK, part, BENCH_4K))
            goto unmap;
    }
    if (bench_stats(env, &after))
        goto unmap;
    pages = after.device_pages - before.device_pages;
    if (pages != blocks * (part / page)) {
        bench_fail(env, "%" PRIu64 " pages are on the device in place of %zu", pages, blocks * (part / page));
        goto unmap;
    }
    for (size_t i = 0; i < blocks; i++) {
        if (bench_verify(env, memory + i * BENCH_BLOCK, part, env->seed + i))
            goto unmap;
    }
    value = (double)(after.metadata_bytes - before.metadata_bytes) / (double)pages + descriptor;
    env->emit(&(struct bench_result){
        .bench = bench,
        .size = pages * page,
        .page = BENCH_4K,
        .value = value,
        .unit = "bytes/page",
        .reference = budget,
        .ratio = value / budget,
        .better = BENCH_LOWER,
        .runs = 1,
        .note = "reference: the budget",
    });
    failed = 0;
unmap:
    bench_unmap(memory, env->size);
    return failed;
}

/* A device of its own for each: what was unmapped leaves the other's numbers only in time. */
static int run_one(struct bench_env *env, const char *bench, size_t part, double budget)
{
    int failed = bench_open(env);

    if (failed)
        return failed;
    failed = measure(env, bench, part, budget);
    return bench_close(env) || failed;
}

static int run(struct bench_env *env)
{
    return run_one(env, "metadata_bytes_per_page", BENCH_BLOCK, DENSE_BUDGET) ||
           run_one(env, "metadata_bytes_per_page_sparse", hmm_page_size(), SPARSE_BUDGET);
}

const struct bench bench_metadata = {
    .name = "metadata_bytes_per_page",
    .summary = "bytes of tables and descriptors for a page on the device, dense and sparse",
    .run = run,
};
