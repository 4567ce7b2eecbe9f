/* SPDX-License-Identifier: MIT */
/*
 * See buddy.h. A set bit i at order o: pages [i << o, (i + 1) << o) are one free block. Invariants: no page is in two free
 * blocks; two free buddies do not both exist below the top order; a bit of a summary level is set exactly when the word below
 * is not zero.
 */
#include "pagemap/buddy.h"

#include <stddef.h>

#include "base/alloc.h"

#define PAGES_MAX ((uint64_t)1 << 40)
#define LEVELS 7 /* 64^7 > PAGES_MAX */

struct bitmap {
    uint64_t bits;
    unsigned levels; /* 0: no block of this order fits */
    uint64_t *level[LEVELS];
};

struct buddy {
    uint64_t pages;
    uint64_t available;
    uint64_t bytes;
    struct bitmap free[BUDDY_ORDERS];
};

/* ---- bitmaps with summaries ---- */

static uint64_t words(uint64_t bits)
{
    return (bits + 63) / 64;
}

/* Words of all levels of a bitmap. */
static uint64_t bitmap_words(uint64_t bits)
{
    uint64_t total = 0;
    while (bits > 1) {
        bits = words(bits);
        total += bits;
    }
    return total ? total : bits;
}

/* Lays the levels out from mem on; returns what comes behind. */
static uint64_t *bitmap_init(struct bitmap *m, uint64_t bits, uint64_t *mem)
{
    m->bits = bits;
    m->levels = 0;
    if (bits == 0)
        return mem;
    do {
        bits = words(bits);
        m->level[m->levels++] = mem;
        mem += bits;
    } while (bits > 1);
    return mem;
}

static bool test_bit(const struct bitmap *m, uint64_t i)
{
    return i < m->bits && (m->level[0][i / 64] >> i % 64 & 1);
}

static void set_bit(struct bitmap *m, uint64_t i)
{
    for (unsigned l = 0; l < m->levels; l++, i /= 64) {
        uint64_t *w = &m->level[l][i / 64], before = *w;
        *w |= (uint64_t)1 << i % 64;
        if (before)
            return; /* the levels above know */
    }
}

static void clear_bit(struct bitmap *m, uint64_t i)
{
    for (unsigned l = 0; l < m->levels; l++, i /= 64) {
        uint64_t *w = &m->level[l][i / 64];
        *w &= ~((uint64_t)1 << i % 64);
        if (*w)
            return;
    }
}

static bool any_bit(const struct bitmap *m)
{
    return m->levels && m->level[m->levels - 1][0];
}

/* Lowest set bit; there is one. */
static uint64_t first_bit(const struct bitmap *m)
{
    uint64_t i = 0;
    for (unsigned l = m->levels; l-- > 0;)
        i = i * 64 + (unsigned)__builtin_ctzll(m->level[l][i]);
    return i;
}

/* Whether a bit of [first, last] is set. */
static bool any_bit_between(const struct bitmap *m, uint64_t first, uint64_t last)
{
    if (first >= m->bits || !any_bit(m))
        return false;
    if (last >= m->bits)
        last = m->bits - 1;
    for (uint64_t w = first / 64; w <= last / 64; w++) {
        uint64_t word = m->level[0][w];
        if (w == first / 64)
            word &= ~(uint64_t)0 << first % 64;
        if (w == last / 64)
            word &= ~(uint64_t)0 >> (63 - last % 64);
        if (word)
            return true;
    }
    return false;
}

/* ---- blocks ---- */

/* Frees the block i of an order, merging upwards. */
static void free_block(struct buddy *b, uint64_t i, unsigned order)
{
    b->available += (uint64_t)1 << order;
    while (order < BUDDY_ORDERS - 1 && test_bit(&b->free[order], i ^ 1)) {
        clear_bit(&b->free[order], i ^ 1);
        i /= 2;
        order++;
    }
    set_bit(&b->free[order], i);
}

/* Largest order of a block that starts at page and holds no more than count pages. */
static unsigned largest_order(uint64_t page, uint64_t count)
{
    unsigned order = 63 - (unsigned)__builtin_clzll(count);
    if (page && (unsigned)__builtin_ctzll(page) < order)
        order = (unsigned)__builtin_ctzll(page);
    return order < BUDDY_ORDERS ? order : BUDDY_ORDERS - 1;
}

