/* SPDX-License-Identifier: MIT */
/*
 * See take.h. UFFDIO_MOVE is used on runs that PAGEMAP_SCAN reported, never across holes, and after any result that is not
 * complete the destination is scanned and only that believed (design fact 1). It is issued on the program's userfaultfd: success
 * proves that no event is pending, so that the mapping is the one validated under the lock (fact 4).
 */
#include "migrate/take.h"

#include <errno.h>
#include <string.h>

#include "debug/inject.h"
#include "mm/hold.h"
#include "notifier/changing.h"

#define REGIONS 64
#define SCAN_TRIES 10000

struct take {
    struct mm *mm;
    struct flight *f;
    struct block *b;
    uint8_t *pages;
    uintptr_t unarmed; /* of -ENXIO */
};

static size_t page_bytes(unsigned pages)
{
    return (size_t)pages << os_page_shift();
}

static uint8_t classify(struct mm *mm, struct hmm_device *dev, struct block *b, unsigned i, uint32_t *landings)
{
    entry_t e = block_entry(b, i);
    switch (entry_kind(e)) {
    case ENTRY_NONE: return TAKE_WANTED;
    case ENTRY_DEVICE: return entry_id(e) == dev->pagemap->id ? TAKE_ALREADY : TAKE_ELSEWHERE;
    case ENTRY_FLIGHT: *landings = __atomic_load_n(&mm->landings, __ATOMIC_SEQ_CST); return TAKE_FLYING;
    default: return TAKE_UNMOVABLE;
    }
}

/* What of a window is held is not wanted. */
struct held {
    uint8_t *pages; /* of the block */
    int n;          /* of them were wanted */
};

static void mark_held(uintptr_t start, uintptr_t end, void *arg)
{
    struct held *h = arg;
    for (uintptr_t a = start; a < end; a += os_page_size())
        if (h->pages[block_index(a)] == TAKE_WANTED) {
            h->pages[block_index(a)] = TAKE_HELD;
            h->n++;
        }
}

static int leave_held(uint8_t *pages, uintptr_t start, uintptr_t end)
{
    struct held h = {.pages = pages};
    hold_each(start, end, mark_held, &h);
    return h.n;
}

int take_survey(struct mm *mm, struct hmm_device *dev, struct window w, const struct tcb_list *tcbs, uint8_t *pages,
                uint32_t *landings)
{
    int wanted = 0;
    rwlock_read_lock(&mm->as);
    struct block *b = pagetable_find(&mm->pt, w.start);
    if (b)
        mutex_lock(&b->lock);
    for (uintptr_t at = w.start, part_end; at < w.end; at = part_end) {
        static const uint8_t why[] = {[ARM_UNMAPPED] = TAKE_UNMAPPED, [ARM_UNMOVABLE] = TAKE_UNMOVABLE};
        enum arm_verdict verdict = mm_verdict(mm, at, w.end, tcbs, &part_end);
        for (uintptr_t a = at; a < part_end; a += os_page_size()) {
            unsigned i = block_index(a);
            pages[i] = b ? classify(mm, dev, b, i, landings) : TAKE_WANTED;
            if (pages[i] == TAKE_WANTED && verdict != ARM_OK)
                pages[i] = why[verdict];
            wanted += pages[i] == TAKE_WANTED;
        }
    }
    if (b)
        mutex_unlock(&b->lock);
    rwlock_read_unlock(&mm->as);
    return wanted - leave_held(pages, w.start, w.end);
}

/* The page is in the flight now. */
static void take_one(struct take *t, unsigned i, enum flight_page how, enum take_page state)
{
    t->f->how[i] = how;
    t->f->home[i] = block_addr(t->b, i);
    t->pages[i] = state;
    block_set(t->b, i, entry_make(ENTRY_FLIGHT, t->f->id, i));
}

