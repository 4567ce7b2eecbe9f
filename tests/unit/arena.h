/* SPDX-License-Identifier: MIT */
/* The memory of a test of steps: an arena, a place to move it to, and what it holds; and the ways to be told of forks. */
#ifndef TESTS_UNIT_ARENA_H
#define TESTS_UNIT_ARENA_H

#include <errno.h>
#include <string.h>

#include "live_device.h"

static char *arena, *away; /* in blocks of their own */
static uint8_t *oracle;    /* what arena holds; shared with children, and never on a device */
static bool by_handlers;   /* without the right to be told of forks: the environment variable HMM_TEST_FORK is "handlers" */

static inline size_t bytes(unsigned pages)
{
    return pages * page;
}

static inline int open_without_fork_event(uint64_t features, struct os_uffd *out)
{
    return features & UFFD_FEATURE_EVENT_FORK ? -EPERM : os_linux.uffd_open(features, out);
}

/* After live_set_up(), before the device is opened. */
static inline void arena_set_up(unsigned pages)
{
    const char *fork_by = getenv("HMM_TEST_FORK");
    arena = live_reserve(LIVE_BLOCK);
    away = live_reserve(LIVE_BLOCK);
    oracle = mmap(NULL, bytes(pages), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    by_handlers = fork_by && !strcmp(fork_by, "handlers");
    if (by_handlers)
        hooked.uffd_open = open_without_fork_event;
}

static inline void arena_tear_down(unsigned pages)
{
    munmap(arena, LIVE_BLOCK);
    munmap(away, LIVE_BLOCK);
    munmap(oracle, bytes(pages));
}

#endif
