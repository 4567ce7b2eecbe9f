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
 *  - In a child made by fork(), handles of the parent give -ESRCH; the child may open devices of its own. Memory that was
 *    managed at the time of fork() is not in the child (touching it is SIGSEGV, never wrong data).
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
    uint32_t size;          /* sizeof(struct hmm_config) */
    uint32_t fault_workers; /* threads for CPU faults that must wait for a device; default 4, 1..64 */
    uint64_t staging_bytes; /* bound of system memory used in transit; default 32 MiB, 4 MiB..1 GiB, rounded to blocks */
    uint64_t seed;          /* of injection and policy; default from the clock, logged */
    const char *debug;      /* comma-separated: validate (audit after each migration call, violations
                             * are logged), inject[=per-mille]; default: environment HMM_DEBUG */
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
 * Opens a device: "NAME" or "NAME:option=value,option=value", for example "soft:memory=64M,engines=2". `hmm devices` lists
 * names and options. The first open starts the manager.
 * -EINVAL: the spec cannot be parsed or a value is out of range (the message quotes the word); -ENODEV: no such driver;
 * -ENOMEM; -EPERM / -ENOSYS: userfaultfd is not permitted / too old (see hmm_check); -EMFILE: too many devices.
 */
HMM_API int hmm_device_open(const char *spec, hmm_dev *dev);

/*
 * Cancels queued jobs, ends running ones (their fences give -ECANCELED), brings every page home, closes the device.
 * -ENODEV: not open (also: closed before). -ENOMEM: pages could not be brought home; -EBUSY: pages are pinned or in use after 10 s.
 * After these two the handle is good for another hmm_device_close() only; nothing is lost.
 */
HMM_API int hmm_device_close(hmm_dev dev);

struct hmm_device_info {
    uint32_t size;         /* in: sizeof(struct hmm_device_info) */
    char name[32];         /* driver name */
    char spec[128];        /* as opened */
    uint32_t page_size;    /* bytes */
    uint64_t memory_bytes; /* device memory */
    uint64_t used_bytes;   /* of it, allocated now */
};

HMM_API int hmm_device_info(hmm_dev dev, struct hmm_device_info *info);

/* Lists the drivers in this build: calls fn once per driver, and once per option with option != NULL. */
typedef void (*hmm_driver_fn)(const char *name, const char *description, const char *option, const char *option_help,
                              void *arg);
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
};

/*
 * Moves the pages of [addr, addr+len), rounded outwards to pages, to device memory; evicts others to make room. A partial
 * success is a success: read the result (may be NULL). Holes are counted, not errors. Blocks for copies and invalidations.
 * -EINVAL: len 0 or the range wraps around; -ENODEV; -EFAULT: nothing is mapped in the range; -ENOMEM.
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
    uint8_t state; /* enum hmm_page_state */
    uint8_t huge;  /* SYSTEM: part of a huge page */
    uint16_t reserved;
    hmm_dev device; /* DEVICE: which; else 0 */
};

/* Fills pages[0 .. n) for the pages of [addr, addr+len), rounded outwards; n is the number of those pages and is returned.
 * A snapshot, consistent per 2 MiB block. -EINVAL, -ENOSPC when max is too small, -ENODEV when no device is open. */
HMM_API int64_t hmm_range_query(const void *addr, size_t len, struct hmm_page_info *pages, size_t max);

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

/* The completion of a job. Reference-counted; wait, query and put from any thread. */
typedef struct hmm_fence hmm_fence;

struct hmm_fence_info {
    uint32_t size;     /* in: sizeof(struct hmm_fence_info) */
    int32_t status;    /* -EINPROGRESS, 0, or the job's error */
    uint64_t result;   /* crc32c: the checksum; kernel: its return value */
    uintptr_t address; /* the faulting address where the error is about one; else 0 */
    char message[160]; /* what went wrong, in words */
};

