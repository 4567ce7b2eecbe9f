/* SPDX-License-Identifier: MIT */
/*
 * The program changes its mappings while pages are on the device, and while jobs use them: munmap, a new mapping at the same
 * address, MADV_DONTNEED, mremap, free, realloc. None of these calls goes through the library.
 */
#include <pthread.h>

#include "support.h"

static void on_device(const void *p, size_t bytes)
{
    assert_int_equal(hmm_migrate_to_device(device, p, bytes, NULL), 0);
    assert_int_equal(pages_in_state(p, bytes, HMM_PAGE_DEVICE), bytes / page_size());
}

static void assert_all(const char *p, size_t bytes, char value)
{
    for (size_t i = 0; i < bytes; i++)
        if (p[i] != value)
            fail_msg("byte %zu is %d, not %d", i, p[i], value);
}

static void map_again(char *p, size_t bytes)
{
    assert_ptr_equal(mmap(p, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), p);
}

/* ---- pages on the device ----------------------------------------------------------------------------------------------------- */

static void unmapped_device_pages_are_freed(void **state)
{
    (void)state;
    char *p = map_pages(4 * MIB);
    struct hmm_device_info info = {.size = sizeof(info)};
    memset(p, 1, 4 * MIB);
    on_device(p, 4 * MIB);
    unmap_pages(p, 4 * MIB);
    uint64_t until = now_ms() + 5000;
    do {
        assert_int_equal(hmm_device_info(device, &info), 0);
    } while (info.used_bytes && now_ms() < until);
    assert_int_equal(info.used_bytes, 0);
}

static void a_part_unmapped_leaves_the_rest(void **state)
{
    (void)state;
    char *p = map_pages(6 * MIB);
    fill_random(p, 6 * MIB, 31);
    char *oracle = malloc(6 * MIB);
    memcpy(oracle, p, 6 * MIB);
    on_device(p, 6 * MIB);
    unmap_pages(p + MIB, 3 * MIB + 4096);
    assert_memory_equal(p, oracle, MIB);
    size_t rest = 4 * MIB + 4096;
    assert_int_equal(device_crc(device, p + rest, 6 * MIB - rest), crc_oracle(oracle + rest, 6 * MIB - rest));
    assert_memory_equal(p + rest, oracle + rest, 6 * MIB - rest);
    unmap_pages(p, MIB);
    unmap_pages(p + rest, 6 * MIB - rest);
    free(oracle);
}

/* The device has translations of the old mapping, fresh in its TLB, when the address gets a new one. */
static void a_new_mapping_at_the_same_address_is_seen(void **state)
{
    (void)state;
    size_t bytes = 512 << 10;
    char *p = map_pages(bytes);
    for (int round = 1; round <= 200; round++) {
        memset(p, round, bytes);
        uint32_t expected = crc_oracle(p, 1000);
        assert_int_equal(device_crc(device, p, 1000), expected);
        device_fill(device, p + 4096, (uint8_t)~round, 100);
        assert_int_equal((uint8_t)p[4096], (uint8_t)~round);
        device_crc(device, p, bytes);
        unmap_pages(p, bytes);
        map_again(p, bytes);
        char zeros[1000] = {0};
        if (round % 2)
            assert_int_equal(device_crc(device, p, 1000), crc_oracle(zeros, 1000));
        assert_all(p, bytes, 0);
    }
    unmap_pages(p, bytes);
}

static void mapping_over_device_pages_gives_zeros(void **state)
{
    (void)state;
    char *p = map_pages(2 * MIB);
    for (int round = 0; round < 50; round++) {
        memset(p, 3, 2 * MIB);
        on_device(p, 2 * MIB);
        map_again(p + MIB / 2, MIB);
        assert_all(p + MIB / 2, MIB, 0);
        assert_all(p, MIB / 2, 3);
        assert_all(p + 3 * MIB / 2, MIB / 2, 3);
    }
    unmap_pages(p, 2 * MIB);
}

