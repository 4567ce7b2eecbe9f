/* SPDX-License-Identifier: MIT */
/*
 * Mappings are registered as a whole, and given back as a whole when nothing of them is away: what the kernel says of them is the
 * oracle for that, and a copy that the library never sees for their content.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "api/manager.h"
#include "live_device.h"
#include "maps.h"

#define SECONDS_MAX 100 /* a hang is a failure */

static int set_up(void **state)
{
    (void)state;
    live_set_up(SECONDS_MAX);
    open_spec("soft:memory=160M,engines=1");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    return live_tear_down() ? 0 : -1;
}

static struct hmm_stats stats(void)
{
    struct hmm_stats s = {.size = sizeof(s)};
    assert_int_equal(hmm_stats(&s), 0);
    return s;
}

static uint64_t regions(void)
{
    struct mm *mm = manager_use();
    assert_non_null(mm);
    uint64_t n = __atomic_load_n(&mm->regions.count, __ATOMIC_SEQ_CST);
    manager_unuse();
    return n;
}

static bool kernel_tells_of_forks(void)
{
    struct mm *mm = manager_use();
    assert_non_null(mm);
    bool tells = mm_has_fork_event(mm);
    manager_unuse();
    return tells;
}

/* The last are given back a moment after the last page has come home. */
static void expect_no_regions(void)
{
    for (int i = 0; i < 2000 && regions(); i++)
        usleep(1000);
    assert_int_equal(regions(), 0);
}

static uint8_t byte_of(size_t i)
{
    return (uint8_t)(random_mix(i) | 1);
}

static void fill_pages(char *at, size_t pages, size_t first)
{
    for (size_t i = 0; i < pages; i++)
        memset(at + i * page, byte_of(first + i), page);
}

static void check_pages(const char *what, const char *at, size_t pages, size_t first)
{
    for (size_t i = 0; i < pages; i++)
        for (size_t k = 0; k < page; k += page - 1)
            if ((uint8_t)at[i * page + k] != byte_of(first + i))
                fail_msg("%s: page %zu is %#x, not %#x", what, i, (uint8_t)at[i * page + k], byte_of(first + i));
}

/* What events and landings leave is given back a moment later. */
static struct maps_range wait_given_back(const void *at, size_t len)
{
    struct maps_range m = maps_look(at, len);
    for (int i = 0; i < 2000 && (m.missing || m.watched); i++) {
        usleep(1000);
        m = maps_look(at, len);
    }
    return m;
}

/* ---- registering ---- */

static void a_mapping_is_registered_as_a_whole_and_given_back_as_a_whole(void **state)
{
    (void)state;
    size_t pages = 4096, bytes = pages * page;
    char *at = map_alone(bytes);
    fill_pages(at, pages, 0);
    to_device(at + 777 * page, page);
    struct maps_range m = maps_look(at, bytes);
    assert_int_equal(m.mappings, 1);
    assert_int_equal(m.missing, bytes);
    assert_int_equal(m.hidden_from_fork, kernel_tells_of_forks() ? 0 : bytes);
    assert_int_equal(regions(), 1);
    to_device(at + 3000 * page, 50 * page);
    assert_int_equal(regions(), 1);
    check_pages("some at home", at, 2900, 0);
    m = maps_look(at, bytes);
    assert_int_equal(m.missing, bytes);
    check_pages("all home", at, pages, 0);
    m = wait_given_back(at, bytes);
    assert_int_equal(m.mappings, 1);
    assert_int_equal(m.missing + m.watched + m.hidden_from_fork, 0);
    expect_no_regions();
    munmap(at, bytes);
}

/* Nothing is away: no touch of ours any more. */
static void first_touches_are_native_when_nothing_is_away(void **state)
{
    (void)state;
    size_t bytes = 8 * LIVE_BLOCK;
    char *at = map_alone(bytes);
    at[0] = 1;
    to_device(at, page);
    assert_int_equal(at[0], 1);
    wait_given_back(at, bytes);
    uint64_t before = stats().cpu_faults;
    for (size_t i = 0; i < bytes; i += page)
        at[i] = 2;
    assert_int_equal(stats().cpu_faults, before);
    munmap(at, bytes);
}

#define MANY 20000u

static void many_small_ranges_of_one_mapping(void **state)
{
    (void)state;
    size_t bytes = 2 * MANY * page;
    char *at = map_alone(bytes);
    fill_pages(at, 2 * MANY, 5);
    for (unsigned i = 0; i < MANY; i++)
        assert_int_equal(to_device(at + 2 * i * page, page).moved, 1);
    struct maps_range m = maps_look(at, bytes);
    assert_int_equal(m.mappings, 1);
    assert_int_equal(m.missing, bytes);
    assert_int_equal(stats().device_pages, MANY);
    assert_int_equal(regions(), 1);
    char *moved = map_alone(bytes);
    assert_ptr_equal(mremap(at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, moved), moved);
    check_pages("many ranges, moved", moved, 2 * MANY, 5);
    munmap(moved, bytes);
}

