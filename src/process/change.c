/* SPDX-License-Identifier: MIT */
/* See change.h. */
#include "process/change.h"

#include <errno.h>
#include <stdio.h>

#include "base/error.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "process/change_work.h"
#include "process/crew.h"

#define RELEASE_MAX_NS 1000000000ull /* that an exec or exit waits for devices */
#define NO_SLOT_NS 100000ull         /* until one is looked for again */
#define STEP_NS 100000000ll          /* of a wait: a handler may have forked meanwhile, and nobody wakes the child */
#define DETACH_MAX ((size_t)1 << 40) /* of a segment whose size is not known yet: what is asked about at first */

static struct {
    const uint32_t *alive; /* on a page that fork wipes: not 0 in the process that started */
    int pid;               /* of that process: a child of vfork sees all its memory */
    uint32_t running;      /* atomic: changes enter slots */
    uint32_t accepting;    /* atomic: those that matter go to library threads */
} life;

/* Changes that this thread has begun and not ended. */
static __thread unsigned mine __attribute__((tls_model("initial-exec")));

/* Slots for its first, second and third: who waits for one more must not keep others from the same. */
static const unsigned slots_for[] = {CHANGING_SLOTS - 32, CHANGING_SLOTS - 8, CHANGING_SLOTS};

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

/* Of huge pages mremap takes whole ones. No more is asked about for it: the marks of changing.h are as coarse. */
static uintptr_t round_up_to_huge(uintptr_t end)
{
    uintptr_t up = (end + OS_BLOCK_SIZE - 1) & BLOCK_MASK;
    return up > end && !mutate("change-huge") ? up : end;
}

/* Library threads change memory of their own and of the program's in steps that have their own rules; who holds a lock must not wait. */
static bool is_inside(void)
{
    return signals_in_library_thread() || lock_held_ranks();
}

static bool is_running(void)
{
    const uint32_t *alive = __atomic_load_n(&life.alive, __ATOMIC_ACQUIRE);
    return __atomic_load_n(&life.running, __ATOMIC_SEQ_CST) && alive && __atomic_load_n(alive, __ATOMIC_RELAXED);
}

/* A signal handler may have forked since the change began. */
static bool in_child(void)
{
    return !__atomic_load_n(life.alive, __ATOMIC_RELAXED) && !mutate("change-child");
}

/* The manager stays until change_drop_user(). */
static bool add_user(void)
{
    __atomic_fetch_add(&changes.users, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&life.accepting, __ATOMIC_SEQ_CST))
        return true;
    change_drop_user();
    return false;
}

/* By name, where it is known. */
static void complain(void)
{
    struct notifier_overdue o;
    char text[256] = "a device";
    if (notifier_overdue(&changes.mm->notifiers, NULL, RELEASE_MAX_NS / 2, &o))
        notifier_overdue_text(&changes.mm->notifiers, &o, text, sizeof(text));
    log_later(HMM_LOG_WARNING, "exec or exit: not waited any longer for devices to let go: %s", text);
}

/* -1: none came free in the time that this change may wait. */
static int enter(enum hmm_change_kind kind, uintptr_t start, uintptr_t end)
{
    int s;
    unsigned nth = mutate("change-nested") || mine >= ARRAY_LEN(slots_for) ? ARRAY_LEN(slots_for) - 1 : mine;
    for (uint64_t since = 0; (s = changing_enter_below(start, end, slots_for[nth])) < 0; os_sleep(NO_SLOT_NS)) {
        uint64_t now = os_now();
        since = since ? since : now;
        if (in_child())
            return -1;
        if (kind != HMM_CHANGE_RELEASE || now - since <= RELEASE_MAX_NS)
            continue;
        if (add_user()) {
            complain();
            change_drop_user();
        }
        return -1;
    }
    return s;
}

/* Whether this thread has begun such a change of more: each call under libhmm-preload.so that was made as hmm_munmap() or its like
 * comes by a second time. */
static bool is_covered(enum hmm_change_kind kind, uintptr_t start, uintptr_t end)
{
    void *me = __builtin_thread_pointer();
    for (int s = 0; s < CHANGING_SLOTS && !mutate("change-twice"); s++) {
        const struct change *c = &changes.slot[s];
        if (__atomic_load_n(&c->owner, __ATOMIC_RELAXED) != me || c->kind != kind || c->start > start || !changing_stands(s))
            continue;
        uint32_t step = __atomic_load_n(&c->step, __ATOMIC_SEQ_CST);
        bool whole = kind == HMM_CHANGE_DETACH ? c->start == start : end <= c->end;
        if (whole && (step == STEP_SILENT || step == STEP_BEGUN || kind == HMM_CHANGE_RELEASE))
            return true;
    }
    return false;
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
        if (futex_wait(&c->step, STEP_BEGINNING, STEP_NS) == -ETIMEDOUT)
            crew_grow();
        if (in_child())
            return;
    }
}

/* Owned from here on. */
static struct change *take_slot(int s, enum hmm_change_kind kind, uintptr_t start, uintptr_t end, uintptr_t source)
{
    struct change *c = &changes.slot[s];
    c->kind = kind;
    c->start = start;
    c->end = end;
    c->source = source;
    __atomic_store_n(&c->step, STEP_SILENT, __ATOMIC_SEQ_CST);
    __atomic_store_n(&c->owner, __builtin_thread_pointer(), __ATOMIC_RELAXED);
    mine++;
    if (kind == HMM_CHANGE_GUARD) /* no event tells of it: what leaves meanwhile would be under the guards */
        changing_apart(s);
    return c;
}

