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

/*
 * The device behind a handle, for a program that uses this interface beside the driver: with a mirror of its own, to measure, to test. NULL
 * with a message: not open. Valid until hmm_device_close(), before which everything that was made with it has to be undone.
 */
HMM_API struct hmm_device *hmm_device_of(hmm_dev handle);

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
 * another pagemap's cpu_map is -EEXIST; missing or wrong fields -EINVAL. Undone by core when the device closes, or open() fails. */
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
     * hmm_pagemap_add(). On failure it has undone everything itself; hmm_fail() names the reason. What the program announces may not
     * be told before it has returned: no translation is read here. */
    int (*open)(struct hmm_device *dev, const union hmm_option_value *values, void **priv);

    /* A library thread; the program's, where open() gave no memory. First step of closing: refuse new jobs, complete those that it has with -ECANCELED (or their
     * result if they finish). On return no job is left; copy, clear and invalidate still work. */
    void (*stop)(void *priv);

    /* Program context, after stop(), when no page is left, no notifier callback runs and none will begin. Frees everything. */
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

/* What happens to the pages of an interval (kernel: enum mmu_notifier_event). */
enum hmm_event_type {
    HMM_EVENT_UNMAP, /* munmap, the old address of mremap, mapped over. By the wrapper, and by the kernel's event */
    HMM_EVENT_CLEAR, /* MADV_DONTNEED, FREE, REMOVE: contents dropped. By the wrapper, and by the kernel's event */
    HMM_EVENT_MIGRATE, /* pages change place, or may have: by migration, eviction and faults; by core where memory is registered anew.
                        * owner is the device that they go to or NULL */
    HMM_EVENT_PROTECTION_VMA,  /* mprotect: by the wrapper only, the kernel tells of none. Rights are to be asked for anew */
    HMM_EVENT_PROTECTION_PAGE, /* fork: while the child's copy is taken no device may write. By core */
    HMM_EVENT_SOFT_DIRTY, /* which pages a mirror has written is being collected: only that mirror's intervals, which must ask for
                           * the right to write again. By core */
    HMM_EVENT_RELEASE, /* the address space ends: exit, exec. Everything; by the wrapper. Stop all activity. A failed exec ends it,
                           * and the device may come back */
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
     * Empties the device page table in [start, end) and returns when the device can no longer touch those pages (all types: whoever
     * does not look at the type is right). Any library thread, or the thread of the program that makes the call; no core lock held,
     * under THE RULE. blockable: may wait for engines; else must return at once, -EAGAIN when it would have to wait (nothing need be
     * undone: a blockable call follows). brief: may block for locks and for messages, but not until a kernel or a job lets go of
     * the pages: -EAGAIN then. Any other non-zero return is reported with the callback's name and ignored. May run concurrently
     * with itself. One that does not return holds up whoever changes the memory, and is named in the log by who waits for it.
     */
    int (*invalidate)(struct hmm_notifier *n, const struct hmm_event *event);
    const char *name; /* of the callback, for messages; constant. NULL: its address alone is named */
};

/* Embedded in a driver's structure, in memory that does not migrate (hmm_mem_alloc()). Zeroed before the first insertion; from then on the
 * fields belong to core. */
struct hmm_notifier {
    struct hmm_notifier *link[3]; /* interval tree */
    uintptr_t max_end, left_end;
    uintptr_t start, end;
    uint64_t seq;   /* see hmm_notifier_seq() */
    uint64_t born;  /* number of its insertion: which invalidations began before it */
    uint32_t calls; /* callbacks running */
    uint32_t priority;
    struct hmm_device *dev; /* NULL: not inserted */
    const struct hmm_notifier_ops *ops;
};

/*
 * Inserts an interval [start, end), page aligned, not empty. Invalidations that began earlier are not delivered, but
 * hmm_notifier_read_begin() waits for them. Does not block, calls nothing. -EINVAL: empty, reversed (as a range that wraps is) or
 * not aligned, or no callback; -EEXIST: inserted already, by anyone: it stays as it is. Each with a message.
 * To be inserted *before* asking where pages of the interval are.
 */
