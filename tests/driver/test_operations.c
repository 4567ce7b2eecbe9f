/* SPDX-License-Identifier: MIT */
/*
 * Operations that go over their operands once, and sort, against naive loops: at all alignments, in all places, across pages and
 * blocks.
 */
#include <math.h>

#include "operations.h"

#define ROOM (5 * MIB)

static const size_t sizes[] = {1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 1023, 4095, 4096, 4097, 12345, 70001};
#define SIZES (sizeof(sizes) / sizeof(sizes[0]))

/* Three arrays in all combinations of places, with plain copies. */
struct arrays {
    struct memory m[3];
    char *copy[3];
};

static struct arrays arrays_new(uint64_t seed, size_t bytes)
{
    struct arrays a;
    for (unsigned i = 0; i < 3; i++) {
        a.m[i] = memory_new((enum place)(seed % PLACES), bytes);
        seed /= PLACES;
        a.copy[i] = malloc(bytes);
        fill_random(a.m[i].p, bytes, seed + i);
        memcpy(a.copy[i], a.m[i].p, bytes);
    }
    return a;
}

static void arrays_settle(hmm_dev dev, struct arrays *a)
{
    for (unsigned i = 0; i < 3; i++)
        memory_settle(dev, &a->m[i]);
}

static void arrays_equal(const struct arrays *a)
{
    for (unsigned i = 0; i < 3; i++)
        if (memcmp(a->m[i].p, a->copy[i], a->m[i].bytes)) {
            size_t at = 0;
            while (a->m[i].p[at] == a->copy[i][at])
                at++;
            fail_msg("array %u in place %u differs at offset %zu", i, a->m[i].place, at);
        }
}

static void arrays_free(struct arrays *a)
{
    for (unsigned i = 0; i < 3; i++) {
        memory_free(&a->m[i]);
        free(a->copy[i]);
    }
}

#define COMBINATIONS (PLACES * PLACES)

