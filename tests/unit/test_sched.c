/* SPDX-License-Identifier: MIT */
/* The scheduler with a device that runs nothing: which job comes when, what ends it, and that none is lost. */
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "fake_device.h"
#include "mem_source.h"
#include "mm/thread.h"

#define SECONDS 1000000000ll
#define PATIENCE (30 * SECONDS)

static struct fake *f;
static unsigned errors;

static void count_errors(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level == HMM_LOG_ERROR) {
        fprintf(stderr, "library: %s\n", line);
        errors++;
    }
}

static void report(const char *line)
{
    fprintf(stderr, "%s\n", line);
}

static int set_up(void **state)
{
    (void)state;
    source_start();
    lock_report = report;
    errors = 0;
    hmm_set_log(count_errors, NULL);
    return threads_start() || jobs_start();
}

static int tear_down(void **state)
{
    (void)state;
    fence_user_cancel_all();
    jobs_stop();
    threads_stop();
    if (mem_used())
        fprintf(stderr, "%llu bytes are still in use\n", (unsigned long long)mem_used());
    int bad = mem_used() != 0 || errors || lock_violations;
    hmm_set_log(NULL, NULL);
    mem_exit();
    return bad;
}

static hmm_fence *must_put(struct fake *on, struct fake_job j)
{
    hmm_fence *fence = NULL;
    int r = fake_try(on, &j, &fence);
    if (r)
        fail_msg("job %llu: %d, %s", (unsigned long long)j.tag, r, hmm_last_message());
    return fence;
}

#define PUT(on, ...) must_put(on, (struct fake_job){.tag = __VA_ARGS__})
/* The same without its fence. */
#define DROP(on, ...) hmm_fence_put(PUT(on, __VA_ARGS__))

static hmm_queue *queue_of(struct fake *on, uint32_t in_order, int32_t priority)
{
    hmm_queue *q = NULL;
    struct hmm_queue_config c = {.size = sizeof(c), .in_order = in_order, .priority = priority};
    assert_int_equal(queue_new(&on->dev, &c, &q), 0);
    return q;
}

static hmm_fence *own_fence(void)
{
    hmm_fence *fence = fence_user_new();
    assert_non_null(fence);
    return fence;
}

/* Waits, checks and puts. */
static void expect_status(hmm_fence *fence, int status, const char *word)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    hmm_fence_wait(fence, PATIENCE);
    assert_int_equal(hmm_fence_info(fence, &info), 0);
    if (info.status != status || (word && !strstr(info.message, word)))
        fail_msg("expected %d and '%s'; got %d, '%s'", status, word ? word : "", info.status, info.message);
    hmm_fence_put(fence);
}

static void expect_order(struct fake *on, const uint64_t *tags, unsigned n)
{
    assert_int_equal(on->submitted, n);
    for (unsigned i = 0; i < n; i++)
        if (on->order[i] != tags[i])
            fail_msg("job %u was %llu, not %llu", i, (unsigned long long)on->order[i], (unsigned long long)tags[i]);
}

#define EXPECT_ORDER(on, ...)                                                                                                  \
    do {                                                                                                                       \
        const uint64_t tags_[] = {__VA_ARGS__};                                                                                \
        expect_order(on, tags_, sizeof(tags_) / sizeof(tags_[0]));                                                             \
    } while (0)

static uint64_t now_ms(void)
{
    return os_now() / 1000000;
}

/* ---- order ------------------------------------------------------------------------------------------------------- */

static void highest_priority_first_then_the_oldest(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_queue *low = queue_of(f, 0, HMM_PRIORITY_LOW), *high = queue_of(f, 0, HMM_PRIORITY_HIGH);
    DROP(f, 1);
    DROP(f, 2, low);
    DROP(f, 3);
    DROP(f, 4, high);
    DROP(f, 5);
    DROP(f, 6, high);
    DROP(f, 7, low);
    EXPECT_ORDER(f, 1);
    while (fake_finish(f, 0, 0))
        ;
    EXPECT_ORDER(f, 1, 4, 6, 3, 5, 2, 7);
    assert_int_equal(f->most, 1);
    assert_int_equal(sched_jobs(&f->dev), 0);
    queue_put(low);
    queue_put(high);
    fake_close(f);
}

static void no_more_jobs_than_slots(void **state)
{
    (void)state;
    f = fake_open(3);
    for (uint64_t i = 1; i <= 10; i++)
        DROP(f, i);
    EXPECT_ORDER(f, 1, 2, 3);
    assert_int_equal(sched_jobs(&f->dev), 10);
    assert_true(fake_finish(f, 2, 0));
    EXPECT_ORDER(f, 1, 2, 3, 4);
    assert_int_equal(sched_jobs(&f->dev), 9);
    while (fake_finish(f, 0, 0))
        ;
    assert_int_equal(f->submitted, 10);
    assert_int_equal(f->most, 3);
    fake_close(f);
}

