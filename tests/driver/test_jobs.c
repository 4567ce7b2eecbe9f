/* SPDX-License-Identifier: MIT */
/* Queues, dependencies, fences, cancelling and time limits, over any device that runs jobs. */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "support.h"

#define JOBS_MAX 65536

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

/* Addresses of process memory that kernels reach through their accessor alone. */
struct places {
    uint32_t *began, *go; /* counts kernels that began; kernels wait until it is not 0 */
    uint32_t *count;      /* of numbers in the list */
    uint32_t *list;
    uint32_t number;
};

static uint32_t get_word(hmm_accessor *acc, const uint32_t *at)
{
    uint32_t value;
    hmm_get(acc, &value, at, sizeof(value));
    return value;
}

static void put_word(hmm_accessor *acc, uint32_t *at, uint32_t value)
{
    hmm_put(acc, at, &value, sizeof(value));
}

/* Says that it runs, and goes on when it may. */
HMM_KERNEL(jobs_wait_for_go)
{
    const struct places *p = arg;
    put_word(acc, p->began, 1);
    while (!get_word(acc, p->go))
        hmm_yield(acc);
    return p->number;
}

/* Appends its number. Two at a time would lose one: this is for jobs that run one by one. */
HMM_KERNEL(jobs_append)
{
    const struct places *p = arg;
    uint32_t n = get_word(acc, p->count);
    for (volatile int i = 0; i < 500; i++)
        ;
    put_word(acc, p->list + n, p->number);
    put_word(acc, p->count, n + 1);
    return n;
}

/* Says that it runs, and never returns, nor lets anybody in. */
HMM_KERNEL(jobs_never_end)
{
    const struct places *p = arg;
    put_word(acc, p->began, 1);
    hmm_yield(acc);
    for (volatile uint64_t i = 0;; i++)
        ;
}

/* The same, with an access now and then. */
HMM_KERNEL(jobs_read_for_ever)
{
    const struct places *p = arg;
    put_word(acc, p->began, 1);
    for (;;)
        get_word(acc, p->go);
}

HMM_KERNEL(jobs_fail)
{
    (void)arg;
    get_word(acc, (const uint32_t *)64); /* nothing is mapped there */
    return 0;
}

static struct places new_places(void)
{
    uint32_t *control = map_shared();
    return (struct places){.began = control, .go = control + 1, .count = control + 2, .list = control + 16};
}

static void free_places(struct places *p)
{
    munmap(p->began, page_size());
}

static void let_go(struct places *p)
{
    __atomic_store_n(p->go, 1, __ATOMIC_RELEASE);
}

/* ---- submitting -------------------------------------------------------------------------------------------------- */

struct extra {
    hmm_queue *queue;
    hmm_fence *const *wait;
    uint32_t nwait;
    uint32_t timeout_ms;
};

static int try_submit(hmm_dev dev, const struct hmm_operation *op, const struct extra *x, hmm_fence **fence)
{
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation = *op};
    if (x) {
        desc.queue = x->queue;
        desc.wait = x->wait;
        desc.nwait = x->nwait;
        desc.timeout_ms = x->timeout_ms;
    }
    return hmm_job_submit(dev, &desc, fence);
}

static hmm_fence *submit(hmm_dev dev, const struct hmm_operation *op, const struct extra *x)
{
    hmm_fence *fence = NULL;
    int r = try_submit(dev, op, x, &fence);
    if (r)
        fail_msg("submit: %d, %s", r, hmm_last_message());
    return fence;
}

static hmm_fence *run(hmm_dev dev, hmm_kernel kernel, const struct places *p, const struct extra *x)
{
    struct hmm_operation op = {.kind = HMM_OP_KERNEL};
    op.kernel = (struct hmm_launch){.size = sizeof(op.kernel), .kernel = kernel, .arg = p, .arg_size = sizeof(*p)};
    return submit(dev, &op, x);
}

static hmm_fence *nop(hmm_dev dev, const struct extra *x)
{
    return submit(dev, &(struct hmm_operation){.kind = HMM_OP_NOP}, x);
}

