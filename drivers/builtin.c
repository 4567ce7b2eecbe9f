/* SPDX-License-Identifier: MIT */
/* The drivers that are part of the library. */
#include <hmm/driver.h>

#include "faulty/faulty.h"
#include "soft/soft.h"

const struct hmm_driver *const hmm_builtin_drivers[] = {&soft_driver, &faulty_driver, NULL};
