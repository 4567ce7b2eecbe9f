/* SPDX-License-Identifier: MIT */
/*
 * Which memory of the program is managed. A mapping is registered with our userfaultfd as a whole, and noted as a region (region.h): in
 * MISSING mode while something of it is away, in WP mode while a device only mirrors it. As a whole, because registering a part
 * splits the kernel's mapping: thousands of parts exhaust vm.max_map_count, and mremap() of a range that spans mappings is refused.
 * Only where faults of the kernel are not ours to serve (user-mode-only), a region is kept within one block: elsewhere in it a
 * system call on memory that was never touched would fail with EFAULT.
 *
 * Where the userfaultfd cannot tell of fork, managed memory is kept from children: hide.c.
 */
#include <errno.h>

#include "debug/inject.h"
#include "mm/arm.h"
#include "mm/thread.h"
#include "os/own.h"

void tcb_list_read(struct tcb_list *list)
{
    int max = ARRAY_LEN(list->at);
    int n = os->thread_blocks(list->at, max);
    list->n = n < 0 ? 0 : n > max ? max : n;
    if (n > max)
        hmm_log(HMM_LOG_WARNING, "more than %d threads: control blocks of some are not known and might migrate", max);
}

/*
 * What the kernel writes around the head of a thread's robust list: the thread id just before it (at thread exit, without faulting),
 * and the rseq area behind it (when the thread is preempted; where userfaultfd is user-mode-only, a missing page there is a
 * SIGSEGV). Distances are those of glibc with room to spare.
 */
#define TCB_BELOW 16384 /* thread-local data of the main thread, ours among them, stands below its control block */
#define TCB_ABOVE 3072

struct range {
    uintptr_t start, end;
};

/* The main thread's control block stands in memory that may also be the program's; other threads' in their stacks. */
static struct range tcb_pages(const struct tcb_list *tcbs)
{
    uintptr_t mask = ~(uintptr_t)(os_page_size() - 1);
    if (tcbs->n == 0)
        return (struct range){0, 0};
    return (struct range){(tcbs->at[0] - TCB_BELOW) & mask, ((tcbs->at[0] + TCB_ABOVE) & mask) + os_page_size()};
}

/* Thread stacks stay: the kernel writes to them without faulting at thread exit, and library threads read what callers have there.
 * So does the memory that holds our own static data. */
static bool holds_stack_or_state(const struct mm *mm, const struct os_vma *vma, const struct tcb_list *tcbs)
{
    for (unsigned i = 1; i < tcbs->n; i++)
        if (tcbs->at[i] >= vma->start && tcbs->at[i] < vma->end)
            return true;
    return (uintptr_t)mm >= vma->start && (uintptr_t)mm < vma->end;
}

/* Cuts r down to the part around addr that excl, which does not contain addr, leaves. */
static void leave_out(struct range *r, uintptr_t addr, struct range excl)
{
    if (excl.end <= addr && excl.end > r->start)
        r->start = excl.end;
    if (excl.start > addr && excl.start < r->end)
        r->end = excl.start;
}

/* The part of r around addr without own mappings; false: addr is in one, which r becomes. */
static bool without_own(struct range *r, uintptr_t addr)
{
    struct range own;
    for (uintptr_t at = r->start; at < r->end && own_overlap(at, r->end, &own.start, &own.end); at = own.end) {
        if (own.start <= addr && addr < own.end) {
            *r = (struct range){own.start > r->start ? own.start : r->start, own.end < r->end ? own.end : r->end};
            return false;
        }
        leave_out(r, addr, own);
    }
    return true;
}

/* What of the mapping may be away, around addr. Not ARM_OK: *r is where that holds. */
static enum arm_verdict movable_part(struct mm *mm, const struct os_vma *vma, uintptr_t addr, const struct tcb_list *tcbs,
                                     struct range *r)
{
    struct range tcb = tcb_pages(tcbs);
    *r = (struct range){vma->start, vma->end};
    if (!vma->anonymous || vma->shared || !vma->read || !vma->write || vma->exec || vma->stack || vma->special)
        return ARM_UNMOVABLE;
    if (holds_stack_or_state(mm, vma, tcbs) || !without_own(r, addr))
        return ARM_UNMOVABLE;
    if (addr >= tcb.start && addr < tcb.end) {
        r->end = tcb.end < r->end ? tcb.end : r->end;
        return ARM_UNMOVABLE;
    }
    leave_out(r, addr, tcb);
    return ARM_OK;
}

enum arm_verdict mm_verdict(struct mm *mm, uintptr_t addr, uintptr_t end, const struct tcb_list *tcbs, uintptr_t *part_end)
{
    struct os_vma vma;
    struct range r;
    *part_end = end;
    int err = os->vma_query(mm->maps_fd, addr, &vma);
    if (err && err != -ENOENT)
        return ARM_UNMOVABLE; /* not known: it stays */
    if (err || vma.start >= end)
        return ARM_UNMAPPED;
    if (vma.start > addr) {
        *part_end = vma.start;
        return ARM_UNMAPPED;
    }
    enum arm_verdict verdict = movable_part(mm, &vma, addr, tcbs, &r);
    if (r.end < end)
        *part_end = r.end;
    return verdict;
}

