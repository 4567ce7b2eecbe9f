/* SPDX-License-Identifier: MIT */
/*
 * Private to the linux_*.c files (and their tests): the operations that make up os_linux, one prototype each, with the contract
 * in os.h. Also system calls that are not thread cancellation points, unlike the C library's: a program's thread that is
 * cancelled inside of us would leave locks behind.
 */
#ifndef HMM_OS_LINUX_H
#define HMM_OS_LINUX_H

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "os/os.h"

/* A result of a system call as a negative errno. */
static inline int64_t sys_result(int64_t r)
{
    return r < 0 ? -errno : r;
}

static inline int sys_open(const char *path, int flags)
{
    return (int)sys_result(syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0));
}

static inline int64_t sys_read(int fd, void *buf, size_t len)
{
    return sys_result(syscall(SYS_read, fd, buf, len));
}

static inline int sys_close(int fd)
{
    return (int)sys_result(syscall(SYS_close, fd));
}

/* linux_uffd.c */
int linux_uffd_open(uint64_t features, struct os_uffd *out);
int linux_uffd_register(int uffd, uintptr_t start, size_t len);
int linux_uffd_watch(int uffd, uintptr_t start, size_t len);
int linux_uffd_watched(int uffd, uintptr_t start, size_t len);
int linux_uffd_unregister(int uffd, uintptr_t start, size_t len);
int64_t linux_uffd_copy(int uffd, uintptr_t dst, const void *src, size_t len);
int64_t linux_uffd_zeropage(int uffd, uintptr_t dst, size_t len);
int64_t linux_uffd_move(int uffd, uintptr_t dst, uintptr_t src, size_t len);
int64_t linux_uffd_poison(int uffd, uintptr_t dst, size_t len);
int linux_uffd_wake(int uffd, uintptr_t start, size_t len);
int linux_uffd_pending(int uffd);
int linux_uffd_read(int uffd, struct uffd_msg *msgs, unsigned n);

/* linux_maps.c */
int linux_pagemap_open(void);
int linux_maps_open(void);
int linux_pagemap_scan(int fd, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n, uintptr_t *walked);
int linux_vma_query(int fd, uintptr_t addr, struct os_vma *out);
int linux_vma_query_fast(int fd);
int linux_page_alone(int fd, uintptr_t addr);
int linux_marked(enum os_mark mark, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n);
/* The fallback of vma_query for kernels before 6.11: reads the list of mappings from its beginning. */
int linux_vma_parse(uintptr_t addr, struct os_vma *out);
/* One line of it, without newline; false for what is none. */
bool linux_vma_parse_line(const char *line, struct os_vma *out);

/* linux_mem.c */
int linux_map(size_t len, size_t align, unsigned flags, void **out);
int linux_remap_fresh(void *addr, size_t len, unsigned flags);
int linux_unmap(void *addr, size_t len);
int linux_map_shown(size_t len, void **out);
int linux_advise(void *addr, size_t len, int advice);
int64_t linux_vm_read(uintptr_t addr, void *buf, size_t len);
int64_t linux_vm_write(uintptr_t addr, const void *buf, size_t len);

/* linux_proc.c */
int linux_poll(const int *fds, unsigned n, int timeout_ms);
int linux_event_open(void);
int linux_event_set(int fd);
int linux_event_clear(int fd);
int linux_thread_cpu(pid_t tid);
int linux_thread_in_fault(pid_t tid);
int linux_bind_cpu(int cpu);
int linux_thread_blocks(uintptr_t *tcbs, unsigned max);
int linux_private_files(const int *keep, unsigned n);
int linux_close(int fd);
int linux_pipe_open(int fds[2]);
int linux_fd_of_thread(pid_t tid, int fd);
int linux_kernel_version(void);
int linux_read_text(const char *path, char *buf, size_t size);

#endif
