/* SPDX-License-Identifier: MIT */
/*
 * Pages that devices fail to give back: how often and for how long. A device is asked again, at growing distances; then it has had its
 * time, and the page is taken for lost. Any thread; under no lock of a higher rank than RANK_QUEUE.
 */
#ifndef HMM_FAULT_FAILING_H
#define HMM_FAULT_FAILING_H

#include <stdbool.h>
#include <stdint.h>

#define FAILING_PATIENCE_NS 10000000000ull
#define FAILING_TRIES 16
#define FAILING_PAGES 32 /* counted at a time */

/* Forgets everything. No other thread is here. */
void failing_start(void);
void failing_stop(void);

/*
 * The page did not come, once more. Returns how often, for the caller to wait the longer. *over: FAILING_TRIES tries and
 * FAILING_PATIENCE_NS have passed. Only what the device fails at counts for that: memory of the system (device_failed false) is waited
 * for as long as it takes, and the device has its full time after it. Where FAILING_PAGES other pages are counted, this one is not:
 * FAILING_TRIES is returned, and its turn comes when they are done.
 */
unsigned failing_note(uintptr_t page, bool device_failed, uint64_t now, bool *over);
/* It came, or is lost: the next failure is a first one. */
void failing_forget(uintptr_t page);

#endif