/*
 * Whether the one mapping that covers the region is registered with us. MISSING: giving a zero page says so. EEXIST: it is, and a
 * page is there; ENOENT: it is not; EAGAIN: an event is pending. Where it succeeds, an absent page became a zero page: the same to
 * the program. WP: taking write-protection from a page that has none says the same.
 */
static int prove_registered(struct mm *mm, const struct region *g, uintptr_t probe)
{
    if (!g->missing) {
        int r = os->uffd_watched(mm->uffd.fd, probe, os_page_size());
        return r == -ENOENT ? -EAGAIN : r;
    }
    for (uintptr_t at = probe; at < g->end; at += os_page_size()) {
        const struct block *b = pagetable_find(&mm->pt, at);
        if (b && block_entry(b, block_index(at)))
            continue; /* missing on purpose: not to be filled */
        int64_t r = os->uffd_zeropage(mm->uffd.fd, at, os_page_size());
        if (r > 0)
            mm_dropped(mm, at, at + os_page_size());
        return r > 0 || r == -EEXIST ? 0 : r == -EAGAIN || r == -ENOENT ? -EAGAIN : (int)r;
    }
    return 0;
}

int region_register(struct mm *mm, uintptr_t start, uintptr_t end, bool missing)
{
    return missing ? os->uffd_register(mm->uffd.fd, start, end - start) : os->uffd_watch(mm->uffd.fd, start, end - start);
}

/*
 * Between looking at the mapping and registering it, it may have been unmapped, and another may stand there after: registering a hole
 * may succeed, and what is mapped into it later would raise no event and read as zeros while its pages are away. So it is looked at
 * again afterwards, and its registration proved. From then on every change of it is an event.
 */
static int prove(struct mm *mm, const struct region *g, uintptr_t probe)
{
    struct os_vma vma;
    if (mutate("arm-unproved"))
        return 0;
    if (os->vma_query(mm->maps_fd, g->start, &vma) || vma.start > g->start || vma.end < g->end)
        return -EAGAIN;
    return prove_registered(mm, g, probe);
}

/* What of the part is in no region, and may be registered now, is to be heeded: a REMOVE of it may be read whose caller has still to drop the
 * pages. What regions say of their events still holds. */
static void heed_gaps(struct mm *mm, struct range part, bool missing)
{
    for (uintptr_t at = part.start, next; at < part.end; at = next) {
        const struct region *g = region_next(&mm->regions, at);
        uintptr_t gap_end = g && g->start < part.end ? g->start : part.end;
        next = g && gap_end < part.end ? g->end : part.end;
        if (gap_end > at)
            region_insert_must(&mm->regions, at, gap_end, missing, REGION_UNPROVED);
    }
}

/*
 * Registers a part of one mapping as one region, whatever the tree says of it: where no event is pending, neither before nor when its
 * registration is proved, nothing is still to come of what stood there. So a mapping is never split, which would be for good if its parts
 * get pages before they are alike again. Until it is proved the tree says what it said. The lock is held throughout: no event is read.
 */
static int establish(struct mm *mm, struct range part, uintptr_t probe, bool missing)
{
    struct region whole = {.start = part.start, .end = part.end, .missing = missing, .state = REGION_PROVED};
    if (mm->forking)
        return -EAGAIN; /* the child is to have it */
    /* The tree may still know what stood here before: a part registered beside that would split the mapping. */
    if (os->uffd_pending(mm->uffd.fd) > 0 && !mutate("arm-split"))
        return -EAGAIN;
    int r = region_register(mm, part.start, part.end, missing);
    if (r == -EINVAL || r == -EBUSY)
        return r; /* nothing was registered */
    /* Before the proof: a mapping that is remapped meanwhile takes its mark with it, and is told of. Why that failed the proof knows better. */
    int hidden = r ? 0 : region_hide(mm, &whole);
    if (!r)
        r = prove(mm, &whole, probe);
    if (!r)
        r = hidden;
    if (r) {
        region_show(mm, part.start, part.end);
        hide_managed(mm, part.start, part.end);
        heed_gaps(mm, part, missing);
        return r;
    }
    region_cut(&mm->regions, part.start, part.end);
    region_insert_must(&mm->regions, part.start, part.end, missing, REGION_PROVED);
    return 0;
}

static bool any_missing(struct mm *mm, struct range part)
{
    const struct region *g = region_next(&mm->regions, part.start);
    while (g && g->start < part.end && !g->missing)
        g = region_next(&mm->regions, g->end);
    return g && g->start < part.end;
}

/* Cuts r down to what is not in a region, or to the region of addr. */
static void within_region(struct mm *mm, struct range *r, uintptr_t addr)
{
    struct region *next = region_next(&mm->regions, addr), *before = region_before(&mm->regions, addr);
    if (next && next->start <= addr) {
        r->start = next->start > r->start ? next->start : r->start;
        r->end = next->end < r->end ? next->end : r->end;
        return;
    }
    if (next)
        leave_out(r, addr, (struct range){next->start, next->end});
    if (before)
        leave_out(r, addr, (struct range){before->start, before->end});
}

