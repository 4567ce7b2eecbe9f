/* SPDX-License-Identifier: MIT */
/*
 * libhmm-preload.so: announces to libhmm what an unmodified program does to its address space. Loaded with LD_PRELOAD, or linked
 * before the C library; it does not load libhmm.
 *
 * Each call finds the next definition of its function, which need not be the C library's, and gives it to libhmm's table to be made;
 * where libhmm is not there, or has no device open, it makes it at once: a load and a branch. Calls from inside the C library (malloc,
 * thread stacks) do not pass here; userfaultfd events do for them (docs/calls.md).
 *
 * Nothing is allocated, locked or printed. The next definitions are looked up by the constructor, because dlsym() may allocate. Calls
 * that come before it (constructors of libraries that are initialised earlier) are made as system calls; brk and exec, which have
 * state in the C library, are looked up when they are called.
 *
 * fork and vfork are not here: what a child finds is seen to by events and fork handlers, which raw calls do not go around. Nor is
 * posix_madvise: the C library drops nothing for it.
 */
#include <alloca.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <hmm/preload.h>

#define PUBLIC __attribute__((visibility("default")))

extern char **environ;

static const struct hmm_calls *calls; /* atomic; NULL: nobody is to be told */

void hmm_preload_attach(const struct hmm_calls *table)
{
    __atomic_store_n(&calls, table && table->size >= sizeof(*table) ? table : NULL, __ATOMIC_RELEASE);
}

static const struct hmm_calls *attached(void)
{
    return __atomic_load_n(&calls, __ATOMIC_ACQUIRE);
}

/* ---- the next definitions ---- */

static void *raw_mmap(void *addr, size_t len, int prot, int flags, int fd, int64_t offset)
{
    return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
}

static int raw_munmap(void *addr, size_t len)
{
    return (int)syscall(SYS_munmap, addr, len);
}

static void *raw_mremap(void *addr, size_t old_len, size_t new_len, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    void *new_addr = va_arg(args, void *);
    va_end(args);
    return (void *)syscall(SYS_mremap, addr, old_len, new_len, flags, new_addr);
}

static int raw_madvise(void *addr, size_t len, int advice)
{
    return (int)syscall(SYS_madvise, addr, len, advice);
}

static int raw_mprotect(void *addr, size_t len, int prot)
{
    return (int)syscall(SYS_mprotect, addr, len, prot);
}

static int raw_pkey_mprotect(void *addr, size_t len, int prot, int pkey)
{
    return pkey == -1 ? raw_mprotect(addr, len, prot) : (int)syscall(SYS_pkey_mprotect, addr, len, prot, pkey);
}

static int raw_shmdt(const void *addr)
{
    return (int)syscall(SYS_shmdt, addr);
}

static struct {
    void *(*mmap)(void *, size_t, int, int, int, int64_t);
    int (*munmap)(void *, size_t);
    void *(*mremap)(void *, size_t, size_t, int, ...);
    int (*madvise)(void *, size_t, int);
    int (*mprotect)(void *, size_t, int);
    int (*pkey_mprotect)(void *, size_t, int, int);
    int (*shmdt)(const void *);
    int (*brk)(void *);
    void *(*sbrk)(intptr_t);
    int (*execve)(const char *, char *const[], char *const[]);
    int (*execvpe)(const char *, char *const[], char *const[]);
    int (*fexecve)(int, char *const[], char *const[]);
    int (*execveat)(int, const char *, char *const[], char *const[], int);
    void (*exit)(int);
} next = {
    .mmap = raw_mmap,
    .munmap = raw_munmap,
    .mremap = raw_mremap,
    .madvise = raw_madvise,
    .mprotect = raw_mprotect,
    .pkey_mprotect = raw_pkey_mprotect,
    .shmdt = raw_shmdt,
};

/* Into a pointer to a function, which C does not let a pointer to data become. What is not there stays as it is. */
static void look_up(void *place, const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (found)
        __atomic_store_n((void **)place, found, __ATOMIC_RELEASE);
}

