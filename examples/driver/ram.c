/* SPDX-License-Identifier: MIT */
/*
 * A driver outside of libhmm's tree, as small as one can be that moves pages and runs a job: `ram`, whose device memory is plain
 * memory of this process. Built as libhmm-ram.so, it is found through HMM_DRIVER_PATH:
 *
 *     make
 *     HMM_DRIVER_PATH=$PWD hmm devices
 *
 * Read <hmm/driver.h> beside it: each operation's contract stands there, and THE RULE, which copy, clear and the worker obey: no
 * malloc, no stdio, no access to the program's memory through its own address. A CPU fault may wait for this very code.
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include <hmm/driver.h>

#define CHUNK ((size_t)64 << 10) /* bytes written to the bus at once */

/* ---- options: libhmm checks them, and `hmm devices` shows them ---- */

enum { MEMORY, GRANULE, MAPPED };

static const struct hmm_option options[] = {
    [MEMORY] = {.name = "memory",
                .type = HMM_OPTION_SIZE,
                .fallback = "64M",
                .min = 64 << 10,
                .max = (uint64_t)1 << 40,
                .help = "bytes of device memory"},
    [GRANULE] = {.name = "granule",
                 .type = HMM_OPTION_SIZE,
                 .fallback = "0",
                 .max = 2 << 20,
                 .help = "bytes that come and go together; 0: one page"},
    [MAPPED] = {.name = "mapped", .type = HMM_OPTION_FLAG, .help = "libhmm may read device memory without asking the driver"},
    {.name = NULL},
};

/* ---- the device ---- */

struct ram {
    struct hmm_device *dev; /* libhmm's object for us: passed to all its calls */
    char *memory;
    size_t bytes;
    size_t page;
    struct hmm_thread *worker;
    pthread_mutex_t lock; /* protects what follows */
    pthread_cond_t changed;
    struct hmm_job *first, **last; /* jobs that wait, linked through job->next */
    bool running;                  /* the worker has one */
    bool stopped;                  /* no new jobs; the one that runs is to end soon */
    bool ending;                   /* the worker is to return */
    char chunk[CHUNK];             /* the worker's */
};

/* ---- copies ---- */

/* A real device would queue the pieces to its DMA engine and signal the fence from its interrupt. memcpy is done at once, so the fence
 * is signalled before we return, which is allowed. */
static int ram_copy(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    struct ram *r = priv;
    for (unsigned i = 0; i < n; i++) {
        char *at = r->memory + v[i].page * r->page; /* device pages are numbers; what they hold is not our business */
        if (kind == HMM_DMA_TO_DEVICE)
            memcpy(at, v[i].host, v[i].pages * r->page);
        else
            memcpy(v[i].host, at, v[i].pages * r->page);
    }
    hmm_fence_signal(fence, 0);
    return 0;
}

/* Pages that the program never wrote need not be copied. */
static int ram_clear(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    struct ram *r = priv;
    for (unsigned i = 0; i < n; i++)
        memset(r->memory + v[i].page * r->page, 0, v[i].pages * r->page);
    hmm_fence_signal(fence, 0);
    return 0;
}

/* ---- jobs: without submit() this would be a memory tier, and complete here ---- */

/*
 * The bus reaches process memory wherever it is, page by page if need be: pages that are on a device come home first. A device with
 * a page table would ask hmm_range_fault() where pages are, bring them with hmm_device_fault(), and keep a notifier over what it
 * has translated: see docs/drivers.md.
 */
static void run_fill(struct ram *r, const struct hmm_op_fill *op, struct hmm_job_status *status)
{
    memset(r->chunk, op->value, CHUNK);
    for (uint64_t done = 0; done < op->bytes;) {
        uint64_t left = op->bytes - done;
        uintptr_t at = (uintptr_t)op->dst + done;
        if (__atomic_load_n(&r->stopped, __ATOMIC_RELAXED)) {
            *status = (struct hmm_job_status){.status = -ECANCELED, .message = "the device was closed while the job ran"};
            return;
        }
        int64_t n = hmm_bus_write(r->dev, at, r->chunk, left < CHUNK ? left : CHUNK);
        if (n < 0) { /* the program unmapped it, or never had it */
            *status = (struct hmm_job_status){.status = (int32_t)n, .address = at, .message = "the bus refused the address"};
            return;
        }
        done += (uint64_t)n;
    }
}

