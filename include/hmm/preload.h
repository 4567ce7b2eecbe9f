/* SPDX-License-Identifier: MIT */
/*
 * For libraries that stand between a program and the C library, as libhmm-preload.so does: each call takes the next definition of
 * its function and makes it, announced by hmm_change_begin() and hmm_change_end() where that is called for.
 *
 * Such a library exports hmm_preload_attach(). libhmm looks for it when it is loaded, calls it with the table when the first device
 * is opened, and with NULL when the last is closed; while it has no table, such a library only passes calls on.
 */
#ifndef HMM_PRELOAD_H
#define HMM_PRELOAD_H

#include <hmm/hmm.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The contract of hmm_change_begin() holds for all: no allocation, no lock of the C library, errno is that of `next`. */
struct hmm_calls {
    uint32_t size; /* of what the library has filled: later fields may be missing */
    uint32_t reserved;
    void (*begin)(struct hmm_change *change, enum hmm_change_kind kind, const void *addr, size_t len);
    void (*end)(struct hmm_change *change);
    void *(*mmap)(void *(*next)(void *, size_t, int, int, int, int64_t), void *addr, size_t len, int prot, int flags, int fd,
                  int64_t offset);
    int (*munmap)(int (*next)(void *, size_t), void *addr, size_t len);
    /* new_addr only with MREMAP_FIXED, or DONTUNMAP where the caller gave one. */
    void *(*mremap)(void *(*next)(void *, size_t, size_t, int, ...), void *addr, size_t old_len, size_t new_len, int flags,
                    void *new_addr);
    int (*madvise)(int (*next)(void *, size_t, int), void *addr, size_t len, int advice);
    int (*mprotect)(int (*next)(void *, size_t, int), void *addr, size_t len, int prot);
    int (*pkey_mprotect)(int (*next)(void *, size_t, int, int), void *addr, size_t len, int prot, int pkey);
    int (*shmdt)(int (*next)(const void *), const void *addr);
    int (*brk)(int (*next)(void *), void *(*next_sbrk)(intptr_t), void *end);
    void *(*sbrk)(void *(*next)(intptr_t), intptr_t increment);
};

/* Defined by the interposing library, at most one in a process. Any thread; calls that have begun with the old table may still end. */
HMM_API void hmm_preload_attach(const struct hmm_calls *calls) __attribute__((weak));

#ifdef __cplusplus
}
#endif
#endif
