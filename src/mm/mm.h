/* SPDX-License-Identifier: MIT */
/*
 * The address space: what is armed, what is where, and what the program's munmap, mremap and madvise did to it.
 *
 * Lock order, outermost first:
 *
 *   mm->as (shared: a migrator's or pager's short step; exclusive: applying events, freeing blocks, audit)
 *     block->lock
 *       notifier tree
 *         driver locks
 *           pagemap
 *             queues (flights, staging, lru, limbo, faults)
 *               internal allocator, log
 *
 * mm->as keeps the reader from reading, so under it nothing may wait: no callback, no copy, no fence, no system call that
 * raises an event or a fault, no retry of EAGAIN. Every UFFDIO_COPY, ZEROPAGE or MOVE into or out of program memory is issued
 * under mm->as shared and the block's lock, in the same hold that checked the entry: the caller of MADV_DONTNEED is already
 * gone when the reader has read but not yet applied its event.
 *
 * A page in transit belongs to a flight. Its entry says FLIGHT, and the flight says where the page's home is *now*: an unmap
 * or drop sets that to 0, a remap moves it. Whoever lands the flight publishes at that address.
 */
#ifndef HMM_MM_H
#define HMM_MM_H

#include "base/fence.h"
#include "base/list.h"
#include "base/lock.h"
#include "base/util.h"
#include "notifier/notifier.h"
#include "os/os.h"
#include "pagemap/pagemap.h"
#include "pagetable/pagetable.h"
#include <hmm/driver.h>

struct mm;
struct sched; /* job/job.h */

/* An open device as core sees it. */
struct hmm_device {
    struct mm *mm;
    const struct hmm_driver *driver;
    void *priv;
    struct pagemap *pagemap;
    struct sched *sched; /* its jobs */
    char spec[128];
    uint32_t lost;                          /* atomic, only rises: 0, or enum hmm_loss + 1 */
    char lost_why[HMM_LOST_MEMORY + 1][96]; /* per loss; written once, before `lost` says so */
};

/* No job runs on it, and no page goes to it any more. */
static inline bool device_is_lost(const struct hmm_device *dev)
{
    return __atomic_load_n(&dev->lost, __ATOMIC_ACQUIRE) != 0;
}

/* Nor does any page come back: what only the device had is to be poisoned. */
static inline bool device_memory_is_lost(const struct hmm_device *dev)
{
    return __atomic_load_n(&dev->lost, __ATOMIC_ACQUIRE) > HMM_LOST_MEMORY;
}

/* Of a lost device, in words. */
static inline const char *device_lost_why(const struct hmm_device *dev)
{
    return dev->lost_why[__atomic_load_n(&dev->lost, __ATOMIC_ACQUIRE) - 1];
}

/* COPY: has data in staging or on the device page. CLEAR: was absent or zero. DONE: landed or dropped; its old place is to be freed. */
enum flight_page { FLIGHT_EMPTY, FLIGHT_COPY, FLIGHT_CLEAR, FLIGHT_DONE };

/* The migration of (part of) one block in one direction. Owned by one thread at a time; home[] is written under mm->as
 * exclusive by events and under mm->as shared plus block lock by its owner. */
struct flight {
    struct list link; /* free list */
    uint32_t id;      /* in entries */
    struct hmm_device *dev;
    uintptr_t base;      /* block of origin */
    unsigned first, end; /* page indices [first, end) that may be in use */
    bool huge;           /* the whole block, as one huge page */
    void *staging;       /* slot of a flight to a device, got and given back with it; or NULL */
    struct invalidation inv;
    bool invalidating; /* begun and not ended */
    unsigned staged;   /* pages in it */
    hmm_fence copied, cleared;
    bool copying, clearing; /* the fence is in use */
    struct hmm_dma *dma;    /* room for two entries per page: what the driver was asked */
    uintptr_t *home;        /* per page: current address, or 0: not in flight, or dropped */
    uint64_t *page;         /* per page: device page */
    uint8_t *how;           /* per page: enum flight_page */
};

#define FLIGHTS_MAX 192
#define LIMBO_MARKS 16
#define OWED_MAX 64

#define LIMBO_BATCHES 8

/* What events left to do outside the lock: devices to invalidate, and device pages of dropped memory, which are freed when no
 * device can touch them any more. Filled under mm->as exclusive, landed by a worker. */
struct limbo {
    struct invalidation inv[LIMBO_MARKS];
    unsigned marks;
    struct {
        uintptr_t start, end;
    } range[LIMBO_MARKS]; /* where blocks became unused */
    unsigned ranges;
    unsigned remaps; /* pages that live on elsewhere: no CPU fault may copy them before this batch has landed */
    uint64_t chain;  /* of page descriptors through their owner field; 0: empty */
    enum { LIMBO_FREE, LIMBO_FILLING, LIMBO_TAKEN } state; /* queue_lock */
};

/* Statistics that have no better home; relaxed atomics. */
struct mm_stats {
    uint64_t cpu_faults, cpu_faults_slow, zero_filled, device_faults;
    uint64_t pages_to_device, pages_to_system, pages_cleared, bytes_to_device, bytes_to_system;
    uint64_t huge_to_device, huge_to_system, evicted;
    uint64_t events_unmap, events_remove, events_remap, dropped, retries, rollbacks, pinned;
};

