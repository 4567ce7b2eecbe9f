/* SPDX-License-Identifier: MIT */
/*
 * Whether the kernel may have copied the address space for a fork that we have not been told of, and what has been taken away since. See
 * attic.c. All calls but start and stop: mm->as is held exclusively.
 */
#ifndef HMM_PROCESS_ATTIC_H
#define HMM_PROCESS_ATTIC_H

#include "mm/estate.h"

int attic_start(struct mm *mm);
/* The reader has ended: doubt will not. Then, when no heir's worker runs any more. */
void attic_ending(void);
void attic_stop(void);
/* Nothing of this process was copied since attic_reset(): false. */
bool attic_may_have_forked(struct mm *mm);
void attic_reset(void);
/* Events are about to be read. */
void attic_reading(void);
/* Entries of [start, end) are about to be dropped or moved. */
void attic_change(struct mm *mm, uintptr_t start, uintptr_t end);
/* A fork was read: adds to e, which is empty, what was taken away after it, and what is away still. uffd is the child's. */
void attic_give(struct mm *mm, int uffd, struct estate *e);

#endif
