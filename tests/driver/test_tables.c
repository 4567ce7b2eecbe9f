/* SPDX-License-Identifier: MIT */
/* Operations that use memory in any order: gather, scatter and breadth-first search, against naive loops, in all places. */
#include "operations.h"

#define ROOM (5 * MIB)

/* ---- gather and scatter ------------------------------------------------------------------------------------------ */

struct lookup {
    bool scatter;
    uint32_t element, index_size;
    uint64_t count, entries;
    size_t table, row, index; /* offsets in their arrays */
};

static uint64_t index_at(const char *p, size_t i, uint32_t size)
{
    uint32_t narrow;
    uint64_t wide;
    memcpy(&narrow, p + i * size, sizeof(narrow));
    if (size == 4)
        return narrow;
    memcpy(&wide, p + i * size, sizeof(wide));
    return wide;
}

static void put_index(char *p, size_t i, uint32_t size, uint64_t value)
{
    uint32_t narrow = (uint32_t)value;
    memcpy(p + i * size, size == 4 ? (void *)&narrow : (void *)&value, size);
}

static struct hmm_operation lookup_operation(const struct lookup *l, char *table, char *row, const char *index)
{
    struct hmm_operation o = {.kind = l->scatter ? HMM_OP_SCATTER : HMM_OP_GATHER};
    uint32_t type = l->index_size == 4 ? HMM_U32 : HMM_U64;
    if (l->scatter)
        o.scatter = (struct hmm_op_scatter){.table = table,
                                            .src = row,
                                            .index = index,
                                            .count = l->count,
                                            .entries = l->entries,
                                            .element = l->element,
                                            .index_type = type};
    else
        o.gather = (struct hmm_op_gather){.dst = row,
                                          .table = table,
                                          .index = index,
                                          .count = l->count,
                                          .entries = l->entries,
                                          .element = l->element,
                                          .index_type = type};
    return o;
}

static void lookup_oracle(const struct lookup *l, char *table, char *row, const char *index)
{
    for (size_t i = 0; i < l->count; i++) {
        char *at = table + index_at(index, i, l->index_size) * l->element;
        memcpy(l->scatter ? at : row + i * l->element, l->scatter ? row + i * l->element : at, l->element);
    }
}

enum { TABLE, ROW, INDEX };

static void check_lookup(hmm_dev dev, const struct lookup *l, uint64_t seed, struct touching *touching)
{
    struct memory m[3];
    char *copy[3];
    for (unsigned i = 0; i < 3; i++) {
        m[i] = memory_new((enum place)(seed / 3 % PLACES), ROOM);
        copy[i] = malloc(ROOM);
        fill_random(m[i].p, ROOM, seed);
        seed = seed / PLACES + 7 * i;
    }
    for (size_t i = 0; i < l->count; i++)
        put_index(m[INDEX].p + l->index, i, l->index_size, random_next(&seed) % l->entries);
    put_index(m[INDEX].p + l->index, l->count / 2, l->index_size, l->entries - 1);
    for (unsigned i = 0; i < 3; i++) {
        memcpy(copy[i], m[i].p, ROOM);
        memory_settle(dev, &m[i]);
    }
    struct hmm_operation o = lookup_operation(l, m[TABLE].p + l->table, m[ROW].p + l->row, m[INDEX].p + l->index);
    if (touching)
        touching_begin(touching, m[TABLE].p, ROOM);
    must_operate(dev, &o);
    if (touching)
        touching_end(touching);
    lookup_oracle(l, copy[TABLE] + l->table, copy[ROW] + l->row, copy[INDEX] + l->index);
    for (unsigned i = 0; i < 3; i++) {
        if (memcmp(m[i].p, copy[i], ROOM))
            fail_msg("%s of elements of %u: array %u in place %u differs", l->scatter ? "scatter" : "gather", l->element, i,
                     m[i].place);
        memory_free(&m[i]);
        free(copy[i]);
    }
}

