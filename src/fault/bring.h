/* SPDX-License-Identifier: MIT */
/* Threads that bring pages home for faults, where the reader of the userfaultfd must not wait. */
#ifndef HMM_FAULT_BRING_H
#define HMM_FAULT_BRING_H

#include "migrate/migrate.h"

/* n workers, and n that wait for devices. 0, -ENOMEM, or the system's error. */
int bring_start(struct mm *mm, unsigned n);
/* Finishes what is queued. The reader has ended. */
void bring_stop(void);
/* Brings the window home, or, where it cannot come, the page at addr in it; and wakes who sleeps there, also where it fails: then the
 * touch comes again. The reader only. */
void bring_queue(struct mm *mm, struct window w, uintptr_t addr);

#endif
