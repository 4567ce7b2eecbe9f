/* SPDX-License-Identifier: MIT */
/*
 * Spans: what a kernel or an operation holds of process memory at one time, at most one per engine.
 *
 * A span of device memory is used at its device address, without a lock. What keeps the page from going away underneath is a
 * hazard: a word in which the engine publishes the pages that it uses. The order is everything:
 *
 *   engine                                     who takes pages away
 *   1. publish the hazard                      A. event gate odd   (before the event is read, so before munmap returns)
 *   2. event gate even?                        B. move the notifier's sequence number; gate even
 *   3. generation and sequence number as in    C. (table.c) look at every engine's hazard and wait for those that overlap
 *      the translation?                        D. copy, free or use the page again
 *   4. use the device address
 *
 * All these are sequentially consistent. If 3 came before B, then 1 came before C, and C waits. If B came before 3, the engine
 * takes the hazard away and asks core again. So no device page is read or written behind D.
 *
 * Step 2 is for events of the address space: B can only happen when the event was read and applied, but munmap() returns in
 * between. A job that was submitted after that (or a span that begins after it) finds the gate odd and waits for B. A span
 * that passed 2 before the gate became odd began before munmap returned, and is concurrent with it: it uses the old page, which
 * D does not reuse before C.
 *
 * Ending a span is an exchange, too: a release, so that who sees the hazard gone sees what was written under it.
 *
 * A span of a page that stays in system memory is a copy, at most one page, without hazard. At its end the bytes that differ from
 * what was read are written back, only those, so that what the CPU wrote beside them meanwhile stays.
 */
#include "soft.h"

#include <errno.h>
#include <string.h>

#include "futex.h"

#define RESEND_MS 20
#define NEVER_MS 1000
#define SPAN_TRIES 16 /* translations that were stale before they were used; then the bus, which is right at any time */
#define LARGE_RUN_PAGES 64
#define ADDRESS_BITS 57

/* ---- hazards ----------------------------------------------------------------------------------------------------- */

/* First page number << 10 | pages; 0: none. A block has at most 512 pages. */
#define HAZARD_PAGES_BITS 10

static uint64_t hazard_of(const struct soft *s, uintptr_t addr, size_t len)
{
    uint64_t first = addr >> s->memory.page_shift, last = (addr + len - 1) >> s->memory.page_shift;
    return first << HAZARD_PAGES_BITS | (last - first + 1);
}

static bool hazard_overlaps(const struct soft *s, uint64_t hazard, uintptr_t start, uintptr_t end)
{
    uint64_t first = hazard >> HAZARD_PAGES_BITS, pages = hazard & ((1u << HAZARD_PAGES_BITS) - 1);
    return pages && first << s->memory.page_shift < end && (first + pages) << s->memory.page_shift > start;
}

/* Replaces the hazard; the old span is over. */
static inline void hazard_set(struct engine *e, uint64_t hazard)
{
    if (!__atomic_exchange_n(&e->hazard, hazard, __ATOMIC_SEQ_CST))
        return; /* there was none: nobody waits for it */
    if (__builtin_expect(__atomic_load_n(&e->waiters, __ATOMIC_SEQ_CST) != 0, 0)) {
        __atomic_fetch_add(&e->dropped, 1, __ATOMIC_SEQ_CST);
        soft_futex_wake(&e->dropped);
    }
}

static uint64_t hazard_get(const struct engine *e)
{
    return __atomic_load_n(&e->hazard, __ATOMIC_SEQ_CST);
}

bool soft_access_in_use(const struct soft *s, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < s->nengines; i++)
        if (hazard_overlaps(s, hazard_get(s->engines[i]), start, end))
            return true;
    return false;
}

/*
 * The engine cannot get the same pages again while we wait: its translation is refused, and core's answer waits for the end of
 * this invalidation. So an overlap that lasts is one span of one job, and its time counts from the first look. Built-in
 * operations have no deadline, they go on by themselves.
 */
