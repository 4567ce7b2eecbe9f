/* SPDX-License-Identifier: MIT */
/* Between event.c and limbo.c. Callers hold mm->as exclusively. */
#ifndef HMM_MM_EVENT_H
#define HMM_MM_EVENT_H

#include "mm/mm.h"

/* The batch being filled. */
struct limbo *limbo_filling(struct mm *mm);
/* Devices are to forget [start, end); their sequence numbers move now. */
void limbo_mark(struct mm *mm, struct limbo *l, uintptr_t start, uintptr_t end, enum hmm_event_type type);
/* Blocks of [start, end) that are not used any more are to be freed. */
void limbo_prune(struct limbo *l, uintptr_t start, uintptr_t end);
/* Calls for a worker if there is something to do. */
void limbo_publish(struct mm *mm, const struct limbo *l);

#endif
