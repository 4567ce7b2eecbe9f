/* SPDX-License-Identifier: MIT */
/* See own.h. A table of ranges; a slot is claimed and published with atomics, so that no lock is needed anywhere. */
#include "os/own.h"

#include <errno.h>

#define OWN_MAX 4096

static struct {
    uintptr_t start; /* 0: free, 1: claimed */
    uintptr_t end;
} own[OWN_MAX];
static unsigned own_top; /* no slot at or above was ever used */

static int claim(void)
{
    for (unsigned i = 0; i < OWN_MAX; i++) {
        uintptr_t unused = 0;
        if (!__atomic_compare_exchange_n(&own[i].start, &unused, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            continue;
        unsigned top = __atomic_load_n(&own_top, __ATOMIC_RELAXED);
        while (top <= i && !__atomic_compare_exchange_n(&own_top, &top, i + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            ;
        return (int)i;
    }
    return -1;
}

int own_map(size_t len, size_t align, unsigned flags, void **out)
{
    int i = claim();
    if (i < 0)
        return -ENOMEM;
    int r = os->map(len, align, flags, out);
    if (!r)
        __atomic_store_n(&own[i].end, (uintptr_t)*out + len, __ATOMIC_RELEASE);
    __atomic_store_n(&own[i].start, r ? 0 : (uintptr_t)*out, __ATOMIC_RELEASE);
    return r;
}

/* Forgotten first: as soon as it is unmapped, another own mapping may stand at the same address. */
int own_unmap(void *addr, size_t len)
{
    unsigned i = 0, top = __atomic_load_n(&own_top, __ATOMIC_ACQUIRE);
    while (i < top && __atomic_load_n(&own[i].start, __ATOMIC_ACQUIRE) != (uintptr_t)addr)
        i++;
    if (i < top)
        __atomic_store_n(&own[i].start, 1, __ATOMIC_RELEASE);
    int r = os->unmap(addr, len);
    if (i < top)
        __atomic_store_n(&own[i].start, r ? (uintptr_t)addr : 0, __ATOMIC_RELEASE);
    return r;
}

bool own_overlap(uintptr_t start, uintptr_t end, uintptr_t *own_start, uintptr_t *own_end)
{
    bool any = false;
    for (unsigned i = 0; i < __atomic_load_n(&own_top, __ATOMIC_ACQUIRE); i++) {
        uintptr_t s = __atomic_load_n(&own[i].start, __ATOMIC_ACQUIRE), e = __atomic_load_n(&own[i].end, __ATOMIC_ACQUIRE);
        if (s <= 1 || s >= end || e <= start || (any && s >= *own_start))
            continue;
        *own_start = s;
        *own_end = e;
        any = true;
    }
    return any;
}

void own_forget(void)
{
    for (unsigned i = 0; i < own_top; i++)
        own[i].start = 0;
    own_top = 0;
}
