/* SPDX-License-Identifier: MIT */
/*
 * The operations of a device on memory that is there already, against the same loops on plain memory: one job on one engine, one thread.
 * The reference calls the soft device's own loops (drivers/soft/engine/loops.h) over all of the operand at once, and the C library's
 * memcpy and memset; what the ratio shows is what it costs to reach memory through translations that may be taken away at any time,
 * and to submit a job. Both sides have pages of the same size: those of the device's memory.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "soft/engine/loops_sort.h"

#define BUFFERS 3
#define GEMM_SIDE_MAX 768
#define DEGREE 8 /* neighbours of a vertex */
/* As in ops_index.c and ops_bfs.c. */
#define BATCH 64
#define OFFSETS_AHEAD 16
#define EDGES_AHEAD 8

/* One operation with its operands, on either side. */
struct side {
    char *buffer[BUFFERS];
    size_t bytes; /* of each */
};

struct work {
    const char *name;
    void (*fill)(const struct side *s, uint64_t seed);
    void (*describe)(const struct side *s, struct hmm_operation *o);
    uint64_t (*reference)(const struct side *s, const struct hmm_operation *o);
    uint64_t (*touched)(const struct side *s); /* bytes that it goes over */
    bool restore;                              /* buffer 0 is what buffer 1 was before each run */
};

static uint64_t touched_one(const struct side *s)
{
    return s->bytes;
}

static uint64_t touched_two(const struct side *s)
{
    return 2 * s->bytes;
}

static void fill_words(const struct side *s, uint64_t seed)
{
    for (unsigned i = 0; i < BUFFERS; i++)
        bench_fill(s->buffer[i], s->bytes, seed + i);
}

static void fill_equal(const struct side *s, uint64_t seed)
{
    for (unsigned i = 0; i < BUFFERS; i++)
        bench_fill(s->buffer[i], s->bytes, seed);
}

static void fill_floats(const struct side *s, uint64_t seed)
{
    for (unsigned i = 0; i < BUFFERS; i++)
        for (size_t k = 0; k < s->bytes / sizeof(float); k++)
            ((float *)(void *)s->buffer[i])[k] = (float)(bench_random(&seed) >> 40) / (1 << 24);
}

/* ---- streams ---------------------------------------------------------------------------------------------------------- */

static void copy(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_COPY;
    o->copy = (struct hmm_op_copy){.dst = s->buffer[0], .src = s->buffer[1], .bytes = s->bytes};
}

static uint64_t plain_copy(const struct side *s, const struct hmm_operation *o)
{
    memcpy(s->buffer[0], s->buffer[1], o->copy.bytes);
    return 0;
}

static void fill(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_FILL;
    o->fill = (struct hmm_op_fill){.dst = s->buffer[0], .bytes = s->bytes, .value = 0x5a};
}

static uint64_t plain_fill(const struct side *s, const struct hmm_operation *o)
{
    memset(s->buffer[0], o->fill.value, o->fill.bytes);
    return 0;
}

static void compare(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_COMPARE;
    o->compare = (struct hmm_op_compare){.a = s->buffer[0], .b = s->buffer[1], .bytes = s->bytes};
}

static uint64_t plain_compare(const struct side *s, const struct hmm_operation *o)
{
    return loop_compare(s->buffer[0], s->buffer[1], o->compare.bytes);
}

static void crc32c(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_CRC32C;
    o->crc32c = (struct hmm_op_crc32c){.src = s->buffer[0], .bytes = s->bytes};
}

static uint64_t plain_crc32c(const struct side *s, const struct hmm_operation *o)
{
    return loop_crc32c(0, s->buffer[0], o->crc32c.bytes);
}

static void histogram(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_HISTOGRAM;
    o->histogram =
        (struct hmm_op_histogram){.src = s->buffer[0], .bytes = s->bytes, .counts = (uint64_t *)(void *)s->buffer[1]};
}

static uint64_t plain_histogram(const struct side *s, const struct hmm_operation *o)
{
    struct loop_histogram h = {0};
    uint64_t *counts = (uint64_t *)(void *)s->buffer[1];

    loop_histogram(&h, s->buffer[0], o->histogram.bytes);
    for (unsigned v = 0; v < 256; v++)
        counts[v] = h.part[0][v] + h.part[1][v] + h.part[2][v] + h.part[3][v];
    return 0;
}

static void saxpy(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_SAXPY;
    o->saxpy = (struct hmm_op_saxpy){
        .x = (float *)(void *)s->buffer[1], .y = (float *)(void *)s->buffer[0], .count = s->bytes / sizeof(float), .a = 0.5f};
}

