/* SPDX-License-Identifier: MIT */
/* See packer.h. */
#include "process/packer.h"

#include <errno.h>

#include "base/futex.h"
#include "os/own.h"
#include "process/nursery.h"

#define WAIT_NS 1000000
#define UNSEEN_NS 10000000000ull /* a child whose end would not be seen takes no message: fork() may have failed */

static struct nursery_message *current(const struct packer *p)
{
    return &p->nursery->message[p->turn];
}

static bool is_ours(const struct packer *p)
{
    return !__atomic_load_n(&current(p)->full, __ATOMIC_ACQUIRE);
}

/* The child's end of the pipe is closed by whatever ends it: exit, a signal, exec. */
bool packer_is_gone(const struct packer *p)
{
    return p->alive >= 0 && os->poll(&p->alive, 1, 0) > 0;
}

static void send(struct packer *p, bool last)
{
    struct nursery_message *m = current(p);
    m->last = last;
    __atomic_store_n(&m->full, 1, __ATOMIC_RELEASE);
    futex_wake_common(&m->full, 1);
    p->turn = !p->turn;
    p->begun = false;
}

static bool is_given_up(struct packer *p)
{
    uint64_t now = os_now();
    if (!p->waiting_since)
        p->waiting_since = now;
    return p->alive < 0 && now - p->waiting_since > UNSEEN_NS;
}

/* 0: the message may be written. */
static int get_message(struct packer *p)
{
    struct nursery_message *m = current(p);
    if (!is_ours(p))
        return packer_is_gone(p) || is_given_up(p) ? -ESRCH : -EAGAIN;
    p->waiting_since = 0;
    if (!p->begun)
        m->runs = m->pages = 0;
    p->begun = true;
    return 0;
}

int packer_add(struct packer *p, uintptr_t addr, const char *bytes, uint32_t pages)
{
    int r = get_message(p);
    if (r)
        return r;
    struct nursery_message *m = current(p);
    uint32_t room = (uint32_t)(NURSERY_BYTES >> os_page_shift()) - m->pages;
    if (m->runs == NURSERY_RUNS || (bytes && !room)) {
        send(p, false);
        return 0;
    }
    if (bytes) {
        char *to = nursery_bytes(p->nursery, p->turn) + ((size_t)m->pages << os_page_shift());
        pages = pages < room ? pages : room;
        int64_t got = os->vm_read((uintptr_t)bytes, to, (size_t)pages << os_page_shift());
        pages = got > 0 ? (uint32_t)(got >> os_page_shift()) : 0;
        if (!pages)
            return -EFAULT;
        m->pages += pages;
    }
    m->run[m->runs++] = (struct nursery_run){.addr = addr, .pages = pages, .how = bytes ? NURSERY_GIVE : NURSERY_POISON};
    return (int)pages;
}

int packer_end(struct packer *p)
{
    int r = get_message(p);
    if (r)
        return r;
    send(p, true);
    p->ended = true;
    return 0;
}

void packer_wait(struct packer *p)
{
    if (is_ours(p))
        os_sleep(WAIT_NS); /* for something else than the child */
    else
        futex_wait_common(&current(p)->full, 1, WAIT_NS);
}

void packer_beat(struct packer *p)
{
    __atomic_fetch_add(&p->nursery->beat, 1, __ATOMIC_RELAXED);
}

void packer_close(struct packer *p)
{
    if (!p->ended)
        __atomic_store_n(&p->nursery->refused, 1, __ATOMIC_RELEASE);
    if (p->alive >= 0)
        os->close(p->alive);
    own_unmap(p->nursery, nursery_size());
    p->nursery = NULL;
}
