/* SPDX-License-Identifier: MIT */
/*
 * The time from the submission of a job that does nothing to the end of the wait for it, against a futex round trip between two threads:
 * the least that handing work to another thread and hearing back can cost, when both sleep in between.
 */
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "harness.h"

#define ROUND_TRIPS 2000

/* ---- the reference: two threads that wake each other ----------------------------------------------------------------- */

struct court {
    uint32_t there, back; /* futexes: number of the last ball */
};

static void pass_ball(uint32_t *word, uint32_t ball)
{
    __atomic_store_n(word, ball, __ATOMIC_RELEASE);
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void await_ball(const uint32_t *word, uint32_t ball)
{
    for (uint32_t seen; (seen = __atomic_load_n(word, __ATOMIC_ACQUIRE)) != ball;)
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void *partner(void *arg)
{
    struct court *court = arg;

    for (uint32_t ball = 1; ball <= ROUND_TRIPS; ball++) {
        await_ball(&court->there, ball);
        pass_ball(&court->back, ball);
    }
    return NULL;
}

static int measure_reference(struct bench_env *env, double *seconds)
{
    struct court court = {0};
    pthread_t thread;

    if (pthread_create(&thread, NULL, partner, &court))
        return bench_fail(env, "no thread can be started");
    double start = bench_now();

    for (uint32_t ball = 1; ball <= ROUND_TRIPS; ball++) {
        pass_ball(&court.there, ball);
        await_ball(&court.back, ball);
    }
    *seconds = bench_now() - start;
    pthread_join(thread, NULL);
    return 0;
}

/* ---- ours ------------------------------------------------------------------------------------------------------------ */

static int measure_ours(struct bench_env *env, double *seconds)
{
    const struct hmm_job_desc empty = {.size = sizeof(empty), .operation.kind = HMM_OP_NOP};
    double start = bench_now();

    for (unsigned i = 0; i < ROUND_TRIPS; i++) {
        hmm_fence *fence;

        if (hmm_job_submit(env->device, &empty, &fence))
            return bench_fail(env, "an empty job is refused: %s", hmm_last_message());
        int status = hmm_fence_wait(fence, -1);

        hmm_fence_put(fence);
        if (status)
            return bench_fail(env, "an empty job failed: %s", hmm_last_message());
    }
    *seconds = bench_now() - start;
    return 0;
}

static int run(struct bench_env *env)
{
    struct samples s = {0};
    double reference = 0, ours = 0;
    int failed = bench_open(env);

    if (failed)
        return failed;
    for (unsigned i = 0; i <= env->runs && !failed; i++) {
        failed = measure_reference(env, &reference) || measure_ours(env, &ours);
        if (!failed && i > 0) /* the first warms up */
            samples_add(&s, reference, ours);
    }
    if (!failed)
        samples_report(env, &s, BENCH_4K, 0, BENCH_NS_PER_OPERATION, ROUND_TRIPS, NULL);
    return bench_close(env) || failed;
}

const struct bench bench_empty_job = {
    .name = "empty_job",
    .summary = "time of a job that does nothing, against a futex round trip",
    .run = run,
    .engines = true,
};
