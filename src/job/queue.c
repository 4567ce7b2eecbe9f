/* SPDX-License-Identifier: MIT */
/* Queues of the program: what their jobs have in common. The order itself is kept by the scheduler. */
#include <errno.h>

#include "base/alloc.h"
#include "job/job.h"

static int check(const struct hmm_queue_config *c)
{
    if (c->size < sizeof(*c))
        return hmm_fail(-EINVAL, "hmm_queue_create: set config->size to sizeof(struct hmm_queue_config)");
    if (c->in_order > 1)
        return hmm_fail(-EINVAL, "hmm_queue_create: in_order is %u, and may be 0 or 1", c->in_order);
    if (c->priority < HMM_PRIORITY_LOW || c->priority > HMM_PRIORITY_HIGH)
        return hmm_fail(-EINVAL, "hmm_queue_create: priority %d is not one of HMM_PRIORITY_*", c->priority);
    if (c->reserved)
        return hmm_fail(-EINVAL, "hmm_queue_create: reserved is %u, and must be 0", c->reserved);
    return 0;
}

int queue_new(struct hmm_device *dev, const struct hmm_queue_config *config, struct hmm_queue **out)
{
    static const struct hmm_queue_config fallback = {.size = sizeof(fallback)};
    struct hmm_queue_config c = config ? *config : fallback;
    int r = check(&c);
    if (r)
        return r;
    if (!dev->driver->submit)
        return hmm_fail(-EOPNOTSUPP, "device %s runs no jobs: it is memory only", dev->driver->name);
    r = sched_check(dev->sched);
    if (r)
        return r;
    struct hmm_queue *q = mem_alloc(sizeof(*q));
    if (!q)
        return hmm_fail(-ENOMEM, "no memory for a queue");
    q->refs = 1;
    q->sched = dev->sched;
    sched_get(q->sched);
    q->in_order = c.in_order;
    q->priority = c.priority;
    list_init(&q->turns);
    *out = q;
    return 0;
}

void queue_get(struct hmm_queue *q)
{
    __atomic_fetch_add(&q->refs, 1, __ATOMIC_RELAXED);
}

void queue_put(struct hmm_queue *q)
{
    if (__atomic_fetch_sub(&q->refs, 1, __ATOMIC_ACQ_REL) != 1)
        return;
    sched_put(q->sched);
    mem_free(q, sizeof(*q));
}
