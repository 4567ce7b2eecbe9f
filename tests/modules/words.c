/* SPDX-License-Identifier: MIT */
/* A driver with one option of each type, whose open() fails with what it was given. */
#include "nothing.h"

enum { SIZE, NUMBER, TEXT, FLAG, MODE, MUST, REST };

static const struct hmm_option options[] = {
    [SIZE] = {.name = "size", .type = HMM_OPTION_SIZE, .fallback = "1K", .max = 1 << 20, .help = "a size"},
    [NUMBER] = {.name = "number", .type = HMM_OPTION_UINT, .fallback = "3", .min = 1, .max = 9, .help = "a number"},
    [TEXT] = {.name = "text", .type = HMM_OPTION_STRING, .fallback = "", .help = "a text"},
    [FLAG] = {.name = "flag", .type = HMM_OPTION_FLAG, .help = "on or off"},
    [MODE] = {.name = "mode", .type = HMM_OPTION_CHOICE, .fallback = "two", .choices = "one|two|three", .help = "a choice"},
    [MUST] = {.name = "must", .type = HMM_OPTION_UINT, .max = 9, .help = "must be given"},
    [REST] = {.name = "rest", .type = HMM_OPTION_SPEC, .fallback = "none", .help = "a spec"},
    {.name = NULL},
};

static int words_open(struct hmm_device *dev, const union hmm_option_value *v, void **priv)
{
    (void)dev;
    (void)priv;
    return hmm_fail(-EIO, "size %llu number %llu text '%s' flag %llu mode %llu must %llu rest '%s'",
                    (unsigned long long)v[SIZE].number, (unsigned long long)v[NUMBER].number, v[TEXT].string,
                    (unsigned long long)v[FLAG].number, (unsigned long long)v[MODE].number, (unsigned long long)v[MUST].number,
                    v[REST].string);
}

HMM_DRIVER_EXPORT = {
    .size = sizeof(struct hmm_driver),
    .abi = HMM_DRIVER_ABI,
    .name = "words",
    .description = "says what it was given",
    .options = options,
    .open = words_open,
    .stop = nothing,
    .close = nothing,
    .copy = no_copy,
    .clear = no_clear,
};