static hmm_fence *copy(hmm_dev dev, void *dst, const void *src, size_t bytes, const struct extra *x)
{
    struct hmm_operation op = {.kind = HMM_OP_COPY};
    op.copy = (struct hmm_op_copy){.dst = dst, .src = src, .bytes = bytes};
    return submit(dev, &op, x);
}

static hmm_queue *new_queue(hmm_dev dev, uint32_t in_order, int32_t priority)
{
    hmm_queue *q = NULL;
    struct hmm_queue_config c = {.size = sizeof(c), .in_order = in_order, .priority = priority};
    int r = hmm_queue_create(dev, &c, &q);
    if (r)
        fail_msg("queue: %d, %s", r, hmm_last_message());
    return q;
}

static hmm_fence *new_fence(void)
{
    hmm_fence *fence = NULL;
    assert_int_equal(hmm_fence_create(&fence), 0);
    return fence;
}

static void expect(hmm_fence *fence, int status, const char *word)
{
    struct hmm_fence_info info = finish(fence);
    if (info.status != status || !strstr(info.message, word))
        fail_msg("expected %d and '%s'; got %d, '%s'", status, word, info.status, info.message);
}

static uint64_t jobs_of(hmm_dev dev)
{
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    return info.jobs;
}

/* ---- queues ------------------------------------------------------------------------------------------------------ */

static void an_empty_job(void **state)
{
    (void)state;
    struct hmm_fence_info info = finish(nop(device, NULL));
    assert_int_equal(info.status, 0);
    assert_int_equal(info.result, 0);
    assert_string_equal(info.message, "");
    assert_int_equal(jobs_of(device), 0);
    assert_int_equal(try_submit(device, &(struct hmm_operation){.kind = HMM_OP_NOP}, NULL, NULL),
                     0); /* no fence is asked for */
}

#define IN_ORDER 400

static void an_in_order_queue_runs_one_by_one(void **state)
{
    (void)state;
    struct places p = new_places();
    hmm_queue *q = new_queue(device, 1, HMM_PRIORITY_NORMAL);
    hmm_fence *last = NULL;
    for (uint32_t i = 0; i < IN_ORDER; i++) {
        hmm_fence_put(last);
        p.number = i * 7;
        last = run(device, jobs_append, &p, &(struct extra){.queue = q});
    }
    must(last);
    assert_int_equal(*p.count, IN_ORDER);
    for (uint32_t i = 0; i < IN_ORDER; i++)
        assert_int_equal(p.list[i], i * 7);
    hmm_queue_destroy(q);
    free_places(&p);
}

static void jobs_of_a_concurrent_queue_run_together(void **state)
{
    (void)state;
    hmm_dev dev = open_with("engines=2");
    hmm_queue *q = new_queue(dev, 0, HMM_PRIORITY_NORMAL);
    struct places a = new_places(), b = new_places();
    hmm_fence *first = run(dev, jobs_wait_for_go, &a, &(struct extra){.queue = q});
    hmm_fence *second = run(dev, jobs_wait_for_go, &b, &(struct extra){.queue = q});
    wait_for(a.began, 1);
    wait_for(b.began, 1); /* though the first one has not ended */
    let_go(&b);
    must(second);
    let_go(&a);
    must(first);
    hmm_queue_destroy(q);
    free_places(&a);
    free_places(&b);
    close_device(dev);
}

