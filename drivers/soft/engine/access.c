/* SPDX-License-Identifier: MIT */
/*
 * What an engine holds of process memory, and how it lets go: hazards, the TLB, the bus; and spans, which are what kernels hold. What
 * operations hold is in hold.c, and stands on the same steps.
 *
 * Device memory is used at its device address, without a lock. What keeps the page from going away underneath is a hazard: a word in
 * which the engine publishes pages that it uses. An engine has several; what is published together and let go together is a hold.
 * `holds` counts those that are over. The order is everything:
 *
 *   engine                                          who takes pages away
 *   0. let go of the last hold: holds + 1           A. event gate odd   (before the event is read, so before munmap returns)
 *   1. publish all hazards of this hold             B. move the notifier's sequence number (or the generation); gate even
 *   2. event gate even?                             C. look at every engine's hazards. Where one overlaps: read `holds`, and wait
 *   3. generation and sequence number as in            until it has moved or no hazard overlaps
 *      the translation?                             D. copy, free or use the page again
 *   4. use the device address
 *
 * Hazards (1, C), B and the looks of 2 and 3 are sequentially consistent. If 3 came before B, then 1 came before C, and C sees the
 * hazard, or sees that it was taken away. If B came before 3, the engine lets go and asks core again. So no device page is used
 * behind D.
 *
 * Why C may be content with `holds`: a hazard may cover much more than what the engine uses (a whole table), and be published again at
 * once, over and over. Waiting until nothing overlaps could take for ever; waiting for the end of the holds that passed 3 before B is
 * enough. Let H be one of these. Then C, which came after B, reads a hazard word of H or a later one. Step 0 before H is a release
 * that H's publishing follows, and so C, which has acquired the hazard, reads for `holds` H's number or a larger one. When
 * `holds` has moved on from there, H is over. A hold that begins after that publishes, and does 3, after C has looked: after B. It is
 * refused the page. The other way round, if the number that C read is not H's but of a later hold, C waits for that, which is
 * longer than it must, not wrong. Reading `holds` acquires what was written under the holds that are over.
 *
 * Step 3 is needed once per translation and hold, however often it is used under it, because nothing that took its page away in
 * between has passed C. hold.c notes in the TLB for which hold it was done.
 *
 * Step 2 is for events of the address space: B can only happen when the event was read and applied, but munmap() returns in
 * between. A job that was submitted after that (or a hold that begins after it) finds the gate odd and waits for B. One that passed 2
 * before the gate became odd began before munmap returned, and is concurrent with it: it uses the old page, which D does not reuse
 * before C.
 *
 * C has no deadline for operations, only for kernels. So an operation lets go after each piece of its work; and an engine that
 * resolves, uses the bus or waits for events holds nothing meanwhile: what it waits for may be waiting for it.
 *
 * Memory that stays in system memory is used as a copy of at most one page, without hazard. At its end the bytes that differ from
 * what was read are written back, only those, so that what the CPU wrote beside them meanwhile stays.
 */
#include "access.h"

#include <errno.h>
#include <string.h>

#include "futex.h"

#define RESEND_MS 20
#define NEVER_MS 1000
#define LARGE_RUN_PAGES 64
#define ADDRESS_BITS 57

/* ---- hazards ----------------------------------------------------------------------------------------------------- */

/* First page number << 19 | pages; 0: none. What is longer covers everything. */
#define HAZARD_PAGES_BITS 19
#define HAZARD_PAGES_MAX ((UINT64_C(1) << HAZARD_PAGES_BITS) - 1)
#define HAZARD_ALL (~UINT64_C(0))

uint64_t soft_hazard_of(const struct world *w, uintptr_t addr, size_t len)
{
    uint64_t first = addr >> w->page_shift, last = (addr + len - 1) >> w->page_shift, pages = last - first + 1;
    return pages < HAZARD_PAGES_MAX ? first << HAZARD_PAGES_BITS | pages : HAZARD_ALL;
}

static bool hazard_overlaps(const struct world *w, uint64_t hazard, uintptr_t start, uintptr_t end)
{
    uint64_t first = hazard >> HAZARD_PAGES_BITS, pages = hazard & HAZARD_PAGES_MAX;
    return hazard == HAZARD_ALL || (pages && first << w->page_shift < end && (first + pages) << w->page_shift > start);
}

/* Step 0. Only the engine writes it. */
static inline void hold_over(struct engine *e)
{
    __atomic_store_n(&e->holds, e->holds + 1, __ATOMIC_RELEASE);
}

static inline void wake_waiters(struct engine *e)
{
    if (__builtin_expect(__atomic_load_n(&e->waiters, __ATOMIC_SEQ_CST) == 0, 1))
        return;
    __atomic_fetch_add(&e->dropped, 1, __ATOMIC_SEQ_CST);
    soft_futex_wake(&e->dropped);
}

void soft_hazards_drop(struct engine *e)
{
    if (!e->nhazards)
        return;
    hold_over(e);
    while (e->nhazards)
        __atomic_exchange_n(&e->hazards[--e->nhazards], 0, __ATOMIC_SEQ_CST);
    wake_waiters(e);
}

