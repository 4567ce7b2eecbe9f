/* SPDX-License-Identifier: MIT */
/* See thread.h. */
#include "mm/thread.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>

#include "base/alloc.h"
#include "base/error.h"
#include "base/futex.h"
#include "mm/stack.h"
#include "os/os.h"

#define THREADS_MAX 512

/* A sanitizer reports from the thread that it finds something in. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define REPORTS_TO_STDERR
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define REPORTS_TO_STDERR
#endif
#endif

struct hmm_thread {
    pthread_t id;
    void *stack;
    char name[16];
    void (*fn)(void *);
    void *arg;
    unsigned slot;
};

struct request {
    int (*fn)(void *);
    void *arg;
    int result;
    uint32_t done;
};

static struct {
    pthread_t root, log;
    void *root_stack, *log_stack;
    struct mutex lock;       /* RANK_QUEUE */
    struct request *request; /* one at a time */
    uint32_t word;           /* futex: request or stop */
    uint32_t free;           /* futex: request slot became free */
    uint32_t stopping;
    struct {
        uint32_t tid; /* 0: unused */
        char name[16];
        const uint32_t *held; /* its lock ranks */
        uintptr_t block;      /* in its control block */
    } known[THREADS_MAX];
    unsigned top; /* no entry at or above was ever used; atomic */
} threads;

/* ---- registry ---- */

