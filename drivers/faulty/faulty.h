/* SPDX-License-Identifier: MIT */
/*
 * `faulty` wraps another device and fails on demand: it opens the other driver with its own device, forwards every operation, and
 * comes between. Memory, notifiers and device faults are the inner driver's; it does not know that it is wrapped.
 *
 * What is hit is drawn from a seed and a counter of its own per kind of failure, so a run with one thread repeats.
 */
#ifndef HMM_DRIVERS_FAULTY_H
#define HMM_DRIVERS_FAULTY_H

#include <hmm/driver.h>

#include <pthread.h>

enum hit { HIT_COPY, HIT_CLEAR, HIT_SUBMIT, HIT_JOB, HITS };

/* A job that the inner driver has, or has finished while the program is not to know it yet. */
struct record {
    struct faulty *faulty;
    struct hmm_job *job;
    void (*done)(struct hmm_job *job, const struct hmm_job_status *status); /* of a wrapper around us, as `wrapper` */
    void *wrapper;
    struct record *next;
    uint64_t due; /* nanoseconds */
    struct hmm_job_status status;
    char message[160];
};

/* Finished jobs that are held back. */
struct delays {
    struct hmm_thread *thread; /* NULL: none is held back */
    pthread_mutex_t lock;      /* all below */
    pthread_cond_t changed;
    struct record *held;
    unsigned completing; /* taken off, and not done yet */
    bool flush;          /* nothing is held back any more */
    bool ending;
};

struct faulty {
    struct hmm_device *dev;
    const struct hmm_driver *inner;
    void *inner_priv;
    uint64_t seed;
    uint32_t permille[HITS];
    uint64_t drawn[HITS]; /* atomic */
    uint32_t copy_delay_us, clear_delay_us, job_delay_us;
    uint64_t lose_after, lose_engines_after;
    uint64_t operations; /* atomic */
    struct delays delays;
};

/* ---- jobs.c ---- */

int faulty_submit(void *priv, struct hmm_job *job);
void faulty_cancel(void *priv, struct hmm_job *job, int status, const char *message);

/* ---- delay.c ---- */

/* Starts the thread if jobs are to be held back. */
int faulty_delays_init(struct faulty *f);
/* No job is held any more. */
void faulty_delays_exit(struct faulty *f);
/* Completes the job when its time has come; frees the record. Does not block. */
void faulty_delays_add(struct faulty *f, struct record *r);
/* Completes it soon, if it is held back: false: it is not. */
bool faulty_delays_hurry(struct faulty *f, const struct hmm_job *job);
/* Completes all, and from now on at once. */
void faulty_delays_flush(struct faulty *f);
/* Completes the job and frees the record. No locks. */
void faulty_complete(struct record *r);

/* ---- faulty.c ---- */

/* Whether this call is to fail; *more: further random bits. */
bool faulty_hit(struct faulty *f, enum hit what, uint64_t *more);
/* Counts an operation, and loses the device when its time has come: true: it has no memory any more. */
bool faulty_memory_lost(struct faulty *f);
/* Whether it runs no jobs any more. */
bool faulty_engines_lost(const struct faulty *f);
void faulty_sleep_us(uint32_t us);

extern const struct hmm_driver faulty_driver;

#endif