/* What stands in the slot has left the program already: the scan must not fail. It allocates next to nothing, so it does not for long. */
static int scan_slot(struct mm *mm, uintptr_t at, uintptr_t end, struct os_region *v, uintptr_t *walked)
{
    int r = -1;
    for (unsigned tries = 0; tries < SCAN_TRIES && r < 0; tries++)
        r = os->pagemap_scan(mm->pagemap_fd, at, end, v, REGIONS, walked);
    if (r < 0)
        hmm_log(HMM_LOG_ERROR, "pages in transit cannot be found (PAGEMAP_SCAN: %s)", hmm_strerror(r));
    return r;
}

/*
 * Takes those of pages [i, i+n) that stand in the slot, as what they are there: a page that was the zero page when it was scanned
 * may have been written before it was moved. Returns the first index that does not stand there.
 */
static unsigned believe_slot(struct take *t, unsigned i, unsigned n)
{
    uintptr_t slot = (uintptr_t)t->f->staging, at = slot + page_bytes(i), end = at + page_bytes(n), walked;
    struct os_region v[REGIONS];
    unsigned first_missing = i;
    while (at < end) {
        int r = scan_slot(t->mm, at, end, v, &walked);
        for (int k = 0; k < r; k++) {
            enum flight_page how = v[k].flags & OS_PG_ZERO ? FLIGHT_CLEAR : FLIGHT_COPY;
            unsigned from = (v[k].start - slot) >> os_page_shift(), to = (v[k].end - slot) >> os_page_shift();
            for (unsigned j = from; j < to; j++)
                if (t->pages[j] == TAKE_WANTED)
                    take_one(t, j, how, TAKE_TAKEN);
            if (from == first_missing)
                first_missing = to;
        }
        if (r < 0)
            break;
        at = walked;
    }
    return first_missing;
}

/* Moves one scanned run of WANTED pages. 0 or -EAGAIN. */
static int take_run(struct take *t, unsigned i, unsigned n, bool zero)
{
    unsigned end = i + n;
    while (i < end) {
        char *to = (char *)t->f->staging + page_bytes(i);
        int64_t r = os->uffd_move(t->mm->uffd.fd, (uintptr_t)to, block_addr(t->b, i), page_bytes(end - i));
        if (r == (int64_t)page_bytes(end - i) && (!zero || mutate("zero-seen"))) {
            for (; i < end; i++)
                take_one(t, i, zero ? FLIGHT_CLEAR : FLIGHT_COPY, TAKE_TAKEN);
            return 0;
        }
        unsigned stuck = believe_slot(t, i, end - i);
        if (stuck >= end)
            return 0;
        if (r == -EAGAIN)
            return -EAGAIN;
        if (r > 0 && stuck > i) {
            i = stuck; /* progress: ask again from the page that did not come, to learn why */
            continue;
        }
        t->pages[stuck] = r == -EBUSY ? TAKE_PINNED
                          : r == -EINVAL || r == -EFAULT
                              ? TAKE_UNMOVABLE /* EFAULT: poisoned in an earlier life of the manager */
                              : TAKE_BUSY;
        i = stuck + 1;
    }
    return 0;
}

/* Zero pages go one half of a block at a time: some kernels corrupt the huge zero page when it is moved as one (docs/kernel-facts.md). */
static unsigned run_max(bool zero)
{
    return zero ? block_pages() / 2 : block_pages();
}

/* The WANTED sub-runs of a scanned region. */
static int take_region(struct take *t, const struct os_region *v)
{
    bool zero = v->flags & OS_PG_ZERO;
    unsigned end = (v->end - t->b->base) >> os_page_shift();
    if (v->flags & OS_PG_HUGE && v->end - v->start == OS_BLOCK_SIZE && !zero)
        t->f->huge = true; /* confirmed when all of it was taken */
    for (unsigned i = block_index(v->start); i < end;) {
        unsigned n = 0;
        while (i + n < end && n < run_max(zero) && t->pages[i + n] == TAKE_WANTED)
            n++;
        if (n) {
            int r = take_run(t, i, n, zero);
            if (r)
                return r;
        }
        i += n ? n : 1;
    }
    return 0;
}

