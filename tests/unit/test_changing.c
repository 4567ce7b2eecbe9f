/* SPDX-License-Identifier: MIT */
/*
 * The map of memory that changes may matter to, against a plain array; and the slots, by which a device waits for changes that have
 * begun before it asked.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "live.h"
#include "notifier/changing.h"
#include "os/os.h"

#define GRANULE ((uintptr_t)2 << 20)
#define BASE ((uintptr_t)0x7f0000000000)
#define GRANULES 4096u

static bool expected[GRANULES];

static int set_up(void **state)
{
    (void)state;
    memset(expected, 0, sizeof(expected));
    return changing_start();
}

static bool expect(uintptr_t start, uintptr_t end)
{
    for (uintptr_t g = (start - BASE) / GRANULE; g <= (end - 1 - BASE) / GRANULE; g++)
        if (expected[g])
            return true;
    return false;
}

static bool yes(uintptr_t start, uintptr_t end, void *arg)
{
    (void)start;
    (void)end;
    (void)arg;
    return true;
}

static bool no(uintptr_t start, uintptr_t end, void *arg)
{
    (void)start;
    (void)end;
    (void)arg;
    return false;
}

static void random_marks_match_a_plain_array(void **state)
{
    (void)state;
    uint64_t seed = 7;
    unsigned found = 0;
    for (int step = 0; step < 20000; step++) {
        size_t page = os_page_size();
        uintptr_t start = BASE + random_mix(seed++) % (GRANULES * GRANULE / page) * page;
        uintptr_t len = random_mix(seed++) % 8 ? random_mix(seed++) % (4 * GRANULE) : random_mix(seed++) % (200 * GRANULE);
        uintptr_t end = (start + len + page) & ~(page - 1);
        if (end > BASE + GRANULES * GRANULE)
            continue;
        if (step % 50 == 0) {
            changing_mark(start, start + page);
            expected[(start - BASE) / GRANULE] = true;
        } else if (step % 7 == 0) {
            changing_unmark(start, end, yes, NULL);
            for (uintptr_t g = (start - BASE + GRANULE - 1) / GRANULE; g < (end - BASE) / GRANULE; g++)
                expected[g] = false;
        }
        found += expect(start, end);
        if (changing_matters(start, end) != expect(start, end))
            fail_msg("step %d: [%#lx, %#lx)", step, (unsigned long)start, (unsigned long)end);
    }
    assert_true(found > 1000 && found < 19000);
}

static void a_granule_is_not_cleared_in_part_nor_while_somebody_is_there(void **state)
{
    (void)state;
    changing_mark(BASE, BASE + 3 * GRANULE);
    changing_unmark(BASE + 4096, BASE + 3 * GRANULE - 4096, yes, NULL);
    assert_true(changing_matters(BASE, BASE + 4096));
    assert_false(changing_matters(BASE + GRANULE, BASE + 2 * GRANULE));
    assert_true(changing_matters(BASE + 2 * GRANULE, BASE + 3 * GRANULE));
    changing_unmark(BASE, BASE + 3 * GRANULE, no, NULL);
    assert_true(changing_matters(BASE, BASE + 4096));
    changing_unmark(BASE, BASE + 3 * GRANULE, yes, NULL);
    assert_false(changing_matters(BASE, BASE + 3 * GRANULE));
}

static void what_the_map_does_not_cover_matters(void **state)
{
    (void)state;
    assert_true(changing_matters((uintptr_t)1 << 47, ((uintptr_t)1 << 47) + 4096));
    assert_true(changing_matters(BASE, UINTPTR_MAX - 4095));
    assert_false(changing_matters(BASE, BASE + 4096));
    changing_mark(0, (uintptr_t)1 << 46); /* a device that mirrors everything */
    assert_true(changing_matters(BASE, BASE + 4096));
    changing_mark(0, (uintptr_t)1 << 45);
    changing_unmark_large(0, (uintptr_t)1 << 46);
    assert_true(changing_matters(BASE, BASE + 4096));
    changing_unmark_large(0, (uintptr_t)1 << 45);
    assert_false(changing_matters(BASE, BASE + 4096));
}

