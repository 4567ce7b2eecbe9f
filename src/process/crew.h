/* SPDX-License-Identifier: MIT */
/*
 * The threads that take announced changes (change.h), in three pools: askers (hmm-change) ask devices briefly, waiters (hmm-change-wait) wait
 * for them, finishers (hmm-change-end) never call a device. There is always an asker and a waiter more than devices hold up, made ahead
 * by a thread that nobody waits for: making one may need the allocator of the program, which may be what announces a change.
 */
#ifndef HMM_PROCESS_CREW_H
#define HMM_PROCESS_CREW_H

#include "mm/thread.h"

enum crew { CREW_ASKERS, CREW_WAITERS, CREW_FINISHERS, CREWS };

/* n threads of each to begin with. Message set on failure. */
int crew_start(unsigned n);
/* When nothing is queued any more. */
void crew_stop(void);
/* In a child of fork. */
void crew_forget(void);

/* For any thread: allocates nothing. */
void crew_queue(enum crew which, struct work *work);
/* All of a pool may be held up, or about to be: looks, and makes more, in a thread of its own. */
void crew_grow(void);

#endif