static void disown(struct change *c)
{
    if (__atomic_exchange_n(&c->owner, NULL, __ATOMIC_RELAXED) == __builtin_thread_pointer() && mine)
        mine--;
}

static uint32_t begin(enum hmm_change_kind kind, uintptr_t addr, size_t len, uintptr_t source)
{
    uintptr_t start, end;
    if (!is_running() || !widen(kind, addr, len, &start, &end) || is_inside() || (mine && is_covered(kind, start, end)))
        return CHANGE_NONE;
    int s = enter(kind, start, source ? round_up_to_huge(end) : end);
    if (s < 0)
        return CHANGE_NONE;
    struct change *c = take_slot(s, kind, start, end, source);
    if (!changing_matters(start, end)) {
        SEQ_POINT("change-silent");
        return (uint32_t)s;
    }
    if (os_pid() != life.pid) { /* a child of vfork: its own threads of control are not ours to stop */
        disown(c);
        changing_leave(s);
        return CHANGE_NONE;
    }
    if (!add_user()) /* the last device ends: who comes with a new one waits for the slot */
        return (uint32_t)s;
    c->invalidating = c->away = c->waits = false;
    __atomic_store_n(&c->step, STEP_BEGINNING, __ATOMIC_SEQ_CST);
    changing_narrow(s, start, end); /* of what is beyond it the asker tells, if it is the kernel's */
    changing_announce(s);
    work_init(&c->work, change_ask);
    crew_queue(CREW_ASKERS, &c->work);
    wait_begun(c);
    SEQ_POINT("change-made");
    return (uint32_t)s;
}

uint32_t change_begin(enum hmm_change_kind kind, uintptr_t addr, size_t len)
{
    return begin(kind, addr, len, kind == HMM_CHANGE_REMAP ? addr : 0);
}

uint32_t change_begin_target(uintptr_t addr, size_t len, uintptr_t source)
{
    return begin(HMM_CHANGE_UNMAP, addr, len, source);
}

void change_end(uint32_t s)
{
    if (s >= CHANGING_SLOTS)
        return;
    struct change *c = &changes.slot[s];
    uint32_t step = __atomic_load_n(&c->step, __ATOMIC_SEQ_CST);
    disown(c);
    if (step == STEP_SILENT) {
        changing_leave((int)s);
        return;
    }
    if (in_child() || step == STEP_ENDED) /* nobody is there to end it; with its first device the child forgets it */
        return;
    c->made = os_now();
    changing_made((int)s);
    bool waits = step == STEP_BEGUN && c->away;
    c->waits = waits;
    if (__atomic_exchange_n(&c->step, STEP_ENDING, __ATOMIC_SEQ_CST) == STEP_BEGINNING)
        return; /* it was not waited for: whoever finishes the beginning ends it */
    work_init(&c->work, change_finish);
    crew_queue(CREW_FINISHERS, &c->work);
    if (!waits)
        return;
    while (__atomic_load_n(&c->step, __ATOMIC_SEQ_CST) == STEP_ENDING) {
        futex_wait(&c->step, STEP_ENDING, STEP_NS);
        if (in_child())
            return;
    }
    changing_leave((int)s);
    change_drop_user();
}

/* ---- life ---- */

int change_start(struct mm *mm, const uint32_t *alive, unsigned n)
{
    int r = changing_start();
    if (r)
        return r;
    changes.mm = mm;
    life.pid = os_pid();
    r = crew_start(n);
    if (r)
        return r;
    __atomic_store_n(&life.alive, alive, __ATOMIC_RELEASE);
    __atomic_store_n(&life.running, 1, __ATOMIC_SEQ_CST);
    return 0;
}

void change_accept(bool on)
{
    __atomic_store_n(&life.accepting, on, __ATOMIC_SEQ_CST);
}

bool change_quiet(int64_t timeout_ns)
{
    uint32_t n = __atomic_load_n(&changes.users, __ATOMIC_SEQ_CST);
    if (n)
        futex_wait(&changes.users, n, timeout_ns);
    return __atomic_load_n(&changes.users, __ATOMIC_SEQ_CST) == 0;
}

void change_text(char *buf, size_t size)
{
    snprintf(buf, size, "a change that was announced has not ended");
    for (int s = 0; s < CHANGING_SLOTS; s++) {
        const struct change *c = &changes.slot[s];
        if (__atomic_load_n(&c->owner, __ATOMIC_RELAXED) && __atomic_load_n(&c->step, __ATOMIC_SEQ_CST) != STEP_SILENT)
            snprintf(buf, size, "a change of [%#lx, %#lx) was announced and has not ended", (unsigned long)c->start,
                     (unsigned long)c->end);
    }
}

void change_stop(void)
{
    change_accept(false);
    __atomic_store_n(&life.running, 0, __ATOMIC_SEQ_CST);
    while (!change_quiet(-1))
        ;
    crew_stop();
}

void change_forget(void)
{
    life.running = life.accepting = 0;
    changes.users = 0;
    crew_forget();
    for (int s = 0; s < CHANGING_SLOTS; s++) {
        changes.slot[s].owner = NULL;
        changes.slot[s].step = STEP_ENDED;
    }
    mine = 0;
    changing_forget();
}
