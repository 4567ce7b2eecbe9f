/* SPDX-License-Identifier: MIT */
/*
 * Interval notifiers (kernel: mm/mmu_notifier.c, mmu_interval_notifier). Public half in <hmm/driver.h>.
 *
 * An invalidation has three steps. Begin marks: under the tree lock it enters the range into the list of active invalidations
 * and moves the sequence number of every notifier that overlaps; no callback, so it may run under the address-space lock.
 * Call runs the callbacks, without locks. End takes the range from the active list and wakes read_begin waiters.
 *
 * A notifier that is inserted while an invalidation is active is not called for it; its read_begin waits for the end.
 *
 * What a driver may rely on: let read_begin return s. Then, under the lock that the callback takes, read_retry(s) being false
 * means that every invalidation of the interval that began before has ended before read_begin returned, and every one that
 * begins later will call back, after that lock is free: what is published now is either right or taken back in time.
 *
 * A MIGRATE with an owner leaves out that device's notifiers; the owner of any other type means nothing. SOFT_DIRTY does not come this way:
 * a mirror that collects asks its own device (mirror_bits.c).
 */
#ifndef HMM_NOTIFIER_H
#define HMM_NOTIFIER_H

#include "base/list.h"
#include "base/lock.h"
#include <hmm/driver.h>

struct notifier_tree {
    struct mutex lock; /* RANK_NOTIFIER; protects everything below and every node */
    struct hmm_notifier *root;
    unsigned count;
    struct list active;   /* struct invalidation */
    struct list ending;   /* struct notifier_ending */
    uint32_t changes;     /* futex: active list or a calls count changed, if anybody waits */
    uint32_t waiters;     /* on changes */
    uint64_t insertions;  /* so far; numbers the notifiers (born) and seeds their priorities */
    uint64_t callbacks;   /* statistics: how many have been called, */
    uint64_t callback_ns; /* and the time that those which returned took together */
    uint64_t refused;     /* of callbacks: those that answered -EAGAIN */
    uint64_t bytes;       /* sum of the lengths of all notifiers */
    struct list running;  /* struct running: callbacks that run */
    const char *(*device_name)(const struct hmm_device *dev); /* for messages; set once, before use; may be NULL */
};

struct invalidation {
    struct list link;
    struct hmm_event event;
    uint64_t insertions; /* when it began: notifiers born later are not called */
    bool marked;         /* some notifier overlaps: calls are due */
};

void notifier_tree_init(struct notifier_tree *t);
void notifier_tree_destroy(struct notifier_tree *t);

/* Marks. inv lives until notifier_end(). An empty range concerns nobody. Returns inv->marked: false means that no device has
 * anything there, and call may be left out. Does not block, callable under the address-space and block locks. */
bool notifier_begin(struct notifier_tree *t, struct invalidation *inv, uintptr_t start, uintptr_t end, enum hmm_event_type type,
                    struct hmm_device *owner);
enum notifier_how {
    NOTIFIER_AT_ONCE, /* not blockable */
    NOTIFIER_BRIEFLY, /* blockable, but brief */
    NOTIFIER_WAIT,
};
/* Runs the callbacks, in the order of (start, address), one at a time. Returns 0, or -EAGAIN (not for NOTIFIER_WAIT; at once):
 * some device must be waited for; call again with NOTIFIER_WAIT. No locks held. Wrong returns are logged with the callback's address and
 * count as done. */
int notifier_call(struct notifier_tree *t, struct invalidation *inv, enum notifier_how how);
void notifier_end(struct notifier_tree *t, struct invalidation *inv);

/* A device that has nothing any more: no callback of its notifiers begins between ignore and forget, so that its driver may free what they
 * use once those that run have returned. Its notifiers are gone when it is forgotten. */
struct notifier_ending {
    struct list link;
    struct hmm_device *dev;
};
void notifier_ignore(struct notifier_tree *t, struct notifier_ending *e, struct hmm_device *dev);
void notifier_forget(struct notifier_tree *t, struct notifier_ending *e);

/* Insert etc. behind the public calls: the tree is found by the caller. Insert wants start, end, dev and ops. -EINVAL, -EEXIST. */
int notifier_insert(struct notifier_tree *t, struct hmm_notifier *n, struct hmm_device *dev, uintptr_t start, uintptr_t end,
                    const struct hmm_notifier_ops *ops);
int notifier_remove(struct notifier_tree *t, struct hmm_notifier *n); /* -ENOENT, -EDEADLK */
/* 0: it is not inserted. */
uint64_t notifier_read_begin(struct notifier_tree *t, struct hmm_notifier *n);
/* The same, for timeout_ns at most (< 0: for ever): 0 also when that has passed. */
uint64_t notifier_read_begin_timeout(struct notifier_tree *t, struct hmm_notifier *n, int64_t timeout_ns);
/* Whether an interval overlaps [start, end). Does not block; callable under the address-space and block locks. */
bool notifier_any(struct notifier_tree *t, uintptr_t start, uintptr_t end);

/* A callback that has been running for long. */
struct notifier_overdue {
    int (*callback)(struct hmm_notifier *, const struct hmm_event *);
    const char *name; /* of it, or NULL; constant, the driver's */
    struct hmm_device *dev;
    uintptr_t start, end; /* of the notifier's interval */
    struct hmm_event event;
    uint64_t ns; /* how long by now */
};
/* The callback of dev (NULL: of any device) that has been running longest, if that is at least ns. False: none; out is unchanged. Does
 * not block. It may have returned by the time that the caller looks. */
bool notifier_overdue(struct notifier_tree *t, const struct hmm_device *dev, uint64_t ns, struct notifier_overdue *out);
/* In words: "callback soft-table (0x...) of device soft for [...) has been running for 3.2 s (unmap of [...))". */
void notifier_overdue_text(const struct notifier_tree *t, const struct notifier_overdue *o, char *buf, size_t size);

/* Sum of the lengths of the device's notifiers. Looks at all: not for hot paths. */
uint64_t notifier_bytes(struct notifier_tree *t, const struct hmm_device *dev);
/* Order, heap property, max_end, counts; for the audit and tests. */
bool notifier_tree_is_valid(struct notifier_tree *t);

#endif
