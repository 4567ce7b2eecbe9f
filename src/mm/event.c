/* SPDX-License-Identifier: MIT */
/*
 * Reading userfaultfd messages and applying events (fs/userfaultfd.c of the kernel: userfaultfd_unmap_complete, _remove,
 * mremap_userfaultfd_complete).
 *
 * All of it happens under the exclusive address-space lock: the thread that called munmap or madvise goes on as soon as its
 * event is *read*, so nothing may look at entries between the read and the end of the application. The gate is odd meanwhile,
 * for devices that translate without the lock.
 */
#include "mm/event.h"

#include <errno.h>

#include "debug/inject.h"
#include "mm/arm.h"

#define MESSAGES 64

/* Takes the entry away; device pages go to the batch. */
static void drop_page(struct mm *mm, struct block *b, unsigned i, struct limbo *l)
{
    entry_t e = block_entry(b, i);
    if (entry_kind(e) == ENTRY_DEVICE)
        chain_add(&l->chain, entry_id(e), entry_page(e));
    else if (entry_kind(e) == ENTRY_FLIGHT && !mutate("event-drop-flight"))
        mm->flights[entry_id(e)]->home[entry_page(e)] = 0;
    if (entry_kind(e) == ENTRY_FLIGHT) /* whoever lands it does not know this address any more */
        os->uffd_wake(mm->uffd.fd, block_addr(b, i), os_page_size());
    if (e) {
        block_set(b, i, 0);
        stat_add(&mm->stats.dropped, 1);
    }
}

static void drop_range(struct mm *mm, uintptr_t start, uintptr_t end, enum hmm_event_type type, bool unmapped)
{
    struct limbo *l = limbo_filling(mm);
    bool any = false;
    if (mm->fork)
        mm->fork->changing(mm, start, end, 0);
    if (!mutate("event-mark"))
        limbo_mark(mm, l, start, end, type);
    for (struct block *b = pagetable_next(&mm->pt, start, end); b; b = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, end)) {
        for (unsigned i = block_first(b, start); i < block_behind(b, end) && b->used; i++)
            drop_page(mm, b, i, l);
        any = true;
    }
    any |= region_any(&mm->regions, start, end);
    if (unmapped) {
        hide_unmapped(mm, start, end);
        region_cut(&mm->regions, start, end);
    }
    if (any)
        limbo_prune(l, start, end);
    limbo_publish(mm, l);
}

static void owe_unmap(struct mm *mm, struct owed owed)
{
    mm->owes = true;
    for (unsigned i = 0; i < OWED_MAX; i++)
        if (mm->owed[i].start == mm->owed[i].end) {
            mm->owed[i] = owed;
            return;
        }
    hmm_log(HMM_LOG_ERROR, "more than %d unmaps overtaken by remaps: pages of [%#lx, %#lx) may be dropped", OWED_MAX,
            (unsigned long)owed.start, (unsigned long)owed.end);
}

void owed_forget(struct mm *mm)
{
    if (!mm->owes || os->uffd_pending(mm->uffd.fd) != 0 || mutate("owed-stale"))
        return;
    for (unsigned i = 0; i < OWED_MAX; i++)
        mm->owed[i].start = mm->owed[i].end = 0;
    mm->owes = false;
}

/* Nothing stands there: of what was perhaps never registered, no unmap was owed, and this one is of what came there since. */
static bool is_empty(struct mm *mm, uintptr_t start, uintptr_t end)
{
    struct os_vma vma;
    int r = os->vma_query(mm->maps_fd, start, &vma);
    return (r == -ENOENT || (!r && vma.start >= end)) && !mutate("owed-stale");
}

static struct owed *next_owed(struct mm *mm, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < OWED_MAX && mm->owes && !mutate("owed-unmap"); i++)
        if (mm->owed[i].start < mm->owed[i].end && mm->owed[i].start < end && start < mm->owed[i].end)
            return &mm->owed[i];
    return NULL;
}

/* A part of an unmap of which another part was owed: the kernel tells of all that was unmapped, also of what was not registered. So at
 * the target of the remap it is of what stood there before. */
static void unmap_beside(struct mm *mm, const struct owed *owed, uintptr_t start, uintptr_t end)
{
    uintptr_t from = owed->target > start ? owed->target : start, to = owed->target_end < end ? owed->target_end : end;
    if (from >= to || mutate("owed-beside")) {
        mm_event_unmap(mm, start, end);
        return;
    }
    if (start < from)
        mm_event_unmap(mm, start, from);
    if (to < end)
        mm_event_unmap(mm, to, end);
    if (next_owed(mm, from, to) || is_empty(mm, from, to))
        mm_event_unmap(mm, from, to);
}

