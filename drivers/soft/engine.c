/* SPDX-License-Identifier: MIT */
/*
 * Job engines: threads that take jobs from the queue and run them.
 *
 * A job ends by returning, or by leaving through `out`: from an access that fails, or from a place where the job was asked to
 * end, which for a kernel may be any place in its own code (deadline.c). `in_user` says whether the thread is in such code. It is
 * false in all code of the driver and of core, where a lock may be held.
 */
#include "soft.h"

#include <errno.h>
#include <string.h>

#define RESEND_MS 20

void soft_engine_throw(struct engine *e)
{
    siglongjmp(e->out, 1);
}

static void set_status(struct engine *e, int status)
{
    e->status = (struct hmm_job_status){.status = status, .message = e->message};
}

static void describe_deadline(struct engine *e)
{
    struct text t = {.buf = e->message, .size = sizeof(e->message)};
    soft_text_str(&t, "kernel ");
    soft_text_hex(&t, (uintptr_t)e->kernel);
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
    soft_text_str(&t, "the device was closed while the job ran");
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

static void run_kernel(struct engine *e, struct hmm_job *job)
{
    soft_engine_leave_driver(e);
    uint64_t result = job->kernel(&e->accessor, job->arg);
    soft_engine_enter_driver(e);
    if (soft_access_end_span(e))
        soft_engine_throw(e);
    e->status.result = result;
}

/* The job's own frames are gone when this returns; its span, too. */
static void run(struct engine *e, struct hmm_job *job)
{
    memset(&e->status, 0, sizeof(e->status));
    e->message[0] = '\0';
    e->is_kernel = job->op == HMM_OP_KERNEL;
    e->kernel = job->kernel;
    if (sigsetjmp(e->out, 0) == 0) {
        if (e->is_kernel) {
            run_kernel(e, job);
        } else {
            e->status.result = soft_ops_run(e, job);
            if (soft_access_end_span(e))
                soft_engine_throw(e);
        }
    } else if (e->status.status == 0) { /* from the signal handler, which only leaves */
        ended(e, soft_deadline_asked(e));
        soft_deadline_allow();
    }
    soft_access_drop_span(e);
    if (e->status.status == -ETIMEDOUT)
        hmm_log(HMM_LOG_WARNING, "soft: %s", e->message);
}

static void engine_thread(void *arg)
{
    struct engine *e = arg;
    struct job_queue *q = &e->soft->queue;
    soft_deadline_adopt(e);
    for (struct hmm_job *job; (job = soft_queue_take(q, e));) {
        run(e, job);
        hmm_job_done(job, &e->status);
        soft_queue_done(q, e);
    }
}

int soft_submit(void *priv, struct hmm_job *job)
{
    struct soft *s = priv;
    return soft_queue_add(&s->queue, job);
}

/* ---- stopping ---------------------------------------------------------------------------------------------------- */

static void cancel_queued(struct hmm_job *jobs)
{
    static const struct hmm_job_status canceled = {
        .status = -ECANCELED,
        .message = "the device was closed before the job ran",
    };
    while (jobs) {
        struct hmm_job *next = jobs->next;
        hmm_job_done(jobs, &canceled);
        jobs = next;
    }
}

/* Returns the longest deadline of those that run. */
static uint32_t ask_all_to_end(struct soft *s, bool force)
{
    uint32_t longest = 0;
    pthread_mutex_lock(&s->queue.lock);
    for (unsigned i = 0; i < s->nengines; i++) {
        struct engine *e = s->engines[i];
        if (!e->job)
            continue;
        soft_deadline_kill(e, e->generation, KILL_CLOSE, force);
        if (e->deadline_ms > longest)
            longest = e->deadline_ms;
    }
    pthread_mutex_unlock(&s->queue.lock);
    return longest;
}

void soft_engines_stop(struct soft *s)
{
    cancel_queued(soft_queue_stop(&s->queue));
    uint32_t patience = ask_all_to_end(s, false);
    while (!soft_queue_wait_idle(&s->queue, patience)) {
        ask_all_to_end(s, true);
        patience = RESEND_MS;
    }
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static void engine_free(struct engine *e)
{
    size_t page = hmm_page_size();
    hmm_mem_free(e->tlb, sizeof(*e->tlb));
    hmm_mem_free(e->pfns, SOFT_BLOCK / page * sizeof(e->pfns[0]));
    hmm_mem_free(e->local, LOCAL_BYTES);
    hmm_mem_free(e->bounce.now, page);
    hmm_mem_free(e->bounce.before, page);
    hmm_mem_free(e, sizeof(*e));
}

static struct engine *engine_new(struct soft *s)
{
    size_t page = hmm_page_size();
    struct engine *e = hmm_mem_alloc(sizeof(*e));
    if (!e)
        return NULL;
    e->soft = s;
    e->tlb = hmm_mem_alloc(sizeof(*e->tlb));
    e->pfns = hmm_mem_alloc(SOFT_BLOCK / page * sizeof(e->pfns[0]));
    e->local = hmm_mem_alloc(LOCAL_BYTES);
    e->bounce.now = hmm_mem_alloc(page);
    e->bounce.before = hmm_mem_alloc(page);
    if (!e->tlb || !e->pfns || !e->local || !e->bounce.now || !e->bounce.before) {
        engine_free(e);
        return NULL;
    }
    soft_access_init(e);
    return e;
}

/* All engines are made before the first runs: others look at every engine's hazard. */
static int make_engines(struct soft *s, unsigned engines)
{
    for (unsigned i = 0; i < engines; i++) {
        s->engines[i] = engine_new(s);
        if (!s->engines[i])
            return hmm_fail(-ENOMEM, "soft: no memory for engine %u of %u", i + 1, engines);
        s->nengines++;
    }
    return 0;
}

int soft_engines_init(struct soft *s, unsigned engines)
{
    soft_queue_init(&s->queue);
    int r = soft_deadline_signal_get();
    if (r)
        goto destroy_queue;
    r = make_engines(s, engines);
    for (unsigned i = 0; i < s->nengines && !r; i++) {
        r = hmm_thread_start(&s->engines[i]->thread, "hmm-soft-engine", engine_thread, s->engines[i]);
        if (r)
            hmm_fail(r, "soft: engine %u of %u cannot be started (%s)", i + 1, engines, hmm_strerror(r));
    }
    if (!r)
        return 0;
    soft_engines_join(s);
    soft_engines_exit(s);
    return r;

destroy_queue:
    soft_queue_destroy(&s->queue);
    return r;
}

void soft_engines_join(struct soft *s)
{
    soft_queue_end(&s->queue);
    for (unsigned i = 0; i < s->nengines; i++) {
        if (s->engines[i]->thread)
            hmm_thread_join(s->engines[i]->thread);
    }
}

void soft_engines_exit(struct soft *s)
{
    for (unsigned i = 0; i < s->nengines; i++)
        engine_free(s->engines[i]);
    s->nengines = 0;
    soft_deadline_signal_put();
    soft_queue_destroy(&s->queue);
}
