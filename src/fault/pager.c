/* SPDX-License-Identifier: MIT */
/*
 * The reader. See fault.h.
 *
 * Where it runs decides the latency of a fault: about 4 us when it is on the CPU of the faulting thread, about 70 us when an idle
 * CPU has to be woken. So it follows: now and then it looks where the faulting thread runs, and binds itself there.
 */

#include <errno.h>
#include <string.h>

#include "debug/inject.h"
#include "fault/bring.h"
#include "fault/failing.h"
#include "fault/fault.h"
#include "migrate/migrate.h"
#include "migrate/staging.h"
#include "mm/thread.h"
#include "os/own.h"
#include "policy/policy.h"

#define FAULTS 64
#define FOLLOW_EVERY 64 /* faults between two looks */
#define INLINE_PAGES 16 /* more is a worker's: the reader must get back to reading */
#define LIMBO_WORKERS 3 /* one lands what events left to do; so many less one may hang in a device before all do */

static struct {
    struct hmm_thread *reader;
    struct workers limbo_worker; /* lands batches, behind nobody who waits for them */
    uint32_t limbo_waits;        /* atomic: one of them waits to see whether a batch may be overtaken */
    struct work limbo_work;
    int stop_fd;
    struct flight *flight; /* the reader's own */
    struct policy_streams streams, zero_streams;
    unsigned since_look;
    int bound_cpu;
    void *zeros; /* a block of own memory that is never written: reading it costs no cache */
} pager;

static struct mm *pager_mm;

static size_t page_bytes(unsigned n)
{
    return (size_t)n << os_page_shift();
}

/* ---- limbo ---- */

static void land_limbo(struct work *work, unsigned worker)
{
    (void)work;
    (void)worker;
    for (bool later;;) {
        struct limbo *l = mm_limbo_take(pager_mm, &later);
        if (l) {
            mm_limbo_land(pager_mm, l);
            continue;
        }
        if (!later || __atomic_exchange_n(&pager.limbo_waits, 1, __ATOMIC_ACQ_REL))
            break;
        os_sleep(LIMBO_LATE_NS);
        __atomic_store_n(&pager.limbo_waits, 0, __ATOMIC_RELEASE);
    }
}

static void limbo_ready(struct mm *mm)
{
    (void)mm;
    workers_queue(&pager.limbo_worker, &pager.limbo_work);
}

/* ---- serving one fault ---- */

static int64_t zeros_at(struct mm *mm, const struct fault *ft, unsigned n)
{
    return ft->write ? os->uffd_copy(mm->uffd.fd, ft->addr, pager.zeros, page_bytes(n))
                     : os->uffd_zeropage(mm->uffd.fd, ft->addr, page_bytes(n));
}

/* Of n pages from the missing one at addr on, those that are absent, too. COPY would overwrite the marker of a page that was poisoned
 * in an earlier life of the manager, of which there is no entry (kernel fact 21). */
static unsigned absent_pages(struct mm *mm, uintptr_t addr, unsigned n)
{
    struct os_region v;
    uintptr_t walked;
    int r = 0;
    if (n == 1 || (r = os->pagemap_scan(mm->pagemap_fd, addr, addr + page_bytes(n), &v, 1, &walked)) < 0)
        return 1;
    uintptr_t end = r > 0 ? v.start : walked;
    return end > addr ? (unsigned)((end - addr) >> os_page_shift()) : 1;
}

/* Pages from addr on that may be filled: of its block and region, up to the next that is away. */
static unsigned fillable(const struct block *b, const struct region *r, uintptr_t addr)
{
    unsigned i = block_index(addr), n = 1, most = block_pages() - i;
    if (r->end - addr < page_bytes(most))
        most = (r->end - addr) >> os_page_shift();
    while (n < most && b->used && !block_entry(b, i + n))
        n++;
    return b->used ? n : most;
}

/* Gives zeros to absent pages from the fault on, the more the longer a walk goes on: registered memory that was never touched costs a
 * fault per window. Caller holds mm->as shared and the block's lock. Returns the pages given, or an error. */
