/* SPDX-License-Identifier: MIT */
/*
 * Engines: what runs jobs on process addresses. This folder is the device's own side. It runs on threads of the program's process, or in
 * a process of its own (soft:isolated), and does not know which: it calls nothing of libhmm, and reaches everything that is not
 * device memory through `struct outside`.
 *
 *   run.c       a job from beginning to end
 *   ops.c       the operations: which there are. They stand in ops_*.c
 *   loops*.c    what they do to memory, once they have it; crc32c.c the checksum
 *   access.c    spans: TLB, hazards, the bus
 *   hold.c      what operations hold: several operands at once
 *   deadline.c  ending a kernel that does not let go
 *   text.c      messages without stdio
 *   mutate.c    protocol steps left out on purpose, in test builds
 *
 * Everything an engine does between taking a job and finishing it obeys the rule of <hmm/driver.h>.
 */
#ifndef HMM_SOFT_ENGINE_H
#define HMM_SOFT_ENGINE_H

#include <hmm/driver.h>

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SOFT_BLOCK ((uintptr_t)2 << 20) /* what one translation covers at most */
#define SOFT_ENGINES_MAX 64

struct engine;

/*
 * A run of pages that lie together on the device, as the TLB keeps it. Empty when start == end. It holds while the three numbers are
 * what they were when it was made; where one does not apply, it points to something that never changes.
 */
struct translation {
    uintptr_t start, end;
    char *at;            /* device memory of start */
    const uint64_t *seq; /* moves when an invalidation of these pages begins */
    uint64_t seq_seen;
    const uint32_t *generation; /* moves when what `seq` belongs to is used for other pages */
    uint32_t generation_seen;
    uint32_t gate, gate_mask; /* world.gate must agree with gate in these bits */
    bool write;
};

/* What the side that the engines run on provides. All may block, and none is called with a span or a hazard held. */
struct outside {
    /* 0: *t holds; 1: the page stays in system memory, use the bus; else the error. */
    int (*resolve)(struct engine *e, uintptr_t addr, bool write, struct translation *t);
    /* Bytes done, at least 1, or the error: -EFAULT, -EACCES... */
    int64_t (*bus_read)(struct engine *e, uintptr_t addr, void *buf, size_t len);
    int64_t (*bus_write)(struct engine *e, uintptr_t addr, const void *buf, size_t len);
    /* Waits until world.gate is even, or was. */
    void (*sync)(struct engine *e);
    /* Zeroed memory that no device page and no page of the program is; NULL when there is none. */
    void *(*alloc)(size_t bytes);
    void (*free)(void *ptr, size_t bytes);
    void (*warn)(const char *line);
};

/* All engines that look at the same translations. */
struct world {
    const struct outside *outside;
    const uint32_t *gate; /* odd: changes of the address space are not known to translations yet */
    char *memory;         /* device memory */
    unsigned page_shift;
    unsigned nengines;
    struct engine *engines[SOFT_ENGINES_MAX];
};

static inline char *soft_world_memory(const struct world *w, uint64_t page)
{
    return w->memory + (page << w->page_shift);
}

/* Steps that a test build can leave out (tests/MUTATIONS.md), named by the environment variable HMM_MUTATE. */
#ifdef HMM_MUTATIONS
bool soft_mutate(const char *name); /* mutate.c */
#else
#define soft_mutate(name) false
#endif

/* ---- access.c ---------------------------------------------------------------------------------------------------- */

#define TLB_SMALL 512 /* by page */
#define TLB_LARGE 512 /* by block: runs that cover much of one */

struct tlb_entry {
    struct translation t;
    uint64_t held; /* engine.holds when it was last found to hold */
};

struct tlb {
    struct tlb_entry small[TLB_SMALL], large[TLB_LARGE];
};

/* Memory that is used as a copy of at most one page. `before` holds what was read, to find what was changed. */
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
/* A span for the engine's own operations, which hold nothing else meanwhile; does not return on error. */
char *soft_access_span(struct engine *e, uintptr_t addr, size_t *len, bool write);
/* True when an engine uses a page of [start, end) now. */
bool soft_access_in_use(const struct world *w, uintptr_t start, uintptr_t end);
/* Waits until none does that did when this was called, ending kernels at their deadlines. */
void soft_access_wait_unused(struct world *w, uintptr_t start, uintptr_t end);

