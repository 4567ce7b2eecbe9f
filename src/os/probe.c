/* SPDX-License-Identifier: MIT */
/*
 * What this system allows, one item per thing that the library needs, each with its remedy. Everything is asked through `os`,
 * so that tests can simulate systems that lack it. Program context: may block and use stdio's formatting; leaves nothing open.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "os/os.h"

/* As enum hmm_check_status. */
enum { OK, DEGRADED, MISSING, NOT_SEEN };

struct probe {
    void (*fn)(const struct os_check_item *, void *);
    void *arg;
    struct os_check_item item; /* being filled */
    int worst;                 /* 0, 1 or the first error that ends the main path */
};

#define REMEDY_PERMISSION                                                                                                      \
    "give this user access to /dev/userfaultfd (chgrp and chmod g+rw, or a udev rule), or set vm.unprivileged_userfaultfd=1 "  \
    "with "                                                                                                                    \
    "sysctl, or grant CAP_SYS_PTRACE; in a container, also allow userfaultfd in its seccomp profile"
#define REMEDY_KERNEL "boot Linux 6.8 or newer"
#define REMEDY_PROC "mount /proc in this environment"

static void probe_begin(struct probe *p, const char *name)
{
    memset(&p->item, 0, sizeof(p->item));
    p->item.name = name;
}

__attribute__((format(printf, 2, 3))) static void probe_detail(struct probe *p, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(p->item.detail, sizeof(p->item.detail), fmt, ap);
    va_end(ap);
}

static void probe_end(struct probe *p, int status, const char *remedy)
{
    p->item.status = status;
    snprintf(p->item.remedy, sizeof(p->item.remedy), "%s", remedy);
    if (status == DEGRADED && !p->worst)
        p->worst = 1;
    p->fn(&p->item, p->arg);
}

/* The item is missing and the main path does not work without it. The first reason is the one reported. */
static void probe_end_missing(struct probe *p, int err, const char *remedy)
{
    if (p->worst >= 0)
        p->worst = err;
    probe_end(p, MISSING, remedy);
}

static const char *errno_name(int err)
{
    const char *name = strerrorname_np(-err);

    return name ? name : "unknown error";
}

static void probe_kernel(struct probe *p)
{
    int v = os->kernel_version();

    probe_begin(p, "kernel");
    if (v < 0) {
        probe_detail(p, "the version cannot be read (%s)", errno_name(v));
        probe_end(p, NOT_SEEN, "");
        return;
    }
    probe_detail(p, "Linux %d.%d; at least %d.%d is needed, for UFFDIO_MOVE", v / 1000, v % 1000, OS_KERNEL_MINIMUM / 1000,
                 OS_KERNEL_MINIMUM % 1000);
    if (v < OS_KERNEL_MINIMUM)
        probe_end_missing(p, -ENOSYS, REMEDY_KERNEL);
    else
        probe_end(p, OK, "");
}

/* True when u is open. */
static bool probe_uffd(struct probe *p, struct os_uffd *u)
{
    int err = os->uffd_open(0, u);

    probe_begin(p, "userfaultfd");
    if (!err) {
        probe_detail(p, "opened through %s", u->route);
        probe_end(p, OK, "");
        return true;
    }
    if (err == -EPERM) {
        probe_detail(p, "neither /dev/userfaultfd nor userfaultfd(2) is permitted");
        probe_end_missing(p, -EPERM, REMEDY_PERMISSION);
    } else if (err == -ENOSYS) {
        probe_detail(p, "this kernel has no userfaultfd");
        probe_end_missing(p, -ENOSYS, "use a kernel that is built with CONFIG_USERFAULTFD");
    } else {
        probe_detail(p, "cannot be opened (%s)", errno_name(err));
        probe_end_missing(p, -EPERM,
                          err == -EMFILE || err == -ENFILE ? "raise the limit of open files (ulimit -n)"
                                                           : "free memory, then try again");
    }
    return false;
}

static const struct {
    uint64_t bit;
    const char *name, *use, *since;
} features[] = {
    {UFFD_FEATURE_EVENT_REMOVE, "feature EVENT_REMOVE", "tells when memory is dropped", "4.11"},
    {UFFD_FEATURE_EVENT_UNMAP, "feature EVENT_UNMAP", "tells when memory is unmapped", "4.11"},
    {UFFD_FEATURE_EVENT_REMAP, "feature EVENT_REMAP", "tells when memory is moved by mremap", "4.11"},
    {UFFD_FEATURE_THREAD_ID, "feature THREAD_ID", "tells which thread faulted", "4.14"},
    {UFFD_FEATURE_POISON, "feature POISON", "keeps what was lost with a device from reading as zeros", "6.6"},
    {UFFD_FEATURE_MOVE, "feature MOVE", "takes pages out and puts them back without copying", "6.8"},
};

