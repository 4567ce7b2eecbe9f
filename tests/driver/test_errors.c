/* SPDX-License-Identifier: MIT */
/* Bad input: what is refused at the call, and what ends a job with an error and an address in its fence. The process lives. */
#include <fcntl.h>

#include "support.h"

/* ---- addresses that a job cannot use ------------------------------------------------------------------------------------ */

struct access {
    char *at;
    size_t len;
    bool write;
};

HMM_KERNEL(access_once)
{
    struct access *a = arg;
    char byte = 7;
    if (a->write)
        hmm_put(acc, a->at, &byte, 1);
    else
        hmm_get(acc, &byte, a->at, 1);
    return (uint64_t)byte;
}

static struct hmm_fence_info try_access(void *at, bool write)
{
    struct access a = {.at = at, .len = 1, .write = write};
    return run_kernel(device, access_once, &a, sizeof(a));
}

/* The fence names the error and the address, in the field and in words. */
static void assert_ended(struct hmm_fence_info info, int status, const void *address)
{
    char text[32];
    snprintf(text, sizeof(text), "%#lx", (unsigned long)address);
    if (info.status != status || info.address != (uintptr_t)address)
        fail_msg("status %d, address %#lx, '%s'", info.status, (unsigned long)info.address, info.message);
    if (address && !strstr(info.message, text))
        fail_msg("the message does not name %s: '%s'", text, info.message);
}

static void assert_device_works(void)
{
    char *p = strdup("123456789");
    assert_int_equal(device_crc(device, p, 9), 0xe3069283);
    free(p);
}

static void an_unmapped_address_ends_the_job(void **state)
{
    (void)state;
    size_t page = page_size();
    char *p = map_pages(3 * page), *behind = p + 3 * page + 5;
    assert_ended(try_access(behind, false), -EFAULT, behind);
    assert_ended(try_access(behind, true), -EFAULT, behind);
    assert_device_works();
    assert_int_equal(try_access(p + page, true).status, 0);
    unmap_pages(p + page, page); /* it is on the device now */
    assert_ended(try_access(p + page, false), -EFAULT, p + page);
    assert_ended(try_access(p + page, true), -EFAULT, p + page);
    assert_int_equal(try_access(p, true).status, 0);
    assert_device_works();
    unmap_pages(p, page);
    unmap_pages(p + 2 * page, page);
}

static void strange_addresses_end_the_job(void **state)
{
    (void)state;
    static const uintptr_t strange[] = {0, 1, 4095, 0x800000000000, 0x0123456789abcdef, UINTPTR_MAX - 4095, UINTPTR_MAX};
    for (size_t i = 0; i < sizeof(strange) / sizeof(strange[0]); i++) {
        assert_ended(try_access((void *)strange[i], false), -EFAULT, (void *)strange[i]);
        assert_ended(try_access((void *)strange[i], true), -EFAULT, (void *)strange[i]);
    }
    assert_device_works();
}

static void memory_without_access_ends_the_job(void **state)
{
    (void)state;
    char *p = map_pages(page_size());
    p[0] = 1;
    mprotect(p, page_size(), PROT_NONE);
    assert_ended(try_access(p, false), -EACCES, p);
    assert_ended(try_access(p, true), -EACCES, p);
    assert_device_works();
    unmap_pages(p, page_size());
}

static void read_only_memory_can_be_read_and_not_written(void **state)
{
    (void)state;
    char *p = map_pages(page_size());
    p[10] = 42;
    mprotect(p, page_size(), PROT_READ);
    struct hmm_fence_info info = try_access(p + 10, false);
    assert_int_equal(info.status, 0);
    assert_int_equal(info.result, 42);
    assert_ended(try_access(p + 10, true), -EACCES, p + 10);
    assert_int_equal(p[10], 42);
    assert_device_works();
    unmap_pages(p, page_size());
}

