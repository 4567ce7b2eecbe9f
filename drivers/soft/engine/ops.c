/* SPDX-License-Identifier: MIT */
/* Which operations there are, and what they share. */
#include "ops.h"

#include <errno.h>

static const struct {
    const char *name;
    soft_op *run;
} ops[HMM_OPS] = {
    [HMM_OP_NOP] = {"nop", NULL},
    [HMM_OP_KERNEL] = {"kernel", NULL}, /* run.c */
    [HMM_OP_COPY] = {"copy", soft_op_copy},
    [HMM_OP_FILL] = {"fill", soft_op_fill},
    [HMM_OP_COMPARE] = {"compare", soft_op_compare},
    [HMM_OP_CRC32C] = {"crc32c", soft_op_crc32c},
    [HMM_OP_HISTOGRAM] = {"histogram", soft_op_histogram},
    [HMM_OP_REDUCE] = {"reduce", soft_op_reduce},
    [HMM_OP_SAXPY] = {"saxpy", soft_op_saxpy},
    [HMM_OP_GEMM] = {"gemm", soft_op_gemm},
    [HMM_OP_SORT] = {"sort", soft_op_sort},
    [HMM_OP_GATHER] = {"gather", soft_op_gather},
    [HMM_OP_SCATTER] = {"scatter", soft_op_scatter},
    [HMM_OP_BFS] = {"bfs", soft_op_bfs},
};

const char *soft_ops_name(uint32_t kind)
{
    return kind < HMM_OPS ? ops[kind].name : "unknown";
}

uint64_t soft_ops_run(struct engine *e, const struct hmm_operation *operation)
{
    soft_op *run = operation->kind < HMM_OPS ? ops[operation->kind].run : NULL;
    uint64_t result = run ? run(e, operation) : 0;
    soft_release(e);
    return result;
}

void soft_ops_out_of_range(struct engine *e, uintptr_t addr, const char *what, uint64_t number, uint64_t least, uint64_t most)
{
    struct text t = {.buf = e->message, .size = sizeof(e->message)};
    soft_text_str(&t, soft_ops_name(e->operation->kind));
    soft_text_str(&t, ": the ");
    soft_text_str(&t, what);
    soft_text_str(&t, " at ");
    soft_text_hex(&t, addr);
    soft_text_str(&t, " is ");
    soft_text_dec(&t, number);
    soft_text_str(&t, ", and must be from ");
    soft_text_dec(&t, least);
    soft_text_str(&t, " to ");
    soft_text_dec(&t, most);
    e->status = (struct hmm_job_status){.status = -ERANGE, .address = addr, .message = e->message};
    soft_engine_throw(e);
}
