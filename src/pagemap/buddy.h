/* SPDX-License-Identifier: MIT */
/*
 * A binary buddy allocator over page numbers [0, pages), any count, no power of two needed (Knowlton 1965). Free blocks are
 * bits, one bitmap per order, each under a tree of summary words (a bit per word that is not zero) that leads to the lowest
 * one. So its own memory is about 2 bits a page, nothing is written to the pages, and a step costs the order, not the size.
 * Not locked: the pagemap's lock protects it.
 */
#ifndef HMM_PAGEMAP_BUDDY_H
#define HMM_PAGEMAP_BUDDY_H

#include <stdbool.h>
#include <stdint.h>

#define BUDDY_ORDERS 20

struct buddy; /* opaque */

struct buddy *buddy_new(uint64_t pages); /* all free. NULL without memory, and for 0 or more than 2^40 pages */
void buddy_free_all(struct buddy *b);    /* frees the allocator itself */
/* First page of 2^order contiguous, aligned pages; -1 when none is free. From the smallest free block that fits, so that large
 * ones stay whole, and of these the lowest. */
int64_t buddy_alloc(struct buddy *b, unsigned order);
/* Frees any run of allocated pages, however they were allocated; merges with free buddies. A run that is not wholly allocated,
 * empty or out of range is refused as a whole, with false. */
bool buddy_release(struct buddy *b, uint64_t page, uint64_t count);
uint64_t buddy_available(const struct buddy *b);
bool buddy_is_free(const struct buddy *b, uint64_t page);
/* Free blocks do not overlap, are merged, lie inside, add up; summaries agree. */
bool buddy_is_valid(const struct buddy *b);
uint64_t buddy_bytes(const struct buddy *b); /* own memory */

#endif