/* The job stops at the first byte that it cannot have. */
static void a_hole_in_a_range_is_found_exactly(void **state)
{
    (void)state;
    size_t page = page_size(), hole = 700 * page;
    char *p = map_pages(4 * MIB), *dst = map_pages(4 * MIB);
    hmm_fence *fence;
    fill_random(p, 4 * MIB, 21);
    unmap_pages(p + hole, page);
    assert_int_equal(hmm_job_crc32c(device, p, 4 * MIB, &fence), 0);
    assert_ended(finish(fence), -EFAULT, p + hole);
    assert_int_equal(hmm_job_copy(device, dst, p, 4 * MIB, &fence), 0);
    assert_ended(finish(fence), -EFAULT, p + hole);
    assert_int_equal(hmm_job_copy(device, p, dst, 4 * MIB, &fence), 0);
    assert_ended(finish(fence), -EFAULT, p + hole);
    assert_int_equal(hmm_job_fill(device, p, 1, 4 * MIB, &fence), 0);
    assert_ended(finish(fence), -EFAULT, p + hole);
    for (size_t i = 0; i < hole; i++)
        if (p[i] != 1)
            fail_msg("byte %zu before the hole is not filled", i);
    assert_device_works();
    unmap_pages(dst, 4 * MIB);
    unmap_pages(p, hole);
    unmap_pages(p + hole + page, 4 * MIB - hole - page);
}

HMM_KERNEL(write_then_fail)
{
    struct access *a = arg;
    char bytes[3] = {1, 2, 3};
    hmm_put(acc, a->at, bytes, sizeof(bytes));
    hmm_get(acc, bytes, (void *)8, 1);
    hmm_put(acc, a->at, "\7\7\7", 3); /* not reached */
    return 0;
}

static void what_was_written_before_the_error_stays(void **state)
{
    (void)state;
    char *p = map_pages(page_size());
    struct access a = {.at = p};
    assert_ended(run_kernel(device, write_then_fail, &a, sizeof(a)), -EFAULT, (void *)8);
    assert_memory_equal(p, "\1\2\3\0", 4);
    unmap_pages(p, page_size());
}

static void errors_in_many_jobs_stay_their_own(void **state)
{
    (void)state;
    enum { JOBS = 60 };
    hmm_fence *fences[JOBS];
    char *p = map_pages(JOBS * page_size());
    for (int i = 0; i < JOBS; i++) {
        char *at = i % 3 ? p + (size_t)i * page_size() : (char *)(uintptr_t)(i + 1);
        assert_int_equal(hmm_job_fill(device, at, 1, 1, &fences[i]), 0);
    }
    for (int i = 0; i < JOBS; i++) {
        struct hmm_fence_info info = finish(fences[i]);
        assert_int_equal(info.status, i % 3 ? 0 : -EFAULT);
        assert_int_equal(info.address, i % 3 ? 0 : i + 1);
    }
    unmap_pages(p, JOBS * page_size());
}

/* ---- parameters that a call refuses -------------------------------------------------------------------------------------- */

static void assert_refused(int r, int expected, const char *word)
{
    if (r != expected || !strstr(hmm_last_message(), word))
        fail_msg("expected %d and '%s' in the message; got %d, '%s'", expected, word, r, hmm_last_message());
}

static void empty_wrapping_and_null_ranges_are_refused(void **state)
{
    (void)state;
    char *p = map_pages(page_size());
    hmm_fence *fence = (hmm_fence *)p;
    assert_refused(hmm_job_copy(device, p, p, 0, &fence), -EINVAL, "hmm_job_copy");
    assert_refused(hmm_job_fill(device, p, 1, 0, &fence), -EINVAL, "hmm_job_fill");
    assert_refused(hmm_job_crc32c(device, p, 0, &fence), -EINVAL, "hmm_job_crc32c");
    assert_refused(hmm_job_copy(device, p, p, SIZE_MAX, &fence), -EINVAL, "wrap");
    assert_refused(hmm_job_fill(device, p, 1, SIZE_MAX - 4096, &fence), -EINVAL, "wrap");
    assert_refused(hmm_job_crc32c(device, p, SIZE_MAX - (size_t)p + 2, &fence), -EINVAL, "wrap");
    assert_refused(hmm_job_copy(device, NULL, p, 1, &fence), -EINVAL, "NULL");
    assert_refused(hmm_job_copy(device, p, NULL, 1, &fence), -EINVAL, "NULL");
    assert_refused(hmm_job_fill(device, NULL, 1, 1, &fence), -EINVAL, "NULL");
    assert_refused(hmm_job_crc32c(device, NULL, 1, &fence), -EINVAL, "NULL");
    assert_refused(hmm_migrate_to_device(device, p, 0, NULL), -EINVAL, "");
    assert_refused(hmm_migrate_to_device(device, p, SIZE_MAX, NULL), -EINVAL, "");
    assert_refused(hmm_migrate_to_system(p, 0, NULL), -EINVAL, "");
    assert_refused(hmm_migrate_to_system(p, SIZE_MAX, NULL), -EINVAL, "");
    assert_ptr_equal(fence, p); /* outputs only on success */
    unmap_pages(p, page_size());
    assert_refused(hmm_migrate_to_device(device, p, page_size(), NULL), -EFAULT, "");
}

