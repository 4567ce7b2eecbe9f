/* SPDX-License-Identifier: MIT */
/* What pages hold: some words each, which follow from whose page it is and from its version. */
#ifndef TESTS_STRESS_VERSIONS_H
#define TESTS_STRESS_VERSIONS_H

#include "kernels/check_pages.h"
#include "stress.h"

#define ZERO 0 /* version of a page that reads as zeros */

static size_t page;

static inline size_t word_offset(unsigned w)
{
    return w == WORDS - 1 ? page - sizeof(uint64_t) : w * (page / WORDS);
}

static inline uint64_t expected(uint64_t whose, uint64_t version, unsigned w)
{
    return version == ZERO ? 0 : random_mix(whose << 40 ^ version << 4 ^ w);
}

#endif
