/* SPDX-License-Identifier: MIT */
/* What every operation refuses, and the memory that it says it uses. No operand is touched: the addresses are invented. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "job/job.h"

#define A ((void *)0x100000)
#define B ((void *)0x200000)
#define C ((void *)0x300000)
#define HIGH ((void *)(UINTPTR_MAX - 0xfff)) /* the last page */
#define HUGE ((uint64_t)1 << 62)

struct refusal {
    const char *name;
    struct hmm_operation op;
    const char *word; /* in the message */
};

#define COPY(...)                                                                                                              \
    {                                                                                                                          \
        .kind = HMM_OP_COPY, .copy = { __VA_ARGS__ }                                                                           \
    }
#define FILL(...)                                                                                                              \
    {                                                                                                                          \
        .kind = HMM_OP_FILL, .fill = { __VA_ARGS__ }                                                                           \
    }
#define COMPARE(...)                                                                                                           \
    {                                                                                                                          \
        .kind = HMM_OP_COMPARE, .compare = { __VA_ARGS__ }                                                                     \
    }
#define CRC(...)                                                                                                               \
    {                                                                                                                          \
        .kind = HMM_OP_CRC32C, .crc32c = { __VA_ARGS__ }                                                                       \
    }
#define HISTOGRAM(...)                                                                                                         \
    {                                                                                                                          \
        .kind = HMM_OP_HISTOGRAM, .histogram = { __VA_ARGS__ }                                                                 \
    }
#define REDUCE(...)                                                                                                            \
    {                                                                                                                          \
        .kind = HMM_OP_REDUCE, .reduce = { __VA_ARGS__ }                                                                       \
    }
#define SAXPY(...)                                                                                                             \
    {                                                                                                                          \
        .kind = HMM_OP_SAXPY, .saxpy = { __VA_ARGS__ }                                                                         \
    }
#define GEMM(...)                                                                                                              \
    {                                                                                                                          \
        .kind = HMM_OP_GEMM, .gemm = { __VA_ARGS__ }                                                                           \
    }
#define SORT(...)                                                                                                              \
    {                                                                                                                          \
        .kind = HMM_OP_SORT, .sort = { __VA_ARGS__ }                                                                           \
    }
#define GATHER(...)                                                                                                            \
    {                                                                                                                          \
        .kind = HMM_OP_GATHER, .gather = { __VA_ARGS__ }                                                                       \
    }
#define SCATTER(...)                                                                                                           \
    {                                                                                                                          \
        .kind = HMM_OP_SCATTER, .scatter = { __VA_ARGS__ }                                                                     \
    }
#define BFS(...)                                                                                                               \
    {                                                                                                                          \
        .kind = HMM_OP_BFS, .bfs = { __VA_ARGS__ }                                                                             \
    }
#define KERNEL(...)                                                                                                            \
    {                                                                                                                          \
        .kind = HMM_OP_KERNEL, .kernel = {.size = sizeof(struct hmm_launch), __VA_ARGS__ }                                     \
    }

static uint64_t nothing(hmm_accessor *acc, void *arg)
{
    (void)acc;
    (void)arg;
    return 0;
}

