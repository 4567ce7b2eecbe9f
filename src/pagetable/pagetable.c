/* SPDX-License-Identifier: MIT */
/* See pagetable.h. Four levels of 9 bits over 2 MiB blocks cover 57-bit addresses. */
#include "pagetable/pagetable.h"

#include <errno.h>
#include <string.h>

#include "base/alloc.h"

#define LEVELS 4
#define LEVEL_BITS 9
#define FANOUT (1u << LEVEL_BITS)
#define NODE_BYTES (FANOUT * sizeof(void *))
#define BLOCK_SHIFT 21

_Static_assert((size_t)1 << BLOCK_SHIFT == OS_BLOCK_SIZE, "BLOCK_SHIFT matches OS_BLOCK_SIZE");

static unsigned slot(uintptr_t addr, unsigned level)
{
    return addr >> (BLOCK_SHIFT + level * LEVEL_BITS) & (FANOUT - 1);
}

/* Bytes of address space below one slot of a level. */
static uintptr_t slot_span(unsigned level)
{
    return (uintptr_t)1 << (BLOCK_SHIFT + level * LEVEL_BITS);
}

static bool in_reach(uintptr_t addr)
{
    return addr >> (BLOCK_SHIFT + LEVELS * LEVEL_BITS) == 0;
}

unsigned block_pages(void)
{
    return OS_BLOCK_SIZE >> os_page_shift();
}

static void account(struct pagetable *pt, int64_t bytes)
{
    __atomic_fetch_add(&pt->bytes, (uint64_t)bytes, __ATOMIC_RELAXED);
}

int pagetable_init(struct pagetable *pt)
{
    memset(pt, 0, sizeof(*pt));
    mutex_init(&pt->lock, RANK_BLOCK);
    pt->root = mem_alloc(NODE_BYTES);
    if (!pt->root)
        return -ENOMEM;
    account(pt, NODE_BYTES);
    return 0;
}

static size_t table_bytes(void)
{
    return block_pages() * sizeof(entry_t);
}

static void block_free(struct pagetable *pt, struct block *b)
{
    if (b->table) {
        mem_free(b->table, table_bytes());
        account(pt, -(int64_t)table_bytes());
    }
    mutex_destroy(&b->lock);
    mem_free(b, sizeof(*b));
    account(pt, -(int64_t)sizeof(*b));
    __atomic_fetch_sub(&pt->blocks, 1, __ATOMIC_RELAXED);
}

static void free_below(struct pagetable *pt, void **node, unsigned level)
{
    for (unsigned i = 0; i < FANOUT; i++) {
        if (!node[i])
            continue;
        if (level > 0)
            free_below(pt, node[i], level - 1);
        else
            block_free(pt, node[i]);
    }
    mem_free(node, NODE_BYTES);
}

void pagetable_exit(struct pagetable *pt)
{
    free_below(pt, pt->root, LEVELS - 1);
    mutex_destroy(&pt->lock);
}

struct block *pagetable_find(const struct pagetable *pt, uintptr_t addr)
{
    if (!in_reach(addr))
        return NULL;
    void **node = pt->root;
    for (unsigned level = LEVELS; level-- > 0 && node;)
        node = __atomic_load_n(&node[slot(addr, level)], __ATOMIC_ACQUIRE);
    return (struct block *)node;
}

static struct block *block_new(struct pagetable *pt, uintptr_t base)
{
    struct block *b = mem_alloc(sizeof(*b));
    if (!b)
        return NULL;
    b->base = base;
    mutex_init(&b->lock, RANK_BLOCK);
    list_init(&b->lru);
    account(pt, sizeof(*b));
    __atomic_fetch_add(&pt->blocks, 1, __ATOMIC_RELAXED);
    return b;
}

/* Caller holds pt->lock. */
static struct block *grow(struct pagetable *pt, uintptr_t addr)
{
    void **node = pt->root;
    for (unsigned level = LEVELS; level-- > 0;) {
        void **at = &node[slot(addr, level)];
        void *child = *at;
        if (!child) {
            child = level > 0 ? mem_alloc(NODE_BYTES) : (void *)block_new(pt, addr & BLOCK_MASK);
            if (!child)
                return NULL; /* nodes made so far stay: they are part of the tree */
            if (level > 0)
                account(pt, NODE_BYTES);
            __atomic_store_n(at, child, __ATOMIC_RELEASE);
        }
        node = child;
    }
    return (struct block *)node;
}