bool region_gap(struct mm *mm, uintptr_t addr, struct os_vma *vma, uintptr_t *start, uintptr_t *end)
{
    if (os->vma_query(mm->maps_fd, addr, vma) || vma->start > addr)
        return false;
    struct range r = {vma->start, vma->end};
    if (!without_own(&r, addr))
        return false;
    within_region(mm, &r, addr);
    *start = r.start;
    *end = r.end;
    return true;
}

/* Faults of the kernel are not ours to serve: as little as can be is registered. */
static struct range user_mode_part(const struct mm *mm, struct range r, uintptr_t addr)
{
    uintptr_t base = addr & BLOCK_MASK, end = (addr | ~BLOCK_MASK) + 1;
    if (mm->uffd.user_mode_only)
        r = (struct range){base > r.start ? base : r.start, end < r.end ? end : r.end};
    return r;
}

int region_arm(struct mm *mm, uintptr_t addr, const struct tcb_list *tcbs, uintptr_t *part_end)
{
    struct os_vma vma;
    struct range r;
    struct region *g = region_find(&mm->regions, addr);
    lock_assert_held(RANK_AS);
    if (g && g->missing && g->state == REGION_PROVED)
        return 0;
    if (os->vma_query(mm->maps_fd, addr, &vma) || vma.start > addr || movable_part(mm, &vma, addr, tcbs, &r) != ARM_OK)
        return -EAGAIN; /* it changed: its verdict is asked for again */
    r = user_mode_part(mm, r, addr);
    *part_end = r.end;
    return establish(mm, r, addr, true);
}

int mm_arm(struct mm *mm, uintptr_t addr, const struct tcb_list *tcbs, uintptr_t *part_end)
{
    struct hide_look look;
    bool is_kept = hide_look(mm, addr, &look);
    *part_end = addr + os_page_size();
    rwlock_write_lock(&mm->as);
    int r = is_kept && hide_is_old(mm, &look) ? -EAGAIN : region_arm(mm, addr, tcbs, part_end);
    if (!r && is_kept)
        hide_note(mm, addr, &look);
    rwlock_write_unlock(&mm->as);
    return r;
}

/* ---- watching ---- */

static bool is_watched(struct mm *mm, uintptr_t addr, uintptr_t end, uintptr_t *part_end)
{
    const struct region *g = region_find(&mm->regions, addr);
    if (!g || g->state != REGION_PROVED)
        return false;
    *part_end = g->end < end ? g->end : end;
    return true;
}

/* What of the mapping may be watched, around addr. A library thread's stack is unmapped when nobody reads events any more. */
static bool watchable_part(const struct os_vma *vma, uintptr_t addr, enum watch_how how, struct range *r)
{
    *r = (struct range){vma->start, vma->end};
    if (vma->special || thread_stack_within(vma->start, vma->end))
        return false;
    if (how == WATCH_FREE && (!vma->anonymous || vma->shared))
        return false;
    return without_own(r, addr);
}

/* Caller holds mm->as exclusively. */
static int watch(struct mm *mm, uintptr_t addr, uintptr_t end, enum watch_how how, uintptr_t *part_end)
{
    struct os_vma vma;
    struct range r;
    *part_end = end;
    if (is_watched(mm, addr, end, part_end))
        return 0;
    int err = os->vma_query(mm->maps_fd, addr, &vma);
    if (err && err != -ENOENT)
        return -EAGAIN;
    if (err || vma.start > addr) {
        if (!err && vma.start < end)
            *part_end = vma.start;
        return -ENOENT;
    }
    bool can = watchable_part(&vma, addr, how, &r);
    *part_end = r.end < end ? r.end : end;
    if (!can)
        return -EOPNOTSUPP;
    err = establish(mm, r, addr, any_missing(mm, r));
    return err == -EINVAL ? -EOPNOTSUPP : err;
}

int mm_watch(struct mm *mm, uintptr_t addr, uintptr_t end, enum watch_how how, uintptr_t *part_end)
{
    rwlock_read_lock(&mm->as);
    bool watched = is_watched(mm, addr, end, part_end);
    rwlock_read_unlock(&mm->as);
    if (watched)
        return 0;
    rwlock_write_lock(&mm->as);
    int r = watch(mm, addr, end, how, part_end);
    rwlock_write_unlock(&mm->as);
    return r;
}

int mm_register_again(struct mm *mm, uintptr_t addr)
{
    struct os_vma vma;
    const struct region *g = region_find(&mm->regions, addr);
    if (!g || os->vma_query(mm->maps_fd, addr, &vma) || vma.start > addr)
        return -EAGAIN;
    uintptr_t start = vma.start > g->start ? vma.start : g->start, end = vma.end < g->end ? vma.end : g->end;
    return os->uffd_register(mm->uffd.fd, start, end - start);
}
