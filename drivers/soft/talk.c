/* SPDX-License-Identifier: MIT */
/*
 * A job on an engine of another process: the port's thread says what to do, then answers what the engine asks, until the engine says
 * that it is done, or the process is gone. All that an engine can ask for is what any device may: pages of process addresses, and the
 * bus. What it says is copied once and checked; a process that says what makes no sense is killed.
 */
#include "link.h"

#include <errno.h>
#include <string.h>

#define ADDRESS_MAX ((uintptr_t)1 << 57)
#define TURNS_ASKED_MAX 100000 /* of a job that was asked to end: those of a write-back over the bus, and many more */

static struct channel *channel_of(const struct port *p)
{
    return &p->soft->link->channels->engines[p->index];
}

/* ---- turns ------------------------------------------------------------------------------------------------------- */

/* After a request to end the job, the engine has so long for one turn. 0: no limit. */
static uint32_t turn_limit(struct port *p, uint64_t since)
{
    uint64_t asked = __atomic_load_n(&p->talk.forced_ms, __ATOMIC_SEQ_CST), now = soft_now_ms();
    if (!asked)
        return 0;
    p->talk.turns_asked++;
    uint64_t from = asked > since ? asked : since;
    if (now - from < LINK_PATIENCE_MS && p->talk.turns_asked < TURNS_ASKED_MAX)
        return (uint32_t)(LINK_PATIENCE_MS - (now - from));
    soft_link_kill(p->soft->link, "a job did not end when it was asked to");
    return 1000;
}

/* Waits until the engine has spoken, and copies what it said. False: the process is gone. */
static bool hear(struct port *p, struct from_engine *said)
{
    struct channel *c = channel_of(p);
    uint32_t mine = p->talk.count, next = channel_next(mine);
    patience_watch(&c->turn, next, c->engine.cpu, &p->talk.patience);
    for (uint64_t since = 0;;) {
        uint32_t count = __atomic_load_n(&c->turn, __ATOMIC_SEQ_CST) >> 1;
        if (count == next)
            break;
        if (soft_link_gone(p->soft->link))
            return false;
        if (count != mine)
            soft_link_kill(p->soft->link, "an engine spoke out of turn");
        since = since ? since : soft_now_ms();
        if (count != mine)
            soft_futex_wait(&p->soft->link->gone, 0, 1000);
        else
            channel_listen(&c->turn, mine, turn_limit(p, since));
    }
    p->talk.count = next;
    memcpy(said, &c->engine, sizeof(*said));
    said->message[sizeof(said->message) - 1] = '\0';
    return true;
}

static void speak(struct port *p, enum said_kind kind)
{
    struct channel *c = channel_of(p);
    uint32_t before = p->talk.count;
    c->program.kind = kind;
    c->program.cpu = (uint32_t)sched_getcpu();
    p->talk.count = channel_next(before);
    if (channel_speak(&c->turn, p->talk.count) != before && !soft_link_gone(p->soft->link))
        soft_link_kill(p->soft->link, "an engine spoke out of turn");
}

/* ---- what an engine asks for ------------------------------------------------------------------------------------- */

static int64_t answer_fault(struct port *p, const struct from_engine *said)
{
    struct from_program *answer = &channel_of(p)->program;
    struct hmm_mirror_run run;
    if (__atomic_load_n(p->soft->world.gate, __ATOMIC_SEQ_CST) & 1)
        hmm_event_sync(p->soft->dev); /* else the answer would be old at once */
    int r = said->addr >= ADDRESS_MAX ? -EFAULT : soft_model_resolve(p, said->addr, said->write != 0, &run);
    if (r == 0) {
        answer->start = run.start;
        answer->end = run.end;
        answer->page = run.page;
        answer->write = run.flags & HMM_MIRROR_WRITE ? 1 : 0;
        answer->gate = run.gate;
        answer->held = run.seq == NULL;
    }
    return r;
}

