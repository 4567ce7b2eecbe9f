/* SPDX-License-Identifier: MIT */
/*
 * Putting pages into the program's memory: the last step of every way home, and of every roll-back.
 *
 * Each run is put under the shared address-space lock and its block's lock, with its homes read in the same hold. Nothing is
 * given up: a run whose put must wait for an event keeps its entry and its source until it is done or dropped.
 */
#include <errno.h>
#include <string.h>

#include "debug/inject.h"
#include "migrate/migrate.h"
#include "migrate/staging.h"

/* Longest hold of the shared lock for copies: the reader waits for us. MOVE is quick and takes whole blocks. */
#define COPY_PAGES 32

static size_t page_bytes(uint64_t pages)
{
    return pages << os_page_shift();
}

static bool is_lost(struct put_source src)
{
    return !src.slot && !src.cpu_map;
}

static const char *source_of(const struct flight *f, struct put_source src, unsigned i)
{
    return src.slot ? src.slot + page_bytes(i) : src.cpu_map + page_bytes(f->page[i]);
}

/* Pages from i on that follow each other at home, within one block, and in the source. */
static unsigned run_length(const struct flight *f, struct put_source src, unsigned i, unsigned max)
{
    unsigned n = 1;
    while (n < max && i + n < f->end && f->how[i + n] == FLIGHT_COPY && f->home[i + n] == f->home[i] + page_bytes(n) &&
           (f->home[i + n] & ~BLOCK_MASK) != 0 && (!src.cpu_map || f->page[i + n] == f->page[i] + n))
        n++;
    return n;
}

/* The result of an incomplete MOVE is not believed: what is no longer in the slot has arrived. */
static int gone_from_slot(struct mm *mm, uintptr_t slot, unsigned n)
{
    struct os_region v;
    uintptr_t walked;
    int r = os->pagemap_scan(mm->pagemap_fd, slot, slot + page_bytes(n), &v, 1, &walked);
    if (r < 0)
        return -EAGAIN; /* not known: copying from where nothing may be any more would fault */
    uintptr_t first = r > 0 ? v.start : walked;
    return (int)((first - slot) >> os_page_shift());
}

/* Pages of the slot from here on that are there. One that was freed lazily may have been discarded: it reads as zeros, and to copy it would
 * wait for the reader. */
static int staged(struct mm *mm, uintptr_t slot, unsigned n)
{
    struct os_region v;
    uintptr_t walked;
    int r = os->pagemap_scan(mm->pagemap_fd, slot, slot + page_bytes(n), &v, 1, &walked);
    if (r < 0)
        return -EAGAIN;
    return r > 0 && v.start == slot ? (int)((v.end - slot) >> os_page_shift()) : 0;
}

static int copy_run(struct mm *mm, struct flight *f, struct put_source src, unsigned i, unsigned n)
{
    const char *from = source_of(f, src, i);
    int there = src.slot && !mutate("staging-put") ? staged(mm, (uintptr_t)from, n) : (int)n;
    if (there < 0)
        return there;
    int64_t r = there ? os->uffd_copy(mm->uffd.fd, f->home[i], from, page_bytes((unsigned)there))
                      : os->uffd_zeropage(mm->uffd.fd, f->home[i], os_page_size());
    return r > 0 ? (int)(r >> os_page_shift()) : (int)r;
}

/* One try: pages put from the start of the run (> 0) or an error about its first page. */
static int try_run(struct mm *mm, struct flight *f, struct put_source src, unsigned i, unsigned n, bool *moved)
{
    *moved = false;
    if (is_lost(src)) {
        int64_t r = mutate("poison") ? os->uffd_zeropage(mm->uffd.fd, f->home[i], page_bytes(n))
                                     : os->uffd_poison(mm->uffd.fd, f->home[i], page_bytes(n));
        return r > 0 ? (int)(r >> os_page_shift()) : (int)r;
    }
    const char *from = source_of(f, src, i);
    bool may_move = mutate("fork-slot") || !((mm->forking && f->staging) || staging_is_kept(src.slot));
    if (src.slot && may_move) {
        int64_t r = os->uffd_move(mm->uffd.fd, f->home[i], (uintptr_t)from, page_bytes(n));
        int k = r == (int64_t)page_bytes(n) ? (int)n : gone_from_slot(mm, (uintptr_t)from, n);
        *moved = k > 0;
        if (k != 0)
            return k;
        if (r == -EAGAIN || r == -ENOMEM)
            return r;
    }
    return copy_run(mm, f, src, i, n < COPY_PAGES ? n : COPY_PAGES);
}

