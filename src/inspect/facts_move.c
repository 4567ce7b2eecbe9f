/* SPDX-License-Identifier: MIT */
/* Facts about UFFDIO_MOVE: what it tells, what it takes, what holds it off, where it puts. */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "inspect/facts.h"

#define RACE_NS 1500000000ull /* how long the race is given to show itself */
#define RACE_ENOUGH 3

/* ---- 1: the result ---- */

enum { RUN = 64 };

/* Page 0 of the source becomes a zero page, a page of its own, and nothing, again and again. */
static void disturb(void *arg)
{
    volatile char *p = arg;
    uint32_t seed = 7;

    on_cpu(1);
    for (;;) {
        char c = *p;

        (void)c;
        seed = seed * 1103515245 + 12345;
        for (volatile uint32_t i = 0; i < seed >> 22; i++)
            ;
        *p = 1;
        for (volatile uint32_t i = 0; i < (seed >> 18 & 1023); i++)
            ;
        madvise((void *)p, os_page_size(), MADV_DONTNEED);
    }
}

/* Every undisturbed page is at exactly one of the two places, whole. Ends the child if not. */
static unsigned count_moved(const char *src, const char *dst)
{
    bool here[RUN], there[RUN];
    size_t page = os_page_size();
    unsigned moved;

    present_map(src, RUN, here);
    present_map(dst, RUN, there);
    moved = there[0];
    for (unsigned i = 1; i < RUN; i++) {
        const char *at = (there[i] ? dst : src) + i * page;

        if (here[i] == there[i])
            fact_differs("page %u of %u was at %s place after MOVE", i, RUN, here[i] ? "either" : "no");
        if (at[0] != (char)i || at[page - 1] != (char)i)
            fact_differs("page %u of %u had other contents after MOVE", i, RUN);
        moved += there[i];
    }
    return moved;
}

void fact_move_result(void)
{
    struct os_uffd u = uffd_new(NO_EVENTS);
    size_t page = os_page_size();
    char *src = pages(RUN), *dst = pages(RUN);
    uint64_t until = os_now() + RACE_NS;
    unsigned moves = 0, incomplete = 0, wrong = 0, worst = 0;

    watch(u.fd, dst, RUN);
    if (!on_cpu(0))
        fact_unseen("could not be tried: no CPU to be had");
    thread_start(disturb, src);
    while (os_now() < until && wrong < RACE_ENOUGH) {
        int64_t r;
        unsigned moved, told;

        for (unsigned i = 1; i < RUN; i++)
            src[i * page] = src[i * page + page - 1] = (char)i;
        r = os->uffd_move(u.fd, (uintptr_t)dst, (uintptr_t)src, RUN * page);
        moved = count_moved(src, dst);
        told = r > 0 ? (unsigned)((size_t)r / page) : 0;
        moves++;
        incomplete += told != RUN;
        if (told == RUN && moved != RUN)
            fact_differs("MOVE said that all %u pages were moved, and %u were", RUN, moved);
        if (moved > told) {
            wrong++;
            worst = moved - told > worst ? moved - told : worst;
        }
        os->advise(dst, RUN * page, OS_ADVISE_DONTNEED);
    }
    if (!wrong)
        fact_unseen("%u disturbed MOVEs of %u pages, %u of them incomplete: no page was lost, and no count was wrong", moves,
                    RUN, incomplete);
    fact_ok("%u disturbed MOVEs of %u pages: no page was lost; %u times more pages were moved than told, at most %u", moves,
            RUN, wrong, worst);
}

/* ---- 2: the source ---- */

static void expect_move(const char *what, int uffd, char *dst, const char *src, size_t n, int64_t want)
{
    int64_t r = os->uffd_move(uffd, (uintptr_t)dst, (uintptr_t)src, n * os_page_size());

    if (r != want)
        fact_differs("MOVE of %s gave %s, not %s", what, error_name(r), error_name(want));
    if (want < 0 && present_count(dst, n))
        fact_differs("MOVE of %s was refused, and pages were moved", what);
}

/* Memory that the kernel holds for DMA: a registered buffer of io_uring. False where io_uring is not to be had. */
static bool hold_for_dma(char *p)
{
    struct io_uring_params params = {0};
    struct iovec v = {p, os_page_size()};
    int ring = (int)syscall(SYS_io_uring_setup, 1, &params);

    return ring >= 0 && syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &v, 1) == 0;
}

