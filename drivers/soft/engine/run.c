/* SPDX-License-Identifier: MIT */
/*
 * A job from beginning to end. It ends by returning, or by leaving through `out`: from an access that fails, or from a place where the
 * job was asked to end, which for a kernel may be any place in its own code (deadline.c). `in_user` says whether the thread is in
 * such code. It is false in all code of the driver and of core, where a lock may be held.
 */
#include "engine.h"

#include <errno.h>
#include <string.h>

void soft_engine_throw(struct engine *e)
{
    siglongjmp(e->out, 1);
}

static void set_status(struct engine *e, int status)
{
    e->status = (struct hmm_job_status){.status = status, .message = e->message};
}

static void describe_kernel(const struct engine *e, struct text *t)
{
    const struct hmm_launch *k = &e->operation->kernel;
    soft_text_str(t, "kernel ");
    if (k->symbol)
        soft_text_str(t, k->symbol);
    else
        soft_text_hex(t, (uintptr_t)k->kernel);
}

static void describe_deadline(struct engine *e)
{
    struct text t = {.buf = e->message, .size = sizeof(e->message)};
    describe_kernel(e, &t);
    soft_text_str(&t, " held a span for ");
    soft_text_dec(&t, e->deadline_ms);
    soft_text_str(&t, " ms while memory it uses was taken away; call hmm_yield(), or launch it with a longer deadline_ms");
}

static void ended(struct engine *e, enum kill_cause cause)
{
    if (cause == KILL_DEADLINE) {
        describe_deadline(e);
        set_status(e, -ETIMEDOUT);
        return;
    }
    struct text t = {.buf = e->message, .size = sizeof(e->message)};
    soft_text_str(&t, cause == KILL_CLOSE ? "the device was closed while the job ran" : "the job was cancelled while it ran");
    set_status(e, -ECANCELED);
}

void soft_engine_check(struct engine *e)
{
    enum kill_cause cause = soft_deadline_asked(e);
    if (__builtin_expect(cause == KILL_NONE, 1))
        return;
    ended(e, cause);
    soft_engine_throw(e);
}

void soft_engine_enter_driver(struct engine *e)
{
    __atomic_store_n(&e->in_user, 0, __ATOMIC_RELAXED);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* Whoever asks may do so right after this check, and see in_user still 0: it asks again until the job has ended. */
void soft_engine_leave_driver(struct engine *e)
{
    soft_engine_check(e);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n(&e->in_user, 1, __ATOMIC_RELAXED);
}

static void no_scratch(struct engine *e, size_t bytes)
{
    struct text t = {.buf = e->message, .size = sizeof(e->message)};
    soft_text_str(&t, soft_ops_name(e->operation->kind));
    soft_text_str(&t, ": no memory for ");
    soft_text_dec(&t, bytes);
    soft_text_str(&t, " bytes of working space; free some, or give it less at once");
    set_status(e, -ENOMEM);
    soft_engine_throw(e);
}

void *soft_engine_scratch(struct engine *e, size_t bytes)
{
    void *ptr = e->world->outside->alloc(bytes);
    if (!ptr)
        no_scratch(e, bytes);
    e->scratch[e->nscratch++] = (struct scratch){.ptr = ptr, .bytes = bytes};
    return ptr;
}

static void free_scratch(struct engine *e)
{
    while (e->nscratch) {
        struct scratch *s = &e->scratch[--e->nscratch];
        e->world->outside->free(s->ptr, s->bytes);
    }
}

static uint64_t run_kernel(struct engine *e, const struct hmm_launch *launch)
{
    soft_engine_leave_driver(e);
    uint64_t result = launch->kernel(&e->accessor, (void *)launch->arg);
    soft_engine_enter_driver(e);
    return result;
}

/* The deadline is written first: who sees the generation sees its deadline. */
void soft_engine_begin(struct engine *e, const struct hmm_operation *operation, uint32_t generation)
{
    bool kernel = operation->kind == HMM_OP_KERNEL;
    __atomic_store_n(&e->deadline_ms, kernel ? operation->kernel.deadline_ms : 0, __ATOMIC_RELAXED);
    __atomic_store_n(&e->generation, generation, __ATOMIC_SEQ_CST);
}

/* The job's own frames are gone when this returns; its span, too. */
void soft_engine_run(struct engine *e, const struct hmm_operation *operation)
{
    memset(&e->status, 0, sizeof(e->status));
    e->message[0] = '\0';
    e->operation = operation;
    if (sigsetjmp(e->out, 0) == 0) {
        uint64_t result = soft_engine_runs_kernel(e) ? run_kernel(e, &operation->kernel) : soft_ops_run(e, operation);
        if (soft_access_end_span(e))
            soft_engine_throw(e);
        e->status.result = result;
    } else if (e->status.status == 0) { /* from the signal handler, which only leaves */
        ended(e, soft_deadline_asked(e));
        soft_deadline_allow();
    }
    soft_hold_drop(e);
    soft_access_drop_span(e);
    free_scratch(e);
    __atomic_fetch_add(&e->run, 1, __ATOMIC_RELAXED);
    if (e->status.status == -ETIMEDOUT)
        e->world->outside->warn(e->message);
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static bool bounce_new(struct engine *e, struct bounce *b)
{
    size_t page = (size_t)1 << e->world->page_shift;
    b->now = e->world->outside->alloc(page);
    b->before = e->world->outside->alloc(page);
    return b->now && b->before;
}

static void bounce_free(struct engine *e, struct bounce *b)
{
    size_t page = (size_t)1 << e->world->page_shift;
    e->world->outside->free(b->now, page);
    e->world->outside->free(b->before, page);
}

void soft_engine_free(struct engine *e)
{
    void (*release)(void *, size_t) = e->world->outside->free;
    release(e->tlb, sizeof(*e->tlb));
    release(e->local, LOCAL_BYTES);
    bounce_free(e, &e->bounce);
    for (unsigned i = 0; i < OPERANDS; i++)
        bounce_free(e, &e->slots[i].bounce);
    release(e, sizeof(*e));
}

struct engine *soft_engine_new(struct world *w, void *owner)
{
    void *(*alloc)(size_t) = w->outside->alloc;
    struct engine *e = alloc(sizeof(*e));
    if (!e)
        return NULL;
    e->world = w;
    e->owner = owner;
    e->tlb = alloc(sizeof(*e->tlb));
    e->local = alloc(LOCAL_BYTES);
    bool all = e->tlb && e->local && bounce_new(e, &e->bounce);
    for (unsigned i = 0; i < OPERANDS && all; i++)
        all = bounce_new(e, &e->slots[i].bounce);
    if (!all) {
        soft_engine_free(e);
        return NULL;
    }
    soft_access_init(e);
    return e;
}
