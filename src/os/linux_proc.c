/* SPDX-License-Identifier: MIT */
/*
 * Threads, CPUs and descriptors. No state but the CPUs that the process was given at load time; any thread may call.
 */
#include <dirent.h>
#include <linux/close_range.h>
#include <linux/futex.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/utsname.h>
#include <time.h>

#include "os/linux.h"

/* ---- waiting ---- */

int linux_poll(const int *fds, unsigned n, int timeout_ms)
{
    struct pollfd p[31];
    struct timespec t = {timeout_ms / 1000, (long)(timeout_ms % 1000) * 1000000};
    int64_t r;
    int ready = 0;

    if (n > sizeof(p) / sizeof(p[0]))
        return -EINVAL;
    for (unsigned i = 0; i < n; i++)
        p[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
    r = sys_result(syscall(SYS_ppoll, p, n, timeout_ms < 0 ? NULL : &t, NULL, (size_t)0));
    if (r < 0)
        return r == -EINTR ? 0 : (int)r;
    for (unsigned i = 0; i < n; i++) {
        if (p[i].revents & (POLLNVAL | POLLERR))
            return -EBADF; /* would be ready for ever, and never readable */
        if (p[i].revents & (POLLIN | POLLHUP))
            ready |= 1 << i;
    }
    return ready;
}

int linux_event_open(void)
{
    return (int)sys_result(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

int linux_event_set(int fd)
{
    uint64_t one = 1;
    int64_t r = sys_result(syscall(SYS_write, fd, &one, sizeof(one)));

    return r < 0 && r != -EAGAIN ? (int)r : 0; /* EAGAIN: the count is full, so it is set */
}

int linux_event_clear(int fd)
{
    uint64_t count;
    int64_t r = sys_read(fd, &count, sizeof(count));

    return r < 0 && r != -EAGAIN ? (int)r : 0;
}

int linux_close(int fd)
{
    int err = sys_close(fd);

    return err == -EINTR ? 0 : err; /* Linux has closed it all the same */
}

/* ---- CPUs ---- */

#define CPU_WORDS 128 /* 8192 CPUs: the most that the kernel is built for */

static unsigned long start_cpus[CPU_WORDS];

/* At load time the thread has the CPUs that the process was started with; later every thread may have its own. */
__attribute__((constructor)) static void remember_cpus(void)
{
    if (syscall(SYS_sched_getaffinity, 0, sizeof(start_cpus), start_cpus) < 0)
        memset(start_cpus, 0xff, sizeof(start_cpus));
}

int linux_bind_cpu(int cpu)
{
    unsigned long mask[CPU_WORDS] = {0};
    unsigned bits = 8 * sizeof(mask[0]);

    if (cpu >= (int)(CPU_WORDS * bits))
        return -EINVAL;
    if (cpu < 0)
        memcpy(mask, start_cpus, sizeof(mask));
    else
        mask[(unsigned)cpu / bits] = 1ul << (unsigned)cpu % bits;
    return (int)sys_result(syscall(SYS_sched_setaffinity, 0, sizeof(mask), mask));
}

/* Writes "/proc/self/task/TID" and the name. */
static void task_path(pid_t tid, const char *name, char *path)
{
    char digits[12];
    unsigned n = 0;

    path = stpcpy(path, "/proc/self/task/");
    do
        digits[n++] = (char)('0' + tid % 10);
    while (tid /= 10);
    while (n)
        *path++ = digits[--n];
    stpcpy(path, name);
}

/* Field `want` of the fields behind the command's name, which may itself contain anything. The first is field 3. */
static int stat_field(const char *stat, unsigned want)
{
    const char *p = strrchr(stat, ')');
    int value = 0;

    if (!p)
        return -EIO;
    for (unsigned field = 2; field < want; field++) {
        p = strchr(p + 1, ' ');
        if (!p)
            return -EIO;
    }
    for (p++; *p >= '0' && *p <= '9'; p++)
        value = value * 10 + (*p - '0');
    return value;
}

int linux_read_text(const char *path, char *buf, size_t size)
{
    int fd = sys_open(path, O_RDONLY);
    int64_t len;

    if (fd < 0)
        return fd;
    len = sys_read(fd, buf, size - 1);
    sys_close(fd);
    if (len < 0)
        return (int)len;
    if (len && buf[len - 1] == '\n')
        len--;
    buf[len] = '\0';
    return (int)len;
}

int linux_thread_cpu(pid_t tid)
{
    char path[48], stat[1024];
    int len;

    if (tid <= 0)
        return -EINVAL;
    task_path(tid, "/stat", path);
    len = linux_read_text(path, stat, sizeof(stat));
    return len < 0 ? len : stat_field(stat, 39);
}

/* Where it sleeps is the name of a function of the kernel, or "0" where that is not told. */
int linux_thread_in_fault(pid_t tid)
{
    char path[48], where[64];
    int len;

    if (tid <= 0)
        return -EINVAL;
    task_path(tid, "/wchan", path);
    len = linux_read_text(path, where, sizeof(where));
    return len < 0 ? len : strcmp(where, "handle_userfault") == 0;
}

/* ---- threads ---- */

/* 0 for a name that is not a number. */
static pid_t task_id(const char *name)
{
    pid_t tid = 0;

    for (; *name >= '0' && *name <= '9'; name++)
        tid = tid * 10 + (*name - '0');
    return *name ? 0 : tid;
}

/* Address of the thread's list of robust futexes. The C library keeps it, and the word that the kernel clears at thread exit,
 * in the thread's control block. 0: the thread has ended, or has none. */
uintptr_t (*os_known_thread_block)(uint32_t tid);

static uintptr_t thread_block(pid_t tid)
{
    struct robust_list_head *head = NULL;
    size_t len;
    uintptr_t known = os_known_thread_block ? os_known_thread_block((uint32_t)tid) : 0;

    if (known)
        return known;
    if (syscall(SYS_get_robust_list, tid, &head, &len) < 0)
        return 0;
    return (uintptr_t)head;
}

int linux_thread_blocks(uintptr_t *tcbs, unsigned max)
{
    char entries[2048] __attribute__((aligned(8)));
    int dir = sys_open("/proc/self/task", O_RDONLY | O_DIRECTORY);
    unsigned count = 0;
    int64_t got;

    if (dir < 0)
        return dir;
    while ((got = sys_result(syscall(SYS_getdents64, dir, entries, sizeof(entries)))) > 0) {
        for (int64_t at = 0; at < got;) {
            const struct dirent64 *d = (const struct dirent64 *)(entries + at);
            pid_t tid = task_id(d->d_name);
            uintptr_t block = tid ? thread_block(tid) : 0;

            if (block) {
                if (count < max)
                    tcbs[count] = block;
                count++;
            }
            at += d->d_reclen;
        }
    }
    sys_close(dir);
    return got < 0 ? (int)got : (int)count;
}

/* ---- descriptors ---- */

static int close_span(unsigned first, unsigned last, unsigned flags)
{
    if (first > last)
        return 0;
    return (int)sys_result(syscall(SYS_close_range, first, last, flags));
}

int linux_private_files(const int *keep, unsigned n)
{
    unsigned from = n ? (unsigned)keep[n - 1] + 1 : 0;
    int err;

    /* The tail first: with it the table becomes private, and the kernel copies only what stands before the tail. */
    err = close_span(from, ~0u, CLOSE_RANGE_UNSHARE);
    from = 0;
    for (unsigned i = 0; i < n && !err; i++) {
        if (keep[i] > 0)
            err = close_span(from, (unsigned)keep[i] - 1, 0);
        from = (unsigned)keep[i] + 1;
    }
    return err;
}

int linux_pipe_open(int fds[2])
{
    return (int)sys_result(syscall(SYS_pipe2, fds, O_CLOEXEC));
}

/* Before 6.9 a thread cannot be named so. Its process can, and has the same table unless the thread made its own. */
static int open_thread(pid_t tid)
{
    int fd = (int)sys_result(syscall(SYS_pidfd_open, tid, PIDFD_THREAD));

    return fd == -EINVAL ? (int)sys_result(syscall(SYS_pidfd_open, getpid(), 0)) : fd;
}

int linux_fd_of_thread(pid_t tid, int fd)
{
    int thread = open_thread(tid), copy;

    if (thread < 0)
        return thread;
    copy = (int)sys_result(syscall(SYS_pidfd_getfd, thread, fd, 0));
    sys_close(thread);
    return copy;
}

int linux_kernel_version(void)
{
    struct utsname u;
    int major = 0, minor = 0;
    const char *p = u.release;

    if (uname(&u) < 0)
        return -errno;
    for (; *p >= '0' && *p <= '9'; p++)
        major = major * 10 + (*p - '0');
    if (*p == '.')
        p++;
    for (; *p >= '0' && *p <= '9'; p++)
        minor = minor * 10 + (*p - '0');
    return major * 1000 + minor;
}
