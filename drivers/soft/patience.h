/* SPDX-License-Identifier: MIT */
/*
 * Watching a while before going to sleep. Two processes on two CPUs so answer each other in a fraction of the time that a sleep and a
 * wake take, most of all where an idle CPU would have to be woken. On one CPU it would only keep the other side from running; and
 * where that has no CPU of its own, or is busy for long, it is a waste. So it is done on different CPUs only, and while it pays: after
 * some failures only now and then.
 */
#ifndef HMM_SOFT_PATIENCE_H
#define HMM_SOFT_PATIENCE_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct patience {
    int32_t credit; /* > 0: it pays */
    uint32_t waits; /* counts those without, for the trials */
};
#define PATIENCE_NS 100000
#define PATIENCE_CREDIT 8 /* failures in a row until it is given up */
#define PATIENCE_TRIAL 16 /* then every so many waits */

static inline uint64_t patience_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void patience_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline bool patience_look(const uint32_t *turn, uint32_t next)
{
    for (int i = 0; i < 8; i++) {
        if (__atomic_load_n(turn, __ATOMIC_ACQUIRE) >> 1 == next)
            return true;
        patience_pause();
    }
    return false;
}

/* Watches for the count `next`, which who last spoke on `their_cpu` is to set. True: it is there. */
static inline bool patience_watch(const uint32_t *turn, uint32_t next, uint32_t their_cpu, struct patience *p)
{
    if (their_cpu == (uint32_t)sched_getcpu() || (p->credit <= 0 && ++p->waits % PATIENCE_TRIAL))
        return __atomic_load_n(turn, __ATOMIC_ACQUIRE) >> 1 == next;
    bool there = patience_look(turn, next);
    if (!there)
        for (uint64_t until = patience_now_ns() + PATIENCE_NS; !there && patience_now_ns() < until;)
            there = patience_look(turn, next);
    p->credit += there ? 2 : -1;
    p->credit = p->credit > PATIENCE_CREDIT ? PATIENCE_CREDIT : p->credit < 0 ? 0 : p->credit;
    return there;
}

#endif
