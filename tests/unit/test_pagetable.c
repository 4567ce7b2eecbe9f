/* SPDX-License-Identifier: MIT */
/* The page table: entries, blocks from short list to table, the tree; random use against plain arrays. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "common/oracle.h"
#include "mem_source.h"
#include "pagetable/pagetable.h"

#define PAGES_MAX 512 /* of a block, with the smallest page size there is */

static struct pagetable pt;

static int set_up(void **state)
{
    (void)state;
    source_start();
    lock_violations = 0;
    alloc_until_fail = -1;
    return pagetable_init(&pt);
}

static int tear_down(void **state)
{
    (void)state;
    mem_fail = NULL;
    pagetable_exit(&pt);
    bool bad = mem_used() != 0 || lock_violations != 0;
    if (bad)
        print_error("%lu bytes leaked, %lu lock violations\n", (unsigned long)mem_used(), (unsigned long)lock_violations);
    mem_exit();
    return bad;
}

static uint64_t seed_now(void)
{
    const char *text = getenv("HMM_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("seed %llu (HMM_SEED repeats it)\n", (unsigned long long)seed);
    return seed;
}

static void entries_keep_their_parts(void **state)
{
    (void)state;
    const struct {
        enum entry_kind kind;
        uint32_t id;
        uint64_t page;
    } v[] = {
        {ENTRY_DEVICE, 0, 0}, {ENTRY_FLIGHT, 127, 511}, {ENTRY_DEVICE, 0x1fff, ((uint64_t)1 << 48) - 1}, {ENTRY_POISON, 1, 1}};
    for (size_t i = 0; i < sizeof(v) / sizeof(*v); i++) {
        entry_t e = entry_make(v[i].kind, v[i].id, v[i].page);
        assert_int_not_equal(e, 0);
        assert_int_equal(entry_kind(e), v[i].kind);
        assert_int_equal(entry_id(e), v[i].id);
        assert_int_equal(entry_page(e), v[i].page);
    }
    assert_int_equal(entry_kind(0), ENTRY_NONE);
}

static void a_block_is_found_by_every_address_in_it(void **state)
{
    (void)state;
    uintptr_t base = (uintptr_t)0x7f12345 << 21;
    assert_null(pagetable_find(&pt, base));
    struct block *b = pagetable_get(&pt, base + 12345);
    assert_non_null(b);
    assert_int_equal(b->base, base);
    assert_ptr_equal(pagetable_get(&pt, base), b);
    assert_ptr_equal(pagetable_find(&pt, base + OS_BLOCK_SIZE - 1), b);
    assert_null(pagetable_find(&pt, base - 1));
    assert_null(pagetable_find(&pt, base + OS_BLOCK_SIZE));
    assert_int_equal(pt.blocks, 1);
    pagetable_remove(&pt, b);
    assert_null(pagetable_find(&pt, base));
    assert_int_equal(pt.blocks, 0);
}

static void addresses_out_of_reach_have_no_block(void **state)
{
    (void)state;
    uintptr_t out = (uintptr_t)1 << 57;
    assert_null(pagetable_find(&pt, out));
    assert_null(pagetable_get(&pt, out));
    assert_null(pagetable_get(&pt, UINTPTR_MAX));
    assert_null(pagetable_next(&pt, out, UINTPTR_MAX));
    struct block *last = pagetable_get(&pt, out - 1);
    assert_non_null(last);
    assert_ptr_equal(pagetable_next(&pt, 0, UINTPTR_MAX), last);
    assert_null(pagetable_next(&pt, last->base + OS_BLOCK_SIZE, UINTPTR_MAX));
}

static int ascending(const void *a, const void *b)
{
    uintptr_t x = *(const uintptr_t *)a, y = *(const uintptr_t *)b;
    return x < y ? -1 : x > y;
}

/* First of a sorted array whose block reaches into [start, end); 0: none. */
static uintptr_t oracle_next(const uintptr_t *base, unsigned n, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < n; i++)
        if (base[i] && base[i] >= (start & BLOCK_MASK) && base[i] < end)
            return base[i];
    return 0;
}

static void walking_meets_every_block_in_order(void **state)
{
    (void)state;
    enum { BLOCKS = 300 };
    uint64_t r = seed_now();
    uintptr_t base[BLOCKS];
    for (unsigned i = 0; i < BLOCKS; i++) { /* near each other and far apart */
        base[i] =
            (i % 3 ? (uintptr_t)0x55aa << 32 : random_next(&r) >> 8 & BLOCK_MASK) + (random_next(&r) % 512 + 1) * OS_BLOCK_SIZE;
        assert_non_null(pagetable_get(&pt, base[i]));
    }
    qsort(base, BLOCKS, sizeof(*base), ascending);
    for (unsigned round = 0; round < 3000; round++) {
        uintptr_t at = base[random_next(&r) % BLOCKS], start = at + random_next(&r) % (4 * OS_BLOCK_SIZE) - 2 * OS_BLOCK_SIZE;
        uintptr_t end = round % 4 ? start + random_next(&r) % (64 * OS_BLOCK_SIZE) + 1 : UINTPTR_MAX;
        struct block *b = pagetable_next(&pt, start, end);
        assert_int_equal(b ? b->base : 0, oracle_next(base, BLOCKS, start, end));
    }
    unsigned n = 0, unique = 0;
    for (unsigned i = 0; i < BLOCKS; i++)
        unique += i == 0 || base[i] != base[i - 1];
    for (struct block *b = pagetable_next(&pt, 0, UINTPTR_MAX); b;
         b = pagetable_next(&pt, b->base + OS_BLOCK_SIZE, UINTPTR_MAX))
        n++;
    assert_int_equal(n, unique);
    assert_int_equal(pt.blocks, unique);
}

