/* SPDX-License-Identifier: MIT */
/*
 * The device page table: blocks of 2 MiB, each with an interval notifier over exactly its range and the sequence number at which
 * its entries were read. It is a cache of what core knows; losing a block costs a snapshot.
 *
 * Filling is the retry loop of the kernel's document (mm/hmm.rst):
 *
 *   again: seq = read_begin(notifier)         waits while an invalidation is in progress
 *          snapshot of the block               may be stale as soon as it is taken
 *          lock; if read_retry(seq) unlock, again; write entries, filled = seq; unlock
 *
 * The entries of a block may be used only while its sequence number is still `filled`. So an invalidation makes the whole block
 * stale the moment it begins, whatever its callback has cleared so far; pages of the block that did not move are found again
 * by a snapshot. The device's own migrations do not move the number, and need not: they only add pages.
 *
 * The notifier is inserted before core is asked anything about the block, so that no change after the answer is missed.
 *
 * Blocks are given up when the table is full, and when nothing of them is mapped. A TLB may still hold their translations; what
 * makes that safe is said in access.c. Lock order in soft.h.
 */
#include "link.h"
#include "soft.h"

#include <errno.h>
#include <time.h>

#define RESOLVE_TRIES 8 /* then the bus, which is right at any time */
#define FILL_TRIES 16
#define SWEEP_STEPS 4

static unsigned hash_of(const struct table *t, uintptr_t base)
{
    return (unsigned)((uint64_t)(base / SOFT_BLOCK) * 0x9e3779b97f4a7c15ull >> (64 - t->hash_bits));
}

/* Caller holds table.lock. */
static struct block *find(struct table *t, uintptr_t base)
{
    struct block *b = t->hash[hash_of(t, base)];
    while (b && b->base != base)
        b = b->next;
    return b;
}

static void unhash(struct table *t, struct block *b)
{
    struct block **at = &t->hash[hash_of(t, b->base)];
    while (*at != b)
        at = &(*at)->next;
    *at = b->next;
}

/* ---- invalidation ------------------------------------------------------------------------------------------------ */

static void clear_entries(struct table *t, struct block *b, uintptr_t start, uintptr_t end)
{
    uintptr_t page = SOFT_BLOCK / t->block_pages;
    unsigned first = start > b->base ? (start - b->base) / page : 0;
    unsigned last = end < b->base + SOFT_BLOCK ? (end - b->base) / page : t->block_pages;
    for (unsigned i = first; i < last; i++) {
        b->mapped -= b->pte[i] != 0;
        b->pte[i] = 0;
    }
}

/* The engine process uses nothing of the block, and the first `exports` translations that it got will not be used again. */
static void forgotten(struct block *b, uint64_t exports)
{
    pthread_mutex_lock(&b->soft->table.lock);
    if (b->quiet < exports)
        b->quiet = exports;
    pthread_mutex_unlock(&b->soft->table.lock);
}

static void delay(uint32_t ms)
{
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    while (ms && nanosleep(&left, &left) && errno == EINTR)
        ;
}

/* The engine process lets go of the range; briefly: or -EAGAIN, if it uses it. */
static int recall(struct soft *s, struct block *b, uintptr_t start, uintptr_t end, uint64_t exports, bool briefly)
{
    bool whole = end - start == SOFT_BLOCK;
    bool quiet = briefly ? soft_recall_nowait(s->link, start, end) : soft_recall(s->link, start, end);
    if (quiet && (whole || !briefly)) /* asked briefly it speaks of the range only */
        forgotten(b, exports);
    return briefly && !quiet ? -EAGAIN : 0;
}

/* Engines of this process, and jobs that hold the range, let go of it, or -EAGAIN. exported: another process is still to be asked,
 * which is waiting. */
static int wait_for_engines(struct soft *s, const struct hmm_event *event, bool exported)
{
    if (s->model.kind != MODEL_FAULT)
        return soft_model_invalidate(s, event);
    if (soft_mutate("soft-hazard"))
        return 0;
    if (!event->blockable || event->brief)
        return (exported && !event->brief) || soft_ports_in_use(s, event->start, event->end) ? -EAGAIN : 0;
    soft_ports_wait_unused(s, event->start, event->end);
    return 0;
}