static void free_run(struct buddy *b, uint64_t page, uint64_t count)
{
    while (count) {
        unsigned order = largest_order(page, count);
        free_block(b, page >> order, order);
        page += (uint64_t)1 << order;
        count -= (uint64_t)1 << order;
    }
}

static bool overlaps_free(const struct buddy *b, uint64_t page, uint64_t count)
{
    for (unsigned o = 0; o < BUDDY_ORDERS; o++)
        if (any_bit_between(&b->free[o], page >> o, (page + count - 1) >> o))
            return true;
    return false;
}

/* ---- interface ---- */

struct buddy *buddy_new(uint64_t pages)
{
    if (pages == 0 || pages > PAGES_MAX)
        return NULL;
    uint64_t total = 0;
    for (unsigned o = 0; o < BUDDY_ORDERS; o++)
        total += bitmap_words(pages >> o);
    size_t bytes = sizeof(struct buddy) + total * sizeof(uint64_t);
    struct buddy *b = mem_alloc(bytes);
    if (!b)
        return NULL;
    b->pages = pages;
    b->bytes = bytes;
    uint64_t *mem = (uint64_t *)(b + 1);
    for (unsigned o = 0; o < BUDDY_ORDERS; o++)
        mem = bitmap_init(&b->free[o], pages >> o, mem);
    free_run(b, 0, pages);
    return b;
}

void buddy_free_all(struct buddy *b)
{
    mem_free(b, b->bytes);
}

int64_t buddy_alloc(struct buddy *b, unsigned order)
{
    unsigned o = order;
    while (o < BUDDY_ORDERS && !any_bit(&b->free[o]))
        o++;
    if (o >= BUDDY_ORDERS)
        return -1;
    uint64_t i = first_bit(&b->free[o]);
    clear_bit(&b->free[o], i);
    while (o > order) { /* keep the lower half, free the upper one */
        o--;
        i *= 2;
        set_bit(&b->free[o], i + 1);
    }
    b->available -= (uint64_t)1 << order;
    return (int64_t)(i << order);
}

bool buddy_release(struct buddy *b, uint64_t page, uint64_t count)
{
    if (count == 0 || page >= b->pages || count > b->pages - page || overlaps_free(b, page, count))
        return false;
    free_run(b, page, count);
    return true;
}

uint64_t buddy_available(const struct buddy *b)
{
    return b->available;
}

uint64_t buddy_bytes(const struct buddy *b)
{
    return b->bytes;
}

bool buddy_is_free(const struct buddy *b, uint64_t page)
{
    return page < b->pages && overlaps_free(b, page, 1);
}

/* ---- validation ---- */

static bool summaries_agree(const struct bitmap *m)
{
    uint64_t bits = m->bits;
    for (unsigned l = 0; l < m->levels; l++) {
        uint64_t n = words(bits);
        if (bits % 64 && m->level[l][n - 1] >> bits % 64)
            return false; /* bits beyond the end */
        for (uint64_t w = 0; w < n && l + 1 < m->levels; w++)
            if ((m->level[l][w] != 0) != (m->level[l + 1][w / 64] >> w % 64 & 1))
                return false;
        bits = n;
    }
    return true;
}

static bool block_is_valid(const struct buddy *b, unsigned order, uint64_t i)
{
    if (order < BUDDY_ORDERS - 1 && test_bit(&b->free[order], i ^ 1))
        return false;
    for (unsigned o = order + 1; o < BUDDY_ORDERS; o++)
        if (test_bit(&b->free[o], i >> (o - order)))
            return false;
    return true;
}

bool buddy_is_valid(const struct buddy *b)
{
    uint64_t sum = 0;
    for (unsigned o = 0; o < BUDDY_ORDERS; o++) {
        const struct bitmap *m = &b->free[o];
        if (!summaries_agree(m))
            return false;
        for (uint64_t i = 0; i < m->bits; i++) {
            if (m->level[0][i / 64] == 0) {
                i |= 63;
                continue;
            }
            if (!test_bit(m, i))
                continue;
            if (!block_is_valid(b, o, i))
                return false;
            sum += (uint64_t)1 << o;
        }
    }
    return sum == b->available;
}
