/* SPDX-License-Identifier: MIT */
/* A notifier callback that does not come back holds up who needs what its device has, and nobody else. */
#include <pthread.h>
#include <time.h>

#include "hold.h"

#define OTHERS_SECONDS 6

/* What another device does all the time, in a thread of its own, so that a hang is seen. */
static void *use_another(void *arg)
{
    uint64_t *rounds = arg;
    hmm_dev dev;
    hmm_fence *fence;
    if (hmm_device_open("soft:memory=8M", &dev))
        return NULL;
    char *p = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 5; i++) {
        memset(p, i, 2 * MIB);
        if (hmm_migrate_to_device(dev, p, 2 * MIB, NULL) || hmm_job_fill(dev, p, (uint8_t)(i + 100), MIB, &fence))
            return NULL;
        if (hmm_fence_wait(fence, OTHERS_SECONDS * 1000000000ll))
            return NULL;
        hmm_fence_put(fence);
        if (p[MIB - 1] != i + 100 || hmm_migrate_to_system(p, 2 * MIB, NULL) || p[2 * MIB - 1] != i)
            return NULL;
        ++*rounds;
    }
    /* Its memory, freed while it is there, comes free there. */
    memset(p, 1, 2 * MIB);
    if (hmm_migrate_to_device(dev, p, 2 * MIB, NULL))
        return NULL;
    munmap(p, 2 * MIB);
    struct hmm_device_info info = {.size = sizeof(info)};
    for (int i = 0; i < OTHERS_SECONDS * 1000 && !hmm_device_info(dev, &info) && info.used_bytes; i++)
        sleep_ms(1);
    *rounds += info.used_bytes == 0;
    *rounds += hmm_device_close(dev) == 0;
    return NULL;
}

static void others_work(void)
{
    uint64_t rounds = 0;
    pthread_t thread;
    struct timespec until;
    pthread_create(&thread, NULL, use_another, &rounds);
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 3 * OTHERS_SECONDS;
    if (pthread_timedjoin_np(thread, NULL, &until)) {
        release_all(NULL);
        pthread_join(thread, NULL);
        fail_msg("another device was held up after %llu rounds", (unsigned long long)rounds);
    }
    assert_int_equal(rounds, 7);
}

struct bringer {
    pthread_t thread;
    char *p;
    int result;
};

static void *bring_home(void *arg)
{
    struct bringer *b = arg;
    b->result = hmm_migrate_to_system(b->p, BLOCK, NULL);
    return NULL;
}

#define BRINGERS 5 /* more than there are threads for it */

static void calls_that_hang_in_one_device_do_not_hold_up_another(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(1);
    char *p = map_pages(BRINGERS * BLOCK);
    static struct bringer b[BRINGERS]; /* a test that failed leaves the threads behind */
    fill_random(p, BRINGERS * BLOCK, 3);
    all_to_device(dev, p, BRINGERS * BLOCK);
    watch(1, p, BRINGERS * BLOCK);
    knobs(1)->hold = 1;
    for (unsigned i = 0; i < BRINGERS; i++) {
        b[i] = (struct bringer){.p = p + i * BLOCK};
        pthread_create(&b[i].thread, NULL, bring_home, &b[i]);
    }
    wait_for(&knobs(1)->inside, BRINGERS);
    others_work();
    const char *const words[] = {STUCK_CALLBACK, "device stuck", NULL};
    close_gives_up(dev, words);
    knobs(1)->hold = 0;
    for (unsigned i = 0; i < BRINGERS; i++) {
        pthread_join(b[i].thread, NULL);
        assert_int_equal(b[i].result, 0);
    }
    close_in_time(dev);
    check_content(p, BRINGERS * BLOCK, 3);
    unmap_pages(p, BRINGERS * BLOCK);
}

/* The event of munmap() is what the callback hangs in: no page is left to come home, but the device pages are still its. */
static void a_callback_that_hangs_in_an_unmap_holds_up_nobody_else(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(2);
    char *p = map_pages(2 * BLOCK);
    memset(p, 1, 2 * BLOCK);
    all_to_device(dev, p, 2 * BLOCK);
    watch(2, p, 2 * BLOCK);
    knobs(2)->hold = 1;
    unmap_and_keep(p, BLOCK); /* does not wait for devices itself */
    wait_for(&knobs(2)->inside, 1);
    unmap_and_keep(p + BLOCK, BLOCK);
    wait_for(&knobs(2)->inside, 2); /* nor one for the other */
    others_work();
    const char *const words[] = {STUCK_CALLBACK, "device stuck", "unmap", NULL};
    close_gives_up(dev, words);
    knobs(2)->hold = 0;
    close_in_time(dev);
    unmap_pages(p, 2 * BLOCK);
}

static void a_device_that_cannot_be_closed_holds_up_nobody_else(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(0);
    char *p = map_pages(MIB);
    fill_random(p, MIB, 1);
    all_to_device(dev, p, MIB);
    watch(0, p, MIB);
    knobs(0)->hold = 1;
    const char *const words[] = {STUCK_CALLBACK, "device stuck", NULL};
    close_gives_up(dev, words);
    others_work();
    knobs(0)->hold = 0;
    close_in_time(dev);
    check_content(p, MIB, 1);
    unmap_pages(p, MIB);
}

/* The limit of the process is full of pages that their device does not let go of: others go without room, but go on. */
static void pages_that_cannot_be_evicted_are_not_waited_for(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(3), other = open_spec("soft:memory=8M");
    char *p = map_pages(4 * BLOCK), *q = map_pages(BLOCK);
    fill_random(p, 4 * BLOCK, 7);
    fill_random(q, BLOCK, 8);
    all_to_device(dev, p, 4 * BLOCK);
    watch(3, p, 4 * BLOCK);
    knobs(3)->hold = 1;
    uint64_t began = now_ms();
    assert_int_equal(hmm_set_limit(4 * BLOCK), 0);
    assert_int_equal(hmm_migrate_to_device(other, q, BLOCK, NULL), -ENOSPC);
    assert_non_null(strstr(hmm_last_message(), "hmm_set_limit"));
    assert_int_equal(device_crc(other, q, 16 * page_size()), crc_oracle(q, 16 * page_size())); /* over the bus */
    assert_true(now_ms() - began < SLACK_MS);
    assert_int_equal(knobs(3)->inside, 0);
    began = now_ms();
    assert_int_equal(hmm_set_limit(2 * BLOCK), -EBUSY); /* waits, but not for ever */
    assert_non_null(strstr(hmm_last_message(), "the limit stands"));
    assert_true(now_ms() - began < BOUND_MS + SLACK_MS);
    knobs(3)->hold = 0;
    assert_int_equal(hmm_set_limit(2 * BLOCK), 0);
    assert_int_equal(stats_now().device_pages, 2 * BLOCK / page_size());
    assert_int_equal(hmm_set_limit(0), 0);
    all_to_device(other, q, BLOCK);
    close_in_time(other);
    close_in_time(dev);
    check_content(p, 4 * BLOCK, 7);
    check_content(q, BLOCK, 8);
    unmap_pages(p, 4 * BLOCK);
    unmap_pages(q, BLOCK);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_HOLD(calls_that_hang_in_one_device_do_not_hold_up_another),
        TEST_HOLD(a_callback_that_hangs_in_an_unmap_holds_up_nobody_else),
        TEST_HOLD(pages_that_cannot_be_evicted_are_not_waited_for),
        TEST_HOLD(a_device_that_cannot_be_closed_holds_up_nobody_else),
    };
    return cmocka_run_group_tests_name("hanging", tests, NULL, NULL);
}