struct block *pagetable_get(struct pagetable *pt, uintptr_t addr)
{
    struct block *b = pagetable_find(pt, addr);
    if (b || !in_reach(addr))
        return b;
    mutex_lock(&pt->lock);
    b = grow(pt, addr);
    mutex_unlock(&pt->lock);
    return b;
}

struct block *pagetable_next(const struct pagetable *pt, uintptr_t start, uintptr_t end)
{
    uintptr_t addr = start & BLOCK_MASK;
    while (addr < end && in_reach(addr)) {
        void **node = pt->root;
        unsigned level = LEVELS;
        while (level > 0) {
            void **child = __atomic_load_n(&node[slot(addr, level - 1)], __ATOMIC_ACQUIRE);
            if (!child)
                break;
            node = child;
            level--;
        }
        if (level == 0)
            return (struct block *)node;
        /* Empty slots of one node are passed over together. */
        unsigned i = slot(addr, level - 1) + 1;
        while (i < FANOUT && !__atomic_load_n(&node[i], __ATOMIC_ACQUIRE))
            i++;
        uintptr_t span = slot_span(level - 1);
        addr = (addr & ~(span * FANOUT - 1)) + span * i;
        if (addr == 0)
            break;
    }
    return NULL;
}

void pagetable_remove(struct pagetable *pt, struct block *b)
{
    void **node = pt->root;
    for (unsigned level = LEVELS; level-- > 1;)
        node = node[slot(b->base, level)];
    __atomic_store_n(&node[slot(b->base, 0)], NULL, __ATOMIC_RELEASE);
    block_free(pt, b);
}

/* Caller holds the block lock. */
static int install_table(struct pagetable *pt, struct block *b)
{
    entry_t *table = mem_alloc(table_bytes());
    if (!table)
        return -ENOMEM;
    for (unsigned i = 0; i < BLOCK_SPARSE; i++)
        if (b->sparse[i])
            table[b->sparse_page[i]] = b->sparse[i];
    memset(b->sparse, 0, sizeof(b->sparse));
    b->table = table;
    account(pt, table_bytes());
    return 0;
}

int block_reserve(struct pagetable *pt, struct block *b, unsigned n)
{
    if (b->table || b->used + n <= BLOCK_SPARSE)
        return 0;
    return install_table(pt, b);
}

void block_reserve_must(struct pagetable *pt, struct block *b, unsigned n)
{
    while (block_reserve(pt, b, n))
        os_sleep(1000000);
}

entry_t block_entry(const struct block *b, unsigned i)
{
    if (b->table)
        return b->table[i];
    for (unsigned k = 0; k < BLOCK_SPARSE; k++)
        if (b->sparse[k] && b->sparse_page[k] == i)
            return b->sparse[k];
    return 0;
}

static entry_t *sparse_slot(struct block *b, unsigned i)
{
    entry_t *unused = NULL;
    for (unsigned k = 0; k < BLOCK_SPARSE; k++) {
        if (b->sparse[k] && b->sparse_page[k] == i)
            return &b->sparse[k];
        if (!b->sparse[k] && !unused)
            unused = &b->sparse[k];
    }
    if (unused)
        b->sparse_page[unused - b->sparse] = i;
    return unused;
}

void block_set(struct block *b, unsigned i, entry_t e)
{
    entry_t *at = b->table ? &b->table[i] : sparse_slot(b, i);
    if (!at)
        return; /* only for e == 0 in a full list: there is nothing to clear */
    b->used += (e != 0) - (*at != 0);
    b->on_device += (entry_kind(e) == ENTRY_DEVICE) - (entry_kind(*at) == ENTRY_DEVICE);
    *at = e;
}

bool block_is_valid(const struct block *b)
{
    unsigned used = 0, on_device = 0;
    for (unsigned i = 0; i < block_pages(); i++) {
        entry_t e = block_entry(b, i);
        used += e != 0;
        on_device += entry_kind(e) == ENTRY_DEVICE;
    }
    return b->base == (b->base & BLOCK_MASK) && used == b->used && on_device == b->on_device;
}
