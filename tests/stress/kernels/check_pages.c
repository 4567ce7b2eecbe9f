/* SPDX-License-Identifier: MIT */
/*
 * A shared object of its own, so that a device whose engines are in another process can load it. It is linked to no libhmm: the
 * accessor is that of whoever loads it, here the program's own copy of the library, there the engines'.
 */
#include "check_pages.h"

HMM_KERNEL(check_pages)
{
    struct job_arg *a = arg;
    for (unsigned i = 0; i < a->n; i++)
        for (unsigned w = 0; w < WORDS; w++) {
            uint64_t found;
            char *at = a->pages[i].addr + a->pages[i].offset[w];
            hmm_get(acc, &found, at, sizeof(found));
            if (found != a->pages[i].before[w])
                return 1 + 256 * i + w;
            hmm_put(acc, at, &a->pages[i].after[w], sizeof(found));
        }
    return 0;
}
