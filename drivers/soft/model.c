/* SPDX-License-Identifier: MIT */
/*
 * How jobs get at the memory of the program. Three kinds of device:
 *
 *   fault     The engine asks when it gets there, and gives each page back as soon as its span ends (mirror.c, engine/access.c).
 *   resident  No faults. The ranges of a job are brought to the device before it starts, and held while it runs: who wants such a page
 *             waits until the job has ended, whatever for.
 *   register  A registration cache. The same, but what was found is kept for the next job over the same range, and holds references
 *             to the device pages. When the program unmaps or drops memory, a registration is only orphaned: nobody waits, running
 *             jobs go on with the old pages, which nobody sees any more and which go when the last of these jobs has ended; the next
 *             job asks anew. Who wants to have the bytes (the CPU, an eviction) still waits for running jobs, because they write them.
 *             (RDMA need not: there memory is registered where it is, and never moves.) A registration that no job uses holds up
 *             nobody: it is dropped.
 *
 * Pages that did not come (they cannot move, or did not fit), and all others, are reached over the bus.
 *
 * A hold is taken in one step, under the lock that the invalidate callback takes, when all registrations of the job are current: so
 * each invalidation either began before and is known, or will call back and see the hold. Before that a job holds nothing, however long
 * it waits: for pages, for room, for other jobs to end. So jobs never wait for each other in a circle. Nor does a job that holds wait
 * for what only another's end can give: it asks for no page any more, and the bus takes none that is held (core waits only for the
 * page that is touched).
 *
 * Jobs ask for room first, so that two that do not fit together run one after the other instead of evicting each other. Room is
 * counted, not allocated: what is on the device for other reasons is evicted.
 */
#include "link.h"
#include "soft.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "engine/futex.h"

#define HOLD_TRIES 16  /* then what is current is held, and the rest goes over the bus */
#define BRING_TRIES 2  /* of them; later ones only look */
#define LOOK_MS 20     /* between two looks whether a job was asked to end, or has */
#define LONG_MS 1000   /* between two looks when nothing is due */
#define CACHED_MAX 128 /* registrations that no job uses */
#define ADDRESS_MAX ((uintptr_t)1 << 57)

/* Pages of a range that a job may hold. */
struct request {
    uintptr_t start, end;
    struct registration *fresh; /* made for it, not published */
};

/* Whole pages, and not more than the page table has directories for. False: nothing of it can be held. */
static bool pages_of(const struct soft *s, const struct hmm_range *range, struct request *out)
{
    uintptr_t mask = hmm_page_size() - 1, most = (uintptr_t)s->directories * SOFT_BLOCK;
    if (range->bytes == 0 || range->addr >= ADDRESS_MAX || range->bytes > ADDRESS_MAX - range->addr)
        return false;
    out->start = range->addr & ~mask;
    out->end = (range->addr + range->bytes + mask) & ~mask;
    if (out->end - out->start > most)
        out->end = out->start + most;
    return true;
}

static unsigned requests_of(const struct soft *s, const struct hmm_job *job, struct request *requests)
{
    unsigned n = 0;
    for (uint32_t i = 0; i < job->nranges && n < HOLD_MAX; i++) {
        requests[n] = (struct request){0};
        n += pages_of(s, &job->ranges[i], &requests[n]);
    }
    return n;
}

/* ---- waiting; caller holds model.lock -------------------------------------------------------------------------------- */

/* False: nothing changed for so long. */
static bool wait_change(struct soft *s, uint32_t ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    return pthread_cond_timedwait(&s->model.changed, &s->model.lock, &until) != ETIMEDOUT;
}

/* What another job holds already takes no more room. */
static uint64_t room_for(struct soft *s, const struct request *requests, unsigned n)
{
    uint64_t pages = 0;
    for (unsigned i = 0; i < n; i++) {
        const struct registration *r = soft_registration_find(s, requests[i].start, requests[i].end);
        if (!r || !r->users)
            pages += (requests[i].end - requests[i].start) >> s->memory.page_shift;
    }
    return pages < s->memory.pages ? pages : s->memory.pages;
}

