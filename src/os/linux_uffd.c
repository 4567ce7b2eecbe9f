/* SPDX-License-Identifier: MIT */
/*
 * userfaultfd(2). Thin: one ioctl each, results made into the contract of os.h. The kernel serialises; any thread may call.
 *
 * A fill (COPY, ZEROPAGE, MOVE) that stopped half-way answers EAGAIN and leaves the count in the structure; one that did
 * nothing leaves a negative errno there, or, when it failed before it looked, what we put there: 0.
 */
#include <string.h>

#include "os/linux.h"

static int uffd_ioctl(int uffd, unsigned long request, void *arg)
{
    return (int)sys_result(ioctl(uffd, request, arg));
}

/* Asks for exactly these features. A refusal leaves the descriptor as it was. */
static int uffd_handshake(int fd, uint64_t features, struct os_uffd *out)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    int err = uffd_ioctl(fd, UFFDIO_API, &api);

    if (err < 0)
        return err;
    out->fd = fd;
    out->features = api.features;
    return 0;
}

static int uffd_from_device(void)
{
    int dev = sys_open("/dev/userfaultfd", O_RDWR);
    int64_t fd;

    if (dev < 0)
        return dev;
    fd = sys_result(ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK));
    sys_close(dev);
    return (int)fd;
}

static int uffd_from_call(int flags)
{
    return (int)sys_result(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags));
}

static int uffd_from_call_any(void)
{
    return uffd_from_call(0);
}

static int uffd_from_call_user(void)
{
    return uffd_from_call(UFFD_USER_MODE_ONLY);
}

static const struct {
    const char *name;
    int (*open)(void);
    bool user_mode_only;
} routes[] = {
    {"/dev/userfaultfd", uffd_from_device, false},
    {"userfaultfd(2)", uffd_from_call_any, false},
    {"userfaultfd(2) user-mode-only", uffd_from_call_user, true},
};

/* Whether an error of one route says nothing about the next. The device file may be absent, closed to us, or without driver. */
static bool route_refused(int err)
{
    return err == -EPERM || err == -EACCES || err == -ENOENT || err == -ENODEV || err == -ENXIO || err == -ENOTTY ||
           err == -ENOSYS || err == -EINVAL;
}

int linux_uffd_open(uint64_t features, struct os_uffd *out)
{
    struct os_uffd u;
    int fd = -ENOSYS;
    unsigned i;
    int err;

    for (i = 0; i < sizeof(routes) / sizeof(routes[0]); i++) {
        fd = routes[i].open();
        if (fd >= 0)
            break;
        if (!route_refused(fd))
            return fd;
    }
    if (fd < 0)
        return fd == -ENOSYS ? -ENOSYS : -EPERM;
    u.route = routes[i].name;
    u.user_mode_only = routes[i].user_mode_only;
    err = uffd_handshake(fd, features, &u);
    if (err < 0) {
        sys_close(fd);
        return err;
    }
    *out = u;
    return 0;
}

int linux_uffd_register(int uffd, uintptr_t start, size_t len)
{
    struct uffdio_register r = {.range = {start, len}, .mode = UFFDIO_REGISTER_MODE_MISSING};

    return uffd_ioctl(uffd, UFFDIO_REGISTER, &r);
}

int linux_uffd_watch(int uffd, uintptr_t start, size_t len)
{
    struct uffdio_register r = {.range = {start, len}, .mode = UFFDIO_REGISTER_MODE_WP};

    return uffd_ioctl(uffd, UFFDIO_REGISTER, &r);
}

int linux_uffd_watched(int uffd, uintptr_t start, size_t len)
{
    struct uffdio_writeprotect w = {.range = {start, len}, .mode = UFFDIO_WRITEPROTECT_MODE_DONTWAKE};

    return uffd_ioctl(uffd, UFFDIO_WRITEPROTECT, &w);
}

int linux_uffd_unregister(int uffd, uintptr_t start, size_t len)
{
    struct uffdio_range r = {start, len};

    return uffd_ioctl(uffd, UFFDIO_UNREGISTER, &r);
}

/* err: of the ioctl; done: what it left in the structure. */
static int64_t fill_result(int err, int64_t done)
{
    if (done > 0)
        return done;
    return err < 0 ? err : -EAGAIN;
}

int64_t linux_uffd_copy(int uffd, uintptr_t dst, const void *src, size_t len)
{
    struct uffdio_copy c = {.dst = dst, .src = (uintptr_t)src, .len = len, .mode = UFFDIO_COPY_MODE_DONTWAKE};
    int err = uffd_ioctl(uffd, UFFDIO_COPY, &c);

    return fill_result(err, c.copy);
}

int64_t linux_uffd_zeropage(int uffd, uintptr_t dst, size_t len)
{
    struct uffdio_zeropage z = {.range = {dst, len}, .mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE};
    int err = uffd_ioctl(uffd, UFFDIO_ZEROPAGE, &z);

    return fill_result(err, z.zeropage);
}

int64_t linux_uffd_move(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    struct uffdio_move m = {.dst = dst, .src = src, .len = len, .mode = UFFDIO_MOVE_MODE_DONTWAKE};
    int err = uffd_ioctl(uffd, UFFDIO_MOVE, &m);

    return fill_result(err, m.move);
}

int64_t linux_uffd_poison(int uffd, uintptr_t dst, size_t len)
{
    struct uffdio_poison p = {.range = {dst, len}, .mode = UFFDIO_POISON_MODE_DONTWAKE};
    int err = uffd_ioctl(uffd, UFFDIO_POISON, &p);

    return fill_result(err, p.updated);
}

int linux_uffd_wake(int uffd, uintptr_t start, size_t len)
{
    struct uffdio_range r = {start, len};

    return uffd_ioctl(uffd, UFFDIO_WAKE, &r);
}

int linux_uffd_pending(int uffd)
{
    /* A pending event is looked for before the range is: an empty range is then refused, and nothing was done. */
    struct uffdio_writeprotect w = {.range = {0, 0}};
    int err = uffd_ioctl(uffd, UFFDIO_WRITEPROTECT, &w);

    if (err == -EAGAIN)
        return 1;
    return err == -EINVAL ? 0 : err;
}

int linux_uffd_read(int uffd, struct uffd_msg *msgs, unsigned n)
{
    int64_t r = sys_read(uffd, msgs, n * sizeof(*msgs));

    if (r == -EAGAIN || r == -EINTR)
        return 0;
    return r < 0 ? (int)r : (int)(r / (int64_t)sizeof(*msgs));
}
