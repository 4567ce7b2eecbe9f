/* SPDX-License-Identifier: MIT */
/*
 * Fences: one completion, reference-counted, waited for on a futex; and what follows a completion.
 *
 * Callbacks run in the thread that completes the fence, after the completion is published, oldest first, under no lock. What they
 * complete in turn is settled by the same loop, not by recursion: a chain of 65,536 jobs needs no stack. A callback must not block.
 */
#ifndef HMM_BASE_FENCE_H
#define HMM_BASE_FENCE_H

#include "base/list.h"
#include <hmm/driver.h>

/* What a fence is part of. NULL: nothing. */
struct fence_kind {
    /* After the callbacks of a completion, in the same thread. The fence is kept alive meanwhile. May be NULL. */
    void (*after)(hmm_fence *fence);
    /* The last reference is gone: frees the memory. */
    void (*free)(hmm_fence *fence);
};

struct hmm_fence {
    uint32_t refs;
    uint32_t word; /* 0 pending, 1 pending with waiters, 2 done; release when done */
    int32_t status;
    uint32_t follow; /* FOLLOW_*; see fence.c */
    uintptr_t address;
    uint64_t result;
    const struct fence_kind *kind;
    struct list callbacks; /* of struct fence_callback; list lock */
    hmm_fence *next;       /* done, and its callbacks are still to run, by the thread that completed it */
    char message[160];
};

/* Embedded in what waits. */
struct fence_callback {
    struct list link; /* empty while it is not registered: list_init() at first */
    /* The fence is done and its status may be read; or NULL: it went away without having been completed. */
    void (*fn)(struct fence_callback *cb, hmm_fence *fence);
};

/* Whether fences that this process holds are its parent's (in a child of fork, where their memory is not): the public calls give
 * -ESRCH. Set by the manager. */
extern bool (*fence_foreign)(void);
int fence_check_own(const char *what);

/* One reference. NULL without memory. */
hmm_fence *fence_new(void);
/* A fence that lives on the stack or in a structure: no reference, no free, no callbacks. */
void fence_init(hmm_fence *fence);
hmm_fence *fence_get(hmm_fence *fence);
void fence_put(hmm_fence *fence); /* NULL allowed */
bool fence_done(const hmm_fence *fence);
/* Status once done; -EAGAIN at time-out. timeout_ns < 0: none. */
int fence_wait(hmm_fence *fence, int64_t timeout_ns);
/* Full completion; exactly once. hmm_fence_signal(f, s) is fence_complete(f, {s}). */
void fence_complete(hmm_fence *fence, const struct hmm_job_status *status);

/* False, and nothing is registered: the fence is done, or will be at once; its status may be read. The caller has a reference. */
bool fence_add_callback(hmm_fence *fence, struct fence_callback *cb);
/* True: it was registered and is not any more. False: it ran, runs, or will at once. Needs no reference. */
bool fence_remove_callback(struct fence_callback *cb);

/* A fence that the program completes. */
hmm_fence *fence_user_new(void);
/* Completes all of them with -ECANCELED: the last device closes. */
void fence_user_cancel_all(void);
/* In a child of fork: forgets them. */
void fence_forget(void);

#endif
