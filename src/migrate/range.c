/* SPDX-License-Identifier: MIT */
/*
 * Whole ranges, block by block. Towards a device several flights are kept in the air: while the driver copies one block, the next
 * is taken. Towards the system each block is one step (its copy is the work), and several library threads may share a range.
 */
#include <errno.h>

#include "base/alloc.h"
#include "migrate/migrate.h"
#include "migrate/staging.h"
#include "migrate/take.h"

#define DEPTH 4      /* flights in the air per caller */
#define TRIES_MAX 64 /* for pages that others keep in flight; then they are counted as busy */

struct pipeline {
    struct mm *mm;
    struct hmm_migrate_result *res;
    struct flight *air[DEPTH];
    unsigned n;
};

static int land_oldest(struct pipeline *p)
{
    struct flight *f = p->air[0];
    int r = land_on_device(p->mm, f, p->res);
    flight_put(p->mm, f);
    p->n--;
    for (unsigned i = 0; i < p->n; i++)
        p->air[i] = p->air[i + 1];
    return r;
}

static int land_all(struct pipeline *p)
{
    int first = 0;
    while (p->n) {
        int r = land_oldest(p);
        first = first ? first : r;
    }
    return first;
}

static void give_back(struct mm *mm, struct flight *f)
{
    if (f->staging)
        staging_put_unused(STAGING_OUT, f->staging);
    f->staging = NULL;
    flight_put(mm, f);
}

static struct flight *try_flight(struct mm *mm, bool wait)
{
    struct flight *f = flight_get(mm, wait);
    if (!f)
        return NULL;
    f->staging = staging_get(mm, STAGING_OUT, wait);
    if (f->staging)
        return f;
    flight_put(mm, f);
    return NULL;
}

/* A flight with a staging slot. Never waits for others while own ones could land: everybody who waits here holds nothing. */
static struct flight *get_flight(struct pipeline *p, int *err)
{
    struct flight *f = p->n < DEPTH ? try_flight(p->mm, false) : NULL;
    while (!f && p->n && !*err) {
        *err = land_oldest(p);
        f = *err ? NULL : try_flight(p->mm, false);
    }
    if (!f && !*err) {
        f = try_flight(p->mm, true);
        *err = f ? 0 : -ENOMEM;
    }
    return f;
}

/* What stood in the way of a window, with nothing held. 0: try again. */
static int mend(struct pipeline *p, struct window w, int obstacle, const struct obstacle *o)
{
    int r = land_all(p); /* our own flights may be what stands there */
    if (r)
        return r;
    if (obstacle == -EXDEV) /* device to device goes through system memory for now */
        return migrate_range_to_system(p->mm, NULL, w.start, w.end, NULL);
    if (obstacle == -ESTALE)
        take_unshare(w.start & BLOCK_MASK, o->shared);
    else
        flight_wait(p->mm, o->landings);
    return 0;
}

int migrate_range_to_device(struct mm *mm, struct cursor *c)
{
    struct pipeline p = {.mm = mm, .res = c->res};
    int r = 0;
    bool unshared = false; /* in this window */
    for (unsigned tries = 0; c->at < c->end && r >= 0;) {
        uintptr_t block_end = (c->at & BLOCK_MASK) + OS_BLOCK_SIZE;
        struct window w = {c->at, block_end < c->end ? block_end : c->end};
        struct obstacle o = {.unshared = unshared};
        r = 0;
        struct flight *f = get_flight(&p, &r);
        if (!f)
            break;
        r = depart_to_device(mm, f, c->dev, w, c->tcbs, c->partial, tries >= TRIES_MAX, c->res, &o);
        if (r == 0)
            p.air[p.n++] = f;
        else
            give_back(mm, f);
        if (r == -EBUSY || r == -EXDEV || r == -ESTALE) {
            bool own = p.n > 0;
            tries += r != -ESTALE;
            unshared |= r == -ESTALE;
            r = r == -EBUSY && own ? land_all(&p) : mend(&p, w, r, &o);
        } else if (r == -ENOSPC && p.n) {
            r = land_all(&p); /* our own pages may be what fills the device: try once more with nothing in the air */
        } else if (r >= 0) {
            c->at = w.end;
            c->partial = unshared = false;
            tries = 0;
        } else {
            c->lacking = o.lacking;
        }
    }
    int landed = land_all(&p);
    return r < 0 ? r : landed;
}

static int block_to_system(struct mm *mm, struct flight *f, struct hmm_device *dev, struct window w,
                           struct hmm_migrate_result *res)
{
    int first = 0;
    for (;;) {
        uint64_t pinned = res ? res->pinned : 0, unmovable = res ? res->unmovable : 0;
        if (!depart_to_system(mm, f, dev, w, res))
            break;
        if (res)
            res->pinned = pinned, res->unmovable = unmovable; /* the next look counts them again */
        int r = land_in_system(mm, f, LAND, res);
        first = first ? first : r;
        if (r)
            break;
    }
    return first;
}

/* Next block of [at, end) that exists; end when there is none. Blocks come and go: the answer is a hint. */
static uintptr_t next_block(struct mm *mm, uintptr_t at, uintptr_t end)
{
    rwlock_read_lock(&mm->as);
    struct block *b = pagetable_next(&mm->pt, at, end);
    uintptr_t base = b ? b->base : end;
    rwlock_read_unlock(&mm->as);
    return base > at ? base : at;
}

int migrate_range_to_system(struct mm *mm, struct hmm_device *dev, uintptr_t start, uintptr_t end,
                            struct hmm_migrate_result *res)
{
    struct flight *f = flight_get(mm, true);
    int first = 0;
    for (uintptr_t at = next_block(mm, start, end); at < end; at = next_block(mm, at, end)) {
        uintptr_t block_end = (at & BLOCK_MASK) + OS_BLOCK_SIZE;
        struct window w = {at, block_end < end ? block_end : end};
        int r = block_to_system(mm, f, dev, w, res);
        first = first ? first : r;
        at = w.end;
    }
    flight_put(mm, f);
    return first;
}

int migrate_unused_to_system(struct mm *mm, struct hmm_device *dev, uintptr_t base, struct hmm_migrate_result *res)
{
    struct window w = {base, base + OS_BLOCK_SIZE};
    struct flight *f = flight_get(mm, true);
    int r = 0;
    if (depart_to_system(mm, f, dev, w, res))
        r = land_in_system(mm, f, LAND_UNLESS_USED, res);
    if (r) /* nobody tries again: who touched a page meanwhile asks for it anew */
        os->uffd_wake(mm->uffd.fd, w.start, w.end - w.start);
    flight_put(mm, f);
    return r;
}
