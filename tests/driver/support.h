/* SPDX-License-Identifier: MIT */
/*
 * What the driver suite has in common. The suite stands on the public interface only and runs over any driver that runs jobs: the
 * environment variable HMM_TEST_DEVICE names the device, "soft:memory=64M" where it is not set.
 *
 * Every test opens its device in setup; teardown audits every structure, closes, and fails when the library logged an error.
 * Expected values come from plain arrays and from the kernel's own reports, never from the library.
 */
#ifndef TESTS_DRIVER_SUPPORT_H
#define TESTS_DRIVER_SUPPORT_H

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include <hmm/hmm.h>

#include "common/oracle.h"
#include "common/uapi.h"

#define BLOCK ((size_t)2 << 20)
#define MIB ((size_t)1 << 20)
#define JOB_SECONDS 60 /* no job of the suite takes that long */

/* What each file of the suite defines instead of main(): the file is built as a shared object, because a device whose engines are in
 * another process loads kernels from one. */
__attribute__((visibility("default"))) int test_main(void);

/* ---- devices ---- */

extern hmm_dev device; /* the test's own */

/* "memory=8M", "flag" etc. over the spec of the environment, or over the device that it wraps; valid until the thread's next call. */
const char *spec_with(const char *options);
hmm_dev open_with(const char *options);
hmm_dev open_spec(const char *spec);
/* Audits, then closes. */
void close_device(hmm_dev dev);
/* The whole program, all devices. */
void assert_audit_clean(void);

int setup_none(void **state); /* logs are watched; no device */
int setup_device(void **state);
int teardown(void **state);
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup_device, teardown)
#define TEST_WITHOUT_DEVICE(f) cmocka_unit_test_setup_teardown(f, setup_none, teardown)
/* This test loses data with a device, which the library logs as an error: teardown allows it. */
void expect_errors(void);
/* Lines logged at this level since setup. */
unsigned logged(enum hmm_log_level level);

/* ---- jobs ---- */

/* Waits, drops the fence. Fails the test after JOB_SECONDS. */
struct hmm_fence_info finish(hmm_fence *fence);
/* The same for a kernel of this device; deadline 0: the default. */
hmm_fence *launch(hmm_dev dev, hmm_kernel kernel, const void *arg, size_t size, uint32_t deadline_ms);
struct hmm_fence_info run_kernel(hmm_dev dev, hmm_kernel kernel, const void *arg, size_t size);
/* The result of a job that must succeed. */
uint64_t must(hmm_fence *fence);
uint64_t must_run(hmm_dev dev, hmm_kernel kernel, const void *arg, size_t size);
/* Kernels of the suite run on threads of this process; else elsewhere, on a device that is given a kernel by name. Asks `device`. */
bool engines_in_this_process(void);
/* Skips the test where the device of the suite has no page faults: it holds the ranges of a job until its end, and uses everything else
 * over the bus. */
void skip_without_device_faults(void);
uint32_t device_crc(hmm_dev dev, const void *src, size_t len);
void device_copy(hmm_dev dev, void *dst, const void *src, size_t len);
void device_fill(hmm_dev dev, void *dst, uint8_t value, size_t len);

/*
 * Flags between kernels and the test, in a file that no device can take: a kernel cannot reach them through its accessor without
 * ending its span, and may run in another process. So it gets this struct in its argument block, and opens the file for itself.
 */
struct control {
    volatile uint32_t *flags; /* the test's; of no use to a kernel */
    char path[128];
};
struct control make_control(void);
void free_control(struct control *control); /* teardown does it for a test that failed */
/* For kernels, before they take a span. Stays mapped until the process ends, because a kernel may be ended anywhere. */
volatile uint32_t *open_control(const struct control *control);

/* ---- memory ---- */

size_t page_size(void);
/* Private anonymous memory, small pages, block aligned, with one unmapped page before and behind: holes of one page, which nobody
 * else maps by chance. Freed with unmap_pages(), parts too. */
char *map_pages(size_t bytes);
/* The same of huge pages, all touched; skips the test where the system gives none. */
char *map_huge(size_t bytes);
void unmap_pages(void *ptr, size_t bytes);
/* One page of shared memory, which no device takes: kernels reach it over the bus. Freed with munmap(). */
void *map_shared(void);
void fill_random(void *ptr, size_t bytes, uint64_t seed);
/* fill_random() with this seed is there. */
void check_content(const char *p, size_t bytes, uint64_t seed);

/* One touch by a thread of its own, which is joined by the test. */
struct touch {
    pthread_t thread;
    volatile char *at;
    char value;             /* that was found */
    uint64_t took;          /* ms */
    volatile uint32_t done; /* atomic: the above is set */
};
void start_touch(struct touch *t, char *at);

/* ---- what the kernel says ---- */

size_t anon_huge_bytes(const void *ptr); /* of the mapping at ptr, by /proc/self/smaps */
unsigned thread_count(void);
unsigned descriptor_count(void);

/* ---- what the library says ---- */

struct hmm_stats stats_now(void);
uint64_t used_bytes(hmm_dev dev);
/* Until no more are used: what was dropped is free when devices have let go of it, soon and without anybody's doing. Fails the test
 * after JOB_SECONDS. */
void wait_used(hmm_dev dev, uint64_t bytes);
/* Pages of [ptr, ptr+len) in this state. */
size_t pages_in_state(const void *ptr, size_t len, enum hmm_page_state state);

uint64_t now_ms(void);
void sleep_ms(unsigned ms);
/* Waits until *word is at least value; fails the test after JOB_SECONDS. */
void wait_for(const volatile uint32_t *word, uint32_t value);

#endif
