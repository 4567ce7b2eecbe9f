/* SPDX-License-Identifier: MIT */
/* See pagemap.h for the life of a pagemap and the rules of its counts. */
#include "pagemap/pagemap.h"

#include <errno.h>
#include <time.h>

#include "base/alloc.h"
#include "base/error.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "os/os.h"
#include "pagemap/limit.h"

/* Every pagemap by its id. Written under the lock, read without. */
static struct mutex registry_lock = MUTEX_INITIALIZER(RANK_PAGEMAP);
static struct pagemap *registry[PAGEMAP_IDS];
static uint32_t last_id; /* ids go round, so that a stale one finds nothing rather than its successor */

/* ---- creation, undone in reverse ---- */

/* Registers an action. May fail, as any step may: then it has been done already. */
static int on_undo(struct pagemap *pm, pagemap_undo fn)
{
    if (pm->nundo == PAGEMAP_UNDO_MAX) {
        fn(pm);
        return -ENOMEM;
    }
    pm->undo[pm->nundo++] = fn;
    return 0;
}

static void undo_all(struct pagemap *pm)
{
    while (pm->nundo > 0)
        pm->undo[--pm->nundo](pm);
}

static void undo_lock(struct pagemap *pm)
{
    mutex_destroy(&pm->lock);
}

static void undo_pages(struct pagemap *pm)
{
    mem_free(pm->pages, pm->desc.pages * sizeof(*pm->pages));
}

static void undo_buddy(struct pagemap *pm)
{
    buddy_free_all(pm->buddy);
}

static void undo_register(struct pagemap *pm)
{
    mutex_lock(&registry_lock);
    __atomic_store_n(&registry[pm->id], NULL, __ATOMIC_RELEASE);
    mutex_unlock(&registry_lock);
}

static int make_lock(struct pagemap *pm)
{
    mutex_init(&pm->lock, RANK_PAGEMAP);
    return on_undo(pm, undo_lock);
}

static int make_pages(struct pagemap *pm)
{
    pm->pages = mem_alloc(pm->desc.pages * sizeof(*pm->pages));
    return pm->pages ? on_undo(pm, undo_pages) : -ENOMEM;
}

static int make_buddy(struct pagemap *pm)
{
    pm->buddy = buddy_new(pm->desc.pages);
    return pm->buddy ? on_undo(pm, undo_buddy) : -ENOMEM;
}

static bool maps_overlap(const struct hmm_pagemap_desc *a, const struct hmm_pagemap_desc *b)
{
    uintptr_t start_a = (uintptr_t)a->cpu_map, end_a = start_a + a->pages * os_page_size();
    uintptr_t start_b = (uintptr_t)b->cpu_map, end_b = start_b + b->pages * os_page_size();
    return a->cpu_map && b->cpu_map && start_a < end_b && start_b < end_a;
}

/* Takes the next id. Caller holds registry_lock. */
static int take_id(struct pagemap *pm)
{
    for (uint32_t i = 0; i < PAGEMAP_IDS; i++)
        if (registry[i] && maps_overlap(&registry[i]->desc, &pm->desc))
            return -EEXIST;
    for (uint32_t n = 1; n < PAGEMAP_IDS; n++) {
        uint32_t id = (last_id + n - 1) % (PAGEMAP_IDS - 1) + 1;
        if (!registry[id]) {
            pm->id = last_id = id;
            __atomic_store_n(&registry[id], pm, __ATOMIC_RELEASE);
            return 0;
        }
    }
    return -ENFILE;
}

static int make_registered(struct pagemap *pm)
{
    mutex_lock(&registry_lock);
    int err = take_id(pm);
    mutex_unlock(&registry_lock);
    return err ? err : on_undo(pm, undo_register);
}

