/* SPDX-License-Identifier: MIT */
/*
 * The real system's table, and the few helpers that need no table: page size, clock, thread id.
 *
 * No state but constants found at load time and the cached thread id; safe in any thread, and on the fault path.
 */
#include <pthread.h>
#include <sys/auxv.h>
#include <time.h>

#include "os/linux.h"

const struct os_ops os_linux = {
    .uffd_open = linux_uffd_open,
    .uffd_register = linux_uffd_register,
    .uffd_watch = linux_uffd_watch,
    .uffd_watched = linux_uffd_watched,
    .uffd_unregister = linux_uffd_unregister,
    .uffd_copy = linux_uffd_copy,
    .uffd_zeropage = linux_uffd_zeropage,
    .uffd_move = linux_uffd_move,
    .uffd_poison = linux_uffd_poison,
    .uffd_wake = linux_uffd_wake,
    .uffd_pending = linux_uffd_pending,
    .uffd_read = linux_uffd_read,
    .poll = linux_poll,
    .event_open = linux_event_open,
    .event_set = linux_event_set,
    .event_clear = linux_event_clear,
    .pagemap_open = linux_pagemap_open,
    .maps_open = linux_maps_open,
    .pagemap_scan = linux_pagemap_scan,
    .vma_query = linux_vma_query,
    .map = linux_map,
    .remap_fresh = linux_remap_fresh,
    .unmap = linux_unmap,
    .map_shown = linux_map_shown,
    .advise = linux_advise,
    .vm_read = linux_vm_read,
    .vm_write = linux_vm_write,
    .thread_cpu = linux_thread_cpu,
    .thread_in_fault = linux_thread_in_fault,
    .bind_cpu = linux_bind_cpu,
    .thread_blocks = linux_thread_blocks,
    .private_files = linux_private_files,
    .close = linux_close,
    .pipe_open = linux_pipe_open,
    .fd_of_thread = linux_fd_of_thread,
    .kernel_version = linux_kernel_version,
    .page_alone = linux_page_alone,
    .marked = linux_marked,
    .vma_query_fast = linux_vma_query_fast,
    .read_text = linux_read_text,
};

const struct os_ops *os = &os_linux;

size_t os_page_size(void)
{
    static size_t size; /* every thread stores the same value */
    size_t s = __atomic_load_n(&size, __ATOMIC_RELAXED);

    if (!s) {
        s = getauxval(AT_PAGESZ);
        __atomic_store_n(&size, s, __ATOMIC_RELAXED);
    }
    return s;
}

unsigned os_page_shift(void)
{
    return (unsigned)__builtin_ctzl(os_page_size());
}

uint64_t os_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void os_sleep(uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};

    /* The raw call: clock_nanosleep() of the C library is a cancellation point. The rest is left in t when interrupted. */
    while (syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, &t) < 0 && errno == EINTR)
        ;
}

static __thread pid_t cached_tid __attribute__((tls_model("initial-exec")));

pid_t os_tid(void)
{
    if (!cached_tid)
        cached_tid = (pid_t)syscall(SYS_gettid);
    return cached_tid;
}

pid_t os_pid(void)
{
    return (pid_t)syscall(SYS_getpid);
}

/* The child of fork() is a thread of another name. (After a raw clone() without exec the old one stays: no such child may use
 * the library.) */
static void forget_tid(void)
{
    cached_tid = 0;
}

__attribute__((constructor)) static void watch_fork(void)
{
    pthread_atfork(NULL, NULL, forget_tid);
}