static void in_order_jobs_run_one_by_one_whatever_their_status(void **state)
{
    (void)state;
    f = fake_open(8);
    hmm_queue *q = queue_of(f, 1, HMM_PRIORITY_NORMAL), *other = queue_of(f, 1, HMM_PRIORITY_NORMAL);
    hmm_fence *a = PUT(f, 1, q), *b = PUT(f, 2, q), *c = PUT(f, 3, q), *d = PUT(f, 4, q);
    DROP(f, 11, other);
    DROP(f, 12, other);
    DROP(f, 21);
    EXPECT_ORDER(f, 1, 11, 21);
    assert_int_equal(hmm_job_cancel(b), 0); /* the order of the others stays */
    expect_status(b, -ECANCELED, "hmm_job_cancel");
    EXPECT_ORDER(f, 1, 11, 21);
    assert_true(fake_finish(f, 1, -EIO));
    EXPECT_ORDER(f, 1, 11, 21, 3);
    assert_true(fake_finish(f, 11, 0));
    EXPECT_ORDER(f, 1, 11, 21, 3, 12);
    assert_true(fake_finish(f, 3, 0));
    EXPECT_ORDER(f, 1, 11, 21, 3, 12, 4);
    queue_put(q); /* given up with a job in it */
    while (fake_finish(f, 0, 0))
        ;
    expect_status(a, -EIO, "it broke");
    expect_status(c, 0, NULL);
    expect_status(d, 0, NULL);
    queue_put(other);
    fake_close(f);
}

static void a_held_job_holds_those_behind_it_in_order_only(void **state)
{
    (void)state;
    f = fake_open(8);
    hmm_queue *q = queue_of(f, 1, HMM_PRIORITY_HIGH);
    hmm_fence *gate = own_fence();
    DROP(f, 1, q, &gate, 1);
    DROP(f, 2, q);
    DROP(f, 3, q);
    DROP(f, 4);
    EXPECT_ORDER(f, 4);
    assert_int_equal(hmm_fence_complete(gate, 0), 0);
    EXPECT_ORDER(f, 4, 1); /* before hmm_fence_complete() returned */
    assert_true(fake_finish(f, 1, 0));
    assert_true(fake_finish(f, 2, 0));
    EXPECT_ORDER(f, 4, 1, 2, 3);
    hmm_fence_put(gate);
    queue_put(q);
    fake_close(f);
}

/* Age counts from submission, not from when the fences were done. */
static void a_job_that_waited_is_still_the_oldest(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_fence *gate = own_fence();
    DROP(f, 1);
    DROP(f, 2, NULL, &gate, 1);
    DROP(f, 3);
    assert_int_equal(hmm_fence_complete(gate, 0), 0);
    hmm_fence_put(gate);
    while (fake_finish(f, 0, 0))
        ;
    EXPECT_ORDER(f, 1, 2, 3);
    fake_close(f);
}

/* ---- dependencies ------------------------------------------------------------------------------------------------ */

static void dependencies_across_devices(void **state)
{
    (void)state;
    f = fake_open(4);
    struct fake *g = fake_open(4);
    hmm_fence *wait[3] = {PUT(f, 1), PUT(g, 2), own_fence()};
    hmm_fence *last = PUT(g, 3, NULL, wait, 3);
    hmm_fence *twice[2] = {last, last}; /* the same one twice */
    hmm_fence *end = PUT(f, 4, NULL, twice, 2);
    assert_true(fake_finish(f, 1, 0));
    assert_int_equal(hmm_fence_complete(wait[2], 0), 0);
    EXPECT_ORDER(g, 2);
    assert_true(fake_finish(g, 2, 0));
    EXPECT_ORDER(g, 2, 3);
    EXPECT_ORDER(f, 1);
    assert_true(fake_finish(g, 3, 0));
    EXPECT_ORDER(f, 1, 4);
    for (int i = 0; i < 3; i++)
        hmm_fence_put(wait[i]);
    expect_status(last, 0, NULL);
    assert_true(fake_finish(f, 4, 0));
    expect_status(end, 0, NULL);
    fake_close(g);
    fake_close(f);
}

static void done_fences_do_not_hold(void **state)
{
    (void)state;
    f = fake_open(4);
    hmm_fence *a = PUT(f, 1);
    assert_true(fake_finish(f, 1, 0));
    DROP(f, 2, NULL, &a, 1);
    EXPECT_ORDER(f, 1, 2);
    hmm_fence_put(a);
    hmm_fence *bad = own_fence();
    assert_int_equal(hmm_fence_complete(bad, -EIO), 0);
    hmm_fence *c = PUT(f, 3, NULL, &bad, 1);
    assert_true(fence_done(c));
    expect_status(c, -ECANCELED, hmm_strerror(-EIO));
    hmm_fence_put(bad);
    EXPECT_ORDER(f, 1, 2);
    fake_close(f);
}