/* What has no raw form; errno is kept. */
static void look_up_late(void *place, const char *name)
{
    int err = errno;
    if (!__atomic_load_n((void **)place, __ATOMIC_ACQUIRE))
        look_up(place, name);
    errno = err;
}

__attribute__((constructor(101))) static void look_up_all(void)
{
    int err = errno;
    look_up(&next.mmap, "mmap");
    look_up(&next.munmap, "munmap");
    look_up(&next.mremap, "mremap");
    look_up(&next.madvise, "madvise");
    look_up(&next.mprotect, "mprotect");
    look_up(&next.pkey_mprotect, "pkey_mprotect");
    look_up(&next.shmdt, "shmdt");
    look_up(&next.brk, "brk");
    look_up(&next.sbrk, "sbrk");
    look_up(&next.execve, "execve");
    look_up(&next.execvpe, "execvpe");
    look_up(&next.fexecve, "fexecve");
    look_up(&next.execveat, "execveat");
    look_up(&next.exit, "_exit");
    errno = err;
}

/* ---- memory ---- */

PUBLIC void *mmap(void *addr, size_t len, int prot, int flags, int fd, int64_t offset);
PUBLIC void *mmap64(void *addr, size_t len, int prot, int flags, int fd, int64_t offset);
PUBLIC int munmap(void *addr, size_t len);
PUBLIC void *mremap(void *addr, size_t old_len, size_t new_len, int flags, ...);
PUBLIC int madvise(void *addr, size_t len, int advice);
PUBLIC int mprotect(void *addr, size_t len, int prot);
PUBLIC int pkey_mprotect(void *addr, size_t len, int prot, int pkey);
PUBLIC int shmdt(const void *addr);

void *mmap(void *addr, size_t len, int prot, int flags, int fd, int64_t offset)
{
    const struct hmm_calls *c = attached();
    return c ? c->mmap(next.mmap, addr, len, prot, flags, fd, offset) : next.mmap(addr, len, prot, flags, fd, offset);
}

void *mmap64(void *addr, size_t len, int prot, int flags, int fd, int64_t offset)
{
    return mmap(addr, len, prot, flags, fd, offset);
}

int munmap(void *addr, size_t len)
{
    const struct hmm_calls *c = attached();
    return c ? c->munmap(next.munmap, addr, len) : next.munmap(addr, len);
}

/* The fifth argument is passed on as the kernel finds it: in its register, whether the caller gave one or not. */
void *mremap(void *addr, size_t old_len, size_t new_len, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    void *new_addr = va_arg(args, void *);
    va_end(args);
    const struct hmm_calls *c = attached();
    return c ? c->mremap(next.mremap, addr, old_len, new_len, flags, new_addr)
             : next.mremap(addr, old_len, new_len, flags, new_addr);
}

int madvise(void *addr, size_t len, int advice)
{
    const struct hmm_calls *c = attached();
    return c ? c->madvise(next.madvise, addr, len, advice) : next.madvise(addr, len, advice);
}

int mprotect(void *addr, size_t len, int prot)
{
    const struct hmm_calls *c = attached();
    return c ? c->mprotect(next.mprotect, addr, len, prot) : next.mprotect(addr, len, prot);
}

int pkey_mprotect(void *addr, size_t len, int prot, int pkey)
{
    const struct hmm_calls *c = attached();
    return c ? c->pkey_mprotect(next.pkey_mprotect, addr, len, prot, pkey) : next.pkey_mprotect(addr, len, prot, pkey);
}

int shmdt(const void *addr)
{
    const struct hmm_calls *c = attached();
    return c ? c->shmdt(next.shmdt, addr) : next.shmdt(addr);
}

PUBLIC int brk(void *end)
{
    const struct hmm_calls *c = attached();
    look_up_late(&next.brk, "brk");
    look_up_late(&next.sbrk, "sbrk");
    return c ? c->brk(next.brk, next.sbrk, end) : next.brk(end);
}

PUBLIC void *sbrk(intptr_t increment)
{
    const struct hmm_calls *c = attached();
    look_up_late(&next.sbrk, "sbrk");
    return c ? c->sbrk(next.sbrk, increment) : next.sbrk(increment);
}

