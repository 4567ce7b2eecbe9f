/* SPDX-License-Identifier: MIT */
/*
 * Reductions; the order of floating sums is part of the interface (hmm_op_reduce). See loops.h.
 *
 * The smallest and largest of floating numbers are found with ordinary comparisons, for which -0 is 0 and a NaN nothing. Whether
 * there was a NaN is kept beside, and so is whether there were numbers with and without a minus: if the smallest is 0, any minus was
 * that of -0; if the largest is 0, any number without a minus was +0.
 */
#include "loops.h"

#include <math.h>

typedef float f32x4 __attribute__((vector_size(16), aligned(1), may_alias));
typedef double f64x2 __attribute__((vector_size(16), aligned(1), may_alias));
typedef float f32x2 __attribute__((vector_size(8), aligned(1), may_alias));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int64_t i64x2 __attribute__((vector_size(16)));
typedef int32_t any_i32 __attribute__((aligned(1), may_alias));
typedef int64_t any_i64 __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* ---- integers ---------------------------------------------------------------------------------------------------- */

/* Four at a time, so that none waits for the one before. */
#define SUM(name, type)                                                                                                        \
    static uint64_t sum_##name(const type *p, size_t n)                                                                        \
    {                                                                                                                          \
        uint64_t a = 0, b = 0, c = 0, d = 0;                                                                                   \
        size_t i = 0;                                                                                                          \
        for (; n - i >= 4; i += 4) {                                                                                           \
            a += (uint64_t)p[i];                                                                                               \
            b += (uint64_t)p[i + 1];                                                                                           \
            c += (uint64_t)p[i + 2];                                                                                           \
            d += (uint64_t)p[i + 3];                                                                                           \
        }                                                                                                                      \
        for (; i < n; i++)                                                                                                     \
            a += (uint64_t)p[i];                                                                                               \
        return a + b + c + d;                                                                                                  \
    }
SUM(i32, any_i32)
SUM(i64, any_i64)
SUM(u32, any_u32)
SUM(u64, any_u64)

#define BETTER(a, b, max) ((max) ? ((a) > (b) ? (a) : (b)) : ((a) < (b) ? (a) : (b)))
#define BEST(name, type, wide)                                                                                                 \
    INLINE wide best_##name(wide best, const type *p, size_t n, bool max)                                                      \
    {                                                                                                                          \
        wide a = best, b = best, c = best, d = best;                                                                           \
        size_t i = 0;                                                                                                          \
        for (; n - i >= 4; i += 4) {                                                                                           \
            wide w = p[i], x = p[i + 1], y = p[i + 2], z = p[i + 3];                                                           \
            a = BETTER(a, w, max);                                                                                             \
            b = BETTER(b, x, max);                                                                                             \
            c = BETTER(c, y, max);                                                                                             \
            d = BETTER(d, z, max);                                                                                             \
        }                                                                                                                      \
        for (; i < n; i++) {                                                                                                   \
            wide w = p[i];                                                                                                     \
            a = BETTER(a, w, max);                                                                                             \
        }                                                                                                                      \
        a = BETTER(a, b, max);                                                                                                 \
        c = BETTER(c, d, max);                                                                                                 \
        return BETTER(a, c, max);                                                                                              \
    }
BEST(i32, any_i32, int64_t)
BEST(i64, any_i64, int64_t)
BEST(u32, any_u32, uint64_t)
BEST(u64, any_u64, uint64_t)

/* ---- sums of floating numbers ------------------------------------------------------------------------------------ */

/* All lanes, from lane 0 on: 16 elements at a time. Returns how many are done. */
static size_t sum_lanes_f64(double *lanes, const any_f64 *p, size_t n)
{
    f64x2 a[LOOP_LANES / 2];
    size_t i = 0;
    memcpy(a, lanes, sizeof(a));
    for (; n - i >= LOOP_LANES; i += LOOP_LANES) {
        const f64x2 *v = (const f64x2 *)(p + i);
        a[0] += v[0];
        a[1] += v[1];
        a[2] += v[2];
        a[3] += v[3];
        a[4] += v[4];
        a[5] += v[5];
        a[6] += v[6];
        a[7] += v[7];
    }
    memcpy(lanes, a, sizeof(a));
    return i;
}

