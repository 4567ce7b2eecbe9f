/* SPDX-License-Identifier: MIT */
/* See staging.h. */
#include "migrate/staging.h"

#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "os/own.h"

#define RENEW_TRIES 100

struct slot {
    uint64_t used;   /* its flight, and the pages of it that children of fork are still to get; 0: free */
    bool huge;       /* it held a huge page: known when its flight has given it back */
    bool tables;     /* a page table may stand there, even when no page does */
    bool registered; /* OUT only, as is */
    bool filled;     /* everything that is to stand there has come */
};

struct slots {
    char *base;
    unsigned n;
    struct slot *v;
};

static struct {
    struct mutex lock; /* RANK_QUEUE */
    uint32_t changed;  /* futex: a slot was given back */
    struct slots kinds[STAGING_KINDS];
    int64_t pages; /* atomic */
} staging;

static unsigned map_flags(enum staging_kind kind)
{
    return kind == STAGING_IN_HUGE ? OS_MAP_HUGE : kind == STAGING_IN ? OS_MAP_NOHUGE : 0;
}

static void slots_exit(struct slots *s)
{
    if (s->base)
        own_unmap(s->base, s->n * OS_BLOCK_SIZE);
    if (s->v)
        mem_free(s->v, s->n * sizeof(*s->v));
    memset(s, 0, sizeof(*s));
}

static int slots_init(struct slots *s, enum staging_kind kind, unsigned n)
{
    void *base = NULL;
    s->n = n;
    s->v = mem_alloc(n * sizeof(*s->v));
    if (!s->v)
        return -ENOMEM;
    int r = own_map(n * OS_BLOCK_SIZE, OS_BLOCK_SIZE, map_flags(kind), &base);
    s->base = base;
    return r;
}

/* ---- for children of fork ---- */

static struct mm *staging_mm;

static unsigned slot_of(const struct slots *s, uintptr_t addr)
{
    return (addr - (uintptr_t)s->base) / OS_BLOCK_SIZE;
}

static void keep_slot(uintptr_t addr, uint64_t pages)
{
    struct slots *out = &staging.kinds[STAGING_OUT];
    mutex_lock(&staging.lock);
    out->v[slot_of(out, addr)].used += pages;
    mutex_unlock(&staging.lock);
}

/* False: others want the slot still. */
static bool drop_uses(struct slots *s, unsigned i, uint64_t uses, bool huge)
{
    mutex_lock(&staging.lock);
    s->v[i].huge |= huge;
    uint64_t used = s->v[i].used;
    if (used > uses)
        s->v[i].used -= uses;
    mutex_unlock(&staging.lock);
    if (used < uses)
        hmm_log(HMM_LOG_ERROR, "bug: staging slot %u is given back by more than use it (%lu of %lu)", i, (unsigned long)uses,
                (unsigned long)used);
    return used == uses;
}

static void free_slot(struct mm *mm, enum staging_kind kind, unsigned i);

static void drop_slot(uintptr_t addr, uint64_t pages)
{
    struct slots *out = &staging.kinds[STAGING_OUT];
    unsigned i = slot_of(out, addr);
    if (drop_uses(out, i, pages, false))
        free_slot(staging_mm, STAGING_OUT, i);
}

bool staging_is_kept(const void *slot)
{
    const struct slots *out = &staging.kinds[STAGING_OUT];
    uintptr_t addr = (uintptr_t)slot, base = (uintptr_t)out->base;
    if (addr < base || addr >= base + out->n * OS_BLOCK_SIZE)
        return false;
    mutex_lock(&staging.lock);
    bool kept = out->v[slot_of(out, addr)].used > 1;
    mutex_unlock(&staging.lock);
    return kept;
}

/* ---- life ---- */

