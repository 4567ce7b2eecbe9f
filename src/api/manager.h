/* SPDX-License-Identifier: MIT */
/*
 * The one manager of the process: starts with the first device, ends with the last. Entry points find devices here.
 */
#ifndef HMM_API_MANAGER_H
#define HMM_API_MANAGER_H

#include "mm/mm.h"
#include "mm/thread.h"

#define DEVICES_MAX 32

/* -ESRCH in a child of fork that has not opened a device of its own; clears the thread's message. Call it first. */
int api_enter(void);

/* Starts the manager if it does not run, and counts one more device, as one that is ending until it is open. */
int manager_get(struct mm **mm);
/* The device of manager_get() is open: changes are announced from now on. Cannot fail. */
void manager_opened(void);
/* One device less; the last stops the manager. counted: as ending, by manager_all_ending() or because it did not open. */
void manager_put(bool counted);
/* Whether each device is one that has asked this, or is not open yet: then no change is announced any more, until manager_opened().
 * *counted: this one has asked; false at first. */
bool manager_all_ending(bool *counted);
/* Keeps the manager from stopping during a call; NULL when none runs (-ENODEV). */
struct mm *manager_use(void);
void manager_unuse(void);

enum call_state { CALL_RUNS, CALL_DONE, CALL_ABANDONED };

/* Runs fn in a library thread and waits. The caller is inside manager_use(). */
struct call {
    struct work work;
    void (*fn)(struct call *call);
    void (*abandoned)(struct call *call); /* in the library thread, when it ends after manager_wait_call_for() gave it up */
    uint32_t begun;                       /* atomic: a thread has it */
    uint32_t state;                       /* futex: enum call_state */
};
void manager_call(struct call *call);
/* The two halves, for several calls at once. */
void manager_start_call(struct call *call);
void manager_wait_call(struct call *call);
/* Waits at most so long. False: the call goes on without us, and ends with call->abandoned(), which has to free it. */
bool manager_wait_call_for(struct call *call, int64_t timeout_ns);
/* The same, but the caller may come back to it: nothing is given up. */
bool manager_call_done_for(struct call *call, int64_t timeout_ns);
unsigned manager_callers(void);
/* HMM_DEBUG=validate */
bool manager_validates(void);
/* How long closing and meeting a limit wait while nothing moves: ten seconds, or HMM_DEBUG=patience. */
uint64_t manager_patience_ns(void);

/* ---- change.c ---- */

/* Tells libhmm-preload.so, where it is loaded, that changes are to be announced, or not. */
void calls_attach(bool running);

/* ---- device.c ---- */

/* A device by handle, kept open until device_put(). NULL: -ENODEV with message. */
struct hmm_device *device_get(hmm_dev handle);
void device_put(struct hmm_device *dev);
hmm_dev device_handle(const struct hmm_device *dev);
/* lost.c: -ENODEV with message where the device is lost, else 0. */
int device_refuse_lost(const struct hmm_device *dev);
/* migrate.c: the pages of len bytes at addr. 0; -EINVAL, -EFAULT: with a message that begins with `what`. */
int api_page_range(const char *what, const void *addr, size_t len, uintptr_t *start, uintptr_t *end);
/* migrate.c: migrates [start, end) home, what is larger than this by several threads. The caller is inside manager_use(), and knows no lock. 0, or the
 * first error. */
#define API_SPLIT_BYTES ((size_t)8 << 20) /* ranges above are brought home by several threads */
int api_bring_home(struct mm *mm, uintptr_t start, uintptr_t end, struct hmm_migrate_result *sum);
/* limit.c: HMM_LIMIT, where the program has not set a limit; -EINVAL with message. */
int limits_start(void);
/* limit.c: -ENOSPC with message: a limit left room on dev for none of so many pages. */
int limit_refused(struct hmm_device *dev, uint64_t pages);
/* Forgets everything, in a child of fork. */
void devices_forget(void);
/* Bytes of page descriptors of all open devices. */
uint64_t devices_descriptor_bytes(void);
/* Calls fn for each device's pagemap, those of devices that are being closed included: their pages are still there. The caller is inside manager_use(). */
void devices_each(void (*fn)(struct pagemap *pm, void *arg), void *arg);

#endif
