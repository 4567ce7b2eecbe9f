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

/* Starts the manager if it does not run, and counts one more device. */
int manager_get(struct mm **mm);
/* One device less; the last stops the manager. */
void manager_put(void);
/* Keeps the manager from stopping during a call; NULL when none runs (-ENODEV). */
struct mm *manager_use(void);
void manager_unuse(void);

/* Runs fn in a library thread and waits. The caller is inside manager_use(). */
struct call {
    struct work work;
    void (*fn)(struct call *call);
    uint32_t done;
};
void manager_call(struct call *call);
/* The two halves, for several calls at once. */
void manager_start_call(struct call *call);
void manager_wait_call(struct call *call);
unsigned manager_callers(void);
/* HMM_DEBUG=validate */
bool manager_validates(void);

/* ---- device.c ---- */

/* A device by handle, kept open until device_put(). NULL: -ENODEV with message. */
struct hmm_device *device_get(hmm_dev handle);
void device_put(struct hmm_device *dev);
hmm_dev device_handle(const struct hmm_device *dev);
/* lost.c: -ENODEV with message where the device is lost, else 0. */
int device_refuse_lost(const struct hmm_device *dev);
/* Forgets everything, in a child of fork. */
void devices_forget(void);
/* Bytes of page descriptors of all open devices; and their allocated pages. */
uint64_t devices_descriptor_bytes(void);
uint64_t devices_used_pages(void);
/* Calls fn for each open device's pagemap. The caller is inside manager_use(). */
void devices_each(void (*fn)(struct pagemap *pm, void *arg), void *arg);

#endif