/*
 * When this returns 0, no engine uses a page of the range, and none will without asking core again:
 *
 *  - The sequence number moved before this was called. An engine that looks at it after that refuses its translation.
 *  - An engine that looked at it before had published its hazard before (access.c), and all of that is in one order for
 *    everybody (sequentially consistent). So the hazard is seen here, and waited for.
 *
 * An engine process has hazards and versions of its own, which it is told to look at (process/control.c), if it was given anything of
 * the block that it may still use. It gets nothing while we are here: a block that is filled now waits for us in read_begin().
 * So what it has forgotten when it answers stays forgotten until this invalidation is over.
 *
 * Seeing a hazard gone acquires what its engine released by taking it away: everything it wrote to the page. So a copy that
 * core starts after this sees it.
 *
 * That is the model with faults. Where jobs hold their ranges, no translation outlives a job, and model.c says who is waited for.
 */
static int invalidate(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct block *b = (struct block *)((char *)n - offsetof(struct block, notifier));
    struct soft *s = b->soft;
    if (event->blockable)
        pthread_mutex_lock(&s->table.lock);
    else if (pthread_mutex_trylock(&s->table.lock))
        return -EAGAIN;
    uintptr_t start = event->start > b->base ? event->start : b->base;
    uintptr_t end = event->end < b->base + SOFT_BLOCK ? event->end : b->base + SOFT_BLOCK;
    bool here = b->base != BLOCK_NONE && start < end;
    if (here)
        clear_entries(&s->table, b, start, end);
    uint64_t exports = b->exports;
    bool exported = here && exports != b->quiet && !soft_mutate("soft-export");
    pthread_mutex_unlock(&s->table.lock);
    if ((!event->blockable || event->brief) && s->invalidate_delay_ms)
        return -EAGAIN;
    int r = wait_for_engines(s, event, exported);
    if (!r && exported && !soft_mutate("soft-hazard"))
        r = recall(s, b, start, end, exports, event->brief);
    if (!r)
        delay(s->invalidate_delay_ms);
    return r;
}

static const struct hmm_notifier_ops notifier_ops = {.invalidate = invalidate};

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* Has the engine process forget the block, unless it uses a page of it now. No invalidation is in progress, so it may ask for the
 * block again at any time: that is seen by the number of exports. */
static void make_forgotten(struct table *t, struct block *b)
{
    pthread_mutex_lock(&t->lock);
    uintptr_t base = b->base;
    uint64_t exports = b->exports;
    bool ask = base != BLOCK_NONE && b->users == 0 && exports != b->quiet;
    pthread_mutex_unlock(&t->lock);
    if (ask && soft_recall_nowait(b->soft->link, base, base + SOFT_BLOCK))
        forgotten(b, exports);
}

/* Takes a block out of the table, unless an engine fills it or uses one of its pages. Caller holds table.structure.
 *
 * The generation moves first. An engine that published a hazard before that is seen below; one that does so later finds its
 * translation to be of an older generation. So when the notifier is gone, nobody relies on it. */
static bool give_up(struct table *t, struct block *b)
{
    make_forgotten(t, b);
    pthread_mutex_lock(&t->lock);
    bool can = b->base != BLOCK_NONE && b->users == 0 && b->quiet == b->exports;
    if (can) {
        __atomic_fetch_add(&b->generation, 1, __ATOMIC_SEQ_CST);
        can = !soft_ports_in_use(b->soft, b->base, b->base + SOFT_BLOCK);
    }
    if (can) {
        unhash(t, b);
        clear_entries(t, b, b->base, b->base + SOFT_BLOCK);
        b->base = BLOCK_NONE;
        b->current = false;
    }
    pthread_mutex_unlock(&t->lock);
    if (!can)
        return false;
    hmm_notifier_remove(&b->notifier);
    b->next = t->unused;
    t->unused = b;
    return true;
}

/* Looks at the next few blocks and gives up those with nothing mapped, so that core need not call us for them. */
static void sweep(struct table *t)
{
    for (unsigned i = 0; i < SWEEP_STEPS && t->made; i++) {
        struct block *b = t->all[t->hand++ % t->made];
        pthread_mutex_lock(&t->lock);
        bool idle = b->base != BLOCK_NONE && b->mapped == 0;
        pthread_mutex_unlock(&t->lock);
        if (idle)
            give_up(t, b);
    }
}

