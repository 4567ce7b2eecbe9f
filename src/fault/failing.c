/* SPDX-License-Identifier: MIT */
/* See failing.h. A page that nobody has asked for since long came some other way: its record is as good as none. */
#include "fault/failing.h"

#include <string.h>

#include "base/lock.h"

struct record {
    uintptr_t page; /* 0: unused */
    uint64_t since, last;
    unsigned tries;
};

static struct {
    struct mutex lock; /* RANK_QUEUE */
    unsigned used;     /* atomic, so that a fault need not take the lock to see that there are none */
    struct record records[FAILING_PAGES];
} failing;

void failing_start(void)
{
    memset(&failing, 0, sizeof(failing));
    mutex_init(&failing.lock, RANK_QUEUE);
}

void failing_stop(void)
{
    mutex_destroy(&failing.lock);
}

/* The page's record; NULL: it has none. Caller holds the lock, as below. */
static struct record *find(uintptr_t page)
{
    for (unsigned i = 0; i < FAILING_PAGES; i++)
        if (failing.records[i].page == page)
            return &failing.records[i];
    return NULL;
}

static void drop(struct record *r)
{
    *r = (struct record){0};
    __atomic_fetch_sub(&failing.used, 1, __ATOMIC_RELAXED);
}

static void drop_old(uint64_t now)
{
    for (unsigned i = 0; i < FAILING_PAGES; i++)
        if (failing.records[i].page && now - failing.records[i].last > FAILING_PATIENCE_NS)
            drop(&failing.records[i]);
}

/* NULL: all are in use. */
static struct record *add(uintptr_t page, uint64_t now)
{
    struct record *r = find(0);
    if (!r)
        return NULL;
    *r = (struct record){.page = page, .since = now};
    __atomic_fetch_add(&failing.used, 1, __ATOMIC_RELAXED);
    return r;
}

unsigned failing_note(uintptr_t page, bool device_failed, uint64_t now, bool *over)
{
    unsigned tries = FAILING_TRIES;
    *over = false;
    mutex_lock(&failing.lock);
    drop_old(now);
    struct record *r = find(page);
    if (!r)
        r = add(page, now);
    if (r) {
        if (!device_failed)
            r->since = now;
        r->last = now;
        tries = ++r->tries;
        *over = tries >= FAILING_TRIES && now - r->since >= FAILING_PATIENCE_NS;
    }
    mutex_unlock(&failing.lock);
    return tries;
}

void failing_forget(uintptr_t page)
{
    if (__atomic_load_n(&failing.used, __ATOMIC_RELAXED) == 0)
        return;
    mutex_lock(&failing.lock);
    struct record *r = find(page);
    if (r)
        drop(r);
    mutex_unlock(&failing.lock);
}
