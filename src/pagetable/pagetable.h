/* SPDX-License-Identifier: MIT */
/*
 * Address -> entry: where a page is when it is not plain system memory.
 *
 * A radix tree (9 bits a level, like the hardware's) leads to blocks of 2 MiB; a block holds one 8-byte entry per base page, in a
 * short list while few are in use, in a table afterwards. No entry (0) means: system memory, ask the kernel.
 *
 *   entry    CPU page table           data is in
 *   NONE     whatever the kernel has  system memory
 *   DEVICE   missing                  device page (pagemap id, page)
 *   FLIGHT   missing                  staging or device page of a migration in flight (flight id, index)
 *   POISON   poison marker            nowhere: lost with its device
 *
 * Concurrency: tree nodes are never freed while the table lives, so lookup is lock-free. Blocks are created under the
 * table's lock by holders of the shared address-space lock, and freed only by a holder of the exclusive one: a block pointer
 * is valid while the address-space lock is held in either mode. Entries are protected by the block's lock, or by the exclusive
 * address-space lock.
 */
#ifndef HMM_PAGETABLE_H
#define HMM_PAGETABLE_H

#include "base/list.h"
#include "base/lock.h"
#include "os/os.h"

typedef uint64_t entry_t;

enum entry_kind { ENTRY_NONE, ENTRY_DEVICE, ENTRY_FLIGHT, ENTRY_POISON };

/* bits 0..2 kind, 3..15 id (pagemap or flight), 16..63 page or index */
static inline entry_t entry_make(enum entry_kind kind, uint32_t id, uint64_t page)
{
    return (entry_t)kind | (entry_t)id << 3 | page << 16;
}

static inline enum entry_kind entry_kind(entry_t e)
{
    return (enum entry_kind)(e & 7);
}

static inline uint32_t entry_id(entry_t e)
{
    return e >> 3 & 0x1fff;
}

static inline uint64_t entry_page(entry_t e)
{
    return e >> 16;
}

#define BLOCK_MASK (~(uintptr_t)(OS_BLOCK_SIZE - 1))
#define BLOCK_SPARSE 8 /* entries kept without a table */

#define BLOCK_PAGES_MAX 512 /* with the smallest page size there is */

struct block {
    uintptr_t base;
    struct mutex lock; /* RANK_BLOCK: everything below but lru */
    entry_t *table;    /* one per page, or NULL: the list below */
    entry_t sparse[BLOCK_SPARSE];
    uint16_t sparse_page[BLOCK_SPARSE];
    uint16_t used;      /* entries that are not NONE */
    uint16_t on_device; /* of these DEVICE */
    bool huge;          /* came as one huge page: goes home as one */
    struct list lru;    /* mm's lru_lock; linked while on_device > 0, roughly */
};

struct pagetable {
    struct mutex lock; /* RANK_BLOCK: growing the tree */
    void **root;
    uint64_t blocks; /* atomic */
    uint64_t bytes;  /* atomic: tree, blocks and tables */
};

int pagetable_init(struct pagetable *pt);
void pagetable_exit(struct pagetable *pt); /* frees what is left */

/* Pages per block. */
unsigned block_pages(void);
static inline unsigned block_index(uintptr_t addr)
{
    return (addr & (OS_BLOCK_SIZE - 1)) >> os_page_shift();
}
static inline uintptr_t block_addr(const struct block *b, unsigned i)
{
    return b->base + ((uintptr_t)i << os_page_shift());
}

/* Indices of the first page of [start, end) in a block that overlaps it, and behind its last. */
static inline unsigned block_first(const struct block *b, uintptr_t start)
{
    return start <= b->base ? 0 : block_index(start);
}
static inline unsigned block_behind(const struct block *b, uintptr_t end)
{
    return end >= b->base + OS_BLOCK_SIZE ? block_pages() : block_index(end);
}

/* The block of an address or NULL. Caller holds the address-space lock. */
struct block *pagetable_find(const struct pagetable *pt, uintptr_t addr);
/* The same, created if missing; NULL without memory. */
struct block *pagetable_get(struct pagetable *pt, uintptr_t addr);
/* First block whose base is in [block of start, end); NULL when none. */
struct block *pagetable_next(const struct pagetable *pt, uintptr_t start, uintptr_t end);
/* Frees an unused block. Caller holds the address-space lock exclusively. */
void pagetable_remove(struct pagetable *pt, struct block *b);

/* Makes room for n more entries, so that block_set cannot fail. Caller holds the block lock. */
int block_reserve(struct pagetable *pt, struct block *b, unsigned n);
/* The same, waiting for memory instead of failing: for events, which cannot be refused. */
void block_reserve_must(struct pagetable *pt, struct block *b, unsigned n);
entry_t block_entry(const struct block *b, unsigned i);
void block_set(struct block *b, unsigned i, entry_t e);
/* Counts and lists agree. Caller holds the block lock or the exclusive address-space lock. */
bool block_is_valid(const struct block *b);

#endif
