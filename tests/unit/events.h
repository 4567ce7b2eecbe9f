/* SPDX-License-Identifier: MIT */
/* Reading events otherwise than they came: readers for a test's table of system calls. */
#ifndef TESTS_UNIT_EVENTS_H
#define TESTS_UNIT_EVENTS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "os/os.h"

static struct {
    uintptr_t start, end; /* start 0: none */
    uint64_t read;        /* when */
} fake_remove;

static inline void expect_remove(const void *at, size_t len)
{
    fake_remove.end = (uintptr_t)at + len;
    __atomic_store_n(&fake_remove.start, (uintptr_t)at, __ATOMIC_SEQ_CST);
}

/* As if a thread were in MADV_DONTNEED: with the next message that there is. */
static inline int read_and_remove(int uffd, struct uffd_msg *msgs, unsigned n)
{
    int got = os_linux.uffd_read(uffd, msgs, n - 1);
    if (got > 0 && fake_remove.start) {
        memset(&msgs[got], 0, sizeof(msgs[got]));
        msgs[got].event = UFFD_EVENT_REMOVE;
        msgs[got].arg.remove.start = fake_remove.start;
        msgs[got++].arg.remove.end = fake_remove.end;
        fake_remove.read = os_now();
        __atomic_store_n(&fake_remove.start, 0, __ATOMIC_SEQ_CST);
    }
    return got;
}

/* Events of two threads in the other order: the unmap of this address is held until a remap comes. */
static struct uffd_msg held;
static uintptr_t hold_start;
static uint32_t holding; /* 1: hold it; 2: held; 3: given */

static inline int read_held(int uffd, struct uffd_msg *msgs, unsigned n)
{
    int got = os_linux.uffd_read(uffd, msgs, n - 1), kept = 0;
    bool remap = false;
    for (int i = 0; i < got; i++) {
        if (holding == 1 && msgs[i].event == UFFD_EVENT_UNMAP && msgs[i].arg.remove.start == hold_start) {
            held = msgs[i];
            __atomic_store_n(&holding, 2, __ATOMIC_SEQ_CST);
            continue;
        }
        remap |= holding == 2 && msgs[i].event == UFFD_EVENT_REMAP;
        msgs[kept++] = msgs[i];
    }
    if (remap) {
        msgs[kept++] = held;
        __atomic_store_n(&holding, 3, __ATOMIC_SEQ_CST);
    }
    return got < 0 ? got : kept;
}

static inline void hold_unmap_of(const void *at)
{
    hold_start = (uintptr_t)at;
    __atomic_store_n(&holding, 1, __ATOMIC_SEQ_CST);
}

/* The caller goes on when the message is read, before the hook has looked at it. */
static inline void expect_holding(uint32_t n)
{
    for (int i = 0; i < 5000 && __atomic_load_n(&holding, __ATOMIC_SEQ_CST) != n; i++)
        usleep(1000);
    assert_int_equal(__atomic_load_n(&holding, __ATOMIC_SEQ_CST), n);
}

#endif