/* False: it makes no sense. */
static bool answer(struct port *p, const struct from_engine *said)
{
    struct channel *c = channel_of(p);
    int64_t status = 0;
    bool bus = said->kind == SAID_BUS_READ || said->kind == SAID_BUS_WRITE;
    if (bus && (said->len == 0 || said->len > CHANNEL_BOUNCE_BYTES))
        return false;
    switch (said->kind) {
    case SAID_FAULT: status = answer_fault(p, said); break;
    case SAID_BUS_READ: status = soft_port_bus_read(p, said->addr, c->bounce, said->len); break;
    case SAID_BUS_WRITE: status = soft_port_bus_write(p, said->addr, c->bounce, said->len); break;
    case SAID_SYNC: hmm_event_sync(p->soft->dev); break;
    case SAID_WARN: hmm_log(HMM_LOG_WARNING, "soft: %s", said->message); break;
    default: return false;
    }
    c->program.status = status;
    return true;
}

/* ---- a job ------------------------------------------------------------------------------------------------------- */

static void end_with(struct port *p, int status, const char *message)
{
    strncpy(p->talk.message, message, sizeof(p->talk.message) - 1);
    p->talk.status = (struct hmm_job_status){.status = status, .message = p->talk.message};
}

static bool copy_name(char *to, const char *from)
{
    size_t n = from ? strlen(from) + 1 : 0;
    if (n == 0 || n > CHANNEL_NAME_BYTES)
        return false;
    memcpy(to, from, n);
    return true;
}

/* The whole of what a kernel needs. Pointers of the program mean nothing there. */
static bool give_kernel(struct channel *c, const struct hmm_launch *launch)
{
    struct hmm_launch *there = &c->program.operation.kernel;
    if (launch->arg_size > CHANNEL_ARG_BYTES || !copy_name(c->object, launch->object) || !copy_name(c->symbol, launch->symbol))
        return false;
    if (launch->arg_size)
        memcpy(c->arg, launch->arg, launch->arg_size);
    there->kernel = NULL;
    there->arg = NULL;
    there->object = there->symbol = NULL;
    there->ranges = NULL;
    there->nranges = 0;
    return true;
}

static bool give_job(struct port *p, const struct hmm_job *job)
{
    struct channel *c = channel_of(p);
    bool kernel = job->operation.kind == HMM_OP_KERNEL;
    c->program.operation = job->operation;
    c->program.generation = p->generation;
    __atomic_store_n(&p->talk.deadline_ms, kernel ? job->operation.kernel.deadline_ms : 0, __ATOMIC_RELAXED);
    return !kernel || give_kernel(c, &job->operation.kernel);
}

static bool sensible(int64_t status)
{
    return status <= 0 && status > -4096 && status != -EINPROGRESS && status != -EAGAIN;
}

static void take_result(struct port *p, const struct from_engine *said)
{
    memcpy(p->talk.message, said->message, sizeof(p->talk.message));
    p->talk.status = (struct hmm_job_status){
        .status = (int32_t)said->status,
        .result = said->result,
        .address = said->addr,
        .message = p->talk.message,
    };
}

void soft_talk_run(struct port *p, const struct hmm_job *job)
{
    struct link *link = p->soft->link;
    struct from_engine said = {.kind = 0};
    if (!soft_link_gone(link) && !give_job(p, job)) {
        end_with(p, -ENOEXEC, "the kernel has no name of an object and a symbol that fit, or its argument is too large");
        return;
    }
    for (enum said_kind kind = SAID_JOB; !soft_link_gone(link); kind = SAID_ANSWER) {
        speak(p, kind);
        if (!hear(p, &said))
            break;
        if (said.kind == SAID_DONE && sensible(said.status)) {
            take_result(p, &said);
            goto done;
        }
        if (!answer(p, &said))
            soft_link_kill(link, "an engine said what makes no sense");
    }
    end_with(p, -ENODEV, soft_link_reason(link));
done:
    __atomic_store_n(&p->talk.deadline_ms, 0, __ATOMIC_RELAXED);
}

void soft_talk_ask_to_end(struct port *p, uint32_t generation, enum kill_cause cause, bool force)
{
    struct link *link = p->soft->link;
    struct channel *c = channel_of(p);
    uint64_t none = 0;
    if (force)
        __atomic_compare_exchange_n(&p->talk.forced_ms, &none, soft_now_ms(), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    __atomic_store_n(&c->kill, (uint64_t)generation << 16 | (uint64_t)force << 8 | (uint64_t)cause, __ATOMIC_SEQ_CST);
    __atomic_fetch_or(&link->channels->kills, 1ull << p->index, __ATOMIC_SEQ_CST);
    soft_link_ring(link);
    if (force)
        channel_futex_wake(&c->turn); /* the port looks how long it waits already */
}