static uint64_t plain_saxpy(const struct side *s, const struct hmm_operation *o)
{
    loop_saxpy((any_f32 *)s->buffer[0], (const any_f32 *)s->buffer[1], o->saxpy.count, o->saxpy.a);
    return 0;
}

/* ---- reductions ------------------------------------------------------------------------------------------------------- */

static void sum_f64(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_REDUCE;
    o->reduce =
        (struct hmm_op_reduce){.src = s->buffer[0], .count = s->bytes / sizeof(double), .type = HMM_F64, .how = HMM_SUM};
}

static void min_f32(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_REDUCE;
    o->reduce = (struct hmm_op_reduce){.src = s->buffer[0], .count = s->bytes / sizeof(float), .type = HMM_F32, .how = HMM_MIN};
}

static uint64_t plain_reduce(const struct side *s, const struct hmm_operation *o)
{
    enum loop_type type = (enum loop_type)o->reduce.type;
    enum loop_how how = (enum loop_how)o->reduce.how;
    struct loop_reduction r;

    loop_reduce_begin(&r, how);
    loop_reduce(&r, type, how, 0, s->buffer[0], o->reduce.count);
    return loop_reduce_end(&r, type, how);
}

/* ---- products of matrices ----------------------------------------------------------------------------------------------- */

static size_t gemm_side(const struct side *s)
{
    size_t side = 64;

    while (side < GEMM_SIDE_MAX && (side + 64) * (side + 64) * sizeof(float) <= s->bytes)
        side += 64;
    return side;
}

static uint64_t touched_gemm(const struct side *s)
{
    return 3 * gemm_side(s) * gemm_side(s) * sizeof(float);
}

static void gemm(const struct side *s, struct hmm_operation *o)
{
    uint32_t side = (uint32_t)gemm_side(s);

    o->kind = HMM_OP_GEMM;
    o->gemm = (struct hmm_op_gemm){.a = (float *)(void *)s->buffer[0],
                                   .b = (float *)(void *)s->buffer[1],
                                   .c = (float *)(void *)s->buffer[2],
                                   .m = side,
                                   .n = side,
                                   .k = side,
                                   .alpha = 1};
}

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

static uint64_t plain_gemm(const struct side *s, const struct hmm_operation *o)
{
    size_t side = o->gemm.m;
    const float *a = (float *)(void *)s->buffer[0], *b = (float *)(void *)s->buffer[1];
    float *c = (float *)(void *)s->buffer[2];
    float *packed_a = calloc((size_t)LOOP_GEMM_M * LOOP_GEMM_K, sizeof(float));
    float *packed_b = calloc((size_t)LOOP_GEMM_N * LOOP_GEMM_K, sizeof(float));
    float *product = calloc((size_t)LOOP_GEMM_M * LOOP_GEMM_N, sizeof(float));

    for (size_t j = 0; j < side; j += LOOP_GEMM_N)
        for (size_t p = 0; p < side; p += LOOP_GEMM_K) {
            size_t n = least(side - j, LOOP_GEMM_N), k = least(side - p, LOOP_GEMM_K);

            for (size_t row = 0; row < k; row++)
                loop_gemm_pack_b(packed_b, row, k, b + (p + row) * side + j, n);
            for (size_t i = 0; i < side; i += LOOP_GEMM_M) {
                size_t m = least(side - i, LOOP_GEMM_M);

                for (size_t row = 0; row < m; row++)
                    loop_gemm_pack_a(packed_a, row, a + (i + row) * side + p, k);
                loop_gemm_multiply(product, packed_a, packed_b, m, n, k);
                for (size_t row = 0; row < m; row++)
                    loop_gemm_update(c + (i + row) * side + j, product + row * LOOP_GEMM_N, n, o->gemm.alpha,
                                     p ? 1 : o->gemm.beta);
            }
        }
    free(packed_a);
    free(packed_b);
    free(product);
    return 0;
}

/* ---- sort --------------------------------------------------------------------------------------------------------------- */

static void sort(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_SORT;
    o->sort = (struct hmm_op_sort){.data = s->buffer[0], .count = s->bytes / sizeof(uint32_t), .type = HMM_U32};
}

static inline void sort_put(void *to, uint64_t place, const char *numbers, unsigned n)
{
    memcpy((char *)to + place * sizeof(uint32_t), numbers, n * sizeof(uint32_t));
}

