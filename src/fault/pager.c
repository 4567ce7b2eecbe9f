/* SPDX-License-Identifier: MIT */
/*
 * The reader. See fault.h.
 *
 * Where it runs decides the latency of a fault: about 4 us when it is on the CPU of the faulting thread, about 70 us when an idle
 * CPU has to be woken. So it follows: now and then it looks where the faulting thread runs, and binds itself there.
 */

#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "debug/inject.h"
#include "fault/bring.h"
#include "fault/failing.h"
#include "fault/fault.h"
#include "migrate/migrate.h"
#include "mm/thread.h"
#include "policy/policy.h"

#define FAULTS 64
#define FOLLOW_EVERY 64 /* faults between two looks */
#define INLINE_PAGES 16 /* more is a worker's: the reader must get back to reading */
#define ZERO_PAGES 16   /* absent pages given at once */

static struct {
    struct hmm_thread *reader;
    struct workers limbo_worker; /* one: batches land in order, and behind nobody who waits for them */
    struct work limbo_work;
    int stop_fd;
    struct flight *flight; /* the reader's own */
    struct policy_streams streams;
    unsigned since_look;
    int bound_cpu;
    char *zeros;
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
    for (struct limbo *l; (l = mm_limbo_take(pager_mm)) != NULL;)
        mm_limbo_land(pager_mm, l);
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

/* Gives zeros to absent pages from addr on. Caller holds mm->as shared and, where there is a block, its lock. Returns bytes given
 * or an error. */
static int64_t give_zeros(struct mm *mm, const struct block *b, const struct fault *ft)
{
    unsigned n = 1;
    unsigned i = block_index(ft->addr);
    while (b && n < ZERO_PAGES && i + n < block_pages() && block_is_armed(b, i + n, 1) && !block_entry(b, i + n))
        n++;
    if (ft->write)
        n = absent_pages(mm, ft->addr, n);
    int64_t r = zeros_at(mm, ft, n);
    if (r == -ENOENT || r == -EINVAL) /* they may span two mappings */
        r = zeros_at(mm, ft, 1);
    if (r > 0)
        stat_add(&mm->stats.zero_filled, r >> os_page_shift());
    return r;
}

/* Unregisters what the mapping has in this block: it grew in place by mremap, which raises no event (design fact 15), or
 * disarming it did not succeed. Where that is refused the page gets zeros, so that the touch ends. Caller: mm->as exclusive. */
static void release_unknown(struct mm *mm, const struct fault *ft)
{
    struct os_vma vma;
    if (os->vma_query(mm->maps_fd, ft->addr, &vma) || vma.start > ft->addr)
        return;
    uintptr_t block_end = (ft->addr | ~BLOCK_MASK) + 1, end = vma.end < block_end ? vma.end : block_end;
    if (os->uffd_unregister(mm->uffd.fd, ft->addr, end - ft->addr))
        give_zeros(mm, NULL, ft);
}

/* An absent page in memory of which nothing is away: give the kernel its faults back. */
static void serve_unmanaged(struct mm *mm, const struct fault *ft)
{
    rwlock_write_lock(&mm->as);
    struct block *b = pagetable_find(&mm->pt, ft->addr);
    bool pending = os->uffd_pending(mm->uffd.fd) != 0;
    if (b && b->used == 0)
        mm_disarm(mm, b);
    else if (!b && !pending)
        release_unknown(mm, ft);
    rwlock_write_unlock(&mm->as);
    if (pending)
        os_sleep(20000);
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

static void serve(struct mm *mm, const struct fault *ft)
{
    enum { NOTHING, WAKE, RETRY, UNMANAGED, DEVICE } todo = NOTHING;
    struct window w = {0};
    rwlock_read_lock(&mm->as);
    struct block *b = pagetable_find(&mm->pt, ft->addr);
    if (!b) {
        todo = UNMANAGED;
    } else {
        mutex_lock(&b->lock);
        entry_t e = block_entry(b, block_index(ft->addr));
        switch (entry_kind(e)) {
        case ENTRY_NONE:
            if (b->used == 0) {
                todo = UNMANAGED;
            } else {
                int64_t r = give_zeros(mm, b, ft);
                todo = r == -EAGAIN || r == -ENOMEM ? RETRY : WAKE;
            }
            break;
        case ENTRY_DEVICE:
            w = choose_window(b, ft->addr, e);
            todo = DEVICE;
            break;
        case ENTRY_POISON: todo = WAKE; break;
        case ENTRY_FLIGHT: break; /* whoever lands it wakes the thread */
        }
        mutex_unlock(&b->lock);
    }
    rwlock_read_unlock(&mm->as);
    switch (todo) {
    case UNMANAGED: serve_unmanaged(mm, ft); break;
    case DEVICE: serve_device_page(mm, w, ft->addr); break;
    case RETRY:
        os_sleep(20000); /* an event is pending, and outlives its reading (design fact 6) */
        /* fall through */
    case WAKE: os->uffd_wake(mm->uffd.fd, ft->addr, page_bytes(ZERO_PAGES)); break;
    case NOTHING: break;
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
    if (name)
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
    pager.zeros = mem_alloc(page_bytes(ZERO_PAGES));
    pager.flight = flight_new(mm);
    if (!pager.zeros || !pager.flight)
        goto free;
    mm->limbo_ready = limbo_ready;
    r = workers_start(&pager.limbo_worker, "hmm-limbo", 1);
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
    mem_free(pager.zeros, page_bytes(ZERO_PAGES));
    return hmm_fail(r, "the fault threads cannot be started: %s", hmm_strerror(r));
}

void fault_stop(void)
{
    threads_call(set_stop, NULL);
    hmm_thread_join(pager.reader);
    bring_stop();
    workers_stop(&pager.limbo_worker); /* it lands what the last events left */
    threads_call(close_stop, NULL);
    mem_free(pager.zeros, page_bytes(ZERO_PAGES));
}
