/* SPDX-License-Identifier: MIT */
/*
 * Drivers: those in this build, and those in shared objects of their own, which are loaded when a spec names them and stay for the
 * life of the process. Program context; any thread.
 */
#ifndef HMM_API_DRIVERS_H
#define HMM_API_DRIVERS_H

#include <hmm/driver.h>

/* ---- load.c ---- */

/*
 * The driver of this name, checked: its interface is ours and complete, and its options can be used. -ENODEV: there is none; -EINVAL:
 * it is of another ABI or malformed; -ENOEXEC: its file cannot be loaded. With message. Valid for the life of the process.
 */
int driver_by_name(const char *name, size_t len, const struct hmm_driver **driver);
/* Calls fn for each driver: of this build, then of the folders of HMM_DRIVER_PATH, which are loaded. Those that cannot be are logged. */
void drivers_each(void (*fn)(const struct hmm_driver *driver, const char *origin, void *arg), void *arg);

/* ---- spec.c ---- */

/* Splits a spec and checks it against the driver's table. values has room for HMM_OPTIONS_MAX. Messages quote the word. */
int spec_parse(const char *spec, const struct hmm_driver **driver, union hmm_option_value *values);
/* A number with an optional K, M, G or T. -EINVAL without message. */
int parse_size(const char *word, size_t len, uint64_t *out);
/* Whether specs can be checked against the driver's table of options: 0 or -EINVAL with message. */
int options_check(const struct hmm_driver *driver);

#endif