/* Second chance, as for page replacement. */
static void reclaim(struct table *t)
{
    for (unsigned i = 0; i < 2 * t->made && !t->unused; i++) {
        struct block *b = t->all[t->hand++ % t->made];
        pthread_mutex_lock(&t->lock);
        bool recent = b->recent;
        b->recent = false;
        pthread_mutex_unlock(&t->lock);
        if (!recent)
            give_up(t, b);
    }
}

/* A block without a range; NULL: all are in use. Caller holds table.structure. */
static struct block *unused_block(struct soft *s)
{
    struct table *t = &s->table;
    sweep(t);
    if (!t->unused && t->made < t->max) {
        struct block *b = hmm_mem_alloc(sizeof(*b) + t->block_pages * sizeof(pte_t));
        if (b) {
            b->soft = s;
            b->base = BLOCK_NONE;
            t->all[t->made++] = b;
            t->unused = b;
        }
    }
    if (!t->unused)
        reclaim(t);
    struct block *b = t->unused;
    if (b)
        t->unused = b->next;
    return b;
}

static struct block *find_and_use(struct table *t, uintptr_t base)
{
    pthread_mutex_lock(&t->lock);
    struct block *b = find(t, base);
    if (b) {
        b->users++;
        b->recent = true;
    }
    pthread_mutex_unlock(&t->lock);
    return b;
}

struct block *soft_table_get(struct soft *s, uintptr_t base)
{
    struct table *t = &s->table;
    struct block *b = find_and_use(t, base);
    if (b)
        return b;
    pthread_mutex_lock(&t->structure);
    b = find_and_use(t, base);
    if (b)
        goto unlock;
    b = unused_block(s);
    if (!b)
        goto unlock;
    if (hmm_notifier_insert(s->dev, &b->notifier, base, base + SOFT_BLOCK, &notifier_ops)) {
        b->next = t->unused;
        t->unused = b;
        b = NULL;
        goto unlock;
    }
    pthread_mutex_lock(&t->lock);
    b->base = base;
    b->users = 1;
    b->recent = true;
    b->next = t->hash[hash_of(t, base)];
    t->hash[hash_of(t, base)] = b;
    pthread_mutex_unlock(&t->lock);
unlock:
    pthread_mutex_unlock(&t->structure);
    return b;
}

void soft_table_put(struct soft *s, struct block *b)
{
    struct table *t = &s->table;
    pthread_mutex_lock(&t->lock);
    b->users--;
    pthread_mutex_unlock(&t->lock);
}

/* ---- translation ------------------------------------------------------------------------------------------------- */

static void install(struct table *t, struct block *b, const uint64_t *pfns, uint64_t seq)
{
    b->mapped = 0;
    for (unsigned i = 0; i < t->block_pages; i++) {
        pte_t pte = 0;
        if (pfns[i] & HMM_PFN_VALID)
            pte = ((pte_t)(pfns[i] & HMM_PFN_MASK) + 1) | (pfns[i] & HMM_PFN_WRITE ? PTE_WRITE : 0);
        b->pte[i] = pte;
        b->mapped += pte != 0;
    }
    b->filled = seq;
    b->current = true;
}

/* Reads the whole block from core. 0, -EAGAIN: it changes too often, or core's error. The engine holds no span. */
static int fill(struct port *p, struct block *b, uintptr_t base)
{
    struct table *t = &p->soft->table;
    for (unsigned i = 0; i < FILL_TRIES; i++) {
        uint64_t seq = hmm_notifier_read_begin(&b->notifier);
        int r = hmm_range_snapshot(p->soft->dev, base, base + SOFT_BLOCK, p->pfns);
        if (r < 0)
            return r;
        pthread_mutex_lock(&t->lock);
        bool stale = hmm_notifier_read_retry(&b->notifier, seq);
        if (stale && soft_mutate("soft-retry")) {
            stale = false;
            seq = hmm_notifier_seq(&b->notifier);
        }
        if (!stale)
            install(t, b, p->pfns, seq);
        pthread_mutex_unlock(&t->lock);
        if (!stale)
            return 0;
    }
    return -EAGAIN;
}

