/* SPDX-License-Identifier: MIT */
/* What the tests of operations have in common: submitting them, and memory that lies in different places. */
#ifndef TESTS_DRIVER_OPERATIONS_H
#define TESTS_DRIVER_OPERATIONS_H

#include <pthread.h>

#include "support.h"

hmm_fence *submit_operation(hmm_dev dev, const struct hmm_operation *operation);
/* The result of one that must succeed. */
uint64_t must_operate(hmm_dev dev, const struct hmm_operation *operation);
/* One that must fail, with this error about this address. */
void must_fail(hmm_dev dev, const struct hmm_operation *operation, int status, const void *address);

/* Where memory is when a job starts. */
enum place {
    IN_SYSTEM,
    ON_DEVICE,
    IN_BOTH,    /* runs of pages here and there */
    BEHIND_BUS, /* shared: no page can move */
    IN_ALL_THREE,
    PLACES,
};

struct memory {
    char *p;
    size_t bytes;
    enum place place;
};

/* Block aligned, a page that is nobody's before and behind. */
struct memory memory_new(enum place place, size_t bytes);
/* After the CPU has filled it: brings it to its place. */
void memory_settle(hmm_dev dev, const struct memory *m);
void memory_free(struct memory *m);

/* Begins to read bytes of [p, p+bytes) here and there, from a thread of its own, until touching_end(). */
struct touching {
    pthread_t thread;
    const volatile char *p;
    size_t bytes;
    volatile uint32_t stop;
};
void touching_begin(struct touching *t, const void *p, size_t bytes);
void touching_end(struct touching *t);

#endif
