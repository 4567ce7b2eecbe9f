/* SPDX-License-Identifier: MIT */
/* The soft device: options, and what is set up and taken down in which order. See soft.h and docs/soft.md. */
#include "soft.h"

#include <errno.h>

enum { OPTION_MEMORY, OPTION_ENGINES, OPTION_COPIES, OPTION_INVALIDATE_DELAY };

static const struct hmm_option options[] = {
    [OPTION_MEMORY] = {"memory", HMM_OPTION_SIZE, "256M", 64 << 10, (uint64_t)4 << 40, "bytes of device memory"},
    [OPTION_ENGINES] = {"engines", HMM_OPTION_UINT, "2", 1, SOFT_ENGINES_MAX, "threads that run jobs"},
    [OPTION_COPIES] = {"copies", HMM_OPTION_UINT, "2", 1, SOFT_COPIES_MAX, "threads that copy pages"},
    [OPTION_INVALIDATE_DELAY] = {"invalidate_delay_ms", HMM_OPTION_UINT, "0", 0, 60000,
                                 "for tests: how much longer each invalidation takes"},
    {.name = NULL},
};

static int give_memory(struct soft *s)
{
    return hmm_pagemap_add(s->dev, &(struct hmm_pagemap_desc){
                                       .type = HMM_PAGEMAP_PRIVATE,
                                       .pages = s->memory.pages,
                                       .cpu_map = s->memory.map,
                                   });
}

static int soft_open(struct hmm_device *dev, const union hmm_option_value *values, void **priv)
{
    struct soft *s = hmm_mem_alloc(sizeof(*s));
    if (!s)
        return hmm_fail(-ENOMEM, "soft: no memory for the device");
    s->dev = dev;
    s->gate = hmm_event_gate(dev);
    s->invalidate_delay_ms = (uint32_t)values[OPTION_INVALIDATE_DELAY].number;
    int r = soft_memory_init(&s->memory, values[OPTION_MEMORY].number);
    if (r)
        goto free_device;
    r = soft_table_init(s);
    if (r)
        goto free_memory;
    r = soft_copy_init(s, (unsigned)values[OPTION_COPIES].number);
    if (r)
        goto free_table;
    r = soft_engines_init(s, (unsigned)values[OPTION_ENGINES].number);
    if (r)
        goto stop_copies;
    r = give_memory(s);
    if (r)
        goto stop_engines;
    *priv = s;
    return 0;

stop_engines:
    soft_engines_join(s);
    soft_engines_exit(s);
stop_copies:
    soft_copy_exit(s);
free_table:
    soft_table_exit(s);
free_memory:
    soft_memory_exit(&s->memory);
free_device:
    hmm_mem_free(s, sizeof(*s));
    return r;
}

static void soft_stop(void *priv)
{
    soft_engines_stop(priv);
}

/* Engines use the table, and invalidations, which end with the table, look at the engines. */
static void soft_close(void *priv)
{
    struct soft *s = priv;
    soft_engines_join(s);
    soft_table_exit(s);
    soft_engines_exit(s);
    soft_copy_exit(s);
    soft_memory_exit(&s->memory);
    hmm_mem_free(s, sizeof(*s));
}

const struct hmm_driver soft_driver = {
    .size = sizeof(struct hmm_driver),
    .abi = HMM_DRIVER_ABI,
    .name = "soft",
    .description = "software device: memory of its own, engines on threads of this process",
    .options = options,
    .open = soft_open,
    .stop = soft_stop,
    .close = soft_close,
    .copy = soft_copy,
    .clear = soft_clear,
    .submit = soft_submit,
};
