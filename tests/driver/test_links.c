/* SPDX-License-Identifier: MIT */
/*
 * What the soft device can be told about its link and its page size. Times are checked from below, where they follow from the model;
 * from above only so far that a transfer that never ends is seen.
 */
#include <pthread.h>

#include "support.h"

#define UPPER_MS 20000

static hmm_dev open_soft(const char *options)
{
    if (strncmp(spec_with(NULL), "soft", 4)) {
        fprintf(stderr, "skipped: links and page sizes are options of the soft device\n");
        skip();
    }
    return open_with(options);
}

static void assert_took(uint64_t since, uint64_t ms)
{
    uint64_t took = now_ms() - since;
    if (took + 1 < ms || took > ms + UPPER_MS)
        fail_msg("it took %llu ms, the model says at least %llu", (unsigned long long)took, (unsigned long long)ms);
}

/* ---- the link ------------------------------------------------------------------------------------------------------ */

static void a_copy_takes_as_long_as_its_bytes_need(void **state)
{
    (void)state;
    hmm_dev dev = open_soft("bandwidth=32M"); /* 1 MiB in 31.25 ms */
    char *p = map_pages(8 * MIB), *oracle = malloc(8 * MIB);
    fill_random(oracle, 8 * MIB, 1);
    memcpy(p, oracle, 8 * MIB);
    uint64_t before = now_ms();
    assert_int_equal(hmm_migrate_to_device(dev, p, 8 * MIB, NULL), 0);
    assert_took(before, 250);
    assert_int_equal(device_crc(dev, p, 8 * MIB), crc_oracle(oracle, 8 * MIB));
    before = now_ms();
    assert_int_equal(hmm_migrate_to_system(p, 8 * MIB, NULL), 0);
    assert_took(before, 250);
    assert_memory_equal(p, oracle, 8 * MIB);
    free(oracle);
    unmap_pages(p, 8 * MIB);
}

/* What was never touched is made on the device. */
static void clearing_crosses_no_link(void **state)
{
    (void)state;
    hmm_dev dev = open_soft("bandwidth=64K"); /* 8 MiB in 128 s */
    char *p = map_pages(8 * MIB);
    uint64_t before = now_ms();
    assert_int_equal(hmm_migrate_to_device(dev, p, 8 * MIB, NULL), 0);
    assert_took(before, 0);
    unmap_pages(p, 8 * MIB);
}

struct transfer {
    pthread_t thread;
    hmm_dev dev;
    char *p;
    bool to_device;
};

static void *transfer(void *arg)
{
    struct transfer *t = arg;
    int r = t->to_device ? hmm_migrate_to_device(t->dev, t->p, 4 * MIB, NULL) : hmm_migrate_to_system(t->p, 4 * MIB, NULL);
    return r ? t : NULL;
}

/* Two transfers of a second each. */
static uint64_t both(hmm_dev dev, bool first_to_device, bool second_to_device)
{
    struct transfer t[] = {{.dev = dev, .p = map_pages(4 * MIB), .to_device = first_to_device},
                           {.dev = dev, .p = map_pages(4 * MIB), .to_device = second_to_device}};
    for (unsigned i = 0; i < 2; i++) {
        if (!t[i].to_device) /* cleared there, at no cost */
            assert_int_equal(hmm_migrate_to_device(dev, t[i].p, 4 * MIB, NULL), 0);
        else
            memset(t[i].p, 1, 4 * MIB);
    }
    uint64_t before = now_ms();
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&t[i].thread, NULL, transfer, &t[i]), 0);
    for (unsigned i = 0; i < 2; i++) {
        void *failed;
        pthread_join(t[i].thread, &failed);
        assert_null(failed);
    }
    uint64_t took = now_ms() - before;
    for (unsigned i = 0; i < 2; i++)
        unmap_pages(t[i].p, 4 * MIB);
    return took;
}

static void transfers_of_one_direction_share_the_bandwidth(void **state)
{
    (void)state;
    hmm_dev dev = open_soft("bandwidth=4M,copies=4");
    uint64_t there = both(dev, true, true), back = both(dev, false, false);
    assert_true(there >= 1990 && there < 2000 + UPPER_MS);
    assert_true(back >= 1990 && back < 2000 + UPPER_MS);
}

