/* SPDX-License-Identifier: MIT */
/* Life of the address space object. See mm.h for the rules. */
#include "mm/mm.h"

#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "mm/arm.h"
#include "mm/event.h"
#include "os/own.h"

#define POOL_FLIGHTS 48

static int open_descriptors(struct mm *mm)
{
    int r = os->uffd_open(OS_UFFD_REQUIRED | UFFD_FEATURE_EVENT_FORK, &mm->uffd);
    if (r) /* it takes CAP_SYS_PTRACE: without it fork handlers do what can be done (process/fork.c) */
        r = os->uffd_open(OS_UFFD_REQUIRED, &mm->uffd);
    else
        mm->fork_event = true;
    if (r)
        return hmm_fail(r, "userfaultfd cannot be opened (%s): `hmm check` names what is missing and the remedy",
                        hmm_strerror(r));
    r = mm->pagemap_fd = os->pagemap_open();
    if (r < 0)
        goto close_uffd;
    r = mm->maps_fd = os->maps_open();
    if (r < 0)
        goto close_pagemap;
    return 0;

close_pagemap:
    os->close(mm->pagemap_fd);
close_uffd:
    os->close(mm->uffd.fd);
    return hmm_fail(r, "descriptors of /proc/self (pagemap, maps) cannot be opened: %s", hmm_strerror(r));
}

static void close_descriptors(struct mm *mm)
{
    os->close(mm->maps_fd);
    os->close(mm->pagemap_fd);
    os->close(mm->uffd.fd);
}

static int make_flights(struct mm *mm)
{
    for (unsigned i = 0; i < POOL_FLIGHTS; i++) {
        struct flight *f = flight_new(mm);
        if (!f)
            return -ENOMEM;
        flight_put(mm, f);
    }
    return 0;
}

static const char *name_of(const struct hmm_device *dev)
{
    return dev->driver->name;
}

int mm_init(struct mm *mm)
{
    memset(mm, 0, sizeof(*mm));
    rwlock_init(&mm->as, RANK_AS);
    mutex_init(&mm->queue_lock, RANK_QUEUE);
    notifier_tree_init(&mm->notifiers);
    mm->notifiers.device_name = name_of;
    list_init(&mm->free_flights);
    list_init(&mm->lru);
    list_init(&mm->captures);
    int r = open_descriptors(mm);
    if (r)
        goto destroy_locks;
    r = pagetable_init(&mm->pt);
    if (r)
        goto close;
    r = make_flights(mm);
    if (r)
        goto free_flights;
    r = mm->gate_fd = os->map_shown(os_page_size(), (void **)&mm->gate);
    if (r < 0)
        goto free_flights;
    return 0;

free_flights:
    flight_free_all(mm);
    pagetable_exit(&mm->pt);
close:
    close_descriptors(mm);
    hmm_fail(r, "the manager cannot start: %s", hmm_strerror(r));
destroy_locks:
    notifier_tree_destroy(&mm->notifiers);
    mutex_destroy(&mm->queue_lock);
    rwlock_destroy(&mm->as);
    return r;
}

void mm_exit(struct mm *mm)
{
    rwlock_write_lock(&mm->as);
    while (mm->regions.root)
        region_drop(mm, mm->regions.root);
    regions_exit(&mm->kept);
    rwlock_write_unlock(&mm->as);
    os->close(mm->gate_fd);
    os->unmap(mm->gate, os_page_size());
    flight_free_all(mm);
    pagetable_exit(&mm->pt);
    close_descriptors(mm);
    notifier_tree_destroy(&mm->notifiers);
    mutex_destroy(&mm->queue_lock);
    rwlock_destroy(&mm->as);
}

void mm_sync(struct mm *mm)
{
    rwlock_read_lock(&mm->as);
    rwlock_read_unlock(&mm->as);
}

void mm_backoff(struct mm *mm, unsigned attempt)
{
    lock_assert_none();
    stat_add(&mm->stats.retries, 1);
    os_sleep(10000ull << (attempt < 8 ? attempt : 8));
}
