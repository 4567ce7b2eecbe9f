/* SPDX-License-Identifier: MIT */
/*
 * fork by handlers: from just before the address space is copied to just after it, in the thread that forks. See window.c. The caller
 * keeps the manager from stopping meanwhile.
 */
#ifndef HMM_PROCESS_WINDOW_H
#define HMM_PROCESS_WINDOW_H

#include "mm/estate.h"

int window_start(struct mm *mm, bool (*may_have_forked)(struct mm *mm), void (*reset)(void));
void window_stop(void);
/* In the program's thread: before fork, and after it in the parent and in the child. Whatever fails leaves the child without the
 * memory, and says so. Signals are blocked from the first to the second. */
void window_open(void);
void window_close(void);
void window_close_in_child(void);
/* Hooks; see struct fork_hooks. Only while mm->forking. */
void window_change(struct mm *mm, uintptr_t start, uintptr_t end, uintptr_t to);
void window_arrival(struct mm *mm, const struct flight *f, unsigned i, const char *slot);

#endif
