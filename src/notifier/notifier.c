/* SPDX-License-Identifier: MIT */
/*
 * See notifier.h. The tree is a treap (Seidel and Aragon 1996): a binary search tree over (start, address of the node), a heap
 * over pseudo-random priorities, so that its expected depth is logarithmic in any order of insertion. max_end is the largest
 * end in the subtree (CLRS 14.3). link[0] and link[1] are the children, link[2] the parent.
 *
 * Callbacks run one at a time, without the lock. A running one is counted in `calls`; only that one: a notifier whose turn has
 * not come can be removed without waiting, so a remover never waits for another notifier's callback, which may want the
 * remover's locks. Between two callbacks the walk goes on from the key of the last, never from its memory.
 */
#include "notifier/notifier.h"

#include <errno.h>

#include "base/error.h"
#include "os/os.h"

enum { LEFT, RIGHT, PARENT };

/* A place in the order of the tree. */
struct key {
    uintptr_t start;
    uintptr_t address;
};

/* A callback that this thread is in. */
struct call {
    struct call *outer;
    struct hmm_notifier *n;
    bool removed; /* by the callback itself, against the rules: n is not touched any more */
};
static __thread struct call *calls_here __attribute__((tls_model("initial-exec")));

/* ---- the tree; every function: caller holds t->lock ---- */

static struct key key_of(const struct hmm_notifier *n)
{
    return (struct key){n->start, (uintptr_t)n};
}

static bool key_before(struct key a, struct key b)
{
    return a.start != b.start ? a.start < b.start : a.address < b.address;
}

static bool overlaps(const struct hmm_notifier *n, uintptr_t start, uintptr_t end)
{
    return n->start < end && start < n->end;
}

