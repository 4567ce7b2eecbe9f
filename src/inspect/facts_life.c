/* SPDX-License-Identifier: MIT */
/* Facts about what a program does meanwhile: closing, forking, growing, locking, ending threads, system calls. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "inspect/facts.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* 6.1 */
#endif

/* ---- 8: closing ---- */

void fact_close(void)
{
    struct os_uffd lost = uffd_new(EVENTS), held = uffd_new(EVENTS);
    char *x = pages(1), *y = pages(1);
    char zero, served;

    watch(lost.fd, x, 1);
    watch(held.fd, y, 1);
    serve_private(held.fd, 'h');
    os->close(lost.fd);
    zero = *x;
    if (os->close(held.fd) < 0)
        fact_differs("a descriptor was closed for the program when a thread made its table private");
    served = *y;
    if (served != 'h')
        fact_differs("a page whose userfaultfd is open in a private table read as %d after the program closed its own", served);
    if (zero != 0)
        fact_unseen("a missing page of a closed userfaultfd did not read as zeros");
    fact_ok("closed: the missing page read as zeros; closed for the program, held in a private table: it was served");
}

/* ---- 9: fork and mremap ---- */

static int read_byte(void *p)
{
    return *(volatile char *)p;
}

static int cannot_read(void *p)
{
    char c;

    return os->vm_read((uintptr_t)p, &c, 1) == -EFAULT;
}

struct remapping {
    char *from, *to;
    size_t len;
    int done;
};

static void remap_it(void *arg)
{
    struct remapping *r = arg;

    mremap(r->from, r->len, r->len, MREMAP_MAYMOVE | MREMAP_FIXED, r->to);
    set_flag(&r->done);
}

/* With the event the registration goes along, and the event tells where to. */
static void remap_with_event(void)
{
    struct os_uffd u = uffd_new(EVENTS);
    size_t page = os_page_size();
    struct remapping r = {pages(1), pages(1), page, 0};
    char *src = pages(1);
    struct uffd_msg msg;

    watch(u.fd, r.from, 1);
    thread_start(remap_it, &r);
    do
        msg = read_message(u.fd);
    while (msg.event != UFFD_EVENT_REMAP);
    if (msg.arg.remap.from != (uintptr_t)r.from || msg.arg.remap.to != (uintptr_t)r.to || msg.arg.remap.len != page)
        fact_differs("mremap sent its event with other addresses");
    /* One for the old place may follow, and mremap waits for each to be read. */
    while (!flag_set(&r.done))
        if (os->poll(&u.fd, 1, 1))
            os->uffd_read(u.fd, &msg, 1);
    *src = 4;
    if (os->uffd_copy(u.fd, (uintptr_t)r.to, src, page) != (int64_t)page || *r.to != 4)
        fact_differs("after mremap with the event, the new place was not registered");
}