static void probe_features(struct probe *p, const struct os_uffd *u)
{
    char remedy[128];

    for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
        probe_begin(p, features[i].name);
        if (!u) {
            probe_detail(p, "not looked at: no userfaultfd");
            probe_end(p, NOT_SEEN, "");
            continue;
        }
        if (u->features & features[i].bit) {
            probe_detail(p, "%s", features[i].use);
            probe_end(p, OK, "");
            continue;
        }
        probe_detail(p, "this kernel does not offer it: %s", features[i].use);
        snprintf(remedy, sizeof(remedy), "boot Linux 6.8 or newer, built with CONFIG_USERFAULTFD (this feature came with %s)",
                 features[i].since);
        probe_end_missing(p, -ENOSYS, remedy);
    }
}

static void probe_user_mode(struct probe *p, const struct os_uffd *u)
{
    probe_begin(p, "faults inside system calls");
    if (!u) {
        probe_detail(p, "not looked at: no userfaultfd");
        probe_end(p, NOT_SEEN, "");
    } else if (u->user_mode_only) {
        probe_detail(p, "not resolved: system calls on migrated buffers (read, write, ...) would fail with EFAULT");
        probe_end(p, DEGRADED, REMEDY_PERMISSION);
    } else {
        probe_detail(p, "resolved, like those of the program itself");
        probe_end(p, OK, "");
    }
}

/* 0 when a page of ours can be moved and arrives; the features are asked for together, as the library does. */
static int try_move(char *src, char *dst, size_t page)
{
    struct os_uffd u;
    int64_t moved;
    int err = os->uffd_open(OS_UFFD_REQUIRED, &u);

    if (err < 0)
        return err;
    memset(src, 0x5a, page);
    err = os->uffd_register(u.fd, (uintptr_t)dst, page);
    if (!err) {
        moved = os->uffd_move(u.fd, (uintptr_t)dst, (uintptr_t)src, page);
        /* From here on a page that did not arrive reads as zeros, instead of waiting for us. */
        os->uffd_unregister(u.fd, (uintptr_t)dst, page);
        if (moved == (int64_t)page)
            err = dst[0] == 0x5a && dst[page - 1] == 0x5a ? 0 : -EIO;
        else
            err = moved < 0 ? (int)moved : -EIO;
    }
    os->close(u.fd);
    return err;
}

static void probe_move(struct probe *p, const struct os_uffd *u, char *mem, size_t page)
{
    int err;

    probe_begin(p, "moving a page");
    if (!u || !mem || (u->features & OS_UFFD_REQUIRED) != OS_UFFD_REQUIRED) {
        probe_detail(p, "not tried: %s", mem ? "userfaultfd or a feature of it is missing" : "no memory");
        probe_end(p, NOT_SEEN, "");
        return;
    }
    err = try_move(mem, mem + page, page);
    if (!err) {
        probe_detail(p, "a page of %zu bytes was taken, moved and read back", page);
        probe_end(p, OK, "");
    } else {
        probe_detail(p, "failed (%s)", errno_name(err));
        probe_end_missing(p, err == -EPERM ? -EPERM : -ENOSYS,
                          "look for a security policy that forbids the ioctls of userfaultfd; run `hmm check --deep`");
    }
}

/* Reports a call that the main path needs: err < 0 ends it. */
static void probe_call(struct probe *p, const char *name, const char *use, int err, const char *remedy)
{
    probe_begin(p, name);
    if (err >= 0) {
        probe_detail(p, "%s", use);
        probe_end(p, OK, "");
        return;
    }
    probe_detail(p, "failed (%s); %s", errno_name(err), use);
    probe_end_missing(p, err == -EPERM || err == -EACCES ? -EPERM : -ENOSYS, remedy);
}

/* A process that has changed its user is owned by root under /proc until it runs another program. */
static const char *scan_remedy(int err)
{
    return err == -EACCES || err == -EPERM
               ? "let the program run as the user who started it, without set-user-id or file capabilities"
               : "boot Linux 6.7 or newer, and mount /proc";
}

static int try_scan(char *mem, size_t page)
{
    struct os_region r = {0};
    uintptr_t walked, at = (uintptr_t)mem;
    int fd, n;

    if (!mem)
        return -ENOMEM;
    fd = os->pagemap_open();
    if (fd < 0)
        return fd;
    mem[0] = 1;
    n = os->pagemap_scan(fd, at, at + page, &r, 1, &walked);
    os->close(fd);
    if (n < 0)
        return n;
    return n == 1 && r.start == at && r.end == at + page && r.flags & (OS_PG_PRESENT | OS_PG_SWAPPED) ? 0 : -EIO;
}

