/* SPDX-License-Identifier: MIT */
/*
 * What an operation holds: the next elements of several operands, and windows over memory that it uses in any order, all at once.
 *
 * A hold publishes the hazards of all of it together (top of access.c). So what is missing cannot be brought while the rest is kept:
 * everything is let go, one translation is brought, and the hold begins again. Two operands that push each other out of a small
 * device memory would do that for ever; after ACCESS_TRIES the one that is missing then is used over the bus, which is right at any
 * time and needs no hazard.
 *
 * A window has one hazard over all of it, and its translations are checked when they are first used in a hold. What one hold has
 * checked means nothing to the next.
 */
#include "access.h"

#include <errno.h>
#include <string.h>

#define WINDOW_BLOCKS_MAX ((size_t)1 << 16) /* that a window finds without the TLB: 128 GiB */

/* ---- copies over spans ------------------------------------------------------------------------------------------- */

/* With write: fails where writing would. */
static void read_over_spans(struct engine *e, void *to, uintptr_t from, size_t bytes, bool write)
{
    soft_release(e);
    for (size_t len; bytes; to = (char *)to + len, from += len, bytes -= len) {
        len = bytes;
        const char *span = soft_access_span(e, from, &len, write);
        memcpy(to, span, len);
    }
    if (soft_access_end_span(e))
        soft_engine_throw(e);
}

void soft_read(struct engine *e, void *to, uintptr_t from, size_t bytes)
{
    read_over_spans(e, to, from, bytes, false);
}

void soft_write(struct engine *e, uintptr_t to, const void *from, size_t bytes)
{
    soft_release(e);
    for (size_t len; bytes; to += len, from = (const char *)from + len, bytes -= len) {
        len = bytes;
        char *span = soft_access_span(e, to, &len, true);
        memcpy(span, from, len);
    }
    if (soft_access_end_span(e))
        soft_engine_throw(e);
}

/* ---- bounced operands -------------------------------------------------------------------------------------------- */

/* One element that lies in two translations. */
static void bounce_element(struct engine *e, const struct operand *o, struct slot *s)
{
    read_over_spans(e, s->bounce.now, o->addr, o->element, o->write);
    memcpy(s->bounce.before, s->bounce.now, o->element);
    s->bounce.addr = o->addr;
    s->bounce.len = o->element;
    s->bounce.write = o->write;
    s->over_spans = true;
    s->found = false;
}

/* The elements that lie in one page. */
static void bounce_page(struct engine *e, const struct operand *o, struct slot *s, uint64_t count)
{
    size_t page = (size_t)1 << e->world->page_shift;
    if (soft_bounce_read(e, &s->bounce, o->addr, count < page ? count * o->element : page, o->write))
        soft_engine_throw(e);
    s->bounce.len -= s->bounce.len % o->element;
    s->over_spans = false;
    if (s->bounce.len == 0)
        bounce_element(e, o, s);
}

static void write_back(struct engine *e, struct slot *s)
{
    struct bounce b = s->bounce;
    s->bounce.len = 0;
    if (!b.len || !b.write)
        return;
    if (!s->over_spans && soft_bounce_write_back(e, &b))
        soft_engine_throw(e);
    for (size_t from = 0, to; s->over_spans && soft_bounce_changed(&b, &from, &to); from = to)
        soft_write(e, b.addr + from, b.now + from, to - from);
}

/* ---- holding ----------------------------------------------------------------------------------------------------- */

static void forget_windows(struct engine *e)
{
    for (unsigned i = 0; i < e->nwindows; i++) {
        struct window *w = &e->windows[i];
        if (w->low < w->high)
            memset(w->direct + w->low, 0, (w->high - w->low) * sizeof(*w->direct));
        w->low = SIZE_MAX;
        w->high = 0;
    }
}

static void let_go(struct engine *e)
{
    soft_hazards_drop(e);
    forget_windows(e);
    e->holding = false;
}

void soft_release(struct engine *e)
{
    if (!e->holding)
        return;
    let_go(e);
    for (unsigned i = 0; i < OPERANDS; i++)
        write_back(e, &e->slots[i]);
}

