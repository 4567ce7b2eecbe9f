/* SPDX-License-Identifier: MIT */
/* Fences: one completion, seen whole by every waiter; references; the public calls and their bad input. */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "base/fence.h"
#include "mem_source.h"

static char logged[400];

static void keep(enum hmm_log_level level, const char *line, void *arg)
{
    (void)level;
    (void)arg;
    snprintf(logged, sizeof(logged), "%s", line);
}

static int set_up(void **state)
{
    (void)state;
    source_start();
    logged[0] = 0;
    hmm_set_log(keep, NULL);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    bool leak = mem_used() != 0;
    hmm_set_log(NULL, NULL);
    mem_exit();
    return leak;
}

static const struct hmm_job_status full_status = {
    .status = -EFAULT, .result = 0x123456789abcdef0, .address = 0x1000, .message = "soft: nothing is mapped at 0x1000"};

static void test_life(void **state)
{
    (void)state;
    hmm_fence *f = fence_new();
    assert_false(fence_done(f));
    assert_int_equal(fence_wait(f, 0), -EAGAIN);
    assert_ptr_equal(fence_get(f), f);
    fence_put(f);
    hmm_fence_signal(f, -EIO);
    assert_true(fence_done(f));
    assert_int_equal(fence_wait(f, 0), -EIO);
    assert_int_equal(fence_wait(f, -1), -EIO);
    assert_true(mem_used() > 0);
    fence_put(f);
    assert_int_equal(mem_used(), 0);
    fence_put(NULL);
}

static void test_fence_on_the_stack(void **state)
{
    (void)state;
    hmm_fence f;
    memset(&f, 0xff, sizeof(f));
    fence_init(&f);
    assert_false(fence_done(&f));
    hmm_fence_signal(&f, 0);
    assert_int_equal(fence_wait(&f, -1), 0);
    assert_string_equal(f.message, "");
}

static void test_no_memory(void **state)
{
    (void)state;
    source_exhausted = true;
    assert_null(fence_new());
    source_exhausted = false;
}

static void test_wait_runs_out_after_its_time(void **state)
{
    (void)state;
    struct timespec a, b;
    hmm_fence f;
    fence_init(&f);
    clock_gettime(CLOCK_MONOTONIC, &a);
    assert_int_equal(hmm_fence_wait(&f, 30000000), -EAGAIN);
    clock_gettime(CLOCK_MONOTONIC, &b);
    int64_t ns = (b.tv_sec - a.tv_sec) * 1000000000 + b.tv_nsec - a.tv_nsec;
    assert_true(ns >= 30000000);
    assert_non_null(strstr(hmm_last_message(), "30000000"));
    hmm_fence_signal(&f, 0); /* a completion after the time-out is an ordinary one */
    assert_int_equal(hmm_fence_wait(&f, 0), 0);
}

static void test_second_completion_is_refused(void **state)
{
    (void)state;
    hmm_fence f;
    fence_init(&f);
    fence_complete(&f, &full_status);
    assert_string_equal(logged, "");
    hmm_fence_signal(&f, 0);
    assert_non_null(strstr(logged, "second time"));
    assert_int_equal(fence_wait(&f, 0), -EFAULT);
    assert_int_equal(f.result, full_status.result);
}

static void test_info(void **state)
{
    (void)state;
    hmm_fence f;
    fence_init(&f);
    struct hmm_fence_info info = {.size = sizeof(info), .result = 77};
    assert_int_equal(hmm_fence_info(&f, &info), 0);
    assert_int_equal(info.status, -EINPROGRESS);
    assert_int_equal(info.result, 0);
    fence_complete(&f, &full_status);
    assert_int_equal(hmm_fence_info(&f, &info), 0);
    assert_int_equal(info.size, sizeof(info));
    assert_int_equal(info.status, -EFAULT);
    assert_int_equal(info.result, full_status.result);
    assert_int_equal(info.address, 0x1000);
    assert_string_equal(info.message, full_status.message);
    assert_int_equal(hmm_fence_wait(&f, -1), -EFAULT);
    assert_string_equal(hmm_last_message(), full_status.message);
}