/* An offset so that len bytes lie across a page or a block, of every alignment as `step` goes on. */
static size_t somewhere(uint64_t *seed, size_t len, size_t step)
{
    size_t middle = random_next(seed) % 2 ? 2 * MIB : 2 * MIB + 3 * 4096;
    return (middle - len / 2) / 16 * 16 + step % 16;
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

static void copy_between_all_places(void **state)
{
    (void)state;
    uint64_t seed = 1;
    for (unsigned c = 0; c < COMBINATIONS; c++) {
        struct arrays a = arrays_new(c, ROOM);
        arrays_settle(device, &a);
        for (size_t i = 0; i < 3 * SIZES; i++) {
            size_t len = sizes[i % SIZES], to = somewhere(&seed, len, i), from = somewhere(&seed, len, i / 3);
            device_copy(device, a.m[0].p + to, a.m[1].p + from, len);
            memcpy(a.copy[0] + to, a.copy[1] + from, len);
        }
        device_copy(device, a.m[0].p + 17, a.m[1].p + 4096 * 3 - 5, 4 * MIB + 77);
        memcpy(a.copy[0] + 17, a.copy[1] + 4096 * 3 - 5, 4 * MIB + 77);
        arrays_equal(&a);
        arrays_free(&a);
    }
}

static void copy_within_one_array_is_memmove(void **state)
{
    (void)state;
    static const size_t shifts[] = {1, 16, 4095, 4096, 4097, 65536, 100001, 1500000};
    for (unsigned place = 0; place < PLACES; place++) {
        struct arrays a = arrays_new(place, ROOM);
        arrays_settle(device, &a);
        for (size_t i = 0; i < sizeof(shifts) / sizeof(shifts[0]); i++) {
            size_t from = 1 * MIB + 5, len = 2 * MIB + 999;
            device_copy(device, a.m[0].p + from + shifts[i], a.m[0].p + from, len);
            memmove(a.copy[0] + from + shifts[i], a.copy[0] + from, len);
            device_copy(device, a.m[0].p + from - shifts[i] / 2, a.m[0].p + from, len);
            memmove(a.copy[0] + from - shifts[i] / 2, a.copy[0] + from, len);
        }
        arrays_equal(&a);
        arrays_free(&a);
    }
}

static void fill_in_all_places(void **state)
{
    (void)state;
    uint64_t seed = 2;
    for (unsigned place = 0; place < PLACES; place++) {
        struct arrays a = arrays_new(place, ROOM);
        arrays_settle(device, &a);
        for (size_t i = 0; i < 2 * SIZES; i++) {
            size_t len = sizes[i % SIZES], to = somewhere(&seed, len, i);
            device_fill(device, a.m[0].p + to, (uint8_t)i, len);
            memset(a.copy[0] + to, (int)i, len);
        }
        arrays_equal(&a);
        arrays_free(&a);
    }
}

static uint64_t compare(const void *p, const void *q, uint64_t bytes)
{
    return must_operate(device, &(struct hmm_operation){.kind = HMM_OP_COMPARE, .compare = {.a = p, .b = q, .bytes = bytes}});
}

static void compare_finds_the_first_difference(void **state)
{
    (void)state;
    uint64_t seed = 3;
    for (unsigned c = 0; c < COMBINATIONS; c++) {
        struct arrays a = arrays_new(c, ROOM);
        for (size_t i = 0; i < 2 * SIZES; i++) {
            size_t len = sizes[i % SIZES], x = somewhere(&seed, len, i), y = somewhere(&seed, len, i / 2);
            size_t other = random_next(&seed) % len, differs = random_next(&seed) % (other + 1);
            memcpy(a.m[0].p + x, a.m[1].p + y, len);
            if (i % 8 == 0)
                arrays_settle(device, &a);
            assert_int_equal(compare(a.m[0].p + x, a.m[1].p + y, len), len);
            a.m[0].p[x + other] ^= 0x10;
            a.m[0].p[x + differs] ^= 0x01;
            assert_int_equal(compare(a.m[0].p + x, a.m[1].p + y, len), differs);
        }
        arrays_free(&a);
    }
}

static void crc32c_in_all_places(void **state)
{
    (void)state;
    uint64_t seed = 4;
    for (unsigned place = 0; place < PLACES; place++) {
        struct arrays a = arrays_new(place, ROOM);
        arrays_settle(device, &a);
        for (size_t i = 0; i < 2 * SIZES; i++) {
            size_t len = sizes[i % SIZES], at = somewhere(&seed, len, i);
            assert_int_equal(device_crc(device, a.m[0].p + at, len), crc_oracle(a.copy[0] + at, len));
        }
        arrays_free(&a);
    }
}

static void histogram_counts_every_byte(void **state)
{
    (void)state;
    uint64_t seed = 5;
    for (unsigned c = 0; c < COMBINATIONS; c++) {
        struct arrays a = arrays_new(c, ROOM);
        arrays_settle(device, &a);
        for (size_t i = 0; i < SIZES; i++) {
            size_t len = i == 0 ? 3 * MIB + 5 : sizes[i], from = i == 0 ? 3 : somewhere(&seed, len, i);
            size_t to = 2 * MIB - 1000 + i;
            uint64_t counts[256] = {0};
            must_operate(device, &(struct hmm_operation){.kind = HMM_OP_HISTOGRAM,
                                                         .histogram = {.src = a.m[1].p + from,
                                                                       .bytes = len,
                                                                       .counts = (uint64_t *)(void *)(a.m[0].p + to)}});
            for (size_t k = 0; k < len; k++)
                counts[(unsigned char)a.copy[1][from + k]]++;
            memcpy(a.copy[0] + to, counts, sizeof(counts));
        }
        arrays_equal(&a);
        arrays_free(&a);
    }
}

/* ---- saxpy ------------------------------------------------------------------------------------------------------- */

static void fill_floats(char *p, size_t bytes, uint64_t *seed)
{
    for (size_t i = 0; i + sizeof(float) <= bytes; i += sizeof(float)) {
        float x = (float)((double)(int64_t)random_next(seed) / 9e18 * 100);
        memcpy(p + i, &x, sizeof(x));
    }
}

static float float_at(const char *p, size_t i)
{
    float x;
    memcpy(&x, p + i * sizeof(x), sizeof(x));
    return x;
}

/* One rounding of the product and one of the sum. */
static void check_saxpy(float a, float x, float y, float found)
{
    long double product = (long double)a * x, sum = product + y;
    long double bound = ldexpl(fabsl(product), -24) * 1.001L + ldexpl(fabsl(sum), -24) * 1.001L;
    if (fabsl(found - sum) > bound)
        fail_msg("%a * %a + %a gave %a", (double)a, (double)x, (double)y, (double)found);
}

static void saxpy(struct arrays *a, size_t y, const struct memory *from, const char *x_before, size_t x, size_t n, float factor)
{
    must_operate(device, &(struct hmm_operation){.kind = HMM_OP_SAXPY,
                                                 .saxpy = {.x = (const float *)(const void *)(from->p + x),
                                                           .y = (float *)(void *)(a->m[0].p + y),
                                                           .count = n,
                                                           .a = factor}});
    for (size_t i = 0; i < n; i++)
        check_saxpy(factor, float_at(x_before + x, i), float_at(a->copy[0] + y, i), float_at(a->m[0].p + y, i));
    memcpy(a->copy[0] + y, a->m[0].p + y, n * sizeof(float)); /* the rest must be as it was */
}

static void saxpy_is_within_its_bound(void **state)
{
    (void)state;
    uint64_t seed = 6;
    for (unsigned c = 0; c < COMBINATIONS; c++) {
        struct arrays a = arrays_new(c, ROOM);
        for (size_t i = 0; i < SIZES; i++) {
            size_t n = sizes[i], y = somewhere(&seed, n * 4, i), x = somewhere(&seed, n * 4, i * 3);
            fill_floats(a.m[0].p + y, n * 4, &seed);
            fill_floats(a.m[1].p + x, n * 4, &seed);
            memcpy(a.copy[0] + y, a.m[0].p + y, n * 4);
            memcpy(a.copy[1] + x, a.m[1].p + x, n * 4);
            if (i % 8 == 0)
                arrays_settle(device, &a);
            saxpy(&a, y, &a.m[1], a.copy[1], x, n, -1.7f);
        }
        arrays_equal(&a);
        arrays_free(&a);
    }
}

static void saxpy_of_an_array_with_itself(void **state)
{
    (void)state;
    uint64_t seed = 7;
    for (unsigned place = 0; place < PLACES; place++) {
        struct arrays a = arrays_new(place, ROOM);
        fill_floats(a.m[0].p + 7, 4 * MIB, &seed);
        memcpy(a.copy[0], a.m[0].p, ROOM);
        arrays_settle(device, &a);
        saxpy(&a, 7, &a.m[0], a.copy[0], 7, MIB - 3, 0.3f);
        arrays_equal(&a);
        arrays_free(&a);
    }
}

/* ---- sort -------------------------------------------------------------------------------------------------------- */

static int by_u32(const void *p, const void *q)
{
    uint32_t x = *(const uint32_t *)p, y = *(const uint32_t *)q;
    return (x > y) - (x < y);
}

static int by_u64(const void *p, const void *q)
{
    uint64_t x = *(const uint64_t *)p, y = *(const uint64_t *)q;
    return (x > y) - (x < y);
}

static void sort_on_device(hmm_dev dev, void *p, uint64_t count, bool wide)
{
    must_operate(dev, &(struct hmm_operation){.kind = HMM_OP_SORT,
                                              .sort = {.data = p, .count = count, .type = wide ? HMM_U64 : HMM_U32}});
}

/* Sorted beside, where it is aligned. */
static void sort_copy(char *p, size_t count, size_t size)
{
    void *aligned = malloc(count * size);
    memcpy(aligned, p, count * size);
    qsort(aligned, count, size, size == 4 ? by_u32 : by_u64);
    memcpy(p, aligned, count * size);
    free(aligned);
}

static void sort_is_qsort(void **state)
{
    (void)state;
    uint64_t seed = 8;
    for (unsigned place = 0; place < PLACES; place++)
        for (size_t i = place % 2; i < 2 * SIZES; i += 2) {
            size_t count = sizes[i / 2], size = i / 2 % 2 == place / 2 % 2 ? 8 : 4, at = somewhere(&seed, count * size, i);
            struct arrays a = arrays_new(place, ROOM);
            arrays_settle(device, &a);
            sort_on_device(device, a.m[0].p + at, count, size == 8);
            sort_copy(a.copy[0] + at, count, size);
            arrays_equal(&a);
            arrays_free(&a);
        }
}

/* Digits that are all the same are left out: each pattern is another number of passes. */
static void sort_of_numbers_with_constant_digits(void **state)
{
    (void)state;
    static const uint64_t masks[] = {
        0, 0xff, 0xff00, 0xffff, 0xff0000ff, 0xffffff, ~0ull, 0xff00ff00ull, 0xff000000ff00ull, 0xff00000000ull, 1, 1ull << 63};
    uint64_t seed = 9;
    for (size_t i = 0; i < sizeof(masks) / sizeof(masks[0]); i++)
        for (size_t size = 4; size <= 8; size += 4) {
            size_t count = 30000, bytes = count * size;
            char *p = map_pages(bytes + 4096), *copy = malloc(bytes);
            for (size_t k = 0; k < count; k++) {
                uint64_t number = (random_next(&seed) & masks[i]) | (0x1234567812345678ull & ~masks[i]);
                memcpy(p + 8 + k * size, &number, size);
            }
            memcpy(copy, p + 8, bytes);
            sort_on_device(device, p + 8, count, size == 8);
            sort_copy(copy, count, size);
            assert_memory_equal(p + 8, copy, bytes);
            free(copy);
            unmap_pages(p, bytes + 4096);
        }
}

/* ---- more than the device has ------------------------------------------------------------------------------------- */

static void operands_that_push_each_other_out(void **state)
{
    (void)state;
    static const char *const memories[] = {"memory=64K,engines=1", "memory=1M"};
    for (unsigned i = 0; i < 2; i++) {
        hmm_dev dev = open_with(memories[i]);
        struct arrays a = arrays_new(IN_SYSTEM, ROOM);
        device_copy(dev, a.m[0].p + 3, a.m[1].p + 77, 4 * MIB);
        memcpy(a.copy[0] + 3, a.copy[1] + 77, 4 * MIB);
        arrays_equal(&a);
        uint64_t counts[256] = {0}, found[256];
        must_operate(dev, &(struct hmm_operation){.kind = HMM_OP_HISTOGRAM,
                                                  .histogram = {.src = a.m[1].p, .bytes = ROOM, .counts = found}});
        for (size_t k = 0; k < ROOM; k++)
            counts[(unsigned char)a.copy[1][k]]++;
        assert_memory_equal(found, counts, sizeof(counts));
        size_t count = i ? 300001 : 20001; /* more than there is room for: nearly every line that is written is a fault */
        sort_on_device(dev, a.m[2].p + 4, count, false);
        sort_copy(a.copy[2] + 4, count, 4);
        arrays_equal(&a);
        arrays_free(&a);
        close_device(dev);
    }
}

/* ---- while others use the memory ---------------------------------------------------------------------------------- */

/* Pages are called home all the time while operations use them. */
static void a_cpu_that_reads_does_not_disturb(void **state)
{
    (void)state;
    struct arrays a = arrays_new(ON_DEVICE, ROOM);
    struct touching first, second;
    touching_begin(&first, a.m[0].p, ROOM);
    touching_begin(&second, a.m[1].p, ROOM);
    for (unsigned i = 0; i < 8; i++) {
        device_copy(device, a.m[0].p + i, a.m[1].p + 5, 4 * MIB);
        memcpy(a.copy[0] + i, a.copy[1] + 5, 4 * MIB);
        assert_int_equal(device_crc(device, a.m[0].p, ROOM), crc_oracle(a.copy[0], ROOM));
        sort_on_device(device, a.m[1].p + 8 * i, 300000, true);
        sort_copy(a.copy[1] + 8 * i, 300000, 8);
        assert_int_equal(compare(a.m[1].p, a.copy[1], ROOM), ROOM);
    }
    touching_end(&first);
    touching_end(&second);
    arrays_equal(&a);
    arrays_free(&a);
}

/* What the CPU writes beside the operand, in the same pages, stays. */
static void a_cpu_that_writes_beside_is_not_overwritten(void **state)
{
    (void)state;
    for (unsigned place = 0; place < PLACES; place++) {
        struct arrays a = arrays_new(place, ROOM);
        arrays_settle(device, &a);
        for (unsigned i = 1; i <= 60; i++) {
            hmm_fence *fence = NULL;
            assert_int_equal(hmm_job_fill(device, a.m[0].p + 4096 + 1, (uint8_t)i, 4094, &fence), 0);
            for (unsigned k = 0; k < 50; k++) {
                a.m[0].p[4096] = (char)(i + k);
                a.m[0].p[2 * 4096 - 1] = (char)(i + k);
            }
            must(fence);
            assert_int_equal(a.m[0].p[4096], (char)(i + 49));
            assert_int_equal(a.m[0].p[2 * 4096 - 1], (char)(i + 49));
            assert_int_equal(a.m[0].p[4096 + 1], (char)i);
            assert_int_equal(a.m[0].p[2 * 4096 - 2], (char)i);
        }
        arrays_free(&a);
    }
}

/* Numbers that change while they are sorted: the result is any, but nothing else may be hit. */
static void numbers_that_change_while_they_are_sorted(void **state)
{
    (void)state;
    struct arrays a = arrays_new(IN_SYSTEM, ROOM);
    for (unsigned i = 0; i < 6; i++) {
        struct hmm_operation sort = {.kind = HMM_OP_SORT,
                                     .sort = {.data = a.m[0].p + 4096, .count = 3 * MIB / 8, .type = HMM_U64}};
        hmm_fence *fence = submit_operation(device, &sort);
        for (size_t at = 4096; at < 3 * MIB; at += 512)
            memset(a.m[0].p + at, i % 2 ? 0xff : 0, 512);
        must(fence);
        assert_memory_equal(a.m[0].p, a.copy[0], 4096);
        assert_memory_equal(a.m[0].p + 4096 + 3 * MIB, a.copy[0] + 4096 + 3 * MIB, ROOM - 4096 - 3 * MIB);
    }
    arrays_free(&a);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(copy_between_all_places),
        TEST(copy_within_one_array_is_memmove),
        TEST(fill_in_all_places),
        TEST(compare_finds_the_first_difference),
        TEST(crc32c_in_all_places),
        TEST(histogram_counts_every_byte),
        TEST(saxpy_is_within_its_bound),
        TEST(saxpy_of_an_array_with_itself),
        TEST(sort_is_qsort),
        TEST(sort_of_numbers_with_constant_digits),
        TEST_WITHOUT_DEVICE(operands_that_push_each_other_out),
        TEST(a_cpu_that_reads_does_not_disturb),
        TEST(a_cpu_that_writes_beside_is_not_overwritten),
        TEST(numbers_that_change_while_they_are_sorted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
