/* SPDX-License-Identifier: MIT */
/*
 * Migration of pages, one block (or part of one) per flight (kernel: mm/migrate_device.c).
 *
 *   to a device:  depart_to_device   survey, allocate, notify, take (user -> staging), start the driver's copy
 *                 land_on_device     wait for the copy, publish, free staging, wake
 *   to the system: depart_to_system  mark the entries
 *                 land_in_system     notify, copy, put, publish, free device pages, wake
 *
 * Every failure puts the pages back where they were. None of these may be called with a lock held; each may block, except
 * land_in_system with LAND_AT_ONCE, which the reader of the userfaultfd uses.
 */
#ifndef HMM_MIGRATE_H
#define HMM_MIGRATE_H

#include "mm/mm.h"

/* Pages of [start, end), within one block. */
struct window {
    uintptr_t start, end;
};

/* What depart_to_device() could not do, for its caller to mend. */
struct obstacle {
    uint64_t lacking;  /* -ENOSPC: device pages short */
    uint64_t limited;  /* 0 or 1 returned: of the pages that found no room, those that a limit left none for */
    uint32_t landings; /* -EBUSY: pages are in flight; flight_wait() for this */
    bool unshared;     /* in: what was pinned may have been shared by fork, but was populated since: it counts as pinned now */
    uint64_t shared[BLOCK_PAGES_MAX / 64]; /* -ESTALE: bit per page of the block: pages that are pinned, or shared by fork */
};

/*
 * Starts the migration of a window; f has an empty staging slot. 0: f is under way, to be landed. 1: nothing to move; f and its slot are unused, all pages are counted in res.
 * -ESTALE: pages may be shared by fork: take_unshare() with nothing in flight, since populating them may wait for any page of them that
 * has left meanwhile, and so for other flights; then again. Failures leave every page where it was and count nothing; f->staging is NULL if the slot
 * was used and is given back: -ENOSPC the device is full, or at a limit (unless `partial`, then it takes what it
 * can, and counts the rest as busy), -EBUSY pages are in flight elsewhere, -EXDEV pages are on another device (bring them home first), -ENOMEM, or the
 * driver's error. With `settle` pages in flight or elsewhere are counted as busy instead.
 */
int depart_to_device(struct mm *mm, struct flight *f, struct hmm_device *dev, struct window w, const struct tcb_list *tcbs,
                     bool partial, bool settle, struct hmm_migrate_result *res, struct obstacle *obstacle);
/* Returns the copy's error, with all pages back home; else 0. */
int land_on_device(struct mm *mm, struct flight *f, struct hmm_migrate_result *res);

/* Marks the pages of w that are on one device (dev, or with NULL the first that is met). Returns their number; 0: nothing there,
 * f is unused. Counts pinned ones. Another call finds those on further devices. */
unsigned depart_to_system(struct mm *mm, struct flight *f, struct hmm_device *dev, struct window w,
                          struct hmm_migrate_result *res);
/* How to bring pages home. Where that fails, and not for LAND, the sleepers are left asleep: the caller tries again, and wakes them. */
enum landing {
    LAND_AT_ONCE, /* for a fault; waits for nothing: neither for devices nor for copies */
    LAND_UNLESS_USED, /* for a fault; waits for copies, but not until a device lets go of the pages: that may take as long as a job */
    LAND_FOR_FAULT, /* for a fault; waits for both */
    LAND,           /* because somebody wants them home */
};
/*
 * Brings them home. -EAGAIN: something must be waited for that `how` rules out; -ENOMEM: the pages that did not find memory are on
 * the device as before; driver's errors likewise. Where the device has lost its memory they are poisoned.
 */
int land_in_system(struct mm *mm, struct flight *f, enum landing how, struct hmm_migrate_result *res);
/* Poisons them: nobody can give their content any more. 0, -ENOMEM: the rest is as before. Blocks. */
int land_as_poison(struct mm *mm, struct flight *f);

/* ---- dma.c: the driver's copy engine; may be made to fail by injection ---- */

int driver_start_copy(struct flight *f, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence);
int driver_start_clear(struct flight *f, const struct hmm_dma *v, unsigned n, hmm_fence *fence);
/* Starts and waits. */
int driver_copy(struct flight *f, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n);

/* ---- put.c: into system memory ---- */

/* Where page i of a flight comes from. */
struct put_source {
    char *slot;    /* staging: at slot + i * page size, may be moved; or NULL */
    char *cpu_map; /* else device memory as the process sees it: page[i] of it is copied; or NULL: it is lost */
};
/*
 * Puts every FLIGHT_COPY page of f into system memory at its home and clears its entry; it becomes FLIGHT_DONE, as do dropped ones.
 * Without a source it is poisoned there, and its entry says so. Retries while events are pending if blockable. 0, -EAGAIN, -ENOMEM,
 * -EIO: cpu_map cannot be read, -ENODEV: the device has lost its memory; the rest is as before.
 */
int put_home(struct mm *mm, struct flight *f, struct put_source src, bool blockable);
/* Gives every FLIGHT_COPY page of f the given device's entry at its home again: FLIGHT_EMPTY; dropped ones: FLIGHT_DONE. */
void restore_entries(struct mm *mm, struct flight *f);
/* Removes the entries of FLIGHT_CLEAR pages: FLIGHT_DONE. */
void clear_entries(struct mm *mm, struct flight *f);
/* Frees the device pages of FLIGHT_DONE pages: FLIGHT_EMPTY. */
void free_done(struct flight *f);
/* Wakes CPU faults asleep on the pages, and everyone who waits for a landing. To be called with home[] as published. */
void wake_homes(struct mm *mm, struct flight *f);
/* Gives back what is not needed any more where the pages departed from. */
void trim_window(struct mm *mm, const struct flight *f);
/* The same as wake_homes(), but for faults asleep where the pages departed from: the caller wakes those. */
void wake_moved(struct mm *mm, struct flight *f);

/* ---- whole ranges ---- */

/* Progress through a range, so that a caller can mend an obstacle and go on. */
struct cursor {
    struct hmm_device *dev;
    uintptr_t at, end;
    const struct tcb_list *tcbs;
    bool partial;     /* take what fits: set by the caller when no more room can be made */
    uint64_t lacking; /* out: -ENOSPC */
    struct hmm_migrate_result *res;
};
/* Migrates [at, end) with several flights at a time: one block is taken while others are copied. 0 when done. -ENOSPC: nothing is
 * in flight any more, `at` is the block that found no room. */
int migrate_range_to_device(struct mm *mm, struct cursor *c);
/* dev NULL: from every device. First error, after trying everything. */
int migrate_range_to_system(struct mm *mm, struct hmm_device *dev, uintptr_t start, uintptr_t end,
                            struct hmm_migrate_result *res);
/* Brings the pages of one block home from dev unless they are in use there: -EAGAIN, and they stay; other errors as above. Wakes. */
int migrate_unused_to_system(struct mm *mm, struct hmm_device *dev, uintptr_t base, struct hmm_migrate_result *res);

#endif
