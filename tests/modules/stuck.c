/* SPDX-License-Identifier: MIT */
/* See stuck.h. */
#include "stuck.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <hmm/driver.h>

enum { MEMORY, SLOT };

static const struct hmm_option options[] = {
    [MEMORY] = {.name = "memory", .type = HMM_OPTION_SIZE, .fallback = "8M", .min = 4096, .max = 1 << 30, .help = "a size"},
    [SLOT] = {.name = "slot", .type = HMM_OPTION_UINT, .fallback = "0", .max = STUCK_SLOTS - 1, .help = "which of the test's"},
    {.name = NULL},
};

struct stuck {
    struct hmm_device *dev;
    char *memory;
    size_t bytes;
    unsigned slot;
    struct hmm_notifier notifier;
    int watches;
};

static struct stuck *opened[STUCK_SLOTS];

static int watch(unsigned slot, uintptr_t start, uintptr_t end);

__attribute__((visibility("default"))) extern struct stuck_interface stuck_interface;
struct stuck_interface stuck_interface = {.watch = watch};

static void sleep_ms(unsigned ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&t, NULL);
}

static int invalidate(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct stuck *s = (struct stuck *)((char *)n - offsetof(struct stuck, notifier));
    struct stuck_device *d = &stuck_interface.devices[s->slot];
    if ((d->hold || d->sleep_ms) && (!event->blockable || event->brief)) {
        __atomic_fetch_add(&d->refused, 1, __ATOMIC_SEQ_CST);
        return -EAGAIN;
    }
    __atomic_fetch_add(&d->inside, 1, __ATOMIC_SEQ_CST);
    if (d->sleep_ms)
        sleep_ms(d->sleep_ms);
    while (d->hold)
        sleep_ms(1);
    __atomic_fetch_add(&d->calls, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_sub(&d->inside, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static int watch(unsigned slot, uintptr_t start, uintptr_t end)
{
    static const struct hmm_notifier_ops ops = {.invalidate = invalidate, .name = STUCK_CALLBACK};
    struct stuck *s = opened[slot];
    int r = hmm_notifier_insert(s->dev, &s->notifier, start, end, &ops);
    s->watches = r == 0;
    return r;
}

static int stuck_open(struct hmm_device *dev, const union hmm_option_value *v, void **priv)
{
    struct stuck *s = calloc(1, sizeof(*s));
    if (!s)
        return hmm_fail(-ENOMEM, "stuck: no memory");
    s->dev = dev;
    s->bytes = v[MEMORY].number;
    s->slot = (unsigned)v[SLOT].number;
    s->memory = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); /* shared: it never leaves */
    const struct hmm_pagemap_desc desc = {.type = HMM_PAGEMAP_PRIVATE, .pages = s->bytes / hmm_page_size()};
    int r = s->memory == MAP_FAILED ? hmm_fail(-ENOMEM, "stuck: no device memory") : hmm_pagemap_add(dev, &desc);
    if (r) {
        free(s);
        return r;
    }
    memset(&stuck_interface.devices[s->slot], 0, sizeof(stuck_interface.devices[s->slot]));
    opened[s->slot] = s;
    *priv = s;
    return 0;
}

static void stuck_stop(void *priv)
{
    (void)priv;
}

static void stuck_close(void *priv)
{
    struct stuck *s = priv;
    if (s->watches)
        hmm_notifier_remove(&s->notifier);
    opened[s->slot] = NULL;
    munmap(s->memory, s->bytes);
    free(s);
}

static int stuck_copy(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    struct stuck *s = priv;
    for (unsigned i = 0; i < n; i++) {
        char *at = s->memory + v[i].page * hmm_page_size();
        if (kind == HMM_DMA_TO_DEVICE)
            memcpy(at, v[i].host, v[i].pages * hmm_page_size());
        else
            memcpy(v[i].host, at, v[i].pages * hmm_page_size());
    }
    hmm_fence_signal(fence, 0);
    return 0;
}

static int stuck_clear(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    struct stuck *s = priv;
    for (unsigned i = 0; i < n; i++)
        memset(s->memory + v[i].page * hmm_page_size(), 0, v[i].pages * hmm_page_size());
    hmm_fence_signal(fence, 0);
    return 0;
}

HMM_DRIVER_EXPORT = {
    .size = sizeof(struct hmm_driver),
    .abi = HMM_DRIVER_ABI,
    .name = "stuck",
    .description = "does with its callbacks what a test says",
    .options = options,
    .open = stuck_open,
    .stop = stuck_stop,
    .close = stuck_close,
    .copy = stuck_copy,
    .clear = stuck_clear,
};