static void many_mappings(void **state)
{
    (void)state;
    size_t bytes = 2 * MANY * page;
    char *at = live_reserve(bytes);
    for (unsigned i = 0; i < MANY; i++) {
        assert_true(live_map(at + 2 * i * page, page));
        fill_pages(at + 2 * i * page, 1, i);
    }
    struct hmm_migrate_result res = to_device(at, bytes);
    assert_int_equal(res.moved, MANY);
    assert_int_equal(res.unmovable, MANY); /* the gaps have no access */
    assert_int_equal(regions(), MANY);
    for (unsigned i = 0; i < MANY; i++)
        check_pages("many mappings", at + 2 * i * page, 1, i);
    struct maps_range m = wait_given_back(at, bytes);
    assert_int_equal(m.missing, 0);
    expect_no_regions();
    munmap(at, bytes);
}

/* ---- mremap, munmap ---- */

/* Pages [from, end) of a mapping are away, the others are not. */
static char *partly_away(size_t pages, size_t from, size_t end)
{
    char *at = map_alone(pages * page);
    fill_pages(at, pages, 9);
    assert_int_equal(to_device(at + from * page, (end - from) * page).moved, end - from);
    return at;
}

static void a_mapping_that_is_away_in_part_can_be_moved(void **state)
{
    (void)state;
    char *at = partly_away(1000, 300, 400), *to = map_alone(1000 * page);
    assert_ptr_equal(mremap(at, 1000 * page, 1000 * page, MREMAP_MAYMOVE | MREMAP_FIXED, to), to);
    assert_int_equal(stats().device_pages, 100);
    assert_int_equal(maps_look(to, 1000 * page).missing, 1000 * page);
    check_pages("moved", to, 1000, 9);
    munmap(to, 1000 * page);
}

static void it_can_shrink(void **state)
{
    (void)state;
    char *at = partly_away(1000, 300, 500);
    assert_ptr_equal(mremap(at, 1000 * page, 400 * page, 0), at);
    for (int i = 0; i < 2000 && stats().device_pages != 100; i++)
        usleep(1000);
    assert_int_equal(stats().device_pages, 100);
    check_pages("shrunk", at, 400, 9);
    munmap(at, 400 * page);
}

static void check_zeros(const char *what, const char *at, size_t pages)
{
    for (size_t i = 0; i < pages; i++)
        if (at[i * page] || at[(i + 1) * page - 1])
            fail_msg("%s: page %zu is not zero", what, i);
}

/* In place there is no event: the first touch of the new part makes it known, and the mapping stays one. */
static void it_can_grow_in_place(void **state)
{
    (void)state;
    char *at = partly_away(1000, 300, 500);
    munmap(at + 1000 * page, 1000 * page);
    assert_ptr_equal(mremap(at, 1000 * page, 2000 * page, 0), at);
    at[1500 * page] = 7;
    assert_int_equal(maps_look(at, 2000 * page).mappings, 1);
    assert_int_equal(maps_look(at, 2000 * page).missing, 2000 * page);
    assert_int_equal(regions(), 1);
    assert_int_equal(at[1500 * page], 7);
    check_zeros("grown", at + 1501 * page, 499);
    fill_pages(at + 1000 * page, 1000, 1009);
    assert_int_equal(to_device(at + 900 * page, 300 * page).moved, 300); /* across the old end */
    char *to = map_alone(4000 * page);
    assert_ptr_equal(mremap(at, 2000 * page, 3000 * page, MREMAP_MAYMOVE | MREMAP_FIXED, to), to);
    check_pages("grown and moved", to, 2000, 9);
    check_zeros("grown by moving", to + 2000 * page, 1000);
    wait_given_back(to, 3000 * page);
    expect_no_regions();
    munmap(to, 3000 * page);
}

/* Arming the new part extends the region, too; where nothing is away, the part is given back. */
static void what_has_grown_is_armed_or_given_back(void **state)
{
    (void)state;
    char *at = partly_away(100, 30, 50);
    munmap(at + 100 * page, 100 * page);
    assert_ptr_equal(mremap(at, 100 * page, 200 * page, 0), at);
    assert_int_equal(to_device(at + 150 * page, 10 * page).moved, 10);
    assert_int_equal(regions(), 1);
    assert_int_equal(maps_look(at, 200 * page).missing, 200 * page);
    munmap(at, 150 * page); /* with it what was away of the old part */
    check_zeros("armed where it grew", at + 150 * page, 50);
    wait_given_back(at + 150 * page, 50 * page);
    expect_no_regions();
    munmap(at + 150 * page, 50 * page);
}