HMM_API int hmm_notifier_insert(struct hmm_device *dev, struct hmm_notifier *n, uintptr_t start, uintptr_t end,
                                const struct hmm_notifier_ops *ops);
/*
 * Removes it and waits until no callback of it runs; then n belongs to the caller again, and hmm_notifier_read_retry() is true for
 * every number that was read before. Not under a lock that its callback takes. -ENOENT: not inserted, or removed already, or being removed by
 * another thread (which is not waited for). -EDEADLK: from inside its own callback, which cannot be waited for: nothing was done.
 * It waits as long as the callback runs, and says in the log which one that is: after one second, and then every ten.
 */
HMM_API int hmm_notifier_remove(struct hmm_notifier *n);

/* Whether a notifier of any device overlaps [start, end), so that a change there would be told to somebody. Does not block; any thread. */
HMM_API bool hmm_notifier_any(struct hmm_device *dev, uintptr_t start, uintptr_t end);

/* Waits until no invalidation of the interval is in progress and returns its sequence number, never 0. Not under driver locks that
 * the callback takes. 0 when n is not inserted: a number that is never current. */
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
 * Returns 0: it came to the device; ask hmm_range_fault() where it is, it may already have moved again: loop. Returns 1:
 * it stays in system memory; use the bus, now and not cached. The bus is right at any time, so it also ends a loop that
 * does not converge. -EFAULT: nothing mapped; -EACCES: protection forbids it; -EHWPOISON: its only copy was lost with a device.
 */
HMM_API int hmm_device_fault(struct hmm_device *dev, uintptr_t addr, unsigned flags);

/* What hmm_range_fault() says of a page. Without any of these bits the word is 0: not there (never touched, swapped, on another
 * device, on its way) and not asked for. */
#define HMM_PFN_VALID (1ull << 63) /* the device may read it; where it is: below */
#define HMM_PFN_WRITE (1ull << 62) /* and write it. Only with VALID */
#define HMM_PFN_ERROR (1ull << 61) /* asking for it will not help: nothing mapped, no right to read, lost */
#define HMM_PFN_DEVICE                                                                                                         \
    (1ull << 60) /* with VALID: in this device's memory, and the low bits are the device page (in the pagemap of
                                     * this device). Without: in system memory, the low bits are its process address / page size */
#define HMM_PFN_MASK ((1ull << 52) - 1)
#define HMM_PFN_ORDER_SHIFT 52
#define HMM_PFN_ORDER_MASK 0x1full
/* The page belongs to 2^order pages, aligned, that one large entry of the CPU's page table maps, or that are neighbours, aligned as well, in
 * device memory as they came; all have the same rights. 0: nothing known. Bits 57 to 59 are reserved. */
#define HMM_PFN_ORDER(pfn) ((unsigned)((pfn) >> HMM_PFN_ORDER_SHIFT & HMM_PFN_ORDER_MASK))

/* What is asked of hmm_range_fault(), per page or for all. */
#define HMM_PFN_REQ_FAULT HMM_PFN_VALID /* VALID, or an error */
#define HMM_PFN_REQ_WRITE HMM_PFN_WRITE /* together with REQ_FAULT: WRITE, too */

/* Only says what is in this device's memory; requests are not looked at, and a page that is elsewhere gives 0. For devices that reach
 * system memory over the bus, and ask hmm_device_fault() for the rest. System memory is neither looked at nor watched. */
#define HMM_RANGE_DEVICE_ONLY 1u
/* Watches shared and file-backed memory, too, as far as the kernel can, at the price of its fault-around (a first touch of the CPU gets
 * several times slower). Without it such memory is watched by the wrappers alone: a munmap() by a raw system call is not seen. */
#define HMM_RANGE_REGISTER 2u

