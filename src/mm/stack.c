/* SPDX-License-Identifier: MIT */
/* See stack.h. */
#include "mm/stack.h"

#include <errno.h>

#include "debug/inject.h"
#include "os/own.h"

#define STACKS_MAX 512 /* what is above a child does not free */

static void *stacks[STACKS_MAX]; /* atomic */

/* Without the two pages around it. */
static size_t usual_size(void)
{
    static size_t size; /* what it is for the first is kept: stacks are freed by it */
    size_t s = __atomic_load_n(&size, __ATOMIC_RELAXED), before = 0;
    pthread_attr_t usual;
    if (s)
        return s;
    pthread_attr_init(&usual);
    pthread_attr_getstacksize(&usual, &s);
    pthread_attr_destroy(&usual);
    s = (s + os_page_size() - 1) & ~(os_page_size() - 1);
    return __atomic_compare_exchange_n(&size, &before, s, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED) ? s : before;
}

static size_t whole_size(void)
{
    return usual_size() + 2 * os_page_size();
}

/* One for another; false: it is not there. */
static bool replace(void *stack, void *by)
{
    for (unsigned i = 0; i < STACKS_MAX; i++) {
        void *expected = stack;
        if (__atomic_compare_exchange_n(&stacks[i], &expected, by, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            return true;
    }
    return false;
}

int stack_new(pthread_attr_t *attr, void **stack)
{
    unsigned flags = OS_MAP_INHERIT | OS_MAP_NOHUGE;
    void *base;
    *stack = NULL;
    if (mutate("own-stack"))
        return 0;
    int r = own_map(whole_size(), os_page_size(), flags | OS_MAP_RESERVE, &base);
    if (r)
        return r;
    char *lowest = (char *)base + os_page_size();
    r = os->remap_fresh(lowest, usual_size(), flags);
    if (!r)
        r = -pthread_attr_setstack(attr, lowest, usual_size());
    if (r) {
        own_unmap(base, whole_size());
        return r;
    }
    replace(NULL, base);
    *stack = base;
    return 0;
}

void stack_free(void *stack)
{
    if (!stack)
        return;
    replace(stack, NULL);
    own_unmap(stack, whole_size());
}

void stacks_forget(void)
{
    for (unsigned i = 0; i < STACKS_MAX; i++)
        if (stacks[i])
            os->unmap(stacks[i], whole_size());
    for (unsigned i = 0; i < STACKS_MAX; i++)
        stacks[i] = NULL;
}