static int give_zeros(struct mm *mm, const struct block *b, const struct region *r, const struct fault *ft)
{
    uintptr_t number = ft->addr >> os_page_shift();
    struct policy_zero_fault in = {number, fillable(b, r, ft->addr), block_pages()};
    unsigned n = absent_pages(mm, ft->addr, policy_zero_fault(&pager.zero_streams, &in));
    int64_t given = zeros_at(mm, ft, n);
    if (given == -ENOENT || given == -EINVAL) /* they may span two mappings */
        given = zeros_at(mm, ft, 1);
    if (given <= 0) {
        policy_zero_given(&pager.zero_streams, number, 0);
        return (int)given;
    }
    n = given >> os_page_shift();
    mm_dropped(mm, ft->addr, ft->addr + given, UINT64_MAX);
    policy_zero_given(&pager.zero_streams, number, n);
    stat_add(&mm->stats.zero_filled, n);
    return (int)n;
}

/* Nothing of it is away: the kernel gets its faults back. */
static void serve_unused(struct mm *mm, const struct fault *ft)
{
    if (!mm_fault_unused(mm, ft->addr))
        os_sleep(20000); /* an event is pending, and outlives its reading (design fact 6) */
    os->uffd_wake(mm->uffd.fd, ft->addr, os_page_size());
}

static void serve_device_page(struct mm *mm, struct window w, uintptr_t addr)
{
    struct pagemap *pm = NULL;
    bool inline_ = w.end - w.start <= page_bytes(INLINE_PAGES);
    if (inline_ && depart_to_system(mm, pager.flight, NULL, w, NULL)) {
        pm = pager.flight->dev->pagemap;
        if (land_in_system(mm, pager.flight, LAND_AT_ONCE, NULL) == 0) {
            failing_forget(addr);
            return;
        }
    }
    if (inline_ && !pm) { /* somebody else brought it */
        os->uffd_wake(mm->uffd.fd, w.start, w.end - w.start);
        return;
    }
    bring_queue(mm, w, addr);
}

/* Caller holds the block lock; e is the entry of addr. */
static struct window choose_window(const struct block *b, uintptr_t addr, entry_t e)
{
    const struct pagemap *on = pagemap_by_id(entry_id(e));
    struct policy_range r = policy_cpu_fault(&pager.streams, &(struct policy_cpu_fault){
                                                                 .pages = block_pages(),
                                                                 .page = block_index(addr),
                                                                 .number = addr >> os_page_shift(),
                                                                 .huge = b->huge && b->on_device == block_pages(),
                                                                 .granule = pagemap_granule(on) >> os_page_shift(),
                                                             });
    return (struct window){b->base + page_bytes(r.first), b->base + page_bytes(r.end)};
}

struct served {
    enum { ASLEEP, WAKE, RETRY, UNUSED, DEVICE } todo;
    unsigned pages;  /* WAKE */
    struct window w; /* DEVICE */
};

/* Caller holds the block's lock; e is the entry of addr, and not NONE. */
static struct served look_at_entry(const struct block *b, uintptr_t addr, entry_t e)
{
    switch (entry_kind(e)) {
    case ENTRY_DEVICE: return (struct served){.todo = DEVICE, .w = choose_window(b, addr, e)};
    case ENTRY_FLIGHT: return (struct served){.todo = ASLEEP}; /* whoever lands it wakes the thread */
    default: return (struct served){.todo = WAKE, .pages = 1};
    }
}

/* Caller holds mm->as shared. There was no entry: where pages of the region are away there is a block, for its lock, even where none of
 * them is in it. */
static struct served look_at_absent(struct mm *mm, const struct fault *ft)
{
    struct region *r = region_find(&mm->regions, ft->addr);
    if (!r || !mm_is_away(mm, r))
        return (struct served){.todo = UNUSED};
    struct block *b = pagetable_get(&mm->pt, ft->addr);
    if (!b)
        return (struct served){.todo = RETRY};
    mutex_lock(&b->lock);
    /* Taken meanwhile: the touch is tried again. */
    int given = block_entry(b, block_index(ft->addr)) ? 1 : give_zeros(mm, b, r, ft);
    mutex_unlock(&b->lock);
    if (given == -EAGAIN || given == -ENOMEM)
        return (struct served){.todo = RETRY};
    return (struct served){.todo = WAKE, .pages = given > 0 ? given : 1};
}

/* Caller holds mm->as shared. */
static struct served look(struct mm *mm, const struct fault *ft)
{
    struct block *b = pagetable_find(&mm->pt, ft->addr);
    if (b) {
        mutex_lock(&b->lock);
        entry_t e = block_entry(b, block_index(ft->addr));
        struct served s = e ? look_at_entry(b, ft->addr, e) : (struct served){0};
        mutex_unlock(&b->lock);
        if (e)
            return s;
    }
    return look_at_absent(mm, ft);
}

