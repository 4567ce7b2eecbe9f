/* SPDX-License-Identifier: MIT */
/* Drivers that must be refused, or that fail: built once per kind of fault (meson.build), each as the file that its NAME says. */
#include "../nothing.h"

static int some_open(struct hmm_device *dev, const union hmm_option_value *values, void **priv)
{
    (void)values;
    (void)priv;
#ifdef FAILS_HALF_WAY
    int r = hmm_pagemap_add(dev, &(struct hmm_pagemap_desc){.type = HMM_PAGEMAP_PRIVATE, .pages = 16});
    return r ? r : hmm_fail(-EIO, "the device does not answer");
#else
    (void)dev;
    return 0;
#endif
}

#define NUMBER(n)                                                                                                              \
    {                                                                                                                          \
        .name = (n), .type = HMM_OPTION_UINT, .fallback = "0", .max = 1, .help = "-"                                           \
    }
static const struct hmm_option options[] = {
#ifdef NO_CHOICES
    {.name = "mode", .type = HMM_OPTION_CHOICE, .fallback = "a", .help = "-"},
#endif
#ifdef EMPTY_CHOICE
    {.name = "mode", .type = HMM_OPTION_CHOICE, .fallback = "a", .help = "-", .choices = "a||b"},
#endif
#ifdef BAD_FALLBACK
    {.name = "size", .type = HMM_OPTION_SIZE, .fallback = "lots", .max = 1, .help = "-"},
#endif
#ifdef FALLBACK_OUT_OF_RANGE
    {.name = "size", .type = HMM_OPTION_SIZE, .fallback = "2", .max = 1, .help = "-"},
#endif
#ifdef FLAG_WITH_FALLBACK
    {.name = "deep", .type = HMM_OPTION_FLAG, .fallback = "1", .help = "-"},
#endif
#ifdef SPEC_NOT_LAST
    {.name = "over", .type = HMM_OPTION_SPEC, .help = "-"},
    NUMBER("more"),
#endif
#ifdef TWICE
    NUMBER("more"),
    NUMBER("more"),
#endif
#ifdef NAMELESS
    NUMBER("a=b"),
#endif
#ifdef UNKNOWN_TYPE
    {.name = "more", .type = (enum hmm_option_type)99, .fallback = "0", .help = "-"},
#endif
#ifdef TOO_MANY
    NUMBER("a"),
    NUMBER("b"),
    NUMBER("c"),
    NUMBER("d"),
    NUMBER("e"),
    NUMBER("f"),
    NUMBER("g"),
    NUMBER("h"),
    NUMBER("i"),
    NUMBER("j"),
    NUMBER("k"),
    NUMBER("l"),
    NUMBER("m"),
    NUMBER("n"),
    NUMBER("o"),
    NUMBER("p"),
    NUMBER("q"),
#endif
    {.name = NULL},
};

#ifndef NO_SYMBOL
HMM_DRIVER_EXPORT = {
#ifdef TOO_SMALL
    .size = 64,
#else
    .size = sizeof(struct hmm_driver),
#endif
#ifdef OTHER_ABI
    .abi = HMM_DRIVER_ABI + 1,
    .name = (const char *)8, /* is not to be looked at: it may be anything in another interface */
#else
    .abi = HMM_DRIVER_ABI,
#ifdef WRONG_NAME
    .name = "somethingelse",
#else
    .name = NAME,
#endif
#endif
    .description = "a driver that must not be used",
    .options = options,
    .open = some_open,
    .stop = nothing,
    .close = nothing,
#ifndef NO_COPY
    .copy = no_copy,
#endif
    .clear = no_clear,
};
#else
const void *const unused[] = {options, some_open, nothing, no_copy, no_clear};
#endif
