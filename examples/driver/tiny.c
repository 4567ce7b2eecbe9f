/* SPDX-License-Identifier: MIT */
/*
 * A whole driver, as short as one can be: `tiny` has memory, copies pages, and fills memory of the program where it is, with device page
 * faults and the retry loop of mm/hmm.rst. One job at a time, one page of it at a time; a page is used under `lock`, so that is all
 * that invalidate() waits for. ram.c beside it says more about each slot. HMM_DRIVER_PATH=$PWD ./use tiny
 */
#include <errno.h>
#include <hmm/driver.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <string.h>

#define BYTES ((size_t)16 << 20)
#define TRIES 32

struct tiny {
    struct hmm_device *dev;
    char *memory;
    size_t page;
    struct hmm_notifier notifier; /* over what the job uses */
    pthread_mutex_t lock;         /* a page is in use; stopped */
    struct hmm_thread *worker;
    struct hmm_job *job;
    sem_t work; /* there is a job, or it is the end */
    bool stopped;
};

static int tiny_copy(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    struct tiny *t = priv;
    for (const struct hmm_dma *d = v; d < v + n; d++)
        if (kind == HMM_DMA_TO_DEVICE)
            memcpy(t->memory + d->page * t->page, d->host, d->pages * t->page);
        else
            memcpy(d->host, t->memory + d->page * t->page, d->pages * t->page);
    hmm_fence_signal(fence, 0);
    return 0;
}

static int tiny_clear(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    struct tiny *t = priv;
    for (const struct hmm_dma *d = v; d < v + n; d++)
        memset(t->memory + d->page * t->page, 0, d->pages * t->page);
    hmm_fence_signal(fence, 0);
    return 0;
}

/* Nobody uses a page without the lock, nor with it without looking at the sequence number: whoever gets the lock here is done. */
static int tiny_invalidate(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct tiny *t = (struct tiny *)((char *)n - offsetof(struct tiny, notifier));
    if (event->blockable)
        pthread_mutex_lock(&t->lock);
    else if (pthread_mutex_trylock(&t->lock))
        return -EAGAIN;
    pthread_mutex_unlock(&t->lock);
    return 0;
}

static const struct hmm_notifier_ops notifier_ops = {.invalidate = tiny_invalidate, .name = "tiny"};

/* The retry loop, for len bytes within one page. A page that comes and goes all the time is written over the bus in the end. */
static int fill(struct tiny *t, uintptr_t addr, unsigned char value, size_t len)
{
    uint64_t pfn;
    uintptr_t page = addr & ~(t->page - 1);
    struct hmm_fault_range range = {
        .size = sizeof(range), .flags = HMM_RANGE_DEVICE_ONLY, .notifier = &t->notifier, .pfns = &pfn};
    range.start = page, range.end = page + t->page;
    int r = 0; /* 1: it stays in system memory */
    for (int tries = 0; tries < TRIES && (r = hmm_device_fault(t->dev, addr, HMM_FAULT_WRITE)) == 0; tries++) {
        range.notifier_seq = hmm_notifier_read_begin(&t->notifier);
        if (hmm_range_fault(t->dev, &range))
            continue;
        hmm_event_sync(t->dev); /* what the program did before now has reached the number */
        pthread_mutex_lock(&t->lock);
        bool good = !hmm_notifier_read_retry(&t->notifier, range.notifier_seq) && pfn & HMM_PFN_WRITE;
        if (good)
            memset(t->memory + (pfn & HMM_PFN_MASK) * t->page + (addr - page), value, len);
        pthread_mutex_unlock(&t->lock);
        if (good)
            return 0;
    }
    for (; r >= 0 && len; addr++, len--)
        r = hmm_bus_write(t->dev, addr, &value, 1) == 1 ? 0 : -EFAULT;
    return r;
}

static void run(struct tiny *t, struct hmm_job *job)
{
    const struct hmm_op_fill *op = &job->operation.fill;
    uintptr_t at = (uintptr_t)op->dst, end = at + op->bytes, mask = t->page - 1;
    int r = hmm_notifier_insert(t->dev, &t->notifier, at & ~mask, (end + mask) & ~mask, &notifier_ops);
    bool inserted = !r;
    struct hmm_job_status status = {.address = at};
    for (size_t len; !r && at < end; at += len) {
        len = t->page - (at & mask) < end - at ? t->page - (at & mask) : end - at;
        status.address = at;
        r = __atomic_load_n(&t->stopped, __ATOMIC_RELAXED) ? -ECANCELED : fill(t, at, op->value, len);
    }
    if (inserted)
        hmm_notifier_remove(&t->notifier);
    status.status = r;
    status.message = r ? hmm_strerror(r) : NULL;
    hmm_job_done(job, &status); /* may submit the next one */
}

static void work(void *arg)
{
    struct tiny *t = arg;
    for (struct hmm_job *job; sem_wait(&t->work), (job = t->job) != NULL;) {
        t->job = NULL;
        run(t, job);
    }
}

static int tiny_submit(void *priv, struct hmm_job *job) /* one at a time: tiny said nothing else (hmm_engines_add()) */
{
    struct tiny *t = priv;
    pthread_mutex_lock(&t->lock);
    int r = t->stopped ? -ENODEV : job->operation.kind != HMM_OP_FILL ? -EOPNOTSUPP : 0;
    if (!r)
        t->job = job;
    pthread_mutex_unlock(&t->lock);
    if (!r)
        sem_post(&t->work);
    return r;
}

static void tiny_stop(void *priv) /* the job that runs ends at its next page */
{
    struct tiny *t = priv;
    pthread_mutex_lock(&t->lock);
    __atomic_store_n(&t->stopped, true, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&t->lock);
    sem_post(&t->work);
    hmm_thread_join(t->worker);
}

static void tiny_close(void *priv)
{
    struct tiny *t = priv;
    hmm_mem_free(t->memory, BYTES);
    hmm_mem_free(t, sizeof(*t));
}

static int tiny_open(struct hmm_device *dev, const union hmm_option_value *values, void **priv)
{
    struct tiny *t = *priv = hmm_mem_alloc(sizeof(*t));
    (void)values;
    if (!t)
        return hmm_fail(-ENOMEM, "tiny: no memory for the device");
    *t = (struct tiny){.dev = dev, .page = hmm_page_size(), .memory = hmm_mem_alloc(BYTES)};
    pthread_mutex_init(&t->lock, NULL);
    sem_init(&t->work, 0, 0);
    int r =
        t->memory ? hmm_thread_start(&t->worker, "tiny", work, t) : hmm_fail(-ENOMEM, "tiny: no memory of %zu bytes", BYTES);
    if (!r) {
        r = hmm_pagemap_add(dev, &(struct hmm_pagemap_desc){.type = HMM_PAGEMAP_PRIVATE, .pages = BYTES / t->page});
        if (r)
            tiny_stop(t);
    }
    if (r)
        tiny_close(t);
    return r;
}

HMM_DRIVER_EXPORT = {.size = sizeof(struct hmm_driver),
                     .abi = HMM_DRIVER_ABI,
                     .name = "tiny",
                     .description = "a small device that faults and fills",
                     .open = tiny_open,
                     .stop = tiny_stop,
                     .close = tiny_close,
                     .copy = tiny_copy,
                     .clear = tiny_clear,
                     .submit = tiny_submit};
