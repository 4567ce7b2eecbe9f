/* SPDX-License-Identifier: MIT */
/* Devices: handles, opening, closing, and what core provides to a driver about its device. */
#include <errno.h>
#include <limits.h>
#include <string.h>

#include "api/drivers.h"
#include "api/manager.h"
#include "base/alloc.h"
#include "base/error.h"
#include "base/futex.h"
#include "job/job.h"
#include "mirror/mirror.h"
#include "migrate/migrate.h"

enum slot_state { SLOT_FREE, SLOT_OPENING, SLOT_OPEN, SLOT_CLOSING, SLOT_STUCK };

/* Handles are serial numbers: a stale one never names another device. */
static struct {
    struct mutex lock; /* RANK_DRIVER: held for moments, only pagemap locks are taken under it */
    hmm_dev next;
    struct {
        enum slot_state state;
        hmm_dev handle;
        struct hmm_device *dev;
        uint32_t users; /* futex */
    } slots[DEVICES_MAX];
} devices = {.lock = MUTEX_INITIALIZER(RANK_DRIVER)};

void devices_forget(void)
{
    hmm_dev next = devices.next;
    memset(&devices, 0, sizeof(devices));
    devices.next = next;
    devices.lock = (struct mutex)MUTEX_INITIALIZER(RANK_DRIVER);
}

static int find_slot(hmm_dev handle)
{
    for (int i = 0; i < DEVICES_MAX; i++)
        if (devices.slots[i].state != SLOT_FREE && devices.slots[i].handle == handle)
            return i;
    return -1;
}

struct hmm_device *device_get(hmm_dev handle)
{
    struct hmm_device *dev = NULL;
    mutex_lock(&devices.lock);
    int i = handle > 0 ? find_slot(handle) : -1;
    if (i >= 0 && devices.slots[i].state == SLOT_OPEN) {
        dev = devices.slots[i].dev;
        devices.slots[i].users++;
    }
    mutex_unlock(&devices.lock);
    if (!dev)
        hmm_fail(-ENODEV, "device handle %d is not open (closed before, or never opened)", handle);
    return dev;
}

void device_put(struct hmm_device *dev)
{
    mutex_lock(&devices.lock);
    for (int i = 0; i < DEVICES_MAX; i++)
        if (devices.slots[i].dev == dev && --devices.slots[i].users == 0)
            futex_wake(&devices.slots[i].users, INT_MAX);
    mutex_unlock(&devices.lock);
}

hmm_dev device_handle(const struct hmm_device *dev)
{
    hmm_dev handle = 0;
    mutex_lock(&devices.lock);
    for (int i = 0; i < DEVICES_MAX; i++)
        if (devices.slots[i].state != SLOT_FREE && devices.slots[i].dev == dev)
            handle = devices.slots[i].handle;
    mutex_unlock(&devices.lock);
    return handle;
}

void devices_each(void (*fn)(struct pagemap *pm, void *arg), void *arg)
{
    mutex_lock(&devices.lock);
    for (int i = 0; i < DEVICES_MAX; i++)
        if (devices.slots[i].state == SLOT_OPEN)
            fn(devices.slots[i].dev->pagemap, arg);
    mutex_unlock(&devices.lock);
}

static void add_descriptors(struct pagemap *pm, void *sum)
{
    *(uint64_t *)sum += pm->desc.pages * sizeof(struct page_desc);
}

uint64_t devices_descriptor_bytes(void)
{
    uint64_t sum = 0;
    devices_each(add_descriptors, &sum);
    return sum;
}

static void add_used(struct pagemap *pm, void *sum)
{
    *(uint64_t *)sum += pagemap_used(pm);
}

uint64_t devices_used_pages(void)
{
    uint64_t sum = 0;
    devices_each(add_used, &sum);
    return sum;
}

/* ---- open ---- */

static int reserve_slot(struct hmm_device *dev)
{
    int slot = -1;
    mutex_lock(&devices.lock);
    for (int i = 0; i < DEVICES_MAX && slot < 0; i++)
        if (devices.slots[i].state == SLOT_FREE)
            slot = i;
    if (slot >= 0) {
        devices.slots[slot].state = SLOT_OPENING;
        devices.slots[slot].dev = dev;
        devices.slots[slot].handle = ++devices.next;
        devices.slots[slot].users = 0;
    }
    mutex_unlock(&devices.lock);
    return slot;
}

static void set_slot(int slot, enum slot_state state)
{
    mutex_lock(&devices.lock);
    devices.slots[slot].state = state;
    if (state == SLOT_FREE)
        devices.slots[slot].dev = NULL;
    mutex_unlock(&devices.lock);
}

/* No page of it is in use. */
static void remove_pagemap(struct hmm_device *dev)
{
    if (!dev->pagemap)
        return;
    pagemap_kill(dev->pagemap);
    pagemap_wait(dev->pagemap, -1);
    pagemap_destroy(dev->pagemap);
    dev->pagemap = NULL;
}

