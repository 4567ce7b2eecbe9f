/* SPDX-License-Identifier: MIT */
/*
 * Engines whose outside is a channel. Each has a thread, which is at all times in one of two places: in a job, or waiting for the
 * program to speak.
 */
#include "process.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

struct remote {
    struct process *process;
    struct engine *engine;
    struct channel *channel;
    uint32_t count; /* of turns */
    struct patience patience;
    cpu_set_t allowed; /* as the program's were */
    int together;      /* turns in a row on the port's CPU */
    bool apart;        /* bound to others */
    pthread_t thread;
};

#define TOGETHER_MAX 16
#define TOGETHER_AGAIN 200 /* turns until it is tried again */

static __thread struct remote *self;

/* ---- turns ------------------------------------------------------------------------------------------------------- */

/*
 * Two that talk are quickest on two CPUs, each watching for the other; but the scheduler likes to put who is woken where the waker
 * is. So an engine that finds itself there again and again leaves that CPU to its port, for as long as watching pays.
 */
static void stay_off(struct remote *r, int cpu)
{
    cpu_set_t set = r->allowed;
    CPU_CLR(cpu, &set);
    r->together = 0;
    r->apart = CPU_COUNT(&set) && sched_setaffinity(0, sizeof(set), &set) == 0;
    r->patience.credit = PATIENCE_CREDIT;
}

static void stay_anywhere(struct remote *r)
{
    sched_setaffinity(0, sizeof(r->allowed), &r->allowed);
    r->apart = false;
    r->together = -TOGETHER_AGAIN;
}

static void listen_to_program(struct remote *r)
{
    uint32_t *turn = &r->channel->turn, next = channel_next(r->count), port = r->channel->program.cpu;
    int cpu = sched_getcpu();
    r->together = port == (uint32_t)cpu || r->together < 0 ? r->together + 1 : 0;
    if (r->together >= TOGETHER_MAX)
        stay_off(r, cpu);
    patience_watch(turn, next, port, &r->patience);
    if (r->apart && r->patience.credit == 0)
        stay_anywhere(r);
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) >> 1 != next)
        channel_listen(turn, r->count, 0);
    r->count = next;
}

static void speak(struct remote *r, enum said_kind kind)
{
    r->channel->engine.kind = kind;
    r->channel->engine.cpu = (uint32_t)sched_getcpu();
    r->count = channel_next(r->count);
    channel_speak(&r->channel->turn, r->count);
}

static const struct from_program *ask(struct remote *r, enum said_kind kind)
{
    speak(r, kind);
    listen_to_program(r);
    return &r->channel->program;
}

/* ---- what an engine reaches -------------------------------------------------------------------------------------- */

/* This process maps a page of device memory when it first touches it. The program has made whole chunks of 2 MiB exist, so a chunk is
 * mapped at once: that takes a fraction of the time. */
static void map_chunks(struct process *p, uint64_t page, uint64_t pages)
{
    static uint8_t mapped[((uint64_t)4 << 40) / SOFT_BLOCK];
    uint64_t first = (page << p->world.page_shift) / SOFT_BLOCK,
             last = (((page + pages) << p->world.page_shift) - 1) / SOFT_BLOCK;
    for (uint64_t chunk = first; chunk <= last; chunk++) {
        if (__atomic_load_n(&mapped[chunk], __ATOMIC_RELAXED))
            continue;
        uint64_t at = chunk * SOFT_BLOCK, left = p->memory_bytes - at;
        madvise(p->world.memory + at, left < SOFT_BLOCK ? left : SOFT_BLOCK, MADV_POPULATE_WRITE); /* else page by page */
        __atomic_store_n(&mapped[chunk], 1, __ATOMIC_RELAXED);
    }
}

static const uint32_t never_moves;

static int resolve(struct engine *e, uintptr_t addr, bool write, struct translation *t)
{
    struct remote *r = e->owner;
    const uint64_t *version = process_version(addr);
    uint64_t seen = __atomic_load_n(version, __ATOMIC_SEQ_CST); /* before asking: see control.c */
    r->channel->engine.addr = addr;
    r->channel->engine.write = write;
    const struct from_program *answer = ask(r, SAID_FAULT);
    if (answer->status)
        return (int)answer->status;
    map_chunks(r->process, answer->page, (answer->end - answer->start) >> e->world->page_shift);
    *t = (struct translation){
        .start = answer->start,
        .end = answer->end,
        .at = soft_world_memory(e->world, answer->page),
        .seq = version,
        .seq_seen = seen,
        .generation = &never_moves,
        .gate = answer->gate,
        .gate_mask = soft_mutate("soft-gate") ? 0 : UINT32_MAX,
        .write = answer->write,
    };
    if (answer->held) {
        t->seq = &e->run; /* moves when the job ends */
        t->seq_seen = __atomic_load_n(&e->run, __ATOMIC_RELAXED);
        t->gate_mask = 0;
    }
    return 0;
}