/* Pages of the run that lie in the first one's mapping: the kernel takes no range that spans two. */
static unsigned within_mapping(struct mm *mm, uintptr_t home, unsigned n)
{
    struct os_vma vma;
    if (os->vma_query(mm->maps_fd, home, &vma) || vma.start > home)
        return 1;
    uintptr_t pages = (vma.end - home) >> os_page_shift();
    return pages < n ? pages : n;
}

/* Caller holds mm->as shared and the block lock. */
static int put_run(struct mm *mm, struct flight *f, struct put_source src, unsigned i, unsigned n, bool *moved)
{
    if (mutate("flip-to-system") && !is_lost(src))
        *(char *)source_of(f, src, i) ^= 1;
    int r = try_run(mm, f, src, i, n, moved);
    if (r > 0 || r == -EAGAIN || r == -ENOMEM || r == -EEXIST || r == -EFAULT)
        return r;
    return try_run(mm, f, src, i, within_mapping(mm, f->home[i], n), moved);
}

static void settle_run(struct flight *f, struct block *b, unsigned i, unsigned n, entry_t e)
{
    for (unsigned k = i; k < i + n; k++) {
        block_set(b, block_index(f->home[k]), e);
        f->how[k] = FLIGHT_DONE;
    }
}

/* A fork() under way may have copied the address space before the pages came home. */
static void tell_fork(struct mm *mm, const struct flight *f, struct put_source src, unsigned i, unsigned n)
{
    for (unsigned k = i; mm->forking && !is_lost(src) && k < i + n; k++)
        mm->fork->arrived(mm, f, k, f->staging ? src.slot : NULL);
}

/* What to do about a run that the kernel refused: 0 try again, else give up for now. */
static int refused(struct mm *mm, struct flight *f, struct block *b, unsigned i, int err)
{
    uintptr_t home = f->home[i];
    if (err == -EEXIST) {
        /* Only a mapping that we were not told about can have a page here; what the program wrote there is newer. */
        hmm_log(HMM_LOG_WARNING, "page %#lx was filled by somebody else while it was away: its newer content stays",
                (unsigned long)home);
        settle_run(f, b, i, 1, 0);
        return 0;
    }
    if (err == -EFAULT) /* the source: device memory that the process cannot read */
        return -EIO;
    if (err == -EAGAIN || err == -ENOMEM)
        return err;
    struct os_vma vma;
    int r = os->vma_query(mm->maps_fd, home, &vma);
    if (r && r != -ENOENT)
        return -EAGAIN; /* not known: nothing is given up for that */
    if (r || vma.start > home) {
        if (os->uffd_pending(mm->uffd.fd) != 0)
            return -EAGAIN;
        hmm_log(HMM_LOG_WARNING, "page %#lx was unmapped without an event: dropped", (unsigned long)home);
        settle_run(f, b, i, 1, 0);
        stat_add(&mm->stats.dropped, 1);
        return 0;
    }
    if (os->uffd_pending(mm->uffd.fd) != 0)
        return -EAGAIN;
    /* The registration is gone (another userfaultfd, an unregistering call): take it again. */
    return mm_register_again(mm, home) ? -EAGAIN : 0;
}

