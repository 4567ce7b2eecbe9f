/* SPDX-License-Identifier: MIT */
/* Telling programs which drivers there are, and what their options may be, in words. */
#include <stdio.h>

#include "api/drivers.h"
#include "base/error.h"

struct listing {
    hmm_driver_fn fn;
    void *arg;
};

/* "64K", or the number where no unit fits. */
static void print_size(char *text, size_t size, uint64_t n)
{
    static const char units[] = "\0KMGT";
    unsigned unit = 0;
    while (n && n % 1024 == 0 && unit < 4) {
        n /= 1024;
        unit++;
    }
    snprintf(text, size, "%llu%.1s", (unsigned long long)n, &units[unit]);
}

static void print_range(char *text, size_t size, const struct hmm_option *o)
{
    char min[24], max[24];
    if (o->type == HMM_OPTION_SIZE) {
        print_size(min, sizeof(min), o->min);
        print_size(max, sizeof(max), o->max);
    } else {
        snprintf(min, sizeof(min), "%llu", (unsigned long long)o->min);
        snprintf(max, sizeof(max), "%llu", (unsigned long long)o->max);
    }
    snprintf(text, size, "%s to %s", min, max);
}

static const char *values_of(const struct hmm_option *o, char *text, size_t size)
{
    switch (o->type) {
    case HMM_OPTION_FLAG: return "on or off";
    case HMM_OPTION_CHOICE: return o->choices;
    case HMM_OPTION_SPEC: return "a device spec";
    case HMM_OPTION_STRING: return "text without ','";
    default: print_range(text, size, o); return text;
    }
}

static void list_driver(const struct hmm_driver *d, const char *origin, void *arg)
{
    const struct listing *to = arg;
    struct hmm_driver_item item = {
        .size = sizeof(item), .driver = d->name, .description = d->description ? d->description : "", .origin = origin};
    char text[64];
    to->fn(&item, to->arg);
    for (const struct hmm_option *o = d->options; o && o->name; o++) {
        item.option = o->name;
        item.help = o->help ? o->help : "";
        item.fallback = o->type == HMM_OPTION_FLAG ? "off" : o->fallback;
        item.values = values_of(o, text, sizeof(text));
        to->fn(&item, to->arg);
    }
}

void hmm_drivers(hmm_driver_fn fn, void *arg)
{
    struct listing to = {fn, arg};
    message_clear();
    if (fn)
        drivers_each(list_driver, &to);
}