/* Pages that the scan did not show are absent, and stay so: the range is registered, and a fault finds the entry. */
static void take_absent(struct take *t, uintptr_t start, uintptr_t end)
{
    for (uintptr_t a = start; a < end; a += os_page_size())
        if (t->pages[block_index(a)] == TAKE_WANTED)
            take_one(t, block_index(a), FLIGHT_CLEAR, TAKE_ABSENT);
}

/* One armed part. 0 or error. */
static int take_part(struct take *t, uintptr_t start, uintptr_t end)
{
    while (start < end) {
        struct os_region v[REGIONS];
        uintptr_t walked, at = start;
        int n = os->pagemap_scan(t->mm->pagemap_fd, start, end, v, REGIONS, &walked);
        if (n < 0)
            return n;
        for (int k = 0; k < n; k++) {
            take_absent(t, at, v[k].start);
            int r = take_region(t, &v[k]);
            if (r)
                return r;
            at = v[k].end;
        }
        take_absent(t, at, walked);
        start = walked;
    }
    return 0;
}

/*
 * MOVE refuses while an event is pending; a scan does not, and what looks absent may be a mapping that an unread remap has left,
 * whose entries would follow the remapped data. So absent pages count only when no event is pending after they were marked: what
 * is still unread then came later, and will find the entries.
 */
static int settle_absent(struct take *t, int r)
{
    bool any = false;
    for (unsigned i = t->f->first; i < t->f->end && !any; i++)
        any = t->pages[i] == TAKE_ABSENT;
    if (!any)
        return r;
    bool proved = (!r || r == -ENXIO) && (os->uffd_pending(t->mm->uffd.fd) == 0 || mutate("absent-pending"));
    if (!proved && !r)
        r = -EAGAIN;
    for (unsigned i = t->f->first; i < t->f->end; i++) {
        if (t->pages[i] != TAKE_ABSENT)
            continue;
        t->pages[i] = proved ? TAKE_TAKEN : TAKE_WANTED;
        if (!proved) {
            t->f->how[i] = FLIGHT_DONE; /* its device page is to be freed, unless it is taken after all */
            t->f->home[i] = 0;
            block_set(t->b, i, 0);
        }
    }
    return r;
}

static bool has_wanted(const struct flight *f, const uint8_t *pages)
{
    for (unsigned i = f->first; i < f->end; i++)
        if (pages[i] == TAKE_WANTED)
            return true;
    return false;
}

/* The survey's verdict may be old: somebody else may have taken a page since, or pinned it. And what the program is changing stays. */
static void forget_foreign(struct take *t)
{
    leave_held(t->pages, block_addr(t->b, t->f->first), block_addr(t->b, t->f->end));
    bool changing =
        changing_keeps_off(block_addr(t->b, t->f->first), block_addr(t->b, t->f->end)) && !mutate("change-keeps-off");
    for (unsigned i = t->f->first; i < t->f->end; i++) {
        uintptr_t at = block_addr(t->b, i);
        if (t->pages[i] == TAKE_WANTED && (block_entry(t->b, i) || (changing && changing_keeps_off(at, at + os_page_size()))))
            t->pages[i] = TAKE_BUSY;
    }
}

void take_refuse(const struct flight *f, uint8_t *pages, uintptr_t start, uintptr_t end, enum take_page as)
{
    uintptr_t stop = f->base + page_bytes(f->end);
    for (uintptr_t a = start; a < end && a < stop; a += os_page_size())
        if (pages[block_index(a)] == TAKE_WANTED)
            pages[block_index(a)] = as;
}

/* How far the region reaches in which pages may be away from `at` on; at: it does not. */
static uintptr_t armed_end(struct mm *mm, uintptr_t at, uintptr_t end)
{
    const struct region *r = region_find(&mm->regions, at);
    if (!r || !r->missing || r->state != REGION_PROVED)
        return at;
    return r->end < end ? r->end : end;
}

