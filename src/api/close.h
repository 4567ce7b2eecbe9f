/* SPDX-License-Identifier: MIT */
/* Closing a device: everything that may have to wait for it, with a bound. */
#ifndef HMM_API_CLOSE_H
#define HMM_API_CLOSE_H

#include "api/manager.h"

/* How far it has come; it only goes on. */
enum close_stage {
    CLOSE_JOBS,      /* the driver's stop(), and what is left of its jobs */
    CLOSE_USERS,     /* calls that are inside the device */
    CLOSE_MIRRORS,   /* its mirrors' release() */
    CLOSE_PAGES,     /* every page comes home */
    CLOSE_CALLBACKS, /* notifier callbacks of it that are still running; none begins any more */
    CLOSE_CHANGES,   /* of the last device: changes that the program has announced */
    CLOSE_DONE,      /* nothing is left but the driver's close() */
};

struct closing {
    struct call call;
    struct hmm_device *dev;
    const uint32_t *users; /* futex: of its slot */
    bool counted;          /* see manager_all_ending() */
    bool ignored;          /* its notifiers are not called any more */
    struct notifier_ending ending;
    bool running;     /* a library thread is at it. Of the one caller */
    uint32_t stage;   /* atomic: enum close_stage */
    uint32_t give_up; /* atomic: end at the next opportunity */
    int result;
};

void closing_init(struct closing *c, struct hmm_device *dev, const uint32_t *users);
/*
 * 0: only the driver's close() is left. Else as hmm_device_close(), with a message; to be called again then, by one thread at a time: it
 * goes on where it was, and a library thread that could not come back yet is still at it. Application context.
 */
int closing_run(struct closing *c);
/* After that: the driver's close() has removed its notifiers, and the device's memory may become another's. */
void closing_end(struct closing *c);

#endif
