/* SPDX-License-Identifier: MIT */
/*
 * Reductions and products of matrices: against the order and the bounds that the interface states, in all places. The sum is computed
 * here as <hmm/hmm.h> says it, element by element, and must agree in every bit.
 */
#include <math.h>

#include "operations.h"

#define ROOM (5 * MIB)

static const size_t counts[] = {1, 2, 7, 15, 16, 17, 31, 33, 100, 1023, 4096, 33333, 400001};
#define COUNTS (sizeof(counts) / sizeof(counts[0]))

static struct hmm_fence_info reduce(const void *src, uint64_t count, enum hmm_type type, enum hmm_reduction how)
{
    struct hmm_operation o = {.kind = HMM_OP_REDUCE, .reduce = {.src = src, .count = count, .type = type, .how = how}};
    struct hmm_fence_info info = finish(submit_operation(device, &o));
    if (info.status)
        fail_msg("reduce: %d, %s", info.status, info.message);
    return info;
}

/* ---- integers ---------------------------------------------------------------------------------------------------- */

static size_t size_of(enum hmm_type type)
{
    return type == HMM_I32 || type == HMM_U32 || type == HMM_F32 ? 4 : 8;
}

static uint64_t integer_at(const char *p, size_t i, enum hmm_type type)
{
    int32_t narrow;
    uint64_t wide = 0;
    memcpy(&narrow, p + i * size_of(type), 4);
    if (size_of(type) == 8)
        memcpy(&wide, p + i * 8, 8);
    return size_of(type) == 8 ? wide : type == HMM_I32 ? (uint64_t)narrow : (uint32_t)narrow;
}

static uint64_t reduce_integers(const char *p, size_t n, enum hmm_type type, enum hmm_reduction how)
{
    bool with_sign = type == HMM_I32 || type == HMM_I64;
    uint64_t result = integer_at(p, 0, type);
    for (size_t i = 1; i < n; i++) {
        uint64_t x = integer_at(p, i, type);
        bool less = with_sign ? (int64_t)x < (int64_t)result : x < result;
        if (how == HMM_SUM)
            result += x;
        else if (how == HMM_MIN ? less : !less)
            result = x;
    }
    return result;
}

static const enum hmm_type integers[] = {HMM_I32, HMM_I64, HMM_U32, HMM_U64};

static void integers_in_all_places(void **state)
{
    (void)state;
    for (unsigned place = 0; place < PLACES; place++) {
        struct memory m = memory_new((enum place)place, ROOM);
        char *copy = malloc(ROOM);
        fill_random(m.p, ROOM, place);
        memcpy(copy, m.p, ROOM);
        memory_settle(device, &m);
        for (size_t i = 0; i < COUNTS; i++)
            for (unsigned t = 0; t < 4; t++)
                for (enum hmm_reduction how = HMM_SUM; how <= HMM_MAX; how++) {
                    size_t at = 2 * MIB - counts[i] * 2 + i + 4 * t;
                    assert_int_equal(reduce(m.p + at, counts[i], integers[t], how).result,
                                     reduce_integers(copy + at, counts[i], integers[t], how));
                }
        free(copy);
        memory_free(&m);
    }
}

/* The wanted number alone among others, at each place of a vector and of what is left over. */
static void extremes_are_found_wherever_they_are(void **state)
{
    (void)state;
    char *p = map_pages(4096);
    for (size_t n = 1; n <= 40; n++)
        for (size_t at = 0; at < n; at++)
            for (unsigned t = 0; t < 4; t++) {
                size_t size = size_of(integers[t]);
                memset(p, 0, 4096);
                memset(p + at * size, 0xff, size);
                bool with_sign = t < 2;
                uint64_t ones = with_sign ? UINT64_MAX : size == 4 ? UINT32_MAX : UINT64_MAX;
                assert_int_equal(reduce(p, n, integers[t], HMM_MIN).result, with_sign || n == 1 ? ones : 0);
                assert_int_equal(reduce(p, n, integers[t], HMM_MAX).result, with_sign && n > 1 ? 0 : ones);
            }
    unmap_pages(p, 4096);
}

/* ---- floating numbers -------------------------------------------------------------------------------------------- */

