/* SPDX-License-Identifier: MIT */
/*
 * Memory that is freed while it is on a device: its device pages are free at once, whoever gets the address next sees zeros and
 * never what stood there, and pays for it what fresh memory costs, not a fault for every page.
 */
#include <malloc.h>
#include <pthread.h>

#include "support.h"
#include "unit/maps.h"

#define DEVICE_MEMORY "memory=16M"
#define BYTES (4 * MIB)
#define ROUNDS 12
#define SMALL (64 * page)
#define LIVES 60
#define WINDOW 16 /* pages that a fault on absent managed memory gives at least, where there is so much room */

static size_t page, pages;

/* Nobody touches the memory meanwhile. */
static void wait_until_used(hmm_dev dev, uint64_t bytes)
{
    wait_used(dev, bytes);
    assert_int_equal(used_bytes(dev), bytes);
}

/* What is left to do after an event has been done, and the registration given back, a moment after that. */
static void wait_until_unmanaged(const char *p, size_t bytes)
{
    for (uint64_t until = now_ms() + JOB_SECONDS * 1000; stats_now().blocks && now_ms() < until;)
        sleep_ms(1);
    assert_int_equal(stats_now().blocks, 0);
    for (uint64_t until = now_ms() + 200; maps_look(p, bytes).missing && now_ms() < until;)
        sleep_ms(1);
}

static void put_there(hmm_dev dev, char *p, size_t bytes, uint64_t seed)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    fill_random(p, bytes, seed);
    assert_int_equal(hmm_migrate_to_device(dev, p, bytes, &res), 0);
    assert_int_equal(res.moved, bytes / page);
}

/* Touches every page, by reading or writing; all must be zero. Returns the faults that the library was told of. */
static uint64_t touch_zeros(char *p, size_t bytes, bool write)
{
    uint64_t before = stats_now().cpu_faults;
    for (size_t i = 0; i < bytes; i += page) {
        if (write)
            ((volatile char *)p)[i + 1] = 1;
        if (((volatile char *)p)[i] != 0)
            fail_msg("page %zu reads as %d", i / page, p[i]);
    }
    uint64_t faults = stats_now().cpu_faults - before;
    for (size_t i = 0; i < bytes; i++)
        if (p[i] != (write && i % page == 1))
            fail_msg("byte %zu is %d", i, p[i]);
    return faults;
}

/* ---- what freeing gives back ------------------------------------------------------------------------------------------------------ */

enum way { UNMAP, MAP_OVER, DONTNEED, SHRINK, WAYS };

/* Frees [p, p + bytes); with SHRINK the mapping at p keeps its first page. */
static void free_by(enum way way, char *p, size_t bytes)
{
    switch (way) {
    case UNMAP: assert_int_equal(munmap(p, bytes), 0); break;
    case MAP_OVER:
        assert_ptr_equal(mmap(p, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), p);
        break;
    case DONTNEED: assert_int_equal(madvise(p, bytes, MADV_DONTNEED), 0); break;
    case SHRINK: assert_ptr_equal(mremap(p, bytes, page, 0), p); break;
    case WAYS: break;
    }
}

static void device_pages_are_free_without_a_touch(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    for (enum way way = UNMAP; way < WAYS; way++) {
        char *p = map_pages(BYTES);
        put_there(dev, p, BYTES, way);
        assert_int_equal(used_bytes(dev), BYTES);
        struct hmm_stats s = stats_now();
        free_by(way, p, BYTES);
        wait_until_used(dev, way == SHRINK ? page : 0);
        struct hmm_stats t = stats_now();
        assert_int_equal(t.dropped - s.dropped, way == SHRINK ? pages - 1 : pages);
        assert_int_equal(t.cpu_faults, s.cpu_faults);
        assert_int_equal(t.pages_to_system, s.pages_to_system); /* nothing was brought home to be thrown away */
        unmap_pages(p, BYTES);
        wait_until_used(dev, 0);
    }
    close_device(dev);
}

