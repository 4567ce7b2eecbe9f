/* SPDX-License-Identifier: MIT */
/*
 * The jobs that core handed over, first in first out; any number of ports take from it. Invariant, under the lock: `running` is the
 * number of ports that took a job and did not complete it.
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
    pthread_cond_init(&q->finished, &attr);
    pthread_condattr_destroy(&attr);
    q->tail = &q->head;
}

void soft_queue_destroy(struct job_queue *q)
{
    pthread_cond_destroy(&q->finished);
    pthread_mutex_destroy(&q->lock);
}

/* Caller holds the lock. NULL: none is idle. */
static struct port *pop_idle(struct job_queue *q)
{
    struct port *p = q->idle;
    if (p) {
        q->idle = p->below;
        p->idle = false;
    }
    return p;
}

static void push_idle(struct job_queue *q, struct port *p)
{
    if (p->idle)
        return;
    p->below = q->idle;
    p->idle = true;
    q->idle = p;
}

/* Somebody else's wake-up may have come first. */
static void leave_idle(struct job_queue *q, struct port *p)
{
    struct port **at = &q->idle;
    while (p->idle && *at != p)
        at = &(*at)->below;
    if (p->idle)
        *at = p->below;
    p->idle = false;
}

int soft_queue_add(struct job_queue *q, struct hmm_job *job)
{
    struct port *idle = NULL;
    pthread_mutex_lock(&q->lock);
    bool stopped = q->stopped;
    if (!stopped) {
        job->next = NULL;
        *q->tail = job;
        q->tail = &job->next;
        idle = pop_idle(q);
    }
    pthread_mutex_unlock(&q->lock);
    if (idle)
        pthread_cond_signal(&idle->work); /* after the lock, or who wakes up waits for it at once */
    return stopped ? -ENODEV : 0;
}

struct hmm_job *soft_queue_take(struct job_queue *q, struct port *p)
{
    pthread_mutex_lock(&q->lock);
    while (!q->head && !q->ending) {
        push_idle(q, p);
        pthread_cond_wait(&p->work, &q->lock);
    }
    leave_idle(q, p);
    struct hmm_job *job = q->head;
    if (job) {
        q->head = job->next;
        if (!q->head)
            q->tail = &q->head;
        q->running++;
        soft_port_begin(p, job);
    }
    pthread_mutex_unlock(&q->lock);
    return job;
}

void soft_queue_ended(struct job_queue *q, struct port *p)
{
    pthread_mutex_lock(&q->lock);
    p->job = NULL;
    pthread_mutex_unlock(&q->lock);
}

void soft_queue_done(struct job_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->running--;
    if (q->running == 0)
        pthread_cond_broadcast(&q->finished);
    pthread_mutex_unlock(&q->lock);
}

bool soft_queue_remove(struct job_queue *q, struct hmm_job *job)
{
    pthread_mutex_lock(&q->lock);
    struct hmm_job **at = &q->head;
    while (*at && *at != job)
        at = &(*at)->next;
    bool found = *at;
    if (found) {
        *at = job->next;
        if (q->tail == &job->next)
            q->tail = at;
    }
    pthread_mutex_unlock(&q->lock);
    return found;
}

struct hmm_job *soft_queue_stop(struct job_queue *q)
{
    pthread_mutex_lock(&q->lock);
    struct hmm_job *jobs = q->head;
    q->head = NULL;
    q->tail = &q->head;
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
        r = pthread_cond_timedwait(&q->finished, &q->lock, &until);
    bool idle = q->running == 0;
    pthread_mutex_unlock(&q->lock);
    return idle;
}

void soft_queue_end(struct job_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->ending = true;
    for (struct port *p; (p = pop_idle(q));)
        pthread_cond_signal(&p->work);
    pthread_mutex_unlock(&q->lock);
}
