/* SPDX-License-Identifier: MIT */
#ifndef HMM_BASE_UTIL_H
#define HMM_BASE_UTIL_H

#include <stddef.h>

#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))
#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

#endif
