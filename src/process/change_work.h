/* SPDX-License-Identifier: MIT */
/* What the program's threads and the library's know of an announced change: for change.c and change_work.c. */
#ifndef HMM_PROCESS_CHANGE_WORK_H
#define HMM_PROCESS_CHANGE_WORK_H

#include "mm/mm.h"
#include "mm/thread.h"
#include "notifier/changing.h"

/* SILENT: nobody was to be told, and no library thread knows of it. */
enum change_step { STEP_SILENT, STEP_BEGINNING, STEP_BEGUN, STEP_ENDING, STEP_ENDED };

/* What a slot of changing.h is used for here. The program's thread writes it before it hands it over, and only reads `step` then. */
struct change {
    struct work work;
    enum hmm_change_kind kind;
    uintptr_t start, end;
    uintptr_t source; /* the pages of the mapping there say how far the kernel rounds the length up; 0: it does not */
    struct invalidation inv;
    bool invalidating; /* begun and not ended */
    bool away;         /* the call drops pages that are on a device or in flight */
    bool waits;        /* the thread waits for STEP_ENDED, and leaves the slot */
    uint64_t made;     /* os_now() when the call had returned */
    uint32_t step;     /* futex */
    void *owner;       /* atomic: control block of the thread, until it ends the change */
};

extern struct changes {
    struct mm *mm;
    uint32_t users; /* futex: changes that library threads know of */
    struct change slot[CHANGING_SLOTS];
} changes;

void change_drop_user(void);
/* For askers: devices are told, and the change is BEGUN, or goes on to a waiter. */
void change_ask(struct work *work, unsigned worker);
/* For finishers: the call has returned. */
void change_finish(struct work *work, unsigned worker);

#endif
