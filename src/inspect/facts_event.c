/* SPDX-License-Identifier: MIT */
/* Facts about events: when they are read, in which order, and what waits for them. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "inspect/facts.h"

/* ---- a thread that drops or unmaps memory when told, on the CPU of its reader ---- */

struct dropper {
    char *at;
    size_t len;
    bool unmap;
    unsigned cpu;
    int ready, go, done;
};

static void drop_once(struct dropper *d)
{
    if (d->unmap)
        munmap(d->at, d->len);
    else
        madvise(d->at, d->len, MADV_DONTNEED);
}

static void drop_when_told(void *arg)
{
    struct dropper *d = arg;

    on_cpu(d->cpu);
    set_flag(&d->ready);
    for (;;) {
        while (!__atomic_exchange_n(&d->go, 0, __ATOMIC_ACQ_REL))
            os_sleep(1000);
        drop_once(d);
        set_flag(&d->done);
    }
}

static void tell(struct dropper *d)
{
    __atomic_store_n(&d->done, 0, __ATOMIC_RELEASE);
    set_flag(&d->go);
}

/* ---- 5: REMOVE comes early ---- */

enum { ROUNDS = 300 };

void fact_remove_early(void)
{
    struct os_uffd u = uffd_new(EVENTS);
    size_t page = os_page_size();
    char *x = pages(1), *src = pages(1);
    struct dropper d = {.at = x, .len = page};
    unsigned early = 0;

    watch(u.fd, x, 1);
    *src = 7;
    if (!on_cpu(0))
        fact_unseen("could not be tried: no CPU to be had");
    thread_start(drop_when_told, &d);
    wait_flag(&d.ready);
    for (unsigned i = 0; i < ROUNDS; i++) {
        int64_t r = os->uffd_copy(u.fd, (uintptr_t)x, src, page);

        if (r != (int64_t)page)
            fact_differs("round %u: COPY gave %s", i, error_name(r));
        tell(&d);
        if (read_message(u.fd).event != UFFD_EVENT_REMOVE)
            fact_differs("MADV_DONTNEED sent another event than REMOVE");
        early += present(x);
        wait_flag(&d.done);
        if (present(x))
            fact_differs("round %u: the page was there after MADV_DONTNEED returned", i);
    }
    if (!early)
        fact_unseen("in %u rounds the page was gone when the event had been read", ROUNDS);
    fact_ok("in %u of %u rounds the page was still there when the event had been read", early, ROUNDS);
}

/* ---- 6: EAGAIN outlives the read ---- */

void fact_again_outlives(void)
{
    struct os_uffd u = uffd_new(EVENTS);
    size_t page = os_page_size();
    char *x = pages(1), *z = pages(1), *src = pages(1);
    struct dropper d = {.at = x, .len = page};
    unsigned again = 0;
    uint64_t longest = 0;

    watch(u.fd, x, 1);
    watch(u.fd, z, 1);
    *src = 7;
    if (!on_cpu(0))
        fact_unseen("could not be tried: no CPU to be had");
    thread_start(drop_when_told, &d);
    wait_flag(&d.ready);
    for (unsigned i = 0; i < ROUNDS; i++) {
        uint64_t t;
        int64_t r;

        tell(&d);
        read_message(u.fd);
        t = os_now();
        again += os->uffd_pending(u.fd) == 1;
        while ((r = os->uffd_copy(u.fd, (uintptr_t)z, src, page)) == -EAGAIN) {
            if (os_now() - t > 1000000000)
                fact_differs("round %u: EAGAIN for a second after the event was read, with sleeps in between", i);
            os_sleep(20000);
        }
        if (r != (int64_t)page)
            fact_differs("round %u: COPY gave %s", i, error_name(r));
        t = os_now() - t;
        longest = t > longest ? t : longest;
        wait_flag(&d.done);
        os->uffd_unregister(u.fd, (uintptr_t)z, page);
        os->advise(z, page, OS_ADVISE_DONTNEED);
        watch(u.fd, z, 1);
    }
    if (!again)
        fact_unseen("in %u rounds nothing was pending when the event had been read", ROUNDS);
    fact_ok("in %u of %u rounds still pending when the event had been read; at most %.0f us until COPY worked", again, ROUNDS,
            (double)longest / 1000);
}

/* ---- 7: order ---- */

struct call {
    char *from, *to; /* to: NULL for munmap */
    size_t len;
    int done;
};

static void make_call(void *arg)
{
    struct call *c = arg;

    if (c->to)
        mremap(c->from, c->len, c->len, MREMAP_MAYMOVE | MREMAP_FIXED, c->to);
    else
        munmap(c->from, c->len);
    set_flag(&c->done);
}

/*
 * Left alone, the race takes luck: munmap has given up the memory, and another thread's mremap has landed there and told of it,
 * before munmap tells. Here munmap is held up in between: it tells one userfaultfd after the other, and the first is not read.
 */
