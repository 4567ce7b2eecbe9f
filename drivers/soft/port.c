/* SPDX-License-Identifier: MIT */
/*
 * Ports: one thread per engine, which takes jobs that core handed over, has them run, and completes them. Engines of this process run
 * on these very threads, and reach core directly; those of another process are talked to (link.h).
 */
#include "link.h"
#include "soft.h"

#include <errno.h>
#include <string.h>

#define RESEND_MS 20

/* ---- what an engine in this process reaches ---------------------------------------------------------------------- */

static const uint32_t unchanging = 0;

static int resolve(struct engine *e, uintptr_t addr, bool write, struct translation *t)
{
    struct port *p = e->owner;
    struct hmm_mirror_run run;
    int r = soft_model_resolve(p, addr, write, &run);
    if (r == 0 && !run.seq)
        *t = (struct translation){
            .start = run.start,
            .end = run.end,
            .at = soft_world_memory(e->world, run.page),
            .seq = &e->run, /* moves when the job ends */
            .seq_seen = __atomic_load_n(&e->run, __ATOMIC_RELAXED),
            .generation = &unchanging,
            .write = run.flags & HMM_MIRROR_WRITE,
        };
    else if (r == 0)
        *t = (struct translation){
            .start = run.start,
            .end = run.end,
            .at = soft_world_memory(e->world, run.page),
            .seq = run.seq,
            .seq_seen = run.seq_seen,
            .generation = run.generation,
            .generation_seen = run.generation_seen,
            .gate_mask = 1,
            .write = run.flags & HMM_MIRROR_WRITE,
        };
    return r;
}

/* The bus only says that it could not; why is known to who looks at the mapping. */
static int bus_error(struct port *p, uintptr_t addr, unsigned flags, int64_t result)
{
    int r = hmm_device_fault(p->soft->dev, addr, flags);
    return r < 0 ? r : result < 0 ? (int)result : -EFAULT;
}

int64_t soft_port_bus_read(struct port *p, uintptr_t addr, void *buf, size_t len)
{
    int64_t n = soft_bus_read(p->soft, addr, buf, len);
    return n > 0 ? n : bus_error(p, addr, HMM_FAULT_READ, n);
}

int64_t soft_port_bus_write(struct port *p, uintptr_t addr, const void *buf, size_t len)
{
    int64_t n = soft_bus_write(p->soft, addr, buf, len);
    return n > 0 ? n : bus_error(p, addr, HMM_FAULT_WRITE, n);
}

static int64_t bus_read(struct engine *e, uintptr_t addr, void *buf, size_t len)
{
    return soft_port_bus_read(e->owner, addr, buf, len);
}

static int64_t bus_write(struct engine *e, uintptr_t addr, const void *buf, size_t len)
{
    return soft_port_bus_write(e->owner, addr, buf, len);
}

static void sync_events(struct engine *e)
{
    struct port *p = e->owner;
    hmm_event_sync(p->soft->dev);
}

static void warn(const char *line)
{
    hmm_log(HMM_LOG_WARNING, "soft: %s", line);
}

static const struct outside this_process = {
    .resolve = resolve,
    .bus_read = bus_read,
    .bus_write = bus_write,
    .sync = sync_events,
    .alloc = hmm_mem_alloc,
    .free = hmm_mem_free,
    .warn = warn,
};

bool soft_ports_in_use(struct soft *s, uintptr_t start, uintptr_t end)
{
    return soft_access_in_use(&s->world, start, end);
}

void soft_ports_wait_unused(struct soft *s, uintptr_t start, uintptr_t end)
{
    soft_access_wait_unused(&s->world, start, end);
}

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

void soft_port_begin(struct port *p, struct hmm_job *job)
{
    p->job = job;
    p->asked.status = 0;
    p->generation++;
    __atomic_store_n(&p->talk.forced_ms, 0, __ATOMIC_SEQ_CST);
    p->talk.turns_asked = 0;
    if (p->engine)
        soft_engine_begin(p->engine, &job->operation, p->generation);
}

/* What cancel() asked for is what the job ends with, if it ended because of it. */
static struct hmm_job_status final_status(struct port *p)
{
    struct hmm_job_status status = p->engine ? p->engine->status : p->talk.status;
    if (status.status == -ECANCELED && p->asked.status) {
        status.status = p->asked.status;
        status.message = p->asked.message;
    }
    return status;
}

static __thread bool here;

bool soft_port_here(void)
{
    return here;
}

static void port_thread(void *arg)
{
    struct port *p = arg;
    here = true;
    struct job_queue *q = &p->soft->queue;
    if (p->engine)
        soft_deadline_adopt(p->engine);
    for (struct hmm_job *job; (job = soft_queue_take(q, p));) {
        soft_model_begin(p, job);
        if (p->engine)
            soft_engine_run(p->engine, &job->operation);
        else
            soft_talk_run(p, job);
        soft_queue_ended(q, p);
        soft_model_end(p);
        struct hmm_job_status status = final_status(p);
        hmm_job_done(job, &status);
        soft_queue_done(q);
    }
}

int soft_submit(void *priv, struct hmm_job *job)
{
    struct soft *s = priv;
    if (s->link && soft_link_gone(s->link))
        return -ENODEV;
    return soft_queue_add(&s->queue, job);
}

