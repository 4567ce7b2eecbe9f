/* SPDX-License-Identifier: MIT */
/* Operations on memory that is not there or protected: the address is that of the first byte. And operations that are ended. */
#include "operations.h"

enum { HOLE_PAGE = 20, PAGES = 40 };

/* 40 pages with a hole of two in them, or two that may only be read. Nothing else is mapped into the hole meanwhile. */
struct gap {
    char *p, *first; /* the first byte of the hole */
};

static struct gap gap_new(int protection)
{
    size_t page = page_size();
    struct gap g = {.p = map_pages(PAGES * page)};
    memset(g.p, 0, PAGES * page);
    g.first = g.p + HOLE_PAGE * page;
    if (protection == PROT_NONE)
        munmap(g.first, 2 * page);
    else
        mprotect(g.first, 2 * page, protection);
    return g;
}

static void gap_free(struct gap *g)
{
    unmap_pages(g->p, PAGES * page_size());
}

#define F(p) ((float *)(void *)(p))

/* All operations with one operand that has the gap, and good ones beside it. count: elements of 4 bytes; the operand begins at bad. */
static unsigned operations_over(struct hmm_operation *o, char *bad, char *good, uint64_t count, bool write)
{
    unsigned n = 0;
    uint64_t bytes = count * 4;
    uint32_t *zeros = (uint32_t *)(void *)good, *numbers = (uint32_t *)(void *)(good + bytes);
    if (write) {
        o[n++] = (struct hmm_operation){.kind = HMM_OP_COPY, .copy = {.dst = bad, .src = good, .bytes = bytes}};
        o[n++] = (struct hmm_operation){.kind = HMM_OP_FILL, .fill = {.dst = bad, .bytes = bytes, .value = 1}};
        o[n++] = (struct hmm_operation){.kind = HMM_OP_SAXPY, .saxpy = {.x = F(good), .y = F(bad), .count = count, .a = 1}};
        o[n++] = (struct hmm_operation){
            .kind = HMM_OP_GEMM,
            .gemm = {.a = F(good), .b = F(good), .c = F(bad), .m = 1, .n = (uint32_t)count, .k = 1, .beta = 1}};
        o[n++] = (struct hmm_operation){
            .kind = HMM_OP_GATHER,
            .gather = {
                .dst = bad, .table = good, .index = zeros, .count = count, .entries = 4, .element = 4, .index_type = HMM_U32}};
        o[n++] = (struct hmm_operation){.kind = HMM_OP_SCATTER,
                                        .scatter = {.table = bad,
                                                    .src = good,
                                                    .index = numbers,
                                                    .count = count,
                                                    .entries = count,
                                                    .element = 4,
                                                    .index_type = HMM_U32}};
        return n;
    }
    o[n++] = (struct hmm_operation){.kind = HMM_OP_COPY, .copy = {.dst = good, .src = bad, .bytes = bytes}};
    o[n++] = (struct hmm_operation){.kind = HMM_OP_COMPARE, .compare = {.a = good, .b = bad, .bytes = bytes}};
    o[n++] = (struct hmm_operation){.kind = HMM_OP_COMPARE, .compare = {.a = bad, .b = good, .bytes = bytes}};
    o[n++] = (struct hmm_operation){.kind = HMM_OP_CRC32C, .crc32c = {.src = bad, .bytes = bytes}};
    o[n++] = (struct hmm_operation){.kind = HMM_OP_HISTOGRAM,
                                    .histogram = {.src = bad, .bytes = bytes, .counts = (uint64_t *)(void *)good}};
    o[n++] =
        (struct hmm_operation){.kind = HMM_OP_REDUCE, .reduce = {.src = bad, .count = count, .type = HMM_F32, .how = HMM_SUM}};
    o[n++] = (struct hmm_operation){.kind = HMM_OP_SAXPY, .saxpy = {.x = F(bad), .y = F(good), .count = count, .a = 1}};
    o[n++] = (struct hmm_operation){.kind = HMM_OP_SORT, .sort = {.data = bad, .count = count, .type = HMM_U32}};
    o[n++] = (struct hmm_operation){
        .kind = HMM_OP_GEMM, .gemm = {.a = F(bad), .b = F(good), .c = F(good + bytes), .m = (uint32_t)count, .n = 1, .k = 1}};
    o[n++] = (struct hmm_operation){.kind = HMM_OP_GATHER,
                                    .gather = {.dst = good,
                                               .table = bad,
                                               .index = numbers,
                                               .count = count,
                                               .entries = count,
                                               .element = 4,
                                               .index_type = HMM_U32}};
    o[n++] = (struct hmm_operation){.kind = HMM_OP_GATHER,
                                    .gather = {.dst = good,
                                               .table = good + bytes,
                                               .index = bad,
                                               .count = count,
                                               .entries = 4,
                                               .element = 4,
                                               .index_type = HMM_U32}};
    return n;
}

