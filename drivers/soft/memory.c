/* SPDX-License-Identifier: MIT */
/*
 * Device memory: a shared mapping of an unnamed file. Its pages are the file's, so UFFDIO_MOVE cannot take them into the
 * program: what migrates is really copied. It is not inherited by fork, and takes memory only as it is used.
 *
 * A file page that does not exist yet is allocated when it is first written; that may fail, and would then be a SIGBUS in the
 * middle of a copy. So pages are made to exist beforehand, 2 MiB at a time, where failing is an error of that copy alone. Every
 * device page that a job can reach was copied to or cleared before. Any thread; no locks.
 */
#include "soft.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHUNK ((size_t)2 << 20)
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) /* whoever else gets the file cannot take our pages away */

/* A mapping of the file, aligned so that the kernel may use huge pages. */
static char *map_aligned(int fd, size_t bytes)
{
    char *area = mmap(NULL, bytes + CHUNK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED)
        return NULL;
    char *map = area + (-(uintptr_t)area & (CHUNK - 1));
    char *end = map + bytes;
    if (mmap(map, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0) == MAP_FAILED) {
        munmap(area, bytes + CHUNK);
        return NULL;
    }
    if (map > area)
        munmap(area, map - area);
    munmap(end, area + bytes + CHUNK - end);
    return map;
}

static int check_size(uint64_t bytes)
{
    uint64_t system = (uint64_t)sysconf(_SC_PHYS_PAGES) * hmm_page_size();
    if (bytes > system)
        return hmm_fail(-ENOMEM, "soft: memory=%lluM is more than the %lluM that this system has; ask for less",
                        (unsigned long long)(bytes >> 20), (unsigned long long)(system >> 20));
    return 0;
}

int soft_memory_init(struct memory *m, uint64_t bytes, int *keep_fd)
{
    size_t page = hmm_page_size();
    int r = check_size(bytes);
    if (r)
        return r;
    m->page_shift = __builtin_ctzl(page);
    m->bytes = (bytes + page - 1) & ~(page - 1);
    m->pages = m->bytes >> m->page_shift;
    int fd = memfd_create("hmm-soft", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return hmm_fail(-errno, "soft: device memory cannot be made (memfd_create: %s)", hmm_strerror(-errno));
    if (ftruncate(fd, m->bytes) || fcntl(fd, F_ADD_SEALS, SEALS)) {
        r = hmm_fail(-errno, "soft: %lluM of device memory cannot be made (%s)", (unsigned long long)(bytes >> 20),
                     hmm_strerror(-errno));
        goto close_fd;
    }
    m->map = map_aligned(fd, m->bytes);
    if (!m->map) {
        r = hmm_fail(-ENOMEM, "soft: no address space for %lluM of device memory; ask for less",
                     (unsigned long long)(bytes >> 20));
        goto close_fd;
    }
    m->touched_bytes = ((m->bytes + CHUNK - 1) / CHUNK + 31) / 32 * sizeof(uint32_t);
    m->touched = hmm_mem_alloc(m->touched_bytes);
    if (!m->touched || madvise(m->map, m->bytes, MADV_DONTFORK)) {
        r = hmm_fail(-ENOMEM, "soft: no memory for the device's own records");
        goto unmap;
    }
    madvise(m->map, m->bytes, MADV_HUGEPAGE); /* where the system has it for shared memory */
    if (keep_fd)
        *keep_fd = fd;
    else
        close(fd);
    return 0;

unmap:
    hmm_mem_free(m->touched, m->touched_bytes);
    munmap(m->map, m->bytes);
    m->map = NULL;
close_fd:
    close(fd);
    return r;
}

void soft_memory_exit(struct memory *m)
{
    hmm_mem_free(m->touched, m->touched_bytes);
    munmap(m->map, m->bytes);
}

static int touch_chunk(struct memory *m, size_t chunk)
{
    uint32_t bit = 1u << (chunk % 32), *word = &m->touched[chunk / 32];
    if (__atomic_load_n(word, __ATOMIC_ACQUIRE) & bit)
        return 0;
    size_t at = chunk * CHUNK, len = m->bytes - at < CHUNK ? m->bytes - at : CHUNK;
    while (madvise(m->map + at, len, MADV_POPULATE_WRITE)) {
        if (errno != EINTR && errno != EAGAIN)
            return -ENOMEM;
    }
    __atomic_fetch_or(word, bit, __ATOMIC_RELEASE);
    return 0;
}

int soft_memory_touch(struct memory *m, uint64_t page, uint64_t pages)
{
    size_t first = (page << m->page_shift) / CHUNK, last = (((page + pages) << m->page_shift) - 1) / CHUNK;
    for (size_t chunk = first; chunk <= last; chunk++) {
        int r = touch_chunk(m, chunk);
        if (r)
            return r;
    }
    return 0;
}
