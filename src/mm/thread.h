/* SPDX-License-Identifier: MIT */
/*
 * Library threads. A root thread makes its descriptor table private and creates all others, so that they share a table that the
 * program cannot close and children do not inherit (design fact 8). All have every signal blocked.
 *
 * A second thread delivers log lines. Both end with the last device.
 */
#ifndef HMM_MM_THREAD_H
#define HMM_MM_THREAD_H

#include "base/list.h"
#include "base/lock.h"
#include <hmm/driver.h>

/* Starts the root and log threads. Application context. */
int threads_start(void);
/* Stops them; all other library threads have been joined. */
void threads_stop(void);
/* In a child of fork: there are none. */
void threads_forget(void);
/* Runs fn in the root thread and waits: for what must happen in the private descriptor table. */
int threads_call(int (*fn)(void *), void *arg);
/* Whether the calling thread is one of those that share the private descriptor table. */
bool thread_in_library(void);
/* Name of the library thread with this id if it holds a lock (known in builds that check locks), or NULL; lock-free. */
const char *thread_holding_locks(uint32_t tid);

/* ---- work for a pool of threads ---- */

struct work {
    struct list link;
    void (*fn)(struct work *work, unsigned worker);
};

struct workers {
    struct mutex lock; /* RANK_QUEUE */
    struct list queue;
    uint32_t word; /* futex: moves when work was queued or at the end */
    bool stopping;
    bool growing; /* workers_grow() is at it */
    const char *name;
    unsigned n, started;
    unsigned room; /* of threads */
    struct hmm_thread **threads;
};

/* worker indices 0 .. n-1. */
int workers_start(struct workers *w, const char *name, unsigned n);
/* The same with room for more: workers_grow() adds one, up to max. */
int workers_start_growing(struct workers *w, const char *name, unsigned n, unsigned max);
/* For work that has waited too long, because those that are there wait themselves for something that may never come. Adds a thread if
 * work is queued and there is room. Application context: nobody on the fault path may call it. */
void workers_grow(struct workers *w);
/* Finishes queued work, then joins. */
void workers_stop(struct workers *w);
/* Queues; nothing if it is queued already. The item is unlinked before fn runs, and not touched after: fn may free it. */
void workers_queue(struct workers *w, struct work *work);
void work_init(struct work *work, void (*fn)(struct work *, unsigned));

#endif
