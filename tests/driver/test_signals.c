/* SPDX-License-Identifier: MIT */
/* A handler may touch managed memory wherever it interrupts the program, inside calls of the library, too. */
#include "support.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <time.h>

#define BYTES (8 * MIB)
#define SECONDS 2

static char *arena;
static unsigned long touches;
static unsigned wrong;

static void handler(int sig)
{
    (void)sig;
    touches++;
    for (size_t i = 0; i < 4; i++) {
        size_t at = (touches * 4 + i) * 7919 * page_size() % BYTES;
        if (*(volatile char *)(arena + at) != 3)
            wrong++;
    }
}

static void *migrate(void *arg)
{
    int *stop = arg;
    while (!__atomic_load_n(stop, __ATOMIC_ACQUIRE))
        hmm_migrate_to_device(device, arena, BYTES, NULL);
    return NULL;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* A busy machine and a slow device take their time. */
static bool enough(unsigned long jobs)
{
    return touches > 100 && jobs > 100;
}

static void handlers_touch_managed_memory_inside_calls(void **state)
{
    (void)state;
    static char target[4096]; /* not in the arena */
    int stop = 0;
    unsigned long jobs = 0;
    arena = map_pages(BYTES);
    memset(arena, 3, BYTES);
    pthread_t t;
    sigset_t alarm_only;
    sigemptyset(&alarm_only);
    sigaddset(&alarm_only, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &alarm_only, NULL);
    assert_int_equal(pthread_create(&t, NULL, migrate, &stop), 0);
    pthread_sigmask(SIG_UNBLOCK, &alarm_only, NULL);
    signal(SIGALRM, handler);
    struct itimerval every = {{0, 200}, {0, 200}}, never = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &every, NULL);
    for (double start = now(), ran = 0; ran < SECONDS || (ran < JOB_SECONDS && !enough(jobs)); jobs++, ran = now() - start) {
        hmm_fence *fence;
        assert_int_equal(hmm_job_fill(device, target, 1, sizeof(target), &fence), 0);
        assert_int_equal(hmm_fence_wait(fence, -1), 0);
        hmm_fence_put(fence);
    }
    setitimer(ITIMER_REAL, &never, NULL);
    signal(SIGALRM, SIG_DFL);
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    pthread_join(t, NULL);
    assert_true(enough(jobs));
    assert_int_equal(wrong, 0);
    unmap_pages(arena, BYTES);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(handlers_touch_managed_memory_inside_calls),
    };
    return cmocka_run_group_tests_name("signals", tests, NULL, NULL);
}