static void lookups_in_all_places(void **state)
{
    (void)state;
    uint64_t seed = 0;
    for (unsigned scatter = 0; scatter < 2; scatter++)
        for (uint32_t element = 1; element <= 16; element *= 2)
            for (uint32_t index_size = 4; index_size <= 8; index_size += 4)
                for (unsigned round = 0; round < 4; round++, seed++) {
                    /* in odd rounds elements lie across pages and blocks */
                    struct lookup l = {.scatter = scatter,
                                       .element = element,
                                       .index_size = index_size,
                                       .count = round < 2 ? 1 + seed : 3000 + seed,
                                       .entries = ((round + element) % 4 ? 4 * MIB : 70000) / element,
                                       .table = round % 2 ? 100 + seed : 4096 + 16 * seed,
                                       .row = 2 * MIB - 3000 + seed,
                                       .index = 2 * MIB - 5000 + seed * 3};
                    check_lookup(device, &l, seed * 77, NULL);
                }
}

static void lookups_while_the_cpu_reads_the_table(void **state)
{
    (void)state;
    for (unsigned scatter = 0; scatter < 2; scatter++) {
        struct touching touching;
        struct lookup l = {
            .scatter = scatter, .element = 8, .index_size = 4, .count = 200000, .entries = 4 * MIB / 8, .table = 8};
        check_lookup(device, &l, 3, &touching);
    }
}

static void lookups_in_a_table_larger_than_the_device(void **state)
{
    (void)state;
    hmm_dev dev = open_with("memory=1M");
    for (unsigned scatter = 0; scatter < 2; scatter++) {
        struct lookup l = {
            .scatter = scatter, .element = 4, .index_size = 8, .count = 6000, .entries = MIB, .table = 1, .row = 3};
        check_lookup(dev, &l, 0, NULL);
    }
    close_device(dev);
}

/* More than one hazard word can say: three mappings far apart in one table of 6 GiB, most of which is not there. */
static void lookups_in_a_table_of_gigabytes(void **state)
{
    (void)state;
    size_t bytes = (size_t)6 << 30;
    uint64_t index[3000], found[3000], seed = 1;
    uint64_t *table = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(table != MAP_FAILED);
    madvise(table, bytes, MADV_NOHUGEPAGE);
    for (unsigned i = 0; i < 3000; i++) {
        index[i] = i % 3 * (bytes / 8 / 3) + random_next(&seed) % (256 * 1024);
        table[index[i]] = index[i] * 5;
    }
    struct lookup l = {.element = 8, .index_size = 8, .count = 3000, .entries = bytes / 8};
    struct hmm_operation o = lookup_operation(&l, (char *)table, (char *)found, (char *)index);
    for (unsigned round = 0; round < 2; round++) {
        must_operate(device, &o);
        for (unsigned i = 0; i < 3000; i++)
            assert_int_equal(found[i], index[i] * 5);
    }
    munmap(table, bytes);
}

/* A page of the table comes home and changes between two jobs, which use the same translations. */
static void a_table_that_changed_is_read_again(void **state)
{
    (void)state;
    enum { N = 4096 };
    uint32_t *table = (uint32_t *)(void *)map_pages(4 * MIB), *row = (uint32_t *)(void *)map_pages(N * 4);
    uint32_t *index = (uint32_t *)(void *)map_pages(N * 4);
    struct lookup l = {.element = 4, .index_size = 4, .count = N, .entries = MIB};
    struct hmm_operation o = lookup_operation(&l, (char *)table, (char *)row, (char *)index);
    for (uint32_t i = 0; i < N; i++)
        index[i] = i * 256;
    for (uint32_t round = 0; round < 20; round++) {
        for (uint32_t i = round; i < N; i += 5)
            table[i * 256] = round * N + i;
        must_operate(device, &o);
        for (uint32_t i = 0; i < N; i++)
            assert_int_equal(row[i], table[i * 256]);
    }
    unmap_pages(table, 4 * MIB);
    unmap_pages(row, N * 4);
    unmap_pages(index, N * 4);
}

