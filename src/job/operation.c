/* SPDX-License-Identifier: MIT */
/* What operations may be asked: operands, types and counts; and the process memory that each uses. Pure; touches no operand. */
#include <errno.h>
#include <inttypes.h>

#include "job/job.h"

/* An operation under check: the first fault is kept, and its ranges are collected. */
struct check {
    const char *op;
    int err;
    struct {
        const char *name;
        uintptr_t addr;
        uint64_t bytes;
        bool write;
    } operands[OPERATION_RANGES_MAX];
    unsigned n;
};

int operation_check_range(const char *what, const char *name, uintptr_t addr, uint64_t bytes)
{
    if (!addr)
        return hmm_fail(-EINVAL, "%s: %s is NULL", what, name);
    if (!bytes)
        return hmm_fail(-EINVAL, "%s: %s at 0x%" PRIxPTR " is empty: its size or a count is 0", what, name, addr);
    if (addr + bytes < addr)
        return hmm_fail(-EINVAL, "%s: %s at 0x%" PRIxPTR " of %" PRIu64 " bytes wraps around the address space", what, name,
                        addr, bytes);
    return 0;
}

/* An operand of count elements. */
static void operand(struct check *c, const char *name, const void *ptr, uint64_t count, uint64_t element, bool write)
{
    uint64_t bytes;
    if (c->err)
        return;
    if (__builtin_mul_overflow(count, element, &bytes))
        c->err = hmm_fail(-EINVAL, "%s: %s: %" PRIu64 " elements of %" PRIu64 " bytes overflow", c->op, name, count, element);
    else
        c->err = operation_check_range(c->op, name, (uintptr_t)ptr, bytes);
    if (c->err)
        return;
    c->operands[c->n].name = name;
    c->operands[c->n].addr = (uintptr_t)ptr;
    c->operands[c->n].bytes = bytes;
    c->operands[c->n++].write = write;
}

static void reads(struct check *c, const char *name, const void *ptr, uint64_t count, uint64_t element)
{
    operand(c, name, ptr, count, element, false);
}

static void writes(struct check *c, const char *name, const void *ptr, uint64_t count, uint64_t element)
{
    operand(c, name, ptr, count, element, true);
}

/* Of those collected. */
static void apart(struct check *c, unsigned i, unsigned k)
{
    if (c->err)
        return;
    uintptr_t a = c->operands[i].addr, b = c->operands[k].addr;
    if (a < b + c->operands[k].bytes && b < a + c->operands[i].bytes)
        c->err = hmm_fail(-EINVAL, "%s: %s at 0x%" PRIxPTR " and %s at 0x%" PRIxPTR " overlap", c->op, c->operands[i].name, a,
                          c->operands[k].name, b);
}

/* What is written overlaps nothing else; what is only read may. */
static void all_apart(struct check *c)
{
    for (unsigned i = 0; i < c->n; i++)
        for (unsigned k = i + 1; k < c->n; k++)
            if (c->operands[i].write || c->operands[k].write)
                apart(c, i, k);
}

static void must(struct check *c, bool good, const char *name, uint64_t value, const char *allowed)
{
    if (!c->err && !good)
        c->err = hmm_fail(-EINVAL, "%s: %s is %" PRIu64 ", and may be %s", c->op, name, value, allowed);
}

static uint64_t type_size(uint32_t type)
{
    return type == HMM_I32 || type == HMM_U32 || type == HMM_F32 ? 4 : 8;
}

static void check_reduce(struct check *c, const struct hmm_op_reduce *o)
{
    must(c, o->type <= HMM_F64, "type", o->type, "HMM_I32 to HMM_F64");
    must(c, o->how <= HMM_MAX, "how", o->how, "HMM_SUM, HMM_MIN or HMM_MAX");
    reads(c, "src", o->src, o->count, type_size(o->type));
}

static void check_saxpy(struct check *c, const struct hmm_op_saxpy *o)
{
    writes(c, "y", o->y, o->count, sizeof(float));
    if (o->x == o->y)
        return;
    reads(c, "x", o->x, o->count, sizeof(float));
    all_apart(c);
}

