/* SPDX-License-Identifier: MIT */
/*
 * Jobs: queues, dependencies, time limits; standing on fences and the driver interface.
 *
 *   submit.c     from the program's description to a job: checks, copies, references
 *   operation.c  what each operation may be asked, and which memory it uses
 *   kernel.c     names of kernels
 *   sched.c      per device: which job the driver gets next
 *   queue.c      queues of the program
 *   timer.c      the thread "hmm-jobs": time limits, requests to end, descriptors of fences
 *
 * Core keeps the jobs; a driver gets one when its fences are done, its turn in an in-order queue has come and a slot is free. So
 * drivers know nothing of dependencies, priorities and time limits.
 *
 *         submit            fences done, its turn        a slot is free              hmm_job_done()
 *   ----------------> HELD ----------------------> READY --------------> RUNNING --------------------> ENDED
 *                       |                            |                                                  ^
 *                       +----------------------------+--- cancelled, time limit, device closed or lost -+
 *
 * A job and its fence are one object with one count of references: core has one until the job ended and what follows has begun, the
 * program one if it asked for the fence, and each callback that waits for another fence has one. A queue and the scheduler are
 * referenced by jobs and handles; the scheduler outlives its device, and then refuses everything.
 *
 * Locks: sched.lock (RANK_JOBS), under it timer.lock and those of fences (RANK_QUEUE). None is held across a call of the driver or
 * a completion. Everything from hmm_job_done() on obeys the rule of <hmm/driver.h>.
 */
#ifndef HMM_JOB_JOB_H
#define HMM_JOB_JOB_H

#include "base/fence.h"
#include "base/heap.h"
#include "base/list.h"
#include "base/lock.h"
#include "base/util.h"
#include "mm/mm.h"
#include <hmm/driver.h>

#define JOBS_MAX 65536   /* of a device */
#define JOB_WAITS_MAX 64 /* fences that a job waits for */
#define JOB_RANGES_MAX 64
#define OPERATION_RANGES_MAX 3 /* of operations but kernels */
#define JOB_ARG_MAX (64u << 10)

enum job_state { JOB_HELD, JOB_READY, JOB_RUNNING, JOB_ENDED };

struct job;

/* A fence that a job waits for. Registered, it has a reference to the fence and one to the job; whoever takes it off puts both. */
struct dependency {
    struct fence_callback callback;
    hmm_fence *fence;
    struct job *job;
};

extern const struct fence_kind job_kind;

struct job {
    hmm_fence fence; /* its references are the job's */
    struct hmm_job job;
    struct sched *sched;
    struct hmm_queue *queue; /* NULL: the device's own */

    /* Under sched->lock. */
    enum job_state state;
    struct list link;       /* HELD, READY: sched->held */
    struct list turn;       /* until it ended: queue->turns of an in-order queue */
    struct heap_node ready; /* READY: sched->ready */
    uint64_t seq;           /* age */
    uint32_t waits;         /* fences that are not done */
    int end_status;         /* RUNNING: what it is asked to end with, or 0 */

    /* Under the timer's lock, which nests in sched->lock. */
    struct heap_node timer;
    uint64_t when; /* os_now() */
    bool timed;    /* in the timer's heap; set under both locks, so that who holds sched->lock and sees false need not ask */

    uint64_t limit; /* os_now() when its time is up; 0: none */
    uint32_t timeout_ms;
    void *block; /* argument and ranges of a kernel; NULL: none */
    size_t block_bytes;
    struct hmm_range ranges[OPERATION_RANGES_MAX];
    unsigned ndependencies;
    struct dependency dependencies[];
};

/* ---- sched.c ----------------------------------------------------------------------------------------------------- */

struct sched {
    uint32_t refs; /* atomic */
    struct hmm_device *dev;
    struct mutex lock;
    const char *refusal; /* why no job is taken; NULL: they are */
    char lost[120];      /* the reason */
    uint32_t slots, flags;
    bool open;          /* the driver's open() has returned */
    uint32_t running;   /* jobs with the driver */
    uint32_t jobs;      /* not ended */
    uint32_t unsettled; /* not ended, or what follows is still to be done */
    uint32_t calls;     /* into the driver */
    uint32_t submits;   /* of these, submit() */
    uint64_t seq;
    struct heap ready; /* jobs that could begin */
    struct list held;  /* all that the driver does not have */
    uint32_t waiters;  /* threads that wait for calls or jobs to end */
    uint32_t word;     /* futex for them */
};

