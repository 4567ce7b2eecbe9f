/* SPDX-License-Identifier: MIT */
/* A bare pager: one thread that answers each fault in a range with a copy, and nothing else. The floor that faults stand on. */
#ifndef HMM_BENCH_UFFD_H
#define HMM_BENCH_UFFD_H

#include "harness.h"

struct bare_pager;

/* Answers `faults` faults in [memory, memory + bytes) from the same offsets of `origin`. The thread starts on the CPUs of the
 * caller. NULL after bench_fail(). */
struct bare_pager *bare_pager_start(struct bench_env *env, char *memory, const char *origin, size_t bytes, size_t faults);
/* Waits for the last fault. 1 after bench_fail(). */
int bare_pager_stop(struct bench_env *env, struct bare_pager *pager);

#endif
