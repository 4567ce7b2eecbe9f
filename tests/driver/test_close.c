/* SPDX-License-Identifier: MIT */
/* Closing a device whose notifier callback does not come back: it ends in bounded time, names who is to blame, and can be done later. */
#include "hold.h"

/* ---- the tests ------------------------------------------------------------------------------------------------------------ */

static void a_callback_that_never_returns_is_named_and_closing_is_done_later(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(0);
    char *p = map_pages(MIB), range[64];
    fill_random(p, MIB, 1);
    all_to_device(dev, p, MIB);
    watch(0, p, MIB);
    knobs(0)->hold = 1;
    snprintf(range, sizeof(range), "[%#lx, %#lx)", (unsigned long)p, (unsigned long)(p + MIB));
    const char *const words[] = {STUCK_CALLBACK, "device stuck", range, "close it again", NULL};
    close_gives_up(dev, words);
    assert_true(logged(HMM_LOG_WARNING) > 0);
    assert_audit_clean(); /* its pages are still counted */
    assert_int_equal(stats_now().device_pages, MIB / page_size());
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), -ENODEV); /* good for closing only */
    assert_int_equal(hmm_migrate_to_device(dev, p, MIB, NULL), -ENODEV);
    close_gives_up(dev, words); /* it meets the same callback */
    assert_int_equal(knobs(0)->inside, 1);
    knobs(0)->hold = 0;
    close_in_time(dev);
    assert_int_equal(hmm_device_close(dev), -ENODEV);
    check_content(p, MIB, 1);
    unmap_pages(p, MIB);
}

static void a_callback_that_sleeps_is_waited_for(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(0);
    char *p = map_pages(MIB);
    fill_random(p, MIB, 2);
    all_to_device(dev, p, MIB);
    watch(0, p, MIB);
    knobs(0)->sleep_ms = 1000;
    uint64_t began = now_ms();
    close_device(dev);
    assert_true(now_ms() - began >= 950);
    assert_int_equal(knobs(0)->inside, 0);
    assert_true(knobs(0)->calls >= 1);
    check_content(p, MIB, 2);
    unmap_pages(p, MIB);
}

/* No page of the device is concerned: only its callback stands between it and the end. */
static void a_callback_that_hangs_without_a_page_is_not_waited_for_either(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(0), other = open_spec("soft:memory=8M");
    char *p = map_pages(BLOCK);
    memset(p, 1, BLOCK);
    all_to_device(other, p, BLOCK);
    watch(0, p, BLOCK);
    knobs(0)->hold = 1;
    unmap_and_keep(p, BLOCK);
    wait_for(&knobs(0)->inside, 1);
    const char *const words[] = {STUCK_CALLBACK, "device stuck", "unmap", NULL};
    close_gives_up(dev, words);
    knobs(0)->hold = 0;
    close_in_time(dev);
    close_in_time(other);
    unmap_pages(p, BLOCK);
}

/* The driver's own numbers are the oracle. */
static void callbacks_are_counted_with_their_time(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(0);
    char *p = map_pages(MIB);
    fill_random(p, MIB, 6);
    all_to_device(dev, p, MIB);
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    assert_int_equal(info.mirrored_bytes, 0);
    watch(0, p, MIB / 2);
    assert_int_equal(hmm_device_info(dev, &info), 0);
    assert_int_equal(info.mirrored_bytes, MIB / 2);
    assert_int_equal(stats_now().mirrored_bytes, MIB / 2);
    struct hmm_stats s = stats_now();
    assert_int_equal(hmm_migrate_to_system(p + MIB / 2, MIB / 2, NULL), 0); /* not in its range */
    assert_int_equal(stats_now().invalidations, s.invalidations);
    knobs(0)->sleep_ms = 100;
    assert_int_equal(*(volatile char *)p, *(volatile char *)p); /* a fault: asked without waiting first, then to wait */
    assert_int_equal(hmm_migrate_to_system(p + page_size(), page_size(), NULL), 0);
    knobs(0)->sleep_ms = 0;
    struct hmm_stats t = stats_now();
    assert_int_equal(t.invalidations - s.invalidations, knobs(0)->calls + knobs(0)->refused);
    assert_int_equal(t.invalidations_refused - s.invalidations_refused, knobs(0)->refused);
    assert_int_equal(knobs(0)->calls, 2);
    assert_true(knobs(0)->refused >= 1);
    assert_true(t.invalidation_ns - s.invalidation_ns >= 195000000);
    assert_true(t.invalidation_ns - s.invalidation_ns < 2 * 1000000000ull);
    close_device(dev);
    check_content(p, MIB, 6);
    unmap_pages(p, MIB);
}

/* An engine waits for a page that another device does not let go of. */
static void a_device_whose_job_waits_for_another_device_can_be_closed_later(void **state)
{
    (void)state;
    hmm_dev dev = open_stuck(3), waits = open_spec("soft:memory=8M,engines=1");
    hmm_fence *fence;
    char *p = map_pages(MIB);
    fill_random(p, MIB, 5);
    all_to_device(dev, p, MIB);
    watch(3, p, MIB);
    knobs(3)->hold = 1;
    assert_int_equal(hmm_job_crc32c(waits, p, MIB, &fence), 0);
    wait_for(&knobs(3)->inside, 1);
    const char *const words[] = {STUCK_CALLBACK, "device stuck", NULL};
    close_gives_up(waits, words);
    knobs(3)->hold = 0;
    close_in_time(waits);
    assert_int_not_equal(hmm_fence_wait(fence, 0), -EAGAIN); /* it has ended, one way or the other */
    hmm_fence_put(fence);
    close_in_time(dev);
    check_content(p, MIB, 5);
    unmap_pages(p, MIB);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_HOLD(a_callback_that_never_returns_is_named_and_closing_is_done_later),
        TEST_HOLD(a_callback_that_sleeps_is_waited_for),
        TEST_HOLD(callbacks_are_counted_with_their_time),
        TEST_HOLD_LONG(a_callback_that_hangs_without_a_page_is_not_waited_for_either),
        TEST_HOLD(a_device_whose_job_waits_for_another_device_can_be_closed_later),
    };
    return cmocka_run_group_tests_name("close", tests, NULL, NULL);
}