static size_t at_most_bounce(size_t len)
{
    return len < CHANNEL_BOUNCE_BYTES ? len : CHANNEL_BOUNCE_BYTES;
}

static int64_t bus_read(struct engine *e, uintptr_t addr, void *buf, size_t len)
{
    struct remote *r = e->owner;
    r->channel->engine.addr = addr;
    r->channel->engine.len = at_most_bounce(len);
    int64_t n = ask(r, SAID_BUS_READ)->status;
    if (n > 0)
        memcpy(buf, r->channel->bounce, (size_t)n);
    return n;
}

static int64_t bus_write(struct engine *e, uintptr_t addr, const void *buf, size_t len)
{
    struct remote *r = e->owner;
    r->channel->engine.addr = addr;
    r->channel->engine.len = at_most_bounce(len);
    memcpy(r->channel->bounce, buf, at_most_bounce(len));
    return ask(r, SAID_BUS_WRITE)->status;
}

static void sync_events(struct engine *e)
{
    ask(e->owner, SAID_SYNC);
}

static void *allocate(size_t bytes)
{
    return calloc(1, bytes);
}

static void release(void *ptr, size_t bytes)
{
    (void)bytes;
    free(ptr);
}

static void say(struct channel *c, const char *message)
{
    strncpy(c->engine.message, message, sizeof(c->engine.message) - 1);
    c->engine.message[sizeof(c->engine.message) - 1] = '\0';
}

static void warn(const char *line)
{
    say(self->channel, line);
    ask(self, SAID_WARN);
}

static const struct outside another_process = {
    .resolve = resolve,
    .bus_read = bus_read,
    .bus_write = bus_write,
    .sync = sync_events,
    .alloc = allocate,
    .free = release,
    .warn = warn,
};

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

/* The names stay where they are: the channel is the job's until it is done. */
static bool find_kernel(struct remote *r, struct hmm_launch *launch)
{
    struct engine *e = r->engine;
    int err = 0;
    launch->object = r->channel->object;
    launch->symbol = r->channel->symbol;
    launch->arg = r->channel->arg;
    launch->kernel = process_kernel(launch->object, launch->symbol, &err, e->message, sizeof(e->message));
    if (!launch->kernel)
        e->status = (struct hmm_job_status){.status = err, .message = e->message};
    return launch->kernel;
}

static void run_job(struct remote *r)
{
    struct engine *e = r->engine;
    struct hmm_operation operation = r->channel->program.operation;
    soft_engine_begin(e, &operation, r->channel->program.generation);
    if (operation.kind != HMM_OP_KERNEL || find_kernel(r, &operation.kernel))
        soft_engine_run(e, &operation);
    struct from_engine *done = &r->channel->engine;
    done->status = e->status.status;
    done->result = e->status.result;
    done->addr = e->status.address;
    say(r->channel, e->status.message ? e->status.message : "");
    speak(r, SAID_DONE);
}

static void *engine_main(void *arg)
{
    struct remote *r = self = arg;
    prctl(PR_SET_NAME, "hmm-soft-engine");
    sched_getaffinity(0, sizeof(r->allowed), &r->allowed);
    soft_deadline_adopt(r->engine);
    if (process_crash_adopt(r->engine))
        abort();
    for (;;) {
        listen_to_program(r);
        run_job(r);
    }
    return NULL;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

/* All engines are made before the first runs: others look at every engine's hazard. */
int process_engines_start(struct process *p)
{
    unsigned n = p->channels->nengines;
    struct remote *all = calloc(n, sizeof(*all));
    p->world.outside = &another_process;
    for (unsigned i = 0; i < n; i++) {
        struct engine *e = all ? soft_engine_new(&p->world, &all[i]) : NULL;
        if (!e)
            return -ENOMEM;
        all[i] = (struct remote){.process = p, .engine = e, .channel = &p->channels->engines[i]};
        p->world.engines[p->world.nengines++] = e;
    }
    for (unsigned i = 0; i < n; i++) {
        int r = pthread_create(&all[i].thread, NULL, engine_main, &all[i]);
        if (r)
            return -r;
    }
    return 0;
}
