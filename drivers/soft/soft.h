/* SPDX-License-Identifier: MIT */
/*
 * The software device: memory of its own, engines that run jobs on process addresses, a page table and a TLB fed through
 * notifiers, page faults that are resolved and replayed.
 *
 * The program's side, in this folder:
 *
 *   soft.c      options, set-up and take-down
 *   memory.c    device memory: a shared mapping at addresses of its own
 *   copy.c      copy engines: threads for the copy and clear slots, never behind a job
 *   stream.c    copying large pieces past the caches
 *   queue.c     the jobs that core handed over
 *   port.c      one thread per engine: takes jobs, runs them, completes them
 *   mirror.c    the page table, which core keeps: invalidation, faults
 *   link.h      the engines' own process (soft:isolated); NULL: they run on the ports' threads
 *   model.c     how jobs get at memory: by faults, or by ranges that are held while they run
 *   register.c  registrations: ranges whose pages jobs hold
 *   bus.c       the time that crossing the link to system memory takes
 *
 * The device's own side, wherever it runs, is engine/.
 *
 * Locks; none is held across a call into core but of hmm_mirror_dir_seq(), hmm_page_get() and _put(), and none under another but as said:
 *
 *   model.lock        registrations, and who holds them; what the invalidate callback takes (models without faults)
 *   queue.lock        queued jobs, and which port runs what
 *   copy.lock         queued copies
 *   link.lock         until when the link is taken
 */
#ifndef HMM_SOFT_H
#define HMM_SOFT_H

#include <hmm/driver.h>

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/engine.h"
#include "patience.h"

extern const struct hmm_driver soft_driver;

#define SOFT_COPIES_MAX 16

struct soft;
struct port;
struct link;

/* ---- bus.c ----------------------------------------------------------------------------------------------------- */

/* What crosses the link between the device and system memory, and how long that takes at least. */
enum direction { TO_DEVICE, TO_SYSTEM };

struct bus {
    uint64_t bandwidth[2];     /* bytes per second, by direction; 0: no limit */
    uint64_t latency_ns;       /* of each transfer */
    uint64_t fault_latency_ns; /* of each fault of the device, before core is asked */
    bool modelled;             /* any of these is not 0 */
    pthread_mutex_t lock;
    uint64_t taken_until[2]; /* ns; what comes later in this direction waits its turn; lock */
};

#define SOFT_LINKS "none|pcie3x16|pcie4x16|pcie5x16|nvlink2|cxl2x8"
/* choice: a place in SOFT_LINKS. The other numbers replace those of the link where they are not 0. */
void soft_bus_init(struct bus *l, uint64_t choice, uint64_t bandwidth, uint64_t latency_ns, uint64_t fault_latency_ns);
void soft_bus_exit(struct bus *l);
/* A transfer begins: takes its turn and returns the time at which it may be over, for soft_bus_wait(). */
uint64_t soft_bus_begin(struct bus *l, enum direction way, uint64_t bytes);
/* Waits until that time, to a few microseconds. May block. */
void soft_bus_wait(const struct bus *l, uint64_t until);
/* hmm_device_fault(), hmm_bus_read() and hmm_bus_write(), and the time that they take over the link. */
int soft_bus_fault(struct soft *s, uintptr_t addr, unsigned flags);
int64_t soft_bus_read(struct soft *s, uintptr_t addr, void *buf, size_t len);
int64_t soft_bus_write(struct soft *s, uintptr_t addr, const void *buf, size_t len);

/* ---- memory.c ---------------------------------------------------------------------------------------------------- */

struct memory {
    char *map;
    size_t bytes;
    uint64_t pages;
    unsigned page_shift;
    uint32_t *touched; /* one bit per 2 MiB: its pages exist */
    size_t touched_bytes;
};

/* Message set on failure. keep_fd: gets a descriptor of the file; NULL: none is left open. */
int soft_memory_init(struct memory *m, uint64_t bytes, int *keep_fd);
void soft_memory_exit(struct memory *m);
/* Makes pages exist before they are first written: running out of memory is an error here and SIGBUS later. */
int soft_memory_touch(struct memory *m, uint64_t page, uint64_t pages);

static inline char *soft_memory_at(const struct memory *m, uint64_t page)
{
    return m->map + (page << m->page_shift);
}

/* ---- copy.c ------------------------------------------------------------------------------------------------------ */

/* stream.c: both sides page aligned, a multiple of the page size. */
void soft_stream_copy(void *to, const void *from, size_t bytes);

#define COPY_RING 64

struct copy_request {
    enum { COPY_STOP, COPY_TO_DEVICE, COPY_TO_SYSTEM, COPY_CLEAR } what;
    unsigned n;
    const struct hmm_dma *v;
    hmm_fence *fence;
};

struct copy_queue {
    pthread_mutex_t lock;
    pthread_cond_t filled, emptied;
    struct copy_request ring[COPY_RING];
    unsigned head, count;
    unsigned nthreads;
    struct hmm_thread *threads[SOFT_COPIES_MAX];
};

