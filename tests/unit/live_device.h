/* SPDX-License-Identifier: MIT */
/* For tests of the whole library over a device of their own: opening it over a table of system calls that a test may change. */
#ifndef TESTS_UNIT_LIVE_DEVICE_H
#define TESTS_UNIT_LIVE_DEVICE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "live.h"
#include "os/os.h"

static size_t page;
static hmm_dev dev;
static struct os_ops hooked; /* what `os` is: a test sets what it wants in it */
static unsigned errors_logged;
static char last_error[512];

static inline void count_errors(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level <= HMM_LOG_WARNING)
        fprintf(stderr, "library: %s\n", line);
    if (level == HMM_LOG_ERROR)
        snprintf(last_error, sizeof(last_error), "%s", line);
    __atomic_fetch_add(&errors_logged, level == HMM_LOG_ERROR, __ATOMIC_RELAXED);
}

/* A test that takes longer hangs. */
static inline void live_set_up(unsigned seconds_max)
{
    page = hmm_page_size();
    errors_logged = 0;
    alarm(seconds_max);
    hmm_set_log(count_errors, NULL);
    hooked = os_linux;
    os = &hooked;
}

static inline void open_spec(const char *spec)
{
    int r = hmm_device_open(spec, &dev);
    if (r)
        fail_msg("open %s: %d, %s", spec, r, hmm_last_message());
}

/* Whether all was well. */
static inline bool live_tear_down(void)
{
    bool good = true;
    if (dev)
        good = hmm_audit() == 0 && hmm_device_close(dev) == 0;
    dev = 0;
    os = &os_linux;
    hmm_set_log(NULL, NULL);
    alarm(0);
    return good && !errors_logged;
}

static inline struct hmm_migrate_result to_device(const void *at, size_t len)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    int r = hmm_migrate_to_device(dev, at, len, &res);
    if (r)
        fail_msg("to device: %d, %s", r, hmm_last_message());
    return res;
}

#endif
