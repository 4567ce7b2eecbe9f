/* SPDX-License-Identifier: MIT */
/*
 * Answers of the range fault, without bringing anything: what the kernel and the page table say of the pages of a range.
 *
 * Nothing is held while the kernel is asked, and the caller's pfns are not touched under a lock of ours. So two answers may be of
 * different moments; that is what the sequence number is for: what was right at its own moment, and was not invalidated since, still is.
 * Entries are read after the kernel was asked, and win: a page that came to a device in between is there.
 */
#ifndef HMM_MIRROR_LOOK_H
#define HMM_MIRROR_LOOK_H

#include "mm/mm.h"

/* Where a request waits while its word holds the answer: bits that an answer does not use. */
#define KEPT_SHIFT 5 /* VALID and WRITE to bits 58 and 57 */
#define PFN_KEPT ((HMM_PFN_VALID | HMM_PFN_WRITE) >> KEPT_SHIFT)

struct look {
    struct hmm_device *dev;
    struct hmm_fault_range *range;
    uintptr_t at; /* how far it came: for messages */
    bool kept;    /* requests are in the words, at PFN_KEPT, and stay there */
    /* Of all answers of the last look_at_mapping(): these bits. Without one of VALID or WRITE, some page lacks it. */
    uint64_t common;
    struct os_vma vma; /* look_at_device(): the mapping that was asked for last */
};

static inline uint64_t *look_pfn(const struct look *l, uintptr_t addr)
{
    return l->range->pfns + ((addr - l->range->start) >> os_page_shift());
}

/* Sets the answer of every page of [start, end) to `value`. */
void look_fill(const struct look *l, uintptr_t start, uintptr_t end, uint64_t value);
/* All of [start, end), which lies within the readable mapping vma. 0, or the error of a system call. No locks held. */
int look_at_mapping(struct look *l, const struct os_vma *vma, uintptr_t start, uintptr_t end);
/* Only what is on this device; asks the kernel for the protection of mappings that have pages there, and for nothing else. */
int look_at_device(struct look *l, uintptr_t start, uintptr_t end);

/* What stands in the way of system memory at an address. */
enum obstacle_kind { OBSTACLE_NONE, OBSTACLE_FLIGHT, OBSTACLE_OTHER_DEVICE, OBSTACLE_HERE, OBSTACLE_LOST };
/* What is at addr, and up to where in [addr, end) the same holds. For FLIGHT *landings is to be waited for. */
enum obstacle_kind look_at_entry(const struct look *l, uintptr_t addr, uintptr_t end, uintptr_t *same_end, uint32_t *landings);

#endif