void soft_hold_drop(struct engine *e)
{
    let_go(e);
    for (unsigned i = 0; i < OPERANDS; i++)
        e->slots[i].bounce.len = 0;
    e->nwindows = 0;
}

/* A translation for an operand that has none, or a copy. */
static void find(struct engine *e, const struct operand *o, struct slot *s, uint64_t count, unsigned *tries)
{
    struct tlb_entry *x = soft_tlb_find(e, o->addr, o->write);
    if (x) {
        s->t = x->t;
        s->found = true;
        return;
    }
    int r = ++*tries > ACCESS_TRIES ? 1 : soft_resolve(e, o->addr, o->write, &s->t);
    if (r < 0) {
        soft_access_error(e, o->addr, o->write, r);
        soft_engine_throw(e);
    }
    if (r > 0) {
        bounce_page(e, o, s, count);
        return;
    }
    soft_tlb_fill(e, o->addr, &s->t);
    s->found = true;
}

/* How many elements of the operand can be held, at most count, at least 1. */
static uint64_t elements(struct engine *e, const struct operand *o, struct slot *s, uint64_t count, unsigned *tries)
{
    if (!s->found && !s->bounce.len)
        find(e, o, s, count, tries);
    if (s->found && s->t.end - o->addr < o->element)
        bounce_element(e, o, s);
    uint64_t n = (s->found ? s->t.end - o->addr : s->bounce.len) / o->element;
    return n < count ? n : count;
}

static void publish(struct engine *e, const struct operand *operands, unsigned n, uint64_t count)
{
    uint64_t hazards[HAZARDS];
    unsigned k = 0;
    for (unsigned i = 0; i < n; i++)
        if (e->slots[i].found)
            hazards[k++] = soft_hazard_of(e->world, operands[i].addr, count * operands[i].element);
    for (unsigned i = 0; i < e->nwindows; i++)
        hazards[k++] = soft_hazard_of(e->world, e->windows[i].start, e->windows[i].bytes);
    soft_hazards_publish(e, hazards, k);
}

/* The translation is stale: so is what the TLB has there. */
static void forget(struct engine *e, const struct operand *o, struct slot *s)
{
    struct tlb_entry *x = soft_tlb_find(e, o->addr, o->write);
    if (x && soft_translation_check(e, &x->t) == CHECK_STALE)
        soft_tlb_forget(x);
    s->found = false;
}

/* Publishes what was found, and checks it. False: nothing is held. */
static bool try_to_hold(struct engine *e, struct operand *operands, unsigned n, uint64_t count)
{
    bool good = true, events = false;
    publish(e, operands, n, count);
    for (unsigned i = 0; i < n; i++) {
        struct slot *s = &e->slots[i];
        operands[i].at = s->found ? s->t.at + (operands[i].addr - s->t.start) : s->bounce.now;
        if (!s->found)
            continue;
        enum check found = soft_translation_check(e, &s->t);
        events |= found == CHECK_EVENTS;
        if (found == CHECK_STALE)
            forget(e, &operands[i], s);
        good &= found == CHECK_GOOD;
    }
    if (good)
        return true;
    soft_hazards_drop(e);
    if (events)
        e->world->outside->sync(e);
    return false;
}

uint64_t soft_hold(struct engine *e, struct operand *operands, unsigned n, uint64_t count)
{
    soft_release(e);
    soft_engine_check(e);
    for (unsigned i = 0; i < n; i++)
        e->slots[i].found = false;
    unsigned tries = 0;
    for (;;) {
        uint64_t granted = count;
        for (unsigned i = 0; i < n; i++)
            granted = elements(e, &operands[i], &e->slots[i], granted, &tries);
        if (try_to_hold(e, operands, n, granted)) {
            e->holding = true;
            return granted;
        }
    }
}

/* ---- windows ----------------------------------------------------------------------------------------------------- */

