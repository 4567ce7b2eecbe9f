/* SPDX-License-Identifier: MIT */
/*
 * The internal allocator: size classes over chunks of the library's own mappings. Never the C library's, because code on the
 * fault path may run while an application thread holds that allocator's lock and waits for us. Memory is zeroed.
 *
 * Large requests (above 32 KiB) are mapped and unmapped one by one, so their memory is given back. Smaller ones come from slabs
 * of one size class; a slab without objects serves any class, and a chunk without slabs is unmapped, but for one.
 *
 * Any thread; one innermost lock (RANK_ALLOC), not held while the source maps or unmaps.
 */
#ifndef HMM_BASE_ALLOC_H
#define HMM_BASE_ALLOC_H

#include <stddef.h>
#include <stdint.h>

/* Where chunks come from; set once at start, before the first allocation. map returns zeroed, page-aligned, not inherited
 * memory, or a negative errno. */
struct mem_source {
    int (*map)(size_t bytes, void **out);
    void (*unmap)(void *ptr, size_t bytes);
};
void mem_init(const struct mem_source *source);
/* Unmaps every chunk. All users are gone: what they still held is lost. A later mem_init starts anew. */
void mem_exit(void);
/* In a child of fork: forgets every chunk (they are not inherited). */
void mem_forget(void);

/* NULL when there is no memory or when mem_fail says so. At least 16-byte aligned. */
void *mem_alloc(size_t bytes);
/* bytes as allocated; NULL allowed. A size of another class is reported and the memory is lost, not handed out twice. */
void mem_free(void *ptr, size_t bytes);

/* Bytes handed out now (rounded to size classes), and mapped now. */
uint64_t mem_used(void);
uint64_t mem_mapped(void);

/* Injection: asked before each allocation when not NULL; true makes it fail. */
extern int (*mem_fail)(size_t bytes);

#endif