/* One engine, kept busy until all is queued. */
static void the_highest_priority_begins_first(void **state)
{
    (void)state;
    enum { BLOCKERS = 16, EACH = 30 };
    hmm_dev dev = open_with("engines=1");
    struct places p = new_places();
    static const int32_t priorities[] = {HMM_PRIORITY_LOW, HMM_PRIORITY_NORMAL, HMM_PRIORITY_HIGH};
    hmm_queue *q[3];
    for (int i = 0; i < 3; i++)
        q[i] = new_queue(dev, 0, priorities[i]);
    for (int i = 0; i < BLOCKERS; i++) /* as many as any driver takes at once */
        hmm_fence_put(run(dev, jobs_wait_for_go, &p, &(struct extra){.queue = q[2]}));
    for (uint32_t i = 0; i < EACH; i++)
        for (uint32_t k = 0; k < 3; k++) {
            p.number = k;
            hmm_fence_put(run(dev, jobs_append, &p, &(struct extra){.queue = q[k]}));
        }
    assert_int_equal(jobs_of(dev), BLOCKERS + 3 * EACH);
    let_go(&p);
    wait_for(p.count, 3 * EACH);
    for (uint32_t i = 0; i < 3 * EACH; i++)
        assert_int_equal(p.list[i], 2 - i / EACH);
    for (int i = 0; i < 3; i++)
        hmm_queue_destroy(q[i]);
    close_device(dev);
    free_places(&p);
}

static void queues_of_closed_and_other_devices(void **state)
{
    (void)state;
    hmm_dev dev = open_with(NULL);
    hmm_queue *q = new_queue(dev, 1, HMM_PRIORITY_NORMAL);
    hmm_fence *fence = NULL;
    struct hmm_operation op = {.kind = HMM_OP_NOP};
    assert_int_equal(try_submit(device, &op, &(struct extra){.queue = q}, &fence), -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "another device"));
    must(nop(dev, &(struct extra){.queue = q}));
    close_device(dev);
    assert_int_equal(try_submit(device, &op, &(struct extra){.queue = q}, &fence), -ENODEV);
    assert_int_equal(try_submit(dev, &op, &(struct extra){.queue = q}, &fence), -ENODEV);
    assert_int_equal(hmm_queue_create(dev, NULL, &q), -ENODEV);
    assert_null(fence);
    hmm_queue_destroy(q);
    hmm_queue_destroy(NULL);
    assert_int_equal(hmm_queue_create(device, NULL, NULL), -EINVAL);
}

static void a_queue_may_be_given_up_with_jobs_in_it(void **state)
{
    (void)state;
    struct places p = new_places();
    hmm_queue *q = new_queue(device, 1, HMM_PRIORITY_HIGH);
    hmm_fence *blocker = run(device, jobs_wait_for_go, &p, &(struct extra){.queue = q});
    hmm_fence *behind = run(device, jobs_append, &p, &(struct extra){.queue = q});
    hmm_queue_destroy(q);
    let_go(&p);
    must(blocker);
    must(behind);
    assert_int_equal(*p.count, 1);
    free_places(&p);
}

/* ---- dependencies ------------------------------------------------------------------------------------------------ */

/* Copies from buffer to buffer, on two devices in turn, each step waiting for the one before. Without the order the last buffer would
 * hold what was in one of the others. */
static void data_follows_a_chain_over_two_devices(void **state)
{
    (void)state;
    enum { STEPS = 12 };
    hmm_dev dev[2] = {device, open_with(NULL)};
    size_t bytes = MIB + 4711;
    char *buffers[STEPS + 1], *expected = malloc(bytes);
    for (int i = 0; i <= STEPS; i++) {
        buffers[i] = map_pages(bytes);
        fill_random(buffers[i], bytes, (uint64_t)i);
    }
    memcpy(expected, buffers[0], bytes);
    hmm_fence *start = new_fence(), *last = NULL;
    for (int i = 0; i < STEPS; i++) {
        hmm_fence *wait[2] = {start, last};
        hmm_fence *next =
            copy(dev[i & 1], buffers[i + 1], buffers[i], bytes, &(struct extra){.wait = wait, .nwait = last ? 2 : 1});
        hmm_fence_put(last);
        last = next;
    }
    assert_int_equal(hmm_fence_wait(last, 50000000), -EAGAIN); /* nothing begins by itself */
    assert_int_equal(hmm_fence_complete(start, 0), 0);
    must(last);
    hmm_fence_put(start);
    for (int i = 1; i <= STEPS; i++)
        assert_memory_equal(buffers[i], expected, bytes);
    for (int i = 0; i <= STEPS; i++)
        unmap_pages(buffers[i], bytes);
    free(expected);
    close_device(dev[1]);
}