static inline void stat_add(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

struct mm {
    struct rwlock as;
    struct pagetable pt;
    struct notifier_tree notifiers;
    uint32_t *gate; /* odd while events are being read and applied, see hmm_event_gate(); on a page of its own */
    int gate_fd;    /* of that page, read-only; in the library's private table */

    /* Descriptors in the library's private table: valid in library threads only. */
    struct os_uffd uffd;         /* the program's: user ranges and outbound staging */
    struct os_uffd discard_uffd; /* without events: the discard area only */
    int pagemap_fd, maps_fd;
    void *discard; /* one block */

    struct mutex queue_lock; /* RANK_QUEUE: flights, lru, limbo */
    struct flight *flights[FLIGHTS_MAX];
    unsigned nflights;
    struct list free_flights;
    uint32_t flights_changed; /* futex */
    struct list lru;          /* blocks, coldest first */
    struct limbo limbo[LIMBO_BATCHES];
    uint32_t remaps_pending; /* futex: remaps in batches that have not landed */
    uint32_t landing_waiters;
    uint32_t landings; /* futex: some flight landed; waiters for FLIGHT entries look again */

    struct {
        uintptr_t start, end;
    } owed[OWED_MAX]; /* unmaps that a remap overtook (design fact 7); under mm->as exclusive */

    struct mm_stats stats;
    void (*limbo_ready)(
        struct mm *mm); /* tells the workers; set by fault/ before its threads start, never NULL while events are read */
};

/* ---- mm.c: life ---- */

/* Opens everything in the calling library thread, whose descriptor table is private. Message set on failure. */
int mm_init(struct mm *mm);
void mm_exit(struct mm *mm); /* no flight, no device, no reader is left */
/* Waits until every event that was read so far has been applied. */
void mm_sync(struct mm *mm);
/* Runs after EAGAIN: nothing is held; gives the event's thread and the reader time. attempt counts from 0. */
void mm_backoff(struct mm *mm, unsigned attempt);

/* ---- arm.c: which memory is managed ---- */

/* Why pages cannot move. */
enum arm_verdict { ARM_OK, ARM_UNMAPPED, ARM_UNMOVABLE };

/* Pages that the kernel writes at thread exit without faulting (design fact 17): they never leave. */
struct tcb_list {
    unsigned n; /* the main thread is the first */
    uintptr_t at[256];
};
void tcb_list_read(struct tcb_list *list);

/* What the mapping at addr allows, below `end`: *part_end is where the verdict stops to hold. ARM_OK: private anonymous read-write
 * memory. No locks needed; it may be outdated at once. */
enum arm_verdict mm_verdict(struct mm *mm, uintptr_t addr, uintptr_t end, const struct tcb_list *tcbs, uintptr_t *part_end);
/*
 * Makes [start, end) of one block armed: registered with our userfaultfd and DONTFORK. The range has the verdict ARM_OK. Caller holds
 * mm->as shared and the block lock. 0: armed, and no event was pending, so that every later change of the mapping will be one.
 * -EAGAIN: an event is pending or the mapping just changed; -EINVAL: it cannot be registered.
 */
int mm_arm(struct mm *mm, struct block *b, uintptr_t start, uintptr_t end);
/* Unregisters what of an unused block is armed and frees the block; false: an event is pending, nothing was done. Caller holds
 * mm->as exclusively; wakes sleepers. */
bool mm_disarm(struct mm *mm, struct block *b);
/* Disarms the block of addr if nothing of it is away. No locks held. */
void mm_trim(struct mm *mm, uintptr_t addr);
/* The same for every block of [start, end). */
void mm_prune(struct mm *mm, uintptr_t start, uintptr_t end);
/* ---- event.c ---- */

/* Reads all pending messages and applies the events, under mm->as exclusive; puts fault addresses into faults[0 .. max).
 * Returns their number; *more: read again. */
struct fault {
    uintptr_t addr;
    uint32_t tid;
    bool write;
};
unsigned mm_read_events(struct mm *mm, struct fault *faults, unsigned max, bool *more);
/* Applied by the reader; here for tests. Caller holds mm->as exclusively. */
void mm_event_unmap(struct mm *mm, uintptr_t start, uintptr_t end);
void mm_event_remove(struct mm *mm, uintptr_t start, uintptr_t end);
void mm_event_remap(struct mm *mm, uintptr_t from, uintptr_t to, size_t len);
/* Takes the batch that events have filled, or NULL. The worker that took it lands it. */
struct limbo *mm_limbo_take(struct mm *mm);
/* Invalidates and frees. No locks; blocks. */
void mm_limbo_land(struct mm *mm, struct limbo *l);
/* Waits until no device can reach a remapped page through its old address. No locks. */
void mm_remaps_wait(struct mm *mm);

/* A device page on a chain through the descriptors (its owner field is free once its entry is gone). */
void chain_add(uint64_t *chain, uint32_t pagemap, uint64_t page);
/* Puts the reference of every page on it. No locks above RANK_DRIVER. */
void chain_put(uint64_t chain);

/* ---- flight.c ---- */

/* From the pool: NULL when none is free and !wait. */
struct flight *flight_get(struct mm *mm, bool wait);
/* A flight outside the pool, for a thread that must never wait for one. NULL: no memory or too many. */
struct flight *flight_new(struct mm *mm);
void flight_put(struct mm *mm, struct flight *f);
/* All flights are back. */
void flight_free_all(struct mm *mm);
/* Empties the record for a new use. */
void flight_reset(struct flight *f, struct hmm_device *dev, uintptr_t base, unsigned first, unsigned end);
/* Ends the flight's invalidation if it is begun. */
void flight_end_invalidation(struct mm *mm, struct flight *f);
/* Tells those who wait for FLIGHT entries, and wakes CPU faults asleep at the current homes. */
void flight_landed(struct mm *mm);
/* Waits until some flight lands after `seen` (value of mm->landings read under the lock that showed the FLIGHT entry). */
void flight_wait(struct mm *mm, uint32_t seen);

/* ---- lru.c ---- */

void lru_touch(struct mm *mm, struct block *b);  /* hottest now; caller holds mm->as */
void lru_remove(struct mm *mm, struct block *b); /* before it is freed */

#endif
