/* SPDX-License-Identifier: MIT */
/* Every number of hmm_stats(), by name: for `hmm demo --stats`, and for its JSON object. One thread. */
#include <inttypes.h>
#include <stdio.h>

#include "demo.h"

#define NAME_WIDTH 24

struct field {
    const char *name; /* as in struct hmm_stats */
    size_t offset;
    const char *help;
};

#define FIELD(name, help)                                                                                                      \
    {                                                                                                                          \
#name, offsetof(struct hmm_stats, name), help                                                                          \
    }

static const struct field fields[] = {
    FIELD(cpu_faults, "faults of the CPU on managed memory"),
    FIELD(cpu_faults_slow, "of these, served by a worker"),
    FIELD(zero_filled, "pages given as zeros to touches of absent managed memory"),
    FIELD(device_faults, "page faults of devices"),
    FIELD(pages_to_device, "pages migrated to devices"),
    FIELD(pages_to_system, "pages migrated home"),
    FIELD(pages_cleared, "pages cleared on a device instead of copied"),
    FIELD(bytes_to_device, "bytes copied to devices"),
    FIELD(bytes_to_system, "bytes copied home"),
    FIELD(huge_to_device, "huge pages taken whole"),
    FIELD(huge_to_system, "huge pages restored whole"),
    FIELD(evicted, "pages sent home to make room, or to meet a limit"),
    FIELD(limited, "pages that found no room because of a limit"),
    FIELD(invalidations, "notifier callbacks"),
    FIELD(invalidations_refused, "of these, those that had to wait, and were called again"),
    FIELD(invalidation_ns, "nanoseconds in callbacks"),
    FIELD(events_unmap, "by event: memory unmapped"),
    FIELD(events_remove, "by event: content dropped"),
    FIELD(events_remap, "by event: memory moved"),
    FIELD(events_fork, "by event: fork"),
    FIELD(calls_unmap, "by wrapper: memory unmapped"),
    FIELD(calls_remove, "by wrapper: content dropped"),
    FIELD(calls_remap, "by wrapper: memory moved"),
    FIELD(calls_protect, "by wrapper: protection changed"),
    FIELD(calls_fork, "by wrapper: fork"),
    FIELD(calls_release, "by wrapper: exec and exit"),
    FIELD(forks, "children that got their copy of what was on devices"),
    FIELD(pages_to_children, "pages copied for them"),
    FIELD(dropped, "pages that were away when their memory was unmapped or dropped"),
    FIELD(poisoned, "pages whose content was lost with a device"),
    FIELD(retries, "calls repeated because an event was pending, or a page did not come home"),
    FIELD(rollbacks, "migrations that failed and were undone"),
    FIELD(pinned, "pages left because the kernel holds them"),
    FIELD(device_pages, "now: pages on devices"),
    FIELD(transit_pages, "now: of these, on their way"),
    FIELD(mirrored_bytes, "now: bytes of memory that devices mirror"),
    FIELD(staging_bytes, "now: bytes of system memory that hold pages in transit"),
    FIELD(metadata_bytes, "now: bytes of tables"),
    FIELD(descriptor_bytes, "now: bytes of page descriptors"),
    FIELD(blocks, "now: blocks of 2 MiB tracked"),
    FIELD(limit_bytes, "limit of the process, in bytes; 0: none"),
    FIELD(pins, "now: ranges that are pinned"),
    FIELD(pins_dirty, "pins that ended as dirty"),
};

static uint64_t value_of(const struct hmm_stats *stats, const struct field *f)
{
    return *(const uint64_t *)((const char *)stats + f->offset);
}

void stats_print(const struct hmm_stats *stats)
{
    printf("Statistics of the library:\n");
    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
        printf("  %-*s %14" PRIu64 "  %s\n", NAME_WIDTH, fields[i].name, value_of(stats, &fields[i]), fields[i].help);
    printf("\n");
}

json_object *stats_json(const struct hmm_stats *stats)
{
    json_object *o = json_object_new_object();

    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
        json_object_object_add(o, fields[i].name, json_object_new_uint64(value_of(stats, &fields[i])));
    return o;
}
