/* SPDX-License-Identifier: MIT */
/* See running.h. Nothing here waits; lines are formatted into the caller's stack. */
#include "notifier/running.h"

#include <errno.h>
#include <stdio.h>

#include "base/util.h"
#include "debug/inject.h"
#include "os/os.h"

#define SECOND 1000000000ull
#define COMPLAIN_FIRST SECOND
#define COMPLAIN_AGAIN (10 * SECOND)

static __thread struct running *calls_here __attribute__((tls_model("initial-exec")));

void running_enter(struct notifier_tree *t, struct running *call, struct hmm_notifier *n, const struct hmm_event *event)
{
    *call = (struct running){
        .outer = calls_here,
        .n = n,
        .ops = n->ops,
        .dev = n->dev,
        .start = n->start,
        .end = n->end,
        .event = event,
        .began = os_now(),
    };
    n->calls++;
    t->callbacks++;
    list_add_tail(&t->running, &call->link);
    calls_here = call;
}

void running_leave(struct notifier_tree *t, struct running *call)
{
    calls_here = call->outer;
    list_del(&call->link);
    t->callback_ns += os_now() - call->began;
    call->n->calls--; /* it is alive: its removal waits for this */
}

bool running_here(const struct hmm_notifier *n)
{
    for (const struct running *c = calls_here; c; c = c->outer)
        if (c->n == n)
            return true;
    return false;
}

/* ---- words ---- */

const char *event_name(enum hmm_event_type type)
{
    static const char *const names[] = {
        [HMM_EVENT_UNMAP] = "unmap",          [HMM_EVENT_CLEAR] = "clear",
        [HMM_EVENT_MIGRATE] = "migrate",      [HMM_EVENT_PROTECTION_VMA] = "change of protection",
        [HMM_EVENT_PROTECTION_PAGE] = "fork", [HMM_EVENT_SOFT_DIRTY] = "collection of dirty bits",
        [HMM_EVENT_RELEASE] = "release",
    };
    return (unsigned)type < ARRAY_LEN(names) ? names[type] : "event of an unknown type";
}

void running_name(const struct notifier_tree *t, const struct hmm_notifier_ops *ops, const struct hmm_device *dev,
                  uintptr_t start, uintptr_t end, char *buf, size_t size)
{
    const char *device = t->device_name && dev ? t->device_name(dev) : NULL;
    snprintf(buf, size, "callback %s%s%p%s of device %s for [%#lx, %#lx)", ops->name ? ops->name : "", ops->name ? " (" : "",
             (void *)(uintptr_t)ops->invalidate, ops->name ? ")" : "", device ? device : "(unnamed)", (unsigned long)start,
             (unsigned long)end);
}

static bool may_refuse(const struct hmm_event *event)
{
    return !event->blockable || event->brief;
}

bool answer_is_right(const struct hmm_event *event, int err)
{
    return !err || (err == -EAGAIN && may_refuse(event));
}

int answer_is_wrong(const struct hmm_event *event, int err, const char *who)
{
    hmm_log(HMM_LOG_ERROR, "%s returned %d (%s of [%#lx, %#lx), %s); it must %s; taken as done", who, err,
            event_name(event->type), (unsigned long)event->start, (unsigned long)event->end,
            event->brief       ? "brief"
            : event->blockable ? "blockable"
                               : "not blockable",
            may_refuse(event) ? "return 0 or -EAGAIN" : "return 0");
    return 0;
}

void notifier_overdue_text(const struct notifier_tree *t, const struct notifier_overdue *o, char *buf, size_t size)
{
    const struct hmm_notifier_ops ops = {.invalidate = o->callback, .name = o->name};
    char name[128];
    running_name(t, &ops, o->dev, o->start, o->end, name, sizeof(name));
    snprintf(buf, size, "%s has been running for %llu.%llu s (%s of [%#lx, %#lx))", name, (unsigned long long)(o->ns / SECOND),
             (unsigned long long)(o->ns % SECOND / (SECOND / 10)), event_name(o->event.type), (unsigned long)o->event.start,
             (unsigned long)o->event.end);
}

/* ---- who runs ---- */

/* The callback, of n or else of dev, or of anybody, that began first, or NULL. Calls are listed in the order of their beginning.
 * Caller holds the tree lock. */
static struct running *oldest(struct notifier_tree *t, const struct hmm_notifier *n, const struct hmm_device *dev)
{
    list_for_each (pos, &t->running) {
        struct running *c = container_of(pos, struct running, link);
        if ((!n || c->n == n) && (!dev || c->dev == dev))
            return c;
    }
    return NULL;
}

static void describe(const struct running *c, uint64_t now, struct notifier_overdue *out)
{
    *out = (struct notifier_overdue){
        .callback = c->ops->invalidate,
        .name = c->ops->name,
        .dev = c->dev,
        .start = c->start,
        .end = c->end,
        .event = *c->event,
        .ns = now - c->began,
    };
}

bool notifier_overdue(struct notifier_tree *t, const struct hmm_device *dev, uint64_t ns, struct notifier_overdue *out)
{
    uint64_t now = os_now();
    mutex_lock(&t->lock);
    const struct running *c = oldest(t, NULL, dev);
    bool overdue = c && now >= c->began && now - c->began >= ns;
    if (overdue)
        describe(c, now, out);
    mutex_unlock(&t->lock);
    return overdue;
}

/* ---- complaints ---- */

void complaint_begin(struct complaint *c, const char *who, const struct hmm_notifier *n)
{
    uint64_t now = os_now();
    *c = (struct complaint){.who = who, .n = n, .began = now, .next = now + COMPLAIN_FIRST};
}

int64_t complaint_sleep(const struct complaint *c)
{
    uint64_t now = os_now();
    return c->next > now ? (int64_t)(c->next - now) : 0;
}

void complaint_look(struct notifier_tree *t, struct complaint *c)
{
    uint64_t now = os_now();
    if (now < c->next || mutate("notifier-silent"))
        return;
    c->next = now + COMPLAIN_AGAIN;
    const struct running *call = oldest(t, c->n, NULL);
    call =
        call ? call : oldest(t, NULL, NULL); /* an invalidation is called one callback at a time: it may hang in another one */
    char text[224] = "no callback runs: an invalidation was begun and not ended";
    if (call) {
        struct notifier_overdue o;
        describe(call, now, &o);
        notifier_overdue_text(t, &o, text, sizeof(text));
    }
    hmm_log(HMM_LOG_WARNING, "%s has waited for %llu s: %s", c->who, (unsigned long long)((now - c->began) / SECOND), text);
}
