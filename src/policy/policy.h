/* SPDX-License-Identifier: MIT */
/*
 * Decisions: what to bring along with a faulting page. Pure functions of their arguments: no locks, no system calls, replayable.
 * Pages are indices within a block of `pages` pages; a range [first, end) always contains the faulting page.
 */
#ifndef HMM_POLICY_H
#define HMM_POLICY_H

#include <stdbool.h>
#include <stdint.h>

struct policy_range {
    unsigned first, end;
};

struct policy_device_fault {
    unsigned pages, page;  /* of the block; faulting */
    unsigned on_device;    /* pages of this block on the device already */
    unsigned previous;     /* pages of the block before it on the device: a sequential walk leaves it full */
    bool huge;             /* the CPU maps it as one huge page: taken whole */
    uint64_t device_pages; /* capacity of the device */
    unsigned granule;      /* what the device moves at least: pages, a power of two, at most `pages`; 0: one */
};
/* Grows with evidence: 64 KiB, then as much as is there already, then the block. Never more than a quarter of the device, but
 * whole granules. */
struct policy_range policy_device_fault(const struct policy_device_fault *in);

/* Sequential CPU touches, over several streams. Owned by one thread. */
#define POLICY_STREAMS 8
struct policy_streams {
    struct {
        uintptr_t next;  /* page number where the stream would fault next */
        unsigned window; /* pages brought last time */
        uint64_t used;   /* clock of last use */
    } s[POLICY_STREAMS];
    uint64_t clock;
    unsigned last; /* the stream of the last decision */
};
struct policy_cpu_fault {
    unsigned pages, page;
    uintptr_t number; /* absolute page number of the faulting page */
    bool huge;        /* went as one huge page: comes back as one */
    unsigned granule; /* as above */
};
/* A page that continues a stream doubles the stream's window, up to the block; any other page comes alone. Always whole granules. */
struct policy_range policy_cpu_fault(struct policy_streams *streams, const struct policy_cpu_fault *in);

/* Zeros for memory that was never touched: how many pages from `number` on, of at most `most` (> 0). A page that continues a stream gets
 * twice what the stream got last, any other the first window. policy_zero_given() says what was given in the end. */
struct policy_zero_fault {
    uintptr_t number;
    unsigned most;  /* to where the memory may be filled: the end of the block, or of what is registered */
    unsigned pages; /* of a block: the largest window */
};
unsigned policy_zero_fault(struct policy_streams *streams, const struct policy_zero_fault *in);
void policy_zero_given(struct policy_streams *streams, uintptr_t number, unsigned pages);

#endif
