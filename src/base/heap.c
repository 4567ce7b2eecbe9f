/* SPDX-License-Identifier: MIT */
/* See heap.h. No recursion: a heap of many nodes may be as deep as it is large. */
#include "base/heap.h"

#include <stddef.h>

/* Both are roots; either may be NULL. */
static struct heap_node *merge(const struct heap *h, struct heap_node *a, struct heap_node *b)
{
    if (!a || !b)
        return a ? a : b;
    if (h->before(b, a)) {
        struct heap_node *t = a;
        a = b;
        b = t;
    }
    b->prev = a;
    b->next = a->child;
    if (b->next)
        b->next->prev = b;
    a->child = b;
    return a;
}

static struct heap_node *detach(struct heap_node *n)
{
    if (n)
        n->next = n->prev = NULL;
    return n;
}

/* Makes one root of a row of siblings: pairs from the left, then all pairs from the right. */
static struct heap_node *merge_row(const struct heap *h, struct heap_node *row)
{
    struct heap_node *pairs = NULL, *root = NULL;
    while (row) {
        struct heap_node *a = row, *b = a->next;
        row = b ? b->next : NULL;
        detach(a);
        a = merge(h, a, detach(b));
        a->next = pairs;
        pairs = a;
    }
    while (pairs) {
        struct heap_node *next = pairs->next;
        root = merge(h, root, detach(pairs));
        pairs = next;
    }
    return root;
}

void heap_insert(struct heap *h, struct heap_node *n)
{
    n->child = NULL;
    h->first = merge(h, h->first, detach(n));
}

void heap_remove(struct heap *h, struct heap_node *n)
{
    if (h->first == n) {
        h->first = merge_row(h, n->child);
        return;
    }
    if (n->prev->child == n)
        n->prev->child = n->next;
    else
        n->prev->next = n->next;
    if (n->next)
        n->next->prev = n->prev;
    h->first = merge(h, h->first, merge_row(h, n->child));
}
