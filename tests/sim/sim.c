/* SPDX-License-Identifier: MIT */
/* The simulated system. Only what the probe and the unit tests call; the rest is left NULL, so that a new use is noticed. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "sim/sim.h"

const struct sim sim_complete = {
    .version = 6018,
    .threads = 1,
    .thp = "always [madvise] never",
    .map_count = "65530",
};

static struct sim sys;
static int open_fds, mappings;

#define SIM_FD 100000

static int fd_new(int error)
{
    if (error)
        return error;
    return SIM_FD + open_fds++;
}

static int sim_close(int fd)
{
    if (fd < SIM_FD)
        return -EBADF;
    open_fds--;
    return 0;
}

static int sim_uffd_open(uint64_t features, struct os_uffd *out)
{
    uint64_t have = ((uint64_t)1 << 17) - 1;

    have &= ~sys.uffd_absent;
    if (sys.uffd_error)
        return sys.uffd_error;
    if (features & ~have)
        return -EINVAL;
    *out = (struct os_uffd){
        .fd = fd_new(0), .features = have, .user_mode_only = sys.user_mode_only, .route = "a simulated userfaultfd"};
    return 0;
}

static int sim_uffd_register(int uffd, uintptr_t start, size_t len)
{
    (void)start, (void)len;
    return uffd < SIM_FD ? -EBADF : sys.register_error;
}

static int sim_uffd_unregister(int uffd, uintptr_t start, size_t len)
{
    (void)start, (void)len;
    return uffd < SIM_FD ? -EBADF : 0;
}

static int64_t sim_uffd_move(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    if (uffd < SIM_FD)
        return -EBADF;
    if (sys.move_result)
        return sys.move_result;
    if (!sys.move_lies)
        memcpy((void *)dst, (void *)src, len);
    return (int64_t)len;
}

static int sim_pagemap_open(void)
{
    return fd_new(sys.pagemap_error);
}

static int sim_maps_open(void)
{
    return fd_new(sys.maps_error);
}

static int sim_pagemap_scan(int fd, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n, uintptr_t *walked)
{
    if (fd < SIM_FD || !n)
        return -EINVAL;
    if (sys.scan_error)
        return sys.scan_error;
    v[0] = (struct os_region){start, end, OS_PG_PRESENT};
    *walked = end;
    return 1;
}

static int sim_vma_query(int fd, uintptr_t addr, struct os_vma *out)
{
    if (fd < SIM_FD)
        return -EBADF;
    if (sys.vma_error)
        return sys.vma_error;
    *out = (struct os_vma){.start = addr, .end = addr + os_page_size(), .read = true, .write = true, .anonymous = true};
    return 0;
}

static int sim_vma_query_fast(int fd)
{
    return fd < SIM_FD ? -EBADF : !sys.vma_slow;
}

static int sim_map(size_t len, size_t align, unsigned flags, void **out)
{
    int err = sys.map_error ? sys.map_error : os_linux.map(len, align, flags, out);

    mappings += !err;
    return err;
}

static int sim_unmap(void *addr, size_t len)
{
    mappings--;
    return os_linux.unmap(addr, len);
}

static int sim_advise(void *addr, size_t len, int advice)
{
    if (advice == OS_ADVISE_POPULATE_WRITE && sys.populate_error)
        return sys.populate_error;
    return os_linux.advise(addr, len, advice);
}

static int64_t sim_vm_read(uintptr_t addr, void *buf, size_t len)
{
    if (sys.vm_error)
        return sys.vm_error;
    memcpy(buf, (void *)addr, len);
    return (int64_t)len;
}

static int sim_thread_blocks(uintptr_t *tcbs, unsigned max)
{
    for (int i = 0; i < sys.threads && i < (int)max; i++)
        tcbs[i] = (uintptr_t)&sys;
    return sys.threads;
}

static int sim_kernel_version(void)
{
    return sys.version;
}

static int sim_read_text(const char *path, char *buf, size_t size)
{
    const char *text = strstr(path, "transparent_hugepage") ? sys.thp : strstr(path, "max_map_count") ? sys.map_count : NULL;

    if (!text)
        return -ENOENT;
    snprintf(buf, size, "%s", text);
    return (int)strlen(buf);
}

static const struct os_ops sim_ops = {
    .uffd_open = sim_uffd_open,
    .uffd_register = sim_uffd_register,
    .uffd_unregister = sim_uffd_unregister,
    .uffd_move = sim_uffd_move,
    .pagemap_open = sim_pagemap_open,
    .maps_open = sim_maps_open,
    .pagemap_scan = sim_pagemap_scan,
    .vma_query = sim_vma_query,
    .vma_query_fast = sim_vma_query_fast,
    .map = sim_map,
    .unmap = sim_unmap,
    .advise = sim_advise,
    .vm_read = sim_vm_read,
    .thread_blocks = sim_thread_blocks,
    .close = sim_close,
    .kernel_version = sim_kernel_version,
    .read_text = sim_read_text,
};

void sim_start(const struct sim *system)
{
    sys = *system;
    open_fds = mappings = 0;
    os = &sim_ops;
}

int sim_stop(void)
{
    os = &os_linux;
    return open_fds + mappings;
}