/* A caller built against a shorter struct gets that many bytes and not one more. */
static void test_info_respects_every_size(void **state)
{
    (void)state;
    hmm_fence f;
    struct hmm_fence_info full = {.size = sizeof(full)};
    fence_init(&f);
    fence_complete(&f, &full_status);
    assert_int_equal(hmm_fence_info(&f, &full), 0);
    for (uint32_t size = 4; size <= sizeof(full) + 8; size++) {
        union {
            struct hmm_fence_info info;
            unsigned char bytes[sizeof(struct hmm_fence_info) + 16];
        } u;
        memset(&u, 0xee, sizeof(u));
        u.info.size = size;
        full.size = size;
        assert_int_equal(hmm_fence_info(&f, &u.info), 0);
        size_t known = size < sizeof(full) ? size : sizeof(full);
        assert_memory_equal(&u, &full, known);
        for (size_t i = known; i < sizeof(u); i++)
            assert_int_equal(u.bytes[i], 0xee);
    }
}

static void test_long_message_is_cut(void **state)
{
    (void)state;
    char text[400];
    memset(text, 'y', sizeof(text) - 1);
    text[sizeof(text) - 1] = 0;
    hmm_fence f;
    struct hmm_fence_info info = {.size = sizeof(info)};
    fence_init(&f);
    fence_complete(&f, &(struct hmm_job_status){.status = -EIO, .message = text});
    assert_int_equal(hmm_fence_info(&f, &info), 0);
    assert_int_equal(strlen(info.message), sizeof(info.message) - 1);
}

static void test_bad_input(void **state)
{
    (void)state;
    hmm_fence f;
    struct hmm_fence_info info = {.size = 0};
    fence_init(&f);
    assert_int_equal(hmm_fence_wait(NULL, -1), -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "NULL"));
    assert_int_equal(hmm_fence_info(NULL, &info), -EINVAL);
    assert_int_equal(hmm_fence_info(&f, NULL), -EINVAL);
    assert_int_equal(hmm_fence_info(&f, &info), -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "size"));
    hmm_fence_put(NULL);
    hmm_fence_signal(&f, -ENODEV); /* an error without a message of its own */
    assert_int_equal(hmm_fence_wait(&f, -1), -ENODEV);
    assert_string_equal(hmm_last_message(), hmm_strerror(-ENODEV));
}

/* ---- threads ---- */

#define WAITERS 4

struct race {
    hmm_fence *f;
    uint32_t waiting;
    int64_t timeout;
};

static void *wait_and_check(void *arg)
{
    struct race *r = arg;
    struct hmm_fence_info info = {.size = sizeof(info)};
    __atomic_fetch_add(&r->waiting, 1, __ATOMIC_ACQ_REL);
    int status;
    do
        status = fence_wait(r->f, r->timeout);
    while (status == -EAGAIN);
    hmm_fence_info(r->f, &info);
    bool ok = status == -EFAULT && info.result == full_status.result && info.address == full_status.address &&
              strcmp(info.message, full_status.message) == 0;
    fence_put(r->f);
    return (void *)(uintptr_t)ok;
}

static void race_once(int64_t timeout, bool let_them_sleep)
{
    struct race r = {.f = fence_new(), .timeout = timeout};
    pthread_t t[WAITERS];
    for (int i = 0; i < WAITERS; i++) {
        fence_get(r.f);
        assert_int_equal(pthread_create(&t[i], NULL, wait_and_check, &r), 0);
    }
    /* WAITED in the word says that one is about to sleep. */
    while (let_them_sleep && __atomic_load_n(&r.f->word, __ATOMIC_ACQUIRE) == 0)
        sched_yield();
    fence_complete(r.f, &full_status);
    fence_put(r.f);
    for (int i = 0; i < WAITERS; i++) {
        void *ok;
        pthread_join(t[i], &ok);
        assert_true((uintptr_t)ok);
    }
    assert_int_equal(mem_used(), 0);
}

static void test_waiters_see_the_whole_result(void **state)
{
    (void)state;
    for (int i = 0; i < 300; i++)
        race_once(i % 3 ? -1 : 1000, i & 1);
}

static void *signal_pointer(void *arg)
{
    hmm_fence *f;
    while ((f = __atomic_exchange_n((hmm_fence **)arg, NULL, __ATOMIC_ACQ_REL)) != (hmm_fence *)arg)
        if (f)
            hmm_fence_signal(f, 5);
        else
            sched_yield();
    return NULL;
}