static void an_index_that_is_too_large_is_named(void **state)
{
    (void)state;
    enum { N = 5000 };
    for (unsigned place = 0; place < PLACES; place++)
        for (unsigned scatter = 0; scatter < 2; scatter++)
            for (uint32_t size = 4; size <= 8; size += 4) {
                struct memory index = memory_new((enum place)place, N * 8 + 4096);
                char *table = map_pages(4096), *row = map_pages(N * 2), *at = index.p + 3;
                struct lookup l = {.scatter = scatter, .element = 2, .index_size = size, .count = N, .entries = 2048};
                struct hmm_operation o = lookup_operation(&l, table, row, at);
                must_operate(device, &o);
                put_index(at, N - 10, size, 2048);
                put_index(at, N - 5, size, 1u << 31);
                memory_settle(device, &index);
                must_fail(device, &o, -ERANGE, at + (N - 10) * size);
                put_index(at, N - 10, size, 2047);
                must_fail(device, &o, -ERANGE, at + (N - 5) * size);
                memory_free(&index);
                unmap_pages(table, 4096);
                unmap_pages(row, N * 2);
            }
}

/* ---- breadth-first search ---------------------------------------------------------------------------------------- */

struct graph {
    uint32_t vertices;
    uint64_t nedges;
    struct memory m[3]; /* offsets, edges, distance */
    uint64_t *offsets;
    uint32_t *edges, *distance;
};

enum { OFFSETS, EDGES, DISTANCE };

/* Each vertex has up to `most` neighbours, some near and some far; every 11th has none. Arrays begin `skew` bytes behind a page. */
static struct graph graph_new(uint32_t vertices, unsigned most, uint64_t seed, size_t skew)
{
    struct graph g = {.vertices = vertices};
    uint64_t places = seed;
    size_t bytes[3] = {(vertices + 1) * sizeof(uint64_t), (size_t)vertices * most * sizeof(uint32_t),
                       vertices * sizeof(uint32_t)};
    for (unsigned i = 0; i < 3; i++) {
        g.m[i] = memory_new((enum place)(places % PLACES), (bytes[i] + skew) / BLOCK * BLOCK + BLOCK);
        places /= PLACES;
    }
    g.offsets = (uint64_t *)(void *)(g.m[OFFSETS].p + skew);
    g.edges = (uint32_t *)(void *)(g.m[EDGES].p + skew);
    g.distance = (uint32_t *)(void *)(g.m[DISTANCE].p + skew);
    for (uint32_t v = 0; v < vertices; v++) {
        memcpy(&g.offsets[v], &g.nedges, sizeof(uint64_t));
        for (uint64_t k = v % 11 == 10 ? 0 : random_next(&seed) % (most + 1); k; k--, g.nedges++) {
            uint64_t r = random_next(&seed);
            uint32_t to = r % 3 ? (uint32_t)((v + r / 4 % 64) % vertices) : (uint32_t)(r / 4 % vertices);
            memcpy(&g.edges[g.nedges], &to, sizeof(to));
        }
    }
    memcpy(&g.offsets[vertices], &g.nedges, sizeof(uint64_t));
    return g;
}

static void graph_free(struct graph *g)
{
    for (unsigned i = 0; i < 3; i++)
        memory_free(&g->m[i]);
}

static struct hmm_operation bfs_operation(const struct graph *g, uint32_t source)
{
    return (struct hmm_operation){.kind = HMM_OP_BFS,
                                  .bfs = {.offsets = g->offsets,
                                          .edges = g->nedges ? g->edges : NULL,
                                          .distance = g->distance,
                                          .nedges = g->nedges,
                                          .vertices = g->vertices,
                                          .source = source}};
}

/* Over and over all edges until nothing changes. */
static uint64_t bfs_oracle(const struct graph *g, uint32_t source, uint32_t *distance)
{
    uint64_t reached = 1;
    bool changed = true;
    memset(distance, 0xff, g->vertices * sizeof(*distance));
    distance[source] = 0;
    for (uint32_t d = 0; changed; d++) {
        changed = false;
        for (uint32_t v = 0; v < g->vertices; v++)
            for (uint64_t i = distance[v] == d ? index_at((char *)g->offsets, v, 8) : UINT64_MAX - 1;
                 i < index_at((char *)g->offsets, v + 1, 8); i++) {
                uint64_t to = index_at((char *)g->edges, i, 4);
                if (distance[to] != UINT32_MAX)
                    continue;
                distance[to] = d + 1;
                reached++;
                changed = true;
            }
    }
    return reached;
}

