/* SPDX-License-Identifier: MIT */
/*
 * Fault injection, seeded. Wraps the operating-system table, the internal allocator and driver operations: each call fails,
 * with an error it may really return, with a probability, or exactly the nth one fails. Delays at sequence points widen races.
 * The seed is logged; the same seed gives the same decisions per call site and thread-independent counter.
 */
#ifndef HMM_DEBUG_INJECT_H
#define HMM_DEBUG_INJECT_H

#include "os/os.h"
#include <hmm/driver.h>

enum inject_kind { INJECT_OS, INJECT_ALLOC, INJECT_DRIVER, INJECT_DELAY, INJECT_KINDS };

struct inject_config {
    uint64_t seed;
    uint32_t permille[INJECT_KINDS]; /* probability of failure (or delay) in thousandths */
    uint64_t fail_nth;               /* > 0: only the nth eligible call fails (all kinds but delay), once */
};

/* Replaces `os` by the wrapped table and hooks the allocator. While no manager runs. Calls that a process cannot live without
 * (map at start, private_files) fail only by fail_nth. */
void inject_start(const struct inject_config *config);
void inject_stop(void);
bool inject_active(void);
/* Eligible calls seen since inject_start: the sweep's upper bound. */
uint64_t inject_calls(void);
/* Failures injected since inject_start, and the last of them ("uffd_move: EBUSY"); "" when there was none. For messages of
 * tests: nothing is logged at the time, because a log callback must not run under the caller's locks. */
uint64_t inject_failures(void);
const char *inject_last(void);

/* Asked before a driver operation: 0, or the error to return instead of calling it. */
int inject_driver(const char *op);

/* A sequence point: a place where another thread's step would matter. Sleeps now and then while injection is on, otherwise one
 * predictable branch. Tests may set inject_point_hook to be called at each. No effect on locks held. */
extern int inject_points_on;
extern void (*inject_point_hook)(const char *point);
void inject_point_slow(const char *point);
#define SEQ_POINT(name)                                                                                                        \
    do {                                                                                                                       \
        if (__builtin_expect(__atomic_load_n(&inject_points_on, __ATOMIC_RELAXED), 0))                                         \
            inject_point_slow(name);                                                                                           \
    } while (0)

/*
 * Mutations: protocol steps that a test build can switch off to prove that some test notices (tests/MUTATIONS.md). Compiled
 * in only with HMM_MUTATIONS; named by the environment variable HMM_MUTATE.
 */
#ifdef HMM_MUTATIONS
bool mutate(const char *name);
#else
#define mutate(name) false
#endif

#endif
