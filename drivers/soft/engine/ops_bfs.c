/* SPDX-License-Identifier: MIT */
/*
 * Breadth-first search. The queue and the marks of vertices that were seen are the engine's own: each vertex enters the queue once,
 * whatever the program does to its memory meanwhile.
 */
#include "ops.h"

#define UNDER_ONE_HOLD ((uint64_t)256 << 10) /* steps */
#define SOME ((uint64_t)4096)                /* edges between looks at who waits */
#define OFFSETS_AHEAD 16                     /* vertices */
#define EDGES_AHEAD 8

struct bfs {
    struct engine *e;
    const struct hmm_op_bfs *graph;
    struct window *offsets, *edges, *distance;
    uint32_t *queue, head, tail;
    uint64_t *seen;
    uint64_t steps; /* under this hold */
};

static inline char *at_once(const struct window *w, uint64_t offset, size_t len)
{
    if (__builtin_expect(w->careful, 0) && (offset + len > w->reach || soft_window_straddles(w, offset, len)))
        return NULL;
    return soft_window_at(w, offset);
}

static inline uint64_t get(struct bfs *b, struct window *w, uint64_t i, unsigned size)
{
    char *at = at_once(w, i * size, size), copy[sizeof(uint64_t)];
    if (__builtin_expect(at != NULL, 1))
        return loop_load(at, size);
    soft_window_get(b->e, w, w->start + i * size, copy, size);
    return loop_load(copy, size);
}

static inline void set_distance(struct bfs *b, uint32_t vertex, uint32_t distance)
{
    char *at = at_once(b->distance, (uint64_t)vertex * sizeof(distance), sizeof(distance));
    if (__builtin_expect(at != NULL, 1))
        memcpy(at, &distance, sizeof(distance));
    else
        soft_window_put(b->e, b->distance, b->distance->start + (uint64_t)vertex * sizeof(distance), &distance,
                        sizeof(distance));
}

static inline void visit(struct bfs *b, uint32_t vertex, uint32_t distance)
{
    uint64_t *word = &b->seen[vertex / 64], bit = UINT64_C(1) << vertex % 64;
    if (*word & bit)
        return;
    *word |= bit;
    b->queue[b->tail++] = vertex;
    set_distance(b, vertex, distance);
}

/* Lets go now and then. */
static inline void rest(struct bfs *b, uint64_t steps)
{
    b->steps += steps;
    if (__builtin_expect(b->steps < UNDER_ONE_HOLD && !soft_hold_wanted(b->e), 1))
        return;
    soft_hold(b->e, NULL, 0, 0);
    b->steps = 0;
}

static inline void visit_edge(struct bfs *b, uint64_t i, uint64_t to, uint32_t distance)
{
    if (__builtin_expect(to >= b->graph->vertices, 0))
        soft_ops_out_of_range(b->e, b->edges->start + i * sizeof(uint32_t), "neighbour", to, 0, b->graph->vertices - 1);
    visit(b, (uint32_t)to, distance);
}

/* Edges at `at`, as long as everything that they need is found at once; returns how many. All that it uses is in registers. */
static uint64_t follow_at_once(struct bfs *b, const char *at, uint64_t n, uint32_t distance)
{
    uint64_t *const seen = b->seen, k = 0;
    uint32_t *const queue = b->queue, tail = b->tail;
    const uint32_t vertices = b->graph->vertices;
    const struct window distances = {.start = b->distance->start, .origin = b->distance->origin};
    for (; k < n; k++) {
        uint64_t to = loop_load(at + k * sizeof(uint32_t), sizeof(uint32_t)), bit = UINT64_C(1) << to % 64;
        if (to >= vertices)
            break;
        if (seen[to / 64] & bit)
            continue;
        char *found = soft_window_at(&distances, to * sizeof(uint32_t));
        if (!found)
            break;
        seen[to / 64] |= bit;
        queue[tail++] = (uint32_t)to;
        *(any_u32 *)found = distance;
    }
    b->tail = tail;
    return k;
}