void soft_hazards_publish(struct engine *e, const uint64_t *hazards, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        __atomic_exchange_n(&e->hazards[i], hazards[i], __ATOMIC_SEQ_CST);
    e->nhazards = n;
}

/* Both at once, for a hold of one word after another: the new one takes the place of the old one. */
static inline void hazard_replace(struct engine *e, uint64_t hazard)
{
    if (e->nhazards > 1)
        soft_hazards_drop(e);
    bool was_held = e->nhazards;
    if (was_held)
        hold_over(e);
    __atomic_exchange_n(&e->hazards[0], hazard, __ATOMIC_SEQ_CST);
    e->nhazards = 1;
    if (was_held)
        wake_waiters(e);
}

static bool engine_overlaps(const struct engine *e, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < HAZARDS; i++)
        if (hazard_overlaps(e->world, __atomic_load_n(&e->hazards[i], __ATOMIC_SEQ_CST), start, end))
            return true;
    return false;
}

bool soft_access_in_use(const struct world *w, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < w->nengines; i++)
        if (engine_overlaps(w->engines[i], start, end))
            return true;
    return false;
}

/*
 * Step C for one engine. A hold of a kernel is one span of one job, and its time counts from the first look. Operations have no
 * deadline, they go on by themselves.
 */
static void wait_for_engine(struct engine *e, uintptr_t start, uintptr_t end)
{
    uint64_t since = soft_now_ms();
    uint32_t generation = __atomic_load_n(&e->generation, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&e->waiters, 1, __ATOMIC_SEQ_CST);
    bool overlaps = engine_overlaps(e, start, end);
    uint64_t holds = __atomic_load_n(&e->holds, __ATOMIC_ACQUIRE); /* after the hazards */
    while (overlaps) {
        uint32_t seen = __atomic_load_n(&e->dropped, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&e->holds, __ATOMIC_ACQUIRE) != holds || !engine_overlaps(e, start, end))
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

void soft_access_wait_unused(struct world *w, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < w->nengines; i++)
        if (engine_overlaps(w->engines[i], start, end))
            wait_for_engine(w->engines[i], start, end);
}

/* ---- TLB --------------------------------------------------------------------------------------------------------- */

/* Neighbours fall into different slots, and so do arrays that lie at a round distance from each other (Fibonacci hashing). */
static inline unsigned tlb_slot(uint64_t number, unsigned slots)
{
    return (unsigned)((number * UINT64_C(0x9e3779b97f4a7c15) >> 32) * slots >> 32);
}

static inline struct tlb_entry *tlb_large(struct engine *e, uintptr_t addr)
{
    return &e->tlb->large[tlb_slot(addr / SOFT_BLOCK, TLB_LARGE)];
}

static inline struct tlb_entry *tlb_small(struct engine *e, uintptr_t addr)
{
    return &e->tlb->small[tlb_slot(addr >> e->world->page_shift, TLB_SMALL)];
}

static inline bool translates(const struct translation *t, uintptr_t addr, bool write)
{
    return t->start <= addr && addr < t->end && (t->write || !write);
}

static inline struct tlb_entry *tlb_find(struct engine *e, uintptr_t addr, bool write)
{
    struct tlb_entry *x = tlb_large(e, addr);
    if (translates(&x->t, addr, write))
        return x;
    x = tlb_small(e, addr);
    return translates(&x->t, addr, write) ? x : NULL;
}

struct tlb_entry *soft_tlb_find(struct engine *e, uintptr_t addr, bool write)
{
    return tlb_find(e, addr, write);
}

void soft_tlb_fill(struct engine *e, uintptr_t addr, const struct translation *t)
{
    bool large = (t->end - t->start) >> e->world->page_shift >= LARGE_RUN_PAGES;
    *(large ? tlb_large(e, addr) : tlb_small(e, addr)) = (struct tlb_entry){.t = *t, .held = UINT64_MAX};
}

/* A large one must not hide the small one that comes. */
void soft_tlb_forget(struct tlb_entry *x)
{
    x->t.end = x->t.start;
}

static inline enum check translation_check(const struct engine *e, const struct translation *t)
{
    uint32_t gate = __atomic_load_n(e->world->gate, __ATOMIC_SEQ_CST);
    if (__builtin_expect(gate & 1, 0))
        return CHECK_EVENTS;
    if (soft_mutate("soft-check"))
        return CHECK_GOOD;
    if (__builtin_expect(((gate ^ t->gate) & t->gate_mask) == 0 &&
                             __atomic_load_n(t->generation, __ATOMIC_SEQ_CST) == t->generation_seen &&
                             __atomic_load_n(t->seq, __ATOMIC_SEQ_CST) == t->seq_seen,
                         1))
        return CHECK_GOOD;
    return CHECK_STALE;
}

enum check soft_translation_check(const struct engine *e, const struct translation *t)
{
    return translation_check(e, t);
}

int soft_resolve(struct engine *e, uintptr_t addr, bool write, struct translation *t)
{
    return addr >> ADDRESS_BITS ? -EFAULT : e->world->outside->resolve(e, addr, write, t);
}

