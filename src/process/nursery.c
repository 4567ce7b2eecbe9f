/* SPDX-License-Identifier: MIT */
/* See nursery.h. The kernel is called directly, not through `os`: what tests and injection put there is the parent's. */
#include "process/nursery.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/error.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "os/os.h"

#define STEP_NS 100000000 /* between two looks whether the parent is there */
#define STEPS_MAX 300     /* without a sign of it, where the kernel cannot say */
#define TRIES 10000       /* of what system memory is short for */

struct child {
    struct nursery *n;
    struct os_uffd uffd;
    int maps_fd;
    pid_t parent;
    struct os_vma vma; /* registered last */
};

static size_t page_bytes(uint64_t pages)
{
    return pages << os_page_shift();
}

size_t nursery_size(void)
{
    size_t head = (sizeof(struct nursery) + os_page_size() - 1) & ~(os_page_size() - 1);
    return head + 2 * NURSERY_BYTES;
}

char *nursery_bytes(struct nursery *n, unsigned i)
{
    return (char *)n + nursery_size() - (2 - i) * NURSERY_BYTES;
}

static void say(const char *text)
{
    if (syscall(SYS_write, 2, text, strlen(text)) < 0)
        return;
}

static void __attribute__((noreturn)) fail(const char *why, int err)
{
    say("libhmm: a child of fork has not got its memory and ends: ");
    say(why);
    if (err) {
        say(": ");
        say(hmm_strerror(err));
    }
    say("\n");
    for (;;)
        syscall(SYS_exit_group, 127);
}

/* ---- one run ---- */

/* Registers the mapping of addr; where a run cannot be given because nothing of ours can be there, false. */
static bool register_mapping(struct child *c, uintptr_t addr)
{
    struct os_vma vma;
    if (addr >= c->vma.start && addr < c->vma.end)
        return true;
    if (os_linux.vma_query(c->maps_fd, addr, &vma) || vma.start > addr || !vma.anonymous || vma.shared)
        return false;
    for (unsigned tries = 0; tries < TRIES; tries++) {
        int r = os_linux.uffd_register(c->uffd.fd, vma.start, vma.end - vma.start);
        if (!r) {
            c->vma = vma;
            return true;
        }
        if (r != -ENOMEM)
            fail("a mapping cannot be registered", r);
        os_sleep(100000);
    }
    fail("a mapping cannot be registered", -ENOMEM);
}

static int64_t give(struct child *c, const struct nursery_run *r, uintptr_t addr, const char *bytes, size_t len)
{
    return r->how == NURSERY_POISON ? os_linux.uffd_poison(c->uffd.fd, addr, len)
                                    : os_linux.uffd_copy(c->uffd.fd, addr, bytes, len);
}

static void take_run(struct child *c, const struct nursery_run *r, const char *bytes)
{
    uintptr_t end = r->addr + page_bytes(r->pages);
    unsigned tries = 0;
    for (uintptr_t at = r->addr; at < end;) {
        if (!register_mapping(c, at)) {
            at += os_page_size();
            continue;
        }
        uintptr_t part_end = end < c->vma.end ? end : c->vma.end;
        int64_t done = give(c, r, at, bytes + (at - r->addr), part_end - at);
        if (done > 0)
            at += (uintptr_t)done;
        else if (done == -EEXIST)
            at += os_page_size(); /* what is there is newer */
        else if ((done == -ENOMEM || done == -EAGAIN) && tries++ < TRIES)
            os_sleep(100000);
        else
            fail("a page cannot be put", (int)done);
    }
}

/* ---- messages ---- */

/* Where the parent has another name for us than we have (namespaces), it has none for us: its beat must do. */
static void look_at_parent(struct child *c, unsigned *quiet, uint32_t *beat)
{
    uint32_t now = __atomic_load_n(&c->n->beat, __ATOMIC_RELAXED);
    *quiet = now == *beat ? *quiet + 1 : 0;
    *beat = now;
    if (__atomic_load_n(&c->n->refused, __ATOMIC_ACQUIRE))
        fail("its parent cannot give it", 0);
    if (getppid() != c->parent)
        fail("its parent is gone", 0);
    if (!c->parent && *quiet > STEPS_MAX)
        fail("its parent does not answer", 0);
}

static void wait_message(struct child *c, const struct nursery_message *m)
{
    unsigned quiet = 0;
    uint32_t beat = 0;
    while (!__atomic_load_n(&m->full, __ATOMIC_ACQUIRE)) {
        futex_wait_common(&m->full, 0, STEP_NS);
        if (!__atomic_load_n(&m->full, __ATOMIC_ACQUIRE))
            look_at_parent(c, &quiet, &beat);
    }
}

static bool take_message(struct child *c, unsigned i)
{
    struct nursery_message *m = &c->n->message[i];
    const char *bytes = nursery_bytes(c->n, i);
    wait_message(c, m);
    for (unsigned k = 0; k < m->runs; k++) {
        take_run(c, &m->run[k], bytes);
        bytes += m->run[k].how == NURSERY_GIVE ? page_bytes(m->run[k].pages) : 0;
    }
    bool last = m->last;
    __atomic_store_n(&m->full, 0, __ATOMIC_RELEASE);
    futex_wake_common(&m->full, 1);
    return last;
}

void nursery_take(struct nursery *n)
{
    struct child c = {.n = n, .parent = getppid()};
    if (c.parent && c.parent != n->parent)
        fail("its parent is gone", 0);
    int r = os_linux.uffd_open(UFFD_FEATURE_POISON, &c.uffd);
    if (r)
        fail("userfaultfd cannot be opened", r);
    c.maps_fd = os_linux.maps_open();
    if (c.maps_fd < 0)
        fail("/proc/self/maps cannot be opened", c.maps_fd);
    for (unsigned i = 0; !take_message(&c, i); i = !i)
        ;
    os_linux.close(c.maps_fd);
    os_linux.close(c.uffd.fd); /* unregisters */
}