static size_t sum_lanes_f32(double *lanes, const any_f32 *p, size_t n)
{
    f64x2 a[LOOP_LANES / 2];
    size_t i = 0;
    memcpy(a, lanes, sizeof(a));
    for (; n - i >= LOOP_LANES; i += LOOP_LANES) {
        const f32x2 *v = (const f32x2 *)(p + i);
        a[0] += __builtin_convertvector(v[0], f64x2);
        a[1] += __builtin_convertvector(v[1], f64x2);
        a[2] += __builtin_convertvector(v[2], f64x2);
        a[3] += __builtin_convertvector(v[3], f64x2);
        a[4] += __builtin_convertvector(v[4], f64x2);
        a[5] += __builtin_convertvector(v[5], f64x2);
        a[6] += __builtin_convertvector(v[6], f64x2);
        a[7] += __builtin_convertvector(v[7], f64x2);
    }
    memcpy(lanes, a, sizeof(a));
    return i;
}

INLINE double number(const void *p, size_t i, bool wide)
{
    return wide ? ((const any_f64 *)p)[i] : ((const any_f32 *)p)[i];
}

INLINE void sum_floating(struct loop_reduction *r, uint64_t first, const char *p, size_t n, bool wide)
{
    size_t i = 0, size = wide ? sizeof(double) : sizeof(float);
    for (; i < n && (first + i) % LOOP_LANES; i++)
        r->lanes[(first + i) % LOOP_LANES] += number(p, i, wide);
    if (wide)
        i += sum_lanes_f64(r->lanes, (const any_f64 *)(p + i * size), n - i);
    else
        i += sum_lanes_f32(r->lanes, (const any_f32 *)(p + i * size), n - i);
    for (; i < n; i++)
        r->lanes[(first + i) % LOOP_LANES] += number(p, i, wide);
}

static double add_lanes(const double *l)
{
    return ((l[0] + l[8]) + (l[4] + l[12])) + ((l[2] + l[10]) + (l[6] + l[14])) +
           (((l[1] + l[9]) + (l[5] + l[13])) + ((l[3] + l[11]) + (l[7] + l[15])));
}

/* ---- smallest and largest of floating numbers -------------------------------------------------------------------- */

INLINE void best_one(struct loop_reduction *r, double x, bool max)
{
    r->nan |= x != x;
    r->negative |= !!signbit(x);
    r->positive |= !signbit(x);
    if (max ? x > r->best : x < r->best)
        r->best = x;
}

/* `any` collects the bits of all, `all` those that every one has: of both the sign is looked at. */
#define BEST_FLOATING(name, type, scalar, vector, ints, lanes)                                                                 \
    INLINE void best_##name(struct loop_reduction *r, const type *p, size_t n, bool max)                                       \
    {                                                                                                                          \
        vector best = (vector){0} + (scalar)r->best, best2 = best;                                                             \
        ints any = {0}, all = ~(ints){0}, nan = {0};                                                                           \
        size_t i = 0;                                                                                                          \
        for (; n - i >= 2 * (lanes); i += 2 * (lanes)) {                                                                       \
            vector x = *(const vector *)(p + i), y = *(const vector *)(p + i + (lanes));                                       \
            ints xi = (ints)x, yi = (ints)y;                                                                                   \
            ints x_better = max ? x > best : x < best, y_better = max ? y > best2 : y < best2;                                 \
            best = (vector)((xi & x_better) | ((ints)best & ~x_better));                                                       \
            best2 = (vector)((yi & y_better) | ((ints)best2 & ~y_better));                                                     \
            nan |= (x != x) | (y != y);                                                                                        \
            any |= xi | yi;                                                                                                    \
            all &= xi & yi;                                                                                                    \
        }                                                                                                                      \
        for (unsigned k = 0; i && k < (lanes); k++) {                                                                          \
            r->nan |= nan[k] != 0;                                                                                             \
            r->negative |= any[k] < 0;                                                                                         \
            r->positive |= all[k] >= 0;                                                                                        \
            if (max ? best[k] > r->best : best[k] < r->best)                                                                   \
                r->best = best[k];                                                                                             \
            if (max ? best2[k] > r->best : best2[k] < r->best)                                                                 \
                r->best = best2[k];                                                                                            \
        }                                                                                                                      \
        for (; i < n; i++)                                                                                                     \
            best_one(r, p[i], max);                                                                                            \
    }