/* Kernel: struct hmm_range. */
struct hmm_fault_range {
    uint32_t size;                 /* sizeof(struct hmm_fault_range) */
    uint32_t flags;                /* HMM_RANGE_* */
    struct hmm_notifier *notifier; /* of this device, inserted, covers [start, end) */
    uint64_t notifier_seq;         /* of hmm_notifier_read_begin() before the call */
    uintptr_t start, end;          /* page aligned, not empty; any length */
    uint64_t *pfns;                /* one per page; the library's or the driver's memory, never memory that can migrate */
    /* What is asked of page i: (pfns[i] & pfn_flags_mask) | default_flags, HMM_PFN_REQ_*. With a mask of 0 pfns need not be set. */
    uint64_t default_flags, pfn_flags_mask;
};

/*
 * Says where each page of [start, end) is and what the device may do there; brings the pages that are asked for to where they have an
 * address: never touched or swapped ones into system memory, those on another device home; those on this device stay there. It migrates
 * nothing to the device: hmm_device_fault() does. 0: every page that was asked for is VALID (and WRITE); the answer holds while
 * hmm_notifier_read_retry(notifier, notifier_seq) is false: to be looked at, and the answer used, under the lock that the callback
 * takes. (Kernel: mm/hmm.c. What is in system memory may come to *this* device without an invalidation, as its own migrations do not
 * invalidate it: the process address then still is right, and brings it back when it is used.)
 *
 * WRITE: the mapping allows writing, and the page is not one that a write would replace (the zero page, a private file's). A page shared
 * since a fork counts as writable: it is replaced under its address when the device writes there.
 *
 * The same notifier may be in use by several threads. Engine or program context, no locks; blocks (page faults of any kind). Stops at the
 * first page that fails:
 *   -EBUSY      invalidated since notifier_seq was read: read_begin, and again
 *   -EFAULT     asked for a page where nothing is mapped, that may not be read, or that cannot be given (behind the end of its file)
 *   -EPERM      asked for the right to write what is mapped read-only
 *   -EHWPOISON  asked for a page whose only copy was lost
 *   -EINVAL     the structure is wrong; with a message
 *   -ENOMEM     no system memory
 * After an error pfns holds the requests as before (bits of pfn_flags_mask; not with HMM_RANGE_DEVICE_ONLY), and nothing else of meaning.
 * Every error sets a message.
 */
HMM_API int hmm_range_fault(struct hmm_device *dev, struct hmm_fault_range *range);
/*
 * The same with read_begin before, sets notifier_seq, and again after -EBUSY, until timeout_ns have passed: -ETIMEDOUT. -1: for ever. Not
 * under a lock that the callback takes. Page faults are not interrupted: only the repetitions, and waiting for invalidations, end.
 * (Kernel: hmm_range_fault_unlocked_timeout().)
 */
HMM_API int hmm_range_fault_timeout(struct hmm_device *dev, struct hmm_fault_range *range, int64_t timeout_ns);
#define HMM_RANGE_DEFAULT_TIMEOUT_NS 1000000000ll

/* The bus: reads or writes system memory at a process address as a device would (kernel: process_vm_readv). Faults CPU pages
 * in, so a page on any device comes home. Returns bytes done (> 0), -EFAULT when the first byte is unmapped or protected, -EHWPOISON
 * when its only copy was lost with a device. */
HMM_API int64_t hmm_bus_read(struct hmm_device *dev, uintptr_t addr, void *buf, size_t len);
HMM_API int64_t hmm_bus_write(struct hmm_device *dev, uintptr_t addr, const void *buf, size_t len);

/* ---- mirrors (kernel: struct hmm_mirror of HMM v8, and what mm/hmm.c left to drivers) -------------------------------- */

/*
 * A mirror is a device's view of the address space: a page table that core keeps for the driver. Core fills it with the retry loop,
 * empties it when the address space changes, and bounds its memory; the driver asks for translations and says when its device has let
 * go of them.
 *
 * The table is made of directories of 2 MiB (one block of core, HMM_MIRROR_DIR bytes, aligned), each with an interval notifier over
 * exactly its range and a lock of its own. Directories are made as they are needed and used again for other ranges, but never freed
 * before the mirror is: what a run points to can be read as long as somebody has a reference to the mirror.
 *
 * A device may have several mirrors; they know nothing of each other.
 *
 * A thread that calls these, as anything that takes locks of core, stands on a stack that does not migrate. What it passes for answers may:
 * it is written when no lock is held.
 *
 * Every call that takes a mirror: -ESRCH in a child of fork of the process that registered it (without touching the mirror, whose
 * memory is not there); -ENODEV when it was unregistered. Except where said, no locks of the driver that one of its operations
 * takes, and nothing held that invalidate() waits for. Calls that may block say so.
 */
