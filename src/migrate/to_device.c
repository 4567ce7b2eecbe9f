/* SPDX-License-Identifier: MIT */
/*
 * System -> device. See migrate.h and take.h.
 *
 * From the moment a page is taken its only copy is in staging. It leaves staging when the driver's copy is complete and the entry
 * published, or when it has been put back. Nothing in between can fail in a way that frees it.
 */
#include <errno.h>
#include <string.h>

#include "debug/inject.h"
#include "migrate/migrate.h"
#include "migrate/staging.h"
#include "migrate/take.h"

#define RUNS 64
#define PAGES_MAX 512 /* pages per block with the smallest page size there is */
#define EAGAIN_MAX 40 /* a tenth of a second: then the pages that could not be taken are counted as busy */

/* ---- device pages ---- */

/* Assigns device pages to the WANTED pages, ascending. Returns how many were lacking. */
static unsigned assign_pages(struct flight *f, uint8_t *pages, unsigned wanted)
{
    struct page_run runs[RUNS];
    unsigned nruns = 0, r = 0;
    uint64_t used = 0;
    int64_t got = pagemap_alloc(f->dev->pagemap, wanted, runs, RUNS, &nruns);
    if (got < 0)
        got = 0; /* closing: nothing finds room */
    unsigned lacking = wanted - got;
    for (unsigned i = f->first; i < f->end; i++) {
        if (pages[i] != TAKE_WANTED)
            continue;
        if (r < nruns && used == runs[r].count) {
            r++;
            used = 0;
        }
        if (r == nruns) {
            pages[i] = TAKE_BUSY;
            continue;
        }
        f->page[i] = runs[r].page + used++;
        f->how[i] = FLIGHT_DONE; /* to be freed unless the page is taken */
    }
    return lacking;
}

/* ---- copies ---- */

/* Gathers what to copy or clear into pieces that are contiguous on both sides, and starts it. */
static int start(struct flight *f, enum flight_page how, hmm_fence *fence, bool *started, struct hmm_dma *v)
{
    unsigned n = 0;
    for (unsigned i = f->first; i < f->end;) {
        unsigned k = 1;
        if (f->how[i] == how) {
            while (i + k < f->end && f->how[i + k] == how && f->page[i + k] == f->page[i] + k)
                k++;
            v[n++] =
                (struct hmm_dma){.page = f->page[i], .pages = k, .host = (char *)f->staging + ((size_t)i << os_page_shift())};
        }
        i += k;
    }
    if (n == 0)
        return 0;
    int r = how == FLIGHT_COPY ? driver_start_copy(f, HMM_DMA_TO_DEVICE, v, n, fence) : driver_start_clear(f, v, n, fence);
    *started = r == 0;
    return r;
}

static int start_transfer(struct flight *f)
{
    f->copying = f->clearing = false;
    int r = start(f, FLIGHT_COPY, &f->copied, &f->copying, f->dma);
    if (!r)
        r = start(f, FLIGHT_CLEAR, &f->cleared, &f->clearing, f->dma + block_pages());
    return r;
}

static int wait_transfer(struct flight *f)
{
    int r = f->copying ? fence_wait(&f->copied, -1) : 0;
    int c = f->clearing ? fence_wait(&f->cleared, -1) : 0;
    f->copying = f->clearing = false;
    return r ? r : c;
}

/* ---- the way out ---- */

static void free_staging(struct mm *mm, struct flight *f, unsigned staged)
{
    if (!f->staging)
        return;
    staging_put(mm, STAGING_OUT, f->staging, f->huge);
    staging_account(-(int64_t)staged);
    f->staging = NULL;
    f->staged = 0;
}

/* Everything goes back to where it was. The transfer has ended or was never started. */
static void roll_back(struct mm *mm, struct flight *f)
{
    stat_add(&mm->stats.rollbacks, 1);
    clear_entries(mm, f);
    while (put_home(mm, f, (struct put_source){.slot = f->staging}, true))
        mm_backoff(mm, 6); /* no memory: the pages stay staged until there is some */
    free_staging(mm, f, f->staged);
    flight_end_invalidation(mm, f);
    wake_homes(mm, f);
    flight_arrived(mm, f);
    free_done(f);
    trim_window(mm, f);
}

