/* SPDX-License-Identifier: MIT */
/*
 * The interval tree of notifiers: a treap (Seidel and Aragon 1996), a binary search tree over (start, address of the node) and a heap
 * over pseudo-random priorities, so that its expected depth is logarithmic in any order of insertion. max_end is the largest end in
 * the subtree (CLRS 14.3), left_end that of the left child: to pass that by, it need not be fetched. link[LEFT] and link[RIGHT] are the children, link[PARENT] the parent; nodes are the drivers'.
 *
 * Every function: caller holds the tree's lock.
 */
#ifndef HMM_NOTIFIER_TREAP_H
#define HMM_NOTIFIER_TREAP_H

#include "notifier/notifier.h"

enum { LEFT, RIGHT, PARENT };

/* A place in the order of the tree. */
struct key {
    uintptr_t start;
    uintptr_t address;
};

#define KEY_FIRST ((struct key){0, 0})

static inline struct key key_of(const struct hmm_notifier *n)
{
    return (struct key){n->start, (uintptr_t)n};
}

static inline bool overlaps(const struct hmm_notifier *n, uintptr_t start, uintptr_t end)
{
    return n->start < end && start < n->end;
}

/* n has start, end and born. */
void treap_insert(struct notifier_tree *t, struct hmm_notifier *n);
void treap_remove(struct notifier_tree *t, struct hmm_notifier *n);
/* Whether this very node is in the tree. Of a node that is not, any content will do. */
bool treap_has(const struct notifier_tree *t, const struct hmm_notifier *n);
/* The first notifier behind `after` in the subtree of n that overlaps [start, end), or NULL. */
struct hmm_notifier *treap_next(struct hmm_notifier *n, struct key after, uintptr_t start, uintptr_t end);
/* Sum of the lengths of dev's nodes in the subtree of n; looks at all. */
uint64_t treap_bytes(const struct hmm_notifier *n, const struct hmm_device *dev);
/* The number of nodes, or -1: order, heap property or max_end are wrong. */
long treap_check(const struct notifier_tree *t);

#endif