static void serve(struct mm *mm, const struct fault *ft)
{
    if (staging_touched(mm, ft->addr))
        return;
    rwlock_read_lock(&mm->as);
    struct served s = look(mm, ft);
    rwlock_read_unlock(&mm->as);
    switch (s.todo) {
    case UNUSED: serve_unused(mm, ft); break;
    case DEVICE: serve_device_page(mm, s.w, ft->addr); break;
    case RETRY:
        os_sleep(20000); /* an event is pending, and outlives its reading (design fact 6) */
        /* fall through */
    case WAKE: os->uffd_wake(mm->uffd.fd, ft->addr, page_bytes(s.pages ? s.pages : 1)); break;
    case ASLEEP: break;
    }
}

/* ---- the loop ---- */

static void follow(uint32_t tid)
{
    if (pager.since_look++ % FOLLOW_EVERY)
        return;
    int cpu = os->thread_cpu(tid);
    if (cpu >= 0 && cpu != pager.bound_cpu && os->bind_cpu(cpu) == 0)
        pager.bound_cpu = cpu;
}

/* A library thread that touches managed memory while it holds a lock would wait for itself: a bug, to be named. */
static void name_culprit(const struct fault *ft)
{
    const char *name = thread_holding_locks(ft->tid);
    if (name && os->thread_in_fault((pid_t)ft->tid) == 1) /* else somebody has woken it already, and it has the lock since */
        hmm_log(HMM_LOG_ERROR, "bug: library thread %s touched managed memory at %#lx while it held a lock", name,
                (unsigned long)ft->addr);
}

static void reader_main(void *arg)
{
    struct mm *mm = arg;
    const int fds[] = {mm->uffd.fd, pager.stop_fd};
    for (;;) {
        int ready = os->poll(fds, 2, -1);
        if (ready > 0 && ready & 2)
            break;
        bool more = ready > 0;
        while (more) {
            struct fault faults[FAULTS];
            unsigned n = mm_read_events(mm, faults, FAULTS, &more);
            stat_add(&mm->stats.cpu_faults, n);
            for (unsigned i = 0; i < n; i++) {
                follow(faults[i].tid);
                name_culprit(&faults[i]);
                serve(mm, &faults[i]);
            }
        }
    }
}

/* The descriptor lives in the library's table: these run in the root thread. */
static int open_stop(void *arg)
{
    (void)arg;
    return pager.stop_fd = os->event_open();
}

static int set_stop(void *arg)
{
    (void)arg;
    return os->event_set(pager.stop_fd);
}

static int close_stop(void *arg)
{
    (void)arg;
    return os->close(pager.stop_fd);
}

int fault_start(struct mm *mm, unsigned n)
{
    memset(&pager, 0, sizeof(pager));
    pager_mm = mm;
    pager.bound_cpu = -1;
    work_init(&pager.limbo_work, land_limbo);
    int r = -ENOMEM;
    pager.flight = flight_new(mm);
    if (!pager.flight)
        goto fail;
    r = own_map(OS_BLOCK_SIZE, OS_BLOCK_SIZE, OS_MAP_NOHUGE, &pager.zeros);
    if (r)
        goto fail;
    mm->limbo_ready = limbo_ready;
    r = workers_start(&pager.limbo_worker, "hmm-limbo", LIMBO_WORKERS);
    if (r)
        goto free;
    r = bring_start(mm, n);
    if (r)
        goto stop_limbo;
    r = threads_call(open_stop, NULL);
    if (r < 0)
        goto stop_bring;
    r = hmm_thread_start(&pager.reader, "hmm-pager", reader_main, mm);
    if (r)
        goto close_stop;
    return 0;

close_stop:
    threads_call(close_stop, NULL);
stop_bring:
    bring_stop();
stop_limbo:
    workers_stop(&pager.limbo_worker);
free:
    own_unmap(pager.zeros, OS_BLOCK_SIZE);
fail:
    return hmm_fail(r, "the fault threads cannot be started: %s", hmm_strerror(r));
}

void fault_stop(void)
{
    threads_call(set_stop, NULL);
    hmm_thread_join(pager.reader);
    bring_stop();
    workers_stop(&pager.limbo_worker); /* it lands what the last events left */
    threads_call(close_stop, NULL);
    own_unmap(pager.zeros, OS_BLOCK_SIZE);
}