static void the_two_directions_do_not_wait_for_each_other(void **state)
{
    (void)state;
    hmm_dev dev = open_soft("bandwidth=4M,copies=4");
    uint64_t took = UPPER_MS;
    for (unsigned i = 0; i < 5 && took >= 1900; i++) /* the machine may be busy */
        took = both(dev, true, false);
    assert_true(took >= 990 && took < 1900);
}

static void every_transfer_has_the_latency(void **state)
{
    (void)state;
    hmm_dev dev = open_soft("latency_ns=100000000");
    char *p = map_pages(page_size());
    memset(p, 5, page_size());
    uint64_t before = now_ms();
    assert_int_equal(hmm_migrate_to_device(dev, p, 1, NULL), 0);
    assert_took(before, 100);
    before = now_ms();
    assert_int_equal(p[17], 5); /* a touch of the CPU */
    assert_took(before, 100);
    char *shared = map_shared();
    before = now_ms();
    device_fill(dev, shared, 3, 8); /* the bus: read, then written back */
    assert_took(before, 200);
    assert_int_equal(shared[7], 3);
    munmap(shared, page_size());
    unmap_pages(p, page_size());
}

static void faults_of_the_device_have_a_latency_of_their_own(void **state)
{
    (void)state;
    hmm_dev dev = open_soft("fault_latency_ns=100000000,model=fault");
    char *p = map_pages(page_size());
    memset(p, 5, page_size());
    uint64_t before = now_ms();
    device_fill(dev, p, 6, page_size());
    assert_took(before, 100);
    assert_int_equal(p[0], 6);
    unmap_pages(p, page_size());
}

static void the_links_that_have_names_open(void **state)
{
    (void)state;
    static const char *const names[] = {"none", "pcie3x16", "pcie4x16", "pcie5x16", "nvlink2", "cxl2x8"};
    char *p = map_pages(MIB), *oracle = malloc(MIB);
    for (unsigned i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        char options[64];
        snprintf(options, sizeof(options), "link=%s", names[i]);
        hmm_dev dev = open_soft(options);
        fill_random(oracle, MIB, i);
        memcpy(p, oracle, MIB);
        assert_int_equal(device_crc(dev, p, MIB), crc_oracle(oracle, MIB));
        assert_memory_equal(p, oracle, MIB);
        close_device(dev);
    }
    hmm_dev dev;
    assert_int_equal(hmm_device_open(spec_with("link=string"), &dev), -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "string"));
    free(oracle);
    unmap_pages(p, MIB);
}

/* Every byte crosses the link, so core reads no device memory itself; the ways home are others. */
static void content_survives_every_way_home_over_a_link(void **state)
{
    (void)state;
    hmm_dev dev = open_soft("latency_ns=1000,memory=16M");
    size_t bytes = 12 * MIB;
    char *p = map_pages(bytes), *oracle = malloc(bytes);
    uint64_t seed = 99;
    fill_random(oracle, bytes, 3);
    memcpy(p, oracle, bytes);
    for (unsigned round = 0; round < 4; round++) {
        assert_int_equal(hmm_migrate_to_device(dev, p, bytes, NULL), 0);
        for (unsigned i = 0; i < 200; i++) { /* single pages */
            size_t at = random_next(&seed) % bytes;
            assert_int_equal(p[at], oracle[at]);
            p[at] = oracle[at] = (char)i;
        }
        assert_memory_equal(p, oracle, bytes / 2); /* streams */
    }
    assert_memory_equal(p, oracle, bytes);
    free(oracle);
    unmap_pages(p, bytes);
}

/* ---- page sizes ------------------------------------------------------------------------------------------------------ */

static size_t on_device(const char *p, size_t bytes)
{
    return pages_in_state(p, bytes, HMM_PAGE_DEVICE);
}

