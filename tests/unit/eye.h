/* SPDX-License-Identifier: MIT */
/*
 * For tests of mirrors: a second driver of an open soft device, as small as one can be that is right. It sees the program's memory
 * through a mirror of its own, on whatever thread the test calls it. What it uses at the moment, it uses under `use`, which is what
 * invalidate() waits for.
 */
#ifndef TESTS_UNIT_EYE_H
#define TESTS_UNIT_EYE_H

#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "api/manager.h"
#include "live.h"
#include "mirror/table.h"

struct eye {
    struct hmm_device *dev;
    struct hmm_mirror *m;
    pthread_mutex_t use;
    struct hmm_mirror_ops ops;
    uint32_t flags, directories; /* for registering */
    int answer;                  /* of invalidate(), where it may refuse; else `wrong` */
    int wrong;
    void (*meanwhile)(struct eye *e, const struct hmm_mirror_change *c); /* in invalidate(), if not NULL */
    uint32_t invalidated, released, freed;                               /* calls */
    uint32_t after_free;                                                 /* calls that came after free() */
    struct hmm_event last;
    uintptr_t last_start, last_end;
    uint64_t bus;   /* bytes that went over the bus */
    uint64_t stale; /* runs that were not used, because they were old */
};

static inline void eye_count(struct eye *e, uint32_t *counter)
{
    if (__atomic_load_n(&e->freed, __ATOMIC_SEQ_CST))
        __atomic_fetch_add(&e->after_free, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST);
}

static inline int eye_invalidate(void *priv, const struct hmm_mirror_change *c)
{
    struct eye *e = priv;
    eye_count(e, &e->invalidated);
    if (e->meanwhile)
        e->meanwhile(e, c);
    if (!c->event->blockable || c->event->brief) {
        if (e->answer)
            return e->answer;
        if (pthread_mutex_trylock(&e->use))
            return -EAGAIN;
    } else {
        pthread_mutex_lock(&e->use);
    }
    e->last = *c->event;
    e->last_start = c->start;
    e->last_end = c->end;
    pthread_mutex_unlock(&e->use);
    return e->wrong;
}

static inline void eye_release(void *priv)
{
    struct eye *e = priv;
    eye_count(e, &e->released);
}

static inline void eye_free(void *priv)
{
    struct eye *e = priv;
    eye_count(e, &e->freed);
}

/* A touch by the CPU, which may call the mirror back: what the test set before stands in memory. */
static inline void eye_touch(void *at)
{
    __asm__ volatile("" ::: "memory");
    *(volatile char *)at += 0;
    __asm__ volatile("" ::: "memory");
}

/* Set what differs in *e, then open. */
static inline void eye_init(struct eye *e, hmm_dev dev)
{
    memset(e, 0, sizeof(*e));
    pthread_mutex_init(&e->use, NULL);
    e->dev = device_get(dev);
    device_put(e->dev); /* the test closes it, and not before the mirror */
    e->ops = (struct hmm_mirror_ops){
        .size = sizeof(e->ops), .name = "eye", .invalidate = eye_invalidate, .release = eye_release, .free = eye_free};
}

static inline int eye_open(struct eye *e)
{
    struct hmm_mirror_desc desc = {
        .size = sizeof(desc), .flags = e->flags, .ops = &e->ops, .priv = e, .directories = e->directories};
    return hmm_mirror_register(e->dev, &desc, &e->m);
}

struct eye_call {
    struct call call;
    struct eye *e;
    uintptr_t addr;
    unsigned flags;
    struct hmm_mirror_run *run;
    int result;
};

static inline void eye_resolve_there(struct call *call)
{
    struct eye_call *c = container_of(call, struct eye_call, call);
    c->result = hmm_mirror_resolve(c->e->m, c->addr, c->flags, c->run);
}

/* In a library thread, as an engine would: the test's own has not the descriptors. */
static inline int eye_resolve(struct eye *e, uintptr_t addr, unsigned flags, struct hmm_mirror_run *run)
{
    struct eye_call c = {.call.fn = eye_resolve_there, .e = e, .addr = addr, .flags = flags, .run = run};
    manager_call(&c.call);
    return c.result;
}

static inline bool eye_current(const struct hmm_mirror_run *run)
{
    return __atomic_load_n(run->seq, __ATOMIC_SEQ_CST) == run->seq_seen &&
           __atomic_load_n(run->generation, __ATOMIC_SEQ_CST) == run->generation_seen;
}

/* Where the device reaches the byte. */
static inline char *eye_at(const struct eye *e, const struct hmm_mirror_run *run, uintptr_t addr)
{
    if (!(run->flags & HMM_MIRROR_DEVICE))
        return (char *)(run->page << os_page_shift()) + (addr - run->start);
    return (char *)e->dev->pagemap->desc.cpu_map + (run->page << os_page_shift()) + (addr - run->start);
}

/* Copies through a run if it still holds. */
static inline bool eye_use(struct eye *e, const struct hmm_mirror_run *run, uintptr_t addr, void *buf, size_t len, bool write)
{
    pthread_mutex_lock(&e->use);
    bool even = !(__atomic_load_n(hmm_event_gate(e->dev), __ATOMIC_SEQ_CST) & 1);
    bool good = even && eye_current(run);
    if (good && write)
        memcpy(eye_at(e, run, addr), buf, len);
    else if (good)
        memcpy(buf, eye_at(e, run, addr), len);
    pthread_mutex_unlock(&e->use);
    if (!even)
        hmm_event_sync(e->dev);
    return good;
}

static inline int eye_bus(struct eye *e, uintptr_t addr, void *buf, size_t len, bool write)
{
    uintptr_t page = os_page_size() - 1;
    int64_t n = write ? hmm_bus_write(e->dev, addr, buf, len) : hmm_bus_read(e->dev, addr, buf, len);
    if (n < 0)
        return (int)n;
    __atomic_fetch_add(&e->bus, len, __ATOMIC_RELAXED);
    if (write && e->flags & HMM_MIRROR_TRACK_DIRTY)
        return hmm_mirror_mark(e->m, addr & ~page, (addr + len + page) & ~page, HMM_MIRROR_DIRTY, 0);
    return 0;
}

/* len bytes within one page. cached: the run that was used last, used again while it holds; may be NULL. */
static inline int eye_access(struct eye *e, uintptr_t addr, void *buf, size_t len, bool write, struct hmm_mirror_run *cached)
{
    struct hmm_mirror_run run, *r = cached ? cached : &run;
    bool try = cached && r->start <= addr && addr + len <= r->end && (!write || r->flags & HMM_MIRROR_WRITE);
    for (;;) {
        if (try && eye_use(e, r, addr, buf, len, write))
            return 0;
        __atomic_fetch_add(&e->stale, try, __ATOMIC_RELAXED);
        int err = eye_resolve(e, addr, write ? HMM_FAULT_WRITE : HMM_FAULT_READ, r);
        if (err)
            r->start = r->end = 0;
        if (err == 1)
            return eye_bus(e, addr, buf, len, write);
        if (err)
            return err;
        try = true;
    }
}

#endif
