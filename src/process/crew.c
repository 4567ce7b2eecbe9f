/* SPDX-License-Identifier: MIT */
/* See crew.h. */
#include "process/crew.h"

#include <string.h>

#include "base/futex.h"
#include "base/util.h"
#include "debug/inject.h"
#include "notifier/changing.h"

#define SPARE_NS 10000000ll /* a thread that is idle takes work within so long */
#define SPARE_TRIES 8
#define ASKERS_MAX 32

struct pool {
    struct workers workers;
    struct work probe; /* who takes it is idle */
    uint32_t probed;   /* futex: it was taken */
};

static struct {
    struct pool pools[CREWS];
    struct hmm_thread *grower;
    uint32_t grow;  /* futex: moves when a pool may be used up */
    uint32_t ended; /* atomic: so does the grower */
} crew;

void crew_queue(enum crew which, struct work *work)
{
    workers_queue(&crew.pools[which].workers, work);
}

void crew_grow(void)
{
    __atomic_fetch_add(&crew.grow, 1, __ATOMIC_SEQ_CST);
    futex_wake(&crew.grow, 1);
}

static void take_probe(struct work *work, unsigned worker)
{
    (void)worker;
    struct pool *p = container_of(work, struct pool, probe);
    __atomic_store_n(&p->probed, 1, __ATOMIC_SEQ_CST);
    futex_wake(&p->probed, 1);
}

static bool is_ended(void)
{
    return __atomic_load_n(&crew.ended, __ATOMIC_SEQ_CST);
}

/* A pool of which no thread is idle gets one more. */
static void keep_spare(struct pool *p)
{
    if (__atomic_exchange_n(&p->probed, 0, __ATOMIC_SEQ_CST)) { /* else the last one is still queued */
        work_init(&p->probe, take_probe);
        workers_queue(&p->workers, &p->probe);
    }
    for (unsigned i = 0; i < SPARE_TRIES && !is_ended(); i++) {
        futex_wait(&p->probed, 0, SPARE_NS);
        if (__atomic_load_n(&p->probed, __ATOMIC_SEQ_CST))
            return;
        if (!mutate("change-grow"))
            workers_grow(&p->workers);
    }
}

static void grower_main(void *arg)
{
    (void)arg;
    while (!is_ended()) {
        uint32_t grow = __atomic_load_n(&crew.grow, __ATOMIC_SEQ_CST);
        keep_spare(&crew.pools[CREW_WAITERS]);
        keep_spare(&crew.pools[CREW_ASKERS]);
        if (!is_ended())
            futex_wait(&crew.grow, grow, -1);
    }
}

/* ---- life ---- */

static int start_pool(enum crew which, unsigned n)
{
    static const char *const names[] = {"hmm-change", "hmm-change-wait", "hmm-change-end"};
    static const unsigned most[] = {ASKERS_MAX, CHANGING_SLOTS, 0}; /* finishers are as many as they are */
    struct pool *p = &crew.pools[which];
    p->probed = 1;
    int r = workers_start_growing(&p->workers, names[which], n, n > most[which] ? n : most[which]);
    if (r)
        p->workers.room = 0;
    return r;
}

int crew_start(unsigned n)
{
    int r = 0;
    memset(&crew, 0, sizeof(crew));
    for (unsigned i = 0; i < CREWS && !r; i++)
        r = start_pool(i, n);
    if (!r)
        r = hmm_thread_start(&crew.grower, "hmm-change-more", grower_main, NULL);
    if (r)
        crew_stop();
    return r;
}

void crew_stop(void)
{
    __atomic_store_n(&crew.ended, 1, __ATOMIC_SEQ_CST);
    crew_grow();
    if (crew.grower)
        hmm_thread_join(crew.grower);
    crew.grower = NULL;
    for (unsigned i = 0; i < CREWS; i++)
        if (crew.pools[i].workers.room)
            workers_stop(&crew.pools[i].workers);
}

void crew_forget(void)
{
    memset(&crew, 0, sizeof(crew));
}