/* ---- hold.c: what operations hold, several things at once ---------------------------------------------------------- */

#define OPERANDS 3 /* streams of one hold */
#define WINDOWS 3  /* of one job */
#define HAZARDS (OPERANDS + WINDOWS)

/* One stream of an operation: elements that are used in ascending order. */
struct operand {
    uintptr_t addr;   /* of the next element; the operation moves it */
    uint32_t element; /* bytes, 1..16 */
    bool write;       /* also readable */
    char *at;         /* where the engine finds it while it is held */
};

/* What hold.c knows of an operand. */
struct slot {
    struct translation t;
    bool found;
    bool over_spans; /* the bounce is of one element that lies in two translations */
    struct bounce bounce;
};

/*
 * Process memory that an operation uses in any order. Where a whole block of it lies together on the device, direct[] has the
 * difference between device and process addresses, for as long as this hold lasts; else 0.
 */
struct window {
    uintptr_t start;
    uint64_t bytes;
    bool write;
    bool careful;   /* an element may lie beyond reach, or in two blocks */
    uint64_t reach; /* bytes from start that direct[] covers */
    uintptr_t *direct;
    uintptr_t first;  /* number of direct[0]'s block */
    uintptr_t origin; /* where direct[] would be that of block 0 */
    size_t low, high; /* [low, high) of direct[] may be set */
    uintptr_t missed; /* where the last miss was, and how often in a row */
    unsigned tries;
};

/*
 * Holds the next elements of n operands, and the engine's windows; whatever was held before is released. Returns for how many
 * elements, 1..count, every operand's `at` is good, until the next call of this, of soft_release() or of anything that gives a span.
 * Invalidations wait for it: to be called again within a millisecond or so. Does not return on error, or when the job was asked to
 * end.
 */
uint64_t soft_hold(struct engine *e, struct operand *operands, unsigned n, uint64_t count);
/* Writes back what was held as a copy, and holds nothing. Does not return on error. */
void soft_release(struct engine *e);
/* The same without writing back, and forgets the windows: after an error, and at the end of the job. */
void soft_hold_drop(struct engine *e);
/* Over elements of this size. Good until the end of the job. Does not return on error. */
struct window *soft_window_open(struct engine *e, const void *ptr, uint64_t bytes, uint32_t element, bool write);
/* Where [addr, addr + len) is in the present hold, or NULL. */
char *soft_window_find(struct engine *e, struct window *w, uintptr_t addr, size_t len);
/* After NULL: releases everything and brings that memory. False: it is to be used over spans. Does not return on error. */
bool soft_window_bring(struct engine *e, struct window *w, uintptr_t addr, size_t len);
/* Copies, by any means; windows are held afterwards and no operands. Does not return on error. */
void soft_window_get(struct engine *e, struct window *w, uintptr_t addr, void *buf, size_t len);
void soft_window_put(struct engine *e, struct window *w, uintptr_t addr, const void *buf, size_t len);

/* Where the byte at this offset is, offset < reach, if the whole block lies together; else NULL: ask soft_window_find(). What follows
 * in the same block follows there, too. */
static inline char *soft_window_at(const struct window *w, uint64_t offset)
{
    uintptr_t addr = w->start + offset;
    uintptr_t difference = *(const uintptr_t *)(w->origin + addr / SOFT_BLOCK * sizeof(uintptr_t));
    return difference ? (char *)(addr + difference) : NULL;
}

/* The same where an element may reach into the next block. */
static inline bool soft_window_straddles(const struct window *w, uint64_t offset, size_t len)
{
    return ((w->start + offset) & (SOFT_BLOCK - 1)) + len > SOFT_BLOCK;
}

/* Copies over spans, across any number of them. Nothing is held afterwards. Do not return on error. */
void soft_read(struct engine *e, void *to, uintptr_t from, size_t bytes);
void soft_write(struct engine *e, uintptr_t to, const void *from, size_t bytes);