static int check(const struct hmm_pagemap_desc *desc)
{
    if (!desc)
        return hmm_fail(-EINVAL, "pagemap: no description given");
    if (desc->type != HMM_PAGEMAP_PRIVATE)
        return hmm_fail(-EINVAL, "pagemap: type %d is not supported; only HMM_PAGEMAP_PRIVATE is", (int)desc->type);
    if (desc->pages == 0)
        return hmm_fail(-EINVAL, "pagemap: 0 pages; a device needs at least one page of memory");
    if (desc->pages > PAGEMAP_PAGES_MAX)
        return hmm_fail(-EINVAL, "pagemap: %llu pages are more than a pagemap can hold (%llu)", (unsigned long long)desc->pages,
                        (unsigned long long)PAGEMAP_PAGES_MAX);
    uint64_t granule = desc->granule;
    if (granule && (granule & (granule - 1) || granule < os_page_size() || granule > OS_BLOCK_SIZE))
        return hmm_fail(-EINVAL, "pagemap: a granule of %llu bytes is not a power of two from %zu to %zu",
                        (unsigned long long)granule, os_page_size(), (size_t)OS_BLOCK_SIZE);
    if (granule / os_page_size() > desc->pages)
        return hmm_fail(-EINVAL, "pagemap: %llu pages are less than a granule of %llu bytes; give it more memory",
                        (unsigned long long)desc->pages, (unsigned long long)granule);
    uintptr_t map = (uintptr_t)desc->cpu_map;
    if (map % os_page_size())
        return hmm_fail(-EINVAL, "pagemap: cpu_map %p is not aligned to pages of %zu bytes", desc->cpu_map, os_page_size());
    if (map && desc->pages * os_page_size() > UINTPTR_MAX - map)
        return hmm_fail(-EINVAL, "pagemap: cpu_map %p with %llu pages wraps around the address space", desc->cpu_map,
                        (unsigned long long)desc->pages);
    return 0;
}

static int fail_create(const struct hmm_pagemap_desc *desc, int err)
{
    if (err == -EEXIST)
        return hmm_fail(err, "pagemap: cpu_map %p overlaps that of another pagemap; give each its own mapping", desc->cpu_map);
    if (err == -ENFILE)
        return hmm_fail(err, "pagemap: all %d pagemaps of the process are in use; close a device first", PAGEMAP_IDS - 1);
    return hmm_fail(err, "pagemap: no system memory for the descriptors of %llu device pages; open a smaller device",
                    (unsigned long long)desc->pages);
}

int pagemap_create(const struct hmm_pagemap_desc *desc, struct hmm_device *dev, void *priv, struct pagemap **out)
{
    static int (*const steps[])(struct pagemap *) = {make_lock, make_pages, make_buddy, make_registered};
    int err = check(desc);
    if (err)
        return err;
    struct pagemap *pm = mem_alloc(sizeof(*pm));
    if (!pm)
        return fail_create(desc, -ENOMEM);
    pm->dev = dev;
    pm->priv = priv;
    pm->desc = *desc;
    if (!pm->desc.granule)
        pm->desc.granule = os_page_size();
    for (unsigned i = 0; i < ARRAY_LEN(steps); i++) {
        err = steps[i](pm);
        if (err)
            goto undo;
    }
    *out = pm;
    return 0;

undo:
    undo_all(pm);
    mem_free(pm, sizeof(*pm));
    return fail_create(desc, err);
}

struct pagemap *pagemap_by_id(uint32_t id)
{
    return id < PAGEMAP_IDS ? __atomic_load_n(&registry[id], __ATOMIC_ACQUIRE) : NULL;
}

/* ---- allocation ---- */

/* Adds a block to the runs; false when it would need one run too many. */
static bool add_run(struct page_run *runs, unsigned max, unsigned *n, uint64_t page, uint64_t count)
{
    if (*n > 0 && runs[*n - 1].page + runs[*n - 1].count == page) {
        runs[*n - 1].count += count;
        return true;
    }
    if (*n == max)
        return false;
    runs[(*n)++] = (struct page_run){page, count};
    return true;
}

/* The largest block of at most want pages; returns its size, 0 when full. Caller holds the lock. */
static uint64_t take_block(struct pagemap *pm, uint64_t want, uint64_t *page)
{
    unsigned order = 63 - (unsigned)__builtin_clzll(want);
    if (order >= BUDDY_ORDERS)
        order = BUDDY_ORDERS - 1;
    for (unsigned o = order + 1; o-- > 0;) {
        int64_t got = buddy_alloc(pm->buddy, o);
        if (got >= 0) {
            *page = (uint64_t)got;
            return (uint64_t)1 << o;
        }
    }
    return 0;
}

int64_t pagemap_alloc(struct pagemap *pm, uint64_t want, struct page_run *runs, unsigned max, unsigned *nruns)
{
    uint64_t got = 0;
    unsigned n = 0;
    mutex_lock(&pm->lock);
    if (pm->dying) {
        mutex_unlock(&pm->lock);
        return -ENODEV;
    }
    uint64_t allowed = limit_charge(pm, want);
    while (got < allowed) {
        uint64_t page, count = take_block(pm, allowed - got, &page);
        if (count == 0)
            break;
        if (!add_run(runs, max, &n, page, count)) {
            buddy_release(pm->buddy, page, count);
            break;
        }
        for (uint64_t i = 0; i < count; i++)
            __atomic_store_n(&pm->pages[page + i].refs, 1, __ATOMIC_RELAXED);
        got += count;
    }
    pm->used += got;
    mutex_unlock(&pm->lock);
    limit_uncharge(allowed - got);
    *nruns = n;
    return (int64_t)got;
}

