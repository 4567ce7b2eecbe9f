/* SPDX-License-Identifier: MIT */
/* Products of matrices: blocks of a and b are packed into the engine's own memory and multiplied there; nothing is held meanwhile. */
#include "ops.h"

/* Matrix rows of process memory. */
struct matrix {
    uintptr_t at;
    uint64_t stride; /* bytes from one row to the next */
};

struct gemm {
    struct matrix a, b, c;
    size_t m, n, k; /* of the whole */
    float alpha, beta;
    float *row, *packed_a, *packed_b, *product;
};

static uintptr_t element(const struct matrix *x, size_t row, size_t column)
{
    return x->at + row * x->stride + column * sizeof(float);
}

static void pack_a(struct engine *e, struct gemm *g, size_t i0, size_t m, size_t p0, size_t k)
{
    for (size_t i = 0; i < m; i++) {
        soft_read(e, g->row, element(&g->a, i0 + i, p0), k * sizeof(float));
        loop_gemm_pack_a(g->packed_a, i, g->row, k);
    }
}

static void pack_b(struct engine *e, struct gemm *g, size_t p0, size_t k, size_t j0, size_t n)
{
    for (size_t p = 0; p < k; p++) {
        soft_read(e, g->row, element(&g->b, p0 + p, j0), n * sizeof(float));
        loop_gemm_pack_b(g->packed_b, p, k, g->row, n);
    }
}

static void update_row(struct engine *e, const struct gemm *g, uintptr_t c, const float *product, size_t n, float beta)
{
    struct operand o = {.addr = c, .element = sizeof(float), .write = true};
    while (n) {
        size_t some = soft_hold(e, &o, 1, n);
        loop_gemm_update((any_f32 *)o.at, product, some, g->alpha, beta);
        soft_ops_advance(&o, 1, some);
        product += some;
        n -= some;
    }
}

/* Adds to c what rows [p0, p0 + k) of a block of b, n wide, give. */
static void add_block(struct engine *e, struct gemm *g, size_t j0, size_t n, size_t p0, size_t k)
{
    float beta = p0 == 0 ? g->beta : 1;
    pack_b(e, g, p0, k, j0, n);
    for (size_t i0 = 0; i0 < g->m; i0 += LOOP_GEMM_M) {
        size_t m = g->m - i0 < LOOP_GEMM_M ? g->m - i0 : LOOP_GEMM_M;
        pack_a(e, g, i0, m, p0, k);
        soft_release(e);
        loop_gemm_multiply(g->product, g->packed_a, g->packed_b, m, n, k);
        for (size_t i = 0; i < m; i++)
            update_row(e, g, element(&g->c, i0 + i, j0), g->product + i * LOOP_GEMM_N, n, beta);
    }
}

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* No more than this product needs. */
static void get_room(struct engine *e, struct gemm *g)
{
    size_t m = loop_round_up(least(g->m, LOOP_GEMM_M), LOOP_TILE_M), n = loop_round_up(least(g->n, LOOP_GEMM_N), LOOP_TILE_N);
    size_t k = least(g->k, LOOP_GEMM_K);
    g->row = soft_engine_scratch(e, (n > k ? n : k) * sizeof(float));
    g->packed_a = soft_engine_scratch(e, m * k * sizeof(float));
    g->packed_b = soft_engine_scratch(e, n * k * sizeof(float));
    g->product = soft_engine_scratch(e, m * LOOP_GEMM_N * sizeof(float));
}

static struct matrix matrix_of(const void *at, uint32_t stride, uint32_t columns)
{
    return (struct matrix){.at = (uintptr_t)at, .stride = (uint64_t)(stride ? stride : columns) * sizeof(float)};
}

uint64_t soft_op_gemm(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_gemm *o = &operation->gemm;
    struct gemm g = {.a = matrix_of(o->a, o->lda, o->k),
                     .b = matrix_of(o->b, o->ldb, o->n),
                     .c = matrix_of(o->c, o->ldc, o->n),
                     .m = o->m,
                     .n = o->n,
                     .k = o->k,
                     .alpha = o->alpha,
                     .beta = o->beta};
    get_room(e, &g);
    for (size_t j = 0; j < g.n; j += LOOP_GEMM_N)
        for (size_t p = 0; p < g.k; p += LOOP_GEMM_K)
            add_block(e, &g, j, least(g.n - j, LOOP_GEMM_N), p, least(g.k - p, LOOP_GEMM_K));
    return 0;
}
