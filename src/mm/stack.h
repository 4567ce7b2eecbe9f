/* SPDX-License-Identifier: MIT */
/*
 * Stacks of library threads. Those of the C library become one mapping with memory of the program that is right above and alike; that
 * would not be movable any more. So these are own memory, with a page without access at both ends. Children of fork get a copy, like
 * of any stack: the C library goes through its threads there.
 */
#ifndef HMM_MM_STACK_H
#define HMM_MM_STACK_H

#include <pthread.h>

/* Makes one of the usual size and names it in the attributes. -ENOMEM. Any thread. */
int stack_new(pthread_attr_t *attr, void **stack);
/* Its thread has been joined, or never was. NULL: nothing. */
void stack_free(void *stack);
/* In a child of fork: nobody is on any of them. */
void stacks_forget(void);

#endif