/* ---- who gets the address next ----------------------------------------------------------------------------------------------------- */

static void a_new_mapping_at_the_address_costs_no_fault(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    char *p = map_pages(BYTES);
    for (int round = 0; round < ROUNDS; round++) {
        put_there(dev, p, BYTES, round);
        free_by(round % 2 ? UNMAP : MAP_OVER, p, BYTES);
        if (round % 2)
            free_by(MAP_OVER, p, BYTES); /* which maps anew where nothing is */
        madvise(p, BYTES, MADV_NOHUGEPAGE);
        assert_int_equal(touch_zeros(p, BYTES, round % 3 == 0), 0);
    }
    close_device(dev);
    unmap_pages(p, BYTES);
}

static void dropped_memory_is_the_kernels_again(void **state)
{
    (void)state;
    uint64_t faults = 0;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    char *p = map_pages(SMALL);
    for (int round = 0; round < LIVES; round++) {
        put_there(dev, p, SMALL, round);
        free_by(DONTNEED, p, SMALL);
        wait_until_unmanaged(p, SMALL);
        faults += touch_zeros(p, SMALL, round % 2);
    }
    if (faults > LIVES / 30) /* none, but for a thread of the library that did not run for so long */
        fail_msg("%llu faults in %d lives", (unsigned long long)faults, LIVES);
    close_device(dev);
    unmap_pages(p, SMALL);
}

/* At once: the memory may still be registered for the first touches, and is then given in windows. */
static void dropped_memory_that_is_touched_at_once_does_not_storm(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    char *p = map_pages(BYTES);
    for (int round = 0; round < ROUNDS; round++) {
        put_there(dev, p, BYTES, round);
        free_by(DONTNEED, p, BYTES);
        uint64_t faults = touch_zeros(p, BYTES, round % 2);
        if (faults > pages / WINDOW + BYTES / BLOCK)
            fail_msg("%llu faults for %zu pages", (unsigned long long)faults, pages);
        wait_until_used(dev, 0);
    }
    close_device(dev);
    unmap_pages(p, BYTES);
}

/* Half of each block is dropped, the rest stays on the device: the memory stays registered for its sake. */
static void dropped_memory_beside_pages_that_stay_does_not_storm(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    char *p = map_pages(BYTES), *oracle = malloc(BYTES);
    for (int round = 0; round < ROUNDS; round++) {
        put_there(dev, p, BYTES, round);
        fill_random(oracle, BYTES, round);
        uint64_t faults = 0;
        for (size_t at = 0; at < BYTES; at += BLOCK) {
            free_by(DONTNEED, p + at, BLOCK / 2);
            faults += touch_zeros(p + at, BLOCK / 2, round % 2);
        }
        if (faults > pages / 2 / WINDOW + BYTES / BLOCK)
            fail_msg("%llu faults for %zu pages", (unsigned long long)faults, pages / 2);
        wait_until_used(dev, BYTES / 2);
        for (size_t at = 0; at < BYTES; at += BLOCK)
            assert_memory_equal(p + at + BLOCK / 2, oracle + at + BLOCK / 2, BLOCK / 2);
        assert_int_equal(hmm_migrate_to_system(p, BYTES, NULL), 0);
    }
    free(oracle);
    close_device(dev);
    unmap_pages(p, BYTES);
}