/* A device may be given an address that no memory can have. */
static void what_is_above_all_memory_costs_others_nothing(void **state)
{
    (void)state;
    uintptr_t top = (uintptr_t)1 << 47;
    changing_mark(top, top + 4096);
    changing_mark(UINTPTR_MAX - 8191, UINTPTR_MAX - 4095);
    assert_false(changing_matters(BASE, BASE + 4096));
    changing_mark(top - 4096, top + 4096);
    assert_true(changing_matters(top - 4096, top));
    assert_false(changing_matters(BASE, BASE + 4096));
}

/* ---- slots ---- */

static uint32_t runs, waited;

static void *wait_for_range(void *arg)
{
    uintptr_t start = (uintptr_t)arg;
    __atomic_store_n(&runs, 1, __ATOMIC_SEQ_CST);
    changing_wait(start, start + 4096);
    __atomic_store_n(&waited, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void a_device_waits_for_a_silent_change_of_its_range_only(void **state)
{
    (void)state;
    pthread_t thread;
    int other = changing_enter(BASE + GRANULE, BASE + 2 * GRANULE), s = changing_enter(BASE, BASE + 8192);
    assert_true(s >= 0 && other >= 0 && s != other);
    changing_wait(BASE + 8192, BASE + GRANULE); /* beside both: does not wait */
    for (int announced = 0; announced < 2; announced++) {
        runs = waited = 0;
        pthread_create(&thread, NULL, wait_for_range, (void *)(BASE + 4096));
        while (!__atomic_load_n(&runs, __ATOMIC_SEQ_CST))
            usleep(100);
        usleep(50000);
        assert_int_equal(__atomic_load_n(&waited, __ATOMIC_SEQ_CST), 0);
        if (announced) {
            assert_false(changing_keeps_off(BASE, BASE + GRANULE));
            changing_announce(s); /* whoever is told by other means need not wait here */
            assert_true(changing_keeps_off(BASE + 4096, BASE + 8192));
            assert_false(changing_keeps_off(BASE + 8192, BASE + 3 * GRANULE));
        } else {
            changing_leave(s);
        }
        pthread_join(thread, NULL);
        if (!announced)
            s = changing_enter(BASE, BASE + 8192);
    }
    changing_leave(s);
    assert_false(changing_keeps_off(0, UINTPTR_MAX));
    changing_leave(other);
    changing_wait(0, UINTPTR_MAX);
}

static unsigned errors;

static void count_errors(enum hmm_log_level level, const char *line, void *arg)
{
    (void)line;
    (void)arg;
    errors += level == HMM_LOG_ERROR;
}

/* Its thread was killed, as a child of vfork. */
static void a_change_that_does_not_end_is_given_up_once(void **state)
{
    (void)state;
    uint64_t most = changing_wait_max_ns, began = os_now();
    int s = changing_enter(BASE, BASE + 4096);
    changing_apart(s);
    errors = 0;
    hmm_set_log(count_errors, NULL);
    assert_false(changing_wait_timeout(BASE, BASE + 4096, 30000000));
    assert_in_range(os_now() - began, 30000000, 5000000000);
    assert_true(changing_wait_timeout(BASE + 4096, BASE + 8192, 0));
    changing_wait_max_ns = 100000000;
    changing_wait(BASE, BASE + 4096);
    changing_wait_max_ns = most;
    bool over = changing_wait_timeout(BASE, BASE + 4096, 100000000);
    hmm_set_log(NULL, NULL);
    assert_true(over);
    assert_false(changing_stands(s) || changing_keeps_off(0, UINTPTR_MAX));
    assert_int_equal(errors, 1);
    changing_leave(s);
    assert_false(changing_keeps_off(0, UINTPTR_MAX));
}

/* Two that follow each other in one slot: the second has its own time. */
static void a_change_is_not_given_up_for_the_time_of_the_one_before(void **state)
{
    (void)state;
    pthread_t thread;
    uint64_t most = changing_wait_max_ns;
    changing_wait_max_ns = 1000000000;
    errors = runs = waited = 0;
    hmm_set_log(count_errors, NULL);
    int s = changing_enter(BASE, BASE + 4096);
    pthread_create(&thread, NULL, wait_for_range, (void *)BASE);
    while (!__atomic_load_n(&runs, __ATOMIC_SEQ_CST))
        usleep(100);
    usleep(700000);
    changing_leave(s); /* the one who waits is rarely quick enough to see it empty */
    assert_int_equal(changing_enter(BASE, BASE + 4096), s);
    usleep(600000);
    bool stands = changing_stands(s);
    changing_leave(s);
    pthread_join(thread, NULL);
    changing_wait_max_ns = most;
    hmm_set_log(NULL, NULL);
    assert_true(stands);
    assert_int_equal(errors, 0);
}

/* What one takes to have a second is not kept from it by those who want a first. */
static void the_last_slots_are_for_those_who_have_one(void **state)
{
    (void)state;
    int slot[CHANGING_SLOTS];
    for (int i = 0; i < 100; i++)
        assert_true((slot[i] = changing_enter_below(BASE, BASE + 4096, 100)) >= 0);
    assert_int_equal(changing_enter_below(BASE, BASE + 4096, 100), -1);
    assert_true((slot[100] = changing_enter(BASE, BASE + 4096)) >= 0);
    for (int i = 0; i <= 100; i++)
        changing_leave(slot[i]);
}

static void slots_are_as_many_as_said_and_come_back(void **state)
{
    (void)state;
    int slot[CHANGING_SLOTS];
    for (int round = 0; round < 3; round++) {
        bool seen[CHANGING_SLOTS] = {false};
        for (int i = 0; i < CHANGING_SLOTS; i++) {
            slot[i] = changing_enter(BASE, BASE + 4096);
            assert_true(slot[i] >= 0 && slot[i] < CHANGING_SLOTS && !seen[slot[i]]);
            seen[slot[i]] = true;
        }
        assert_int_equal(changing_enter(BASE, BASE + 4096), -1);
        for (int i = 0; i < CHANGING_SLOTS; i++)
            changing_leave(slot[i]);
    }
    changing_wait(0, UINTPTR_MAX);
}

/* ---- one sees the other ---- */

/* A device marks and looks at the slots; a change takes a slot and looks at the marks. What must not be: the change saw no mark, and
 * is still at work when the device has looked. */
#define ROUNDS 200000
static uint32_t at_work, stop, silent;

static void *change_again_and_again(void *arg)
{
    (void)arg;
    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
        int s = changing_enter(BASE, BASE + 4096);
        if (!changing_matters(BASE, BASE + 4096)) {
            __atomic_store_n(&at_work, 1, __ATOMIC_SEQ_CST);
            __atomic_fetch_add(&silent, 1, __ATOMIC_RELAXED);
            __atomic_store_n(&at_work, 0, __ATOMIC_SEQ_CST);
        }
        changing_leave(s);
    }
    return NULL;
}

static void a_change_that_saw_no_mark_is_over_when_the_device_has_looked(void **state)
{
    (void)state;
    pthread_t thread;
    unsigned wrong = 0;
    stop = silent = 0;
    pthread_create(&thread, NULL, change_again_and_again, NULL);
    while (!__atomic_load_n(&silent, __ATOMIC_RELAXED))
        usleep(100);
    uint64_t until = os_now() + 1000000000ull;
    for (int i = 0; i < ROUNDS && os_now() < until; i++) {
        changing_mark(BASE, BASE + 4096);
        changing_wait(BASE, BASE + 4096);
        wrong += __atomic_load_n(&at_work, __ATOMIC_SEQ_CST);
        changing_unmark(BASE, BASE + GRANULE, yes, NULL);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    assert_int_equal(wrong, 0);
    assert_true(silent > 100);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(random_marks_match_a_plain_array, set_up),
        cmocka_unit_test_setup(a_granule_is_not_cleared_in_part_nor_while_somebody_is_there, set_up),
        cmocka_unit_test_setup(what_the_map_does_not_cover_matters, set_up),
        cmocka_unit_test_setup(a_device_waits_for_a_silent_change_of_its_range_only, set_up),
        cmocka_unit_test_setup(what_is_above_all_memory_costs_others_nothing, set_up),
        cmocka_unit_test_setup(a_change_that_does_not_end_is_given_up_once, set_up),
        cmocka_unit_test_setup(a_change_is_not_given_up_for_the_time_of_the_one_before, set_up),
        cmocka_unit_test_setup(the_last_slots_are_for_those_who_have_one, set_up),
        cmocka_unit_test_setup(slots_are_as_many_as_said_and_come_back, set_up),
        cmocka_unit_test_setup(a_change_that_saw_no_mark_is_over_when_the_device_has_looked, set_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
