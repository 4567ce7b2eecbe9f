/* SPDX-License-Identifier: MIT */
/* Fences: one completion, reference-counted, waited for on a futex. */
#ifndef HMM_BASE_FENCE_H
#define HMM_BASE_FENCE_H

#include <hmm/driver.h>

struct hmm_fence {
    uint32_t refs;
    uint32_t word; /* 0 pending, 1 pending with waiters, 2 done; release when done */
    int32_t status;
    uintptr_t address;
    uint64_t result;
    char message[160];
};

/* Whether fences that this process holds are its parent's (in a child of fork, where their memory is not): the public calls give
 * -ESRCH. Set by the manager. */
extern bool (*fence_foreign)(void);

/* One reference. NULL without memory. */
hmm_fence *fence_new(void);
/* A fence that lives on the stack or in a structure: no reference, no free. */
void fence_init(hmm_fence *fence);
hmm_fence *fence_get(hmm_fence *fence);
void fence_put(hmm_fence *fence); /* NULL allowed */
bool fence_done(const hmm_fence *fence);
/* Status once done; -EAGAIN at time-out. timeout_ns < 0: none. */
int fence_wait(hmm_fence *fence, int64_t timeout_ns);
/* Full completion; exactly once. hmm_fence_signal(f, s) is fence_complete(f, {s}). */
void fence_complete(hmm_fence *fence, const struct hmm_job_status *status);

#endif