/* Entries i and i+1 (k) of a block are neighbours on the device with the same rights. */
static bool follows(const struct block *b, unsigned i, unsigned k)
{
    return b->pte[i] && b->pte[k] == b->pte[i] + 1;
}

enum walk { WALK_FOUND, WALK_MISSING, WALK_STALE };

/* Looks addr up; *out is the run of device pages around it. */
static enum walk walk(struct soft *s, struct block *b, uintptr_t addr, bool write, struct extent *out)
{
    struct table *t = &s->table;
    uintptr_t page = SOFT_BLOCK / t->block_pages;
    unsigned first = (addr - b->base) / page, last = first;
    enum walk found = WALK_STALE;
    uint32_t gate = __atomic_load_n(s->world.gate, __ATOMIC_SEQ_CST); /* before the sequence number */
    pthread_mutex_lock(&t->lock);
    if (!b->current || b->filled != hmm_notifier_seq(&b->notifier))
        goto unlock;
    pte_t pte = b->pte[first];
    found = WALK_MISSING;
    if (!pte || (write && !(pte & PTE_WRITE)))
        goto unlock;
    while (first > 0 && follows(b, first - 1, first))
        first--;
    while (last + 1 < t->block_pages && follows(b, last, last + 1))
        last++;
    *out = (struct extent){
        .start = b->base + first * page,
        .end = b->base + (last + 1) * page,
        .page = (b->pte[first] & ~PTE_WRITE) - 1,
        .block = b,
        .seq = b->filled,
        .generation = __atomic_load_n(&b->generation, __ATOMIC_RELAXED),
        .gate = gate,
        .write = pte & PTE_WRITE,
    };
    found = WALK_FOUND;
    b->exports += s->link != NULL;
unlock:
    pthread_mutex_unlock(&t->lock);
    return found;
}

int soft_table_resolve(struct port *p, uintptr_t addr, bool write, struct extent *out)
{
    struct soft *s = p->soft;
    uintptr_t base = addr & ~(SOFT_BLOCK - 1);
    struct block *b = soft_table_get(s, base);
    int r = 1;
    for (unsigned i = 0; b && i < RESOLVE_TRIES; i++) {
        enum walk found = walk(s, b, addr, write, out);
        if (found == WALK_FOUND) {
            soft_table_put(s, b);
            return 0;
        }
        if (found == WALK_MISSING) {
            r = soft_bus_fault(s, addr, write ? HMM_FAULT_WRITE : HMM_FAULT_READ);
            if (r)
                break;
            r = 1;
        }
        if (fill(p, b, base))
            break;
    }
    if (b)
        soft_table_put(s, b);
    return r;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

int soft_table_init(struct soft *s)
{
    struct table *t = &s->table;
    t->block_pages = SOFT_BLOCK / hmm_page_size();
    t->max = 4 * ((s->memory.bytes + SOFT_BLOCK - 1) / SOFT_BLOCK) + 64;
    t->hash_bits = 32 - __builtin_clz(t->max);
    t->hash_bytes = sizeof(t->hash[0]) << t->hash_bits;
    t->all_bytes = sizeof(t->all[0]) * t->max;
    t->hash = hmm_mem_alloc(t->hash_bytes);
    t->all = hmm_mem_alloc(t->all_bytes);
    if (!t->hash || !t->all) {
        hmm_mem_free(t->hash, t->hash_bytes);
        hmm_mem_free(t->all, t->all_bytes);
        return hmm_fail(-ENOMEM, "soft: no memory for the device page table");
    }
    pthread_mutex_init(&t->structure, NULL);
    pthread_mutex_init(&t->lock, NULL);
    return 0;
}

void soft_table_exit(struct soft *s)
{
    struct table *t = &s->table;
    for (unsigned i = 0; i < t->made; i++) {
        if (t->all[i]->base != BLOCK_NONE)
            hmm_notifier_remove(&t->all[i]->notifier);
        hmm_mem_free(t->all[i], sizeof(struct block) + t->block_pages * sizeof(pte_t));
    }
    hmm_mem_free(t->all, t->all_bytes);
    hmm_mem_free(t->hash, t->hash_bytes);
    pthread_mutex_destroy(&t->lock);
    pthread_mutex_destroy(&t->structure);
}
