/* SPDX-License-Identifier: MIT */
/*
 * The scheduler of one device. See job.h for states, references and locks.
 *
 * A job that ends does so in these steps: under the lock it leaves every list and frees its slot (so whoever waits for its fence
 * and submits again finds room); its fence is published; callbacks of the fence run, and start what waited for it; then, in
 * after_end(), free slots are filled. All of this happens in the thread that ended the job, so that a chain needs no other.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/error.h"
#include "base/futex.h"
#include "job/job.h"

#define ASK_AGAIN_NS 20000000ull

static const char closed[] = "the device was closed";

/* Of two jobs that could begin: the higher priority, then the older. */
static bool begins_before(const struct heap_node *a, const struct heap_node *b)
{
    const struct job *x = container_of(a, struct job, ready), *y = container_of(b, struct job, ready);
    return x->job.priority != y->job.priority ? x->job.priority > y->job.priority : x->seq < y->seq;
}

static struct job *from_ready(struct heap_node *n)
{
    return n ? container_of(n, struct job, ready) : NULL;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

int sched_new(struct hmm_device *dev)
{
    struct sched *s = mem_alloc(sizeof(*s));
    if (!s)
        return hmm_fail(-ENOMEM, "no memory for the jobs of a device");
    mutex_init(&s->lock, RANK_JOBS);
    s->refs = 1;
    s->dev = dev;
    s->slots = 1;
    s->ready.before = begins_before;
    list_init(&s->held);
    dev->sched = s;
    return 0;
}

void sched_open(struct hmm_device *dev)
{
    dev->sched->open = true;
}

void sched_get(struct sched *s)
{
    __atomic_fetch_add(&s->refs, 1, __ATOMIC_RELAXED);
}

void sched_put(struct sched *s)
{
    if (__atomic_fetch_sub(&s->refs, 1, __ATOMIC_ACQ_REL) != 1)
        return;
    mutex_destroy(&s->lock);
    mem_free(s, sizeof(*s));
}

void sched_free(struct hmm_device *dev)
{
    sched_put(dev->sched);
    dev->sched = NULL;
}

int hmm_engines_add(struct hmm_device *dev, const struct hmm_engines_desc *desc)
{
    struct sched *s = dev->sched;
    if (!desc || desc->size < sizeof(*desc) || desc->reserved || desc->flags & ~HMM_ENGINES_NAMED)
        return hmm_fail(-EINVAL, "driver %s: hmm_engines_add: set size, known flags, and zeros", dev->driver->name);
    if (desc->slots < 1 || desc->slots > JOBS_MAX)
        return hmm_fail(-EINVAL, "driver %s: hmm_engines_add: %u slots are not within 1 and %d", dev->driver->name, desc->slots,
                        JOBS_MAX);
    if (!dev->driver->submit || s->open)
        return hmm_fail(-EINVAL, "driver %s: hmm_engines_add: %s", dev->driver->name,
                        s->open ? "call it from open()" : "it has no submit()");
    s->slots = desc->slots;
    s->flags = desc->flags;
    return 0;
}

/* Caller holds the lock. */
static int refuse(const struct sched *s)
{
    if (s->refusal == closed)
        return hmm_fail(-ENODEV, "the device was closed: its queues take no jobs any more");
    return hmm_fail(-ENODEV, "the device is lost (%s): close it", s->refusal);
}

int sched_check(struct sched *s)
{
    mutex_lock(&s->lock);
    int r = s->refusal ? refuse(s) : 0;
    mutex_unlock(&s->lock);
    return r;
}

uint32_t sched_jobs(struct hmm_device *dev)
{
    struct sched *s = dev->sched;
    mutex_lock(&s->lock);
    uint32_t n = s->jobs;
    mutex_unlock(&s->lock);
    return n;
}

/* ---- whose turn it is -------------------------------------------------------------------------------------------- */

/* Makes a job ready that could begin. Caller holds the lock. */
static void consider(struct job *job)
{
    struct hmm_queue *q = job->queue;
    if (job->state != JOB_HELD || job->waits)
        return;
    if (q && q->in_order && q->turns.next != &job->turn)
        return;
    job->state = JOB_READY;
    heap_insert(&job->sched->ready, &job->ready);
}

/* Takes it off every list. The next of its queue may be ready now. Caller holds the lock, and then calls finish(). */
static void end(struct job *job)
{
    struct sched *s = job->sched;
    if (job->state == JOB_RUNNING)
        s->running--;
    else
        list_del(&job->link);
    if (job->state == JOB_READY)
        heap_remove(&s->ready, &job->ready);
    job->state = JOB_ENDED;
    s->jobs--;
    timer_clear(job);
    list_del(&job->turn);
    if (job->queue && !list_empty(&job->queue->turns))
        consider(container_of(job->queue->turns.next, struct job, turn));
}

/* Those that are registered still. The submitting thread may still be registering others: it takes them off itself. */
static void take_off_dependencies(struct job *job)
{
    for (unsigned i = 0; i < job->ndependencies; i++) {
        struct dependency *d = &job->dependencies[i];
        if (!fence_remove_callback(&d->callback))
            continue;
        fence_put(d->fence);
        job_put(job);
    }
}

/* The job has ended: publishes it, and lets go of core's reference (after_end). No locks. */
static void finish(struct job *job, const struct hmm_job_status *status)
{
    take_off_dependencies(job);
    fence_complete(&job->fence, status);
}

static void finish_with(struct job *job, int status, const char *why)
{
    finish(job, &(struct hmm_job_status){.status = status, .message = why});
}

/* Caller holds the lock. */
static void wake_waiters(struct sched *s)
{
    if (!s->waiters)
        return;
    s->word++;
    mutex_wake_all(&s->word);
}

/* Caller holds the lock, which is released meanwhile. */
static int call_submit(struct sched *s, struct job *job)
{
    s->calls++;
    s->submits++;
    mutex_unlock(&s->lock);
    int r = s->dev->driver->submit(s->dev->priv, &job->job);
    mutex_lock(&s->lock);
    s->calls--;
    s->submits--;
    wake_waiters(s);
    return r;
}

/* Fills free slots. Returns what `mine` was refused with by the driver, or 0. Caller holds the lock, which is released meanwhile. */
static int fill_slots(struct sched *s, const struct job *mine)
{
    int refused = 0;
    struct job *job;
    while (!s->refusal && s->running < s->slots && (job = from_ready(s->ready.first)) != NULL) {
        heap_remove(&s->ready, &job->ready);
        list_del(&job->link);
        job->state = JOB_RUNNING;
        s->running++;
        int r = call_submit(s, job);
        if (!r)
            continue;
        end(job);
        if (job == mine)
            refused = r;
        mutex_unlock(&s->lock);
        finish_with(job, r, NULL);
        mutex_lock(&s->lock);
    }
    return refused;
}

void hmm_job_done(struct hmm_job *done, const struct hmm_job_status *status)
{
    struct job *job = container_of(done, struct job, job);
    struct sched *s = job->sched;
    void (*intercept)(struct hmm_job *, const struct hmm_job_status *) = done->done;
    if (intercept) { /* a wrapping driver sees it first */
        done->done = NULL;
        intercept(done, status);
        return;
    }
    mutex_lock(&s->lock);
    bool running = job->state == JOB_RUNNING;
    if (running)
        end(job);
    mutex_unlock(&s->lock);
    if (running)
        finish(job, status);
    else
        hmm_log(HMM_LOG_ERROR, "hmm_job_done: job %p is not with the driver, or done already", (void *)done);
}

/* ---- the life of a job ------------------------------------------------------------------------------------------- */

static void free_block(struct job *job)
{
    if (job->block)
        mem_free(job->block, job->block_bytes);
    job->block = NULL;
}

static void after_end(hmm_fence *fence)
{
    struct job *job = container_of(fence, struct job, fence);
    struct sched *s = job->sched;
    if (job->queue)
        queue_put(job->queue);
    job->queue = NULL;
    if (!job->end_status) /* else the driver may be looking at it, in cancel(): kept as long as the job */
        free_block(job);
    sched_get(s); /* the job may be the last that has it */
    mutex_lock(&s->lock);
    fill_slots(s, NULL);
    s->unsettled--;
    wake_waiters(s);
    mutex_unlock(&s->lock);
    job_put(job);
    sched_put(s);
}

static void free_job(hmm_fence *fence)
{
    struct job *job = container_of(fence, struct job, fence);
    if (job->queue)
        queue_put(job->queue);
    free_block(job);
    sched_put(job->sched);
    mem_free(job, sizeof(*job) + job->ndependencies * sizeof(job->dependencies[0]));
}

const struct fence_kind job_kind = {.after = after_end, .free = free_job};

/* Caller holds the lock. */
static int admit(struct sched *s, struct job *job)
{
    if (s->refusal)
        return refuse(s);
    if (s->jobs == JOBS_MAX)
        return hmm_fail(-EBUSY, "device %s has %d jobs already: wait for a fence, then submit again", s->dev->driver->name,
                        JOBS_MAX);
    s->jobs++;
    s->unsettled++;
    job->seq = s->seq++;
    job->state = JOB_HELD;
    job->waits = job->ndependencies ? job->ndependencies + 1 : 0; /* one until all are registered */
    list_add_tail(&s->held, &job->link);
    if (job->queue && job->queue->in_order)
        list_add_tail(&job->queue->turns, &job->turn);
    if (job->limit)
        timer_set(job, job->limit);
    consider(job);
    return 0;
}

static void dependency_done(struct job *job)
{
    struct sched *s = job->sched;
    mutex_lock(&s->lock);
    if (--job->waits == 0) {
        consider(job);
        fill_slots(s, NULL);
    }
    mutex_unlock(&s->lock);
}

static void dependency_failed(struct job *job, const hmm_fence *fence)
{
    static const char failed[] = "a job that it waits for failed: ";
    const char *reason = fence->message[0] ? fence->message : hmm_strerror(fence->status);
    char why[sizeof(fence->message) + sizeof(failed)];
    bool passed_on = strncmp(reason, failed, sizeof(failed) - 1) == 0; /* along a chain the first reason stays readable */
    snprintf(why, sizeof(why), "%s%s", passed_on ? "" : failed, reason);
    sched_end_held(job, -ECANCELED, why);
}

void sched_dependency_fired(struct fence_callback *cb, hmm_fence *fence)
{
    struct dependency *d = container_of(cb, struct dependency, callback);
    struct job *job = d->job;
    if (fence->status < 0)
        dependency_failed(job, fence);
    else
        dependency_done(job);
    fence_put(d->fence);
    job_put(job);
}

/* The last step is for the one that stands for all: it makes the job ready if every fence was done before. The caller's reference
 * keeps the job. */
static void register_dependencies(struct job *job)
{
    struct sched *s = job->sched;
    for (unsigned i = 0; i < job->ndependencies; i++) {
        struct dependency *d = &job->dependencies[i];
        fence_get(d->fence);
        fence_get(&job->fence);
        if (!fence_add_callback(d->fence, &d->callback))
            sched_dependency_fired(&d->callback, d->fence);
    }
    mutex_lock(&s->lock);
    bool ended = job->state == JOB_ENDED;
    mutex_unlock(&s->lock);
    if (ended)
        take_off_dependencies(job);
    else
        dependency_done(job);
}

int sched_submit(struct job *job)
{
    struct sched *s = job->sched;
    mutex_lock(&s->lock);
    int r = admit(s, job);
    if (r) {
        mutex_unlock(&s->lock);
        return r;
    }
    fence_get(&job->fence); /* core's; the caller keeps its own */
    int refused = fill_slots(s, job);
    mutex_unlock(&s->lock);
    if (job->ndependencies)
        register_dependencies(job);
    if (refused)
        hmm_fail(refused, "device %s does not take the job: %s", s->dev->driver->name, hmm_strerror(refused));
    return refused;
}

/* ---- ending jobs before their time ------------------------------------------------------------------------------- */

bool sched_end_held(struct job *job, int status, const char *why)
{
    struct sched *s = job->sched;
    mutex_lock(&s->lock);
    bool held = job->state == JOB_HELD || job->state == JOB_READY;
    if (held)
        end(job);
    mutex_unlock(&s->lock);
    if (held)
        finish_with(job, status, why);
    return held;
}

int sched_cancel(struct job *job)
{
    struct sched *s = job->sched;
    if (sched_end_held(job, -ECANCELED, "cancelled by hmm_job_cancel() before it began"))
        return 0;
    mutex_lock(&s->lock);
    bool running = job->state == JOB_RUNNING;
    if (running && s->dev->driver->cancel) {
        if (!job->end_status)
            job->end_status = -ECANCELED;
        timer_set(job, 0); /* the driver is asked in a library thread */
    }
    mutex_unlock(&s->lock);
    return running ? 0 : -EALREADY;
}

static void describe_end(const struct job *job, int status, char *text, size_t size)
{
    if (status == -ETIMEDOUT)
        snprintf(text, size, "it was not done %u ms after its submission, its time limit (timeout_ms)", job->timeout_ms);
    else
        snprintf(text, size, "cancelled by hmm_job_cancel()");
}

/* Caller holds the lock, which is released meanwhile. */
static void call_cancel(struct sched *s, struct job *job, const char *why)
{
    int status = job->end_status;
    s->calls++;
    mutex_unlock(&s->lock);
    s->dev->driver->cancel(s->dev->priv, &job->job, status, why);
    mutex_lock(&s->lock);
    s->calls--;
    wake_waiters(s);
}

void sched_timer(struct job *job)
{
    struct sched *s = job->sched;
    char why[128];
    describe_end(job, -ETIMEDOUT, why, sizeof(why));
    sched_end_held(job, -ETIMEDOUT, why);
    mutex_lock(&s->lock);
    if (job->state == JOB_RUNNING && s->dev->driver->cancel) {
        if (!job->end_status)
            job->end_status = -ETIMEDOUT;
        describe_end(job, job->end_status, why, sizeof(why));
        call_cancel(s, job, why);
        if (job->state == JOB_RUNNING)
            timer_set(job, os_now() + ASK_AGAIN_NS);
    }
    mutex_unlock(&s->lock);
}

/* Ends everything that the driver does not have. All are marked before the first is finished: what waits for another ends with
 * this status, too. */
static void end_all_held(struct sched *s, const char *refusal, int status, const char *why)
{
    struct list ended;
    list_init(&ended);
    mutex_lock(&s->lock);
    s->refusal = refusal;
    while (!list_empty(&s->held)) {
        struct job *job = container_of(s->held.next, struct job, link);
        end(job);
        fence_get(&job->fence);
        list_add_tail(&ended, &job->link);
    }
    mutex_unlock(&s->lock);
    while (!list_empty(&ended)) {
        struct job *job = container_of(ended.next, struct job, link);
        list_del(&job->link);
        finish_with(job, status, why);
        job_put(job);
    }
}

void sched_stop(struct hmm_device *dev)
{
    struct sched *s = dev->sched;
    end_all_held(s, closed, -ECANCELED, "the device was closed before the job ran");
    mutex_lock(&s->lock);
    s->waiters++;
    while (s->submits)
        mutex_wait(&s->lock, &s->word, s->word);
    s->waiters--;
    mutex_unlock(&s->lock);
}

void sched_wait(struct hmm_device *dev)
{
    struct sched *s = dev->sched;
    mutex_lock(&s->lock);
    s->waiters++;
    while (s->unsettled || s->calls)
        mutex_wait(&s->lock, &s->word, s->word);
    s->waiters--;
    mutex_unlock(&s->lock);
}

void sched_lost(struct hmm_device *dev, const char *reason)
{
    struct sched *s = dev->sched;
    mutex_lock(&s->lock);
    bool first = !s->refusal;
    if (first) {
        snprintf(s->lost, sizeof(s->lost), "%s", reason ? reason : "no reason was given");
        s->refusal = s->lost; /* a second loss at the same time leaves the text alone */
    }
    mutex_unlock(&s->lock);
    if (first)
        end_all_held(s, s->lost, -ENODEV, s->lost);
}