struct hmm_mirror;
struct hmm_mirror_dir;

#define HMM_MIRROR_DIR ((uintptr_t)2 << 20)

/* Entries: bits, and in the low bits (HMM_PFN_MASK) a page number: of the device with DEVICE, else process address >> page shift. After
 * dma_map(), what that put there. As HMM_PFN_* where both have a bit. */
#define HMM_MIRROR_VALID (1ull << 63)
#define HMM_MIRROR_WRITE (1ull << 62)  /* may be written */
#define HMM_MIRROR_DEVICE (1ull << 60) /* in this device's memory */
#define HMM_MIRROR_DIRTY (1ull << 59)  /* was written, or may have been: see hmm_mirror_collect_dirty() */
#define HMM_MIRROR_SELECT (1ull << 58) /* the driver's own; goes with the translation */

/* What the device has to let go of, or to answer for: a part of one directory. */
struct hmm_mirror_change {
    uintptr_t start, end;
    const struct hmm_event *event; /* its range may be larger */
    /* How many times runs of this directory had been handed out (by resolve, lookup and walks) when its entries were emptied; never
     * falls. None that is handed out later is older than the change. */
    uint64_t given;
    uint64_t *word; /* of this directory, for the driver: atomic, not touched by core; 0 when the directory was made */
};

struct hmm_mirror_ops {
    uint32_t size;    /* sizeof(struct hmm_mirror_ops) */
    const char *name; /* of invalidate(), for messages; constant. NULL: the driver's */
    /*
     * The entries of the range are emptied and no run of it is current. Returns when the device can no longer touch those pages.
     * Context, blockable, brief and errors: as of hmm_notifier_ops.invalidate. May run concurrently with itself, for other ranges or the
     * same. Called for every invalidation of a directory that exists, whether entries were there or not: a run that was handed out
     * before may still be in use. Also brief, when core would like to use the directory for another range, and -EAGAIN then leaves it.
     * Required.
     */
    int (*invalidate)(void *priv, const struct hmm_mirror_change *change);
    /*
     * Stop all activity through this mirror. Called once, whichever is first: hmm_mirror_unregister(), hmm_device_close() (after
     * stop(), before pages are brought home), hmm_device_lost(). Whatever an invalidate() returned. May block as invalidate() may;
     * from hmm_device_lost() it is called by a library thread, soon. invalidate() may be called meanwhile and afterwards. May be NULL.
     */
    void (*release)(void *priv);
    /* The last reference is gone, and no other operation runs or will: nothing is called after it. The context of the last put. May be
     * NULL. */
    void (*free)(void *priv);
    /*
     * An entry is about to be published: may replace its low bits by what the device's bus calls that page. A negative errno refuses it:
     * the entry stays empty, and resolve says 1 (use the bus) until the directory is read again. Under the directory's lock: does not
     * block, calls nothing that takes a mirror. May be NULL.
     *
     * What stands there is used until invalidate() has let go of it. A page of system memory (only with HMM_MIRROR_SYSTEM) may come to
     * this device meanwhile, whose own migrations invalidate nothing. So what the bus calls it must reach it as its process address
     * does, with page faults that bring it back; or dma_map() has pinned it where it is, and it does not migrate.
     */
    int (*dma_map)(void *priv, uintptr_t addr, uint64_t *entry);
    /* Takes back what a dma_map() that returned 0 made; once for each, with what it put there, and HMM_MIRROR_DEVICE as it was: when the
     * entry is emptied, which is after invalidate() has returned 0 where there was one. The same context. May be NULL. */
    void (*dma_unmap)(void *priv, uintptr_t addr, uint64_t entry);
    /* Instead of hmm_device_fault(), with its contract; it may call that. No locks. NULL: hmm_device_fault(). */
    int (*fault)(void *priv, uintptr_t addr, unsigned flags);
};

