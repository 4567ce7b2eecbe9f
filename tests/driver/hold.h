/* SPDX-License-Identifier: MIT */
/* What the tests with libhmm-stuck.so share: a device whose callbacks do not come back while the test holds them. */
#ifndef TESTS_DRIVER_HOLD_H
#define TESTS_DRIVER_HOLD_H

#include "modules/stuck.h"
#include "support.h"

#define BOUND_MS 10000 /* of closing and of limits, without progress, says hmm.h */
#define SHORT_MS 3000  /* what HMM_DEBUG makes of it for the tests, but for one */
#define SLACK_MS 6000  /* a busy machine */

extern struct stuck_interface *stuck; /* after the first open_stuck() */
extern unsigned bound_ms;             /* BOUND_MS or SHORT_MS */
struct stuck_device *knobs(unsigned slot);
hmm_dev open_stuck(unsigned slot);
/* Puts the device's notifier there. */
void watch(unsigned slot, const char *p, size_t len);

int setup_hold(void **state);      /* SHORT_MS */
int setup_hold_long(void **state); /* BOUND_MS */
/* Teardown: nothing stays held, whatever the test did. */
int release_all(void **state);
#define TEST_HOLD(f) cmocka_unit_test_setup_teardown(f, setup_hold, release_all)
#define TEST_HOLD_LONG(f) cmocka_unit_test_setup_teardown(f, setup_hold_long, release_all)

void all_to_device(hmm_dev dev, const char *p, size_t len);
/* Unmaps, and keeps the addresses from being another's at once: who gets them has to wait for the device that does not let go. */
void unmap_and_keep(char *p, size_t len);

/* A close that must give up, after the bound and with these words (to a NULL) in its message. */
void close_gives_up(hmm_dev dev, const char *const *words);
/* One that must not. */
void close_in_time(hmm_dev dev);

#endif
