/* SPDX-License-Identifier: MIT */
/*
 * Messages. hmm_fail() (driver.h) sets the thread's message and returns the error; hmm_log() hands a line to the program.
 *
 * While somebody drains (log_draining), lines from library threads, and from threads that hold a lock of ours, pass through a
 * ring, which a library thread without locks drains into the callback. All other lines are delivered at once. A line that finds
 * the ring full is lost and counted; a line logged from inside a callback is dropped. Lines are cut at 255 bytes ("...").
 *
 * Nothing here allocates or waits for I/O, so it is fit for the fault path.
 */
#ifndef HMM_BASE_ERROR_H
#define HMM_BASE_ERROR_H

#include "base/util.h"
#include <hmm/driver.h>

/* Marks the calling thread as a library thread: its lines go to the ring. */
void log_library_thread(void);
/* A drainer starts (true) or is gone (false; the caller, without locks, delivers what is left). False at first. */
void log_draining(bool on);
/* Delivers queued lines; called by the draining thread, no locks held. Returns the number delivered. */
unsigned log_drain(void);
/* Word that changes when a line was queued; the drainer sleeps on it (futex). */
const uint32_t *log_pending_word(void);
/* Changes it although there is no line, so that the drainer looks whether it is to end. */
void log_wake(void);
/* In a child of fork, also before it opens a device: forgets queued lines and callbacks that ran in other threads. The callback stays set. */
void log_forget(void);
/* hmm_log() where no callback of the program may run: in its signal handlers, and in the calls that it may make there. The drainer
 * delivers the line; that is waited for, 100 ms at most. Where nobody drains it is lost. */
void log_later(enum hmm_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Clears the thread's message at the start of an API call. */
void message_clear(void);

#endif