/* A child lives on, so that memory is shared with it. */
static pid_t fork_and_wait(void)
{
    pid_t pid = fork();

    if (pid == 0) {
        alarm(5);
        for (;;)
            pause();
    }
    if (pid < 0)
        fact_unseen("could not be tried: no process");
    return pid;
}

static void move_after_fork(int uffd, char *dst)
{
    char *src = pages(2);
    size_t page = os_page_size();

    memset(src, 5, 2 * page);
    fork_and_wait();
    expect_move("a page shared after fork", uffd, dst, src, 1, -EBUSY);
    if (os->advise(src, 2 * page, OS_ADVISE_POPULATE_WRITE) < 0)
        fact_differs("MADV_POPULATE_WRITE of a page shared after fork failed");
    expect_move("a page that was shared after fork, and populated", uffd, dst, src, 1, (int64_t)page);
    os->advise(dst, page, OS_ADVISE_DONTNEED);
}

void fact_move_source(void)
{
    struct os_uffd u = uffd_new(NO_EVENTS);
    size_t page = os_page_size();
    char *dst = pages(2), *p = pages(2);
    char *shared = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), *file;
    int exe = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    bool dma, locked;

    watch(u.fd, dst, 2);
    move_after_fork(u.fd, dst);
    memset(p, 1, 2 * page);
    mprotect(p, page, PROT_READ);
    expect_move("a read-only page", u.fd, dst, p, 1, -EINVAL);
    expect_move("pages of two mappings", u.fd, dst, p, 2, -EINVAL);
    mprotect(p, page, PROT_READ | PROT_WRITE);
    locked = mlock2(p, page, 0) == 0; /* not mlock(), which sanitizers make do nothing */
    if (locked)
        expect_move("a locked page", u.fd, dst, p, 1, -EINVAL);
    syscall(SYS_munlock, p, page);
    *shared = 1;
    expect_move("shared memory", u.fd, dst, shared, 1, -EINVAL);
    file = exe < 0 ? MAP_FAILED : mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE, exe, 0);
    if (file != MAP_FAILED) {
        *file = 1;
        expect_move("a private page of a file", u.fd, dst, file, 1, -EINVAL);
    }
    dma = hold_for_dma(p);
    if (dma)
        expect_move("a page held for DMA", u.fd, dst, p, 1, -EBUSY);
    fact_ok("after fork EBUSY, cured by populating; read-only, two mappings, %sshared and file EINVAL; held for DMA %s",
            locked ? "locked, " : "", dma ? "EBUSY" : "not tried, no io_uring");
}

/* ---- 3: plain references ---- */

/* A page whose contents wait in a pipe by reference; returns the reading end. */
static int splice_page(const char *p)
{
    struct iovec v = {(void *)(uintptr_t)p, os_page_size()};
    int fds[2];

    if (pipe2(fds, O_CLOEXEC) < 0 || vmsplice(fds[1], &v, 1, 0) != (ssize_t)os_page_size())
        fact_unseen("could not be tried: vmsplice: %s", strerrorname_np(errno));
    return fds[0];
}

static char read_back(int fd)
{
    char c = 0;

    if (read(fd, &c, 1) != 1)
        fact_unseen("could not be tried: the pipe is empty");
    return c;
}

void fact_move_references(void)
{
    struct os_uffd u = uffd_new(NO_EVENTS);
    size_t page = os_page_size();
    char *src = pages(2), *staging = pages(2), reused, freed;
    int pipe_reused, pipe_freed;

    watch(u.fd, staging, 2);
    memset(src, 'A', 2 * page);
    pipe_reused = splice_page(src);
    pipe_freed = splice_page(src + page);
    if (os->uffd_move(u.fd, (uintptr_t)staging, (uintptr_t)src, 2 * page) != (int64_t)(2 * page))
        fact_unseen("MOVE refused a page that the kernel refers to, which is safer still");
    memset(staging, 'Z', page); /* used again for other data */
    os->uffd_unregister(u.fd, (uintptr_t)staging, 2 * page);
    if (os->remap_fresh(staging + page, page, OS_MAP_NOHUGE) < 0) /* freed */
        fact_unseen("could not be tried: no memory");
    memset(staging + page, 'Z', page);
    memset(pages(64), 'Z', 64 * page);
    reused = read_back(pipe_reused);
    freed = read_back(pipe_freed);
    if (freed != 'A')
        fact_differs("a page in a pipe was moved and freed, and its reader got other data");
    if (reused != 'Z')
        fact_unseen("a page in a pipe was moved and written, and its reader got the old data, which is safer still");
    fact_ok("of two pages in a pipe that were moved, one used again gave its reader the other data, one freed the right");
}

