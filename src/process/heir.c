/* SPDX-License-Identifier: MIT */
/* See heir.h: the life of heirs. */
#include "process/heirs.h"

#include <errno.h>
#include <limits.h>
#include <string.h>

#include "base/alloc.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "process/nursery.h"

#define WORKERS 2
#define CALLERS 4             /* each may be held up by a device, as long as a job runs */
#define IDLE_MS 1             /* between two looks at a child whose devices are waited for */
#define ASK_NS 5000000        /* between two looks at the devices */
#define WAIT_NS 100000        /* an event's thread has to run first, or memory is short */
#define STOP_NS 5000000000ull /* with a child that makes no progress at the end */

struct heirs heirs;

/* Waits for devices that did not let go at once. */
struct caller {
    struct work work;
    struct capture *capture;
};

/* ---- devices ---- */

static void wait_for_devices(struct work *work, unsigned worker)
{
    struct caller *c = container_of(work, struct caller, work);
    (void)worker;
    mm_remaps_wait(heirs.mm);
    capture_call(c->capture, NOTIFIER_WAIT);
    capture_put(c->capture);
    mem_free(c, sizeof(*c));
}

/* Devices are asked, and do not hold up each other. A page that was remapped before can be written through its old address until that
 * batch has landed. True: all have let go. */
static bool ask_devices(struct heir *h)
{
    h->asked = os_now();
    h->landed |= !__atomic_load_n(&heirs.mm->remaps_pending, __ATOMIC_SEQ_CST);
    return h->landed && capture_call(h->estate.capture, NOTIFIER_BRIEFLY) == 0;
}

/* A device that does not let go is made to, after its job's deadline, by who waits for it. What other devices hold must not wait for that:
 * so they are asked again and again meanwhile. */
static void call_devices(struct heir *h)
{
    struct capture *c = h->estate.capture;
    h->called = true;
    if (!c || ask_devices(h))
        return;
    struct caller *w;
    while (!(w = mem_alloc(sizeof(*w))))
        os_sleep(1000000);
    capture_get(c);
    w->capture = c;
    work_init(&w->work, wait_for_devices);
    workers_queue(&heirs.callers, &w->work);
}

/* ---- life ---- */

/* All up to the number before the first that is under way. Caller holds heirs.lock. */
static void update_board(void)
{
    uint32_t settled = heirs.board->started;
    list_for_each (pos, &heirs.all) {
        const struct heir *h = container_of(pos, struct heir, link);
        if (h->number <= settled)
            settled = h->number - 1;
    }
    __atomic_store_n(&heirs.board->settled, settled, __ATOMIC_RELEASE);
}

static void end(struct heir *h)
{
    mutex_lock(&heirs.lock);
    list_del(&h->link);
    update_board();
    __atomic_fetch_sub(&heirs.board->under_way[h->number % HEIR_SLOTS], 1, __ATOMIC_RELEASE);
    __atomic_fetch_add(&heirs.board->ended, 1, __ATOMIC_RELEASE);
    mutex_unlock(&heirs.lock);
    futex_wake_common(&heirs.board->ended, INT_MAX);
    mem_free(h, sizeof(*h));
}

static void close_child(struct heir *h)
{
    estate_free(&h->estate);
    regions_exit(&h->known);
    if (heir_is_by_event(h))
        os->close(h->uffd); /* unregisters: from now on the child is nobody's but its own */
    else
        packer_close(&h->packer);
    end(h);
}

/* At the end a child that is stopped in the middle of a call cannot be waited for. */
static bool is_stuck(struct heir *h)
{
    uint64_t now = os_now();
    if (!__atomic_load_n(&heirs.stopping, __ATOMIC_ACQUIRE))
        return false;
    if (!h->stuck_since)
        h->stuck_since = now;
    return now - h->stuck_since > STOP_NS;
}

static void wait_a_little(struct heir *h)
{
    bool for_devices = h->estate.pages && fill_next(h) == h->estate.n;
    if (for_devices && os_now() - h->asked > ASK_NS && !mutate("fork-ask"))
        ask_devices(h);
    if (!heir_is_by_event(h))
        packer_wait(&h->packer);
    else if (for_devices)
        os->poll(&h->uffd, 1, IDLE_MS);
    else
        os_sleep(WAIT_NS);
}

