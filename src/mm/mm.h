/* SPDX-License-Identifier: MIT */
/*
 * The address space: what is armed, what is where, and what the program's munmap, mremap and madvise did to it.
 *
 * Lock order, outermost first:
 *
 *   mm->as (shared: a migrator's or pager's short step; exclusive: applying events, freeing blocks, audit)
 *     block->lock
 *       changing (the map of memory that changes may matter to)
 *         notifier tree
 *           driver locks
 *             pagemap
 *               jobs
 *                 queues (flights, staging, lru, limbo, faults)
 *                   internal allocator, log
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
#include "mm/region.h"
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
    uint64_t transit;                       /* atomic: pages of its flights, see flight_departed() */
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
    unsigned counted;  /* pages that the device's transit count has of it */
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
#define DROPPING_MAX 64

#define LIMBO_BATCHES 8

/* What events left to do outside the lock: devices to invalidate, and device pages of dropped memory, which are freed when no
 * device can touch them any more. Filled under mm->as exclusive, landed by a worker. */
struct limbo {
    struct invalidation inv[LIMBO_MARKS];
    unsigned marks;
    struct limbo_range {
        uintptr_t start, end;
    } range[LIMBO_MARKS]; /* where blocks became unused */
    unsigned ranges;
    unsigned remaps; /* pages that live on elsewhere: no CPU fault may copy them before this batch has landed */
    uint32_t number; /* since it is not free; of its beginning */
    bool freed;      /* devices have let go, and its device pages are free: what is left is to be tidied up */
    uint64_t chain;  /* of page descriptors through their owner field; 0: empty */
    uint64_t taken;  /* os_now() */
    enum { LIMBO_FREE, LIMBO_FILLING, LIMBO_TAKEN } state; /* queue_lock */
};

/* Statistics that have no better home; relaxed atomics. */
struct mm_stats {
    uint64_t cpu_faults, cpu_faults_slow, zero_filled, device_faults;
    uint64_t pages_to_device, pages_to_system, pages_cleared, bytes_to_device, bytes_to_system;
    uint64_t huge_to_device, huge_to_system, evicted;
    uint64_t events_unmap, events_remove, events_remap, events_fork, dropped, retries, rollbacks, pinned;
    uint64_t calls_unmap, calls_remove, calls_remap, calls_protect, calls_fork, calls_release;
    uint64_t forks, pages_to_children, poisoned, limited, transit_pages;
};

