/* SPDX-License-Identifier: MIT */
/*
 * How a child that the kernel does not tell of is filled: it takes its pages itself, before fork() returns in it, from memory that it
 * shares with its parent. In the child is but the one thread that forked, which holds whatever locks the others held: its side makes
 * system calls and nothing else. It needs no rights over the parent, nor the parent over it.
 *
 * The parent writes messages, by turns into two places, so that one is filled while the other is taken. The child opens a
 * userfaultfd of its own and registers the mapping of each run, so that COPY gives what is absent, refuses what is there
 * (it came home before the address space was copied, and is newer), and minds no protection.
 */
#ifndef HMM_PROCESS_NURSERY_H
#define HMM_PROCESS_NURSERY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NURSERY_RUNS 128
#define NURSERY_BYTES ((size_t)512 << 10) /* of pages, per message */

enum nursery_how { NURSERY_GIVE, NURSERY_POISON };

struct nursery_run {
    uintptr_t addr;
    uint32_t pages;
    uint32_t how; /* POISON: without bytes */
};

struct nursery_message {
    uint32_t full; /* futex: 1 the child's turn, 0 the parent's */
    uint32_t runs, pages;
    bool last; /* the child has everything */
    struct nursery_run run[NURSERY_RUNS];
};

struct nursery {
    uint32_t refused; /* atomic: the parent cannot fill the child, which is to end */
    uint32_t beat;    /* atomic: the parent is there and at work */
    int32_t parent;   /* process id */
    struct nursery_message message[2];
};

size_t nursery_size(void);
/* Where the pages of message i stand. */
char *nursery_bytes(struct nursery *n, unsigned i);
/* The child's side. Returns when the child has everything; else says why on standard error and ends the process (127), which must not
 * go on with zeros for data. Signals are blocked. */
void nursery_take(struct nursery *n);

#endif
