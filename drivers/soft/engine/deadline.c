/* SPDX-License-Identifier: MIT */
/*
 * Ending a kernel that does not let go: a real-time signal to its engine, whose handler leaves the kernel by siglongjmp().
 *
 * The request is a word with the generation of the job, so that it cannot hit the next one: an engine changes its generation only
 * on its own thread, between jobs, and the handler runs on that thread. The handler leaves only when the thread is in the
 * kernel's own code: then it holds no lock and nothing of the driver or of core is half done. Otherwise the request is seen at
 * the end of the accessor call.
 *
 * The signal is one that the program has not set up when the first device opens. Threads other than engines ignore it, should
 * somebody send it to them.
 */
#include "engine.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Static state of the process; `owner` tells a forked child that it is a copy of its parent's. */
static struct {
    pthread_mutex_t lock;
    pid_t owner;
    unsigned users;
    int number;
} kill_signal = {.lock = PTHREAD_MUTEX_INITIALIZER};

static __thread struct engine *self;

enum kill_cause soft_deadline_asked(const struct engine *e)
{
    uint64_t kill = __atomic_load_n(&e->kill, __ATOMIC_ACQUIRE);
    return kill >> 8 == e->generation ? (enum kill_cause)(kill & 0xff) : KILL_NONE;
}

static void on_signal(int number)
{
    struct engine *e = self;
    (void)number;
    if (!e || !__atomic_load_n(&e->in_user, __ATOMIC_RELAXED) || soft_deadline_asked(e) == KILL_NONE)
        return;
    __atomic_store_n(&e->in_user, 0, __ATOMIC_RELAXED);
    soft_engine_throw(e);
}

void soft_deadline_allow(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, kill_signal.number);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

void soft_deadline_adopt(struct engine *e)
{
    self = e;
    __atomic_store_n(&e->tid, (int)syscall(SYS_gettid), __ATOMIC_RELEASE);
    soft_deadline_allow();
}

void soft_deadline_kill(struct engine *e, uint32_t generation, enum kill_cause cause, bool force)
{
    __atomic_store_n(&e->kill, (uint64_t)generation << 8 | cause, __ATOMIC_SEQ_CST);
    int tid = __atomic_load_n(&e->tid, __ATOMIC_ACQUIRE);
    if (force && tid && __atomic_load_n(&e->in_user, __ATOMIC_SEQ_CST))
        syscall(SYS_tgkill, getpid(), tid, kill_signal.number);
}

/* ---- the signal -------------------------------------------------------------------------------------------------- */

/* No SA_NODEFER: real-time signals queue up, and each of a flood of them would nest. So the handler that leaves by a jump leaves the
 * signal blocked, until soft_deadline_allow(). */
static int install(void)
{
    struct sigaction ours = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK | SA_RESTART}, old;
    sigemptyset(&ours.sa_mask);
    for (int n = SIGRTMAX; n >= SIGRTMIN; n--) {
        if (sigaction(n, NULL, &old) || (old.sa_flags & SA_SIGINFO) || old.sa_handler != SIG_DFL)
            continue;
        if (sigaction(n, &ours, NULL) == 0)
            return n;
    }
    return hmm_fail(-EBUSY, "soft: no real-time signal is free to end kernels with; the program uses all of them");
}

static void uninstall(int number)
{
    struct sigaction now;
    if (sigaction(number, NULL, &now) == 0 && !(now.sa_flags & SA_SIGINFO) && now.sa_handler == on_signal)
        signal(number, SIG_DFL);
}

int soft_deadline_signal_get(void)
{
    int r = 0;
    if (kill_signal.owner != getpid()) {
        pthread_mutex_init(&kill_signal.lock, NULL);
        kill_signal.owner = getpid();
        kill_signal.users = 0;
    }
    pthread_mutex_lock(&kill_signal.lock);
    if (kill_signal.users == 0) {
        int number = install();
        if (number < 0)
            r = number;
        else
            kill_signal.number = number;
    }
    if (!r)
        kill_signal.users++;
    pthread_mutex_unlock(&kill_signal.lock);
    return r;
}

void soft_deadline_signal_put(void)
{
    pthread_mutex_lock(&kill_signal.lock);
    if (--kill_signal.users == 0)
        uninstall(kill_signal.number);
    pthread_mutex_unlock(&kill_signal.lock);
}
