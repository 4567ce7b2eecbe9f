/* SPDX-License-Identifier: MIT */
/* The soft device: options, and what is set up and taken down in which order. See soft.h and docs/soft.md. */
#include "link.h"
#include "soft.h"

#include <errno.h>

enum {
    OPTION_MEMORY,
    OPTION_ENGINES,
    OPTION_COPIES,
    OPTION_ISOLATED,
    OPTION_MODEL,
    OPTION_PAGE,
    OPTION_LINK,
    OPTION_BANDWIDTH,
    OPTION_LATENCY,
    OPTION_FAULT_LATENCY,
    OPTION_INVALIDATE_DELAY
};

#define NUMBER(name_, type_, fallback_, min_, max_, help_)                                                                     \
    {                                                                                                                          \
        .name = (name_), .type = (type_), .fallback = (fallback_), .min = (min_), .max = (max_), .help = (help_)               \
    }
#define CHOICE(name_, fallback_, choices_, help_)                                                                              \
    {                                                                                                                          \
        .name = (name_), .type = HMM_OPTION_CHOICE, .fallback = (fallback_), .help = (help_), .choices = (choices_)            \
    }

#define TERA ((uint64_t)1 << 40)
#define SECOND_NS 1000000000

static const struct hmm_option options[] = {
    [OPTION_MEMORY] = NUMBER("memory", HMM_OPTION_SIZE, "256M", 64 << 10, 4 * TERA, "bytes of device memory"),
    [OPTION_ENGINES] = NUMBER("engines", HMM_OPTION_UINT, "2", 1, SOFT_ENGINES_MAX, "threads that run jobs"),
    [OPTION_COPIES] = NUMBER("copies", HMM_OPTION_UINT, "2", 1, SOFT_COPIES_MAX, "threads that copy pages"),
    [OPTION_ISOLATED] = {.name = "isolated", .type = HMM_OPTION_FLAG, .help = "engines run in a process of their own"},
    [OPTION_MODEL] = CHOICE("model", "fault", SOFT_MODELS,
                            "page faults; or ranges of jobs held while they run; or held, and known to the next job"),
    [OPTION_PAGE] = CHOICE("page", "4K", "4K|64K|2M", "what faults of either side move at least"),
    [OPTION_LINK] = CHOICE("link", "none", SOFT_LINKS, "the link to system memory whose speed is modelled"),
    [OPTION_BANDWIDTH] = NUMBER("bandwidth", HMM_OPTION_SIZE, "0", 0, 1024 * TERA,
                                "bytes per second of each direction of the link; 0: as the link says"),
    [OPTION_LATENCY] = NUMBER("latency_ns", HMM_OPTION_UINT, "0", 0, SECOND_NS, "of each transfer; 0: as the link says"),
    [OPTION_FAULT_LATENCY] =
        NUMBER("fault_latency_ns", HMM_OPTION_UINT, "0", 0, SECOND_NS, "of each fault of the device; 0: as the link says"),
    [OPTION_INVALIDATE_DELAY] =
        NUMBER("invalidate_delay_ms", HMM_OPTION_UINT, "0", 0, 60000, "for tests: how much longer each invalidation takes"),
    {.name = NULL},
};

static int give_memory(struct soft *s)
{
    return hmm_pagemap_add(s->dev, &(struct hmm_pagemap_desc){
                                       .type = HMM_PAGEMAP_PRIVATE,
                                       .pages = s->memory.pages,
                                       /* With a link every byte is to cross it: core reads nothing directly. */
                                       .cpu_map = s->bus.modelled ? NULL : s->memory.map,
                                       .granule = s->page,
                                   });
}

/* Memory is whole pages of the device. */
static int make_memory(struct soft *s, const union hmm_option_value *values)
{
    uint64_t bytes = (values[OPTION_MEMORY].number + s->page - 1) & ~(uint64_t)(s->page - 1);
    if (values[OPTION_ISOLATED].number)
        return soft_link_open(s, bytes, (unsigned)values[OPTION_ENGINES].number);
    return soft_memory_init(&s->memory, bytes, NULL);
}

