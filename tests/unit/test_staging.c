/* SPDX-License-Identifier: MIT */
/* What the kernel does to pages while they stand in a staging slot, or when they are moved there. */
#include <errno.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "api/manager.h"
#include "debug/inject.h"
#include "live.h"
#include "os/os.h"

#define PAGES 40u
#define LAZY 5u /* these three pages are freed lazily */
#define LAZY_END 8u
#define SECONDS_MAX 20 /* a hang is a failure */

static size_t page;
static char *area;
static hmm_dev dev;
static struct os_ops hooked;
static unsigned discarded;
static size_t longest; /* that was moved */

/* In the library thread that migrates. */
static void discard_staged(const char *point)
{
    if (strcmp(point, "to-device-taken"))
        return;
    struct mm *mm = manager_use();
    for (unsigned i = 0; i < mm->nflights; i++) {
        const char *slot = mm->flights[i]->staging;
        for (unsigned k = LAZY; slot && k < LAZY_END; k++) {
            madvise((void *)(slot + (k + 1) * page), page, MADV_PAGEOUT);
            discarded += !page_present(slot + (k + 1) * page);
        }
    }
    manager_unuse();
}

/* As if a child of fork were still to get what is staged: it is copied home, then, and not moved. */
static const char *kept;

static void discard_and_keep(const char *point)
{
    struct mm *mm = manager_use();
    discard_staged(point);
    for (unsigned i = 0; i < mm->nflights && !kept; i++)
        if (mm->flights[i]->staging) {
            kept = mm->flights[i]->staging;
            mm->slot_keep((uintptr_t)kept, 1);
        }
    manager_unuse();
}

static int64_t move(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    if (src >= (uintptr_t)area && src < (uintptr_t)area + LIVE_BLOCK && len > longest)
        longest = len;
    return os_linux.uffd_move(uffd, dst, src, len);
}

/* What a CPU has just put on the kernel's lists another does not find there. */
static void stay_on_one_cpu(void)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((size_t)sched_getcpu(), &one);
    sched_setaffinity(0, sizeof(one), &one);
}

static int set_up(void **state)
{
    (void)state;
    stay_on_one_cpu();
    page = hmm_page_size();
    alarm(SECONDS_MAX);
    hooked = os_linux;
    os = &hooked;
    area = live_reserve(LIVE_BLOCK);
    discarded = 0;
    longest = 0;
    return area ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    __atomic_store_n(&inject_points_on, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&inject_point_hook, NULL, __ATOMIC_SEQ_CST);
    int r = hmm_device_close(dev);
    os = &os_linux;
    munmap((void *)((uintptr_t)area & ~(LIVE_BLOCK - 1)), LIVE_BLOCK);
    alarm(0);
    return r;
}

static void open_over_lazy(void)
{
    area += page; /* next to the stack of a thread it would not move */
    assert_true(live_map(area, PAGES * page));
    live_fill(area, PAGES * page, 3);
    assert_int_equal(madvise(area + LAZY * page, (LAZY_END - LAZY) * page, MADV_FREE), 0);
    assert_int_equal(hmm_device_open("soft:memory=8M", &dev), 0);
}

static void skip_unless_discarded(void)
{
    if (discarded == LAZY_END - LAZY)
        return;
    print_message("the kernel did not discard the staged pages: nothing was tried\n");
    skip();
}

static void expect_lazy_gone(void)
{
    for (size_t i = 0; i < PAGES * page; i++) {
        bool lazy = i >= LAZY * page && i < LAZY_END * page;
        if ((uint8_t)area[i] != (lazy ? 0 : (uint8_t)random_mix(3 + i)))
            fail_msg("byte %zu is %#x", i, (uint8_t)area[i]);
    }
}

/* MADV_FREE keeps a page until memory is short, and moving it does not change that. Its reader, who is not the program, must not wait. */
static void what_was_freed_lazily_may_go_on_the_way(void **state)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    (void)state;
    open_over_lazy();
    __atomic_store_n(&inject_point_hook, discard_staged, __ATOMIC_SEQ_CST);
    __atomic_store_n(&inject_points_on, 1, __ATOMIC_SEQ_CST);
    assert_int_equal(hmm_migrate_to_device(dev, area, PAGES * page, &res), 0);
    assert_int_equal(res.moved, PAGES);
    skip_unless_discarded();
    expect_lazy_gone();
}

static void what_was_discarded_comes_home_as_zeros(void **state)
{
    struct inject_config c = {.seed = 1, .permille[INJECT_DRIVER] = 1000};
    (void)state;
    open_over_lazy();
    kept = NULL;
    __atomic_store_n(&inject_point_hook, discard_and_keep, __ATOMIC_SEQ_CST);
    __atomic_store_n(&inject_points_on, 1, __ATOMIC_SEQ_CST);
    inject_start(&c);
    assert_true(hmm_migrate_to_device(dev, area, PAGES * page, NULL) < 0);
    inject_stop();
    __atomic_store_n(&inject_points_on, 0, __ATOMIC_SEQ_CST);
    struct mm *mm = manager_use();
    assert_true(kept != NULL);
    mm->slot_drop((uintptr_t)kept, 1);
    manager_unuse();
    skip_unless_discarded();
    expect_lazy_gone();
}

/* Some kernels corrupt the huge zero page when it is moved as one. */
static void the_huge_zero_page_is_not_moved_as_one(void **state)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    (void)state;
    assert_ptr_equal(mmap(area, LIVE_BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), area);
    madvise(area, LIVE_BLOCK, MADV_HUGEPAGE);
    assert_int_equal(*(volatile char *)area, 0);
    assert_int_equal(hmm_device_open("soft:memory=8M", &dev), 0);
    hooked.uffd_move = move;
    assert_int_equal(hmm_migrate_to_device(dev, area, LIVE_BLOCK, &res), 0);
    assert_int_equal(res.moved, LIVE_BLOCK / page);
    assert_int_equal(res.cleared, res.moved);
    assert_true(longest > 0 && longest < LIVE_BLOCK);
    for (size_t i = 0; i < LIVE_BLOCK; i++)
        if (area[i])
            fail_msg("byte %zu is %#x", i, (uint8_t)area[i]);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(what_was_freed_lazily_may_go_on_the_way),
        TEST(what_was_discarded_comes_home_as_zeros),
        TEST(the_huge_zero_page_is_not_moved_as_one),
    };
    return cmocka_run_group_tests_name("staging", tests, NULL, NULL);
}
