/* SPDX-License-Identifier: MIT */
/* For tests that run the whole library on memory of their own. */
#ifndef TESTS_UNIT_LIVE_H
#define TESTS_UNIT_LIVE_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <hmm/hmm.h>

#include "common/oracle.h"

#define LIVE_BLOCK ((size_t)2 << 20)

static inline void live_fill(void *to, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i < bytes; i++)
        ((volatile uint8_t *)to)[i] = (uint8_t)random_mix(seed + i);
}

/* Block-aligned address space without access, of whole blocks. */
static inline char *live_reserve(size_t bytes)
{
    char *raw = mmap(NULL, bytes + LIVE_BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return raw == MAP_FAILED ? NULL : (char *)(((uintptr_t)raw + LIVE_BLOCK - 1) & ~(LIVE_BLOCK - 1));
}

/* Fresh small pages at a place of the program's own. */
static inline bool live_map(void *at, size_t bytes)
{
    void *p = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return p == at && madvise(at, bytes, MADV_NOHUGEPAGE) == 0;
}

/* A mapping of its own: neighbours without access on both sides. */
static inline char *map_alone(size_t bytes)
{
    char *at = live_reserve(bytes + 2 * LIVE_BLOCK);
    if (!at || !live_map(at + LIVE_BLOCK, bytes))
        abort();
    return at + LIVE_BLOCK;
}

#endif
