/* SPDX-License-Identifier: MIT */
/*
 * Changes of the address space that the program announces (kernel: mmu_notifier_invalidate_range_start and _end).
 * Public half in <hmm/hmm.h>.
 *
 *   begin   enter the range into a slot; nobody there: done (notifier/changing.h). Else, in a library thread: begin the invalidation,
 *           call the devices, unregister what has nothing away, so that the call raises no event; GUARD: bring pages home.
 *   call    made by the program's thread. Pages that are on a device are dropped by its event, not before: the call may fail.
 *   end     after UNMAP and CLEAR of pages that were away: wait for what the event left to do. End the invalidation, leave the slot.
 *
 * The program's thread takes no lock that the fault path takes: it may run on a stack that is away. It uses a slot of the library's
 * own memory, hands it over to the threads of crew.h, and sleeps on a futex: no allocation, no thread is made for it. Askers ask devices
 * *briefly*; what would have to wait for a job goes on to a waiter, so that changes elsewhere do not wait for that job.
 */
#ifndef HMM_PROCESS_CHANGE_H
#define HMM_PROCESS_CHANGE_H

#include "mm/mm.h"

/* Threads: n changers, waiters and finishers; more where devices hold up all of them. alive: a word that is 0 in children of fork.
 * None is announced before change_accept(). Message set on failure. */
int change_start(struct mm *mm, const uint32_t *alive, unsigned n);
/* No change begins any more; waits for those that have begun to end. */
void change_stop(void);
/* Whether changes are announced from now on, or only entered into slots: false when no device needs it any more, as a step before
 * change_stop(). */
void change_accept(bool on);
/* Whether none that was announced is under way; waits up to timeout_ns for that (< 0: for one step). */
bool change_quiet(int64_t timeout_ns);
/* In words: "a change of [...) was announced and has not ended". */
void change_text(char *buf, size_t size);
/* In a child of fork. */
void change_forget(void);

/* See hmm_change_begin(). Returns the slot, or CHANGE_NONE: nothing to be ended. */
#define CHANGE_NONE UINT32_MAX
uint32_t change_begin(enum hmm_change_kind kind, uintptr_t addr, size_t len);
/* The same for what stands where an mremap moves the mapping of `source` to. */
uint32_t change_begin_target(uintptr_t addr, size_t len, uintptr_t source);
void change_end(uint32_t slot);

#endif