/* The finalizer of splitmix64: the same insertions give the same tree. */
static uint32_t priority_of(uint64_t number)
{
    uint64_t z = number * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

static uintptr_t max_end_of(const struct hmm_notifier *n)
{
    uintptr_t max = n->end;
    for (unsigned side = LEFT; side <= RIGHT; side++)
        if (n->link[side] && n->link[side]->max_end > max)
            max = n->link[side]->max_end;
    return max;
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
    parent->max_end = max_end_of(parent);
    n->max_end = max_end_of(n);
}

static void tree_insert(struct notifier_tree *t, struct hmm_notifier *n)
{
    struct hmm_notifier *parent = NULL, **place = &t->root;
    while (*place) {
        parent = *place;
        if (parent->max_end < n->end)
            parent->max_end = n->end;
        place = &parent->link[!key_before(key_of(n), key_of(parent))];
    }
    n->link[LEFT] = n->link[RIGHT] = NULL;
    n->link[PARENT] = parent;
    n->max_end = n->end;
    *place = n;
    while (n->link[PARENT] && n->link[PARENT]->priority < n->priority)
        rotate_up(t, n);
}

static void tree_remove(struct notifier_tree *t, struct hmm_notifier *n)
{
    while (n->link[LEFT] || n->link[RIGHT]) {
        struct hmm_notifier *l = n->link[LEFT], *r = n->link[RIGHT];
        rotate_up(t, !r || (l && l->priority > r->priority) ? l : r);
    }
    *place_of(t, n) = NULL;
    for (struct hmm_notifier *up = n->link[PARENT]; up; up = up->link[PARENT])
        up->max_end = max_end_of(up);
    n->link[PARENT] = NULL;
}

/* The first notifier behind `after` that overlaps [start, end), or NULL. The subtrees that are passed over hold nothing that
 * ends behind start, or nothing behind `after`, but for one path each: logarithmic. */
static struct hmm_notifier *next_overlap(struct hmm_notifier *n, struct key after, uintptr_t start, uintptr_t end)
{
    while (n && n->max_end > start) {
        if (key_before(after, key_of(n))) {
            struct hmm_notifier *found = next_overlap(n->link[LEFT], after, start, end);
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

#define KEY_FIRST ((struct key){0, 0})

/* ---- waiting; caller holds t->lock ---- */

static void wait_change(struct notifier_tree *t)
{
    t->waiters++;
    mutex_wait(&t->lock, &t->changes, t->changes);
    t->waiters--;
}

static void changed(struct notifier_tree *t)
{
    if (t->waiters == 0)
        return;
    __atomic_fetch_add(&t->changes, 1, __ATOMIC_RELEASE);
    mutex_wake_all(&t->changes);
}

/* ---- invalidations ---- */

void notifier_tree_init(struct notifier_tree *t)
{
    *t = (struct notifier_tree){0};
    mutex_init(&t->lock, RANK_NOTIFIER);
    list_init(&t->active);
}

void notifier_tree_destroy(struct notifier_tree *t)
{
    mutex_destroy(&t->lock);
}

/* An owner's own migration is none of its notifiers' business. */
static bool concerns(const struct hmm_event *event, const struct hmm_notifier *n)
{
    return overlaps(n, event->start, event->end) &&
           !(event->type == HMM_EVENT_MIGRATE && event->owner && event->owner == n->dev);
}

/* Moves the sequence numbers below n; returns whether there was one. */
static bool mark(struct hmm_notifier *n, const struct hmm_event *event)
{
    bool marked = false;
    while (n && n->max_end > event->start) {
        marked |= mark(n->link[LEFT], event);
        if (n->start >= event->end)
            break;
        if (concerns(event, n)) {
            __atomic_fetch_add(&n->seq, 1, __ATOMIC_SEQ_CST);
            marked = true;
        }
        n = n->link[RIGHT];
    }
    return marked;
}

bool notifier_begin(struct notifier_tree *t, struct invalidation *inv, uintptr_t start, uintptr_t end, enum hmm_event_type type,
                    struct hmm_device *owner)
{
    inv->event = (struct hmm_event){.start = start, .end = end, .type = type, .owner = owner, .blockable = true};
    inv->marked = false;
    list_init(&inv->link);
    if (start >= end)
        return false;
    mutex_lock(&t->lock);
    list_add_tail(&t->active, &inv->link);
    inv->insertions = t->insertions;
    inv->marked = mark(t->root, &inv->event);
    mutex_unlock(&t->lock);
    return inv->marked;
}

void notifier_end(struct notifier_tree *t, struct invalidation *inv)
{
    mutex_lock(&t->lock);
    list_del(&inv->link);
    changed(t);
    mutex_unlock(&t->lock);
}

/* The next notifier to be called. Caller holds t->lock. */
static struct hmm_notifier *next_to_call(struct notifier_tree *t, const struct invalidation *inv, struct key after)
{
    struct hmm_notifier *n;
    while ((n = next_overlap(t->root, after, inv->event.start, inv->event.end)) != NULL) {
        if (n->born < inv->insertions && concerns(&inv->event, n))
            return n;
        after = key_of(n);
    }
    return NULL;
}

/* Runs one callback, without the lock. Caller holds t->lock before and after. */
static int run_callback(struct notifier_tree *t, struct hmm_notifier *n, const struct hmm_event *event)
{
    int (*invalidate)(struct hmm_notifier *, const struct hmm_event *) = n->ops->invalidate;
    struct call call = {.outer = calls_here, .n = n};
    n->calls++;
    t->callbacks++;
    mutex_unlock(&t->lock);
    calls_here = &call;
    int err = invalidate(n, event);
    calls_here = call.outer;
    bool may_refuse = !event->blockable || event->brief;
    if (err && (err != -EAGAIN || !may_refuse))
        hmm_log(HMM_LOG_ERROR, "notifier: callback %p returned %d for [%#lx, %#lx), %s; it must %s; taken as done",
                (void *)(uintptr_t)invalidate, err, (unsigned long)event->start, (unsigned long)event->end,
                event->brief       ? "brief"
                : event->blockable ? "blockable"
                                   : "not blockable",
                may_refuse ? "return 0 or -EAGAIN" : "return 0");
    mutex_lock(&t->lock);
    if (!call.removed) {
        n->calls--;
        changed(t);
    }
    return err == -EAGAIN && may_refuse ? -EAGAIN : 0;
}

int notifier_call(struct notifier_tree *t, struct invalidation *inv, enum notifier_how how)
{
    struct hmm_event event = inv->event;
    struct hmm_notifier *n;
    struct key at = KEY_FIRST;
    int err = 0;
    event.blockable = how != NOTIFIER_AT_ONCE;
    event.brief = how == NOTIFIER_BRIEFLY;
    if (!inv->marked)
        return 0;
    lock_assert_none();
    mutex_lock(&t->lock);
    while (!err && (n = next_to_call(t, inv, at)) != NULL) {
        at = key_of(n);
        err = run_callback(t, n, &event);
    }
    mutex_unlock(&t->lock);
    return err;
}

/* ---- notifiers ---- */

int notifier_insert(struct notifier_tree *t, struct hmm_notifier *n)
{
    if (n->start >= n->end || (n->start | n->end) % os_page_size())
        return hmm_fail(-EINVAL, "notifier: [%#lx, %#lx) is empty or not aligned to pages of %zu bytes",
                        (unsigned long)n->start, (unsigned long)n->end, os_page_size());
    if (!n->ops || !n->ops->invalidate)
        return hmm_fail(-EINVAL, "notifier: no invalidate callback; without one the device would keep stale translations");
    mutex_lock(&t->lock);
    n->calls = 0;
    n->born = t->insertions++;
    n->priority = priority_of(n->born);
    /* What was cached in an earlier life of this memory must not look current. */
    __atomic_store_n(&n->seq, (n->born + 1) << 32, __ATOMIC_SEQ_CST);
    tree_insert(t, n);
    t->count++;
    mutex_unlock(&t->lock);
    return 0;
}

/* Leaves out the callbacks that this thread is in itself: it would wait for ever. Returns their number. */
static uint32_t own_calls(struct hmm_notifier *n)
{
    uint32_t own = 0;
    for (struct call *c = calls_here; c; c = c->outer)
        if (c->n == n && !c->removed) {
            c->removed = true;
            own++;
        }
    return own;
}

void notifier_remove(struct notifier_tree *t, struct hmm_notifier *n)
{
    uint32_t own = own_calls(n);
    if (own)
        hmm_log(HMM_LOG_ERROR, "notifier: removed by its own callback %p, which is not allowed; remove it after the callback",
                (void *)(uintptr_t)n->ops->invalidate);
    mutex_lock(&t->lock);
    tree_remove(t, n);
    t->count--;
    while (n->calls > own)
        wait_change(t);
    mutex_unlock(&t->lock);
}

/* Whether an invalidation of n's interval has begun and not ended. Caller holds t->lock. */
static bool invalidating(struct notifier_tree *t, const struct hmm_notifier *n)
{
    list_for_each (pos, &t->active)
        if (concerns(&container_of(pos, struct invalidation, link)->event, n))
            return true;
    return false;
}

uint64_t notifier_read_begin(struct notifier_tree *t, struct hmm_notifier *n)
{
    mutex_lock(&t->lock);
    while (invalidating(t, n))
        wait_change(t);
    uint64_t seq = hmm_notifier_seq(n);
    mutex_unlock(&t->lock);
    return seq;
}

bool hmm_notifier_read_retry(const struct hmm_notifier *n, uint64_t seq)
{
    return hmm_notifier_seq(n) != seq;
}

unsigned notifier_count(struct notifier_tree *t)
{
    mutex_lock(&t->lock);
    unsigned n = t->count;
    mutex_unlock(&t->lock);
    return n;
}

/* ---- validation ---- */

/* Checks the subtree of n, whose keys lie behind low and before high (NULL: no bound). Returns its nodes, or -1. Caller holds
 * t->lock. */
static long check_subtree(const struct hmm_notifier *n, const struct hmm_notifier *parent, const struct hmm_notifier *low,
                          const struct hmm_notifier *high)
{
    if (!n)
        return 0;
    bool ok = n->link[PARENT] == parent && n->start < n->end && n->max_end == max_end_of(n);
    ok = ok && (!parent || n->priority <= parent->priority);
    ok = ok && (!low || key_before(key_of(low), key_of(n))) && (!high || key_before(key_of(n), key_of(high)));
    if (!ok)
        return -1;
    long left = check_subtree(n->link[LEFT], n, low, n), right = check_subtree(n->link[RIGHT], n, n, high);
    return left < 0 || right < 0 ? -1 : left + right + 1;
}

bool notifier_tree_is_valid(struct notifier_tree *t)
{
    mutex_lock(&t->lock);
    bool ok = check_subtree(t->root, NULL, NULL, NULL) == (long)t->count;
    mutex_unlock(&t->lock);
    return ok;
}
