/* SPDX-License-Identifier: MIT */
/* One sequence point at a time, at which something happens, or whoever comes first stops until the test lets it go on. */
#ifndef TESTS_UNIT_POINTS_H
#define TESTS_UNIT_POINTS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "debug/inject.h"

static const char *point_wanted;
static void (*point_action)(void); /* NULL: stop */
static uint32_t point_hits, point_released;

/* Once: what the action sets off passes the same points. */
static inline void at_point(const char *point)
{
    const char *wanted = __atomic_load_n(&point_wanted, __ATOMIC_SEQ_CST);
    if (!wanted || strcmp(point, wanted) || __atomic_fetch_add(&point_hits, 1, __ATOMIC_SEQ_CST))
        return;
    if (point_action)
        point_action();
    else
        while (!__atomic_load_n(&point_released, __ATOMIC_SEQ_CST))
            usleep(100);
}

/* action NULL: whoever comes stops there until release_point(). */
static inline void arm_point(const char *point, void (*action)(void))
{
    point_action = action;
    __atomic_store_n(&point_hits, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&point_released, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&point_wanted, point, __ATOMIC_SEQ_CST);
    inject_point_hook = at_point;
    __atomic_store_n(&inject_points_on, 1, __ATOMIC_SEQ_CST);
}

static inline void wait_point(void)
{
    while (!__atomic_load_n(&point_hits, __ATOMIC_SEQ_CST))
        usleep(100);
}

static inline void release_point(void)
{
    __atomic_store_n(&point_released, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&point_wanted, NULL, __ATOMIC_SEQ_CST);
}

/* For teardown, too. */
static inline void forget_point(void)
{
    release_point();
    __atomic_store_n(&inject_points_on, 0, __ATOMIC_SEQ_CST);
    inject_point_hook = NULL;
}

static inline void disarm_point(const char *what)
{
    forget_point();
    if (__atomic_load_n(&point_hits, __ATOMIC_SEQ_CST) == 0)
        fail_msg("%s: the point was not passed", what);
}

#endif
