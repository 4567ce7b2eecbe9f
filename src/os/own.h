/* SPDX-License-Identifier: MIT */
/*
 * The library's own mappings, remembered: a program may name a range that covers them, and they must never migrate. All of them are
 * made and freed through here.
 */
#ifndef HMM_OS_OWN_H
#define HMM_OS_OWN_H

#include "os/os.h"

/* As os->map and os->unmap. -ENOMEM also when too many are there. */
int own_map(size_t len, size_t align, unsigned flags, void **out);
int own_unmap(void *addr, size_t len);
/* The first own mapping that overlaps [start, end), or end <= start: none. Lock-free for the reader. */
bool own_overlap(uintptr_t start, uintptr_t end, uintptr_t *own_start, uintptr_t *own_end);
/* In a child of fork: there are none. */
void own_forget(void);

#endif
