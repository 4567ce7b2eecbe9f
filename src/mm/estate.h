/* SPDX-License-Identifier: MIT */
/*
 * Estates: what a child of fork is to get. A list of runs of pages, each with the child's address and the place where the bytes are: a
 * device page, or a staging slot of a flight to a device. Each page in it holds a reference to that place, so that it is neither freed
 * nor used again, whatever becomes of it in the parent. So nothing has to stop while a child is given its copy, but devices, which must
 * not write meanwhile:
 *
 * Captures: the invalidations that keep devices off the pages of an estate. They begin when the entries are read, under mm->as
 * exclusively; a worker then waits for the devices (a range is quiet), and each range ends when no page of it is wanted any more.
 * Shared by the estates of a child and of its children.
 *
 * An estate belongs to one thread at a time, or is written under mm->as exclusively (the attic, process/attic.c), or under that or a lock
 * of its own (process/window.c).
 */
#ifndef HMM_MM_ESTATE_H
#define HMM_MM_ESTATE_H

#include "mm/mm.h"

#define CAPTURE_RANGES 256
#define CAPTURE_BYTES ((size_t)64 << 20) /* of a range, about: it ends when all of it is given, and devices may go on there */
#define ESTATE_QUIET 0xffff              /* as a range: no device has to be waited for */

struct estate_run {
    uintptr_t addr;   /* in the child */
    uint64_t source;  /* device page; with pagemap 0: address in a staging slot */
    uint32_t pages;   /* 0: used up */
    uint16_t pagemap; /* id */
    uint16_t range;   /* of the capture */
};

struct capture_moved; /* where pages of it were remapped to */

struct capture {
    struct mm *mm;
    struct list link; /* mm->captures */
    uint32_t refs;    /* atomic */
    unsigned n;
    struct capture_moved *moved;
    struct capture_range {
        struct invalidation inv;
        uint64_t left;  /* atomic: pages that estates hold of it */
        uint32_t quiet; /* atomic, only rises */
        uint32_t ended; /* atomic */
    } range[CAPTURE_RANGES];
};

struct estate {
    struct mm *mm;
    struct capture *capture; /* or NULL */
    struct estate_run *v;    /* ascending by addr, unless mixed */
    size_t n, room;
    uint64_t pages; /* in all runs */
    bool mixed;     /* runs are in no order; none gives a page that another gives, but in the attic (process/attic.c) */
};

/* Takes over one reference to the capture, which may be NULL. */
void estate_init(struct estate *e, struct mm *mm, struct capture *capture);
/* Appends a run with a reference of each page. The caller holds one, or a lock that keeps the places from being freed. Waits for memory:
 * a child cannot be refused its memory. */
void estate_add(struct estate *e, struct estate_run run);
/* Appends every page of [start, end) that is away and whose bytes are somewhere. Caller holds mm->as exclusively. With a capture the
 * ranges are noted in it, for capture_begin(). */
void estate_add_entries(struct estate *e, uintptr_t start, uintptr_t end);
/* Appends all of `from`, with references of its own, and the capture if e has none. */
void estate_add_estate(struct estate *e, const struct estate *from);
/* Moves what lies in [start, end) to the end of `out`, with its references. */
void estate_take(struct estate *e, uintptr_t start, uintptr_t end, struct estate *out);
/* The same, to the place that lies `by` bytes further in e itself, where it has nothing: the child has remapped it. Runs are numbered
 * anew. */
void estate_move(struct estate *e, uintptr_t start, uintptr_t end, uintptr_t by);
/* The run that gives the page at addr, split so that it begins there; e->n: none. */
size_t estate_find(struct estate *e, uintptr_t addr);
/* Where the first page at or behind addr begins that e gives, at most end. */
uintptr_t estate_next(const struct estate *e, uintptr_t addr, uintptr_t end);
/* The first `pages` pages of run i are done with. No lock above RANK_DRIVER: device pages may be freed. */
void estate_consume(struct estate *e, size_t i, uint32_t pages);
/* Drops all of it, and its reference to the capture. The same locks. */
void estate_free(struct estate *e);

struct capture *capture_new(struct mm *mm); /* one reference; waits for memory */
/* Begins the invalidations of what estate_add_entries() noted. Caller holds mm->as exclusively. */
void capture_begin(struct capture *c);
/* Pages of [start, end) go to `to`: no device may map them there before the captures that have them have ended. Caller holds mm->as
 * exclusively. */
void captures_remapped(struct mm *mm, uintptr_t start, uintptr_t end, uintptr_t to);
/* Calls the devices. -EAGAIN: some have to be waited for, and how was not NOTIFIER_WAIT; the other ranges are quiet. No locks. */
int capture_call(struct capture *c, enum notifier_how how);
void capture_get(struct capture *c);
/* The last ends what has not ended. No locks. */
void capture_put(struct capture *c);

/* The bytes of a run as far as this process can see them, or NULL. */
const char *estate_bytes(const struct estate_run *run);
static inline bool estate_is_quiet(const struct estate *e, const struct estate_run *run)
{
    return run->range == ESTATE_QUIET || __atomic_load_n(&e->capture->range[run->range].quiet, __ATOMIC_ACQUIRE);
}

#endif