/* Pages that running jobs hold, or asked for and do not hold yet. What several hold together is counted once, until the last ends. */
static uint64_t taken(const struct soft *s)
{
    uint64_t pages = 0;
    for (unsigned i = 0; i < s->nports; i++)
        pages += s->ports[i]->hold.reserved;
    for (const struct registration *r = s->model.first; r; r = r->next)
        if (r->users)
            pages += (r->end - r->start) >> s->memory.page_shift;
    return pages;
}

static bool fits_beside_others(const struct soft *s, uint64_t room)
{
    uint64_t others = taken(s);
    return !others || others + room <= s->memory.pages;
}

static bool is_first(const struct soft *s, const struct hold *h)
{
    for (unsigned i = 0; i < s->nports; i++)
        if (s->ports[i]->hold.turn && s->ports[i]->hold.turn < h->turn)
            return false;
    return true;
}

/* First come, first served, so that a large job is not passed by small ones for ever. */
static void wait_for_room(struct port *p, const struct request *requests, unsigned n)
{
    struct soft *s = p->soft;
    struct hold *h = &p->hold;
    pthread_mutex_lock(&s->model.lock);
    h->turn = ++s->model.turns;
    uint64_t room;
    while ((room = room_for(s, requests, n)) && !soft_port_was_asked(p) && (!is_first(s, h) || !fits_beside_others(s, room)))
        wait_change(s, LOOK_MS);
    h->turn = 0;
    h->reserved = room;
    pthread_cond_broadcast(&s->model.changed); /* the next one is first now */
    pthread_mutex_unlock(&s->model.lock);
}

/* ---- taking and leaving a hold ------------------------------------------------------------------------------------- */

static bool is_found(struct soft *s, const struct request *q)
{
    pthread_mutex_lock(&s->model.lock);
    bool found = soft_registration_find(s, q->start, q->end);
    pthread_mutex_unlock(&s->model.lock);
    return found;
}

static void prepare(struct port *p, struct request *requests, unsigned n, uint64_t budget)
{
    for (unsigned i = 0; i < n; i++) {
        struct request *q = &requests[i];
        if (is_found(p->soft, q))
            continue;
        if (!q->fresh)
            q->fresh = soft_registration_new(p->soft, q->start, q->end);
        if (q->fresh)
            soft_registration_fill(p, q->fresh, &budget);
    }
}

static struct registration *current_of(struct soft *s, struct request *q)
{
    struct registration *r = soft_registration_find(s, q->start, q->end);
    return r ? r : q->fresh && soft_registration_is_current(q->fresh) ? q->fresh : NULL;
}

/* All or, unless it is the last try, nothing. */
static bool take(struct port *p, struct request *requests, unsigned n, bool last)
{
    struct soft *s = p->soft;
    struct hold *h = &p->hold;
    bool all = true;
    pthread_mutex_lock(&s->model.lock);
    for (unsigned i = 0; i < n && all && !last; i++)
        all = current_of(s, &requests[i]) != NULL;
    for (unsigned i = 0; i < n && all; i++) {
        struct registration *r = current_of(s, &requests[i]);
        if (r && r == requests[i].fresh) {
            requests[i].fresh = NULL;
            soft_registration_publish(s, r, s->model.kind == MODEL_REGISTER);
            s->model.made++;
        } else if (r) {
            s->model.used_again++;
        }
        if (r)
            r->users++;
        h->registrations[h->n++] = r;
    }
    if (all)
        h->reserved = 0; /* what it holds counts from now on */
    pthread_mutex_unlock(&s->model.lock);
    return all;
}

static uint64_t count_pages(const struct soft *s, const struct request *requests, unsigned n)
{
    uint64_t pages = 0;
    for (unsigned i = 0; i < n; i++)
        pages += (requests[i].end - requests[i].start) >> s->memory.page_shift;
    return pages;
}