static void an_error_cancels_those_that_wait(void **state)
{
    (void)state;
    char *p = map_pages(MIB);
    struct places places = new_places();
    memset(p, 5, MIB);
    hmm_fence *bad = run(device, jobs_fail, &places, NULL);
    hmm_fence *middle = copy(device, p, p + 4096, 4096, &(struct extra){.wait = &bad, .nwait = 1});
    hmm_fence *last = nop(device, &(struct extra){.wait = &middle, .nwait = 1});
    expect(last, -ECANCELED, "a job that it waits for failed: ");
    expect(middle, -ECANCELED, "a job that it waits for failed: ");
    struct hmm_fence_info info = finish(bad);
    assert_int_equal(info.status, -EFAULT);
    assert_int_equal(info.address, 64);
    hmm_fence *mine = new_fence();
    hmm_fence *waits = copy(device, p, p + 4096, 4096, &(struct extra){.wait = &mine, .nwait = 1});
    assert_int_equal(hmm_fence_complete(mine, -EIO), 0);
    assert_int_not_equal(hmm_fence_wait(waits, 0), -EAGAIN); /* it was cancelled before hmm_fence_complete() returned */
    expect(waits, -ECANCELED, hmm_strerror(-EIO));
    hmm_fence_put(mine);
    free_places(&places);
    unmap_pages(p, MIB);
}

static void cycles_cannot_be_made(void **state)
{
    (void)state;
    hmm_fence *fence = NULL;
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation.kind = HMM_OP_NOP, .wait = &fence, .nwait = 1};
    assert_int_equal(hmm_job_submit(device, &desc, &fence), -EINVAL); /* its own fence does not exist yet */
    assert_non_null(strstr(hmm_last_message(), "must exist before"));
    assert_null(fence);
    /* The only way left is a fence of the program that it completes too late: a time limit ends that. */
    hmm_queue *q = new_queue(device, 1, HMM_PRIORITY_NORMAL);
    hmm_fence *mine = new_fence();
    hmm_fence *first = nop(device, &(struct extra){.queue = q, .wait = &mine, .nwait = 1, .timeout_ms = 50});
    hmm_fence *second = nop(device, &(struct extra){.queue = q});
    int r = hmm_fence_wait(second, JOB_SECONDS * 1000000000ll);
    assert_int_equal(r, 0);
    expect(first, -ETIMEDOUT, "50 ms");
    must(second);
    hmm_fence_put(mine);
    hmm_queue_destroy(q);
}

static void fences_of_the_program(void **state)
{
    (void)state;
    hmm_fence *mine = new_fence(), *job = nop(device, NULL);
    struct hmm_fence_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_fence_wait(mine, 1000000), -EAGAIN);
    assert_int_equal(hmm_fence_complete(mine, 1), -EINVAL);
    assert_int_equal(hmm_fence_complete(mine, -EAGAIN), -EINVAL);
    assert_int_equal(hmm_fence_complete(mine, -EINPROGRESS), -EINVAL);
    assert_int_equal(hmm_fence_complete(job, 0), -EINVAL);
    assert_int_equal(hmm_fence_complete(NULL, 0), -EINVAL);
    assert_int_equal(hmm_job_cancel(mine), -EINVAL);
    assert_int_equal(hmm_job_cancel(NULL), -EINVAL);
    assert_int_equal(hmm_fence_complete(mine, -EACCES), 0);
    assert_int_equal(hmm_fence_complete(mine, 0), -EALREADY);
    assert_int_equal(hmm_fence_wait(mine, -1), -EACCES);
    assert_int_equal(hmm_fence_info(mine, &info), 0);
    assert_int_equal(info.status, -EACCES);
    hmm_fence_put(mine);
    must(job);
    assert_int_equal(hmm_fence_create(NULL), -EINVAL);
}

static void no_device_no_fence(void **state)
{
    (void)state;
    hmm_fence *fence = NULL;
    assert_int_equal(hmm_fence_create(&fence), -ENODEV);
    assert_null(fence);
    hmm_dev dev = open_with(NULL);
    fence = new_fence();
    close_device(dev);
    assert_int_equal(hmm_fence_wait(fence, -1), -ECANCELED); /* nobody waits for ever */
    assert_int_equal(hmm_fence_complete(fence, 0), -EALREADY);
    hmm_fence_put(fence);
}