/* The fence's memory is used again as soon as the wait has returned; the completer must not write to it by then. */
static void test_stack_fence_may_vanish_when_done(void **state)
{
    (void)state;
    hmm_fence *box = NULL;
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, signal_pointer, &box), 0);
    for (int i = 0; i < 3000; i++) {
        hmm_fence f;
        fence_init(&f);
        __atomic_store_n(&box, &f, __ATOMIC_RELEASE);
        assert_int_equal(fence_wait(&f, -1), 5);
        memset(&f, 0x77, sizeof(f));
        for (size_t b = 0; b < sizeof(f); b++)
            assert_int_equal(((unsigned char *)&f)[b], 0x77);
    }
    __atomic_store_n(&box, (hmm_fence *)&box, __ATOMIC_RELEASE);
    pthread_join(t, NULL);
}

/* ---- what follows a completion ---- */

struct follower {
    struct fence_callback cb;
    hmm_fence *seen; /* what it was called with */
    unsigned calls, place;
    hmm_fence *then; /* completed by it, or NULL */
};

static unsigned places;

static void follow(struct fence_callback *cb, hmm_fence *fence)
{
    struct follower *w = (struct follower *)((char *)cb - offsetof(struct follower, cb));
    w->seen = fence;
    w->calls++;
    w->place = ++places;
    if (fence)
        assert_true(fence_done(fence));
    if (w->then)
        hmm_fence_signal(w->then, fence->status);
}

static void follower_init(struct follower *w)
{
    *w = (struct follower){.cb.fn = follow};
    list_init(&w->cb.link);
}

static void test_callbacks_run_once_oldest_first(void **state)
{
    (void)state;
    struct follower w[4];
    hmm_fence *f = fence_new();
    places = 0;
    for (int i = 0; i < 4; i++)
        follower_init(&w[i]);
    for (int i = 0; i < 3; i++)
        assert_true(fence_add_callback(f, &w[i].cb));
    assert_true(fence_remove_callback(&w[1].cb));
    assert_false(fence_remove_callback(&w[1].cb));
    hmm_fence_signal(f, -EIO);
    assert_ptr_equal(w[0].seen, f);
    assert_int_equal(w[0].place, 1);
    assert_int_equal(w[1].calls, 0);
    assert_int_equal(w[2].place, 2);
    assert_false(fence_remove_callback(&w[0].cb));
    assert_false(fence_add_callback(f, &w[3].cb));
    assert_int_equal(w[3].calls, 0);
    fence_put(f);
    assert_int_equal(w[0].calls + w[2].calls, 2);
}

static void test_callbacks_of_a_fence_that_goes_away(void **state)
{
    (void)state;
    struct follower w;
    hmm_fence *f = fence_new();
    follower_init(&w);
    assert_true(fence_add_callback(f, &w.cb));
    w.seen = f;
    fence_put(f);
    assert_int_equal(w.calls, 1);
    assert_null(w.seen);
}

#define CHAIN 100000

/* Each callback completes the next fence. */
static void test_a_long_chain_of_completions(void **state)
{
    (void)state;
    static struct follower w[CHAIN];
    static hmm_fence *f[CHAIN + 1];
    places = 0;
    for (int i = 0; i <= CHAIN; i++)
        f[i] = fence_new();
    for (int i = 0; i < CHAIN; i++) {
        follower_init(&w[i]);
        w[i].then = f[i + 1];
        assert_true(fence_add_callback(f[i], &w[i].cb));
    }
    hmm_fence_signal(f[0], -ENODEV);
    for (int i = 0; i < CHAIN; i++)
        assert_int_equal(w[i].place, i + 1);
    assert_int_equal(fence_wait(f[CHAIN], 0), -ENODEV);
    for (int i = 0; i <= CHAIN; i++)
        fence_put(f[i]);
}

/* Adding, removing and completing at the same time: every callback runs once or is removed, never both. */
struct adding {
    hmm_fence *f;
    struct follower w[64];
    uint32_t go;
    unsigned removed, refused;
};

static void *add_and_remove(void *arg)
{
    struct adding *a = arg;
    while (!__atomic_load_n(&a->go, __ATOMIC_ACQUIRE))
        ;
    for (int i = 0; i < 64; i++) {
        a->refused += !fence_add_callback(a->f, &a->w[i].cb);
        if (i % 3 == 0)
            a->removed += fence_remove_callback(&a->w[i / 2].cb);
    }
    return NULL;
}

