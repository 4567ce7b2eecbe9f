/* SPDX-License-Identifier: MIT */
/*
 * See bring.h. Two kinds of threads: workers wait for copies; waiters wait for devices, too, which may use a page for as long as a job
 * runs. What a worker finds in use it leaves to a waiter.
 */
#include "fault/bring.h"

#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "fault/failing.h"
#include "mm/thread.h"

#define FAULT_QUEUE 1024
#define BACKOFF_NS 1000000ull /* doubles with each failure */
#define BACKOFF_SHIFT_MAX 7

struct fault_work {
    struct work work;
    struct mm *mm;
    struct window w;
    uintptr_t addr; /* the page that was touched */
    struct list free;
};

static struct {
    struct workers workers, waiters;
    struct flight **flights; /* one per worker and waiter */
    unsigned nworkers;       /* and as many waiters */
    unsigned waiting;        /* items that waiters have; lock */
    struct mutex lock;       /* RANK_QUEUE: free items */
    struct list free;
    struct fault_work items[FAULT_QUEUE];
} bringers;

static void wake(struct mm *mm, uintptr_t start, uintptr_t end)
{
    if (start < end)
        os->uffd_wake(mm->uffd.fd, start, end - start);
}

static struct fault_work *take_item(void)
{
    struct fault_work *fw = NULL;
    mutex_lock(&bringers.lock);
    if (!list_empty(&bringers.free)) {
        fw = container_of(bringers.free.next, struct fault_work, free);
        list_del(&fw->free);
    }
    mutex_unlock(&bringers.lock);
    return fw;
}

static void free_item(struct fault_work *fw)
{
    mutex_lock(&bringers.lock);
    list_add_tail(&bringers.free, &fw->free);
    mutex_unlock(&bringers.lock);
}

/* 1: brought some of w; 0: none of it is on a device; or an error, with sleepers left asleep. Looks at the window once: the touch is
 * tried again if its page was on another device than the first, and what goes to a device meanwhile is not to come back. */
static int bring(struct mm *mm, struct flight *f, struct window w, enum landing how)
{
    if (!depart_to_system(mm, f, NULL, w, NULL))
        return 0;
    int r = land_in_system(mm, f, how, NULL);
    return r ? r : 1;
}

/* Of the device that f last met, which may be closed once it has no page any more. False: the page is still there. */
static bool give_up(struct mm *mm, struct flight *f, struct window page, int err)
{
    if (!depart_to_system(mm, f, f->dev, page, NULL))
        return true;
    const char *name = f->dev->driver->name;
    if (land_as_poison(mm, f))
        return false;
    hmm_log(HMM_LOG_ERROR, "device %s did not give page %#lx back for %llu s (%s): its content is lost, touching it is SIGBUS",
            name, (unsigned long)page.start, FAILING_PATIENCE_NS / 1000000000, hmm_strerror(err));
    failing_forget(page.start); /* the address may be used again */
    return true;
}

/* The pages are safe on the device; the touch is tried again, when we have waited. */
static void not_brought(struct mm *mm, struct flight *f, struct window page, int err)
{
    bool over;
    unsigned tries = failing_note(page.start, err != -ENOMEM && err != -EAGAIN, os_now(), &over);
    if (tries == 1)
        hmm_log(HMM_LOG_WARNING, "page %#lx did not come home: %s; trying again", (unsigned long)page.start, hmm_strerror(err));
    if (over && give_up(mm, f, page, err))
        return;
    stat_add(&mm->stats.retries, 1);
    os_sleep(BACKOFF_NS << (tries < BACKOFF_SHIFT_MAX ? tries : BACKOFF_SHIFT_MAX));
}

/* What bring() said about the page is final: its touch goes on, or is tried again. */
static void settle(struct mm *mm, struct flight *f, struct window page, int r)
{
    if (r < 0)
        not_brought(mm, f, page, r);
    else if (r > 0)
        failing_forget(page.start);
    wake(mm, page.start, page.end);
}