/* ---- ending early ------------------------------------------------------------------------------------------------ */

static void cancel_queued_running_and_finished(void **state)
{
    (void)state;
    hmm_dev dev = open_with("engines=1");
    struct places p = new_places(), quick = new_places();
    hmm_fence *mine = new_fence();
    hmm_fence *running = run(dev, jobs_never_end, &p, NULL), *queued[20];
    for (int i = 0; i < 20; i++)
        queued[i] = run(dev, jobs_append, &quick, NULL);
    hmm_fence *held = run(dev, jobs_append, &quick, &(struct extra){.wait = &mine, .nwait = 1});
    wait_for(p.began, 1);
    for (int i = 0; i < 20; i++)
        assert_int_equal(hmm_job_cancel(queued[i]), 0);
    assert_int_equal(hmm_job_cancel(held), 0);
    for (int i = 0; i < 20; i++)
        expect(queued[i], -ECANCELED, "cancelled");
    expect(held, -ECANCELED, "cancelled");
    assert_int_equal(hmm_fence_wait(running, 0), -EAGAIN);
    assert_int_equal(hmm_job_cancel(running), 0);
    int r = hmm_fence_wait(running, JOB_SECONDS * 1000000000ll);
    assert_int_equal(r, -ECANCELED);
    assert_int_equal(hmm_job_cancel(running), -EALREADY);
    hmm_fence_put(running);
    assert_int_equal(*quick.count, 0);
    must(run(dev, jobs_append, &quick, NULL)); /* the engine is good for others */
    hmm_fence_put(mine);
    close_device(dev);
    free_places(&p);
    free_places(&quick);
}

static void time_limits(void **state)
{
    (void)state;
    struct places p = new_places();
    hmm_fence *mine = new_fence();
    uint64_t start = now_ms();
    hmm_fence *computes = run(device, jobs_never_end, &p, &(struct extra){.timeout_ms = 150});
    hmm_fence *reads = run(device, jobs_read_for_ever, &p, &(struct extra){.timeout_ms = 200});
    hmm_fence *held = nop(device, &(struct extra){.wait = &mine, .nwait = 1, .timeout_ms = 250});
    hmm_fence *good = nop(device, &(struct extra){.timeout_ms = 60000});
    expect(computes, -ETIMEDOUT, "");
    assert_true(now_ms() - start >= 150);
    expect(reads, -ETIMEDOUT, "");
    assert_true(now_ms() - start >= 200);
    expect(held, -ETIMEDOUT, "250 ms");
    assert_true(now_ms() - start >= 250);
    must(good);
    hmm_fence_put(mine);
    free_places(&p);
}

static void closing_ends_every_job(void **state)
{
    (void)state;
    hmm_dev dev = open_with("engines=2");
    struct places p = new_places();
    hmm_queue *q = new_queue(dev, 1, HMM_PRIORITY_LOW);
    hmm_fence *mine = new_fence(), *fences[12];
    unsigned n = 0;
    fences[n++] = run(dev, jobs_never_end, &p, NULL);
    fences[n++] = run(dev, jobs_read_for_ever, &p, NULL);
    while (n < 8)
        fences[n++] = nop(dev, &(struct extra){.queue = q, .wait = &mine, .nwait = 1});
    for (; n < 12; n++)
        fences[n] = nop(device, &(struct extra){.wait = &fences[n - 4], .nwait = 1}); /* of a device that stays */
    int fd = hmm_fence_fd(fences[5]);
    assert_true(fd >= 0);
    wait_for(p.began, 1);
    close_device(dev);
    for (unsigned i = 0; i < n; i++) {
        assert_int_equal(hmm_fence_wait(fences[i], 0), -ECANCELED);
        hmm_fence_put(fences[i]);
    }
    struct pollfd pfd = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&pfd, 1, JOB_SECONDS * 1000), 1);
    close(fd);
    assert_int_equal(hmm_fence_complete(mine, 0), 0);
    hmm_fence_put(mine);
    hmm_queue_destroy(q);
    free_places(&p);
}