/* skew: misaligned elements reach into the gap with some of their bytes. */
static void check_gap(int protection, bool write, size_t skew, bool settled)
{
    struct hmm_operation o[16];
    uint64_t count = PAGES * page_size() / 4 - 4;
    size_t bytes = count * 4;
    struct gap g = gap_new(protection);
    char *good = map_pages(BLOCK);
    unsigned n = operations_over(o, g.p + skew, good, count, write);
    for (unsigned i = 0; i < n; i++) {
        memset(good, 0, BLOCK);
        for (uint32_t k = 0; k < count; k++)
            memcpy(good + bytes + k * 4, &k, 4);
        if (settled) {
            hmm_migrate_to_device(device, g.p, PAGES * page_size(), NULL);
            hmm_migrate_to_device(device, good, BLOCK, NULL);
        }
        must_fail(device, &o[i], protection == PROT_NONE ? -EFAULT : -EACCES, g.first);
    }
    unmap_pages(good, BLOCK);
    gap_free(&g);
}

static void a_hole_is_named_by_its_first_byte(void **state)
{
    (void)state;
    for (size_t skew = 0; skew < 4; skew++)
        for (unsigned settled = 0; settled < 2; settled++) {
            check_gap(PROT_NONE, false, skew, settled);
            check_gap(PROT_NONE, true, skew, settled);
        }
}

static void memory_that_may_only_be_read_is_named(void **state)
{
    (void)state;
    skip_without_device_faults(); /* a bus write that changes nothing is not made */
    for (size_t skew = 0; skew < 4; skew++)
        check_gap(PROT_READ, true, skew, false);
}

static void memory_that_may_only_be_read_is_read(void **state)
{
    (void)state;
    size_t bytes = PAGES * page_size();
    char *p = map_pages(bytes), *copy = malloc(bytes);
    fill_random(p, bytes, 1);
    memcpy(copy, p, bytes);
    mprotect(p, bytes, PROT_READ);
    assert_int_equal(device_crc(device, p + 1, bytes - 1), crc_oracle(copy + 1, bytes - 1));
    mprotect(p, bytes / 2, PROT_READ | PROT_WRITE);
    assert_int_equal(device_crc(device, p + 1, bytes - 1), crc_oracle(copy + 1, bytes - 1));
    free(copy);
    unmap_pages(p, bytes);
}

/* ---- operations that are ended ------------------------------------------------------------------------------------ */

/* Takes minutes. */
static void closing_the_device_ends_operations(void **state)
{
    (void)state;
    enum { N = 6000 };
    hmm_dev dev = open_with("memory=64M,engines=2");
    size_t bytes = (size_t)N * N * 4;
    float *a = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(a != MAP_FAILED);
    struct hmm_operation product = {
        .kind = HMM_OP_GEMM, .gemm = {.a = a, .b = a, .c = a + (size_t)N * N, .m = N, .n = N, .k = N, .alpha = 1, .beta = 1}};
    hmm_fence *fence = submit_operation(dev, &product);
    sleep_ms(100);
    uint64_t before = now_ms();
    close_device(dev);
    assert_true(now_ms() - before < 10000);
    struct hmm_fence_info info = finish(fence);
    assert_int_equal(info.status, -ECANCELED);
    assert_non_null(strstr(info.message, "closed"));
    munmap(a, 2 * bytes);
}

/* What a job that ended held is let go: others get the memory, and the engine goes on. */
static void memory_of_an_operation_that_failed_is_free(void **state)
{
    (void)state;
    hmm_dev dev = open_with("engines=1");
    struct gap g = gap_new(PROT_NONE);
    char *good = map_pages(BLOCK);
    for (unsigned i = 0; i < 20; i++) {
        struct hmm_operation o = {.kind = HMM_OP_COPY, .copy = {.dst = good, .src = g.p, .bytes = PAGES * page_size()}};
        must_fail(dev, &o, -EFAULT, g.first);
        memset(g.p, (int)i, page_size());
        memset(good, (int)i + 1, BLOCK);
        assert_int_equal(device_crc(dev, good, BLOCK), crc_oracle(good, BLOCK));
    }
    unmap_pages(good, BLOCK);
    gap_free(&g);
}

static void no_room_for_a_sort(void **state)
{
    (void)state;
    size_t bytes = (size_t)1 << 46; /* no system has as much working space */
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        skip();
    struct hmm_operation o = {.kind = HMM_OP_SORT, .sort = {.data = p, .count = bytes / 8, .type = HMM_U64}};
    struct hmm_fence_info info = finish(submit_operation(device, &o));
    assert_int_equal(info.status, -ENOMEM);
    assert_non_null(strstr(info.message, "sort: no memory for 70368744177664 bytes"));
    munmap(p, bytes);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_hole_is_named_by_its_first_byte),          TEST(memory_that_may_only_be_read_is_named),
        TEST(memory_that_may_only_be_read_is_read),       TEST_WITHOUT_DEVICE(closing_the_device_ends_operations),
        TEST(memory_of_an_operation_that_failed_is_free), TEST(no_room_for_a_sort),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