static void test_adding_races_with_completion(void **state)
{
    (void)state;
    for (int round = 0; round < 500; round++) {
        struct adding a = {.f = fence_new()};
        unsigned calls = 0;
        pthread_t t;
        for (int i = 0; i < 64; i++)
            follower_init(&a.w[i]);
        assert_int_equal(pthread_create(&t, NULL, add_and_remove, &a), 0);
        __atomic_store_n(&a.go, 1, __ATOMIC_RELEASE);
        for (int spin = 0; spin < round * 4; spin++)
            __atomic_signal_fence(__ATOMIC_SEQ_CST);
        hmm_fence_signal(a.f, 0);
        pthread_join(t, NULL);
        for (int i = 0; i < 64; i++) {
            assert_in_range(a.w[i].calls, 0, 1);
            calls += a.w[i].calls;
        }
        assert_int_equal(calls + a.removed + a.refused, 64);
        fence_put(a.f);
    }
}

/* ---- fences of the program ---- */

static void test_the_program_completes_its_fences(void **state)
{
    (void)state;
    struct hmm_fence_info info = {.size = sizeof(info)};
    hmm_fence *f = fence_user_new(), *g = fence_user_new();
    static const int bad[] = {1, INT_MAX, -EAGAIN, -EINPROGRESS};
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert_int_equal(hmm_fence_complete(f, bad[i]), -EINVAL);
    assert_int_equal(hmm_fence_wait(f, 0), -EAGAIN);
    assert_int_equal(hmm_fence_complete(f, -EIO), 0);
    assert_int_equal(hmm_fence_complete(f, 0), -EALREADY);
    assert_int_equal(hmm_fence_info(f, &info), 0);
    assert_int_equal(info.status, -EIO);
    assert_int_equal(hmm_fence_complete(g, 0), 0);
    assert_int_equal(hmm_fence_wait(g, -1), 0);
    hmm_fence_put(g);
    hmm_fence_put(f);
    assert_int_equal(hmm_fence_complete(NULL, 0), -EINVAL);
    hmm_fence *plain = fence_new();
    assert_int_equal(hmm_fence_complete(plain, 0), -EINVAL);
    fence_put(plain);
}

static void test_the_last_device_ends_the_programs_fences(void **state)
{
    (void)state;
    hmm_fence *f = fence_user_new(), *done = fence_user_new(), *gone = fence_user_new();
    assert_int_equal(hmm_fence_complete(done, 0), 0);
    fence_put(gone);
    fence_user_cancel_all();
    assert_int_equal(fence_wait(f, 0), -ECANCELED);
    assert_int_equal(fence_wait(done, 0), 0);
    assert_int_equal(hmm_fence_complete(f, 0), -EALREADY);
    fence_put(f);
    fence_put(done);
}

struct rivals {
    hmm_fence *f;
    uint32_t ready;
};

static void *complete_it(void *arg)
{
    struct rivals *r = arg;
    __atomic_fetch_add(&r->ready, 1, __ATOMIC_ACQ_REL);
    while (__atomic_load_n(&r->ready, __ATOMIC_ACQUIRE) < 2)
        ;
    return (void *)(uintptr_t)(hmm_fence_complete(r->f, 0) == 0);
}

static void test_only_one_completes_it(void **state)
{
    (void)state;
    for (int round = 0; round < 2000; round++) {
        pthread_t t;
        struct rivals r = {.f = fence_user_new()};
        void *won;
        assert_int_equal(pthread_create(&t, NULL, complete_it, &r), 0);
        uintptr_t first = (uintptr_t)complete_it(&r);
        pthread_join(t, &won);
        assert_int_equal(first + (uintptr_t)won, 1);
        fence_put(r.f);
    }
    assert_string_equal(logged, "");
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_life),
        T(test_fence_on_the_stack),
        T(test_no_memory),
        T(test_wait_runs_out_after_its_time),
        T(test_second_completion_is_refused),
        T(test_info),
        T(test_info_respects_every_size),
        T(test_long_message_is_cut),
        T(test_bad_input),
        T(test_waiters_see_the_whole_result),
        T(test_stack_fence_may_vanish_when_done),
        T(test_callbacks_run_once_oldest_first),
        T(test_callbacks_of_a_fence_that_goes_away),
        T(test_a_long_chain_of_completions),
        T(test_adding_races_with_completion),
        T(test_the_program_completes_its_fences),
        T(test_the_last_device_ends_the_programs_fences),
        T(test_only_one_completes_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
