/* SPDX-License-Identifier: MIT */
/*
 * Start and end. Everything comes in descriptors (channel.h); the arguments are for those who read the list of processes. The process
 * ends when the program says so, and when the program is gone: then the other end of the socket is closed.
 */
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

static struct hello hello = {.magic = CHANNEL_MAGIC, .version = CHANNEL_VERSION};

/* What the engine folder calls for its messages; there is no log here. The first reason stays. */
int hmm_fail(int err, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    if (!hello.status)
        vsnprintf(hello.message, sizeof(hello.message), fmt, args);
    va_end(args);
    hello.status = err;
    return err;
}

/* Signals that a terminal, or who ends a service, sends to all processes: the program ends in its own order, and we with it. */
static void set_up_signals(void)
{
    static const int not_ours[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGPIPE, SIGTSTP, SIGTTIN, SIGTTOU};
    sigset_t none;
    for (int n = 1; n <= SIGRTMAX; n++)
        if (n != SIGKILL && n != SIGSTOP)
            signal(n, SIG_DFL);
    for (unsigned i = 0; i < sizeof(not_ours) / sizeof(not_ours[0]); i++)
        signal(not_ours[i], SIG_IGN);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* ---- what was given ---------------------------------------------------------------------------------------------- */

static int map_channels(struct process *p)
{
    struct stat s;
    if (fstat(CHANNEL_FD_CHANNEL, &s) || (size_t)s.st_size < sizeof(struct channels))
        return hmm_fail(-EINVAL, "the channel is missing or too short");
    struct channels *c = mmap(NULL, (size_t)s.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, CHANNEL_FD_CHANNEL, 0);
    if (c == MAP_FAILED)
        return hmm_fail(-errno, "the channel cannot be mapped: %s", hmm_strerror(-errno));
    /* A child of a kernel that forks has no voice here, and writes to no device memory when this process is gone. */
    if (madvise(c, (size_t)s.st_size, MADV_DONTFORK))
        return hmm_fail(-errno, "the channel cannot be kept to this process: %s", hmm_strerror(-errno));
    if (c->magic != CHANNEL_MAGIC || c->version != CHANNEL_VERSION || c->layout != CHANNEL_LAYOUT)
        return hmm_fail(-EPROTO, "it is of another version than the library");
    if (c->nengines > SOFT_ENGINES_MAX || (size_t)s.st_size < channels_bytes(c->nengines))
        return hmm_fail(-EINVAL, "the channel is too short for %u engines", c->nengines);
    p->channels = c;
    return 0;
}

/* Aligned, so that the kernel may use huge pages. */
static int map_memory(struct process *p)
{
    uint64_t bytes = p->channels->memory_bytes;
    char *area = mmap(NULL, bytes + SOFT_BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), *at;
    if (area == MAP_FAILED)
        return hmm_fail(-errno, "no address space for device memory: %s", hmm_strerror(-errno));
    at = area + (-(uintptr_t)area & (SOFT_BLOCK - 1));
    if (mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, CHANNEL_FD_MEMORY, 0) == MAP_FAILED)
        return hmm_fail(-errno, "device memory cannot be mapped: %s", hmm_strerror(-errno));
    if (madvise(at, bytes, MADV_DONTFORK))
        return hmm_fail(-errno, "device memory cannot be kept to this process: %s", hmm_strerror(-errno));
    madvise(at, bytes, MADV_HUGEPAGE);
    p->memory_bytes = bytes;
    p->world.memory = at;
    p->world.page_shift = p->channels->page_shift;
    return 0;
}

static int map_gate(struct process *p)
{
    void *gate = mmap(NULL, (size_t)1 << p->world.page_shift, PROT_READ, MAP_SHARED, CHANNEL_FD_GATE, 0);
    if (gate == MAP_FAILED)
        return hmm_fail(-errno, "the event gate cannot be mapped: %s", hmm_strerror(-errno));
    p->world.gate = gate;
    return 0;
}

static int start(struct process *p)
{
    int r = map_channels(p);
    if (!r)
        r = map_memory(p);
    if (!r)
        r = map_gate(p);
    for (int fd = CHANNEL_FD_MEMORY; fd < CHANNEL_FD_END; fd++)
        close(fd);
    if (!r)
        r = soft_deadline_signal_get();
    if (!r)
        r = process_crash_init();
    if (!r)
        r = process_engines_start(p);
    if (!r)
        r = process_control_start(p);
    if (r && !hello.status)
        hmm_fail(r, "threads or memory are missing: %s", hmm_strerror(r));
    return r;
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

/* When the other end of the socket closes, the kernel itself kills this process: a stopped one (SIGSTOP) could not do so. */
static int end_with_the_program(void)
{
    int fd = CHANNEL_FD_SOCKET;
    if (fcntl(fd, F_SETOWN, getpid()) || fcntl(fd, F_SETSIG, SIGKILL) || fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_ASYNC))
        return -errno;
    return 0;
}

/* Not by recv(): while a thread sleeps there, the kernel may leave it to that thread to notice. */
static void wait_for_the_end(void)
{
    struct pollfd p = {.fd = CHANNEL_FD_SOCKET, .events = POLLIN | POLLRDHUP};
    while (poll(&p, 1, -1) <= 0)
        ;
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

static int usage(const char *name)
{
    fprintf(stderr, "%s: the engines of a libhmm device `soft:isolated`; hmm_device_open() starts it\n", name);
    return 2;
}

static bool is_socket(int fd)
{
    struct stat s;
    return fstat(fd, &s) == 0 && S_ISSOCK(s.st_mode);
}

int main(int argc, char **argv)
{
    static struct process process;
    if (argc != 3 || !is_socket(CHANNEL_FD_SOCKET))
        return usage(argv[0]);
    setsid();
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_NAME, "hmm-soft-engine");
    set_up_signals();
    int r = start(&process);
    if (!r && (r = end_with_the_program()))
        hmm_fail(r, "the socket does not announce its end: %s", hmm_strerror(r));
    if (send(CHANNEL_FD_SOCKET, &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello) || r)
        _exit(1);
    wait_for_the_end();
    _exit(0);
}