static void dontneed_gives_zeros_to_the_cpu(void **state)
{
    (void)state;
    char *p = map_pages(3 * MIB);
    for (int round = 0; round < 50; round++) {
        memset(p, 5, 3 * MIB);
        on_device(p, 3 * MIB);
        assert_int_equal(madvise(p + MIB, MIB, MADV_DONTNEED), 0);
        assert_all(p + MIB, MIB, 0);
        assert_all(p, MIB, 5);
        assert_all(p + 2 * MIB, MIB, 5);
    }
    unmap_pages(p, 3 * MIB);
}

static void dontneed_gives_zeros_to_the_device(void **state)
{
    (void)state;
    char *p = map_pages(MIB), *zeros = calloc(1, MIB);
    uint32_t expected = crc_oracle(zeros, MIB);
    for (int round = 0; round < 100; round++) {
        device_fill(device, p, 6, MIB); /* in its TLB, for writing */
        assert_int_equal(madvise(p, MIB, MADV_DONTNEED), 0);
        assert_int_equal(device_crc(device, p, MIB), expected);
    }
    free(zeros);
    unmap_pages(p, MIB);
}

static void dontneed_then_a_device_write_keeps_the_rest_zero(void **state)
{
    (void)state;
    char *p = map_pages(MIB);
    for (int round = 0; round < 50; round++) {
        device_fill(device, p, 7, MIB);
        assert_int_equal(madvise(p, MIB, MADV_DONTNEED), 0);
        device_fill(device, p + 1000, 8, 5000);
        assert_all(p, 1000, 0);
        assert_all(p + 1000, 5000, 8);
        assert_all(p + 6000, MIB - 6000, 0);
    }
    unmap_pages(p, MIB);
}

static void mremap_takes_device_pages_along(void **state)
{
    (void)state;
    char *oracle = malloc(4 * MIB), *target = map_pages(8 * MIB);
    for (int round = 0; round < 30; round++) {
        char *p = map_pages(4 * MIB);
        fill_random(p, 4 * MIB, round);
        memcpy(oracle, p, 4 * MIB);
        device_crc(device, p, 4 * MIB);
        size_t shift = (size_t)round * 11 * page_size();
        char *q = mremap(p, 4 * MIB, 4 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, target + shift);
        assert_ptr_equal(q, target + shift);
        if (round % 2)
            assert_int_equal(device_crc(device, q, 4 * MIB), crc_oracle(oracle, 4 * MIB));
        assert_memory_equal(q, oracle, 4 * MIB);
        device_fill(device, q, 1, 4 * MIB);
        assert_all(q, 4 * MIB, 1);
    }
    unmap_pages(target, 8 * MIB);
    free(oracle);
}

static void realloc_of_device_memory_keeps_it(void **state)
{
    (void)state;
    char *oracle = malloc(8 * MIB), *p = malloc(MIB);
    fill_random(oracle, 8 * MIB, 32);
    memcpy(p, oracle, MIB);
    for (size_t bytes = MIB; bytes < 8 * MIB; bytes += MIB) {
        device_crc(device, p, bytes);
        p = realloc(p, bytes + MIB);
        assert_memory_equal(p, oracle, bytes);
        memcpy(p + bytes, oracle + bytes, MIB);
    }
    assert_int_equal(device_crc(device, p, 8 * MIB), crc_oracle(oracle, 8 * MIB));
    free(p);
    free(oracle);
}

static void heap_that_is_freed_and_used_again_is_intact(void **state)
{
    (void)state;
    enum { SLOTS = 200 };
    char *slots[SLOTS] = {0};
    size_t sizes[SLOTS] = {0};
    uint64_t seed = 33;
    for (int step = 0; step < 3000; step++) {
        int i = (int)(random_next(&seed) % SLOTS);
        assert_all(slots[i] ? slots[i] : "", slots[i] ? sizes[i] : 0, (char)i);
        free(slots[i]);
        sizes[i] = 1 + random_next(&seed) % (step % 20 ? 2000 : 300000);
        slots[i] = calloc(1, sizes[i]);
        assert_all(slots[i], sizes[i], 0);
        device_fill(device, slots[i], (uint8_t)i, sizes[i]);
    }
    for (int i = 0; i < SLOTS; i++) {
        assert_all(slots[i] ? slots[i] : "", slots[i] ? sizes[i] : 0, (char)i);
        free(slots[i]);
    }
}

