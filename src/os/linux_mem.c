/* SPDX-License-Identifier: MIT */
/*
 * Our own memory, advice, and access to the program's memory by copy. Own memory is never inherited by children: a copy
 * of it there would be a copy of private state, and mark every page of it shared.
 */
#include <sys/mman.h>
#include <sys/uio.h>

#include "os/linux.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22  /* 5.14 */
#define MADV_POPULATE_WRITE 23 /* 5.14 */
#endif

#define SHOWN_SEALS (F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/*
 * Makes a mapping made by reserve_raw() what the flags say. Under mlockall(MCL_FUTURE) of the program it is locked, and locked
 * memory takes no part in MOVE; reserved without access it is at least not filled, so that it is still empty when unlocked.
 */
static int dress(void *addr, size_t len, unsigned flags)
{
    /* The call itself: sanitizers make that of the C library do nothing. */
    if (syscall(SYS_munlock, addr, len) < 0)
        return -errno;
    if (!(flags & OS_MAP_INHERIT) && madvise(addr, len, flags & OS_MAP_WIPE ? MADV_WIPEONFORK : MADV_DONTFORK) < 0)
        return -errno;
    /* EINVAL: a kernel without huge pages. */
    if (flags & OS_MAP_HUGE && madvise(addr, len, MADV_HUGEPAGE) < 0 && errno != EINVAL)
        return -errno;
    if (flags & OS_MAP_NOHUGE && madvise(addr, len, MADV_NOHUGEPAGE) < 0 && errno != EINVAL)
        return -errno;
    if (!(flags & OS_MAP_RESERVE) && mprotect(addr, len, PROT_READ | PROT_WRITE) < 0)
        return -errno;
    return 0;
}

/* Address space without access or memory, at addr (NULL: anywhere). */
static void *reserve_raw(void *addr, size_t len)
{
    int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (addr ? MAP_FIXED : 0);

    return mmap(addr, len, PROT_NONE, how, -1, 0);
}

/* Maps more than asked and gives back what stands before and behind the aligned part. */
static void *reserve_aligned(size_t len, size_t align)
{
    size_t slack = align > os_page_size() ? align - os_page_size() : 0;
    char *all, *aligned;
    size_t before;

    if (len + slack < len) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    all = reserve_raw(NULL, len + slack);
    if (all == MAP_FAILED || !slack)
        return all;
    aligned = (char *)(((uintptr_t)all + align - 1) & ~(uintptr_t)(align - 1));
    before = (size_t)(aligned - all);
    if (before)
        munmap(all, before);
    if (slack - before)
        munmap(aligned + len, slack - before);
    return aligned;
}

int linux_map(size_t len, size_t align, unsigned flags, void **out)
{
    void *p;
    int err;

    if (!len || align & (align - 1))
        return -EINVAL;
    if (flags & OS_MAP_COMMON) {
        p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (p != MAP_FAILED)
            *out = p;
        return p == MAP_FAILED ? -errno : 0;
    }
    p = reserve_aligned(len, align);
    if (p == MAP_FAILED)
        return -errno;
    err = dress(p, len, flags);
    if (err < 0) {
        munmap(p, len);
        return err;
    }
    *out = p;
    return 0;
}

int linux_remap_fresh(void *addr, size_t len, unsigned flags)
{
    if (reserve_raw(addr, len) == MAP_FAILED)
        return -errno;
    return dress(addr, len, flags);
}

int linux_unmap(void *addr, size_t len)
{
    return (int)sys_result(munmap(addr, len));
}

/* The seals come last: a mapping that is there already stays writable. */
int linux_map_shown(size_t len, void **out)
{
    int fd = memfd_create("hmm-shown", MFD_CLOEXEC | MFD_ALLOW_SEALING), err;
    void *p = MAP_FAILED;

    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)len) < 0)
        goto fail;
    p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED || madvise(p, len, MADV_DONTFORK) < 0 || fcntl(fd, F_ADD_SEALS, SHOWN_SEALS) < 0)
        goto fail;
    *out = p;
    return fd;

fail:
    err = -errno;
    if (p != MAP_FAILED)
        munmap(p, len);
    sys_close(fd);
    return err;
}

int linux_advise(void *addr, size_t len, int advice)
{
    static const int advices[] = {
        [OS_ADVISE_DONTNEED] = MADV_DONTNEED,
        [OS_ADVISE_DONTFORK] = MADV_DONTFORK,
        [OS_ADVISE_DOFORK] = MADV_DOFORK,
        [OS_ADVISE_POPULATE_WRITE] = MADV_POPULATE_WRITE,
        [OS_ADVISE_POPULATE_READ] = MADV_POPULATE_READ,
    };

    if (advice < 0 || (size_t)advice >= sizeof(advices) / sizeof(advices[0]))
        return -EINVAL;
    return (int)sys_result(madvise(addr, len, advices[advice]));
}

/* The thread's own id names the process: the id of a first thread that has ended names a process without memory. Not the
 * cached one: a child made by a raw clone() must never write into its parent. */
static int64_t vm_copy(long call, uintptr_t addr, void *buf, size_t len)
{
    struct iovec local = {buf, len}, remote = {(void *)addr, len};
    int64_t r;

    do
        r = sys_result(syscall(call, syscall(SYS_gettid), &local, 1ul, &remote, 1ul, 0ul));
    while (r == -EINTR);
    return r ? r : -EFAULT;
}

int64_t linux_vm_read(uintptr_t addr, void *buf, size_t len)
{
    return vm_copy(SYS_process_vm_readv, addr, buf, len);
}

int64_t linux_vm_write(uintptr_t addr, const void *buf, size_t len)
{
    return vm_copy(SYS_process_vm_writev, addr, (void *)(uintptr_t)buf, len);
}
