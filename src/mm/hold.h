/* SPDX-License-Identifier: MIT */
/*
 * Ranges whose pages stay in system memory: what pins (src/pin) are to migrations.
 *
 * All of it is lock-free, because a pin of memory that libhmm does not manage takes no lock. Counts by 2 MiB of address space (hashed) say whether
 * there may be any; the slots say where. Who holds a range and who takes pages of it meet so (all of it sequentially consistent):
 *
 *      hold                                            migration, under mm->as
 *        enter the range                                 the region was made, and its bits were set (changing.h)
 *        look at the bits; if they are clear,            look at the holds
 *        nothing of it is away, or leaves                take pages
 *        else: mm_land_range(), bring home what is away
 */
#ifndef HMM_MM_HOLD_H
#define HMM_MM_HOLD_H

#include <stdbool.h>
#include <stdint.h>

#define HOLDS_MAX 65536u

/* Makes room, once in the life of a process. 0 or -ENOMEM, with message. */
int holds_start(void);
/* In a child of fork: there are none, nor room. */
void holds_forget(void);

/* The slot, or -ENFILE: all are used; -EOVERFLOW: 65,535 hold something of the same 2 MiB; -ENOMEM: there is no room. */
int hold_enter(uintptr_t start, uintptr_t end);
void hold_leave(unsigned slot);
/* Whether a page of [start, end) is held. */
bool hold_any(uintptr_t start, uintptr_t end);
/* Calls fn for the part of each hold that lies in [start, end). */
void hold_each(uintptr_t start, uintptr_t end, void (*fn)(uintptr_t start, uintptr_t end, void *arg), void *arg);

#endif