/* An even number of passes, one for each byte: the result is where it began. */
static uint64_t plain_sort(const struct side *s, const struct hmm_operation *o)
{
    const size_t passes = sizeof(uint32_t), bytes = o->sort.count * sizeof(uint32_t);
    uint64_t(*counts)[SORT_DIGITS] = calloc(passes, sizeof(*counts));
    struct sort_lines *lines = aligned_alloc(SORT_LINE, sizeof(*lines));
    char *from = s->buffer[0], *other = malloc(bytes), *to = other;

    sort_count(counts, from, o->sort.count, sizeof(uint32_t));
    for (unsigned place = 0; place < passes; place++) {
        char *old = from;

        sort_begin(lines, counts[place], sizeof(uint32_t));
        sort_some(lines, from, o->sort.count, sizeof(uint32_t), 8 * place, sort_put, to);
        sort_end(lines, sizeof(uint32_t), sort_put, to);
        from = to;
        to = old;
    }
    free(other);
    free(lines);
    free(counts);
    return 0;
}

/* ---- tables ------------------------------------------------------------------------------------------------------------- */

/* Table, row, index. */
static void fill_lookup(const struct side *s, uint64_t seed)
{
    uint32_t *index = (uint32_t *)(void *)s->buffer[2];
    size_t entries = s->bytes / sizeof(uint32_t);

    bench_fill(s->buffer[0], s->bytes, seed);
    bench_fill(s->buffer[1], s->bytes, seed + 1);
    for (size_t i = 0; i < entries; i++)
        index[i] = (uint32_t)(bench_random(&seed) % entries);
}

static void gather(const struct side *s, struct hmm_operation *o)
{
    uint64_t n = s->bytes / sizeof(uint32_t);

    o->kind = HMM_OP_GATHER;
    o->gather = (struct hmm_op_gather){.dst = s->buffer[1],
                                       .table = s->buffer[0],
                                       .index = s->buffer[2],
                                       .count = n,
                                       .entries = n,
                                       .element = sizeof(uint32_t),
                                       .index_type = HMM_U32};
}

static void scatter(const struct side *s, struct hmm_operation *o)
{
    uint64_t n = s->bytes / sizeof(uint32_t);

    o->kind = HMM_OP_SCATTER;
    o->scatter = (struct hmm_op_scatter){.table = s->buffer[0],
                                         .src = s->buffer[1],
                                         .index = s->buffer[2],
                                         .count = n,
                                         .entries = n,
                                         .element = sizeof(uint32_t),
                                         .index_type = HMM_U32};
}

/* As the operation does it: checks its indices, and asks for a batch of elements before it uses the first. */
static unsigned find_batch(char *table, const uint32_t *index, unsigned n, uint64_t entries, bool write, char **found)
{
    for (unsigned i = 0; i < n; i++) {
        uint64_t entry = loop_load(index + i, sizeof(uint32_t));

        if (entry >= entries)
            return i;
        found[i] = table + entry * sizeof(uint32_t);
        if (write)
            __builtin_prefetch(found[i], 1);
        else
            __builtin_prefetch(found[i], 0);
    }
    return n;
}

static uint64_t plain_gather(const struct side *s, const struct hmm_operation *o)
{
    char *found[BATCH], *row = s->buffer[1];

    for (uint64_t done = 0; done < o->gather.count; done += BATCH) {
        unsigned n = find_batch(s->buffer[0], (uint32_t *)(void *)s->buffer[2] + done, BATCH, o->gather.entries, false, found);

        for (unsigned i = 0; i < n; i++)
            memcpy(row + (done + i) * sizeof(uint32_t), found[i], sizeof(uint32_t));
    }
    return 0;
}

static uint64_t plain_scatter(const struct side *s, const struct hmm_operation *o)
{
    char *found[BATCH];
    const char *row = s->buffer[1];

    for (uint64_t done = 0; done < o->scatter.count; done += BATCH) {
        unsigned n = find_batch(s->buffer[0], (uint32_t *)(void *)s->buffer[2] + done, BATCH, o->scatter.entries, true, found);

        for (unsigned i = 0; i < n; i++)
            memcpy(found[i], row + (done + i) * sizeof(uint32_t), sizeof(uint32_t));
    }
    return 0;
}

/* ---- graphs ------------------------------------------------------------------------------------------------------------- */

static uint32_t vertices_of(const struct side *s)
{
    return (uint32_t)(s->bytes / (DEGREE * sizeof(uint32_t)));
}

static uint64_t touched_bfs(const struct side *s)
{
    return vertices_of(s) * (DEGREE * sizeof(uint32_t) + sizeof(uint64_t) + sizeof(uint32_t));
}

