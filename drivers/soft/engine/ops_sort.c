/* SPDX-License-Identifier: MIT */
/*
 * Radix sort by digits of 8 bits, from the numbers to as much memory of the engine's own and back, skipping digits that are all the
 * same (loops_sort.h). Reading goes straight on; what is written to the numbers goes through a window.
 */
#include "loops_sort.h"
#include "ops.h"

#define SOME ((uint64_t)4096)                /* numbers between looks at who waits */
#define UNDER_ONE_HOLD ((uint64_t)256 << 10) /* numbers */

struct sort {
    struct engine *e;
    uintptr_t data;
    uint64_t count;
    unsigned size;
    char *other; /* the engine's own */
    struct sort_lines *lines;
    struct window *window; /* over data */
};

/* ---- from and to ------------------------------------------------------------------------------------------------- */

/* Cut at the end of the array: see loops_sort.h. */
static unsigned fitting(const struct sort *s, uint64_t place, unsigned n)
{
    return place >= s->count ? 0 : s->count - place < n ? (unsigned)(s->count - place) : n;
}

static inline void put_in_other(void *to, uint64_t place, const char *numbers, unsigned n)
{
    struct sort *s = to;
    memcpy(s->other + place * s->size, numbers, fitting(s, place, n) * s->size);
}

static inline void put_in_data(void *to, uint64_t place, const char *numbers, unsigned n)
{
    struct sort *s = to;
    size_t bytes = fitting(s, place, n) * s->size;
    uint64_t offset = place * s->size;
    if (!bytes)
        return;
    char *at = NULL;
    if (offset + bytes <= s->window->reach && !soft_window_straddles(s->window, offset, bytes))
        at = soft_window_at(s->window, offset);
    if (__builtin_expect(at != NULL, 1))
        memcpy(at, numbers, bytes);
    else
        soft_window_put(s->e, s->window, s->data + offset, numbers, bytes);
}

static inline __attribute__((always_inline)) void to_other(struct sort *s, unsigned size, unsigned shift)
{
    struct operand o = {.addr = s->data, .element = size};
    for (uint64_t left = s->count; left;) {
        uint64_t n = soft_hold(s->e, &o, 1, soft_ops_piece(left, size));
        sort_some(s->lines, o.at, n, size, shift, put_in_other, s);
        soft_ops_advance(&o, 1, n);
        left -= n;
    }
    soft_release(s->e);
    sort_end(s->lines, size, put_in_other, s);
}

static inline __attribute__((always_inline)) void to_data(struct sort *s, unsigned size, unsigned shift)
{
    uint64_t n, under_hold = 0;
    soft_hold(s->e, NULL, 0, 0);
    for (uint64_t done = 0; done < s->count; done += n) {
        n = s->count - done < SOME ? s->count - done : SOME;
        sort_some(s->lines, s->other + done * size, n, size, shift, put_in_data, s);
        under_hold += n;
        if (under_hold >= UNDER_ONE_HOLD || soft_hold_wanted(s->e)) {
            soft_hold(s->e, NULL, 0, 0);
            under_hold = 0;
        }
    }
    sort_end(s->lines, size, put_in_data, s);
    soft_release(s->e);
}

/* ---- the passes -------------------------------------------------------------------------------------------------- */

static void count(struct sort *s, uint64_t (*counts)[SORT_DIGITS])
{
    struct operand o = {.addr = s->data, .element = s->size};
    for (uint64_t left = s->count; left;) {
        uint64_t n = soft_hold(s->e, &o, 1, soft_ops_piece(left, s->size));
        if (s->size == sizeof(uint32_t))
            sort_count(counts, o.at, n, sizeof(uint32_t));
        else
            sort_count(counts, o.at, n, sizeof(uint64_t));
        soft_ops_advance(&o, 1, n);
        left -= n;
    }
    soft_release(s->e);
}

static void pass(struct sort *s, const uint64_t *counts, unsigned place, bool from_data)
{
    sort_begin(s->lines, counts, s->size);
    if (s->size == sizeof(uint32_t)) {
        if (from_data)
            to_other(s, sizeof(uint32_t), 8 * place);
        else
            to_data(s, sizeof(uint32_t), 8 * place);
    } else if (from_data) {
        to_other(s, sizeof(uint64_t), 8 * place);
    } else {
        to_data(s, sizeof(uint64_t), 8 * place);
    }
}

uint64_t soft_op_sort(struct engine *e, const struct hmm_operation *operation)
{
    const struct hmm_op_sort *o = &operation->sort;
    struct sort s = {.e = e, .data = (uintptr_t)o->data, .count = o->count, .size = o->type == HMM_U32 ? 4 : 8};
    uint64_t(*counts)[SORT_DIGITS] = soft_engine_scratch(e, sizeof(*counts) * s.size);
    s.lines = soft_engine_scratch(e, sizeof(*s.lines));
    s.other = soft_engine_scratch(e, s.count * s.size);
    count(&s, counts);
    s.window = soft_window_open(e, o->data, s.count * s.size, s.size, true);
    bool in_data = true;
    for (unsigned place = 0; place < s.size; place++) {
        if (sort_constant(counts[place], s.count))
            continue;
        pass(&s, counts[place], place, in_data);
        in_data = !in_data;
    }
    if (!in_data)
        soft_write(e, s.data, s.other, s.count * s.size);
    return 0;
}
