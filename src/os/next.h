/* SPDX-License-Identifier: MIT */
/*
 * The C library's calls that change the address space, or whatever stands before them in the program (libhmm-preload.so, an
 * allocator's hooks): for the wrappers of src/api, which announce them. Results and errno are those of the calls.
 */
#ifndef HMM_OS_NEXT_H
#define HMM_OS_NEXT_H

#include <stddef.h>
#include <stdint.h>

struct os_next {
    void *(*mmap)(void *, size_t, int, int, int, int64_t);
    int (*munmap)(void *, size_t);
    void *(*mremap)(void *, size_t, size_t, int, ...);
    int (*madvise)(void *, size_t, int);
    int (*mprotect)(void *, size_t, int);
    int (*pkey_mprotect)(void *, size_t, int, int);
    int (*brk)(void *);
    void *(*sbrk)(intptr_t);
    int (*shmdt)(const void *);
    int (*execve)(const char *, char *const[], char *const[]);
    int (*execvpe)(const char *, char *const[], char *const[]);
    int (*fexecve)(int, char *const[], char *const[]);
    void (*exit)(int); /* _exit() */
};

extern const struct os_next os_next;

#endif
