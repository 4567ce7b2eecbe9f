/* SPDX-License-Identifier: MIT */
/* See change.h. */
#include "process/change.h"

#include <errno.h>
#include <limits.h>

#include "base/futex.h"
#include "debug/inject.h"
#include "migrate/migrate.h"
#include "mm/thread.h"
#include "notifier/changing.h"

#define RELEASE_MAX_NS 1000000000ull /* that an exec or exit waits for devices */
#define FREED_MAX_NS 100000000ull /* that the end of a change waits for device pages to be free: others' events stand before */
#define NO_SLOT_NS 100000ull      /* until one is looked for again */
#define DETACH_MAX ((size_t)1 << 40) /* of a segment whose size is not known yet: what is asked about at first */

/* SILENT: nobody was to be told, and no library thread knows of it. */
enum step { STEP_SILENT, STEP_BEGINNING, STEP_BEGUN, STEP_ENDING, STEP_ENDED };

/* What a slot of changing.h is used for here. The program's thread writes it before it hands it over, and only reads `step` then. */
struct change {
    struct work work;
    enum hmm_change_kind kind;
    uintptr_t start, end;
    struct invalidation inv;
    bool invalidating; /* begun and not ended */
    bool away;         /* the call drops pages that are on a device or in flight */
    bool waits;        /* the thread waits for STEP_ENDED, and leaves the slot */
    uint32_t step;     /* futex */
};

static struct {
    struct mm *mm;
    const uint32_t *alive; /* on a page that fork wipes: not 0 in the process that started */
    int pid;               /* of that process: a child of vfork sees all its memory */
    uint32_t running;      /* atomic */
    uint32_t users;        /* futex: changes that library threads know of */
    struct workers changers, waiters;
    struct change slot[CHANGING_SLOTS];
} changes;

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

/* ---- in library threads ---- */

static void set_step(struct change *c, enum step step)
{
    __atomic_store_n(&c->step, step, __ATOMIC_SEQ_CST);
    futex_wake(&c->step, INT_MAX);
}

static void drop_user(void)
{
    if (__atomic_sub_fetch(&changes.users, 1, __ATOMIC_SEQ_CST) == 0)
        futex_wake(&changes.users, INT_MAX);
}

static void finish(struct change *c)
{
    if (c->kind == HMM_CHANGE_CLEAR) /* the call has returned */
        mm_dropped(changes.mm, c->start, c->end);
    if (c->away && !mutate("change-freed"))
        mm_limbo_wait(changes.mm, FREED_MAX_NS);
    if (c->invalidating)
        notifier_end(&changes.mm->notifiers, &c->inv);
    if (c->waits) {
        set_step(c, STEP_ENDED);
        return;
    }
    changing_leave((int)(c - changes.slot));
    drop_user();
}

static void finish_work(struct work *work, unsigned worker)
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

/* Whether the block has an entry of this kind in the range; ENTRY_NONE: any entry. Caller holds mm->as. */
static bool block_has(struct block *b, uintptr_t start, uintptr_t end, enum entry_kind kind)
{
    bool found = false;
    unsigned i = start <= b->base ? 0 : block_index(start);
    unsigned behind = end >= b->base + OS_BLOCK_SIZE ? block_pages() : block_index(end);
    mutex_lock(&b->lock);
    for (; i < behind && b->used && !found; i++) {
        entry_t e = block_entry(b, i);
        found = kind == ENTRY_NONE ? e != 0 : entry_kind(e) == kind;
    }
    mutex_unlock(&b->lock);
    return found;
}

/* *landings, as it was then, is for flight_wait(). */
static bool range_has(struct mm *mm, uintptr_t start, uintptr_t end, enum entry_kind kind, uint32_t *landings)
{
    bool found = false;
    rwlock_read_lock(&mm->as);
    *landings = __atomic_load_n(&mm->landings, __ATOMIC_SEQ_CST);
    for (struct block *b = pagetable_next(&mm->pt, start, end); b && !found;
         b = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, end))
        found = block_has(b, start, end, kind);
    rwlock_read_unlock(&mm->as);
    return found;
}

