/* SPDX-License-Identifier: MIT */
/*
 * Estates against a plain array: which page of the child comes from where, whatever is taken out, moved, found and used up. Places are
 * staging slots, which count who holds them.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "live.h"
#include "mem_source.h"
#include "mm/estate.h"

#define PAGES 512u
#define BASE ((uintptr_t)1 << 30)
#define SLOTS ((uintptr_t)1 << 40)
#define SLOTS_MAX 8u

static struct mm mm;
static int64_t held[SLOTS_MAX]; /* by slot: they are counted one by one */
static uint64_t oracle[PAGES];  /* source of each page; 0: none */
static uint64_t state;

static int64_t *held_of(uintptr_t addr)
{
    size_t slot = (addr - SLOTS) / OS_BLOCK_SIZE;
    assert_true(slot < SLOTS_MAX);
    return &held[slot];
}

static void keep(uintptr_t addr, uint64_t pages)
{
    *held_of(addr) += (int64_t)pages;
}

static void drop(uintptr_t addr, uint64_t pages)
{
    *held_of(addr) -= (int64_t)pages;
}

static int64_t all_held(void)
{
    int64_t all = 0;
    for (unsigned i = 0; i < SLOTS_MAX; i++)
        all += held[i] < 0 ? -held[i] : held[i];
    return all;
}

static unsigned below(unsigned n)
{
    state = random_mix(state);
    return (unsigned)(state >> 16) % n;
}

static uintptr_t at(unsigned page)
{
    return BASE + page * os_page_size();
}

static int set_up(void **unused)
{
    (void)unused;
    source_start();
    memset(&mm, 0, sizeof(mm));
    mm.slot_keep = keep;
    mm.slot_drop = drop;
    memset(held, 0, sizeof(held));
    memset(oracle, 0, sizeof(oracle));
    return 0;
}

static int tear_down(void **unused)
{
    (void)unused;
    int left = mem_used() != 0;
    mem_exit();
    return left;
}

/* Runs ascending, some continue each other, some from one slot into the next. */
static void make(struct estate *e)
{
    estate_init(e, &mm, NULL);
    memset(oracle, 0, sizeof(oracle));
    for (unsigned i = 0; i < PAGES;) {
        unsigned n = 1 + below(20), gap = below(4);
        unsigned first = (1 + below(SLOTS_MAX - 1)) * block_pages() - below(30);
        uint64_t source = SLOTS + (uint64_t)(below(4) ? first : below(block_pages())) * os_page_size();
        for (unsigned k = 0; k < n && i < PAGES; k++, i++) {
            oracle[i] = source + k * os_page_size();
            estate_add(e, (struct estate_run){.addr = at(i), .source = oracle[i], .pages = 1, .range = ESTATE_QUIET});
        }
        i += gap;
    }
}

static void check(const struct estate *e, const char *what)
{
    uint64_t found[PAGES] = {0}, pages = 0;
    int64_t in_slot[SLOTS_MAX] = {0};
    for (size_t i = 0; i < e->n; i++) {
        for (unsigned k = 0; k < e->v[i].pages; k++) {
            size_t page = (e->v[i].addr - BASE) / os_page_size() + k;
            assert_true(page < PAGES);
            assert_true(found[page] == 0);
            found[page] = e->v[i].source + k * os_page_size();
            in_slot[(found[page] - SLOTS) / OS_BLOCK_SIZE]++;
            pages++;
        }
        if (i && e->v[i].addr < e->v[i - 1].addr)
            fail_msg("%s: out of order", what);
    }
    assert_int_equal(pages, e->pages);
    assert_memory_equal(held, in_slot, sizeof(held));
    if (memcmp(found, oracle, sizeof(oracle)))
        fail_msg("%s: not what the array says", what);
}

static void take(struct estate *e)
{
    struct estate out;
    unsigned first = below(PAGES), n = 1 + below(40), end = first + n < PAGES ? first + n : PAGES, expected = 0;
    estate_init(&out, &mm, NULL);
    estate_take(e, at(first), at(end), &out);
    for (unsigned i = first; i < end; i++) {
        expected += oracle[i] != 0;
        oracle[i] = 0;
    }
    assert_int_equal(out.pages, expected);
    estate_free(&out);
    check(e, "take");
}

