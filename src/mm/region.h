/* SPDX-License-Identifier: MIT */
/*
 * Regions: which parts of the address space are registered with our userfaultfd, and how. Disjoint ranges in a treap (Seidel and
 * Aragon 1996) over their start: 20,000 of them are looked through as fast as a few.
 *
 * A region is made as the whole of one mapping, so that registering never splits the kernel's mapping; the program's munmap, mremap
 * and mprotect may cut it later. What events tell is applied to the tree when they are read. So of a region that is PROVED holds:
 *
 *   every page of it is registered in the region's mode, or the event that ended that is still unread.
 *
 * Concurrency: the tree changes under mm->as exclusive only; lookup and reading need it shared. A pointer is valid as long as the
 * lock is held. No function but region_insert_must() and region_cut() allocates; these wait for memory, because an event cannot
 * be refused.
 */
#ifndef HMM_MM_REGION_H
#define HMM_MM_REGION_H

#include <stdbool.h>
#include <stdint.h>

enum region_state {
    REGION_UNPROVED, /* a part may be registered, and events of it must be heeded; no page of it may be taken */
    REGION_LEFT,     /* a remap has taken its pages away, and is still to be told of as unmapped; or stays (MREMAP_DONTUNMAP) */
    REGION_PROVED,   /* all of it is */
};

struct region {
    uintptr_t start, end;
    bool missing; /* MISSING mode: pages of it may be away. Else it is only watched (WP mode): nothing of it is away */
    enum region_state state;
    uintptr_t hint; /* atomic: a block where something was away when last looked: see mm_is_away() */
    struct region *child[2];
    uint32_t priority;
};

struct regions {
    struct region *root;
    uint64_t count;    /* atomic for those who look without the lock: 0 means that no address is registered */
    uint64_t inserted; /* so far; seeds the priorities */
};

/* The region that contains addr, or NULL. */
struct region *region_find(const struct regions *rs, uintptr_t addr);
/* The first region that ends behind addr: the one that contains it or the next above; NULL: none. */
struct region *region_next(const struct regions *rs, uintptr_t addr);
/* The last region that starts below addr, or NULL. */
struct region *region_before(const struct regions *rs, uintptr_t addr);
/* Whether some region overlaps [start, end). */
bool region_any(const struct regions *rs, uintptr_t start, uintptr_t end);

/* Adds [start, end), which no region overlaps. Neighbours that touch it stay apart: each is unregistered when nothing of it is away. */
struct region *region_insert_must(struct regions *rs, uintptr_t start, uintptr_t end, bool missing, enum region_state state);
/* Takes [start, end) out: regions are removed, shortened or split. */
void region_cut(struct regions *rs, uintptr_t start, uintptr_t end);
/* Makes r and the neighbours that touch it and are like it one; which of them is left is not said. */
void region_join(struct regions *rs, struct region *r);
/* Order, heap property, disjoint, count; for the audit and tests. */
bool regions_are_valid(const struct regions *rs);
/* Frees all. */
void regions_exit(struct regions *rs);

#endif