static void free_memory(struct soft *s)
{
    if (s->link)
        soft_link_close(s);
    else
        soft_memory_exit(&s->memory);
}

/* Two jobs per engine: one to run, and the next, so that no engine waits for core. Kernels of another process have names, or they are not
 * found there. */
static int describe_engines(struct soft *s, unsigned engines)
{
    return hmm_engines_add(s->dev, &(struct hmm_engines_desc){
                                       .size = sizeof(struct hmm_engines_desc),
                                       .slots = 2 * engines,
                                       .flags = s->link ? HMM_ENGINES_NAMED : 0,
                                   });
}

/* 4K is the smallest page that there is, whatever the system's. */
static int choose_page(struct soft *s, uint64_t choice)
{
    static const uint32_t pages[] = {4 << 10, 64 << 10, 2 << 20};
    s->page = pages[choice];
    if (s->page < hmm_page_size() && choice)
        return hmm_fail(-EINVAL, "soft: page=%uK is less than the system's page of %zuK", s->page >> 10, hmm_page_size() >> 10);
    if (s->page < hmm_page_size())
        s->page = (uint32_t)hmm_page_size();
    return 0;
}

static int soft_open(struct hmm_device *dev, const union hmm_option_value *values, void **priv)
{
    struct soft *s = hmm_mem_alloc(sizeof(*s));
    if (!s)
        return hmm_fail(-ENOMEM, "soft: no memory for the device");
    s->dev = dev;
    s->invalidate_delay_ms = (uint32_t)values[OPTION_INVALIDATE_DELAY].number;
    soft_bus_init(&s->bus, values[OPTION_LINK].number, values[OPTION_BANDWIDTH].number, values[OPTION_LATENCY].number,
                  values[OPTION_FAULT_LATENCY].number);
    int r = choose_page(s, values[OPTION_PAGE].number);
    if (!r)
        r = make_memory(s, values);
    if (r)
        goto free_device;
    r = soft_mirror_init(s);
    if (r)
        goto drop_memory;
    soft_model_init(s, (enum model_kind)values[OPTION_MODEL].number);
    r = soft_copy_init(s, (unsigned)values[OPTION_COPIES].number);
    if (r)
        goto free_mirror;
    r = soft_ports_init(s, (unsigned)values[OPTION_ENGINES].number);
    if (r)
        goto stop_copies;
    r = describe_engines(s, s->nports);
    if (!r)
        r = give_memory(s);
    if (!r && s->link)
        r = soft_link_opened(s->link);
    if (r)
        goto stop_engines;
    *priv = s;
    return 0;

stop_engines:
    soft_ports_join(s);
    soft_ports_exit(s);
stop_copies:
    soft_copy_exit(s);
free_mirror:
    soft_mirror_exit(s);
    soft_model_exit(s);
drop_memory:
    free_memory(s);
free_device:
    soft_bus_exit(&s->bus);
    hmm_mem_free(s, sizeof(*s));
    return r;
}

static void soft_stop(void *priv)
{
    soft_ports_stop(priv);
    soft_model_stop(priv);
}

/* Engines use the mirror, and invalidations, which end with the mirror, look at the engines. */
static void soft_close(void *priv)
{
    struct soft *s = priv;
    soft_ports_join(s);
    soft_mirror_exit(s);
    soft_model_exit(s);
    soft_ports_exit(s);
    soft_copy_exit(s);
    free_memory(s);
    soft_bus_exit(&s->bus);
    hmm_mem_free(s, sizeof(*s));
}

const struct hmm_driver soft_driver = {
    .size = sizeof(struct hmm_driver),
    .abi = HMM_DRIVER_ABI,
    .name = "soft",
    .description = "software device: memory of its own, engines on threads of this process or in one of their own",
    .options = options,
    .open = soft_open,
    .stop = soft_stop,
    .close = soft_close,
    .copy = soft_copy,
    .clear = soft_clear,
    .submit = soft_submit,
    .cancel = soft_cancel,
};
