/* SPDX-License-Identifier: MIT */
/*
 * Kernels that crash. A signal that a thread raises in the code of a kernel ends that kernel, as deadline.c does: there the
 * thread holds no lock of ours and nothing of the driver is half done. What the kernel did to the memory of this process before is
 * done, and may make others crash; it is all that it can reach. Anywhere else the signal ends the process.
 */
#include "process.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>

#define STACK_BYTES ((size_t)64 << 10)

static const struct {
    int number;
    const char *name;
} crashes[] = {
    {SIGSEGV, "SIGSEGV"}, {SIGBUS, "SIGBUS"},   {SIGFPE, "SIGFPE"},
    {SIGILL, "SIGILL"},   {SIGABRT, "SIGABRT"}, {SIGTRAP, "SIGTRAP"},
};
#define CRASHES (sizeof(crashes) / sizeof(crashes[0]))

static __thread struct engine *self;

static const char *name_of(int number)
{
    for (unsigned i = 0; i < CRASHES; i++)
        if (crashes[i].number == number)
            return crashes[i].name;
    return "?";
}

static void describe(struct engine *e, int number, const siginfo_t *info)
{
    const struct hmm_launch *launch = &e->operation->kernel;
    struct text t = {.buf = e->message, .size = sizeof(e->message)};
    bool address = number == SIGSEGV || number == SIGBUS;
    e->message[0] = '\0';
    soft_text_str(&t, "kernel ");
    soft_text_str(&t, launch->symbol);
    soft_text_str(&t, " crashed: ");
    soft_text_str(&t, name_of(number));
    if (address) {
        soft_text_str(&t, " at ");
        soft_text_hex(&t, (uintptr_t)info->si_addr);
        soft_text_str(&t, "; process memory is reached by hmm_span_read() and hmm_span_write() only");
    }
    e->status = (struct hmm_job_status){
        .status = -EFAULT,
        .address = address ? (uintptr_t)info->si_addr : 0,
        .message = e->message,
    };
}

/* SA_NODEFER, because the jump does not restore the mask. */
static void on_crash(int number, siginfo_t *info, void *context)
{
    struct engine *e = self;
    (void)context;
    if (!e || !__atomic_load_n(&e->in_user, __ATOMIC_RELAXED)) {
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    __atomic_store_n(&e->in_user, 0, __ATOMIC_RELAXED);
    describe(e, number, info);
    soft_deadline_allow(); /* the crash may have happened under that signal's handler */
    soft_engine_throw(e);
}

int process_crash_init(void)
{
    struct sigaction a = {.sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigemptyset(&a.sa_mask);
    for (unsigned i = 0; i < CRASHES; i++)
        if (sigaction(crashes[i].number, &a, NULL))
            return -errno;
    return 0;
}

/* A kernel may crash because its stack is full. */
int process_crash_adopt(struct engine *e)
{
    stack_t stack = {.ss_size = STACK_BYTES, .ss_sp = malloc(STACK_BYTES)};
    if (!stack.ss_sp)
        return -ENOMEM;
    self = e;
    return sigaltstack(&stack, NULL) ? -errno : 0;
}
