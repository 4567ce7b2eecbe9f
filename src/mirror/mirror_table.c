/* SPDX-License-Identifier: MIT */
/*
 * The directories of a mirror: a hash table of bounded size. When it is full, one is given up by second chance, as for page
 * replacement; and whenever one is made, a few are looked at that have nothing in them, so that core need not call us for them.
 * What a device still holds of such a directory, and how it is found out, is said in table.h and at mirror_dir_give_up().
 */
#include "mirror/table.h"

#include <errno.h>

#include "base/alloc.h"
#include "debug/inject.h"

#define DIR_NONE ((uintptr_t)1) /* 0 is the address of a directory, too */
#define SWEEP_STEPS 4
#define PROBES 64 /* neighbours that are looked for before all directories are */

static bool has_hooks(const struct hmm_mirror *m)
{
    return m->ops.dma_map || m->ops.dma_unmap;
}

static struct hmm_mirror_dir **chain_of(struct hmm_mirror *m, uintptr_t base)
{
    return &m->hash[(uint64_t)(base / HMM_MIRROR_DIR) * 0x9e3779b97f4a7c15ull >> (64 - m->hash_bits)];
}

/* ---- finding ----------------------------------------------------------------------------------------------------- */

/* Caller holds m->lock. */
static struct hmm_mirror_dir *find(struct hmm_mirror *m, uintptr_t base)
{
    struct hmm_mirror_dir *d = *chain_of(m, base);
    while (d && d->base != base)
        d = d->next;
    return d;
}

/* The same. */
static struct hmm_mirror_dir *use(struct hmm_mirror_dir *d)
{
    if (d) {
        __atomic_fetch_add(&d->users, 1, __ATOMIC_ACQUIRE);
        __atomic_store_n(&d->recent, 1, __ATOMIC_RELAXED);
    }
    return d;
}

static struct hmm_mirror_dir *find_and_use(struct hmm_mirror *m, uintptr_t base)
{
    mutex_lock(&m->lock);
    struct hmm_mirror_dir *d = use(find(m, base));
    mutex_unlock(&m->lock);
    return d;
}

void mirror_dir_drop(struct hmm_mirror_dir *d)
{
    __atomic_fetch_sub(&d->users, 1, __ATOMIC_RELEASE);
}

static struct hmm_mirror_dir *lowest(struct hmm_mirror *m, uintptr_t from, uintptr_t end)
{
    struct hmm_mirror_dir *best = NULL;
    for (size_t i = 0; i < (size_t)1 << m->hash_bits; i++)
        for (struct hmm_mirror_dir *d = m->hash[i]; d; d = d->next)
            if (d->base >= from && d->base < end && (!best || d->base < best->base))
                best = d;
    return best;
}

struct hmm_mirror_dir *mirror_dir_next(struct hmm_mirror *m, uintptr_t from, uintptr_t end)
{
    uintptr_t at = from & ~(HMM_MIRROR_DIR - 1), start = at;
    struct hmm_mirror_dir *d = NULL;
    mutex_lock(&m->lock);
    for (unsigned i = 0; i < PROBES && at >= start && at < end && !d; i++, at += HMM_MIRROR_DIR)
        d = find(m, at);
    if (!d && at >= start && at < end)
        d = lowest(m, at, end);
    use(d);
    mutex_unlock(&m->lock);
    return d;
}

/* ---- the turn ---------------------------------------------------------------------------------------------------- */

static void turn_take(struct hmm_mirror *m)
{
    mutex_lock(&m->lock);
    m->turn_waiters++;
    while (m->turn_taken)
        mutex_wait(&m->lock, &m->turns, m->turns);
    m->turn_waiters--;
    m->turn_taken = 1;
    mutex_unlock(&m->lock);
}

static void turn_leave(struct hmm_mirror *m)
{
    mutex_lock(&m->lock);
    m->turn_taken = 0;
    __atomic_fetch_add(&m->turns, 1, __ATOMIC_RELEASE);
    if (m->turn_waiters)
        mutex_wake_all(&m->turns);
    mutex_unlock(&m->lock);
}

/* ---- giving up; caller has the turn ------------------------------------------------------------------------------------ */

static void unhash(struct hmm_mirror *m, struct hmm_mirror_dir *d)
{
    struct hmm_mirror_dir **at = chain_of(m, d->base);
    while (*at != d)
        at = &(*at)->next;
    *at = d->next;
}

/* Its range is nobody's any more. Nobody can find it, and the device uses nothing of it. */
static void make_unused(struct hmm_mirror *m, struct hmm_mirror_dir *d)
{
    hmm_notifier_remove(&d->notifier);
    mutex_lock(&d->lock);
    mirror_empty(d, d->base, d->base + HMM_MIRROR_DIR, 0);
    mirror_unmap(d, d->base, d->base + HMM_MIRROR_DIR);
    d->current = false;
    mutex_unlock(&d->lock);
    d->base = DIR_NONE;
    d->next = m->unused;
    m->unused = d;
}

/*
 * Takes a directory from its range, unless somebody fills it or the device uses one of its pages.
 *
 * The generation moves first (in mirror_change_begin), then the device is asked, briefly. A use that was visible before is seen by
 * the driver; one that becomes visible later finds the generation moved. What was handed out between the question and the end shows in
 * `given`, which moves only while there are users. So when the notifier goes, nobody relies on it.
 */
