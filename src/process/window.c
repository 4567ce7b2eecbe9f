/* SPDX-License-Identifier: MIT */
/*
 * fork where the kernel does not tell of it (no CAP_SYS_PTRACE). The kernel forgets the child's registrations: what is away would be
 * zeros there. So managed memory is kept from children (MADV_DONTFORK), except in the window around a fork():
 *
 *   the program's thread                 library                              child
 *   before: nursery, pipe
 *           open the window -----------> forking = true, DOFORK
 *   fork (T)                                                                   handler: takes its memory
 *   after:  close the window ----------> waits until no event is pending;       |
 *                                        estate, DONTFORK, forking = false      |
 *                                        an heir fills the nursery -----------> until it has everything
 *   waits for the heir
 *
 * The estate is what is away when the window closes, and what was away at some time in the window and is not any more, since T may lie
 * before: what came home, and what an event has taken away of which it is not certain that T came later (fork.c says how that is
 * known). Where the child has the page, because it came home before T, COPY is refused. What an event before T concerned is
 * dropped, and moved, in that list. Nothing is armed, disarmed or taken meanwhile, so that what is away can only become less, and what
 * happens to it is an event. Whoever wants that is told EAGAIN, and does not wait for the program's thread.
 *
 * What is left to chance: a munmap by another thread just before T whose event is read after it, and a new mapping at its address made
 * just before T by a third thread: the child has the old bytes there. And while the window is open, a raw clone() of another thread
 * gives a child that reads zeros.
 */
#include "process/window.h"

#include <errno.h>
#include <limits.h>
#include <unistd.h>

#include "base/error.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "mm/arm.h"
#include "mm/thread.h"
#include "os/own.h"
#include "process/gather.h"
#include "process/heir.h"
#include "process/nursery.h"

#define SHOW_TRIES 1000
#define PENDING_TRIES 20000 /* of 50 us: a thread that has sent an event is stopped in the middle of it */

struct request {
    struct work work;
    uint32_t done;
};

static struct {
    struct mm *mm;
    bool (*may_have_forked)(struct mm *mm);
    void (*reset)(void);
    struct workers worker; /* of its own: others may wait for devices, and fork waits for it with the program's locks held */
    uint32_t turn;         /* futex: a thread is between before and after */
    struct mutex lock;     /* RANK_JOBS, as places are kept under it: the attic, for arrivals; events have mm->as exclusively */
    struct estate attic, trash;

    /* Of the thread whose turn it is. */
    struct nursery *nursery; /* NULL: the child does not get the memory */
    int pipe[2];
    pid_t tid;
} window;

/* ---- the library's side ---- */

static void finish(struct request *q)
{
    __atomic_store_n(&q->done, 1, __ATOMIC_RELEASE);
    futex_wake(&q->done, INT_MAX);
}

/* What is unread could concern what is shown or hidden, or what is in the estate. */
static void lock_without_events(struct mm *mm)
{
    for (unsigned tries = 0;; tries++) {
        rwlock_write_lock(&mm->as);
        if (os->uffd_pending(mm->uffd.fd) == 0 || tries == PENDING_TRIES)
            return;
        rwlock_write_unlock(&mm->as);
        os_sleep(50000);
    }
}

static void show_each(struct mm *mm, bool show)
{
    unsigned refused = 0;
    for (struct region *r = region_next(&mm->regions, 0); r; r = region_next(&mm->regions, r->end))
        if (r->missing && show)
            region_show(mm, r->start, r->end);
        else if (r->missing)
            refused += region_hide(mm, r) && r->state == REGION_PROVED; /* else there may be holes */
    if (refused && os->uffd_pending(mm->uffd.fd) == 0)                  /* else it may be gone, and we come again */
        hmm_log(HMM_LOG_WARNING,
                "fork: %u mappings cannot be kept from children any more (vm.max_map_count?): a raw clone() reads zeros there",
                refused);
}

/* A mapping that is remapped meanwhile takes its mark with it, to where we do not know of it until the event is read. Caller holds mm->as
 * exclusively; lets go of it in between. */
static void show_all(struct mm *mm, bool show)
{
    show_each(mm, show);
    for (unsigned tries = 0; os->uffd_pending(mm->uffd.fd) != 0 && tries < SHOW_TRIES; tries++) {
        rwlock_write_unlock(&mm->as);
        lock_without_events(mm);
        show_each(mm, show);
    }
}

static void open_here(struct work *work, unsigned worker)
{
    struct mm *mm = window.mm;
    (void)worker;
    lock_without_events(mm);
    mm->forking = true;
    window.reset();
    show_all(mm, true);
    rwlock_write_unlock(&mm->as);
    finish(container_of(work, struct request, work));
}

