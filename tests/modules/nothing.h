/* SPDX-License-Identifier: MIT */
/* Operations of drivers that do nothing, and transfers that fail. */
#ifndef TESTS_MODULES_NOTHING_H
#define TESTS_MODULES_NOTHING_H

#include <errno.h>

#include <hmm/driver.h>

static inline void nothing(void *priv)
{
    (void)priv;
}

static inline int no_copy(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    (void)priv, (void)kind, (void)v, (void)n, (void)fence;
    return -EIO;
}

static inline int no_clear(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    (void)priv, (void)v, (void)n, (void)fence;
    return -EIO;
}

#endif
