/* SPDX-License-Identifier: MIT */
/*
 * libhmm: heterogeneous memory management in user space.
 *
 * A device computes on this process's own pointers. Pages migrate to its memory when it touches them and come back when
 * the CPU touches them. There is one manager per process; it starts with the first hmm_device_open() and ends with the
 * last hmm_device_close(). Without an open device the library owns no thread, no descriptor and no managed range.
 *
 * Conventions, valid for every function below unless its comment says otherwise:
 *  - Returns 0 (or a count) on success and a negative errno on failure. Outputs are written only on success.
 *  - After a failure hmm_last_message() holds one line for this thread that names the thing, the reason and the remedy.
 *  - Safe in any thread. Not async-signal-safe. May block; never call one while holding a lock that a log callback takes.
 *  - In a child made by fork(), handles of the parent give -ESRCH; the child may open devices of its own. It
 *    has a copy of its own, in system memory, of what was on devices; fork() returns in the parent when it has it (docs/api.md).
 *  - Sizes are bytes. Addresses need no alignment; migration rounds a range *inwards or outwards* as stated per call.
 *  - The library never prints, never aborts, installs no signal handler, interposes no symbol. The `soft` driver uses one
 *    real-time signal while a device of it is open (see docs/soft.md).
 */
#ifndef HMM_HMM_H
#define HMM_HMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HMM_VERSION_MAJOR 0
#define HMM_VERSION_MINOR 1
#define HMM_VERSION_PATCH 0

#define HMM_API __attribute__((visibility("default")))

/* "0.1.0". Static storage. */
HMM_API const char *hmm_version(void);

/* A short English text for a negative errno as libhmm uses it. Static storage; never NULL. Async-signal-safe. */
HMM_API const char *hmm_strerror(int err);

/* The detailed message of the last failed call of this thread; "" when there was none. Valid until this thread's next
 * libhmm call. */
HMM_API const char *hmm_last_message(void);

enum hmm_log_level { HMM_LOG_ERROR, HMM_LOG_WARNING, HMM_LOG_INFO, HMM_LOG_DEBUG };

/* Receives one line, without newline. Called from a library thread that holds no lock, or from the thread that is inside a
 * libhmm call; may allocate, print and touch managed memory, must not call libhmm. */
typedef void (*hmm_log_fn)(enum hmm_log_level level, const char *line, void *arg);

/* Sets (or with NULL clears) the log callback. Returns when no old callback is running any more. */
HMM_API void hmm_set_log(hmm_log_fn fn, void *arg);

/* Settings of the manager. Zero means default. */
struct hmm_config {
    uint32_t size; /* sizeof(struct hmm_config) */
    uint32_t
        fault_workers; /* threads for CPU faults that wait for copies, and as many that wait for devices; default 4, 1..64 */
    uint64_t staging_bytes; /* bound of system memory used in transit; default 32 MiB, 4 MiB..1 GiB, rounded to blocks */
    uint64_t seed;          /* of injection and policy; default from the clock, logged */
    const char *debug;      /* comma-separated: validate (audit after each migration call, violations
                             * are logged), inject[=per-mille] (calls fail), delay[=per-mille] (locks and steps of the protocol take
                             * longer), patience=ms (instead of the 10 s for which closing and limits wait while nothing moves);
                             * default: environment HMM_DEBUG */
};

/* Takes effect at the next manager start. -EBUSY while a device is open, -EINVAL for a value out of range. */
HMM_API int hmm_configure(const struct hmm_config *config);

/* ---- what this system allows ------------------------------------------------------------------------------------- */

enum hmm_check_status { HMM_CHECK_OK, HMM_CHECK_DEGRADED, HMM_CHECK_MISSING, HMM_CHECK_NOT_SEEN };

struct hmm_check_item {
    const char *name;   /* what was looked at */
    const char *detail; /* what was found */
    const char *remedy; /* how to get it; "" where nothing is missing */
    enum hmm_check_status status;
};

typedef void (*hmm_check_fn)(const struct hmm_check_item *item, void *arg);

/* Probes kernel and permissions, one item per fact. Opens and closes descriptors of its own. Returns 0 when the main path
 * works fully, 1 when it works with restrictions (some item is DEGRADED), -ENOSYS / -EPERM when it does not. */
HMM_API int hmm_check(hmm_check_fn fn, void *arg);

/* Re-proves, on the running kernel, the kernel behaviours the protocol depends on (docs/kernel-facts.md). Takes seconds.
 * Forks: call it from a program with one thread. Returns the number of facts that are *not* as the protocol needs them, or
 * a negative errno when they could not be tried. A race that did not show itself is NOT_SEEN, which does not count. */
HMM_API int hmm_check_deep(hmm_check_fn fn, void *arg);

/* ---- devices ----------------------------------------------------------------------------------------------------- */

/* A device handle. Positive; never reused in the life of the process, so that a stale one is -ENODEV, not another device. */
typedef int32_t hmm_dev;

