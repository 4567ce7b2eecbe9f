/* SPDX-License-Identifier: MIT */
/* The tree of regions, against a plain array with one word per page; and many of them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "mem_source.h"
#include "mm/region.h"

#define PAGES 600u

static struct regions rs;
static uint32_t oracle[PAGES]; /* 0: in none; else number of the insertion it came from, times 8, and mode and state */
static uint32_t inserted;

static uint64_t next_random(uint64_t *r)
{
    *r ^= *r << 13;
    *r ^= *r >> 7;
    *r ^= *r << 17;
    return *r;
}

static uintptr_t at(unsigned page)
{
    return (uintptr_t)(page + 1) << 12;
}

static int set_up(void **state)
{
    (void)state;
    source_start();
    rs = (struct regions){0};
    memset(oracle, 0, sizeof(oracle));
    inserted = 0;
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    regions_exit(&rs);
    bool leaked = mem_used() != 0 || rs.count != 0;
    mem_exit();
    return leaked ? -1 : 0;
}

static void insert(unsigned first, unsigned end, bool missing, enum region_state state)
{
    region_insert_must(&rs, at(first), at(end), missing, state);
    inserted++;
    for (unsigned i = first; i < end; i++)
        oracle[i] = inserted * 8 + missing * 4 + state;
}

static void check_all(void)
{
    unsigned count = 0;
    assert_true(regions_are_valid(&rs));
    for (unsigned i = 0; i < PAGES; i++) {
        const struct region *r = region_find(&rs, at(i)), *next = region_next(&rs, at(i)), *before = region_before(&rs, at(i));
        count += oracle[i] && (i == 0 || oracle[i] != oracle[i - 1]);
        unsigned k = i;
        while (k < PAGES && !oracle[k])
            k++;
        if (k == PAGES)
            assert_null(next);
        else
            assert_true(next && next->end > at(i) && next->start <= at(k) && (k == i || next->start == at(k)));
        assert_ptr_equal(r, oracle[i] ? next : NULL);
        if (r)
            assert_int_equal(oracle[i] % 8, r->missing * 4 + r->state);
        for (k = i; k > 0 && !oracle[k - 1];)
            k--;
        if (k == 0)
            assert_true(!before || before->start < at(i));
        else
            assert_true(before && before->start < at(i) && before->end >= at(k));
        assert_int_equal(region_any(&rs, at(i), at(i) + 1), oracle[i] != 0);
    }
    assert_int_equal(rs.count, count);
}

static void random_use_matches_an_array(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed < 6; seed++) {
        uint64_t r = seed * 0x9e3779b97f4a7c15ull;
        for (unsigned step = 0; step < 400; step++) {
            unsigned first = next_random(&r) % PAGES, end = first + 1 + next_random(&r) % 30;
            end = end < PAGES ? end : PAGES;
            region_cut(&rs, at(first), at(end)); /* to insert, the place must be free; to cut, that is it */
            memset(oracle + first, 0, (end - first) * sizeof(*oracle));
            if (next_random(&r) % 3)
                insert(first, end, next_random(&r) % 2, next_random(&r) % 3);
            check_all();
        }
        regions_exit(&rs);
        memset(oracle, 0, sizeof(oracle));
    }
}

/* Of a region that is cut in the middle both ends stay what they were. */
static void a_cut_in_the_middle_leaves_two(void **state)
{
    (void)state;
    insert(10, 40, true, REGION_LEFT);
    region_cut(&rs, at(20), at(30));
    memset(oracle + 20, 0, 10 * sizeof(*oracle));
    assert_int_equal(rs.count, 2);
    const struct region *a = region_find(&rs, at(19)), *b = region_find(&rs, at(30));
    assert_true(a && a->start == at(10) && a->end == at(20) && a->missing && a->state == REGION_LEFT);
    assert_true(b && b->start == at(30) && b->end == at(40) && b->missing && b->state == REGION_LEFT);
    region_cut(&rs, 0, UINTPTR_MAX);
    assert_int_equal(rs.count, 0);
    region_cut(&rs, at(20), at(20)); /* of nothing: nothing */
}

/* Only what touches and is alike. */
static void neighbours_that_are_alike_can_be_joined(void **state)
{
    (void)state;
    region_insert_must(&rs, at(10), at(20), true, REGION_PROVED);
    region_insert_must(&rs, at(30), at(40), true, REGION_PROVED);
    region_insert_must(&rs, at(40), at(50), false, REGION_PROVED);
    region_insert_must(&rs, at(51), at(60), true, REGION_PROVED);
    region_join(&rs, region_insert_must(&rs, at(20), at(30), true, REGION_PROVED));
    assert_true(regions_are_valid(&rs));
    assert_int_equal(rs.count, 3);
    const struct region *r = region_find(&rs, at(25));
    assert_true(r && r->start == at(10) && r->end == at(40));
    region_join(&rs, region_find(&rs, at(45)));
    assert_int_equal(rs.count, 3);
    region_join(&rs, region_insert_must(&rs, at(50), at(51), true, REGION_LEFT));
    assert_int_equal(rs.count, 4);
}

static unsigned depth(const struct region *r)
{
    unsigned l = r ? depth(r->child[0]) : 0, h = r ? depth(r->child[1]) : 0;
    return r ? 1 + (l > h ? l : h) : 0;
}

/* In ascending order, the worst for a tree that does not balance. */
static void many_are_found_as_fast_as_a_few(void **state)
{
    (void)state;
    enum { MANY = 40000 };
    for (uintptr_t i = 0; i < MANY; i++)
        region_insert_must(&rs, 2 * i << 12, (2 * i + 1) << 12, true, REGION_PROVED);
    assert_int_equal(rs.count, MANY);
    assert_true(regions_are_valid(&rs));
    assert_true(depth(rs.root) < 60);
    for (uintptr_t i = 0; i < MANY; i++) {
        assert_non_null(region_find(&rs, 2 * i << 12));
        assert_null(region_find(&rs, (2 * i + 1) << 12));
    }
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(random_use_matches_an_array),
        TEST(a_cut_in_the_middle_leaves_two),
        TEST(neighbours_that_are_alike_can_be_joined),
        TEST(many_are_found_as_fast_as_a_few),
    };
    return cmocka_run_group_tests_name("region", tests, NULL, NULL);
}