/* A remap was read before this unmap, which belongs to the old mapping and must not hurt the new one. */
static void pay_owed(struct mm *mm, struct owed *debt, uintptr_t start, uintptr_t end)
{
    struct owed owed = *debt, rest = owed;
    uintptr_t from = owed.start > start ? owed.start : start, to = owed.end < end ? owed.end : end;
    debt->end = from; /* what is left of it: at most two parts */
    rest.start = to;
    if (rest.start < rest.end)
        owe_unmap(mm, rest);
    if (owed.maybe && is_empty(mm, from, to)) {
        mm_event_unmap(mm, start, end);
        return;
    }
    if (start < from)
        unmap_beside(mm, &owed, start, from);
    if (to < end)
        unmap_beside(mm, &owed, to, end);
}

void mm_event_unmap(struct mm *mm, uintptr_t start, uintptr_t end)
{
    lock_assert_held(RANK_AS);
    struct owed *debt = next_owed(mm, start, end);
    if (debt)
        pay_owed(mm, debt, start, end);
    else
        drop_range(mm, start, end, HMM_EVENT_UNMAP, true);
}

/* What is present stays, and is not taken before it is gone: see dropping.c. */
void mm_event_remove(struct mm *mm, uintptr_t start, uintptr_t end)
{
    lock_assert_held(RANK_AS);
    dropping_note(mm, start, end);
    drop_range(mm, start, end, HMM_EVENT_CLEAR, false); /* and looks later what has become of it */
}

/* What is registered at the target of a remap belongs to a mapping whose unmap we have not read yet; also when a remap has taken its
 * pages away, because the unmap of what it leaves is told after it. Of what is not proved that is not certain. */
static void clear_target(struct mm *mm, uintptr_t start, uintptr_t end)
{
    for (struct region *r = region_next(&mm->regions, start); r && r->start < end; r = region_next(&mm->regions, r->end))
        if (r->state != REGION_UNPROVED || !mutate("owed-unproved"))
            owe_unmap(mm, (struct owed){.start = r->start > start ? r->start : start,
                                        .end = r->end < end ? r->end : end,
                                        .target = start,
                                        .target_end = end,
                                        .maybe = r->state == REGION_UNPROVED});
    drop_range(mm, start, end, HMM_EVENT_UNMAP, true);
}

static void move_page(struct mm *mm, struct block *b, unsigned i, uintptr_t to)
{
    entry_t e = block_entry(b, i);
    struct block *d;
    while (!(d = pagetable_get(&mm->pt, to)))
        os_sleep(1000000); /* an event cannot be refused; see block_reserve_must */
    block_reserve_must(&mm->pt, d, 1);
    block_set(b, i, 0);
    block_set(d, block_index(to), e);
    if (entry_kind(e) == ENTRY_DEVICE) {
        page_set_owner(&pagemap_by_id(entry_id(e))->pages[entry_page(e)], to);
        lru_touch(mm, d);
    } else if (entry_kind(e) == ENTRY_FLIGHT) {
        mm->flights[entry_id(e)]->home[entry_page(e)] = to;
        os->uffd_wake(mm->uffd.fd, block_addr(b, i), os_page_size());
    }
}

static void move_entries(struct mm *mm, struct block *b, uintptr_t from, uintptr_t to, size_t len)
{
    for (unsigned i = block_first(b, from); i < block_behind(b, from + len) && b->used; i++)
        if (block_entry(b, i))
            move_page(mm, b, i, block_addr(b, i) - from + to);
}

/* The mapping is registered where it stands now. What it leaves is unmapped, of which we are told later; with MREMAP_DONTUNMAP it stays, and
 * stays registered. */
static void move_regions(struct mm *mm, uintptr_t from, uintptr_t to, size_t len)
{
    uintptr_t end = from + len, part_end;
    struct region *r;
    for (uintptr_t at = from; (r = region_next(&mm->regions, at)) && r->start < end; at = part_end) {
        uintptr_t start = r->start > from ? r->start : from;
        enum region_state state = r->state == REGION_LEFT ? REGION_UNPROVED : r->state;
        bool missing = r->missing;
        part_end = r->end < end ? r->end : end;
        region_cut(&mm->regions, start, part_end);
        if (!mutate("remap-left"))
            region_insert_must(&mm->regions, start, part_end, missing, REGION_LEFT);
        r = region_insert_must(&mm->regions, start - from + to, part_end - from + to, missing, state);
        if (state == REGION_PROVED) /* what moves back in parts becomes one again */
            region_join(&mm->regions, r);
    }
}