static bool is_away(struct mm *mm, uintptr_t start, uintptr_t end)
{
    uint32_t unused;
    return range_has(mm, start, end, ENTRY_NONE, &unused);
}

/* No page of the range leaves for a device any more: changing_keeps_off() is asked under mm->as. What is already on its way is met there.
 * A page that is pinned on its device stays. */
static void bring_home(struct mm *mm, uintptr_t start, uintptr_t end)
{
    uint32_t landings;
    rwlock_write_lock(&mm->as); /* whoever asked before we said so has taken its pages */
    rwlock_write_unlock(&mm->as);
    while (range_has(mm, start, end, ENTRY_FLIGHT, &landings))
        flight_wait(mm, landings);
    migrate_range_to_system(mm, NULL, start, end, NULL);
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
    notifier_call(&changes.mm->notifiers, &c->inv, NOTIFIER_WAIT);
    prepare(c);
    begun(c);
}

/* What shmdt will unmap: mapped as one, and cut by nobody but the program itself. */
static void find_segment(struct change *c)
{
    struct os_vma vma;
    bool found = os->vma_query(changes.mm->maps_fd, c->start, &vma) == 0 && vma.start <= c->start;
    c->end = found ? vma.end : c->start + os_page_size();
}

static void begin_work(struct work *work, unsigned worker)
{
    (void)worker;
    struct change *c = container_of(work, struct change, work);
    if (c->kind == HMM_CHANGE_DETACH)
        find_segment(c);
    if (matters_to_nobody(c)) {
        begun(c);
        return;
    }
    stat_add(counter_of(c->kind), 1);
    c->invalidating = true;
    notifier_begin(&changes.mm->notifiers, &c->inv, c->start, c->end, type_of(c->kind), NULL);
    bool told = mutate("change-call") || notifier_call(&changes.mm->notifiers, &c->inv, NOTIFIER_BRIEFLY) == 0;
    if (told && c->kind != HMM_CHANGE_GUARD) {
        prepare(c);
        begun(c);
        return;
    }
    work_init(&c->work, wait_for_devices);
    workers_queue(&changes.waiters, &c->work);
}

/* ---- in the program's threads ---- */

/* Widens to pages. False: nothing, or it wraps. */
static bool widen(enum hmm_change_kind kind, uintptr_t addr, size_t len, uintptr_t *start, uintptr_t *end)
{
    uintptr_t mask = ~(uintptr_t)(os_page_size() - 1);
    if (kind == HMM_CHANGE_RELEASE)
        addr = 0, len = mask;
    if (kind == HMM_CHANGE_DETACH)
        len = addr < UINTPTR_MAX - DETACH_MAX ? DETACH_MAX : 0;
    *start = addr & mask;
    *end = (addr + len + ~mask) & mask;
    return len && addr + len >= addr && *end > *start;
}

/* Library threads change memory of their own and of the program's in steps that have their own rules; who holds a lock must not wait. */
static bool is_inside(void)
{
    return signals_in_library_thread() || lock_held_ranks();
}

static bool is_running(void)
{
    const uint32_t *alive = __atomic_load_n(&changes.alive, __ATOMIC_ACQUIRE);
    return __atomic_load_n(&changes.running, __ATOMIC_SEQ_CST) && alive && __atomic_load_n(alive, __ATOMIC_RELAXED);
}

/* The manager stays until drop_user(). */
static bool add_user(void)
{
    if (os_pid() != changes.pid) /* a child of vfork: its own threads of control are not ours to stop */
        return false;
    __atomic_fetch_add(&changes.users, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&changes.running, __ATOMIC_SEQ_CST))
        return true;
    drop_user();
    return false;
}

static int enter(uintptr_t start, uintptr_t end)
{
    int s;
    while ((s = changing_enter(start, end)) < 0)
        os_sleep(NO_SLOT_NS);
    return s;
}

