/* SPDX-License-Identifier: MIT */
/*
 * Closing a device waits for its driver, for its notifier callbacks and for calls that are inside it, and any of these may never come
 * back. So a library thread does it, and the caller watches: where nothing has moved for ten seconds, it asks that thread to give
 * up, and returns. A thread that cannot, because a callback holds it, stays where it is; the next close meets it there.
 */
#include "api/close.h"

#include <errno.h>
#include <string.h>

#include "base/error.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "job/job.h"
#include "migrate/migrate.h"
#include "mirror/mirror.h"
#include "process/change.h"

#define STEP_NS 100000000
#define OVERDUE_NS 1000000000 /* a callback that runs for so long is worth naming */

static enum close_stage stage_of(const struct closing *c)
{
    return __atomic_load_n(&c->stage, __ATOMIC_ACQUIRE);
}

static void reach(struct closing *c, enum close_stage stage)
{
    __atomic_store_n(&c->stage, stage, __ATOMIC_RELEASE);
}

static bool given_up(const struct closing *c)
{
    return __atomic_load_n(&c->give_up, __ATOMIC_ACQUIRE);
}

/* ---- in a library thread ---- */

static void end_jobs(struct closing *c)
{
    struct hmm_device *dev = c->dev;
    sched_stop(dev);
    dev->driver->stop(dev->priv);
    sched_wait(dev);
    pagemap_kill(dev->pagemap);
}

static int wait_users(const struct closing *c)
{
    for (uint32_t n; (n = __atomic_load_n(c->users, __ATOMIC_ACQUIRE)) != 0;) {
        if (given_up(c))
            return -EBUSY;
        futex_wait(c->users, n, STEP_NS);
    }
    return 0;
}

/* Everything migrates back; pages in flight or dropped settle meanwhile. */
static int bring_home(const struct closing *c)
{
    struct hmm_device *dev = c->dev;
    for (;;) {
        int r = migrate_range_to_system(dev->mm, dev, 0, UINTPTR_MAX & BLOCK_MASK, NULL);
        if (pagemap_wait(dev->pagemap, STEP_NS) == 0)
            return 0;
        if (r == -ENOMEM || given_up(c))
            return r ? r : -EBUSY;
    }
}

/* The driver's close() removes its notifiers, and would wait for as long as a callback of them runs. What they use is freed there: none
 * may begin. */
static int wait_callbacks(struct closing *c)
{
    struct notifier_overdue o;
    if (!c->ignored && !mutate("close-ignore")) {
        notifier_ignore(&c->dev->mm->notifiers, &c->ending, c->dev);
        c->ignored = true;
    }
    while (!mutate("close-callbacks") && notifier_overdue(&c->dev->mm->notifiers, c->dev, 0, &o)) {
        if (given_up(c))
            return -EBUSY;
        os_sleep(STEP_NS / 10);
    }
    return 0;
}

/* The last close stops the threads that end them. */
static int wait_changes(struct closing *c)
{
    SEQ_POINT("close-changes");
    while (manager_all_ending(&c->counted) && !change_quiet(STEP_NS) && !mutate("close-changes"))
        if (given_up(c))
            return -EBUSY;
    return 0;
}

static int run_stage(struct closing *c)
{
    switch (stage_of(c)) {
    case CLOSE_JOBS: end_jobs(c); return 0;
    case CLOSE_USERS: return wait_users(c);
    case CLOSE_MIRRORS: mirrors_release(c->dev); return 0;
    case CLOSE_PAGES: return bring_home(c);
    case CLOSE_CALLBACKS: return wait_callbacks(c);
    case CLOSE_CHANGES: return wait_changes(c);
    case CLOSE_DONE: break;
    }
    return 0;
}

static void run_closing(struct call *call)
{
    struct closing *c = container_of(call, struct closing, call);
    c->result = 0;
    while (stage_of(c) < CLOSE_DONE && !c->result) {
        c->result = run_stage(c);
        if (!c->result)
            reach(c, stage_of(c) + 1);
    }
}

/* ---- who waits for it ---- */

/* Falls with everything that happens. Pages count when no job moves them any more. */
static uint64_t progress_of(const struct closing *c)
{
    enum close_stage stage = stage_of(c);
    uint64_t used = stage >= CLOSE_PAGES ? pagemap_used(c->dev->pagemap) : 0;
    return ((uint64_t)(CLOSE_DONE - stage) << 56) + ((uint64_t)sched_jobs(c->dev) << 40) + used +
           __atomic_load_n(c->users, __ATOMIC_RELAXED);
}

