/* SPDX-License-Identifier: MIT */
/* Operations that go once over their operands, from one end to the other. */
#include "ops.h"

#define NEAR ((uintptr_t)4096) /* ranges that overlap and are no further apart are copied through a buffer */

/* ---- copy -------------------------------------------------------------------------------------------------------- */

/* The destination is not within the source. */
static void copy_forward(struct engine *e, uintptr_t dst, uintptr_t src, uint64_t bytes, bool large)
{
    struct operand o[2] = {{.addr = src, .element = 1}, {.addr = dst, .element = 1, .write = true}};
    while (bytes) {
        size_t n = soft_hold(e, o, 2, soft_ops_piece(bytes, 1));
        if (large)
            loop_copy_large(o[1].at, o[0].at, n);
        else
            memmove(o[1].at, o[0].at, n);
        soft_ops_advance(o, 2, n);
        bytes -= n;
    }
}

/* From the end, in parts that do not overlap with where they go. */
static void copy_backward(struct engine *e, uintptr_t dst, uintptr_t src, uint64_t bytes)
{
    uint64_t most = dst - src;
    while (bytes) {
        uint64_t n = bytes < most ? bytes : most;
        bytes -= n;
        copy_forward(e, dst + bytes, src + bytes, n, false);
    }
}

/* The same where these parts would be small. */
static void copy_near(struct engine *e, uintptr_t dst, uintptr_t src, uint64_t bytes)
{
    while (bytes) {
        size_t n = bytes < LOCAL_BYTES ? bytes : LOCAL_BYTES;
        bytes -= n;
        soft_read(e, e->local, src + bytes, n);
        soft_write(e, dst + bytes, e->local, n);
    }
}

/* Like memmove: from the end when the destination begins inside the source. */
uint64_t soft_op_copy(struct engine *e, const struct hmm_operation *operation)
{
    uintptr_t dst = (uintptr_t)operation->copy.dst, src = (uintptr_t)operation->copy.src;
    uint64_t bytes = operation->copy.bytes;
    bool into = dst > src && dst - src < bytes, from = dst <= src && src - dst < bytes;
    if (!into)
        copy_forward(e, dst, src, bytes, bytes >= LOOP_COPY_LARGE && !from);
    else if (dst - src >= NEAR)
        copy_backward(e, dst, src, bytes);
    else
        copy_near(e, dst, src, bytes);
    return 0;
}

/* ---- fill -------------------------------------------------------------------------------------------------------- */

void soft_ops_fill(struct engine *e, uintptr_t to, uint8_t value, uint64_t bytes)
{
    struct operand o = {.addr = to, .element = 1, .write = true};
    while (bytes) {
        size_t n = soft_hold(e, &o, 1, soft_ops_piece(bytes, 1));
        memset(o.at, value, n);
        soft_ops_advance(&o, 1, n);
        bytes -= n;
    }
    soft_release(e);
}

uint64_t soft_op_fill(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_fill *f = &operation->fill;
    soft_ops_fill(e, (uintptr_t)f->dst, f->value, f->bytes);
    return 0;
}

/* ---- what only reads --------------------------------------------------------------------------------------------- */

uint64_t soft_op_compare(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_compare *c = &operation->compare;
    struct operand o[2] = {{.addr = (uintptr_t)c->a, .element = 1}, {.addr = (uintptr_t)c->b, .element = 1}};
    for (uint64_t done = 0; done < c->bytes;) {
        size_t n = soft_hold(e, o, 2, soft_ops_piece(c->bytes - done, 1)), same = loop_compare(o[0].at, o[1].at, n);
        if (same < n)
            return done + same;
        soft_ops_advance(o, 2, n);
        done += n;
    }
    return c->bytes;
}

uint64_t soft_op_crc32c(struct engine *e, const struct hmm_operation *operation)
{
    struct operand o = {.addr = (uintptr_t)operation->crc32c.src, .element = 1};
    uint32_t crc = 0;
    for (uint64_t left = operation->crc32c.bytes; left;) {
        size_t n = soft_hold(e, &o, 1, soft_ops_piece(left, 1));
        crc = loop_crc32c(crc, o.at, n);
        soft_ops_advance(&o, 1, n);
        left -= n;
    }
    return crc;
}

uint64_t soft_op_histogram(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_histogram *h = &operation->histogram;
    struct operand o = {.addr = (uintptr_t)h->src, .element = 1};
    struct loop_histogram counts = {0};
    for (uint64_t left = h->bytes; left;) {
        size_t n = soft_hold(e, &o, 1, soft_ops_piece(left, 1));
        loop_histogram(&counts, o.at, n);
        soft_ops_advance(&o, 1, n);
        left -= n;
    }
    for (unsigned v = 0; v < 256; v++)
        counts.part[0][v] += counts.part[1][v] + counts.part[2][v] + counts.part[3][v];
    soft_write(e, (uintptr_t)h->counts, counts.part[0], sizeof(counts.part[0]));
    return 0;
}

/* ---- saxpy ------------------------------------------------------------------------------------------------------- */

uint64_t soft_op_saxpy(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_saxpy *s = &operation->saxpy;
    struct operand o[2] = {{.addr = (uintptr_t)s->x, .element = sizeof(float)},
                           {.addr = (uintptr_t)s->y, .element = sizeof(float), .write = true}};
    for (uint64_t left = s->count; left;) {
        size_t n = soft_hold(e, o, 2, soft_ops_piece(left, sizeof(float)));
        loop_saxpy((any_f32 *)o[1].at, (const any_f32 *)o[0].at, n, s->a);
        soft_ops_advance(o, 2, n);
        left -= n;
    }
    return 0;
}
