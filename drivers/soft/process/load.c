/* SPDX-License-Identifier: MIT */
/*
 * User kernels by name. An object is loaded once, when the first of its kernels is launched, and stays: kernels of it may have left
 * something running. Its constructors run here, on an engine's thread, before the job.
 */
#include "process.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct loaded {
    struct loaded *next;
    hmm_kernel kernel;
    char *object, *symbol;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* dlopen() has one of its own; this is for `all` */
static struct loaded *all;

static hmm_kernel find(const char *object, const char *symbol)
{
    hmm_kernel kernel = NULL;
    pthread_mutex_lock(&lock);
    for (struct loaded *l = all; l && !kernel; l = l->next)
        if (strcmp(l->symbol, symbol) == 0 && strcmp(l->object, object) == 0)
            kernel = l->kernel;
    pthread_mutex_unlock(&lock);
    return kernel;
}

/* Without memory it is looked up again next time. */
static void keep(const char *object, const char *symbol, hmm_kernel kernel)
{
    struct loaded *l = calloc(1, sizeof(*l));
    if (!l)
        return;
    *l = (struct loaded){.kernel = kernel, .object = strdup(object), .symbol = strdup(symbol)};
    if (!l->object || !l->symbol) {
        free(l->object);
        free(l->symbol);
        free(l);
        return;
    }
    pthread_mutex_lock(&lock);
    l->next = all;
    all = l;
    pthread_mutex_unlock(&lock);
}

hmm_kernel process_kernel(const char *object, const char *symbol, int *err, char *message, size_t size)
{
    hmm_kernel kernel = find(object, symbol);
    if (kernel)
        return kernel;
    void *handle = dlopen(object, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        snprintf(message, size, "kernel %s: its object cannot be loaded: %s", symbol, dlerror());
        *err = -ENOEXEC;
        return NULL;
    }
    void *address = dlsym(handle, symbol);
    if (!address) {
        snprintf(message, size, "there is no kernel %s in %s; is it exported (HMM_KERNEL)?", symbol, object);
        *err = -ENOENT;
        return NULL;
    }
    memcpy(&kernel, &address, sizeof(kernel));
    keep(object, symbol, kernel);
    return kernel;
}
