/* SPDX-License-Identifier: MIT */
/*
 * See lock.h. POSIX locks underneath, so that thread sanitizers understand them. The ranks held are a bit mask per thread.
 */
#include "base/lock.h"

#include <limits.h>
#include <signal.h>
#include <stdio.h>

#include "base/futex.h"

#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))

uint64_t lock_violations;
void (*lock_report)(const char *line);
void (*lock_delay)(enum lock_rank rank, bool taken);

THREAD_LOCAL uint32_t held;

/* ---- signals ---- */

THREAD_LOCAL bool signals_never; /* a library thread: all signals are blocked for good */
THREAD_LOCAL unsigned signals_depth;
THREAD_LOCAL sigset_t signals_before;

void signals_library_thread(void)
{
    signals_never = true;
}

bool signals_in_library_thread(void)
{
    return signals_never;
}

void signals_block(void)
{
    sigset_t all, before;
    if (signals_never)
        return;
    if (signals_depth == 0) { /* counted when they are blocked: a handler that comes before takes locks, too */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        signals_before = before;
    }
    signals_depth++;
}

void signals_unblock(void)
{
    if (signals_never || --signals_depth > 0)
        return;
    pthread_sigmask(SIG_SETMASK, &signals_before, NULL);
}

static uint32_t bit(enum lock_rank rank)
{
    return 1u << rank;
}

static void set_held(enum lock_rank rank)
{
    held |= bit(rank);
}

static void clear_held(enum lock_rank rank)
{
    held &= ~bit(rank);
}

#ifdef HMM_LOCK_CHECK

THREAD_LOCAL bool reporting; /* the report itself takes locks */

static const char *rank_name(enum lock_rank rank)
{
    static const char *const names[] = {
        [RANK_MANAGER] = "manager",   [RANK_AS] = "address-space", [RANK_BLOCK] = "block",     [RANK_CHANGING] = "changing",
        [RANK_NOTIFIER] = "notifier", [RANK_DRIVER] = "driver",    [RANK_PAGEMAP] = "pagemap", [RANK_JOBS] = "jobs",
        [RANK_QUEUE] = "queue",       [RANK_ALLOC] = "allocator",  [RANK_LOG] = "log",
    };
    return names[rank];
}

static void violation(const char *what, enum lock_rank rank, uint32_t others)
{
    if (reporting)
        return;
    reporting = true;
    __atomic_fetch_add(&lock_violations, 1, __ATOMIC_RELAXED);
    char line[160];
    snprintf(line, sizeof(line), "lock order: %s the %s lock (rank %d) while holding ranks 0x%x", what, rank_name(rank),
             (int)rank, others);
    if (lock_report)
        lock_report(line);
    reporting = false;
}

static void check_take(enum lock_rank rank)
{
    uint32_t allowed = bit(rank) - 1;
    if (held & ~allowed)
        violation("takes", rank, held);
}

static void check_drop(enum lock_rank rank)
{
    if (!(held & bit(rank)))
        violation("releases, without having it,", rank, held);
}

static void check_wait(enum lock_rank rank)
{
    uint32_t others = held & ~bit(rank) & ~bit(RANK_MANAGER);
    if (others)
        violation("waits under", rank, others);
}

void lock_assert_held(enum lock_rank rank)
{
    if (!(held & bit(rank)))
        violation("needs, and lacks,", rank, held);
}

void lock_assert_none(void)
{
    uint32_t others = held & ~bit(RANK_MANAGER);
    if (others)
        violation("must hold no lock, yet holds", (enum lock_rank)__builtin_ctz(others), others);
}

#else

static void check_take(enum lock_rank rank)
{
    (void)rank;
}

static void check_drop(enum lock_rank rank)
{
    (void)rank;
}

static void check_wait(enum lock_rank rank)
{
    (void)rank;
}

void lock_assert_held(enum lock_rank rank)
{
    (void)rank;
}

void lock_assert_none(void)
{
}

#endif

uint32_t lock_held_ranks(void)
{
    return held;
}

const uint32_t *lock_held_word(void)
{
    return &held;
}

void lock_forget(void)
{
    held = 0;
    signals_never = false;
    signals_depth = 0;
}

void mutex_init(struct mutex *l, enum lock_rank rank)
{
    pthread_mutex_init(&l->m, NULL);
    l->rank = rank;
}

void mutex_destroy(struct mutex *l)
{
    pthread_mutex_destroy(&l->m);
}

static void before_taking(enum lock_rank rank)
{
    signals_block();
    check_take(rank);
    if (__builtin_expect(lock_delay != NULL, 0))
        lock_delay(rank, false);
}

static void taken(enum lock_rank rank)
{
    set_held(rank);
    if (__builtin_expect(lock_delay != NULL, 0))
        lock_delay(rank, true);
}

void mutex_lock(struct mutex *l)
{
    before_taking(l->rank);
    pthread_mutex_lock(&l->m);
    taken(l->rank);
}

bool mutex_trylock(struct mutex *l)
{
    signals_block();
    if (pthread_mutex_trylock(&l->m)) {
        signals_unblock();
        return false;
    }
    check_take(l->rank);
    set_held(l->rank);
    return true;
}

void mutex_unlock(struct mutex *l)
{
    check_drop(l->rank);
    clear_held(l->rank);
    pthread_mutex_unlock(&l->m);
    signals_unblock();
}

void mutex_wait(struct mutex *l, const uint32_t *word, uint32_t seen)
{
    mutex_wait_timeout(l, word, seen, -1);
}

void mutex_wait_timeout(struct mutex *l, const uint32_t *word, uint32_t seen, int64_t timeout_ns)
{
    check_wait(l->rank);
    mutex_unlock(l);
    futex_wait(word, seen, timeout_ns);
    mutex_lock(l);
}

void mutex_wake_all(const uint32_t *word)
{
    futex_wake(word, INT_MAX);
}

void rwlock_init(struct rwlock *l, enum lock_rank rank)
{
    pthread_rwlockattr_t attr;
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&l->rw, &attr);
    pthread_rwlockattr_destroy(&attr);
    l->rank = rank;
}

void rwlock_destroy(struct rwlock *l)
{
    pthread_rwlock_destroy(&l->rw);
}

void rwlock_read_lock(struct rwlock *l)
{
    before_taking(l->rank);
    pthread_rwlock_rdlock(&l->rw);
    taken(l->rank);
}

void rwlock_read_unlock(struct rwlock *l)
{
    check_drop(l->rank);
    clear_held(l->rank);
    pthread_rwlock_unlock(&l->rw);
    signals_unblock();
}

void rwlock_write_lock(struct rwlock *l)
{
    before_taking(l->rank);
    pthread_rwlock_wrlock(&l->rw);
    taken(l->rank);
}

void rwlock_write_unlock(struct rwlock *l)
{
    check_drop(l->rank);
    clear_held(l->rank);
    pthread_rwlock_unlock(&l->rw);
    signals_unblock();
}
