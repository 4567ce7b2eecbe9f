/* SPDX-License-Identifier: MIT */
/*
 * Which memory of the program is managed: registered with our userfaultfd (MISSING mode) and MADV_DONTFORK, block by block,
 * only while something of the block is away. Arming takes the mmap lock for writing, so a block that is armed is not armed
 * again; disarming gives the program native faults back (design fact 15).
 *
 * DONTFORK: until fork is handled, a child can crash on managed memory but never read zeros for data. Disarming sets DOFORK,
 * also where the program itself had asked for DONTFORK: the kernel offers no cheap way to ask (docs/api.md says so).
 */
#include <errno.h>

#include "debug/inject.h"
#include "mm/mm.h"
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

static bool near_tcb(uintptr_t addr, uintptr_t tcb)
{
    uintptr_t mask = ~(uintptr_t)(os_page_size() - 1);
    return addr >= ((tcb - TCB_BELOW) & mask) && addr <= ((tcb + TCB_ABOVE) & mask);
}

/* The main thread's control block stands in memory that may also be the program's; other threads' in their stacks. */
static bool is_tcb(uintptr_t addr, const struct tcb_list *tcbs)
{
    return tcbs->n > 0 && near_tcb(addr, tcbs->at[0]);
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

/* Cuts [addr, *part_end) where an own mapping begins; true: it begins here. */
static bool is_own(uintptr_t addr, uintptr_t *part_end)
{
    uintptr_t start, end;
    if (!own_overlap(addr, *part_end, &start, &end))
        return false;
    if (start > addr) {
        *part_end = start;
        return false;
    }
    if (end < *part_end)
        *part_end = end;
    return true;
}

/* How far from addr the same answer to is_tcb holds; cheap when no control block is in the block. */
static uintptr_t tcb_part_end(uintptr_t addr, uintptr_t end, const struct tcb_list *tcbs)
{
    bool answer = is_tcb(addr, tcbs);
    uintptr_t tcb = tcbs->n ? tcbs->at[0] : 0, far = TCB_BELOW + os_page_size();
    if (!answer && (tcb + far < addr || tcb > end + far))
        return end;
    uintptr_t at = addr + os_page_size();
    while (at < end && is_tcb(at, tcbs) == answer)
        at += os_page_size();
    return at;
}

enum arm_verdict mm_verdict(struct mm *mm, uintptr_t addr, uintptr_t end, const struct tcb_list *tcbs, uintptr_t *part_end)
{
    struct os_vma vma;
    *part_end = end;
    int r = os->vma_query(mm->maps_fd, addr, &vma);
    if (r && r != -ENOENT)
        return ARM_UNMOVABLE; /* not known: it stays */
    if (r || vma.start >= end)
        return ARM_UNMAPPED;
    if (vma.start > addr) {
        *part_end = vma.start;
        return ARM_UNMAPPED;
    }
    if (vma.end < end)
        *part_end = vma.end;
    if (!vma.anonymous || vma.shared || !vma.read || !vma.write || vma.exec || vma.stack || vma.special)
        return ARM_UNMOVABLE;
    if (holds_stack_or_state(mm, &vma, tcbs) || is_own(addr, part_end))
        return ARM_UNMOVABLE;
    *part_end = tcb_part_end(addr, *part_end, tcbs);
    return is_tcb(addr, tcbs) ? ARM_UNMOVABLE : ARM_OK;
}

/*
 * Whether the one mapping that covers the part is registered with us: giving a zero page says so. EEXIST: it is, and a page is there;
 * ENOENT: it is not; EAGAIN: an event is pending. Where it succeeds, an absent page became a zero page: the same to the program.
 */
static int prove_registered(struct mm *mm, const struct block *b, uintptr_t start, uintptr_t end)
{
    for (uintptr_t at = start; at < end; at += os_page_size()) {
        if (block_entry(b, block_index(at)))
            continue; /* missing on purpose: not to be filled */
        int64_t r = os->uffd_zeropage(mm->uffd.fd, at, os_page_size());
        return r > 0 || r == -EEXIST ? 0 : r == -EAGAIN || r == -ENOENT ? -EAGAIN : (int)r;
    }
    return 0;
}

/*
 * Between looking at the mapping and registering it, it may have been unmapped, and another may stand there after: registering a hole
 * succeeds, and what is mapped into it later would raise no event and read as zeros while its pages are away. So it is looked at
 * again afterwards, and its registration proved. From then on every change of it is an event.
 */
int mm_arm(struct mm *mm, struct block *b, uintptr_t start, uintptr_t end)
{
    unsigned i = block_index(start), n = (end - start) >> os_page_shift();
    struct os_vma vma;
    if (block_is_armed(b, i, n))
        return 0;
    if (os->uffd_register(mm->uffd.fd, start, end - start))
        return -EINVAL;
    bool before = b->unproved;
    b->unproved = true;
    if (mutate("arm-unproved"))
        goto armed;
    if (os->vma_query(mm->maps_fd, start, &vma) || vma.start > start || vma.end < end)
        return -EAGAIN;
    int r = prove_registered(mm, b, start, end);
    if (r)
        return r;
armed:
    /* A child must not get the range without its missing pages. */
    if (!mutate("dontfork") && os->advise((void *)start, end - start, OS_ADVISE_DONTFORK))
        return -EINVAL;
    block_arm(b, i, n, true);
    b->unproved = before;
    return 0;
}

/* Mapping by mapping: one that cannot be registered would make the kernel refuse the whole range. */
static int disarm_run(struct mm *mm, uintptr_t start, uintptr_t end)
{
    int first = 0;
    for (uintptr_t at = start; at < end;) {
        struct os_vma vma;
        int r = os->vma_query(mm->maps_fd, at, &vma);
        if (r == -ENOENT || (!r && vma.start >= end))
            break;
        if (r)
            return r;
        uintptr_t from = vma.start > at ? vma.start : at, to = vma.end < end ? vma.end : end;
        if (vma.anonymous && !vma.shared) {
            r = os->uffd_unregister(mm->uffd.fd, from, to - from);
            if (!r)
                os->advise((void *)from, to - from, OS_ADVISE_DOFORK);
            first = first ? first : r;
        }
        at = to;
    }
    return first;
}

/*
 * An unread event means that something else may stand in the armed part by now: a remap may have brought missing pages there,
 * and unregistering would turn them into zeros. Then the block stays, and is looked at again later. An event that came in between
 * is seen afterwards, and the registration taken again at once; two adjacent system calls are the least that is left to chance.
 */
bool mm_disarm(struct mm *mm, struct block *b)
{
    lock_assert_held(RANK_AS);
    unsigned i = 0, n = block_armed_run(b, &i);
    if (n && os->uffd_pending(mm->uffd.fd) != 0)
        return false;
    for (; n; i += n, n = block_armed_run(b, &i)) {
        uintptr_t start = block_addr(b, i), end = block_addr(b, i + n);
        b->unproved = true; /* until it is known what is registered */
        block_arm(b, i, n, false);
        int r = disarm_run(mm, start, end);
        if (os->uffd_pending(mm->uffd.fd) != 0) {
            os->uffd_register(mm->uffd.fd, start, end - start);
            return false;
        }
        if (r)
            return false;
    }
    lru_remove(mm, b);
    pagetable_remove(&mm->pt, b);
    return true;
}

void mm_trim(struct mm *mm, uintptr_t addr)
{
    rwlock_read_lock(&mm->as); /* most often there is nothing to do: do not stop everybody to find out */
    struct block *b = pagetable_find(&mm->pt, addr);
    bool unused = false;
    if (b) {
        mutex_lock(&b->lock);
        unused = b->used == 0;
        mutex_unlock(&b->lock);
    }
    rwlock_read_unlock(&mm->as);
    if (!unused)
        return;
    rwlock_write_lock(&mm->as);
    b = pagetable_find(&mm->pt, addr);
    if (b && b->used == 0)
        mm_disarm(mm, b);
    rwlock_write_unlock(&mm->as);
}

void mm_prune(struct mm *mm, uintptr_t start, uintptr_t end)
{
    rwlock_write_lock(&mm->as);
    struct block *next;
    for (struct block *b = pagetable_next(&mm->pt, start, end); b; b = next) {
        next = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, end);
        if (b->used == 0)
            mm_disarm(mm, b);
    }
    rwlock_write_unlock(&mm->as);
}
