/* SPDX-License-Identifier: MIT */
/* The wrapping driver: without options it is the device it wraps; each option does what it says, and no content is lost by it. */
#include "support.h"

#define PAGES 200

static char spec[128];

/* The device of the suite in a wrapper; options end with ','. */
static const char *wrapped(const char *options)
{
    int n = snprintf(spec, sizeof(spec), "faulty:%sover=%s", options, spec_with(NULL));
    assert_true(n < (int)sizeof(spec));
    return spec;
}

/* Status of a fill, wherever it is told: by the call or by the fence. */
static struct hmm_fence_info try_fill(hmm_dev dev, void *p, uint8_t value, size_t len)
{
    hmm_fence *fence = NULL;
    int r = hmm_job_fill(dev, p, value, len, &fence);
    if (r)
        return (struct hmm_fence_info){.status = r};
    return finish(fence);
}

static void assert_refused(const char *text, int err, const char *word)
{
    hmm_dev dev = 0;
    int r = hmm_device_open(text, &dev);
    if (r != err || !strstr(hmm_last_message(), word))
        fail_msg("'%s' gave %d, '%s'; not %d with '%s'", text, r, hmm_last_message(), err, word);
}

static void what_it_wraps_must_be_given_and_be_a_device(void **state)
{
    (void)state;
    assert_refused("faulty", -EINVAL, "over=SPEC");
    assert_refused("faulty:seed=1", -EINVAL, "over=SPEC");
    assert_refused("faulty:over=", -EINVAL, "'over='");
    assert_refused("faulty:over=nosuchdevice", -ENODEV, "'nosuchdevice'");
    assert_refused("faulty:over=soft:colour=red", -EINVAL, "'colour'");
    assert_refused("faulty:over=faulty", -EINVAL, "over=SPEC");
    assert_refused("faulty:copy_error=1001,over=soft", -EINVAL, "'1001'");
    close_device(open_spec(wrapped(""))); /* and after that all is well */
}

static void use(hmm_dev dev)
{
    size_t bytes = PAGES * page_size();
    char *p = map_pages(bytes), *copy = malloc(bytes);
    fill_random(p, bytes, 1);
    memcpy(copy, p, bytes);
    assert_int_equal(hmm_migrate_to_device(dev, p, bytes, NULL), 0);
    assert_int_equal(pages_in_state(p, bytes, HMM_PAGE_DEVICE), PAGES);
    assert_int_equal(device_crc(dev, p, bytes), crc_oracle(copy, bytes));
    device_fill(dev, p + 5, 3, bytes / 2);
    memset(copy + 5, 3, bytes / 2);
    assert_memory_equal(p, copy, bytes);
    unmap_pages(p, bytes);
    free(copy);
}

static void without_options_it_is_the_device(void **state)
{
    (void)state;
    hmm_dev dev = open_spec(wrapped(""));
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    assert_string_equal(info.name, "faulty");
    assert_string_equal(info.spec, spec);
    assert_int_equal(info.lost, 0);
    assert_true(info.memory_bytes > 0);
    use(dev);
}

static void wrappers_wrap_each_other(void **state)
{
    (void)state;
    char deep[256];
    snprintf(deep, sizeof(deep), "faulty:job_delay_us=1000,over=faulty:over=%s", wrapped(""));
    use(open_spec(deep));
}

static void copies_fail_and_nothing_is_lost(void **state)
{
    (void)state;
    size_t bytes = PAGES * page_size();
    hmm_dev dev = open_spec(wrapped("copy_error=1000,"));
    char *p = map_pages(bytes), *copy = malloc(bytes);
    fill_random(p, bytes, 2);
    memcpy(copy, p, bytes);
    for (int i = 0; i < 20; i++) /* some at once, some by their fence */
        assert_int_equal(hmm_migrate_to_device(dev, p, bytes, NULL), -EIO);
    assert_int_equal(pages_in_state(p, bytes, HMM_PAGE_SYSTEM), PAGES);
    assert_memory_equal(p, copy, bytes);
    assert_int_equal(device_crc(dev, p, bytes), crc_oracle(copy, bytes)); /* over the bus */
    unmap_pages(p, bytes);
    free(copy);
}

static void clears_fail_and_copies_do_not(void **state)
{
    (void)state;
    size_t bytes = PAGES * page_size();
    hmm_dev dev = open_spec(wrapped("clear_error=1000,"));
    char *p = map_pages(bytes);
    for (int i = 0; i < 20; i++)
        assert_int_equal(hmm_migrate_to_device(dev, p, bytes, NULL), -EIO); /* absent pages are cleared */
    assert_int_equal(pages_in_state(p, bytes, HMM_PAGE_ABSENT), PAGES);
    memset(p, 1, bytes);
    assert_int_equal(hmm_migrate_to_device(dev, p, bytes, NULL), 0);
    assert_int_equal(p[7], 1);
    unmap_pages(p, bytes);
}

static void refused_jobs_do_nothing(void **state)
{
    (void)state;
    hmm_dev dev = open_spec(wrapped("submit_error=1000,"));
    char *p = map_pages(page_size());
    assert_int_equal(try_fill(dev, p, 7, 100).status, -EIO);
    assert_int_equal(p[0], 0);
    unmap_pages(p, page_size());
}

static void jobs_run_and_report_an_error(void **state)
{
    (void)state;
    hmm_dev dev = open_spec(wrapped("job_error=1000,"));
    char *p = map_pages(2 * page_size());
    struct hmm_fence_info info = try_fill(dev, p, 7, 100);
    assert_int_equal(info.status, -EIO);
    assert_non_null(strstr(info.message, "job_error"));
    assert_int_equal(p[99], 7);
    unmap_pages(p + page_size(), page_size());
    info = try_fill(dev, p, 8, 2 * page_size()); /* an error of its own stays */
    assert_int_equal(info.status, -EFAULT);
    assert_int_equal(info.address, (uintptr_t)p + page_size());
    unmap_pages(p, page_size());
}

