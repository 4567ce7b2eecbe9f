/* SPDX-License-Identifier: MIT */
/* Messages and the log: what a line may cost, who delivers it, and when a callback is surely gone. */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/error.h"
#include "base/futex.h"
#include "base/lock.h"

struct sink {
    unsigned lines;
    enum hmm_log_level level;
    char last[400];
    pthread_t thread;
};

static struct sink sink;

static void keep(enum hmm_log_level level, const char *line, void *arg)
{
    struct sink *s = arg;
    s->lines++;
    s->level = level;
    s->thread = pthread_self();
    snprintf(s->last, sizeof(s->last), "%s", line);
}

static int set_up(void **state)
{
    (void)state;
    memset(&sink, 0, sizeof(sink));
    hmm_set_log(keep, &sink);
    message_clear();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    log_draining(false);
    hmm_set_log(NULL, NULL);
    return 0;
}

static void in_thread(void *(*fn)(void *), void *arg)
{
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, fn, arg), 0);
    pthread_join(t, NULL);
}

/* ---- messages ---- */

static void *fail_elsewhere(void *arg)
{
    (void)arg;
    hmm_fail(-EIO, "elsewhere");
    return NULL;
}

static void test_fail_sets_this_threads_message(void **state)
{
    (void)state;
    assert_string_equal(hmm_last_message(), "");
    assert_int_equal(hmm_fail(-EINVAL, "soft: memory=%d is %s", 7, "odd"), -EINVAL);
    assert_string_equal(hmm_last_message(), "soft: memory=7 is odd");
    in_thread(fail_elsewhere, NULL);
    assert_string_equal(hmm_last_message(), "soft: memory=7 is odd");
    message_clear();
    assert_string_equal(hmm_last_message(), "");
}

static void test_long_messages_end_in_dots(void **state)
{
    (void)state;
    char text[600];
    memset(text, 'x', sizeof(text) - 1);
    text[sizeof(text) - 1] = 0;
    hmm_fail(-EINVAL, "%s", text);
    assert_int_equal(strlen(hmm_last_message()), 255);
    assert_string_equal(hmm_last_message() + 250, "xx...");
    hmm_log(HMM_LOG_INFO, "%s", text);
    assert_string_equal(sink.last, hmm_last_message());
    hmm_fail(-EINVAL, "%.255s", text); /* fits to the last byte: not cut */
    assert_string_equal(hmm_last_message() + 250, "xxxxx");
}

static void test_strerror(void **state)
{
    (void)state;
    static const int used[] = {EPERM,  ESRCH,  EIO,    EAGAIN, ENOMEM, EACCES,    EFAULT,      EBUSY,     EEXIST,   ENODEV,
                               EINVAL, ENFILE, EMFILE, ENOSPC, ENOSYS, ETIMEDOUT, EINPROGRESS, ECANCELED, EHWPOISON};
    assert_string_equal(hmm_strerror(0), "success");
    for (size_t i = 0; i < ARRAY_LEN(used); i++) {
        assert_string_not_equal(hmm_strerror(-used[i]), "unknown error");
        for (size_t j = 0; j < i; j++)
            assert_string_not_equal(hmm_strerror(-used[i]), hmm_strerror(-used[j]));
    }
    assert_string_equal(hmm_strerror(-9999), "unknown error");
    assert_string_equal(hmm_strerror(EINVAL), "unknown error"); /* not negative: not an error of ours */
    assert_string_equal(hmm_strerror(INT_MIN), "unknown error");
}

/* ---- delivery ---- */

static void test_application_lines_are_delivered_at_once(void **state)
{
    (void)state;
    log_draining(true);
    hmm_log(HMM_LOG_WARNING, "%s %d", "line", 1);
    assert_int_equal(sink.lines, 1);
    assert_int_equal(sink.level, HMM_LOG_WARNING);
    assert_string_equal(sink.last, "line 1");
    hmm_set_log(NULL, NULL);
    hmm_log(HMM_LOG_WARNING, "to nobody");
    assert_int_equal(sink.lines, 1);
}

static void *log_from_library(void *arg)
{
    log_library_thread();
    hmm_log(HMM_LOG_ERROR, "from the library %d", *(int *)arg);
    return NULL;
}

