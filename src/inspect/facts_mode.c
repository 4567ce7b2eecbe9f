/* SPDX-License-Identifier: MIT */
/* Facts about the modes of registration, and about what a remap leaves behind: see facts.h. */
#include <string.h>
#include <sys/mman.h>

#include "inspect/facts.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4 /* 5.7 */
#endif

/* ---- 22: MISSING and WP replace each other ---- */

static void touch_it(void *arg)
{
    *(volatile char *)arg;
}

/* Reads a missing page; whether that is a fault. It is left asleep, or the page is filled. */
static bool read_faults(const struct os_uffd *u, char *at)
{
    int fd = u->fd;

    thread_start(touch_it, at);
    while (!present(at))
        if (os->poll(&fd, 1, 1) == 1)
            return true;
    return false;
}

static void drop_it(void *arg)
{
    madvise(arg, os_page_size(), MADV_DONTNEED);
}

void fact_modes(void)
{
    enum { N = 8 };
    struct os_uffd u = uffd_new(EVENTS);
    size_t page = os_page_size(), len = N * page;
    char *p = pages(N);
    int err = os->uffd_watch(u.fd, (uintptr_t)p, len);

    if (err < 0)
        fact_differs("private memory cannot be registered in WP mode: %s", error_name(err));
    if (os->uffd_watched(u.fd, (uintptr_t)p, page))
        fact_differs("what is registered in WP mode is not said to be");
    if (read_faults(&u, p))
        fact_differs("a first touch in WP mode raises a fault");
    thread_start(drop_it, p);
    if (read_message(u.fd).event != UFFD_EVENT_REMOVE)
        fact_differs("MADV_DONTNEED raises no event in WP mode");
    watch(u.fd, p, N);
    if (os->uffd_watched(u.fd, (uintptr_t)p, page) == 0)
        fact_differs("WP mode is left when MISSING is registered");
    err = os->uffd_watch(u.fd, (uintptr_t)p, len);
    if (err < 0)
        fact_differs("WP mode cannot follow MISSING mode: %s", error_name(err));
    if (read_faults(&u, p + 2 * page))
        fact_differs("a first touch raises a fault after MISSING mode was replaced by WP");
    watch(u.fd, p, N);
    if (!read_faults(&u, p + 4 * page))
        fact_differs("a first touch raises no fault after WP mode was replaced by MISSING");
    fact_ok("each mode replaced the other; WP raised events, and no fault");
}

/* ---- 23: what a remap leaves ---- */

struct remap {
    char *from, *to;
    size_t len;
    int flags, done;
};

static void remap_it(void *arg)
{
    struct remap *r = arg;

    if (mremap(r->from, r->len, r->len, MREMAP_MAYMOVE | MREMAP_FIXED | r->flags, r->to) == r->to)
        set_flag(&r->done);
}

void fact_remap_leaves(void)
{
    enum { N = 8 };
    struct os_uffd u = uffd_new(EVENTS);
    size_t len = N * os_page_size();
    static struct remap r, keep;
    struct uffd_msg msg;

    r = (struct remap){.from = pages(N), .to = pages(N), .len = len};
    watch(u.fd, r.from, N);
    thread_start(remap_it, &r);
    if (read_message(u.fd).event != UFFD_EVENT_REMAP)
        fact_differs("mremap raises another event first");
    if (os->uffd_pending(u.fd) != 1)
        fact_differs("no event is pending between the remap and the unmap of what it left");
    msg = read_message(u.fd);
    if (msg.event != UFFD_EVENT_UNMAP || msg.arg.remove.start != (uintptr_t)r.from ||
        msg.arg.remove.end != (uintptr_t)r.from + len)
        fact_differs("the unmap of what mremap left is not told after it");
    wait_flag(&r.done);
    keep = (struct remap){.from = r.to, .to = pages(N), .len = len, .flags = MREMAP_DONTUNMAP};
    thread_start(remap_it, &keep);
    if (read_message(u.fd).event != UFFD_EVENT_REMAP)
        fact_differs("mremap with MREMAP_DONTUNMAP raises another event first");
    wait_flag(&keep.done);
    if (!read_faults(&u, keep.from))
        fact_differs("with MREMAP_DONTUNMAP the old place is not registered any more");
    fact_ok("the unmap of the old place came after the remap; with MREMAP_DONTUNMAP it stayed registered");
}