/*
 * Opens a device: "NAME" or "NAME:word,word", where a word is option=value, or the name of an option that is on or off, for
 * example "soft:isolated,memory=64M". An option that takes a spec takes the rest: "faulty:seed=7,over=soft:memory=64M". `hmm
 * devices` lists names and options. A driver that is not in this build is looked for as libhmm-NAME.so in the folders of the
 * environment variable HMM_DRIVER_PATH, and stays loaded. The first open starts the manager.
 * -EINVAL: the spec cannot be parsed or a value is out of range (the message quotes the word), or the driver is of another ABI;
 * -ENODEV: no such driver; -ENOEXEC: its file cannot be loaded; -ENOMEM; -EPERM / -ENOSYS: userfaultfd is not permitted / too old
 * (see hmm_check); -EMFILE: too many devices.
 */
HMM_API int hmm_device_open(const char *spec, hmm_dev *dev);

/*
 * Cancels queued jobs, ends running ones (their fences give -ECANCELED), brings every page home, closes the device.
 * -ENODEV: not open (also: closed before). -ENOMEM: pages could not be brought home; -EBUSY: after 10 s pages are pinned or in use, a
 * call is inside the device, or a notifier callback of it has not returned: the message names the callback, the device, the range
 * and the time. -EIO: the device did not give pages back for 10 s. After these three the handle is good for another
 * hmm_device_close() only, which goes on where this one gave up; nothing is lost, and other devices are not affected.
 */
HMM_API int hmm_device_close(hmm_dev dev);

struct hmm_device_info {
    uint32_t size;         /* in: sizeof(struct hmm_device_info) */
    char name[32];         /* driver name */
    char spec[128];        /* as opened */
    uint32_t page_size;    /* bytes: what moves at once at least, hmm_page_size() or more */
    uint64_t memory_bytes; /* device memory */
    uint64_t used_bytes;   /* of it, allocated now */
    uint32_t lost;         /* 1: it takes no jobs any more, see HMM_DEVICE_LOST in docs/api.md; close it */
    uint32_t reserved;
    uint64_t jobs;           /* submitted and not done */
    uint64_t transit_bytes;  /* of used_bytes: on the way to the device or home */
    uint64_t limit_bytes;    /* as set by hmm_device_set_limit(), whole pages; 0: none */
    uint64_t mirrored_bytes; /* process memory in ranges that the device mirrors (its notifiers); overlaps count twice */
};

HMM_API int hmm_device_info(hmm_dev dev, struct hmm_device_info *info);

/* ---- limits (kernel: cgroup dmem.max, memory.max) --------------------------------------------------------------------- */

/*
 * How much memory the process may have on devices: on one (hmm_device_set_limit), and on all of them together (hmm_set_limit; where
 * the program never sets it, the environment variable HMM_LIMIT, a number with K, M, G or T). Rounded down to pages; 0: no limit but
 * the device's own memory. Pages in transit count: they have a device page. It is a limit, not a reservation.
 *
 * Within a limit, room is made by eviction as on a device of that size: of this device's pages, and for the limit of the process of
 * the coldest pages of any device that are not in use. Pages that still find no room stay in system memory and are counted (hmm_migrate_result.limited,
 * hmm_stats.limited); a migration that can move nothing for that reason is -ENOSPC, with a message that names the limit, its use
 * and the remedy. A device fault uses the bus then.
 *
 * A limit that is lower than the use takes effect at once for new pages, and pages are evicted until it is met. -EBUSY: after 10 s
 * it is not, because pages are pinned or in use; the limit stands, and eviction for new pages goes on. -EINVAL: less than a page of
 * the device (of the system); -ENODEV. May be called at any time, from any thread; hmm_set_limit() without an open device, too. Blocks.
 */
HMM_API int hmm_device_set_limit(hmm_dev dev, uint64_t bytes);
HMM_API int hmm_set_limit(uint64_t bytes);

/* A driver (option == NULL) or one of its options. Strings are valid until the callback returns. */
struct hmm_driver_item {
    uint32_t size; /* of what the library filled */
    uint32_t reserved;
    const char *driver;
    const char *description; /* of the driver */
    const char *origin;      /* "built in", or the file that it was loaded from */
    const char *option;
    const char *help;     /* of the option */
    const char *fallback; /* its value when it is not given; NULL: must be given */
    const char *values;   /* what it may be, in words: "64K to 4T", "fault|resident|register" */
};
typedef void (*hmm_driver_fn)(const struct hmm_driver_item *item, void *arg);

/*
 * Lists drivers: calls fn once per driver, and then once per option of it. Those in this build come first, then libhmm-NAME.so in
 * the folders of HMM_DRIVER_PATH (separated by ':'), which are loaded for that. One that cannot be loaded is logged and left out.
 */
HMM_API void hmm_drivers(hmm_driver_fn fn, void *arg);

/* ---- migration (kernel: migrate_vma_*) --------------------------------------------------------------------------- */