static void an_error_cancels_along_the_chain_with_its_reason(void **state)
{
    (void)state;
    f = fake_open(4);
    struct fake *g = fake_open(4);
    hmm_fence *never = own_fence();
    hmm_fence *a = PUT(f, 1);
    hmm_fence *wait[2] = {never, a};
    hmm_fence *b = PUT(g, 2, NULL, wait, 2);
    hmm_fence *c = PUT(f, 3, NULL, &b, 1);
    assert_true(fake_finish(f, 1, -EFAULT));
    struct hmm_fence_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_fence_info(c, &info), 0);
    assert_string_equal(info.message, "a job that it waits for failed: fake: it broke");
    expect_status(b, -ECANCELED, "a job that it waits for failed: fake: it broke"); /* though `never` is not done */
    expect_status(c, -ECANCELED, NULL);
    expect_status(a, -EFAULT, "it broke");
    EXPECT_ORDER(f, 1);
    assert_int_equal(g->submitted, 0);
    assert_int_equal(hmm_fence_complete(never, 0), 0);
    hmm_fence_put(never);
    fake_close(g);
    fake_close(f);
}

/* Nothing of a cancelled job stays behind, though the fence that it waited for is never done. */
static void cancelled_jobs_leave_the_fences_they_waited_for(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_fence *never = own_fence(), *bad = own_fence();
    assert_int_equal(hmm_fence_complete(bad, -EIO), 0);
    hmm_fence *wait[3] = {never, bad, never};
    uint64_t before = mem_used();
    for (uint64_t i = 1; i <= 100; i++) {
        hmm_fence *held = PUT(f, i, NULL, &never, 1), *failed = PUT(f, i, NULL, wait, 3);
        assert_true(fence_done(failed));
        assert_int_equal(hmm_job_cancel(held), 0);
        hmm_fence_put(held);
        hmm_fence_put(failed);
    }
    assert_int_equal(mem_used(), before);
    hmm_fence_put(never);
    hmm_fence_put(bad);
    fake_close(f);
}

static void null_fences_and_too_many_are_refused(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_fence *a = PUT(f, 1), *wait[JOB_WAITS_MAX + 1], *out = NULL;
    for (unsigned i = 0; i <= JOB_WAITS_MAX; i++)
        wait[i] = a;
    wait[3] = NULL;
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 2, .wait = wait, .nwait = 4}, &out), -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "wait[3]"));
    assert_non_null(strstr(hmm_last_message(), "must exist before"));
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 2, .wait = NULL, .nwait = 1}, &out), -EINVAL);
    wait[3] = a;
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 2, .wait = wait, .nwait = JOB_WAITS_MAX + 1}, &out), -EINVAL);
    assert_null(out);
    out = PUT(f, 2, NULL, wait, JOB_WAITS_MAX);
    assert_true(fake_finish(f, 1, 0));
    assert_true(fake_finish(f, 2, 0));
    expect_status(out, 0, NULL);
    hmm_fence_put(a);
    fake_close(f);
}

/* A device that completes inside submit(), and errors that run along: neither may use stack per job. */
static void *long_chains(void *arg)
{
    int status = *(int *)arg;
    f = fake_open(1);
    f->at_once = true;
    hmm_fence *first = own_fence(), *last = fence_get(first);
    for (unsigned i = 0; i < JOBS_MAX; i++) {
        hmm_fence *next = PUT(f, i + 1, NULL, &last, 1);
        hmm_fence_put(last);
        last = next;
    }
    assert_int_equal(hmm_fence_complete(first, status), 0);
    hmm_fence_put(first);
    assert_true(fence_done(last));
    assert_int_equal(f->submitted, status ? 0 : JOBS_MAX);
    for (unsigned i = 0; i < f->submitted; i++)
        assert_int_equal(f->order[i], i + 1);
    expect_status(last, status ? -ECANCELED : 0, NULL);
    fake_close(f);
    return NULL;
}

static void chains_need_no_stack(void **state)
{
    (void)state;
    int status[2] = {0, -EIO};
    for (int i = 0; i < 2; i++) {
        pthread_t t;
        pthread_attr_t attr;
        pthread_attr_init(&attr);
        pthread_attr_setstacksize(&attr, 256 << 10);
        assert_int_equal(pthread_create(&t, &attr, long_chains, &status[i]), 0);
        pthread_join(t, NULL);
        pthread_attr_destroy(&attr);
    }
}

/* ---- ending early ------------------------------------------------------------------------------------------------ */

