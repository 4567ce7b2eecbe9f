/* SPDX-License-Identifier: MIT */
/*
 * The software device: memory of its own, engines that run jobs on process addresses, a page table and a TLB fed through
 * notifiers, page faults that are resolved and replayed.
 *
 *   memory.c    device memory: a shared mapping at addresses of its own
 *   copy.c      copy engines: threads for the copy and clear slots, never behind a job
 *   stream.c    copying large pieces past the caches
 *   queue.c     the bounded job queue
 *   engine.c    job engines: threads that take jobs and run them
 *   ops.c       copy, fill, crc32c on process addresses
 *   crc32c.c    the checksum of a piece of memory
 *   access.c    spans: TLB, hazards, the bus
 *   table.c     the page table: blocks with a notifier each, faults, invalidation
 *   deadline.c  ending a kernel that does not let go
 *
 * Locks, outermost first; none is held across a call into core but `structure`:
 *
 *   table.structure   which blocks exist; held across hmm_notifier_insert() and hmm_notifier_remove(), so the callback
 *                     does not take it
 *     table.lock      entries of all blocks, hash chains; what the invalidate callback takes
 *   queue.lock        queued jobs, and which engine runs what
 *   copy.lock         queued copies
 *
 * Everything an engine does between taking a job and finishing it obeys the rule of <hmm/driver.h>.
 */
#ifndef HMM_SOFT_H
#define HMM_SOFT_H

#include <hmm/driver.h>

#include <pthread.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

extern const struct hmm_driver soft_driver;

#define SOFT_BLOCK ((uintptr_t)2 << 20) /* what one block of the page table covers */
#define SOFT_ENGINES_MAX 64
#define SOFT_COPIES_MAX 16
#define SOFT_NAME_LEN 32

struct soft;

/* Steps that a test build can leave out (tests/MUTATIONS.md), named by the environment variable HMM_MUTATE. */
#ifdef HMM_MUTATIONS
bool soft_mutate(const char *name); /* mutate.c */
#else
#define soft_mutate(name) false
#endif

/* ---- memory.c ---------------------------------------------------------------------------------------------------- */

struct memory {
    char *map;
    size_t bytes;
    uint64_t pages;
    unsigned page_shift;
    uint32_t *touched; /* one bit per 2 MiB: its pages exist */
    size_t touched_bytes;
};

/* Message set on failure. */
int soft_memory_init(struct memory *m, uint64_t bytes);
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

/* ---- table.c ----------------------------------------------------------------------------------------------------- */

/* Entry: device page + 1, and the write bit; 0: not present. */
typedef uint32_t pte_t;
#define PTE_WRITE (1u << 31)

#define BLOCK_NONE ((uintptr_t)1) /* 0 is the address of a block, too */

/* The page table of one 2 MiB block. Allocated once and used again for other blocks, never freed before the device closes, so
 * that a TLB entry may point to it for ever and `generation` says whether it is still the same block. */
struct block {
    struct hmm_notifier notifier;
    struct soft *soft;
    struct block *next;  /* hash chain or free list; table.lock */
    uintptr_t base;      /* BLOCK_NONE: free; table.lock */
    uint64_t filled;     /* sequence number at which the entries were read; table.lock */
    uint32_t generation; /* atomic: moves when the block is given up */
    uint32_t users;      /* engines that fill it; table.lock */
    uint32_t mapped;     /* entries present; table.lock */
    bool current;        /* filled is meaningful; table.lock */
    bool recent;         /* second chance; table.lock */
    pte_t pte[];
};

struct table {
    pthread_mutex_t structure, lock;
    struct block **hash; /* table.lock */
    size_t hash_bytes;
    unsigned hash_bits;
    struct block **all; /* every block ever made: [0, made); table.structure */
    size_t all_bytes;
    unsigned made, max, hand;
    struct block *unused; /* table.structure */
    unsigned block_pages;
};

/* One translated run, as the TLB keeps it. Empty when start == end. */
struct translation {
    uintptr_t start, end;
    char *at; /* device memory of start */
    struct block *block;
    uint64_t seq;
    uint32_t generation;
    bool write;
};

int soft_table_init(struct soft *s);
/* Removes every notifier. No engine runs. */
void soft_table_exit(struct soft *s);

struct engine;
/* The slow path of a translation: walk, fill, fault. 0: *t holds; 1: the page stays in system memory, use the bus; else the
 * error. The engine holds no span. Blocks. */
int soft_table_resolve(struct engine *e, uintptr_t addr, bool write, struct translation *t);

/* ---- access.c ---------------------------------------------------------------------------------------------------- */

#define TLB_SMALL 256 /* by page */
#define TLB_LARGE 64  /* by block: runs that cover a whole one */

struct tlb {
    struct translation small[TLB_SMALL], large[TLB_LARGE];
};

/* A span of system memory: a copy of at most one page. `before` holds what was read, to find what the kernel changed. */
struct bounce {
    uintptr_t addr;
    size_t len; /* 0: none */
    bool write;
    char *now, *before;
};

void soft_access_init(struct engine *e);
/* Ends the current span; pages of the bus are written back. 0 or the error, with e->status filled. */
int soft_access_end_span(struct engine *e);
/* Ends it without writing back, after an error. */
void soft_access_drop_span(struct engine *e);
/* A span for the engine's own operations; does not return on error. */
char *soft_access_span(struct engine *e, uintptr_t addr, size_t *len, bool write);
/* True when an engine uses a page of [start, end) now. */
bool soft_access_in_use(const struct soft *s, uintptr_t start, uintptr_t end);
/* Waits until none does, ending kernels at their deadlines. */
void soft_access_wait_unused(struct soft *s, uintptr_t start, uintptr_t end);