static void with_dontunmap_the_old_place_reads_as_zeros(void **state)
{
    (void)state;
    char *at = partly_away(500, 100, 400);
    char *to = mremap(at, 500 * page, 500 * page, MREMAP_MAYMOVE | 4 /* MREMAP_DONTUNMAP */, NULL);
    assert_ptr_not_equal(to, MAP_FAILED);
    assert_ptr_not_equal(to, at);
    check_zeros("left behind", at, 500);
    check_pages("taken along", to, 500, 9);
    assert_int_equal(wait_given_back(at, 500 * page).missing, 0);
    fill_pages(at, 500, 77);
    assert_int_equal(to_device(at, 500 * page).moved, 500);
    check_pages("away again", at, 500, 77);
    munmap(at, 500 * page);
    munmap(to, 500 * page);
}

static void a_part_can_be_unmapped(void **state)
{
    (void)state;
    char *at = partly_away(1000, 0, 1000);
    munmap(at + 100 * page, 300 * page);
    munmap(at + 999 * page, page);
    for (int i = 0; i < 2000 && stats().device_pages != 699; i++)
        usleep(1000);
    assert_int_equal(stats().device_pages, 699);
    assert_true(live_map(at + 200 * page, 10 * page));
    check_zeros("mapped anew", at + 200 * page, 10);
    check_pages("before the hole", at, 100, 9);
    check_pages("behind the hole", at + 400 * page, 599, 409);
    wait_given_back(at, 1000 * page);
    expect_no_regions();
    munmap(at, 1000 * page);
}

/* The program's mprotect splits the mapping: what is registered stays so, and comes home. */
static void a_part_can_be_made_read_only(void **state)
{
    (void)state;
    char *at = partly_away(300, 0, 200);
    mprotect(at + 100 * page, 50 * page, PROT_READ);
    check_pages("read-only in part", at, 300, 9);
    struct maps_range m = wait_given_back(at, 300 * page);
    assert_int_equal(m.missing, 0);
    munmap(at, 300 * page);
}

/* ---- faults ---- */

/* Sequential touches of memory that was never touched: about a fault per block. */
static void count_zero_faults(bool write)
{
    size_t blocks = 32, bytes = blocks * LIVE_BLOCK;
    char *at = map_alone(bytes);
    at[0] = 1;
    to_device(at, page);
    uint64_t before = stats().cpu_faults;
    for (size_t i = page; i < bytes; i += page) {
        if (write)
            at[i] = (char)byte_of(i);
        else
            assert_int_equal(*(volatile char *)(at + i), 0);
    }
    uint64_t faults = stats().cpu_faults - before;
    if (faults > blocks + 16 || faults < blocks / 2)
        fail_msg("%llu faults for %zu blocks", (unsigned long long)faults, blocks);
    for (size_t i = page; i < bytes && write; i += page)
        assert_int_equal((uint8_t)at[i], byte_of(i));
    assert_int_equal(at[0], 1);
    munmap(at, bytes);
}

static void untouched_memory_is_filled_in_large_windows(void **state)
{
    (void)state;
    count_zero_faults(true);
    count_zero_faults(false);
}

/* A window stops at what is away and at the end of the region, and leaves what is present. */
static void a_window_of_zeros_stops_at_what_is_not_absent(void **state)
{
    (void)state;
    size_t pages = 512;
    char *at = map_alone(pages * page);
    fill_pages(at + 40 * page, 8, 40);
    fill_pages(at + 100 * page, 100, 100);
    to_device(at + 100 * page, 100 * page);
    for (size_t i = 0; i < pages; i++) {
        bool data = (i >= 40 && i < 48) || (i >= 100 && i < 200);
        at[i * page + 8] = data ? at[i * page + 8] : 3;
    }
    check_pages("present", at + 40 * page, 8, 40);
    check_pages("away", at + 100 * page, 100, 100);
    check_zeros("absent", at, 40);
    check_zeros("absent", at + 200 * page, pages - 200);
    munmap(at, pages * page);
}

#define TOUCHERS 90

struct toucher {
    pthread_t thread;
    char *at;
    size_t pages, first;
    unsigned wrong;
};

static void *touch_main(void *arg)
{
    struct toucher *t = arg;
    for (size_t i = 0; i < t->pages; i++) {
        t->wrong += (uint8_t)t->at[i * page] != byte_of(t->first + i);
        t->at[i * page + 1] = 1;
    }
    return NULL;
}