static void cancel_held_running_and_done(void **state)
{
    (void)state;
    int asked = 0;
    f = fake_open(1);
    hmm_fence *gate = own_fence();
    hmm_fence *a = PUT(f, 1), *ready = PUT(f, 2), *held = PUT(f, 3, NULL, &gate, 1);
    assert_int_equal(hmm_job_cancel(ready), 0);
    assert_true(fence_done(ready));
    assert_int_equal(hmm_job_cancel(held), 0);
    assert_true(fence_done(held));
    assert_int_equal(hmm_job_cancel(held), -EALREADY);
    expect_status(ready, -ECANCELED, NULL);
    expect_status(held, -ECANCELED, NULL);
    assert_int_equal(sched_jobs(&f->dev), 1);
    assert_int_equal(hmm_fence_complete(gate, 0), 0); /* nobody waits for it any more */
    assert_int_equal(hmm_job_cancel(gate), -EINVAL);
    assert_int_equal(hmm_job_cancel(NULL), -EINVAL);
    hmm_fence_put(gate);

    assert_int_equal(hmm_job_cancel(a), 0);
    uint64_t until = now_ms() + 30000;
    while (fake_cancels(f, NULL) < 3 && now_ms() < until)
        os_sleep(1000000);
    assert_true(fake_cancels(f, &asked) >= 3); /* again and again */
    assert_int_equal(asked, -ECANCELED);
    assert_false(fence_done(a));
    fake_obey(f);
    expect_status(fence_get(a), -ECANCELED, "hmm_job_cancel");
    assert_int_equal(hmm_job_cancel(a), -EALREADY);
    hmm_fence_put(a);
    EXPECT_ORDER(f, 1);
    fake_close(f);
}

static void a_driver_without_cancel_goes_on(void **state)
{
    (void)state;
    f = fake_open(1);
    f->driver.cancel = NULL;
    hmm_fence *a = PUT(f, 1, .timeout_ms = 1), *b = PUT(f, 2);
    assert_int_equal(hmm_job_cancel(a), 0);
    assert_int_equal(hmm_job_cancel(b), 0);
    expect_status(b, -ECANCELED, NULL);
    assert_int_equal(hmm_fence_wait(a, 50000000), -EAGAIN);
    assert_true(fake_finish(f, 1, 0));
    expect_status(a, 0, NULL);
    fake_close(f);
}

static void time_limits(void **state)
{
    (void)state;
    int asked = 0;
    f = fake_open(1);
    fake_obey(f);
    hmm_fence *gate = own_fence();
    uint64_t start = now_ms();
    hmm_fence *late = PUT(f, 9, .timeout_ms = 100000); /* not done when the device closes */
    hmm_fence *held = PUT(f, 2, NULL, &gate, 1, 60), *ready = PUT(f, 3, .timeout_ms = 30);
    hmm_fence *soon = PUT(f, 4, .timeout_ms = 100000);
    expect_status(ready, -ETIMEDOUT, "30 ms");
    assert_true(now_ms() - start >= 30);
    expect_status(held, -ETIMEDOUT, "60 ms");
    assert_true(now_ms() - start >= 60);
    assert_int_equal(fake_cancels(f, NULL), 0);
    assert_true(fake_finish(f, 9, 0));
    hmm_fence *running = PUT(f, 5, .timeout_ms = 40);
    assert_true(fake_finish(f, 4, 0));
    expect_status(running, -ETIMEDOUT, "40 ms");
    fake_cancels(f, &asked);
    assert_int_equal(asked, -ETIMEDOUT);
    EXPECT_ORDER(f, 9, 4, 5);
    expect_status(late, 0, NULL);
    expect_status(soon, 0, NULL);
    hmm_fence_put(gate);
    fake_close(f);
}

static void the_first_reason_to_end_stays(void **state)
{
    (void)state;
    int asked = 0;
    f = fake_open(1);
    hmm_fence *a = PUT(f, 1, .timeout_ms = 20);
    uint64_t until = now_ms() + 30000;
    while (!fake_cancels(f, NULL) && now_ms() < until)
        os_sleep(1000000);
    fake_cancels(f, &asked);
    assert_int_equal(asked, -ETIMEDOUT);
    assert_int_equal(hmm_job_cancel(a), 0);
    fake_obey(f);
    expect_status(a, -ETIMEDOUT, "20 ms");
    fake_close(f);
}

/* ---- closed, lost, full, refused --------------------------------------------------------------------------------- */

static void *finish_later(void *arg)
{
    os_sleep(50000000);
    fake_finish(arg, 0, -ECANCELED);
    return NULL;
}