/* ---- deadline.c -------------------------------------------------------------------------------------------------- */

enum kill_cause { KILL_NONE, KILL_DEADLINE, KILL_CLOSE };

/* The signal that ends kernels: found and installed with the first device, given back with the last. Program context. */
int soft_deadline_signal_get(void);
void soft_deadline_signal_put(void);
/* Engine thread, at its start: this thread may be interrupted, for this engine. */
void soft_deadline_adopt(struct engine *e);
/* Engine thread, after the handler left a kernel: the next one may be interrupted, too. */
void soft_deadline_allow(void);
/* Asks the engine's job of this generation to end, at its next accessor call; with force at once, by the signal. The signal may
 * miss; to be repeated until the job has ended. Any thread. */
void soft_deadline_kill(struct engine *e, uint32_t generation, enum kill_cause cause, bool force);
/* What the present job was asked. Engine thread. */
enum kill_cause soft_deadline_asked(const struct engine *e);

/* ---- engine.c ---------------------------------------------------------------------------------------------------- */

#define LOCAL_BYTES ((size_t)64 << 10)

/* Written by its own thread unless said otherwise. */
struct engine {
    struct hmm_accessor accessor; /* first: what a kernel sees */
    struct soft *soft;
    struct hmm_thread *thread;
    int tid;
    struct hmm_job *job; /* queue.lock */
    bool is_kernel;
    hmm_kernel kernel;
    char *local;    /* LOCAL_BYTES, for operations */
    uint64_t *pfns; /* of one block, for table.c */
    sigjmp_buf out; /* the way out of a job */
    struct hmm_job_status status;
    char message[160];
    struct bounce bounce;
    struct tlb *tlb;

    /* Read and written by others, all atomic. */
    char pad[64];
    uint64_t hazard;      /* the pages in use; see access.c */
    uint32_t waiters;     /* threads that wait for the hazard to go */
    uint32_t dropped;     /* futex: moves when a hazard goes while there are waiters */
    uint32_t generation;  /* counts jobs */
    uint32_t deadline_ms; /* of this job; 0: none. Written before generation */
    uint64_t kill;        /* generation << 8 | cause */
    uint32_t in_user;     /* in the code of a kernel, where the signal may end it */
    char pad_end[64];
};

int soft_engines_init(struct soft *s, unsigned engines);
/* Refuses jobs, completes queued ones, ends running ones. On return no job is left. */
void soft_engines_stop(struct soft *s);
/* After soft_engines_stop(): ends the threads. */
void soft_engines_join(struct soft *s);
/* After soft_engines_join(), when no invalidation can come any more: they look at every engine's hazard. */
void soft_engines_exit(struct soft *s);
/* Leaves the job with e->status; does not return. Holds no lock. */
void soft_engine_throw(struct engine *e) __attribute__((noreturn));
/* Does not return when the job was asked to end. */
void soft_engine_check(struct engine *e);
/* Code of a kernel ends / begins on this thread. leave() does not return when the job was asked to end. */
void soft_engine_enter_driver(struct engine *e);
void soft_engine_leave_driver(struct engine *e);
int soft_submit(void *priv, struct hmm_job *job);

/* ---- queue.c ----------------------------------------------------------------------------------------------------- */

#define QUEUE_MAX 65536

struct job_queue {
    pthread_mutex_t lock;
    pthread_cond_t filled, idle;
    struct hmm_job *head, **tail;
    unsigned count, running;
    bool stopped, ending;
};

void soft_queue_init(struct job_queue *q);
void soft_queue_destroy(struct job_queue *q);
/* -EBUSY full, -ENODEV stopped. */
int soft_queue_add(struct job_queue *q, struct hmm_job *job);
/* Waits for a job and makes it e's; NULL: the thread is to end. */
struct hmm_job *soft_queue_take(struct job_queue *q, struct engine *e);
/* e's job is done and freed. */
void soft_queue_done(struct job_queue *q, struct engine *e);
/* No more jobs are taken; returns those that were queued. */
struct hmm_job *soft_queue_stop(struct job_queue *q);
/* After soft_queue_stop(): waits until no job runs, at most timeout_ms. False: time is up. */
bool soft_queue_wait_idle(struct job_queue *q, uint32_t timeout_ms);
/* Lets engine threads end. */
void soft_queue_end(struct job_queue *q);

/* ---- ops.c, crc32c.c, text.c ------------------------------------------------------------------------------------- */

/* Runs a built-in operation; errors leave through soft_engine_throw(). Returns its result. */
uint64_t soft_ops_run(struct engine *e, const struct hmm_job *job);

/* CRC-32C of len bytes after those that gave crc; begins with 0. */
uint32_t soft_crc32c(uint32_t crc, const void *data, size_t len);
/* The same without the processor's instruction. */
uint32_t soft_crc32c_table(uint32_t crc, const void *data, size_t len);

/* A message in a buffer of fixed size, without stdio. */
struct text {
    char *buf;
    size_t size, len;
};
void soft_text_str(struct text *t, const char *s);
void soft_text_dec(struct text *t, uint64_t n);
void soft_text_hex(struct text *t, uint64_t n);

/* ---- the device -------------------------------------------------------------------------------------------------- */

struct soft {
    struct hmm_device *dev;
    const uint32_t *gate;
    struct memory memory;
    struct copy_queue copies;
    struct table table;
    struct job_queue queue;
    unsigned nengines;
    struct engine *engines[SOFT_ENGINES_MAX];
    uint32_t invalidate_delay_ms;
};

#endif