/* ---- the bus ----------------------------------------------------------------------------------------------------- */

static void describe(struct engine *e, uintptr_t addr, bool write, int err)
{
    struct text t = {.buf = e->message, .size = sizeof(e->message)};
    soft_text_str(&t, soft_ops_name(e->operation->kind));
    if (soft_engine_runs_kernel(e)) {
        soft_text_str(&t, " ");
        if (e->operation->kernel.symbol)
            soft_text_str(&t, e->operation->kernel.symbol);
        else
            soft_text_hex(&t, (uintptr_t)e->operation->kernel.kernel);
    }
    soft_text_str(&t, write ? ": cannot write " : ": cannot read ");
    soft_text_hex(&t, addr);
    soft_text_str(&t, err == -EFAULT   ? ": nothing is mapped there; is the pointer right, and the memory not freed?"
                      : err == -EACCES ? ": the mapping's protection forbids it; see mprotect(2)"
                                       : ": ");
    if (err != -EFAULT && err != -EACCES)
        soft_text_str(&t, hmm_strerror(err));
}

int soft_access_error(struct engine *e, uintptr_t addr, bool write, int err)
{
    describe(e, addr, write, err);
    e->status = (struct hmm_job_status){.status = err, .address = addr, .message = e->message};
    return err;
}

static int bus_write_all(struct engine *e, uintptr_t addr, const char *from, size_t len)
{
    while (len) {
        int64_t n = e->world->outside->bus_write(e, addr, from, len);
        if (n < 0)
            return soft_access_error(e, addr, true, (int)n);
        addr += n;
        from += n;
        len -= n;
    }
    return 0;
}

bool soft_bounce_changed(const struct bounce *b, size_t *from, size_t *to)
{
    size_t i = *from, k;
    while (i < b->len && b->now[i] == b->before[i])
        i++;
    for (k = i; k < b->len && b->now[k] != b->before[k];)
        k++;
    *from = i;
    *to = k;
    return i < k && !soft_mutate("soft-write-back");
}

int soft_bounce_write_back(struct engine *e, struct bounce *b)
{
    int r = 0;
    for (size_t from = 0, to; r == 0 && soft_bounce_changed(b, &from, &to); from = to)
        r = bus_write_all(e, b->addr + from, b->now + from, to - from);
    return r;
}

int soft_bounce_read(struct engine *e, struct bounce *b, uintptr_t addr, size_t len, bool write)
{
    size_t page = (size_t)1 << e->world->page_shift, left = page - (addr & (page - 1));
    int64_t n = e->world->outside->bus_read(e, addr, b->now, len < left ? len : left);
    if (n < 0)
        return soft_access_error(e, addr, write, (int)n);
    if (write)
        memcpy(b->before, b->now, n);
    b->addr = addr;
    b->len = n;
    b->write = write;
    return 0;
}

/* ---- spans ------------------------------------------------------------------------------------------------------- */

int soft_access_end_span(struct engine *e)
{
    int r = 0;
    soft_hazards_drop(e);
    if (e->bounce.len && e->bounce.write)
        r = soft_bounce_write_back(e, &e->bounce);
    e->bounce.len = 0;
    return r;
}

void soft_access_drop_span(struct engine *e)
{
    e->bounce.len = 0;
    soft_hazards_drop(e);
}

/* Ends the last span, but leaves a hazard to be replaced by the next one. */
static inline int end_bounce(struct engine *e)
{
    return __builtin_expect(e->bounce.len != 0, 0) ? soft_access_end_span(e) : 0;
}

/* A span over the bus: *len is cut to what there is. */
static char *bounce_span(struct engine *e, uintptr_t addr, size_t *len, bool write)
{
    if (soft_bounce_read(e, &e->bounce, addr, *len, write))
        return NULL;
    *len = e->bounce.len;
    return e->bounce.now;
}

/* *len bytes at addr, or the part of it that one translation has. NULL: e->status says why not. */
static char *get_span(struct engine *e, uintptr_t addr, size_t *len, bool write)
{
    if (end_bounce(e))
        return NULL;
    for (unsigned tries = 0; tries < ACCESS_TRIES;) {
        struct tlb_entry *x = tlb_find(e, addr, write);
        if (x) {
            size_t granted = x->t.end - addr < *len ? x->t.end - addr : *len;
            hazard_replace(e, soft_hazard_of(e->world, addr, granted));
            enum check found = translation_check(e, &x->t);
            if (found == CHECK_GOOD) {
                *len = granted;
                return x->t.at + (addr - x->t.start);
            }
            soft_hazards_drop(e);
            if (found == CHECK_EVENTS) {
                e->world->outside->sync(e);
                continue;
            }
            soft_tlb_forget(x);
        }
        tries++;
        soft_hazards_drop(e); /* core may now wait for this engine */
        struct translation t;
        int r = soft_resolve(e, addr, write, &t);
        if (r < 0) {
            soft_access_error(e, addr, write, r);
            return NULL;
        }
        if (r > 0)
            break;
        soft_tlb_fill(e, addr, &t);
    }
    soft_hazards_drop(e);
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
