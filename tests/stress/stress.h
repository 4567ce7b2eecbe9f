/* SPDX-License-Identifier: MIT */
/* What the stress programs share: a seeded generator, time, log lines, and failing with words. */
#ifndef HMM_TESTS_STRESS_H
#define HMM_TESTS_STRESS_H

#include <hmm/hmm.h>

#include "common/oracle.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static inline unsigned below(uint64_t *state, unsigned n)
{
    return random_next(state) % n;
}

static inline double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static inline uint64_t seed_of(int argc, char **argv, int at)
{
    const char *text = argc > at ? argv[at] : getenv("HMM_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("seed %llu (give it as HMM_SEED to repeat)\n", (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

static inline const char *device_spec(const char *fallback)
{
    const char *spec = getenv("HMM_TEST_DEVICE");
    return spec ? spec : fallback;
}

static inline void print_warnings(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level <= HMM_LOG_WARNING)
        printf("log: %s\n", line);
}

#define REQUIRE(call)                                                                                                          \
    do {                                                                                                                       \
        int64_t r_ = (call);                                                                                                   \
        if (r_ < 0) {                                                                                                          \
            printf("%s:%d: %s: %s (%s)\n", __FILE__, __LINE__, #call, hmm_strerror((int)r_), hmm_last_message());              \
            fflush(stdout);                                                                                                    \
            _exit(1);                                                                                                          \
        }                                                                                                                      \
    } while (0)

#endif
