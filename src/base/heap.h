/* SPDX-License-Identifier: MIT */
/*
 * A pairing heap (Fredman, Sedgewick, Sleator, Tarjan 1986): intrusive, so that it needs no memory. Insertion and a look at the
 * first take constant time, removal of any node O(log n) amortized. Its owner locks.
 */
#ifndef HMM_BASE_HEAP_H
#define HMM_BASE_HEAP_H

#include <stdbool.h>

struct heap_node {
    struct heap_node *child; /* the first */
    struct heap_node *next;  /* sibling */
    struct heap_node *prev;  /* sibling, or of the first child the parent */
};

struct heap {
    struct heap_node *first; /* NULL: empty */
    bool (*before)(const struct heap_node *a, const struct heap_node *b);
};

void heap_insert(struct heap *h, struct heap_node *n);
/* n is in it. */
void heap_remove(struct heap *h, struct heap_node *n);

#endif
