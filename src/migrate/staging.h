/* SPDX-License-Identifier: MIT */
/*
 * Staging: the system memory that pages pass through, in slots of one block, bounded.
 *
 * Outbound slots are registered with the program's userfaultfd, because UFFDIO_MOVE from the program is issued on it (design
 * fact 4). What was taken from the program is freed, never used for other data: the kernel may still be sending from it
 * (fact 3). A slot is unregistered before it is freed, so that freeing raises no event for our own reader.
 *
 * Inbound slots are plain memory: a driver's copy makes their pages appear, and MOVE takes them away to the program.
 */
#ifndef HMM_MIGRATE_STAGING_H
#define HMM_MIGRATE_STAGING_H

#include "mm/mm.h"

enum staging_kind { STAGING_OUT, STAGING_IN, STAGING_IN_HUGE, STAGING_KINDS };

#define STAGING_MIN ((uint64_t)4 << 20)
#define STAGING_DEFAULT ((uint64_t)32 << 20)
#define STAGING_MAX ((uint64_t)1 << 30)

/* Divides `bytes` into slots. */
int staging_init(struct mm *mm, uint64_t bytes);
void staging_exit(struct mm *mm);

/* An empty slot; NULL when none is free and !wait, or when it cannot be prepared. Waits without locks. */
void *staging_get(struct mm *mm, enum staging_kind kind, bool wait);
/* Frees the slot's pages and gives it back; huge: what it held was one huge page. No locks held. Where a child of fork is still to get
 * pages of it (mm->slot_keep), that happens when it has them. */
void staging_put(struct mm *mm, enum staging_kind kind, void *slot, bool huge);
/* The same for a slot that nothing was put into. */
void staging_put_unused(enum staging_kind kind, void *slot);
/* Whether what is at this address stands in an outbound slot from which a child of fork is still to get pages: it may be copied, not
 * moved. */
bool staging_is_kept(const void *slot);
/* Everything that is to stand in the outbound slot has come. */
void staging_filled(struct mm *mm, const void *slot);
/*
 * False: addr is not in an outbound slot. A missing page of one was touched: by mlockall(MCL_CURRENT) of the program; or by a copy out of the
 * slot, of a page that the program had freed lazily (MADV_FREE keeps it clean when it is moved) and that the kernel has reclaimed since.
 * It is filled with zeros, which is what such a page reads as; but not while the slot is being filled: what stood there would be taken for
 * a page of the program. The touch is left asleep until staging_filled(), or until the slot is unregistered, then. Called by the reader, with no locks.
 */
bool staging_touched(struct mm *mm, uintptr_t addr);
/* Accounting of pages in slots, for hmm_stats(). */
void staging_account(int64_t pages);
uint64_t staging_bytes(void);

#endif
