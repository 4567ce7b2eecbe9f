/* SPDX-License-Identifier: MIT */
/*
 * A device's view of the address space (kernel: mm/hmm.c): device faults and snapshots. The public half is in <hmm/driver.h>.
 * Mirror page tables kept by core come later; today each driver keeps its own.
 */
#ifndef HMM_MIRROR_H
#define HMM_MIRROR_H

#include "mm/mm.h"

int mirror_device_fault(struct hmm_device *dev, uintptr_t addr, unsigned flags);
/* Whether the only copy of the page was lost. */
bool mirror_is_poisoned(struct hmm_device *dev, uintptr_t addr);
int mirror_snapshot(struct hmm_device *dev, uintptr_t start, uintptr_t end, uint64_t *pfns);

#endif
