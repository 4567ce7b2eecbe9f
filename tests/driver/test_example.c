/* SPDX-License-Identifier: MIT */
/*
 * The retry loop of the example driver `tiny`, while the CPU takes pages away all the time: nothing may be written to a page that has
 * left. The driver's call of hmm_event_sync() reaches this file first, and takes its time: that is after the driver has been told where the
 * page is, and before it takes the lock under which it looks whether that is still so.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <hmm/driver.h>

#include "support.h"

#define BYTES ((size_t)48 * 4096)
#define FILLS 20

static char *memory;
static uint32_t stop_touching;

static uint32_t syncs;

__attribute__((visibility("default"))) void hmm_event_sync(struct hmm_device *dev)
{
    static void (*next)(struct hmm_device *);
    struct timespec t = {.tv_nsec = 100000};
    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "hmm_event_sync");
    __atomic_fetch_add(&syncs, 1, __ATOMIC_RELAXED);
    next(dev);
    nanosleep(&t, NULL);
}

static void *touch(void *arg)
{
    uint64_t random = 9;
    (void)arg;
    while (!__atomic_load_n(&stop_touching, __ATOMIC_RELAXED))
        ((volatile char *)memory)[random_next(&random) % BYTES];
    return NULL;
}

static void every_fill_arrives(void **state)
{
    pthread_t toucher;
    (void)state;
    setenv("HMM_DRIVER_PATH", MODULES, 1);
    hmm_dev dev = open_spec("tiny");
    memory = map_pages(BYTES);
    memset(memory, 255, BYTES);
    stop_touching = 0;
    uint64_t before = stats_now().device_faults;
    assert_int_equal(pthread_create(&toucher, NULL, touch, NULL), 0);
    for (unsigned n = 0; n < FILLS; n++) {
        device_fill(dev, memory + n, (uint8_t)n, BYTES - 2 * n);
        for (size_t i = 0; i < BYTES - 2 * n; i += 512)
            if ((uint8_t)memory[n + i] != (uint8_t)n)
                fail_msg("fill %u did not arrive at byte %zu", n, i);
    }
    __atomic_store_n(&stop_touching, 1, __ATOMIC_RELAXED);
    pthread_join(toucher, NULL);
    assert_true(stats_now().device_faults > before + FILLS); /* it was the device that wrote */
    assert_true(syncs > FILLS);                              /* and this file was asked */
    unmap_pages(memory, BYTES);
}

static void what_it_cannot_write_is_said(void **state)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    hmm_fence *fence;
    (void)state;
    hmm_dev dev = open_spec("tiny");
    char *p = map_pages(4 * page_size());
    memset(p, 1, 4 * page_size());
    assert_int_equal(munmap(p + 2 * page_size(), page_size()), 0);
    assert_int_equal(hmm_job_fill(dev, p + 5, 9, 3 * page_size(), &fence), 0);
    info = finish(fence);
    assert_int_equal(info.status, -EFAULT);
    assert_int_equal(info.address, (uintptr_t)p + 2 * page_size());
    assert_int_equal(p[2 * page_size() - 1], 9);
    assert_int_equal(p[4], 1);
    char *shared = map_shared();
    assert_int_equal(hmm_job_fill(dev, shared, 3, 100, &fence), 0); /* memory that stays: over the bus */
    must(fence);
    assert_int_equal(shared[99], 3);
    assert_int_equal(hmm_job_crc32c(dev, p, 8, &fence), -EOPNOTSUPP); /* fills are all that it can */
    unmap_pages(shared, page_size());
    unmap_pages(p, 2 * page_size());
    unmap_pages(p + 3 * page_size(), page_size());
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(every_fill_arrives, setup_none, teardown),
        cmocka_unit_test_setup_teardown(what_it_cannot_write_is_said, setup_none, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
