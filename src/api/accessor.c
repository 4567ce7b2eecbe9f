/* SPDX-License-Identifier: MIT */
/* What kernels call. It knows nothing but the accessor: the engine process of a device has its own copy of it. */
#include <string.h>

#include <hmm/driver.h>

const void *hmm_span_read(hmm_accessor *acc, const void *ptr, size_t *len)
{
    return acc->span(acc, (uintptr_t)ptr, len, false);
}

void *hmm_span_write(hmm_accessor *acc, void *ptr, size_t *len)
{
    return acc->span(acc, (uintptr_t)ptr, len, true);
}

void hmm_yield(hmm_accessor *acc)
{
    acc->yield(acc);
}

void hmm_get(hmm_accessor *acc, void *local, const void *ptr, size_t len)
{
    for (size_t done = 0; done < len;) {
        size_t n = len - done;
        const void *span = acc->span(acc, (uintptr_t)ptr + done, &n, false);
        memcpy((char *)local + done, span, n);
        done += n;
    }
}

void hmm_put(hmm_accessor *acc, void *ptr, const void *local, size_t len)
{
    for (size_t done = 0; done < len;) {
        size_t n = len - done;
        void *span = acc->span(acc, (uintptr_t)ptr + done, &n, true);
        memcpy(span, (const char *)local + done, n);
        done += n;
    }
}