/* Bit i: job i failed. */
static uint64_t pattern(unsigned seed)
{
    char options[64];
    uint64_t bits = 0;
    snprintf(options, sizeof(options), "seed=%u,job_error=300,", seed);
    hmm_dev dev = open_spec(wrapped(options));
    char *p = map_pages(page_size());
    for (int i = 0; i < 64; i++)
        bits |= (uint64_t)(try_fill(dev, p, 1, 1).status != 0) << i;
    unmap_pages(p, page_size());
    close_device(dev);
    return bits;
}

static void a_seed_repeats(void **state)
{
    (void)state;
    uint64_t five = pattern(5);
    int failed = __builtin_popcountll(five);
    assert_true(failed > 3 && failed < 45); /* of 64, 300 per mille */
    assert_int_equal(pattern(5), five);
    assert_int_not_equal(pattern(6), five);
}

static void delays_are_waited_for(void **state)
{
    (void)state;
    hmm_dev dev = open_spec(wrapped("job_delay_us=200000,copy_delay_us=100000,clear_delay_us=150000,"));
    char *p = map_pages(2 * page_size());
    p[0] = 1;
    uint64_t start = now_ms();
    assert_int_equal(hmm_migrate_to_device(dev, p, 1, NULL), 0);
    uint64_t copied = now_ms();
    assert_int_equal(hmm_migrate_to_device(dev, p + page_size(), 1, NULL), 0);
    uint64_t cleared = now_ms();
    device_fill(dev, p, 2, 1);
    uint64_t done = now_ms();
    assert_true(copied - start >= 99 && cleared - copied >= 149 && done - cleared >= 199);
    assert_int_equal(p[0], 2);
    unmap_pages(p, 2 * page_size());
}

static void many_jobs_are_held_back_at_once(void **state)
{
    (void)state;
    enum { JOBS = 50 };
    hmm_fence *fences[JOBS];
    hmm_dev dev = open_spec(wrapped("job_delay_us=20000,"));
    char *p = map_pages(page_size());
    for (int i = 0; i < JOBS; i++)
        assert_int_equal(hmm_job_fill(dev, p + i, (uint8_t)i, 1, &fences[i]), 0);
    for (int i = 0; i < JOBS; i++)
        must(fences[i]);
    for (int i = 0; i < JOBS; i++)
        assert_int_equal(p[i], i);
    unmap_pages(p, page_size());
}

static void closing_does_not_wait_for_delays(void **state)
{
    (void)state;
    hmm_fence *fence = NULL;
    hmm_dev dev = open_spec(wrapped("job_delay_us=1000000,"));
    char *p = map_pages(page_size());
    assert_int_equal(hmm_job_fill(dev, p, 9, 1, &fence), 0);
    while (*(volatile char *)p != 9)
        sleep_ms(1);
    close_device(dev);
    assert_int_not_equal(hmm_fence_wait(fence, 0), -EAGAIN); /* done: with its result, or cancelled */
    hmm_fence_put(fence);
    unmap_pages(p, page_size());
}

/* Everything fails now and then, on a device that is too small, and the memory always is as the array. */
static void content_survives_errors(void **state)
{
    (void)state;
    size_t bytes = 1024 * page_size(), page = page_size();
    uint64_t random = 17;
    expect_errors(); /* none is, but a failure of this test should say what was lost first */
    hmm_dev dev = open_spec("faulty:seed=3,copy_error=200,clear_error=200,over=soft:memory=1M");
    char *p = map_pages(bytes), *copy = calloc(1, bytes);
    unsigned failed = 0;
    for (int i = 0; i < 300; i++) {
        size_t at = random_next(&random) % 1024 * page, n = (1 + random_next(&random) % 64) * page;
        if (at + n > bytes)
            n = bytes - at;
        failed += hmm_migrate_to_device(dev, p + at, n, NULL) != 0;
        if (i % 3 == 0)
            assert_int_equal(device_crc(dev, p + at, n), crc_oracle(copy + at, n));
        if (i % 3 == 1) {
            fill_random(p + at, page, (uint64_t)i);
            fill_random(copy + at, page, (uint64_t)i);
        }
        if (i % 10 == 0)
            failed += hmm_migrate_to_system(p, bytes, NULL) != 0;
    }
    assert_true(failed > 10);
    assert_memory_equal(p, copy, bytes);
    assert_int_equal(logged(HMM_LOG_ERROR), 0);
    unmap_pages(p, bytes);
    free(copy);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(what_it_wraps_must_be_given_and_be_a_device),
        TEST_WITHOUT_DEVICE(without_options_it_is_the_device),
        TEST_WITHOUT_DEVICE(wrappers_wrap_each_other),
        TEST_WITHOUT_DEVICE(copies_fail_and_nothing_is_lost),
        TEST_WITHOUT_DEVICE(clears_fail_and_copies_do_not),
        TEST_WITHOUT_DEVICE(refused_jobs_do_nothing),
        TEST_WITHOUT_DEVICE(jobs_run_and_report_an_error),
        TEST_WITHOUT_DEVICE(a_seed_repeats),
        TEST_WITHOUT_DEVICE(delays_are_waited_for),
        TEST_WITHOUT_DEVICE(many_jobs_are_held_back_at_once),
        TEST_WITHOUT_DEVICE(closing_does_not_wait_for_delays),
        TEST_WITHOUT_DEVICE(content_survives_errors),
    };
    return cmocka_run_group_tests_name("faulty", tests, NULL, NULL);
}
