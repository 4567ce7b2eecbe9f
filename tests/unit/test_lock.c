/* SPDX-License-Identifier: MIT */
/* Locks: exclusion, waiting, writers first, and that the rank checker sees what it must and nothing else. */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "base/futex.h"
#include "base/lock.h"

static char reported[200];

static void report(const char *line)
{
    strncpy(reported, line, sizeof(reported) - 1);
}

static int set_up(void **state)
{
    (void)state;
    lock_violations = 0;
    lock_report = report;
    memset(reported, 0, sizeof(reported));
    lock_forget();
    return 0;
}

static pthread_t start(void *(*fn)(void *), void *arg)
{
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, fn, arg), 0);
    return t;
}

static uint32_t load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* ---- ranks ---- */

static void test_ascending_order_is_no_violation(void **state)
{
    (void)state;
    struct mutex l[RANK_LOG + 1];
    for (int r = RANK_MANAGER; r <= RANK_LOG; r++)
        mutex_init(&l[r], (enum lock_rank)r);
    for (int r = RANK_MANAGER; r <= RANK_LOG; r++) {
        mutex_lock(&l[r]);
        lock_assert_held((enum lock_rank)r);
        assert_int_equal(lock_held_ranks(), (1u << (r + 1)) - 2);
    }
    for (int r = RANK_MANAGER; r <= RANK_LOG; r++) /* any order of release */
        mutex_unlock(&l[r]);
    assert_int_equal(lock_held_ranks(), 0);
    assert_int_equal(lock_violations, 0);
    for (int r = RANK_MANAGER; r <= RANK_LOG; r++)
        mutex_destroy(&l[r]);
}

static void test_every_descending_pair_is_a_violation(void **state)
{
    (void)state;
    for (int outer = RANK_MANAGER; outer <= RANK_LOG; outer++) {
        for (int inner = RANK_MANAGER; inner <= RANK_LOG; inner++) {
            struct mutex a, b;
            mutex_init(&a, (enum lock_rank)outer);
            mutex_init(&b, (enum lock_rank)inner);
            lock_violations = 0;
            mutex_lock(&a);
            mutex_lock(&b);
            assert_int_equal(lock_violations, inner > outer ? 0 : 1);
            mutex_unlock(&b);
            mutex_unlock(&a);
            lock_forget();
            mutex_destroy(&a);
            mutex_destroy(&b);
        }
    }
}

static void test_violation_names_the_lock(void **state)
{
    (void)state;
    struct mutex a;
    struct rwlock b;
    mutex_init(&a, RANK_PAGEMAP);
    rwlock_init(&b, RANK_AS);
    mutex_lock(&a);
    rwlock_read_lock(&b);
    assert_int_equal(lock_violations, 1);
    assert_non_null(strstr(reported, "address-space"));
    rwlock_read_unlock(&b);
    rwlock_write_lock(&b);
    assert_int_equal(lock_violations, 2);
    rwlock_write_unlock(&b);
    mutex_unlock(&a);
    rwlock_destroy(&b);
    mutex_destroy(&a);
}

static void test_assertions(void **state)
{
    (void)state;
    struct mutex manager, queue;
    mutex_init(&manager, RANK_MANAGER);
    mutex_init(&queue, RANK_QUEUE);
    lock_assert_none();
    mutex_lock(&manager);
    lock_assert_none();
    assert_int_equal(lock_violations, 0);
    mutex_lock(&queue);
    lock_assert_none();
    assert_int_equal(lock_violations, 1);
    assert_non_null(strstr(reported, "queue"));
    lock_assert_held(RANK_AS);
    assert_int_equal(lock_violations, 2);
    mutex_unlock(&queue);
    mutex_unlock(&manager);
    mutex_destroy(&queue);
    mutex_destroy(&manager);
}

static void test_release_without_lock_is_a_violation(void **state)
{
    (void)state;
    struct rwlock l;
    rwlock_init(&l, RANK_AS);
    rwlock_read_lock(&l);
    lock_forget();
    rwlock_read_unlock(&l);
    assert_int_equal(lock_violations, 1);
    rwlock_destroy(&l);
}

static void test_waiting_under_another_lock_is_a_violation(void **state)
{
    (void)state;
    struct mutex outer, inner;
    uint32_t word = 1;
    mutex_init(&outer, RANK_AS);
    mutex_init(&inner, RANK_QUEUE);
    mutex_lock(&inner);
    mutex_wait(&inner, &word, 0); /* differs already: returns */
    assert_int_equal(lock_violations, 0);
    mutex_unlock(&inner);
    mutex_lock(&outer);
    mutex_lock(&inner);
    mutex_wait(&inner, &word, 0);
    assert_int_equal(lock_violations, 1);
    mutex_unlock(&inner);
    mutex_unlock(&outer);
    mutex_destroy(&inner);
    mutex_destroy(&outer);
}

