/* SPDX-License-Identifier: MIT */
/*
 * Starting a process that is nobody's child: the program's wait() must not see it, nor its SIGCHLD handler, nor may it become a
 * zombie that nobody waits for. So a first child, whose end raises no signal and which only wait calls with __WALL see, starts
 * the second and ends; the second becomes an orphan, and belongs to whoever adopts orphans. (Where that is the program itself, as the
 * first process of a container, it sees one child more; such a program must expect children that it does not know.)
 *
 * Neither is a copy: they run in this address space until exec (CLONE_VM), while their parent sleeps (CLONE_VFORK). A fork() would
 * copy page tables and be seen by userfaultfd. So they only make system calls, on stacks of their own, with all signals blocked.
 */
#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>

#define STACK_BYTES ((size_t)64 << 10) /* each */

/* A sanitizer reports to where the library's threads do. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define STDERR_STAYS
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define STDERR_STAYS
#endif
#endif

/* The given ones may stand where others are to come: first all go out of the way. */
static int arrange_descriptors(struct spawn *s)
{
    int n = CHANNEL_FD_END - CHANNEL_FD_SOCKET;
    for (int i = 0; i < n; i++) {
        s->fds[i] = fcntl(s->fds[i], F_DUPFD_CLOEXEC, CHANNEL_FD_END);
        if (s->fds[i] < 0)
            return -errno;
    }
    int nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (nowhere < 0)
        return -errno;
    nowhere = fcntl(nowhere, F_DUPFD_CLOEXEC, CHANNEL_FD_END);
    if (nowhere < 0)
        return -errno;
    int last = 2;
#ifdef STDERR_STAYS
    last = fcntl(2, F_GETFD) < 0 ? 2 : 1;
#endif
    for (int fd = 0; fd <= last; fd++)
        if (dup2(nowhere, fd) < 0)
            return -errno;
    for (int i = 0; i < n; i++)
        if (dup2(s->fds[i], CHANNEL_FD_SOCKET + i) < 0)
            return -errno;
    return syscall(SYS_close_range, CHANNEL_FD_END, ~0u, 0) ? -errno : 0;
}

static int run_program(void *arg)
{
    struct spawn *s = arg;
    s->err = arrange_descriptors(s);
    if (!s->err) {
        execve(s->path, s->argv, s->envp);
        s->err = -errno;
    }
    _exit(127);
}

/* Shares the descriptor table with the library's threads: there the new process's descriptor is to be. */
static int start_program(void *arg)
{
    struct spawn *s = arg;
    s->pid = clone(run_program, s->stack + 2 * STACK_BYTES, CLONE_VM | CLONE_VFORK | CLONE_PIDFD | SIGCHLD, s, &s->pidfd);
    if (s->pid < 0)
        s->err = -errno;
    _exit(0);
}

int soft_spawn(struct spawn *s)
{
    int status;
    s->err = 0;
    s->pidfd = -1;
    s->stack = hmm_mem_alloc(2 * STACK_BYTES);
    if (!s->stack)
        return -ENOMEM;
    int first = clone(start_program, s->stack + STACK_BYTES, CLONE_VM | CLONE_VFORK | CLONE_FILES, s);
    if (first < 0)
        s->err = -errno;
    else
        while (waitpid(first, &status, __WALL) < 0 && errno == EINTR)
            ; /* or the program has waited for it, with __WALL */
    hmm_mem_free(s->stack, 2 * STACK_BYTES);
    if (s->err && s->pidfd >= 0)
        close(s->pidfd);
    return s->err;
}