static void close_here(struct work *work, unsigned worker)
{
    struct mm *mm = window.mm;
    struct estate e, trash;
    (void)worker;
    lock_without_events(mm);
    estate_init(&e, mm, capture_new(mm));
    gather(&e, &window.attic, 1);
    capture_begin(e.capture);
    mm->forking = false;
    estate_take(&window.attic, 0, UINTPTR_MAX, &window.trash);
    estate_free(&window.attic); /* nothing is left in it but room */
    trash = window.trash;
    estate_init(&window.trash, mm, NULL);
    show_all(mm, false);
    rwlock_write_unlock(&mm->as);
    estate_free(&trash);
    int alive = os->fd_of_thread(window.tid, window.pipe[0]);
    heir_new_in_nursery(mm, window.nursery, alive, &e);
    window.nursery = NULL;
    finish(container_of(work, struct request, work));
    mm_prune(mm, 0, UINTPTR_MAX & BLOCK_MASK); /* what was not given up meanwhile */
}

static void call(void (*fn)(struct work *, unsigned))
{
    struct request q = {.done = 0};
    work_init(&q.work, fn);
    workers_queue(&window.worker, &q.work);
    while (!__atomic_load_n(&q.done, __ATOMIC_ACQUIRE))
        futex_wait(&q.done, 0, -1);
}

/* ---- hooks ---- */

void window_change(struct mm *mm, uintptr_t start, uintptr_t end, uintptr_t to)
{
    if (window.may_have_forked(mm))
        estate_add_entries(&window.attic, start, end);
    else if (to)
        estate_move(&window.attic, start, end, to - start);
    else
        estate_take(&window.attic, start, end, &window.trash);
}

void window_arrival(struct mm *mm, const struct flight *f, unsigned i, const char *slot)
{
    struct estate_run run = {.addr = f->home[i], .pages = 1, .range = ESTATE_QUIET};
    (void)mm;
    run.pagemap = slot ? 0 : f->dev->pagemap->id;
    run.source = slot ? (uintptr_t)slot + ((uintptr_t)i << os_page_shift()) : f->page[i];
    mutex_lock(&window.lock);
    if (!mutate("fork-arrival"))
        estate_add(&window.attic, run);
    mutex_unlock(&window.lock);
}

/* ---- the program's side ---- */

static void give_turn(void)
{
    __atomic_store_n(&window.turn, 0, __ATOMIC_RELEASE);
    futex_wake(&window.turn, 1);
    signals_unblock();
}

static void take_turn(void)
{
    signals_block(); /* a handler that forks would wait for us */
    while (__atomic_exchange_n(&window.turn, 1, __ATOMIC_ACQUIRE))
        futex_wait(&window.turn, 1, -1);
}

void window_open(void)
{
    void *nursery;
    take_turn();
    window.nursery = NULL;
    window.tid = (pid_t)os_tid();
    int r = os->pipe_open(window.pipe);
    if (r)
        goto fail;
    r = own_map(nursery_size(), os_page_size(), OS_MAP_COMMON, &nursery);
    if (r)
        goto close_pipe;
    window.nursery = nursery;
    window.nursery->parent = getpid();
    call(open_here);
    return;

close_pipe:
    os->close(window.pipe[0]);
    os->close(window.pipe[1]);
fail:
    hmm_log(HMM_LOG_ERROR, "fork: the child does not get managed memory, touching it is SIGSEGV: %s", hmm_strerror(r));
}

void window_close(void)
{
    SEQ_POINT("fork-window-close");
    if (window.nursery) {
        int pipe[2] = {window.pipe[0], window.pipe[1]};
        call(close_here);
        os->close(pipe[0]);
        os->close(pipe[1]);
    }
    give_turn();
}

void window_close_in_child(void)
{
    struct nursery *n = window.nursery;
    if (n) {
        os_linux.close(window.pipe[0]);
        nursery_take(n);
        os_linux.close(window.pipe[1]);
        os_linux.unmap(n, nursery_size());
    }
    signals_unblock();
}

/* ---- life ---- */

int window_start(struct mm *mm, bool (*may_have_forked)(struct mm *mm), void (*reset)(void))
{
    window.mm = mm;
    window.may_have_forked = may_have_forked;
    window.reset = reset;
    window.turn = 0;
    mutex_init(&window.lock, RANK_JOBS);
    estate_init(&window.attic, mm, NULL);
    estate_init(&window.trash, mm, NULL);
    return workers_start(&window.worker, "hmm-fork", 1);
}

void window_stop(void)
{
    workers_stop(&window.worker);
    mutex_destroy(&window.lock);
}
