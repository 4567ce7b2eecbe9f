/* SPDX-License-Identifier: MIT */
/* What to bring along with a faulting page: the windows of device faults and of CPU faults. Pure functions. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "policy/policy.h"

#define PAGES 512u
#define MANY ((uint64_t)1 << 20) /* a device that is never short */

static struct policy_range device(unsigned page, unsigned on_device, unsigned previous, bool huge, uint64_t device_pages)
{
    return policy_device_fault(&(struct policy_device_fault){PAGES, page, on_device, previous, huge, device_pages, 0});
}

static struct policy_range cpu(struct policy_streams *st, uintptr_t number, bool huge)
{
    return policy_cpu_fault(st, &(struct policy_cpu_fault){PAGES, number % PAGES, number, huge, 1});
}

static void assert_range(struct policy_range r, unsigned first, unsigned end)
{
    assert_int_equal(r.first, first);
    assert_int_equal(r.end, end);
}

static void a_lone_device_fault_brings_64_kib(void **state)
{
    (void)state;
    assert_range(device(0, 0, 0, false, MANY), 0, 16);
    assert_range(device(17, 0, 0, false, MANY), 16, 32);
    assert_range(device(511, 0, 0, false, MANY), 496, 512);
}

static void a_window_grows_with_what_is_there(void **state)
{
    (void)state;
    assert_range(device(40, 8, 0, false, MANY), 32, 48);
    assert_range(device(40, 16, 0, false, MANY), 32, 64);
    assert_range(device(200, 100, 0, false, MANY), 0, 256);
    assert_range(device(200, 129, 0, false, MANY), 0, 512);
    assert_range(device(200, 511, 0, false, MANY), 0, 512);
}

static void a_full_block_before_brings_the_whole_block(void **state)
{
    (void)state;
    assert_range(device(0, 0, 384, false, MANY), 0, 512);
    assert_range(device(0, 0, 383, false, MANY), 0, 16);
}

static void a_huge_page_comes_whole(void **state)
{
    (void)state;
    assert_range(device(300, 0, 0, true, MANY), 0, 512);
}

static void a_window_is_never_more_than_a_quarter_of_the_device(void **state)
{
    (void)state;
    assert_range(device(300, 0, 0, true, 1024), 256, 512);
    assert_range(device(300, 0, 0, true, 1023), 256, 384);
    assert_range(device(300, 511, 512, true, 16), 300, 304);
    for (uint64_t pages = 1; pages < 8; pages++) /* no quarter, but the page itself */
        assert_range(device(300, 0, 0, true, pages), 300, 301);
}

/* For every argument: in the block, with the page, of a power of two, aligned to itself. */
static void every_device_window_holds_its_page(void **state)
{
    (void)state;
    for (unsigned page = 0; page < PAGES; page += 7)
        for (unsigned on = 0; on <= PAGES; on += 13)
            for (uint64_t pages = 1; pages < 5000; pages = pages * 3 + 1) {
                struct policy_range r = device(page, on, on / 2, on % 2, pages);
                unsigned n = r.end - r.first;
                assert_true(r.first <= page && page < r.end && r.end <= PAGES);
                assert_true((n & (n - 1)) == 0 && r.first % n == 0);
                assert_true(n == 1 || n <= pages / 4);
            }
}

static void a_lone_cpu_fault_brings_its_page(void **state)
{
    struct policy_streams st = {0};
    (void)state;
    assert_range(cpu(&st, 1000, false), 1000 % PAGES, 1000 % PAGES + 1);
    assert_range(cpu(&st, 5000, false), 5000 % PAGES, 5000 % PAGES + 1);
    assert_range(cpu(&st, 900, false), 900 % PAGES, 900 % PAGES + 1); /* backwards is no stream */
}

static void a_stream_doubles_up_to_the_block(void **state)
{
    struct policy_streams st = {0};
    uintptr_t at = 3 * PAGES;
    unsigned expected = 1;
    (void)state;
    while (at < 20 * PAGES) {
        struct policy_range r = cpu(&st, at, false);
        unsigned left = PAGES - at % PAGES, n = r.end - r.first;
        assert_int_equal(r.first, at % PAGES);
        assert_int_equal(n, expected < left ? expected : left);
        at += n;
        expected = expected * 2 > PAGES ? PAGES : expected * 2;
    }
    assert_range(cpu(&st, at, false), 0, PAGES);
}

static void streams_do_not_disturb_each_other(void **state)
{
    struct policy_streams st = {0};
    uintptr_t at[POLICY_STREAMS];
    (void)state;
    for (unsigned i = 0; i < POLICY_STREAMS; i++)
        at[i] = (uintptr_t)(i + 1) * 1000 * PAGES;
    for (unsigned round = 0; round < 7; round++)
        for (unsigned i = 0; i < POLICY_STREAMS; i++) {
            struct policy_range r = cpu(&st, at[i], false);
            assert_int_equal(r.end - r.first, 1u << round);
            at[i] += r.end - r.first;
        }
}

static void the_oldest_stream_makes_room(void **state)
{
    struct policy_streams st = {0};
    (void)state;
    for (unsigned i = 0; i <= POLICY_STREAMS; i++) /* one more than there is room for: the first is forgotten */
        cpu(&st, (uintptr_t)(i + 1) * 1000 * PAGES, false);
    for (unsigned i = POLICY_STREAMS; i >= 1; i--) {
        struct policy_range r = cpu(&st, (uintptr_t)(i + 1) * 1000 * PAGES + 1, false);
        assert_int_equal(r.end - r.first, 2);
    }
    struct policy_range r = cpu(&st, (uintptr_t)1000 * PAGES + 1, false);
    assert_int_equal(r.end - r.first, 1);
}

