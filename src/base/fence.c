/* SPDX-License-Identifier: MIT */
/*
 * See fence.h. The result fields are written before `follow` becomes CLOSED and `word` becomes DONE (release) and read after one
 * of them was seen so (acquire); they never change again. After the store to `word` the completer of a fence that nothing follows
 * touches only the word's address, for the wake, which is harmless when the fence is gone already: waiters everywhere expect
 * spurious wakes. Of a fence that something follows it holds a reference.
 *
 * `lists` protects the lists of callbacks of all fences, and the list of the program's fences. It is taken only where there are
 * such, never for a plain completion.
 */
#include "base/fence.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <time.h>

#include "base/alloc.h"
#include "base/error.h"
#include "base/futex.h"
#include "base/lock.h"

#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))

#define FOLLOW_SOME 1u   /* there are, or were, callbacks */
#define FOLLOW_CLOSED 2u /* none can be added */

struct user_fence {
    hmm_fence fence;
    struct list link; /* of users; `lists` */
    uint32_t claimed; /* atomic: somebody completes it */
};

static struct mutex lists = MUTEX_INITIALIZER(RANK_QUEUE);
static struct list users = {&users, &users};

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
    list_init(&fence->callbacks);
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

/* The first callback, no more registered; NULL: none is left. */
static struct fence_callback *pop_callback(hmm_fence *fence)
{
    struct fence_callback *cb = NULL;
    mutex_lock(&lists);
    if (!list_empty(&fence->callbacks)) {
        cb = container_of(fence->callbacks.next, struct fence_callback, link);
        list_del(&cb->link);
    }
    mutex_unlock(&lists);
    return cb;
}

static void run_callbacks(hmm_fence *fence, hmm_fence *done)
{
    if (__atomic_load_n(&fence->follow, __ATOMIC_ACQUIRE) & FOLLOW_SOME)
        for (struct fence_callback *cb; (cb = pop_callback(fence));)
            cb->fn(cb, done);
}

