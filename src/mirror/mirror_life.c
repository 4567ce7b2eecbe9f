/* SPDX-License-Identifier: MIT */
/*
 * The life of a mirror (kernel: hmm_mirror_register() of HMM v8, mmu_notifier_register(), mmu_notifier_put()).
 *
 *   LIVE       calls go on
 *   ENDING     unregister has begun: calls that are inside end, new ones get -ENODEV; release; every directory is emptied
 *   (freed)    when the last reference is put; the registration's is put at the end of unregister
 *
 * release is a step of its own, taken by whoever is first: unregister, closing the device, the loss of the device. The others wait until
 * it is done, where they must.
 *
 * `dev` is used only inside a call, an invalidation or unregister itself, all of which keep the device from going: the driver's close()
 * unregisters, and what it forgot is ended by core.
 */
#include "mirror/table.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>

#include "base/alloc.h"
#include "base/error.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "mm/thread.h"

#define DIRECTORIES_MAX (1u << 24) /* 32 TiB */

enum mirror_released { RELEASE_TO_COME, RELEASE_RUNS, RELEASE_DONE };

static struct {
    struct mutex starting; /* RANK_MANAGER: the worker */
    struct mutex lock;     /* RANK_DRIVER: the list, and whose device each is of */
    struct list all;
    struct workers worker; /* releases after a loss */
    bool works;
} mirrors = {
    .starting = MUTEX_INITIALIZER(RANK_MANAGER), .lock = MUTEX_INITIALIZER(RANK_DRIVER), .all = {&mirrors.all, &mirrors.all}};

bool (*mirror_foreign)(void);

static __thread struct mirror_inside *inside_here;

void mirrors_forget(void)
{
    mirrors.starting = (struct mutex)MUTEX_INITIALIZER(RANK_MANAGER);
    mirrors.lock = (struct mutex)MUTEX_INITIALIZER(RANK_DRIVER);
    list_init(&mirrors.all);
    mirrors.works = false;
}

void mirrors_stop(void)
{
    if (mirrors.works)
        workers_stop(&mirrors.worker);
    mirrors.works = false;
}

