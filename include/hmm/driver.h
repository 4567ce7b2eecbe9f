/* SPDX-License-Identifier: MIT */
/*
 * The driver interface: what a device must provide, and what the core provides to it.
 *
 * THE RULE for driver code that a CPU fault may wait for (copy, clear, invalidate, and everything an engine does between
 * taking a job and finishing it): never call the C library's allocator or stdio, never touch the program's memory through
 * its own address, never wait for an application thread. An application thread may hold the allocator's lock while it waits
 * for the page that this code brings. Use hmm_mem_alloc() for memory and hmm_bus_read()/hmm_bus_write() for system pages.
 *
 * Threads of a driver are made with hmm_thread_start(): signals blocked, descriptors of the program not visible.
 */
#ifndef HMM_DRIVER_H
#define HMM_DRIVER_H

#include <hmm/hmm.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HMM_DRIVER_ABI 1u

struct hmm_device;   /* core's object for an open device */
struct hmm_notifier; /* below */

/* ---- memory, threads, messages for drivers ----------------------------------------------------------------------- */

/* Zeroed memory from the library's own mappings (never managed, not inherited by fork). NULL when there is none. Does not
 * fault on managed memory; takes the allocator lock (innermost). bytes > 0. */
HMM_API void *hmm_mem_alloc(size_t bytes);
HMM_API void hmm_mem_free(void *ptr, size_t bytes); /* bytes as allocated; NULL allowed */

struct hmm_thread;
/* Starts a library thread: all signals blocked, private descriptor table, `name` up to 15 bytes. -EAGAIN, -ENOMEM.
 * Application context (open) only: it waits until the thread runs. */
HMM_API int hmm_thread_start(struct hmm_thread **thread, const char *name, void (*fn)(void *), void *arg);
/* Waits for its end and frees it. */
HMM_API void hmm_thread_join(struct hmm_thread *thread);