/* What a migration did, in pages of hmm_page_size(). Every page of the range is counted exactly once. */
struct hmm_migrate_result {
    uint32_t size; /* in: sizeof(struct hmm_migrate_result) */
    uint32_t reserved;
    uint64_t moved;         /* now where they were asked to be, by this call */
    uint64_t already;       /* were there before */
    uint64_t cleared;       /* of moved: absent or zero pages, cleared on the device instead of copied */
    uint64_t huge;          /* of moved: pages that were moved as parts of whole huge pages */
    uint64_t pinned;        /* stayed: the kernel holds them for DMA, or a pin of ours does */
    uint64_t unmovable;     /* stayed: read-only, locked, shared, file-backed, or hold a thread's control block */
    uint64_t unmapped;      /* no mapping there */
    uint64_t busy;          /* stayed: changed under the migration (unmapped, dropped), or no device memory for them */
    uintptr_t first_stayed; /* address of the first page that stayed; 0 when none */
    uint64_t limited;       /* of busy: a limit left no room for them */
};

/*
 * Moves the pages of [addr, addr+len), rounded outwards to pages, to device memory; evicts others to make room. A partial
 * success is a success: read the result (may be NULL). Holes are counted, not errors. Blocks for copies and invalidations.
 * -EINVAL: len 0 or the range wraps around; -ENODEV; -EFAULT: nothing is mapped in the range; -ENOMEM; -ENOSPC: a limit left room
 * for none of the pages.
 */
HMM_API int hmm_migrate_to_device(hmm_dev dev, const void *addr, size_t len, struct hmm_migrate_result *result);

/* Brings the pages of [addr, addr+len), rounded outwards, back to system memory. Errors as above; no -EFAULT. */
HMM_API int hmm_migrate_to_system(const void *addr, size_t len, struct hmm_migrate_result *result);

/* Bytes per page of this system. */
HMM_API size_t hmm_page_size(void);

/* ---- where is it ------------------------------------------------------------------------------------------------- */

enum hmm_page_state {
    HMM_PAGE_ABSENT,    /* not mapped, or never touched: neither CPU nor a device holds anything */
    HMM_PAGE_SYSTEM,    /* in system memory or swap */
    HMM_PAGE_DEVICE,    /* device-private: missing in the CPU page table */
    HMM_PAGE_MIGRATING, /* in transit */
    HMM_PAGE_POISONED,  /* its only copy is lost */
};

struct hmm_page_info {
    uint8_t state;  /* enum hmm_page_state */
    uint8_t huge;   /* SYSTEM: part of a huge page */
    uint8_t pinned; /* by hmm_pin_range() */
    uint8_t reserved;
    hmm_dev device; /* DEVICE: which; else 0 */
};

/* Fills pages[0 .. n) for the pages of [addr, addr+len), rounded outwards; n is the number of those pages and is returned.
 * A snapshot, consistent per 2 MiB block. -EINVAL, -ENOSPC when max is too small, -ENODEV when no device is open. */
HMM_API int64_t hmm_range_query(const void *addr, size_t len, struct hmm_page_info *pages, size_t max);

/* ---- pins (kernel: pin_user_pages(), Documentation/core-api/pin_user_pages.rst) ------------------------------------------- */

/*
 * A pin keeps the pages of a range in system memory: as long as there is one, libhmm takes none of them to a device, whoever asks
 * (migrations, device faults, eviction), and counts them as pinned. It is for memory that somebody reaches without faults that libhmm could
 * serve: a kernel driver, a network card, code that must not wait.
 *
 * It holds off libhmm, and nobody else: the kernel may still swap, compact or replace the page. Who needs a physical address that stays needs a
 * pin of the kernel's (an io_uring registered buffer, RDMA), which libhmm respects and reports as pinned, too.
 *
 * It is of addresses: what is mapped there later is pinned until hmm_unpin(), and pages that the program moves away with mremap() are not;
 * what was on a device when mremap() moved it there stays away until it is touched.
 * A child of fork inherits none.
 */
typedef uint64_t hmm_pin; /* 0: none; never used again for another */

enum hmm_pin_flags {
    HMM_PIN_WRITE =
        1, /* will be written: pages that are shared (after fork, the zero page, a private file's) are made private first */
};

struct hmm_pin_desc {
    uint32_t size;     /* sizeof(struct hmm_pin_desc) */
    uint32_t flags;    /* HMM_PIN_* */
    const void *owner; /* a key: hmm_unpin() wants the same; may be NULL */
};

/*
 * Pins the pages of [addr, addr + len), rounded outwards: those on a device come home, those that were never touched are made (for
 * reading: the zero page; with WRITE: pages of their own), and none leaves until the pin ends. Ranges may overlap, and be pinned again.
 * Apart from that it costs by call, not by page, and takes no lock where libhmm manages nothing of the range. May wait while a device
 * uses a page; faults pages in as a touch would. desc NULL: for reading, no owner.
 *
 * 0 and *pin; on failure nothing is pinned. -EINVAL: len 0, a range that wraps, unknown flags, size. -EFAULT: nothing is mapped somewhere,
 * or it cannot be read. -EPERM: WRITE of memory that is not writable. -EHWPOISON: a page was lost with its device. -ENODEV: no device is
 * open, and nothing is managed. -EBUSY: a page is pinned on its device. -EOVERFLOW: some 65,000 pins of the same 2 MiB; -ENFILE: 65,536 pins in all.
 * -ENOMEM; the error of a device that does not give a page.
 */
