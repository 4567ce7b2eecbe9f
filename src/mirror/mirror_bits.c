/* SPDX-License-Identifier: MIT */
/*
 * What a driver does with a range of a mirror: walking it, marking pages, collecting what was written, discarding; and directories that it
 * keeps.
 *
 * Collecting: no run that is current is handed out from the moment the device is asked to let go until the bits are taken
 * (mirror_change_begin). A write through a run was noted when the run was handed out, or by the driver before it let go. So at that moment
 * the bits say of every write until then; and a later write is through a run that is handed out later. A directory that is not asked,
 * because nothing of it is handed out for writing, keeps its bits: one that is set meanwhile is of a run that the device goes on using.
 */
#include "mirror/table.h"

#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "debug/inject.h"

#define MARKS (HMM_MIRROR_DIRTY | HMM_MIRROR_SELECT)
#define READ_TRIES 16

static bool is_range(uintptr_t start, uintptr_t end)
{
    return start < end && !((start | end) & (os_page_size() - 1));
}

/* The part of a range in a directory. */
struct part {
    uintptr_t start, end;
};

static struct part part_of(const struct hmm_mirror_dir *d, uintptr_t start, uintptr_t end)
{
    uintptr_t top = d->base + HMM_MIRROR_DIR;
    return (struct part){start > d->base ? start : d->base, end < top ? end : top};
}

static int wrong_range(const struct hmm_mirror *m, uintptr_t start, uintptr_t end)
{
    return hmm_fail(-EINVAL, "mirror '%s': [%#lx, %#lx) is empty, reversed, not aligned to pages, or not in the directory",
                    m->ops.name, (unsigned long)start, (unsigned long)end);
}

static int no_directory(const struct hmm_mirror *m, uintptr_t addr)
{
    return hmm_fail(-ENOSPC,
                    "mirror '%s': no directory to spare for %#lx: all %u are kept, dirty or in use, or it is no address of the "
                    "process; register it with more directories, or collect or discard some",
                    m->ops.name, (unsigned long)addr, m->max);
}

static int no_memory(const struct hmm_mirror *m)
{
    return hmm_fail(-ENOMEM, "mirror '%s': no memory for a copy of a directory", m->ops.name);
}

/* ---- walk -------------------------------------------------------------------------------------------------------- */

struct walk {
    uint64_t bits;
    int (*fn)(const struct hmm_mirror_run *run, void *arg);
    void *arg;
};

/* A directory's entries at one moment, as drivers see them. In memory of ours: written under the directory's lock. */
struct picture {
    struct hmm_mirror_run run; /* what all have in common */
    unsigned n;
    uint64_t entry[DIR_PAGES_MAX];
};

/* With dirty tracking only what is dirty may be written: it was noted. */
static uint64_t public_entry(const struct hmm_mirror_dir *d, uint64_t e)
{
    if (!(e & HMM_MIRROR_VALID))
        return e & MARKS;
    bool noted = !(d->m->flags & HMM_MIRROR_TRACK_DIRTY) || e & HMM_MIRROR_DIRTY || mutate("mirror-walk-write");
    return e & (ENTRY_RIGHTS | MARKS | HMM_PFN_MASK) & (noted ? UINT64_MAX : ~HMM_MIRROR_WRITE);
}

/* given: runs of it will be handed out. False: the device is asked to let go of it just now, and no run of the copy is current. */
static bool copy_entries(struct hmm_mirror_dir *d, struct part p, bool given, struct picture *copy)
{
    unsigned first, last;
    mirror_clip(d, p.start, p.end, &first, &last);
    copy->n = last - first;
    copy->run.gate = __atomic_load_n(d->m->dev->mm->gate, __ATOMIC_SEQ_CST);
    mutex_lock(&d->lock);
    bool changing = d->changing && !mutate("mirror-changing");
    for (unsigned i = 0; i < copy->n; i++)
        copy->entry[i] = public_entry(d, d->entry[first + i]);
    copy->run.seq = &d->notifier.seq;
    copy->run.seq_seen = d->filled;
    copy->run.generation = &d->generation;
    copy->run.generation_seen = __atomic_load_n(&d->generation, __ATOMIC_RELAXED) - changing;
    if (given)
        __atomic_store_n(&d->given, d->given + 1, __ATOMIC_RELAXED);
    mutex_unlock(&d->lock);
    return !changing;
}

