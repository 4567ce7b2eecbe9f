/* SPDX-License-Identifier: MIT */
/* Asking hmm_range_fault(), and what the kernel says, for the tests of one file each. */
#ifndef TESTS_DRIVER_RANGE_H
#define TESTS_DRIVER_RANGE_H

#include <hmm/driver.h>

#include "support.h"

#define PAGES 40
#define REQ_READ HMM_PFN_REQ_FAULT
#define REQ_WRITE (HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)

static struct hmm_notifier notifier;
static uint64_t pfns[4096];
static size_t page;

static int let_go(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    (void)event;
    return 0;
}

static const struct hmm_notifier_ops ops = {.invalidate = let_go, .name = "test"};

static inline struct hmm_device *dev(void)
{
    struct hmm_device *d = hmm_device_of(device);
    assert_non_null(d);
    return d;
}

static inline void watch(const void *start, size_t bytes)
{
    assert_int_equal(hmm_notifier_insert(dev(), &notifier, (uintptr_t)start, (uintptr_t)start + bytes, &ops), 0);
}

static inline void unwatch(void)
{
    assert_int_equal(hmm_notifier_remove(&notifier), 0);
}

static inline struct hmm_fault_range range_of(const void *start, size_t bytes, uint64_t request)
{
    assert_true(bytes / page <= sizeof(pfns) / sizeof(pfns[0]));
    return (struct hmm_fault_range){
        .size = sizeof(struct hmm_fault_range),
        .notifier = &notifier,
        .start = (uintptr_t)start,
        .end = (uintptr_t)start + bytes,
        .pfns = pfns,
        .default_flags = request,
    };
}

/* The whole loop, of all pages, under the notifier. The answers are in pfns[]. */
static inline int ask_watched(const void *start, size_t bytes, uint64_t request, unsigned flags)
{
    struct hmm_fault_range r = range_of(start, bytes, request);
    r.flags = flags;
    memset(pfns, 0xdd, sizeof(pfns)); /* need not be set */
    return hmm_range_fault_timeout(dev(), &r, JOB_SECONDS * 1000000000ll);
}

/* The same with a notifier for as long as it takes. */
static inline int ask(const void *start, size_t bytes, uint64_t request)
{
    watch(start, bytes);
    int result = ask_watched(start, bytes, request, 0);
    unwatch();
    return result;
}

static inline bool is_present(const void *ptr)
{
    return pagemap_word(ptr) >> 63 & 1;
}

static inline char *map_with(int protection, int flags, int fd)
{
    char *p = mmap(NULL, PAGES * page, protection, flags, fd, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    madvise(p, PAGES * page, MADV_NOHUGEPAGE);
    return p;
}

static inline char *anonymous(void)
{
    return map_with(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

#endif
