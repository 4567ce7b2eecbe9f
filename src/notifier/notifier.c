/* SPDX-License-Identifier: MIT */
/*
 * See notifier.h. Callbacks run one at a time, without the lock. A running one is counted in `calls`; only that one: a notifier
 * whose turn has not come can be removed without waiting, so a remover never waits for another notifier's callback, which may want
 * the remover's locks. Between two callbacks the walk goes on from the key of the last, never from its memory.
 */
#include "notifier/notifier.h"

#include <errno.h>

#include "base/error.h"
#include "debug/inject.h"
#include "notifier/changing.h"
#include "notifier/running.h"
#include "notifier/treap.h"
#include "os/os.h"

/* ---- waiting; caller holds t->lock ---- */

/* For timeout_ns at most; < 0: for ever. */
static void wait_change(struct notifier_tree *t, int64_t timeout_ns)
{
    t->waiters++;
    mutex_wait_timeout(&t->lock, &t->changes, t->changes, timeout_ns);
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
    list_init(&t->ending);
    list_init(&t->running);
}

void notifier_tree_destroy(struct notifier_tree *t)
{
    mutex_destroy(&t->lock);
}

/* An owner's own migration is none of its notifiers' business. */
static bool concerns(const struct hmm_event *event, const struct hmm_notifier *n)
{
    bool own = event->type == HMM_EVENT_MIGRATE && event->owner && event->owner == n->dev;
    return overlaps(n, event->start, event->end) && !own;
}