static void closing_ends_what_core_keeps_and_waits_for_the_rest(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_queue *q = queue_of(f, 1, HMM_PRIORITY_NORMAL);
    hmm_fence *gate = own_fence();
    hmm_fence *a = PUT(f, 1), *b = PUT(f, 2, q), *c = PUT(f, 3, q, &b, 1), *d = PUT(f, 4, NULL, &gate, 1), *out = NULL;
    sched_stop(&f->dev);
    EXPECT_ORDER(f, 1);
    assert_false(fence_done(a));
    expect_status(b, -ECANCELED, "the device was closed");
    expect_status(c, -ECANCELED, "the device was closed"); /* and not because of b */
    expect_status(d, -ECANCELED, "the device was closed");
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 5}, &out), -ENODEV);
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 5, .queue = q}, &out), -ENODEV);
    assert_int_equal(queue_new(&f->dev, NULL, &q), -ENODEV);
    assert_null(out);
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, finish_later, f), 0);
    sched_wait(&f->dev);
    assert_true(fence_done(a));
    pthread_join(t, NULL);
    assert_int_equal(hmm_fence_complete(gate, 0), 0);
    hmm_fence_put(gate);
    fake_close(f);
    struct fake *g = fake_open(1); /* a queue of a closed device is not another device's */
    assert_int_equal(fake_try(g, &(struct fake_job){.tag = 6, .queue = q}, &out), -ENODEV);
    queue_put(q);
    assert_int_equal(hmm_job_cancel(a), -EALREADY);
    hmm_fence_put(a);
    q = queue_of(g, 0, 0);
    f = fake_open(1);
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 7, .queue = q}, &out), -EINVAL);
    queue_put(q);
    fake_close(f);
    fake_close(g);
}

static void *submit_one(void *arg)
{
    hmm_fence *made = NULL;
    int r = fake_try(arg, &(struct fake_job){.tag = 1}, &made);
    hmm_fence_put(made);
    return (void *)(intptr_t)r;
}

static void stopping_waits_for_submit_to_return(void **state)
{
    (void)state;
    f = fake_open(1);
    f->slow = true;
    pthread_t t;
    void *r;
    assert_int_equal(pthread_create(&t, NULL, submit_one, f), 0);
    uint64_t until = now_ms() + 30000;
    while (!sched_jobs(&f->dev) && now_ms() < until)
        sched_yield();
    sched_stop(&f->dev); /* the job is on its way into the driver */
    assert_int_equal(fake_submitted(f), 1);
    pthread_join(t, &r);
    assert_null(r);
    fake_close(f);
}

static void a_lost_device_says_why(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_fence *a = PUT(f, 1), *b = PUT(f, 2), *c = PUT(f, 3, NULL, &b, 1), *out = NULL;
    sched_lost(&f->dev, "fell off the bus");
    sched_lost(&f->dev, "again");
    expect_status(b, -ENODEV, "fell off the bus");
    expect_status(c, -ENODEV, "fell off the bus");
    assert_false(fence_done(a));
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 4}, &out), -ENODEV);
    assert_non_null(strstr(hmm_last_message(), "fell off the bus"));
    assert_true(fake_finish(f, 1, -ENODEV));
    expect_status(a, -ENODEV, NULL);
    EXPECT_ORDER(f, 1);
    fake_close(f);
}

static void the_bound_of_jobs(void **state)
{
    (void)state;
    f = fake_open(2);
    hmm_fence *out = NULL;
    for (uint64_t i = 1; i <= JOBS_MAX; i++)
        DROP(f, i);
    assert_int_equal(sched_jobs(&f->dev), 65536);
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 1}, &out), -EBUSY);
    assert_non_null(strstr(hmm_last_message(), "wait for a fence"));
    assert_null(out);
    assert_true(fake_finish(f, 0, 0));
    DROP(f, JOBS_MAX + 1);
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 1}, &out), -EBUSY);
    while (fake_finish(f, 0, 0))
        ;
    assert_int_equal(f->submitted, JOBS_MAX + 1);
    for (unsigned i = 0; i < f->submitted; i++)
        assert_int_equal(f->order[i], i + 1);
    fake_close(f);
}

static void what_the_driver_refuses(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_fence *out = NULL;
    f->refuse = -EOPNOTSUPP;
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 1}, &out), -EOPNOTSUPP);
    assert_null(out);
    assert_non_null(strstr(hmm_last_message(), "fake"));
    assert_int_equal(sched_jobs(&f->dev), 0);
    f->refuse = 0;
    DROP(f, 2);
    hmm_fence *held = PUT(f, 3), *next = PUT(f, 4, NULL, &held, 1);
    f->refuse = -EIO;
    assert_true(fake_finish(f, 2, 0));
    expect_status(held, -EIO, NULL);
    expect_status(next, -ECANCELED, NULL);
    EXPECT_ORDER(f, 2);
    fake_close(f);
    f = fake_open(1);
    f->driver.submit = NULL;
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 1}, &out), -EOPNOTSUPP);
    hmm_queue *q = NULL;
    assert_int_equal(queue_new(&f->dev, NULL, &q), -EOPNOTSUPP);
    fake_close(f);
}