static int walk_copy(const struct picture *copy, uintptr_t start, const struct walk *w)
{
    int r = 0;
    for (unsigned i = 0, k; i < copy->n && !r; i = k) {
        uint64_t e = copy->entry[i], step = e & HMM_MIRROR_VALID ? 1 : 0;
        k = i + 1;
        if ((e & w->bits) != w->bits)
            continue;
        while (k < copy->n && copy->entry[k] == e + (k - i) * step)
            k++;
        struct hmm_mirror_run run = copy->run;
        run.start = start + ((uintptr_t)i << os_page_shift());
        run.end = start + ((uintptr_t)k << os_page_shift());
        run.page = e & HMM_PFN_MASK;
        run.flags = e & ~HMM_PFN_MASK;
        r = w->fn(&run, w->arg);
    }
    return r;
}

static int walk_range(struct hmm_mirror *m, uintptr_t start, uintptr_t end, const struct walk *w)
{
    struct hmm_mirror_dir *d;
    struct picture *copy = mem_alloc(sizeof(*copy));
    int r = copy ? 0 : no_memory(m);
    for (uintptr_t at = start; !r && at < end && (d = mirror_dir_next(m, at, end));) {
        struct part p = part_of(d, start, end);
        copy_entries(d, p, true, copy);
        r = walk_copy(copy, p.start, w);
        at = d->base + HMM_MIRROR_DIR;
        mirror_dir_drop(d);
    }
    mem_free(copy, sizeof(*copy));
    return r;
}

int hmm_mirror_walk(struct hmm_mirror *m, uintptr_t start, uintptr_t end, uint64_t bits,
                    int (*fn)(const struct hmm_mirror_run *run, void *arg), void *arg)
{
    int r = mirror_enter(m);
    if (r)
        return r;
    struct walk w = {.bits = bits ? bits : HMM_MIRROR_VALID, .fn = fn, .arg = arg};
    struct mirror_inside inside;
    mirror_inside_begin(&inside, m);
    if (!fn)
        r = hmm_fail(-EINVAL, "mirror '%s': a walk without a function to call", m->ops.name);
    else
        r = is_range(start, end) ? walk_range(m, start, end, &w) : wrong_range(m, start, end);
    mirror_inside_end(&inside);
    mirror_leave(m);
    return r;
}

/* ---- marks ------------------------------------------------------------------------------------------------------- */

static void mark_part(struct hmm_mirror_dir *d, struct part p, uint64_t set, uint64_t clear)
{
    unsigned i, last;
    mutex_lock(&d->lock);
    for (mirror_clip(d, p.start, p.end, &i, &last); i < last; i++) {
        uint64_t may = d->entry[i] & HMM_MIRROR_VALID ? MARKS : HMM_MIRROR_DIRTY;
        mirror_set_entry(d, i, (d->entry[i] & ~clear) | (set & may));
    }
    mutex_unlock(&d->lock);
}

static int mark_range(struct hmm_mirror *m, uintptr_t start, uintptr_t end, uint64_t set, uint64_t clear)
{
    bool make = set & HMM_MIRROR_DIRTY;
    for (uintptr_t at = start; at < end;) {
        struct hmm_mirror_dir *d = make ? mirror_dir_find(m, at, true) : mirror_dir_next(m, at, end);
        if (!d)
            return make ? no_directory(m, at) : 0;
        mark_part(d, part_of(d, start, end), set, clear);
        at = d->base + HMM_MIRROR_DIR;
        mirror_dir_drop(d);
    }
    return 0;
}

int hmm_mirror_mark(struct hmm_mirror *m, uintptr_t start, uintptr_t end, uint64_t set, uint64_t clear)
{
    int r = mirror_enter(m);
    if (r)
        return r;
    if ((set | clear) & ~MARKS)
        r = hmm_fail(-EINVAL, "mirror '%s': of the bits %#llx only DIRTY and SELECT can be changed", m->ops.name,
                     (unsigned long long)(set | clear));
    else
        r = is_range(start, end) ? mark_range(m, start, end, set, clear) : wrong_range(m, start, end);
    mirror_leave(m);
    return r;
}