static int open_device(struct hmm_device *dev, const union hmm_option_value *values)
{
    int r = sched_new(dev);
    if (r)
        return r;
    r = dev->driver->open(dev, values, &dev->priv);
    if (!r && !dev->pagemap) {
        dev->driver->stop(dev->priv);
        dev->driver->close(dev->priv);
        r = hmm_fail(-EINVAL, "driver %s gave no device memory (hmm_pagemap_add)", dev->driver->name);
    }
    if (r) {
        remove_pagemap(dev);
        sched_free(dev);
    } else {
        sched_open(dev);
    }
    return r;
}

int hmm_device_open(const char *spec, hmm_dev *handle)
{
    const struct hmm_driver *driver;
    union hmm_option_value values[HMM_OPTIONS_MAX];
    struct mm *mm;
    message_clear();
    if (!handle)
        return hmm_fail(-EINVAL, "hmm_device_open: the place for the handle is NULL");
    int r = spec_parse(spec, &driver, values);
    if (!r)
        r = manager_get(&mm);
    if (r)
        return r;
    struct hmm_device *dev = mem_alloc(sizeof(*dev));
    int slot = dev ? reserve_slot(dev) : -1;
    if (slot < 0) {
        r = dev ? hmm_fail(-EMFILE, "more than %d devices", DEVICES_MAX) : hmm_fail(-ENOMEM, "no memory for a device");
        goto free;
    }
    dev->mm = mm;
    dev->driver = driver;
    memcpy(dev->spec, spec, strlen(spec)); /* its length was checked; the object is zeroed */
    r = open_device(dev, values);
    if (r)
        goto release_slot;
    *handle = devices.slots[slot].handle;
    set_slot(slot, SLOT_OPEN);
    return 0;

release_slot:
    set_slot(slot, SLOT_FREE);
free:
    mem_free(dev, sizeof(*dev));
    manager_put();
    return r;
}

int hmm_pagemap_add(struct hmm_device *dev, const struct hmm_pagemap_desc *desc)
{
    if (dev->pagemap)
        return hmm_fail(-EBUSY, "device %s has its memory already", dev->driver->name);
    return pagemap_create(desc, dev, desc ? desc->priv : NULL, &dev->pagemap);
}

/* ---- close ---- */

struct home_call {
    struct call call;
    struct hmm_device *dev;
    int result;
};

static void bring_all_home(struct call *call)
{
    struct home_call *c = container_of(call, struct home_call, call);
    c->result = migrate_range_to_system(c->dev->mm, c->dev, 0, UINTPTR_MAX & BLOCK_MASK, NULL);
}

#define EVACUATE_TRIES                                                                                                         \
    100 /* of 100 ms: invalidations may wait for kernels to end at their deadlines, a device may fail and recover */

/* Everything migrates back; pages in flight or dropped settle meanwhile. */
static int evacuate(struct hmm_device *dev)
{
    int failed = 0;
    for (unsigned tries = 0; tries < EVACUATE_TRIES; tries++) {
        struct home_call c = {.call.fn = bring_all_home, .dev = dev};
        manager_call(&c.call);
        int r = pagemap_wait(dev->pagemap, 100000000);
        if (!r)
            return 0;
        if (c.result == -ENOMEM)
            return hmm_fail(c.result, "%llu pages of device %s could not be brought home: %s; free memory, then close it again",
                            (unsigned long long)pagemap_used(dev->pagemap), dev->driver->name, hmm_strerror(c.result));
        failed = c.result;
    }
    if (failed)
        return hmm_fail(failed, "%llu pages of device %s could not be brought home: %s; close it again later",
                        (unsigned long long)pagemap_used(dev->pagemap), dev->driver->name, hmm_strerror(failed));
    return hmm_fail(-EBUSY, "%llu pages of device %s are pinned or in use; close it again later",
                    (unsigned long long)pagemap_used(dev->pagemap), dev->driver->name);
}

static void wait_users(int slot)
{
    for (uint32_t n; (n = __atomic_load_n(&devices.slots[slot].users, __ATOMIC_ACQUIRE)) != 0;)
        futex_wait(&devices.slots[slot].users, n, -1);
}

int hmm_device_close(hmm_dev handle)
{
    int r = api_enter();
    if (r)
        return r;
    mutex_lock(&devices.lock);
    int slot = handle > 0 ? find_slot(handle) : -1;
    enum slot_state state = slot >= 0 ? devices.slots[slot].state : SLOT_FREE;
    bool closable = state == SLOT_OPEN || state == SLOT_STUCK;
    if (closable)
        devices.slots[slot].state = SLOT_CLOSING;
    mutex_unlock(&devices.lock);
    if (!closable)
        return hmm_fail(-ENODEV, "device handle %d is not open (closed before, or never opened)", handle);
    struct hmm_device *dev = devices.slots[slot].dev;
    if (state == SLOT_OPEN) {
        /* A handler might touch a page whose way home needs a lock that the driver has, or that of another device whose jobs start. */
        signals_block();
        sched_stop(dev);
        dev->driver->stop(dev->priv);
        signals_unblock();
        sched_wait(dev);
        pagemap_kill(dev->pagemap);
    }
    wait_users(slot);
    r = evacuate(dev);
    if (r) {
        set_slot(slot, SLOT_STUCK);
        return r;
    }
    remove_pagemap(dev); /* before its memory goes: the address may be another device's at once */
    dev->driver->close(dev->priv);
    sched_free(dev);
    set_slot(slot, SLOT_FREE);
    mem_free(dev, sizeof(*dev));
    manager_put();
    return 0;
}