/* ---- 4: what holds MOVE off ---- */

struct unmapping {
    char *at;
    size_t len;
    int done;
};

static void unmap_it(void *arg)
{
    struct unmapping *m = arg;

    munmap(m->at, m->len);
    set_flag(&m->done);
}

static void expect_pending(const char *which, int uffd, int want)
{
    int got = os->uffd_pending(uffd);

    if (got != want)
        fact_differs("an empty WRITEPROTECT on the userfaultfd %s an event gave %d, not %d", which, got, want);
}

void fact_move_gate(void)
{
    struct os_uffd u = uffd_new(EVENTS), other = uffd_new(NO_EVENTS);
    size_t page = os_page_size();
    char *x = pages(1), *staging = pages(1), *elsewhere = pages(1);
    struct unmapping m = {x, page, 0};
    struct uffd_msg msg;
    int64_t r, beside;

    *x = 1;
    watch(u.fd, x, 1);
    watch(u.fd, staging, 1);
    watch(other.fd, elsewhere, 1);
    expect_pending("without", u.fd, 0);
    thread_start(unmap_it, &m);
    wait_message(u.fd);
    /* The address is free already, and somebody maps new memory there. */
    if (mmap(x, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != x)
        fact_unseen("could not be tried: the unmapped address was not free");
    *x = 2;
    expect_pending("with", u.fd, 1);
    expect_pending("beside one with", other.fd, 0);
    r = os->uffd_move(u.fd, (uintptr_t)staging, (uintptr_t)x, page);
    if (r != -EAGAIN || present(staging))
        fact_differs("with an event pending MOVE on the same userfaultfd gave %s, not EAGAIN", error_name(r));
    beside = os->uffd_move(other.fd, (uintptr_t)elsewhere, (uintptr_t)x, page);
    msg = read_message(u.fd);
    if (msg.event != UFFD_EVENT_UNMAP || msg.arg.remove.start != (uintptr_t)x || msg.arg.remove.end != (uintptr_t)x + page)
        fact_differs("munmap sent event %u for another range", msg.event);
    wait_flag(&m.done);
    expect_pending("after reading", u.fd, 0);
    fact_ok("EAGAIN before the event was read, also to the pending test; through another userfaultfd: %s", error_name(beside));
}

/* ---- 12: the target ---- */

/* Puts a page into one that refuses MOVE: MOVE must say how and do nothing, COPY must work. */
static void refused_target(const char *what, int uffd, char *dst, char *staging, int64_t want)
{
    size_t page = os_page_size();
    int64_t r;

    memset(staging, 0x33, page);
    r = os->uffd_move(uffd, (uintptr_t)dst, (uintptr_t)staging, page);
    if (r > 0)
        fact_unseen("MOVE into %s worked, which is more than is needed", what);
    if (r != want || !present(staging))
        fact_differs("MOVE into %s gave %s, not %s", what, error_name(r), error_name(want));
    r = os->uffd_copy(uffd, (uintptr_t)dst, staging, page);
    if (r != (int64_t)page)
        fact_differs("COPY into %s gave %s", what, error_name(r));
    if (dst[0] != 0x33 || dst[page - 1] != 0x33)
        fact_differs("COPY into %s brought other data", what);
}

void fact_move_target(void)
{
    struct os_uffd u = uffd_new(NO_EVENTS | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED);
    size_t page = os_page_size();
    char *read_only = pages(1), *locked = pages(1), *marked = pages(1), *protected = pages(1), *staging = pages(2);
    bool lockable;
    int err;

    watch(u.fd, read_only, 1);
    mprotect(read_only, page, PROT_READ);
    refused_target("a read-only target", u.fd, read_only, staging, -EINVAL);

    watch(u.fd, locked, 1);
    lockable = mlock2(locked, page, MLOCK_ONFAULT) == 0;
    if (lockable)
        refused_target("a locked target", u.fd, locked, staging, -EINVAL);

    err = watch_mode(u.fd, marked, 1, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
    if (!err)
        err = write_protect(u.fd, marked, 1);
    if (err < 0)
        fact_unseen("could not be tried: write-protection of a missing page: %s", error_name(err));
    refused_target("a missing page under write-protect", u.fd, marked, staging, -EEXIST);

    /* A page under write-protect goes out and comes back writable: nobody is told of this write. */
    *protected = 1;
    watch_mode(u.fd, protected, 1, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
    write_protect(u.fd, protected, 1);
    watch(u.fd, staging + page, 1);
    err = os->uffd_move(u.fd, (uintptr_t)staging + page, (uintptr_t) protected, page) == (int64_t)page &&
                  os->uffd_move(u.fd, (uintptr_t) protected, (uintptr_t)staging + page, page) == (int64_t)page
              ? 0
              : -EIO;
    if (err)
        fact_differs("a page under write-protect could not be moved out and back");
    *protected = 2;
    fact_ok("MOVE refused read-only%s and marked targets, where COPY worked; a moved page lost its write-protection",
            lockable ? ", locked" : "");
}

/* ---- 20: huge pages ---- */

static bool is_huge(char *p)
{
    struct os_region r;
    uintptr_t walked, at = (uintptr_t)p;
    int fd = os->pagemap_open();
    int n = os->pagemap_scan(fd, at, at + OS_BLOCK_SIZE, &r, 1, &walked);

    os->close(fd);
    return n == 1 && r.start == at && r.end == at + OS_BLOCK_SIZE && r.flags & OS_PG_HUGE;
}

void fact_move_huge(void)
{
    struct os_uffd u = uffd_new(NO_EVENTS);
    char *src = huge_area(), *dst = huge_area();
    uint64_t t;

    memset(src, 0x44, OS_BLOCK_SIZE);
    if (!is_huge(src))
        fact_unseen("could not be tried: no huge page was to be had");
    watch(u.fd, dst, OS_BLOCK_SIZE / os_page_size());
    t = os_now();
    if (os->uffd_move(u.fd, (uintptr_t)dst, (uintptr_t)src, OS_BLOCK_SIZE) != (int64_t)OS_BLOCK_SIZE)
        fact_differs("MOVE of a whole huge page failed");
    t = os_now() - t;
    if (!is_huge(dst))
        fact_differs("a huge page was split by being moved whole");
    if (dst[0] != 0x44 || dst[OS_BLOCK_SIZE - 1] != 0x44 || present(src))
        fact_differs("a huge page did not arrive whole");
    fact_ok("moved whole in %.1f us", (double)t / 1000);
}

/* ---- 24: the huge zero page ---- */

void fact_move_huge_zero(void)
{
    struct os_uffd u = uffd_new(NO_EVENTS);
    char *src = huge_area(), *dst = huge_area();
    size_t half = OS_BLOCK_SIZE / 2;

    (void)*(volatile char *)src;
    if (!is_huge(src))
        fact_unseen("could not be tried: no huge zero page was to be had");
    watch(u.fd, dst, OS_BLOCK_SIZE / os_page_size());
    for (size_t at = 0; at < OS_BLOCK_SIZE; at += half)
        if (os->uffd_move(u.fd, (uintptr_t)dst + at, (uintptr_t)src + at, half) != (int64_t)half)
            fact_differs("MOVE of half of the huge zero page failed");
    for (size_t i = 0; i < OS_BLOCK_SIZE; i++)
        if (dst[i])
            fact_differs("half of the huge zero page arrived as something else");
    fact_ok("moved in two halves, which read as zeros");
}

/* ---- 25: pages that were freed lazily ---- */

void fact_move_lazy(void)
{
    struct os_uffd u = uffd_new(NO_EVENTS);
    size_t page = os_page_size();
    char *src = pages(1), *dst = pages(1);

    on_cpu(0); /* another would not find the page on the kernel's lists yet */
    *src = 5;
    if (madvise(src, page, MADV_FREE))
        fact_unseen("could not be tried: MADV_FREE: %s", error_name(-errno));
    watch(u.fd, dst, 1);
    if (os->uffd_move(u.fd, (uintptr_t)dst, (uintptr_t)src, page) != (int64_t)page)
        fact_differs("a page that was freed lazily could not be moved");
    if (*dst != 5 && *dst != 0)
        fact_differs("a page that was freed lazily arrived as something else");
    madvise(dst, page, MADV_PAGEOUT);
    fact_ok(present(dst) ? "it stays where it was moved to" : "it may be discarded where it was moved to");
}
