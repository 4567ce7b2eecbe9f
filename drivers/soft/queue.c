/* SPDX-License-Identifier: MIT */
/*
 * The job queue: bounded, first in first out, any number of engines take from it. Invariant, under the lock: `running` is the
 * number of engines whose `job` is set.
 */
#include "soft.h"

#include <errno.h>
#include <time.h>

void soft_queue_init(struct job_queue *q)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->filled, &attr);
    pthread_cond_init(&q->idle, &attr);
    pthread_condattr_destroy(&attr);
    q->tail = &q->head;
}

void soft_queue_destroy(struct job_queue *q)
{
    pthread_cond_destroy(&q->idle);
    pthread_cond_destroy(&q->filled);
    pthread_mutex_destroy(&q->lock);
}

int soft_queue_add(struct job_queue *q, struct hmm_job *job)
{
    int r = 0;
    pthread_mutex_lock(&q->lock);
    if (q->stopped) {
        r = -ENODEV;
    } else if (q->count == QUEUE_MAX) {
        r = -EBUSY;
    } else {
        job->next = NULL;
        *q->tail = job;
        q->tail = &job->next;
        q->count++;
        pthread_cond_signal(&q->filled);
    }
    pthread_mutex_unlock(&q->lock);
    return r;
}

struct hmm_job *soft_queue_take(struct job_queue *q, struct engine *e)
{
    pthread_mutex_lock(&q->lock);
    while (!q->head && !q->ending)
        pthread_cond_wait(&q->filled, &q->lock);
    struct hmm_job *job = q->head;
    if (job) {
        q->head = job->next;
        if (!q->head)
            q->tail = &q->head;
        q->count--;
        q->running++;
        e->job = job;
        /* The deadline is written first: who sees the generation sees its deadline. */
        __atomic_store_n(&e->deadline_ms, job->op == HMM_OP_KERNEL ? job->deadline_ms : 0, __ATOMIC_RELAXED);
        __atomic_fetch_add(&e->generation, 1, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&q->lock);
    return job;
}

void soft_queue_done(struct job_queue *q, struct engine *e)
{
    pthread_mutex_lock(&q->lock);
    e->job = NULL;
    q->running--;
    if (q->running == 0)
        pthread_cond_broadcast(&q->idle);
    pthread_mutex_unlock(&q->lock);
}

struct hmm_job *soft_queue_stop(struct job_queue *q)
{
    pthread_mutex_lock(&q->lock);
    struct hmm_job *jobs = q->head;
    q->head = NULL;
    q->tail = &q->head;
    q->count = 0;
    q->stopped = true;
    pthread_mutex_unlock(&q->lock);
    return jobs;
}

bool soft_queue_wait_idle(struct job_queue *q, uint32_t timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    int r = 0;
    pthread_mutex_lock(&q->lock);
    while (q->running && r != ETIMEDOUT)
        r = pthread_cond_timedwait(&q->idle, &q->lock, &until);
    bool idle = q->running == 0;
    pthread_mutex_unlock(&q->lock);
    return idle;
}

void soft_queue_end(struct job_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->ending = true;
    pthread_cond_broadcast(&q->filled);
    pthread_mutex_unlock(&q->lock);
}