int staging_init(struct mm *mm, uint64_t bytes)
{
    unsigned total = bytes / OS_BLOCK_SIZE, in = total >= 8 ? total / 8 : 1;
    unsigned share[STAGING_KINDS] = {[STAGING_OUT] = total - 2 * in > 0 ? total - 2 * in : 1, in, in};
    memset(&staging, 0, sizeof(staging));
    mutex_init(&staging.lock, RANK_QUEUE);
    staging_mm = mm;
    mm->slot_keep = keep_slot;
    mm->slot_drop = drop_slot;
    for (int k = 0; k < STAGING_KINDS; k++) {
        int r = slots_init(&staging.kinds[k], k, share[k]);
        if (r) {
            while (k >= 0)
                slots_exit(&staging.kinds[k--]);
            return r;
        }
    }
    return 0;
}

void staging_exit(struct mm *mm)
{
    struct slots *out = &staging.kinds[STAGING_OUT];
    for (unsigned i = 0; i < out->n; i++)
        /* Unmapping what is registered would wait for a reader that has ended. */
        for (unsigned tries = 0; tries < RENEW_TRIES && out->v[i].registered; tries++)
            out->v[i].registered =
                os->uffd_unregister(mm->uffd.fd, (uintptr_t)out->base + i * OS_BLOCK_SIZE, OS_BLOCK_SIZE) != 0;
    for (int k = 0; k < STAGING_KINDS; k++)
        slots_exit(&staging.kinds[k]);
    mutex_destroy(&staging.lock);
}

static int take_slot(struct slots *s, bool wait)
{
    int got = -1;
    mutex_lock(&staging.lock);
    while (got < 0) {
        for (unsigned i = 0; i < s->n && got < 0; i++)
            if (!s->v[i].used)
                got = i;
        if (got >= 0) {
            s->v[got].used = 1;
            s->v[got].huge = s->v[got].filled = false;
        } else if (wait)
            mutex_wait(&staging.lock, &staging.changed, staging.changed);
        else
            break;
    }
    mutex_unlock(&staging.lock);
    return got;
}

static void give_slot(struct slots *s, unsigned i)
{
    mutex_lock(&staging.lock);
    s->v[i].used = 0;
    staging.changed++;
    mutex_unlock(&staging.lock);
    futex_wake(&staging.changed, INT32_MAX); /* all: kinds share the word */
}

/* A failure leaves the place without access: tried again for a while. */
static int renew(void *slot, enum staging_kind kind)
{
    int r = -ENOMEM;
    for (unsigned tries = 0; tries < RENEW_TRIES && r; tries++) {
        if (tries)
            os_sleep(1000000);
        r = os->remap_fresh(slot, OS_BLOCK_SIZE, map_flags(kind));
    }
    return r;
}

static void retire(int err)
{
    hmm_log(HMM_LOG_ERROR, "a staging slot cannot be renewed (%s): it is not used any more", hmm_strerror(err));
}

/*
 * Dropping the pages is cheap: it takes the lock of the address space shared. It leaves the page table on kernels before 6.14, and a whole
 * huge page can only stand, or be moved to, where there is none. So a slot that huge pages use is mapped afresh, unless there
 * never was a table; small pages need not care. While the slot could not be unregistered, dropping raises an event, which our reader
 * takes: slower, not wrong.
 */
static int empty_slot(struct slots *s, unsigned i, enum staging_kind kind, bool huge)
{
    void *slot = s->base + i * OS_BLOCK_SIZE;
    if (!s->v[i].registered && (kind == STAGING_IN_HUGE || (huge && s->v[i].tables))) {
        s->v[i].tables = false;
        return renew(slot, kind);
    }
    s->v[i].tables |= !huge;
    int r = os->advise(slot, OS_BLOCK_SIZE, OS_ADVISE_DONTNEED);
    return r && !s->v[i].registered ? renew(slot, kind) : r; /* locked, by mlockall() of the program: what is fresh is not */
}

/* What stands in the slot is taken for pages of the program, and mlockall(MCL_CURRENT) fills all memory that can be accessed. While the slot
 * is registered it cannot: its touch is left asleep. */
static bool is_empty(struct mm *mm, const char *slot)
{
    struct os_region v;
    uintptr_t walked;
    return os->pagemap_scan(mm->pagemap_fd, (uintptr_t)slot, (uintptr_t)slot + OS_BLOCK_SIZE, &v, 1, &walked) == 0 ||
           mutate("staging-filled");
}

