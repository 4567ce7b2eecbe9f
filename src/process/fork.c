/* SPDX-License-Identifier: MIT */
/*
 * See fork.h. By event:
 *
 *   the program          reader (mm->as exclusive)                       hmm-heir
 *   fork() ------------> read FORK: the child's userfaultfd
 *   waits                estate = every entry that is away
 *   returns  <- - - -    invalidation of their ranges begins  -------->  devices let go
 *   (child runs, too)                                                    fill, wake; until the estate is empty
 *   handler waits  <- - - - - - - - - - - - - - - - - - - - - - - - - -  close
 *
 * From the moment at which the kernel copies the address space (T) until the thread that forked has run again after our reading, the
 * kernel refuses to put in or take out: what comes home and what leaves meets a pending event and waits. So the entries are what they
 * were at T, but for events of other threads that are read out of order: attic.c.
 */
#include "process/fork.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/fence.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "mm/thread.h"
#include "os/own.h"
#include "process/attic.h"
#include "process/heir.h"
#include "process/window.h"

#define READING_NS 20000         /* between two looks whether events were applied */
#define READING_STEPS 100000     /* then the reader is not there any more */
#define SETTLE_STEP_NS 100000000 /* between two looks at progress */
#define SETTLE_STEPS 100         /* without any: given up */

static struct {
    struct mm *mm;
    uint32_t running;         /* atomic */
    uint32_t users;           /* atomic: handlers inside */
    struct heir_board *board; /* shared with children */
} forks;

/* ---- hooks; see mm.h ---- */

static void on_reading(struct mm *mm, bool now)
{
    (void)mm;
    if (now)
        attic_reading();
    __atomic_fetch_add(&forks.board->reading, 1, __ATOMIC_SEQ_CST);
}

static void on_change(struct mm *mm, uintptr_t start, uintptr_t end, uintptr_t to)
{
    if (to)
        captures_remapped(mm, start, end, to);
    if (mm->forking)
        window_change(mm, start, end, to);
    if (mm_has_fork_event(mm))
        attic_change(mm, start, end);
}

static void on_fork(struct mm *mm, int uffd)
{
    struct estate e;
    SEQ_POINT("fork-read");
    estate_init(&e, mm, capture_new(mm));
    attic_give(mm, uffd, &e);
    capture_begin(e.capture);
    heir_new(mm, uffd, &e);
}

static const struct fork_hooks hooks = {
    .reading = on_reading, .forked = on_fork, .changing = on_change, .arrived = window_arrival};

/* ---- waiting for children's memory ---- */

/* All forks behind `after` up to `number`. Children of 256 forks ago are waited for, too. */
static bool is_settled(const struct heir_board *b, uint32_t after, uint32_t number)
{
    if ((int32_t)(__atomic_load_n(&b->settled, __ATOMIC_ACQUIRE) - number) >= 0)
        return true;
    for (uint32_t n = after + 1, k = 0; (int32_t)(number - n) >= 0 && k < HEIR_SLOTS; n++, k++)
        if (__atomic_load_n(&b->under_way[n % HEIR_SLOTS], __ATOMIC_ACQUIRE))
            return false;
    return !mutate("fork-others");
}

/* Whoever sent an event goes on when it is read, a little before it is applied. False: the reader is at it still, or is not there any
 * more. */
static bool wait_applied(const struct heir_board *b)
{
    uint32_t reading = __atomic_load_n(&b->reading, __ATOMIC_SEQ_CST);
    for (unsigned i = 0; i < READING_STEPS; i++) {
        if (!(reading & 1) || __atomic_load_n(&b->reading, __ATOMIC_SEQ_CST) != reading)
            return true;
        os_sleep(READING_NS);
    }
    return false;
}

/* The number of the last fork that the kernel has told of. */
static uint32_t last_fork(const struct heir_board *b)
{
    wait_applied(b);
    return __atomic_load_n(&b->started, __ATOMIC_SEQ_CST);
}

/* For the children of forks behind `after`. False: no progress for too long, or nobody is there who could make any. */
static bool wait_settled(const struct heir_board *b, uint32_t after, bool (*gone)(void))
{
    uint32_t moves = __atomic_load_n(&b->moves, __ATOMIC_RELAXED), number = last_fork(b);
    for (unsigned steps = 0; !is_settled(b, after, number); steps++) {
        uint32_t seen = __atomic_load_n(&b->ended, __ATOMIC_ACQUIRE), now = __atomic_load_n(&b->moves, __ATOMIC_RELAXED);
        if (now != moves)
            steps = 0;
        moves = now;
        if (steps >= SETTLE_STEPS || (gone && gone()))
            return false;
        if (!is_settled(b, after, number))
            futex_wait_common(&b->ended, seen, SETTLE_STEP_NS);
    }
    return true;
}