static void test_library_lines_pass_through_the_ring(void **state)
{
    (void)state;
    int n = 3;
    uint32_t before = *log_pending_word();
    log_draining(true);
    in_thread(log_from_library, &n);
    assert_int_equal(sink.lines, 0);
    assert_int_not_equal(*log_pending_word(), before);
    assert_int_equal(log_drain(), 1);
    assert_string_equal(sink.last, "from the library 3");
    assert_int_equal(sink.level, HMM_LOG_ERROR);
    assert_true(pthread_equal(sink.thread, pthread_self()));
    assert_int_equal(log_drain(), 0);
}

static void test_undrained_library_lines_are_not_lost(void **state)
{
    (void)state;
    int n = 4;
    in_thread(log_from_library, &n); /* nobody drains: at once */
    assert_int_equal(sink.lines, 1);
    log_draining(true);
    in_thread(log_from_library, &n);
    assert_int_equal(sink.lines, 1);
    log_draining(false); /* delivers the rest */
    assert_int_equal(sink.lines, 2);
    in_thread(log_from_library, &n);
    assert_int_equal(sink.lines, 3);
}

static void test_no_callback_under_a_lock(void **state)
{
    (void)state;
    struct mutex l;
    mutex_init(&l, RANK_BLOCK);
    log_draining(true);
    mutex_lock(&l);
    hmm_log(HMM_LOG_ERROR, "under a lock");
    assert_int_equal(sink.lines, 0);
    mutex_unlock(&l);
    hmm_log(HMM_LOG_ERROR, "free");
    assert_string_equal(sink.last, "free");
    assert_int_equal(log_drain(), 1);
    assert_string_equal(sink.last, "under a lock");
    mutex_destroy(&l);
}

static void *flood(void *arg)
{
    log_library_thread();
    for (int i = 0; i < *(int *)arg; i++)
        hmm_log(HMM_LOG_INFO, "line %d", i);
    return NULL;
}

static void test_full_ring_counts_what_it_loses(void **state)
{
    (void)state;
    int n = 100;
    log_draining(true);
    in_thread(flood, &n);
    assert_int_equal(log_drain(), 65); /* 64 lines and a note */
    assert_non_null(strstr(sink.last, "36 lines"));
    n = 40;
    for (int i = 0; i < 5; i++) { /* round the end of the ring, in order */
        in_thread(flood, &n);
        assert_int_equal(log_drain(), 40);
        assert_string_equal(sink.last, "line 39");
    }
}

static void test_drainer_is_woken(void **state)
{
    (void)state;
    pthread_t t;
    int n = 5;
    log_draining(true);
    uint32_t seen = __atomic_load_n(log_pending_word(), __ATOMIC_ACQUIRE);
    assert_int_equal(pthread_create(&t, NULL, log_from_library, &n), 0);
    while (__atomic_load_n(log_pending_word(), __ATOMIC_ACQUIRE) == seen)
        futex_wait(log_pending_word(), seen, -1);
    assert_int_equal(log_drain(), 1);
    pthread_join(t, NULL);
}

/* ---- callbacks that misbehave or take long ---- */

static void log_again(enum hmm_log_level level, const char *line, void *arg)
{
    keep(level, line, arg);
    hmm_log(HMM_LOG_INFO, "from inside");
}

static void set_again(enum hmm_log_level level, const char *line, void *arg)
{
    hmm_set_log(keep, arg);
    keep(level, line, arg);
}

static void test_callback_may_not_recurse_nor_hang(void **state)
{
    (void)state;
    hmm_set_log(log_again, &sink);
    hmm_log(HMM_LOG_INFO, "once");
    assert_int_equal(sink.lines, 1);
    hmm_set_log(set_again, &sink);
    hmm_log(HMM_LOG_INFO, "twice");
    assert_int_equal(sink.lines, 2);
    hmm_log(HMM_LOG_INFO, "thrice"); /* the callback of the callback's choice */
    assert_int_equal(sink.lines, 3);
}

static uint32_t slow_inside, slow_go, slow_left;

static void slow(enum hmm_log_level level, const char *line, void *arg)
{
    (void)level;
    (void)line;
    (void)arg;
    __atomic_fetch_add(&slow_inside, 1, __ATOMIC_ACQ_REL);
    while (!__atomic_load_n(&slow_go, __ATOMIC_ACQUIRE))
        sched_yield();
    for (int i = 0; i < 100; i++)
        sched_yield();
    __atomic_fetch_add(&slow_left, 1, __ATOMIC_ACQ_REL);
}

