/* SPDX-License-Identifier: MIT */
/*
 * One pass of a radix sort, by the digit of 8 bits from the least significant on. Numbers are collected in lines of 64 bytes, one per
 * digit, and written a line at a time: 256 streams of writes would need more of the TLB and the caches than there is.
 *
 * What is counted and what is sorted may differ when the program changes its numbers meanwhile. Then positions are wrong, and may be
 * behind the end: who puts lines somewhere checks that.
 */
#ifndef HMM_SOFT_LOOPS_SORT_H
#define HMM_SOFT_LOOPS_SORT_H

#include "loops.h"

#define SORT_DIGITS 256
#define SORT_LINE 64

struct sort_lines {
    uint64_t next[SORT_DIGITS]; /* place of the next number with this digit */
    uint8_t begin[SORT_DIGITS]; /* where its line begins: not 0 only in the first one */
    char line[SORT_DIGITS][SORT_LINE] __attribute__((aligned(SORT_LINE)));
};

/* Numbers of each digit, of size bytes: counts[digit's place][digit]. */
static inline void sort_count(uint64_t (*counts)[SORT_DIGITS], const char *from, size_t n, unsigned size)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t number = loop_load(from + i * size, size);
        for (unsigned place = 0; place < size; place++)
            counts[place][number >> 8 * place & 0xff]++;
    }
}

/* Whether all numbers have the same digit there: then there is nothing to do. */
static inline bool sort_constant(const uint64_t *counts, uint64_t n)
{
    for (unsigned d = 0; d < SORT_DIGITS; d++)
        if (counts[d])
            return counts[d] == n;
    return true;
}

static inline void sort_begin(struct sort_lines *l, const uint64_t *counts, unsigned size)
{
    uint64_t at = 0;
    for (unsigned d = 0; d < SORT_DIGITS; d++) {
        l->next[d] = at;
        l->begin[d] = (uint8_t)(at % (SORT_LINE / size));
        at += counts[d];
    }
}

static inline __attribute__((always_inline)) void sort_store(char *to, uint64_t number, unsigned size)
{
    if (size == 4)
        *(any_u32 *)to = (uint32_t)number;
    else
        *(any_u64 *)to = number;
}

/* Puts numbers [place, place + n) where they belong. */
typedef void sort_put_fn(void *to, uint64_t place, const char *numbers, unsigned n);

static inline __attribute__((always_inline)) void sort_some(struct sort_lines *l, const char *from, size_t n, unsigned size,
                                                            unsigned shift, sort_put_fn *put, void *to)
{
    const unsigned room = SORT_LINE / size;
    for (size_t i = 0; i < n; i++) {
        uint64_t number = loop_load(from + i * size, size);
        unsigned d = number >> shift & 0xff;
        uint64_t place = l->next[d]++;
        unsigned k = place % room;
        sort_store(l->line[d] + k * size, number, size);
        if (k == room - 1) {
            unsigned begin = l->begin[d];
            put(to, place - (k - begin), l->line[d] + begin * size, room - begin);
            l->begin[d] = 0;
        }
    }
}

static inline __attribute__((always_inline)) void sort_end(struct sort_lines *l, unsigned size, sort_put_fn *put, void *to)
{
    const unsigned room = SORT_LINE / size;
    for (unsigned d = 0; d < SORT_DIGITS; d++) {
        unsigned k = l->next[d] % room, begin = l->begin[d];
        if (k > begin)
            put(to, l->next[d] - (k - begin), l->line[d] + begin * size, k - begin);
    }
}

#endif