HMM_KERNEL(nothing)
{
    (void)acc;
    (void)arg;
    return 0;
}

static void bad_launches_are_refused(void **state)
{
    (void)state;
    hmm_fence *fence = NULL;
    struct hmm_launch l = {.size = sizeof(l), .kernel = nothing};
    char arg[16];
    assert_refused(hmm_job_launch(device, NULL, &fence), -EINVAL, "launch");
    l.size = 4;
    assert_refused(hmm_job_launch(device, &l, &fence), -EINVAL, "size");
    l.size = sizeof(l);
    l.kernel = NULL;
    assert_refused(hmm_job_launch(device, &l, &fence), -EINVAL, "kernel");
    l.kernel = nothing;
    l.arg_size = 8;
    assert_refused(hmm_job_launch(device, &l, &fence), -EINVAL, "argument");
    l.arg = arg;
    l.arg_size = (64 << 10) + 1;
    assert_refused(hmm_job_launch(device, &l, &fence), -EINVAL, "argument");
    assert_null(fence);
}

static void bad_fences_are_refused(void **state)
{
    (void)state;
    hmm_fence *fence;
    struct hmm_fence_info info = {.size = 0};
    assert_refused(hmm_fence_wait(NULL, 0), -EINVAL, "NULL");
    assert_refused(hmm_fence_info(NULL, &info), -EINVAL, "NULL");
    char *p = calloc(1, 1);
    assert_int_equal(hmm_job_fill(device, p, 1, 1, &fence), 0);
    assert_refused(hmm_fence_info(fence, NULL), -EINVAL, "size");
    assert_refused(hmm_fence_info(fence, &info), -EINVAL, "size");
    must(fence);
    hmm_fence_put(NULL);
    free(p);
}

/* ---- devices ------------------------------------------------------------------------------------------------------------- */

static void a_closed_device_is_refused_everywhere(void **state)
{
    (void)state;
    char *p = map_pages(page_size());
    struct hmm_launch l = {.size = sizeof(l), .kernel = nothing};
    struct hmm_device_info info = {.size = sizeof(info)};
    hmm_fence *fence = NULL;
    hmm_dev other = open_with(NULL);
    close_device(other);
    assert_refused(hmm_device_close(other), -ENODEV, "not open");
    assert_refused(hmm_job_fill(other, p, 1, 1, &fence), -ENODEV, "not open");
    assert_refused(hmm_job_copy(other, p, p, 1, &fence), -ENODEV, "not open");
    assert_refused(hmm_job_crc32c(other, p, 1, &fence), -ENODEV, "not open");
    assert_refused(hmm_job_launch(other, &l, &fence), -ENODEV, "not open");
    assert_refused(hmm_migrate_to_device(other, p, 1, NULL), -ENODEV, "not open");
    assert_refused(hmm_device_info(other, &info), -ENODEV, "not open");
    static const hmm_dev never[] = {0, -1, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 4; i++)
        assert_refused(hmm_device_close(never[i]), -ENODEV, "not open");
    assert_null(fence);
    assert_device_works();
    unmap_pages(p, page_size());
}

static void the_last_device_closed_twice_is_refused(void **state)
{
    (void)state;
    hmm_dev dev = open_with(NULL);
    hmm_fence *fence = NULL;
    char byte = 0;
    close_device(dev);
    assert_refused(hmm_device_close(dev), -ENODEV, "not open");
    assert_refused(hmm_job_fill(dev, &byte, 1, 1, &fence), -ENODEV, "not open");
    assert_refused(hmm_audit(), -ENODEV, "");
}

static void handles_are_not_used_again(void **state)
{
    (void)state;
    hmm_dev first = open_with(NULL);
    close_device(first);
    hmm_dev second = open_with(NULL);
    assert_true(second > 0);
    assert_int_not_equal(first, second);
    assert_refused(hmm_device_close(first), -ENODEV, "not open");
}

