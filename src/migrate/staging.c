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

struct slots {
    char *base;
    unsigned n;
    uint64_t *used;   /* a byte per slot would do; words keep it simple to index */
    bool *registered; /* OUT only */
    bool *tables;     /* a page table may stand there, even when no page does */
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
    if (s->used)
        mem_free(s->used, s->n * sizeof(*s->used));
    if (s->registered)
        mem_free(s->registered, s->n * sizeof(*s->registered));
    if (s->tables)
        mem_free(s->tables, s->n * sizeof(*s->tables));
    memset(s, 0, sizeof(*s));
}

static int slots_init(struct slots *s, enum staging_kind kind, unsigned n)
{
    void *base = NULL;
    s->n = n;
    s->used = mem_alloc(n * sizeof(*s->used));
    s->registered = mem_alloc(n * sizeof(*s->registered));
    s->tables = mem_alloc(n * sizeof(*s->tables));
    if (!s->used || !s->registered || !s->tables)
        return -ENOMEM;
    int r = own_map(n * OS_BLOCK_SIZE, OS_BLOCK_SIZE, map_flags(kind), &base);
    s->base = base;
    return r;
}

int staging_init(struct mm *mm, uint64_t bytes)
{
    (void)mm;
    unsigned total = bytes / OS_BLOCK_SIZE, in = total >= 8 ? total / 8 : 1;
    unsigned share[STAGING_KINDS] = {[STAGING_OUT] = total - 2 * in > 0 ? total - 2 * in : 1, in, in};
    memset(&staging, 0, sizeof(staging));
    mutex_init(&staging.lock, RANK_QUEUE);
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
        for (unsigned tries = 0; tries < RENEW_TRIES && out->registered[i]; tries++)
            out->registered[i] = os->uffd_unregister(mm->uffd.fd, (uintptr_t)out->base + i * OS_BLOCK_SIZE, OS_BLOCK_SIZE) != 0;
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
            if (!s->used[i])
                got = i;
        if (got >= 0)
            s->used[got] = 1;
        else if (wait)
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
    s->used[i] = 0;
    staging.changed++;
    mutex_unlock(&staging.lock);
    futex_wake(&staging.changed, INT32_MAX); /* all: kinds share the word */
}

void *staging_get(struct mm *mm, enum staging_kind kind, bool wait)
{
    struct slots *s = &staging.kinds[kind];
    int i = take_slot(s, wait);
    if (i < 0)
        return NULL;
    char *slot = s->base + i * OS_BLOCK_SIZE;
    if (kind == STAGING_OUT && !s->registered[i]) {
        if (os->uffd_register(mm->uffd.fd, (uintptr_t)slot, OS_BLOCK_SIZE)) {
            give_slot(s, i);
            return NULL;
        }
        s->registered[i] = true;
    }
    return slot;
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

/*
 * Dropping the pages is cheap: it takes the lock of the address space shared. It leaves the page table on kernels before 6.14, and a whole
 * huge page can only stand, or be moved to, where there is none. So a slot that huge pages use is mapped afresh, unless there
 * never was a table; small pages need not care. While the slot could not be unregistered, dropping raises an event, which our reader
 * takes: slower, not wrong.
 */
static int empty_slot(struct slots *s, unsigned i, enum staging_kind kind, bool huge)
{
    void *slot = s->base + i * OS_BLOCK_SIZE;
    if (!s->registered[i] && (kind == STAGING_IN_HUGE || (huge && s->tables[i]))) {
        s->tables[i] = false;
        return renew(slot, kind);
    }
    s->tables[i] |= !huge;
    int r = os->advise(slot, OS_BLOCK_SIZE, OS_ADVISE_DONTNEED);
    return r && !s->registered[i] ? renew(slot, kind) : r; /* locked, by mlockall() of the program: what is fresh is not */
}

void staging_put(struct mm *mm, enum staging_kind kind, void *slot, bool huge)
{
    struct slots *s = &staging.kinds[kind];
    unsigned i = ((char *)slot - s->base) / OS_BLOCK_SIZE;
    lock_assert_none();
    if (kind == STAGING_OUT && !os->uffd_unregister(mm->uffd.fd, (uintptr_t)slot, OS_BLOCK_SIZE))
        s->registered[i] = false;
    if (!mutate("staging-leak")) {
        int r = empty_slot(s, i, kind, huge);
        if (r) {
            hmm_log(HMM_LOG_ERROR, "a staging slot cannot be renewed (%s): it is not used any more", hmm_strerror(r));
            return;
        }
    }
    give_slot(s, i);
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
