/* SPDX-License-Identifier: MIT */
/* Reductions: pieces of any size give the same bits, because lanes go by the number of the element. */
#include "ops.h"

_Static_assert((int)LOOP_I32 == (int)HMM_I32 && (int)LOOP_I64 == (int)HMM_I64 && (int)LOOP_U32 == (int)HMM_U32 &&
                   (int)LOOP_U64 == (int)HMM_U64 && (int)LOOP_F32 == (int)HMM_F32 && (int)LOOP_F64 == (int)HMM_F64,
               "loops.h repeats the types of hmm.h");
_Static_assert((int)LOOP_SUM == (int)HMM_SUM && (int)LOOP_MIN == (int)HMM_MIN && (int)LOOP_MAX == (int)HMM_MAX,
               "loops.h repeats the reductions of hmm.h");

static uint32_t size_of(uint32_t type)
{
    return type == HMM_I32 || type == HMM_U32 || type == HMM_F32 ? 4 : 8;
}

uint64_t soft_op_reduce(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_reduce *r = &operation->reduce;
    enum loop_type type = (enum loop_type)r->type;
    enum loop_how how = (enum loop_how)r->how;
    struct operand o = {.addr = (uintptr_t)r->src, .element = size_of(r->type)};
    struct loop_reduction so_far;
    loop_reduce_begin(&so_far, how);
    for (uint64_t done = 0; done < r->count;) {
        size_t n = soft_hold(e, &o, 1, soft_ops_piece(r->count - done, o.element));
        loop_reduce(&so_far, type, how, done, o.at, n);
        soft_ops_advance(&o, 1, n);
        done += n;
    }
    return loop_reduce_end(&so_far, type, how);
}
