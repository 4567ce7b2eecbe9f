/* SPDX-License-Identifier: MIT */
/*
 * Device memory as pages (kernel: mm/memremap.c, struct dev_pagemap).
 *
 * Life: create -> alive -> kill (no new references) -> [owner migrates everything back] -> wait (last reference gone) ->
 * destroy. A set-up that fails half-way is undone by actions registered so far, in reverse; destroy runs the same actions.
 *
 * A descriptor is 12 bytes: with the 8-byte entry and its share of the block below the 24 bytes a migrated page may cost. Reference and pin counts
 * are separate; both atomic. A page is free when its reference count is 0. Counts rise without the lock, by whoever has a
 * reference already; the last reference goes under the lock, so that under it counts, `used` and the buddy allocator agree.
 */
#ifndef HMM_PAGEMAP_H
#define HMM_PAGEMAP_H

#include "base/lock.h"
#include "os/os.h"
#include "pagemap/buddy.h"
#include <hmm/driver.h>

#define PAGEMAP_IDS 256 /* 0 is none */
#define PAGEMAP_PAGES_MAX ((uint64_t)1 << 39)

/* Twelve bytes, so that with its 8-byte entry and its share of the block a migrated page stays below 24. */
struct page_desc {
    uint32_t owner_low; /* see page_owner() */
    uint16_t owner_high;
    uint16_t pins; /* each pin also holds a reference */
    uint32_t refs;
};
_Static_assert(sizeof(struct page_desc) == 12,
               "24 bytes a migrated page: 12 here, 8 in the page table, the rest for the block");

/* The address of the one user page it backs, or 0: the reverse mapping. Its user's to set; 0 when free. Below 2^60, a multiple of
 * 4 KiB. */
#define PAGE_OWNER_SHIFT 12
static inline uint64_t page_owner(const struct page_desc *d)
{
    return ((uint64_t)d->owner_high << 32 | d->owner_low) << PAGE_OWNER_SHIFT;
}

static inline void page_set_owner(struct page_desc *d, uint64_t addr)
{
    d->owner_low = (uint32_t)(addr >> PAGE_OWNER_SHIFT);
    d->owner_high = (uint16_t)(addr >> (PAGE_OWNER_SHIFT + 32));
}

struct pagemap;
typedef void (*pagemap_undo)(struct pagemap *pm);
#define PAGEMAP_UNDO_MAX 4

struct pagemap {
    struct mutex lock; /* RANK_PAGEMAP: buddy, counts */
    uint32_t id;       /* 1..255; in page-table entries */
    bool dying;        /* atomic */
    struct hmm_device *dev;
    void *priv; /* of the driver, for ops */
    struct hmm_pagemap_desc desc;
    struct page_desc *pages;
    struct buddy *buddy;
    uint64_t used;     /* pages with references, and those being freed */
    uint64_t limit;    /* of used; 0: none */
    uint64_t freeing;  /* of used: no reference any more, page_free is being called */
    uint32_t released; /* futex: moves when used falls */
    uint32_t waiters;  /* sleeping on it */

    /* What creation did, in order. */
    pagemap_undo undo[PAGEMAP_UNDO_MAX];
    unsigned nundo;
};

/* Bytes that the device moves at least; what goes and comes by faults is whole granules. */
static inline uint64_t pagemap_granule(const struct pagemap *pm)
{
    return pm->desc.granule;
}

/* A contiguous run of device pages. */
struct page_run {
    uint64_t page;
    uint64_t count;
};

/* Checks desc (-EINVAL with message; -EEXIST: cpu_map overlaps another live pagemap) and takes an id. -ENOMEM, -ENFILE: ids. */
int pagemap_create(const struct hmm_pagemap_desc *desc, struct hmm_device *dev, void *priv, struct pagemap **out);
/* By id from a page-table entry; NULL when there is none. A dying one is found until it is destroyed: its pages must come home.
 * Lock-free; the caller holds a reference on a page of it, or the address-space lock. */
struct pagemap *pagemap_by_id(uint32_t id);

/* Allocates up to `want` pages with one reference each, contiguous where possible (whole orders first), as at most max runs.
 * Returns the number of pages got, which may be less than want, 0 when full or at a limit, or -ENODEV when dying. Ascending within a run;
 * run order is the order of use. */
int64_t pagemap_alloc(struct pagemap *pm, uint64_t want, struct page_run *runs, unsigned max, unsigned *nruns);

/*
 * Limits (kernel: mm/page_counter.c). Of one pagemap, and of all of the process together; both in pages, 0: none. A page is charged to both
 * from its allocation until its last reference has gone. pagemap_alloc() gets no page beyond them; one that is lower than the use
 * frees nothing by itself.
 */
void pagemap_set_limit(struct pagemap *pm, uint64_t pages);
void pagemap_set_total_limit(uint64_t pages);
uint64_t pagemap_total_limit(void); /* 0: none */
uint64_t pagemap_total_used(void);
int64_t pagemap_total_room(void);           /* see struct pagemap_room */
uint64_t pagemap_limit(struct pagemap *pm); /* 0: none */
/* The most pages that it can have at once. */
uint64_t pagemap_capacity(struct pagemap *pm);
/* What one pagemap, and the process, have left. Negative: so much more is used than the limit allows. */
struct pagemap_room {
    int64_t own, total; /* total: INT64_MAX without a limit */
    bool limited;       /* own is less than what is free on the device, or total less than own */
};
struct pagemap_room pagemap_room(struct pagemap *pm);

/* One more reference. The caller holds one, or a lock that keeps the page's user from dropping it. */
void pagemap_get(struct pagemap *pm, uint64_t page);
/* Drops a reference of each of count pages; frees those at zero and calls page_free. No lock above RANK_DRIVER held. */
void pagemap_put(struct pagemap *pm, uint64_t page, uint64_t count);
/* A pin holds a reference; the caller has one or a lock, as for pagemap_get(). -ENODEV when dying. */
int pagemap_pin(struct pagemap *pm, uint64_t page);
void pagemap_unpin(struct pagemap *pm, uint64_t page);
static inline uint32_t pagemap_pins(const struct pagemap *pm, uint64_t page)
{
    return __atomic_load_n(&pm->pages[page].pins, __ATOMIC_ACQUIRE);
}

void pagemap_kill(struct pagemap *pm);
/* Waits until no page has a reference and no page_free runs; -ETIMEDOUT. timeout_ns < 0: none. No locks held. */
int pagemap_wait(struct pagemap *pm, int64_t timeout_ns);
/* After kill and wait: where the process saw it is not its own any more, and may be another's. Else it stays as it is. */
void pagemap_retire(struct pagemap *pm);
/* After kill and wait. Frees everything. */
void pagemap_destroy(struct pagemap *pm);

/* In a child of fork: there are none. */
void pagemap_forget(void);

/* Pages with references now. Takes the lock. */
uint64_t pagemap_used(struct pagemap *pm);
/* Buddy, counts and references agree. Takes the lock. */
bool pagemap_is_valid(struct pagemap *pm);
uint64_t pagemap_metadata_bytes(const struct pagemap *pm);

#endif
