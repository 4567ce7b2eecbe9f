/* SPDX-License-Identifier: MIT */
/*
 * A device for tests of the scheduler: it runs nothing, notes what it is given, and completes jobs when it is told to, at once, or in
 * threads of its own. Its jobs are checksums whose number of bytes is their tag.
 */
#ifndef TESTS_UNIT_FAKE_DEVICE_H
#define TESTS_UNIT_FAKE_DEVICE_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/alloc.h"
#include "base/error.h"
#include "job/job.h"

#define FAKE_LOG 200000

struct fake {
    struct hmm_device dev;
    struct hmm_driver driver;
    pthread_mutex_t lock;
    struct hmm_job *first, **last; /* with the driver */
    uint32_t with, most;           /* jobs with the driver; the most there were */
    uint32_t submitted, done, cancels;
    bool slow;       /* submit() takes its time */
    bool at_once;    /* completes inside submit() */
    int refuse;      /* what submit() answers */
    bool obeys;      /* cancel() completes the job; else it does nothing */
    int asked;       /* status of the last cancel() */
    uint64_t *order; /* tags as they came */
};

static int fake_submit(void *priv, struct hmm_job *job)
{
    struct fake *f = priv;
    if (f->slow)
        os_sleep(50000000);
    pthread_mutex_lock(&f->lock);
    int r = f->refuse;
    if (!r) {
        if (f->submitted < FAKE_LOG)
            f->order[f->submitted] = job->operation.crc32c.bytes;
        f->submitted++;
        if (++f->with > f->most)
            f->most = f->with;
        job->next = NULL;
        if (!f->at_once) {
            *f->last = job;
            f->last = &job->next;
        } else {
            f->with--;
            f->done++;
        }
    }
    bool at_once = f->at_once;
    pthread_mutex_unlock(&f->lock);
    if (!r && at_once)
        hmm_job_done(job, &(struct hmm_job_status){.result = job->operation.crc32c.bytes});
    return r;
}

/* Takes the job with this tag from the driver, or with 0 the first; NULL: it has none such. */
static struct hmm_job *fake_take(struct fake *f, uint64_t tag)
{
    pthread_mutex_lock(&f->lock);
    struct hmm_job **at = &f->first;
    while (*at && tag && (*at)->operation.crc32c.bytes != tag)
        at = &(*at)->next;
    struct hmm_job *job = *at;
    if (job) {
        *at = job->next;
        if (!*at)
            f->last = at;
        f->with--;
        f->done++;
    }
    pthread_mutex_unlock(&f->lock);
    return job;
}

/* Completes it; false: the driver does not have it. */
static inline bool fake_finish(struct fake *f, uint64_t tag, int status)
{
    struct hmm_job *job = fake_take(f, tag);
    if (!job)
        return false;
    hmm_job_done(job, &(struct hmm_job_status){.status = status,
                                               .result = job->operation.crc32c.bytes,
                                               .message = status ? "fake: it broke" : NULL});
    return true;
}

static void fake_cancel(void *priv, struct hmm_job *job, int status, const char *message)
{
    struct fake *f = priv;
    pthread_mutex_lock(&f->lock);
    f->cancels++;
    f->asked = status;
    bool obeys = f->obeys;
    pthread_mutex_unlock(&f->lock);
    if (!obeys)
        return;
    struct hmm_job *mine = fake_take(f, job->operation.crc32c.bytes);
    if (mine)
        hmm_job_done(mine, &(struct hmm_job_status){.status = status, .message = message});
}

/* What the thread of time limits may be changing. */
static inline uint32_t fake_cancels(struct fake *f, int *asked)
{
    pthread_mutex_lock(&f->lock);
    uint32_t n = f->cancels;
    if (asked)
        *asked = f->asked;
    pthread_mutex_unlock(&f->lock);
    return n;
}

static inline void fake_obey(struct fake *f)
{
    pthread_mutex_lock(&f->lock);
    f->obeys = true;
    pthread_mutex_unlock(&f->lock);
}

static inline uint32_t fake_submitted(struct fake *f)
{
    pthread_mutex_lock(&f->lock);
    uint32_t n = f->submitted;
    pthread_mutex_unlock(&f->lock);
    return n;
}

static inline struct fake *fake_open(uint32_t slots)
{
    struct fake *f = calloc(1, sizeof(*f));
    f->order = calloc(FAKE_LOG, sizeof(*f->order));
    pthread_mutex_init(&f->lock, NULL);
    f->last = &f->first;
    f->driver = (struct hmm_driver){.name = "fake", .submit = fake_submit, .cancel = fake_cancel};
    f->dev.driver = &f->driver;
    f->dev.priv = f;
    if (sched_new(&f->dev) ||
        hmm_engines_add(&f->dev, &(struct hmm_engines_desc){.size = sizeof(struct hmm_engines_desc), .slots = slots}))
        abort();
    sched_open(&f->dev);
    return f;
}

/* Completes what the driver has, as stop() does. */
static inline void fake_close(struct fake *f)
{
    sched_stop(&f->dev);
    while (fake_finish(f, 0, -ECANCELED))
        ;
    sched_wait(&f->dev);
    sched_free(&f->dev);
    pthread_mutex_destroy(&f->lock);
    free(f->order);
    free(f);
}

struct fake_job {
    uint64_t tag;
    hmm_queue *queue;
    hmm_fence *const *wait;
    uint32_t nwait;
    uint32_t timeout_ms;
};

static inline int fake_try(struct fake *f, const struct fake_job *j, hmm_fence **fence)
{
    struct hmm_job_desc desc = {.size = sizeof(desc),
                                .timeout_ms = j->timeout_ms,
                                .queue = j->queue,
                                .wait = j->wait,
                                .nwait = j->nwait,
                                .operation.kind = HMM_OP_CRC32C};
    desc.operation.crc32c = (struct hmm_op_crc32c){.src = (void *)1, .bytes = j->tag};
    struct job_request rq;
    int r = job_read(&rq, &desc, NULL);
    if (r)
        return r;
    signals_block();
    struct job *job = job_new(&f->dev, &rq, &r);
    if (job)
        r = job_submit(job, fence);
    signals_unblock();
    return r;
}

#endif