static void wait_for_engine(struct soft *s, struct engine *e, uintptr_t start, uintptr_t end)
{
    uint64_t since = soft_now_ms();
    uint32_t generation = __atomic_load_n(&e->generation, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&e->waiters, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint32_t seen = __atomic_load_n(&e->dropped, __ATOMIC_SEQ_CST);
        if (!hazard_overlaps(s, hazard_get(e), start, end))
            break;
        uint64_t now = soft_now_ms();
        uint32_t present = __atomic_load_n(&e->generation, __ATOMIC_SEQ_CST);
        if (present != generation) {
            generation = present;
            since = now;
        }
        uint32_t deadline = __atomic_load_n(&e->deadline_ms, __ATOMIC_RELAXED), wait = NEVER_MS;
        if (deadline && now - since >= deadline) {
            soft_deadline_kill(e, generation, KILL_DEADLINE, true);
            wait = RESEND_MS;
        } else if (deadline) {
            wait = deadline - (uint32_t)(now - since);
        }
        soft_futex_wait(&e->dropped, seen, wait);
    }
    __atomic_fetch_sub(&e->waiters, 1, __ATOMIC_SEQ_CST);
}

void soft_access_wait_unused(struct soft *s, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < s->nengines; i++)
        if (hazard_overlaps(s, hazard_get(s->engines[i]), start, end))
            wait_for_engine(s, s->engines[i], start, end);
}

/* ---- TLB --------------------------------------------------------------------------------------------------------- */

static inline struct translation *tlb_large(struct engine *e, uintptr_t addr)
{
    return &e->tlb->large[addr / SOFT_BLOCK % TLB_LARGE];
}

static inline struct translation *tlb_small(struct engine *e, uintptr_t addr)
{
    return &e->tlb->small[(addr >> e->soft->memory.page_shift) % TLB_SMALL];
}

static inline bool translates(const struct translation *t, uintptr_t addr, bool write)
{
    return t->start <= addr && addr < t->end && (t->write || !write);
}

static inline struct translation *tlb_find(struct engine *e, uintptr_t addr, bool write)
{
    struct translation *t = tlb_large(e, addr);
    if (translates(t, addr, write))
        return t;
    t = tlb_small(e, addr);
    return translates(t, addr, write) ? t : NULL;
}

static void tlb_fill(struct engine *e, uintptr_t addr, const struct translation *t)
{
    bool large = (t->end - t->start) >> e->soft->memory.page_shift >= LARGE_RUN_PAGES;
    *(large ? tlb_large(e, addr) : tlb_small(e, addr)) = *t;
}

enum hold { HOLD_GRANTED, HOLD_STALE, HOLD_EVENTS };

/* Steps 1 to 3 of the top of this file. Not granted: no hazard is left. */
static inline enum hold hold(struct engine *e, const struct translation *t, uintptr_t addr, size_t len)
{
    hazard_set(e, hazard_of(e->soft, addr, len));
    bool events = __atomic_load_n(e->soft->gate, __ATOMIC_SEQ_CST) & 1;
    if (__builtin_expect(!events && __atomic_load_n(&t->block->generation, __ATOMIC_SEQ_CST) == t->generation &&
                             hmm_notifier_seq(&t->block->notifier) == t->seq,
                         1))
        return HOLD_GRANTED;
    hazard_set(e, 0);
    return events ? HOLD_EVENTS : HOLD_STALE;
}

/* ---- the bus ----------------------------------------------------------------------------------------------------- */

static void describe(struct engine *e, uintptr_t addr, bool write, int err)
{
    struct text t = {.buf = e->message, .size = sizeof(e->message)};
    static const char *const ops[] = {
        [HMM_OP_COPY] = "copy", [HMM_OP_FILL] = "fill", [HMM_OP_CRC32C] = "crc32c", [HMM_OP_KERNEL] = "kernel "};
    soft_text_str(&t, ops[e->job->op]);
    if (e->is_kernel)
        soft_text_hex(&t, (uintptr_t)e->kernel);
    soft_text_str(&t, write ? ": cannot write " : ": cannot read ");
    soft_text_hex(&t, addr);
    soft_text_str(&t, err == -EFAULT   ? ": nothing is mapped there; is the pointer right, and the memory not freed?"
                      : err == -EACCES ? ": the mapping's protection forbids it; see mprotect(2)"
                                       : ": ");
    if (err != -EFAULT && err != -EACCES)
        soft_text_str(&t, hmm_strerror(err));
}

static int set_error(struct engine *e, uintptr_t addr, bool write, int err)
{
    describe(e, addr, write, err);
    e->status = (struct hmm_job_status){.status = err, .address = addr, .message = e->message};
    return err;
}

/* The bus only says that it could not; why is known to who looks at the mapping. */
static int bus_error(struct engine *e, uintptr_t addr, bool write, int64_t result)
{
    int r = hmm_device_fault(e->soft->dev, addr, write ? HMM_FAULT_WRITE : HMM_FAULT_READ);
    return set_error(e, addr, write, r < 0 ? r : result < 0 ? (int)result : -EFAULT);
}

