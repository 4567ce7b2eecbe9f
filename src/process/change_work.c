/* SPDX-License-Identifier: MIT */
/* The steps of a change that library threads make; see change.h. */
#include "process/change_work.h"

#include <errno.h>
#include <limits.h>

#include "base/error.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "migrate/migrate.h"
#include "process/crew.h"

#define FREED_MAX_NS 100000000ull /* that the end of a change waits for device pages to be free: others' events stand before */
#define HOME_MAX_NS 1000000000ull /* that guards wait for pages to come home, where it fails */
#define HOME_STEP_NS 100000ull
#define NEIGHBOURS_MAX 64 /* mappings that are looked at behind one of a segment, for another of it */

struct changes changes;

static enum hmm_event_type type_of(enum hmm_change_kind kind)
{
    switch (kind) {
    case HMM_CHANGE_CLEAR:
    case HMM_CHANGE_GUARD: return HMM_EVENT_CLEAR;
    case HMM_CHANGE_PROTECT: return HMM_EVENT_PROTECTION_VMA;
    case HMM_CHANGE_RELEASE: return HMM_EVENT_RELEASE;
    default: return HMM_EVENT_UNMAP;
    }
}

static uint64_t *counter_of(enum hmm_change_kind kind)
{
    struct mm_stats *stats = &changes.mm->stats;
    switch (kind) {
    case HMM_CHANGE_CLEAR:
    case HMM_CHANGE_GUARD: return &stats->calls_remove;
    case HMM_CHANGE_REMAP: return &stats->calls_remap;
    case HMM_CHANGE_PROTECT: return &stats->calls_protect;
    case HMM_CHANGE_RELEASE: return &stats->calls_release;
    default: return &stats->calls_unmap;
    }
}

static void set_step(struct change *c, enum change_step step)
{
    __atomic_store_n(&c->step, step, __ATOMIC_SEQ_CST);
    futex_wake(&c->step, INT_MAX);
}

void change_drop_user(void)
{
    if (__atomic_sub_fetch(&changes.users, 1, __ATOMIC_SEQ_CST) == 0)
        futex_wake(&changes.users, INT_MAX);
}

/* Counted from when the call returned, however long the change stood in the queue: finishers never grow in number. */
static void wait_freed(const struct change *c)
{
    uint64_t now = os_now(), until = (mutate("change-bound") ? now : c->made) + FREED_MAX_NS;
    if (now < until && !mutate("change-freed"))
        mm_limbo_wait(changes.mm, until - now);
}

static void finish(struct change *c)
{
    SEQ_POINT("change-finish");
    if (c->kind == HMM_CHANGE_CLEAR) /* the call has returned: what another has dropped since is not its business */
        mm_dropped(changes.mm, c->start, c->end, c->made);
    if (c->away)
        wait_freed(c);
    if (c->invalidating)
        notifier_end(&changes.mm->notifiers, &c->inv);
    if (c->waits) {
        set_step(c, STEP_ENDED);
        return;
    }
    changing_leave((int)(c - changes.slot));
    change_drop_user();
}

void change_finish(struct work *work, unsigned worker)
{
    (void)worker;
    finish(container_of(work, struct change, work));
}