/* Waits for the job. timeout_ns < 0: for ever. Returns the job's error (0, -EFAULT, -EACCES, -ETIMEDOUT ended at its
 * deadline, -ECANCELED, -ENODEV, -ENOSPC, -EIO ...), or -EAGAIN when the *wait* ran out first. */
HMM_API int hmm_fence_wait(hmm_fence *fence, int64_t timeout_ns);
HMM_API int hmm_fence_info(hmm_fence *fence, struct hmm_fence_info *info);
/* Drops the reference that the submitting call returned. NULL is allowed. A job goes on without its fence. */
HMM_API void hmm_fence_put(hmm_fence *fence);

/*
 * Job submission. Copies its parameters, queues, returns at once. Jobs of one device may run concurrently and in any order:
 * order them by waiting. Every job sees all memory changes (munmap, madvise, writes...) that happened before the call.
 * fence may be NULL for a caller who does not care about errors. Zero length is -EINVAL, as is a range that
 * wraps around. Overlapping copies behave like memmove. -ENODEV: device closed. -EBUSY: its queue is full, wait for a fence.
 * -EOPNOTSUPP: it runs no jobs. -ENOMEM.
 */
HMM_API int hmm_job_copy(hmm_dev dev, void *dst, const void *src, size_t len, hmm_fence **fence);
HMM_API int hmm_job_fill(hmm_dev dev, void *dst, uint8_t value, size_t len, hmm_fence **fence);
/* CRC-32C (Castagnoli), initial value and final xor 0xffffffff; the result is in hmm_fence_info.result. */
HMM_API int hmm_job_crc32c(hmm_dev dev, const void *src, size_t len, hmm_fence **fence);

/*
 * User kernels: a C function that runs on a device engine and reaches process memory only through its accessor. It must not
 * allocate, lock, do I/O or call other parts of libhmm: the engine may be the one that memory comes back through. An access
 * to an unmapped or protected address does not return: it ends the job with -EFAULT / -EACCES and the address in the fence.
 */
typedef struct hmm_accessor hmm_accessor;
typedef uint64_t (*hmm_kernel)(hmm_accessor *acc, void *arg);

struct hmm_launch {
    uint32_t size;        /* sizeof(struct hmm_launch) */
    uint32_t deadline_ms; /* an invalidation waits this long for a span, then ends the kernel; 0: 1000 */
    hmm_kernel kernel;
    const void *arg; /* copied to the device at submission; the kernel gets the copy, 16-byte aligned, writable */
    size_t arg_size; /* 0..64 KiB */
};
HMM_API int hmm_job_launch(hmm_dev dev, const struct hmm_launch *launch, hmm_fence **fence);

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
    uint64_t pages_cleared;   /* absent or zero pages cleared on a device instead of copied */
    uint64_t bytes_to_device; /* copied by drivers */
    uint64_t bytes_to_system; /* copied by drivers or by UFFDIO_COPY from device memory */
    uint64_t huge_to_device;  /* whole huge pages taken */
    uint64_t huge_to_system;  /* whole huge pages restored */
    uint64_t evicted;         /* pages sent home to make room on a device */
    uint64_t invalidations;   /* notifier callbacks */
    uint64_t events_unmap, events_remove, events_remap;
    uint64_t dropped;          /* device or staged pages whose memory was unmapped or dropped */
    uint64_t retries;          /* system calls repeated because an event was pending */
    uint64_t rollbacks;        /* staged pages put back because a migration failed */
    uint64_t pinned;           /* pages left because the kernel holds them */
    uint64_t metadata_bytes;   /* gauge: tables and descriptors, without per-device fixed descriptors */
    uint64_t descriptor_bytes; /* gauge: page descriptors of all open devices */
    uint64_t staging_bytes;    /* gauge: resident memory of pages in transit, as accounted */
    uint64_t device_pages;     /* gauge: pages now on devices */
    uint64_t blocks;           /* gauge: 2 MiB blocks tracked */
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
