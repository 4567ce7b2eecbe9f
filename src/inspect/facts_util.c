/* SPDX-License-Identifier: MIT */
/* Means for the facts: memory, userfaultfds, threads, waiting. All in a child that ends soon: nothing is given back. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "inspect/facts.h"

#define HANG_NS 2000000000ull

const char *error_name(int64_t err)
{
    const char *name = err < 0 ? strerrorname_np((int)-err) : "success";

    return name ? name : "?";
}

/* ---- memory ---- */

/* Between inaccessible pages nothing can be merged with it, so that it is one mapping and stays one. */
static char *fenced(size_t len, size_t align, int advice)
{
    size_t page = os_page_size();
    char *all = mmap(NULL, len + align + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *p = (char *)(((uintptr_t)all + page + align - 1) & ~(uintptr_t)(align - 1));

    if (all == MAP_FAILED || mprotect(p, len, PROT_READ | PROT_WRITE) < 0)
        fact_unseen("could not be tried: no memory");
    madvise(p, len, advice);
    return p;
}

char *pages(size_t n)
{
    return fenced(n * os_page_size(), os_page_size(), MADV_NOHUGEPAGE);
}

char *huge_area(void)
{
    return fenced(OS_BLOCK_SIZE, OS_BLOCK_SIZE, MADV_HUGEPAGE);
}

static int pagemap(void)
{
    static int fd = -1; /* one thread of a child asks */

    if (fd < 0)
        fd = os->pagemap_open();
    if (fd < 0)
        fact_unseen("could not be tried: /proc/self/pagemap: %s", error_name(fd));
    return fd;
}

void present_map(const char *p, size_t n, bool *map)
{
    uintptr_t start = (uintptr_t)p, at = start, end = at + n * os_page_size(), walked;
    struct os_region r[64];

    memset(map, 0, n * sizeof(*map));
    while (at < end) {
        int got = os->pagemap_scan(pagemap(), at, end, r, 64, &walked);

        if (got < 0)
            fact_unseen("could not be tried: PAGEMAP_SCAN: %s", error_name(got));
        for (int i = 0; i < got; i++)
            for (at = r[i].start; at < r[i].end; at += os_page_size())
                map[(at - start) >> os_page_shift()] = true;
        at = walked;
    }
}

size_t present_count(const char *p, size_t n)
{
    bool map[1024];
    size_t count = 0;

    while (n) {
        size_t step = n < 1024 ? n : 1024;

        present_map(p, step, map);
        for (size_t i = 0; i < step; i++)
            count += map[i];
        p += step * os_page_size();
        n -= step;
    }
    return count;
}

bool present(const char *p)
{
    bool map;

    present_map(p, 1, &map);
    return map;
}

/* ---- userfaultfds ---- */

struct os_uffd uffd_new(uint64_t features)
{
    struct os_uffd u;
    int err = os->uffd_open(features, &u);

    if (err < 0)
        fact_unseen("could not be tried: userfaultfd: %s", error_name(err));
    return u;
}

void watch(int uffd, char *p, size_t n)
{
    int err = os->uffd_register(uffd, (uintptr_t)p, n * os_page_size());

    if (err < 0)
        fact_unseen("could not be tried: registration: %s", error_name(err));
}

int watch_mode(int uffd, char *p, size_t n, uint64_t mode)
{
    struct uffdio_register r = {.range = {(uintptr_t)p, n * os_page_size()}, .mode = mode};

    return ioctl(uffd, UFFDIO_REGISTER, &r) < 0 ? -errno : 0;
}

int write_protect(int uffd, char *p, size_t n)
{
    struct uffdio_writeprotect w = {.range = {(uintptr_t)p, n * os_page_size()}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};

    return ioctl(uffd, UFFDIO_WRITEPROTECT, &w) < 0 ? -errno : 0;
}

void wait_message(int uffd)
{
    uint64_t until = os_now() + HANG_NS;

    while (os->poll(&uffd, 1, 100) != 1)
        if (os_now() > until)
            fact_differs("an expected event or fault never came");
}

struct uffd_msg read_message(int uffd)
{
    struct uffd_msg msg;

    do
        wait_message(uffd);
    while (os->uffd_read(uffd, &msg, 1) != 1);
    return msg;
}

struct server {
    int uffd;
    bool keep_private;
    char *page;
    int ready;
};

static void server_run(void *arg)
{
    struct server *s = arg;
    size_t page = os_page_size();

    if (s->keep_private && os->private_files(&s->uffd, 1) < 0)
        return;
    set_flag(&s->ready);
    for (;;) {
        struct uffd_msg msg;
        uintptr_t at;

        if (os->poll(&s->uffd, 1, -1) < 0)
            return;
        if (os->uffd_read(s->uffd, &msg, 1) != 1 || msg.event != UFFD_EVENT_PAGEFAULT)
            continue;
        at = msg.arg.pagefault.address & ~(uintptr_t)(page - 1);
        os->uffd_copy(s->uffd, at, s->page, page);
        os->uffd_wake(s->uffd, at, page);
    }
}

static void server_start(int uffd, char byte, bool keep_private)
{
    struct server *s = malloc(sizeof(*s));

    if (!s)
        fact_unseen("could not be tried: no memory");
    *s = (struct server){.uffd = uffd, .keep_private = keep_private, .page = pages(1)};
    memset(s->page, byte, os_page_size());
    thread_start(server_run, s);
    wait_flag(&s->ready);
}

void serve(int uffd, char byte)
{
    server_start(uffd, byte, false);
}

void serve_private(int uffd, char byte)
{
    server_start(uffd, byte, true);
}

/* ---- threads ---- */

struct start {
    void (*fn)(void *);
    void *arg;
};

static void *thread_run(void *arg)
{
    struct start s = *(struct start *)arg;

    free(arg);
    s.fn(s.arg);
    return NULL;
}

void thread_start(void (*fn)(void *), void *arg)
{
    struct start *s = malloc(sizeof(*s));
    pthread_t t;

    if (s)
        *s = (struct start){fn, arg};
    if (!s || pthread_create(&t, NULL, thread_run, s) != 0)
        fact_unseen("could not be tried: no thread");
    pthread_detach(t);
}

bool flag_set(const int *flag)
{
    return __atomic_load_n(flag, __ATOMIC_ACQUIRE) != 0;
}

void set_flag(int *flag)
{
    __atomic_store_n(flag, 1, __ATOMIC_RELEASE);
}

void wait_flag(const int *flag)
{
    uint64_t until = os_now() + HANG_NS;

    while (!flag_set(flag)) {
        if (os_now() > until)
            fact_differs("a system call that should have ended did not");
        os_sleep(20000);
    }
}

static cpu_set_t allowed; /* as the child began */

static void allowed_read(void)
{
    if (sched_getaffinity(0, sizeof(allowed), &allowed) < 0)
        CPU_ZERO(&allowed);
}

bool on_cpu(unsigned which)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, allowed_read);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && which-- == 0)
            return os->bind_cpu(cpu) == 0;
    return false;
}

int in_child(int (*fn)(void *), void *arg)
{
    pid_t pid = fork();
    int status;

    if (pid < 0)
        fact_unseen("could not be tried: no process");
    if (pid == 0) {
        alarm(2);
        _exit(fn(arg));
    }
    if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
        return -1;
    return WEXITSTATUS(status);
}