static bool give_up(struct hmm_mirror *m, struct hmm_mirror_dir *d)
{
    if (d->base == DIR_NONE || __atomic_load_n(&d->users, __ATOMIC_ACQUIRE) || __atomic_load_n(&d->dirty, __ATOMIC_RELAXED))
        return false;
    uint64_t given = __atomic_load_n(&d->given, __ATOMIC_SEQ_CST);
    bool can =
        mirror_change_begin(d, d->base, d->base + HMM_MIRROR_DIR, HMM_EVENT_MIGRATE, true) == 0 || mutate("mirror-give-up");
    mirror_change_end(d);
    SEQ_POINT("mirror-give-up");
    if (!can)
        return false;
    mutex_lock(&m->lock);
    can = __atomic_load_n(&d->users, __ATOMIC_ACQUIRE) == 0 && __atomic_load_n(&d->given, __ATOMIC_RELAXED) == given &&
          __atomic_load_n(&d->dirty, __ATOMIC_RELAXED) == 0;
    if (can)
        unhash(m, d);
    mutex_unlock(&m->lock);
    if (can)
        make_unused(m, d);
    return can;
}

/* Looks at the next few directories and gives up those with nothing in them. */
static void sweep(struct hmm_mirror *m)
{
    for (unsigned i = 0; i < SWEEP_STEPS && m->made; i++) {
        struct hmm_mirror_dir *d = m->all[m->hand++ % m->made];
        mutex_lock(&d->lock);
        bool idle = d->valid == 0;
        mutex_unlock(&d->lock);
        if (idle)
            give_up(m, d);
    }
}

/* Second chance. */
static void reclaim(struct hmm_mirror *m)
{
    for (unsigned i = 0; i < 2 * m->made && !m->unused; i++) {
        struct hmm_mirror_dir *d = m->all[m->hand++ % m->made];
        if (!__atomic_exchange_n(&d->recent, 0, __ATOMIC_RELAXED))
            give_up(m, d);
    }
}

void mirror_dir_give_up(struct hmm_mirror *m, uintptr_t base)
{
    turn_take(m);
    mutex_lock(&m->lock);
    struct hmm_mirror_dir *d = find(m, base);
    mutex_unlock(&m->lock);
    if (d)
        give_up(m, d);
    turn_leave(m);
}

/* ---- making; caller has the turn --------------------------------------------------------------------------------------- */

static void make_another(struct hmm_mirror *m)
{
    struct hmm_mirror_dir *d = m->made < m->max ? mem_alloc(m->dir_bytes) : NULL;
    if (!d)
        return;
    d->m = m;
    d->base = DIR_NONE;
    d->origin = has_hooks(m) ? d->entry + block_pages() : NULL;
    mutex_init(&d->lock, RANK_DRIVER);
    m->all[m->made] = d;
    __atomic_store_n(&m->made, m->made + 1, __ATOMIC_RELEASE);
    m->unused = d;
}

/* NULL: all are in use. */
static struct hmm_mirror_dir *take_unused(struct hmm_mirror *m)
{
    sweep(m);
    if (!m->unused)
        make_another(m);
    if (!m->unused)
        reclaim(m);
    struct hmm_mirror_dir *d = m->unused;
    if (d)
        m->unused = d->next;
    return d;
}

static struct hmm_mirror_dir *make(struct hmm_mirror *m, uintptr_t base)
{
    struct hmm_mirror_dir *d = take_unused(m);
    if (!d)
        return NULL;
    d->base = base;
    if (hmm_notifier_insert(m->dev, &d->notifier, base, base + HMM_MIRROR_DIR, &mirror_notifier_ops)) {
        d->base = DIR_NONE;
        d->next = m->unused;
        m->unused = d;
        return NULL;
    }
    mutex_lock(&m->lock);
    struct hmm_mirror_dir **chain = chain_of(m, base);
    d->next = *chain;
    *chain = use(d);
    mutex_unlock(&m->lock);
    return d;
}

struct hmm_mirror_dir *mirror_dir_find(struct hmm_mirror *m, uintptr_t addr, bool make_it)
{
    uintptr_t base = addr & ~(HMM_MIRROR_DIR - 1);
    struct hmm_mirror_dir *d = find_and_use(m, base);
    if (d || !make_it)
        return d;
    turn_take(m);
    d = find_and_use(m, base);
    if (!d)
        d = make(m, base);
    turn_leave(m);
    return d;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

int mirror_table_init(struct hmm_mirror *m, unsigned max)
{
    m->max = max;
    m->dir_bytes = sizeof(struct hmm_mirror_dir) + (has_hooks(m) ? 2 : 1) * block_pages() * sizeof(uint64_t);
    m->hash_bits = 32 - (unsigned)__builtin_clz(max);
    m->hash = mem_alloc(sizeof(m->hash[0]) << m->hash_bits);
    m->all = mem_alloc(sizeof(m->all[0]) * max);
    mutex_init(&m->lock, RANK_DRIVER);
    if (m->hash && m->all)
        return 0;
    mirror_table_free(m);
    return -ENOMEM;
}

void mirror_table_empty(struct hmm_mirror *m)
{
    turn_take(m);
    for (unsigned i = 0; i < m->made; i++) {
        struct hmm_mirror_dir *d = m->all[i];
        if (d->base == DIR_NONE)
            continue;
        mirror_change_begin(d, d->base, d->base + HMM_MIRROR_DIR, HMM_EVENT_MIGRATE, false);
        mutex_lock(&m->lock);
        unhash(m, d);
        mutex_unlock(&m->lock);
        make_unused(m, d);
        mirror_change_end(d);
    }
    turn_leave(m);
}

void mirror_table_free(struct hmm_mirror *m)
{
    for (unsigned i = 0; i < m->made; i++) {
        mutex_destroy(&m->all[i]->lock);
        mem_free(m->all[i], m->dir_bytes);
    }
    mem_free(m->all, sizeof(m->all[0]) * m->max);
    mem_free(m->hash, sizeof(m->hash[0]) << m->hash_bits);
    mutex_destroy(&m->lock);
}
