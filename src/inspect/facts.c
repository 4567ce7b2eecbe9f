/* SPDX-License-Identifier: MIT */
/*
 * hmm_check_deep(): re-proves the kernel behaviours that the protocol depends on (docs/kernel-facts.md), each in a child with
 * a time limit. A child that hangs or dies is a result, not an accident: the kernel did not do what was expected of it.
 *
 * No state outside the children; the calling program has one thread.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "inspect/facts.h"

struct fact {
    void (*prove)(void);
    const char *name;   /* the fact in one line */
    const char *action; /* what the library does about it */
};

static const struct fact facts[] = {
    {fact_move_result, "1: MOVE may move pages and not say so, but each page is at one of the two places",
     "after every result that is not complete, the destination is scanned and only the scan is believed"},
    {fact_move_source, "2: MOVE wants private, anonymous, writable, unlocked memory that is ours alone, in one mapping",
     "what does not qualify stays in system memory and is counted; copy-on-write is broken with MADV_POPULATE_WRITE"},
    {fact_move_references, "3: MOVE takes pages that the kernel is still sending from",
     "a page taken from the program is freed after the copy, never used again for other data"},
    {fact_move_gate, "4: a pending event holds off MOVE on its own userfaultfd, and on no other",
     "pages are taken through the program's own userfaultfd, with staging registered there too"},
    {fact_remove_early, "5: the event of MADV_DONTNEED is read before the pages go",
     "what is present in the range is not taken before it was seen to be gone"},
    {fact_again_outlives, "6: EAGAIN outlives the reading of the event",
     "everything is let go, then a sleep, then another try"},
    {fact_order, "7: events of different threads may be read out of order",
     "mremap onto live entries drops them and notes that one unmap is owed there"},
    {fact_close, "8: a closed descriptor turns missing pages into zeros; one in a private table does not close",
     "library threads hold every descriptor in a private table, for good"},
    {fact_fork, "9: fork and mremap without events turn missing pages into zeros; MADV_DONTFORK keeps them from children",
     "where the event of fork is not given, managed memory is kept from children; that of REMAP is always asked for"},
    {fact_mincore, "10: mincore calls a swapped page absent; PAGEMAP_SCAN does not", "only PAGEMAP_SCAN is asked"},
    {fact_dontneed, "11: MADV_DONTNEED of ours could hit a new mapping, and waits for our own reader",
     "it is never called on memory of the program, nor on an area with events"},
    {fact_move_target, "12: MOVE drops write-protection and refuses read-only and locked targets; COPY does not refuse",
     "putting back falls back to COPY"},
    {fact_read_only, "13: a read-only page under write-protect raises a fault when it is written after mprotect",
     "read-only pages stay in system memory; to duplicate them would rest on this"},
    {fact_growth, "15: growing in place by mremap extends the registration without an event",
     "a fault outside of what is known to be registered makes it known, or unregisters it"},
    {fact_one_owner, "16: a mapping belongs to one userfaultfd, and registrations use up vm.max_map_count",
     "memory that another userfaultfd has stays in system memory and is counted; whole mappings are registered"},
    {fact_thread_exit, "17: the kernel writes at thread exit without faulting missing pages in",
     "pages with thread control blocks never leave; get_robust_list finds them"},
    {fact_system_calls, "18: system calls and process_vm_readv fault missing pages in, /proc/PID/mem does not",
     "devices reach system memory by process_vm_readv"},
    {fact_mlockall, "18: mlockall fills new memory, but not what is reserved without access",
     "own memory is reserved without access and unlocked before it is used"},
    {fact_collapse, "19: holes of a registered mapping are not collapsed into a huge page; mprotect raises no event",
     "nothing is needed for the first; protections are asked for when they matter"},
    {fact_move_huge, "20: a huge page is moved whole", "blocks that came as a huge page go home as one"},
    {fact_poison, "21: a poisoned page is SIGBUS until its content is dropped, whatever becomes of the userfaultfd",
     "what was lost with a device never reads as zeros"},
    {fact_modes, "22: MISSING and WP mode replace each other in one step; WP mode raises events and no faults",
     "memory that is only mirrored is watched at no cost, and no event is missed when it changes to being away and back"},
    {fact_remap_leaves, "23: mremap tells of the unmap of the old place after the remap, except with MREMAP_DONTUNMAP",
     "the old place stays known until then: an unmap that another remap onto it has overtaken is owed"},
    {fact_move_huge_zero, "24: the huge zero page can be moved in two halves",
     "it is never moved as one, which corrupts it on some kernels"},
    {fact_move_lazy, "25: a page that was freed lazily can be moved, and may be discarded afterwards",
     "a staged page that is gone reads as zeros"},
    {fact_fork_event, "26: fork waits until its event is read, which brings a descriptor that fills the child's memory",
     "a child is given what is away through it; without the right to the event, handlers of fork do what can be done"},
};

/* ---- in the child ---- */

struct verdict {
    int status; /* enum hmm_check_status */
    char seen[200];
};

static int verdict_fd;