void fence_put(hmm_fence *fence)
{
    if (!fence || __atomic_fetch_sub(&fence->refs, 1, __ATOMIC_ACQ_REL) != 1)
        return;
    run_callbacks(fence, NULL);
    if (fence->kind)
        fence->kind->free(fence);
    else
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

/* ---- completion ---- */

/* Done fences whose followers this thread has still to run. */
THREAD_LOCAL bool settling;
THREAD_LOCAL hmm_fence *unsettled, **unsettled_end;

static void settle_one(hmm_fence *fence)
{
    run_callbacks(fence, fence);
    if (fence->kind && fence->kind->after)
        fence->kind->after(fence);
    fence_put(fence);
}

/* Takes the reference. */
static void settle(hmm_fence *fence)
{
    fence->next = NULL;
    if (settling) {
        *unsettled_end = fence;
        unsettled_end = &fence->next;
        return;
    }
    settling = true;
    unsettled = NULL;
    unsettled_end = &unsettled;
    while (fence) {
        settle_one(fence);
        fence = unsettled;
        if (fence)
            unsettled = fence->next;
        if (!unsettled)
            unsettled_end = &unsettled;
    }
    settling = false;
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
    bool followed = __atomic_fetch_or(&fence->follow, FOLLOW_CLOSED, __ATOMIC_ACQ_REL) & FOLLOW_SOME;
    followed |= fence->kind && fence->kind->after;
    if (followed)
        fence_get(fence);
    if (__atomic_exchange_n(&fence->word, DONE, __ATOMIC_ACQ_REL) == WAITED)
        futex_wake(&fence->word, INT_MAX);
    if (followed)
        settle(fence);
}

bool fence_add_callback(hmm_fence *fence, struct fence_callback *cb)
{
    if (fence_done(fence))
        return false;
    mutex_lock(&lists);
    bool open = !(__atomic_fetch_or(&fence->follow, FOLLOW_SOME, __ATOMIC_ACQ_REL) & FOLLOW_CLOSED);
    if (open)
        list_add_tail(&fence->callbacks, &cb->link);
    mutex_unlock(&lists);
    return open;
}

bool fence_remove_callback(struct fence_callback *cb)
{
    mutex_lock(&lists);
    bool registered = !list_empty(&cb->link);
    list_del(&cb->link);
    mutex_unlock(&lists);
    return registered;
}

/* ---- fences of the program ---- */

static void user_free(hmm_fence *fence)
{
    struct user_fence *u = container_of(fence, struct user_fence, fence);
    mutex_lock(&lists);
    list_del(&u->link);
    mutex_unlock(&lists);
    mem_free(u, sizeof(*u));
}

static const struct fence_kind user_kind = {.free = user_free};

hmm_fence *fence_user_new(void)
{
    struct user_fence *u = mem_alloc(sizeof(*u));
    if (!u)
        return NULL;
    fence_init(&u->fence);
    u->fence.kind = &user_kind;
    mutex_lock(&lists);
    list_add_tail(&users, &u->link);
    mutex_unlock(&lists);
    return &u->fence;
}

/* False: it was completed before. */
static bool user_complete(struct user_fence *u, const struct hmm_job_status *status)
{
    if (__atomic_exchange_n(&u->claimed, 1, __ATOMIC_ACQ_REL))
        return false;
    mutex_lock(&lists);
    list_del(&u->link);
    mutex_unlock(&lists);
    fence_complete(&u->fence, status);
    return true;
}

static bool get_unless_gone(hmm_fence *fence)
{
    uint32_t refs = __atomic_load_n(&fence->refs, __ATOMIC_RELAXED);
    while (refs && !__atomic_compare_exchange_n(&fence->refs, &refs, refs + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        ;
    return refs != 0;
}

/* One that is being freed leaves the list by itself. */
static struct user_fence *pop_user(void)
{
    struct user_fence *u = NULL;
    mutex_lock(&lists);
    while (!u && !list_empty(&users)) {
        u = container_of(users.next, struct user_fence, link);
        list_del(&u->link);
        if (!get_unless_gone(&u->fence))
            u = NULL;
    }
    mutex_unlock(&lists);
    return u;
}

void fence_user_cancel_all(void)
{
    static const struct hmm_job_status closed = {
        .status = -ECANCELED, .message = "the last device was closed before the program completed the fence"};
    for (struct user_fence *u; (u = pop_user());) {
        user_complete(u, &closed);
        fence_put(&u->fence);
    }
}

void fence_forget(void)
{
    mutex_init(&lists, RANK_QUEUE);
    list_init(&users);
    settling = false;
}

/* ---- the public half ---- */

bool (*fence_foreign)(void);

int fence_check_own(const char *what)
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
    int foreign = fence_check_own("hmm_fence_wait");
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
    int foreign = fence_check_own("hmm_fence_info");
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

int hmm_fence_complete(hmm_fence *fence, int status)
{
    message_clear();
    if (!fence)
        return hmm_fail(-EINVAL, "hmm_fence_complete: the fence is NULL; pass the one that hmm_fence_create() gave");
    int foreign = fence_check_own("hmm_fence_complete");
    if (foreign)
        return foreign;
    if (fence->kind != &user_kind)
        return hmm_fail(-EINVAL, "hmm_fence_complete: the fence is a job's, which completes it; hmm_job_cancel() ends it");
    if (status > 0 || status == -EAGAIN || status == -EINPROGRESS)
        return hmm_fail(-EINVAL, "hmm_fence_complete: status %d is not 0 or an error that tells a waiter something", status);
    signals_block(); /* jobs may start: drivers take locks of their own */
    bool first = user_complete(container_of(fence, struct user_fence, fence), &(struct hmm_job_status){.status = status});
    signals_unblock();
    if (!first)
        return hmm_fail(-EALREADY, "hmm_fence_complete: the fence is done already; its first status stays");
    return 0;
}

void hmm_fence_put(hmm_fence *fence)
{
    if (fence_foreign && fence_foreign())
        return;
    fence_put(fence);
}