HMM_API int hmm_pin_range(const void *addr, size_t len, const struct hmm_pin_desc *desc, hmm_pin *pin);

/*
 * Ends a pin. dirty: the pages were written by somebody whom neither the CPU nor devices know of (counted in hmm_stats(); it matters once
 * something is kept of them elsewhere). The memory may be unmapped by then. 0. -EINVAL: not a pin, or unpinned before. -EPERM: of another
 * owner: it stays. -ESRCH: in a child of fork. Any thread and signal handlers; takes no lock, does not block.
 */
HMM_API int hmm_unpin(hmm_pin pin, const void *owner, bool dirty);

/* Whether a page of [addr, addr + len), rounded outwards, is pinned by hmm_pin_range(), or may be about to (kernel: folio_maybe_dma_pinned()).
 * Takes no lock. */
HMM_API bool hmm_may_be_pinned(const void *addr, size_t len);

/* ---- fences ------------------------------------------------------------------------------------------------------ */

/* A completion: of a job, or of something that the program does itself. Reference-counted; use it from any thread. */
typedef struct hmm_fence hmm_fence;

struct hmm_fence_info {
    uint32_t size;     /* in: sizeof(struct hmm_fence_info) */
    int32_t status;    /* -EINPROGRESS, 0, or the job's error */
    uint64_t result;   /* of the operation; kernel: its return value */
    uintptr_t address; /* the process address that the error is about; else 0 */
    char message[160]; /* what went wrong, in words */
};

/* Waits for the job. timeout_ns < 0: for ever. Returns the job's error (0, -EFAULT, -EACCES, -ETIMEDOUT ended at its deadline or
 * time limit, -ECANCELED, -ENODEV, -ENOSPC, -ERANGE, -EIO ...), or -EAGAIN when the *wait* ran out first. */
HMM_API int hmm_fence_wait(hmm_fence *fence, int64_t timeout_ns);
HMM_API int hmm_fence_info(hmm_fence *fence, struct hmm_fence_info *info);
/* A new descriptor (eventfd, close-on-exec) that becomes and stays readable when the fence is done: for poll() and epoll. The
 * caller's to close, before or after. Each call makes one. -EMFILE, -ENOMEM; -EPERM: a filter of system calls forbids
 * pidfd_getfd(2), by which the library keeps a duplicate that close() of the program does not reach. */
HMM_API int hmm_fence_fd(hmm_fence *fence);
/* Drops the reference that the submitting call returned. NULL is allowed. A job goes on without its fence. */
HMM_API void hmm_fence_put(hmm_fence *fence);

/* A fence that the program completes: for jobs that wait for something outside of the device. Needs an open device (-ENODEV); when
 * the last one closes, it is completed with -ECANCELED. */
HMM_API int hmm_fence_create(hmm_fence **fence);
/* Completes such a fence with status 0 or a negative errno; jobs that wait for it start, or are cancelled, before it returns.
 * -EALREADY: it is done; -EINVAL: it is the fence of a job, or the status is positive, -EAGAIN or -EINPROGRESS. */
HMM_API int hmm_fence_complete(hmm_fence *fence, int status);

/* ---- queues ------------------------------------------------------------------------------------------------------ */

/*
 * Where jobs wait for an engine. Every device has one of its own: concurrent, of normal priority. Jobs of a concurrent queue run at
 * the same time and in any order; those of an in-order queue one after the other, in the order of their submission: each begins
 * when the one before it is done, whatever its status. Of jobs that could begin, those of the highest priority do, and of these the
 * oldest. A job that runs is not interrupted for another.
 */
typedef struct hmm_queue hmm_queue;

enum hmm_priority { HMM_PRIORITY_LOW = -1, HMM_PRIORITY_NORMAL = 0, HMM_PRIORITY_HIGH = 1 };

struct hmm_queue_config {
    uint32_t size;     /* sizeof(struct hmm_queue_config) */
    uint32_t in_order; /* 0 or 1 */
    int32_t priority;  /* enum hmm_priority */
    uint32_t reserved; /* 0 */
};
/* config may be NULL: concurrent, normal. -EINVAL, -ENODEV, -EOPNOTSUPP: the device runs no jobs; -ENOMEM. */
HMM_API int hmm_queue_create(hmm_dev dev, const struct hmm_queue_config *config, hmm_queue **queue);
/* Gives the queue up; its jobs go on. NULL is allowed. Also to be called when the device was closed first. */
HMM_API void hmm_queue_destroy(hmm_queue *queue);

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

/*
 * User kernels: a C function that runs on a device engine and reaches process memory only through its accessor. It must not
 * allocate, lock, do I/O or call other parts of libhmm: the engine may be the one that memory comes back through. An access
 * to an unmapped or protected address does not return: it ends the job with -EFAULT / -EACCES and the address in the fence.
 *
 * A device may run its engines elsewhere than in this process (soft:isolated). Then a kernel is known by name: a symbol of a shared
 * object, which is loaded there, too. Static data are each side's own. Give the names, or the function as it is known here: a
 * function that is exported from a shared object (HMM_KERNEL) is found by its address.
 */