static void check_bfs(hmm_dev dev, const struct graph *g, uint32_t source)
{
    uint32_t *distance = malloc(g->vertices * sizeof(*distance));
    uint64_t reached = bfs_oracle(g, source, distance);
    struct hmm_operation o = bfs_operation(g, source);
    for (unsigned i = 0; i < 3; i++)
        memory_settle(dev, &g->m[i]);
    assert_int_equal(must_operate(dev, &o), reached);
    assert_memory_equal(g->distance, distance, g->vertices * sizeof(*distance));
    free(distance);
}

static void bfs_of_graphs_in_all_places(void **state)
{
    (void)state;
    static const uint32_t vertices[] = {1, 2, 12, 1000, 30000};
    for (uint64_t seed = 0; seed < PLACES * PLACES * PLACES; seed += 6)
        for (unsigned i = 0; i < 5; i++) {
            struct graph g = graph_new(vertices[i], 1 + seed % 5, seed, seed % 2 ? seed : 0);
            check_bfs(device, &g, (uint32_t)(seed % vertices[i]));
            graph_free(&g);
        }
}

static void bfs_of_one_vertex_with_many_neighbours(void **state)
{
    (void)state;
    enum { N = 800000 };
    struct graph g = graph_new(N, 1, 0, 0);
    g.nedges = N - 1;
    for (uint32_t v = 0; v <= N; v++)
        g.offsets[v] = v ? N - 1 : 0;
    for (uint32_t i = 0; i < N - 1; i++)
        g.edges[i] = i + 1;
    check_bfs(device, &g, 0);
    graph_free(&g);
}

static void bfs_without_edges(void **state)
{
    (void)state;
    struct graph g = graph_new(3, 0, 0, 0);
    assert_int_equal(g.nedges, 0);
    check_bfs(device, &g, 1);
    graph_free(&g);
}

static void bfs_of_a_graph_larger_than_the_device(void **state)
{
    (void)state;
    hmm_dev dev = open_with("memory=256K");
    struct graph g = graph_new(20000, 4, 0, 0);
    check_bfs(dev, &g, 0);
    graph_free(&g);
    close_device(dev);
}

static void bfs_while_the_cpu_reads(void **state)
{
    (void)state;
    struct graph g = graph_new(300000, 6, 31, 0);
    struct touching edges, distance;
    touching_begin(&edges, g.edges, g.nedges * 4);
    touching_begin(&distance, g.distance, g.vertices * 4);
    for (uint32_t i = 0; i < 3; i++)
        check_bfs(device, &g, i);
    touching_end(&edges);
    touching_end(&distance);
    graph_free(&g);
}

static void numbers_of_a_graph_that_are_wrong_are_named(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < PLACES * PLACES; seed += 4) {
        struct graph g = graph_new(5000, 1, seed, 0);
        for (uint32_t v = 0; v < 5000; v++) {
            g.offsets[v] = v;
            g.edges[v] = (v + 1) % 5000;
        }
        g.offsets[5000] = g.nedges = 5000;
        struct hmm_operation o = bfs_operation(&g, 0);
        assert_int_equal(must_operate(device, &o), 5000);
        g.edges[4321] = 5000; /* no vertex */
        memory_settle(device, &g.m[EDGES]);
        must_fail(device, &o, -ERANGE, &g.edges[4321]);
        g.offsets[4000] = 3998; /* descends */
        memory_settle(device, &g.m[OFFSETS]);
        must_fail(device, &o, -ERANGE, &g.offsets[4000]);
        g.offsets[3000] = 5001; /* above */
        must_fail(device, &o, -ERANGE, &g.offsets[3000]);
        g.offsets[0] = UINT64_MAX;
        must_fail(device, &o, -ERANGE, &g.offsets[0]);
        graph_free(&g);
    }
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(lookups_in_all_places),
        TEST(lookups_while_the_cpu_reads_the_table),
        TEST_WITHOUT_DEVICE(lookups_in_a_table_larger_than_the_device),
        TEST(lookups_in_a_table_of_gigabytes),
        TEST(a_table_that_changed_is_read_again),
        TEST(an_index_that_is_too_large_is_named),
        TEST(bfs_of_graphs_in_all_places),
        TEST(bfs_of_one_vertex_with_many_neighbours),
        TEST(bfs_without_edges),
        TEST_WITHOUT_DEVICE(bfs_of_a_graph_larger_than_the_device),
        TEST(bfs_while_the_cpu_reads),
        TEST(numbers_of_a_graph_that_are_wrong_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
