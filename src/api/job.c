/* SPDX-License-Identifier: MIT */
/* Jobs, queues and descriptors of fences: the entry points. What they do stands in src/job. */
#include <errno.h>
#include <string.h>

#include "api/manager.h"
#include "base/error.h"
#include "base/fence.h"
#include "job/job.h"

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

/* Signals are blocked, once around all locks, ours and those of the driver; but not while memory of the program is touched. */
static int submit_blocked(hmm_dev handle, const struct job_request *rq, hmm_fence **fence)
{
    int r = -ENODEV;
    struct hmm_device *dev = device_get(handle);
    struct job *job = dev ? job_new(dev, rq, &r) : NULL;
    if (job && job_needs_copy(rq)) {
        signals_unblock();
        r = job_copy(job, rq);
        signals_block();
    }
    if (job && r)
        job_put(job);
    if (job && !r) {
        mm_sync(dev->mm); /* changes that the program made before this call are known to the device's notifiers */
        r = job_submit(job, fence);
    }
    if (dev)
        device_put(dev);
    return r;
}

/* call: what messages begin with; NULL: the operation. */
static int submit(const char *call, hmm_dev dev, const struct hmm_job_desc *desc, hmm_fence **fence)
{
    struct job_request rq;
    hmm_fence *made = NULL;
    int r = api_enter();
    if (!r)
        r = job_read(&rq, desc, call);
    if (r)
        return r;
    signals_block();
    r = submit_blocked(dev, &rq, fence ? &made : NULL);
    signals_unblock();
    if (!r && fence)
        *fence = made;
    return r;
}

int hmm_job_submit(hmm_dev dev, const struct hmm_job_desc *desc, hmm_fence **fence)
{
    return submit(NULL, dev, desc, fence);
}

int hmm_job_copy(hmm_dev dev, void *dst, const void *src, size_t len, hmm_fence **fence)
{
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation.kind = HMM_OP_COPY};
    desc.operation.copy = (struct hmm_op_copy){.dst = dst, .src = src, .bytes = len};
    return submit("hmm_job_copy", dev, &desc, fence);
}

int hmm_job_fill(hmm_dev dev, void *dst, uint8_t value, size_t len, hmm_fence **fence)
{
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation.kind = HMM_OP_FILL};
    desc.operation.fill = (struct hmm_op_fill){.dst = dst, .bytes = len, .value = value};
    return submit("hmm_job_fill", dev, &desc, fence);
}

int hmm_job_crc32c(hmm_dev dev, const void *src, size_t len, hmm_fence **fence)
{
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation.kind = HMM_OP_CRC32C};
    desc.operation.crc32c = (struct hmm_op_crc32c){.src = src, .bytes = len};
    return submit("hmm_job_crc32c", dev, &desc, fence);
}

int hmm_job_launch(hmm_dev dev, const struct hmm_launch *launch, hmm_fence **fence)
{
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation.kind = HMM_OP_KERNEL};
    int r = api_enter();
    if (r)
        return r;
    if (!launch || launch->size < sizeof(*launch))
        return hmm_fail(-EINVAL, "hmm_job_launch: set launch->size to sizeof(struct hmm_launch)");
    desc.operation.kernel = *launch;
    return submit("hmm_job_launch", dev, &desc, fence);
}

int hmm_job_cancel(hmm_fence *fence)
{
    int r = api_enter();
    if (r)
        return r;
    struct job *job = fence ? job_of(fence) : NULL;
    if (!job)
        return hmm_fail(-EINVAL, "hmm_job_cancel: the fence is %s",
                        fence ? "not a job's: hmm_fence_complete() ends it" : "NULL");
    signals_block(); /* jobs that had to wait for this one may start: drivers take locks of their own */
    r = sched_cancel(job);
    signals_unblock();
    return r ? hmm_fail(r, "hmm_job_cancel: the job is done already") : 0;
}

/* ---- queues ------------------------------------------------------------------------------------------------------ */

int hmm_queue_create(hmm_dev handle, const struct hmm_queue_config *config, hmm_queue **queue)
{
    int r = api_enter();
    if (r)
        return r;
    if (!queue)
        return hmm_fail(-EINVAL, "hmm_queue_create: the place for the queue is NULL");
    struct hmm_device *dev = device_get(handle);
    if (!dev)
        return -ENODEV;
    r = queue_new(dev, config, queue);
    device_put(dev);
    return r;
}

void hmm_queue_destroy(hmm_queue *queue)
{
    if (queue && api_enter() == 0)
        queue_put(queue);
}

/* ---- fences ------------------------------------------------------------------------------------------------------ */

int hmm_fence_create(hmm_fence **fence)
{
    int r = api_enter();
    if (r)
        return r;
    if (!fence)
        return hmm_fail(-EINVAL, "hmm_fence_create: the place for the fence is NULL");
    if (!manager_use())
        return -ENODEV;
    hmm_fence *made = fence_user_new();
    manager_unuse();
    if (!made)
        return hmm_fail(-ENOMEM, "no memory for a fence");
    *fence = made;
    return 0;
}

/* Fences that are not done end with the last device: so where there is no manager, this one is done or about to be. */
int hmm_fence_fd(hmm_fence *fence)
{
    int r = api_enter();
    if (r)
        return r;
    if (!fence)
        return hmm_fail(-EINVAL, "hmm_fence_fd: the fence is NULL; pass the one that the submitting call returned");
    bool runs = manager_use() != NULL;
    if (!runs)
        fence_wait(fence, -1);
    message_clear();
    r = fence_watch(fence);
    if (runs)
        manager_unuse();
    return r;
}
