/* SPDX-License-Identifier: MIT */
/*
 * CPU faults. One reader thread reads the userfaultfd, applies events and serves what needs no waiting; workers do the rest:
 * faults for which a device must be waited for, whole blocks, and what events left to do.
 *
 * The reader never waits: not for a device, not for a migration, not for memory in transit. A fault on a page in flight stays
 * asleep; whoever lands the flight wakes it and the access is tried again.
 */
#ifndef HMM_FAULT_H
#define HMM_FAULT_H

#include "mm/mm.h"

/* Starts the reader and n workers over mm. Application context; the descriptors of mm are open. */
int fault_start(struct mm *mm, unsigned n);
/* Stops them. No page is away any more. */
void fault_stop(void);

#endif