/* Core notes what is handed out for writing: runs for writing are of one page, or of pages that are dirty already. */
#define HMM_MIRROR_TRACK_DIRTY 1u
/* For devices that reach system memory by process addresses, and may cache them: the table has entries of system pages, too, and resolve
 * brings pages to where they have an address (hmm_range_fault()) instead of to the device (ops.fault is not called). */
#define HMM_MIRROR_SYSTEM 2u

struct hmm_mirror_desc {
    uint32_t size; /* sizeof(struct hmm_mirror_desc) */
    uint32_t flags;
    const struct hmm_mirror_ops *ops; /* stays valid until free() has returned */
    void *priv;                       /* for ops */
    uint32_t directories;             /* bound of the table, of 2 MiB each; 0: chosen by the device's memory */
    uint32_t reserved;                /* 0 */
};

/* Makes a mirror of the address space for the device, with one reference: the registration's. The device is open or opening; after
 * hmm_pagemap_add(), or directories given. Program context. -EINVAL, -ENOMEM with message; *m only on success. */
HMM_API int hmm_mirror_register(struct hmm_device *dev, const struct hmm_mirror_desc *desc, struct hmm_mirror **m);
/*
 * Ends it: calls that run end or return -ENODEV, release() is called if it was not, everything is invalidated (HMM_EVENT_MIGRATE) and no
 * invalidate() comes any more; then the registration's reference is put. To be called at the latest by the driver's close(). Blocks.
 * -EDEADLK: from inside an operation of this mirror, or a callback of a walk; nothing was done. -ENODEV: unregistered already (the
 * caller has a reference).
 */
HMM_API int hmm_mirror_unregister(struct hmm_mirror *m);
/* References keep the structure, and what runs point to, not the view: it may end before (-ENODEV), and the device may be closed. Any
 * context. get: the caller has one, or the registration's cannot end meanwhile. */
HMM_API void hmm_mirror_get(struct hmm_mirror *m);
HMM_API void hmm_mirror_put(struct hmm_mirror *m);

/* Pages that lie together on the device (or in system memory) with the same rights, within one directory. */
struct hmm_mirror_run {
    uintptr_t start, end; /* of the process */
    uint64_t page;        /* of start: the low bits of its entry; the others follow */
    uint64_t flags;       /* HMM_MIRROR_VALID, _WRITE, _DEVICE: of all pages. From a walk also _DIRTY, _SELECT */
    /*
     * The run may be used, and cached, as long as both words are what they were; look at them, in any order, *after* the use is visible
     * to invalidate(), with sequential consistency. seq moves when an invalidation of the directory begins; generation when the
     * directory is used for another range, or the mirror changes itself.
     */
    const uint64_t *seq;
    uint64_t seq_seen;
    const uint32_t *generation;
    uint32_t generation_seen;
    uint32_t gate; /* *hmm_event_gate() before the run was read */
};

/*
 * The slow path of a translation: look up; where there is nothing, fault the page (ops.fault) and read the directory again, as often as
 * it takes. 0: *run contains addr. 1: the page stays in system memory, or changes too often, or there is no directory to spare: use the
 * bus, now and not cached. Else as hmm_device_fault(). flags: HMM_FAULT_READ or HMM_FAULT_WRITE. Engine context, as that; blocks.
 */
HMM_API int hmm_mirror_resolve(struct hmm_mirror *m, uintptr_t addr, unsigned flags, struct hmm_mirror_run *run);
/* Only what the table has: 0, or -ENOENT. Takes the directory's lock, does not block otherwise, asks nobody. */
HMM_API int hmm_mirror_lookup(struct hmm_mirror *m, uintptr_t addr, unsigned flags, struct hmm_mirror_run *run);

