/* SPDX-License-Identifier: MIT */
/* For tests of what the program does: a device of the whole library, a notifier of it that remembers its events, and may hold them up. */
#ifndef TESTS_UNIT_WATCHER_H
#define TESTS_UNIT_WATCHER_H

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "api/manager.h"
#include "debug/inject.h"
#include "live.h"

#define MIB ((size_t)1 << 20)
#define WATCHER_EVENTS 64

struct watcher {
    struct hmm_notifier notifier;
    pthread_mutex_t lock;
    struct hmm_event event[WATCHER_EVENTS];
    unsigned n;
    uint32_t hold; /* atomic: while it is 1, a callback that may wait does, and one that may not refuses */
    uint32_t held; /* callbacks that wait now */
};

static hmm_dev handle;
static struct hmm_device *dev;
static size_t page;
static unsigned errors_logged;

static int watcher_told(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct watcher *w = (struct watcher *)n;
    pthread_mutex_lock(&w->lock);
    if (event->type != HMM_EVENT_MIGRATE && w->n < WATCHER_EVENTS)
        w->event[w->n++] = *event;
    pthread_mutex_unlock(&w->lock);
    bool hold = __atomic_load_n(&w->hold, __ATOMIC_ACQUIRE) && event->type != HMM_EVENT_MIGRATE;
    if (hold && (event->brief || !event->blockable))
        return -EAGAIN;
    __atomic_fetch_add(&w->held, hold, __ATOMIC_ACQ_REL);
    while (hold && __atomic_load_n(&w->hold, __ATOMIC_ACQUIRE))
        usleep(500);
    __atomic_fetch_sub(&w->held, hold, __ATOMIC_ACQ_REL);
    return 0;
}

static const struct hmm_notifier_ops watcher_ops = {.invalidate = watcher_told};

static inline void watch(struct watcher *w, const void *at, size_t len)
{
    memset(w, 0, sizeof(*w));
    pthread_mutex_init(&w->lock, NULL);
    assert_int_equal(hmm_notifier_insert(dev, &w->notifier, (uintptr_t)at, (uintptr_t)at + len, &watcher_ops), 0);
}

static inline void unwatch(struct watcher *w)
{
    assert_int_equal(hmm_notifier_remove(&w->notifier), 0);
}

static inline unsigned watcher_saw(struct watcher *w, enum hmm_event_type type, const void *at, size_t len)
{
    unsigned n = 0;
    pthread_mutex_lock(&w->lock);
    for (unsigned i = 0; i < w->n; i++)
        n += w->event[i].type == type && w->event[i].start == (uintptr_t)at && w->event[i].end == (uintptr_t)at + len;
    pthread_mutex_unlock(&w->lock);
    return n;
}

/* ---- life ---- */

static inline void watcher_log(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level <= HMM_LOG_WARNING)
        fprintf(stderr, "library: %s\n", line);
    errors_logged += level == HMM_LOG_ERROR;
}

static inline int watcher_set_up(void **state)
{
    (void)state;
    page = hmm_page_size();
    errors_logged = 0;
    alarm(50);
    hmm_set_log(watcher_log, NULL);
    if (hmm_device_open("soft:memory=16M,engines=1", &handle)) {
        fprintf(stderr, "open: %s\n", hmm_last_message());
        return -1;
    }
    dev = device_get(handle);
    device_put(dev);
    inject_points_on = 1;
    return 0;
}

static inline int watcher_tear_down(void **state)
{
    (void)state;
    inject_point_hook = NULL;
    inject_points_on = 0;
    int r = hmm_audit();
    if (r > 0)
        fprintf(stderr, "audit: %s\n", hmm_last_message());
    hmm_device_close(handle);
    hmm_set_log(NULL, NULL);
    alarm(0);
    return errors_logged || r ? -1 : 0;
}

#define WATCHER_TEST(f) cmocka_unit_test_setup_teardown(f, watcher_set_up, watcher_tear_down)

/* ---- memory, and what of it is on the device ---- */

static inline char *mapped(size_t bytes, uint64_t seed)
{
    char *p = live_reserve(bytes);
    assert_true(live_map(p, bytes));
    live_fill(p, bytes, seed);
    return p;
}

static inline uint8_t *copy_of(const char *p, size_t bytes)
{
    uint8_t *c = malloc(bytes);
    memcpy(c, p, bytes);
    return c;
}

static inline void to_device(const void *at, size_t len)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(handle, at, len, &res), 0);
    assert_int_equal(res.moved + res.already, len / page);
}

static inline size_t on_device(const void *at, size_t len)
{
    size_t n = 0, pages = len / page;
    struct hmm_page_info *info = calloc(pages, sizeof(*info));
    assert_int_equal(hmm_range_query(at, len, info, pages), pages);
    for (size_t i = 0; i < pages; i++)
        n += info[i].state == HMM_PAGE_DEVICE;
    free(info);
    return n;
}

static inline struct hmm_fence_info finish(hmm_fence *fence)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    hmm_fence_wait(fence, -1);
    assert_int_equal(hmm_fence_info(fence, &info), 0);
    hmm_fence_put(fence);
    return info;
}

static inline uint32_t device_crc(const void *at, size_t len)
{
    hmm_fence *fence;
    assert_int_equal(hmm_job_crc32c(handle, at, len, &fence), 0);
    struct hmm_fence_info info = finish(fence);
    if (info.status)
        fail_msg("the device cannot read %p: %d, %s", at, info.status, info.message);
    return (uint32_t)info.result;
}

static inline uint64_t used_bytes(void)
{
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(handle, &info), 0);
    return info.used_bytes;
}

static inline struct hmm_stats stats_now(void)
{
    struct hmm_stats s = {.size = sizeof(s)};
    assert_int_equal(hmm_stats(&s), 0);
    return s;
}

#endif
