/* SPDX-License-Identifier: MIT */
/* See heirs.h. Filling a child: from device memory where it can be seen, else through the driver and a staging slot. */
#include "process/heirs.h"

#include <errno.h>

#include "base/futex.h"
#include "debug/inject.h"
#include "migrate/migrate.h"
#include "migrate/staging.h"

#define SLICE_PAGES 4096           /* then another heir has its turn */
#define HALF_PAGES 1024            /* by each of two threads */
#define WIPED 64                   /* mappings looked at in one go */
#define WAIT_NS 100000             /* memory is short */
#define POISON_TRIES 200           /* of 1 ms */
#define PATIENCE_NS 10000000000ull /* with a device that does not give its pages */

/* COPY by a second thread: the kernel's work for one page is longer than the memory's. */
struct half {
    struct work work;
    int uffd;
    uintptr_t addr;
    const char *bytes;
    int64_t done;
    uint32_t ready;
};

static size_t page_bytes(uint64_t pages)
{
    return pages << os_page_shift();
}

void fill_wake(struct heir *h, uintptr_t addr, uint64_t pages)
{
    if (heir_is_by_event(h))
        os->uffd_wake(h->uffd, addr, page_bytes(pages));
}

/* The end of all that the estate gives. */
static uintptr_t end_of_all(const struct estate *e)
{
    uintptr_t end = 0;
    for (size_t i = 0; i < e->n; i++)
        if (e->v[i].addr + page_bytes(e->v[i].pages) > end)
            end = e->v[i].addr + page_bytes(e->v[i].pages);
    return end;
}

/* The program asked that children find nothing there. Read once, before anything is filled: what was asked before the fork. The kernel
 * counts pages for it: no further than needed. */
void fill_leave_out_wiped(struct heir *h)
{
    struct os_region v[WIPED];
    uintptr_t at = 0, end = end_of_all(&h->estate);
    h->looked = true;
    if (!end || mutate("fork-wipe"))
        return;
    for (int n = WIPED; n == WIPED;) {
        n = os->marked(OS_MARK_WIPE, at, end, v, WIPED);
        if (n < 0) {
            os_sleep(WAIT_NS);
            n = WIPED;
            continue;
        }
        for (int i = 0; i < n; i++) {
            follow_drop(h, v[i].start, v[i].end);
            at = v[i].end;
        }
    }
}

/* Bytes given, or an error. */
static int64_t give(struct heir *h, const struct estate_run *r, const char *bytes, uint32_t pages)
{
    if (heir_is_by_event(h))
        return os->uffd_copy(h->uffd, r->addr, bytes, page_bytes(pages));
    int n = packer_add(&h->packer, r->addr, bytes, pages);
    return n > 0 ? (int64_t)page_bytes(n) : n;
}

/* The child finds out that a page is lost, and never reads zeros for it. */
static int64_t poison(struct heir *h, const struct estate_run *r, uint32_t pages)
{
    return heir_is_by_event(h) ? os->uffd_poison(h->uffd, r->addr, page_bytes(pages)) : give(h, r, NULL, pages);
}

/* Through the driver's copy engine. */
static int64_t fill_by_driver(struct heir *h, const struct estate_run *r, uint32_t pages)
{
    struct flight f = {.dev = pagemap_by_id(r->pagemap)->dev};
    char *slot = staging_get(h->mm, STAGING_IN, true);
    if (!slot)
        return -ENOMEM;
    struct hmm_dma v = {.page = r->source, .pages = pages, .host = slot};
    int64_t done = driver_copy(&f, HMM_DMA_TO_SYSTEM, &v, 1);
    if (!done)
        done = give(h, r, slot, pages);
    else if (done != -ENOMEM)
        done = -EIO;
    staging_put(h->mm, STAGING_IN, slot, false);
    return done;
}