/* Edges [i, end), at least one; returns how many. */
static uint64_t follow_some(struct bfs *b, uint64_t i, uint64_t end, uint32_t distance)
{
    const char *at = b->distance->careful ? NULL : at_once(b->edges, i * sizeof(uint32_t), sizeof(uint32_t));
    uintptr_t left = SOFT_BLOCK - ((b->edges->start + i * sizeof(uint32_t)) & (SOFT_BLOCK - 1));
    uint64_t n = end - i < SOME ? end - i : SOME;
    if (n > left / sizeof(uint32_t))
        n = left / sizeof(uint32_t);
    uint64_t done = at ? follow_at_once(b, at, n, distance) : 0;
    if (done)
        return done;
    visit_edge(b, i, get(b, b->edges, i, sizeof(uint32_t)), distance);
    return 1;
}

static uint64_t get_offset(struct bfs *b, uint64_t i, uint64_t least)
{
    uint64_t offset = get(b, b->offsets, i, sizeof(uint64_t)), most = b->graph->nedges;
    if (__builtin_expect(offset < least || offset > most, 0))
        soft_ops_out_of_range(b->e, b->offsets->start + i * sizeof(uint64_t), "offset", offset, least, most);
    return offset;
}

/* Asks for what the vertices that come next will need. */
static inline void ask_ahead(const struct bfs *b)
{
    const uint32_t *next = b->queue + b->head;
    if (b->tail - b->head <= OFFSETS_AHEAD)
        return;
    char *offset = at_once(b->offsets, (uint64_t)next[OFFSETS_AHEAD] * sizeof(uint64_t), sizeof(uint64_t));
    __builtin_prefetch(offset);
    offset = at_once(b->offsets, (uint64_t)next[EDGES_AHEAD] * sizeof(uint64_t), sizeof(uint64_t));
    uint64_t edge = offset ? loop_load(offset, sizeof(uint64_t)) : UINT64_MAX;
    if (edge < b->graph->nedges)
        __builtin_prefetch(at_once(b->edges, edge * sizeof(uint32_t), sizeof(uint32_t)));
}

/* Both ends of a vertex's edges. */
static inline void get_edges(struct bfs *b, uint32_t vertex, uint64_t *first, uint64_t *end)
{
    uint64_t at = (uint64_t)vertex * sizeof(uint64_t);
    bool one_block = !soft_window_straddles(b->offsets, at, 2 * sizeof(uint64_t));
    char *both = one_block ? at_once(b->offsets, at, 2 * sizeof(uint64_t)) : NULL;
    *first = both ? loop_load(both, sizeof(uint64_t)) : UINT64_MAX;
    *end = both ? loop_load(both + sizeof(uint64_t), sizeof(uint64_t)) : 0;
    if (__builtin_expect(*first <= *end && *end <= b->graph->nedges, 1))
        return;
    *first = get_offset(b, vertex, 0);
    *end = get_offset(b, (uint64_t)vertex + 1, *first);
}

static void expand(struct bfs *b, uint32_t vertex, uint32_t distance)
{
    uint64_t i, end, n;
    get_edges(b, vertex, &i, &end);
    for (; i < end; i += n) {
        n = follow_some(b, i, end, distance);
        rest(b, n);
    }
    rest(b, 1);
}

static void open_graph(struct bfs *b)
{
    const struct hmm_op_bfs *g = b->graph;
    struct engine *e = b->e;
    b->queue = soft_engine_scratch(e, g->vertices * sizeof(uint32_t));
    b->seen = soft_engine_scratch(e, (g->vertices / 64 + 1) * sizeof(uint64_t));
    b->offsets = soft_window_open(e, g->offsets, (g->vertices + (uint64_t)1) * sizeof(uint64_t), sizeof(uint64_t), false);
    b->distance = soft_window_open(e, g->distance, g->vertices * sizeof(uint32_t), sizeof(uint32_t), true);
    if (g->nedges)
        b->edges = soft_window_open(e, g->edges, g->nedges * sizeof(uint32_t), sizeof(uint32_t), false);
}

/* The queue is in order of distance: where the vertices of one distance end, those of the next begin. */
uint64_t soft_op_bfs(struct engine *e, const struct hmm_operation *operation)
{
    struct bfs b = {.e = e, .graph = &operation->bfs};
    soft_ops_fill(e, (uintptr_t)b.graph->distance, 0xff, b.graph->vertices * sizeof(uint32_t));
    open_graph(&b);
    soft_hold(e, NULL, 0, 0);
    visit(&b, b.graph->source, 0);
    for (uint32_t distance = 1; b.head < b.tail; distance++)
        for (uint32_t end = b.tail; b.head < end; b.head++) {
            ask_ahead(&b);
            expand(&b, b.queue[b.head], distance);
        }
    return b.tail;
}