/* What is present there was freed lazily, and stays; the rest may go. */
static int leave_present(struct take *t, uintptr_t start, uintptr_t end)
{
    struct os_region v[REGIONS];
    for (uintptr_t at = start, walked; at < end; at = walked) {
        int n = os->pagemap_scan(t->mm->pagemap_fd, at, end, v, REGIONS, &walked);
        if (n < 0)
            return n;
        for (int k = 0; k < n; k++)
            for (uintptr_t a = v[k].start; a < v[k].end; a += os_page_size())
                if (t->pages[block_index(a)] == TAKE_WANTED)
                    t->pages[block_index(a)] = TAKE_BUSY;
    }
    return 0;
}

/* One part of which the kernel's mapping allows it. 0 or error. */
static int take_armed(struct take *t, uintptr_t start, uintptr_t end)
{
    for (uintptr_t at = start, stop; at < end; at = stop) {
        stop = at + os_page_size();
        if (t->pages[block_index(at)] != TAKE_WANTED)
            continue; /* also what was taken before the last -ENXIO */
        stop = armed_end(t->mm, at, end);
        t->unarmed = at;
        if (stop == at)
            return -ENXIO;
        enum mm_dropping dropping = mm_dropping(t->mm, at, &stop);
        int r = dropping == DROPPING_SOON ? -EAGAIN : dropping == DROPPING_LATE ? leave_present(t, at, stop) : 0;
        if (!r)
            r = take_part(t, at, stop);
        if (r)
            return r;
    }
    return 0;
}

static int take_block(struct take *t, const struct tcb_list *tcbs)
{
    uintptr_t end = t->b->base + page_bytes(t->f->end);
    forget_foreign(t);
    for (uintptr_t at = t->b->base + page_bytes(t->f->first), part_end; at < end; at = part_end) {
        part_end = at + os_page_size();
        if (t->pages[block_index(at)] != TAKE_WANTED)
            continue;
        enum arm_verdict verdict = mm_verdict(t->mm, at, end, tcbs, &part_end);
        if (verdict == ARM_OK) {
            int r = take_armed(t, at, part_end);
            if (r)
                return r;
            continue;
        }
        for (uintptr_t a = at; a < part_end; a += os_page_size())
            if (t->pages[block_index(a)] == TAKE_WANTED)
                t->pages[block_index(a)] = verdict == ARM_UNMAPPED ? TAKE_UNMAPPED : TAKE_UNMOVABLE;
    }
    return 0;
}

int take_pages(struct mm *mm, struct flight *f, const struct tcb_list *tcbs, uint8_t *pages, uintptr_t *unarmed)
{
    if (!has_wanted(f, pages))
        return 0;
    rwlock_read_lock(&mm->as);
    struct block *b = pagetable_get(&mm->pt, f->base);
    int r = -ENOMEM;
    if (b) {
        struct take t = {.mm = mm, .f = f, .b = b, .pages = pages};
        mutex_lock(&b->lock);
        r = block_reserve(&mm->pt, b, f->end - f->first);
        if (!r) /* while a fork() is under way without the kernel's event, the child is to have them */
            r = mm->forking ? -EAGAIN : settle_absent(&t, take_block(&t, tcbs));
        mutex_unlock(&b->lock);
        *unarmed = t.unarmed;
    }
    rwlock_read_unlock(&mm->as);
    return r;
}

bool take_find_shared(const struct flight *f, const uint8_t *pages, uint64_t *shared)
{
    bool any = false;
    for (unsigned i = f->first; i < f->end; i++)
        if (pages[i] == TAKE_PINNED) {
            shared[i / 64] |= (uint64_t)1 << i % 64;
            any = true;
        }
    return any;
}

static bool is_shared(const uint64_t *shared, unsigned i)
{
    return shared[i / 64] >> i % 64 & 1;
}

void take_unshare(uintptr_t base, const uint64_t *shared)
{
    lock_assert_none();
    for (unsigned i = 0, n; i < block_pages(); i += n) {
        n = 1;
        if (!is_shared(shared, i))
            continue;
        while (i + n < block_pages() && is_shared(shared, i + n))
            n++;
        os->advise((void *)(base + page_bytes(i)), page_bytes(n), OS_ADVISE_POPULATE_WRITE);
    }
}
