/* SPDX-License-Identifier: MIT */
/*
 * A device's view of the address space (kernel: mm/hmm.c): device faults, range faults, and mirrors with their page tables
 * (table.h). The public half is in <hmm/driver.h>.
 */
#ifndef HMM_MIRROR_H
#define HMM_MIRROR_H

#include "mm/mm.h"

int mirror_device_fault(struct hmm_device *dev, uintptr_t addr, unsigned flags);
/* Whether the only copy of the page was lost. */
bool mirror_is_poisoned(struct hmm_device *dev, uintptr_t addr);
/* range_fault.c: the calls of that name. Library threads. */
int mirror_range_fault(struct hmm_device *dev, struct hmm_fault_range *range);
int mirror_range_fault_timeout(struct hmm_device *dev, struct hmm_fault_range *range, int64_t timeout_ns);

/* ---- mirror_life.c ---- */

/* Says that this process is a child of the one that the mirrors are of; set once, before the first is registered. */
extern bool (*mirror_foreign)(void);
/* The device is lost: its mirrors are released, soon. Any thread; does not block. */
void mirrors_lost(struct hmm_device *dev);
/* The device is being closed: its mirrors are released. Returns when all releases have, which may be never: library thread. */
void mirrors_release(struct hmm_device *dev);
/* Which release that is, in words; false: none runs. Does not block. */
bool mirrors_releasing(const struct hmm_device *dev, char *buf, size_t size);
/* Unregisters what the driver's close() left behind. */
void mirrors_end(struct hmm_device *dev);
/* No device is open: ends the thread. */
void mirrors_stop(void);
/* In a child of fork: there are none. */
void mirrors_forget(void);

#endif
