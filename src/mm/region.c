/* SPDX-License-Identifier: MIT */
/* See region.h. Split and merge are those of Blelloch and Reid-Miller (1998); expected depth is logarithmic in any order. */
#include "mm/region.h"

#include <stddef.h>

#include "base/alloc.h"
#include "notifier/changing.h"
#include "os/os.h"

enum { LEFT, RIGHT };

/* The finalizer of splitmix64 (Steele, Lea, Flood 2014): the same insertions give the same tree. */
static uint32_t priority_of(uint64_t number)
{
    uint64_t z = number * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

/* Everything of a is below everything of b. */
static struct region *merge(struct region *a, struct region *b)
{
    if (!a || !b)
        return a ? a : b;
    if (a->priority > b->priority) {
        a->child[RIGHT] = merge(a->child[RIGHT], b);
        return a;
    }
    b->child[LEFT] = merge(a, b->child[LEFT]);
    return b;
}

/* Into what starts below addr, and the rest. */
static void split(struct region *t, uintptr_t addr, struct region **below, struct region **above)
{
    if (!t) {
        *below = *above = NULL;
    } else if (t->start < addr) {
        split(t->child[RIGHT], addr, &t->child[RIGHT], above);
        *below = t;
    } else {
        split(t->child[LEFT], addr, below, &t->child[LEFT]);
        *above = t;
    }
}

static void set_count(struct regions *rs, int64_t change)
{
    __atomic_store_n(&rs->count, rs->count + (uint64_t)change, __ATOMIC_SEQ_CST);
}

struct region *region_before(const struct regions *rs, uintptr_t addr)
{
    struct region *found = NULL;
    for (struct region *r = rs->root; r; r = r->child[r->start < addr]) {
        if (r->start < addr)
            found = r;
    }
    return found;
}

struct region *region_next(const struct regions *rs, uintptr_t addr)
{
    struct region *found = NULL;
    for (struct region *r = rs->root; r; r = r->child[r->end <= addr]) {
        if (r->end > addr)
            found = r;
    }
    return found;
}

struct region *region_find(const struct regions *rs, uintptr_t addr)
{
    struct region *r = region_next(rs, addr);
    return r && r->start <= addr ? r : NULL;
}

bool region_any(const struct regions *rs, uintptr_t start, uintptr_t end)
{
    struct region *r = region_next(rs, start);
    return r && r->start < end;
}

struct region *region_insert_must(struct regions *rs, uintptr_t start, uintptr_t end, bool missing, enum region_state state)
{
    struct region *r, *below, *above;
    while (!(r = mem_alloc(sizeof(*r))))
        os_sleep(1000000);
    *r = (struct region){
        .start = start, .end = end, .missing = missing, .state = state, .priority = priority_of(rs->inserted++)};
    split(rs->root, start, &below, &above);
    rs->root = merge(merge(below, r), above);
    set_count(rs, 1);
    changing_mark(start, end);
    return r;
}

static void remove_region(struct regions *rs, struct region *r)
{
    struct region **at = &rs->root;
    while (*at != r)
        at = &(*at)->child[(*at)->start < r->start];
    *at = merge(r->child[LEFT], r->child[RIGHT]);
    mem_free(r, sizeof(*r));
    set_count(rs, -1);
}

/* Bounds move within what the region covered, so its place in the order stays. */
void region_cut(struct regions *rs, uintptr_t start, uintptr_t end)
{
    for (struct region *r; start < end && (r = region_next(rs, start)) && r->start < end;) {
        uintptr_t r_end = r->end;
        if (r->start < start) {
            r->end = start;
            if (end < r_end)
                region_insert_must(rs, end, r_end, r->missing, r->state);
        } else if (end < r_end) {
            r->start = end;
        } else {
            remove_region(rs, r);
        }
    }
}

static bool is_like(const struct region *a, const struct region *b)
{
    return a->missing == b->missing && a->state == b->state;
}

void region_join(struct regions *rs, struct region *r)
{
    struct region *before = region_before(rs, r->start), *next = region_next(rs, r->end);
    if (next && next->start == r->end && is_like(r, next)) {
        r->end = next->end;
        remove_region(rs, next);
    }
    if (before && before->end == r->start && is_like(r, before)) {
        uintptr_t end = r->end;
        remove_region(rs, r);
        before->end = end;
    }
}

/* Regions of the subtree, or -1. *last: where the one before ends. */
static int64_t check(const struct region *r, uint32_t priority, uintptr_t *last)
{
    if (!r)
        return 0;
    int64_t left = check(r->child[LEFT], r->priority, last);
    if (left < 0 || r->start < *last || r->start >= r->end || r->priority > priority)
        return -1;
    *last = r->end;
    int64_t right = check(r->child[RIGHT], r->priority, last);
    return right < 0 ? -1 : left + 1 + right;
}

bool regions_are_valid(const struct regions *rs)
{
    uintptr_t last = 0;
    return check(rs->root, UINT32_MAX, &last) == (int64_t)rs->count;
}

void regions_exit(struct regions *rs)
{
    while (rs->root)
        remove_region(rs, rs->root);
}