static void *take_and_hold(void *arg)
{
    mutex_lock(arg);
    uint32_t held = lock_held_ranks();
    mutex_unlock(arg);
    return (void *)(uintptr_t)held;
}

static void test_ranks_are_per_thread(void **state)
{
    (void)state;
    struct mutex outer, inner;
    void *held;
    mutex_init(&outer, RANK_AS);
    mutex_init(&inner, RANK_QUEUE);
    mutex_lock(&inner);
    pthread_t t = start(take_and_hold, &outer);
    pthread_join(t, &held);
    assert_int_equal((uintptr_t)held, 1u << RANK_AS);
    assert_int_equal(lock_violations, 0);
    mutex_unlock(&inner);
    mutex_destroy(&inner);
    mutex_destroy(&outer);
}

/* ---- exclusion and waiting ---- */

#define THREADS 4
#define ROUNDS 20000

struct shared {
    struct mutex l;
    struct rwlock rw;
    uint64_t count;
    uint32_t turn;
    uint32_t readers_in;
    uint32_t writer_done, reader_saw;
};

static void *count_up(void *arg)
{
    struct shared *s = arg;
    for (int i = 0; i < ROUNDS; i++) {
        mutex_lock(&s->l);
        uint64_t v = *(volatile uint64_t *)&s->count;
        *(volatile uint64_t *)&s->count = v + 1;
        mutex_unlock(&s->l);
    }
    return NULL;
}

static void *try_lock(void *arg)
{
    struct mutex *l = arg;
    bool got = mutex_trylock(l);
    if (got)
        mutex_unlock(l);
    return got ? l : NULL;
}

static void test_trylock_takes_only_what_is_free(void **state)
{
    struct mutex l;
    pthread_t thread;
    void *got;
    (void)state;
    mutex_init(&l, RANK_DRIVER);
    assert_true(mutex_trylock(&l));
    assert_int_equal(lock_held_ranks(), 1u << RANK_DRIVER);
    assert_int_equal(pthread_create(&thread, NULL, try_lock, &l), 0);
    pthread_join(thread, &got);
    assert_null(got);
    mutex_unlock(&l);
    assert_int_equal(lock_held_ranks(), 0);
    assert_int_equal(pthread_create(&thread, NULL, try_lock, &l), 0);
    pthread_join(thread, &got);
    assert_ptr_equal(got, &l);
    mutex_destroy(&l);
}

static void test_mutex_excludes(void **state)
{
    (void)state;
    static struct shared s;
    pthread_t t[THREADS];
    mutex_init(&s.l, RANK_QUEUE);
    for (int i = 0; i < THREADS; i++)
        t[i] = start(count_up, &s);
    for (int i = 0; i < THREADS; i++)
        pthread_join(t[i], NULL);
    assert_int_equal(s.count, (uint64_t)THREADS * ROUNDS);
    mutex_destroy(&s.l);
}

static void *write_lock_count(void *arg)
{
    struct shared *s = arg;
    for (int i = 0; i < ROUNDS; i++) {
        if (i % 4) {
            rwlock_read_lock(&s->rw);
            (void)*(volatile uint64_t *)&s->count;
            rwlock_read_unlock(&s->rw);
        } else {
            rwlock_write_lock(&s->rw);
            uint64_t v = *(volatile uint64_t *)&s->count;
            *(volatile uint64_t *)&s->count = v + 1;
            rwlock_write_unlock(&s->rw);
        }
    }
    return NULL;
}

static void test_rwlock_excludes_writers(void **state)
{
    (void)state;
    static struct shared s;
    pthread_t t[THREADS];
    rwlock_init(&s.rw, RANK_AS);
    for (int i = 0; i < THREADS; i++)
        t[i] = start(write_lock_count, &s);
    for (int i = 0; i < THREADS; i++)
        pthread_join(t[i], NULL);
    assert_int_equal(s.count, (uint64_t)THREADS * ROUNDS / 4);
    rwlock_destroy(&s.rw);
}

/* Readers share: each waits inside for the other. */
static void *meet_inside(void *arg)
{
    struct shared *s = arg;
    rwlock_read_lock(&s->rw);
    __atomic_fetch_add(&s->readers_in, 1, __ATOMIC_ACQ_REL);
    while (load(&s->readers_in) < 2)
        sched_yield();
    rwlock_read_unlock(&s->rw);
    return NULL;
}