static void bad_descriptions_of_queues_and_engines(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_queue *q = NULL;
    const struct hmm_queue_config bad[] = {
        {.size = 4},
        {.size = sizeof(bad[0]), .in_order = 2},
        {.size = sizeof(bad[0]), .priority = 2},
        {.size = sizeof(bad[0]), .priority = -2},
        {.size = sizeof(bad[0]), .reserved = 1},
    };
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert_int_equal(queue_new(&f->dev, &bad[i], &q), -EINVAL);
    assert_null(q);
    f->dev.sched->open = false;
    const struct hmm_engines_desc engines[] = {
        {.size = 4, .slots = 1},
        {.size = sizeof(engines[0]), .slots = 0},
        {.size = sizeof(engines[0]), .slots = 65537},
        {.size = sizeof(engines[0]), .slots = 1, .flags = 2},
        {.size = sizeof(engines[0]), .slots = 1, .reserved = 1},
    };
    for (unsigned i = 0; i < sizeof(engines) / sizeof(engines[0]); i++)
        assert_int_equal(hmm_engines_add(&f->dev, &engines[i]), -EINVAL);
    assert_int_equal(hmm_engines_add(&f->dev, NULL), -EINVAL);
    struct hmm_engines_desc good = {.size = sizeof(good), .slots = 65536, .flags = HMM_ENGINES_NAMED};
    assert_int_equal(hmm_engines_add(&f->dev, &good), 0);
    sched_open(&f->dev);
    assert_int_equal(hmm_engines_add(&f->dev, &good), -EINVAL);
    fake_close(f);
}

static void no_memory(void **state)
{
    (void)state;
    f = fake_open(1);
    hmm_fence *out = NULL;
    hmm_queue *q = NULL;
    mem_fail = fail_nth;
    alloc_until_fail = 0;
    assert_int_equal(fake_try(f, &(struct fake_job){.tag = 1}, &out), -ENOMEM);
    alloc_until_fail = 0;
    assert_int_equal(queue_new(&f->dev, NULL, &q), -ENOMEM);
    alloc_until_fail = 0;
    assert_null(fence_user_new());
    mem_fail = NULL;
    assert_null(out);
    assert_int_equal(sched_jobs(&f->dev), 0);
    fake_close(f);
}

/* ---- descriptors of fences --------------------------------------------------------------------------------------- */

static bool readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) == 1;
}

/* Descriptors in the table of the library's threads, and two; 0: the thread has not named itself yet. */
static unsigned count_library_descriptors(void)
{
    DIR *tasks = opendir("/proc/self/task");
    unsigned n = 0;
    for (struct dirent *d; (d = readdir(tasks));) {
        char path[300], name[32] = "";
        snprintf(path, sizeof(path), "/proc/self/task/%s/comm", d->d_name);
        FILE *comm = fopen(path, "re");
        if (!comm)
            continue;
        if (!fgets(name, sizeof(name), comm))
            name[0] = 0;
        fclose(comm);
        if (strcmp(name, "hmm-jobs\n") != 0)
            continue;
        snprintf(path, sizeof(path), "/proc/self/task/%s/fd", d->d_name);
        DIR *fds = opendir(path);
        while (readdir(fds))
            n++;
        closedir(fds);
    }
    closedir(tasks);
    return n;
}

static unsigned library_descriptors(void)
{
    unsigned n;
    while ((n = count_library_descriptors()) == 0)
        sched_yield();
    return n;
}

static void wait_for_library_descriptors(unsigned n)
{
    uint64_t until = now_ms() + 30000;
    while (library_descriptors() != n && now_ms() < until)
        os_sleep(1000000);
    assert_int_equal(library_descriptors(), n);
}

static void descriptors_become_and_stay_readable(void **state)
{
    (void)state;
    f = fake_open(1);
    unsigned before = library_descriptors();
    hmm_fence *a = PUT(f, 1);
    int fd = fence_watch(a), second = fence_watch(a), closed = fence_watch(a);
    assert_true(fd >= 0 && second >= 0 && closed >= 0);
    assert_int_equal(library_descriptors(), before + 3);
    close(closed);
    assert_false(readable(fd));
    assert_false(readable(second));
    assert_true(fake_finish(f, 1, -EIO)); /* an error is done, too */
    struct pollfd p = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, 30000), 1);
    p.fd = second;
    assert_int_equal(poll(&p, 1, 30000), 1);
    assert_true(readable(fd));
    wait_for_library_descriptors(before);
    int late = fence_watch(a);
    assert_true(readable(late));
    assert_int_equal(library_descriptors(), before);
    close(fd);
    close(second);
    close(late);
    hmm_fence_put(a);
    fake_close(f);
}

static void descriptors_end_with_their_fence(void **state)
{
    (void)state;
    unsigned before = library_descriptors();
    hmm_fence *a = own_fence();
    int fd = fence_watch(a);
    assert_int_equal(library_descriptors(), before + 1);
    hmm_fence_put(a); /* nobody can complete it any more */
    wait_for_library_descriptors(before);
    assert_false(readable(fd));
    close(fd);
    a = own_fence();
    fd = fence_watch(a);
    fence_user_cancel_all(); /* the last device closes */
    struct pollfd p = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, 30000), 1);
    assert_int_equal(hmm_fence_complete(a, 0), -EALREADY);
    expect_status(a, -ECANCELED, "closed");
    close(fd);
}

