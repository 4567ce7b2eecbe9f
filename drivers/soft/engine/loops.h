/* SPDX-License-Identifier: MIT */
/*
 * What operations do to memory, once they have it: over plain pointers of any alignment. They know nothing of engines, so that a
 * benchmark can run them on plain memory, too.
 *
 * Vectors are of 16 bytes and portable (GNU C); the same source for every processor.
 */
#ifndef HMM_SOFT_LOOPS_H
#define HMM_SOFT_LOOPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Of any alignment, and may alias anything. */
typedef uint32_t any_u32 __attribute__((aligned(1), may_alias));
typedef uint64_t any_u64 __attribute__((aligned(1), may_alias));
typedef float any_f32 __attribute__((aligned(1), may_alias));
typedef double any_f64 __attribute__((aligned(1), may_alias));

/* One load: the compiler may not look again, when the program changes it meanwhile. size: 4 or 8. */
static inline __attribute__((always_inline)) uint64_t loop_load(const void *p, unsigned size)
{
    return size == 4 ? *(const volatile any_u32 *)p : *(const volatile any_u64 *)p;
}

/* ---- loops.c ----------------------------------------------------------------------------------------------------- */

/* Large copies do not go through the caches, in which they would only push out what is used. */
#define LOOP_COPY_LARGE ((uint64_t)4 << 20)

/* memcpy() for a part of a large copy. */
void loop_copy_large(void *to, const void *from, size_t n);
/* Offset of the first byte that differs, or n. */
size_t loop_compare(const void *a, const void *b, size_t n);
/* y[i] = a * x[i] + y[i]; x may be y. */
void loop_saxpy(any_f32 *y, const any_f32 *x, size_t n, float a);

/* In four parts, of which the sum is the result: bytes of the same value do not wait for each other. */
struct loop_histogram {
    uint64_t part[4][256];
};
void loop_histogram(struct loop_histogram *h, const void *p, size_t n);

/* ---- crc32c.c ---------------------------------------------------------------------------------------------------- */

/* CRC-32C of len bytes after those that gave crc; begins with 0. */
uint32_t loop_crc32c(uint32_t crc, const void *data, size_t len);
/* The same without the processor's instruction. */
uint32_t loop_crc32c_table(uint32_t crc, const void *data, size_t len);

/* ---- loops_reduce.c ---------------------------------------------------------------------------------------------- */

enum loop_type { LOOP_I32, LOOP_I64, LOOP_U32, LOOP_U64, LOOP_F32, LOOP_F64, LOOP_TYPES };
enum loop_how { LOOP_SUM, LOOP_MIN, LOOP_MAX, LOOP_HOWS };

#define LOOP_LANES 16

/* A reduction under way. Which fields are used depends on the type. */
struct loop_reduction {
    uint64_t sum;
    int64_t best_signed;
    uint64_t best_unsigned;
    double best;
    bool nan, positive, negative; /* were there any */
    double lanes[LOOP_LANES];     /* element i is added to lane i % LOOP_LANES */
};

void loop_reduce_begin(struct loop_reduction *r, enum loop_how how);
/* Elements [first, first + n) of the whole; to be called in ascending order. */
void loop_reduce(struct loop_reduction *r, enum loop_type type, enum loop_how how, uint64_t first, const void *p, size_t n);
/* As hmm_op_reduce says. */
uint64_t loop_reduce_end(const struct loop_reduction *r, enum loop_type type, enum loop_how how);

/* ---- loops_gemm.c ------------------------------------------------------------------------------------------------ */

/* The blocks that are multiplied at once, so that they stay in the caches; multiples of the tile's sides. */
#define LOOP_GEMM_M 128
#define LOOP_GEMM_N 512
#define LOOP_GEMM_K 256
#define LOOP_TILE_M 4
#define LOOP_TILE_N 8

static inline size_t loop_round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

/* Row i of a block of a, k long, into its place; the packed block has room for rows rounded up to LOOP_TILE_M. What is in the room
 * beyond the rows is multiplied, too, but goes only to room beyond the product. */
void loop_gemm_pack_a(float *packed, size_t i, const any_f32 *row, size_t k);
/* Row p of a block of b with k rows, n long; the same for columns and LOOP_TILE_N. */
void loop_gemm_pack_b(float *packed, size_t p, size_t k, const any_f32 *row, size_t n);
/* product = a * b, of packed blocks; product has stride LOOP_GEMM_N and room for rounded sides. */
void loop_gemm_multiply(float *product, const float *a, const float *b, size_t m, size_t n, size_t k);
/* Part of a row: c = alpha * product + beta * c; with beta 0 c is not read. */
void loop_gemm_update(any_f32 *c, const float *product, size_t n, float alpha, float beta);

#endif