typedef struct hmm_accessor hmm_accessor;
typedef uint64_t (*hmm_kernel)(hmm_accessor *acc, void *arg);

/* Begins the definition of a kernel that has a name: HMM_KERNEL(sum) { ... acc ... arg ... } */
#define HMM_KERNEL(name)                                                                                                       \
    __attribute__((visibility("default"))) uint64_t name(hmm_accessor *acc, void *arg);                                        \
    uint64_t name(hmm_accessor *acc, void *arg)

/* Process memory that a job uses. */
struct hmm_range {
    uintptr_t addr;
    uint64_t bytes;
    uint32_t write; /* 1: the job writes there */
    uint32_t reserved;
};

struct hmm_launch {
    uint32_t size;        /* sizeof(struct hmm_launch) */
    uint32_t deadline_ms; /* an invalidation waits this long for a span, then ends the kernel; 0: 1000 */
    hmm_kernel kernel;    /* the function, or NULL and its names: */
    const void *arg;      /* copied to the device at submission; the kernel gets the copy, 16-byte aligned, writable */
    size_t arg_size;      /* 0..64 KiB */
    const char *object;   /* file of a shared object, as for dlopen(3) */
    const char *symbol;   /* an exported function in it */
    /* What the kernel will use. A device without page faults (soft:model=resident, model=register) makes it resident before the
     * kernel starts, and keeps it; an access to anything else goes over the bus there. Others do not need it. */
    const struct hmm_range *ranges;
    uint32_t nranges; /* 0..64 */
    uint32_t reserved;
};

/*
 * A span: the device's own mapping of process memory at ptr, contiguous for *len bytes (in: wanted, > 0; out: granted,
 * 1..wanted). Valid until the next accessor call of this kernel. A write span is also readable. Kernel threads only.
 */
HMM_API const void *hmm_span_read(hmm_accessor *acc, const void *ptr, size_t *len);
HMM_API void *hmm_span_write(hmm_accessor *acc, void *ptr, size_t *len);
/* Ends the current span, so that an invalidation need not wait for it. For kernels that compute for long on local data. */
HMM_API void hmm_yield(hmm_accessor *acc);
/* Copies between process memory and kernel-local memory, across any number of spans. */
HMM_API void hmm_get(hmm_accessor *acc, void *local, const void *ptr, size_t len);
HMM_API void hmm_put(hmm_accessor *acc, void *ptr, const void *local, size_t len);

/* ---- operations -------------------------------------------------------------------------------------------------- */

enum hmm_type { HMM_I32, HMM_I64, HMM_U32, HMM_U64, HMM_F32, HMM_F64 };
enum hmm_reduction { HMM_SUM, HMM_MIN, HMM_MAX };

enum hmm_op {
    HMM_OP_NOP, /* nothing: to join fences, or to measure a device */
    HMM_OP_KERNEL,
    HMM_OP_COPY,
    HMM_OP_FILL,
    HMM_OP_COMPARE,
    HMM_OP_CRC32C,
    HMM_OP_HISTOGRAM,
    HMM_OP_REDUCE,
    HMM_OP_SAXPY,
    HMM_OP_GEMM,
    HMM_OP_SORT,
    HMM_OP_GATHER,
    HMM_OP_SCATTER,
    HMM_OP_BFS,
};
#define HMM_OPS (HMM_OP_BFS + 1)

/*
 * What a job does. Pointers are process pointers of any alignment; numbers are in the order of bytes of the machine. A count or a
 * size of 0, a range that wraps around the address space, a count that overflows it and a NULL pointer are -EINVAL at submission.
 * So are operands that overlap, where it says so.
 */
/* Like memmove: they may overlap. */
struct hmm_op_copy {
    void *dst;
    const void *src;
    uint64_t bytes;
};

struct hmm_op_fill {
    void *dst;
    uint64_t bytes;
    uint8_t value;
};

/* Result: the offset of the first byte that differs, or bytes when none does. */
struct hmm_op_compare {
    const void *a, *b;
    uint64_t bytes;
};

/* CRC-32C (Castagnoli), initial value and final xor 0xffffffff. Result: the checksum. */
struct hmm_op_crc32c {
    const void *src;
    uint64_t bytes;
};

/* counts[v] becomes the number of bytes of value v. Must not overlap. */
struct hmm_op_histogram {
    const void *src;
    uint64_t bytes;
    uint64_t *counts; /* 256 */
};

/*
 * Result: of integers an int64_t (uint64_t for the unsigned types); sums wrap modulo 2^64. Of floating types the bits of a
 * double: hmm_result_double(). The sum of floating numbers is made in double, in 16 lanes: element i is added to lane
 * i % 16, in ascending order of i, and the lanes are added in the order ((0+8)+(4+12)) + ((2+10)+(6+14)) + (((1+9)+(5+13)) +
 * ((3+11)+(7+15))); for HMM_F32 it is then rounded to float. So it does not depend on where pages are. It differs from the
 * exact sum by at most (n/16 + 4) * 2^-53 * sum|x|, and for HMM_F32 by 2^-24 of its value more. NaN and infinities propagate
 * as IEEE 754 says; the minimum and maximum of anything with a NaN is NaN, and -0 is less than +0.
 */
