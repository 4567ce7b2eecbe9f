/* SPDX-License-Identifier: MIT */
/*
 * The built-in operations. None holds two spans, and none holds a span for long: an invalidation waits for it. Copies go through a
 * buffer of the engine, piece by piece.
 */
#include "soft.h"

#include <string.h>

#define PIECE_MAX ((size_t)256 << 10)

static size_t at_most(uint64_t bytes, size_t max)
{
    return bytes < max ? bytes : max;
}

static void read_all(struct engine *e, char *to, uintptr_t from, size_t bytes)
{
    while (bytes) {
        size_t len = bytes;
        const char *span = soft_access_span(e, from, &len, false);
        memcpy(to, span, len);
        to += len;
        from += len;
        bytes -= len;
    }
}

static void write_all(struct engine *e, uintptr_t to, const char *from, size_t bytes)
{
    while (bytes) {
        size_t len = bytes;
        char *span = soft_access_span(e, to, &len, true);
        memcpy(span, from, len);
        to += len;
        from += len;
        bytes -= len;
    }
}

/* Like memmove: from the end when the destination begins inside the source. */
static void copy(struct engine *e, const struct hmm_job *job)
{
    bool backward = job->dst > job->src && job->dst - job->src < job->bytes;
    for (uint64_t done = 0; done < job->bytes;) {
        size_t len = at_most(job->bytes - done, LOCAL_BYTES);
        uint64_t at = backward ? job->bytes - done - len : done;
        read_all(e, e->local, job->src + at, len);
        write_all(e, job->dst + at, e->local, len);
        done += len;
    }
}

static void fill(struct engine *e, const struct hmm_job *job)
{
    for (uint64_t done = 0; done < job->bytes;) {
        size_t len = at_most(job->bytes - done, PIECE_MAX);
        char *span = soft_access_span(e, job->dst + done, &len, true);
        memset(span, (int)job->value, len);
        done += len;
    }
}

static uint32_t checksum(struct engine *e, const struct hmm_job *job)
{
    uint32_t crc = 0;
    for (uint64_t done = 0; done < job->bytes;) {
        size_t len = at_most(job->bytes - done, PIECE_MAX);
        const char *span = soft_access_span(e, job->src + done, &len, false);
        crc = soft_crc32c(crc, span, len);
        done += len;
    }
    return crc;
}

uint64_t soft_ops_run(struct engine *e, const struct hmm_job *job)
{
    switch (job->op) {
    case HMM_OP_COPY: copy(e, job); return 0;
    case HMM_OP_FILL: fill(e, job); return 0;
    case HMM_OP_CRC32C: return checksum(e, job);
    case HMM_OP_KERNEL: break; /* not ours */
    }
    return 0;
}