static double floating_at(const char *p, size_t i, enum hmm_type type)
{
    float narrow;
    double wide;
    memcpy(&narrow, p + i * size_of(type), 4);
    if (type == HMM_F32)
        return (double)narrow;
    memcpy(&wide, p + i * 8, 8);
    return wide;
}

static void put_floating(char *p, size_t i, enum hmm_type type, double x)
{
    float narrow = (float)x;
    if (type == HMM_F32)
        memcpy(p + i * 4, &narrow, 4);
    else
        memcpy(p + i * 8, &x, 8);
}

static double sum_as_stated(const char *p, size_t n, enum hmm_type type)
{
    double l[16] = {0};
    for (size_t i = 0; i < n; i++)
        l[i % 16] += floating_at(p, i, type);
    double even = ((l[0] + l[8]) + (l[4] + l[12])) + ((l[2] + l[10]) + (l[6] + l[14]));
    double odd = ((l[1] + l[9]) + (l[5] + l[13])) + ((l[3] + l[11]) + (l[7] + l[15]));
    return type == HMM_F32 ? (double)(float)(even + odd) : even + odd;
}

static bool same_bits(double x, double y)
{
    return memcmp(&x, &y, sizeof(x)) == 0;
}

static void check_bound(const char *p, size_t n, enum hmm_type type, double found)
{
    long double exact = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        exact += floating_at(p, i, type);
        size += fabsl(floating_at(p, i, type));
    }
    long double bound = ((long double)n / 16 + 4) * ldexpl(size, -53);
    if (type == HMM_F32)
        bound += ldexpl(fabsl(exact) + bound, -24);
    /* the oracle rounds, too: to 64 bits */
    bound += (long double)n * ldexpl(size, -64);
    assert_true(fabsl(found - exact) <= bound);
}

static void sums_have_the_stated_order_in_all_places(void **state)
{
    (void)state;
    uint64_t seed = 1;
    for (unsigned place = 0; place < PLACES; place++)
        for (enum hmm_type type = HMM_F32; type <= HMM_F64; type++) {
            struct memory m = memory_new((enum place)place, ROOM);
            char *copy = malloc(ROOM);
            for (size_t i = 0; i < COUNTS; i++) {
                size_t n = counts[i], at = 2 * MIB - n * 4 + (i * 3 + place) % 16;
                for (size_t k = 0; k < n; k++)
                    put_floating(m.p + at, k, type, ldexp((double)(int64_t)random_next(&seed), (int)(k % 40) - 60));
                memcpy(copy + at, m.p + at, n * size_of(type));
                memory_settle(device, &m);
                struct hmm_fence_info info = reduce(m.p + at, n, type, HMM_SUM);
                double found = hmm_result_double(&info);
                if (!same_bits(found, sum_as_stated(copy + at, n, type)))
                    fail_msg("%zu numbers at %zu in place %u: %a, not %a", n, at, place, found,
                             sum_as_stated(copy + at, n, type));
                check_bound(copy + at, n, type, found);
            }
            free(copy);
            memory_free(&m);
        }
}

static void check_extremes(char *p, size_t n, enum hmm_type type, double min, double max)
{
    struct hmm_fence_info low = reduce(p, n, type, HMM_MIN), high = reduce(p, n, type, HMM_MAX);
    double found_min = hmm_result_double(&low), found_max = hmm_result_double(&high);
    if (isnan(min))
        assert_true(isnan(found_min) && isnan(found_max));
    else if (!same_bits(found_min, min) || !same_bits(found_max, max))
        fail_msg("%zu numbers: %a to %a, not %a to %a", n, found_min, found_max, min, max);
}

