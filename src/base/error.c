/* SPDX-License-Identifier: MIT */
/*
 * See error.h. `lock` (RANK_LOG, the innermost) protects everything static below. Deliveries in progress are counted by the
 * generation of the callback they run: hmm_set_log() starts a new generation and waits until no older one is left. A thread inside
 * a callback does not wait there, so two callbacks that (wrongly) set callbacks do not wait for each other. No record of a delivery
 * stands on its thread's stack: that is the program's memory, which nobody may touch under the lock.
 *
 * Messages are formatted by vsnprintf into memory of the thread; for integers, strings and pointers it does not allocate.
 */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/futex.h"
#include "base/lock.h"

#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))
#define LINE_BYTES 256
#define RING_LINES 64
#define GENERATIONS 16        /* that are told apart */
#define LATER_NS 100000000ull /* that log_later() waits for the drainer */

struct line {
    enum hmm_log_level level;
    char text[LINE_BYTES];
};

THREAD_LOCAL char message[LINE_BYTES];
THREAD_LOCAL bool library_thread;
THREAD_LOCAL bool in_callback;
THREAD_LOCAL uint64_t delivering; /* generation of the delivery that this thread is in */

static struct mutex lock = MUTEX_INITIALIZER(RANK_LOG);
static hmm_log_fn callback; /* also read without the lock, to skip work */
static void *callback_arg;
static uint64_t generation;
static unsigned deliveries[GENERATIONS];
static uint32_t delivered; /* futex: a delivery ended while somebody waited */
static unsigned delivery_waiters;

static struct line ring[RING_LINES];
static unsigned ring_first, ring_count;
static uint64_t ring_lost;
static bool draining;
static uint32_t pending; /* futex */

/* ---- error messages ---- */

static void format(char *out, const char *fmt, va_list ap)
{
    int n = vsnprintf(out, LINE_BYTES, fmt, ap);
    if (n >= LINE_BYTES)
        memcpy(out + LINE_BYTES - 4, "...", 4);
}

int hmm_fail(int err, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    format(message, fmt, ap);
    va_end(ap);
    return err;
}

const char *hmm_last_message(void)
{
    return message;
}

void message_clear(void)
{
    message[0] = 0;
}

/* ---- delivery ---- */

static bool any_before(uint64_t limit)
{
    for (uint64_t g = limit; g > 0 && generation - (g - 1) < GENERATIONS; g--)
        if (deliveries[(g - 1) % GENERATIONS])
            return true;
    return false;
}

static void wait_for_deliveries_before(uint64_t limit)
{
    while (any_before(limit)) {
        delivery_waiters++;
        mutex_wait(&lock, &delivered, delivered);
        delivery_waiters--;
    }
}

void hmm_set_log(hmm_log_fn fn, void *arg)
{
    mutex_lock(&lock);
    __atomic_store_n(&callback, fn, __ATOMIC_RELAXED);
    callback_arg = arg;
    uint64_t mine = ++generation;
    if (!in_callback)
        wait_for_deliveries_before(mine);
    mutex_unlock(&lock);
}

/* Calls the callback, if one is set. */
static void deliver(enum hmm_log_level level, const char *text)
{
    mutex_lock(&lock);
    hmm_log_fn fn = callback;
    void *arg = callback_arg;
    uint64_t g = generation;
    if (fn)
        deliveries[g % GENERATIONS]++;
    mutex_unlock(&lock);
    if (!fn)
        return;
    delivering = g;
    in_callback = true;
    fn(level, text, arg);
    in_callback = false;
    mutex_lock(&lock);
    deliveries[g % GENERATIONS]--;
    bool wake = delivery_waiters > 0;
    if (wake)
        delivered++;
    mutex_unlock(&lock);
    if (wake)
        mutex_wake_all(&delivered);
}

/* ---- the ring ---- */

/* Queues the line; false when nobody drains. */
static bool enqueue(enum hmm_log_level level, const char *text)
{
    mutex_lock(&lock);
    bool queue = draining;
    if (queue && ring_count == RING_LINES) {
        ring_lost++;
    } else if (queue) {
        struct line *l = &ring[(ring_first + ring_count++) % RING_LINES];
        l->level = level;
        memcpy(l->text, text, strlen(text) + 1);
        __atomic_fetch_add(&pending, 1, __ATOMIC_RELEASE);
    }
    mutex_unlock(&lock);
    if (queue)
        futex_wake(&pending, 1);
    return queue;
}

/* Takes the oldest line, or after the last one a note of how many were lost. */
static bool dequeue(struct line *out)
{
    mutex_lock(&lock);
    bool some = ring_count > 0 || ring_lost > 0;
    if (ring_count > 0) {
        *out = ring[ring_first];
        ring_first = (ring_first + 1) % RING_LINES;
        ring_count--;
    } else if (ring_lost > 0) {
        out->level = HMM_LOG_WARNING;
        snprintf(out->text, sizeof(out->text), "log: %llu lines were lost here: they came faster than the callback takes them",
                 (unsigned long long)ring_lost);
        ring_lost = 0;
    }
    mutex_unlock(&lock);
    return some;
}

/* The process may be about to end. */
static void wait_taken(void)
{
    uint32_t never = 0;
    for (uint64_t waited = 0; waited < LATER_NS; waited += LATER_NS / 100) {
        mutex_lock(&lock);
        bool some = ring_count > 0;
        for (unsigned g = 0; g < GENERATIONS; g++)
            some |= deliveries[g] > 0;
        mutex_unlock(&lock);
        if (!some)
            return;
        futex_wait(&never, 0, LATER_NS / 100);
    }
}

unsigned log_drain(void)
{
    struct line l;
    unsigned n = 0;
    lock_assert_none();
    for (; dequeue(&l); n++)
        deliver(l.level, l.text);
    return n;
}

void log_draining(bool on)
{
    mutex_lock(&lock);
    draining = on;
    mutex_unlock(&lock);
    if (!on)
        log_drain();
}

void log_library_thread(void)
{
    library_thread = true;
}

const uint32_t *log_pending_word(void)
{
    return &pending;
}

void log_wake(void)
{
    __atomic_fetch_add(&pending, 1, __ATOMIC_RELEASE);
    futex_wake(&pending, 1);
}

void log_forget(void)
{
    mutex_init(&lock, RANK_LOG); /* another thread may have held it at fork */
    memset(deliveries, 0, sizeof(deliveries));
    if (in_callback)
        deliveries[delivering % GENERATIONS] = 1;
    delivery_waiters = 0;
    ring_first = ring_count = 0;
    ring_lost = 0;
    draining = false;
    library_thread = false;
}

/* The child may set a log without ever opening a device. */
__attribute__((constructor)) static void watch_fork(void)
{
    pthread_atfork(NULL, NULL, log_forget);
}

static bool has_callback(void)
{
    return !in_callback && __atomic_load_n(&callback, __ATOMIC_RELAXED);
}

void hmm_log(enum hmm_log_level level, const char *fmt, ...)
{
    char text[LINE_BYTES];
    if (!has_callback())
        return;
    va_list ap;
    va_start(ap, fmt);
    format(text, fmt, ap);
    va_end(ap);
    bool in_the_way = library_thread || (lock_held_ranks() & ~(1u << RANK_MANAGER));
    if (!in_the_way || !enqueue(level, text))
        deliver(level, text);
}

void log_later(enum hmm_log_level level, const char *fmt, ...)
{
    char text[LINE_BYTES];
    if (!has_callback())
        return;
    va_list ap;
    va_start(ap, fmt);
    format(text, fmt, ap);
    va_end(ap);
    if (enqueue(level, text))
        wait_taken();
}