static void wait_for_page(struct work *work, unsigned waiter)
{
    struct fault_work *fw = container_of(work, struct fault_work, work);
    struct window page = {fw->addr, fw->addr + os_page_size()};
    struct mm *mm = fw->mm;
    mutex_lock(&bringers.lock);
    list_add_tail(&bringers.free, &fw->free);
    bringers.waiting--;
    mutex_unlock(&bringers.lock);
    struct flight *f = bringers.flights[bringers.nworkers + waiter];
    settle(mm, f, page, bring(mm, f, page, LAND_FOR_FAULT));
}

/* Half of the items stay for faults that need not wait. */
static void leave_to_waiters(struct fault_work *fw)
{
    struct mm *mm = fw->mm;
    uintptr_t addr = fw->addr;
    mutex_lock(&bringers.lock);
    bool room = bringers.waiting < FAULT_QUEUE / 2;
    bringers.waiting += room;
    mutex_unlock(&bringers.lock);
    if (room) {
        work_init(&fw->work, wait_for_page);
        workers_queue(&bringers.waiters, &fw->work);
    } else {
        free_item(fw);
        os_sleep(50000);
        wake(mm, addr, addr + os_page_size());
    }
}

/* Where the window cannot come, it is only the page that was touched that counts: one of its neighbours may be what fails, or what a
 * job holds until it ends, and that job may be the one that waits for this page. */
static void bring_window(struct work *work, unsigned worker)
{
    struct fault_work *fw = container_of(work, struct fault_work, work);
    struct flight *f = bringers.flights[worker];
    struct mm *mm = fw->mm;
    struct window w = fw->w, page = {fw->addr, fw->addr + os_page_size()};
    int r = bring(mm, f, w, LAND_UNLESS_USED);
    wake(mm, w.start, page.start);
    wake(mm, page.end, w.end);
    if (r < 0 && w.end - w.start > page.end - page.start)
        r = bring(mm, f, page, LAND_UNLESS_USED);
    if (r == -EAGAIN) {
        leave_to_waiters(fw);
        return;
    }
    free_item(fw);
    settle(mm, f, page, r);
}

void bring_queue(struct mm *mm, struct window w, uintptr_t addr)
{
    struct fault_work *fw = take_item();
    if (!fw) { /* every worker is waiting for a device: the fault comes again */
        os_sleep(50000);
        os->uffd_wake(mm->uffd.fd, w.start, w.end - w.start);
        return;
    }
    fw->mm = mm;
    fw->w = w;
    fw->addr = addr;
    work_init(&fw->work, bring_window);
    stat_add(&mm->stats.cpu_faults_slow, 1);
    workers_queue(&bringers.workers, &fw->work);
}

/* ---- life ---- */

int bring_start(struct mm *mm, unsigned n)
{
    memset(&bringers, 0, sizeof(bringers));
    bringers.nworkers = n;
    mutex_init(&bringers.lock, RANK_QUEUE);
    failing_start();
    list_init(&bringers.free);
    for (unsigned i = 0; i < FAULT_QUEUE; i++)
        list_add_tail(&bringers.free, &bringers.items[i].free);
    int r = -ENOMEM;
    bringers.flights = mem_alloc(2 * n * sizeof(*bringers.flights));
    if (!bringers.flights)
        return r;
    for (unsigned i = 0; i < 2 * n; i++)
        if (!(bringers.flights[i] = flight_new(mm)))
            goto free;
    r = workers_start(&bringers.workers, "hmm-fault", n);
    if (r)
        goto free;
    r = workers_start(&bringers.waiters, "hmm-fault-wait", n);
    if (r)
        goto stop_workers;
    return 0;

stop_workers:
    workers_stop(&bringers.workers);
free:
    mem_free(bringers.flights, 2 * n * sizeof(*bringers.flights));
    return r;
}

void bring_stop(void)
{
    workers_stop(&bringers.workers); /* what they leave to waiters is queued when they have ended */
    workers_stop(&bringers.waiters);
    mem_free(bringers.flights, 2 * bringers.nworkers * sizeof(*bringers.flights));
    failing_stop();
    mutex_destroy(&bringers.lock);
}
