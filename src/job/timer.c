/* SPDX-License-Identifier: MIT */
/*
 * The thread "hmm-jobs": does at its time what no other thread is there for. It ends jobs whose time is up, asks drivers again to
 * end what they run, and writes the descriptors of fences: those live in the library's private descriptor table, where no close()
 * of the program reaches them. It holds no lock while it does.
 *
 * It sleeps until the earliest time that it knows of, and is woken only for an earlier one, or for a descriptor.
 */
#include <errno.h>
#include <limits.h>
#include <string.h>

#include "base/alloc.h"
#include "base/futex.h"
#include "job/job.h"
#include "mm/thread.h"
#include "os/os.h"

/* A descriptor that waits for a fence. */
struct watch {
    struct fence_callback callback;
    struct list link; /* timer.fired; the lock */
    int fd;           /* in the library's table */
    bool done;        /* else the fence went away */
};

static struct {
    struct mutex lock; /* RANK_QUEUE: everything here */
    struct heap heap;  /* of jobs, by when */
    struct list fired; /* watches */
    unsigned watches;  /* that exist */
    uint64_t sleeps_until;
    uint32_t word; /* futex */
    bool stopping;
    struct hmm_thread *thread;
} timer;

static bool earlier(const struct heap_node *a, const struct heap_node *b)
{
    return container_of(a, struct job, timer)->when < container_of(b, struct job, timer)->when;
}

/* Caller holds the lock. */
static void wake(void)
{
    timer.sleeps_until = 0;
    timer.word++;
    futex_wake(&timer.word, 1);
}

/* Caller holds the lock. */
static void remove_job(struct job *job)
{
    heap_remove(&timer.heap, &job->timer);
    __atomic_store_n(&job->timed, false, __ATOMIC_RELEASE);
}

void timer_set(struct job *job, uint64_t when)
{
    mutex_lock(&timer.lock);
    if (job->timed)
        remove_job(job);
    job->when = when;
    __atomic_store_n(&job->timed, true, __ATOMIC_RELEASE);
    heap_insert(&timer.heap, &job->timer);
    if (when < timer.sleeps_until)
        wake();
    mutex_unlock(&timer.lock);
}

void timer_clear(struct job *job)
{
    if (!__atomic_load_n(&job->timed, __ATOMIC_ACQUIRE))
        return;
    mutex_lock(&timer.lock);
    if (job->timed)
        remove_job(job);
    mutex_unlock(&timer.lock);
}

/* ---- the thread -------------------------------------------------------------------------------------------------- */

/* The next descriptor to write. Caller holds the lock, as below. */
static struct watch *pop_fired(void)
{
    if (list_empty(&timer.fired))
        return NULL;
    struct watch *w = container_of(timer.fired.next, struct watch, link);
    list_del(&w->link);
    return w;
}

/* A job whose time has come, with a reference; NULL: none. *next: when one will. */
static struct job *pop_due(uint64_t *next)
{
    *next = UINT64_MAX;
    if (!timer.heap.first)
        return NULL;
    struct job *job = container_of(timer.heap.first, struct job, timer);
    if (job->when > os_now()) {
        *next = job->when;
        return NULL;
    }
    fence_get(&job->fence);
    remove_job(job);
    return job;
}

static void write_descriptor(struct watch *w)
{
    if (w->done)
        os->event_set(w->fd);
    os->close(w->fd);
    mem_free(w, sizeof(*w));
}

static void sleep_until(uint64_t when)
{
    timer.sleeps_until = when;
    uint32_t seen = timer.word;
    mutex_unlock(&timer.lock);
    uint64_t now = os_now();
    if (when == UINT64_MAX)
        futex_wait(&timer.word, seen, -1);
    else if (when > now)
        futex_wait(&timer.word, seen, (int64_t)(when - now));
    mutex_lock(&timer.lock);
    timer.sleeps_until = 0;
}

static void jobs_main(void *arg)
{
    (void)arg;
    mutex_lock(&timer.lock);
    while (!timer.stopping || timer.watches) {
        struct watch *w = pop_fired();
        uint64_t next = 0;
        struct job *job = w ? NULL : pop_due(&next);
        if (!w && !job) {
            sleep_until(next);
            continue;
        }
        mutex_unlock(&timer.lock);
        if (w) {
            write_descriptor(w);
        } else {
            sched_timer(job);
            job_put(job);
        }
        mutex_lock(&timer.lock);
        timer.watches -= w != NULL;
    }
    mutex_unlock(&timer.lock);
}

int jobs_start(void)
{
    memset(&timer, 0, sizeof(timer));
    mutex_init(&timer.lock, RANK_QUEUE);
    timer.heap.before = earlier;
    list_init(&timer.fired);
    int r = hmm_thread_start(&timer.thread, "hmm-jobs", jobs_main, NULL);
    if (r)
        mutex_destroy(&timer.lock);
    return r;
}

void jobs_stop(void)
{
    mutex_lock(&timer.lock);
    timer.stopping = true;
    wake();
    mutex_unlock(&timer.lock);
    hmm_thread_join(timer.thread);
    mutex_destroy(&timer.lock);
}

void jobs_forget(void)
{
    memset(&timer, 0, sizeof(timer));
}

/* ---- descriptors of fences --------------------------------------------------------------------------------------- */

static void watch_fires(struct fence_callback *cb, hmm_fence *fence)
{
    struct watch *w = container_of(cb, struct watch, callback);
    mutex_lock(&timer.lock);
    w->done = fence != NULL;
    list_add_tail(&timer.fired, &w->link);
    wake();
    mutex_unlock(&timer.lock);
}

struct adoption {
    pid_t tid;
    int fd;
};

static int adopt_in_root(void *arg)
{
    const struct adoption *a = arg;
    return os->fd_of_thread(a->tid, a->fd);
}

static int add_watch(hmm_fence *fence, int fd)
{
    struct watch *w = mem_alloc(sizeof(*w));
    if (!w)
        return -ENOMEM;
    struct adoption a = {.tid = os_tid(), .fd = fd};
    w->fd = threads_call(adopt_in_root, &a);
    if (w->fd < 0) {
        int r = w->fd;
        mem_free(w, sizeof(*w));
        return r;
    }
    w->callback.fn = watch_fires;
    list_init(&w->callback.link);
    mutex_lock(&timer.lock);
    timer.watches++;
    mutex_unlock(&timer.lock);
    if (!fence_add_callback(fence, &w->callback)) {
        fence_wait(fence, -1); /* it is being completed: readable as soon as everybody can see that */
        os->event_set(fd);
        watch_fires(&w->callback, NULL);
    }
    return 0;
}

int fence_watch(hmm_fence *fence)
{
    int fd = os->event_open();
    if (fd < 0)
        return hmm_fail(fd, "hmm_fence_fd: the system gives no descriptor (eventfd): %s", hmm_strerror(fd));
    int r = fence_done(fence) ? os->event_set(fd) : add_watch(fence, fd);
    if (!r)
        return fd;
    os->close(fd);
    return hmm_fail(r, "hmm_fence_fd: the library cannot have a duplicate of the descriptor (pidfd_getfd): %s",
                    hmm_strerror(r));
}
