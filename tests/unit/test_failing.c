/* SPDX-License-Identifier: MIT */
/* How long devices are asked for a page that they do not give. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "fault/failing.h"

#define SECOND 1000000000ull
#define TRY (SECOND / 8)

static uint64_t now;

static int set_up(void **state)
{
    (void)state;
    now = 5 * SECOND;
    failing_start();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    failing_stop();
    return 0;
}

static bool over_after(uintptr_t page, uint64_t ns)
{
    bool over = false;
    for (uint64_t end = now + ns; now < end && !over; now += TRY)
        failing_note(page, true, now, &over);
    return over;
}

static void a_device_has_its_time(void **state)
{
    (void)state;
    bool over;
    assert_int_equal(failing_note(0x1000, true, now, &over), 1);
    assert_int_equal(failing_note(0x1000, true, now, &over), 2);
    assert_int_equal(failing_note(0x2000, true, now, &over), 1);
    assert_false(over_after(0x1000, FAILING_PATIENCE_NS));
    assert_true(over_after(0x1000, SECOND));
}

static void time_without_tries_is_not_enough(void **state)
{
    (void)state;
    bool over;
    for (unsigned i = 1; i < FAILING_TRIES; i++, now += SECOND) {
        assert_int_equal(failing_note(0x1000, true, now, &over), i);
        assert_false(over);
    }
    failing_note(0x1000, true, now, &over);
    assert_true(over);
}

static void what_came_begins_anew(void **state)
{
    (void)state;
    bool over;
    assert_true(over_after(0x1000, 2 * FAILING_PATIENCE_NS));
    failing_forget(0x1000); /* it is lost, and the address is used again */
    assert_int_equal(failing_note(0x1000, true, now, &over), 1);
    assert_false(over);
}

static void what_failed_long_ago_begins_anew(void **state)
{
    (void)state;
    bool over;
    assert_false(over_after(0x1000, 9 * SECOND));
    now += FAILING_PATIENCE_NS + 1;
    assert_int_equal(failing_note(0x1000, true, now, &over), 1);
    assert_false(over);
}

static void lack_of_memory_is_not_the_devices_fault(void **state)
{
    (void)state;
    bool over;
    for (unsigned i = 0; i < 1000; i++, now += TRY) {
        failing_note(0x1000, false, now, &over);
        assert_false(over);
    }
    failing_note(0x1000, true, now, &over);
    assert_false(over); /* its first failure */
    assert_true(over_after(0x1000, FAILING_PATIENCE_NS + SECOND));
}

static void of_many_pages_all_are_given_up_in_the_end(void **state)
{
    (void)state;
    enum { MANY = 3 * FAILING_PAGES };
    bool lost[MANY] = {false};
    unsigned left = MANY;
    for (uint64_t end = now + 5 * FAILING_PATIENCE_NS; left && now < end; now += TRY)
        for (unsigned i = 0; i < MANY; i++) {
            if (lost[i])
                continue;
            failing_note(0x1000 * (i + 1), true, now, &lost[i]);
            if (lost[i])
                failing_forget(0x1000 * (i + 1));
            left -= lost[i];
        }
    assert_int_equal(left, 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(a_device_has_its_time),
        TEST(time_without_tries_is_not_enough),
        TEST(what_came_begins_anew),
        TEST(what_failed_long_ago_begins_anew),
        TEST(lack_of_memory_is_not_the_devices_fault),
        TEST(of_many_pages_all_are_given_up_in_the_end),
    };
    return cmocka_run_group_tests_name("failing", tests, NULL, NULL);
}
