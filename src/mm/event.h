/* SPDX-License-Identifier: MIT */
/* Between event.c, limbo.c, dropping.c and settle.c. Callers hold mm->as exclusively. */
#ifndef HMM_MM_EVENT_H
#define HMM_MM_EVENT_H

#include "mm/mm.h"

/* The batch being filled. */
struct limbo *limbo_filling(struct mm *mm);
/* Devices are to forget [start, end); their sequence numbers move now. */
void limbo_mark(struct mm *mm, struct limbo *l, uintptr_t start, uintptr_t end, enum hmm_event_type type);
/* What is not needed any more in and beside [start, end) is to be given back: see mm_prune(). */
void limbo_prune(struct limbo *l, uintptr_t start, uintptr_t end);
/* Calls for a worker if there is something to do. */
void limbo_publish(struct mm *mm, const struct limbo *l);

/* Forgets the unmaps that are owed where no event is pending: none of them is to come. */
void owed_forget(struct mm *mm);

/* [start, end) is about to be dropped, or freed lazily. */
void dropping_note(struct mm *mm, uintptr_t start, uintptr_t end);
/* Forgets of that what is absent, or too long ago. What is still noted there, the latest counting. */
enum mm_dropping dropping_look(struct mm *mm, uintptr_t start, uintptr_t end);

#endif
