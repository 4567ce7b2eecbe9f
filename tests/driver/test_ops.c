/* SPDX-License-Identifier: MIT */
/* Copy, fill and crc32c against plain arrays, at all alignments and sizes. */
#include "support.h"

static const size_t sizes[] = {1, 2, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097, 8193, 65536, 70001};
#define SIZES (sizeof(sizes) / sizeof(sizes[0]))

static void crc32c_of_the_check_string(void **state)
{
    (void)state;
    char *p = strdup("123456789");
    assert_int_equal(device_crc(device, p, 9), 0xe3069283);
    free(p);
}

static void crc32c_at_all_alignments_and_sizes(void **state)
{
    (void)state;
    char *p = map_pages(128 << 10);
    fill_random(p, 128 << 10, 1);
    for (size_t offset = 0; offset < 16; offset++)
        for (size_t i = 0; i < SIZES; i++)
            assert_int_equal(device_crc(device, p + offset, sizes[i]), crc_oracle(p + offset, sizes[i]));
    unmap_pages(p, 128 << 10);
}

static void crc32c_across_blocks(void **state)
{
    (void)state;
    size_t bytes = 7 * MIB, from = 4096 * 3 + 5, len = 6 * MIB + 77;
    char *p = map_pages(bytes);
    fill_random(p, bytes, 2);
    uint32_t expected = crc_oracle(p + from, len);
    assert_int_equal(device_crc(device, p + from, len), expected);
    assert_int_equal(device_crc(device, p + from, len), expected);
    unmap_pages(p, bytes);
}

static void crc32c_of_memory_never_touched_is_of_zeros(void **state)
{
    (void)state;
    char *p = map_pages(3 * MIB), *zeros = calloc(1, 3 * MIB);
    assert_int_equal(device_crc(device, p, 3 * MIB), crc_oracle(zeros, 3 * MIB));
    for (size_t i = 0; i < 3 * MIB; i += 4096)
        assert_int_equal(p[i], 0);
    free(zeros);
    unmap_pages(p, 3 * MIB);
}

/* dst and src in one arena, a copy of which is the oracle: what lies around the destination is checked, too. */
static void check_copy(char *arena, char *oracle, size_t bytes, size_t dst, size_t src, size_t len)
{
    memmove(oracle + dst, oracle + src, len);
    device_copy(device, arena + dst, arena + src, len);
    assert_memory_equal(arena, oracle, bytes);
}

static void copy_at_all_alignments_and_sizes(void **state)
{
    (void)state;
    size_t bytes = 512 << 10;
    char *arena = map_pages(bytes), *oracle = malloc(bytes);
    fill_random(arena, bytes, 3);
    memcpy(oracle, arena, bytes);
    for (size_t i = 0; i < SIZES; i++)
        for (size_t a = 0; a < 9; a += 4)
            for (size_t b = 0; b < 9; b += 3)
                check_copy(arena, oracle, bytes, (256 << 10) + a, 100 + b, sizes[i]);
    free(oracle);
    unmap_pages(arena, bytes);
}

static void copy_of_overlapping_ranges_is_memmove(void **state)
{
    (void)state;
    static const size_t shifts[] = {0, 1, 8, 4095, 4096, 65535, 65536, 65537, 150000};
    size_t bytes = 5 * MIB, len = 300001, middle = 2 * MIB - 100000;
    char *arena = map_pages(bytes), *oracle = malloc(bytes);
    fill_random(arena, bytes, 4);
    memcpy(oracle, arena, bytes);
    for (size_t i = 0; i < sizeof(shifts) / sizeof(shifts[0]); i++) {
        check_copy(arena, oracle, bytes, middle + shifts[i], middle, len);
        check_copy(arena, oracle, bytes, middle - shifts[i], middle, len);
    }
    free(oracle);
    unmap_pages(arena, bytes);
}

static void fill_touches_nothing_beside_it(void **state)
{
    (void)state;
    size_t bytes = 5 * MIB;
    char *arena = map_pages(bytes), *oracle = malloc(bytes);
    fill_random(arena, bytes, 5);
    memcpy(oracle, arena, bytes);
    for (size_t i = 0; i < SIZES; i++)
        for (size_t offset = 2 * MIB - 5; offset < 2 * MIB + 5; offset++) {
            memset(oracle + offset, (int)(i + offset), sizes[i]);
            device_fill(device, arena + offset, (uint8_t)(i + offset), sizes[i]);
        }
    memset(oracle + 77, 0xee, 4 * MIB);
    device_fill(device, arena + 77, 0xee, 4 * MIB);
    assert_memory_equal(arena, oracle, bytes);
    free(oracle);
    unmap_pages(arena, bytes);
}

