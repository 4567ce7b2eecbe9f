/* SPDX-License-Identifier: MIT */
/*
 * The calls that change the address space, announced (docs/calls.md). Each takes the next definition of its function: the C library's
 * for hmm_munmap() and its like, what stands behind libhmm-preload.so for that. Here stands which call changes what; how
 * devices are told, in process/change.c.
 *
 * Nothing here allocates, or takes a lock of the C library; errno is that of the call.
 */
#include <errno.h>
#include <linux/mman.h>
#include <stdarg.h>
#include <sys/vfs.h>

#include "api/manager.h"
#include "os/next.h"
#include "process/change.h"
#include <hmm/preload.h>

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* 5.18 */
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102 /* 6.13 */
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

void hmm_change_begin(struct hmm_change *change, enum hmm_change_kind kind, const void *addr, size_t len)
{
    int err = errno;
    change->slot = change_begin(kind, (uintptr_t)addr, len);
    errno = err;
}

void hmm_change_end(struct hmm_change *change)
{
    int err = errno;
    change_end(change->slot);
    change->slot = CHANGE_NONE;
    errno = err;
}

/* ---- what each call changes ---- */

#define HUGETLBFS_MAGIC 0x958458f6
#define HUGE_DEFAULT ((size_t)2 << 20) /* where neither flags nor file say it */

/* The kernel rounds it up to the pages of the new mapping. */
static size_t mapped_length(size_t len, int flags, int fd)
{
    size_t huge = 0;
    struct statfs fs;
    int err = errno;
    if (flags & MAP_ANONYMOUS)
        huge = !(flags & MAP_HUGETLB)                    ? 0
               : flags >> MAP_HUGE_SHIFT & MAP_HUGE_MASK ? (size_t)1 << (flags >> MAP_HUGE_SHIFT & MAP_HUGE_MASK)
                                                         : HUGE_DEFAULT;
    else if (fd >= 0 && fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS_MAGIC)
        huge = (size_t)fs.f_bsize;
    errno = err;
    return huge && len <= SIZE_MAX - huge ? (len + huge - 1) & ~(huge - 1) : len;
}

static void *call_mmap(void *(*next)(void *, size_t, int, int, int, int64_t), void *addr, size_t len, int prot, int flags,
                       int fd, int64_t offset)
{
    if (!(flags & MAP_FIXED) || flags & MAP_FIXED_NOREPLACE)
        return next(addr, len, prot, flags, fd, offset);
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_UNMAP, addr, mapped_length(len, flags, fd));
    void *p = next(addr, len, prot, flags, fd, offset);
    hmm_change_end(&c);
    return p;
}

static int call_munmap(int (*next)(void *, size_t), void *addr, size_t len)
{
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_UNMAP, addr, len);
    int r = next(addr, len);
    hmm_change_end(&c);
    return r;
}

/* The part of the old range whose pages may go elsewhere or away: *len of it, from `from` on. */
static size_t remapped_part(size_t old_len, size_t new_len, int flags, size_t *len)
{
    size_t mask = os_page_size() - 1, kept = (new_len + mask) & ~mask, old = (old_len + mask) & ~mask;
    *len = 0;
    if (old == 0) /* another mapping of the same shared memory is made */
        return 0;
    if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) || (kept > old && flags & MREMAP_MAYMOVE)) {
        *len = old;
        return 0;
    }
    if (kept < old)
        *len = old - kept;
    return kept;
}

static void begin_target(struct hmm_change *change, const void *addr, size_t len, const void *source)
{
    int err = errno;
    change->slot = change_begin_target((uintptr_t)addr, len, (uintptr_t)source);
    errno = err;
}

static void *call_mremap(void *(*next)(void *, size_t, size_t, int, ...), void *addr, size_t old_len, size_t new_len, int flags,
                         void *new_addr)
{
    struct hmm_change from, to;
    size_t len, at = remapped_part(old_len, new_len, flags, &len);
    hmm_change_begin(&from, HMM_CHANGE_REMAP, (char *)addr + at, len);
    begin_target(&to, new_addr, flags & MREMAP_FIXED ? new_len : 0, addr);
    void *p = next(addr, old_len, new_len, flags, new_addr);
    hmm_change_end(&to);
    hmm_change_end(&from);
    return p;
}

static int call_madvise(int (*next)(void *, size_t, int), void *addr, size_t len, int advice)
{
    struct hmm_change c;
    enum hmm_change_kind kind = HMM_CHANGE_CLEAR;
    switch (advice) {
    case MADV_DONTNEED:
    case MADV_DONTNEED_LOCKED:
    case MADV_FREE:
    case MADV_REMOVE: break;
    case MADV_GUARD_INSTALL: kind = HMM_CHANGE_GUARD; break;
    default: return next(addr, len, advice); /* no content changes */
    }
    hmm_change_begin(&c, kind, addr, len);
    int r = next(addr, len, advice);
    hmm_change_end(&c);
    return r;
}

