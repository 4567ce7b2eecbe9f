/* SPDX-License-Identifier: MIT */
/* See uffd.h. The pager's thread touches only its own structure, the origin and the userfaultfd. */
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

struct bare_pager {
    pthread_t thread;
    int uffd;
    char *memory;
    const char *origin;
    size_t faults, page_size;
    int error;
};

/* The first way that is permitted. */
static int open_uffd(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int fd = -1;

    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
        close(device);
    }
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    return fd;
}

static void *serve(void *arg)
{
    struct bare_pager *p = arg;

    for (size_t i = 0; i < p->faults; i++) {
        struct uffdio_copy copy = {.len = p->page_size};
        struct uffd_msg msg;

        if (read(p->uffd, &msg, sizeof(msg)) != (ssize_t)sizeof(msg) || msg.event != UFFD_EVENT_PAGEFAULT) {
            p->error = errno ? errno : EIO;
            break;
        }
        copy.dst = msg.arg.pagefault.address & ~(p->page_size - 1);
        copy.src = (uintptr_t)p->origin + (copy.dst - (uintptr_t)p->memory);
        if (ioctl(p->uffd, UFFDIO_COPY, &copy)) {
            p->error = errno;
            break;
        }
    }
    if (p->error)
        close(p->uffd); /* unregisters, so that nobody waits for us for ever */
    return NULL;
}

struct bare_pager *bare_pager_start(struct bench_env *env, char *memory, const char *origin, size_t bytes, size_t faults)
{
    struct bare_pager *p = calloc(1, sizeof(*p));
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register reg = {.range = {(uintptr_t)memory, bytes}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    const char *step;
    int err;

    if (!p) {
        bench_fail(env, "no memory");
        return NULL;
    }
    *p = (struct bare_pager){
        .memory = memory, .origin = origin, .faults = faults, .page_size = hmm_page_size(), .uffd = open_uffd()};
    step = "opened";
    if (p->uffd < 0 || ioctl(p->uffd, UFFDIO_API, &api))
        goto failed;
    step = "registered";
    if (ioctl(p->uffd, UFFDIO_REGISTER, &reg))
        goto failed;
    err = pthread_create(&p->thread, NULL, serve, p);
    if (!err)
        return p;
    step = "served by a thread";
    errno = err;
failed:
    bench_fail(env, "the reference's userfaultfd cannot be %s: %s", step, strerror(errno));
    if (p->uffd >= 0)
        close(p->uffd);
    free(p);
    return NULL;
}

int bare_pager_stop(struct bench_env *env, struct bare_pager *p)
{
    int err;

    pthread_join(p->thread, NULL);
    err = p->error;
    if (!err)
        close(p->uffd);
    free(p);
    return err ? bench_fail(env, "the reference's pager failed: %s", strerror(err)) : 0;
}