static int busy_with_callback(const struct closing *c, const struct notifier_overdue *o)
{
    char text[192];
    notifier_overdue_text(&c->dev->mm->notifiers, o, text, sizeof(text));
    return hmm_fail(-EBUSY, "device %s is not closed yet, close it again later: %s", c->dev->driver->name, text);
}

/* What has not ended, as far as it can be seen from here. A callback of another device may be what its own jobs wait for. */
static int busy(const struct closing *c)
{
    struct notifier_tree *t = &c->dev->mm->notifiers;
    const char *name = c->dev->driver->name;
    struct notifier_overdue o;
    if (notifier_overdue(t, c->dev, OVERDUE_NS, &o) || (c->running && notifier_overdue(t, NULL, OVERDUE_NS, &o)))
        return busy_with_callback(c, &o);
    if (stage_of(c) == CLOSE_JOBS)
        return hmm_fail(-EBUSY, "%llu jobs of device %s have not ended, or its driver has not stopped; close it again later",
                        (unsigned long long)sched_jobs(c->dev), name);
    char text[128];
    if (stage_of(c) == CLOSE_MIRRORS && mirrors_releasing(c->dev, text, sizeof(text)))
        return hmm_fail(-EBUSY, "device %s: %s; close it again when it has", name, text);
    if (stage_of(c) == CLOSE_CHANGES) {
        change_text(text, sizeof(text));
        return hmm_fail(-EBUSY, "device %s: %s; close it again when it has", name, text);
    }
    if (stage_of(c) == CLOSE_USERS)
        return hmm_fail(-EBUSY, "%u calls of other threads are inside device %s; close it again when they have returned",
                        __atomic_load_n(c->users, __ATOMIC_RELAXED), name);
    return hmm_fail(-EBUSY, "%llu pages of device %s are pinned or in use; close it again later",
                    (unsigned long long)pagemap_used(c->dev->pagemap), name);
}

static int failed(const struct closing *c)
{
    if (c->running || c->result == -EBUSY) /* while it runs, its thread may write the result */
        return busy(c);
    return hmm_fail(c->result, "%llu pages of device %s could not be brought home: %s; %s",
                    (unsigned long long)pagemap_used(c->dev->pagemap), c->dev->driver->name, hmm_strerror(c->result),
                    c->result == -ENOMEM ? "free memory, then close it again" : "close it again later");
}

static void start(struct closing *c)
{
    c->give_up = 0;
    c->call = (struct call){.fn = run_closing};
    c->running = true;
    manager_start_call(&c->call);
}

/* Whether the library thread came back; until then, or until nothing has moved for so long. */
static bool watch(struct closing *c, uint64_t *until, uint64_t *progress)
{
    while (!manager_call_done_for(&c->call, STEP_NS)) {
        uint64_t now = os_now(), p = progress_of(c);
        if (p < *progress) {
            *until = now + manager_patience_ns();
            *progress = p;
        }
        if (now < *until || mutate("close-patience"))
            continue;
        __atomic_store_n(&c->give_up, 1, __ATOMIC_RELEASE);
        return manager_call_done_for(&c->call, 3 * STEP_NS);
    }
    return true;
}

void closing_init(struct closing *c, struct hmm_device *dev, const uint32_t *users)
{
    *c = (struct closing){.dev = dev, .users = users, .stage = CLOSE_JOBS};
}

void closing_end(struct closing *c)
{
    if (c->ignored)
        notifier_forget(&c->dev->mm->notifiers, &c->ending);
}

int closing_run(struct closing *c)
{
    uint64_t until = os_now() + manager_patience_ns(), progress = progress_of(c);
    __atomic_store_n(&c->give_up, 0, __ATOMIC_RELEASE); /* one that is still there goes on */
    do {
        if (!c->running)
            start(c);
        c->running = !watch(c, &until, &progress);
    } while (!c->running && c->result && c->result != -ENOMEM && os_now() < until); /* it had given up just before we came */
    if (!c->running && !c->result)
        return 0;
    int r = failed(c);
    hmm_log(HMM_LOG_WARNING, "%s", hmm_last_message());
    return r;
}
