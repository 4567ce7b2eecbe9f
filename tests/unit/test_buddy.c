/* SPDX-License-Identifier: MIT */
/* The buddy allocator against a plain array of used pages, and its own validator against broken states. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mem_source.h"
#include "pagemap/buddy.c" /* its inside, to break it */

static int set_up(void **state)
{
    (void)state;
    source_start();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    bool leak = mem_used() != 0;
    mem_exit();
    return leak;
}

/* ---- the oracle ---- */

struct model {
    uint64_t pages;
    bool *used;
};

static bool model_free(const struct model *m, uint64_t page, uint64_t count)
{
    if (page >= m->pages || count > m->pages - page)
        return false;
    return !memchr(m->used + page, true, count);
}

/* What the contract promises: the lowest of the smallest maximal free blocks that fit. A free block is maximal when its parent
 * is not free. */
static int64_t model_alloc(const struct model *m, unsigned order)
{
    for (unsigned o = order; o < BUDDY_ORDERS && (uint64_t)1 << o <= m->pages; o++) {
        uint64_t size = (uint64_t)1 << o;
        for (uint64_t page = 0; page + size <= m->pages; page += size)
            if (model_free(m, page, size) && (o == BUDDY_ORDERS - 1 || !model_free(m, page & ~size, 2 * size)))
                return (int64_t)page;
    }
    return -1;
}

static uint64_t model_available(const struct model *m)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < m->pages; i++)
        n += !m->used[i];
    return n;
}

static void model_mark(struct model *m, uint64_t page, uint64_t count, bool used)
{
    memset(m->used + page, used, count);
}

/* ---- random operations ---- */

static void step_alloc(struct buddy *b, struct model *m, unsigned *seed)
{
    unsigned order = (unsigned)rand_r(seed) % 10;
    if (rand_r(seed) % 3)
        order %= 3;
    int64_t expected = model_alloc(m, order), got = buddy_alloc(b, order);
    assert_int_equal(got, expected);
    if (got >= 0)
        model_mark(m, (uint64_t)got, (uint64_t)1 << order, true);
}

/* Any run, as it comes: whole, a part of one allocation, or across several; and some that are partly free. */
static void step_release(struct buddy *b, struct model *m, unsigned *seed)
{
    uint64_t page = (uint64_t)rand_r(seed) % m->pages, count = 1 + (uint64_t)rand_r(seed) % (rand_r(seed) % 4 ? 8 : 300);
    bool legal = page + count <= m->pages;
    for (uint64_t i = page; legal && i < page + count; i++)
        legal = m->used[i];
    if (!legal && rand_r(seed) % 4) { /* make most of them legal: the used run at page */
        for (count = 0; page + count < m->pages && m->used[page + count] && count < 300; count++)
            ;
        legal = count > 0;
    }
    assert_int_equal(buddy_release(b, page, count), legal);
    if (legal)
        model_mark(m, page, count, false);
}

static void run_model(uint64_t pages, int steps, unsigned seed)
{
    struct model m = {.pages = pages, .used = calloc(pages, 1)};
    struct buddy *b = buddy_new(pages);
    assert_non_null(b);
    assert_int_equal(buddy_available(b), pages);
    for (int i = 0; i < steps; i++) {
        /* Fill and empty in turns. */
        bool filling = i / 200 % 2 == 0;
        if ((unsigned)rand_r(&seed) % 10 < (filling ? 8u : 3u))
            step_alloc(b, &m, &seed);
        else
            step_release(b, &m, &seed);
        assert_int_equal(buddy_available(b), model_available(&m));
        if (i % 16 == 0)
            assert_true(buddy_is_valid(b));
        uint64_t page = (uint64_t)rand_r(&seed) % pages;
        assert_int_equal(buddy_is_free(b, page), !m.used[page]);
    }
    for (uint64_t i = 0; i < pages; i++)
        if (m.used[i])
            assert_true(buddy_release(b, i, 1));
    assert_int_equal(buddy_available(b), pages);
    assert_true(buddy_is_valid(b));
    buddy_free_all(b);
    free(m.used);
}

static void test_small_sizes_against_model(void **state)
{
    (void)state;
    for (uint64_t pages = 1; pages <= 140; pages++)
        run_model(pages, 300, (unsigned)pages);
}

static void test_large_sizes_against_model(void **state)
{
    (void)state;
    static const uint64_t sizes[] = {512, 1000, 4095, 4097, 8192};
    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        run_model(sizes[i], 1500, i);
}

/* ---- named cases ---- */