/* Moves the sequence numbers below n; returns whether there was one. */
static bool mark(struct hmm_notifier *n, const struct hmm_event *event)
{
    bool marked = false;
    while (n && n->max_end > event->start) {
        if (n->left_end > event->start)
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

void notifier_ignore(struct notifier_tree *t, struct notifier_ending *e, struct hmm_device *dev)
{
    e->dev = dev;
    mutex_lock(&t->lock);
    list_add_tail(&t->ending, &e->link);
    mutex_unlock(&t->lock);
}

void notifier_forget(struct notifier_tree *t, struct notifier_ending *e)
{
    mutex_lock(&t->lock);
    list_del(&e->link);
    mutex_unlock(&t->lock);
}

static bool is_ignored(const struct notifier_tree *t, const struct hmm_notifier *n)
{
    list_for_each (pos, &t->ending)
        if (container_of(pos, struct notifier_ending, link)->dev == n->dev)
            return true;
    return false;
}

/* The next notifier to be called. Caller holds t->lock. */
static struct hmm_notifier *next_to_call(struct notifier_tree *t, const struct invalidation *inv, struct key after)
{
    struct hmm_notifier *n;
    while ((n = treap_next(t->root, after, inv->event.start, inv->event.end)) != NULL) {
        if (n->born < inv->insertions && concerns(&inv->event, n) && !is_ignored(t, n))
            return n;
        after = key_of(n);
    }
    return NULL;
}

static int check_answer(const struct notifier_tree *t, const struct running *call, int err)
{
    char name[160];
    if (answer_is_right(call->event, err))
        return err;
    running_name(t, call->ops, call->dev, call->start, call->end, name, sizeof(name));
    return answer_is_wrong(call->event, err, name);
}

/* Runs one callback, without the lock. Caller holds t->lock before and after. */
static int run_callback(struct notifier_tree *t, struct hmm_notifier *n, const struct hmm_event *event)
{
    struct running call;
    running_enter(t, &call, n, event);
    mutex_unlock(&t->lock);
    int err = check_answer(t, &call, call.ops->invalidate(n, event));
    mutex_lock(&t->lock);
    t->refused += err == -EAGAIN;
    running_leave(t, &call);
    changed(t);
    return err;
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

static int check_interval(uintptr_t start, uintptr_t end, const struct hmm_notifier_ops *ops)
{
    if (start >= end)
        return hmm_fail(-EINVAL, "notifier: the interval [%#lx, %#lx) is empty, reversed, or wraps around",
                        (unsigned long)start, (unsigned long)end);
    if ((start | end) % os_page_size())
        return hmm_fail(-EINVAL, "notifier: the interval [%#lx, %#lx) is not aligned to pages of %zu bytes",
                        (unsigned long)start, (unsigned long)end, os_page_size());
    if (!ops || !ops->invalidate)
        return hmm_fail(-EINVAL, "notifier: no invalidate callback; without one the device would keep stale translations");
    return 0;
}

int notifier_insert(struct notifier_tree *t, struct hmm_notifier *n, struct hmm_device *dev, uintptr_t start, uintptr_t end,
                    const struct hmm_notifier_ops *ops)
{
    int r = check_interval(start, end, ops);
    if (r)
        return r;
    mutex_lock(&t->lock);
    if (treap_has(t, n) && !mutate("notifier-twice")) {
        r = hmm_fail(-EEXIST, "notifier: inserted already, for [%#lx, %#lx); remove it first, or use another",
                     (unsigned long)n->start, (unsigned long)n->end);
        goto unlock;
    }
    n->start = start;
    n->end = end;
    n->ops = ops;
    n->calls = 0;
    n->born = t->insertions++;
    /* What was cached in an earlier life of this memory must not look current. */
    __atomic_store_n(&n->seq, (n->born + 1) << 32, __ATOMIC_SEQ_CST);
    __atomic_store_n(&n->dev, dev, __ATOMIC_RELEASE);
    treap_insert(t, n);
    t->count++;
    t->bytes += end - start;
unlock:
    mutex_unlock(&t->lock);
    if (!r)
        changing_mark(start, end);
    return r;
}

/* Caller holds t->lock. */
static void wait_for_callbacks(struct notifier_tree *t, const struct hmm_notifier *n)
{
    struct complaint c;
    complaint_begin(&c, "hmm_notifier_remove()", n);
    while (n->calls && !mutate("notifier-remove")) {
        wait_change(t, complaint_sleep(&c));
        complaint_look(t, &c);
    }
}

int notifier_remove(struct notifier_tree *t, struct hmm_notifier *n)
{
    if (running_here(n)) {
        char name[160];
        running_name(t, n->ops, n->dev, n->start, n->end, name, sizeof(name));
        hmm_log(HMM_LOG_ERROR,
                "notifier: %s removes its own notifier, which would wait for itself: refused; do it after the callback", name);
        return hmm_fail(-EDEADLK, "notifier: removed from inside of its own %s; do it after the callback has returned", name);
    }
    mutex_lock(&t->lock);
    int r = treap_has(t, n) ? 0 : -ENOENT;
    if (!r) {
        treap_remove(t, n);
        t->count--;
        t->bytes -= n->end - n->start;
        __atomic_fetch_add(&n->seq, 1, __ATOMIC_SEQ_CST); /* what was read before is not current any more */
        wait_for_callbacks(t, n);
        changing_unmark_large(n->start, n->end);
        __atomic_store_n(&n->dev, NULL, __ATOMIC_RELEASE);
        changed(t);
    }
    mutex_unlock(&t->lock);
    return r ? hmm_fail(r, "notifier: removed, but it is not inserted (removed before?)") : 0;
}

/* Whether an invalidation of n's interval has begun and not ended. Caller holds t->lock. */
static bool invalidating(struct notifier_tree *t, const struct hmm_notifier *n)
{
    list_for_each (pos, &t->active)
        if (concerns(&container_of(pos, struct invalidation, link)->event, n))
            return true;
    return false;
}

/* 0 when it was removed meanwhile. Caller holds t->lock. */
static uint64_t current_seq(const struct hmm_notifier *n)
{
    return n->dev ? hmm_notifier_seq(n) : 0;
}

uint64_t notifier_read_begin_timeout(struct notifier_tree *t, struct hmm_notifier *n, int64_t timeout_ns)
{
    uint64_t seq = 0;
    bool waited = false;
    struct complaint c;
    uint64_t began = timeout_ns < 0 ? 0 : os_now();
    if (!changing_wait_timeout(n->start, n->end, timeout_ns))
        return 0;
    if (timeout_ns > 0) {
        int64_t spent = (int64_t)(os_now() - began);
        timeout_ns = spent < timeout_ns ? timeout_ns - spent : 0;
    }
    mutex_lock(&t->lock);
    for (uint64_t deadline = 0; n->dev && invalidating(t, n);) {
        if (!waited) {
            complaint_begin(&c, "hmm_notifier_read_begin()", n);
            deadline = c.began + (uint64_t)timeout_ns;
            waited = true;
        }
        int64_t sleep = complaint_sleep(&c), left = timeout_ns < 0 ? sleep : (int64_t)(deadline - os_now());
        if (left <= 0)
            goto unlock;
        wait_change(t, left < sleep ? left : sleep);
        complaint_look(t, &c);
    }
    seq = current_seq(n);
unlock:
    mutex_unlock(&t->lock);
    return seq;
}

uint64_t notifier_read_begin(struct notifier_tree *t, struct hmm_notifier *n)
{
    return notifier_read_begin_timeout(t, n, -1);
}

bool hmm_notifier_read_retry(const struct hmm_notifier *n, uint64_t seq)
{
    return hmm_notifier_seq(n) != seq;
}

uint64_t notifier_bytes(struct notifier_tree *t, const struct hmm_device *dev)
{
    mutex_lock(&t->lock);
    uint64_t bytes = treap_bytes(t->root, dev);
    mutex_unlock(&t->lock);
    return bytes;
}

bool notifier_any(struct notifier_tree *t, uintptr_t start, uintptr_t end)
{
    mutex_lock(&t->lock);
    bool any = treap_next(t->root, KEY_FIRST, start, end) != NULL;
    mutex_unlock(&t->lock);
    return any;
}

bool notifier_tree_is_valid(struct notifier_tree *t)
{
    mutex_lock(&t->lock);
    bool ok = treap_check(t) == (long)t->count;
    mutex_unlock(&t->lock);
    return ok;
}
