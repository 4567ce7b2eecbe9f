/* SPDX-License-Identifier: MIT */
/*
 * The operating-system boundary. Everything the library asks of the kernel goes through this one table, so that a failing
 * or simulated system can stand in for tests and injection can wrap it.
 *
 * Common contract: no operation takes a lock of ours, allocates from the C library or touches program memory. Errors are
 * negative errno. Addresses and lengths are multiples of os_page_size() unless said otherwise. "May raise events" means: the
 * call waits for our own reader, so it must not be made under the address-space lock.
 */
#ifndef HMM_OS_H
#define HMM_OS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "os/uapi.h"

/* Features of a userfaultfd that the main path needs, and what the kernel gave. */
struct os_uffd {
    int fd;
    uint64_t features;   /* of UFFDIO_API */
    bool user_mode_only; /* faults inside system calls give EFAULT */
    const char *route;   /* "/dev/userfaultfd", "userfaultfd(2)", "userfaultfd(2) user-mode-only" */
};

/* One run of pages with equal properties, from PAGEMAP_SCAN. */
struct os_region {
    uintptr_t start, end;
    uint64_t flags; /* OS_PG_* */
};
#define OS_PG_PRESENT (1u << 0)
#define OS_PG_SWAPPED (1u << 1)
#define OS_PG_ZERO (1u << 2) /* the shared zero page, small or huge */
#define OS_PG_HUGE (1u << 3) /* mapped by a huge page table entry */
#define OS_PG_FILE (1u << 4)

/* The VMA that contains an address, or the next above it. */
struct os_vma {
    uintptr_t start, end;
    bool read, write, exec, shared;
    bool anonymous;   /* no file behind it */
    bool stack;       /* the kernel's "[stack]" */
    bool special;     /* vdso, vvar, vsyscall: never ours to touch */
    size_t page_size; /* bytes: larger for hugetlb; 0: not known */
    uint64_t offset;  /* in the file, bytes */
    uint64_t inode, device;
};

/* MADV_WIPEONFORK, MADV_DONTFORK. */
enum os_mark { OS_MARK_WIPE, OS_MARK_KEEP };

struct os_ops {
    /* Opens a userfaultfd: /dev/userfaultfd first, then the system call, then user-mode-only. O_CLOEXEC | O_NONBLOCK.
     * features: required UFFD_FEATURE_* bits. -EPERM: no route permits it; -ENOSYS: no such call; -EINVAL: a required feature
     * is missing. Does not change out on failure. */
    int (*uffd_open)(uint64_t features, struct os_uffd *out);

    /* UFFDIO_REGISTER with MISSING mode. The range lies within mappings; idempotent for the same userfaultfd. Takes the mmap
     * lock for writing: may split or merge VMAs. -EBUSY: another userfaultfd has it; -EINVAL: a kind that cannot be
     * registered; -EPERM: shared memory that the program may never write. Nothing was done then. -ENOMEM: too many mappings; what
     * stands before the one that failed was registered. */
    int (*uffd_register)(int uffd, uintptr_t start, size_t len);
    /* The same with WP mode instead: no faults, since nothing is ever write-protected, but events. Replaces MISSING mode in one step,
     * and is replaced by it (kernel fact 22): nothing of ours may be missing there any more. */
    int (*uffd_watch)(int uffd, uintptr_t start, size_t len);
    /* Wakes every waiter in the range. Missing pages read as zeros afterwards: nothing of ours may be missing there. */
    int (*uffd_unregister)(int uffd, uintptr_t start, size_t len);

