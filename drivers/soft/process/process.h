/* SPDX-License-Identifier: MIT */
/*
 * The program hmm-soft-engine: the engines of a soft:isolated device, in a process of their own. It has device memory, the channel
 * and the event gate (channel.h), and asks for everything else. Its memory is never managed, so here the rule of <hmm/driver.h> does
 * not hold: it may allocate, and load shared objects.
 *
 *   main.c     start, and end: with the device or with the program
 *   remote.c   engines: what they reach is on the other side of a channel
 *   control.c  invalidations, and requests to end jobs
 *   load.c     user kernels by name
 *   crash.c    kernels that crash
 */
#ifndef HMM_SOFT_PROCESS_H
#define HMM_SOFT_PROCESS_H

#include <pthread.h>

#include "../channel.h"

struct process {
    struct channels *channels;
    struct world world;
    uint64_t memory_bytes;
};

/* ---- remote.c ---------------------------------------------------------------------------------------------------- */

/* Makes the engines, then starts them. Negative errno. */
int process_engines_start(struct process *p);

/* ---- control.c --------------------------------------------------------------------------------------------------- */

/* Versions of translations: one number for all blocks with the same hash, which moves at every invalidation of one of them. */
const uint64_t *process_version(uintptr_t addr);

int process_control_start(struct process *p);

/* ---- load.c ------------------------------------------------------------------------------------------------------ */

/* The function, or NULL with *err and a message. Any engine thread. */
hmm_kernel process_kernel(const char *object, const char *symbol, int *err, char *message, size_t size);

/* ---- crash.c ----------------------------------------------------------------------------------------------------- */

/* Signals of crashes end the kernel that raised them, and outside of kernels the process. Once. */
int process_crash_init(void);
/* Engine thread, at its start. */
int process_crash_adopt(struct engine *e);

#endif
