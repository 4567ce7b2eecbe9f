/* SPDX-License-Identifier: MIT */
/* fork, as a program sees it: the same cases where the kernel tells of it, and where fork handlers do (without CAP_SYS_PTRACE). */
#ifndef TESTS_DRIVER_FORK_CASES_H
#define TESTS_DRIVER_FORK_CASES_H

#include <stdbool.h>

/* Runs all. A result of cmocka. */
int fork_cases(const char *name, bool by_event);

#endif