    /* UFFDIO_COPY with DONTWAKE. dst: registered, missing pages of the program or of staging; src: library memory. Returns
     * bytes copied from the start (> 0, may be short) or: -EAGAIN an event is pending and nothing was copied; -EEXIST a page
     * is there; -ENOENT not registered or unmapped; -ENOMEM; -EFAULT src. */
    int64_t (*uffd_copy)(int uffd, uintptr_t dst, const void *src, size_t len);
    /* UFFDIO_ZEROPAGE with DONTWAKE: the same without source; maps the shared zero page. */
    int64_t (*uffd_zeropage)(int uffd, uintptr_t dst, size_t len);
    /* UFFDIO_MOVE with DONTWAKE, never ALLOW_SRC_HOLES. dst registered with this uffd; both within one VMA. Returns what the
     * kernel said: len means all moved; anything else is *not to be believed* (design fact 1): scan the destination.
     * -EAGAIN, -EBUSY pinned or shared after fork, -EINVAL unsuitable VMA, -ENOENT source missing / dst not registered,
     * -EEXIST, -ENOMEM. */
    int64_t (*uffd_move)(int uffd, uintptr_t dst, uintptr_t src, size_t len);
    /* UFFDIO_POISON with DONTWAKE: missing pages become such that touching them is SIGBUS, and EFAULT in system calls, until the
     * mapping or its content is dropped. They stay so when the range is unregistered. Results as of uffd_copy. */
    int64_t (*uffd_poison)(int uffd, uintptr_t dst, size_t len);
    /* Whether uffd_watch holds for the range, by taking write-protection from pages that have none. 0: it does; -EAGAIN: an event is
     * pending; -ENOENT: it does not. */
    int (*uffd_watched)(int uffd, uintptr_t start, size_t len);
    /* UFFDIO_WAKE: threads asleep in the range try again. */
    int (*uffd_wake)(int uffd, uintptr_t start, size_t len);
    /* Whether an event of this userfaultfd is pending (UFFDIO_WRITEPROTECT of nothing answers EAGAIN). 1, 0 or error. */
    int (*uffd_pending)(int uffd);
    /* Non-blocking read of up to n messages: count, 0 when there are none (EAGAIN), or error. */
    int (*uffd_read)(int uffd, struct uffd_msg *msgs, unsigned n);

    /* Waits until one of n descriptors is readable. timeout_ms < 0: for ever. Bit i of the result: fds[i] is readable. 0:
     * time-out or signal. */
    int (*poll)(const int *fds, unsigned n, int timeout_ms);
    /* eventfd, non-blocking, close-on-exec. */
    int (*event_open)(void);
    int (*event_set)(int fd);
    int (*event_clear)(int fd);

    /* Opens /proc/self/pagemap and the list of mappings for the two calls below. */
    int (*pagemap_open)(void);
    int (*maps_open)(void);
    /* PAGEMAP_SCAN of [start, end): regions of pages with any of OS_PG_PRESENT | OS_PG_SWAPPED, ascending, n at most. Returns
     * their number and in *walked how far it came (== end when complete). Pages not covered are absent. */
    int (*pagemap_scan)(int fd, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n, uintptr_t *walked);
    /* The VMA that contains addr or the first above it: PROCMAP_QUERY, else a parse of the list. 0, -ENOENT when none is at or
     * above. */
    int (*vma_query)(int fd, uintptr_t addr, struct os_vma *out);

    /* Own memory: private, anonymous, DONTFORK, aligned to `align` (power of two). OS_MAP_*. */
    int (*map)(size_t len, size_t align, unsigned flags, void **out);
    /* Replaces own memory in place by fresh, empty memory and frees its page tables. Must not be registered with a
     * userfaultfd that has events. On failure the place stays reserved, without access: call again. */
    int (*remap_fresh)(void *addr, size_t len, unsigned flags);
    int (*unmap)(void *addr, size_t len);
    /* Own memory that another process can be shown: zeroed, DONTFORK, and for ever of this size. Returns a descriptor of it, which
     * nobody can map for writing any more. Undone by unmap and close. */
    int (*map_shown)(size_t len, void **out);
    /* madvise. On program memory only OS_ADVISE_DONTFORK, _DOFORK and _POPULATE_*. DONTNEED: own, unregistered memory
     * only. POPULATE_READ and POPULATE_WRITE may fault: no locks. */
    int (*advise)(void *addr, size_t len, int advice);

    /* process_vm_readv / writev on this process: bytes done > 0, or -EFAULT. May fault: no locks held. Any alignment. */
    int64_t (*vm_read)(uintptr_t addr, void *buf, size_t len);
    int64_t (*vm_write)(uintptr_t addr, const void *buf, size_t len);

    /* Which CPU a thread of ours last ran on (field 39 of /proc/self/task/TID/stat), or error. */
    int (*thread_cpu)(pid_t tid);
    /* Whether a thread of ours sleeps in a fault of a userfaultfd: 1, 0 (also where the kernel does not say) or error. */
    int (*thread_in_fault)(pid_t tid);
    /* Binds the calling thread to one CPU of the process's allowed set, or with cpu < 0 to all of them. */
    int (*bind_cpu)(int cpu);
    /* Fills tcbs with one address inside each thread's control block, where the kernel writes at thread exit
     * (get_robust_list). Returns the number of threads, which may exceed max. */
    int (*thread_blocks)(uintptr_t *tcbs, unsigned max);