static void serve(struct work *work, unsigned worker)
{
    struct heir *h = container_of(work, struct heir, work);
    (void)worker;
    if (!h->looked)
        fill_leave_out_wiped(h);
    if (!h->called)
        call_devices(h);
    if (!heir_is_by_event(h))
        packer_beat(&h->packer);
    int r = fill_slice(h);
    bool stuck = r == -EAGAIN && is_stuck(h);
    if (stuck)
        fill_poison_rest(h);
    if (!r && !h->estate.pages && !heir_is_by_event(h))
        r = packer_end(&h->packer);
    if (r == -ESRCH || stuck || (!r && !h->estate.pages)) {
        close_child(h);
        return;
    }
    if (r == -EAGAIN)
        wait_a_little(h);
    workers_queue(&heirs.workers, &h->work);
}

static struct heir *make(struct mm *mm, int uffd, uint32_t number)
{
    struct heir *h;
    while (!(h = mem_alloc(sizeof(*h))))
        os_sleep(1000000);
    h->mm = mm;
    h->uffd = uffd;
    h->chunk = CHUNK_PAGES;
    work_init(&h->work, serve);
    list_init(&h->link);
    mutex_lock(&heirs.lock);
    h->number = number ? number : heirs.board->started + 1;
    list_add_tail(&heirs.all, &h->link);
    __atomic_fetch_add(&heirs.board->under_way[h->number % HEIR_SLOTS], 1, __ATOMIC_RELAXED);
    if (!number)
        __atomic_store_n(&heirs.board->started, h->number, __ATOMIC_RELEASE);
    mutex_unlock(&heirs.lock);
    stat_add(&mm->stats.forks, 1);
    return h;
}

void heir_new(struct mm *mm, int uffd, struct estate *estate)
{
    struct heir *h = make(mm, uffd, 0);
    h->estate = *estate;
    follow_regions(h, &mm->regions);
    workers_queue(&heirs.workers, &h->work);
}

void heir_new_in_nursery(struct mm *mm, struct nursery *nursery, int alive, struct estate *estate)
{
    struct heir *h = make(mm, -1, 0);
    h->packer = (struct packer){.nursery = nursery, .alive = alive};
    h->estate = *estate;
    workers_queue(&heirs.workers, &h->work);
}

/* What its parent has is in it already, or missing, too: no fill can have come between the fork and this message. */
void heir_forked(struct heir *h, int uffd)
{
    struct heir *child = make(h->mm, uffd, h->number);
    estate_init(&child->estate, h->mm, NULL);
    if (!mutate("fork-grandchild"))
        estate_add_estate(&child->estate, &h->estate);
    follow_regions(child, &h->known);
    child->looked = h->looked;
    child->called = h->called;
    child->landed = h->landed;
    workers_queue(&heirs.workers, &child->work);
}

void heirs_run(struct work *work)
{
    workers_queue(&heirs.workers, work);
}

int heirs_start(struct mm *mm, struct heir_board *board)
{
    memset(&heirs, 0, sizeof(heirs));
    heirs.mm = mm;
    heirs.board = board;
    mutex_init(&heirs.lock, RANK_QUEUE);
    list_init(&heirs.all);
    int r = workers_start(&heirs.workers, "hmm-heir", WORKERS);
    if (r)
        return r;
    r = workers_start(&heirs.helpers, "hmm-heir-copy", 1);
    if (r)
        goto stop_workers;
    r = workers_start(&heirs.callers, "hmm-heir-wait", CALLERS);
    if (!r)
        return 0;
    workers_stop(&heirs.helpers);
stop_workers:
    workers_stop(&heirs.workers);
    return r;
}

void heirs_stop(void)
{
    __atomic_store_n(&heirs.stopping, true, __ATOMIC_RELEASE);
    workers_stop(&heirs.workers);
    workers_stop(&heirs.helpers);
    workers_stop(&heirs.callers);
    mutex_destroy(&heirs.lock);
}
