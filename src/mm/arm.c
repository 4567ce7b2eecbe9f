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
#include "os/own.h"

#define SAY_EVERY_NS 10000000000ull
#define REFUSED_NS 3000000000ull     /* a registration that is refused for so long is reported */
#define REFUSED_GAP_NS 1000000000ull /* what was not tried for so long was not refused meanwhile */

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
static int prove_registered(struct mm *mm, const struct region *g, uintptr_t probe, size_t page_size)
{
    if (!g->missing) { /* of hugetlb memory the kernel answers for whole pages only */
        size_t len = page_size > os_page_size() && !mutate("watch-huge") ? page_size : os_page_size();
        int r = os->uffd_watched(mm->uffd.fd, probe & ~(uintptr_t)(len - 1), len);
        return r == -ENOENT ? -EAGAIN : r;
    }
    for (uintptr_t at = probe; at < g->end; at += os_page_size()) {
        const struct block *b = pagetable_find(&mm->pt, at);
        if (b && block_entry(b, block_index(at)))
            continue; /* missing on purpose: not to be filled */
        int64_t r = os->uffd_zeropage(mm->uffd.fd, at, os_page_size());
        if (r > 0)
            mm_dropped(mm, at, at + os_page_size(), UINT64_MAX);
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
    return prove_registered(mm, g, probe, vma.page_size);
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

/* The part was marked and is not armed: what the program has marked itself stays so, and what is managed stays marked. */
static void undo_hide(struct mm *mm, struct range part, bool missing)
{
    if (!missing && !mutate("keep-mark"))
        return;
    region_show(mm, part.start, part.end);
    hide_managed(mm, part.start, part.end);
    if (!region_first_missing(mm, part.start, part.end))
        region_cut(&mm->kept, part.start, part.end);
}

/*
 * Registers a part of one mapping as one region, whatever the tree says of it: where no event is pending, neither before nor when its
 * registration is proved, nothing is still to come of what stood there. So a mapping is never split, which would be for good if its parts
 * get pages before they are alike again. Until it is proved the tree says what it said. The lock is held throughout: no event is read.
 */
static int establish(struct mm *mm, struct range part, uintptr_t probe, bool missing, const struct hide_look *look)
{
    struct region whole = {.start = part.start, .end = part.end, .missing = missing, .state = REGION_PROVED};
    if (mm->forking)
        return -EAGAIN; /* the child is to have it */
    /* The tree may still know what stood here before: a part registered beside that would split the mapping. */
    if (os->uffd_pending(mm->uffd.fd) > 0 && !mutate("arm-split"))
        return -EAGAIN;
    int r = region_register(mm, part.start, part.end, missing);
    if (r == -EPERM) /* shared memory that the program may never write */
        r = -EINVAL;
    if (r == -EINVAL || r == -EBUSY)
        return r; /* nothing was registered */
    if (r) {
        heed_gaps(mm, part, missing);
        return r;
    }
    if (missing && !mutate("keep-mark")) /* before it is marked: else the mark would be lost where the proof fails */
        hide_note(mm, part.start, part.end, look);
    /* Before the proof: a mapping that is remapped meanwhile takes its mark with it, and is told of. Why that failed the proof knows better. */
    int hidden = region_hide(mm, &whole);
    r = prove(mm, &whole, probe);
    if (!r)
        r = hidden;
    if (r) {
        heed_gaps(mm, part, missing);
        undo_hide(mm, part, missing);
        if (!missing && os->uffd_pending(mm->uffd.fd) > 0 && !mutate("watch-again"))
            region_take_again(mm, part.start, part.end);
        return r;
    }
    region_cut(&mm->regions, part.start, part.end);
    region_insert_must(&mm->regions, part.start, part.end, missing, REGION_PROVED);
    return 0;
}

const struct region *region_first_missing(struct mm *mm, uintptr_t start, uintptr_t end)
{
    const struct region *g = region_next(&mm->regions, start);
    while (g && g->start < end && !g->missing)
        g = region_next(&mm->regions, g->end);
    return g && g->start < end ? g : NULL;
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

int region_arm(struct mm *mm, uintptr_t addr, const struct tcb_list *tcbs, const struct hide_look *look, uintptr_t *part_end)
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
    return establish(mm, r, addr, true, look);
}

/* No locks held. */
static void too_many_mappings(uintptr_t addr)
{
    static uint64_t said;
    uint64_t before = __atomic_load_n(&said, __ATOMIC_RELAXED), now = os_now();
    char most[32] = "unknown";
    if ((before && now - before < SAY_EVERY_NS) ||
        !__atomic_compare_exchange_n(&said, &before, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return;
    os->read_text("/proc/sys/vm/max_map_count", most, sizeof(most));
    hmm_log(HMM_LOG_WARNING,
            "memory at %#lx cannot be registered and stays where it is: too many mappings, or no memory (sysctl "
            "vm.max_map_count is %s: raise it)",
            (unsigned long)addr, most);
}

int mm_arm(struct mm *mm, uintptr_t addr, const struct tcb_list *tcbs, uintptr_t *part_end)
{
    struct hide_look look;
    bool is_kept = hide_look(mm, addr, &look);
    *part_end = addr + os_page_size();
    rwlock_write_lock(&mm->as);
    int r = is_kept && hide_is_old(mm, &look) ? -EAGAIN : region_arm(mm, addr, tcbs, is_kept ? &look : NULL, part_end);
    rwlock_write_unlock(&mm->as);
    if (r == -ENOMEM)
        too_many_mappings(addr);
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

/* What of the mapping may be watched, around addr. */
static bool watchable_part(const struct os_vma *vma, uintptr_t addr, enum watch_how how, struct range *r)
{
    *r = (struct range){vma->start, vma->end};
    if (vma->special)
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
    err = establish(mm, r, addr, region_first_missing(mm, r.start, r.end) != NULL, NULL);
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
    if (r == -ENOMEM)
        too_many_mappings(addr);
    return r;
}

/* Its caller tries for as long as it takes: somebody should know. Any thread. */
static void say_refused(uintptr_t addr, int err)
{
    static uint64_t since, last, said;
    uint64_t now = os_now(), before = __atomic_exchange_n(&last, now, __ATOMIC_RELAXED);
    if (now > before && now - before > REFUSED_GAP_NS) {
        __atomic_store_n(&since, now, __ATOMIC_RELAXED);
        return;
    }
    uint64_t when = __atomic_load_n(&said, __ATOMIC_RELAXED);
    if (now - __atomic_load_n(&since, __ATOMIC_RELAXED) < REFUSED_NS || (when && now - when < SAY_EVERY_NS) ||
        !__atomic_compare_exchange_n(&said, &when, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return;
    hmm_log(HMM_LOG_WARNING, "page %#lx cannot come home: its mapping cannot be registered: %s; trying again (%s)",
            (unsigned long)addr, hmm_strerror(err),
            err == -EBUSY    ? "another userfaultfd of the program has it: unregister it there"
            : err == -ENOMEM ? "raise sysctl vm.max_map_count"
                             : "memory of another kind stands there");
}

int mm_register_again(struct mm *mm, uintptr_t addr)
{
    struct os_vma vma;
    const struct region *g = region_find(&mm->regions, addr);
    if (!g || os->vma_query(mm->maps_fd, addr, &vma) || vma.start > addr)
        return -EAGAIN;
    uintptr_t start = vma.start > g->start ? vma.start : g->start, end = vma.end < g->end ? vma.end : g->end;
    int r = os->uffd_register(mm->uffd.fd, start, end - start);
    if (r)
        say_refused(addr, r);
    return r;
}
