/* SPDX-License-Identifier: MIT */
/* For tests of notifiers on a tree of their own: what is logged, and threads that wait for each other. */
#ifndef TESTS_UNIT_NOTIFIER_H
#define TESTS_UNIT_NOTIFIER_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "notifier/notifier.h"
#include "os/os.h"

#define PAGE ((uintptr_t)os_page_size())
#define DEVICE(i) ((struct hmm_device *)(uintptr_t)(0x1000 * (i))) /* never followed */

static struct notifier_tree tree;
static unsigned log_lines, wrong_levels;
static char logged[400];

/* From any thread: it cannot assert. */
static inline void keep(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    wrong_levels += level != HMM_LOG_WARNING && level != HMM_LOG_ERROR;
    snprintf(logged, sizeof(logged), "%s", line);
    __atomic_fetch_add(&log_lines, 1, __ATOMIC_RELEASE);
}

static inline pthread_t start(void *(*fn)(void *), void *arg)
{
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, fn, arg), 0);
    return t;
}

static inline uint32_t load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void wait_for(const uint32_t *word, uint32_t value)
{
    for (uint64_t began = os_now(); load(word) < value; sched_yield())
        assert_true(os_now() - began < 30000000000ull);
}

#endif