/* ---- jobs at work --------------------------------------------------------------------------------------------------------------- */

/* Each round: the job has done nothing, a part or everything when its memory goes. It must end, well or with an address in it.
 * Only reading jobs see a hole: in one that is written, something of the process's own could have been mapped meanwhile. */
static void memory_is_unmapped_while_a_job_runs_on_it(void **state)
{
    (void)state;
    size_t bytes = 8 * MIB;
    uint64_t seed = 34;
    unsigned ended = 0;
    for (int round = 0; round < 60; round++) {
        char *p = map_pages(bytes);
        bool reads = round % 3 == 0;
        hmm_fence *fence;
        memset(p, 1, bytes);
        if (reads)
            assert_int_equal(hmm_job_crc32c(device, p, bytes, &fence), 0);
        else if (round % 3 == 1)
            assert_int_equal(hmm_job_fill(device, p, 2, bytes, &fence), 0);
        else
            assert_int_equal(hmm_job_copy(device, p + bytes / 2, p, bytes / 2, &fence), 0);
        for (volatile uint64_t spin = random_next(&seed) % 3000000; spin; spin--)
            ;
        if (reads)
            unmap_pages(p, bytes);
        else
            assert_ptr_equal(mmap(p, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), p);
        struct hmm_fence_info info = finish(fence);
        if (info.status) {
            assert_int_equal(info.status, reads ? -EFAULT : -EACCES);
            assert_true(info.address >= (uintptr_t)p && info.address < (uintptr_t)p + bytes);
            ended++;
        }
        munmap(p, bytes);
    }
    assert_true(ended > 0); /* else nothing was tried */
}

/* The new mapping is not what the job's translations are of: it holds what the CPU puts there, on both sides. */
static void memory_is_replaced_while_a_job_reads_it(void **state)
{
    (void)state;
    size_t bytes = 4 * MIB;
    char *p = map_pages(bytes);
    for (int round = 0; round < 60; round++) {
        hmm_fence *fence;
        memset(p, round, bytes);
        assert_int_equal(hmm_job_crc32c(device, p, bytes, &fence), 0);
        for (volatile int spin = round * 20000; spin; spin--)
            ;
        unmap_pages(p, bytes);
        map_again(p, bytes);
        fill_random(p, bytes, round);
        uint32_t expected = crc_oracle(p, bytes);
        struct hmm_fence_info info = finish(fence);
        assert_true(info.status == 0 || info.status == -EFAULT);
        assert_int_equal(crc_oracle(p, bytes), expected);
        assert_int_equal(device_crc(device, p, bytes), expected);
    }
    unmap_pages(p, bytes);
}

struct churn {
    char *at;
    size_t bytes;
    uint32_t stop;
    uint32_t failed;
};

/* Drops pages and looks for anything but zeros or the device's value. */
static void *drop_pages(void *arg)
{
    struct churn *c = arg;
    uint64_t seed = 35;
    while (!__atomic_load_n(&c->stop, __ATOMIC_RELAXED)) {
        size_t at = random_next(&seed) % (c->bytes / 4096) * 4096;
        madvise(c->at + at, 4096 * (1 + random_next(&seed) % 8), MADV_DONTNEED);
        char seen = *(volatile char *)(c->at + random_next(&seed) % c->bytes);
        if (seen != 0 && seen != 9)
            c->failed++;
    }
    return NULL;
}