static int call_mprotect(int (*next)(void *, size_t, int), void *addr, size_t len, int prot)
{
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_PROTECT, addr, len);
    int r = next(addr, len, prot);
    hmm_change_end(&c);
    return r;
}

static int call_pkey_mprotect(int (*next)(void *, size_t, int, int), void *addr, size_t len, int prot, int pkey)
{
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_PROTECT, addr, len);
    int r = next(addr, len, prot, pkey);
    hmm_change_end(&c);
    return r;
}

static int call_shmdt(int (*next)(const void *), const void *addr)
{
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_DETACH, addr, 0);
    int r = next(addr);
    hmm_change_end(&c);
    return r;
}

static int call_brk(int (*next)(void *), void *(*next_sbrk)(intptr_t), void *end)
{
    struct hmm_change c;
    char *now = next_sbrk(0);
    hmm_change_begin(&c, HMM_CHANGE_UNMAP, end, (char *)end < now ? (size_t)(now - (char *)end) : 0);
    int r = next(end);
    hmm_change_end(&c);
    return r;
}

static void *call_sbrk(void *(*next)(intptr_t), intptr_t increment)
{
    struct hmm_change c;
    if (increment >= 0)
        return next(increment);
    hmm_change_begin(&c, HMM_CHANGE_UNMAP, (char *)next(0) + increment, -(size_t)increment);
    void *p = next(increment);
    hmm_change_end(&c);
    return p;
}

/* ---- for those who link ---- */

void *hmm_mmap(void *addr, size_t len, int prot, int flags, int fd, int64_t offset)
{
    return call_mmap(os_next.mmap, addr, len, prot, flags, fd, offset);
}

int hmm_munmap(void *addr, size_t len)
{
    return call_munmap(os_next.munmap, addr, len);
}

void *hmm_mremap(void *addr, size_t old_len, size_t new_len, int flags, ...)
{
    void *new_addr = NULL;
    if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
        va_list args;
        va_start(args, flags);
        new_addr = va_arg(args, void *);
        va_end(args);
    }
    return call_mremap(os_next.mremap, addr, old_len, new_len, flags, new_addr);
}

int hmm_madvise(void *addr, size_t len, int advice)
{
    return call_madvise(os_next.madvise, addr, len, advice);
}

int hmm_mprotect(void *addr, size_t len, int prot)
{
    return call_mprotect(os_next.mprotect, addr, len, prot);
}

int hmm_pkey_mprotect(void *addr, size_t len, int prot, int pkey)
{
    return call_pkey_mprotect(os_next.pkey_mprotect, addr, len, prot, pkey);
}

int hmm_shmdt(const void *addr)
{
    return call_shmdt(os_next.shmdt, addr);
}

int hmm_brk(void *end)
{
    return call_brk(os_next.brk, os_next.sbrk, end);
}

void *hmm_sbrk(intptr_t increment)
{
    return call_sbrk(os_next.sbrk, increment);
}

int hmm_execve(const char *path, char *const argv[], char *const envp[])
{
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_RELEASE, NULL, 0);
    int r = os_next.execve(path, argv, envp);
    hmm_change_end(&c);
    return r;
}

int hmm_execvpe(const char *file, char *const argv[], char *const envp[])
{
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_RELEASE, NULL, 0);
    int r = os_next.execvpe(file, argv, envp);
    hmm_change_end(&c);
    return r;
}

int hmm_fexecve(int fd, char *const argv[], char *const envp[])
{
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_RELEASE, NULL, 0);
    int r = os_next.fexecve(fd, argv, envp);
    hmm_change_end(&c);
    return r;
}

void hmm_exit(int status)
{
    struct hmm_change c;
    hmm_change_begin(&c, HMM_CHANGE_RELEASE, NULL, 0);
    os_next.exit(status);
    __builtin_unreachable();
}

/* ---- for libhmm-preload.so ---- */

static const struct hmm_calls calls = {
    .size = sizeof(calls),
    .begin = hmm_change_begin,
    .end = hmm_change_end,
    .mmap = call_mmap,
    .munmap = call_munmap,
    .mremap = call_mremap,
    .madvise = call_madvise,
    .mprotect = call_mprotect,
    .pkey_mprotect = call_pkey_mprotect,
    .shmdt = call_shmdt,
    .brk = call_brk,
    .sbrk = call_sbrk,
};

void calls_attach(bool running)
{
    if (hmm_preload_attach)
        hmm_preload_attach(running ? &calls : NULL);
}
