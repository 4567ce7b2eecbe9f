/* SPDX-License-Identifier: MIT */
/* Devices: handles, opening, closing, and what core provides to a driver about its device. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "api/close.h"
#include "api/drivers.h"
#include "api/manager.h"
#include "base/alloc.h"
#include "base/error.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "job/job.h"
#include "mirror/mirror.h"

/* Ending: nothing is left of it but the driver's close(). */
enum slot_state { SLOT_FREE, SLOT_OPENING, SLOT_OPEN, SLOT_CLOSING, SLOT_STUCK, SLOT_ENDING };

/* Handles are serial numbers: a stale one never names another device. */
static struct {
    struct mutex lock; /* RANK_DRIVER: held for moments, only pagemap locks are taken under it */
    hmm_dev next;
    struct {
        enum slot_state state;
        hmm_dev handle;
        struct hmm_device *dev;
        uint32_t users; /* futex */
        struct closing closing;
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

static int not_open(hmm_dev handle, enum slot_state state)
{
    if (state == SLOT_STUCK)
        return hmm_fail(-ENODEV, "device handle %d is half closed: hmm_device_close() gave up; close it again", handle);
    if (state == SLOT_CLOSING || state == SLOT_ENDING)
        return hmm_fail(-ENODEV, "device handle %d is being closed", handle);
    return hmm_fail(-ENODEV, "device handle %d is not open (closed before, or never opened)", handle);
}

struct hmm_device *device_get(hmm_dev handle)
{
    struct hmm_device *dev = NULL;
    mutex_lock(&devices.lock);
    int i = handle > 0 ? find_slot(handle) : -1;
    enum slot_state state = i >= 0 ? devices.slots[i].state : SLOT_FREE;
    if (i >= 0 && devices.slots[i].state == SLOT_OPEN) {
        dev = devices.slots[i].dev;
        devices.slots[i].users++;
    }
    mutex_unlock(&devices.lock);
    if (!dev)
        not_open(handle, state);
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

struct hmm_device *hmm_device_of(hmm_dev handle)
{
    struct hmm_device *dev = api_enter() ? NULL : device_get(handle);
    if (dev)
        device_put(dev);
    return dev;
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
        if (devices.slots[i].state == SLOT_OPEN || devices.slots[i].state == SLOT_CLOSING ||
            devices.slots[i].state == SLOT_STUCK)
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

/* Its notifiers may be there, and what they use is freed by close(): as in closing, none is called any more by then. */
static int end_without_memory(struct hmm_device *dev)
{
    struct notifier_ending ending;
    struct notifier_overdue o;
    dev->driver->stop(dev->priv);
    if (!mutate("open-ignore"))
        notifier_ignore(&dev->mm->notifiers, &ending, dev);
    while (notifier_overdue(&dev->mm->notifiers, dev, 0, &o))
        os_sleep(1000000);
    dev->driver->close(dev->priv);
    if (!mutate("open-ignore"))
        notifier_forget(&dev->mm->notifiers, &ending);
    return hmm_fail(-EINVAL, "driver %s gave no device memory (hmm_pagemap_add)", dev->driver->name);
}

static int open_device(struct hmm_device *dev, const union hmm_option_value *values)
{
    int r = sched_new(dev);
    if (r)
        return r;
    r = dev->driver->open(dev, values, &dev->priv);
    if (!r && !dev->pagemap)
        r = end_without_memory(dev);
    if (r) {
        mirrors_end(dev);
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
    manager_opened();
    set_slot(slot, SLOT_OPEN);
    return 0;

release_slot:
    set_slot(slot, SLOT_FREE);
free:
    mem_free(dev, sizeof(*dev));
    manager_put(true);
    return r;
}

int hmm_pagemap_add(struct hmm_device *dev, const struct hmm_pagemap_desc *desc)
{
    if (dev->pagemap)
        return hmm_fail(-EBUSY, "device %s has its memory already", dev->driver->name);
    return pagemap_create(desc, dev, desc ? desc->priv : NULL, &dev->pagemap);
}

/* ---- close ---- */

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
        return not_open(handle, state);
    struct hmm_device *dev = devices.slots[slot].dev;
    if (state == SLOT_OPEN)
        closing_init(&devices.slots[slot].closing, dev, &devices.slots[slot].users);
    r = closing_run(&devices.slots[slot].closing);
    if (r) {
        set_slot(slot, SLOT_STUCK);
        return r;
    }
    set_slot(slot, SLOT_ENDING);  /* nobody looks at its pages any more, see devices_each() */
    pagemap_retire(dev->pagemap); /* before its memory goes: the address may be another device's at once */
    SEQ_POINT("device-emptied");
    dev->driver->close(dev->priv); /* until it has returned, threads of the driver may ask for pages */
    mirrors_end(dev); /* what the driver has left behind is not told of any more before its notifiers are called again */
    closing_end(&devices.slots[slot].closing);
    remove_pagemap(dev);
    sched_free(dev);
    bool counted = devices.slots[slot].closing.counted;
    set_slot(slot, SLOT_FREE);
    mem_free(dev, sizeof(*dev));
    manager_put(counted);
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
        .transit_bytes = __atomic_load_n(&dev->transit, __ATOMIC_RELAXED) << os_page_shift(),
        .limit_bytes = pagemap_limit(dev->pagemap) << os_page_shift(),
        .mirrored_bytes = notifier_bytes(&dev->mm->notifiers, dev),
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

/* The kernel is asked through descriptors that only library threads have: for a thread of the program one of them does it. */
struct range_call {
    struct call call;
    struct hmm_device *dev;
    struct hmm_fault_range *range;
    bool once;
    int64_t timeout_ns;
    int result;
    char message[256];
};

static void run_range_call(struct call *call)
{
    struct range_call *c = container_of(call, struct range_call, call);
    message_clear();
    c->result = c->once ? mirror_range_fault(c->dev, c->range) : mirror_range_fault_timeout(c->dev, c->range, c->timeout_ns);
    snprintf(c->message, sizeof(c->message), "%s", hmm_last_message());
}

/* Of the library's own memory: other threads look at the record under locks, when the program's stack may be away. */
static int range_call(struct hmm_device *dev, struct hmm_fault_range *range, bool once, int64_t timeout_ns)
{
    struct range_call *c = mem_alloc(sizeof(*c));
    if (!c)
        return hmm_fail(-ENOMEM, "no memory for a range fault");
    *c = (struct range_call){.call.fn = run_range_call, .dev = dev, .range = range, .once = once, .timeout_ns = timeout_ns};
    manager_call(&c->call);
    int r = c->message[0] ? hmm_fail(c->result, "%s", c->message) : c->result;
    mem_free(c, sizeof(*c));
    return r;
}

int hmm_range_fault(struct hmm_device *dev, struct hmm_fault_range *range)
{
    if (thread_in_library())
        return mirror_range_fault(dev, range);
    return range_call(dev, range, true, 0);
}

int hmm_range_fault_timeout(struct hmm_device *dev, struct hmm_fault_range *range, int64_t timeout_ns)
{
    if (thread_in_library())
        return mirror_range_fault_timeout(dev, range, timeout_ns);
    return range_call(dev, range, false, timeout_ns);
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
    if (!dev || !n)
        return hmm_fail(-EINVAL, "hmm_notifier_insert: %s is NULL", dev ? "the notifier" : "the device");
    return notifier_insert(&dev->mm->notifiers, n, dev, start, end, ops);
}

bool hmm_notifier_any(struct hmm_device *dev, uintptr_t start, uintptr_t end)
{
    return notifier_any(&dev->mm->notifiers, start, end);
}

static struct notifier_tree *tree_of(const struct hmm_notifier *n)
{
    struct hmm_device *dev = n ? __atomic_load_n(&n->dev, __ATOMIC_ACQUIRE) : NULL;
    return dev ? &dev->mm->notifiers : NULL;
}

int hmm_notifier_remove(struct hmm_notifier *n)
{
    struct notifier_tree *t = tree_of(n);
    return t ? notifier_remove(t, n) : hmm_fail(-ENOENT, "hmm_notifier_remove: it is not inserted (removed before?)");
}

uint64_t hmm_notifier_read_begin(struct hmm_notifier *n)
{
    struct notifier_tree *t = tree_of(n);
    return t ? notifier_read_begin(t, n) : 0;
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
