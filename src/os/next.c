/* SPDX-License-Identifier: MIT */
/* See next.h. */
#include "os/next.h"

#include <sys/mman.h>
#include <sys/shm.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == sizeof(int64_t), "offsets have 64 bits");

static void *map_memory(void *addr, size_t len, int prot, int flags, int fd, int64_t offset)
{
    return mmap(addr, len, prot, flags, fd, offset);
}

const struct os_next os_next = {
    .mmap = map_memory,
    .munmap = munmap,
    .mremap = mremap,
    .madvise = madvise,
    .mprotect = mprotect,
    .pkey_mprotect = pkey_mprotect,
    .brk = brk,
    .sbrk = sbrk,
    .shmdt = shmdt,
    .execve = execve,
    .execvpe = execvpe,
    .fexecve = fexecve,
    .exit = _exit,
};
