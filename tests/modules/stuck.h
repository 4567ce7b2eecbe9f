/* SPDX-License-Identifier: MIT */
/*
 * libhmm-stuck.so: a memory tier whose notifier callbacks do what a test says: return, sleep, or never come back. The test finds the
 * object below with dlsym(), in the same file that libhmm loads.
 */
#ifndef TESTS_MODULES_STUCK_H
#define TESTS_MODULES_STUCK_H

#include <stdint.h>

#define STUCK_SLOTS 4 /* devices at a time, "stuck:slot=N" */
#define STUCK_CALLBACK "stuck-invalidate"

struct stuck_device {
    volatile uint32_t hold;     /* callbacks that may wait do so until it is 0 */
    volatile uint32_t sleep_ms; /* they take so long */
    volatile uint32_t inside;   /* callbacks that run now */
    volatile uint32_t calls;    /* that have returned */
    volatile uint32_t refused;  /* those that must not wait, while it is held: they said -EAGAIN */
};

struct stuck_interface {
    struct stuck_device devices[STUCK_SLOTS];
    /* Puts a notifier of the device over [start, end). Removed when the device is closed. 0 or what hmm_notifier_insert() said. */
    int (*watch)(unsigned slot, uintptr_t start, uintptr_t end);
};

#define STUCK_SYMBOL "stuck_interface"

#endif
