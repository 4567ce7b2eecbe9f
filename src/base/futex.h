/* SPDX-License-Identifier: MIT */
/* futex(2) on library memory. */
#ifndef HMM_BASE_FUTEX_H
#define HMM_BASE_FUTEX_H

#include <stdint.h>

/* Waits while *word == value. 0, -EAGAIN (value differs), -ETIMEDOUT, -EINTR. timeout_ns < 0: none. Relative, monotonic. */
int futex_wait(const uint32_t *word, uint32_t value, int64_t timeout_ns);
/* Wakes up to n waiters; INT_MAX: all. */
void futex_wake(const uint32_t *word, int n);

/* The same on memory that other processes have, too. */
int futex_wait_common(const uint32_t *word, uint32_t value, int64_t timeout_ns);
void futex_wake_common(const uint32_t *word, int n);

#endif