struct hmm_op_reduce {
    const void *src;
    uint64_t count;
    uint32_t type; /* enum hmm_type */
    uint32_t how;  /* enum hmm_reduction */
};

/* y[i] = a * x[i] + y[i]. With x == y, or apart; else they must not overlap. Error: at most one rounding of the product and
 * one of the sum (a fused multiply-add may leave out the first). */
struct hmm_op_saxpy {
    const float *x;
    float *y;
    uint64_t count;
    float a;
};

/*
 * c = alpha * a * b + beta * c, row by row: a is m x k, b is k x n, c is m x n; lda, ldb, ldc are the elements from one row to
 * the next, 0: as many as it has columns. With beta 0 c is not read. c overlaps neither a nor b. In float; each element
 * differs from the exact one by at most (k + 3) * 2^-24 * (|alpha| * sum|a||b| + |beta c|) + underflow.
 */
struct hmm_op_gemm {
    const float *a, *b;
    float *c;
    uint32_t m, n, k;
    uint32_t lda, ldb, ldc;
    float alpha, beta;
};

/* Ascending, in place. Uses as much memory again on the device's side: -ENOMEM. A job that ends before its time leaves the
 * numbers in any order, some lost and some twice: sort a copy where that matters. */
struct hmm_op_sort {
    void *data;
    uint64_t count;
    uint32_t type; /* HMM_U32, HMM_U64 */
};

/* gather: dst[i] = table[index[i]]; scatter: table[index[i]] = src[i], of equal indices the last one stays. An index that is
 * not below entries ends the job with -ERANGE and the address of the index. What is written overlaps nothing else. */
struct hmm_op_gather {
    void *dst;
    const void *table;
    const void *index;
    uint64_t count;      /* of indices */
    uint64_t entries;    /* of the table */
    uint32_t element;    /* bytes: 1, 2, 4, 8, 16 */
    uint32_t index_type; /* HMM_U32, HMM_U64 */
};

struct hmm_op_scatter {
    void *table;
    const void *src;
    const void *index;
    uint64_t count;
    uint64_t entries;
    uint32_t element;
    uint32_t index_type;
};

/*
 * Breadth-first search in a graph in CSR form: the neighbours of v are edges[offsets[v]] .. edges[offsets[v+1] - 1].
 * distance[v] becomes the number of edges from source to v, or UINT32_MAX. Result: the number of vertices reached. An
 * offset that descends or is above nedges, and a neighbour that is no vertex, end the job with -ERANGE and its address.
 * nedges may be 0, and edges then NULL.
 */
struct hmm_op_bfs {
    const uint64_t *offsets; /* vertices + 1 */
    const uint32_t *edges;
    uint32_t *distance; /* vertices */
    uint64_t nedges;
    uint32_t vertices;
    uint32_t source;
};

struct hmm_operation {
    uint32_t kind; /* enum hmm_op */
    uint32_t reserved;
    union {
        struct hmm_launch kernel;
        struct hmm_op_copy copy;
        struct hmm_op_fill fill;
        struct hmm_op_compare compare;
        struct hmm_op_crc32c crc32c;
        struct hmm_op_histogram histogram;
        struct hmm_op_reduce reduce;
        struct hmm_op_saxpy saxpy;
        struct hmm_op_gemm gemm;
        struct hmm_op_sort sort;
        struct hmm_op_gather gather;
        struct hmm_op_scatter scatter;
        struct hmm_op_bfs bfs;
    };
};

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

struct hmm_job_desc {
    uint32_t size;       /* sizeof(struct hmm_job_desc) */
    uint32_t timeout_ms; /* a job that is not done this long after its submission is ended: -ETIMEDOUT; 0: no limit */
    struct hmm_operation operation;
    hmm_queue *queue; /* of the same device; NULL: the device's own */
    /* The job begins when these fences are done, of any device. One with an error cancels it: -ECANCELED, with the reason. Copied;
     * the fences may be put at once. Fences exist before the jobs that wait for them, so that no cycle of jobs can be made. */
    hmm_fence *const *wait;
    uint32_t nwait; /* 0..64 */
    uint32_t reserved;
};

/*
 * Submits a job. Copies its parameters, queues, returns at once. Every job sees all memory changes (munmap, madvise, writes...)
 * that happened before the call. fence may be NULL for a caller who does not care about errors.
 * -EINVAL: an operand is wrong, or a fence to wait for is NULL; -ENODEV: the device was closed or lost; -EBUSY: it has 65,536 jobs
 * already, wait for a fence; -EOPNOTSUPP: it runs no jobs, or not this operation (in the fence, where the
 * driver was not asked at once); -ENOENT: there is no such object or symbol; -ENOEXEC: the kernel has no name that the engines could find it by, or its object cannot be loaded; -ENOMEM.
 */