/* ---- the end of the address space ---- */

/* Returns the table that release_end() is to have. */
static const struct hmm_calls *release_begin(struct hmm_change *change)
{
    const struct hmm_calls *c = attached();
    if (c)
        c->begin(change, HMM_CHANGE_RELEASE, NULL, 0);
    return c;
}

static void release_end(const struct hmm_calls *c, struct hmm_change *change)
{
    if (c)
        c->end(change);
}

PUBLIC int execve(const char *path, char *const argv[], char *const envp[])
{
    struct hmm_change change;
    look_up_late(&next.execve, "execve");
    const struct hmm_calls *c = release_begin(&change);
    int r = next.execve(path, argv, envp);
    release_end(c, &change);
    return r;
}

PUBLIC int execvpe(const char *file, char *const argv[], char *const envp[])
{
    struct hmm_change change;
    look_up_late(&next.execvpe, "execvpe");
    const struct hmm_calls *c = release_begin(&change);
    int r = next.execvpe(file, argv, envp);
    release_end(c, &change);
    return r;
}

PUBLIC int fexecve(int fd, char *const argv[], char *const envp[])
{
    struct hmm_change change;
    look_up_late(&next.fexecve, "fexecve");
    const struct hmm_calls *c = release_begin(&change);
    int r = next.fexecve(fd, argv, envp);
    release_end(c, &change);
    return r;
}

PUBLIC int execveat(int fd, const char *path, char *const argv[], char *const envp[], int flags);
int execveat(int fd, const char *path, char *const argv[], char *const envp[], int flags)
{
    struct hmm_change change;
    look_up_late(&next.execveat, "execveat");
    const struct hmm_calls *c = release_begin(&change);
    int r =
        next.execveat ? next.execveat(fd, path, argv, envp, flags) : (int)syscall(SYS_execveat, fd, path, argv, envp, flags);
    release_end(c, &change);
    return r;
}

PUBLIC int execv(const char *path, char *const argv[])
{
    return execve(path, argv, environ);
}

PUBLIC int execvp(const char *file, char *const argv[])
{
    return execvpe(file, argv, environ);
}

/* Arguments up to NULL, in an array of the caller's stack. */
#define COLLECT(argv, first, args)                                                                                             \
    do {                                                                                                                       \
        size_t n = 1;                                                                                                          \
        va_start(args, first);                                                                                                 \
        while (va_arg(args, char *))                                                                                           \
            n++;                                                                                                               \
        va_end(args);                                                                                                          \
        (argv) = alloca((n + 1) * sizeof(char *));                                                                             \
        (argv)[0] = (char *)(uintptr_t)(first);                                                                                \
        va_start(args, first);                                                                                                 \
        for (size_t i = 1; i <= n; i++)                                                                                        \
            (argv)[i] = va_arg(args, char *);                                                                                  \
    } while (0)

PUBLIC int execl(const char *path, const char *first, ...)
{
    va_list args;
    char **argv;
    COLLECT(argv, first, args);
    va_end(args);
    return execve(path, argv, environ);
}

PUBLIC int execlp(const char *file, const char *first, ...)
{
    va_list args;
    char **argv;
    COLLECT(argv, first, args);
    va_end(args);
    return execvpe(file, argv, environ);
}

PUBLIC int execle(const char *path, const char *first, ...)
{
    va_list args;
    char **argv;
    COLLECT(argv, first, args);
    char *const *envp = va_arg(args, char *const *);
    va_end(args);
    return execve(path, argv, envp);
}

PUBLIC void _exit(int status)
{
    struct hmm_change change;
    look_up_late(&next.exit, "_exit");
    release_begin(&change);
    if (next.exit)
        next.exit(status);
    for (;;)
        syscall(SYS_exit_group, status);
}

PUBLIC void _Exit(int status)
{
    _exit(status);
}

/* exit() of the program, after its handlers. Others' destructors may still use devices: they are told, and go on. */
__attribute__((destructor)) static void program_ends(void)
{
    struct hmm_change change;
    release_end(release_begin(&change), &change);
}