static void a_full_device_says_so(void **state)
{
    (void)state;
    hmm_fence *mine = new_fence(), *out = NULL;
    struct extra held = {.wait = &mine, .nwait = 1};
    struct hmm_operation op = {.kind = HMM_OP_NOP};
    unsigned n = 0;
    int r;
    while ((r = try_submit(device, &op, &held, NULL)) == 0)
        n++;
    assert_int_equal(r, -EBUSY);
    assert_non_null(strstr(hmm_last_message(), "wait for a fence"));
    assert_int_equal(n, JOBS_MAX);
    assert_int_equal(jobs_of(device), JOBS_MAX);
    assert_int_equal(try_submit(device, &op, NULL, &out), -EBUSY);
    assert_null(out);
    assert_int_equal(hmm_fence_complete(mine, 0), 0);
    hmm_fence_put(mine);
    uint64_t until = now_ms() + JOB_SECONDS * 1000;
    while (jobs_of(device) && now_ms() < until)
        sleep_ms(1);
    assert_int_equal(jobs_of(device), 0);
    must(nop(device, NULL));
}

/* ---- descriptors ------------------------------------------------------------------------------------------------- */

static void fences_can_be_polled(void **state)
{
    (void)state;
    enum { JOBS = 40 };
    struct places p = new_places();
    hmm_fence *blocker = run(device, jobs_wait_for_go, &p, NULL), *fences[JOBS];
    int epoll = epoll_create1(EPOLL_CLOEXEC), fds[JOBS];
    assert_true(epoll >= 0);
    for (int i = 0; i < JOBS; i++) {
        fences[i] = nop(device, &(struct extra){.wait = &blocker, .nwait = 1});
        fds[i] = hmm_fence_fd(fences[i]);
        assert_true(fds[i] >= 0);
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
        assert_int_equal(epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &e), 0);
    }
    struct epoll_event events[JOBS];
    assert_int_equal(epoll_wait(epoll, events, JOBS, 20), 0);
    close(fds[7]); /* the program may close one at any time, and the number may be another file's */
    int other = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_int_equal(other, fds[7]);
    let_go(&p);
    int ready = 0;
    uint64_t until = now_ms() + JOB_SECONDS * 1000;
    while (ready < JOBS - 1 && now_ms() < until)
        ready = epoll_wait(epoll, events, JOBS, 100);
    assert_int_equal(ready, JOBS - 1); /* level-triggered: they stay readable */
    for (int i = 0; i < ready; i++) {
        assert_int_not_equal(events[i].data.u32, 7);
        assert_int_equal(hmm_fence_wait(fences[events[i].data.u32], 0), 0);
    }
    for (int i = 0; i < JOBS; i++) {
        close(fds[i]);
        must(fences[i]);
    }
    int done = hmm_fence_fd(blocker);
    struct pollfd pfd = {.fd = done, .events = POLLIN};
    assert_int_equal(poll(&pfd, 1, 0), 1); /* of a fence that is done: at once */
    close(done);
    must(blocker);
    close(epoll);
    free_places(&p);
    assert_int_equal(hmm_fence_fd(NULL), -EINVAL);
}

static void too_many_descriptors(void **state)
{
    (void)state;
    hmm_fence *mine = new_fence();
    struct rlimit old, low;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
    unsigned before = descriptor_count();
    low = old;
    low.rlim_cur = 0;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
    int r = hmm_fence_fd(mine);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
    assert_int_equal(r, -EMFILE);
    assert_int_equal(descriptor_count(), before);
    int fd = hmm_fence_fd(mine);
    assert_true(fd >= 0);
    close(fd);
    hmm_fence_put(mine);
}

/* ---- kernels by name --------------------------------------------------------------------------------------------- */

static int launch_named(const char *object, const char *symbol, uint64_t arg, hmm_fence **fence)
{
    struct hmm_launch l = {.size = sizeof(l), .object = object, .symbol = symbol, .arg = &arg, .arg_size = sizeof(arg)};
    return hmm_job_launch(device, &l, fence);
}