/* Logs one line through the program's callback. Allowed anywhere, also under THE RULE (lines pass through a ring). */
HMM_API void hmm_log(enum hmm_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Sets hmm_last_message() of this thread and returns err: `return hmm_fail(-EINVAL, "soft: ...")`. */
HMM_API int hmm_fail(int err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* ---- fences and jobs --------------------------------------------------------------------------------------------- */

/* Completes a fence that core passed to copy() or clear(): status 0 or negative errno. Exactly once, from any thread. */
HMM_API void hmm_fence_signal(hmm_fence *fence, int status);

struct hmm_job_status;

/*
 * A job as the driver gets it: its fences to wait for are done, its turn has come. Owned by the driver from a successful submit()
 * until hmm_job_done(). Everything that it points to belongs to the job.
 */
struct hmm_job {
    /* As submitted. KERNEL: `kernel` is set if it could be found in this process; with HMM_ENGINES_NAMED object and symbol are
     * set; arg is the copied argument block, 16-byte aligned; deadline_ms is not 0. */
    struct hmm_operation operation;
    /* The process memory that it uses, whole: of operations, what they say; of kernels, what the launch says. */
    const struct hmm_range *ranges;
    uint32_t nranges;
    int32_t priority;     /* enum hmm_priority; already obeyed */
    hmm_fence *fence;     /* for display only; completed through hmm_job_done() */
    struct hmm_job *next; /* free for the driver's queue */
    void *driver[2];      /* free for the driver */
    /* For drivers that wrap others, NULL else: hmm_job_done() sets it to NULL and calls it instead of completing the job, which is
     * the wrapper's again until it calls hmm_job_done() itself, later or there. */
    void (*done)(struct hmm_job *job, const struct hmm_job_status *status);
    void *wrapper; /* for done */
};

struct hmm_job_status {
    int32_t status; /* 0 or negative errno */
    uint64_t result;
    uintptr_t address;   /* where the error is about an address */
    const char *message; /* copied; may be NULL */
};

/* Completes the job's fence and frees the job. Exactly once per job. May call submit() with the next one before it returns: no
 * driver lock that submit() takes may be held. */
HMM_API void hmm_job_done(struct hmm_job *job, const struct hmm_job_status *status);

#define HMM_ENGINES_NAMED 1u /* kernels run elsewhere: they must have names */

struct hmm_engines_desc {
    uint32_t size;  /* sizeof(struct hmm_engines_desc) */
    uint32_t slots; /* how many jobs submit() takes before one is done, 1..65536; core keeps the others */
    uint32_t flags; /* HMM_ENGINES_* */
    uint32_t reserved;
};
/* Says how the device runs jobs. From open(), by drivers with submit(); without it: one slot, no flags. -EINVAL. */
HMM_API int hmm_engines_add(struct hmm_device *dev, const struct hmm_engines_desc *desc);

/* ---- device memory (kernel: struct dev_pagemap) ------------------------------------------------------------------ */

enum hmm_pagemap_type { HMM_PAGEMAP_PRIVATE = 1 }; /* coherent, generic, fsdax, p2p: refused with -EINVAL for now */

struct hmm_pagemap_ops {
    /* A page (index in the pagemap) has no user any more. Called once per page, in any library thread, under no lock but
     * possibly while a CPU fault waits; may be NULL. priv: as the pagemap was added with. */
    void (*page_free)(void *priv, uint64_t page);
};

struct hmm_pagemap_desc {
    enum hmm_pagemap_type type;
    uint64_t pages; /* of hmm_page_size(); > 0 */
    void *cpu_map;  /* where the process sees this memory (like a mapped BAR), or NULL. Never a program mapping. When set,
                        * core may read single pages straight from it for CPU faults */
    const struct hmm_pagemap_ops *ops; /* may be NULL */
    void *priv;                        /* for ops */
    uint64_t granule; /* bytes that faults of either side bring at least, aligned: a power of two, hmm_page_size() .. 2 MiB; 0:
                       * hmm_page_size() */
};

/* Gives device memory to core. From open() only. One pagemap per device for now (-EBUSY for a second); overlap with
 * another pagemap's cpu_map is -EEXIST; missing or wrong fields -EINVAL. Undone by core when the device closes. */
HMM_API int hmm_pagemap_add(struct hmm_device *dev, const struct hmm_pagemap_desc *desc);

/*
 * References of the driver to device pages [page, page + count): as long as there is one, the page is not freed, whatever happens to
 * the address that it stood for, and hmm_device_close() waits. It keeps no page at its address. Take one only where the page
 * cannot go away: under the lock that invalidate() takes, with the sequence number unchanged. hmm_page_put(): no driver lock that
 * page_free() takes. Any thread; neither blocks.
 */
HMM_API void hmm_page_get(struct hmm_device *dev, uint64_t page, uint64_t count);
HMM_API void hmm_page_put(struct hmm_device *dev, uint64_t page, uint64_t count);

enum hmm_loss {
    HMM_LOST_ENGINES, /* no job runs any more; copy() still works, so every page comes home */
    HMM_LOST_MEMORY,  /* what only the device had is gone: touching it is SIGBUS, never zeros */
};
/*
 * The device is gone or broken. Jobs that core still keeps end with -ENODEV and the reason, no new ones are taken, and no page
 * migrates to it. The driver completes those that it has, and goes on to serve invalidate(); with HMM_LOST_MEMORY copy() and
 * clear() are not called again. Any thread, no locks; does not block. Once; later calls can only make it worse.
 */
HMM_API void hmm_device_lost(struct hmm_device *dev, enum hmm_loss loss, const char *reason);

/* ---- the operations ---------------------------------------------------------------------------------------------- */

enum hmm_dma_kind { HMM_DMA_TO_DEVICE, HMM_DMA_TO_SYSTEM };

/* One contiguous piece of a copy. host is library staging memory, resident or fresh (fresh pages appear as they are
 * written); it does not fault on managed memory and stays valid until the fence. */
struct hmm_dma {
    uint64_t page;  /* first device page */
    uint64_t pages; /* count */
    void *host;
};

enum hmm_option_type {
    HMM_OPTION_SIZE,   /* a number with K, M, G or T (powers of 1024) */
    HMM_OPTION_UINT,   /* a number */
    HMM_OPTION_STRING, /* anything without ',' */
    HMM_OPTION_FLAG,   /* the bare word: number is 1; absent: 0. No fallback */
    HMM_OPTION_CHOICE, /* one of the words in `choices`; number is its place there */
    HMM_OPTION_SPEC,   /* a device spec: takes the rest of the words, commas and all. The last option of a driver */
};

/* A word of the device spec. */
struct hmm_option {
    const char *name;
    enum hmm_option_type type;
    const char *fallback; /* value when the word is absent; NULL (not for FLAG): it must be given */
    uint64_t min, max;    /* SIZE and UINT */
    const char *help;
    const char *choices; /* CHOICE: "fault|resident|register" */
};

union hmm_option_value {
    uint64_t number;
    char string[128];
};

/*
 * All slots but `options`, `submit` and `cancel` are required. `priv` is what open() stored.
 */
struct hmm_driver {
    uint32_t size; /* sizeof(struct hmm_driver) */
    uint32_t abi;  /* HMM_DRIVER_ABI */
    const char *name;
    const char *description;
    const struct hmm_option *options; /* ends with name == NULL; NULL: none. Checked by core before open() */

    /* Program context; may block, may allocate from the C library. values: one per option, in order. Calls
     * hmm_pagemap_add(). On failure it has undone everything itself; hmm_fail() names the reason. */
    int (*open)(struct hmm_device *dev, const union hmm_option_value *values, void **priv);

    /* Program context, signals blocked. First step of closing: refuse new jobs, complete those that it has with -ECANCELED (or their
     * result if they finish). On return no job is left; copy, clear and invalidate still work. */
    void (*stop)(void *priv);

    /* Program context, after stop(), when no page and no notifier callback is left. Frees everything. */
    void (*close)(void *priv);

    /* Copies n pieces asynchronously and signals the fence when all are done. Any library thread, no lock held, under THE
     * RULE. May block for queue space, not for jobs. The vector is valid until the fence. A negative return means: nothing
     * was started and the fence is not consumed. -EIO, -ENOMEM, -ENODEV. */
    int (*copy)(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence);

    /* The same, zeroing n pieces; host is ignored. */
    int (*clear)(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence);

    /* Takes a job; core has counted the slots. Any thread, no lock held, under THE RULE; must not block. A negative return
     * completes the job with it: -ENODEV stopped or lost, -EOPNOTSUPP not this operation, -EIO. NULL: the device runs no jobs (a
     * memory tier). */
    int (*submit)(void *priv, struct hmm_job *job);

    /* Asks a job that submit() took to end soon with this status (-ECANCELED, -ETIMEDOUT) and message: drop it if it did not begin,
     * end it if it runs. The job stays valid during the call, but may be done already: then nothing. Repeated every 20 ms until
     * hmm_job_done(). A library thread, no lock held, under THE RULE; must not block. NULL: jobs cannot be ended early. */
    void (*cancel)(void *priv, struct hmm_job *job, int status, const char *message);
};

/* The drivers linked into this library, ends with NULL. Defined by drivers/builtin.c. */
extern const struct hmm_driver *const hmm_builtin_drivers[];

/* A driver in a shared object of its own, libhmm-NAME.so, exports it under this name: HMM_DRIVER_EXPORT = { ... };  The file must
 * be linked against libhmm.so, not libhmm.a. */
#define HMM_DRIVER_SYMBOL "hmm_driver_entry"
#define HMM_DRIVER_EXPORT                                                                                                      \
    extern __attribute__((visibility("default"))) const struct hmm_driver hmm_driver_entry;                                    \
    const struct hmm_driver hmm_driver_entry

#define HMM_OPTIONS_MAX 16 /* of a driver */

/* For drivers that wrap others: finds and checks what a spec names, as hmm_device_open() does. values has room for
 * HMM_OPTIONS_MAX. The wrapper then calls the other's open() with its own device: memory, notifiers and faults of the one are those
 * of the other. Program context; -EINVAL, -ENODEV, -ENOEXEC with message. */
HMM_API int hmm_driver_find(const char *spec, const struct hmm_driver **driver, union hmm_option_value *values);

/* ---- notifiers (kernel: struct mmu_interval_notifier) ------------------------------------------------------------ */

enum hmm_event_type {
    HMM_EVENT_UNMAP,   /* munmap, mremap away, mapped over */
    HMM_EVENT_CLEAR,   /* MADV_DONTNEED / FREE: contents dropped */
    HMM_EVENT_MIGRATE, /* pages change place; owner is the device that they go to or NULL */
};

struct hmm_event {
    uintptr_t start, end; /* page aligned */
    enum hmm_event_type type;
    struct hmm_device *owner; /* MIGRATE: its own notifiers are not called */
    bool blockable;
    bool brief; /* only with blockable */
};

struct hmm_notifier_ops {
    /*
     * Empties the device page table in [start, end) and returns when the device can no longer touch those pages. Any library
     * thread, no core lock held, under THE RULE. blockable: may wait for engines; else must return at once, -EAGAIN when it
     * would have to wait (nothing need be undone: a blockable call follows). brief: may block for locks and for messages, but not
     * until a kernel or a job lets go of the pages: -EAGAIN then. Any other non-zero return is reported with the
     * callback's name and ignored. May run concurrently with itself.
     */
    int (*invalidate)(struct hmm_notifier *n, const struct hmm_event *event);
};

/* Embedded in a driver's structure. Fields belong to core. */
struct hmm_notifier {
    struct hmm_notifier *link[3]; /* interval tree */
    uintptr_t max_end;
    uintptr_t start, end;
    uint64_t seq;   /* see hmm_notifier_seq() */
    uint64_t born;  /* number of its insertion: which invalidations began before it */
    uint32_t calls; /* callbacks running */
    uint32_t priority;
    struct hmm_device *dev;
    const struct hmm_notifier_ops *ops;
};

/*
 * Inserts an interval [start, end), page aligned, not empty. Invalidations that began earlier are not delivered, but
 * hmm_notifier_read_begin() waits for them. Does not block. -EINVAL.
 * To be inserted *before* asking where pages of the interval are.
 */
HMM_API int hmm_notifier_insert(struct hmm_device *dev, struct hmm_notifier *n, uintptr_t start, uintptr_t end,
                                const struct hmm_notifier_ops *ops);
/* Removes it and waits until no callback of it runs. Not from its own callback; not under a lock that its callback takes. */
HMM_API void hmm_notifier_remove(struct hmm_notifier *n);

/* Waits until no invalidation of the interval is in progress and returns its sequence number. Not under driver locks that
 * the callback takes. */
HMM_API uint64_t hmm_notifier_read_begin(struct hmm_notifier *n);
/* True when an invalidation of the interval began since read_begin: start over. Call it, and publish the device page table
 * entries if it says false, under the lock that the invalidate callback takes. */
HMM_API bool hmm_notifier_read_retry(const struct hmm_notifier *n, uint64_t seq);

/* The sequence number now, an acquire load: moves at the very start of every invalidation of the interval, before munmap() or
 * madvise() of the program can be seen to have returned. A translation cached with an older number must not be used. */
static inline uint64_t hmm_notifier_seq(const struct hmm_notifier *n)
{
    return __atomic_load_n(&n->seq, __ATOMIC_SEQ_CST);
}

/* Odd while core is reading address-space events that are not applied yet. A device that translates while jobs run checks it
 * before it uses a cached translation; odd: hmm_event_sync() first. Never NULL; valid while the device is open. */
HMM_API const uint32_t *hmm_event_gate(struct hmm_device *dev);
/* A descriptor of the page that begins with it, which can only be mapped for reading: for a device whose engines are another
 * process. Valid in library threads, while the device is open. The number itself says something, too: after every event it is
 * another one. Reading faults of the CPU makes it odd for a moment and leaves no trace. */
HMM_API int hmm_event_gate_fd(struct hmm_device *dev);
/* Waits until every event read so far is applied (sequence numbers moved). Short; no locks held. */
HMM_API void hmm_event_sync(struct hmm_device *dev);

/* ---- device faults (kernel: hmm_range_fault, migrate_vma) -------------------------------------------------------- */

#define HMM_FAULT_READ 0u
#define HMM_FAULT_WRITE 1u

/*
 * Resolves a device page fault at addr: brings the page, and as many neighbours as policy finds useful, to the device's
 * memory, making room if needed; or leaves it in system memory where it cannot move. Engine context, no locks, blocks.
 * Returns 0: it came to the device; ask hmm_range_snapshot() where it is, it may already have moved again: loop. Returns 1:
 * it stays in system memory; use the bus, now and not cached. The bus is right at any time, so it also ends a loop that
 * does not converge. -EFAULT: nothing mapped; -EACCES: protection forbids it; -EHWPOISON: its only copy was lost with a device.
 */
HMM_API int hmm_device_fault(struct hmm_device *dev, uintptr_t addr, unsigned flags);

/* Entries of a snapshot. */
#define HMM_PFN_VALID (1ull << 63) /* in this device's memory; the low bits are the device page */
#define HMM_PFN_WRITE (1ull << 62) /* the device may write */
#define HMM_PFN_MASK ((1ull << 52) - 1)

/*
 * Says where the pages of [start, end) are: pfns[0 .. (end-start)/page). The range lies within one 2 MiB block. Pages that
 * are not in this device's memory, and those in transit, give 0: ask hmm_device_fault(). The answer holds while the sequence number of a notifier over the range, taken before, holds.
 */
HMM_API int hmm_range_snapshot(struct hmm_device *dev, uintptr_t start, uintptr_t end, uint64_t *pfns);

/* The bus: reads or writes system memory at a process address as a device would (kernel: process_vm_readv). Faults CPU pages
 * in, so a page on any device comes home. Returns bytes done (> 0), -EFAULT when the first byte is unmapped or protected, -EHWPOISON
 * when its only copy was lost with a device. */
HMM_API int64_t hmm_bus_read(struct hmm_device *dev, uintptr_t addr, void *buf, size_t len);
HMM_API int64_t hmm_bus_write(struct hmm_device *dev, uintptr_t addr, const void *buf, size_t len);

/* ---- user kernels ------------------------------------------------------------------------------------------------ */

/* What a driver that runs user kernels puts at the start of its accessor. span() returns the mapping or does not return. */
struct hmm_accessor {
    void *(*span)(hmm_accessor *acc, uintptr_t addr, size_t *len, bool write);
    void (*yield)(hmm_accessor *acc);
};

#ifdef __cplusplus
}
#endif
#endif