/* By name, where it is known. */
static void complain(void)
{
    struct notifier_overdue o;
    char text[256] = "a device";
    if (notifier_overdue(&changes.mm->notifiers, NULL, RELEASE_MAX_NS / 2, &o))
        notifier_overdue_text(&changes.mm->notifiers, &o, text, sizeof(text));
    hmm_log(HMM_LOG_WARNING, "exec or exit: not waited any longer for devices to let go: %s", text);
}

static void wait_begun(struct change *c)
{
    uint64_t since = os_now();
    bool release = c->kind == HMM_CHANGE_RELEASE;
    while (__atomic_load_n(&c->step, __ATOMIC_SEQ_CST) == STEP_BEGINNING) {
        if (release && os_now() - since > RELEASE_MAX_NS) {
            complain();
            return;
        }
        futex_wait(&c->step, STEP_BEGINNING, release ? (int64_t)(RELEASE_MAX_NS / 10) : -1);
    }
}

uint32_t change_begin(enum hmm_change_kind kind, uintptr_t addr, size_t len)
{
    uintptr_t start, end;
    if (!is_running() || !widen(kind, addr, len, &start, &end) || is_inside())
        return CHANGE_NONE;
    int s = enter(start, end);
    struct change *c = &changes.slot[s];
    c->step = STEP_SILENT;
    if (!changing_matters(start, end)) {
        SEQ_POINT("change-silent");
        return (uint32_t)s;
    }
    if (!add_user()) {
        changing_leave(s);
        return CHANGE_NONE;
    }
    c->kind = kind;
    c->start = start;
    c->end = end;
    c->invalidating = c->away = c->waits = false;
    __atomic_store_n(&c->step, STEP_BEGINNING, __ATOMIC_SEQ_CST);
    changing_announce(s);
    work_init(&c->work, begin_work);
    workers_queue(&changes.changers, &c->work);
    wait_begun(c);
    SEQ_POINT("change-made");
    return (uint32_t)s;
}

void change_end(uint32_t s)
{
    if (s >= CHANGING_SLOTS)
        return;
    struct change *c = &changes.slot[s];
    uint32_t step = __atomic_load_n(&c->step, __ATOMIC_SEQ_CST);
    if (step == STEP_SILENT) {
        changing_leave((int)s);
        return;
    }
    changing_made((int)s);
    bool waits = step == STEP_BEGUN && c->away;
    c->waits = waits;
    if (__atomic_exchange_n(&c->step, STEP_ENDING, __ATOMIC_SEQ_CST) == STEP_BEGINNING)
        return; /* it was not waited for: whoever finishes the beginning ends it */
    work_init(&c->work, finish_work);
    workers_queue(&changes.changers, &c->work);
    if (!waits)
        return;
    while (__atomic_load_n(&c->step, __ATOMIC_SEQ_CST) == STEP_ENDING)
        futex_wait(&c->step, STEP_ENDING, -1);
    changing_leave((int)s);
    drop_user();
}

/* ---- life ---- */

int change_start(struct mm *mm, const uint32_t *alive, unsigned n)
{
    int r = changing_start();
    if (r)
        return r;
    changes.mm = mm;
    changes.pid = os_pid();
    r = workers_start(&changes.changers, "hmm-change", n);
    if (r)
        return r;
    r = workers_start(&changes.waiters, "hmm-change-wait", n);
    if (r) {
        workers_stop(&changes.changers);
        return r;
    }
    __atomic_store_n(&changes.alive, alive, __ATOMIC_RELEASE);
    __atomic_store_n(&changes.running, 1, __ATOMIC_SEQ_CST);
    return 0;
}

void change_stop(void)
{
    __atomic_store_n(&changes.running, 0, __ATOMIC_SEQ_CST);
    for (uint32_t n; (n = __atomic_load_n(&changes.users, __ATOMIC_SEQ_CST)) != 0;)
        futex_wait(&changes.users, n, -1);
    workers_stop(&changes.waiters);
    workers_stop(&changes.changers);
}

void change_forget(void)
{
    changes.running = 0;
    changes.users = 0;
    changing_forget();
}