static void kernels_by_name(void **state)
{
    (void)state;
    hmm_fence *fence = NULL;
    for (uint64_t i = 1; i < 50; i++) {
        assert_int_equal(launch_named(TEST_OBJECT, "object_answer", i, &fence), 0);
        assert_int_equal(must(fence), 42 * i);
    }
    fence = NULL;
    assert_int_equal(launch_named("/nowhere/kernels.so", "object_answer", 1, &fence), -ENOENT);
    assert_non_null(strstr(hmm_last_message(), "/nowhere/kernels.so"));
    assert_int_equal(launch_named(TEST_OBJECT, "object_nothing", 1, &fence), -ENOENT);
    assert_non_null(strstr(hmm_last_message(), "object_nothing"));
    assert_int_equal(launch_named("/dev/null", "object_answer", 1, &fence), -ENOEXEC);
    assert_int_equal(launch_named(TEST_OBJECT, NULL, 1, &fence), -EINVAL);
    assert_null(fence);
}

/* ---- a child of fork --------------------------------------------------------------------------------------------- */

struct inherited {
    hmm_queue *queue;
    hmm_fence *mine, *job;
    int fd;
};

static void use_in_child(const struct inherited *i)
{
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation.kind = HMM_OP_NOP, .queue = i->queue};
    hmm_fence *fence = NULL;
    hmm_queue *queue = NULL;
    if (hmm_job_submit(device, &desc, &fence) != -ESRCH)
        _exit(1);
    if (hmm_fence_complete(i->mine, 0) != -ESRCH)
        _exit(2);
    if (hmm_job_cancel(i->job) != -ESRCH)
        _exit(3);
    if (hmm_fence_fd(i->job) != -ESRCH)
        _exit(4);
    if (hmm_queue_create(device, NULL, &queue) != -ESRCH)
        _exit(5);
    if (hmm_fence_create(&fence) != -ESRCH)
        _exit(6);
    hmm_queue_destroy(i->queue);
    hmm_fence_put(i->mine);
    close(i->fd);
    /* And then one's own. */
    hmm_dev dev;
    if (hmm_device_open(spec_with("memory=4M"), &dev) || hmm_fence_create(&fence))
        _exit(7);
    struct hmm_job_desc own = {.size = sizeof(own), .operation.kind = HMM_OP_NOP, .wait = &fence, .nwait = 1};
    hmm_fence *last;
    int fd;
    if (hmm_job_submit(dev, &own, &last) || (fd = hmm_fence_fd(last)) < 0 || hmm_fence_complete(fence, 0))
        _exit(8);
    struct pollfd pfd = {.fd = fd, .events = POLLIN};
    if (poll(&pfd, 1, JOB_SECONDS * 1000) != 1 || hmm_fence_wait(last, -1))
        _exit(9);
    if (hmm_device_close(dev))
        _exit(10);
    _exit(0);
}

static void a_child_has_none_of_them(void **state)
{
    (void)state;
    struct places p = new_places();
    struct inherited i = {.queue = new_queue(device, 1, HMM_PRIORITY_NORMAL), .mine = new_fence()};
    i.job = nop(device, &(struct extra){.wait = &i.mine, .nwait = 1, .queue = i.queue});
    i.fd = hmm_fence_fd(i.job);
    pid_t child = fork();
    if (child == 0)
        use_in_child(&i);
    int status = -1;
    assert_true(child > 0 && waitpid(child, &status, 0) == child);
    assert_int_equal(status, 0);
    struct pollfd pfd = {.fd = i.fd, .events = POLLIN};
    assert_int_equal(poll(&pfd, 1, 0), 0);
    assert_int_equal(hmm_fence_complete(i.mine, 0), 0);
    must(i.job);
    assert_int_equal(poll(&pfd, 1, JOB_SECONDS * 1000), 1);
    close(i.fd);
    hmm_fence_put(i.mine);
    hmm_queue_destroy(i.queue);
    free_places(&p);
}