/* In mappings of their own and in one: everyone gets on. */
static void ninety_threads_fault_at_once(void **state)
{
    (void)state;
    enum { EACH = 20 };
    struct toucher *t = calloc(TOUCHERS, sizeof(*t));
    char *shared = map_alone(TOUCHERS * EACH * page);
    fill_pages(shared, TOUCHERS * EACH, 0);
    to_device(shared, TOUCHERS * EACH * page);
    for (unsigned i = 0; i < TOUCHERS; i++) {
        t[i] = (struct toucher){.at = shared + i * EACH * page, .pages = EACH, .first = i * EACH};
        if (i % 2) {
            t[i].at = map_alone(EACH * page);
            fill_pages(t[i].at, EACH, t[i].first);
            to_device(t[i].at, EACH * page);
        }
    }
    for (unsigned i = 0; i < TOUCHERS; i++)
        assert_int_equal(pthread_create(&t[i].thread, NULL, touch_main, &t[i]), 0);
    for (unsigned i = 0; i < TOUCHERS; i++) {
        pthread_join(t[i].thread, NULL);
        assert_int_equal(t[i].wrong, 0);
        if (i % 2)
            munmap(t[i].at, EACH * page);
    }
    munmap(shared, TOUCHERS * EACH * page);
    free(t);
}

static struct os_ops user_mode;

static int open_user_mode(uint64_t features, struct os_uffd *out)
{
    int r = os_linux.uffd_open(features, out);
    if (!r)
        out->user_mode_only = true;
    return r;
}

/* A system call on memory that was never touched would fail in all that is registered: so that is no more than a block. */
static void user_mode_only_registers_one_block(void **state)
{
    (void)state;
    assert_int_equal(hmm_device_close(dev), 0);
    user_mode = os_linux;
    user_mode.uffd_open = open_user_mode;
    os = &user_mode;
    assert_int_equal(hmm_device_open("soft:memory=16M,engines=1", &dev), 0);
    char *at = map_alone(4 * LIVE_BLOCK);
    fill_pages(at, 4 * LIVE_BLOCK / page, 1);
    to_device(at + LIVE_BLOCK + page, page);
    assert_int_equal(maps_look(at, 4 * LIVE_BLOCK).missing, LIVE_BLOCK);
    assert_int_equal(maps_look(at + LIVE_BLOCK, LIVE_BLOCK).missing, LIVE_BLOCK);
    to_device(at + 2 * LIVE_BLOCK - page, 2 * page);
    assert_int_equal(maps_look(at + LIVE_BLOCK, 2 * LIVE_BLOCK).missing, 2 * LIVE_BLOCK);
    check_pages("user-mode-only", at, 4 * LIVE_BLOCK / page, 1);
    expect_no_regions();
    munmap(at, 4 * LIVE_BLOCK);
    assert_int_equal(hmm_audit(), 0);
    assert_int_equal(hmm_device_close(dev), 0);
    os = &os_linux;
    assert_int_equal(hmm_device_open("soft:memory=16M,engines=1", &dev), 0);
}

#define BESIDE ((size_t)16 << 20)

static int set_up_closed(void **state)
{
    (void)state;
    live_set_up(SECONDS_MAX);
    return 0;
}

/* The kernel puts what comes next right below, and merges it with the mapping where it is alike: stacks of the C library are that to
 * memory without huge pages. They never leave. */
static void a_mapping_that_library_threads_come_next_to_is_movable(void **state)
{
    (void)state;
    char *p = mmap(NULL, BESIDE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    assert_int_equal(madvise(p, BESIDE, MADV_NOHUGEPAGE), 0);
    fill_pages(p, BESIDE / page, 0);
    open_spec("soft:memory=160M,engines=1");
    struct hmm_migrate_result res = to_device(p, BESIDE);
    assert_int_equal(res.unmovable, 0);
    assert_int_equal(res.moved, BESIDE / page);
    check_pages("beside stacks", p, BESIDE / page, 0);
    munmap(p, BESIDE);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_mapping_that_library_threads_come_next_to_is_movable, set_up_closed,
                                        tear_down), /* first: no stack is there yet */
        TEST(a_mapping_is_registered_as_a_whole_and_given_back_as_a_whole),
        TEST(first_touches_are_native_when_nothing_is_away),
        TEST(many_small_ranges_of_one_mapping),
        TEST(many_mappings),
        TEST(a_mapping_that_is_away_in_part_can_be_moved),
        TEST(it_can_shrink),
        TEST(it_can_grow_in_place),
        TEST(what_has_grown_is_armed_or_given_back),
        TEST(with_dontunmap_the_old_place_reads_as_zeros),
        TEST(a_part_can_be_unmapped),
        TEST(a_part_can_be_made_read_only),
        TEST(untouched_memory_is_filled_in_large_windows),
        TEST(a_window_of_zeros_stops_at_what_is_not_absent),
        TEST(ninety_threads_fault_at_once),
        TEST(user_mode_only_registers_one_block),
    };
    return cmocka_run_group_tests_name("mapping", tests, NULL, NULL);
}