static void a_huge_page_comes_home_whole_and_the_stream_goes_on_behind_it(void **state)
{
    struct policy_streams st = {0};
    (void)state;
    assert_range(cpu(&st, 4 * PAGES + 77, true), 0, PAGES);
    assert_range(cpu(&st, 5 * PAGES, false), 0, PAGES);
}

static struct policy_range device_granule(unsigned page, unsigned on_device, uint64_t device_pages, unsigned granule)
{
    return policy_device_fault(&(struct policy_device_fault){
        .pages = PAGES, .page = page, .on_device = on_device, .device_pages = device_pages, .granule = granule});
}

static void a_device_window_is_whole_granules(void **state)
{
    (void)state;
    assert_range(device_granule(33, 0, MANY, 1), 32, 48);
    assert_range(device_granule(33, 0, MANY, 16), 32, 48);
    assert_range(device_granule(33, 0, MANY, 64), 0, 64);
    assert_range(device_granule(200, 100, MANY, 64), 0, 256); /* evidence asks for more */
    assert_range(device_granule(300, 0, MANY, 512), 0, 512);
    assert_range(device_granule(300, 0, 16, 16), 288, 304); /* more than a quarter, but not less than a granule */
    assert_range(device_granule(300, 0, 512, 512), 0, 512);
}

static struct policy_range cpu_granule(struct policy_streams *st, uintptr_t number, unsigned granule)
{
    return policy_cpu_fault(
        st, &(struct policy_cpu_fault){.pages = PAGES, .page = number % PAGES, .number = number, .granule = granule});
}

/* Of pages that lie alone, and of a stream, which goes on behind the granule. */
static void a_cpu_window_is_whole_granules(void **state)
{
    struct policy_streams st = {0};
    (void)state;
    assert_range(cpu_granule(&st, 3 * PAGES + 37, 16), 32, 48);
    assert_range(cpu_granule(&st, 3 * PAGES + 48, 16), 48, 64);
    assert_range(cpu_granule(&st, 9 * PAGES + 511, 16), 496, 512);
    assert_range(cpu_granule(&st, 12 * PAGES + 511, 512), 0, 512);
    assert_range(cpu_granule(&st, 13 * PAGES, 512), 0, 512);
    for (unsigned granule = 1; granule <= PAGES; granule *= 2)
        for (uintptr_t n = 20 * PAGES; n < 22 * PAGES; n += 3) {
            struct policy_range r = cpu_granule(&st, n, granule);
            assert_true(r.first <= n % PAGES && n % PAGES < r.end && r.end <= PAGES);
            assert_true(r.first % granule == 0 && r.end % granule == 0);
        }
}

static unsigned zeros(struct policy_streams *st, uintptr_t number, unsigned most)
{
    unsigned n = policy_zero_fault(st, &(struct policy_zero_fault){number, most, PAGES});
    policy_zero_given(st, number, n);
    return n;
}

static void untouched_memory_is_filled_in_windows_that_grow(void **state)
{
    struct policy_streams st = {0};
    uintptr_t at = 7 * PAGES;
    (void)state;
    for (unsigned expected = 16; at < 30 * PAGES; expected = expected * 2 < PAGES ? expected * 2 : PAGES) {
        unsigned left = PAGES - at % PAGES, n = zeros(&st, at, left);
        assert_int_equal(n, expected < left ? expected : left);
        at += n;
    }
    assert_int_equal(zeros(&st, 90 * PAGES, PAGES), 16); /* no stream */
    assert_int_equal(zeros(&st, 91 * PAGES, 5), 5);
    assert_int_equal(zeros(&st, 91 * PAGES + 5, 500), 32); /* what the end of the memory left of it does not count */
}

/* Nothing could be given just then: the same is asked again, and is no evidence. */
static void a_window_that_was_not_given_does_not_grow(void **state)
{
    struct policy_streams st = {0};
    (void)state;
    for (int i = 0; i < 5; i++) {
        assert_int_equal(policy_zero_fault(&st, &(struct policy_zero_fault){PAGES, PAGES, PAGES}), 16);
        policy_zero_given(&st, PAGES, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_lone_device_fault_brings_64_kib),
        cmocka_unit_test(a_window_grows_with_what_is_there),
        cmocka_unit_test(a_full_block_before_brings_the_whole_block),
        cmocka_unit_test(a_huge_page_comes_whole),
        cmocka_unit_test(a_window_is_never_more_than_a_quarter_of_the_device),
        cmocka_unit_test(every_device_window_holds_its_page),
        cmocka_unit_test(a_lone_cpu_fault_brings_its_page),
        cmocka_unit_test(a_stream_doubles_up_to_the_block),
        cmocka_unit_test(streams_do_not_disturb_each_other),
        cmocka_unit_test(the_oldest_stream_makes_room),
        cmocka_unit_test(a_huge_page_comes_home_whole_and_the_stream_goes_on_behind_it),
        cmocka_unit_test(a_device_window_is_whole_granules),
        cmocka_unit_test(a_cpu_window_is_whole_granules),
        cmocka_unit_test(untouched_memory_is_filled_in_windows_that_grow),
        cmocka_unit_test(a_window_that_was_not_given_does_not_grow),
    };
    return cmocka_run_group_tests_name("policy", tests, NULL, NULL);
}
