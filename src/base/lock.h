/* SPDX-License-Identifier: MIT */
/*
 * Mutexes and a reader-writer lock with ranks. A thread may take only locks of a higher rank than those it holds, so one of each.
 * Checked in debug builds (HMM_LOCK_CHECK); a violation is reported through lock_report and counted, never aborts.
 *
 *   address space (RANK_AS) -> block -> changing -> notifier -> driver -> pagemap -> jobs -> queue -> allocator -> log
 *
 * Which ranks a thread holds is kept in every build: hmm_log() must know, because the program's callback may touch managed
 * memory and so must not run under a lock of ours.
 */
#ifndef HMM_BASE_LOCK_H
#define HMM_BASE_LOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * No signal handler of the program runs in a thread that holds one of our locks: it might touch the very memory that the lock's
 * holder is needed for. Every lock blocks signals while it is held; a call that takes several blocks them once around. Nests.
 * Library threads have all signals blocked for good, and say so once.
 */
void signals_block(void);
void signals_unblock(void);
void signals_library_thread(void);
bool signals_in_library_thread(void);

enum lock_rank {
    RANK_MANAGER = 1, /* opening and closing; outermost, held while threads start and stop */
    RANK_AS,          /* address space */
    RANK_BLOCK,
    RANK_CHANGING, /* the map of memory that changes may matter to */
    RANK_NOTIFIER,
    RANK_DRIVER,
    RANK_PAGEMAP,
    RANK_JOBS, /* of one device */
    RANK_QUEUE,
    RANK_ALLOC,
    RANK_LOG,
};

struct mutex {
    pthread_mutex_t m;
    enum lock_rank rank;
};
/* For static locks; nothing to destroy. */
#define MUTEX_INITIALIZER(r)                                                                                                   \
    {                                                                                                                          \
        .m = PTHREAD_MUTEX_INITIALIZER, .rank = (r)                                                                            \
    }

void mutex_init(struct mutex *l, enum lock_rank rank);
void mutex_destroy(struct mutex *l);
void mutex_lock(struct mutex *l);
void mutex_unlock(struct mutex *l);
/* False: somebody has it. */
bool mutex_trylock(struct mutex *l);

/* Waits for *word to differ from seen, releasing l meanwhile; spurious returns allowed. With mutex_wake_all() by whoever
 * changed *word under l. A futex underneath: no memory per waiter. No other lock between RANK_MANAGER and l is held. */
void mutex_wait(struct mutex *l, const uint32_t *word, uint32_t seen);
/* The same, for timeout_ns at most; < 0: for ever. */
void mutex_wait_timeout(struct mutex *l, const uint32_t *word, uint32_t seen, int64_t timeout_ns);
/* Wakes every mutex_wait() on word. After *word changed, under l or later; the word need not exist any more. */
void mutex_wake_all(const uint32_t *word);

/* Writers first: a reader that arrives while a writer waits queues behind it. Not recursive. */
struct rwlock {
    pthread_rwlock_t rw;
    enum lock_rank rank;
};

void rwlock_init(struct rwlock *l, enum lock_rank rank);
void rwlock_destroy(struct rwlock *l);
void rwlock_read_lock(struct rwlock *l);
void rwlock_read_unlock(struct rwlock *l);
void rwlock_write_lock(struct rwlock *l);
void rwlock_write_unlock(struct rwlock *l);

/* Bit (1 << rank) per rank that the calling thread holds. */
uint32_t lock_held_ranks(void);
/* Where that is kept, for another thread to look while this one lives. */
const uint32_t *lock_held_word(void);
/* "Caller holds" assertions; nothing in builds without HMM_LOCK_CHECK. lock_assert_none() allows RANK_MANAGER, which is never
 * taken on the fault path and is held around opening and closing. */
void lock_assert_held(enum lock_rank rank);
void lock_assert_none(void);
/* In a child of fork: the calling thread holds nothing. */
void lock_forget(void);

/* For tests: called before each lock is taken, and when it has been (`taken`); may sleep, and takes no lock. Set while no other thread
 * runs; NULL: nothing. */
extern void (*lock_delay)(enum lock_rank rank, bool taken);

/* Number of rank violations seen so far, and where reports go (set once, before threads). */
extern uint64_t lock_violations;
extern void (*lock_report)(const char *line);

#endif
