/* SPDX-License-Identifier: MIT */
/* Looking at everything: range query, statistics, whole-process audit. In library threads (the descriptors are there). */
#ifndef HMM_INSPECT_H
#define HMM_INSPECT_H

#include "mm/mm.h"

/* Pages of [start, end), within one block, as hmm_range_query(). handle: names a device. */
int inspect_query(struct mm *mm, uintptr_t start, uintptr_t end, struct hmm_page_info *pages,
                  hmm_dev (*handle)(const struct hmm_device *));

/* All fields but descriptor_bytes. */
void inspect_stats(struct mm *mm, struct hmm_stats *stats);

struct audit_report {
    int violations;
    char first[160];
};
/* Validates every structure, and every entry against PAGEMAP_SCAN. Takes mm->as exclusively. Returns the violations. */
int inspect_audit(struct mm *mm, void (*each_pagemap)(void (*fn)(struct pagemap *, void *), void *),
                  struct audit_report *report);

#endif
