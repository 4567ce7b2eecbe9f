/* SPDX-License-Identifier: MIT */
/* A device that only cannot give pages back: they come at a later try, or are lost in the end, and nobody else is held up. */
#include <pthread.h>

#include "lost.h"

static void *touch_one(void *lost)
{
    char value;
    *(bool *)lost = is_lost(memory, &value);
    return NULL;
}

static void a_page_that_the_device_does_not_give_is_lost_in_the_end(void **state)
{
    (void)state;
    expect_errors();
    setenv("HMM_DRIVER_PATH", MODULES, 1);
    make_memory();
    assert_int_equal(madvise(memory, bytes, MADV_DONTNEED), 0);
    /* Absent pages are cleared there, which works; no copy does. */
    hmm_dev dev = open_spec("faulty:copy_error=1000,over=ram:memory=1M"), other = open_spec("ram:memory=1M");
    assert_int_equal(hmm_migrate_to_device(dev, memory, 2 * page, NULL), 0);
    assert_int_equal(hmm_migrate_to_device(other, memory + bytes, bytes, NULL), 0);
    bool lost = false;
    pthread_t thread;
    uint64_t start = now_ms();
    assert_int_equal(pthread_create(&thread, NULL, touch_one, &lost), 0);
    sleep_ms(100);
    assert_holds(memory + bytes, bytes, 6); /* others are not held up by that */
    assert_int_equal(hmm_migrate_to_system(memory + page, page, NULL), -EIO);
    assert_int_equal(pages_in_state(memory + page, page, HMM_PAGE_DEVICE), 1);
    pthread_join(thread, NULL);
    assert_true(lost);
    assert_true(now_ms() - start >= 9000); /* it was tried for long */
    assert_int_equal(pages_in_state(memory, page, HMM_PAGE_POISONED), 1);
    assert_int_equal(pages_in_state(memory + page, page, HMM_PAGE_DEVICE), 1); /* nobody has asked for this one */
    assert_logged(HMM_LOG_ERROR, 1);
    unmap_pages(memory, 2 * bytes);
}

static void a_page_that_comes_at_the_second_try_is_as_it_was(void **state)
{
    (void)state;
    setenv("HMM_DRIVER_PATH", MODULES, 1);
    make_memory();
    uint64_t random = 5;
    hmm_dev dev = open_spec("faulty:copy_error=500,seed=9,over=ram:memory=1M");
    unsigned failed = 0;
    for (int i = 0; i < 60; i++) {
        size_t at = random_next(&random) % (PAGES - 8) * page;
        failed += hmm_migrate_to_device(dev, memory + at, 8 * page, NULL) != 0;
        assert_holds(memory + at, 8 * page, 5);
    }
    assert_true(failed > 5 && failed < 55);
    assert_true(stats_now().pages_to_system > 50);
    close_device(dev); /* tries again, too */
    assert_holds(memory, bytes, 5);
    unmap_pages(memory, 2 * bytes);
}

/* ---- a device that cannot give pages back while room is made ---- */

static void *make_room(void *where)
{
    hmm_migrate_to_device(*(hmm_dev *)where, memory + BLOCK, 255 * page, NULL);
    return NULL;
}

static void a_touch_during_an_eviction_that_fails_is_tried_again(void **state)
{
    (void)state;
    setenv("HMM_DRIVER_PATH", MODULES, 1);
    page = page_size();
    memory = map_pages(2 * BLOCK);
    hmm_dev dev = open_spec("faulty:copy_error=1000,copy_delay_us=200000,over=ram:memory=1M");
    assert_int_equal(hmm_migrate_to_device(dev, memory, PAGES * page, NULL), 0);
    bool lost = true;
    pthread_t room, touch;
    assert_int_equal(pthread_create(&room, NULL, make_room, &dev), 0);
    for (uint64_t until = now_ms() + 5000; !pages_in_state(memory, page, HMM_PAGE_MIGRATING) && now_ms() < until;)
        sleep_ms(1); /* the first eviction waits for its copy */
    assert_int_equal(pages_in_state(memory, page, HMM_PAGE_MIGRATING), 1);
    assert_int_equal(pthread_create(&touch, NULL, touch_one, &lost), 0);
    pthread_join(room, NULL);
    for (uint64_t until = now_ms() + 5000; stats_now().retries == 0 && now_ms() < until;)
        sleep_ms(1);
    assert_true(stats_now().retries > 0); /* it is awake */
    assert_int_equal(madvise(memory, PAGES * page, MADV_DONTNEED), 0);
    pthread_join(touch, NULL);
    assert_false(lost);
    unmap_pages(memory, 2 * BLOCK);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(a_touch_during_an_eviction_that_fails_is_tried_again),
        TEST_WITHOUT_DEVICE(a_page_that_comes_at_the_second_try_is_as_it_was),
        TEST_WITHOUT_DEVICE(a_page_that_the_device_does_not_give_is_lost_in_the_end),
    };
    return cmocka_run_group_tests_name("withheld", tests, NULL, NULL);
}