static void *log_slowly(void *arg)
{
    (void)arg;
    hmm_log(HMM_LOG_INFO, "slow");
    return NULL;
}

static void *clear_log(void *arg)
{
    hmm_set_log(NULL, NULL);
    __atomic_store_n((uint32_t *)arg, 1 + __atomic_load_n(&slow_left, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
    return NULL;
}

static void test_set_log_waits_for_old_callbacks(void **state)
{
    (void)state;
    for (int round = 0; round < 20; round++) {
        pthread_t loggers[2], clearer;
        uint32_t cleared = 0;
        slow_inside = slow_go = slow_left = 0;
        hmm_set_log(slow, NULL);
        for (int i = 0; i < 2; i++)
            assert_int_equal(pthread_create(&loggers[i], NULL, log_slowly, NULL), 0);
        while (__atomic_load_n(&slow_inside, __ATOMIC_ACQUIRE) < 2)
            sched_yield();
        assert_int_equal(pthread_create(&clearer, NULL, clear_log, &cleared), 0);
        for (int i = 0; i < 50; i++)
            sched_yield();
        assert_int_equal(__atomic_load_n(&cleared, __ATOMIC_ACQUIRE), 0);
        __atomic_store_n(&slow_go, 1, __ATOMIC_RELEASE);
        pthread_join(clearer, NULL);
        assert_int_equal(cleared, 3); /* both were left when it returned */
        for (int i = 0; i < 2; i++)
            pthread_join(loggers[i], NULL);
    }
}

struct dying {
    bool alive;
    uint32_t calls;
};

static void needs_arg(enum hmm_log_level level, const char *line, void *arg)
{
    (void)level;
    (void)line;
    struct dying *d = arg;
    if (!__atomic_load_n(&d->alive, __ATOMIC_ACQUIRE))
        abort();
    __atomic_fetch_add(&d->calls, 1, __ATOMIC_RELAXED);
}

static uint32_t stop;

static void *log_all_the_time(void *arg)
{
    (void)arg;
    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        hmm_log(HMM_LOG_INFO, "again");
        sched_yield(); /* cannot starve the one that sets */
    }
    return NULL;
}

/* Callback and argument always belong together, and none is used after it was replaced. */
static void test_set_log_races_with_lines(void **state)
{
    (void)state;
    static struct dying d[200];
    pthread_t t[3];
    uint32_t calls = 0;
    stop = 0;
    hmm_set_log(NULL, NULL);
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&t[i], NULL, log_all_the_time, NULL), 0);
    for (int i = 0; i < 200; i++) {
        d[i].alive = true;
        hmm_set_log(needs_arg, &d[i]);
        while (i % 20 == 0 && !__atomic_load_n(&d[i].calls, __ATOMIC_RELAXED))
            sched_yield();
        hmm_set_log(NULL, NULL);
        __atomic_store_n(&d[i].alive, false, __ATOMIC_RELEASE);
        calls += d[i].calls;
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < 3; i++)
        pthread_join(t[i], NULL);
    assert_true(calls >= 10);
}

/* A callback that ran in another thread at fork() never ends in the child. */
static void test_forget_in_a_child(void **state)
{
    (void)state;
    pthread_t t;
    slow_inside = slow_go = slow_left = 0;
    hmm_set_log(slow, NULL);
    assert_int_equal(pthread_create(&t, NULL, log_slowly, NULL), 0);
    while (!__atomic_load_n(&slow_inside, __ATOMIC_ACQUIRE))
        sched_yield();
    pid_t pid = fork();
    if (pid == 0) {
        alarm(5);
        hmm_set_log(keep, &sink);
        hmm_log(HMM_LOG_INFO, "child");
        _exit(sink.lines == 1 ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    __atomic_store_n(&slow_go, 1, __ATOMIC_RELEASE);
    pthread_join(t, NULL);
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_fail_sets_this_threads_message),
        T(test_long_messages_end_in_dots),
        T(test_strerror),
        T(test_application_lines_are_delivered_at_once),
        T(test_library_lines_pass_through_the_ring),
        T(test_undrained_library_lines_are_not_lost),
        T(test_no_callback_under_a_lock),
        T(test_full_ring_counts_what_it_loses),
        T(test_drainer_is_woken),
        T(test_callback_may_not_recurse_nor_hang),
        T(test_set_log_waits_for_old_callbacks),
        T(test_set_log_races_with_lines),
        T(test_forget_in_a_child),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