BEST_FLOATING(f32, any_f32, float, f32x4, i32x4, 4)
BEST_FLOATING(f64, any_f64, double, f64x2, i64x2, 2)

static double best_floating(const struct loop_reduction *r, bool max)
{
    if (r->nan)
        return NAN;
    if (r->best == 0)
        return (max ? r->positive : !r->negative) ? 0.0 : -0.0;
    return r->best;
}

/* ---- all of them ------------------------------------------------------------------------------------------------- */

INLINE void find_best(struct loop_reduction *r, enum loop_type type, const void *p, size_t n, bool max)
{
    switch (type) {
    case LOOP_I32: r->best_signed = best_i32(r->best_signed, p, n, max); break;
    case LOOP_I64: r->best_signed = best_i64(r->best_signed, p, n, max); break;
    case LOOP_U32: r->best_unsigned = best_u32(r->best_unsigned, p, n, max); break;
    case LOOP_U64: r->best_unsigned = best_u64(r->best_unsigned, p, n, max); break;
    case LOOP_F32: best_f32(r, p, n, max); break;
    default: best_f64(r, p, n, max);
    }
}

static void find_min(struct loop_reduction *r, enum loop_type type, const void *p, size_t n)
{
    find_best(r, type, p, n, false);
}

static void find_max(struct loop_reduction *r, enum loop_type type, const void *p, size_t n)
{
    find_best(r, type, p, n, true);
}

static void add(struct loop_reduction *r, enum loop_type type, uint64_t first, const void *p, size_t n)
{
    switch (type) {
    case LOOP_I32: r->sum += sum_i32(p, n); break;
    case LOOP_I64: r->sum += sum_i64(p, n); break;
    case LOOP_U32: r->sum += sum_u32(p, n); break;
    case LOOP_U64: r->sum += sum_u64(p, n); break;
    case LOOP_F32: sum_floating(r, first, p, n, false); break;
    default: sum_floating(r, first, p, n, true);
    }
}

void loop_reduce_begin(struct loop_reduction *r, enum loop_how how)
{
    bool max = how == LOOP_MAX;
    memset(r, 0, sizeof(*r));
    r->best_signed = max ? INT64_MIN : INT64_MAX;
    r->best_unsigned = max ? 0 : UINT64_MAX;
    r->best = max ? -INFINITY : INFINITY;
}

void loop_reduce(struct loop_reduction *r, enum loop_type type, enum loop_how how, uint64_t first, const void *p, size_t n)
{
    if (how == LOOP_SUM)
        add(r, type, first, p, n);
    else if (how == LOOP_MIN)
        find_min(r, type, p, n);
    else
        find_max(r, type, p, n);
}

uint64_t loop_reduce_end(const struct loop_reduction *r, enum loop_type type, enum loop_how how)
{
    union {
        double number;
        uint64_t bits;
    } u;
    bool floating = type == LOOP_F32 || type == LOOP_F64, is_unsigned = type == LOOP_U32 || type == LOOP_U64;
    if (!floating)
        return how == LOOP_SUM ? r->sum : is_unsigned ? r->best_unsigned : (uint64_t)r->best_signed;
    u.number = how == LOOP_SUM ? add_lanes(r->lanes) : best_floating(r, how == LOOP_MAX);
    if (type == LOOP_F32)
        u.number = (float)u.number;
    return u.bits;
}
