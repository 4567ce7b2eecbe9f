/* SPDX-License-Identifier: MIT */
/* The kernel of stress_protocol and its argument block. */
#ifndef HMM_TESTS_STRESS_CHECK_PAGES_H
#define HMM_TESTS_STRESS_CHECK_PAGES_H

#include <hmm/hmm.h>

#include <stdint.h>

#define JOB_PAGES 16
#define WORDS 8 /* spread over the page; the first and the last word are among them */

struct job_page {
    char *addr; /* of the program */
    uint64_t before[WORDS], after[WORDS];
    uint64_t offset[WORDS];
};

struct job_arg {
    unsigned n;
    struct job_page pages[JOB_PAGES];
};

/* Looks for `before` in each word and replaces it by `after`. Returns 1 + 256 * page + word of the first mismatch, else 0. */
__attribute__((visibility("default"))) uint64_t check_pages(hmm_accessor *acc, void *arg);

#endif