int soft_copy_init(struct soft *s, unsigned threads);
void soft_copy_exit(struct soft *s);
int soft_copy(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence);
int soft_clear(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence);

/* ---- mirror.c ---------------------------------------------------------------------------------------------------- */

/* NOLINTNEXTLINE(misc-redundant-expression) */
_Static_assert(SOFT_BLOCK == HMM_MIRROR_DIR, "what a translation covers at most is a directory");

/* Message set on failure. */
int soft_mirror_init(struct soft *s);
/* No engine runs, no job holds anything. */
void soft_mirror_exit(struct soft *s);

/* ---- register.c -------------------------------------------------------------------------------------------------- */

/* In an entry of a registration: its page is held, but the address is somebody else's by now. Beside HMM_PFN_VALID and _WRITE. */
#define PFN_CUT (1ull << 61)

struct registered_block {
    struct hmm_mirror_dir *dir; /* kept: so its notifier stays. NULL: none was to be had, and no page of it is registered */
    uint64_t seq;               /* at which its pages were read */
};

/* Where the pages of a range are, for as long as somebody holds it. */
struct registration {
    struct registration *next; /* of all, or of those to be freed; model.lock */
    uintptr_t start, end;
    unsigned users;     /* jobs that run; model.lock */
    bool stale;         /* no job finds it any more; model.lock */
    uint64_t last_used; /* model.lock */
    bool referenced;    /* it has a reference to each of them */
    size_t bytes;       /* of this structure */
    struct registered_block *blocks;
    uint64_t pages[]; /* HMM_PFN_*, PFN_CUT; 0: not registered */
};

/* A new one, not to be found yet, no page in it. NULL: no memory. */
struct registration *soft_registration_new(struct soft *s, uintptr_t start, uintptr_t end);
/* Brings the pages of r to the device, at most *budget of them, which falls by those that are there, and notes where they are. Blocks,
 * and holds no page. */
void soft_registration_fill(struct port *p, struct registration *r, uint64_t *budget);
/* What it notes is still so. Caller holds model.lock. */
bool soft_registration_is_current(const struct registration *r);
/* One of these addresses that is current; NULL. Caller holds model.lock. */
struct registration *soft_registration_find(struct soft *s, uintptr_t start, uintptr_t end);
/* Makes it one that is found, and takes a reference to each page if asked. It is current. Caller holds model.lock. */
void soft_registration_publish(struct soft *s, struct registration *r, bool reference);
/* Takes it out and puts it on a list. Caller holds model.lock. */
void soft_registration_unlink(struct soft *s, struct registration *r, struct registration **list);
/* Drops references and frees everything on the list. No locks. */
void soft_registrations_free(struct soft *s, struct registration *list);
/* Some page of [start, end) is registered, and the address still its own. Caller holds model.lock. */
bool soft_registration_covers(const struct registration *r, uintptr_t start, uintptr_t end);
/* The addresses are not those of the pages any more. Caller holds model.lock. */
void soft_registration_cut(struct registration *r, uintptr_t start, uintptr_t end);
/* The run of pages around addr, within its block of 2 MiB. False: addr is not registered (for that). Caller holds model.lock. */
bool soft_registration_resolve(const struct registration *r, uintptr_t addr, bool write, struct hmm_mirror_run *run);

/* ---- model.c ----------------------------------------------------------------------------------------------------- */

enum model_kind { MODEL_FAULT, MODEL_RESIDENT, MODEL_REGISTER };
#define SOFT_MODELS "fault|resident|register"

#define HOLD_MAX 64 /* ranges of a job */

struct model {
    enum model_kind kind;
    pthread_mutex_t lock;
    pthread_cond_t changed;     /* a job ended; with model.lock */
    struct registration *first; /* all that are published; model.lock */
    uint64_t clock;             /* for last_used; model.lock */
    uint64_t turns;             /* handed out to jobs that wait for room; model.lock */
    uint64_t made, used_again;  /* registrations; model.lock */
};

/* What the job of a port holds. model.lock, but for what its own thread reads. */
struct hold {
    struct registration *registrations[HOLD_MAX]; /* some may be NULL */
    unsigned n;
    uint64_t reserved; /* pages that it asked for and does not hold yet */
    uint64_t turn;     /* waits for room; 0: does not */
    uint32_t generation;
    uint32_t deadline_ms;   /* 0: none */
    uint64_t awaited_since; /* ms; 0: nobody waits for its end */
};

void soft_model_init(struct soft *s, enum model_kind kind);
/* No job is left: lets go of all pages. */
void soft_model_stop(struct soft *s);
void soft_model_exit(struct soft *s);
/* A job is about to run on the port, or has ended. begin() blocks, and holds nothing while it does. */
void soft_model_begin(struct port *p, const struct hmm_job *job);
void soft_model_end(struct port *p);
/* The slow path of a translation, as hmm_mirror_resolve(). The engine of the port holds no span. Blocks. A run without seq is valid until
 * the job of the port ends, whatever happens to the addresses. */