/* Offsets, edges, distances; neighbours are anywhere. */
static void fill_graph(const struct side *s, uint64_t seed)
{
    uint32_t vertices = vertices_of(s), *edges = (uint32_t *)(void *)s->buffer[1];
    uint64_t *offsets = (uint64_t *)(void *)s->buffer[0];

    for (unsigned i = 0; i < BUFFERS; i++)
        memset(s->buffer[i], 0, s->bytes);
    for (uint64_t v = 0; v <= vertices; v++)
        offsets[v] = v * DEGREE;
    for (uint64_t i = 0; i < (uint64_t)vertices * DEGREE; i++)
        edges[i] = (uint32_t)(bench_random(&seed) % vertices);
}

static void bfs(const struct side *s, struct hmm_operation *o)
{
    o->kind = HMM_OP_BFS;
    o->bfs = (struct hmm_op_bfs){.offsets = (uint64_t *)(void *)s->buffer[0],
                                 .edges = (uint32_t *)(void *)s->buffer[1],
                                 .distance = (uint32_t *)(void *)s->buffer[2],
                                 .nedges = (uint64_t)vertices_of(s) * DEGREE,
                                 .vertices = vertices_of(s),
                                 .source = 0};
}

/* The same algorithm, with the same checks; asks ahead for the same. */
static uint64_t plain_bfs(const struct side *s, const struct hmm_operation *o)
{
    const uint64_t *offsets = (uint64_t *)(void *)s->buffer[0];
    const uint32_t *edges = (uint32_t *)(void *)s->buffer[1];
    uint32_t *distance = (uint32_t *)(void *)s->buffer[2], vertices = o->bfs.vertices, head = 0, tail = 1;
    uint32_t *queue = malloc(vertices * sizeof(*queue));
    uint64_t *seen = calloc(vertices / 64 + 1, sizeof(*seen));

    memset(distance, 0xff, vertices * sizeof(*distance));
    queue[0] = o->bfs.source;
    seen[queue[0] / 64] |= UINT64_C(1) << queue[0] % 64;
    distance[queue[0]] = 0;
    for (uint32_t d = 1; head < tail; d++)
        for (uint32_t end = tail; head < end; head++) {
            uint64_t i = offsets[queue[head]], last = offsets[queue[head] + 1];

            if (tail - head > OFFSETS_AHEAD) {
                __builtin_prefetch(&offsets[queue[head + OFFSETS_AHEAD]]);
                __builtin_prefetch(&edges[offsets[queue[head + EDGES_AHEAD]]]);
            }
            if (i > last || last > o->bfs.nedges)
                break;
            for (; i < last; i++) {
                uint32_t to = edges[i];

                if (to >= vertices)
                    break;
                if (seen[to / 64] >> to % 64 & 1)
                    continue;
                seen[to / 64] |= UINT64_C(1) << to % 64;
                queue[tail++] = to;
                distance[to] = d;
            }
        }
    free(queue);
    free(seen);
    return tail;
}

/* ---- measuring ---------------------------------------------------------------------------------------------------------- */

static const struct work works[] = {
    {"op_copy", fill_words, copy, plain_copy, touched_one, false},
    {"op_fill", fill_words, fill, plain_fill, touched_one, false},
    {"op_compare", fill_equal, compare, plain_compare, touched_two, false},
    {"op_crc32c", fill_words, crc32c, plain_crc32c, touched_one, false},
    {"op_histogram", fill_words, histogram, plain_histogram, touched_one, false},
    {"op_sum_f64", fill_floats, sum_f64, plain_reduce, touched_one, false},
    {"op_min_f32", fill_floats, min_f32, plain_reduce, touched_one, false},
    {"op_saxpy", fill_floats, saxpy, plain_saxpy, touched_two, false},
    {"op_gemm", fill_floats, gemm, plain_gemm, touched_gemm, false},
    {"op_sort", fill_equal, sort, plain_sort, touched_one, true},
    {"op_gather", fill_lookup, gather, plain_gather, touched_one, false},
    {"op_scatter", fill_lookup, scatter, plain_scatter, touched_one, false},
    {"op_bfs", fill_graph, bfs, plain_bfs, touched_bfs, false},
};
#define WORKS (sizeof(works) / sizeof(works[0]))

static int operate(struct bench_env *env, const struct hmm_operation *o, uint64_t *result)
{
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation = *o};
    struct hmm_fence_info info = {.size = sizeof(info)};
    hmm_fence *fence;

    if (hmm_job_submit(env->device, &desc, &fence))
        return bench_fail(env, "a job cannot be submitted: %s", hmm_last_message());
    hmm_fence_wait(fence, -1);
    hmm_fence_info(fence, &info);
    hmm_fence_put(fence);
    if (info.status)
        return bench_fail(env, "a job failed: %s", info.message);
    *result = info.result;
    return 0;
}

