/* SPDX-License-Identifier: MIT */
/* Completions that are held back, by a thread of their own: whoever finishes a job must not sleep. */
#include "faulty.h"

#include <errno.h>
#include <time.h>

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Takes one off whose time has come; else *next is when the first will be. Caller holds the lock. */
static struct record *take_due(struct delays *d, uint64_t *next)
{
    uint64_t now = now_ns();
    *next = UINT64_MAX;
    for (struct record **at = &d->held; *at; at = &(*at)->next) {
        struct record *r = *at;
        if (d->flush || r->due <= now) {
            *at = r->next;
            return r;
        }
        if (r->due < *next)
            *next = r->due;
    }
    return NULL;
}

static void wait_until(struct delays *d, uint64_t ns)
{
    struct timespec until = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    if (ns == UINT64_MAX)
        pthread_cond_wait(&d->changed, &d->lock);
    else
        pthread_cond_timedwait(&d->changed, &d->lock, &until);
}

static void delay_thread(void *arg)
{
    struct delays *d = arg;
    uint64_t next;
    pthread_mutex_lock(&d->lock);
    while (!d->ending) {
        struct record *r = take_due(d, &next);
        if (!r) {
            wait_until(d, next);
            continue;
        }
        d->completing++;
        pthread_mutex_unlock(&d->lock);
        faulty_complete(r);
        pthread_mutex_lock(&d->lock);
        d->completing--;
        pthread_cond_broadcast(&d->changed);
    }
    pthread_mutex_unlock(&d->lock);
}

void faulty_delays_add(struct faulty *f, struct record *r)
{
    struct delays *d = &f->delays;
    if (!d->thread) {
        faulty_complete(r);
        return;
    }
    pthread_mutex_lock(&d->lock);
    r->due = now_ns() + f->job_delay_us * 1000ull;
    r->next = d->held;
    d->held = r;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->lock);
}

bool faulty_delays_hurry(struct faulty *f, const struct hmm_job *job)
{
    struct delays *d = &f->delays;
    pthread_mutex_lock(&d->lock);
    struct record *r = d->held;
    while (r && r->job != job)
        r = r->next;
    if (r) {
        r->due = 0;
        pthread_cond_broadcast(&d->changed);
    }
    pthread_mutex_unlock(&d->lock);
    return r != NULL;
}

void faulty_delays_flush(struct faulty *f)
{
    struct delays *d = &f->delays;
    pthread_mutex_lock(&d->lock);
    d->flush = true;
    pthread_cond_broadcast(&d->changed);
    while (d->held || d->completing)
        pthread_cond_wait(&d->changed, &d->lock);
    pthread_mutex_unlock(&d->lock);
}

int faulty_delays_init(struct faulty *f)
{
    struct delays *d = &f->delays;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->changed, &attr);
    pthread_condattr_destroy(&attr);
    int r = f->job_delay_us ? hmm_thread_start(&d->thread, "hmm-faulty", delay_thread, d) : 0;
    if (r) {
        pthread_cond_destroy(&d->changed);
        pthread_mutex_destroy(&d->lock);
    }
    return r;
}

void faulty_delays_exit(struct faulty *f)
{
    struct delays *d = &f->delays;
    if (d->thread) {
        pthread_mutex_lock(&d->lock);
        d->ending = true;
        pthread_cond_broadcast(&d->changed);
        pthread_mutex_unlock(&d->lock);
        hmm_thread_join(d->thread);
    }
    pthread_cond_destroy(&d->changed);
    pthread_mutex_destroy(&d->lock);
}