static int64_t fill_run(struct heir *h, const struct estate_run *r, uint32_t pages)
{
    const char *bytes = estate_bytes(r);
    if (r->pagemap && device_memory_is_lost(pagemap_by_id(r->pagemap)->dev))
        return poison(h, r, pages);
    int64_t done = bytes ? give(h, r, bytes, pages) : -EFAULT;
    return done == -EFAULT && r->pagemap ? fill_by_driver(h, r, pages) : done;
}

static void given(struct heir *h, size_t i, uint32_t pages)
{
    uintptr_t addr = h->estate.v[i].addr;
    estate_consume(&h->estate, i, pages);
    fill_wake(h, addr, pages);
    h->failing_since = h->stuck_since = 0;
    __atomic_fetch_add(&heirs.board->moves, 1, __ATOMIC_RELAXED);
}

static void copy_half(struct work *work, unsigned worker)
{
    struct half *half = container_of(work, struct half, work);
    (void)worker;
    half->done = os->uffd_copy(half->uffd, half->addr, half->bytes, page_bytes(HALF_PAGES));
    __atomic_store_n(&half->ready, 1, __ATOMIC_RELEASE);
    futex_wake(&half->ready, 1);
}

static uint32_t pages_of(int64_t done)
{
    return done > 0 ? (uint32_t)(done >> os_page_shift()) : 0;
}

/* A large run that can be seen, by two threads. Pages given; 0: it is none, or something is in the way, which fill() sees to. */
static uint32_t fill_halves(struct heir *h, size_t i)
{
    const struct estate_run *r = &h->estate.v[i];
    const char *bytes = estate_bytes(r);
    bool can = heir_is_by_event(h) && h->chunk == CHUNK_PAGES && r->pages >= 2 * HALF_PAGES && bytes && r->pagemap;
    if (!can || device_memory_is_lost(pagemap_by_id(r->pagemap)->dev))
        return 0;
    struct half half = {.uffd = h->uffd, .addr = r->addr + page_bytes(HALF_PAGES), .bytes = bytes + page_bytes(HALF_PAGES)};
    work_init(&half.work, copy_half);
    workers_queue(&heirs.helpers, &half.work);
    uint32_t first = pages_of(os->uffd_copy(h->uffd, r->addr, bytes, page_bytes(HALF_PAGES)));
    while (!__atomic_load_n(&half.ready, __ATOMIC_ACQUIRE))
        futex_wait(&half.ready, 0, -1);
    uint32_t second = first == HALF_PAGES ? pages_of(half.done) : 0; /* else it is found to be there later */
    stat_add(&h->mm->stats.pages_to_children, first + pages_of(half.done));
    if (first)
        given(h, i, first);
    if (second)
        given(h, i, second);
    return first + second;
}

/* A device that did not give a page for long enough has lost it, as for a touch. */
static bool is_given_up(struct heir *h)
{
    uint64_t now = os_now();
    if (!h->failing_since)
        h->failing_since = now;
    return now - h->failing_since > PATIENCE_NS;
}

/* As fill(). Where the child does not have the page any more (ENOENT), or has it already (EEXIST), there is nothing to be poisoned. */
static int give_up(struct heir *h, size_t i, int64_t err)
{
    const struct estate_run *r = &h->estate.v[i];
    int64_t done = poison(h, r, 1);
    if (done == -ESRCH || done == 0) /* 0: a message was full */
        return (int)done;
    if (done == -EAGAIN || done == -ENOMEM)
        return -EAGAIN;
    if (done > 0)
        hmm_log(HMM_LOG_ERROR,
                "%s did not give page %#lx to a child of fork (%s): its content is lost there, touching it is SIGBUS",
                r->pagemap ? pagemap_by_id(r->pagemap)->dev->driver->name : "staging", (unsigned long)r->addr,
                hmm_strerror((int)err));
    given(h, i, 1);
    return 0;
}