/* ---- references and pins ---- */

/* A count that would go below zero is a bug of the caller; nothing is freed twice for it. */
static void report_underflow(uint32_t id, uint64_t page, const char *what)
{
    hmm_log(HMM_LOG_ERROR, "pagemap %u: a %s at page %llu is dropped that nobody holds", id, what, (unsigned long long)page);
}

/* Lowers a count by one and returns what it was; leaves 0 alone. */
static uint32_t drop_count(uint32_t *count)
{
    uint32_t old = __atomic_load_n(count, __ATOMIC_RELAXED);
    while (old && !__atomic_compare_exchange_n(count, &old, old - 1, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        ;
    return old;
}

/* Raises a count that is not zero. */
static bool raise_count(uint32_t *count)
{
    uint32_t old = __atomic_load_n(count, __ATOMIC_RELAXED);
    while (old && !__atomic_compare_exchange_n(count, &old, old + 1, true, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        ;
    return old != 0;
}

void pagemap_get(struct pagemap *pm, uint64_t page)
{
    if (!raise_count(&pm->pages[page].refs))
        hmm_log(HMM_LOG_ERROR, "pagemap %u: a reference is taken to page %llu, which is free", pm->id,
                (unsigned long long)page);
}

/* Gives pages without references to the buddy allocator. Caller holds the lock. Returns whether somebody is to be woken. */
static bool release_run(struct pagemap *pm, const struct page_run *run)
{
    for (uint64_t i = 0; i < run->count; i++)
        page_set_owner(&pm->pages[run->page + i], 0);
    buddy_release(pm->buddy, run->page, run->count);
    pm->used -= run->count;
    if (!mutate("limit-uncharge"))
        limit_uncharge(run->count);
    pm->released++;
    return pm->waiters > 0;
}

/* Tells the driver, without the lock, and takes it again. */
static void call_page_free(struct pagemap *pm, const struct page_run *run)
{
    pm->freeing += run->count;
    mutex_unlock(&pm->lock);
    for (uint64_t i = 0; i < run->count; i++)
        pm->desc.ops->page_free(pm->priv, run->page + i);
    mutex_lock(&pm->lock);
    pm->freeing -= run->count;
}

/* Drops references from `page` on until one was not the last or the end came; the run that has none left goes to *run, and the
 * number of pages looked at is returned. Caller holds the lock. */
static uint64_t drop_run(struct pagemap *pm, uint64_t page, uint64_t count, struct page_run *run, uint64_t *underflows)
{
    *run = (struct page_run){page, 0};
    for (uint64_t i = 0; i < count; i++) {
        uint32_t old = drop_count(&pm->pages[page + i].refs);
        *underflows += old == 0;
        if (old != 1)
            return i + 1;
        run->count++;
    }
    return count;
}

void pagemap_put(struct pagemap *pm, uint64_t page, uint64_t count)
{
    bool calls = pm->desc.ops && pm->desc.ops->page_free, wake = false;
    uint64_t underflows = 0, first = page;
    uint32_t id = pm->id;
    const uint32_t *released = &pm->released;
    if (page >= pm->desc.pages || count > pm->desc.pages - page) {
        report_underflow(id, page, "reference");
        return;
    }
    mutex_lock(&pm->lock);
    while (count) {
        struct page_run run;
        uint64_t n = drop_run(pm, page, count, &run, &underflows);
        if (run.count && calls)
            call_page_free(pm, &run);
        if (run.count)
            wake |= release_run(pm, &run);
        page += n;
        count -= n;
    }
    mutex_unlock(&pm->lock);
    /* pm may be gone by now: pagemap_wait() needs no wake to return. */
    if (wake)
        mutex_wake_all(released);
    if (underflows)
        report_underflow(id, first, "reference");
}

/* Pin counts are 16 bits wide, and say so instead of wrapping. */
static bool add_pin(uint16_t *pins)
{
    uint16_t old = __atomic_load_n(pins, __ATOMIC_RELAXED);
    while (old != UINT16_MAX)
        if (__atomic_compare_exchange_n(pins, &old, (uint16_t)(old + 1), false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            return true;
    return false;
}

static bool take_pin(uint16_t *pins)
{
    uint16_t old = __atomic_load_n(pins, __ATOMIC_RELAXED);
    while (old != 0)
        if (__atomic_compare_exchange_n(pins, &old, (uint16_t)(old - 1), false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            return true;
    return false;
}

int pagemap_pin(struct pagemap *pm, uint64_t page)
{
    if (__atomic_load_n(&pm->dying, __ATOMIC_ACQUIRE))
        return -ENODEV;
    if (!raise_count(&pm->pages[page].refs)) {
        hmm_log(HMM_LOG_ERROR, "pagemap %u: page %llu is pinned, which is free", pm->id, (unsigned long long)page);
        return -EINVAL;
    }
    if (!add_pin(&pm->pages[page].pins)) {
        pagemap_put(pm, page, 1);
        return -EOVERFLOW;
    }
    return 0;
}

void pagemap_unpin(struct pagemap *pm, uint64_t page)
{
    if (!take_pin(&pm->pages[page].pins)) {
        report_underflow(pm->id, page, "pin");
        return;
    }
    pagemap_put(pm, page, 1);
}

/* ---- the end ---- */

void pagemap_kill(struct pagemap *pm)
{
    mutex_lock(&pm->lock);
    __atomic_store_n(&pm->dying, true, __ATOMIC_RELEASE);
    mutex_unlock(&pm->lock);
}

int pagemap_wait(struct pagemap *pm, int64_t timeout_ns)
{
    uint64_t end = timeout_ns >= 0 ? os_now() + (uint64_t)timeout_ns : 0;
    int err = 0;
    lock_assert_none();
    mutex_lock(&pm->lock);
    while (pm->used && !err) {
        uint32_t seen = pm->released;
        uint64_t now = timeout_ns >= 0 ? os_now() : 0;
        if (timeout_ns >= 0 && now >= end) {
            err = -ETIMEDOUT;
            break;
        }
        pm->waiters++;
        mutex_unlock(&pm->lock);
        futex_wait(&pm->released, seen, timeout_ns >= 0 ? (int64_t)(end - now) : -1);
        mutex_lock(&pm->lock);
        pm->waiters--;
    }
    mutex_unlock(&pm->lock);
    return err;
}

void pagemap_retire(struct pagemap *pm)
{
    mutex_lock(&registry_lock);
    pm->desc.cpu_map = NULL;
    mutex_unlock(&registry_lock);
}

void pagemap_destroy(struct pagemap *pm)
{
    if (pm->used)
        hmm_log(HMM_LOG_ERROR, "pagemap %u: destroyed while %llu pages are in use", pm->id, (unsigned long long)pm->used);
    limit_uncharge(pm->used);
    undo_all(pm);
    mem_free(pm, sizeof(*pm));
}

/* ---- inspection ---- */

bool pagemap_is_valid(struct pagemap *pm)
{
    uint64_t referenced = 0;
    bool ok = true;
    mutex_lock(&pm->lock);
    for (uint64_t i = 0; i < pm->desc.pages && ok; i++) {
        const struct page_desc *d = &pm->pages[i];
        /* Under the lock references only rise, so pins that were read first cannot exceed them. */
        uint32_t pins = __atomic_load_n(&d->pins, __ATOMIC_ACQUIRE), refs = __atomic_load_n(&d->refs, __ATOMIC_ACQUIRE);
        referenced += refs > 0;
        ok = pins <= refs && (refs > 0 ? !buddy_is_free(pm->buddy, i) : page_owner(d) == 0 || pm->freeing > 0);
    }
    ok = ok && referenced + pm->freeing == pm->used && buddy_available(pm->buddy) == pm->desc.pages - pm->used &&
         buddy_is_valid(pm->buddy);
    mutex_unlock(&pm->lock);
    return ok;
}

uint64_t pagemap_metadata_bytes(const struct pagemap *pm)
{
    return sizeof(*pm) + pm->desc.pages * sizeof(*pm->pages) + buddy_bytes(pm->buddy);
}

uint64_t pagemap_used(struct pagemap *pm)
{
    mutex_lock(&pm->lock);
    uint64_t used = pm->used;
    mutex_unlock(&pm->lock);
    return used;
}

void pagemap_forget(void)
{
    registry_lock = (struct mutex)MUTEX_INITIALIZER(RANK_PAGEMAP);
    for (unsigned i = 0; i < PAGEMAP_IDS; i++)
        registry[i] = NULL;
    limit_forget();
}