/* ---- many threads ------------------------------------------------------------------------------------------------ */

#define WALKERS 4
#define STEPS 300
#define PIECE ((size_t)12345)

struct walker {
    unsigned index;
    hmm_dev dev[2];
    char *a, *b;
    int wrong;
};

/* Hands a piece of memory back and forth, each copy waiting for the last, on queues and devices by turns; cancels some jobs beside. */
static void *walk(void *arg)
{
    struct walker *w = arg;
    hmm_queue *q[2] = {new_queue(w->dev[0], 1, (int)(w->index % 3) - 1), new_queue(w->dev[1], 0, HMM_PRIORITY_NORMAL)};
    hmm_fence *last = NULL;
    uint64_t seed = w->index;
    fill_random(w->a, PIECE, w->index + 100);
    uint32_t crc = crc_oracle(w->a, PIECE);
    for (int i = 0; i < STEPS; i++) {
        unsigned on = random_next(&seed) & 1;
        struct extra x = {.queue = q[on], .wait = &last, .nwait = last != NULL, .timeout_ms = i & 1 ? 60000 : 0};
        hmm_fence *next = copy(w->dev[on], i & 1 ? w->a : w->b, i & 1 ? w->b : w->a, PIECE, &x);
        hmm_fence_put(last);
        last = next;
        hmm_fence *beside = nop(w->dev[!on], &(struct extra){.wait = &last, .nwait = 1});
        int r = hmm_job_cancel(beside);
        if (r && r != -EALREADY)
            w->wrong++;
        r = hmm_fence_wait(beside, JOB_SECONDS * 1000000000ll);
        if (r && r != -ECANCELED)
            w->wrong++;
        hmm_fence_put(beside);
        if (i % 50 == 49 && hmm_fence_wait(last, JOB_SECONDS * 1000000000ll))
            w->wrong++;
    }
    if (hmm_fence_wait(last, JOB_SECONDS * 1000000000ll))
        w->wrong++;
    hmm_fence_put(last);
    if (crc_oracle(w->a, PIECE) != crc || crc_oracle(w->b, PIECE) != crc)
        w->wrong++;
    hmm_queue_destroy(q[0]);
    hmm_queue_destroy(q[1]);
    return NULL;
}

static void many_threads_and_two_devices(void **state)
{
    (void)state;
    hmm_dev other = open_with("engines=1");
    pthread_t t[WALKERS];
    struct walker w[WALKERS];
    for (unsigned i = 0; i < WALKERS; i++) {
        w[i] = (struct walker){.index = i, .dev = {device, other}, .a = map_pages(PIECE), .b = map_pages(PIECE)};
        assert_int_equal(pthread_create(&t[i], NULL, walk, &w[i]), 0);
    }
    for (unsigned i = 0; i < WALKERS; i++) {
        pthread_join(t[i], NULL);
        assert_int_equal(w[i].wrong, 0);
        unmap_pages(w[i].a, PIECE);
        unmap_pages(w[i].b, PIECE);
    }
    assert_int_equal(jobs_of(device), 0);
    assert_int_equal(jobs_of(other), 0);
    close_device(other);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(an_empty_job),
        TEST(an_in_order_queue_runs_one_by_one),
        TEST(jobs_of_a_concurrent_queue_run_together),
        TEST(the_highest_priority_begins_first),
        TEST(queues_of_closed_and_other_devices),
        TEST(a_queue_may_be_given_up_with_jobs_in_it),
        TEST(data_follows_a_chain_over_two_devices),
        TEST(an_error_cancels_those_that_wait),
        TEST(cycles_cannot_be_made),
        TEST(fences_of_the_program),
        TEST_WITHOUT_DEVICE(no_device_no_fence),
        TEST(cancel_queued_running_and_finished),
        TEST(time_limits),
        TEST(closing_ends_every_job),
        TEST(a_full_device_says_so),
        TEST(fences_can_be_polled),
        TEST(too_many_descriptors),
        TEST(kernels_by_name),
        TEST(a_child_has_none_of_them),
        TEST(many_threads_and_two_devices),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
