/* SPDX-License-Identifier: MIT */
/*
 * Products of blocks of matrices, after Goto and van de Geijn (ACM TOMS 34, 2008): a block of a and one of b are packed in the order
 * in which tiles of the product use them, so that the innermost loop reads both straight on.
 */
#include "loops.h"

typedef float f32x4 __attribute__((vector_size(16), may_alias));
typedef float any_f32x4 __attribute__((vector_size(16), aligned(1), may_alias)); /* of any alignment */

void loop_gemm_pack_a(float *packed, size_t i, const any_f32 *row, size_t k)
{
    float *to = packed + i / LOOP_TILE_M * LOOP_TILE_M * k + i % LOOP_TILE_M;
    for (size_t p = 0; p < k; p++)
        to[p * LOOP_TILE_M] = row[p];
}

void loop_gemm_pack_b(float *packed, size_t p, size_t k, const any_f32 *row, size_t n)
{
    for (size_t j = 0; j < n; j += LOOP_TILE_N) {
        float *to = packed + j * k + p * LOOP_TILE_N;
        memcpy(to, row + j, (n - j < LOOP_TILE_N ? n - j : LOOP_TILE_N) * sizeof(float));
    }
}

/* 4 rows of 8: eight vectors, which stay in registers. */
static void tile(float *product, const float *a, const float *b, size_t k)
{
    f32x4 c00 = {0}, c01 = {0}, c10 = {0}, c11 = {0}, c20 = {0}, c21 = {0}, c30 = {0}, c31 = {0};
    for (size_t p = 0; p < k; p++, a += LOOP_TILE_M, b += LOOP_TILE_N) {
        f32x4 b0 = *(const any_f32x4 *)b, b1 = *(const any_f32x4 *)(b + 4);
        c00 += a[0] * b0;
        c01 += a[0] * b1;
        c10 += a[1] * b0;
        c11 += a[1] * b1;
        c20 += a[2] * b0;
        c21 += a[2] * b1;
        c30 += a[3] * b0;
        c31 += a[3] * b1;
    }
    any_f32x4 *row = (any_f32x4 *)product;
    row[0] = c00;
    row[1] = c01;
    row = (any_f32x4 *)(product + LOOP_GEMM_N);
    row[0] = c10;
    row[1] = c11;
    row = (any_f32x4 *)(product + (size_t)2 * LOOP_GEMM_N);
    row[0] = c20;
    row[1] = c21;
    row = (any_f32x4 *)(product + (size_t)3 * LOOP_GEMM_N);
    row[0] = c30;
    row[1] = c31;
}

void loop_gemm_multiply(float *product, const float *a, const float *b, size_t m, size_t n, size_t k)
{
    for (size_t j = 0; j < n; j += LOOP_TILE_N)
        for (size_t i = 0; i < m; i += LOOP_TILE_M)
            tile(product + i * LOOP_GEMM_N + j, a + i * k, b + j * k, k);
}

void loop_gemm_update(any_f32 *c, const float *product, size_t n, float alpha, float beta)
{
    f32x4 by = {alpha, alpha, alpha, alpha}, keep = {beta, beta, beta, beta};
    any_f32x4 *to = (any_f32x4 *)c;
    const any_f32x4 *row = (const any_f32x4 *)product;
    size_t j = 0;
    for (; n - j >= 4; j += 4) {
        f32x4 sum = by * row[j / 4];
        if (beta != 0)
            sum += keep * to[j / 4];
        to[j / 4] = sum;
    }
    for (; j < n; j++)
        c[j] = beta == 0 ? alpha * product[j] : alpha * product[j] + beta * c[j];
}
