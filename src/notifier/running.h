/* SPDX-License-Identifier: MIT */
/* Callbacks that run: who waits for one that does not return can say which it is. */
#ifndef HMM_NOTIFIER_RUNNING_H
#define HMM_NOTIFIER_RUNNING_H

#include "notifier/notifier.h"

/* One callback of one notifier; on the stack of the thread that runs it. Copies of what it needs of the notifier, so that it can be
 * reported without looking there. */
struct running {
    struct list link;      /* notifier_tree.running; tree lock */
    struct running *outer; /* of the same thread */
    struct hmm_notifier *n;
    const struct hmm_notifier_ops *ops;
    struct hmm_device *dev;
    uintptr_t start, end; /* of the notifier */
    const struct hmm_event *event;
    uint64_t began; /* os_now() */
};

/* Enters and leaves a callback. Caller holds the tree lock. */
void running_enter(struct notifier_tree *t, struct running *call, struct hmm_notifier *n, const struct hmm_event *event);
void running_leave(struct notifier_tree *t, struct running *call);
/* Whether this thread is inside a callback of n. No lock needed. */
bool running_here(const struct hmm_notifier *n);

/* "callback NAME of device NAME for [...)" into buf. */
void running_name(const struct notifier_tree *t, const struct hmm_notifier_ops *ops, const struct hmm_device *dev,
                  uintptr_t start, uintptr_t end, char *buf, size_t size);
const char *event_name(enum hmm_event_type type);
/* Only 0, and -EAGAIN where the event allows it, is an answer of invalidate(). */
bool answer_is_right(const struct hmm_event *event, int err);
/* Reports another one, of who; returns 0: it is taken as done. */
int answer_is_wrong(const struct hmm_event *event, int err, const char *who);

/* A wait that ought to be short. */
struct complaint {
    const char *who; /* "hmm_notifier_remove()" */
    const struct hmm_notifier *n;
    uint64_t began, next; /* os_now(): since when, and when to complain */
};
void complaint_begin(struct complaint *c, const char *who, const struct hmm_notifier *n);
/* How long to sleep until the next complaint. */
int64_t complaint_sleep(const struct complaint *c);
/* Says who is waited for, if it is time. Caller holds the tree lock. */
void complaint_look(struct notifier_tree *t, struct complaint *c);

#endif
