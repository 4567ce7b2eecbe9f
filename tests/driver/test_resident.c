/* SPDX-License-Identifier: MIT */
/* Memory that left is really given back, and what is in transit stays within its bound: read from the kernel's own counters. */
#include "support.h"

#include <pthread.h>

#define BYTES (48 * MIB)
#ifdef __SANITIZE_ADDRESS__
#define SLACK                                                                                                                  \
    (24 * MIB) /* its shadow is an eighth of all memory that is ever touched, staging slots and device memory included */
#else
#define SLACK (6 * MIB) /* tables, stacks, what other parts of the process touch meanwhile */
#endif
#define STAGING (8 * MIB)

/* Anonymous resident memory; device memory is a shared mapping and does not count. */
static uint64_t resident(void)
{
    char line[128];
    uint64_t kib = 0;
    FILE *f = fopen("/proc/self/status", "r");
    assert_non_null(f);
    while (fgets(line, sizeof(line), f))
        if (sscanf(line, "RssAnon: %lu kB", &kib) == 1)
            break;
    fclose(f);
    assert_true(kib > 0);
    return kib << 10;
}

static struct hmm_stats stats(void)
{
    struct hmm_stats s = {.size = sizeof(s)};
    assert_int_equal(hmm_stats(&s), 0);
    return s;
}

static void leaves_and_returns(char *p)
{
    struct hmm_migrate_result out = {.size = sizeof(out)};
    for (size_t i = 0; i < BYTES; i += 64)
        p[i] = (char)(i >> 6 | 1);
    uint64_t before = resident();
    assert_int_equal(hmm_migrate_to_device(device, p, BYTES, &out), 0);
    assert_int_equal(out.moved, BYTES / page_size());
    uint64_t away = resident();
    if (away + BYTES > before + SLACK)
        fail_msg("%lu of %lu KiB that left are still resident", (away + BYTES - before) >> 10, (unsigned long)BYTES >> 10);
    assert_int_equal(stats().staging_bytes, 0);
    assert_int_equal(hmm_migrate_to_system(p, BYTES, NULL), 0);
    uint64_t home = resident();
    if (home > before + SLACK || home + SLACK < before)
        fail_msg("%lu KiB are resident, of %lu before", home >> 10, before >> 10);
    for (size_t i = 0; i < BYTES; i += 64)
        if (p[i] != (char)(i >> 6 | 1))
            fail_msg("byte %zu is %d", i, p[i]);
}

static void small_pages_that_left_are_given_back(void **state)
{
    (void)state;
    char *p = map_pages(BYTES);
    leaves_and_returns(p);
    leaves_and_returns(p); /* staging was given back the first time, too */
    unmap_pages(p, BYTES);
}

static void huge_pages_that_left_are_given_back(void **state)
{
    (void)state;
    char *p = map_huge(BYTES);
    leaves_and_returns(p);
    leaves_and_returns(p);
    unmap_pages(p, BYTES);
}

static void *watch(void *arg)
{
    uint64_t *most = arg;
    while (__atomic_load_n(&most[1], __ATOMIC_ACQUIRE) == 0) {
        uint64_t now = resident();
        if (now > most[0])
            most[0] = now;
    }
    return NULL;
}

/* The bound is the configured one, also with several times as much on its way. */
static void memory_in_transit_is_bounded(void **state)
{
    (void)state;
    close_device(device);
    struct hmm_config c = {.size = sizeof(c), .staging_bytes = STAGING};
    assert_int_equal(hmm_configure(&c), 0);
    device = open_with(NULL);
    char *p = map_pages(BYTES);
    memset(p, 7, BYTES);
    uint64_t before = resident(), most[2] = {0, 0};
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, watch, most), 0);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(hmm_migrate_to_device(device, p, BYTES, NULL), 0);
        assert_int_equal(hmm_migrate_to_system(p, BYTES, NULL), 0);
    }
    __atomic_store_n(&most[1], 1, __ATOMIC_RELEASE);
    pthread_join(t, NULL);
    assert_true(most[0] > 0);
    if (most[0] > before + STAGING + SLACK)
        fail_msg("%lu KiB more than before were resident, staging is %lu", (most[0] - before) >> 10,
                 (unsigned long)STAGING >> 10);
    unmap_pages(p, BYTES);
    close_device(device);
    c.staging_bytes = 0;
    assert_int_equal(hmm_configure(&c), 0);
    device = open_with(NULL);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(small_pages_that_left_are_given_back),
        TEST(huge_pages_that_left_are_given_back),
        TEST(memory_in_transit_is_bounded),
    };
    return cmocka_run_group_tests_name("resident", tests, NULL, NULL);
}