static void faults_bring_whole_granules_in_both_directions(void **state)
{
    (void)state;
    static const struct {
        const char *options;
        size_t granule;
    } sizes[] = {{"page=4K", 0}, {"page=64K", 64 << 10}, {"page=2M", BLOCK}};
    for (unsigned i = 0; i < 3; i++) {
        hmm_dev dev = open_soft(sizes[i].options);
        struct hmm_device_info info = {.size = sizeof(info)};
        size_t granule = sizes[i].granule ? sizes[i].granule : page_size(), pages = granule / page_size();
        char *p = map_pages(2 * BLOCK), *at = p + BLOCK + 5 * page_size();
        char *from = p + BLOCK + (size_t)(at - p - BLOCK) / granule * granule;
        assert_int_equal(hmm_device_info(dev, &info), 0);
        assert_int_equal(info.page_size, granule);
        fill_random(p, 2 * BLOCK, i);
        uint32_t crc = crc_oracle(p, 2 * BLOCK), of_one = crc_oracle(at, 1); /* before: a look brings it home */
        assert_int_equal(device_crc(dev, at, 1), of_one);
        assert_int_equal(on_device(from, granule), pages);
        assert_true(on_device(p, 2 * BLOCK) % pages == 0);
        assert_int_equal(hmm_migrate_to_device(dev, p, 2 * BLOCK, NULL), 0);
        uint64_t home = stats_now().pages_to_system;
        (void)*(volatile char *)at;
        uint64_t until = now_ms() + UPPER_MS; /* the touch goes on before the last page has come */
        while (stats_now().pages_to_system - home < pages && now_ms() < until)
            sleep_ms(1);
        assert_int_equal(stats_now().pages_to_system - home, pages);
        assert_int_equal(on_device(from, granule), 0);
        assert_int_equal(on_device(p, 2 * BLOCK), 2 * BLOCK / page_size() - pages);
        assert_int_equal(crc_oracle(p, 2 * BLOCK), crc);
        unmap_pages(p, 2 * BLOCK);
        close_device(dev);
    }
}

static void a_granule_that_is_mapped_in_part_comes_in_part(void **state)
{
    (void)state;
    static const char *const options[] = {"page=64K", "page=2M"};
    for (unsigned i = 0; i < 2; i++) {
        hmm_dev dev = open_soft(options[i]);
        size_t page = page_size();
        char *p = map_pages(BLOCK);
        memset(p, 4, BLOCK);
        unmap_pages(p, 3 * page);
        unmap_pages(p + 8 * page, BLOCK - 8 * page);
        device_fill(dev, p + 5 * page, 9, 1);
        assert_int_equal(on_device(p + 3 * page, 5 * page), 5);
        assert_int_equal(used_bytes(dev), 5 * page);
        assert_int_equal(p[5 * page], 9);
        assert_int_equal(on_device(p + 3 * page, 5 * page), 0);
        assert_int_equal(p[3 * page] + p[8 * page - 1], 8);
        unmap_pages(p + 3 * page, 5 * page);
        close_device(dev);
    }
}

/* The memory of the device is whole granules; more data than it has. */
static void a_small_device_of_large_pages_works(void **state)
{
    (void)state;
    hmm_dev dev = open_soft("page=2M,memory=3M");
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    assert_int_equal(info.memory_bytes, 4 * MIB);
    char *p = map_pages(16 * MIB);
    fill_random(p, 16 * MIB, 8);
    uint32_t crc = crc_oracle(p, 16 * MIB);
    assert_int_equal(device_crc(dev, p, 16 * MIB), crc);
    assert_int_equal(crc_oracle(p, 16 * MIB), crc);
    unmap_pages(p, 16 * MIB);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(a_copy_takes_as_long_as_its_bytes_need),
        TEST_WITHOUT_DEVICE(clearing_crosses_no_link),
        TEST_WITHOUT_DEVICE(transfers_of_one_direction_share_the_bandwidth),
        TEST_WITHOUT_DEVICE(the_two_directions_do_not_wait_for_each_other),
        TEST_WITHOUT_DEVICE(every_transfer_has_the_latency),
        TEST_WITHOUT_DEVICE(faults_of_the_device_have_a_latency_of_their_own),
        TEST_WITHOUT_DEVICE(the_links_that_have_names_open),
        TEST_WITHOUT_DEVICE(content_survives_every_way_home_over_a_link),
        TEST_WITHOUT_DEVICE(faults_bring_whole_granules_in_both_directions),
        TEST_WITHOUT_DEVICE(a_granule_that_is_mapped_in_part_comes_in_part),
        TEST_WITHOUT_DEVICE(a_small_device_of_large_pages_works),
    };
    return cmocka_run_group_tests_name("links", tests, NULL, NULL);
}