/* ---- collecting and discarding ------------------------------------------------------------------------------------- */

/* Takes the dirty bits of a part into the bitmap of the range from start on. */
static unsigned take_dirty(struct hmm_mirror_dir *d, struct part p, uintptr_t start, uint64_t *dirty)
{
    uint64_t taken[DIR_PAGES_MAX / 64] = {0};
    unsigned first, last, n = 0;
    mirror_clip(d, p.start, p.end, &first, &last);
    mutex_lock(&d->lock);
    for (unsigned i = first; i < last; i++) {
        if (!(d->entry[i] & HMM_MIRROR_DIRTY))
            continue;
        taken[i / 64] |= 1ull << i % 64;
        mirror_set_entry(d, i, d->entry[i] & ~HMM_MIRROR_DIRTY);
        n++;
    }
    mutex_unlock(&d->lock);
    for (unsigned i = first; n && i < last; i++) {
        size_t at = (d->base + ((uintptr_t)i << os_page_shift()) - start) >> os_page_shift();
        dirty[at / 64] |= (taken[i / 64] >> i % 64 & 1) << at % 64;
    }
    return n;
}

/* Without tracking the driver may note what was written only when it is asked to let go. */
static bool may_be_written(const struct hmm_mirror_dir *d)
{
    bool untracked = !(d->m->flags & HMM_MIRROR_TRACK_DIRTY) && !mutate("mirror-collect-clean");
    return untracked || __atomic_load_n(&d->dirty, __ATOMIC_RELAXED);
}

static unsigned collect_part(struct hmm_mirror_dir *d, struct part p, uintptr_t start, uint64_t *dirty)
{
    bool written = may_be_written(d), ask = written && !mutate("mirror-collect");
    unsigned n = 0;
    if (ask)
        mirror_change_begin(d, p.start, p.end, HMM_EVENT_SOFT_DIRTY, false);
    SEQ_POINT("mirror-collect");
    if (written || mutate("mirror-collect-unasked"))
        n = take_dirty(d, p, start, dirty);
    if (ask)
        mirror_change_end(d);
    return n;
}

static int64_t collect(struct hmm_mirror *m, uintptr_t start, uintptr_t end, uint64_t *dirty)
{
    struct hmm_mirror_dir *d;
    int64_t n = 0;
    memset(dirty, 0, (((end - start) >> os_page_shift()) + 63) / 64 * sizeof(*dirty));
    for (uintptr_t at = start; at < end && (d = mirror_dir_next(m, at, end));) {
        n += collect_part(d, part_of(d, start, end), start, dirty);
        at = d->base + HMM_MIRROR_DIR;
        mirror_dir_drop(d);
    }
    return n;
}

int64_t hmm_mirror_collect_dirty(struct hmm_mirror *m, uintptr_t start, uintptr_t end, uint64_t *dirty)
{
    int r = mirror_enter(m);
    if (r)
        return r;
    int64_t n;
    if (!dirty)
        n = hmm_fail(-EINVAL, "mirror '%s': the bitmap for its dirty pages is NULL", m->ops.name);
    else
        n = is_range(start, end) ? collect(m, start, end, dirty) : wrong_range(m, start, end);
    mirror_leave(m);
    return n;
}

static void discard_part(struct hmm_mirror_dir *d, struct part p)
{
    mirror_change_begin(d, p.start, p.end, HMM_EVENT_MIGRATE, false);
    mutex_lock(&d->lock);
    mirror_empty(d, p.start, p.end, 0);
    mirror_unmap(d, p.start, p.end);
    mutex_unlock(&d->lock);
    mirror_change_end(d);
}

static void discard(struct hmm_mirror *m, uintptr_t start, uintptr_t end)
{
    struct hmm_mirror_dir *d;
    for (uintptr_t at = start, base; at < end && (d = mirror_dir_next(m, at, end)); at = base + HMM_MIRROR_DIR) {
        struct part p = part_of(d, start, end);
        base = d->base;
        discard_part(d, p);
        mirror_dir_drop(d);
        if (p.end - p.start == HMM_MIRROR_DIR)
            mirror_dir_give_up(m, base);
    }
}