static void *complete_soon(void *arg)
{
    hmm_fence_complete(arg, 0);
    return NULL;
}

static void descriptors_of_fences_that_are_being_done(void **state)
{
    (void)state;
    unsigned before = library_descriptors();
    for (int round = 0; round < 1000; round++) {
        hmm_fence *a = own_fence();
        pthread_t t;
        assert_int_equal(pthread_create(&t, NULL, complete_soon, a), 0);
        if (round & 1)
            sched_yield();
        int fd = fence_watch(a);
        struct pollfd p = {.fd = fd, .events = POLLIN};
        assert_true(fd >= 0);
        assert_int_equal(poll(&p, 1, 30000), 1);
        pthread_join(t, NULL);
        close(fd);
        hmm_fence_put(a);
    }
    wait_for_library_descriptors(before);
}

/* ---- many threads ------------------------------------------------------------------------------------------------ */

#define SUBMITTERS 4
#define ENGINES 3
#define EACH 4000

struct crowd {
    struct fake *on[2];
    uint32_t stop, wrong, refused, cancelled;
};

struct submitter {
    struct crowd *crowd;
    unsigned index;
    hmm_queue *in_order[2]; /* its own: so the order of its jobs is known */
};

static void *crowd_engine(void *arg)
{
    struct crowd *c = arg;
    for (unsigned i = 0; !__atomic_load_n(&c->stop, __ATOMIC_ACQUIRE); i++)
        if (!fake_finish(c->on[i & 1], 0, i % 1000 == 7 ? -EIO : 0))
            sched_yield();
    return NULL;
}

static uint64_t crowd_tag(const struct submitter *s, unsigned serial, bool in_order)
{
    return (uint64_t)in_order << 40 | (uint64_t)(s->index + 1) << 32 | (serial + 1);
}

static void *crowd_submitter(void *arg)
{
    struct submitter *s = arg;
    struct crowd *c = s->crowd;
    hmm_fence *recent[16] = {NULL};
    uint64_t seed = s->index * 77 + 5;
    for (unsigned i = 0; i < EACH; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        unsigned on = seed >> 60 & 1, slot = i % 16, from = seed >> 40 & 15;
        bool in_order = seed >> 50 & 1;
        hmm_fence *made = NULL;
        struct fake_job j = {.tag = crowd_tag(s, i, in_order),
                             .queue = in_order ? s->in_order[on] : NULL,
                             .timeout_ms = seed >> 33 & 1 ? 60000 : 0};
        if (recent[from] && (seed >> 55 & 3) == 0) {
            j.wait = &recent[from];
            j.nwait = 1;
        }
        int r = fake_try(c->on[on], &j, &made);
        if (r)
            __atomic_fetch_add(&c->refused, 1, __ATOMIC_RELAXED);
        if (made && (seed >> 25 & 31) == 0)
            hmm_job_cancel(made);
        if (recent[slot]) {
            int status = hmm_fence_wait(recent[slot], PATIENCE);
            if (status != 0 && status != -EIO && status != -ECANCELED)
                __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
            if (status == -ECANCELED)
                __atomic_fetch_add(&c->cancelled, 1, __ATOMIC_RELAXED);
            hmm_fence_put(recent[slot]);
        }
        recent[slot] = made;
    }
    for (unsigned i = 0; i < 16; i++) {
        if (recent[i] && hmm_fence_wait(recent[i], PATIENCE) == -EAGAIN)
            __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
        hmm_fence_put(recent[i]);
    }
    return NULL;
}

/* Jobs of one queue came in ascending order. Every submission came once, or was cancelled before it began. */
static void check_crowd(const struct fake *on, unsigned char *seen)
{
    uint64_t last[SUBMITTERS + 1] = {0};
    assert_true(on->submitted < FAKE_LOG);
    for (unsigned i = 0; i < on->submitted; i++) {
        uint64_t serial = on->order[i] & UINT32_MAX;
        unsigned who = on->order[i] >> 32 & 0xff;
        assert_in_range(who, 1, SUBMITTERS);
        assert_int_equal(seen[(who - 1) * EACH + serial - 1]++, 0);
        if (!(on->order[i] >> 40))
            continue;
        assert_true(serial > last[who]);
        last[who] = serial;
    }
    assert_int_equal(on->submitted, on->done);
    assert_true(on->most <= on->dev.sched->slots);
    assert_int_equal(sched_jobs((struct hmm_device *)&on->dev), 0);
}

