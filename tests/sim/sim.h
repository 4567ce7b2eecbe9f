/* SPDX-License-Identifier: MIT */
/*
 * A simulated system: an operations table that can be an old kernel, one without permission, or one that lacks a single thing.
 * Descriptors are invented and counted; memory is real. One thread.
 */
#ifndef HMM_TESTS_SIM_H
#define HMM_TESTS_SIM_H

#include "os/os.h"

struct sim {
    int version;    /* 6018 */
    int uffd_error; /* of every route; 0: opens */
    bool user_mode_only;
    uint64_t uffd_absent; /* features that the kernel does not have */
    int register_error;
    int64_t move_result; /* 0: moves; else this and nothing is moved */
    bool move_lies;      /* says that it moved and did not */
    int pagemap_error, scan_error;
    int maps_error, vma_error;
    bool vma_slow; /* no PROCMAP_QUERY */
    int map_error, populate_error;
    int vm_error;
    int threads;           /* result of thread_blocks */
    const char *thp;       /* NULL: no such file */
    const char *map_count; /* NULL: no such file */
};

/* A system that has everything. */
extern const struct sim sim_complete;

/* Puts the simulated table into `os`. The structure is copied. */
void sim_start(const struct sim *system);
/* Puts the real table back. Returns what was left open: descriptors plus mappings. */
int sim_stop(void);

#endif