static void extremes_of_floating_numbers(void **state)
{
    (void)state;
    static const struct {
        double others, one, min, max;
    } cases[] = {
        {1, -3, -3, 1},
        {1, 7, 1, 7},
        {0.0, -0.0, -0.0, 0.0},
        {-0.0, 0.0, -0.0, 0.0},
        {-0.0, -0.0, -0.0, -0.0},
        {0.0, 0.0, 0.0, 0.0},
        {-1, -0.0, -1, -0.0},
        {-1, 0.0, -1, 0.0},
        {1, -0.0, -0.0, 1},
        {1, 0.0, 0.0, 1},
        {2, INFINITY, 2, INFINITY},
        {2, -INFINITY, -INFINITY, 2},
        {INFINITY, INFINITY, INFINITY, INFINITY},
        {-INFINITY, -INFINITY, -INFINITY, -INFINITY},
        {5, NAN, NAN, NAN},
        {-INFINITY, NAN, NAN, NAN},
        {NAN, NAN, NAN, NAN},
        {1, 0x1p-1074, 0, 0}, /* replaced by the smallest number of the type */
    };
    char *p = map_pages(4096);
    for (enum hmm_type type = HMM_F32; type <= HMM_F64; type++)
        for (unsigned c = 0; c < sizeof(cases) / sizeof(cases[0]); c++)
            for (size_t n = 2; n <= 35; n += 3)
                for (size_t at = 0; at < n; at += 1 + at / 16) {
                    double tiny = type == HMM_F32 ? 0x1p-149 : 0x1p-1074;
                    bool small = cases[c].one == 0x1p-1074;
                    for (size_t k = 0; k < n; k++)
                        put_floating(p + n % 5, k, type, cases[c].others);
                    put_floating(p + n % 5, at, type, small ? tiny : cases[c].one);
                    check_extremes(p + n % 5, n, type, small ? tiny : cases[c].min, small ? 1 : cases[c].max);
                }
    unmap_pages(p, 4096);
}

static void sums_of_infinities_and_nan(void **state)
{
    (void)state;
    char *p = map_pages(4096);
    for (enum hmm_type type = HMM_F32; type <= HMM_F64; type++)
        for (size_t at = 0; at < 50; at++) {
            for (size_t k = 0; k < 50; k++)
                put_floating(p, k, type, 1);
            put_floating(p, at, type, INFINITY);
            struct hmm_fence_info one = reduce(p, 50, type, HMM_SUM);
            assert_true(isinf(hmm_result_double(&one)));
            put_floating(p, (at + 16) % 50, type, -INFINITY);
            struct hmm_fence_info both = reduce(p, 50, type, HMM_SUM);
            assert_true(isnan(hmm_result_double(&both)));
            put_floating(p, at, type, NAN);
            put_floating(p, (at + 16) % 50, type, 0);
            struct hmm_fence_info nan = reduce(p, 50, type, HMM_SUM);
            assert_true(isnan(hmm_result_double(&nan)));
        }
    unmap_pages(p, 4096);
}

/* ---- products of matrices ---------------------------------------------------------------------------------------- */

struct product {
    uint32_t m, n, k, lda, ldb, ldc;
    float alpha, beta;
};

static const struct product products[] = {
    {1, 1, 1, 0, 0, 0, 1, 0},
    {3, 5, 7, 0, 0, 0, 1, 1},
    {4, 8, 16, 0, 0, 0, 2, -1},
    {17, 9, 33, 40, 11, 10, -0.5f, 3},
    {129, 70, 300, 0, 0, 0, 1, 0},
    {65, 515, 17, 0, 600, 0, 1.5f, 0.25f},
    {130, 33, 520, 521, 0, 40, 1, 0.5f},
    {1, 1000, 3, 0, 0, 0, 1, 1},
    {1000, 1, 3, 0, 0, 0, 1, 1},
    {5, 6, 700, 0, 0, 0, 1, -1},
    {200, 1030, 257, 0, 0, 0, 1, 0},
    {8, 8, 8, 0, 0, 0, 0, 1},
};
#define PRODUCTS (sizeof(products) / sizeof(products[0]))

static float float_at(const char *p, size_t i)
{
    return (float)floating_at(p, i, HMM_F32);
}

static size_t matrix_bytes(uint32_t rows, uint32_t stride, uint32_t columns)
{
    return ((size_t)(rows - 1) * (stride ? stride : columns) + columns) * sizeof(float);
}