/* Gives the beginning of run i. Pages given; 0: some were skipped; or -EAGAIN, -ESRCH. */
static int fill(struct heir *h, size_t i)
{
    struct estate_run *r = &h->estate.v[i];
    SEQ_POINT("fork-fill");
    uint32_t halves = fill_halves(h, i);
    if (halves)
        return (int)halves;
    uint32_t pages = r->pages < h->chunk ? r->pages : h->chunk;
    int64_t done = fill_run(h, r, pages);
    if (done > 0) {
        pages = (uint32_t)(done >> os_page_shift());
        stat_add(&h->mm->stats.pages_to_children, pages);
        given(h, i, pages);
        h->chunk = h->chunk * 2 < CHUNK_PAGES ? h->chunk * 2 : CHUNK_PAGES;
        return (int)pages;
    }
    bool failed = done == -EIO || done == -EFAULT; /* the source */
    if (failed && is_given_up(h))
        return give_up(h, i, done);
    if (done == -EAGAIN || done == -ENOMEM || failed)
        return -EAGAIN;
    if (done == -ESRCH || done == 0) /* 0: a message was full */
        return (int)done;
    /* ENOENT: the child does not have it (MADV_DONTFORK, or it is unmapped); EEXIST: it has it already. For the first page of several,
     * or because they span two mappings. */
    if (pages > 1)
        h->chunk = done == -EEXIST ? 1 : pages / 8 + 1;
    else
        given(h, i, 1);
    return 0;
}

size_t fill_next(struct heir *h)
{
    struct estate *e = &h->estate;
    for (size_t k = 0; k < e->n; k++) {
        size_t i = (h->next + k) % e->n;
        if (e->v[i].pages && estate_is_quiet(e, &e->v[i]))
            return h->next = i;
    }
    return e->n;
}

/* Of a child that is given nothing just now: it is offered a page where nothing is registered. */
static bool is_gone(struct heir *h)
{
    return heir_is_by_event(h) ? os->uffd_zeropage(h->uffd, (uintptr_t)heirs.board, page_bytes(1)) == -ESRCH
                               : packer_is_gone(&h->packer);
}

int fill_slice(struct heir *h)
{
    int r = 0;
    for (uint32_t given_pages = 0; given_pages < SLICE_PAGES && h->estate.pages && r >= 0; given_pages += r > 0 ? r : 1) {
        follow_child(h);
        size_t i = fill_next(h);
        if (i == h->estate.n)
            return !h->estate.pages ? 0 : is_gone(h) ? -ESRCH : -EAGAIN;
        r = fill(h, i);
    }
    return r < 0 ? r : 0;
}

/* As long as an event of the child is pending, that is refused, too: a child that runs is waited for. Pages that are refused for good. */
static uint64_t poison_all(struct heir *h)
{
    struct estate *e = &h->estate;
    for (unsigned tries = 0; e->pages && tries < POISON_TRIES;) {
        size_t i = 0;
        follow_child(h);
        while (i < e->n && !e->v[i].pages)
            i++;
        if (i == e->n)
            break;
        uint32_t pages = e->v[i].pages;
        int64_t r = poison(h, &e->v[i], pages);
        if (r == -ESRCH)
            return 0;
        if (r == -EAGAIN || r == -ENOMEM) {
            tries++;
            os_sleep(1000000);
        } else {
            estate_consume(e, i, r > 0 ? pages_of(r) : 1);
        }
    }
    return e->pages;
}

void fill_poison_rest(struct heir *h)
{
    unsigned long long pages = h->estate.pages, zeros = heir_is_by_event(h) ? poison_all(h) : 0;
    if (heir_is_by_event(h))
        hmm_log(HMM_LOG_ERROR,
                "a child of fork did not get %llu pages of its memory before the last device was closed: touching them is "
                "SIGBUS, but for %llu that read as zeros there, because it is stopped in the middle of a call; let children "
                "go on before that",
                pages, zeros);
    else
        hmm_log(HMM_LOG_ERROR,
                "a child of fork did not get %llu pages of its memory before the last device was closed: it ends when it goes "
                "on; let children go on before that",
                pages);
}
