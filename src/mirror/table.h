/* SPDX-License-Identifier: MIT */
/*
 * A mirror's page table (kernel: the device page table that mm/hmm.rst leaves to drivers; hmm_pt of HMM v8). The public half is in
 * <hmm/driver.h>.
 *
 *   mirror_life.c   registering, references, release, the end
 *   mirror_table.c  directories: finding, making, giving up
 *   mirror_fill.c   entries: filling, looking up, invalidation
 *   mirror_bits.c   walk, marks, dirty collection, discard
 *
 * Filling is the retry loop of the kernel's document:
 *
 *   again: seq = read_begin(notifier)         waits while an invalidation is in progress
 *          snapshot of the directory           may be stale as soon as it is taken
 *          lock; if read_retry(seq) unlock, again; write entries, filled = seq; unlock
 *
 * The entries of a directory may be used only while its notifier's sequence number is still `filled`. So an invalidation makes the
 * whole directory stale the moment it begins, whatever its callback has emptied so far; pages that did not move are found again by
 * a snapshot. The device's own migrations do not move the number, and need not: they only add pages.
 *
 * The notifier is inserted before core is asked anything about the directory, so that no change after the answer is missed.
 *
 * What a run relies on besides is the generation. It moves when the directory is given up, before the device is asked whether it uses
 * anything of it; and when the mirror itself has the device let go (collect, discard, the end). A device that looks at it after it has
 * made its use visible is either seen by that question or finds that it has moved.
 *
 * Locks. None is held across an operation of the driver but the DMA hooks, which run under the directory's. Nothing of the caller's is
 * touched under one: it may be away, and who brings it home asks this mirror to let go of it. So answers are gathered in a few words of
 * the stack, or in memory of ours.
 *
 *   the turn          which directories exist: not a mutex, because its holder inserts and removes notifiers, and asks the driver.
 *                     Nothing that an invalidate() waits for may wait for it
 *     mirror->lock    hash chains, the turn itself            (RANK_DRIVER)
 *     dir->lock       entries                                 (RANK_DRIVER; never with mirror->lock)
 *   mirrors.lock      all mirrors, whose device each is of    (RANK_DRIVER; alone)
 */
#ifndef HMM_MIRROR_TABLE_H
#define HMM_MIRROR_TABLE_H

#include "base/list.h"
#include "base/lock.h"
#include "mirror/mirror.h"
#include "mm/thread.h"

/* In entries, beside the public bits. */
#define ENTRY_MAPPED (1ull << 57)  /* by dma_map(); stays while the device may still use it */
#define ENTRY_REFUSED (1ull << 56) /* by dma_map() */
#define ENTRY_RIGHTS (HMM_MIRROR_VALID | HMM_MIRROR_WRITE | HMM_MIRROR_DEVICE)

#define DIR_PAGES_MAX (HMM_MIRROR_DIR / 4096)

struct hmm_mirror_dir {
    struct hmm_notifier notifier; /* in the tree exactly while the directory has a range */
    struct hmm_mirror *m;
    struct hmm_mirror_dir *next; /* hash chain: m->lock; list of unused ones: the turn */
    uintptr_t base;              /* written by who has the turn, while no notifier is in the tree and nobody can find it */
    uint32_t users;              /* atomic; rises under m->lock only */
    uint32_t generation;         /* atomic */
    uint32_t recent;             /* atomic; second chance */
    uint32_t dirty;              /* entries that are; atomic, rises with users > 0 */
    uint64_t given;              /* runs handed out; the same */
    uint64_t word;               /* the driver's */
    struct mutex lock;           /* what follows */
    uint64_t filled;             /* sequence number at which the entries were read */
    uint32_t valid;              /* entries that are */
    uint32_t used;               /* entries that are not 0 */
    uint32_t changing;           /* the mirror has the device let go: nothing is filled, nor handed out as current */
    uint32_t changed, waiters;   /* futex: changing became 0, if anybody waits */
    bool current;                /* filled means something */
    uint64_t *origin;            /* with DMA hooks: page numbers, of entries that are mapped; else NULL */
    uint64_t entry[];
};

#define MIRROR_ENDING (1u << 31) /* in calls: unregister has begun */

