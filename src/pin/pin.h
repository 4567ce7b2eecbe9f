/* SPDX-License-Identifier: MIT */
/*
 * Pins (kernel: mm/gup.c). Public half in <hmm/hmm.h>: what they promise, and what they do not.
 *
 *   pin      enter the range as a hold (mm/hold.h): from now on nothing of it is taken. Where libhmm manages nothing there, that is all;
 *            else, in a library thread, what is on its way lands, and what is away comes home. Then the pages are faulted in.
 *   unpin    leave the hold. A compare and exchange decides between two that unpin.
 *
 * A pin is a slot of the hold and a number that tells its users from those of the slot before.
 */
#ifndef HMM_PIN_H
#define HMM_PIN_H

#include "mm/mm.h"

/* Makes room, once in the life of a process. 0 or -ENOMEM, with message. */
int pins_start(void);
/* In a child of fork. */
void pins_forget(void);

/* Enters a pin of [start, end), pages. Lock-free. 0, *pin, and whether something there is managed, so that pin_settle() is due; or what hold_enter()
 * says. */
int pin_enter(uintptr_t start, uintptr_t end, const void *owner, hmm_pin *pin, bool *managed);
/* Brings home what is away. 0, -EBUSY (pinned on its device), -EHWPOISON, or why a page cannot come home. A library thread, no locks. */
int pin_settle(struct mm *mm, uintptr_t start, uintptr_t end);
/* Faults the pages in. 0; else the error of the system call. The program's thread or a library thread, no locks: may fault. */
int pin_populate(uintptr_t start, uintptr_t end, bool write);
/* The same by touching them, for where system calls cannot fault what is managed in: in the program's thread. The mappings are sound. */
void pin_touch(uintptr_t start, uintptr_t end, bool write);
/* What is wrong with the first page that cannot be had: -EFAULT, -EPERM, -EHWPOISON; or err; 0: nothing, but
 * faults of system calls are not served here: pin_touch(). *at: its address. A library thread. */
int pin_explain(struct mm *mm, uintptr_t start, uintptr_t end, bool write, int err, uintptr_t *at);
/* Lock-free. 0, -EINVAL, -EPERM. */
int pin_leave(hmm_pin pin, const void *owner);

/* Pins now; and how many were ended as dirty. */
uint64_t pins_count(void);
uint64_t pins_dirty(void);
void pin_count_dirty(void);

#endif