/* One run, from page i: how many pages are settled, or an error. */
static int put_step(struct mm *mm, struct flight *f, struct put_source src, unsigned i)
{
    int r = 1;
    if (src.cpu_map && device_memory_is_lost(f->dev) && !mutate("lost-read"))
        return -ENODEV;
    rwlock_read_lock(&mm->as);
    if (f->home[i] == 0) {
        f->how[i] = FLIGHT_DONE;
        goto unlock;
    }
    struct block *b = pagetable_find(&mm->pt, f->home[i]);
    mutex_lock(&b->lock);
    unsigned n = run_length(f, src, i, f->end - i);
    bool moved;
    r = put_run(mm, f, src, i, n, &moved);
    if (r > 0) {
        tell_fork(mm, f, src, i, r);
        settle_run(f, b, i, r, is_lost(src) ? entry_make(ENTRY_POISON, 0, 0) : 0);
        if (is_lost(src))
            stat_add(&mm->stats.poisoned, r);
        if (moved && f->huge && (unsigned)r == block_pages())
            stat_add(&mm->stats.huge_to_system, 1);
    } else {
        r = refused(mm, f, b, i, r);
    }
    mutex_unlock(&b->lock);
unlock:
    rwlock_read_unlock(&mm->as);
    return r;
}

int put_home(struct mm *mm, struct flight *f, struct put_source src, bool blockable)
{
    unsigned attempt = 0;
    for (unsigned i = f->first; i < f->end;) {
        if (f->how[i] != FLIGHT_COPY) {
            i++;
            continue;
        }
        int r = put_step(mm, f, src, i);
        if (r == -EAGAIN && blockable)
            mm_backoff(mm, attempt++);
        else if (r < 0)
            return r;
        else
            i += r;
    }
    return 0;
}

void restore_entries(struct mm *mm, struct flight *f)
{
    rwlock_read_lock(&mm->as);
    for (unsigned i = f->first; i < f->end; i++) {
        if (f->how[i] != FLIGHT_COPY)
            continue;
        struct block *b = f->home[i] ? pagetable_find(&mm->pt, f->home[i]) : NULL;
        f->how[i] = FLIGHT_DONE;
        if (!b)
            continue;
        mutex_lock(&b->lock);
        lru_touch(mm, b);
        block_set(b, block_index(f->home[i]), entry_make(ENTRY_DEVICE, f->dev->pagemap->id, f->page[i]));
        page_set_owner(&f->dev->pagemap->pages[f->page[i]], f->home[i]);
        mutex_unlock(&b->lock);
        f->how[i] = FLIGHT_EMPTY;
    }
    rwlock_read_unlock(&mm->as);
}

void clear_entries(struct mm *mm, struct flight *f)
{
    rwlock_read_lock(&mm->as);
    for (unsigned i = f->first; i < f->end; i++) {
        if (f->how[i] != FLIGHT_CLEAR)
            continue;
        struct block *b = f->home[i] ? pagetable_find(&mm->pt, f->home[i]) : NULL;
        if (b) {
            mutex_lock(&b->lock);
            block_set(b, block_index(f->home[i]), 0);
            mutex_unlock(&b->lock);
        }
        f->how[i] = FLIGHT_DONE;
    }
    rwlock_read_unlock(&mm->as);
}

void free_done(struct flight *f)
{
    for (unsigned i = f->first, n; i < f->end; i += n) {
        n = 1;
        if (f->how[i] != FLIGHT_DONE)
            continue;
        f->how[i] = FLIGHT_EMPTY;
        while (i + n < f->end && f->how[i + n] == FLIGHT_DONE && f->page[i + n] == f->page[i] + n)
            f->how[i + n++] = FLIGHT_EMPTY;
        for (unsigned k = 0; k < n; k++)
            page_set_owner(&f->dev->pagemap->pages[f->page[i] + k], 0);
        pagemap_put(f->dev->pagemap, f->page[i], n);
    }
}

void trim_window(struct mm *mm, const struct flight *f)
{
    mm_trim(mm, f->base + page_bytes(f->first), f->base + page_bytes(f->end));
}

void wake_moved(struct mm *mm, struct flight *f)
{
    for (unsigned i = f->first; i < f->end; i++)
        if (f->home[i] && f->home[i] != f->base + page_bytes(i))
            os->uffd_wake(mm->uffd.fd, f->home[i], os_page_size());
    flight_landed(mm);
}

void wake_homes(struct mm *mm, struct flight *f)
{
    if (mutate("wake")) {
        flight_landed(mm);
        return;
    }
    os->uffd_wake(mm->uffd.fd, f->base + page_bytes(f->first), page_bytes(f->end - f->first));
    wake_moved(mm, f);
}