_Noreturn static void conclude(int status, const char *fmt, va_list ap)
{
    struct verdict v = {.status = status};

    vsnprintf(v.seen, sizeof(v.seen), fmt, ap);
    /* One write, which a pipe takes whole: another thread may be about to say something as well, and only the first counts. */
    if (write(verdict_fd, &v, sizeof(v)) < 0)
        _exit(2);
    _exit(0);
}

void fact_ok(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    conclude(HMM_CHECK_OK, fmt, ap);
}

void fact_differs(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    conclude(HMM_CHECK_MISSING, fmt, ap);
}

void fact_unseen(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    conclude(HMM_CHECK_NOT_SEEN, fmt, ap);
}

_Noreturn static void prove_in_child(const struct fact *f, int fd, pid_t parent)
{
    /* Whatever the program does with these is not for its copy to do. */
    static const int signals[] = {SIGALRM, SIGBUS, SIGSEGV, SIGTERM, SIGINT, SIGPIPE, SIGCHLD};

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(2);
    for (size_t i = 0; i < ARRAY_LEN(signals); i++)
        signal(signals[i], SIG_DFL);
    verdict_fd = fd;
    f->prove();
    _exit(2);
}

/* ---- in the parent ---- */

/* Waits for the verdict of a child; without one, says what became of it. */
static void await(pid_t pid, int fd, unsigned limit_ms, struct verdict *v)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    uint64_t until = os_now() + limit_ms * 1000000ull;
    int status = 0, ready = 0;

    while (os_now() < until && ready <= 0) {
        ready = poll(&p, 1, 100);
        if (ready < 0 && errno != EINTR)
            break;
    }
    if (ready > 0 && read(fd, v, sizeof(*v)) == (ssize_t)sizeof(*v))
        status = -1;
    else if (ready <= 0)
        snprintf(v->seen, sizeof(v->seen), "hung for %.1f seconds and was killed", limit_ms / 1000.0);
    kill(pid, SIGKILL);
    /* A thread that spins in the kernel may not even die: it is not waited for without end. */
    until = os_now() + 1000000000;
    for (pid_t got = 0; got == 0 && os_now() < until;) {
        int s = 0;

        got = waitpid(pid, &s, WNOHANG);
        if (got == pid && status == 0 && ready > 0 && WIFSIGNALED(s))
            snprintf(v->seen, sizeof(v->seen), "died of signal %d", WTERMSIG(s));
        if (got == 0)
            os_sleep(200000);
    }
}

static void try_fact(const struct fact *f, unsigned limit_ms, struct verdict *v)
{
    pid_t parent = getpid(), pid;
    int fds[2];

    *v = (struct verdict){.status = HMM_CHECK_MISSING, .seen = "ended without a verdict"};
    if (pipe2(fds, O_CLOEXEC) < 0) {
        *v = (struct verdict){.status = HMM_CHECK_NOT_SEEN, .seen = "could not be tried: no pipe"};
        return;
    }
    pid = fork();
    if (pid == 0) {
        close(fds[0]);
        prove_in_child(f, fds[1], parent);
    }
    close(fds[1]);
    if (pid < 0)
        *v = (struct verdict){.status = HMM_CHECK_NOT_SEEN, .seen = "could not be tried: no process"};
    else
        await(pid, fds[0], limit_ms, v);
    close(fds[0]);
}

static void report(const struct fact *f, const struct verdict *v, hmm_check_fn fn, void *arg)
{
    char detail[512];
    struct hmm_check_item item = {.name = f->name, .detail = detail, .remedy = "", .status = (enum hmm_check_status)v->status};

    snprintf(detail, sizeof(detail), "%s; libhmm: %s", v->seen, f->action);
    if (v->status == HMM_CHECK_MISSING)
        item.remedy = "do not migrate memory under this kernel; report it, with `uname -a`, to the maintainers of libhmm";
    fn(&item, arg);
}

int facts_run(const char *only, unsigned limit_ms, hmm_check_fn fn, void *arg)
{
    int different = 0;

    for (size_t i = 0; i < ARRAY_LEN(facts); i++) {
        struct verdict v;

        if (strncmp(facts[i].name, only, strlen(only)) != 0)
            continue;
        try_fact(&facts[i], limit_ms, &v);
        different += v.status == HMM_CHECK_MISSING;
        if (fn)
            report(&facts[i], &v, fn, arg);
    }
    return different;
}

#define LIMIT_MS 4000

int hmm_check_deep(hmm_check_fn fn, void *arg)
{
    struct os_uffd u;
    int err;

    message_clear();
    err = os->uffd_open(OS_UFFD_REQUIRED, &u);
    if (err == -EPERM)
        return hmm_fail(err, "deep check: userfaultfd is not permitted to this user; remedy: access to /dev/userfaultfd, "
                             "vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE");
    if (err == -ENOSYS || err == -EINVAL)
        return hmm_fail(-ENOSYS, "deep check: this kernel lacks userfaultfd or a feature of it; remedy: Linux 6.8 or newer");
    if (err < 0)
        return hmm_fail(err, "deep check: userfaultfd cannot be opened (%s)", error_name(err));
    os->close(u.fd);
    return facts_run("", LIMIT_MS, fn, arg);
}