/* The device, too: each life of the address costs it as many faults as the first. */
static void a_device_faults_no_more_than_on_fresh_memory(void **state)
{
    (void)state;
    skip_without_device_faults();
    hmm_dev dev = open_with(DEVICE_MEMORY);
    char *p = map_pages(BYTES), *oracle = malloc(BYTES);
    uint32_t zeros;
    uint64_t first = 0;
    memset(oracle, 0, BYTES);
    zeros = crc_oracle(oracle, BYTES);
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t before = stats_now().device_faults;
        assert_int_equal(device_crc(dev, p, BYTES), zeros);
        device_fill(dev, p, (uint8_t)(round + 1), BYTES);
        uint64_t faults = stats_now().device_faults - before;
        first = round ? first : faults;
        if (faults > first + first / 2 + 8)
            fail_msg("%llu device faults in life %d, %llu in the first", (unsigned long long)faults, round,
                     (unsigned long long)first);
        memset(oracle, round + 1, BYTES);
        assert_int_equal(device_crc(dev, p, BYTES), crc_oracle(oracle, BYTES));
        free_by(round % 2 ? DONTNEED : MAP_OVER, p, BYTES);
        madvise(p, BYTES, MADV_NOHUGEPAGE);
    }
    free(oracle);
    close_device(dev);
    unmap_pages(p, BYTES);
}

/* ---- an allocator ------------------------------------------------------------------------------------------------------------------- */

#define THREADS 3

struct user {
    pthread_t thread;
    hmm_dev dev;
    unsigned number, failed;
};

static bool all_zero(const char *p, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (p[i])
            return false;
    return true;
}

/* What calloc() gives is zero, whatever stood there in another life, of whichever thread, on whichever device; what realloc() gives
 * is what was there. */
static void *use_allocator(void *arg)
{
    struct user *u = arg;
    uint64_t seed = u->number;
    for (int i = 0; i < 60; i++) {
        size_t bytes = 100000 + random_next(&seed) % 1500000, grown = bytes + random_next(&seed) % 500000;
        char *p = calloc(1, bytes), *oracle = malloc(bytes);
        hmm_fence *fence;
        u->failed += !all_zero(p, bytes);
        fill_random(oracle, bytes, seed);
        memcpy(p, oracle, bytes);
        if (hmm_migrate_to_device(u->dev, p, bytes, NULL) && strstr(hmm_last_message(), "limit") == NULL)
            u->failed++;
        if (random_next(&seed) % 2) {
            memset(oracle, 9, bytes / 2);
            if (hmm_job_fill(u->dev, p, 9, bytes / 2, &fence) == 0) {
                u->failed += hmm_fence_wait(fence, JOB_SECONDS * 1000000000ll) != 0;
                hmm_fence_put(fence);
            } else {
                u->failed++;
            }
        }
        if (random_next(&seed) % 2)
            p = realloc(p, grown);
        u->failed += memcmp(p, oracle, bytes) != 0;
        if (random_next(&seed) % 2)
            hmm_migrate_to_device(u->dev, p, bytes / 2, NULL);
        free(p);
        free(oracle);
        if (random_next(&seed) % 8 == 0)
            malloc_trim(0);
    }
    return NULL;
}

static void an_allocator_never_gives_out_old_data(void **state)
{
    (void)state;
    hmm_dev devices[2] = {open_with(DEVICE_MEMORY), open_with("memory=4M")};
    struct user u[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        u[i] = (struct user){.dev = devices[i % 2], .number = i + 1};
        pthread_create(&u[i].thread, NULL, use_allocator, &u[i]);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(u[i].thread, NULL);
        assert_int_equal(u[i].failed, 0);
    }
}

int test_main(void)
{
    page = page_size();
    pages = BYTES / page;
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(device_pages_are_free_without_a_touch),
        TEST_WITHOUT_DEVICE(a_new_mapping_at_the_address_costs_no_fault),
        TEST_WITHOUT_DEVICE(dropped_memory_is_the_kernels_again),
        TEST_WITHOUT_DEVICE(dropped_memory_that_is_touched_at_once_does_not_storm),
        TEST_WITHOUT_DEVICE(dropped_memory_beside_pages_that_stay_does_not_storm),
        TEST_WITHOUT_DEVICE(a_device_faults_no_more_than_on_fresh_memory),
        TEST_WITHOUT_DEVICE(an_allocator_never_gives_out_old_data),
    };
    return cmocka_run_group_tests_name("reuse", tests, NULL, NULL);
}
