/* SPDX-License-Identifier: MIT */
/*
 * Taking pages out of the program's memory: user -> staging, under the shared address-space lock.
 */
#ifndef HMM_MIGRATE_TAKE_H
#define HMM_MIGRATE_TAKE_H

#include "migrate/migrate.h"

/* What became of each page of a window that was to be taken. */
enum take_page {
    TAKE_NO,     /* not asked for */
    TAKE_WANTED, /* to be taken */
    TAKE_TAKEN,  /* in the flight */
    TAKE_ABSENT, /* taken in this hold of the lock without MOVE: not yet proven */
    TAKE_PINNED, /* EBUSY: pinned for DMA, or shared after fork */
    TAKE_HELD,   /* by a pin of ours (mm/hold.h) */
    TAKE_UNMOVABLE,
    TAKE_UNMAPPED,
    TAKE_BUSY,      /* changed underneath */
    TAKE_ALREADY,   /* on the device */
    TAKE_ELSEWHERE, /* on another device */
    TAKE_FLYING,    /* in another flight */
};

/* Looks at the window: WANTED, or why not. Takes mm->as shared. Returns the number WANTED. */
int take_survey(struct mm *mm, struct hmm_device *dev, struct window w, const struct tcb_list *tcbs, uint8_t *pages,
                uint32_t *landings);
/*
 * One hold of the lock: takes as many of the WANTED pages as possible into f (whose page[] is assigned): entries become FLIGHT,
 * how[] and home[] are set. 0, or, with the rest still WANTED: -EAGAIN: an event is pending; let go of everything, and call again. -ENXIO:
 * the page at *unarmed is in no region that is proved; mm_arm() or take_refuse() it, and call again. -ENOMEM.
 */
int take_pages(struct mm *mm, struct flight *f, const struct tcb_list *tcbs, uint8_t *pages, uintptr_t *unarmed);
/* The WANTED pages of [start, end) cannot be registered: they are UNMOVABLE, or BUSY where that may change. */
void take_refuse(const struct flight *f, uint8_t *pages, uintptr_t start, uintptr_t end, enum take_page as);
/* Which pages of f are PINNED, for take_unshare(). False: none. */
bool take_find_shared(const struct flight *f, const uint8_t *pages, uint64_t *shared);
/* Breaks copy-on-write sharing of these pages of the block (after fork). No locks, and no flight of the caller is in the air; may fault. */
void take_unshare(uintptr_t base, const uint64_t *shared);

#endif