static void hold(struct port *p, struct request *requests, unsigned n)
{
    struct soft *s = p->soft;
    bool fits = count_pages(s, requests, n) <= s->memory.pages;
    /* Changes of the address space that returned before the job began move sequence numbers a little later. */
    if (__atomic_load_n(s->world.gate, __ATOMIC_SEQ_CST) & 1)
        hmm_event_sync(s->dev);
    for (unsigned tries = 0; !soft_port_was_asked(p); tries++) {
        /* What did not fit the first time has pushed out some of what came before it: not to be asked for again. */
        bool bring = tries == 0 || (fits && tries < BRING_TRIES);
        prepare(p, requests, n, bring ? s->memory.pages : 0);
        if (take(p, requests, n, tries == HOLD_TRIES))
            break;
    }
    struct registration *rest = NULL;
    for (unsigned i = 0; i < n; i++)
        if (requests[i].fresh) {
            requests[i].fresh->next = rest;
            rest = requests[i].fresh;
        }
    soft_registrations_free(s, rest);
}

void soft_model_begin(struct port *p, const struct hmm_job *job)
{
    struct request requests[HOLD_MAX];
    struct hold *h = &p->hold;
    if (p->soft->model.kind == MODEL_FAULT)
        return;
    h->generation = p->generation;
    h->deadline_ms = job->operation.kind == HMM_OP_KERNEL ? job->operation.kernel.deadline_ms : 0;
    unsigned n = requests_of(p->soft, job, requests);
    if (!n)
        return;
    wait_for_room(p, requests, n);
    hold(p, requests, n);
}

/* Those that nobody uses and that are the oldest, down to the bounds. Caller holds model.lock. */
static void trim_cache(struct soft *s, struct registration **list)
{
    for (;;) {
        struct registration *oldest = NULL;
        unsigned unused = 0;
        uint64_t blocks = 0;
        for (struct registration *r = s->model.first; r; r = r->next) {
            if (r->users)
                continue;
            unused++;
            blocks += (r->end - r->start) / SOFT_BLOCK + 1;
            if (!oldest || r->last_used < oldest->last_used)
                oldest = r;
        }
        if (unused <= CACHED_MAX && blocks <= s->directories / 2)
            return;
        soft_registration_unlink(s, oldest, list);
    }
}

void soft_model_end(struct port *p)
{
    struct soft *s = p->soft;
    struct hold *h = &p->hold;
    struct registration *list = NULL;
    if (s->model.kind == MODEL_FAULT)
        return;
    pthread_mutex_lock(&s->model.lock);
    for (unsigned i = 0; i < h->n; i++) {
        struct registration *r = h->registrations[i];
        if (!r)
            continue;
        r->last_used = ++s->model.clock;
        if (--r->users == 0 && (r->stale || s->model.kind == MODEL_RESIDENT))
            soft_registration_unlink(s, r, &list);
    }
    h->n = 0;
    h->reserved = h->awaited_since = 0;
    trim_cache(s, &list);
    pthread_cond_broadcast(&s->model.changed);
    pthread_mutex_unlock(&s->model.lock);
    soft_registrations_free(s, list);
}

int soft_model_resolve(struct port *p, uintptr_t addr, bool write, struct hmm_mirror_run *run)
{
    struct soft *s = p->soft;
    if (s->model.kind == MODEL_FAULT)
        return hmm_mirror_resolve(s->mirror, addr, write ? HMM_FAULT_WRITE : HMM_FAULT_READ, run);
    bool found = false;
    pthread_mutex_lock(&s->model.lock);
    for (unsigned i = 0; i < p->hold.n && !found; i++)
        found = p->hold.registrations[i] && soft_registration_resolve(p->hold.registrations[i], addr, write, run);
    pthread_mutex_unlock(&s->model.lock);
    return found ? 0 : 1;
}

/* ---- invalidation ------------------------------------------------------------------------------------------------ */

/* Unused registrations of these pages go to the list, others are not found any more. True: jobs that run are to be waited for.
 * Caller holds model.lock. */