struct window *soft_window_open(struct engine *e, const void *ptr, uint64_t bytes, uint32_t element, bool write)
{
    struct window *w = &e->windows[e->nwindows];
    uintptr_t start = (uintptr_t)ptr, first = start / SOFT_BLOCK, last = (start + (bytes - 1)) / SOFT_BLOCK;
    size_t blocks = last - first + 1 < WINDOW_BLOCKS_MAX ? last - first + 1 : WINDOW_BLOCKS_MAX;
    uint64_t reach = blocks * SOFT_BLOCK - (start & (SOFT_BLOCK - 1));
    *w = (struct window){
        .start = start,
        .bytes = bytes,
        .write = write,
        .careful = reach < bytes || start % element,
        .reach = reach < bytes ? reach : bytes,
        .direct = soft_engine_scratch(e, blocks * sizeof(uintptr_t)),
        .first = first,
        .low = SIZE_MAX,
        .missed = UINTPTR_MAX,
    };
    w->origin = (uintptr_t)w->direct - first * sizeof(*w->direct);
    e->nwindows++;
    return w;
}

/* If the translation has all of the window in the block of addr, it is found at once from now on. */
static void remember(struct window *w, const struct translation *t, uintptr_t addr)
{
    uintptr_t start = addr & ~(SOFT_BLOCK - 1), end = start + SOFT_BLOCK, window_end = w->start + w->bytes;
    size_t i = addr / SOFT_BLOCK - w->first;
    if (start < w->start)
        start = w->start;
    if (end > window_end || end < start)
        end = window_end;
    if (addr - w->start >= w->reach || t->start > start || t->end < end)
        return;
    w->direct[i] = (uintptr_t)t->at - t->start;
    w->low = i < w->low ? i : w->low;
    w->high = i >= w->high ? i + 1 : w->high;
}

char *soft_window_find(struct engine *e, struct window *w, uintptr_t addr, size_t len)
{
    struct tlb_entry *x = e->holding ? soft_tlb_find(e, addr, w->write) : NULL;
    if (!x || x->t.end - addr < len)
        return NULL;
    if (x->held != e->holds && !soft_mutate("soft-window")) {
        if (soft_translation_check(e, &x->t) != CHECK_GOOD)
            return NULL;
        x->held = e->holds;
    }
    remember(w, &x->t, addr);
    return x->t.at + (addr - x->t.start);
}

/* The same address missed again: it was taken away before it could be held. */
static bool missed_too_often(struct window *w, uintptr_t addr)
{
    if (addr != w->missed) {
        w->missed = addr;
        w->tries = 0;
    }
    if (++w->tries <= ACCESS_TRIES)
        return false;
    w->missed = UINTPTR_MAX;
    return true;
}

bool soft_window_bring(struct engine *e, struct window *w, uintptr_t addr, size_t len)
{
    soft_release(e);
    soft_engine_check(e);
    if (missed_too_often(w, addr))
        return false;
    if (__atomic_load_n(e->world->gate, __ATOMIC_SEQ_CST) & 1) {
        e->world->outside->sync(e);
        return true;
    }
    struct translation t;
    int r = soft_resolve(e, addr, w->write, &t);
    if (r < 0) {
        soft_access_error(e, addr, w->write, r);
        soft_engine_throw(e);
    }
    if (r > 0)
        return false;
    struct tlb_entry *old = soft_tlb_find(e, addr, w->write);
    if (old)
        soft_tlb_forget(old);
    soft_tlb_fill(e, addr, &t);
    return t.end - addr >= len;
}

/* NULL: to be used over spans; nothing is held. */
static char *find_or_bring(struct engine *e, struct window *w, uintptr_t addr, size_t len)
{
    for (;;) {
        char *at = soft_window_find(e, w, addr, len);
        if (at)
            return at;
        if (!soft_window_bring(e, w, addr, len))
            return NULL;
        soft_hold(e, NULL, 0, 0);
    }
}

void soft_window_get(struct engine *e, struct window *w, uintptr_t addr, void *buf, size_t len)
{
    char *at = find_or_bring(e, w, addr, len);
    if (at) {
        memcpy(buf, at, len);
        return;
    }
    soft_read(e, buf, addr, len);
    soft_hold(e, NULL, 0, 0);
}

void soft_window_put(struct engine *e, struct window *w, uintptr_t addr, const void *buf, size_t len)
{
    char *at = find_or_bring(e, w, addr, len);
    if (at) {
        memcpy(at, buf, len);
        return;
    }
    soft_write(e, addr, buf, len);
    soft_hold(e, NULL, 0, 0);
}