static void probe_vma(struct probe *p, const char *mem)
{
    struct os_vma v = {0};
    int fd = os->maps_open();
    int err = fd < 0 ? fd : os->vma_query(fd, (uintptr_t)mem, &v);
    int fast = fd < 0 ? fd : os->vma_query_fast(fd);

    if (fd >= 0)
        os->close(fd);
    if (!err && ((uintptr_t)mem < v.start || (uintptr_t)mem >= v.end || !v.write || !v.anonymous))
        err = mem ? -EIO : 0;
    if (err < 0 || fast == 1) {
        probe_call(p, "PROCMAP_QUERY", "tells the kind of memory at an address", err, REMEDY_PROC);
        return;
    }
    probe_begin(p, "PROCMAP_QUERY");
    probe_detail(p, "not there: the list of mappings is parsed instead, which is slow in programs with many mappings");
    probe_end(p, DEGRADED, "boot Linux 6.11 or newer");
}

static void probe_populate(struct probe *p, char *mem, size_t page)
{
    int err = mem ? os->advise(mem + 2 * page, page, OS_ADVISE_POPULATE_WRITE) : -ENOMEM;

    probe_begin(p, "MADV_POPULATE_WRITE");
    if (!err) {
        probe_detail(p, "makes pages shared after fork our own again");
        probe_end(p, OK, "");
        return;
    }
    probe_detail(p, "failed (%s): pages shared after fork stay in system memory", errno_name(err));
    probe_end(p, DEGRADED, "boot Linux 6.8 or newer; in a container, allow this advice in its security policy");
}

static void probe_vm_read(struct probe *p)
{
    uint64_t secret = 0x0123456789abcdef, copy = 0;
    int64_t n = os->vm_read((uintptr_t)&secret, &copy, sizeof(copy));
    int err = n == (int64_t)sizeof(copy) && copy == secret ? 0 : n < 0 ? (int)n : -EIO;

    probe_call(p, "process_vm_readv", "lets a device read system memory and makes the kernel fault pages in", err,
               "use a kernel built with CONFIG_CROSS_MEMORY_ATTACH; in a container, allow process_vm_readv and "
               "process_vm_writev in its seccomp profile");
}

static void probe_threads(struct probe *p)
{
    uintptr_t block = 0;
    int n = os->thread_blocks(&block, 1);

    if (n == 0)
        n = -ENOENT;
    probe_call(p, "get_robust_list", "finds the memory that the kernel writes when a thread ends, which must stay", n,
               "mount /proc and allow get_robust_list in the seccomp profile; use the GNU C library");
}

static void probe_thp(struct probe *p)
{
    static const char path[] = "/sys/kernel/mm/transparent_hugepage/enabled";
    char text[64];
    int n = os->read_text(path, text, sizeof(text));

    probe_begin(p, "transparent huge pages");
    if (n < 0) {
        probe_detail(p, "none (%s): every page moves by itself", errno_name(n));
        probe_end(p, DEGRADED, "use a kernel that is built with CONFIG_TRANSPARENT_HUGEPAGE, and mount /sys");
    } else if (strstr(text, "[never]")) {
        probe_detail(p, "%s: every page moves by itself", text);
        probe_end(p, DEGRADED, "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
    } else {
        probe_detail(p, "%s: huge pages move whole", text);
        probe_end(p, OK, "");
    }
}

#define MAP_COUNT_USUAL 65530

static void probe_map_count(struct probe *p)
{
    char text[32];
    int n = os->read_text("/proc/sys/vm/max_map_count", text, sizeof(text));
    long limit = n < 0 ? n : strtol(text, NULL, 10);

    probe_begin(p, "vm.max_map_count");
    if (limit < 0) {
        probe_detail(p, "cannot be read (%s)", errno_name((int)limit));
        probe_end(p, NOT_SEEN, REMEDY_PROC);
        return;
    }
    probe_detail(p, "%ld mappings; every managed area that stands alone takes up to two", limit);
    if (limit < MAP_COUNT_USUAL)
        probe_end(p, DEGRADED, "sysctl vm.max_map_count=1048576");
    else
        probe_end(p, OK, "");
}

int os_probe(void (*fn)(const struct os_check_item *, void *), void *arg)
{
    struct probe p = {.fn = fn, .arg = arg};
    size_t page = os_page_size();
    struct os_uffd u;
    struct os_uffd *have;
    void *mem = NULL;
    int err;

    if (os->map(4 * page, page, OS_MAP_NOHUGE, &mem) < 0)
        mem = NULL;
    probe_kernel(&p);
    have = probe_uffd(&p, &u) ? &u : NULL;
    probe_features(&p, have);
    probe_user_mode(&p, have);
    probe_move(&p, have, mem, page);
    err = try_scan(mem, page);
    probe_call(&p, "PAGEMAP_SCAN", "tells which pages are present, zero, swapped or huge", err, scan_remedy(err));
    probe_vma(&p, mem);
    probe_populate(&p, mem, page);
    probe_vm_read(&p);
    probe_threads(&p);
    probe_thp(&p);
    probe_map_count(&p);
    if (have)
        os->close(u.fd);
    if (mem)
        os->unmap(mem, 4 * page);
    return p.worst;
}