/* As the child's mremap: what stood at the target is gone before. */
static void move(struct estate *e)
{
    unsigned n = 1 + below(30), from = below(PAGES - n), to = below(PAGES - n);
    struct estate out;
    if (from < to + n && to < from + n)
        return;
    estate_init(&out, &mm, NULL);
    estate_take(e, at(to), at(to + n), &out);
    estate_free(&out);
    estate_move(e, at(from), at(from + n), at(to) - at(from));
    for (unsigned i = 0; i < n; i++) {
        oracle[to + i] = oracle[from + i];
        oracle[from + i] = 0;
    }
    check(e, "move");
}

static void find(struct estate *e)
{
    unsigned page = below(PAGES);
    size_t i = estate_find(e, at(page));
    if (!oracle[page]) {
        assert_true(i == e->n);
        unsigned end = page + 16 < PAGES ? page + 16 : PAGES, next = page;
        while (next < end && !oracle[next])
            next++;
        assert_int_equal(estate_next(e, at(page), at(end)), at(next));
        return;
    }
    assert_true(i < e->n && e->v[i].addr == at(page));
    assert_int_equal(e->v[i].source, oracle[page]);
    unsigned n = 1 + below(e->v[i].pages);
    estate_consume(e, i, n);
    memset(oracle + page, 0, n * sizeof(*oracle));
    check(e, "consume");
}

static void an_estate_is_what_a_plain_array_says(void **unused)
{
    (void)unused;
    for (state = 1; state < 60; state++) {
        uint64_t seed = state;
        struct estate e;
        make(&e);
        check(&e, "new");
        for (unsigned i = 0; i < 300; i++) {
            unsigned what = below(3);
            what == 0 ? take(&e) : what == 1 ? move(&e) : find(&e);
        }
        estate_free(&e);
        assert_int_equal(all_held(), 0);
        state = seed;
    }
}

static void a_copy_holds_places_of_its_own(void **unused)
{
    struct estate e, copy;
    (void)unused;
    state = 7;
    make(&e);
    int64_t before = all_held();
    estate_init(&copy, &mm, NULL);
    estate_add_estate(&copy, &e);
    assert_int_equal(all_held(), 2 * before);
    estate_free(&e);
    check(&copy, "copy");
    estate_free(&copy);
    assert_int_equal(all_held(), 0);
}

/* What comes from two lists may name a page twice: each is found as long as it is there, the first of them first. */
static void of_two_places_the_first_counts(void **unused)
{
    struct estate e;
    (void)unused;
    estate_init(&e, &mm, NULL);
    for (unsigned k = 0; k < 2; k++)
        for (unsigned i = 10 - k; i < 20; i++)
            estate_add(&e, (struct estate_run){.addr = at(i),
                                               .source = SLOTS + k * 2 * OS_BLOCK_SIZE + i * os_page_size(),
                                               .pages = 1,
                                               .range = ESTATE_QUIET});
    assert_true(e.mixed);
    size_t i = estate_find(&e, at(15));
    assert_int_equal(e.v[i].source, SLOTS + 15 * os_page_size());
    estate_consume(&e, i, 1);
    i = estate_find(&e, at(15));
    assert_int_equal(e.v[i].source, SLOTS + 2 * OS_BLOCK_SIZE + 15 * os_page_size());
    estate_consume(&e, i, 1);
    assert_true(estate_find(&e, at(15)) == e.n);
    estate_move(&e, at(9), at(12), at(100) - at(9));
    assert_true(estate_find(&e, at(9)) == e.n);
    i = estate_find(&e, at(100));
    assert_int_equal(e.v[i].source, SLOTS + 2 * OS_BLOCK_SIZE + 9 * os_page_size());
    estate_free(&e);
    assert_int_equal(all_held(), 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(an_estate_is_what_a_plain_array_says),
        TEST(a_copy_holds_places_of_its_own),
        TEST(of_two_places_the_first_counts),
    };
    return cmocka_run_group_tests_name("estate", tests, NULL, NULL);
}