static void pages_are_dropped_while_jobs_write_them(void **state)
{
    (void)state;
    struct churn c = {.at = map_pages(2 * MIB), .bytes = MIB}; /* a drop may reach behind `bytes` */
    pthread_t thread;
    pthread_create(&thread, NULL, drop_pages, &c);
    for (int round = 0; round < 150; round++)
        device_fill(device, c.at, 9, c.bytes);
    __atomic_store_n(&c.stop, 1, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    assert_int_equal(c.failed, 0);
    unmap_pages(c.at, 2 * MIB);
}

static void *touch_pages(void *arg)
{
    struct churn *c = arg;
    uint64_t seed = 36;
    while (!__atomic_load_n(&c->stop, __ATOMIC_RELAXED)) {
        volatile uint64_t *word = (uint64_t *)(c->at + random_next(&seed) % (c->bytes / 8) * 8);
        uint64_t v = *word;
        if (v != 0 && v != 0x0101010101010101)
            c->failed++;
    }
    return NULL;
}

/* The CPU takes pages away all the time while jobs fill them with one value or the other: no third value exists. */
static void pages_are_taken_away_while_jobs_write_them(void **state)
{
    (void)state;
    struct churn c = {.at = map_pages(2 * MIB), .bytes = 2 * MIB};
    pthread_t thread;
    pthread_create(&thread, NULL, touch_pages, &c);
    for (int round = 0; round < 100; round++) {
        device_fill(device, c.at, (uint8_t)(round % 2), c.bytes);
        if (round % 2)
            assert_int_equal(device_crc(device, c.at, c.bytes), crc_oracle(c.at, c.bytes));
    }
    __atomic_store_n(&c.stop, 1, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    assert_int_equal(c.failed, 0);
    assert_all(c.at, c.bytes, 1);
    unmap_pages(c.at, 2 * MIB);
}

struct conversation {
    char *p;
    struct control control; /* flags[0]: round of the CPU, [1]: round of the kernel */
    uint32_t rounds;
};

/* Returns how often it saw what had been dropped. It keeps the page in its TLB all the time. */
HMM_KERNEL(look_when_told)
{
    struct conversation *c = arg;
    volatile uint32_t *flags = open_control(&c->control);
    uint64_t wrong = 0;
    for (uint32_t round = 1; round <= c->rounds; round++) {
        char seen, mark = 1;
        hmm_put(acc, c->p, &mark, 1);
        hmm_yield(acc);
        flags[1] = round;
        while (flags[0] != round)
            ;
        hmm_get(acc, &seen, c->p, 1);
        wrong += seen != 0;
    }
    return wrong;
}

/* What madvise() has done when it returns, a kernel that already runs sees as soon as it hears of it. */
static void a_running_kernel_sees_dropped_pages_at_once(void **state)
{
    (void)state;
    struct conversation c = {map_pages(page_size()), make_control(), 3000};
    hmm_fence *fence = launch(device, look_when_told, &c, sizeof(c), 0);
    for (uint32_t round = 1; round <= c.rounds; round++) {
        wait_for(&c.control.flags[1], round);
        madvise(c.p, page_size(), MADV_DONTNEED);
        c.control.flags[0] = round;
    }
    assert_int_equal(must(fence), 0);
    free_control(&c.control);
    unmap_pages(c.p, page_size());
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(unmapped_device_pages_are_freed),
        TEST(a_part_unmapped_leaves_the_rest),
        TEST(a_new_mapping_at_the_same_address_is_seen),
        TEST(mapping_over_device_pages_gives_zeros),
        TEST(dontneed_gives_zeros_to_the_cpu),
        TEST(dontneed_gives_zeros_to_the_device),
        TEST(dontneed_then_a_device_write_keeps_the_rest_zero),
        TEST(mremap_takes_device_pages_along),
        TEST(realloc_of_device_memory_keeps_it),
        TEST(heap_that_is_freed_and_used_again_is_intact),
        TEST(memory_is_unmapped_while_a_job_runs_on_it),
        TEST(memory_is_replaced_while_a_job_reads_it),
        TEST(pages_are_dropped_while_jobs_write_them),
        TEST(pages_are_taken_away_while_jobs_write_them),
        TEST(a_running_kernel_sees_dropped_pages_at_once),
    };
    return cmocka_run_group_tests_name("changes", tests, NULL, NULL);
}