/* ---- deadline.c -------------------------------------------------------------------------------------------------- */

enum kill_cause { KILL_NONE, KILL_DEADLINE, KILL_CLOSE, KILL_CANCEL };

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

/* ---- run.c ------------------------------------------------------------------------------------------------------- */

#define LOCAL_BYTES ((size_t)64 << 10)
#define SCRATCHES 6

/* Written by its own thread unless said otherwise. */
struct engine {
    struct hmm_accessor accessor; /* first: what a kernel sees */
    struct world *world;
    void *owner; /* of whoever made the engine */
    int tid;
    const struct hmm_operation *operation;
    char *local;    /* LOCAL_BYTES, for operations */
    sigjmp_buf out; /* the way out of a job */
    struct hmm_job_status status;
    char message[160];
    struct bounce bounce; /* of the span */
    struct tlb *tlb;
    unsigned nhazards; /* words that may not be 0 */
    bool holding;      /* since soft_hold() */
    struct slot slots[OPERANDS];
    unsigned nwindows;
    struct window windows[WINDOWS];
    struct scratch {
        void *ptr;
        size_t bytes;
    } scratch[SCRATCHES]; /* of this job */
    unsigned nscratch;

    /* Read and written by others, all atomic. */
    char pad[64];
    uint64_t hazards[HAZARDS]; /* the pages in use; see access.c */
    uint64_t holds;            /* moves when all that was held is let go */
    uint32_t waiters;          /* threads that wait for hazards to go */
    uint32_t dropped;          /* futex: moves when hazards go while there are waiters */
    uint32_t generation;       /* of the job; see soft_engine_begin() */
    uint32_t deadline_ms;      /* of this job; 0: none. Written before generation */
    uint64_t kill;             /* generation << 8 | cause */
    uint64_t run;              /* counts jobs, for translations that hold for one job only */
    uint32_t in_user;          /* in the code of a kernel, where the signal may end it */
    char pad_end[64];
};

/* Memory comes from world.outside. NULL when there is none. */
struct engine *soft_engine_new(struct world *w, void *owner);
void soft_engine_free(struct engine *e);

/* A job is about to run: from here on soft_deadline_kill() with this generation hits it. No two jobs in a row have the same. Any
 * thread, while no job runs. */
void soft_engine_begin(struct engine *e, const struct hmm_operation *operation, uint32_t generation);
/* Runs it, on the engine's own thread; e->status says how it went. */
void soft_engine_run(struct engine *e, const struct hmm_operation *operation);

/* Leaves the job with e->status; does not return. Holds no lock. */
void soft_engine_throw(struct engine *e) __attribute__((noreturn));
/* Does not return when the job was asked to end. */
void soft_engine_check(struct engine *e);
/* Zeroed memory until the end of the job. Does not return when there is none. */
void *soft_engine_scratch(struct engine *e, size_t bytes);
/* Code of a kernel ends / begins on this thread. leave() does not return when the job was asked to end. */
void soft_engine_enter_driver(struct engine *e);
void soft_engine_leave_driver(struct engine *e);

/* Somebody waits for what is held. */
static inline bool soft_hold_wanted(const struct engine *e)
{
    return __builtin_expect(__atomic_load_n(&e->waiters, __ATOMIC_RELAXED) != 0, 0);
}

static inline bool soft_engine_runs_kernel(const struct engine *e)
{
    return e->operation->kind == HMM_OP_KERNEL;
}

/* ---- ops.c and text.c -------------------------------------------------------------------------------------------- */

/* Runs a built-in operation; errors leave through soft_engine_throw(). Returns its result. */
uint64_t soft_ops_run(struct engine *e, const struct hmm_operation *operation);
/* What messages call it. */
const char *soft_ops_name(uint32_t kind);

/* A message in a buffer of fixed size, without stdio. */
struct text {
    char *buf;
    size_t size, len;
};
void soft_text_str(struct text *t, const char *s);
void soft_text_dec(struct text *t, uint64_t n);
void soft_text_hex(struct text *t, uint64_t n);

#endif