static void work(void *arg)
{
    struct ram *r = arg;
    pthread_mutex_lock(&r->lock);
    while (!r->ending) {
        struct hmm_job *job = r->first;
        if (!job) {
            pthread_cond_wait(&r->changed, &r->lock);
            continue;
        }
        r->first = job->next;
        if (!r->first)
            r->last = &r->first;
        r->running = true;
        pthread_mutex_unlock(&r->lock);
        struct hmm_job_status status = {0};
        run_fill(r, &job->operation.fill, &status);
        hmm_job_done(job, &status); /* exactly once, and never under a lock that submit() takes; the job is gone now */
        pthread_mutex_lock(&r->lock);
        r->running = false;
        pthread_cond_broadcast(&r->changed);
    }
    pthread_mutex_unlock(&r->lock);
}

static int ram_submit(void *priv, struct hmm_job *job)
{
    struct ram *r = priv;
    if (job->operation.kind != HMM_OP_FILL)
        return -EOPNOTSUPP;
    pthread_mutex_lock(&r->lock);
    bool stopped = r->stopped;
    if (!stopped) {
        job->next = NULL;
        *r->last = job;
        r->last = &job->next;
        pthread_cond_broadcast(&r->changed);
    }
    pthread_mutex_unlock(&r->lock);
    return stopped ? -ENODEV : 0;
}

/* ---- closing: stop() ends the jobs, then libhmm brings every page home, then close() frees ---- */

static void ram_stop(void *priv)
{
    static const struct hmm_job_status canceled = {.status = -ECANCELED, .message = "the device was closed before the job ran"};
    struct ram *r = priv;
    pthread_mutex_lock(&r->lock);
    __atomic_store_n(&r->stopped, true, __ATOMIC_RELAXED);
    struct hmm_job *job = r->first;
    r->first = NULL;
    r->last = &r->first;
    while (r->running)
        pthread_cond_wait(&r->changed, &r->lock);
    pthread_mutex_unlock(&r->lock);
    while (job) {
        struct hmm_job *next = job->next;
        hmm_job_done(job, &canceled);
        job = next;
    }
}

static void ram_free(struct ram *r)
{
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->lock);
    hmm_mem_free(r->memory, r->bytes);
    hmm_mem_free(r, sizeof(*r));
}

static void ram_close(void *priv)
{
    struct ram *r = priv;
    pthread_mutex_lock(&r->lock);
    r->ending = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    hmm_thread_join(r->worker);
    ram_free(r);
}

/* ---- opening: what fails half-way undoes itself, and says what failed, why, and what to do ---- */

static int ram_open(struct hmm_device *dev, const union hmm_option_value *values, void **priv)
{
    struct ram *r = hmm_mem_alloc(sizeof(*r)); /* zeroed, and never migrated itself: malloc'd memory might be */
    if (!r)
        return hmm_fail(-ENOMEM, "ram: no memory for the device");
    r->dev = dev;
    r->page = hmm_page_size();
    r->bytes = values[MEMORY].number & ~(r->page - 1);
    r->last = &r->first;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, NULL);
    r->memory = hmm_mem_alloc(r->bytes);
    int err = r->memory ? 0 : hmm_fail(-ENOMEM, "ram: no %llu bytes of memory; ask for less", (unsigned long long)r->bytes);
    if (!err)
        err = hmm_thread_start(&r->worker, "ram-worker", work, r);
    if (err) {
        ram_free(r);
        return err;
    }
    /* From here on pages may come. */
    err = hmm_pagemap_add(dev, &(struct hmm_pagemap_desc){
                                   .type = HMM_PAGEMAP_PRIVATE,
                                   .pages = r->bytes / r->page,
                                   .granule = values[GRANULE].number,
                                   .cpu_map = values[MAPPED].number ? r->memory : NULL,
                               });
    if (err) {
        ram_close(r);
        return err;
    }
    *priv = r;
    return 0;
}

HMM_DRIVER_EXPORT = {
    .size = sizeof(struct hmm_driver),
    .abi = HMM_DRIVER_ABI,
    .name = "ram", /* as in libhmm-ram.so */
    .description = "a memory tier of plain memory, which can also fill memory",
    .options = options,
    .open = ram_open,
    .stop = ram_stop,
    .close = ram_close,
    .copy = ram_copy,
    .clear = ram_clear,
    .submit = ram_submit,
};