/* Before the driver's open(); -ENOMEM. */
int sched_new(struct hmm_device *dev);
/* After it: jobs may come, hmm_engines_add() may not. */
void sched_open(struct hmm_device *dev);
/* Before the driver's stop(): no job is taken any more, those that core keeps end with -ECANCELED, and no submit() is running. */
void sched_stop(struct hmm_device *dev);
/* After stop(): waits until no job and no call into the driver is left. */
void sched_wait(struct hmm_device *dev);
/* The device goes. */
void sched_free(struct hmm_device *dev);
/* The device is lost: jobs that core keeps end with -ENODEV and the reason; none is taken any more. Any thread, no locks. */
void sched_lost(struct hmm_device *dev, const char *reason);
/* Jobs that are submitted and not done. */
uint32_t sched_jobs(struct hmm_device *dev);

void sched_get(struct sched *s);
void sched_put(struct sched *s);
/* -ENODEV with message when no job is taken any more. */
int sched_check(struct sched *s);

/* Takes the job with one reference. 0, or: -ENODEV, -EBUSY; what the driver refused it with, where it got it at once. Then the job
 * is the caller's again, ended. Signals are blocked. */
int sched_submit(struct job *job);
/* The callback of a dependency; also for a fence that was done before it could be registered. */
void sched_dependency_fired(struct fence_callback *cb, hmm_fence *fence);
/* Ends it with this status if it has not begun; false: it has. `why` is copied. */
bool sched_end_held(struct job *job, int status, const char *why);
/* hmm_job_cancel(): 0 or -EALREADY. */
int sched_cancel(struct job *job);
/* hmm-jobs: its time is up, or it is to be asked again. */
void sched_timer(struct job *job);

/* ---- queue.c ----------------------------------------------------------------------------------------------------- */

struct hmm_queue {
    uint32_t refs; /* atomic */
    struct sched *sched;
    bool in_order;
    int32_t priority;
    struct list turns; /* in order: all its jobs that have not ended; sched->lock */
};

int queue_new(struct hmm_device *dev, const struct hmm_queue_config *config, struct hmm_queue **out);
void queue_get(struct hmm_queue *q);
void queue_put(struct hmm_queue *q);

/* ---- submit.c ---------------------------------------------------------------------------------------------------- */

/* What was read of the program's description, before anything of the library is touched. */
struct job_request {
    struct hmm_job_desc desc;
    hmm_fence *wait[JOB_WAITS_MAX];
    struct hmm_range ranges[OPERATION_RANGES_MAX];
    unsigned nranges;
};

/* Checks and copies what needs no device. -EINVAL with message, which names the operation, or the call where one is given. Touches
 * memory of the program. */
int job_read(struct job_request *rq, const struct hmm_job_desc *desc, const char *call);
/* Whether job_copy() is needed, which touches memory of the program again. */
bool job_needs_copy(const struct job_request *rq);
/* NULL with *err and message. The device is open during all of this. */
struct job *job_new(struct hmm_device *dev, const struct job_request *rq, int *err);
/* The kernel's argument, ranges and names. No signals blocked, no locks. */
int job_copy(struct job *job, const struct job_request *rq);
/* Submits it and consumes the caller's reference; *fence gets one. Signals are blocked. */
int job_submit(struct job *job, hmm_fence **fence);
void job_put(struct job *job);
/* NULL: the fence is not a job's. */
struct job *job_of(hmm_fence *fence);

/* ---- operation.c ------------------------------------------------------------------------------------------------- */

/* Checks operands and lists the memory that they use: ranges has room for OPERATION_RANGES_MAX. Of kernels only the fields of the
 * launch are checked, and *n is 0. -EINVAL with message, which begins with `what`, or NULL: the operation's name. */
int operation_check(const struct hmm_operation *op, const char *what, struct hmm_range *ranges, unsigned *n);
/* One range of what: NULL, empty, wrapping. */
int operation_check_range(const char *what, const char *name, uintptr_t addr, uint64_t bytes);

/* ---- kernel.c ---------------------------------------------------------------------------------------------------- */

/* Finds the kernel by the names that were given, or with `named` its names. On success l->kernel is set, and object and symbol are
 * both set, to strings that live as long as the process, or both NULL. The program's thread, no locks: loads objects. -ENOENT,
 * -ENOEXEC, -EINVAL, -ENOMEM with message. */
int kernel_resolve(struct hmm_launch *l, bool named);
/* In a child of fork: what was found is not there. */
void kernel_forget(void);

/* ---- timer.c ----------------------------------------------------------------------------------------------------- */

/* The thread; in application context. */
int jobs_start(void);
/* No device is open. Fences of the program are completed before. */
void jobs_stop(void);
/* In a child of fork. */
void jobs_forget(void);
/* Calls sched_timer() at this time, once. Moves an earlier call. Caller holds sched->lock, and the job has not ended. */
void timer_set(struct job *job, uint64_t when);
void timer_clear(struct job *job);
/* A descriptor of the calling thread's table that becomes readable when the fence is done. The manager runs. */
int fence_watch(hmm_fence *fence);

#endif