static void test_everything_can_be_taken_and_merges_again(void **state)
{
    (void)state;
    for (uint64_t pages = 1; pages <= 1030; pages += 1 + pages / 9) {
        struct buddy *b = buddy_new(pages);
        for (uint64_t i = 0; i < pages; i++)
            assert_true(buddy_alloc(b, 0) >= 0);
        assert_int_equal(buddy_alloc(b, 0), -1);
        for (uint64_t i = 0; i < pages; i++) /* odd pages upwards, even ones downwards */
            assert_true(buddy_release(b, i % 2 ? i : (pages - 1) / 2 * 2 - i, 1));
        assert_true(buddy_is_valid(b));
        unsigned top = 63 - (unsigned)__builtin_clzll(pages);
        assert_int_equal(buddy_alloc(b, top), 0);
        buddy_free_all(b);
    }
}

static void test_refused_release_changes_nothing(void **state)
{
    (void)state;
    struct buddy *b = buddy_new(100);
    assert_int_equal(buddy_alloc(b, 4), 64); /* 100 = 64 + 32 + 4: the 32 is split */
    assert_false(buddy_release(b, 60, 8));   /* half free */
    assert_false(buddy_release(b, 64, 17));
    assert_false(buddy_release(b, 0, 1));
    assert_false(buddy_release(b, 64, 0));
    assert_false(buddy_release(b, 100, 1));
    assert_false(buddy_release(b, 64, UINT64_MAX));
    assert_false(buddy_release(b, UINT64_MAX, 2));
    assert_int_equal(buddy_available(b), 84);
    assert_true(buddy_release(b, 64, 16));
    assert_false(buddy_release(b, 64, 16));
    assert_true(buddy_is_valid(b));
    buddy_free_all(b);
}

static void test_orders_beyond_the_top(void **state)
{
    (void)state;
    uint64_t top = (uint64_t)1 << (BUDDY_ORDERS - 1);
    struct buddy *b = buddy_new(3 * top + 5);
    assert_int_equal(buddy_alloc(b, BUDDY_ORDERS), -1);
    assert_int_equal(buddy_alloc(b, 64), -1);
    assert_int_equal(buddy_alloc(b, BUDDY_ORDERS - 1), 0);
    assert_int_equal(buddy_alloc(b, BUDDY_ORDERS - 1), top);
    assert_int_equal(buddy_alloc(b, BUDDY_ORDERS - 1), 2 * top);
    assert_int_equal(buddy_alloc(b, BUDDY_ORDERS - 1), -1);
    assert_int_equal(buddy_alloc(b, 2), 3 * top);
    assert_true(buddy_release(b, 0, 3 * top)); /* across blocks of the top order */
    assert_int_equal(buddy_available(b), 3 * top + 1);
    assert_true(buddy_is_valid(b));
    buddy_free_all(b);
}

static void test_validator_sees_damage(void **state)
{
    (void)state;
    struct buddy *b = buddy_new(5000);
    assert_int_equal(buddy_alloc(b, 3), 4992); /* 5000 ends with a block of 8 */
    assert_int_equal(buddy_alloc(b, 3), 4864); /* splits the block of 128 before it */
    assert_true(buddy_is_valid(b));
    b->available++;
    assert_false(buddy_is_valid(b));
    b->available--;
    for (unsigned l = 0; l < b->free[3].levels; l++) { /* any one word, at every level */
        b->free[3].level[l][0] ^= 1;
        assert_false(buddy_is_valid(b));
        b->free[3].level[l][0] ^= 1;
    }
    set_bit(&b->free[1], 0); /* inside a larger free block */
    b->available += 2;
    assert_false(buddy_is_valid(b));
    clear_bit(&b->free[1], 0);
    b->available -= 2;
    set_bit(&b->free[0], 4992); /* free buddies that are not merged */
    set_bit(&b->free[0], 4993);
    b->available += 2;
    assert_false(buddy_is_valid(b));
    clear_bit(&b->free[0], 4993);
    clear_bit(&b->free[0], 4992);
    b->available -= 2;
    assert_true(buddy_is_valid(b));
    buddy_free_all(b);
}

static void test_own_memory_is_two_bits_a_page(void **state)
{
    (void)state;
    uint64_t pages = (uint64_t)1 << 20;
    struct buddy *b = buddy_new(pages);
    assert_true(buddy_bytes(b) * 8 <= pages * 21 / 10);
    assert_true(mem_used() >= buddy_bytes(b));
    buddy_free_all(b);
}

static void test_no_memory_and_bad_sizes(void **state)
{
    (void)state;
    mem_fail = fail_nth;
    alloc_until_fail = 0;
    assert_null(buddy_new(10));
    mem_fail = NULL;
    assert_null(buddy_new(0));
    assert_null(buddy_new(((uint64_t)1 << 40) + 1));
    assert_null(buddy_new(UINT64_MAX));
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_small_sizes_against_model),
        T(test_large_sizes_against_model),
        T(test_everything_can_be_taken_and_merges_again),
        T(test_refused_release_changes_nothing),
        T(test_orders_beyond_the_top),
        T(test_validator_sees_damage),
        T(test_own_memory_is_two_bits_a_page),
        T(test_no_memory_and_bad_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