void mm_event_remap(struct mm *mm, uintptr_t from, uintptr_t to, size_t len)
{
    lock_assert_held(RANK_AS);
    uintptr_t end = from + len;
    clear_target(mm, to, to + len);
    if (mm->fork)
        mm->fork->changing(mm, from, end, to);
    struct limbo *l = limbo_filling(mm);
    limbo_mark(mm, l, from, end, HMM_EVENT_UNMAP);
    l->remaps++;
    __atomic_fetch_add(&mm->remaps_pending, 1, __ATOMIC_SEQ_CST);
    for (struct block *b = pagetable_next(&mm->pt, from, end); b; b = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, end))
        move_entries(mm, b, from, to, len);
    move_regions(mm, from, to, len);
    hide_moved(mm, from, to, len);
    hide_managed(mm, to, to + len); /* clearing the target may have shown it */
    limbo_prune(l, from, end);
    limbo_publish(mm, l);
}

static void apply(struct mm *mm, const struct uffd_msg *m)
{
    switch (m->event) {
    case UFFD_EVENT_UNMAP:
        stat_add(&mm->stats.events_unmap, 1);
        mm_event_unmap(mm, m->arg.remove.start, m->arg.remove.end);
        break;
    case UFFD_EVENT_REMOVE:
        stat_add(&mm->stats.events_remove, 1);
        mm_event_remove(mm, m->arg.remove.start, m->arg.remove.end);
        break;
    case UFFD_EVENT_REMAP:
        stat_add(&mm->stats.events_remap, 1);
        mm_event_remap(mm, m->arg.remap.from, m->arg.remap.to, m->arg.remap.len);
        break;
    case UFFD_EVENT_FORK:
        stat_add(&mm->stats.events_fork, 1);
        mm->fork->forked(mm, (int)m->arg.fork.ufd);
        break;
    default: hmm_log(HMM_LOG_ERROR, "userfaultfd event %d is not known: ignored", m->event);
    }
}

/* Most often a fork whose descriptor found no room: its event comes again, and its thread waits. No locks held. */
static void wait_for_room(int err)
{
    static uint64_t said;
    uint64_t now = os_now();
    if (now - said > 1000000000ull) {
        said = now;
        if (err == -EMFILE || err == -ENFILE)
            hmm_log(HMM_LOG_ERROR, "a child of fork cannot be given its memory: %s; trying again (ulimit -n)",
                    hmm_strerror(err));
        else
            hmm_log(HMM_LOG_ERROR, "memory events cannot be read: %s; trying again", hmm_strerror(err));
    }
    SEQ_POINT("events-refused");
    os_sleep(10000000);
}

unsigned mm_read_events(struct mm *mm, struct fault *faults, unsigned max, bool *more)
{
    struct uffd_msg msgs[MESSAGES];
    unsigned nfaults = 0, want = max < MESSAGES ? max : MESSAGES;
    rwlock_write_lock(&mm->as);
    uint32_t gate = __atomic_fetch_add(mm->gate, 1, __ATOMIC_SEQ_CST);
    if (mm->fork)
        mm->fork->reading(mm, true);
    owed_forget(mm); /* before: an unmap that is owed keeps an event pending until it has been read */
    int n = os->uffd_read(mm->uffd.fd, msgs, want);
    SEQ_POINT("events-read");
    mm->read_at = n > 0 ? os_now() : 0;
    uint32_t gate_after = gate; /* nothing but faults: as if nobody had looked */
    for (int i = 0; i < n; i++) {
        if (msgs[i].event != UFFD_EVENT_PAGEFAULT) {
            gate_after = gate + 2;
            apply(mm, &msgs[i]);
            continue;
        }
        faults[nfaults++] = (struct fault){
            .addr = msgs[i].arg.pagefault.address & ~(uintptr_t)(os_page_size() - 1),
            .tid = msgs[i].arg.pagefault.feat.ptid,
            .write = msgs[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE,
        };
    }
    if (mm->fork)
        mm->fork->reading(mm, false);
    __atomic_store_n(mm->gate, gate_after, __ATOMIC_SEQ_CST);
    mm->read_at = 0;
    rwlock_write_unlock(&mm->as);
    if (n < 0)
        wait_for_room(n);
    *more = n == (int)want;
    return nfaults;
}