static int bus_write_all(struct engine *e, uintptr_t addr, const char *from, size_t len)
{
    while (len) {
        int64_t n = hmm_bus_write(e->soft->dev, addr, from, len);
        if (n <= 0)
            return bus_error(e, addr, true, n);
        addr += n;
        from += n;
        len -= n;
    }
    return 0;
}

/* Writes the runs of bytes that the kernel changed. */
static int bounce_write_back(struct engine *e)
{
    struct bounce *b = &e->bounce;
    for (size_t i = 0, k; i < b->len; i = k) {
        k = i + 1;
        if (b->now[i] == b->before[i])
            continue;
        while (k < b->len && b->now[k] != b->before[k])
            k++;
        int r = bus_write_all(e, b->addr + i, b->now + i, k - i);
        if (r)
            return r;
    }
    return 0;
}

/* A span over the bus: *len is cut to what there is. */
static char *bounce_span(struct engine *e, uintptr_t addr, size_t *len, bool write)
{
    struct bounce *b = &e->bounce;
    size_t page = (size_t)1 << e->soft->memory.page_shift, left = page - (addr & (page - 1));
    int64_t n = hmm_bus_read(e->soft->dev, addr, b->now, *len < left ? *len : left);
    if (n <= 0) {
        bus_error(e, addr, write, n);
        return NULL;
    }
    if (write)
        memcpy(b->before, b->now, n);
    b->addr = addr;
    b->len = n;
    b->write = write;
    *len = n;
    return b->now;
}

/* ---- spans ------------------------------------------------------------------------------------------------------- */

int soft_access_end_span(struct engine *e)
{
    int r = 0;
    if (e->bounce.len && e->bounce.write)
        r = bounce_write_back(e);
    soft_access_drop_span(e);
    return r;
}

void soft_access_drop_span(struct engine *e)
{
    e->bounce.len = 0;
    hazard_set(e, 0);
}

/* Ends the last span, but leaves a hazard to be replaced by the next one. */
static inline int end_bounce(struct engine *e)
{
    return __builtin_expect(e->bounce.len != 0, 0) ? soft_access_end_span(e) : 0;
}

/* *len bytes at addr, or the part of it that one translation has. NULL: e->status says why not. */
static char *get_span(struct engine *e, uintptr_t addr, size_t *len, bool write)
{
    if (end_bounce(e))
        return NULL;
    for (unsigned tries = 0; tries < SPAN_TRIES;) {
        struct translation *t = tlb_find(e, addr, write);
        if (t) {
            size_t granted = t->end - addr < *len ? t->end - addr : *len;
            enum hold held = hold(e, t, addr, granted);
            if (held == HOLD_GRANTED) {
                *len = granted;
                return t->at + (addr - t->start);
            }
            if (held == HOLD_EVENTS) {
                hmm_event_sync(e->soft->dev);
                continue;
            }
            t->end = t->start; /* stale: a large one must not hide the small one that comes */
        }
        tries++;
        hazard_set(e, 0); /* core may now wait for this engine */
        struct translation found;
        int r = addr >> ADDRESS_BITS ? -EFAULT : soft_table_resolve(e, addr, write, &found);
        if (r < 0) {
            set_error(e, addr, write, r);
            return NULL;
        }
        if (r > 0)
            break;
        tlb_fill(e, addr, &found);
    }
    return bounce_span(e, addr, len, write);
}

char *soft_access_span(struct engine *e, uintptr_t addr, size_t *len, bool write)
{
    soft_engine_check(e);
    char *span = get_span(e, addr, len, write);
    if (!span)
        soft_engine_throw(e);
    return span;
}

/* ---- what a kernel calls ----------------------------------------------------------------------------------------- */

static void *kernel_span(hmm_accessor *accessor, uintptr_t addr, size_t *len, bool write)
{
    struct engine *e = (struct engine *)accessor;
    soft_engine_enter_driver(e);
    char *span = soft_access_span(e, addr, len, write);
    soft_engine_leave_driver(e);
    return span;
}

static void kernel_yield(hmm_accessor *accessor)
{
    struct engine *e = (struct engine *)accessor;
    soft_engine_enter_driver(e);
    if (soft_access_end_span(e))
        soft_engine_throw(e);
    soft_engine_leave_driver(e);
}

void soft_access_init(struct engine *e)
{
    e->accessor = (struct hmm_accessor){.span = kernel_span, .yield = kernel_yield};
}