static inline void stat_add(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

/* What fork has to know of what happens to pages (process/fork.c); set at start-up, before events are read. */
struct fork_hooks {
    /* Messages are about to be read, or those that were are applied. mm->as is held exclusively. */
    void (*reading)(struct mm *mm, bool now);
    /* FORK was read: uffd is the child's, in the library's table, for the hook to close. mm->as is held exclusively. */
    void (*forked)(struct mm *mm, int uffd);
    /* Entries of [start, end) are about to be dropped, or to go to `to` (0: dropped). mm->as is held exclusively. */
    void (*changing)(struct mm *mm, uintptr_t start, uintptr_t end, uintptr_t to);
    /* Page i of a flight has arrived at home[i], and its entry is gone: f->page[i], or with a slot f->staging, has the bytes still.
     * mm->as is held shared, with the block's lock. Only called while mm->forking. */
    void (*arrived)(struct mm *mm, const struct flight *f, unsigned i, const char *slot);
};

struct mm {
    struct rwlock as;
    struct pagetable pt;
    struct regions regions; /* what is registered: changed under `as` exclusive */
    struct regions kept;    /* what the program itself keeps from children, see hide.c; the same */
    struct notifier_tree notifiers;
    uint32_t *gate; /* odd while events are being read and applied, see hmm_event_gate(); on a page of its own */
    int gate_fd;    /* of that page, read-only; in the library's private table */

    /* Descriptors in the library's private table: valid in library threads only. */
    struct os_uffd uffd; /* the program's: user ranges and outbound staging */
    int pagemap_fd, maps_fd;

    struct mutex queue_lock; /* RANK_QUEUE: flights, lru, limbo */
    struct flight *flights[FLIGHTS_MAX];
    unsigned nflights;
    struct list free_flights;
    uint32_t flights_changed; /* futex */
    struct list lru;          /* blocks, coldest first */
    struct limbo limbo[LIMBO_BATCHES];
    uint32_t limbo_filled;   /* number of the last batch; queue_lock */
    uint32_t limbo_landed;   /* futex: how many have landed */
    uint32_t remaps_pending; /* futex: remaps in batches that have not landed */
    uint32_t landing_waiters;
    uint32_t landings; /* futex: some flight landed; waiters for FLIGHT entries look again */

    struct owed {
        uintptr_t start, end;
        uintptr_t target, target_end; /* of the remap */
        bool maybe;                   /* what stood there was not proved to be registered */
    } owed[OWED_MAX];                 /* unmaps that a remap overtook (design fact 7); under mm->as exclusive */
    uint64_t read_at; /* os_now() after the read whose events are being applied; 0: none are. Under mm->as exclusive */

    struct dropping {
        uintptr_t start, end; /* empty: unused */
        uint64_t since;       /* on the clock of os_now() */
    } dropping[DROPPING_MAX]; /* see dropping.c; queue_lock */
    uint64_t dropping_until;  /* none is noted behind this; 0: there was none. Atomic */

    struct mm_stats stats;
    void (*limbo_ready)(
        struct mm *mm); /* tells the workers; set by fault/ before its threads start, never NULL while events are read */

    const struct fork_hooks *fork; /* or NULL */
    struct list captures;          /* under mm->as exclusively: see estate.h */
    /* By handlers: a fork() is under way; from before the child's memory is copied until its estate is. Written under mm->as
     * exclusively. Nothing is armed or disarmed meanwhile (-EAGAIN), and what is rolled back stays in its slot, too. */
    bool forking;
    bool fork_event; /* EVENT_FORK was asked for and given; uffd.features names all that the kernel has */
    bool owes;       /* of `owed` some may be noted */
    /* One more, one less page in the staging slot at this address is wanted: the slot is not emptied before. Any lock above RANK_QUEUE;
     * the last must be given back without locks. Set by migrate/. */
    void (*slot_keep)(uintptr_t addr, uint64_t pages);
    void (*slot_drop)(uintptr_t addr, uint64_t pages);
};

/* Whether the kernel tells of forks; else managed memory is kept from children (MADV_DONTFORK). */
static inline bool mm_has_fork_event(const struct mm *mm)
{
    return mm->fork_event;
}

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
 * Makes addr part of a region that is registered in MISSING mode and proved, so that pages of it may be taken: the whole mapping around
 * addr, without what never leaves (own memory, the main thread's control block). Regions that were there become one with it. Where a
 * region is that was only watched, it is watched no less afterwards. Takes mm->as exclusively: no locks held. Library threads only.
 *
 * 0, also when it was so before: the caller looks again under its own hold, since nothing is kept. -EAGAIN: an event is pending, or
 * the mapping just changed: mm_backoff() and again. -EINVAL, -EBUSY (another userfaultfd has it), -ENOMEM (vm.max_map_count; a
 * warning says so): it cannot be, and nothing of it may be taken; what is said of addr holds below *part_end (set for errors only).
 */
int mm_arm(struct mm *mm, uintptr_t addr, const struct tcb_list *tcbs, uintptr_t *part_end);

/* Whether the page at `at`, if it is there, is about to be dropped: it must not be taken. Holds up to *stop, which only falls. No lock is
 * needed; mm->as is held where the answer matters. */
enum mm_dropping {
    DROPPING_NOT,
    DROPPING_SOON, /* a moment ago: mm_backoff() and again */
    DROPPING_LATE, /* for long: it was freed lazily, most likely, and will stay */
};
enum mm_dropping mm_dropping(struct mm *mm, uintptr_t at, uintptr_t *stop);
/* What is present in [start, end) is not about to be dropped by a call whose event was read until then (on the clock of os_now()): it
 * was given by us (UINT64_MAX), or that call has returned. Takes queue_lock. */
void mm_dropped(struct mm *mm, uintptr_t start, uintptr_t end, uint64_t until);

/* What mm_watch() may do about memory that is not private and anonymous. */
enum watch_how {
    WATCH_FREE,     /* nothing: registering such memory takes its fault-around */
    WATCH_REGISTER, /* register it, where the kernel allows (shared anonymous memory, memfd, hugetlb; not files) */
};
/*
 * Makes sure that the program's munmap, mremap, MADV_DONTNEED and MADV_FREE on the mapping at addr are told to notifiers: it is registered,
 * in WP mode where it was not registered at all, which costs its first touch nothing. mprotect raises no event. Answers for
 * [addr, *part_end), *part_end <= end.
 *
 * A region stays as long as a notifier overlaps it. So: insert the notifier first, then watch, then read_begin, look and publish.
 * There is nothing to undo; a region that nobody needs any more goes with the next event in it, which costs less than to register it
 * anew for the notifier of the next job.
 *
 * 0: watched. -ENOENT: nothing is mapped. -EOPNOTSUPP: such memory cannot be watched (a file; with WATCH_FREE everything that is not
 * private and anonymous; own memory, vdso). -EBUSY: another userfaultfd has it. -EAGAIN: an event is pending: mm_backoff() and
 * again. -ENOMEM: too many mappings (vm.max_map_count), or no memory.
 *
 * No locks held: takes mm->as shared, and exclusively where something is to be done. Never blocks on events, never faults. Library
 * threads only.
 */
int mm_watch(struct mm *mm, uintptr_t addr, uintptr_t end, enum watch_how how, uintptr_t *part_end);

/* Whether a page of the region is on a device, in flight or poisoned. Caller holds mm->as in either mode, and no block's lock; under
 * the shared lock the answer may be outdated at once. */
bool mm_is_away(struct mm *mm, struct region *r);
/*
 * Gives back what is not needed any more in and beside [start, end): blocks without entries are freed; regions of which nothing is away
 * are unregistered as a whole, so that faults there are the kernel's own again, or, where a notifier overlaps, watched only. What cannot
 * be done while an event is pending, or before what is about to be dropped has gone, is left for later. Wakes sleepers. mm_trim() looks
 * first whether there is anything to do. No locks held; library threads only.
 */
enum prune {
    PRUNE_DONE,
    PRUNE_LATER, /* of something it is not known for long whether it is still to be dropped: the next event or touch there */
    PRUNE_AGAIN, /* mm_backoff() and again */
};
void mm_trim(struct mm *mm, uintptr_t start, uintptr_t end);
enum prune mm_prune(struct mm *mm, uintptr_t start, uintptr_t end);
/*
 * The same as mm_prune(), but also where notifiers overlap, and only the part of a region within [start, end): for a wrapper that is about
 * to unmap the range and has told the notifiers itself, so that no event is raised. Pages that are away stay away.
 */
void mm_release(struct mm *mm, uintptr_t start, uintptr_t end);
/* Registers the mapping around addr, within its region, once more: somebody else has taken our registration away. Caller holds mm->as. */
int mm_register_again(struct mm *mm, uintptr_t addr);
/*
 * A fault at addr, where there is no entry, in memory that need not be registered: nothing of its region is away, or it is in no region,
 * because it grew in place by mremap or its region was given up. It becomes part of a region that it continues and of which something
 * is away; else it is given back. False: an event is pending, nothing was done. The caller wakes. No locks held; library threads only.
 */
bool mm_fault_unused(struct mm *mm, uintptr_t addr);

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
/*
 * Takes the batch that events have filled, or NULL. The worker that took it lands it. Batches land one after the other, unless one takes
 * long (a device does not let go): then the next may overtake it, except where pages were remapped before, whose old addresses the next
 * batch does not know. *later: that may be so soon; look again after LIMBO_LATE_NS.
 */
#define LIMBO_LATE_NS 50000000ull
struct limbo *mm_limbo_take(struct mm *mm, bool *later);
/* Invalidates and frees. No locks; blocks. */
void mm_limbo_land(struct mm *mm, struct limbo *l);
/* Waits until the device pages of every event that was read so far are free, timeout_ns at most: a device may use what an earlier
 * event has unmapped for as long as a job runs. No locks. */
void mm_limbo_wait(struct mm *mm, uint64_t timeout_ns);
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
/* Accounting: so many pages of f are on their way; and none any more. Between the two f->dev does not change. */
void flight_departed(struct mm *mm, struct flight *f, unsigned pages);
void flight_arrived(struct mm *mm, struct flight *f);
/* Ends the flight's invalidation if it is begun. */
void flight_end_invalidation(struct mm *mm, struct flight *f);
/* Tells those who wait for FLIGHT entries. CPU faults asleep at the homes are for the caller to wake. */
void flight_landed(struct mm *mm);
/* Waits until some flight lands after `seen` (value of mm->landings read under the lock that showed the FLIGHT entry). */
void flight_wait(struct mm *mm, uint32_t seen);

/* ---- lru.c ---- */

/* ---- away.c ---- */

/* Whether [start, end) has an entry of this kind; ENTRY_NONE: any. Takes mm->as and block locks. */
bool mm_range_has(struct mm *mm, uintptr_t start, uintptr_t end, enum entry_kind kind);
/* Something that migrations look at under mm->as keeps pages of [start, end) from leaving from now on: those that were on their way have
 * landed when this returns, on either side. No locks; library threads only. */
void mm_land_range(struct mm *mm, uintptr_t start, uintptr_t end);

void lru_touch(struct mm *mm, struct block *b);  /* hottest now; caller holds mm->as */
void lru_remove(struct mm *mm, struct block *b); /* before it is freed */

#endif
