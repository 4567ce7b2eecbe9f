/* SPDX-License-Identifier: MIT */
/*
 * Gather and scatter. One loop does both: element i of a row (dst or src) belongs to element index[i] of the table. It stops where the
 * table is not found at once; that element is then done by other means.
 */
#include "ops.h"

#define UNDER_ONE_HOLD ((uint64_t)128 << 10) /* elements */
#define BATCH 64                             /* elements that are asked for at once */
#define SOME ((uint64_t)2048)                /* elements between looks at who waits */

struct table {
    struct window *window;
    uint64_t entries;
    uint64_t direct; /* entries below this are found at once, if at all */
    uint32_t element;
    bool write;     /* scatter */
    bool straddles; /* an element may lie in two blocks */
    uint32_t index_size;
};

enum { ROW, INDEX };

/* ---- what is found at once --------------------------------------------------------------------------------------- */

#define INLINE static inline __attribute__((always_inline))

/*
 * Where the next elements are: returns how many were found, until one is not. Asks for all of them before the first is used, so that
 * memory is waited for once per batch: what a table costs that is larger than the caches is waiting.
 */
INLINE unsigned find_batch(const struct table *t, const char *index, unsigned n, unsigned size, unsigned index_size, bool write,
                           bool straddles, char **found)
{
    const uint64_t direct = t->direct;
    const struct window w = *t->window; /* what is found is stored through pointers that might point there */
    for (unsigned i = 0; i < n; i++) {
        uint64_t entry = loop_load(index + i * index_size, index_size);
        if (entry >= direct || (straddles && soft_window_straddles(&w, entry * size, size)))
            return i;
        found[i] = soft_window_at(&w, entry * size);
        if (!found[i])
            return i;
        if (write) /* a constant is asked for */
            __builtin_prefetch(found[i], 1);
        else
            __builtin_prefetch(found[i], 0);
    }
    return n;
}

/* Returns how many were done. All but t, row, index and n are constants where this is used. */
INLINE uint64_t do_some(const struct table *t, char *row, const char *index, uint64_t n, unsigned size, unsigned index_size,
                        bool write, bool straddles)
{
    char *at[BATCH];
    for (uint64_t done = 0; done < n;) {
        unsigned some = n - done < BATCH ? (unsigned)(n - done) : BATCH;
        unsigned found = find_batch(t, index + done * index_size, some, size, index_size, write, straddles, at);
        for (unsigned i = 0; i < found; i++)
            if (write)
                memcpy(at[i], row + (done + i) * size, size);
            else
                memcpy(row + (done + i) * size, at[i], size);
        done += found;
        if (found < some)
            return done;
    }
    return n;
}

INLINE uint64_t do_some_of(const struct table *t, char *row, const char *index, uint64_t n, unsigned index_size, bool write,
                           bool straddles)
{
    switch (t->element) {
    case 1: return do_some(t, row, index, n, 1, index_size, write, straddles);
    case 2: return do_some(t, row, index, n, 2, index_size, write, straddles);
    case 4: return do_some(t, row, index, n, 4, index_size, write, straddles);
    case 8: return do_some(t, row, index, n, 8, index_size, write, straddles);
    default: return do_some(t, row, index, n, 16, index_size, write, straddles);
    }
}

static uint64_t gather_some(const struct table *t, char *row, const char *index, uint64_t n)
{
    if (t->straddles)
        return t->index_size == 4 ? do_some_of(t, row, index, n, 4, false, true) : do_some_of(t, row, index, n, 8, false, true);
    return t->index_size == 4 ? do_some_of(t, row, index, n, 4, false, false) : do_some_of(t, row, index, n, 8, false, false);
}

static uint64_t scatter_some(const struct table *t, char *row, const char *index, uint64_t n)
{
    if (t->straddles)
        return t->index_size == 4 ? do_some_of(t, row, index, n, 4, true, true) : do_some_of(t, row, index, n, 8, true, true);
    return t->index_size == 4 ? do_some_of(t, row, index, n, 4, true, false) : do_some_of(t, row, index, n, 8, true, false);
}

/* ---- one element by other means ---------------------------------------------------------------------------------- */

static void over_spans(struct engine *e, const struct table *t, uintptr_t row, uintptr_t at)
{
    char element[16];
    soft_read(e, element, t->write ? row : at, t->element);
    soft_write(e, t->write ? at : row, element, t->element);
}

/* Does element i of what is held, or brings its part of the table and releases everything. Returns how many were done. */
static uint64_t do_one(struct engine *e, const struct table *t, const struct operand *o, uint64_t i)
{
    uint64_t entry = loop_load(o[INDEX].at + i * t->index_size, t->index_size);
    if (entry >= t->entries)
        soft_ops_out_of_range(e, o[INDEX].addr + i * t->index_size, "index", entry, 0, t->entries - 1);
    uintptr_t at = t->window->start + entry * t->element, row = o[ROW].addr + i * t->element;
    char *element = soft_window_find(e, t->window, at, t->element), *held = o[ROW].at + i * t->element;
    if (element) {
        memcpy(t->write ? element : held, t->write ? held : element, t->element);
        return 1;
    }
    if (soft_window_bring(e, t->window, at, t->element))
        return 0;
    over_spans(e, t, row, at);
    return 1;
}

/* ---- all --------------------------------------------------------------------------------------------------------- */

/* Works on n elements that are held. Returns how many were done before it let go of them, at least to let in who waits. */
static uint64_t do_held(struct engine *e, const struct table *t, const struct operand *o, uint64_t n)
{
    uint64_t done = 0;
    while (done < n && e->holding && !(done && soft_hold_wanted(e))) {
        uint64_t some = n - done < SOME ? n - done : SOME;
        char *row = o[ROW].at + done * t->element;
        const char *index = o[INDEX].at + done * t->index_size;
        uint64_t found = t->write ? scatter_some(t, row, index, some) : gather_some(t, row, index, some);
        done += found;
        if (found < some)
            done += do_one(e, t, o, done);
    }
    return done;
}

static uint64_t run(struct engine *e, struct table *t, const void *table, const void *row, const void *index, uint64_t count)
{
    struct operand o[2] = {[ROW] = {.addr = (uintptr_t)row, .element = t->element, .write = !t->write},
                           [INDEX] = {.addr = (uintptr_t)index, .element = t->index_size}};
    t->window = soft_window_open(e, table, t->entries * t->element, t->element, t->write);
    t->direct = t->window->reach / t->element;
    t->straddles = (uintptr_t)table % t->element != 0;
    while (count) {
        uint64_t n = do_held(e, t, o, soft_hold(e, o, 2, count < UNDER_ONE_HOLD ? count : UNDER_ONE_HOLD));
        soft_ops_advance(o, 2, n);
        count -= n;
    }
    return 0;
}

static uint32_t index_size(uint32_t type)
{
    return type == HMM_U32 ? sizeof(uint32_t) : sizeof(uint64_t);
}

uint64_t soft_op_gather(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_gather *g = &operation->gather;
    struct table t = {.entries = g->entries, .element = g->element, .index_size = index_size(g->index_type)};
    return run(e, &t, g->table, g->dst, g->index, g->count);
}

uint64_t soft_op_scatter(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_scatter *s = &operation->scatter;
    struct table t = {.entries = s->entries, .element = s->element, .write = true, .index_size = index_size(s->index_type)};
    return run(e, &t, s->table, s->src, s->index, s->count);
}