static void check_product(const struct product *g, const char *a, const char *b, const char *c, const char *found)
{
    size_t lda = g->lda ? g->lda : g->k, ldb = g->ldb ? g->ldb : g->n, ldc = g->ldc ? g->ldc : g->n;
    for (size_t i = 0; i < g->m; i++)
        for (size_t j = 0; j < g->n; j++) {
            double exact = 0, size = 0, old = g->beta == 0 ? 0 : (double)g->beta * (double)float_at(c, i * ldc + j);
            for (size_t p = 0; p < g->k; p++) {
                double x = (double)float_at(a, i * lda + p) * (double)float_at(b, p * ldb + j);
                exact += x;
                size += fabs(x);
            }
            exact = (double)g->alpha * exact + old;
            size = fabs((double)g->alpha) * size + fabs(old);
            if (!(fabs((double)float_at(found, i * ldc + j) - exact) <= (g->k + 3) * ldexp(size, -24) + 0x1p-126))
                fail_msg("element %zu, %zu of %u x %u x %u is %a, not %a", i, j, g->m, g->n, g->k,
                         (double)float_at(found, i * ldc + j), exact);
        }
}

/* What lies between rows and around c must stay. */
static void check_beside(const struct product *g, const char *before, const char *after, size_t at, size_t bytes)
{
    size_t ldc = g->ldc ? g->ldc : g->n;
    assert_memory_equal(before, after, at);
    for (size_t i = 0; i + 1 < g->m; i++)
        assert_memory_equal(before + at + (i * ldc + g->n) * 4, after + at + (i * ldc + g->n) * 4, (ldc - g->n) * 4);
    size_t end = at + matrix_bytes(g->m, g->ldc, g->n);
    assert_memory_equal(before + end, after + end, bytes - end);
}

static void gemm(hmm_dev dev, const struct product *g, unsigned seed)
{
    struct memory m[3];
    char *copy[3];
    size_t at[3],
        bytes[3] = {matrix_bytes(g->m, g->lda, g->k), matrix_bytes(g->k, g->ldb, g->n), matrix_bytes(g->m, g->ldc, g->n)};
    uint64_t random = seed;
    for (unsigned i = 0; i < 3; i++) {
        m[i] = memory_new((enum place)(seed % PLACES), ROOM);
        seed = seed / PLACES + i;
        at[i] = 2 * MIB - bytes[i] / 2 / 16 * 16 + random_next(&random) % 16;
        for (size_t k = 0; k < bytes[i] / 4; k++)
            put_floating(m[i].p + at[i], k, HMM_F32, (double)(int64_t)random_next(&random) / 9e18);
        if (i == 2 && g->beta == 0)
            memset(m[i].p, 0xff, ROOM); /* NaN: must not be read */
        copy[i] = malloc(ROOM);
        memcpy(copy[i], m[i].p, ROOM);
        memory_settle(dev, &m[i]);
    }
    must_operate(dev, &(struct hmm_operation){.kind = HMM_OP_GEMM,
                                              .gemm = {.a = (const float *)(const void *)(m[0].p + at[0]),
                                                       .b = (const float *)(const void *)(m[1].p + at[1]),
                                                       .c = (float *)(void *)(m[2].p + at[2]),
                                                       .m = g->m,
                                                       .n = g->n,
                                                       .k = g->k,
                                                       .lda = g->lda,
                                                       .ldb = g->ldb,
                                                       .ldc = g->ldc,
                                                       .alpha = g->alpha,
                                                       .beta = g->beta}});
    check_product(g, copy[0] + at[0], copy[1] + at[1], copy[2] + at[2], m[2].p + at[2]);
    check_beside(g, copy[2], m[2].p, at[2], ROOM);
    assert_memory_equal(m[0].p, copy[0], ROOM);
    assert_memory_equal(m[1].p, copy[1], ROOM);
    for (unsigned i = 0; i < 3; i++) {
        memory_free(&m[i]);
        free(copy[i]);
    }
}

static void products_are_within_their_bound(void **state)
{
    (void)state;
    for (unsigned i = 0; i < PRODUCTS; i++)
        for (unsigned seed = i; seed < PLACES * PLACES * PLACES; seed += 47)
            gemm(device, &products[i], seed);
}

static void products_larger_than_the_device(void **state)
{
    (void)state;
    hmm_dev dev = open_with("memory=256K");
    gemm(dev, &(struct product){150, 600, 300, 0, 0, 0, 1, 1}, 0);
    close_device(dev);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(integers_in_all_places),
        TEST(extremes_are_found_wherever_they_are),
        TEST(sums_have_the_stated_order_in_all_places),
        TEST(extremes_of_floating_numbers),
        TEST(sums_of_infinities_and_nan),
        TEST(products_are_within_their_bound),
        TEST_WITHOUT_DEVICE(products_larger_than_the_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