struct hmm_mirror {
    struct list link;       /* of all; mirrors.lock */
    struct hmm_device *dev; /* until it is unregistered: for calls inside */
    struct hmm_mirror_ops ops;
    void *priv;
    uint32_t flags;
    uint32_t refs;      /* atomic */
    uint32_t calls;     /* atomic, futex: calls inside; MIRROR_ENDING */
    uint32_t released;  /* atomic, futex: enum mirror_released */
    uint32_t loss_told; /* atomic */
    uint32_t ended;     /* atomic, futex: it needs the device no more */
    struct work work;   /* release after a loss */
    uint64_t filled;    /* statistics */
    size_t dir_bytes;   /* of one directory */

    struct mutex lock;
    struct hmm_mirror_dir **hash; /* lock */
    unsigned hash_bits;
    uint32_t turn_taken, turns, turn_waiters; /* lock; turns: futex */

    struct hmm_mirror_dir **all; /* every directory ever made, [0, made); grows in the turn */
    unsigned made, max, hand;    /* made: atomic */
    struct hmm_mirror_dir *unused;
};

/* ---- mirror_life.c ---- */

/* Begins a call: 0, -ESRCH, -ENODEV. */
int mirror_enter(struct hmm_mirror *m);
/* The mirrors that this process sees are those of the one that it was forked from. */
bool mirror_is_foreign(void);
static inline bool mirror_is_ending(const struct hmm_mirror *m)
{
    return __atomic_load_n(&m->calls, __ATOMIC_SEQ_CST) & MIRROR_ENDING;
}
void mirror_leave(struct hmm_mirror *m);

/* This thread is in an operation of the mirror, or in the callback of a walk: it must not wait for its end. */
struct mirror_inside {
    struct mirror_inside *outer;
    const struct hmm_mirror *m;
};
void mirror_inside_begin(struct mirror_inside *i, const struct hmm_mirror *m);
void mirror_inside_end(struct mirror_inside *i);

/* ---- mirror_table.c ---- */

/* The directory of addr, with one more user, or NULL; make: makes it, which waits for the turn. */
struct hmm_mirror_dir *mirror_dir_find(struct hmm_mirror *m, uintptr_t addr, bool make);
void mirror_dir_drop(struct hmm_mirror_dir *d);
/* The lowest directory in [from, end), with one more user, or NULL. */
struct hmm_mirror_dir *mirror_dir_next(struct hmm_mirror *m, uintptr_t from, uintptr_t end);
/* Makes it free for another range if nobody uses it. */
void mirror_dir_give_up(struct hmm_mirror *m, uintptr_t base);
int mirror_table_init(struct hmm_mirror *m, unsigned max);
/* Every directory loses its range and its notifier. No call is inside. */
void mirror_table_empty(struct hmm_mirror *m);
void mirror_table_free(struct hmm_mirror *m);

/* ---- mirror_fill.c ---- */

extern const struct hmm_notifier_ops mirror_notifier_ops;
/* Reads the directory from core. 0, -EAGAIN: it changes too often; or core's error. No locks; blocks. */
int mirror_fill(struct hmm_mirror_dir *d);
/* Writes an entry and counts. Caller holds d->lock. */
void mirror_set_entry(struct hmm_mirror_dir *d, unsigned i, uint64_t e);
/* Empties [start, end) of the directory; keep: bits that stay. Mapped pages stay mapped. Caller holds d->lock. */
void mirror_empty(struct hmm_mirror_dir *d, uintptr_t start, uintptr_t end, uint64_t keep);
/* Has dma_unmap() called for what is empty there. Caller holds d->lock. */
void mirror_unmap(struct hmm_mirror_dir *d, uintptr_t start, uintptr_t end);
/*
 * The mirror itself has the device let go of [start, end) of d. Nothing is handed out between begin and end. begin: 0, or with brief
 * -EAGAIN; end in any case. No locks.
 */
int mirror_change_begin(struct hmm_mirror_dir *d, uintptr_t start, uintptr_t end, enum hmm_event_type type, bool brief);
void mirror_change_end(struct hmm_mirror_dir *d);

/* Indices of the pages of [start, end) that are in the directory. */
static inline void mirror_clip(const struct hmm_mirror_dir *d, uintptr_t start, uintptr_t end, unsigned *first, unsigned *last)
{
    uintptr_t top = d->base + HMM_MIRROR_DIR;
    *first = start > d->base ? (unsigned)((start - d->base) >> os_page_shift()) : 0;
    *last = (unsigned)(((end < top ? end : top) - d->base) >> os_page_shift());
}

#endif