/* A matrix: from its first element to its last. */
static void matrix(struct check *c, const char *name, const float *ptr, uint32_t rows, uint32_t columns, uint32_t step,
                   bool write)
{
    static const char *const lead[] = {"lda", "ldb", "ldc"};
    uint64_t last, elements;
    if (step == 0)
        step = columns;
    must(c, step >= columns, lead[name[0] - 'a'], step, "0 or not less than the matrix has columns");
    if (c->err)
        return;
    if (__builtin_mul_overflow((uint64_t)rows - 1, step, &last) || __builtin_add_overflow(last, columns, &elements))
        c->err = hmm_fail(-EINVAL, "%s: %s: %" PRIu32 " rows of %" PRIu32 " elements overflow", c->op, name, rows, step);
    else
        operand(c, name, ptr, elements, sizeof(float), write);
}

static void check_gemm(struct check *c, const struct hmm_op_gemm *o)
{
    must(c, o->m > 0, "m", o->m, "1 or more");
    must(c, o->n > 0, "n", o->n, "1 or more");
    must(c, o->k > 0, "k", o->k, "1 or more");
    matrix(c, "a", o->a, o->m, o->k, o->lda, false);
    matrix(c, "b", o->b, o->k, o->n, o->ldb, false);
    matrix(c, "c", o->c, o->m, o->n, o->ldc, true);
    if (c->err)
        return;
    apart(c, 2, 0);
    apart(c, 2, 1);
}

static bool unsigned_type(uint32_t type)
{
    return type == HMM_U32 || type == HMM_U64;
}

static void check_sort(struct check *c, const struct hmm_op_sort *o)
{
    must(c, unsigned_type(o->type), "type", o->type, "HMM_U32 or HMM_U64");
    writes(c, "data", o->data, o->count, type_size(o->type));
}

static void check_indexed(struct check *c, uint32_t element, uint32_t index_type)
{
    must(c, element && element <= 16 && !(element & (element - 1)), "element", element, "1, 2, 4, 8 or 16 bytes");
    must(c, unsigned_type(index_type), "index_type", index_type, "HMM_U32 or HMM_U64");
}

static void check_gather(struct check *c, const struct hmm_op_gather *o)
{
    check_indexed(c, o->element, o->index_type);
    writes(c, "dst", o->dst, o->count, o->element);
    reads(c, "table", o->table, o->entries, o->element);
    reads(c, "index", o->index, o->count, type_size(o->index_type));
    all_apart(c);
}

static void check_scatter(struct check *c, const struct hmm_op_scatter *o)
{
    check_indexed(c, o->element, o->index_type);
    writes(c, "table", o->table, o->entries, o->element);
    reads(c, "src", o->src, o->count, o->element);
    reads(c, "index", o->index, o->count, type_size(o->index_type));
    all_apart(c);
}

static void check_bfs(struct check *c, const struct hmm_op_bfs *o)
{
    must(c, o->vertices > 0, "vertices", o->vertices, "1 or more");
    must(c, o->source < o->vertices, "source", o->source, "less than vertices");
    reads(c, "offsets", o->offsets, (uint64_t)o->vertices + 1, sizeof(uint64_t));
    writes(c, "distance", o->distance, o->vertices, sizeof(uint32_t));
    if (o->nedges)
        reads(c, "edges", o->edges, o->nedges, sizeof(uint32_t));
}

static void check_kernel(struct check *c, const struct hmm_launch *l)
{
    if (l->size < sizeof(*l))
        c->err = hmm_fail(-EINVAL, "%s: set launch->size to sizeof(struct hmm_launch)", c->op);
    else if (!l->object != !l->symbol)
        c->err = hmm_fail(-EINVAL, "%s: object is given without symbol, or symbol without object: give both", c->op);
    else if (!l->kernel && !l->object)
        c->err = hmm_fail(-EINVAL, "%s: the kernel is NULL: give the function, or object and symbol", c->op);
    else if (l->arg_size > JOB_ARG_MAX)
        c->err = hmm_fail(-EINVAL, "%s: the argument block of %zu bytes is too large: at most 64 KiB", c->op, l->arg_size);
    else if (l->arg_size && !l->arg)
        c->err = hmm_fail(-EINVAL, "%s: the argument block is NULL but has a size", c->op);
    else if (l->nranges > JOB_RANGES_MAX)
        c->err = hmm_fail(-EINVAL, "%s: %u ranges are too many: at most %d", c->op, l->nranges, JOB_RANGES_MAX);
    else if (l->nranges && !l->ranges)
        c->err = hmm_fail(-EINVAL, "%s: ranges is NULL but nranges is %u", c->op, l->nranges);
    else
        must(c, !l->reserved, "reserved", l->reserved, "0");
}