static void count(const struct flight *f, const uint8_t *pages, struct mm *mm, struct hmm_migrate_result *res)
{
    for (unsigned i = f->first; i < f->end; i++) {
        uint64_t *counter[] = {
            [TAKE_PINNED] = &res->pinned,       [TAKE_HELD] = &res->pinned,
            [TAKE_UNMOVABLE] = &res->unmovable, [TAKE_UNMAPPED] = &res->unmapped,
            [TAKE_BUSY] = &res->busy,           [TAKE_ALREADY] = &res->already,
            [TAKE_ELSEWHERE] = &res->busy,      [TAKE_FLYING] = &res->busy,
            [TAKE_WANTED] = &res->busy,         [TAKE_TAKEN] = NULL,
        };
        if (!counter[pages[i]])
            continue;
        ++*counter[pages[i]];
        if (pages[i] == TAKE_PINNED || pages[i] == TAKE_HELD)
            stat_add(&mm->stats.pinned, 1);
        uintptr_t addr = f->base + ((uintptr_t)i << os_page_shift());
        if (pages[i] != TAKE_ALREADY && pages[i] != TAKE_UNMAPPED && (!res->first_stayed || addr < res->first_stayed))
            res->first_stayed = addr;
    }
}

static void count_all(const struct flight *f, const uint8_t *pages, struct mm *mm, struct hmm_migrate_result *res,
                      uint64_t limited)
{
    count(f, pages, mm, res);
    res->limited += limited;
    stat_add(&mm->stats.limited, limited);
}

/* A mapping that cannot be registered keeps its pages. 0 or -EAGAIN. */
static int arm(struct mm *mm, struct flight *f, const struct tcb_list *tcbs, uint8_t *pages, uintptr_t at)
{
    uintptr_t part_end;
    int r = mm_arm(mm, at, tcbs, &part_end);
    if (r == 0 || r == -EAGAIN)
        return r;
    take_refuse(f, pages, at, part_end, r == -ENOMEM ? TAKE_BUSY : TAKE_UNMOVABLE);
    return 0;
}

/* Takes what can be taken, mapping by mapping, waiting for events in between. A mapping may lose its registration again before it is
 * looked at: so the number of tries has an end here, too. */
static int take_all(struct mm *mm, struct flight *f, const struct tcb_list *tcbs, uint8_t *pages, struct obstacle *obstacle)
{
    uintptr_t unarmed = 0;
    for (unsigned attempt = 0, armed = 0; attempt < EAGAIN_MAX && armed <= 2 * block_pages();) {
        SEQ_POINT("to-device-take");
        int r = take_pages(mm, f, tcbs, pages, &unarmed);
        if (r == -ENXIO) {
            armed++;
            r = arm(mm, f, tcbs, pages, unarmed);
            if (!r)
                continue;
        }
        if (r == -EAGAIN) {
            mm_backoff(mm, attempt++);
            continue;
        }
        if (r)
            return r;
        return !obstacle->unshared && take_find_shared(f, pages, obstacle->shared) ? -ESTALE : 0;
    }
    return 0;
}

static unsigned count_how(const struct flight *f, enum flight_page how)
{
    unsigned n = 0;
    for (unsigned i = f->first; i < f->end; i++)
        n += f->how[i] == how;
    return n;
}

static int has(const uint8_t *pages, const struct flight *f, enum take_page state)
{
    for (unsigned i = f->first; i < f->end; i++)
        if (pages[i] == state)
            return 1;
    return 0;
}

/* Device pages and notifiers for what the survey wants. 1: there is room for none of it, and that is to be counted. */
static int prepare(struct mm *mm, struct flight *f, uint8_t *pages, unsigned wanted, bool partial, struct obstacle *obstacle)
{
    unsigned lacking = assign_pages(f, pages, wanted);
    if (lacking && !partial) {
        obstacle->lacking = lacking;
        free_done(f);
        return -ENOSPC;
    }
    obstacle->limited = lacking && pagemap_room(f->dev->pagemap).limited ? lacking : 0;
    if (lacking == wanted)
        return 1;
    f->invalidating = true;
    if (notifier_begin(&mm->notifiers, &f->inv, f->base + ((uintptr_t)f->first << os_page_shift()),
                       f->base + ((uintptr_t)f->end << os_page_shift()), HMM_EVENT_MIGRATE, f->dev))
        notifier_call(&mm->notifiers, &f->inv, NOTIFIER_WAIT);
    return 0;
}