    /* Makes the calling thread's descriptor table private, keeping only the n descriptors in keep (ascending). */
    int (*private_files)(const int *keep, unsigned n);
    int (*close)(int fd);
    /* A pipe in the calling thread's descriptor table, close-on-exec: fds[0] is readable (poll) when the last copy of fds[1] is closed. */
    int (*pipe_open)(int fds[2]);
    /* A duplicate, in the calling thread's descriptor table, of descriptor fd of another thread of this process, whose table may be
     * another; close-on-exec. -EBADF: it has no such descriptor; -ESRCH: no such thread; -EMFILE, -ENOMEM; -EPERM: a filter of
     * system calls forbids pidfd_getfd(2). */
    int (*fd_of_thread)(pid_t tid, int fd);
    /* "major.minor" of the running kernel as major * 1000 + minor. */
    int (*kernel_version)(void);

    /* Whether no other process has this page of own memory, which children inherit: 1, 0 (also when it is not known) or error. So long as
     * it is 1, nothing of this process was copied by fork since the page was last written. */
    int (*page_alone)(int pagemap_fd, uintptr_t addr);
    /* Mappings that the program has marked in this way and that overlap [start, end), ascending, n at most. Returns their number. Reads
     * the long list of mappings: slow. */
    int (*marked)(enum os_mark mark, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n);

    /* For the probe. Whether vma_query is the fast call on this descriptor: 1, 0 or error. */
    int (*vma_query_fast)(int fd);
    /* Reads a small text file of /proc or /sys without its last newline, cut to size - 1 characters. Length or error. */
    int (*read_text)(const char *path, char *buf, size_t size);
};

#define OS_MAP_HUGE 1u     /* MADV_HUGEPAGE */
#define OS_MAP_NOHUGE 2u   /* MADV_NOHUGEPAGE */
#define OS_MAP_RESERVE 4u  /* PROT_NONE */
#define OS_MAP_WIPE 8u     /* WIPEONFORK instead of DONTFORK: children see zeros */
#define OS_MAP_INHERIT 16u /* children get a copy */
#define OS_MAP_COMMON 32u  /* children made later see the same memory */

enum { OS_ADVISE_DONTNEED, OS_ADVISE_DONTFORK, OS_ADVISE_DOFORK, OS_ADVISE_POPULATE_WRITE, OS_ADVISE_POPULATE_READ };

/* The real system. */
extern const struct os_ops os_linux;

/* The table in use: os_linux unless a test or injection replaced it. Changed only while no manager runs. */
extern const struct os_ops *os;

size_t os_page_size(void);
unsigned os_page_shift(void);
/* Size of a block, and of the huge page that matches it: 2 MiB here (the PMD size). */
#define OS_BLOCK_SIZE ((size_t)2 << 20)

/* Saves thread_blocks a system call per thread: the address for those whose it is known to be, 0 for others. NULL: none is. Set by the
 * layer that starts library threads; any thread, lock-free. */
extern uintptr_t (*os_known_thread_block)(uint32_t tid);

/* Monotonic nanoseconds. */
uint64_t os_now(void);
/* Sleeps; no locks held. */
void os_sleep(uint64_t ns);
pid_t os_tid(void); /* cached per thread */
pid_t os_pid(void); /* asks: differs in a child of vfork, which sees all else as its parent does */
/* ---- probe (src/os/probe.c) ---- */

/* What hmm_check() reports; strings live in the caller's struct. */
struct os_check_item {
    const char *name;
    char detail[160];
    char remedy[256];
    int status; /* enum hmm_check_status values: 0 ok, 1 degraded, 2 missing, 3 not seen */
};
/* Calls fn per item; returns 0, 1 (degraded), -ENOSYS or -EPERM as hmm_check(). Goes through `os`. */
int os_probe(void (*fn)(const struct os_check_item *, void *), void *arg);
/* The features the main path requires. */
#define OS_UFFD_REQUIRED                                                                                                       \
    (UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_THREAD_ID |                \
     UFFD_FEATURE_POISON | UFFD_FEATURE_MOVE)
#define OS_KERNEL_MINIMUM 6008 /* 6.8: UFFDIO_MOVE */

#endif