/* Jobs and CPU accesses in random order, against a plain array. */
static void random_operations_match_a_plain_array(void **state)
{
    (void)state;
    size_t bytes = 6 * MIB;
    uint64_t seed = 6;
    char *arena = map_pages(bytes), *oracle = calloc(1, bytes);
    for (int step = 0; step < 400; step++) {
        uint64_t r = random_next(&seed);
        size_t len = 1 + random_next(&seed) % (r & 64 ? 600000 : 300);
        size_t a = random_next(&seed) % (bytes - len), b = random_next(&seed) % (bytes - len);
        switch (r % 6) {
        case 0:
            device_copy(device, arena + a, arena + b, len);
            memmove(oracle + a, oracle + b, len);
            break;
        case 1:
            device_fill(device, arena + a, (uint8_t)r, len);
            memset(oracle + a, (int)(uint8_t)r, len);
            break;
        case 2: assert_int_equal(device_crc(device, arena + a, len), crc_oracle(oracle + a, len)); break;
        case 3:
            fill_random(arena + a, len, r);
            fill_random(oracle + a, len, r);
            break;
        case 4: assert_memory_equal(arena + a, oracle + a, len); break;
        default:
            assert_int_equal(
                r & 128 ? hmm_migrate_to_device(device, arena + a, len, NULL) : hmm_migrate_to_system(arena + a, len, NULL), 0);
        }
    }
    assert_memory_equal(arena, oracle, bytes);
    free(oracle);
    unmap_pages(arena, bytes);
}

static void many_jobs_at_once_all_complete(void **state)
{
    (void)state;
    enum { JOBS = 600, EACH = 5000 };
    char *p = map_pages(JOBS * EACH);
    hmm_fence *fences[JOBS];
    for (int i = 0; i < JOBS; i++)
        assert_int_equal(hmm_job_fill(device, p + i * EACH, (uint8_t)(i + 1), EACH, &fences[i]), 0);
    for (int i = 0; i < JOBS; i++)
        must(fences[i]);
    for (int i = 0; i < JOBS * EACH; i++)
        if ((uint8_t)p[i] != (uint8_t)(i / EACH + 1))
            fail_msg("byte %d is %d", i, p[i]);
    unmap_pages(p, JOBS * EACH);
}

static void a_job_without_a_fence_runs(void **state)
{
    (void)state;
    char *p = map_pages(4096);
    volatile char *last = p + 4095;
    assert_int_equal(hmm_job_fill(device, p, 9, 4096, NULL), 0);
    uint64_t until = now_ms() + JOB_SECONDS * 1000;
    while (*last != 9 && now_ms() < until)
        sleep_ms(1);
    assert_int_equal(*last, 9);
    unmap_pages(p, 4096);
}

static void what_a_job_read_is_on_the_device(void **state)
{
    (void)state;
    char *p = map_pages(4 * MIB);
    fill_random(p, 4 * MIB, 7);
    device_crc(device, p, 4 * MIB);
    assert_int_equal(pages_in_state(p, 4 * MIB, HMM_PAGE_DEVICE), 4 * MIB / page_size());
    for (size_t i = 0; i < 4 * MIB; i += page_size())
        assert_false(page_present(p + i));
    unmap_pages(p, 4 * MIB);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(crc32c_of_the_check_string),
        TEST(crc32c_at_all_alignments_and_sizes),
        TEST(crc32c_across_blocks),
        TEST(crc32c_of_memory_never_touched_is_of_zeros),
        TEST(copy_at_all_alignments_and_sizes),
        TEST(copy_of_overlapping_ranges_is_memmove),
        TEST(fill_touches_nothing_beside_it),
        TEST(random_operations_match_a_plain_array),
        TEST(many_jobs_at_once_all_complete),
        TEST(a_job_without_a_fence_runs),
        TEST(what_a_job_read_is_on_the_device),
    };
    return cmocka_run_group_tests_name("ops", tests, NULL, NULL);
}