static bool settle(struct soft *s, const struct hmm_event *event, struct registration **list)
{
    bool orphans = s->model.kind == MODEL_REGISTER && (event->type == HMM_EVENT_UNMAP || event->type == HMM_EVENT_CLEAR);
    bool wait = false;
    for (struct registration *r = s->model.first, *next; r; r = next) {
        next = r->next;
        if (!soft_registration_covers(r, event->start, event->end))
            continue;
        r->stale = true;
        if (!r->users)
            soft_registration_unlink(s, r, list);
        else if (orphans)
            soft_registration_cut(r, event->start, event->end);
        else
            wait = true;
    }
    return wait && !soft_mutate("soft-hold");
}

static bool holds(const struct hold *h, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < h->n; i++)
        if (h->registrations[i] && soft_registration_covers(h->registrations[i], start, end))
            return true;
    return false;
}

struct due {
    struct port *port;
    uint32_t generation, deadline_ms;
};

/* Kernels that were waited for as long as they may run on. Returns how long to wait for the others. Caller holds model.lock. */
static uint32_t look_at_deadlines(struct soft *s, const struct hmm_event *event, struct due *due, unsigned *n)
{
    uint64_t now = soft_now_ms();
    uint32_t wait = LONG_MS;
    for (unsigned i = 0; i < s->nports; i++) {
        struct hold *h = &s->ports[i]->hold;
        if (!h->deadline_ms || !holds(h, event->start, event->end))
            continue;
        if (!h->awaited_since)
            h->awaited_since = now;
        uint64_t waited = now - h->awaited_since;
        uint32_t left = waited < h->deadline_ms ? h->deadline_ms - (uint32_t)waited : LOOK_MS;
        if (waited >= h->deadline_ms)
            due[(*n)++] = (struct due){s->ports[i], h->generation, h->deadline_ms};
        wait = left < wait ? left : wait;
    }
    return wait;
}

static void end_jobs(const struct due *due, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        char message[160];
        struct text t = {.buf = message, .size = sizeof(message)};
        soft_text_str(&t, "the kernel held its ranges for ");
        soft_text_dec(&t, due[i].deadline_ms);
        soft_text_str(&t, " ms while memory in them was taken away; launch it with a longer deadline_ms, or in smaller pieces");
        soft_port_end_job(due[i].port, due[i].generation, -ETIMEDOUT, message);
    }
}

int soft_model_invalidate(struct soft *s, const struct hmm_event *event)
{
    struct registration *list = NULL;
    int r = 0;
    if (event->blockable)
        pthread_mutex_lock(&s->model.lock);
    else if (pthread_mutex_trylock(&s->model.lock))
        return -EAGAIN;
    while (settle(s, event, &list)) {
        struct due due[SOFT_ENGINES_MAX];
        unsigned n = 0;
        r = event->blockable && !event->brief ? 0 : -EAGAIN;
        if (r)
            break;
        uint32_t ms = look_at_deadlines(s, event, due, &n);
        if (n) {
            pthread_mutex_unlock(&s->model.lock);
            end_jobs(due, n);
            pthread_mutex_lock(&s->model.lock);
        }
        if (!wait_change(s, ms) && s->link) {
            pthread_mutex_unlock(&s->model.lock);
            soft_link_probe(s->link); /* operations have no deadline: they end by themselves, or with their process */
            pthread_mutex_lock(&s->model.lock);
        }
    }
    pthread_mutex_unlock(&s->model.lock);
    soft_registrations_free(s, list);
    return r;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

void soft_model_init(struct soft *s, enum model_kind kind)
{
    pthread_condattr_t attr;
    s->model.kind = kind;
    pthread_mutex_init(&s->model.lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->model.changed, &attr);
    pthread_condattr_destroy(&attr);
}

void soft_model_stop(struct soft *s)
{
    pthread_mutex_lock(&s->model.lock);
    struct registration *list = s->model.first;
    s->model.first = NULL;
    pthread_mutex_unlock(&s->model.lock);
    soft_registrations_free(s, list);
    if (s->model.kind == MODEL_REGISTER)
        hmm_log(HMM_LOG_DEBUG, "soft: %llu registrations were made, and used again %llu times",
                (unsigned long long)s->model.made, (unsigned long long)s->model.used_again);
}

void soft_model_exit(struct soft *s)
{
    pthread_cond_destroy(&s->model.changed);
    pthread_mutex_destroy(&s->model.lock);
}
