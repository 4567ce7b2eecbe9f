/* SPDX-License-Identifier: MIT */
/* Charging pages to the limits of a pagemap and of the process. For pagemap.c; the rest of the interface is in pagemap.h. */
#ifndef HMM_PAGEMAP_LIMIT_H
#define HMM_PAGEMAP_LIMIT_H

#include "pagemap/pagemap.h"

/* Charges up to `want` pages to the process and returns how many the limits of both allow. Caller holds pm->lock, and adds to pm->used
 * what it makes of them. */
uint64_t limit_charge(const struct pagemap *pm, uint64_t want);
/* Gives back what was charged to the process. */
void limit_uncharge(uint64_t pages);
/* In a child of fork: nothing is used; the limit stays. */
void limit_forget(void);

#endif
