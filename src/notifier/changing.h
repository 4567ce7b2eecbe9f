/* SPDX-License-Identifier: MIT */
/*
 * Which memory a change of the program could matter to, and which changes are being made.
 *
 * The first question is asked before every munmap, madvise and mprotect of a program, so it is answered without a lock, by a bit per
 * 2 MiB of address space: set for memory that is registered, or that a notifier covers. A bit that is set says *maybe*.
 *
 * A change that finds its bits clear is made at once, without telling anybody. For file and shared memory nothing else tells of it.
 * So it stands in a slot while it is made, and whoever reads what a notifier's interval maps first waits for such changes to
 * be over:
 *
 *      change                                          device
 *        enter its range into a slot                     insert the notifier, set its bits
 *        look at the bits; if they are clear:            read_begin: look at the slots; one that overlaps:
 *        make the system call                            wait until it is empty
 *        empty the slot                                  look at the mapping
 *
 * Either the change sees the bits, or the device sees the slot (both sides are sequentially consistent).
 *
 * A change that finds bits set is announced (process/change.h). Its slot keeps migrations to a device off the range.
 */
#ifndef HMM_NOTIFIER_CHANGING_H
#define HMM_NOTIFIER_CHANGING_H

#include <stdbool.h>
#include <stdint.h>

#define CHANGING_SLOTS 128

/* Makes room for the bits, or clears them; without, every question is answered with maybe. The 8 MiB of address space, most of them
 * never touched, stay until the process ends. While nothing is marked. 0 or -ENOMEM, with message. */
int changing_start(void);
/* In a child of fork: neither bits nor changes. */
void changing_forget(void);

/* ---- bits ---- */

/* From now on changes of [start, end) are announced. Any thread; does not block. Called after what they matter to can be found.
 * More than 1 TiB: changes of everything are, until changing_unmark_large() says that it is gone. */
void changing_mark(uintptr_t start, uintptr_t end);
/* The counterpart for what is so large; for less it does nothing. */
void changing_unmark_large(uintptr_t start, uintptr_t end);
/* Clears the bits of all 2 MiB that lie in [start, end) as a whole, if nobody is there: asked under the lock that changing_mark()
 * takes (RANK_CHANGING; below the notifier tree's). */
void changing_unmark(uintptr_t start, uintptr_t end, bool (*nobody)(uintptr_t start, uintptr_t end, void *arg), void *arg);
/* May a change of [start, end) matter to anybody? Lock-free. */
bool changing_matters(uintptr_t start, uintptr_t end);

/* ---- slots ---- */

/* Enters a change. Returns the slot, or -1: all are used. Lock-free. */
int changing_enter(uintptr_t start, uintptr_t end);
/* The same in one of the first `bound` slots: the others are for those who hold one already, so that threads that need a second do not
 * wait for one another. */
int changing_enter_below(uintptr_t start, uintptr_t end, unsigned bound);
/* Before the bits are looked at: migrations keep off although it may not be announced, because no event tells of it. Lock-free. */
void changing_apart(int slot);
/* It will be announced: readers do not wait for it any more, and migrations keep off. Lock-free. */
void changing_announce(int slot);
/* What it is, which was not known when it was entered. Larger: before the call is made, and before devices are told. Lock-free. */
void changing_narrow(int slot, uintptr_t start, uintptr_t end);
/* The call of an announced change is over: migrations go on. Lock-free. */
void changing_made(int slot);
/* Empties the slot. Lock-free; wakes who waits. */
void changing_leave(int slot);
/* Waits until no change that is not announced overlaps [start, end). No locks. A change that takes longer than 10 s is named in the
 * log and not waited for, then or later: its thread may have been killed in the middle, as a child of vfork. */
void changing_wait(uintptr_t start, uintptr_t end);
/* The same, for timeout_ns at most (< 0: as above). False: that has passed. */
bool changing_wait_timeout(uintptr_t start, uintptr_t end, int64_t timeout_ns);
extern uint64_t changing_wait_max_ns; /* those 10 s; for tests */
/* Whether a change that is announced, or apart, overlaps [start, end): pages of it are not to leave for a device. */
bool changing_keeps_off(uintptr_t start, uintptr_t end);
/* Whether the change in the slot is neither over nor given up. */
bool changing_stands(int slot);

#endif