void fact_fork(void)
{
    struct os_uffd u = uffd_new(EVENTS), quiet = uffd_new(NO_EVENTS);
    size_t page = os_page_size();
    char *x = pages(1), *kept = pages(1), *y = pages(1), *to = pages(1), *src = pages(1);
    void *own, *wiped;
    int zero, r;

    watch(u.fd, x, 1);
    zero = in_child(read_byte, x);
    *kept = 3;
    if (os->advise(kept, page, OS_ADVISE_DONTFORK) < 0 || os->map(page, page, 0, &own) < 0 ||
        os->map(page, page, OS_MAP_WIPE, &wiped) < 0)
        fact_unseen("could not be tried: no memory");
    *(char *)own = *(char *)wiped = 3;
    if (in_child(cannot_read, kept) != 1 || in_child(cannot_read, own) != 1)
        fact_differs("MADV_DONTFORK did not keep memory from a child");
    if (in_child(read_byte, wiped) != 0)
        fact_differs("MADV_WIPEONFORK did not wipe memory in a child");
    remap_with_event();
    watch(quiet.fd, y, 1);
    if (mremap(y, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
        fact_unseen("could not be tried: mremap: %s", strerrorname_np(errno));
    r = (int)os->uffd_copy(quiet.fd, (uintptr_t)to, src, page);
    if (zero != 0 || r > 0)
        fact_unseen("the child read %d, and registration %s mremap without its event", zero, r > 0 ? "survived" : "ended with");
    fact_ok("a child read zeros from a missing page; mremap without its event ended registration, with it took it along");
}

/* ---- 10: mincore ---- */

static size_t swapped_count(const char *p, size_t n)
{
    struct os_region r[16];
    uintptr_t walked, at = (uintptr_t)p;
    int fd = os->pagemap_open(), got = os->pagemap_scan(fd, at, at + n * os_page_size(), r, 16, &walked);
    size_t bytes = 0;

    os->close(fd);
    for (int i = 0; i < got; i++)
        bytes += r[i].flags & OS_PG_SWAPPED ? r[i].end - r[i].start : 0;
    return bytes / os_page_size();
}

void fact_mincore(void)
{
    enum { N = 16 };
    char *p = pages(N);
    unsigned char core[N];
    size_t swapped, absent = 0;

    memset(p, 1, N * os_page_size());
    madvise(p, N * os_page_size(), MADV_PAGEOUT);
    swapped = swapped_count(p, N);
    if (present_count(p, N) != N)
        fact_differs("PAGEMAP_SCAN called %zu of %d pages absent after they were paged out", N - present_count(p, N), N);
    if (!swapped)
        fact_unseen("nothing could be swapped out: no swap space, or not permitted");
    if (mincore(p, N * os_page_size(), core) < 0)
        fact_unseen("mincore: %s", strerrorname_np(errno));
    for (int i = 0; i < N; i++)
        absent += !(core[i] & 1);
    fact_ok("%zu of %d pages were swapped out; mincore called %zu absent, PAGEMAP_SCAN none", swapped, N, absent);
}

/* ---- 13: read-only pages ---- */

struct writing {
    volatile char *at;
    int done;
};

static void write_it(void *arg)
{
    struct writing *w = arg;

    *w->at = 2;
    set_flag(&w->done);
}

void fact_read_only(void)
{
    struct os_uffd u = uffd_new(EVENTS | UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    size_t page = os_page_size();
    struct writing w = {.at = pages(1)};
    char *x = (char *)(uintptr_t)w.at;
    struct uffd_msg msg;
    int err;

    *x = 1;
    mprotect(x, page, PROT_READ);
    err = watch_mode(u.fd, x, 1, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
    if (!err)
        err = write_protect(u.fd, x, 1);
    if (err < 0)
        fact_unseen("could not be tried: write-protection: %s", error_name(err));
    mprotect(x, page, PROT_READ | PROT_WRITE);
    thread_start(write_it, &w);
    msg = read_message(u.fd);
    if (msg.event != UFFD_EVENT_PAGEFAULT || !(msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) || flag_set(&w.done) ||
        *x != 1)
        fact_differs("the write was not stopped");
    os->uffd_unregister(u.fd, (uintptr_t)x, page);
    wait_flag(&w.done);
    fact_ok("the write waited for its write-protect fault");
}

/* ---- 15: growth ---- */

void fact_growth(void)
{
    enum { N = 16 };
    struct os_uffd u = uffd_new(EVENTS);
    size_t page = os_page_size();
    char *base = pages(2 * N), *src = pages(1);
    int64_t r;

    munmap(base + N * page, N * page);
    watch(u.fd, base, N);
    if (mremap(base, N * page, 2 * N * page, 0) != base)
        fact_unseen("could not be tried: mremap did not grow in place");
    if (os->poll(&u.fd, 1, 0))
        fact_unseen("growing sent an event, which is more than is needed");
    r = os->uffd_copy(u.fd, (uintptr_t)base + (N + 4) * page, src, page);
    if (r < 0)
        fact_unseen("the grown part was not registered (%s), which is safer still", error_name(r));
    fact_ok("the grown part was registered, and no event told of it");
}

/* ---- 16: one owner, and the limit ---- */

#define LIMIT_TRIED 100000

/* Registers every other page of a mapping until it is refused: the number. */
static unsigned exhaust_registrations(int uffd, long limit, int *err)
{
    size_t page = os_page_size();
    char *p = pages((size_t)limit);
    unsigned n = 0;

    for (long i = 0; i < limit; i += 2, n++) {
        *err = os->uffd_register(uffd, (uintptr_t)p + (size_t)i * page, page);
        if (*err < 0)
            break;
    }
    return n;
}

void fact_one_owner(void)
{
    struct os_uffd u = uffd_new(EVENTS), other = uffd_new(EVENTS);
    size_t page = os_page_size();
    char *x = pages(1), text[32];
    long limit = os->read_text("/proc/sys/vm/max_map_count", text, sizeof(text)) < 0 ? 0 : strtol(text, NULL, 10);
    unsigned n;
    int err;

    watch(u.fd, x, 1);
    err = os->uffd_register(other.fd, (uintptr_t)x, page);
    if (err != -EBUSY)
        fact_differs("a second userfaultfd registered the same page: %s, not EBUSY", error_name(err));
    os->uffd_unregister(u.fd, (uintptr_t)x, page);
    err = os->uffd_register(other.fd, (uintptr_t)x, page);
    if (err < 0)
        fact_differs("after unregistering, another userfaultfd could not register: %s", error_name(err));
    if (limit <= 0 || limit > LIMIT_TRIED)
        fact_ok("EBUSY until it was unregistered; the limit of %ld mappings was not tried", limit);
    n = exhaust_registrations(u.fd, limit + 100, &err);
    if (err != -ENOMEM)
        fact_differs("%u scattered registrations with a limit of %ld mappings ended with %s, not ENOMEM", n, limit,
                     error_name(err));
    fact_ok("EBUSY until it was unregistered; ENOMEM after %u scattered registrations", n);
}

/* ---- 17: thread exit ---- */

#define TID_WORD 64

struct ending {
    char *page;
    pid_t tid; /* set when the kernel has the word's address */
    int end;
};

static void end_when_told(void *arg)
{
    struct ending *e = arg;

    syscall(SYS_set_tid_address, e->page + TID_WORD);
    __atomic_store_n(&e->tid, (pid_t)syscall(SYS_gettid), __ATOMIC_RELEASE);
    while (!flag_set(&e->end))
        os_sleep(20000);
}

/* The word that the kernel clears when this thread ends lies where the library keeps pages from leaving. */
static void check_block(void)
{
    uintptr_t blocks[8] = {0}, *word = NULL;
    int n = os->thread_blocks(blocks, 8);

    if (n < 2)
        fact_differs("get_robust_list found %d control blocks of two threads", n);
    if (prctl(PR_GET_TID_ADDRESS, &word) < 0)
        return; /* a kernel without checkpoints: not to be asked */
    for (int i = 0; i < n && i < 8; i++)
        if ((uintptr_t)word / os_page_size() == blocks[i] / os_page_size())
            return;
    fact_differs("the word that the kernel clears at thread exit lies on another page than the thread's control block");
}

void fact_thread_exit(void)
{
    struct os_uffd u = uffd_new(NO_EVENTS);
    size_t page = os_page_size();
    char *x = pages(1), *staging = pages(1);
    struct ending e = {.page = x};
    int word = 12345;

    memcpy(x + TID_WORD, &word, sizeof(word));
    watch(u.fd, x, 1);
    watch(u.fd, staging, 1);
    thread_start(end_when_told, &e);
    wait_flag(&e.tid);
    check_block();
    if (os->uffd_move(u.fd, (uintptr_t)staging, (uintptr_t)x, page) != (int64_t)page)
        fact_differs("MOVE of a page with a thread's word failed");
    set_flag(&e.end);
    for (uint64_t until = os_now() + 1000000000; os->thread_cpu(e.tid) >= 0 && os_now() < until;)
        os_sleep(100000);
    memcpy(&word, staging + TID_WORD, sizeof(word));
    if (os->poll(&u.fd, 1, 10) || present(x))
        fact_unseen("the kernel waited for the missing page, which is safer still");
    if (word != 12345)
        fact_unseen("the word changed in staging");
    fact_ok(
        "a thread ended while the word that the kernel clears was on a missing page: no fault, and the word was not cleared");
}

/* ---- 18: system calls ---- */

static void through_pipe(char *missing_source, char *missing_target, size_t len)
{
    int fds[2];
    ssize_t put, got;

    if (pipe2(fds, O_CLOEXEC) < 0)
        fact_unseen("could not be tried: no pipe");
    put = write(fds[1], missing_source, len);
    if (put != (ssize_t)len)
        fact_differs("write(2) from a missing page gave %s", put < 0 ? strerrorname_np(errno) : "less");
    got = read(fds[0], missing_target, len);
    if (got != (ssize_t)len)
        fact_differs("read(2) into a missing page gave %s", got < 0 ? strerrorname_np(errno) : "less");
    if (missing_target[0] != 's' || missing_target[len - 1] != 's')
        fact_differs("write(2) and read(2) on missing pages carried other data");
}

void fact_system_calls(void)
{
    struct os_uffd u = uffd_new(EVENTS);
    size_t page = os_page_size();
    char *x = pages(5), byte = 0;
    int64_t r;
    int mem;

    watch(u.fd, x, 5);
    serve(u.fd, 's');
    r = os->vm_read((uintptr_t)x + 7, &byte, 1);
    if (u.user_mode_only) {
        if (r != -EFAULT)
            fact_differs("in user mode only, process_vm_readv of a missing page gave %s, not EFAULT", error_name(r));
        fact_unseen(
            "faults inside system calls are not permitted to this user: process_vm_readv of a missing page gave EFAULT");
    }
    if (r != 1 || byte != 's')
        fact_differs("process_vm_readv of a missing page gave %s", error_name(r));
    byte = 'w';
    r = os->vm_write((uintptr_t)x + page, &byte, 1);
    if (r != 1 || x[page] != 'w' || x[page + 1] != 's')
        fact_differs("process_vm_writev to a missing page gave %s", error_name(r));
    through_pipe(x + 2 * page, x + 3 * page, page);
    mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    r = mem < 0 ? 0 : pread(mem, &byte, 1, (off_t)(uintptr_t)x + (off_t)(4 * page));
    fact_ok("process_vm_readv and writev, write(2) and read(2) were served; /proc/self/mem: %s", mem < 0 ? "not to be opened"
                                                                                                 : r == 1
                                                                                                     ? "served, too"
                                                                                                     : strerrorname_np(errno));
}

/* ---- 18: mlockall ---- */

void fact_mlockall(void)
{
    enum { N = 16 };
    struct os_uffd u = uffd_new(NO_EVENTS);
    size_t page = os_page_size(), len = N * page, filled;
    char *src = pages(N), *open_area, *reserved;
    void *own;

    memset(src, 6, len);
    if (syscall(SYS_mlockall, MCL_FUTURE) < 0) /* sanitizers make that of the C library do nothing */
        fact_unseen("could not be tried: mlockall: %s", strerrorname_np(errno));
    open_area = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    reserved = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (open_area == MAP_FAILED || reserved == MAP_FAILED || os->map(len, page, OS_MAP_NOHUGE, &own) < 0)
        fact_unseen("could not be tried: the limit of locked memory is too low");
    filled = present_count(open_area, N);
    if (present_count(reserved, N))
        fact_differs("memory without access was filled");
    if (present_count(own, N))
        fact_differs("memory made as the library makes its own was filled");
    watch(u.fd, own, N);
    if (os->uffd_move(u.fd, (uintptr_t)own, (uintptr_t)src, len) != (int64_t)len)
        fact_differs("MOVE into memory made as the library makes its own failed");
    fact_ok("of %d new pages %zu were filled; of those reserved, and of the library's own, none", N, filled);
}

/* ---- 19: collapse ---- */

void fact_collapse(void)
{
    enum { HOLE = 7 };
    struct os_uffd u = uffd_new(EVENTS);
    size_t page = os_page_size();
    char *block = huge_area(), *staging = pages(1);
    int armed, unarmed;

    madvise(block, OS_BLOCK_SIZE, MADV_NOHUGEPAGE);
    memset(block, 8, OS_BLOCK_SIZE);
    watch(u.fd, block, OS_BLOCK_SIZE / page);
    watch(u.fd, staging, 1);
    if (os->uffd_move(u.fd, (uintptr_t)staging, (uintptr_t)block + HOLE * page, page) != (int64_t)page)
        fact_differs("MOVE of one page failed");
    madvise(block, OS_BLOCK_SIZE, MADV_HUGEPAGE);
    armed = madvise(block, OS_BLOCK_SIZE, MADV_COLLAPSE) < 0 ? -errno : 0;
    if (present(block + HOLE * page))
        fact_differs("a missing page of a registered block was filled by MADV_COLLAPSE");
    mprotect(block, page, PROT_READ);
    mprotect(block, page, PROT_READ | PROT_WRITE);
    if (os->poll(&u.fd, 1, 0))
        fact_unseen("mprotect sent an event, which is more than is needed");
    os->uffd_unregister(u.fd, (uintptr_t)block, OS_BLOCK_SIZE);
    unarmed = madvise(block, OS_BLOCK_SIZE, MADV_COLLAPSE) < 0 ? -errno : 0;
    if (unarmed < 0)
        fact_unseen("the hole stayed (%s), but without registration nothing could be collapsed either (%s)", error_name(armed),
                    error_name(unarmed));
    fact_ok("collapse of a block with a hole: %s, and the hole stayed; once unregistered it was collapsed", error_name(armed));
}
