/* SPDX-License-Identifier: MIT */
/* Jobs: checking and copying their parameters, handing them to the driver, completing their fences. */
#include <errno.h>
#include <string.h>

#include "api/manager.h"
#include "base/alloc.h"
#include "base/fence.h"

#define ARG_MAX_BYTES (64u << 10)
#define ARG_ALIGN 16
#define DEADLINE_MS 1000

/* The argument block follows the job in one allocation. */
struct job_box {
    struct hmm_job job;
    size_t bytes; /* of the allocation */
};

static size_t arg_offset(void)
{
    return (sizeof(struct job_box) + ARG_ALIGN - 1) & ~(size_t)(ARG_ALIGN - 1);
}

static struct hmm_job *job_alloc(enum hmm_op op, size_t arg_size)
{
    size_t bytes = arg_offset() + arg_size;
    struct job_box *box = mem_alloc(bytes);
    if (!box)
        return NULL;
    box->bytes = bytes;
    box->job.op = op;
    box->job.arg = (char *)box + arg_offset();
    box->job.fence = fence_new();
    if (!box->job.fence) {
        mem_free(box, bytes);
        return NULL;
    }
    return &box->job;
}

/* The device is kept open until submit(). NULL with *err set. */
static struct hmm_job *job_new(hmm_dev handle, enum hmm_op op, size_t arg_size, struct hmm_device **dev, int *err)
{
    *dev = device_get(handle);
    if (!*dev) {
        *err = -ENODEV;
        return NULL;
    }
    struct hmm_job *job = job_alloc(op, arg_size);
    if (!job) {
        device_put(*dev);
        *err = hmm_fail(-ENOMEM, "no memory for a job");
    }
    return job;
}

static void job_free(struct hmm_job *job)
{
    struct job_box *box = container_of(job, struct job_box, job);
    fence_put(job->fence);
    mem_free(box, box->bytes);
}

void hmm_job_done(struct hmm_job *job, const struct hmm_job_status *status)
{
    fence_complete(job->fence, status);
    job_free(job);
}

static bool bad_range(uintptr_t start, size_t len)
{
    return len == 0 || start == 0 || start + len < start;
}

static int check_range(const char *what, const void *ptr, size_t len)
{
    if (!bad_range((uintptr_t)ptr, len))
        return 0;
    return hmm_fail(-EINVAL, "%s: the range at %p of %zu bytes is %s", what, ptr, len,
                    len == 0 ? "empty"
                    : !ptr   ? "NULL"
                             : "wrapping around the address space");
}

/* The driver owns the job from here, or it is freed. Lets go of the device. */
static int submit(struct hmm_device *dev, struct hmm_job *job, hmm_fence **fence)
{
    hmm_fence *f = fence_get(job->fence);
    int r = -EOPNOTSUPP;
    if (dev->driver->submit) {
        signals_block();  /* the driver takes locks of its own */
        mm_sync(dev->mm); /* changes that the program made before this call are known to the device's notifiers */
        r = dev->driver->submit(dev->priv, job);
        signals_unblock();
    }
    if (r)
        job_free(job);
    if (r || !fence)
        fence_put(f);
    else
        *fence = f;
    if (r == -EBUSY)
        hmm_fail(r, "the queue of device %s is full: wait for a fence, then submit again", dev->driver->name);
    else if (r)
        hmm_fail(r, "device %s does not take the job: %s", dev->driver->name, hmm_strerror(r));
    device_put(dev);
    return r;
}

int hmm_job_copy(hmm_dev dev, void *dst, const void *src, size_t len, hmm_fence **fence)
{
    int r = api_enter();
    if (!r)
        r = check_range("hmm_job_copy: source", src, len);
    if (!r)
        r = check_range("hmm_job_copy: destination", dst, len);
    if (r)
        return r;
    struct hmm_device *on;
    struct hmm_job *job = job_new(dev, HMM_OP_COPY, 0, &on, &r);
    if (!job)
        return r;
    job->dst = (uintptr_t)dst;
    job->src = (uintptr_t)src;
    job->bytes = len;
    return submit(on, job, fence);
}

int hmm_job_fill(hmm_dev dev, void *dst, uint8_t value, size_t len, hmm_fence **fence)
{
    int r = api_enter();
    if (!r)
        r = check_range("hmm_job_fill", dst, len);
    if (r)
        return r;
    struct hmm_device *on;
    struct hmm_job *job = job_new(dev, HMM_OP_FILL, 0, &on, &r);
    if (!job)
        return r;
    job->dst = (uintptr_t)dst;
    job->bytes = len;
    job->value = value;
    return submit(on, job, fence);
}

int hmm_job_crc32c(hmm_dev dev, const void *src, size_t len, hmm_fence **fence)
{
    int r = api_enter();
    if (!r)
        r = check_range("hmm_job_crc32c", src, len);
    if (r)
        return r;
    struct hmm_device *on;
    struct hmm_job *job = job_new(dev, HMM_OP_CRC32C, 0, &on, &r);
    if (!job)
        return r;
    job->src = (uintptr_t)src;
    job->bytes = len;
    return submit(on, job, fence);
}

int hmm_job_launch(hmm_dev dev, const struct hmm_launch *launch, hmm_fence **fence)
{
    int r = api_enter();
    if (r)
        return r;
    if (!launch || launch->size < sizeof(*launch))
        return hmm_fail(-EINVAL, "hmm_job_launch: set launch->size to sizeof(struct hmm_launch)");
    if (!launch->kernel)
        return hmm_fail(-EINVAL, "hmm_job_launch: the kernel is NULL");
    if (launch->arg_size > ARG_MAX_BYTES || (launch->arg_size && !launch->arg))
        return hmm_fail(-EINVAL, "hmm_job_launch: the argument block is %s (at most 64 KiB)",
                        launch->arg ? "too large" : "NULL but has a size");
    struct hmm_device *on;
    struct hmm_job *job = job_new(dev, HMM_OP_KERNEL, launch->arg_size, &on, &r);
    if (!job)
        return r;
    job->kernel = launch->kernel;
    job->deadline_ms = launch->deadline_ms ? launch->deadline_ms : DEADLINE_MS;
    if (launch->arg_size)
        memcpy(job->arg, launch->arg, launch->arg_size); /* may fault: no lock is held */
    return submit(on, job, fence);
}

const void *hmm_span_read(hmm_accessor *acc, const void *ptr, size_t *len)
{
    return acc->span(acc, (uintptr_t)ptr, len, false);
}

void *hmm_span_write(hmm_accessor *acc, void *ptr, size_t *len)
{
    return acc->span(acc, (uintptr_t)ptr, len, true);
}

void hmm_yield(hmm_accessor *acc)
{
    acc->yield(acc);
}

void hmm_get(hmm_accessor *acc, void *local, const void *ptr, size_t len)
{
    for (size_t done = 0; done < len;) {
        size_t n = len - done;
        const void *span = acc->span(acc, (uintptr_t)ptr + done, &n, false);
        memcpy((char *)local + done, span, n);
        done += n;
    }
}

void hmm_put(hmm_accessor *acc, void *ptr, const void *local, size_t len)
{
    for (size_t done = 0; done < len;) {
        size_t n = len - done;
        void *span = acc->span(acc, (uintptr_t)ptr + done, &n, true);
        memcpy(span, (const char *)local + done, n);
        done += n;
    }
}