static void ask_to_end(struct port *p, enum kill_cause cause, bool force)
{
    __atomic_store_n(&p->asked_to_end, p->generation, __ATOMIC_SEQ_CST);
    if (p->engine)
        soft_deadline_kill(p->engine, p->generation, cause, force);
    else
        soft_talk_ask_to_end(p, p->generation, cause, force);
}

/* Caller holds queue.lock. The first reason stays. */
static void end_job(struct port *p, int status, const char *message)
{
    if (!p->asked.status) {
        strncpy(p->asked.message, message, sizeof(p->asked.message) - 1);
        p->asked.status = status;
    }
    ask_to_end(p, KILL_CANCEL, true);
}

void soft_port_end_job(struct port *p, uint32_t generation, int status, const char *message)
{
    struct job_queue *q = &p->soft->queue;
    pthread_mutex_lock(&q->lock);
    bool runs = p->job && p->generation == generation, first = runs && !p->asked.status;
    if (runs)
        end_job(p, status, message);
    pthread_mutex_unlock(&q->lock);
    if (first)
        warn(message);
}

bool soft_port_was_asked(struct port *p)
{
    return __atomic_load_n(&p->asked_to_end, __ATOMIC_SEQ_CST) == p->generation;
}

void soft_cancel(void *priv, struct hmm_job *job, int status, const char *message)
{
    struct soft *s = priv;
    if (soft_queue_remove(&s->queue, job)) {
        hmm_job_done(job, &(struct hmm_job_status){.status = status, .message = message});
        return;
    }
    pthread_mutex_lock(&s->queue.lock);
    for (unsigned i = 0; i < s->nports; i++) {
        struct port *p = s->ports[i];
        if (p->job == job)
            end_job(p, status, message);
    }
    pthread_mutex_unlock(&s->queue.lock);
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
    for (unsigned i = 0; i < s->nports; i++) {
        struct port *p = s->ports[i];
        if (!p->job)
            continue;
        ask_to_end(p, KILL_CLOSE, force);
        if (p->job->operation.kind == HMM_OP_KERNEL && p->job->operation.kernel.deadline_ms > longest)
            longest = p->job->operation.kernel.deadline_ms;
    }
    pthread_mutex_unlock(&s->queue.lock);
    return longest;
}

void soft_ports_stop(struct soft *s)
{
    cancel_queued(soft_queue_stop(&s->queue));
    uint32_t patience = ask_all_to_end(s, false);
    while (!soft_queue_wait_idle(&s->queue, patience)) {
        ask_all_to_end(s, true);
        patience = RESEND_MS;
    }
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static void port_free(struct port *p)
{
    if (p->engine)
        soft_engine_free(p->engine);
    pthread_cond_destroy(&p->work);
    hmm_mem_free(p, sizeof(*p));
}

static struct port *port_new(struct soft *s)
{
    struct port *p = hmm_mem_alloc(sizeof(*p));
    if (!p)
        return NULL;
    pthread_cond_init(&p->work, NULL);
    p->soft = s;
    p->index = s->nports;
    p->engine = s->link ? NULL : soft_engine_new(&s->world, p);
    if (!p->engine && !s->link) {
        port_free(p);
        return NULL;
    }
    return p;
}

/* All engines are made before the first runs: others look at every engine's hazard. */
static int make_ports(struct soft *s, unsigned engines)
{
    for (unsigned i = 0; i < engines; i++) {
        struct port *p = port_new(s);
        if (!p)
            return hmm_fail(-ENOMEM, "soft: no memory for engine %u of %u", i + 1, engines);
        s->ports[s->nports++] = p;
        if (p->engine)
            s->world.engines[s->world.nengines++] = p->engine;
    }
    return 0;
}

int soft_ports_init(struct soft *s, unsigned engines)
{
    s->world = (struct world){
        .outside = &this_process,
        .gate = hmm_event_gate(s->dev),
        .memory = s->memory.map,
        .page_shift = s->memory.page_shift,
    };
    soft_queue_init(&s->queue);
    int r = s->link ? 0 : soft_deadline_signal_get();
    if (r)
        goto destroy_queue;
    r = make_ports(s, engines);
    for (unsigned i = 0; i < s->nports && !r; i++) {
        r = hmm_thread_start(&s->ports[i]->thread, "hmm-soft-engine", port_thread, s->ports[i]);
        if (r)
            hmm_fail(r, "soft: engine %u of %u cannot be started (%s)", i + 1, engines, hmm_strerror(r));
    }
    if (!r)
        return 0;
    soft_ports_join(s);
    soft_ports_exit(s);
    return r;

destroy_queue:
    soft_queue_destroy(&s->queue);
    return r;
}

void soft_ports_join(struct soft *s)
{
    soft_queue_end(&s->queue);
    for (unsigned i = 0; i < s->nports; i++) {
        if (s->ports[i]->thread)
            hmm_thread_join(s->ports[i]->thread);
    }
}

void soft_ports_exit(struct soft *s)
{
    s->world.nengines = 0;
    for (unsigned i = 0; i < s->nports; i++)
        port_free(s->ports[i]);
    s->nports = 0;
    if (!s->link)
        soft_deadline_signal_put();
    soft_queue_destroy(&s->queue);
}
