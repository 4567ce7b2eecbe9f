/* SPDX-License-Identifier: MIT */
/* What the tests with libhmm-stuck.so share: a device whose callbacks do not come back while the test holds them. */
#ifndef TESTS_DRIVER_HOLD_H
#define TESTS_DRIVER_HOLD_H

#include "modules/stuck.h"
#include "support.h"

#define BOUND_MS 10000 /* of closing, without progress, says hmm.h */
#define SLACK_MS 6000  /* a busy machine */

extern struct stuck_interface *stuck; /* after the first open_stuck() */
struct stuck_device *knobs(unsigned slot);
hmm_dev open_stuck(unsigned slot);
/* Puts the device's notifier there. */
void watch(unsigned slot, const char *p, size_t len);

/* Teardown: nothing stays held, whatever the test did. */
int release_all(void **state);
#define TEST_HOLD(f) cmocka_unit_test_setup_teardown(f, setup_none, release_all)

void all_to_device(hmm_dev dev, const char *p, size_t len);
/* fill_random() with this seed is there. */
void check_content(const char *p, size_t len, uint64_t seed);
/* Unmaps, and keeps the addresses from being another's at once: who gets them has to wait for the device that does not let go. */
void unmap_and_keep(char *p, size_t len);

/* A close that must give up, after the bound and with these words (to a NULL) in its message. */
void close_gives_up(hmm_dev dev, const char *const *words);
/* One that must not. */
void close_in_time(hmm_dev dev);

#endif