int depart_to_device(struct mm *mm, struct flight *f, struct hmm_device *dev, struct window w, const struct tcb_list *tcbs,
                     bool partial, bool settle, struct hmm_migrate_result *res, struct obstacle *obstacle)
{
    uint8_t pages[PAGES_MAX];
    unsigned first = block_index(w.start), end = first + ((w.end - w.start) >> os_page_shift());
    if (device_is_lost(dev))
        return -ENODEV;
    memset(pages, TAKE_NO, sizeof(pages));
    flight_reset(f, dev, w.start & BLOCK_MASK, first, end);
    int wanted = take_survey(mm, dev, w, tcbs, pages, &obstacle->landings);
    if (!settle && (has(pages, f, TAKE_FLYING) || has(pages, f, TAKE_ELSEWHERE)))
        return has(pages, f, TAKE_FLYING) ? -EBUSY : -EXDEV;
    int r = wanted ? prepare(mm, f, pages, wanted, partial, obstacle) : 1;
    if (r == 1) {
        count_all(f, pages, mm, res, obstacle->limited);
        return 1;
    }
    if (r)
        return r;
    r = take_all(mm, f, tcbs, pages, obstacle);
    staging_filled(mm, f->staging);
    f->staged = count_how(f, FLIGHT_COPY);
    flight_departed(mm, f, f->staged + count_how(f, FLIGHT_CLEAR));
    f->huge = f->huge && f->staged == block_pages();
    staging_account(f->staged);
    SEQ_POINT("to-device-taken");
    if (!r)
        r = start_transfer(f);
    if (r) {
        wait_transfer(f);
        roll_back(mm, f);
        return r;
    }
    count_all(f, pages, mm, res, obstacle->limited);
    return 0;
}

/* ---- landing ---- */

struct landed {
    unsigned pages, copied, cleared;
};

/* Entries of the pages that still have a home, in one hold of the lock. */
static struct landed publish(struct mm *mm, struct flight *f)
{
    struct landed n = {0};
    struct block *b = NULL;
    rwlock_read_lock(&mm->as);
    for (unsigned i = f->first; i < f->end; i++) {
        if (f->how[i] != FLIGHT_COPY && f->how[i] != FLIGHT_CLEAR)
            continue;
        uintptr_t home = f->home[i];
        if (!home && mutate("publish-dropped"))
            home = f->base + ((uintptr_t)i << os_page_shift());
        if (!home) {
            f->how[i] = FLIGHT_DONE;
            continue;
        }
        if (!b || b->base != (home & BLOCK_MASK)) {
            if (b)
                mutex_unlock(&b->lock);
            b = pagetable_find(&mm->pt, home);
            mutex_lock(&b->lock);
            lru_touch(mm, b);
        }
        block_set(b, block_index(home), entry_make(ENTRY_DEVICE, f->dev->pagemap->id, f->page[i]));
        page_set_owner(&f->dev->pagemap->pages[f->page[i]], home);
        n.copied += f->how[i] == FLIGHT_COPY;
        n.cleared += f->how[i] == FLIGHT_CLEAR;
        f->how[i] = FLIGHT_EMPTY;
    }
    n.pages = n.copied + n.cleared;
    if (b) {
        b->huge = f->huge && n.copied == block_pages() && b->base == f->base;
        mutex_unlock(&b->lock);
    }
    rwlock_read_unlock(&mm->as);
    return n;
}

int land_on_device(struct mm *mm, struct flight *f, struct hmm_migrate_result *res)
{
    int r = wait_transfer(f);
    SEQ_POINT("to-device-copied");
    if (!r && device_memory_is_lost(f->dev))
        r = -ENODEV; /* staging still has everything */
    if (r) {
        res->busy += count_how(f, FLIGHT_COPY) + count_how(f, FLIGHT_CLEAR);
        roll_back(mm, f);
        return r;
    }
    struct landed n = publish(mm, f);
    SEQ_POINT("to-device-published");
    unsigned staged = f->staged;
    bool huge = f->huge;
    flight_end_invalidation(mm, f);
    wake_homes(mm, f);
    free_staging(mm, f, staged);
    flight_arrived(mm, f);
    free_done(f);
    trim_window(mm, f);
    stat_add(&mm->stats.pages_to_device, n.pages);
    stat_add(&mm->stats.pages_cleared, n.cleared);
    stat_add(&mm->stats.bytes_to_device, (uint64_t)n.copied << os_page_shift());
    stat_add(&mm->stats.huge_to_device, huge);
    res->moved += n.pages;
    res->cleared += n.cleared;
    res->huge += huge ? n.copied : 0;
    res->busy += staged > n.copied ? staged - n.copied : 0;
    return 0;
}
