/* SPDX-License-Identifier: MIT */
/* Opening, copies, and the decisions. See faulty.h. */
#include "faulty.h"

#include <errno.h>
#include <time.h>

enum {
    SEED,
    COPY_ERROR,
    CLEAR_ERROR,
    SUBMIT_ERROR,
    JOB_ERROR,
    COPY_DELAY,
    CLEAR_DELAY,
    JOB_DELAY,
    LOSE_AFTER,
    LOSE_ENGINES_AFTER,
    OVER
};

#define PERMILLE(n, what)                                                                                                      \
    {                                                                                                                          \
        .name = (n), .type = HMM_OPTION_UINT, .fallback = "0", .max = 1000, .help = "per mille of " what                       \
    }
#define DELAY(n, what)                                                                                                         \
    {                                                                                                                          \
        .name = (n), .type = HMM_OPTION_UINT, .fallback = "0", .max = 1000000, .help = "microseconds that " what               \
    }
#define COUNT(n, what)                                                                                                         \
    {                                                                                                                          \
        .name = (n), .type = HMM_OPTION_UINT, .fallback = "0", .max = UINT64_MAX, .help = (what)                               \
    }

static const struct hmm_option options[] = {
    [SEED] = COUNT("seed", "chooses which calls are hit"),
    [COPY_ERROR] = PERMILLE("copy_error", "copies that fail with -EIO, at once or when they should be done"),
    [CLEAR_ERROR] = PERMILLE("clear_error", "clears that fail in the same way"),
    [SUBMIT_ERROR] = PERMILLE("submit_error", "jobs that the device refuses with -EIO"),
    [JOB_ERROR] = PERMILLE("job_error", "jobs that run and then report -EIO"),
    [COPY_DELAY] = DELAY("copy_delay_us", "each copy waits"),
    [CLEAR_DELAY] = DELAY("clear_delay_us", "each clear waits"),
    [JOB_DELAY] = DELAY("job_delay_us", "the completion of each job waits"),
    [LOSE_AFTER] = COUNT("lose_after", "copies, clears and jobs after which the device and its memory are gone; 0: never"),
    [LOSE_ENGINES_AFTER] = COUNT("lose_engines_after", "the same, but only jobs do not run any more; 0: never"),
    [OVER] = {.name = "over", .type = HMM_OPTION_SPEC, .help = "the device to wrap; the last option, takes the rest"},
    {.name = NULL},
};

/* ---- decisions ---- */

static uint64_t mix(uint64_t x) /* splitmix64 (Steele, Lea, Flood 2014) */
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

bool faulty_hit(struct faulty *f, enum hit what, uint64_t *more)
{
    if (!f->permille[what])
        return false;
    uint64_t n = __atomic_fetch_add(&f->drawn[what], 1, __ATOMIC_RELAXED);
    uint64_t random = mix(mix(f->seed * HITS + what) + n);
    *more = random / 1000;
    return random % 1000 < f->permille[what];
}

bool faulty_memory_lost(struct faulty *f)
{
    uint64_t n = __atomic_add_fetch(&f->operations, 1, __ATOMIC_RELAXED);
    bool memory = f->lose_after && n > f->lose_after;
    if (memory)
        hmm_device_lost(f->dev, HMM_LOST_MEMORY, "faulty: lose_after");
    else if (f->lose_engines_after && n > f->lose_engines_after)
        hmm_device_lost(f->dev, HMM_LOST_ENGINES, "faulty: lose_engines_after");
    return memory;
}

bool faulty_engines_lost(const struct faulty *f)
{
    uint64_t n = __atomic_load_n(&f->operations, __ATOMIC_RELAXED);
    return (f->lose_after && n > f->lose_after) || (f->lose_engines_after && n > f->lose_engines_after);
}

/* ---- copies: may block for queue space, so they may sleep ---- */

void faulty_sleep_us(uint32_t us)
{
    struct timespec left = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000L};
    while (us && nanosleep(&left, &left) && errno == EINTR)
        ;
}

/* 0: to be forwarded; 1: failed through its fence; else it was not started. */
static int meddle(struct faulty *f, enum hit what, uint32_t delay_us, hmm_fence *fence)
{
    uint64_t more;
    if (faulty_memory_lost(f))
        return -ENODEV;
    faulty_sleep_us(delay_us);
    if (!faulty_hit(f, what, &more))
        return 0;
    if (more & 1)
        return -EIO;
    hmm_fence_signal(fence, -EIO);
    return 1;
}

static int faulty_copy(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    struct faulty *f = priv;
    int r = meddle(f, HIT_COPY, f->copy_delay_us, fence);
    return r ? (r < 0 ? r : 0) : f->inner->copy(f->inner_priv, kind, v, n, fence);
}

static int faulty_clear(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    struct faulty *f = priv;
    int r = meddle(f, HIT_CLEAR, f->clear_delay_us, fence);
    return r ? (r < 0 ? r : 0) : f->inner->clear(f->inner_priv, v, n, fence);
}

/* ---- life ---- */

static void take_options(struct faulty *f, const union hmm_option_value *values)
{
    f->seed = values[SEED].number;
    for (unsigned i = 0; i < HITS; i++)
        f->permille[i] = (uint32_t)values[COPY_ERROR + i].number;
    f->copy_delay_us = (uint32_t)values[COPY_DELAY].number;
    f->clear_delay_us = (uint32_t)values[CLEAR_DELAY].number;
    f->job_delay_us = (uint32_t)values[JOB_DELAY].number;
    f->lose_after = values[LOSE_AFTER].number;
    f->lose_engines_after = values[LOSE_ENGINES_AFTER].number;
}

static int faulty_open(struct hmm_device *dev, const union hmm_option_value *values, void **priv)
{
    union hmm_option_value inner[HMM_OPTIONS_MAX];
    struct faulty *f = hmm_mem_alloc(sizeof(*f));
    if (!f)
        return hmm_fail(-ENOMEM, "faulty: no memory for the device");
    f->dev = dev;
    take_options(f, values);
    int r = hmm_driver_find(values[OVER].string, &f->inner, inner);
    if (r)
        goto free_device;
    r = faulty_delays_init(f);
    if (r)
        goto free_device;
    r = f->inner->open(dev, inner, &f->inner_priv);
    if (r)
        goto stop_delays;
    *priv = f;
    return 0;

stop_delays:
    faulty_delays_exit(f);
free_device:
    hmm_mem_free(f, sizeof(*f));
    return r;
}

static void faulty_stop(void *priv)
{
    struct faulty *f = priv;
    f->inner->stop(f->inner_priv);
    faulty_delays_flush(f);
}

static void faulty_close(void *priv)
{
    struct faulty *f = priv;
    f->inner->close(f->inner_priv);
    faulty_delays_exit(f);
    hmm_mem_free(f, sizeof(*f));
}

const struct hmm_driver faulty_driver = {
    .size = sizeof(struct hmm_driver),
    .abi = HMM_DRIVER_ABI,
    .name = "faulty",
    .description = "wraps another device and fails on demand, for tests",
    .options = options,
    .open = faulty_open,
    .stop = faulty_stop,
    .close = faulty_close,
    .copy = faulty_copy,
    .clear = faulty_clear,
    .submit = faulty_submit,
    .cancel = faulty_cancel,
};
