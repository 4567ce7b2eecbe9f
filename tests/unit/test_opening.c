/* SPDX-License-Identifier: MIT */
/*
 * A device that is being opened, by a driver whose open() takes its time, fails, or gives no memory: what the program announces
 * meanwhile, and closing of the others.
 */
#include "watcher.h"

#include <hmm/driver.h>

static struct {
    uint32_t inside;   /* open() runs */
    uint32_t go_on;    /* it does not return before */
    bool fails, empty; /* EMPTY: it succeeds, and gives no memory */
    char *watched;     /* of it: one MiB */
    struct watcher watcher;
    unsigned told_in_close;
} odd;

static int odd_open(struct hmm_device *d, const union hmm_option_value *values, void **priv)
{
    (void)values;
    *priv = &odd;
    __atomic_store_n(&odd.inside, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 5000 && !__atomic_load_n(&odd.go_on, __ATOMIC_SEQ_CST); i++)
        usleep(1000);
    if (odd.fails)
        return hmm_fail(-EIO, "the device does not answer");
    if (odd.watched) {
        memset(&odd.watcher, 0, sizeof(odd.watcher));
        pthread_mutex_init(&odd.watcher.lock, NULL);
        uintptr_t at = (uintptr_t)odd.watched;
        assert_int_equal(hmm_notifier_insert(d, &odd.watcher.notifier, at, at + MIB, &watcher_ops), 0);
    }
    return odd.empty ? 0 : hmm_pagemap_add(d, &(struct hmm_pagemap_desc){.type = HMM_PAGEMAP_PRIVATE, .pages = 16});
}

static void odd_stop(void *priv)
{
    (void)priv;
}

static void odd_close(void *priv)
{
    (void)priv;
    if (!odd.watched)
        return;
    hmm_munmap(odd.watched, MIB);
    odd.told_in_close = odd.watcher.n;
    hmm_notifier_remove(&odd.watcher.notifier);
}

static int odd_copy(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    (void)priv, (void)kind, (void)v, (void)n, (void)fence;
    return -EIO;
}

static int odd_clear(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    (void)priv, (void)v, (void)n, (void)fence;
    return -EIO;
}

static const struct hmm_driver odd_driver = {
    .size = sizeof(struct hmm_driver),
    .abi = HMM_DRIVER_ABI,
    .name = "odd",
    .description = "opens as a test says",
    .open = odd_open,
    .stop = odd_stop,
    .close = odd_close,
    .copy = odd_copy,
    .clear = odd_clear,
};

/* In place of those that the library is built with. */
extern const struct hmm_driver soft_driver;
const struct hmm_driver *const hmm_builtin_drivers[] = {&soft_driver, &odd_driver, NULL};

static int set_up(void **state)
{
    memset(&odd, 0, sizeof(odd));
    setenv("HMM_DEBUG", "patience=1000", 1);
    return watcher_set_up(state);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, watcher_tear_down)

static hmm_dev opened;

static void *open_odd(void *arg)
{
    (void)arg;
    return (void *)(intptr_t)hmm_device_open("odd", &opened);
}

static pthread_t start_opening(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, open_odd, NULL);
    while (!__atomic_load_n(&odd.inside, __ATOMIC_SEQ_CST))
        usleep(100);
    return thread;
}

static int finish_opening(pthread_t thread)
{
    void *r;
    __atomic_store_n(&odd.go_on, 1, __ATOMIC_SEQ_CST);
    pthread_join(thread, &r);
    return (int)(intptr_t)r;
}

/* Else whoever is last would wait for the change without an end: the close, or the open that fails. */
static void a_close_waits_for_changes_although_a_device_is_being_opened(void **state)
{
    (void)state;
    static struct watcher w;
    struct hmm_change change;
    char *p = map_alone(2 * MIB);
    watch(&w, p, MIB);
    hmm_change_begin(&change, HMM_CHANGE_PROTECT, p, MIB);
    unwatch(&w);
    odd.fails = true;
    pthread_t thread = start_opening();
    int closed = hmm_device_close(handle);
    int failed = finish_opening(thread);
    int again = hmm_device_close(handle);
    hmm_change_end(&change);
    assert_int_equal(closed, -EBUSY);
    assert_int_equal(failed, -EIO);
    assert_int_equal(again, -EBUSY);
    assert_int_equal(hmm_device_close(handle), 0);
    assert_int_equal(watcher_set_up(NULL), 0);
    munmap(p, 2 * MIB);
}

/* Changes are announced to it, although the last close had begun to do without. */
static void a_device_that_opens_during_the_last_close_is_told_of_changes(void **state)
{
    (void)state;
    static struct watcher w;
    struct hmm_change change;
    char *p = map_alone(2 * MIB);
    watch(&w, p, MIB);
    hmm_change_begin(&change, HMM_CHANGE_PROTECT, p, MIB);
    unwatch(&w);
    pthread_t thread = start_opening();
    assert_int_equal(hmm_device_close(handle), -EBUSY);
    assert_int_equal(finish_opening(thread), 0);
    assert_int_equal(hmm_device_close(handle), 0); /* another is there, which will wait */
    dev = device_get(handle = opened);
    device_put(dev);
    watch(&w, p, 2 * MIB);
    assert_int_equal(hmm_mprotect(p, 2 * MIB, PROT_READ), 0);
    assert_int_equal(watcher_saw(&w, HMM_EVENT_PROTECTION_VMA, p, 2 * MIB), 1);
    unwatch(&w);
    assert_int_equal(hmm_device_close(handle), -EBUSY);
    hmm_change_end(&change);
    munmap(p, 2 * MIB);
}

/* What callbacks use is freed by close(). */
static void no_callback_begins_in_the_close_of_a_driver_that_gave_no_memory(void **state)
{
    (void)state;
    odd.watched = map_alone(MIB);
    odd.empty = true;
    odd.go_on = 1;
    assert_int_equal(hmm_device_open("odd", &opened), -EINVAL);
    assert_int_equal(odd.told_in_close, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_close_waits_for_changes_although_a_device_is_being_opened),
        TEST(a_device_that_opens_during_the_last_close_is_told_of_changes),
        TEST(no_callback_begins_in_the_close_of_a_driver_that_gave_no_memory),
    };
    return cmocka_run_group_tests_name("opening", tests, NULL, NULL);
}