static const char *const names[HMM_OPS] = {
    [HMM_OP_NOP] = "hmm_job_submit: nop",
    [HMM_OP_KERNEL] = "hmm_job_submit: kernel",
    [HMM_OP_COPY] = "hmm_job_submit: copy",
    [HMM_OP_FILL] = "hmm_job_submit: fill",
    [HMM_OP_COMPARE] = "hmm_job_submit: compare",
    [HMM_OP_CRC32C] = "hmm_job_submit: crc32c",
    [HMM_OP_HISTOGRAM] = "hmm_job_submit: histogram",
    [HMM_OP_REDUCE] = "hmm_job_submit: reduce",
    [HMM_OP_SAXPY] = "hmm_job_submit: saxpy",
    [HMM_OP_GEMM] = "hmm_job_submit: gemm",
    [HMM_OP_SORT] = "hmm_job_submit: sort",
    [HMM_OP_GATHER] = "hmm_job_submit: gather",
    [HMM_OP_SCATTER] = "hmm_job_submit: scatter",
    [HMM_OP_BFS] = "hmm_job_submit: bfs",
};

static void check_simple(struct check *c, const struct hmm_operation *op)
{
    switch (op->kind) {
    case HMM_OP_COPY:
        reads(c, "src", op->copy.src, op->copy.bytes, 1);
        writes(c, "dst", op->copy.dst, op->copy.bytes, 1);
        break;
    case HMM_OP_FILL: writes(c, "dst", op->fill.dst, op->fill.bytes, 1); break;
    case HMM_OP_COMPARE:
        reads(c, "a", op->compare.a, op->compare.bytes, 1);
        reads(c, "b", op->compare.b, op->compare.bytes, 1);
        break;
    case HMM_OP_CRC32C: reads(c, "src", op->crc32c.src, op->crc32c.bytes, 1); break;
    case HMM_OP_HISTOGRAM:
        reads(c, "src", op->histogram.src, op->histogram.bytes, 1);
        writes(c, "counts", op->histogram.counts, 256, sizeof(uint64_t));
        all_apart(c);
        break;
    }
}

int operation_check(const struct hmm_operation *op, const char *what, struct hmm_range *ranges, unsigned *n)
{
    if (op->kind >= HMM_OPS)
        return hmm_fail(-EINVAL, "hmm_job_submit: there is no operation %u (enum hmm_op ends at %d)", op->kind, HMM_OPS - 1);
    struct check c = {.op = what ? what : names[op->kind]};
    must(&c, !op->reserved, "reserved", op->reserved, "0");
    switch (op->kind) {
    case HMM_OP_KERNEL: check_kernel(&c, &op->kernel); break;
    case HMM_OP_REDUCE: check_reduce(&c, &op->reduce); break;
    case HMM_OP_SAXPY: check_saxpy(&c, &op->saxpy); break;
    case HMM_OP_GEMM: check_gemm(&c, &op->gemm); break;
    case HMM_OP_SORT: check_sort(&c, &op->sort); break;
    case HMM_OP_GATHER: check_gather(&c, &op->gather); break;
    case HMM_OP_SCATTER: check_scatter(&c, &op->scatter); break;
    case HMM_OP_BFS: check_bfs(&c, &op->bfs); break;
    default: check_simple(&c, op); break;
    }
    if (c.err)
        return c.err;
    for (unsigned i = 0; i < c.n; i++)
        ranges[i] = (struct hmm_range){.addr = c.operands[i].addr, .bytes = c.operands[i].bytes, .write = c.operands[i].write};
    *n = c.n;
    return 0;
}