/* ---- asking ---- */

int hmm_device_info(hmm_dev handle, struct hmm_device_info *info)
{
    int r = api_enter();
    if (r)
        return r;
    if (!info || info->size < sizeof(info->size))
        return hmm_fail(-EINVAL, "hmm_device_info: set info->size to sizeof(struct hmm_device_info)");
    struct hmm_device *dev = device_get(handle);
    if (!dev)
        return -ENODEV;
    struct hmm_device_info all = {
        .size = info->size,
        .page_size = (uint32_t)pagemap_granule(dev->pagemap),
        .memory_bytes = dev->pagemap->desc.pages << os_page_shift(),
        .used_bytes = pagemap_used(dev->pagemap) << os_page_shift(),
        .jobs = sched_jobs(dev),
        .lost = device_is_lost(dev),
    };
    strncpy(all.name, dev->driver->name, sizeof(all.name) - 1);
    memcpy(all.spec, dev->spec, sizeof(all.spec));
    device_put(dev);
    memcpy(info, &all, info->size < sizeof(all) ? info->size : sizeof(all));
    return 0;
}

/* ---- what core provides to drivers ---- */

const uint32_t *hmm_event_gate(struct hmm_device *dev)
{
    return dev->mm->gate;
}

int hmm_event_gate_fd(struct hmm_device *dev)
{
    return dev->mm->gate_fd;
}

void hmm_event_sync(struct hmm_device *dev)
{
    mm_sync(dev->mm);
}

int hmm_device_fault(struct hmm_device *dev, uintptr_t addr, unsigned flags)
{
    return mirror_device_fault(dev, addr, flags);
}

int hmm_range_snapshot(struct hmm_device *dev, uintptr_t start, uintptr_t end, uint64_t *pfns)
{
    if (start >= end || (start | end) & (os_page_size() - 1) || (start & BLOCK_MASK) != ((end - 1) & BLOCK_MASK))
        return -EINVAL;
    return mirror_snapshot(dev, start, end, pfns);
}

/* To system calls a page whose content is lost looks like one that is not there. */
static int64_t bus_result(struct hmm_device *dev, uintptr_t addr, int64_t r)
{
    return r == -EFAULT && mirror_is_poisoned(dev, addr) ? -EHWPOISON : r;
}

int64_t hmm_bus_read(struct hmm_device *dev, uintptr_t addr, void *buf, size_t len)
{
    return bus_result(dev, addr, os->vm_read(addr, buf, len));
}

int64_t hmm_bus_write(struct hmm_device *dev, uintptr_t addr, const void *buf, size_t len)
{
    return bus_result(dev, addr, os->vm_write(addr, buf, len));
}

/* A range that the device does not have: a bug of the driver, which must not become one of core. */
static bool has_pages(struct hmm_device *dev, uint64_t page, uint64_t count)
{
    if (dev->pagemap && page < dev->pagemap->desc.pages && count <= dev->pagemap->desc.pages - page)
        return true;
    hmm_log(HMM_LOG_ERROR, "driver %s names %llu device pages from %llu on, which do not exist", dev->driver->name,
            (unsigned long long)count, (unsigned long long)page);
    return false;
}

void hmm_page_get(struct hmm_device *dev, uint64_t page, uint64_t count)
{
    if (!has_pages(dev, page, count))
        return;
    for (uint64_t i = 0; i < count; i++)
        pagemap_get(dev->pagemap, page + i);
}

void hmm_page_put(struct hmm_device *dev, uint64_t page, uint64_t count)
{
    if (has_pages(dev, page, count))
        pagemap_put(dev->pagemap, page, count);
}

int hmm_notifier_insert(struct hmm_device *dev, struct hmm_notifier *n, uintptr_t start, uintptr_t end,
                        const struct hmm_notifier_ops *ops)
{
    if (start >= end || (start | end) & (os_page_size() - 1) || !ops || !ops->invalidate)
        return -EINVAL;
    *n = (struct hmm_notifier){.start = start, .end = end, .dev = dev, .ops = ops};
    return notifier_insert(&dev->mm->notifiers, n);
}

void hmm_notifier_remove(struct hmm_notifier *n)
{
    notifier_remove(&n->dev->mm->notifiers, n);
}

uint64_t hmm_notifier_read_begin(struct hmm_notifier *n)
{
    return notifier_read_begin(&n->dev->mm->notifiers, n);
}

void *hmm_mem_alloc(size_t bytes)
{
    return mem_alloc(bytes);
}

void hmm_mem_free(void *ptr, size_t bytes)
{
    if (ptr)
        mem_free(ptr, bytes);
}