bool mirror_is_foreign(void)
{
    return mirror_foreign && mirror_foreign();
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

int mirror_enter(struct hmm_mirror *m)
{
    if (mirror_is_foreign()) /* and m is not there */
        return hmm_fail(-ESRCH, "this process was forked from the one that registered the mirror: it has none");
    if (!(__atomic_fetch_add(&m->calls, 1, __ATOMIC_SEQ_CST) & MIRROR_ENDING))
        return 0;
    mirror_leave(m);
    return hmm_fail(-ENODEV, "the mirror was unregistered");
}

/* The last one may find that m is gone as soon as it has left: it wakes an address. */
void mirror_leave(struct hmm_mirror *m)
{
    if (__atomic_fetch_sub(&m->calls, 1, __ATOMIC_SEQ_CST) == (MIRROR_ENDING | 1))
        futex_wake(&m->calls, INT_MAX);
}

static bool begin_end(struct hmm_mirror *m)
{
    return !(__atomic_fetch_or(&m->calls, MIRROR_ENDING, __ATOMIC_SEQ_CST) & MIRROR_ENDING);
}

static void wait_calls(struct hmm_mirror *m)
{
    for (uint32_t n; (n = __atomic_load_n(&m->calls, __ATOMIC_SEQ_CST)) != MIRROR_ENDING && !mutate("mirror-calls");)
        futex_wait(&m->calls, n, -1);
}

void mirror_inside_begin(struct mirror_inside *i, const struct hmm_mirror *m)
{
    *i = (struct mirror_inside){.outer = inside_here, .m = m};
    inside_here = i;
}

void mirror_inside_end(struct mirror_inside *i)
{
    inside_here = i->outer;
}

static bool is_inside(const struct hmm_mirror *m)
{
    for (const struct mirror_inside *i = inside_here; i; i = i->outer)
        if (i->m == m)
            return true;
    return false;
}

/* ---- references -------------------------------------------------------------------------------------------------- */

void hmm_mirror_get(struct hmm_mirror *m)
{
    if (!mirror_is_foreign())
        __atomic_fetch_add(&m->refs, 1, __ATOMIC_RELAXED);
}

void hmm_mirror_put(struct hmm_mirror *m)
{
    if (mirror_is_foreign() || __atomic_fetch_sub(&m->refs, 1, __ATOMIC_ACQ_REL) != 1)
        return;
    void (*fn)(void *) = m->ops.free;
    void *priv = m->priv;
    mirror_table_free(m);
    mem_free(m, sizeof(*m));
    if (fn)
        fn(priv);
}

/* ---- release ----------------------------------------------------------------------------------------------------- */

static bool release_is_mine(struct hmm_mirror *m)
{
    uint32_t none = RELEASE_TO_COME;
    return __atomic_compare_exchange_n(&m->released, &none, RELEASE_RUNS, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) ||
           mutate("mirror-release");
}

static void run_release(struct hmm_mirror *m)
{
    struct mirror_inside inside;
    SEQ_POINT("mirror-release");
    mirror_inside_begin(&inside, m);
    if (m->ops.release)
        m->ops.release(m->priv);
    mirror_inside_end(&inside);
    __atomic_store_n(&m->released, RELEASE_DONE, __ATOMIC_SEQ_CST);
    futex_wake(&m->released, INT_MAX);
}

/* Whoever comes first calls it; the others wait. */
static void release_once(struct hmm_mirror *m)
{
    if (release_is_mine(m))
        run_release(m);
    while (__atomic_load_n(&m->released, __ATOMIC_SEQ_CST) == RELEASE_RUNS)
        futex_wait(&m->released, RELEASE_RUNS, -1);
}

static void release_work(struct work *work, unsigned worker)
{
    struct hmm_mirror *m = container_of(work, struct hmm_mirror, work);
    (void)worker;
    release_once(m);
    hmm_mirror_put(m);
}

/* The next mirror of the device behind m, with a reference; the one of m is put. */
static struct hmm_mirror *next_of(const struct hmm_device *dev, struct hmm_mirror *m)
{
    struct hmm_mirror *found = NULL;
    mutex_lock(&mirrors.lock);
    struct list *at = m && !list_empty(&m->link) ? m->link.next : mirrors.all.next;
    for (; at != &mirrors.all && !found; at = at->next) {
        struct hmm_mirror *other = container_of(at, struct hmm_mirror, link);
        if (other->dev == dev)
            found = other;
    }
    if (found)
        hmm_mirror_get(found);
    mutex_unlock(&mirrors.lock);
    if (m)
        hmm_mirror_put(m);
    return found;
}

void mirrors_lost(struct hmm_device *dev)
{
    mutex_lock(&mirrors.lock);
    list_for_each (pos, &mirrors.all) {
        struct hmm_mirror *m = container_of(pos, struct hmm_mirror, link);
        if (m->dev != dev || !m->ops.release || __atomic_exchange_n(&m->loss_told, 1, __ATOMIC_SEQ_CST))
            continue;
        hmm_mirror_get(m);
        workers_queue(&mirrors.worker, &m->work);
    }
    mutex_unlock(&mirrors.lock);
}

void mirrors_release(struct hmm_device *dev)
{
    for (struct hmm_mirror *m = next_of(dev, NULL); m; m = next_of(dev, m))
        release_once(m);
}

bool mirrors_releasing(const struct hmm_device *dev, char *buf, size_t size)
{
    bool found = false;
    mutex_lock(&mirrors.lock);
    list_for_each (pos, &mirrors.all) {
        struct hmm_mirror *m = container_of(pos, struct hmm_mirror, link);
        if (m->dev != dev || __atomic_load_n(&m->released, __ATOMIC_SEQ_CST) != RELEASE_RUNS)
            continue;
        snprintf(buf, size, "release() %p of its mirror '%s' has not returned", (void *)(uintptr_t)m->ops.release, m->ops.name);
        found = true;
    }
    mutex_unlock(&mirrors.lock);
    return found;
}

/* ---- registering ------------------------------------------------------------------------------------------------- */

static unsigned choose_directories(const struct hmm_device *dev, uint32_t asked)
{
    if (asked || !dev->pagemap)
        return asked;
    uint64_t most = 4 * (((dev->pagemap->desc.pages << os_page_shift()) + HMM_MIRROR_DIR - 1) / HMM_MIRROR_DIR) + 64;
    return most < DIRECTORIES_MAX ? (unsigned)most : DIRECTORIES_MAX;
}

static int check_desc(struct hmm_device *dev, const struct hmm_mirror_desc *desc)
{
    const char *name = dev->driver->name;
    if (!desc || desc->size != sizeof(*desc) || !desc->ops || desc->ops->size != sizeof(*desc->ops))
        return hmm_fail(-EINVAL, "device %s: a mirror's description and its operations begin with their size", name);
    if (!desc->ops->invalidate)
        return hmm_fail(-EINVAL, "device %s: a mirror needs invalidate(); without it the device would use pages that are gone",
                        name);
    if (desc->flags & ~(HMM_MIRROR_TRACK_DIRTY | HMM_MIRROR_SYSTEM) || desc->reserved)
        return hmm_fail(-EINVAL, "device %s: a mirror has unknown flags %#x", name, desc->flags);
    if (!choose_directories(dev, desc->directories) || desc->directories > DIRECTORIES_MAX)
        return hmm_fail(-EINVAL, "device %s: a mirror of %u directories; 1 to %u, or 0 after hmm_pagemap_add()", name,
                        desc->directories, DIRECTORIES_MAX);
    return 0;
}

static int start_worker(const struct hmm_mirror *m)
{
    int r = 0;
    mutex_lock(&mirrors.starting);
    if (m->ops.release && !mirrors.works) {
        r = workers_start(&mirrors.worker, "hmm-mirror", 1);
        mirrors.works = !r;
    }
    mutex_unlock(&mirrors.starting);
    return r;
}

int hmm_mirror_register(struct hmm_device *dev, const struct hmm_mirror_desc *desc, struct hmm_mirror **out)
{
    if (mirror_is_foreign())
        return hmm_fail(-ESRCH, "this process was forked from the one that opened the device");
    int r = out ? check_desc(dev, desc) : hmm_fail(-EINVAL, "the place for the mirror is NULL");
    if (r)
        return r;
    struct hmm_mirror *m = mem_alloc(sizeof(*m));
    if (!m)
        return hmm_fail(-ENOMEM, "device %s: no memory for a mirror", dev->driver->name);
    m->dev = dev;
    m->ops = *desc->ops;
    if (!m->ops.name)
        m->ops.name = dev->driver->name;
    m->priv = desc->priv;
    m->flags = desc->flags;
    m->refs = 1;
    list_init(&m->link);
    work_init(&m->work, release_work);
    r = mirror_table_init(m, choose_directories(dev, desc->directories));
    if (r) {
        hmm_fail(r, "device %s: no memory for the page table of a mirror", dev->driver->name);
        goto free_mirror;
    }
    r = start_worker(m);
    if (r) {
        hmm_fail(r, "device %s: no thread for its mirrors: %s", dev->driver->name, hmm_strerror(r));
        goto free_table;
    }
    mutex_lock(&mirrors.lock);
    list_add_tail(&mirrors.all, &m->link);
    mutex_unlock(&mirrors.lock);
    *out = m;
    return 0;

free_table:
    mirror_table_free(m);
free_mirror:
    mem_free(m, sizeof(*m));
    return r;
}

/* The caller is the one that set ENDING. */
static void end(struct hmm_mirror *m)
{
    release_once(m);
    SEQ_POINT("mirror-unregister");
    wait_calls(m);
    mirror_table_empty(m);
    mutex_lock(&mirrors.lock);
    list_del(&m->link);
    m->dev = NULL;
    mutex_unlock(&mirrors.lock);
    __atomic_store_n(&m->ended, 1, __ATOMIC_SEQ_CST);
    futex_wake(&m->ended, INT_MAX);
    hmm_mirror_put(m);
}

int hmm_mirror_unregister(struct hmm_mirror *m)
{
    if (mirror_is_foreign())
        return hmm_fail(-ESRCH, "this process was forked from the one that registered the mirror: it has none");
    if (is_inside(m))
        return hmm_fail(-EDEADLK,
                        "a mirror of device %s is unregistered by its own callback, and would wait for itself; do it "
                        "after the callback",
                        m->dev->driver->name);
    if (!begin_end(m))
        return hmm_fail(-ENODEV, "the mirror was unregistered before");
    end(m);
    return 0;
}

static int nothing_to_invalidate(void *priv, const struct hmm_mirror_change *change)
{
    (void)priv;
    (void)change;
    return 0;
}

static void wait_ended(struct hmm_mirror *m)
{
    while (!__atomic_load_n(&m->ended, __ATOMIC_SEQ_CST))
        futex_wait(&m->ended, 0, -1);
}

void mirrors_end(struct hmm_device *dev)
{
    for (struct hmm_mirror *m = next_of(dev, NULL); m; m = next_of(dev, m)) {
        if (!begin_end(m)) {
            wait_ended(m); /* another thread is at it, and needs the device */
            continue;
        }
        hmm_log(HMM_LOG_ERROR, "driver %s left the mirror '%s' behind; close() has to unregister it", dev->driver->name,
                m->ops.name);
        m->ops = (struct hmm_mirror_ops){.name = "", .invalidate = nothing_to_invalidate}; /* the driver's data are gone */
        end(m);
    }
}
