/* SPDX-License-Identifier: MIT */
/* Memory for the internal allocator in tests that have no operating-system layer, counted, and able to fail. */
#ifndef TEST_MEM_SOURCE_H
#define TEST_MEM_SOURCE_H

#include <errno.h>
#include <stdbool.h>
#include <sys/mman.h>

#include "base/alloc.h"

static long source_mappings;  /* live */
static bool source_exhausted; /* map fails */
static long alloc_until_fail; /* with fail_nth: allocations before the one that fails; < 0: none does */

static inline int source_map(size_t bytes, void **out)
{
    if (source_exhausted)
        return -ENOMEM;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return -errno;
    __atomic_fetch_add(&source_mappings, 1, __ATOMIC_RELAXED);
    *out = p;
    return 0;
}

static inline void source_unmap(void *ptr, size_t bytes)
{
    munmap(ptr, bytes);
    __atomic_fetch_sub(&source_mappings, 1, __ATOMIC_RELAXED);
}

static inline void source_start(void)
{
    static const struct mem_source source = {source_map, source_unmap};
    mem_init(&source);
}

/* For mem_fail: lets alloc_until_fail allocations pass, fails one. */
static inline int fail_nth(size_t bytes)
{
    (void)bytes;
    return alloc_until_fail-- == 0;
}

#endif
