/* SPDX-License-Identifier: MIT */
/* Between heir.c (their life), follow.c (what children do meanwhile) and fill.c. An heir is one worker's at a time. */
#ifndef HMM_PROCESS_HEIRS_H
#define HMM_PROCESS_HEIRS_H

#include "mm/thread.h"
#include "process/heir.h"
#include "process/packer.h"

#define CHUNK_PAGES 512 /* given at once */
#define TOUCH_PAGES 16  /* first, of what the child has touched out of turn */

/* A remap was read before the unmap of what stood at its target: see owe_unmap() in mm/event.c. Which of the two comes is told by what is
 * registered there, whether it is filled already or not. */
struct debt {
    uintptr_t start, end;
};
#define DEBTS 16

struct heir {
    struct work work;
    struct list link; /* all; heirs.lock */
    struct mm *mm;
    int uffd;             /* by event; or */
    struct packer packer; /* by handlers */
    uint32_t number;      /* of the fork in this process that it comes from */
    struct estate estate;
    bool looked;    /* for MADV_WIPEONFORK */
    bool called;    /* devices, */
    bool landed;    /* and the remaps before the fork */
    uint64_t asked; /* when the devices were last */
    size_t next;    /* run to be filled */
    uint32_t chunk;
    uint64_t failing_since, stuck_since; /* 0: not */
    struct regions known;                /* by event: what is registered in the child, as far as is known */
    struct debt debts[DEBTS];
    bool owes; /* some may be noted */
};

struct heirs {
    struct mm *mm;
    struct heir_board *board;
    struct workers workers, callers, helpers;
    struct mutex lock; /* RANK_QUEUE */
    struct list all;
    bool stopping;
};
extern struct heirs heirs;

static inline bool heir_is_by_event(const struct heir *h)
{
    return h->uffd >= 0;
}

/* ---- heir.c ---- */

/* An heir for the child of a child, with what is not filled yet. */
void heir_forked(struct heir *h, int uffd);

/* ---- follow.c ---- */

/* Reads what the child did, and applies it to the estate. */
void follow_child(struct heir *h);
/* What is registered where a child is made, with mm->as held exclusively or from the heir of its parent. Waits for memory. */
void follow_regions(struct heir *h, const struct regions *from);
/* Drops [start, end) from the estate. */
void follow_drop(struct heir *h, uintptr_t start, uintptr_t end);

/* ---- fill.c ---- */

void fill_wake(struct heir *h, uintptr_t addr, uint64_t pages);
/* Leaves out what the program has asked to be wiped. */
void fill_leave_out_wiped(struct heir *h);
/* The next run that can be filled; estate.n: there is none now. */
size_t fill_next(struct heir *h);
/* For as long as an heir may have a worker. 0: go on; -EAGAIN: something has to be waited for; -ESRCH: there is no child. */
int fill_slice(struct heir *h);
/* Poisons what is left, for a child that does not take it, and says how many pages the kernel refuses to poison: they read as zeros as soon
 * as its userfaultfd is closed. */
void fill_poison_rest(struct heir *h);

#endif