static unsigned register_thread(const char *name)
{
    for (unsigned i = 0; i < THREADS_MAX; i++) {
        uint32_t unused = 0;
        if (!__atomic_compare_exchange_n(&threads.known[i].tid, &unused, UINT32_MAX, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            continue;
        snprintf(threads.known[i].name, sizeof(threads.known[i].name), "%s", name);
        threads.known[i].held = lock_held_word();
        threads.known[i].block = (uintptr_t)pthread_self();
        unsigned top = __atomic_load_n(&threads.top, __ATOMIC_RELAXED);
        while (top <= i && !__atomic_compare_exchange_n(&threads.top, &top, i + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
            ;
        __atomic_store_n(&threads.known[i].tid, (uint32_t)os_tid(), __ATOMIC_RELEASE);
        return i;
    }
    return THREADS_MAX;
}

static uintptr_t known_block(uint32_t tid)
{
    for (unsigned i = 0; i < __atomic_load_n(&threads.top, __ATOMIC_ACQUIRE); i++)
        if (__atomic_load_n(&threads.known[i].tid, __ATOMIC_ACQUIRE) == tid)
            return threads.known[i].block;
    return 0;
}

static void unregister_thread(unsigned slot)
{
    if (slot < THREADS_MAX)
        __atomic_store_n(&threads.known[slot].tid, 0, __ATOMIC_RELEASE);
}

const char *thread_holding_locks(uint32_t tid)
{
    for (unsigned i = 0; i < THREADS_MAX; i++)
        if (__atomic_load_n(&threads.known[i].tid, __ATOMIC_ACQUIRE) == tid)
            return __atomic_load_n(threads.known[i].held, __ATOMIC_RELAXED) ? threads.known[i].name : NULL;
    return NULL;
}

static int create(pthread_t *id, void **stack, void *(*fn)(void *), void *arg)
{
    sigset_t all, old;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    int r = stack_new(&attr, stack);
    if (!r) {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        r = -pthread_create(id, &attr, fn, arg);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
    }
    pthread_attr_destroy(&attr);
    if (r) {
        stack_free(*stack);
        *stack = NULL;
    }
    return r;
}

static void join(pthread_t id, void *stack)
{
    pthread_join(id, NULL);
    stack_free(stack);
}

/* ---- root ---- */

static void *root_main(void *arg)
{
    (void)arg;
    prctl(PR_SET_NAME, "hmm-root");
    signals_library_thread();
    log_library_thread();
    unsigned slot = register_thread("hmm-root");
    mutex_lock(&threads.lock);
    while (!threads.stopping) {
        struct request *q = threads.request;
        if (!q) {
            mutex_wait(&threads.lock, &threads.word, threads.word);
            continue;
        }
        mutex_unlock(&threads.lock);
        q->result = q->fn(q->arg);
        mutex_lock(&threads.lock);
        threads.request = NULL;
        threads.free++;
        __atomic_store_n(&q->done, 1, __ATOMIC_RELEASE);
        futex_wake(&q->done, INT_MAX);
        futex_wake(&threads.free, INT_MAX);
    }
    mutex_unlock(&threads.lock);
    unregister_thread(slot);
    return NULL;
}

int threads_call(int (*fn)(void *), void *arg)
{
    struct request q = {.fn = fn, .arg = arg};
    mutex_lock(&threads.lock);
    while (threads.request)
        mutex_wait(&threads.lock, &threads.free, threads.free);
    threads.request = &q;
    threads.word++;
    mutex_unlock(&threads.lock);
    futex_wake(&threads.word, 1);
    while (!__atomic_load_n(&q.done, __ATOMIC_ACQUIRE))
        futex_wait(&q.done, 0, -1);
    return q.result;
}

static void *log_main(void *arg)
{
    (void)arg;
    prctl(PR_SET_NAME, "hmm-log");
    signals_library_thread();
    unsigned slot = register_thread("hmm-log");
    const uint32_t *word = log_pending_word();
    for (;;) {
        uint32_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
        if (__atomic_load_n(&threads.stopping, __ATOMIC_ACQUIRE))
            break;
        if (log_drain() == 0)
            futex_wait(word, seen, -1);
    }
    log_draining(false);
    log_drain();
    unregister_thread(slot);
    return NULL;
}

static int private_files(void *arg)
{
    (void)arg;
#ifdef REPORTS_TO_STDERR
    static const int keep[] = {2};
    return os->private_files(keep, 1);
#else
    return os->private_files(NULL, 0);
#endif
}

int threads_start(void)
{
    os_known_thread_block = known_block;
    memset(&threads, 0, sizeof(threads));
    mutex_init(&threads.lock, RANK_QUEUE);
    int r = create(&threads.root, &threads.root_stack, root_main, NULL);
    if (r)
        return hmm_fail(r, "a library thread cannot be created: %s; raise the limit of threads (ulimit -u)", hmm_strerror(r));
    r = threads_call(private_files, NULL);
    log_draining(true); /* before there is a thread that must not deliver its own lines */
    if (!r)
        r = create(&threads.log, &threads.log_stack, log_main, NULL);
    if (r) {
        log_draining(false);
        threads.log = 0;
        threads_stop();
        return hmm_fail(r, "a library thread with a descriptor table of its own cannot be set up: %s", hmm_strerror(r));
    }
    return 0;
}

void threads_stop(void)
{
    mutex_lock(&threads.lock);
    __atomic_store_n(&threads.stopping, 1, __ATOMIC_RELEASE);
    threads.word++;
    mutex_unlock(&threads.lock);
    futex_wake(&threads.word, INT_MAX);
    log_wake();
    join(threads.root, threads.root_stack);
    if (threads.log)
        join(threads.log, threads.log_stack);
    mutex_destroy(&threads.lock);
}

void threads_forget(void)
{
    stacks_forget();
    memset(&threads, 0, sizeof(threads));
}

/* ---- library threads ---- */

static __thread bool in_library __attribute__((tls_model("initial-exec")));

bool thread_in_library(void)
{
    return in_library;
}

static void *thread_main(void *arg)
{
    struct hmm_thread *t = arg;
    in_library = true;
    prctl(PR_SET_NAME, t->name);
    signals_library_thread();
    log_library_thread();
    t->slot = register_thread(t->name);
    t->fn(t->arg);
    unregister_thread(t->slot);
    return NULL;
}

static int create_thread(void *arg)
{
    struct hmm_thread *t = arg;
    return create(&t->id, &t->stack, thread_main, t);
}

int hmm_thread_start(struct hmm_thread **out, const char *name, void (*fn)(void *), void *arg)
{
    struct hmm_thread *t = mem_alloc(sizeof(*t));
    if (!t)
        return hmm_fail(-ENOMEM, "no memory for thread %s", name);
    strncpy(t->name, name, sizeof(t->name) - 1);
    t->fn = fn;
    t->arg = arg;
    *out = t;
    int r = threads_call(create_thread, t);
    if (r) {
        *out = NULL;
        mem_free(t, sizeof(*t));
        return hmm_fail(r, "thread %s cannot be created: %s", name, hmm_strerror(r));
    }
    return 0;
}

void hmm_thread_join(struct hmm_thread *t)
{
    join(t->id, t->stack);
    mem_free(t, sizeof(*t));
}

/* ---- workers ---- */

static void worker_main(void *arg)
{
    struct workers *w = arg;
    mutex_lock(&w->lock);
    unsigned index = w->started++;
    for (;;) {
        if (!list_empty(&w->queue)) {
            struct work *work = container_of(w->queue.next, struct work, link);
            list_del(&work->link);
            mutex_unlock(&w->lock);
            work->fn(work, index);
            mutex_lock(&w->lock);
        } else if (w->stopping) {
            break;
        } else {
            mutex_wait(&w->lock, &w->word, w->word);
        }
    }
    mutex_unlock(&w->lock);
}

int workers_start(struct workers *w, const char *name, unsigned n)
{
    return workers_start_growing(w, name, n, n);
}

int workers_start_growing(struct workers *w, const char *name, unsigned n, unsigned max)
{
    memset(w, 0, sizeof(*w));
    mutex_init(&w->lock, RANK_QUEUE);
    list_init(&w->queue);
    w->threads = mem_alloc(max * sizeof(*w->threads));
    w->room = max;
    w->name = name;
    int r = w->threads ? 0 : -ENOMEM;
    for (; w->n < n && !r; w->n += r == 0)
        r = hmm_thread_start(&w->threads[w->n], name, worker_main, w);
    if (r)
        workers_stop(w);
    return r ? hmm_fail(r, "threads %s cannot be started: %s", name, hmm_strerror(r)) : 0;
}

void workers_grow(struct workers *w)
{
    mutex_lock(&w->lock);
    bool grow = !w->growing && !w->stopping && !list_empty(&w->queue) && w->n < w->room;
    w->growing |= grow;
    mutex_unlock(&w->lock);
    if (!grow)
        return;
    int r = hmm_thread_start(&w->threads[w->n], w->name, worker_main, w);
    mutex_lock(&w->lock);
    w->n += r == 0;
    w->growing = false;
    mutex_unlock(&w->lock);
}

void workers_stop(struct workers *w)
{
    mutex_lock(&w->lock);
    w->stopping = true;
    w->word++;
    mutex_unlock(&w->lock);
    futex_wake(&w->word, INT_MAX);
    for (unsigned i = 0; i < w->n; i++)
        hmm_thread_join(w->threads[i]);
    if (w->threads)
        mem_free(w->threads, w->room * sizeof(*w->threads));
    mutex_destroy(&w->lock);
}

void workers_queue(struct workers *w, struct work *work)
{
    mutex_lock(&w->lock);
    bool idle = list_empty(&work->link);
    if (idle) {
        list_add_tail(&w->queue, &work->link);
        w->word++;
    }
    mutex_unlock(&w->lock);
    if (idle)
        futex_wake(&w->word, 1);
}

void work_init(struct work *work, void (*fn)(struct work *, unsigned))
{
    list_init(&work->link);
    work->fn = fn;
}