static void test_readers_share(void **state)
{
    (void)state;
    static struct shared s;
    rwlock_init(&s.rw, RANK_AS);
    pthread_t a = start(meet_inside, &s), b = start(meet_inside, &s);
    pthread_join(a, NULL);
    pthread_join(b, NULL);
    rwlock_destroy(&s.rw);
}

static void *writer(void *arg)
{
    struct shared *s = arg;
    rwlock_write_lock(&s->rw);
    __atomic_store_n(&s->writer_done, 1, __ATOMIC_RELEASE);
    rwlock_write_unlock(&s->rw);
    return NULL;
}

static void *late_reader(void *arg)
{
    struct shared *s = arg;
    rwlock_read_lock(&s->rw);
    s->reader_saw = load(&s->writer_done);
    rwlock_read_unlock(&s->rw);
    return NULL;
}

static void test_reader_queues_behind_waiting_writer(void **state)
{
    (void)state;
    static struct shared s;
    rwlock_init(&s.rw, RANK_AS);
    rwlock_read_lock(&s.rw);
    pthread_t w = start(writer, &s);
    time_t limit = time(NULL) + 5;
    /* The writer waits as soon as another reader would have to. */
    while (pthread_rwlock_tryrdlock(&s.rw.rw) == 0) {
        pthread_rwlock_unlock(&s.rw.rw);
        assert_true(time(NULL) < limit);
        sched_yield();
    }
    pthread_t r = start(late_reader, &s);
    assert_int_equal(load(&s.writer_done), 0);
    rwlock_read_unlock(&s.rw);
    pthread_join(w, NULL);
    pthread_join(r, NULL);
    assert_int_equal(s.reader_saw, 1);
    rwlock_destroy(&s.rw);
}

/* Two threads take turns; each wake that gets lost hangs the test. */
static void *take_turns(void *arg)
{
    struct shared *s = arg;
    for (int i = 0; i < 2000; i++) {
        mutex_lock(&s->l);
        uint32_t turn;
        while (((turn = load(&s->turn)) & 1) == 0)
            mutex_wait(&s->l, &s->turn, turn);
        __atomic_fetch_add(&s->turn, 1, __ATOMIC_RELEASE);
        mutex_wake_all(&s->turn);
        mutex_unlock(&s->l);
    }
    return NULL;
}

static void test_mutex_wait_ping_pong(void **state)
{
    (void)state;
    static struct shared s;
    mutex_init(&s.l, RANK_QUEUE);
    pthread_t t = start(take_turns, &s);
    for (int i = 0; i < 2000; i++) {
        mutex_lock(&s.l);
        uint32_t turn;
        while ((turn = load(&s.turn)) & 1)
            mutex_wait(&s.l, &s.turn, turn);
        __atomic_fetch_add(&s.turn, 1, __ATOMIC_RELEASE);
        mutex_wake_all(&s.turn);
        mutex_unlock(&s.l);
    }
    pthread_join(t, NULL);
    assert_int_equal(s.turn, 4000);
    assert_int_equal(lock_violations, 0);
    mutex_destroy(&s.l);
}

static void test_futex_answers(void **state)
{
    (void)state;
    uint32_t word = 7;
    assert_int_equal(futex_wait(&word, 8, -1), -EAGAIN);
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    assert_int_equal(futex_wait(&word, 7, 20000000), -ETIMEDOUT);
    clock_gettime(CLOCK_MONOTONIC, &b);
    assert_true((b.tv_sec - a.tv_sec) * 1000000000 + b.tv_nsec - a.tv_nsec >= 20000000);
    assert_int_equal(futex_wait(&word, 7, 0), -ETIMEDOUT);
    futex_wake(&word, 1); /* nobody: no harm */
}

#define T(f) cmocka_unit_test_setup(f, set_up)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_ascending_order_is_no_violation),
        T(test_every_descending_pair_is_a_violation),
        T(test_violation_names_the_lock),
        T(test_assertions),
        T(test_release_without_lock_is_a_violation),
        T(test_waiting_under_another_lock_is_a_violation),
        T(test_ranks_are_per_thread),
        T(test_trylock_takes_only_what_is_free),
        T(test_mutex_excludes),
        T(test_rwlock_excludes_writers),
        T(test_readers_share),
        T(test_reader_queues_behind_waiting_writer),
        T(test_mutex_wait_ping_pong),
        T(test_futex_answers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
