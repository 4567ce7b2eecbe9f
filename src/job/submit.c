/* SPDX-License-Identifier: MIT */
/* From the program's description to a job. What the program could change under us is copied once, and then checked. */
#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "job/job.h"
#include "os/os.h"

#define ARG_ALIGN 16
#define DEADLINE_MS 1000 /* of kernels that name none */

static int read_waits(struct job_request *rq)
{
    unsigned n = rq->desc.nwait;
    if (n > JOB_WAITS_MAX)
        return hmm_fail(-EINVAL, "hmm_job_submit: %u fences to wait for are too many: at most %d; join some by a HMM_OP_NOP", n,
                        JOB_WAITS_MAX);
    if (n && !rq->desc.wait)
        return hmm_fail(-EINVAL, "hmm_job_submit: wait is NULL but nwait is %u", n);
    memcpy(rq->wait, rq->desc.wait ? rq->desc.wait : rq->wait, n * sizeof(rq->wait[0]));
    for (unsigned i = 0; i < n; i++)
        if (!rq->wait[i])
            return hmm_fail(-EINVAL,
                            "hmm_job_submit: wait[%u] is NULL: a fence must exist before the job that waits for it, so submit "
                            "that one first",
                            i);
    return 0;
}

int job_read(struct job_request *rq, const struct hmm_job_desc *desc, const char *call)
{
    if (!desc || desc->size < sizeof(*desc))
        return hmm_fail(-EINVAL, "hmm_job_submit: set desc->size to sizeof(struct hmm_job_desc)");
    rq->desc = *desc;
    if (rq->desc.reserved)
        return hmm_fail(-EINVAL, "hmm_job_submit: reserved is %u, and must be 0", rq->desc.reserved);
    int r = operation_check(&rq->desc.operation, call, rq->ranges, &rq->nranges);
    return r ? r : read_waits(rq);
}

bool job_needs_copy(const struct job_request *rq)
{
    return rq->desc.operation.kind == HMM_OP_KERNEL;
}

struct job *job_of(hmm_fence *fence)
{
    return fence->kind == &job_kind ? container_of(fence, struct job, fence) : NULL;
}

void job_put(struct job *job)
{
    fence_put(&job->fence);
}

/* ---- making one -------------------------------------------------------------------------------------------------- */

static int check_device(const struct hmm_device *dev, const struct job_request *rq)
{
    const struct hmm_queue *q = rq->desc.queue;
    if (!dev->driver->submit)
        return hmm_fail(-EOPNOTSUPP, "device %s runs no jobs: it is memory only", dev->driver->name);
    if (!q || q->sched == dev->sched)
        return 0;
    int r = sched_check(q->sched);
    return r ? r : hmm_fail(-EINVAL, "hmm_job_submit: the queue is of another device than the job");
}

static void set_limit(struct job *job, uint32_t timeout_ms)
{
    job->timeout_ms = timeout_ms;
    if (timeout_ms)
        job->limit = os_now() + timeout_ms * 1000000ull;
}

static void set_dependencies(struct job *job, const struct job_request *rq)
{
    job->ndependencies = rq->desc.nwait;
    for (unsigned i = 0; i < job->ndependencies; i++) {
        struct dependency *d = &job->dependencies[i];
        list_init(&d->callback.link);
        d->callback.fn = sched_dependency_fired;
        d->fence = rq->wait[i];
        d->job = job;
    }
}

struct job *job_new(struct hmm_device *dev, const struct job_request *rq, int *err)
{
    *err = check_device(dev, rq);
    if (*err)
        return NULL;
    struct job *job = mem_alloc(sizeof(*job) + rq->desc.nwait * sizeof(job->dependencies[0]));
    if (!job) {
        *err = hmm_fail(-ENOMEM, "no memory for a job");
        return NULL;
    }
    fence_init(&job->fence);
    job->fence.kind = &job_kind;
    job->sched = dev->sched;
    sched_get(job->sched);
    list_init(&job->link);
    list_init(&job->turn);
    job->queue = rq->desc.queue;
    if (job->queue)
        queue_get(job->queue);
    set_limit(job, rq->desc.timeout_ms);
    set_dependencies(job, rq);
    memcpy(job->ranges, rq->ranges, sizeof(job->ranges));
    job->job.operation = rq->desc.operation;
    job->job.ranges = job->ranges;
    job->job.nranges = rq->nranges;
    job->job.priority = job->queue ? job->queue->priority : HMM_PRIORITY_NORMAL;
    job->job.fence = &job->fence;
    return job;
}

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

static int check_ranges(const struct hmm_range *ranges, unsigned n)
{
    int r = 0;
    for (unsigned i = 0; i < n && !r; i++) {
        r = operation_check_range("hmm_job_submit: kernel", "a range", ranges[i].addr, ranges[i].bytes);
        if (!r && (ranges[i].write > 1 || ranges[i].reserved))
            r = hmm_fail(-EINVAL, "hmm_job_submit: kernel: ranges[%u]: write may be 0 or 1, and reserved must be 0", i);
    }
    return r;
}

/* The argument, and the ranges behind it. */
static int copy_block(struct job *job, const struct hmm_launch *from)
{
    struct hmm_launch *to = &job->job.operation.kernel;
    size_t arg = (from->arg_size + ARG_ALIGN - 1) & ~(size_t)(ARG_ALIGN - 1);
    size_t bytes = arg + from->nranges * sizeof(from->ranges[0]);
    to->arg = NULL;
    to->ranges = NULL;
    if (!bytes)
        return 0;
    job->block = mem_alloc(bytes);
    if (!job->block)
        return hmm_fail(-ENOMEM, "no memory for the argument of a kernel");
    job->block_bytes = bytes;
    struct hmm_range *ranges = (struct hmm_range *)((char *)job->block + arg);
    if (from->arg_size)
        memcpy(job->block, from->arg, from->arg_size);
    if (from->nranges)
        memcpy(ranges, from->ranges, from->nranges * sizeof(ranges[0]));
    to->arg = from->arg_size ? job->block : NULL;
    to->ranges = from->nranges ? ranges : NULL;
    job->job.ranges = ranges;
    job->job.nranges = from->nranges;
    return check_ranges(ranges, from->nranges);
}

int job_copy(struct job *job, const struct job_request *rq)
{
    struct hmm_launch *l = &job->job.operation.kernel;
    int r = kernel_resolve(l, job->sched->flags & HMM_ENGINES_NAMED);
    if (!l->deadline_ms)
        l->deadline_ms = DEADLINE_MS;
    return r ? r : copy_block(job, &rq->desc.operation.kernel);
}

int job_submit(struct job *job, hmm_fence **fence)
{
    int r = sched_submit(job);
    if (!r && fence)
        *fence = &job->fence;
    else
        job_put(job);
    return r;
}