int soft_model_resolve(struct port *p, uintptr_t addr, bool write, struct hmm_mirror_run *run);
/* What is to be done about pages that jobs hold, by the invalidate callback. 0 or -EAGAIN. */
int soft_model_invalidate(struct soft *s, const struct hmm_event *event);

/* ---- port.c ------------------------------------------------------------------------------------------------------ */

/* The program's side of one engine: a thread that takes jobs for it. */
struct port {
    struct soft *soft;
    struct hmm_thread *thread;
    struct engine *engine; /* NULL: in another process */
    unsigned index;
    struct hmm_job *job; /* queue.lock */
    struct port *below;  /* on the stack of idle ones; queue.lock */
    bool idle;           /* is on it; queue.lock */
    pthread_cond_t work;
    uint32_t generation;   /* counts jobs; queue.lock */
    uint32_t asked_to_end; /* generation of the last job that was asked to end; atomic */
    struct {
        int status;
        char message[160];
    } asked; /* what cancel() wants the job to end with; status 0: nothing; queue.lock */
    struct {
        uint32_t count; /* of turns */
        struct patience patience;
        uint32_t deadline_ms; /* of the kernel that runs; atomic */
        uint64_t forced_ms;   /* when its job was first asked to end by force; 0: not yet; atomic */
        uint32_t turns_asked; /* since then */
        struct hmm_job_status status;
        char message[160];
    } talk; /* with an engine in another process: talk.c */
    struct hold hold;
};

int soft_ports_init(struct soft *s, unsigned engines);
/* Whether this is the thread of a port: what it asks for, it waits for. */
bool soft_port_here(void);
/* Refuses jobs, completes queued ones, ends running ones. On return no job is left. */
void soft_ports_stop(struct soft *s);
/* After soft_ports_stop(): ends the threads. */
void soft_ports_join(struct soft *s);
/* After soft_ports_join(), when no invalidation can come any more: they look at every engine's hazard. */
void soft_ports_exit(struct soft *s);
/* True when an engine uses a page of [start, end) now. */
bool soft_ports_in_use(struct soft *s, uintptr_t start, uintptr_t end);
/* Waits until none does, ending kernels at their deadlines. */
void soft_ports_wait_unused(struct soft *s, uintptr_t start, uintptr_t end);
/* p's next job is this one. Caller holds queue.lock. */
void soft_port_begin(struct port *p, struct hmm_job *job);
/* Bytes done, at least 1, or why not. */
int64_t soft_port_bus_read(struct port *p, uintptr_t addr, void *buf, size_t len);
int64_t soft_port_bus_write(struct port *p, uintptr_t addr, const void *buf, size_t len);
/* Ends the port's job of this generation, if it still runs, with this status and message. To be repeated until it has ended. */
void soft_port_end_job(struct port *p, uint32_t generation, int status, const char *message);
/* The port's job was asked to end. Takes no lock: the caller may hold model.lock. */
bool soft_port_was_asked(struct port *p);
int soft_submit(void *priv, struct hmm_job *job);
void soft_cancel(void *priv, struct hmm_job *job, int status, const char *message);

/* ---- queue.c ----------------------------------------------------------------------------------------------------- */

struct job_queue {
    pthread_mutex_t lock;
    pthread_cond_t finished;
    struct port *idle; /* ports without a job, who became idle last on top: its engine is warm */
    struct hmm_job *head, **tail;
    unsigned running;
    bool stopped, ending;
};

void soft_queue_init(struct job_queue *q);
void soft_queue_destroy(struct job_queue *q);
/* -ENODEV: stopped. */
int soft_queue_add(struct job_queue *q, struct hmm_job *job);
/* Waits for a job and makes it p's; NULL: the thread is to end. */
struct hmm_job *soft_queue_take(struct job_queue *q, struct port *p);
/* p's job has ended: nobody may ask it to any more. */
void soft_queue_ended(struct job_queue *q, struct port *p);
/* A job that was taken is done and freed. */
void soft_queue_done(struct job_queue *q);
/* Takes a job out that has not begun; false: it has. */
bool soft_queue_remove(struct job_queue *q, struct hmm_job *job);
/* No more jobs are taken; returns those that were queued. */
struct hmm_job *soft_queue_stop(struct job_queue *q);
/* After soft_queue_stop(): waits until no job runs, at most timeout_ms. False: time is up. */
bool soft_queue_wait_idle(struct job_queue *q, uint32_t timeout_ms);
/* Lets engine threads end. */
void soft_queue_end(struct job_queue *q);

/* ---- the device -------------------------------------------------------------------------------------------------- */

struct soft {
    struct hmm_device *dev;
    struct memory memory;
    struct copy_queue copies;
    struct bus bus;
    struct hmm_mirror *mirror;
    unsigned directories; /* at most, of the mirror */
    bool closing;         /* its mirror is being unregistered */
    struct model model;
    struct job_queue queue;
    struct link *link;  /* NULL: the engines run in this process */
    struct world world; /* engines of this process */
    unsigned nports;
    struct port *ports[SOFT_ENGINES_MAX];
    uint32_t invalidate_delay_ms;
    uint32_t page; /* bytes that faults move at least */
};

#endif