static int restore(struct bench_env *env, const struct side *plain, const struct side *device)
{
    struct hmm_operation o = {0};
    uint64_t result;

    plain_copy(plain, (copy(plain, &o), &o));
    copy(device, &o);
    return operate(env, &o, &result);
}

static int one_pair(struct bench_env *env, const struct work *w, const struct side *plain, const struct side *device,
                    struct samples *s)
{
    struct hmm_operation o = {0}, p = {0};
    uint64_t right, found;
    double start, reference, ours;

    w->describe(plain, &p);
    w->describe(device, &o);
    if (w->restore && restore(env, plain, device))
        return 1;
    start = bench_now();
    right = w->reference(plain, &p);
    reference = bench_now() - start;
    start = bench_now();
    if (operate(env, &o, &found))
        return 1;
    ours = bench_now() - start;
    if (right != found)
        return bench_fail(env, "WRONG RESULT: %" PRIu64 " in place of %" PRIu64, found, right);
    if (s)
        samples_add(s, reference, ours);
    return 0;
}

static int same(struct bench_env *env, const struct side *plain, const struct side *device)
{
    for (unsigned i = 0; i < BUFFERS; i++) {
        size_t at = loop_compare(plain->buffer[i], device->buffer[i], plain->bytes);

        if (at < plain->bytes)
            return bench_fail(env, "WRONG CONTENT of operand %u at offset %zu", i, at);
    }
    return 0;
}

static int one_work(struct bench_env *env, const struct work *w, enum bench_page page, const struct side *plain,
                    const struct side *device)
{
    static struct samples s;

    s.n = 0;
    w->fill(plain, env->seed);
    for (unsigned i = 0; i < BUFFERS; i++) {
        memcpy(device->buffer[i], plain->buffer[i], plain->bytes);
        if (bench_to_device(env, device->buffer[i], device->bytes, BENCH_4K))
            return 1;
    }
    if (one_pair(env, w, plain, device, NULL)) /* warms up */
        return 1;
    for (unsigned i = 0; i < env->runs; i++)
        if (one_pair(env, w, plain, device, &s))
            return 1;
    if (same(env, plain, device))
        return 1;
    samples_report(env, &s, page, w->touched(plain), BENCH_GIB_PER_SECOND, 0,
                   page == BENCH_THP ? "device memory and reference in huge pages"
                                     : "device memory and reference in small pages");
    return 0;
}

/* Device memory of the soft device is shared memory. */
static bool shared_memory_is_huge(void)
{
    char line[128] = "";
    FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "re");

    if (file) {
        if (!fgets(line, sizeof(line), file))
            line[0] = 0;
        fclose(file);
    }
    return strstr(line, "[always]") || strstr(line, "[within_size]") || strstr(line, "[advise]") || strstr(line, "[force]");
}

static int map_side(struct bench_env *env, struct side *s, enum bench_page page)
{
    s->bytes = env->size / (BUFFERS + 1) / BENCH_BLOCK * BENCH_BLOCK;
    if (s->bytes == 0)
        s->bytes = BENCH_BLOCK;
    for (unsigned i = 0; i < BUFFERS; i++) {
        s->buffer[i] = bench_map(env, s->bytes, page);
        if (!s->buffer[i])
            return 1;
    }
    return 0;
}

static void unmap_side(const struct side *s)
{
    for (unsigned i = 0; i < BUFFERS; i++)
        bench_unmap(s->buffer[i], s->bytes);
}

static int run(struct bench_env *env)
{
    enum bench_page page = shared_memory_is_huge() && bench_page_available(env, BENCH_THP) ? BENCH_THP : BENCH_4K;
    const char *name = env->name;
    char full[64];
    struct side plain = {0}, device = {0};
    int failed = bench_open(env);

    if (failed)
        return failed;
    failed = map_side(env, &plain, page) || map_side(env, &device, page);
    for (size_t i = 0; i < WORKS && !failed; i++) {
        snprintf(full, sizeof(full), "%s%s", works[i].name, env->suffix);
        env->name = full;
        failed = one_work(env, &works[i], page, &plain, &device);
    }
    env->name = name;
    unmap_side(&plain);
    unmap_side(&device);
    return bench_close(env) || failed;
}

const struct bench bench_operations = {
    .name = "operations",
    .summary = "speed of operations on resident memory, against the same loops on plain memory",
    .run = run,
    .engines = true,
};