static void many_threads_lose_nothing(void **state)
{
    (void)state;
    struct crowd c = {.on = {fake_open(2), fake_open(5)}};
    pthread_t engines[ENGINES], submitters[SUBMITTERS];
    struct submitter s[SUBMITTERS];
    unsigned char *seen = calloc(SUBMITTERS, EACH);
    for (unsigned i = 0; i < ENGINES; i++)
        assert_int_equal(pthread_create(&engines[i], NULL, crowd_engine, &c), 0);
    for (unsigned i = 0; i < SUBMITTERS; i++) {
        s[i] = (struct submitter){&c, i, {queue_of(c.on[0], 1, (int)(i % 3) - 1), queue_of(c.on[1], 1, 1)}};
        assert_int_equal(pthread_create(&submitters[i], NULL, crowd_submitter, &s[i]), 0);
    }
    for (unsigned i = 0; i < SUBMITTERS; i++)
        pthread_join(submitters[i], NULL);
    __atomic_store_n(&c.stop, 1, __ATOMIC_RELEASE);
    for (unsigned i = 0; i < ENGINES; i++)
        pthread_join(engines[i], NULL);
    assert_int_equal(c.wrong, 0);
    assert_int_equal(c.refused, 0);
    check_crowd(c.on[0], seen);
    check_crowd(c.on[1], seen);
    unsigned missing = 0;
    for (unsigned i = 0; i < SUBMITTERS * EACH; i++)
        missing += !seen[i];
    assert_true(missing <= SUBMITTERS * EACH / 4); /* cancelled before they began, with what waited for them */
    for (unsigned i = 0; i < SUBMITTERS; i++) {
        queue_put(s[i].in_order[0]);
        queue_put(s[i].in_order[1]);
    }
    free(seen);
    fake_close(c.on[0]);
    fake_close(c.on[1]);
}

struct closing {
    struct fake *on;
    uint32_t stop, wrong;
};

static void *submit_until_closed(void *arg)
{
    struct closing *c = arg;
    hmm_fence *last = NULL;
    for (uint64_t i = 1;; i++) {
        hmm_fence *made = NULL;
        int r = fake_try(c->on, &(struct fake_job){.tag = i, .wait = &last, .nwait = last && i % 3 == 0}, &made);
        if (r && r != -ENODEV && r != -EBUSY)
            __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
        if (last) {
            if (i % 7 == 0)
                hmm_job_cancel(last);
            if (r == -ENODEV) {
                int status = hmm_fence_wait(last, PATIENCE);
                if (status && status != -ECANCELED)
                    __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
            }
            hmm_fence_put(last);
        }
        last = made;
        if (r == -ENODEV)
            return NULL;
    }
}

static void *complete_until_told(void *arg)
{
    struct closing *c = arg;
    while (!__atomic_load_n(&c->stop, __ATOMIC_ACQUIRE))
        if (!fake_finish(c->on, 0, 0))
            sched_yield();
    return NULL;
}

static void closing_under_load(void **state)
{
    (void)state;
    for (int round = 0; round < 30; round++) {
        struct closing c = {.on = fake_open(3)};
        pthread_t submitters[3], engine;
        for (int i = 0; i < 3; i++)
            assert_int_equal(pthread_create(&submitters[i], NULL, submit_until_closed, &c), 0);
        assert_int_equal(pthread_create(&engine, NULL, complete_until_told, &c), 0);
        os_sleep(3000000);
        sched_stop(&c.on->dev);
        unsigned submitted = fake_submitted(c.on);
        sched_wait(&c.on->dev);
        assert_int_equal(fake_submitted(c.on), submitted); /* nothing reached the driver after sched_stop() */
        assert_int_equal(sched_jobs(&c.on->dev), 0);
        for (int i = 0; i < 3; i++)
            pthread_join(submitters[i], NULL);
        __atomic_store_n(&c.stop, 1, __ATOMIC_RELEASE);
        pthread_join(engine, NULL);
        assert_int_equal(c.wrong, 0);
        fake_close(c.on);
    }
}

#define T(fn) cmocka_unit_test_setup_teardown(fn, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(highest_priority_first_then_the_oldest),
        T(no_more_jobs_than_slots),
        T(in_order_jobs_run_one_by_one_whatever_their_status),
        T(a_held_job_holds_those_behind_it_in_order_only),
        T(a_job_that_waited_is_still_the_oldest),
        T(dependencies_across_devices),
        T(done_fences_do_not_hold),
        T(an_error_cancels_along_the_chain_with_its_reason),
        T(cancelled_jobs_leave_the_fences_they_waited_for),
        T(null_fences_and_too_many_are_refused),
        T(chains_need_no_stack),
        T(cancel_held_running_and_done),
        T(a_driver_without_cancel_goes_on),
        T(time_limits),
        T(the_first_reason_to_end_stays),
        T(closing_ends_what_core_keeps_and_waits_for_the_rest),
        T(stopping_waits_for_submit_to_return),
        T(a_lost_device_says_why),
        T(the_bound_of_jobs),
        T(what_the_driver_refuses),
        T(bad_descriptions_of_queues_and_engines),
        T(no_memory),
        T(descriptors_become_and_stay_readable),
        T(descriptors_end_with_their_fence),
        T(descriptors_of_fences_that_are_being_done),
        T(many_threads_lose_nothing),
        T(closing_under_load),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
