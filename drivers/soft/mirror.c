/* SPDX-License-Identifier: MIT */
/*
 * The page table, which core keeps: a mirror (<hmm/driver.h>). Here is what is the device's own about it: how its engines let go of pages,
 * and what a fault costs.
 *
 * Engines that look runs up in their TLB make them visible as hazards first, and look at seq and generation afterwards: access.c says why
 * that is enough. Lock order in soft.h.
 */
#include "link.h"
#include "soft.h"

#include <errno.h>
#include <time.h>

/* The engine process uses nothing of the directory, and the first `given` runs that it got will not be used again. */
static void forgotten(const struct hmm_mirror_change *c)
{
    uint64_t quiet = __atomic_load_n(c->word, __ATOMIC_SEQ_CST);
    while (quiet < c->given &&
           !__atomic_compare_exchange_n(c->word, &quiet, c->given, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
}

static void delay(uint32_t ms)
{
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    while (ms && nanosleep(&left, &left) && errno == EINTR)
        ;
}

/* The engine process lets go of the range; briefly: or -EAGAIN, if it uses it. */
static int recall(struct soft *s, const struct hmm_mirror_change *c)
{
    bool whole = c->end - c->start == HMM_MIRROR_DIR, briefly = c->event->brief;
    bool quiet = briefly ? soft_recall_nowait(s->link, c->start, c->end) : soft_recall(s->link, c->start, c->end);
    if (quiet && (whole || !briefly)) /* asked briefly it speaks of the range only */
        forgotten(c);
    return briefly && !quiet ? -EAGAIN : 0;
}

/* Engines of this process, and jobs that hold the range, let go of it, or -EAGAIN. exported: another process is still to be asked,
 * which is waiting. */
static int wait_for_engines(struct soft *s, const struct hmm_mirror_change *c, bool exported)
{
    const struct hmm_event *event = c->event;
    if (s->model.kind != MODEL_FAULT)
        return soft_model_invalidate(s, event);
    if (soft_mutate("soft-hazard"))
        return 0;
    if (!event->blockable || event->brief)
        return (exported && !event->brief) || soft_ports_in_use(s, c->start, c->end) ? -EAGAIN : 0;
    soft_ports_wait_unused(s, c->start, c->end);
    return 0;
}

/*
 * When this returns 0, no engine uses a page of the range, and none will without asking core again:
 *
 *  - The sequence number, or the generation, moved before this was called. An engine that looks at it after that refuses its run.
 *  - An engine that looked at it before had published its hazard before (access.c), and all of that is in one order for
 *    everybody (sequentially consistent). So the hazard is seen here, and waited for.
 *
 * An engine process has hazards and versions of its own, which it is told to look at (process/control.c), if it was given anything of
 * the directory that it may still use: more runs than the word of the directory says are forgotten. It gets nothing while we are here:
 * core hands nothing out of a directory that is being invalidated. So what it has forgotten when it answers stays forgotten until this
 * invalidation is over. That core asks us the same, briefly, before it uses the directory for another range (HMM_MIRROR_DIR of it at
 * once) is what makes a run of an engine process end with its directory.
 *
 * Seeing a hazard gone acquires what its engine released by taking it away: everything it wrote to the page. So a copy that
 * core starts after this sees it.
 *
 * That is the model with faults. Where jobs hold their ranges, no translation outlives a job, and model.c says who is waited for.
 */
static int invalidate(void *priv, const struct hmm_mirror_change *c)
{
    struct soft *s = priv;
    const struct hmm_event *event = c->event;
    bool exported = s->link && c->given != __atomic_load_n(c->word, __ATOMIC_SEQ_CST) && !soft_mutate("soft-export");
    if ((!event->blockable || event->brief) && s->invalidate_delay_ms)
        return -EAGAIN;
    int r = wait_for_engines(s, c, exported);
    if (!r && exported && !soft_mutate("soft-hazard"))
        r = recall(s, c);
    if (!r && !s->closing)
        delay(s->invalidate_delay_ms);
    return r;
}

static int fault(void *priv, uintptr_t addr, unsigned flags)
{
    return soft_bus_fault(priv, addr, flags);
}

static const struct hmm_mirror_ops mirror_ops = {
    .size = sizeof(mirror_ops),
    .name = "soft",
    .invalidate = invalidate,
    .fault = fault,
};

/* Four times what the memory needs when it is used densely. */
int soft_mirror_init(struct soft *s)
{
    s->directories = (unsigned)(4 * ((s->memory.bytes + SOFT_BLOCK - 1) / SOFT_BLOCK) + 64);
    return hmm_mirror_register(s->dev,
                               &(struct hmm_mirror_desc){
                                   .size = sizeof(struct hmm_mirror_desc),
                                   .ops = &mirror_ops,
                                   .priv = s,
                                   .directories = s->directories,
                               },
                               &s->mirror);
}

void soft_mirror_exit(struct soft *s)
{
    s->closing = true;
    hmm_mirror_unregister(s->mirror);
}
