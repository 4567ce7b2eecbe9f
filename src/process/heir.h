/* SPDX-License-Identifier: MIT */
/*
 * Heirs: children whose memory is being filled. See fork.h. Workers give each heir a slice of time in turn, so that one child that is
 * stopped, or whose devices have to be waited for, keeps no other from its memory.
 */
#ifndef HMM_PROCESS_HEIR_H
#define HMM_PROCESS_HEIR_H

#include "mm/estate.h"

/* The child by event: uffd is its userfaultfd, closed when it has everything. Takes over the estate. Waits for memory. Caller holds mm->as
 * exclusively. */
void heir_new(struct mm *mm, int uffd, struct estate *estate);

/* The same by handlers: through the nursery, which is unmapped and whose descriptor is closed in the end. alive: of a pipe whose other
 * end the child has, or an error: its end is not seen then. */
struct nursery;
void heir_new_in_nursery(struct mm *mm, struct nursery *nursery, int alive, struct estate *estate);

/* ---- heirs as forks see them ---- */

#define HEIR_SLOTS 256

/* What children and parent look at; on memory that children share. All atomic. */
struct heir_board {
    uint32_t reading; /* odd while events are read and applied: a fork may have been read that has no number yet */
    uint32_t started; /* number of the last that was made */
    uint32_t settled; /* all up to this number have their memory, or are gone */
    uint32_t ended;   /* futex: rises with each that has, or is gone */
    uint32_t under_way[HEIR_SLOTS]; /* heirs of fork n, and of those 256 forks apart, at n % 256 */
    uint32_t moves;                 /* rises with what they are given: somebody who waits can tell slow from stuck */
};

int heirs_start(struct mm *mm, struct heir_board *board);
/* The reader has ended. Waits for heirs, but for those that make no progress for 5 s: what these still lack is poisoned; where the kernel
 * refuses that, because the child is stopped in the middle of a call, it will be zeros, and an error line says so. */
void heirs_stop(void);
/* Runs fn in a heir's worker. */
struct work;
void heirs_run(struct work *work);

#endif