/* Calls fn for each run of [start, end), page aligned, that the table has and of which every entry has all bits of `bits` (0: VALID),
 * in ascending order; runs are cut at start and end and where DIRTY or SELECT change. A directory is read at one moment; fn runs without
 * locks. Runs that the device is just asked to let go of are not current. With HMM_MIRROR_TRACK_DIRTY WRITE only of what is dirty.
 * Stops when fn returns non-zero, and returns that. -EINVAL, -ENOMEM. */
HMM_API int hmm_mirror_walk(struct hmm_mirror *m, uintptr_t start, uintptr_t end, uint64_t bits,
                            int (*fn)(const struct hmm_mirror_run *run, void *arg), void *arg);

/* Changes DIRTY and SELECT of [start, end), page aligned: first those of `clear`, then those of `set`. SELECT only of valid
 * entries. DIRTY also where there are none (the device wrote over the bus), for which directories are made: -ENOSPC when there is
 * none to spare. May be called while invalidate() waits for the caller, of pages that it holds: a driver that marks what its device wrote
 * does so before it lets go. Where a directory may have to be made, like resolve: it waits for others that are made or given up, and so for
 * invalidate(). With HMM_MIRROR_TRACK_DIRTY do not clear DIRTY of what the device may be writing: collecting asks only for what is dirty.
 * -EINVAL. */
HMM_API int hmm_mirror_mark(struct hmm_mirror *m, uintptr_t start, uintptr_t end, uint64_t set, uint64_t clear);

/*
 * Takes the dirty bits of [start, end), page aligned: bit i of dirty[] (of 64 each, room for all pages; written whole) says that page i
 * was written through the mirror since it was last collected, as far as marked. The device lets go of the range first
 * (HMM_EVENT_SOFT_DIRTY to this mirror's invalidate() alone) and has to ask again: no write is missed, and none is in two collections.
 * Dirty bits stay when pages change place, and go with their content (UNMAP, CLEAR); directories that have them are not used for
 * another range. mremap() is an UNMAP of the old address: what was written there is not collected at the new one, so who follows memory
 * takes all of what appears at an address as written. Returns the number of pages. Blocks. -EINVAL.
 */
HMM_API int64_t hmm_mirror_collect_dirty(struct hmm_mirror *m, uintptr_t start, uintptr_t end, uint64_t *dirty);

/* The device lets go of [start, end), page aligned (HMM_EVENT_MIGRATE to this mirror's invalidate() alone); all bits are gone, and
 * directories that lie in the range as a whole are free for others. The pages stay where they are. Blocks. -EINVAL. */
HMM_API int hmm_mirror_discard(struct hmm_mirror *m, uintptr_t start, uintptr_t end);

struct hmm_mirror_info {
    uint32_t directories, directories_max; /* in use, and bound */
    uint64_t valid, dirty, selected;       /* entries */
    uint64_t filled;                       /* directories read so far */
};
/* Exact if nothing else goes on. */
HMM_API int hmm_mirror_info(struct hmm_mirror *m, struct hmm_mirror_info *info);

/*
 * For devices without faults, which need to know where a range is as a whole, at one moment. A directory that is kept stays one of its
 * range: the one at addr, made if need be. -ENOSPC: all are kept, dirty or in use, or it is no address of the process.
 */
HMM_API int hmm_mirror_dir_get(struct hmm_mirror *m, uintptr_t addr, struct hmm_mirror_dir **dir);
HMM_API void hmm_mirror_dir_put(struct hmm_mirror_dir *dir);
/* Reads the entries of [start, end), within the directory, anew from core. They hold as long as hmm_mirror_dir_seq() is *seq and
 * invalidate() has not been called for them: take that and what it protects under a lock that invalidate() takes. Waits while an
 * invalidation is in progress, or the mirror has its device let go. With HMM_MIRROR_TRACK_DIRTY WRITE only of what is dirty: mark first.
 * -EINVAL, -ENOMEM, -EAGAIN: it changes too often. */
HMM_API int hmm_mirror_dir_read(struct hmm_mirror_dir *dir, uintptr_t start, uintptr_t end, uint64_t *entries, uint64_t *seq);
HMM_API uint64_t hmm_mirror_dir_seq(const struct hmm_mirror_dir *dir);

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
