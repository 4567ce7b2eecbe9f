/* SPDX-License-Identifier: MIT */
/*
 * A device that takes long to let go of a page holds up only those who want that page. The soft device has an option for it;
 * drivers without one are not tested here.
 */
#include <pthread.h>

#include "support.h"

#define DELAY_MS 1000
#define SHORT_MS 300 /* for tests in which nothing has to be done meanwhile */

static hmm_dev open_slow(unsigned delay_ms)
{
    const char *spec = spec_with(NULL), *over = strstr(spec, "over=");
    char option[64];
    if (strncmp(over ? over + strlen("over=") : spec, "soft", 4)) {
        fprintf(stderr, "skipped: %s has no way to delay invalidations\n", spec);
        skip();
    }
    snprintf(option, sizeof(option), "invalidate_delay_ms=%u", delay_ms);
    return open_with(option);
}

static void a_slow_device_holds_up_only_its_own_pages(void **state)
{
    (void)state;
    hmm_dev slow = open_slow(DELAY_MS), quick = open_with(NULL);
    char *held = map_pages(page_size()), *p = map_pages(4 * MIB), *oracle = malloc(4 * MIB);
    struct touch t;
    fill_random(oracle, 4 * MIB, 71);
    memcpy(p, oracle, 4 * MIB);
    memset(held, 7, page_size());
    device_crc(slow, held, page_size());
    device_crc(quick, p, 4 * MIB);
    start_touch(&t, held + 500);
    sleep_ms(100); /* its invalidation sleeps now */
    uint64_t before = now_ms();
    assert_memory_equal(p, oracle, 2 * MIB);                                      /* CPU faults on another device's pages */
    assert_int_equal(device_crc(quick, p, 4 * MIB), crc_oracle(oracle, 4 * MIB)); /* device faults */
    assert_int_equal(hmm_migrate_to_system(p, 4 * MIB, NULL), 0);
    assert_memory_equal(p, oracle, 4 * MIB);
    uint64_t took = now_ms() - before;
    bool meanwhile = !t.done;
    pthread_join(t.thread, NULL);
    assert_true(meanwhile);
    assert_true(took < DELAY_MS / 2);
    assert_true(t.took >= DELAY_MS - 50);
    assert_int_equal(t.value, 7);
    free(oracle);
    unmap_pages(held, page_size());
    unmap_pages(p, 4 * MIB);
}

/* Also on the same device: pages that it never used need no callback. */
static void pages_that_no_engine_used_come_home_at_once(void **state)
{
    (void)state;
    hmm_dev slow = open_slow(DELAY_MS);
    char *held = map_pages(page_size()), *p = map_pages(4 * MIB);
    struct touch t;
    memset(held, 7, page_size());
    memset(p, 8, 4 * MIB);
    device_crc(slow, held, page_size());
    assert_int_equal(hmm_migrate_to_device(slow, p, 4 * MIB, NULL), 0);
    uint64_t called = stats_now().invalidations;
    start_touch(&t, held);
    sleep_ms(100);
    uint64_t before = now_ms();
    for (size_t i = 0; i < 4 * MIB; i++)
        if (p[i] != 8)
            fail_msg("byte %zu is %d", i, p[i]);
    assert_true(now_ms() - before < DELAY_MS / 2);
    pthread_join(t.thread, NULL);
    assert_int_equal(t.value, 7);
    assert_true(stats_now().invalidations - called < 20); /* for the one page of `held`; p has a thousand */
    unmap_pages(held, page_size());
    unmap_pages(p, 4 * MIB);
}

/* Ordinary memory, and absent pages beside pages that are on a device. */
static void touches_of_absent_memory_are_not_held_up(void **state)
{
    (void)state;
    hmm_dev slow = open_slow(DELAY_MS), quick = open_with(NULL);
    char *held = map_pages(page_size()), *sparse = map_pages(BLOCK);
    struct touch t;
    memset(held, 7, page_size());
    device_crc(slow, held, page_size());
    assert_int_equal(hmm_migrate_to_device(quick, sparse, BLOCK, NULL), 0);
    start_touch(&t, held);
    uint64_t before = now_ms();
    while (now_ms() - before < DELAY_MS / 4) { /* from before the invalidation on */
        assert_int_equal(madvise(sparse + MIB, MIB, MADV_DONTNEED), 0);
        for (size_t i = 0; i < 20; i++)
            assert_int_equal(sparse[MIB + i * 12345], 0);
        char *fresh = map_pages(MIB);
        memset(fresh, 1, MIB);
        unmap_pages(fresh, MIB);
    }
    assert_true(now_ms() - before < DELAY_MS / 2);
    pthread_join(t.thread, NULL);
    unmap_pages(held, page_size());
    unmap_pages(sparse, BLOCK);
}

/* munmap of device pages returns at once; the pages are freed when the device has let go. */
static void unmapping_does_not_wait_for_the_device(void **state)
{
    (void)state;
    hmm_dev slow = open_slow(DELAY_MS);
    char *held = map_pages(BLOCK);
    memset(held, 7, BLOCK);
    device_crc(slow, held, BLOCK);
    uint64_t before = now_ms();
    unmap_pages(held, BLOCK);
    assert_true(now_ms() - before < DELAY_MS / 2);
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(slow, &info), 0);
    assert_int_equal(info.used_bytes, BLOCK);
    do {
        sleep_ms(10);
        assert_int_equal(hmm_device_info(slow, &info), 0);
    } while (info.used_bytes && now_ms() - before < DELAY_MS + 3000);
    assert_int_equal(info.used_bytes, 0);
    assert_true(now_ms() - before >= DELAY_MS - 50);
}

/* More touches than there are workers: all are served in the end. */
static void many_touches_of_slow_pages_are_all_served(void **state)
{
    (void)state;
    enum { N = 6 }; /* there are four workers */
    hmm_dev slow = open_slow(SHORT_MS);
    char *held = map_pages(N * BLOCK);
    struct touch t[N];
    memset(held, 7, N * BLOCK);
    device_crc(slow, held, N * BLOCK);
    for (int i = 0; i < N; i++)
        start_touch(&t[i], held + i * BLOCK + i * 4096);
    for (int i = 0; i < N; i++) {
        pthread_join(t[i].thread, NULL);
        assert_int_equal(t[i].value, 7);
        assert_true(t[i].took >= SHORT_MS - 50);
    }
    unmap_pages(held, N * BLOCK);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(a_slow_device_holds_up_only_its_own_pages),
        TEST_WITHOUT_DEVICE(pages_that_no_engine_used_come_home_at_once),
        TEST_WITHOUT_DEVICE(touches_of_absent_memory_are_not_held_up),
        TEST_WITHOUT_DEVICE(unmapping_does_not_wait_for_the_device),
        TEST_WITHOUT_DEVICE(many_touches_of_slow_pages_are_all_served),
    };
    return cmocka_run_group_tests_name("invalidate", tests, NULL, NULL);
}