static void count_oracle(const entry_t *oracle, unsigned *used, unsigned *on_device)
{
    *used = *on_device = 0;
    for (unsigned i = 0; i < block_pages(); i++) {
        *used += oracle[i] != 0;
        *on_device += entry_kind(oracle[i]) == ENTRY_DEVICE;
    }
}

static void check_block(const struct block *b, const entry_t *oracle)
{
    unsigned used, on_device;
    count_oracle(oracle, &used, &on_device);
    for (unsigned i = 0; i < block_pages(); i++)
        if (block_entry(b, i) != oracle[i])
            fail_msg("entry %u is %#llx, not %#llx", i, (unsigned long long)block_entry(b, i), (unsigned long long)oracle[i]);
    assert_int_equal(b->used, used);
    assert_int_equal(b->on_device, on_device);
    assert_true(block_is_valid(b));
}

/* Sets and clears at random; the share of entries in use goes up and down, through the change from list to table. */
static void a_block_is_an_array(void **state)
{
    (void)state;
    uint64_t r = seed_now();
    for (unsigned life = 0; life < 40; life++) {
        entry_t oracle[PAGES_MAX] = {0};
        struct block *b = pagetable_get(&pt, OS_BLOCK_SIZE * 99);
        for (unsigned step = 0; step < 400; step++) {
            unsigned i = random_next(&r) % (step < 100 ? 12 : block_pages());
            bool clear = random_next(&r) % 3 == 0;
            enum entry_kind kind = ENTRY_DEVICE + random_next(&r) % 3;
            mutex_lock(&b->lock);
            assert_int_equal(block_reserve(&pt, b, 1), 0);
            oracle[i] = clear ? 0 : entry_make(kind, random_next(&r) % 8192, random_next(&r) >> 16);
            block_set(b, i, oracle[i]);
            mutex_unlock(&b->lock);
            if (step % 16 == 0 || step < 40)
                check_block(b, oracle);
        }
        check_block(b, oracle);
        pagetable_remove(&pt, b);
    }
}

static void eight_entries_need_no_table(void **state)
{
    (void)state;
    struct block *b = pagetable_get(&pt, OS_BLOCK_SIZE);
    entry_t oracle[PAGES_MAX] = {0};
    uint64_t before = pt.bytes;
    mutex_lock(&b->lock);
    for (unsigned i = 0; i < BLOCK_SPARSE; i++) {
        assert_int_equal(block_reserve(&pt, b, 1), 0);
        block_set(b, i * 63, oracle[i * 63] = entry_make(ENTRY_DEVICE, 1, i));
    }
    assert_null(b->table);
    assert_int_equal(pt.bytes, before);
    block_set(b, 511, 0); /* nothing to clear, and no room: nothing happens */
    check_block(b, oracle);
    assert_int_equal(block_reserve(&pt, b, 1), 0);
    assert_non_null(b->table);
    assert_true(pt.bytes > before);
    check_block(b, oracle);
    mutex_unlock(&b->lock);
    assert_true(sizeof(*b) <= 1024); /* the bound of a sparse block */
}

static void a_wrong_count_is_not_valid(void **state)
{
    (void)state;
    struct block *b = pagetable_get(&pt, OS_BLOCK_SIZE);
    mutex_lock(&b->lock);
    block_set(b, 3, entry_make(ENTRY_DEVICE, 0, 0));
    assert_true(block_is_valid(b));
    b->used++;
    assert_false(block_is_valid(b));
    b->used--;
    b->on_device--;
    assert_false(block_is_valid(b));
    b->on_device++;
    b->base++;
    assert_false(block_is_valid(b));
    b->base--;
    mutex_unlock(&b->lock);
}

/* Every allocation fails in turn: nothing is lost or half made. */
static void running_out_of_memory_changes_nothing(void **state)
{
    (void)state;
    uintptr_t at = (uintptr_t)0x1234567 << 21;
    unsigned failures = 0;
    mem_fail = fail_nth;
    for (long nth = 0;; nth++, failures++) {
        alloc_until_fail = nth;
        struct block *b = pagetable_get(&pt, at);
        if (b)
            break;
        assert_int_equal(pt.blocks, 0);
        assert_null(pagetable_find(&pt, at));
        assert_null(pagetable_next(&pt, 0, UINTPTR_MAX));
    }
    assert_true(failures > 0);
    struct block *b = pagetable_find(&pt, at);
    entry_t oracle[PAGES_MAX] = {0};
    mutex_lock(&b->lock);
    for (unsigned i = 0; i < BLOCK_SPARSE; i++)
        block_set(b, i, oracle[i] = entry_make(ENTRY_FLIGHT, 2, i));
    alloc_until_fail = 0;
    assert_int_equal(block_reserve(&pt, b, 1), -ENOMEM);
    check_block(b, oracle);
    alloc_until_fail = -1;
    assert_int_equal(block_reserve(&pt, b, 1), 0);
    check_block(b, oracle);
    mutex_unlock(&b->lock);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(entries_keep_their_parts),
        TEST(a_block_is_found_by_every_address_in_it),
        TEST(addresses_out_of_reach_have_no_block),
        TEST(walking_meets_every_block_in_order),
        TEST(a_block_is_an_array),
        TEST(eight_entries_need_no_table),
        TEST(a_wrong_count_is_not_valid),
        TEST(running_out_of_memory_changes_nothing),
    };
    return cmocka_run_group_tests_name("pagetable", tests, NULL, NULL);
}
