/* SPDX-License-Identifier: MIT */
/*
 * What is in transit is accounted: at every point of a migration, in either direction, the numbers of hmm_stats() and
 * hmm_device_info() are those of the pages that the test has sent on their way, and nothing is left of them afterwards, also when the
 * migration fails.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "live.h"
#include "points.h"
#include "os/os.h"

#define PAGES 40u
#define LAST_COPIED 30u /* pages from here on were never touched: they are cleared */

static hmm_dev dev;
static char *area, *p;
static size_t page;
static bool noted;
static struct hmm_device_info info;
static struct hmm_stats stats;

static void look(void)
{
    info.size = sizeof(info);
    stats.size = sizeof(stats);
    assert_int_equal(hmm_device_info(dev, &info), 0);
    assert_int_equal(hmm_stats(&stats), 0);
}

/* In the library thread that migrates: asserts are for the test's thread. */
static void note(void)
{
    info.size = sizeof(info);
    stats.size = sizeof(stats);
    noted = hmm_device_info(dev, &info) == 0 && hmm_stats(&stats) == 0;
}

static void watch_point(const char *point)
{
    noted = false;
    arm_point(point, note);
}

static void assert_noted_once(void)
{
    assert_int_equal(point_hits, 1);
    assert_true(noted);
}

static void assert_now(unsigned used, unsigned transit)
{
    assert_int_equal(info.used_bytes, used * page);
    assert_int_equal(info.transit_bytes, transit * page);
    assert_int_equal(stats.device_pages, used);
    assert_int_equal(stats.transit_pages, transit);
}

static int set_up(void **state)
{
    (void)state;
    page = hmm_page_size();
    alarm(50);
    area = live_reserve(LIVE_BLOCK);
    p = area + page; /* next to the stack of a thread it would not move */
    if (!live_map(p, PAGES * page) || hmm_device_open("soft:memory=8M", &dev))
        return -1;
    live_fill(p, LAST_COPIED * page, 1);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    forget_point();
    int r = hmm_device_close(dev);
    inject_stop();
    munmap(area, LIVE_BLOCK);
    alarm(0);
    return r;
}

static void the_way_there(void **state)
{
    (void)state;
    look();
    assert_now(0, 0);
    watch_point("to-device-taken");
    assert_int_equal(hmm_migrate_to_device(dev, p, PAGES * page, NULL), 0);
    forget_point();
    assert_noted_once();
    assert_now(PAGES, PAGES);
    look();
    assert_now(PAGES, 0);
}

static void the_way_home(void **state)
{
    (void)state;
    assert_int_equal(hmm_migrate_to_device(dev, p, PAGES * page, NULL), 0);
    watch_point("to-system-departed");
    assert_int_equal(hmm_migrate_to_system(p + page, 11 * page, NULL), 0);
    forget_point();
    assert_noted_once();
    assert_now(PAGES, 11);
    look();
    assert_now(PAGES - 11, 0);
}

/* Dropped on the way: they have no home any more, but a device page until they land. */
static char *drop_at;

static void drop(void)
{
    madvise(drop_at, 8 * page, MADV_DONTNEED);
}

static void pages_that_are_dropped_on_their_way(void **state)
{
    (void)state;
    drop_at = p + 4 * page;
    arm_point("to-device-taken", drop);
    assert_int_equal(hmm_migrate_to_device(dev, p, PAGES * page, NULL), 0);
    forget_point();
    look();
    assert_now(PAGES - 8, 0);
    for (unsigned i = 0; i < 8 * page; i++)
        assert_int_equal(drop_at[i], 0);
}

/* Every copy of the driver fails: what was taken is put back. */
static void a_migration_that_fails(void **state)
{
    const struct inject_config c = {.seed = 1, .permille = {[INJECT_DRIVER] = 1000}};
    (void)state;
    assert_int_equal(hmm_device_close(dev), 0);
    inject_start(&c);
    assert_int_equal(hmm_device_open("soft:memory=8M", &dev), 0);
    watch_point("to-device-taken");
    assert_int_not_equal(hmm_migrate_to_device(dev, p, PAGES * page, NULL), 0);
    forget_point();
    assert_noted_once();
    assert_now(PAGES, PAGES);
    look();
    assert_now(0, 0);
    assert_int_equal(stats.rollbacks, 1);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(the_way_there),
        TEST(the_way_home),
        TEST(pages_that_are_dropped_on_their_way),
        TEST(a_migration_that_fails),
    };
    return cmocka_run_group_tests_name("transit", tests, NULL, NULL);
}