void fact_order(void)
{
    struct os_uffd first = uffd_new(EVENTS), u = uffd_new(EVENTS);
    size_t page = os_page_size();
    char *x = pages(2), *y = pages(1);
    struct call unmap = {.from = x, .len = 2 * page}, remap = {.from = y, .to = x + page, .len = page};
    struct uffd_msg msg;

    watch(first.fd, x, 1);
    watch(u.fd, x + page, 1);
    watch(u.fd, y, 1);
    thread_start(make_call, &unmap);
    wait_message(first.fd);
    if (os->poll(&u.fd, 1, 20))
        fact_unseen("munmap told both userfaultfds at once");
    thread_start(make_call, &remap);
    msg = read_message(u.fd);
    if (msg.event != UFFD_EVENT_REMAP || msg.arg.remap.to != (uintptr_t)x + page)
        fact_unseen("event %u was read first", msg.event);
    read_message(first.fd);
    for (;;) {
        msg = read_message(u.fd);
        if (msg.event == UFFD_EVENT_UNMAP && msg.arg.remove.start <= (uintptr_t)x + page &&
            msg.arg.remove.end >= (uintptr_t)x + 2 * page)
            break;
    }
    wait_flag(&unmap.done);
    fact_ok("mremap landed where munmap had been, and its event was read before munmap's, which came in the end");
}

/* ---- 11: MADV_DONTNEED ---- */

void fact_dontneed(void)
{
    struct os_uffd u = uffd_new(EVENTS), quiet = uffd_new(NO_EVENTS);
    size_t page = os_page_size();
    char *x = pages(1), *staging = pages(1), *discard = pages(1);
    struct dropper unmapper = {.at = x, .len = page, .unmap = true}, waiter = {.at = staging, .len = page};
    struct uffd_msg msg;
    bool wiped;

    *x = *staging = *discard = 1;
    watch(u.fd, x, 1);
    watch(u.fd, staging, 1);
    watch(quiet.fd, discard, 1);
    thread_start(drop_when_told, &unmapper);
    thread_start(drop_when_told, &waiter);
    /* A late call, meant for memory that is unmapped meanwhile, hits what was mapped since. */
    tell(&unmapper);
    wait_message(u.fd);
    if (mmap(x, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != x)
        fact_unseen("could not be tried: the unmapped address was not free");
    *x = 2;
    os->advise(x, page, OS_ADVISE_DONTNEED);
    wiped = *x == 0;
    read_message(u.fd);
    wait_flag(&unmapper.done);
    /* On an area with events the call waits for the reader; without events it does not, nor tells anybody. */
    tell(&waiter);
    wait_message(u.fd);
    os_sleep(5000000);
    if (flag_set(&waiter.done))
        fact_differs("MADV_DONTNEED of an area with events returned before its event was read");
    msg = read_message(u.fd);
    if (msg.event != UFFD_EVENT_REMOVE || msg.arg.remove.start != (uintptr_t)staging)
        fact_differs("MADV_DONTNEED sent event %u for another range", msg.event);
    wait_flag(&waiter.done);
    os->advise(discard, page, OS_ADVISE_DONTNEED);
    if (present(discard) || os->poll(&u.fd, 1, 0) || os->poll(&quiet.fd, 1, 0))
        fact_differs("MADV_DONTNEED of an area without events left the page, or sent an event");
    if (!wiped)
        fact_unseen("a late MADV_DONTNEED did not reach the new mapping");
    fact_ok("a late call emptied the mapping that had come since; with events it waited for the reader, without it did not");
}

/* ---- 26: the event of fork ---- */

struct forker {
    char *at;
    int seen, done; /* what the child read there; fork has returned and the child has ended */
};

static int read_there(void *at)
{
    return *(volatile char *)at;
}

static void fork_once(void *arg)
{
    struct forker *f = arg;

    f->seen = in_child(read_there, f->at);
    set_flag(&f->done);
}

void fact_fork_event(void)
{
    struct os_uffd u;
    size_t page = os_page_size();
    char *x = pages(2), *src = pages(1);
    struct forker f = {.at = x};
    struct uffd_msg msg;
    int err = os->uffd_open(EVENTS | UFFD_FEATURE_EVENT_FORK, &u), child;
    int64_t r;

    if (err == -EPERM)
        fact_unseen("could not be tried: the event of fork takes CAP_SYS_PTRACE");
    if (err < 0)
        fact_unseen("could not be tried: userfaultfd with the event of fork: %s", error_name(err));
    watch(u.fd, x, 2);
    memset(src, 'f', page);
    thread_start(fork_once, &f);
    wait_message(u.fd);
    os_sleep(5000000);
    if (flag_set(&f.done))
        fact_differs("fork was over before its event was read");
    msg = read_message(u.fd);
    child = (int)msg.arg.fork.ufd;
    if (msg.event != UFFD_EVENT_FORK || child < 0)
        fact_differs("fork sent event %u, with descriptor %d", msg.event, child);
    r = os->uffd_copy(child, (uintptr_t)x, src, page);
    if (r != (int64_t)page)
        fact_differs("COPY into the child, by the descriptor of the event, gave %s", error_name(r));
    os->uffd_wake(child, (uintptr_t)x, page);
    wait_flag(&f.done);
    if (f.seen != 'f')
        fact_differs("the child read %d where COPY had put %d", f.seen, 'f');
    if (present(x))
        fact_differs("COPY into the child put its page into the parent");
    os->close(child);
    fact_ok("fork waited until its event was read, COPY by the descriptor of the event reached the child, and only the child");
}
