/* SPDX-License-Identifier: MIT */
/* A shared object with kernels, for tests of how kernels are found by name. */
#include <hmm/hmm.h>

#include <string.h>

HMM_KERNEL(object_answer)
{
    (void)acc;
    uint64_t n = 1;
    if (arg)
        memcpy(&n, arg, sizeof(n));
    return 42 * n;
}

HMM_KERNEL(object_other)
{
    (void)acc;
    (void)arg;
    return 7;
}

static uint64_t hidden(hmm_accessor *acc, void *arg)
{
    (void)acc;
    (void)arg;
    return 3;
}

/* Gives a kernel that has no name. */
__attribute__((visibility("default"))) hmm_kernel object_hidden(void);
__attribute__((visibility("default"))) hmm_kernel object_hidden(void)
{
    return hidden;
}