static void unparsable_specs_are_refused_with_the_word(void **state)
{
    (void)state;
    static const struct {
        const char *spec;
        int err;
        const char *word;
    } bad[] = {
        {"nosuchdevice", -ENODEV, "nosuchdevice"},
        {"nosuchdevice:memory=1M", -ENODEV, "nosuchdevice"},
        {"soft:memori=1M", -EINVAL, "memori"},
        {"soft:memory=lots", -EINVAL, "lots"},
        {"soft:memory=1Q", -EINVAL, "1Q"},
        {"soft:memory=-1", -EINVAL, "-1"},
        {"soft:memory=", -EINVAL, "memory"},
        {"soft:memory", -EINVAL, "memory"},
        {"soft:memory=1M,,engines=1", -EINVAL, ""},
        {"soft:memory=1M engines=1", -EINVAL, "1M engines=1"},
        {"soft:engines=0", -EINVAL, "engines"},
        {"soft:engines=two", -EINVAL, "two"},
        {"soft:engines=1000000", -EINVAL, "1000000"},
        {"soft:memory=99999999999999999999", -EINVAL, "99999999999999999999"},
        {"soft:=5", -EINVAL, ""},
        {"", -EINVAL, ""},
        {":", -ENODEV, "''"},
    };
    hmm_dev dev = 4711;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        int r = hmm_device_open(bad[i].spec, &dev);
        if (r != bad[i].err || !strstr(hmm_last_message(), bad[i].word))
            fail_msg("'%s' gave %d, '%s'", bad[i].spec, r, hmm_last_message());
    }
    char *huge = malloc(100000);
    memset(huge, 'x', 99999);
    huge[99999] = '\0';
    assert_true(hmm_device_open(huge, &dev) < 0);
    memcpy(huge, "soft:memory=", 12);
    assert_int_equal(hmm_device_open(huge, &dev), -EINVAL);
    free(huge);
    assert_int_equal(hmm_device_open(NULL, &dev), -EINVAL);
    assert_int_equal(hmm_device_open("soft", NULL), -EINVAL);
    assert_int_equal(dev, 4711);
}

static void no_memory_and_more_than_exists_are_refused(void **state)
{
    (void)state;
    hmm_dev dev = 0;
    assert_refused(hmm_device_open(spec_with("memory=0"), &dev), -EINVAL, "memory");
    int r = hmm_device_open(spec_with("memory=3T"), &dev);
    assert_true(r == -ENOMEM || r == -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "memory"));
    assert_int_equal(dev, 0);
    dev = open_with("memory=1M"); /* and after a failure all is well */
    close_device(dev);
}

static void info_names_the_device(void **state)
{
    (void)state;
    hmm_dev dev = open_with("memory=8M");
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    assert_string_equal(info.spec, spec_with("memory=8M"));
    assert_int_equal(info.memory_bytes, 8 * MIB);
    assert_int_equal(info.used_bytes, 0);
    assert_int_equal(info.page_size, page_size());
    char *p = map_pages(MIB);
    assert_int_equal(hmm_migrate_to_device(dev, p, MIB, NULL), 0);
    assert_int_equal(hmm_device_info(dev, &info), 0);
    assert_int_equal(info.used_bytes, MIB);
    assert_int_equal(hmm_device_info(dev, NULL), -EINVAL);
    unmap_pages(p, MIB);
}

static bool listed;

static void look_for_own_driver(const struct hmm_driver_item *item, void *arg)
{
    if (strcmp(item->driver, arg) == 0 && !item->option)
        listed = item->description && *item->description;
    if (item->option)
        assert_true(item->help && *item->help);
}

static void the_driver_is_listed_with_its_options(void **state)
{
    (void)state;
    char name[64];
    snprintf(name, sizeof(name), "%.*s", (int)strcspn(spec_with(NULL), ":"), spec_with(NULL));
    hmm_drivers(look_for_own_driver, name);
    assert_true(listed);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(an_unmapped_address_ends_the_job),
        TEST(strange_addresses_end_the_job),
        TEST(memory_without_access_ends_the_job),
        TEST(read_only_memory_can_be_read_and_not_written),
        TEST(a_hole_in_a_range_is_found_exactly),
        TEST(what_was_written_before_the_error_stays),
        TEST(errors_in_many_jobs_stay_their_own),
        TEST(empty_wrapping_and_null_ranges_are_refused),
        TEST(bad_launches_are_refused),
        TEST(bad_fences_are_refused),
        TEST(a_closed_device_is_refused_everywhere),
        TEST_WITHOUT_DEVICE(the_last_device_closed_twice_is_refused),
        TEST_WITHOUT_DEVICE(handles_are_not_used_again),
        TEST_WITHOUT_DEVICE(unparsable_specs_are_refused_with_the_word),
        TEST_WITHOUT_DEVICE(no_memory_and_more_than_exists_are_refused),
        TEST_WITHOUT_DEVICE(info_names_the_device),
        TEST_WITHOUT_DEVICE(the_driver_is_listed_with_its_options),
    };
    return cmocka_run_group_tests_name("errors", tests, NULL, NULL);
}