int hmm_mirror_discard(struct hmm_mirror *m, uintptr_t start, uintptr_t end)
{
    int r = mirror_enter(m);
    if (r)
        return r;
    if (is_range(start, end))
        discard(m, start, end);
    else
        r = wrong_range(m, start, end);
    mirror_leave(m);
    return r;
}

/* ---- asking ------------------------------------------------------------------------------------------------------ */

static void add_info(struct hmm_mirror_dir *d, struct hmm_mirror_info *info)
{
    mutex_lock(&d->lock);
    info->directories++;
    info->valid += d->valid;
    info->dirty += d->dirty;
    for (unsigned i = 0; i < block_pages(); i++)
        info->selected += !!(d->entry[i] & HMM_MIRROR_SELECT);
    mutex_unlock(&d->lock);
}

int hmm_mirror_info(struct hmm_mirror *m, struct hmm_mirror_info *info)
{
    int r = mirror_enter(m);
    if (r)
        return r;
    struct hmm_mirror_info sum = {.directories_max = m->max, .filled = __atomic_load_n(&m->filled, __ATOMIC_RELAXED)};
    struct hmm_mirror_dir *d;
    for (uintptr_t at = 0; (d = mirror_dir_next(m, at, UINTPTR_MAX));) {
        add_info(d, &sum);
        at = d->base + HMM_MIRROR_DIR;
        mirror_dir_drop(d);
    }
    *info = sum;
    mirror_leave(m);
    return 0;
}

/* ---- directories that are kept ------------------------------------------------------------------------------------- */

int hmm_mirror_dir_get(struct hmm_mirror *m, uintptr_t addr, struct hmm_mirror_dir **dir)
{
    int r = mirror_enter(m);
    if (r)
        return r;
    struct hmm_mirror_dir *d = mirror_dir_find(m, addr, true);
    r = d ? 0 : no_directory(m, addr);
    if (d)
        *dir = d;
    mirror_leave(m);
    return r;
}

void hmm_mirror_dir_put(struct hmm_mirror_dir *dir)
{
    if (!mirror_is_foreign())
        mirror_dir_drop(dir);
}

/* Until no device is asked to let go of it meanwhile. */
static int read_entries(struct hmm_mirror_dir *d, struct part p, struct picture *copy)
{
    int r = 0;
    bool good = false;
    for (unsigned i = 0; !r && !good; i++) {
        r = i < READ_TRIES ? mirror_fill(d) : -EAGAIN;
        SEQ_POINT("mirror-read");
        good = !r && copy_entries(d, p, false, copy);
    }
    if (r == -EAGAIN)
        hmm_fail(r, "mirror '%s': what is at [%#lx, %#lx) changes all the time; try again", d->m->ops.name,
                 (unsigned long)p.start, (unsigned long)p.end);
    return r;
}

int hmm_mirror_dir_read(struct hmm_mirror_dir *dir, uintptr_t start, uintptr_t end, uint64_t *entries, uint64_t *seq)
{
    int r = mirror_is_foreign() ? -ESRCH : mirror_enter(dir->m);
    if (r)
        return r;
    bool within = is_range(start, end) && start >= dir->base && end - dir->base <= HMM_MIRROR_DIR;
    struct picture *copy = within ? mem_alloc(sizeof(*copy)) : NULL;
    r = !within ? wrong_range(dir->m, start, end)
        : copy  ? read_entries(dir, (struct part){start, end}, copy)
                : no_memory(dir->m);
    if (!r) {
        memcpy(entries, copy->entry, copy->n * sizeof(entries[0]));
        *seq = copy->run.seq_seen;
    }
    mem_free(copy, sizeof(*copy));
    mirror_leave(dir->m);
    return r;
}

uint64_t hmm_mirror_dir_seq(const struct hmm_mirror_dir *dir)
{
    return hmm_notifier_seq(&dir->notifier);
}