static bool enter(void)
{
    if (fence_foreign && fence_foreign()) /* a child: there are no threads that could answer */
        return false;
    __atomic_fetch_add(&forks.users, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&forks.running, __ATOMIC_SEQ_CST))
        return true;
    __atomic_fetch_sub(&forks.users, 1, __ATOMIC_SEQ_CST);
    return false;
}

static void leave(void)
{
    __atomic_fetch_sub(&forks.users, 1, __ATOMIC_SEQ_CST);
    futex_wake(&forks.users, INT_MAX);
}

/* Caller has entered. */
static bool settle(uint32_t after)
{
    bool done = wait_settled(forks.board, after, NULL);
    if (!done)
        hmm_log(HMM_LOG_WARNING,
                "fork: a child has not got all of its memory for 10 s; if this process ends before, it is lost there");
    return done;
}

bool fork_settle(void)
{
    if (!enter())
        return true;
    bool done = settle(__atomic_load_n(&forks.board->settled, __ATOMIC_ACQUIRE));
    leave();
    return done;
}

/* ---- the program's handlers ---- */

/* The handlers of a thread's fork() belong together: what the first entered the others leave. */
static __thread bool forking __attribute__((tls_model("initial-exec")));
static __thread uint32_t forks_before __attribute__((tls_model("initial-exec")));

/* What this thread has dropped is dropped in the child: its event must not be taken for one that came after the fork. */
static void begin_by_event(void)
{
    while (!mutate("fork-unapplied") && !wait_applied(forks.board))
        ;
}

static void before_fork(void)
{
    int err = errno;
    forking = enter();
    if (forking) {
        stat_add(&forks.mm->stats.calls_fork, 1);
        forks_before = __atomic_load_n(&forks.board->started, __ATOMIC_SEQ_CST);
        if (mm_has_fork_event(forks.mm))
            begin_by_event();
        else
            window_open();
    }
    SEQ_POINT("fork-before");
    errno = err;
}

/* The parent may end at once, as a daemon's does: what its children still lack would be zeros then. */
static void after_fork_in_parent(void)
{
    int err = errno;
    if (!forking)
        return;
    if (!mm_has_fork_event(forks.mm))
        window_close();
    if (!mutate("fork-settle"))
        settle(forks_before); /* also when the last device is being closed meanwhile */
    leave();
    forking = false;
    errno = err;
}

static void after_fork_in_child(void)
{
    int err = errno;
    if (forking && !mm_has_fork_event(forks.mm))
        window_close_in_child();
    forking = false;
    errno = err;
}

/* As the library is loaded: so handlers of the program find their memory in the child, and no lock of theirs is wanted by anybody who
 * would be waited for here. */
__attribute__((constructor)) static void watch_fork(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

__attribute__((destructor)) static void watch_exit(void)
{
    fork_settle();
}

/* ---- life ---- */

int fork_start(struct mm *mm)
{
    void *board = NULL;
    memset(&forks, 0, sizeof(forks));
    forks.mm = mm;
    int r = own_map(os_page_size(), os_page_size(), OS_MAP_COMMON, &board);
    if (r)
        goto fail;
    forks.board = board;
    r = attic_start(mm);
    if (r)
        goto unmap_board;
    r = heirs_start(mm, forks.board);
    if (r)
        goto stop_attic;
    r = mm_has_fork_event(mm) ? 0 : window_start(mm, attic_may_have_forked, attic_reset);
    if (r)
        goto stop_heirs;
    mm->fork = &hooks;
    __atomic_store_n(&forks.running, 1, __ATOMIC_SEQ_CST);
    return 0;

stop_heirs:
    heirs_stop();
stop_attic:
    attic_stop();
unmap_board:
    own_unmap(forks.board, os_page_size());
    forks.board = NULL;
fail:
    return hmm_fail(r, "no memory for what children of fork are to get: %s", hmm_strerror(r));
}

static void wait_users(void)
{
    __atomic_store_n(&forks.running, 0, __ATOMIC_SEQ_CST);
    for (uint32_t n; (n = __atomic_load_n(&forks.users, __ATOMIC_SEQ_CST)) != 0;)
        futex_wait(&forks.users, n, -1);
}

/* A fork() that is under way sleeps in the kernel until the reader has read its event. */
void fork_ending(void)
{
    if (!mutate("fork-ending"))
        wait_users();
}

void fork_stop(void)
{
    wait_users(); /* where starting has failed */
    if (!mm_has_fork_event(forks.mm))
        window_stop();
    attic_ending();
    heirs_stop();
    attic_stop();
    own_unmap(forks.board, os_page_size());
    forks.board = NULL;
    forks.mm->fork = NULL;
}

static pid_t parent;

static bool parent_is_gone(void)
{
    return getppid() != parent;
}

void fork_forget(void)
{
    parent = getppid();
    if (forks.board)
        wait_settled(forks.board, __atomic_load_n(&forks.board->settled, __ATOMIC_ACQUIRE), parent_is_gone);
    memset(&forks, 0, sizeof(forks));
}