HMM_API int hmm_job_submit(hmm_dev dev, const struct hmm_job_desc *desc, hmm_fence **fence);

/* The same for the most frequent operations, in the device's own queue. */
HMM_API int hmm_job_copy(hmm_dev dev, void *dst, const void *src, size_t len, hmm_fence **fence);
HMM_API int hmm_job_fill(hmm_dev dev, void *dst, uint8_t value, size_t len, hmm_fence **fence);
HMM_API int hmm_job_crc32c(hmm_dev dev, const void *src, size_t len, hmm_fence **fence);
HMM_API int hmm_job_launch(hmm_dev dev, const struct hmm_launch *launch, hmm_fence **fence);

/* Asks a job to end: one that waits ends at once, one that runs at its next access or by force, both with -ECANCELED. Does not
 * wait: the fence says when. The job may finish first; and a driver without a way to end jobs lets one that runs go on (so it does
 * at a time limit). -EALREADY: it is done; -EINVAL: the fence is not a job's. */
HMM_API int hmm_job_cancel(hmm_fence *fence);

/* The result of a floating reduction. */
static inline double hmm_result_double(const struct hmm_fence_info *info)
{
    union {
        uint64_t bits;
        double number;
    } u;
    u.bits = info->result;
    return u.number;
}

/* ---- what the program does to its address space ------------------------------------------------------------------ */

/*
 * munmap(), mremap(), madvise(), mprotect() and the like change memory that a device may be using. A change that is begun and ended
 * here has the guarantee of a kernel's mmu notifiers: when begin returns, every device has let go of the range, and until end none
 * takes hold of it again. Changes that are not announced are seen as userfaultfd events where the kernel raises them; docs/calls.md
 * says for every call what holds with an announcement, with the event alone, and with neither.
 *
 * Three ways to announce: libhmm-preload.so (LD_PRELOAD) does it for an unmodified program; the calls below named after the C
 * library's; and the pair hmm_change_begin() / hmm_change_end() around whatever else changes memory, such as a raw system call.
 */
enum hmm_change_kind {
    HMM_CHANGE_UNMAP,   /* munmap, a mapping made over it, brk down: HMM_EVENT_UNMAP */
    HMM_CHANGE_REMAP,   /* mremap: the part that may move or be cut off: HMM_EVENT_UNMAP */
    HMM_CHANGE_CLEAR,   /* MADV_DONTNEED, FREE, REMOVE: contents dropped: HMM_EVENT_CLEAR */
    HMM_CHANGE_GUARD,   /* MADV_GUARD_INSTALL: the same; what is on a device comes home first, since no event drops it there */
    HMM_CHANGE_PROTECT, /* mprotect, pkey_mprotect: HMM_EVENT_PROTECTION_VMA */
    HMM_CHANGE_DETACH,  /* shmdt: what is left of the segment at addr, whatever len is: HMM_EVENT_UNMAP */
    HMM_CHANGE_RELEASE, /* exec, exit: all of the address space, whatever addr and len are: HMM_EVENT_RELEASE */
};

/* Fields belong to the library. */
struct hmm_change {
    uint32_t slot;
    uint32_t reserved;
};

/*
 * [addr, addr + len), widened to pages, is about to change. Costs a load where no device is open, and some 20 ns where nothing of the
 * range is on a device or watched by one. Else a library thread invalidates the range on every device that has it, waiting for
 * engines as hmm_notifier_ops says; HMM_CHANGE_RELEASE waits 1 s at most and then says in the log which device did not let go.
 *
 * Cannot fail: an empty range, or one that wraps, is nothing. Changes of several threads, and nested ones of one thread, may overlap;
 * of one inside of another of its kind that covers it nobody is told again. A thread nests three at most. 128 may be under way; more
 * wait, for RELEASE 1 s at most.
 * Keeps errno. Allocates nothing, takes no lock of the C library: to be called in signal handlers, in constructors before the
 * library's own, and by an allocator that holds its locks. In a child of fork or vfork, and in library threads, it is nothing.
 *
 * Between begin and end the thread makes the change and nothing else: a job, and a touch of the range by a device, may wait for it.
 * So it does not wait for a device there, nor call this library.
 */
HMM_API void hmm_change_begin(struct hmm_change *change, enum hmm_change_kind kind, const void *addr, size_t len);
/* It was made, or failed: by the same thread. After UNMAP and CLEAR of what was on a device, its device pages are free when this returns; that is waited for
 * 100 ms at most, since events before it come first. */
HMM_API void hmm_change_end(struct hmm_change *change);

/*
 * The calls of the same names without hmm_: the same arguments and results, errno set. Announced where they change what a device may
 * have; in all other cases nothing but the call. offset and flags as there, off_t being 64 bits wide.
 */
