/* SPDX-License-Identifier: MIT */
/* Devices smaller than the data, and several devices at once. */
#include <pthread.h>

#include "support.h"

/* ---- smaller than the data ------------------------------------------------------------------------------------------------ */

static void data_four_times_larger_than_the_device_is_read(void **state)
{
    (void)state;
    skip_without_device_faults();
    size_t bytes = 32 * MIB;
    hmm_dev dev = open_with("memory=8M");
    char *p = map_pages(bytes);
    fill_random(p, bytes, 41);
    uint32_t expected = crc_oracle(p, bytes);
    uint64_t evicted = stats_now().evicted;
    assert_int_equal(device_crc(dev, p, bytes), expected);
    assert_int_equal(device_crc(dev, p, bytes), expected);
    assert_true(stats_now().evicted - evicted >= (bytes - 8 * MIB) / page_size());
    assert_true(used_bytes(dev) <= 8 * MIB);
    assert_int_equal(crc_oracle(p, bytes), expected);
    unmap_pages(p, bytes);
}

static void data_four_times_larger_than_the_device_is_written(void **state)
{
    (void)state;
    size_t bytes = 32 * MIB, half = bytes / 2;
    hmm_dev dev = open_with("memory=8M");
    char *p = map_pages(bytes), *oracle = malloc(bytes);
    fill_random(oracle, bytes, 42);
    memcpy(p, oracle, half);
    device_copy(dev, p + half, p, half);
    device_fill(dev, p + 1000, 3, 100000);
    memcpy(oracle + half, oracle, half);
    memset(oracle + 1000, 3, 100000);
    assert_memory_equal(p, oracle, bytes);
    free(oracle);
    unmap_pages(p, bytes);
}

struct shuffle {
    uint64_t *words;
    uint64_t n, steps, seed;
};

/* Adds a number to random words: most of them are not on the device when they are needed. */
static void shuffle_step(struct shuffle *s, uint64_t *at, uint64_t *add)
{
    *at = random_next(&s->seed) % s->n;
    *add = random_next(&s->seed) >> 40;
}

HMM_KERNEL(add_at_random)
{
    struct shuffle *s = arg;
    for (uint64_t i = 0; i < s->steps; i++) {
        uint64_t at, add;
        size_t len = sizeof(uint64_t);
        shuffle_step(s, &at, &add);
        uint64_t *word = hmm_span_write(acc, s->words + at, &len);
        *word += add;
    }
    return s->steps;
}

static void random_writes_over_a_small_device_are_all_kept(void **state)
{
    (void)state;
    size_t bytes = 16 * MIB;
    hmm_dev dev = open_with("memory=2M,engines=1");
    uint64_t *p = (uint64_t *)map_pages(bytes), *oracle = calloc(1, bytes);
    struct shuffle s = {p, bytes / 8, 20000, 43}, mine = s;
    must_run(dev, add_at_random, &s, sizeof(s));
    for (uint64_t i = 0; i < mine.steps; i++) {
        uint64_t at, add;
        shuffle_step(&mine, &at, &add);
        oracle[at] += add;
    }
    assert_memory_equal(p, oracle, bytes);
    free(oracle);
    unmap_pages(p, bytes);
}

static void the_smallest_device_works(void **state)
{
    (void)state;
    hmm_dev dev = open_with("memory=64K");
    char *p = map_pages(4 * MIB), *oracle = malloc(4 * MIB);
    fill_random(oracle, 4 * MIB, 44);
    memcpy(p, oracle, 4 * MIB);
    assert_int_equal(device_crc(dev, p, 4 * MIB), crc_oracle(oracle, 4 * MIB));
    device_copy(dev, p + 2 * MIB + 1, p, MIB);
    memmove(oracle + 2 * MIB + 1, oracle, MIB);
    assert_memory_equal(p, oracle, 4 * MIB);
    assert_true(used_bytes(dev) <= 64 << 10);
    free(oracle);
    unmap_pages(p, 4 * MIB);
}

static void a_migration_larger_than_the_device_counts_every_page(void **state)
{
    (void)state;
    size_t bytes = 16 * MIB;
    hmm_dev dev = open_with("memory=4M");
    char *p = map_pages(bytes);
    struct hmm_migrate_result r = {.size = sizeof(r)};
    fill_random(p, bytes, 45);
    uint32_t expected = crc_oracle(p, bytes);
    assert_int_equal(hmm_migrate_to_device(dev, p, bytes, &r), 0);
    assert_int_equal(r.moved + r.already + r.pinned + r.unmovable + r.unmapped + r.busy, bytes / page_size());
    assert_true(r.moved >= 4 * MIB / page_size());
    assert_true(pages_in_state(p, bytes, HMM_PAGE_DEVICE) <= 4 * MIB / page_size());
    assert_int_equal(crc_oracle(p, bytes), expected);
    unmap_pages(p, bytes);
}

/* ---- several devices -------------------------------------------------------------------------------------------------------- */

static void two_devices_take_turns_on_the_same_memory(void **state)
{
    (void)state;
    hmm_dev a = open_with("memory=8M"), b = open_with("memory=4M");
    size_t bytes = 6 * MIB;
    char *p = map_pages(bytes), *oracle = malloc(bytes);
    fill_random(p, bytes, 46);
    memcpy(oracle, p, bytes);
    for (int round = 0; round < 10; round++) {
        size_t at = (size_t)round * 500000;
        device_fill(a, p + at, (uint8_t)round, 100000);
        memset(oracle + at, round, 100000);
        assert_int_equal(device_crc(b, p, bytes), crc_oracle(oracle, bytes));
        device_copy(b, p, p + at + 50000, 200000);
        memmove(oracle, oracle + at + 50000, 200000);
        assert_int_equal(device_crc(a, p, bytes), crc_oracle(oracle, bytes));
    }
    assert_memory_equal(p, oracle, bytes);
    free(oracle);
    unmap_pages(p, bytes);
}

