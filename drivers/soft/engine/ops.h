/* SPDX-License-Identifier: MIT */
/*
 * The built-in operations, one function each; what they compute is said in <hmm/hmm.h>. They return the result of the job, and leave
 * through soft_engine_throw() on error. None holds anything for long (hold.c): an invalidation waits for it.
 *
 * The program may change its memory while a job uses it. Then the result is any, but the engine's own memory stays whole: what was
 * read from the program and is used as an index is checked after it was read, and read once.
 */
#ifndef HMM_SOFT_OPS_H
#define HMM_SOFT_OPS_H

#include "engine.h"
#include "loops.h"

#define OPS_PIECE ((uint64_t)512 << 10) /* bytes of an operand that are worked on under one hold */

typedef uint64_t soft_op(struct engine *e, const struct hmm_operation *operation);

/* ops_stream.c */
soft_op soft_op_copy, soft_op_fill, soft_op_compare, soft_op_crc32c, soft_op_histogram, soft_op_saxpy;
/* ops_reduce.c, ops_gemm.c, ops_sort.c, ops_index.c, ops_bfs.c */
soft_op soft_op_reduce, soft_op_gemm, soft_op_sort, soft_op_gather, soft_op_scatter, soft_op_bfs;

/* memset() */
void soft_ops_fill(struct engine *e, uintptr_t to, uint8_t value, uint64_t bytes);
/* The job ends with -ERANGE: the number at this address is wrong. */
void soft_ops_out_of_range(struct engine *e, uintptr_t addr, const char *what, uint64_t number, uint64_t least, uint64_t most)
    __attribute__((noreturn));

static inline uint64_t soft_ops_piece(uint64_t left, uint32_t element)
{
    return left < OPS_PIECE / element ? left : OPS_PIECE / element;
}

/* Moves on by n elements. */
static inline void soft_ops_advance(struct operand *operands, unsigned count, uint64_t n)
{
    for (unsigned i = 0; i < count; i++)
        operands[i].addr += n * operands[i].element;
}

#endif