/* 0; or the slot is of no use now, or (-EIO) never again. */
static int prepare_out(struct mm *mm, struct slots *s, unsigned i)
{
    char *slot = s->base + i * OS_BLOCK_SIZE;
    for (unsigned tries = 0; tries < RENEW_TRIES; tries++) {
        if (!s->v[i].registered && os->uffd_register(mm->uffd.fd, (uintptr_t)slot, OS_BLOCK_SIZE))
            return -ENOMEM;
        s->v[i].registered = true;
        if (is_empty(mm, slot))
            return 0;
        if (os->uffd_unregister(mm->uffd.fd, (uintptr_t)slot, OS_BLOCK_SIZE))
            continue;
        s->v[i].registered = false;
        s->v[i].tables = false;
        int r = renew(slot, STAGING_OUT);
        if (r) {
            retire(r);
            return -EIO;
        }
    }
    return -ENOMEM;
}

void *staging_get(struct mm *mm, enum staging_kind kind, bool wait)
{
    struct slots *s = &staging.kinds[kind];
    int i = take_slot(s, wait);
    if (i < 0)
        return NULL;
    int r = kind == STAGING_OUT ? prepare_out(mm, s, i) : 0;
    if (r && r != -EIO)
        give_slot(s, i);
    return r ? NULL : s->base + i * OS_BLOCK_SIZE;
}

void staging_filled(struct mm *mm, const void *slot)
{
    struct slots *out = &staging.kinds[STAGING_OUT];
    mutex_lock(&staging.lock);
    struct slot *s = &out->v[slot_of(out, (uintptr_t)slot)];
    s->filled = true;
    bool kept = s->used > 1;
    mutex_unlock(&staging.lock);
    if (kept) /* what is copied for a child may have been touched before */
        os->uffd_wake(mm->uffd.fd, (uintptr_t)slot, OS_BLOCK_SIZE);
}

bool staging_touched(struct mm *mm, uintptr_t addr)
{
    struct slots *out = &staging.kinds[STAGING_OUT];
    uintptr_t base = (uintptr_t)out->base;
    if (addr < base || addr >= base + out->n * OS_BLOCK_SIZE)
        return false;
    mutex_lock(&staging.lock);
    const struct slot *slot = &out->v[slot_of(out, addr)];
    if (!slot->used || (slot->filled && !mutate("staging-lazy"))) {
        os->uffd_zeropage(mm->uffd.fd, addr, os_page_size());
        os->uffd_wake(mm->uffd.fd, addr, os_page_size());
    }
    mutex_unlock(&staging.lock);
    return true;
}

static void free_slot(struct mm *mm, enum staging_kind kind, unsigned i)
{
    struct slots *s = &staging.kinds[kind];
    char *slot = s->base + i * OS_BLOCK_SIZE;
    lock_assert_none();
    if (kind == STAGING_OUT && !os->uffd_unregister(mm->uffd.fd, (uintptr_t)slot, OS_BLOCK_SIZE))
        s->v[i].registered = false;
    if (!mutate("staging-leak")) {
        int r = empty_slot(s, i, kind, s->v[i].huge);
        if (r) {
            retire(r);
            return;
        }
    }
    give_slot(s, i);
}

void staging_put(struct mm *mm, enum staging_kind kind, void *slot, bool huge)
{
    struct slots *s = &staging.kinds[kind];
    unsigned i = slot_of(s, (uintptr_t)slot);
    if (drop_uses(s, i, 1, huge))
        free_slot(mm, kind, i);
}

void staging_put_unused(enum staging_kind kind, void *slot)
{
    struct slots *s = &staging.kinds[kind];
    give_slot(s, ((char *)slot - s->base) / OS_BLOCK_SIZE);
}

void staging_account(int64_t pages)
{
    __atomic_fetch_add(&staging.pages, pages, __ATOMIC_RELAXED);
}

uint64_t staging_bytes(void)
{
    int64_t pages = __atomic_load_n(&staging.pages, __ATOMIC_RELAXED);
    return pages > 0 ? (uint64_t)pages << os_page_shift() : 0;
}