struct counters {
    uint64_t *at;
    uint64_t rounds, stride, count;
};

HMM_KERNEL(count_up)
{
    struct counters *c = arg;
    for (uint64_t round = 0; round < c->rounds; round++)
        for (uint64_t i = 0; i < c->count; i++) {
            size_t len = sizeof(uint64_t);
            volatile uint64_t *word = hmm_span_write(acc, c->at + i * c->stride, &len);
            uint64_t value = *word;
            for (volatile int wait = 0; wait < 300; wait++)
                ;
            *word = value + 1;
        }
    return 0;
}

/* Both devices and the CPU write words of their own in the same pages at the same time. */
static void two_devices_and_the_cpu_share_pages_at_once(void **state)
{
    (void)state;
    enum { PAGES = 24, ROUNDS = 60 };
    hmm_dev a = open_with("memory=8M"), b = open_with("memory=8M");
    char *p = map_pages(PAGES * page_size());
    uint64_t stride = page_size() / sizeof(uint64_t);
    struct counters ca = {(uint64_t *)p, ROUNDS, stride, PAGES}, cb = {(uint64_t *)p + 1, ROUNDS, stride, PAGES};
    hmm_fence *fa = launch(a, count_up, &ca, sizeof(ca), 0), *fb = launch(b, count_up, &cb, sizeof(cb), 0);
    volatile uint64_t *mine = (uint64_t *)p + 2;
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < PAGES; i++)
            mine[i * stride]++;
    must(fa);
    must(fb);
    for (int i = 0; i < PAGES; i++) {
        assert_int_equal(ca.at[i * stride], ROUNDS);
        assert_int_equal(cb.at[i * stride], ROUNDS);
        assert_int_equal(mine[i * stride], ROUNDS);
    }
    unmap_pages(p, PAGES * page_size());
}

static void closing_one_device_brings_its_pages_home(void **state)
{
    (void)state;
    hmm_dev a = open_with("memory=8M"), b = open_with("memory=8M");
    char *p = map_pages(4 * MIB), *oracle = malloc(4 * MIB);
    fill_random(p, 4 * MIB, 47);
    memcpy(oracle, p, 4 * MIB);
    device_crc(a, p, 2 * MIB);
    device_crc(b, p + 2 * MIB, 2 * MIB);
    close_device(a);
    assert_int_equal(pages_in_state(p, 2 * MIB, HMM_PAGE_SYSTEM), 2 * MIB / page_size());
    assert_int_equal(pages_in_state(p + 2 * MIB, 2 * MIB, HMM_PAGE_DEVICE), 2 * MIB / page_size());
    assert_memory_equal(p, oracle, 4 * MIB);
    device_crc(b, p, 4 * MIB);
    close_device(b);
    assert_memory_equal(p, oracle, 4 * MIB);
    free(oracle);
    unmap_pages(p, 4 * MIB);
}

/* Threads that migrate, touch and compute on one area, in any order; every word has one writer. */
struct worker {
    pthread_t thread;
    hmm_dev dev;
    char *p;
    size_t bytes;
    unsigned number;
    unsigned failed;
};

static void *work(void *arg)
{
    struct worker *w = arg;
    uint64_t seed = w->number, expected = 0;
    volatile uint64_t *own = (uint64_t *)w->p + w->number;
    for (int i = 0; i < 150; i++) {
        size_t from = random_next(&seed) % (w->bytes / 2), len = 1 + random_next(&seed) % (w->bytes / 2);
        switch (random_next(&seed) % 4) {
        case 0: hmm_migrate_to_device(w->dev, w->p + from, len, NULL); break;
        case 1: hmm_migrate_to_system(w->p + from, len, NULL); break;
        case 2:
            device_fill(w->dev, (char *)own, (uint8_t)i, sizeof(*own));
            memset(&expected, (uint8_t)i, sizeof(expected));
            break;
        default: *own = expected = random_next(&seed);
        }
        w->failed += *own != expected;
    }
    return NULL;
}

static void threads_use_two_devices_in_any_order(void **state)
{
    (void)state;
    hmm_dev devices[2] = {open_with("memory=2M"), open_with("memory=8M")};
    struct worker w[4];
    char *p = map_pages(4 * MIB);
    for (unsigned i = 0; i < 4; i++) {
        w[i] = (struct worker){.dev = devices[i % 2], .p = p, .bytes = 4 * MIB, .number = i};
        pthread_create(&w[i].thread, NULL, work, &w[i]);
    }
    for (unsigned i = 0; i < 4; i++)
        pthread_join(w[i].thread, NULL);
    for (unsigned i = 0; i < 4; i++)
        assert_int_equal(w[i].failed, 0);
    unmap_pages(p, 4 * MIB);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(data_four_times_larger_than_the_device_is_read),
        TEST_WITHOUT_DEVICE(data_four_times_larger_than_the_device_is_written),
        TEST_WITHOUT_DEVICE(random_writes_over_a_small_device_are_all_kept),
        TEST_WITHOUT_DEVICE(the_smallest_device_works),
        TEST_WITHOUT_DEVICE(a_migration_larger_than_the_device_counts_every_page),
        TEST_WITHOUT_DEVICE(two_devices_take_turns_on_the_same_memory),
        TEST_WITHOUT_DEVICE(two_devices_and_the_cpu_share_pages_at_once),
        TEST_WITHOUT_DEVICE(closing_one_device_brings_its_pages_home),
        TEST_WITHOUT_DEVICE(threads_use_two_devices_in_any_order),
    };
    return cmocka_run_group_tests_name("eviction", tests, NULL, NULL);
}
