/* SPDX-License-Identifier: MIT */
/* See futex.h. Private futexes, but for the last two calls: what processes share is found by its page, which is slower. */
#include "base/futex.h"

#include <errno.h>
#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int wait_on(int op, const uint32_t *word, uint32_t value, int64_t timeout_ns)
{
    struct timespec ts = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    if (syscall(SYS_futex, word, op, value, timeout_ns < 0 ? NULL : &ts, NULL, 0) == 0)
        return 0;
    return -errno;
}

int futex_wait(const uint32_t *word, uint32_t value, int64_t timeout_ns)
{
    return wait_on(FUTEX_WAIT_PRIVATE, word, value, timeout_ns);
}

void futex_wake(const uint32_t *word, int n)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

int futex_wait_common(const uint32_t *word, uint32_t value, int64_t timeout_ns)
{
    return wait_on(FUTEX_WAIT, word, value, timeout_ns);
}

void futex_wake_common(const uint32_t *word, int n)
{
    syscall(SYS_futex, word, FUTEX_WAKE, n, NULL, NULL, 0);
}