/* The program's thread goes on; or it does not wait any more, and has ended the change. */
static void begun(struct change *c)
{
    uint32_t beginning = STEP_BEGINNING;
    SEQ_POINT("change-begun");
    if (__atomic_compare_exchange_n(&c->step, &beginning, STEP_BEGUN, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        futex_wake(&c->step, INT_MAX);
    else
        finish(c);
}

static bool nobody(uintptr_t start, uintptr_t end, void *arg)
{
    (void)arg;
    struct mm *mm = changes.mm;
    return !region_any(&mm->regions, start, end) && !pagetable_next(&mm->pt, start, end) &&
           !notifier_any(&mm->notifiers, start, end);
}

/* The map of memory that matters is coarse, and only ever grows by itself: what was nobody's is taken out of it here. */
static bool matters_to_nobody(struct change *c)
{
    struct mm *mm = changes.mm;
    rwlock_read_lock(&mm->as);
    bool yes = nobody(c->start, c->end, NULL);
    if (yes)
        changing_unmark(c->start, c->end, nobody, NULL);
    rwlock_read_unlock(&mm->as);
    return yes;
}

static bool is_away(struct mm *mm, uintptr_t start, uintptr_t end)
{
    return mm_range_has(mm, start, end, ENTRY_NONE);
}

/* No page of the range leaves for a device any more: changing_keeps_off() is asked under mm->as. A page that is pinned on its device
 * stays. */
static void bring_home(struct mm *mm, uintptr_t start, uintptr_t end)
{
    mm_land_range(mm, start, end);
    uint64_t since = os_now();
    int r;
    while ((r = migrate_range_to_system(mm, NULL, start, end, NULL)) != 0 && is_away(mm, start, end)) {
        if (os_now() - since > HOME_MAX_NS || mutate("change-home")) {
            hmm_log(HMM_LOG_WARNING,
                    "guards are made over [%#lx, %#lx), of which pages stay on a device: %s; they are back when the guards are "
                    "removed",
                    (unsigned long)start, (unsigned long)end, hmm_strerror(r));
            return;
        }
        os_sleep(HOME_STEP_NS);
    }
}

/* Devices have let go. */
static void prepare(struct change *c)
{
    struct mm *mm = changes.mm;
    switch (c->kind) {
    case HMM_CHANGE_UNMAP:
    case HMM_CHANGE_REMAP:
    case HMM_CHANGE_DETACH:
        c->away = is_away(mm, c->start, c->end);
        if (!c->away && !mutate("change-release")) /* an event would cost more than the call */
            mm_release(mm, c->start, c->end);
        break;
    case HMM_CHANGE_CLEAR: c->away = is_away(mm, c->start, c->end); break;
    case HMM_CHANGE_GUARD:
        if (is_away(mm, c->start, c->end) && !mutate("change-guard"))
            bring_home(mm, c->start, c->end);
        break;
    default: break;
    }
}

static void wait_for_devices(struct work *work, unsigned worker)
{
    (void)worker;
    struct change *c = container_of(work, struct change, work);
    crew_grow(); /* ahead of the next, which may come from an allocator that a new thread would need */
    notifier_call(&changes.mm->notifiers, &c->inv, NOTIFIER_WAIT);
    prepare(c);
    begun(c);
}

/* What shmdt will unmap: every mapping of the segment that stands where it does in the segment, although the program may have cut it, or
 * unmapped parts. */
static void find_segment(struct change *c)
{
    struct os_vma v, first = {0};
    uintptr_t at = c->start, most = c->end;
    c->end = c->start + os_page_size();
    for (unsigned others = 0; others < NEIGHBOURS_MAX && at < most; others++, at = v.end) {
        if (os->vma_query(changes.mm->maps_fd, at, &v) || v.start >= most)
            break;
        bool here = v.shared && !v.anonymous && v.start >= c->start && v.offset == v.start - c->start;
        if (!here || (first.end && (v.inode != first.inode || v.device != first.device)))
            continue;
        first = v;
        c->end = v.end;
        others = 0;
    }
}

/* The kernel rounds lengths up to the pages of the mapping. */
static void widen_to_huge(struct change *c)
{
    struct os_vma v;
    if (os->vma_query(changes.mm->maps_fd, c->source, &v) == 0 && v.start <= c->source && v.page_size > os_page_size())
        c->end = (c->end + v.page_size - 1) & ~(uintptr_t)(v.page_size - 1);
}

static void find_range(struct change *c)
{
    if (c->kind == HMM_CHANGE_DETACH)
        find_segment(c);
    else if (c->source)
        widen_to_huge(c);
    else
        return;
    changing_narrow((int)(c - changes.slot), c->start, c->end);
}

void change_ask(struct work *work, unsigned worker)
{
    (void)worker;
    struct change *c = container_of(work, struct change, work);
    find_range(c);
    /* Before it is known whether anybody is there: who comes later does not wait for the slot any more, but for this. */
    c->invalidating = !mutate("change-unseen");
    notifier_begin(&changes.mm->notifiers, &c->inv, c->start, c->end, type_of(c->kind), NULL);
    if (!c->invalidating)
        notifier_end(&changes.mm->notifiers, &c->inv);
    if (!c->inv.marked && matters_to_nobody(c)) {
        begun(c);
        return;
    }
    stat_add(counter_of(c->kind), 1);
    bool told = mutate("change-call") || notifier_call(&changes.mm->notifiers, &c->inv, NOTIFIER_BRIEFLY) == 0;
    if (told && c->kind != HMM_CHANGE_GUARD) {
        prepare(c);
        begun(c);
        return;
    }
    work_init(&c->work, wait_for_devices);
    crew_queue(CREW_WAITERS, &c->work);
}
