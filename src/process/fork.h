/* SPDX-License-Identifier: MIT */
/*
 * fork (kernel: kernel/fork.c dup_mmap, fs/userfaultfd.c dup_userfaultfd). The child gets a copy of its own, in system memory, of every
 * page that is on a device; the parent's stay where they are. Two ways:
 *
 *   by event      With EVENT_FORK (CAP_SYS_PTRACE in the first user namespace). The kernel registers the child's memory with a
 *                 userfaultfd of its own and tells us. A worker fills it while the child runs; what the child touches first comes
 *                 first. Also for raw clone().
 *   by handlers   Else. Managed memory is MADV_DONTFORK, but for the moment of a fork(); the child's handler fills the child's memory
 *                 before fork() returns there. A child of a raw clone() does not have the memory: SIGSEGV, never zeros.
 *
 * In both, fork() returns in the parent when the child has everything, or is gone, or has called exec: so a parent may end as soon as
 * it has forked. vfork, posix_spawn and threads copy no memory and cost nothing.
 */
#ifndef HMM_PROCESS_FORK_H
#define HMM_PROCESS_FORK_H

#include "mm/mm.h"

/* Before the reader starts. Errors with a message. */
int fork_start(struct mm *mm);
/* Waits for every fork() that is under way; from now on none is seen to. The reader still reads. */
void fork_ending(void);
/* Then, when the reader has ended. */
void fork_stop(void);
/* In a child of fork that opens its first device: waits until the parent has filled its memory, which cannot be managed before.
 * Then forgets the parent's. */
void fork_forget(void);
/* Waits until every child so far has its memory: for who is about to end the process. At most 10 s after the last progress. False:
 * given up, with a message in the log. Any thread of the program, no locks. */
bool fork_settle(void);

#endif
