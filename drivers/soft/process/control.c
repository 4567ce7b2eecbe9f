/* SPDX-License-Identifier: MIT */
/*
 * The control thread: invalidations, and requests to end jobs. What makes an invalidation work over a channel:
 *
 *   engine                                  control thread                        program
 *                                                                                 A. sequence number moves
 *   1. read the block's version             B. move the block's version           B'. the callback posts the invalidation
 *   2. ask, get a translation               C. look at every engine's hazard,     (a translation is given only with the
 *   3. publish the hazard                      wait for those that overlap         number unmoved, and none while an
 *   4. gate and version as in 1, 2?         D. acknowledge                         invalidation is in progress)
 *   5. use the device address                                                     E. the callback returns: copy, free...
 *
 * 1, 3, 4, B and C are sequentially consistent. If 4 came before B, then 3 came before C, and C waits. If B came before 4, there are
 * two cases. 1 came before B: the version is another one, the translation is not used, and asked for again. 1 came after B, so after
 * A: the program gave the translation after A, therefore after the invalidation was over (after E), and it is of what is there
 * then. An answer that is still on its way does not matter: its version was read before it was asked for.
 *
 * Versions are shared by blocks of the same hash: that costs a question more, and no more. Several invalidations at a time are in
 * slots of their own; one whose hazard lasts is waited for by a thread of its own, so that it does not hold up the others.
 * That thread ends kernels at their deadlines (access.c), as the callback does in the program.
 */
#include "process.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/prctl.h>

#define VERSIONS 4096

static uint64_t versions[VERSIONS];

static uint64_t *version_of(uintptr_t addr)
{
    return &versions[(addr / SOFT_BLOCK) % VERSIONS];
}

const uint64_t *process_version(uintptr_t addr)
{
    return version_of(addr);
}

/* ---- slots ------------------------------------------------------------------------------------------------------- */

static void acknowledge(struct recall_slot *slot, bool quiet)
{
    if (__atomic_exchange_n(&slot->state, quiet ? SLOT_QUIET : SLOT_USED, __ATOMIC_SEQ_CST) == SLOT_ASLEEP)
        channel_futex_wake(&slot->state);
}

static bool in_use(struct process *p, const struct recall_slot *slot, bool block)
{
    uintptr_t base = slot->start & ~(SOFT_BLOCK - 1);
    return block ? soft_access_in_use(&p->world, base, base + SOFT_BLOCK)
                 : soft_access_in_use(&p->world, slot->start, slot->end);
}

static void wait_and_acknowledge(struct process *p, struct recall_slot *slot)
{
    soft_access_wait_unused(&p->world, slot->start, slot->end);
    acknowledge(slot, !in_use(p, slot, true));
}

/* Threads that wait for hazards, made as they are needed. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    struct recall_slot *slots[CHANNEL_SLOTS]; /* to be waited for */
    unsigned n, idle;
} waiting = {.lock = PTHREAD_MUTEX_INITIALIZER, .filled = PTHREAD_COND_INITIALIZER};

static void *waiter_main(void *arg)
{
    struct process *p = arg;
    prctl(PR_SET_NAME, "hmm-soft-wait");
    pthread_mutex_lock(&waiting.lock);
    for (;;) {
        while (waiting.n == 0) {
            waiting.idle++;
            pthread_cond_wait(&waiting.filled, &waiting.lock);
            waiting.idle--;
        }
        struct recall_slot *slot = waiting.slots[--waiting.n];
        pthread_mutex_unlock(&waiting.lock);
        wait_and_acknowledge(p, slot);
        pthread_mutex_lock(&waiting.lock);
    }
    return NULL;
}

static bool start_waiter(struct process *p)
{
    pthread_t id;
    if (pthread_create(&id, NULL, waiter_main, p))
        return false;
    pthread_detach(id);
    return true;
}

/* If no thread can be had, the control thread waits itself: slower for others, but right. */
static void wait_elsewhere(struct process *p, struct recall_slot *slot)
{
    pthread_mutex_lock(&waiting.lock);
    bool there = waiting.idle > waiting.n || start_waiter(p);
    if (there) {
        waiting.slots[waiting.n++] = slot;
        pthread_cond_signal(&waiting.filled);
    }
    pthread_mutex_unlock(&waiting.lock);
    if (!there)
        wait_and_acknowledge(p, slot);
}

static void serve_slot(struct process *p, struct recall_slot *slot)
{
    if (slot->nowait || !in_use(p, slot, false))
        acknowledge(slot, !in_use(p, slot, !slot->nowait));
    else
        wait_elsewhere(p, slot);
}

/* All versions move before the first hazard is looked at: nobody waits longer because of the others. */
static void serve_slots(struct process *p)
{
    struct recall_slot *slots = p->channels->slots;
    uint64_t posted = __atomic_exchange_n(&p->channels->posted, 0, __ATOMIC_SEQ_CST);
    for (uint64_t left = soft_mutate("soft-version") ? 0 : posted; left; left &= left - 1)
        __atomic_fetch_add(version_of(slots[__builtin_ctzll(left)].start), 1, __ATOMIC_SEQ_CST);
    for (uint64_t left = posted; left; left &= left - 1)
        serve_slot(p, &slots[__builtin_ctzll(left)]);
}

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

static void serve_kills(struct process *p)
{
    uint64_t kills = __atomic_exchange_n(&p->channels->kills, 0, __ATOMIC_SEQ_CST);
    for (; kills; kills &= kills - 1) {
        unsigned i = (unsigned)__builtin_ctzll(kills);
        uint64_t kill = __atomic_load_n(&p->channels->engines[i].kill, __ATOMIC_SEQ_CST);
        soft_deadline_kill(p->world.engines[i], (uint32_t)(kill >> 16), (enum kill_cause)(kill & 0xff), kill >> 8 & 1);
    }
}

/* ---- the thread -------------------------------------------------------------------------------------------------- */

/* The program moves the bell first and then looks whether we sleep. */
static void *control_main(void *arg)
{
    struct process *p = arg;
    struct channels *c = p->channels;
    prctl(PR_SET_NAME, "hmm-soft-ctl");
    for (;;) {
        uint32_t seen = __atomic_load_n(&c->bell, __ATOMIC_SEQ_CST);
        serve_slots(p);
        serve_kills(p);
        if (__atomic_load_n(&c->leave, __ATOMIC_ACQUIRE))
            _exit(0);
        __atomic_store_n(&c->control_sleeps, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&c->bell, __ATOMIC_SEQ_CST) == seen)
            channel_futex_wait(&c->bell, seen, 0);
        __atomic_store_n(&c->control_sleeps, 0, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

int process_control_start(struct process *p)
{
    pthread_t id;
    int r = pthread_create(&id, NULL, control_main, p);
    if (r)
        return -r;
    pthread_detach(id);
    return 0;
}
