/* SPDX-License-Identifier: MIT */
/*
 * See fence.h. The result fields are written before `word` becomes DONE (release) and read after it was seen so (acquire); they
 * never change again. After that store the completer touches only the word's address, for the wake, which is harmless when
 * the fence is gone already: waiters everywhere expect spurious wakes.
 */
#include "base/fence.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <time.h>

#include "base/alloc.h"
#include "base/error.h"
#include "base/futex.h"

enum { PENDING, WAITED, DONE };

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

void fence_init(hmm_fence *fence)
{
    memset(fence, 0, sizeof(*fence));
    fence->refs = 1;
}

hmm_fence *fence_new(void)
{
    hmm_fence *fence = mem_alloc(sizeof(*fence));
    if (fence)
        fence_init(fence);
    return fence;
}

hmm_fence *fence_get(hmm_fence *fence)
{
    __atomic_fetch_add(&fence->refs, 1, __ATOMIC_RELAXED);
    return fence;
}

void fence_put(hmm_fence *fence)
{
    if (fence && __atomic_fetch_sub(&fence->refs, 1, __ATOMIC_ACQ_REL) == 1)
        mem_free(fence, sizeof(*fence));
}

bool fence_done(const hmm_fence *fence)
{
    return __atomic_load_n(&fence->word, __ATOMIC_ACQUIRE) == DONE;
}

int fence_wait(hmm_fence *fence, int64_t timeout_ns)
{
    int64_t start = timeout_ns > 0 ? now() : 0;
    int64_t left = timeout_ns;
    while (!fence_done(fence)) {
        if (timeout_ns >= 0 && left <= 0)
            return -EAGAIN;
        uint32_t word = PENDING;
        if (!__atomic_compare_exchange_n(&fence->word, &word, WAITED, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE) &&
            word == DONE)
            break;
        futex_wait(&fence->word, WAITED, left);
        if (timeout_ns > 0)
            left = timeout_ns - (now() - start);
    }
    return fence->status;
}

void fence_complete(hmm_fence *fence, const struct hmm_job_status *status)
{
    if (fence_done(fence)) {
        hmm_log(HMM_LOG_ERROR, "fence %p: completed a second time, with %d; the first result (%d) stays", (void *)fence,
                status->status, fence->status);
        return;
    }
    fence->status = status->status;
    fence->address = status->address;
    fence->result = status->result;
    if (status->message)
        strncpy(fence->message, status->message, sizeof(fence->message) - 1);
    if (__atomic_exchange_n(&fence->word, DONE, __ATOMIC_ACQ_REL) == WAITED)
        futex_wake(&fence->word, INT_MAX);
}

/* ---- the public half ---- */

bool (*fence_foreign)(void);

static int check_own(const char *what)
{
    if (fence_foreign && fence_foreign())
        return hmm_fail(-ESRCH, "%s: the fence is the parent process's; submit a job in this one", what);
    return 0;
}

void hmm_fence_signal(hmm_fence *fence, int status)
{
    fence_complete(fence, &(struct hmm_job_status){.status = status});
}

int hmm_fence_wait(hmm_fence *fence, int64_t timeout_ns)
{
    message_clear();
    if (!fence)
        return hmm_fail(-EINVAL, "hmm_fence_wait: the fence is NULL; pass the one that the submitting call returned");
    int foreign = check_own("hmm_fence_wait");
    if (foreign)
        return foreign;
    int status = fence_wait(fence, timeout_ns);
    if (status == -EAGAIN && !fence_done(fence))
        return hmm_fail(-EAGAIN, "hmm_fence_wait: the job was not done after %lld ns; wait longer, or for ever with -1",
                        (long long)timeout_ns);
    if (status < 0)
        hmm_fail(status, "%s", fence->message[0] ? fence->message : hmm_strerror(status));
    return status;
}

int hmm_fence_info(hmm_fence *fence, struct hmm_fence_info *info)
{
    message_clear();
    if (!fence)
        return hmm_fail(-EINVAL, "hmm_fence_info: the fence is NULL; pass the one that the submitting call returned");
    int foreign = check_own("hmm_fence_info");
    if (foreign)
        return foreign;
    if (!info || info->size == 0)
        return hmm_fail(-EINVAL, "hmm_fence_info: no room for the answer; set info->size to sizeof(struct hmm_fence_info)");
    struct hmm_fence_info full = {.size = info->size, .status = -EINPROGRESS};
    if (fence_done(fence)) {
        full.status = fence->status;
        full.result = fence->result;
        full.address = fence->address;
        memcpy(full.message, fence->message, sizeof(full.message));
    }
    memcpy(info, &full, info->size < sizeof(full) ? info->size : sizeof(full));
    return 0;
}

void hmm_fence_put(hmm_fence *fence)
{
    if (fence_foreign && fence_foreign())
        return;
    fence_put(fence);
}
