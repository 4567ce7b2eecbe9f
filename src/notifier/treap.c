/* SPDX-License-Identifier: MIT */
/* See treap.h. */
#include "notifier/treap.h"

static bool key_before(struct key a, struct key b)
{
    return a.start != b.start ? a.start < b.start : a.address < b.address;
}

/* The finalizer of splitmix64: the same insertions give the same tree. */
static uint32_t priority_of(uint64_t number)
{
    uint64_t z = number * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

static uintptr_t end_below(const struct hmm_notifier *n, unsigned side)
{
    return n->link[side] ? n->link[side]->max_end : 0;
}

static uintptr_t max_end_of(const struct hmm_notifier *n)
{
    uintptr_t left = end_below(n, LEFT), right = end_below(n, RIGHT), max = left > right ? left : right;
    return n->end > max ? n->end : max;
}

/* The ends below n are as they should be, those of n are not. */
static void refresh(struct hmm_notifier *n)
{
    n->left_end = end_below(n, LEFT);
    n->max_end = max_end_of(n);
}

/* Where the parent, or the tree, points to n. */
static struct hmm_notifier **place_of(struct notifier_tree *t, struct hmm_notifier *n)
{
    struct hmm_notifier *parent = n->link[PARENT];
    return parent ? &parent->link[parent->link[RIGHT] == n] : &t->root;
}

/* Lifts n above its parent; the order stays. */
static void rotate_up(struct notifier_tree *t, struct hmm_notifier *n)
{
    struct hmm_notifier *parent = n->link[PARENT];
    unsigned side = parent->link[RIGHT] == n;
    struct hmm_notifier *inner = n->link[!side];
    *place_of(t, parent) = n;
    n->link[PARENT] = parent->link[PARENT];
    n->link[!side] = parent;
    parent->link[PARENT] = n;
    parent->link[side] = inner;
    if (inner)
        inner->link[PARENT] = parent;
    refresh(parent);
    refresh(n);
}

void treap_insert(struct notifier_tree *t, struct hmm_notifier *n)
{
    n->priority = priority_of(n->born);
    struct hmm_notifier *parent = NULL, **place = &t->root;
    while (*place) {
        parent = *place;
        if (parent->max_end < n->end)
            parent->max_end = n->end;
        unsigned side = !key_before(key_of(n), key_of(parent));
        if (side == LEFT && parent->left_end < n->end)
            parent->left_end = n->end;
        place = &parent->link[side];
    }
    n->link[LEFT] = n->link[RIGHT] = NULL;
    n->link[PARENT] = parent;
    refresh(n);
    *place = n;
    while (n->link[PARENT] && n->link[PARENT]->priority < n->priority)
        rotate_up(t, n);
}

void treap_remove(struct notifier_tree *t, struct hmm_notifier *n)
{
    while (n->link[LEFT] || n->link[RIGHT]) {
        struct hmm_notifier *l = n->link[LEFT], *r = n->link[RIGHT];
        rotate_up(t, !r || (l && l->priority > r->priority) ? l : r);
    }
    *place_of(t, n) = NULL;
    for (struct hmm_notifier *up = n->link[PARENT]; up; up = up->link[PARENT])
        refresh(up);
    n->link[PARENT] = NULL;
}

/* The subtrees that are passed over hold nothing that ends behind start, or nothing behind `after`, but for one path each:
 * logarithmic. */
struct hmm_notifier *treap_next(struct hmm_notifier *n, struct key after, uintptr_t start, uintptr_t end)
{
    while (n && n->max_end > start) {
        if (key_before(after, key_of(n))) {
            struct hmm_notifier *found = n->left_end > start ? treap_next(n->link[LEFT], after, start, end) : NULL;
            if (found)
                return found;
            if (n->start >= end)
                return NULL; /* and so does all to the right */
            if (overlaps(n, start, end))
                return n;
        }
        n = n->link[RIGHT];
    }
    return NULL;
}

bool treap_has(const struct notifier_tree *t, const struct hmm_notifier *n)
{
    const struct hmm_notifier *at = t->root;
    while (at && at != n)
        at = at->link[key_before(key_of(at), key_of(n)) ? RIGHT : LEFT];
    return at != NULL;
}

uint64_t treap_bytes(const struct hmm_notifier *n, const struct hmm_device *dev)
{
    uint64_t bytes = 0;
    for (; n; n = n->link[RIGHT])
        bytes += treap_bytes(n->link[LEFT], dev) + (n->dev == dev ? n->end - n->start : 0);
    return bytes;
}

/* ---- validation ---- */

/* Checks the subtree of n, whose keys lie behind low and before high (NULL: no bound). Returns its nodes, or -1. */
static long check_subtree(const struct hmm_notifier *n, const struct hmm_notifier *parent, const struct hmm_notifier *low,
                          const struct hmm_notifier *high)
{
    if (!n)
        return 0;
    bool ok =
        n->link[PARENT] == parent && n->start < n->end && n->max_end == max_end_of(n) && n->left_end == end_below(n, LEFT);
    ok = ok && (!parent || n->priority <= parent->priority);
    ok = ok && (!low || key_before(key_of(low), key_of(n))) && (!high || key_before(key_of(n), key_of(high)));
    if (!ok)
        return -1;
    long left = check_subtree(n->link[LEFT], n, low, n), right = check_subtree(n->link[RIGHT], n, n, high);
    return left < 0 || right < 0 ? -1 : left + right + 1;
}

long treap_check(const struct notifier_tree *t)
{
    return check_subtree(t->root, NULL, NULL, NULL);
}
