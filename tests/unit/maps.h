/* SPDX-License-Identifier: MIT */
/* What the kernel says of the mappings of this process: an oracle for what is registered. */
#ifndef TESTS_UNIT_MAPS_H
#define TESTS_UNIT_MAPS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

struct maps_range {
    unsigned mappings;          /* that overlap it */
    uintptr_t bytes;            /* of it that are mapped */
    uintptr_t missing, watched; /* bytes with each kind of registration */
    uintptr_t hidden_from_fork; /* bytes with DONTFORK */
};

static inline bool maps_has_flag(const char *line, const char *flag)
{
    const char *at = strstr(line, flag);
    return at && at[-1] == ' ' && (at[2] == ' ' || at[2] == '\n');
}

static inline struct maps_range maps_look(const void *addr, size_t len)
{
    uintptr_t start = (uintptr_t)addr, end = start + len, part = 0;
    struct maps_range m = {0};
    FILE *f = fopen("/proc/self/smaps", "re");
    char line[512];
    while (f && fgets(line, sizeof(line), f)) {
        unsigned long s, e;
        char dash;
        if (sscanf(line, "%lx%c%lx ", &s, &dash, &e) == 3 && dash == '-') {
            uintptr_t from = s > start ? s : start, to = e < end ? e : end;
            part = from < to ? to - from : 0;
            m.mappings += part != 0;
            m.bytes += part;
        } else if (strncmp(line, "VmFlags:", 8) == 0) {
            m.missing += maps_has_flag(line, "um") ? part : 0;
            m.watched += maps_has_flag(line, "uw") ? part : 0;
            m.hidden_from_fork += maps_has_flag(line, "dc") ? part : 0;
        }
    }
    if (f)
        fclose(f);
    return m;
}

#endif