HMM_API void *hmm_mmap(void *addr, size_t len, int prot, int flags, int fd, int64_t offset); /* MAP_FIXED: what stood there */
HMM_API int hmm_munmap(void *addr, size_t len);
HMM_API void *hmm_mremap(void *addr, size_t old_len, size_t new_len, int flags, ... /* void *new_addr */);
HMM_API int hmm_madvise(void *addr, size_t len, int advice);
HMM_API int hmm_mprotect(void *addr, size_t len, int prot);
HMM_API int hmm_pkey_mprotect(void *addr, size_t len, int prot, int pkey);
HMM_API int hmm_brk(void *end);
HMM_API void *hmm_sbrk(intptr_t increment);
HMM_API int hmm_shmdt(const void *addr);
/* Devices let go of everything first; when the call fails, they go on. The other exec functions: as these, by hand. */
HMM_API int hmm_execve(const char *path, char *const argv[], char *const envp[]);
HMM_API int hmm_execvpe(const char *file, char *const argv[], char *const envp[]);
HMM_API int hmm_fexecve(int fd, char *const argv[], char *const envp[]);
/* _exit(). exit() of the program runs its handlers first; announce it there, or not: the process ends well without. */
HMM_API void hmm_exit(int status) __attribute__((noreturn));

/* ---- what it does ------------------------------------------------------------------------------------------------ */

/* Counters since the manager started; gauges are marked. Pages are of hmm_page_size(). */
struct hmm_stats {
    uint32_t size; /* in: sizeof(struct hmm_stats) */
    uint32_t reserved;
    uint64_t cpu_faults;      /* fault messages read */
    uint64_t cpu_faults_slow; /* of these, handed to a worker because a device had to be waited for */
    uint64_t zero_filled;     /* pages given as zeros to touches of absent managed memory */
    uint64_t device_faults;
    uint64_t pages_to_device;
    uint64_t pages_to_system;
    uint64_t pages_cleared;                             /* absent or zero pages cleared on a device instead of copied */
    uint64_t bytes_to_device;                           /* copied by drivers */
    uint64_t bytes_to_system;                           /* copied by drivers or by UFFDIO_COPY from device memory */
    uint64_t huge_to_device;                            /* whole huge pages taken */
    uint64_t huge_to_system;                            /* whole huge pages restored */
    uint64_t evicted;                                   /* pages sent home to make room on a device, or to meet a limit */
    uint64_t invalidations;                             /* notifier callbacks */
    uint64_t events_unmap, events_remove, events_remap; /* by event: the kernel told us (munmap, madvise, mremap) */
    uint64_t dropped;                                   /* device or staged pages whose memory was unmapped or dropped */
    uint64_t retries;          /* system calls repeated because an event was pending, or because a page did not come home */
    uint64_t rollbacks;        /* staged pages put back because a migration failed */
    uint64_t pinned;           /* pages left because the kernel holds them */
    uint64_t metadata_bytes;   /* gauge: tables and descriptors, without per-device fixed descriptors */
    uint64_t descriptor_bytes; /* gauge: page descriptors of all open devices */
    uint64_t staging_bytes;    /* gauge: resident memory of pages in transit, as accounted */
    uint64_t device_pages;     /* gauge: pages now on devices, those in transit included */
    uint64_t blocks;           /* gauge: 2 MiB blocks tracked */

    /* What the program did to memory that was managed or mirrored, once per call. By event: as above, when it went past us. By
     * wrapper: it came through hmm_munmap() etc. or libhmm-preload.so. A wrapped call that the kernel still reports counts in both. */
    uint64_t events_fork;
    uint64_t calls_unmap;   /* munmap, mapping over, brk downwards, shmdt */
    uint64_t calls_remove;  /* madvise that drops content */
    uint64_t calls_remap;   /* mremap */
    uint64_t calls_protect; /* mprotect; raises no event */
    uint64_t calls_fork;
    uint64_t calls_release;         /* exec, exit; raise no event */
    uint64_t forks;                 /* children that were given their copy of what was on devices */
    uint64_t pages_to_children;     /* copied for them */
    uint64_t poisoned;              /* pages whose content was lost with a device */
    uint64_t invalidations_refused; /* callbacks that could not be done without waiting, and were called again */
    uint64_t invalidation_ns;       /* time in all callbacks that have returned, of all threads together */
    uint64_t limited;               /* pages that found no room because of a limit */
    uint64_t transit_pages;         /* gauge: of device_pages, on the way to a device or home */
    uint64_t mirrored_bytes;        /* gauge: process memory in ranges that devices mirror; overlaps count twice */
    uint64_t limit_bytes;           /* of the process, see hmm_set_limit(); 0: none */
    uint64_t pins;                  /* gauge: of hmm_pin_range() */
    uint64_t pins_dirty;            /* that were ended as dirty */
};
HMM_API int hmm_stats(struct hmm_stats *stats);

/* Audits every structure, and every entry against what the kernel reports (PAGEMAP_SCAN). Stops migrations for its
 * duration. Returns the number of violations found (each is logged; the first is in hmm_last_message()). Only complete
 * while no other thread changes mappings. -ENODEV when no device is open. */
HMM_API int hmm_audit(void);

#ifdef __cplusplus
}
#endif
#endif