static const struct refusal refusals[] = {
    {"unknown kind", {.kind = HMM_OPS}, "no operation"},
    {"kind of all ones", {.kind = UINT32_MAX}, "no operation"},
    {"reserved", {.kind = HMM_OP_NOP, .reserved = 1}, "reserved"},

    {"copy from NULL", COPY(.dst = A, .bytes = 8), "src is NULL"},
    {"copy to NULL", COPY(.src = A, .bytes = 8), "dst is NULL"},
    {"copy of nothing", COPY(.dst = A, .src = B), "empty"},
    {"copy from the end of everything", COPY(.dst = A, .src = HIGH, .bytes = 0x1001),
     "src at 0xfffffffffffff000 of 4097 bytes wraps"},
    {"copy to the end of everything", COPY(.dst = HIGH, .src = A, .bytes = 0x1001),
     "dst at 0xfffffffffffff000 of 4097 bytes wraps"},
    {"copy of everything", COPY(.dst = A, .src = B, .bytes = UINT64_MAX), "wraps"},

    {"fill of NULL", FILL(.bytes = 1), "dst is NULL"},
    {"fill of nothing", FILL(.dst = A), "empty"},
    {"fill over the end", FILL(.dst = HIGH, .bytes = 0x1001), "wraps"},

    {"compare with NULL", COMPARE(.a = A, .bytes = 1), "b is NULL"},
    {"compare NULL", COMPARE(.b = A, .bytes = 1), "a is NULL"},
    {"compare nothing", COMPARE(.a = A, .b = B), "empty"},
    {"compare over the end", COMPARE(.a = A, .b = HIGH, .bytes = 0x1001), "b at"},

    {"checksum of NULL", CRC(.bytes = 1), "NULL"},
    {"checksum of nothing", CRC(.src = A), "empty"},
    {"checksum over the end", CRC(.src = HIGH, .bytes = HUGE), "wraps"},

    {"histogram of NULL", HISTOGRAM(.bytes = 1, .counts = B), "src is NULL"},
    {"histogram to NULL", HISTOGRAM(.src = A, .bytes = 1), "counts is NULL"},
    {"histogram of nothing", HISTOGRAM(.src = A, .counts = B), "empty"},
    {"histogram over the end", HISTOGRAM(.src = HIGH, .bytes = 0x1001, .counts = B), "wraps"},
    {"counts over the end", HISTOGRAM(.src = A, .bytes = 1, .counts = (void *)(UINTPTR_MAX - 2046)), "counts"},
    {"counts in the source", HISTOGRAM(.src = A, .bytes = 4096, .counts = (void *)0x100fff), "overlap"},
    {"source in the counts", HISTOGRAM(.src = (void *)0x1007ff, .bytes = 1, .counts = A), "overlap"},

    {"reduce NULL", REDUCE(.count = 1), "NULL"},
    {"reduce nothing", REDUCE(.src = A), "empty"},
    {"reduce an unknown type", REDUCE(.src = A, .count = 1, .type = HMM_F64 + 1), "type"},
    {"reduce in an unknown way", REDUCE(.src = A, .count = 1, .how = HMM_MAX + 1), "how"},
    {"reduce too many", REDUCE(.src = A, .count = HUGE, .type = HMM_I32), "overflow"},
    {"reduce too many doubles", REDUCE(.src = A, .count = HUGE >> 1, .type = HMM_F64), "overflow"},
    {"reduce over the end", REDUCE(.src = HIGH, .count = 1025, .type = HMM_U32), "wraps"},

    {"saxpy of NULL", SAXPY(.y = A, .count = 1), "x is NULL"},
    {"saxpy to NULL", SAXPY(.x = A, .count = 1), "y is NULL"},
    {"saxpy of NULL to NULL", SAXPY(.count = 1), "NULL"},
    {"saxpy of nothing", SAXPY(.x = A, .y = B), "empty"},
    {"saxpy shifted", SAXPY(.x = A, .y = (void *)0x100004, .count = 2), "overlap"},
    {"saxpy shifted by a byte", SAXPY(.x = (void *)0x100007, .y = A, .count = 2), "overlap"},
    {"saxpy of too many", SAXPY(.x = A, .y = B, .count = HUGE), "overflow"},
    {"saxpy over the end", SAXPY(.x = HIGH, .y = A, .count = 1025), "x at"},

    {"gemm of no rows", GEMM(.a = A, .b = B, .c = C, .n = 1, .k = 1), "m is 0"},
    {"gemm of no columns", GEMM(.a = A, .b = B, .c = C, .m = 1, .k = 1), "n is 0"},
    {"gemm of no products", GEMM(.a = A, .b = B, .c = C, .m = 1, .n = 1), "k is 0"},
    {"gemm with a NULL", GEMM(.b = B, .c = C, .m = 1, .n = 1, .k = 1), "a is NULL"},
    {"gemm with b NULL", GEMM(.a = A, .c = C, .m = 1, .n = 1, .k = 1), "b is NULL"},
    {"gemm with c NULL", GEMM(.a = A, .b = B, .m = 1, .n = 1, .k = 1), "c is NULL"},
    {"gemm, lda too small", GEMM(.a = A, .b = B, .c = C, .m = 2, .n = 3, .k = 4, .lda = 3), "lda"},
    {"gemm, ldb too small", GEMM(.a = A, .b = B, .c = C, .m = 2, .n = 3, .k = 4, .ldb = 2), "ldb"},
    {"gemm, ldc too small", GEMM(.a = A, .b = B, .c = C, .m = 2, .n = 3, .k = 4, .ldc = 2), "ldc"},
    {"gemm too large", GEMM(.a = A, .b = B, .c = C, .m = UINT32_MAX, .n = 1, .k = UINT32_MAX, .lda = UINT32_MAX), "overflow"},
    {"gemm over the end", GEMM(.a = A, .b = HIGH, .c = C, .m = 1, .n = 33, .k = 32), "b at"},
    {"gemm over the end by its last row", GEMM(.a = A, .b = B, .c = HIGH, .m = 2, .n = 1, .k = 1, .ldc = 1024), "c at"},
    {"gemm, c in a", GEMM(.a = A, .b = B, .c = (void *)0x10000c, .m = 2, .n = 1, .k = 2), "overlap"},
    {"gemm, c in b", GEMM(.a = A, .b = B, .c = (void *)0x1ffff9, .m = 2, .n = 1, .k = 2), "overlap"},

    {"sort NULL", SORT(.count = 1, .type = HMM_U32), "NULL"},
    {"sort nothing", SORT(.data = A, .type = HMM_U32), "empty"},
    {"sort signed", SORT(.data = A, .count = 1, .type = HMM_I32), "type"},
    {"sort floats", SORT(.data = A, .count = 1, .type = HMM_F64), "type"},
    {"sort an unknown type", SORT(.data = A, .count = 1, .type = 77), "type"},
    {"sort too many", SORT(.data = A, .count = HUGE, .type = HMM_U64), "overflow"},
    {"sort over the end", SORT(.data = HIGH, .count = 513, .type = HMM_U64), "wraps"},

#define G .dst = A, .table = B, .index = C, .count = 4, .entries = 4
    {"gather to NULL", GATHER(.table = B, .index = C, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "dst is NULL"},
    {"gather from NULL", GATHER(.dst = A, .index = C, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "table is NULL"},
    {"gather by NULL", GATHER(.dst = A, .table = B, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "index is NULL"},
    {"gather nothing", GATHER(.dst = A, .table = B, .index = C, .entries = 4, .element = 4, .index_type = HMM_U32), "empty"},
    {"gather from nothing", GATHER(.dst = A, .table = B, .index = C, .count = 4, .element = 4, .index_type = HMM_U32), "empty"},
    {"gather elements of 0", GATHER(G, .index_type = HMM_U32), "element"},
    {"gather elements of 3", GATHER(G, .element = 3, .index_type = HMM_U32), "element"},
    {"gather elements of 32", GATHER(G, .element = 32, .index_type = HMM_U32), "element"},
    {"gather by signed numbers", GATHER(G, .element = 4, .index_type = HMM_I32), "index_type"},
    {"gather by floats", GATHER(G, .element = 4, .index_type = HMM_F32), "index_type"},
    {"gather too many",
     GATHER(.dst = A, .table = B, .index = C, .count = HUGE, .entries = 4, .element = 4, .index_type = HMM_U32), "overflow"},
    {"gather from too many",
     GATHER(.dst = A, .table = B, .index = C, .count = 4, .entries = HUGE, .element = 16, .index_type = HMM_U32), "overflow"},
    {"gather over the end",
     GATHER(.dst = A, .table = B, .index = HIGH, .count = 513, .entries = 4, .element = 4, .index_type = HMM_U64), "index at"},
    {"gather into the table",
     GATHER(.dst = (void *)0x20000f, .table = B, .index = C, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "overlap"},
    {"gather into the index",
     GATHER(.dst = (void *)0x2ffff1, .table = B, .index = C, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "overlap"},

    {"scatter to NULL", SCATTER(.src = B, .index = C, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "table is NULL"},
    {"scatter from NULL", SCATTER(.table = A, .index = C, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "src is NULL"},
    {"scatter by NULL", SCATTER(.table = A, .src = B, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "index is NULL"},
    {"scatter nothing", SCATTER(.table = A, .src = B, .index = C, .entries = 4, .element = 4, .index_type = HMM_U32), "empty"},
    {"scatter to nothing", SCATTER(.table = A, .src = B, .index = C, .count = 4, .element = 4, .index_type = HMM_U32), "empty"},
    {"scatter elements of 12",
     SCATTER(.table = A, .src = B, .index = C, .count = 4, .entries = 4, .element = 12, .index_type = HMM_U32), "element"},
    {"scatter by an unknown type",
     SCATTER(.table = A, .src = B, .index = C, .count = 4, .entries = 4, .element = 4, .index_type = 9), "index_type"},
    {"scatter too many",
     SCATTER(.table = A, .src = B, .index = C, .count = HUGE, .entries = 4, .element = 8, .index_type = HMM_U32), "overflow"},
    {"scatter over its source",
     SCATTER(.table = (void *)0x20000f, .src = B, .index = C, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "overlap"},
    {"scatter over its index",
     SCATTER(.table = A, .src = B, .index = (void *)0x100001, .count = 4, .entries = 4, .element = 4, .index_type = HMM_U32),
     "overlap"},
    {"scatter over the end",
     SCATTER(.table = HIGH, .src = B, .index = C, .count = 4, .entries = 513, .element = 8, .index_type = HMM_U32), "table at"},

    {"bfs of no vertices", BFS(.offsets = A, .edges = B, .distance = C, .nedges = 1), "vertices"},
    {"bfs from no vertex", BFS(.offsets = A, .edges = B, .distance = C, .nedges = 1, .vertices = 4, .source = 4), "source"},
    {"bfs without offsets", BFS(.edges = B, .distance = C, .nedges = 1, .vertices = 4), "offsets is NULL"},
    {"bfs without edges", BFS(.offsets = A, .distance = C, .nedges = 1, .vertices = 4), "edges is NULL"},
    {"bfs to NULL", BFS(.offsets = A, .edges = B, .nedges = 1, .vertices = 4), "distance is NULL"},
    {"bfs of too many edges", BFS(.offsets = A, .edges = B, .distance = C, .nedges = HUGE, .vertices = 4), "overflow"},
    {"bfs over the end", BFS(.offsets = HIGH, .edges = B, .distance = C, .nedges = 1, .vertices = 512), "offsets at"},

    {"launch of another size", {.kind = HMM_OP_KERNEL, .kernel = {.size = 8, .kernel = nothing}}, "size"},
    {"launch of nothing", KERNEL(.deadline_ms = 0), "kernel is NULL"},
    {"object without symbol", KERNEL(.kernel = nothing, .object = "x.so"), "symbol"},
    {"symbol without object", KERNEL(.symbol = "x"), "object"},
    {"argument of NULL", KERNEL(.kernel = nothing, .arg_size = 1), "NULL"},
    {"argument too large", KERNEL(.kernel = nothing, .arg = A, .arg_size = 65537), "65537 bytes is too large"},
    {"too many ranges", KERNEL(.kernel = nothing, .ranges = A, .nranges = 65), "too many"},
    {"ranges of NULL", KERNEL(.kernel = nothing, .nranges = 1), "ranges is NULL"},
    {"launch, reserved", KERNEL(.kernel = nothing, .reserved = 1), "reserved"},
};

static void every_bad_operand_is_refused(void **state)
{
    (void)state;
    unsigned wrong = 0;
    for (unsigned i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
        struct hmm_range ranges[OPERATION_RANGES_MAX];
        unsigned n = 77;
        int r = operation_check(&refusals[i].op, NULL, ranges, &n);
        if (r == -EINVAL && strstr(hmm_last_message(), refusals[i].word) && n == 77)
            continue;
        fprintf(stderr, "%s: %d, '%s' lacks '%s'\n", refusals[i].name, r, r ? hmm_last_message() : "", refusals[i].word);
        wrong++;
    }
    assert_int_equal(wrong, 0);
}

struct use {
    uintptr_t addr;
    uint64_t bytes;
    uint32_t write;
};

struct acceptance {
    const char *name;
    struct hmm_operation op;
    struct use uses[OPERATION_RANGES_MAX];
};

static const struct acceptance acceptances[] = {
    {"nop", {.kind = HMM_OP_NOP}, {{0}}},
    {"copy", COPY(.dst = A, .src = B, .bytes = 5), {{0x200000, 5, 0}, {0x100000, 5, 1}}},
    {"copy onto itself, shifted", COPY(.dst = A, .src = (void *)0x100001, .bytes = 5), {{0x100001, 5, 0}, {0x100000, 5, 1}}},
    {"copy up to the last byte but one",
     COPY(.dst = HIGH, .src = A, .bytes = 0xfff),
     {{0x100000, 0xfff, 0}, {UINTPTR_MAX - 0xfff, 0xfff, 1}}},
    {"fill", FILL(.dst = A, .bytes = 7), {{0x100000, 7, 1}}},
    {"compare with itself", COMPARE(.a = A, .b = A, .bytes = 3), {{0x100000, 3, 0}, {0x100000, 3, 0}}},
    {"checksum", CRC(.src = (void *)3, .bytes = 9), {{3, 9, 0}}},
    {"histogram, side by side",
     HISTOGRAM(.src = A, .bytes = 4096, .counts = (void *)0x101000),
     {{0x100000, 4096, 0}, {0x101000, 2048, 1}}},
    {"reduce", REDUCE(.src = A, .count = 3, .type = HMM_F32, .how = HMM_MAX), {{0x100000, 12, 0}}},
    {"reduce of 8 bytes", REDUCE(.src = A, .count = 3, .type = HMM_I64), {{0x100000, 24, 0}}},
    {"saxpy in place", SAXPY(.x = A, .y = A, .count = 4), {{0x100000, 16, 1}}},
    {"saxpy side by side", SAXPY(.x = A, .y = (void *)0x100010, .count = 4), {{0x100010, 16, 1}, {0x100000, 16, 0}}},
    {"gemm", GEMM(.a = A, .b = B, .c = C, .m = 2, .n = 3, .k = 4), {{0x100000, 32, 0}, {0x200000, 48, 0}, {0x300000, 24, 1}}},
    {"gemm of parts of matrices",
     GEMM(.a = A, .b = A, .c = C, .m = 2, .n = 3, .k = 4, .lda = 10, .ldb = 11, .ldc = 12),
     {{0x100000, 56, 0}, {0x100000, 144, 0}, {0x300000, 60, 1}}},
    {"sort", SORT(.data = A, .count = 10, .type = HMM_U64), {{0x100000, 80, 1}}},
    {"gather", GATHER(G, .element = 16, .index_type = HMM_U64), {{0x100000, 64, 1}, {0x200000, 64, 0}, {0x300000, 32, 0}}},
    {"scatter",
     SCATTER(.table = A, .src = B, .index = C, .count = 2, .entries = 9, .element = 1, .index_type = HMM_U32),
     {{0x100000, 9, 1}, {0x200000, 2, 0}, {0x300000, 8, 0}}},
    {"bfs",
     BFS(.offsets = A, .edges = B, .distance = C, .nedges = 6, .vertices = 4, .source = 3),
     {{0x100000, 40, 0}, {0x300000, 16, 1}, {0x200000, 24, 0}}},
    {"bfs without edges", BFS(.offsets = A, .distance = C, .vertices = 1), {{0x100000, 16, 0}, {0x300000, 4, 1}}},
    {"bfs of the most vertices",
     BFS(.offsets = A, .distance = (void *)(1ull << 40), .vertices = UINT32_MAX),
     {{0x100000, (uint64_t)8 << 32, 0}, {(uintptr_t)1 << 40, 4ull * UINT32_MAX, 1}}},
    {"kernel", KERNEL(.kernel = nothing, .arg = A, .arg_size = 65536, .ranges = B, .nranges = 64), {{0}}},
    {"kernel by name", KERNEL(.object = "x.so", .symbol = "x"), {{0}}},
};

static void good_operations_say_what_they_use(void **state)
{
    (void)state;
    for (unsigned i = 0; i < sizeof(acceptances) / sizeof(acceptances[0]); i++) {
        const struct acceptance *a = &acceptances[i];
        struct hmm_range ranges[OPERATION_RANGES_MAX];
        unsigned n = 77, expected = 0;
        int r = operation_check(&a->op, NULL, ranges, &n);
        if (r)
            fail_msg("%s: %d, %s", a->name, r, hmm_last_message());
        while (expected < OPERATION_RANGES_MAX && a->uses[expected].addr)
            expected++;
        if (n != expected)
            fail_msg("%s: %u ranges, not %u", a->name, n, expected);
        for (unsigned k = 0; k < n; k++)
            if (ranges[k].addr != a->uses[k].addr || ranges[k].bytes != a->uses[k].bytes ||
                ranges[k].write != a->uses[k].write || ranges[k].reserved)
                fail_msg("%s: range %u is %#lx + %#lx, write %u", a->name, k, (unsigned long)ranges[k].addr,
                         (unsigned long)ranges[k].bytes, ranges[k].write);
    }
}

static void messages_name_the_call_or_the_operation(void **state)
{
    (void)state;
    struct hmm_range ranges[OPERATION_RANGES_MAX];
    unsigned n;
    struct hmm_operation op = COPY(.dst = A, .bytes = 8);
    assert_int_equal(operation_check(&op, "hmm_job_copy", ranges, &n), -EINVAL);
    assert_string_equal(hmm_last_message(), "hmm_job_copy: src is NULL");
    assert_int_equal(operation_check(&op, NULL, ranges, &n), -EINVAL);
    assert_string_equal(hmm_last_message(), "hmm_job_submit: copy: src is NULL");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_bad_operand_is_refused),
        cmocka_unit_test(good_operations_say_what_they_use),
        cmocka_unit_test(messages_name_the_call_or_the_operation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
