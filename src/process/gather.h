/* SPDX-License-Identifier: MIT */
/* What the child of a fork is to get, of what several times took away from the same places. */
#ifndef HMM_PROCESS_GATHER_H
#define HMM_PROCESS_GATHER_H

#include "mm/estate.h"

/* Adds to e, which is empty, what n estates give, the oldest first, and then what is away now; a page that was added is not added again:
 * of several that came away from one place the first is the child's, and what stands there by now came after the fork. Time is linear in
 * runs and pages. Caller holds mm->as exclusively. Waits for memory. */
void gather(struct estate *e, const struct estate *from, size_t n);

#endif
