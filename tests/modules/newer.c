/* SPDX-License-Identifier: MIT */
/* A driver built with a later header of the same ABI: its structure has a slot that this library does not know. */
#include "nothing.h"

struct newer_driver {
    struct hmm_driver now;
    void (*later)(void);
};

static int newer_open(struct hmm_device *dev, const union hmm_option_value *values, void **priv)
{
    (void)values;
    (void)priv;
    return hmm_pagemap_add(dev, &(struct hmm_pagemap_desc){.type = HMM_PAGEMAP_PRIVATE, .pages = 16});
}

static void later(void)
{
}

extern __attribute__((visibility("default"))) const struct newer_driver hmm_driver_entry;
const struct newer_driver hmm_driver_entry = {
    .now =
        {
            .size = sizeof(struct newer_driver),
            .abi = HMM_DRIVER_ABI,
            .name = "newer",
            .description = "of a later release",
            .open = newer_open,
            .stop = nothing,
            .close = nothing,
            .copy = no_copy,
            .clear = no_clear,
        },
    .later = later,
};
