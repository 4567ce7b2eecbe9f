/* SPDX-License-Identifier: MIT */
/* Calls into the driver's copy engine. */
#include <errno.h>

#include "debug/inject.h"
#include "migrate/migrate.h"

int driver_start_copy(struct flight *f, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    lock_assert_none();
    fence_init(fence);
    if (device_memory_is_lost(f->dev))
        return -ENODEV;
    int r = inject_driver("copy");
    if (kind == HMM_DMA_TO_DEVICE && mutate("flip-to-device"))
        *(char *)v[0].host ^= 1;
    return r ? r : f->dev->driver->copy(f->dev->priv, kind, v, n, fence);
}

int driver_start_clear(struct flight *f, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    lock_assert_none();
    fence_init(fence);
    if (device_memory_is_lost(f->dev))
        return -ENODEV;
    int r = inject_driver("clear");
    return r ? r : f->dev->driver->clear(f->dev->priv, v, n, fence);
}

int driver_copy(struct flight *f, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n)
{
    int r = driver_start_copy(f, kind, v, n, &f->copied);
    return r ? r : fence_wait(&f->copied, -1);
}
