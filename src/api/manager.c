/* SPDX-License-Identifier: MIT */
/* See manager.h. */
#include "api/manager.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/alloc.h"
#include "base/error.h"
#include "base/fence.h"
#include "base/futex.h"
#include "debug/inject.h"
#include "fault/fault.h"
#include "job/job.h"
#include "migrate/staging.h"
#include "mirror/mirror.h"
#include "os/own.h"
#include "pin/pin.h"
#include "process/fork.h"
#include "process/change.h"

#define CALLERS 2         /* threads for explicit migrations */
#define CALLERS_MAX 32    /* with those that were added because the others do not come back */
#define GROW_NS 200000000 /* a call that nobody takes for so long gets a thread */
#define FAULT_WORKERS 4   /* default */
#define FAULT_WORKERS_MAX 64
#define INJECT_PERMILLE 2 /* of HMM_DEBUG=inject without a number: starting makes some 320 calls that may fail */

static struct {
    struct mutex lock; /* RANK_MANAGER: start, stop, configuration */
    uint32_t *alive;   /* on a page that fork wipes: 1 in the process that started the manager */
    unsigned devices;  /* under lock */
    unsigned ending;   /* of them: those that need no change announced any more, or not yet */
    uint32_t users;    /* atomic: calls inside */
    uint32_t running;  /* atomic */
    struct hmm_config config;
    char debug[64];
    bool validate; /* audit after every migration that the program asks for */
    uint64_t patience_ns;
    bool memory; /* the allocator has chunks */
    struct mm mm;
    struct workers callers;
} manager = {.lock = MUTEX_INITIALIZER(RANK_MANAGER)};

/* ---- fork ---- */

static bool in_child(void)
{
    return manager.alive && __atomic_load_n(manager.alive, __ATOMIC_ACQUIRE) == 0;
}

static void forget_lock(void)
{
    manager.lock = (struct mutex)MUTEX_INITIALIZER(RANK_MANAGER);
}

/* Another thread may have been opening, closing or configuring. */
__attribute__((constructor)) static void watch_fork(void)
{
    pthread_atfork(NULL, NULL, forget_lock);
}

int api_enter(void)
{
    message_clear();
    if (in_child())
        return hmm_fail(-ESRCH,
                        "this process was forked from one that uses libhmm: its handles are not valid here; open a device");
    return 0;
}

/* The child's first device: nothing of the parent's is there any more. */
static void forget_parent(void)
{
    fork_forget();
    manager.lock = (struct mutex)MUTEX_INITIALIZER(RANK_MANAGER);
    manager.devices = manager.ending = 0;
    manager.users = 0;
    manager.running = 0;
    *manager.alive = 1;
    devices_forget();
    kernel_forget();
    own_forget();
    pagemap_forget();
    jobs_forget();
    change_forget();
    pins_forget();
    threads_forget(); /* it unmaps, which libhmm-preload.so would announce before */
    mirrors_forget();
    fence_forget();
    mem_forget();
    log_forget();
    lock_forget();
    manager.memory = false;
}

static int make_alive_page(void)
{
    void *page;
    if (manager.alive)
        return 0;
    int r = os->map(os_page_size(), os_page_size(), OS_MAP_WIPE, &page);
    if (r)
        return hmm_fail(r, "no memory for the manager: %s", hmm_strerror(r));
    *(uint32_t *)page = 1;
    manager.alive = page;
    return 0;
}

/* ---- configuration ---- */

int hmm_configure(const struct hmm_config *config)
{
    message_clear();
    if (in_child() && manager.devices) /* fences of the parent are known by that nothing was opened here */
        return hmm_fail(-EBUSY,
                        "hmm_configure: this process was forked while a device was open, and keeps its settings; configure "
                        "when a device of its own was opened and closed");
    if (!config || config->size < sizeof(config->size) || config->size > 4096)
        return hmm_fail(-EINVAL, "hmm_configure: set config->size to sizeof(struct hmm_config)");
    struct hmm_config c = {0};
    memcpy(&c, config, config->size < sizeof(c) ? config->size : sizeof(c));
    if (c.fault_workers > FAULT_WORKERS_MAX)
        return hmm_fail(-EINVAL, "hmm_configure: fault_workers %u is more than %d", c.fault_workers, FAULT_WORKERS_MAX);
    if (c.staging_bytes && (c.staging_bytes < STAGING_MIN || c.staging_bytes > STAGING_MAX))
        return hmm_fail(-EINVAL, "hmm_configure: staging_bytes %llu is not within 4 MiB and 1 GiB",
                        (unsigned long long)c.staging_bytes);
    if (c.debug && strlen(c.debug) >= sizeof(manager.debug))
        return hmm_fail(-EINVAL, "hmm_configure: debug is longer than %zu characters", sizeof(manager.debug) - 1);
    mutex_lock(&manager.lock);
    if (manager.devices) {
        mutex_unlock(&manager.lock);
        return hmm_fail(-EBUSY, "hmm_configure: a device is open; close it first");
    }
    manager.config = c;
    manager.config.debug = NULL;
    if (c.debug) {
        strcpy(manager.debug, c.debug);
        manager.config.debug = manager.debug;
    }
    mutex_unlock(&manager.lock);
    return 0;
}

#define DELAY_PERMILLE 20 /* of HMM_DEBUG=delay without a number */
/* Invalidations may wait for kernels to end at their deadlines, a device may fail and recover. */
#define PATIENCE_MS 10000

/* The word is `name` or `name=NUMBER`. */
static bool debug_word(const char *text, size_t n, const char *name, unsigned fallback, unsigned *number)
{
    size_t len = strlen(name);
    if (n < len || strncmp(text, name, len) || (n > len && text[len] != '='))
        return false;
    *number = n > len ? strtoul(text + len + 1, NULL, 10) : fallback;
    return true;
}

static void start_inject(uint64_t seed, unsigned failures, unsigned delays)
{
    struct inject_config c = {.seed = seed};
    for (int k = 0; k < INJECT_KINDS; k++)
        c.permille[k] = k == INJECT_DELAY ? delays : failures;
    inject_start(&c);
    hmm_log(HMM_LOG_WARNING, "injection is on: seed %llu (HMM_SEED repeats it), per mille: failures %u, delays %u",
            (unsigned long long)seed, failures, delays);
}

/* "inject", "delay", both also with =PERMILLE, "validate", "patience=MS"; others are named and ignored. */
static void start_debug(void)
{
    const char *text = manager.config.debug ? manager.config.debug : getenv("HMM_DEBUG");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t seed = manager.config.seed ? manager.config.seed : (uint64_t)now.tv_nsec ^ (uint64_t)now.tv_sec << 30;
    const char *seed_text = getenv("HMM_SEED");
    if (!manager.config.seed && seed_text)
        seed = strtoull(seed_text, NULL, 0);
    manager.validate = false;
    unsigned failures = 0, delays = 0, patience_ms = PATIENCE_MS;
    while (text && *text) {
        size_t n = strcspn(text, ",");
        if (debug_word(text, n, "inject", INJECT_PERMILLE, &failures))
            delays = delays ? delays : failures;
        else if (n == 8 && !strncmp(text, "validate", 8))
            manager.validate = true;
        else if (!debug_word(text, n, "patience", PATIENCE_MS, &patience_ms) &&
                 !debug_word(text, n, "delay", DELAY_PERMILLE, &delays))
            hmm_log(HMM_LOG_WARNING, "HMM_DEBUG: '%.*s' is not known (inject[=N], delay[=N], validate, patience=MS): ignored",
                    (int)n, text);
        text += n + (text[n] == ',');
    }
    __atomic_store_n(&manager.patience_ns, patience_ms * 1000000ull, __ATOMIC_RELAXED);
    if (failures || delays)
        start_inject(seed, failures, delays);
}

/* ---- start and stop ---- */

static int map_own(size_t bytes, void **out)
{
    return own_map(bytes, os_page_size(), 0, out);
}

static void unmap_own(void *ptr, size_t bytes)
{
    own_unmap(ptr, bytes);
}

static int init_in_root(void *arg)
{
    return mm_init(arg);
}

static int exit_in_root(void *arg)
{
    mm_exit(arg);
    return 0;
}

/* mm_init runs in the root thread, and its message is that thread's: say again what can be said. */
static int open_mm(void)
{
    int r = threads_call(init_in_root, &manager.mm);
    if (r == -EPERM)
        return hmm_fail(r,
                        "userfaultfd is not permitted: give access to /dev/userfaultfd, set vm.unprivileged_userfaultfd=1, or "
                        "run with CAP_SYS_PTRACE; `hmm check` says more");
    if (r == -ENOSYS || r == -EINVAL)
        return hmm_fail(-ENOSYS,
                        "this kernel lacks what libhmm needs of userfaultfd (Linux 6.8 or newer); `hmm check` names it");
    if (r)
        return hmm_fail(r, "the manager cannot start: %s", hmm_strerror(r));
    if (manager.mm.uffd.user_mode_only)
        hmm_log(HMM_LOG_WARNING,
                "userfaultfd is user-mode-only: system calls on migrated buffers fail with EFAULT; `hmm check` "
                "names the remedy");
    return 0;
}

static int staging_in_root(void *arg)
{
    return staging_init(&manager.mm, *(uint64_t *)arg);
}

static int staging_exit_in_root(void *arg)
{
    (void)arg;
    staging_exit(&manager.mm);
    return 0;
}

/* Fences outlive the manager: the program may still wait for them and put them. */
static void exit_memory(void)
{
    if (mem_used() == 0) {
        mem_exit();
        manager.memory = false;
    }
}

static void report_lock(const char *line)
{
    hmm_log(HMM_LOG_ERROR, "bug: %s", line);
}

static int start(void)
{
    fence_foreign = in_child;
    mirror_foreign = in_child;
    static const struct mem_source source = {.map = map_own, .unmap = unmap_own};
    uint64_t staging_size = manager.config.staging_bytes ? manager.config.staging_bytes : STAGING_DEFAULT;
    unsigned workers = manager.config.fault_workers ? manager.config.fault_workers : FAULT_WORKERS;
    lock_report = report_lock;
    if (!manager.memory) /* fences that the program kept from an earlier time still live there */
        mem_init(&source);
    manager.memory = true;
    start_debug();
    int r = limits_start();
    if (r)
        goto stop_memory;
    r = threads_start();
    if (r)
        goto stop_memory;
    r = open_mm();
    if (r)
        goto stop_threads;
    r = threads_call(staging_in_root, &staging_size);
    if (r) {
        hmm_fail(r, "no room for %llu MiB of staging: %s", (unsigned long long)staging_size >> 20, hmm_strerror(r));
        goto close_mm;
    }
    r = fork_start(&manager.mm);
    if (r)
        goto stop_staging;
    r = fault_start(&manager.mm, workers);
    if (r)
        goto stop_forks;
    r = workers_start_growing(&manager.callers, "hmm-migrate", CALLERS, CALLERS_MAX);
    if (r)
        goto stop_faults;
    r = jobs_start();
    if (r)
        goto stop_callers;
    r = pins_start();
    if (r)
        goto stop_jobs;
    r = change_start(&manager.mm, manager.alive, workers);
    if (r)
        goto stop_jobs;
    calls_attach(true);
    __atomic_store_n(&manager.running, 1, __ATOMIC_RELEASE);
    return 0;

stop_jobs:
    jobs_stop();
stop_callers:
    workers_stop(&manager.callers);
stop_faults:
    fork_ending();
    fault_stop();
stop_forks:
    fork_stop();
stop_staging:
    threads_call(staging_exit_in_root, NULL);
close_mm:
    threads_call(exit_in_root, &manager.mm);
stop_threads:
    threads_stop();
stop_memory:
    inject_stop();
    exit_memory();
    return r;
}

static void stop(void)
{
    __atomic_store_n(&manager.running, 0, __ATOMIC_SEQ_CST);
    for (uint32_t n; (n = __atomic_load_n(&manager.users, __ATOMIC_SEQ_CST)) != 0;)
        futex_wait(&manager.users, n, -1);
    calls_attach(false);
    change_stop();
    fence_user_cancel_all();
    jobs_stop();
    mirrors_stop();
    workers_stop(&manager.callers);
    fork_ending(); /* while events are read */
    fault_stop();
    fork_stop();
    threads_call(staging_exit_in_root, NULL);
    threads_call(exit_in_root, &manager.mm);
    threads_stop();
    inject_stop();
    exit_memory();
}

int manager_get(struct mm **mm)
{
    if (in_child())
        forget_parent();
    mutex_lock(&manager.lock);
    int r = make_alive_page();
    if (!r && manager.devices == 0)
        r = start();
    if (!r) {
        manager.devices++;
        manager.ending += !mutate("opening-ending");
    }
    mutex_unlock(&manager.lock);
    *mm = &manager.mm;
    return r;
}

void manager_opened(void)
{
    mutex_lock(&manager.lock);
    manager.ending -= !mutate("opening-ending");
    change_accept(true);
    mutex_unlock(&manager.lock);
}

/* Whoever is last finds no change that was announced: those who only open have none announced, of the others one waited for all to end. */
void manager_put(bool counted)
{
    mutex_lock(&manager.lock);
    manager.ending -= counted;
    if (--manager.devices == 0)
        stop();
    mutex_unlock(&manager.lock);
}

bool manager_all_ending(bool *counted)
{
    mutex_lock(&manager.lock);
    manager.ending += !*counted;
    *counted = true;
    bool all = manager.ending == manager.devices;
    if (all)
        change_accept(false);
    mutex_unlock(&manager.lock);
    return all;
}

struct mm *manager_use(void)
{
    __atomic_fetch_add(&manager.users, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&manager.running, __ATOMIC_SEQ_CST))
        return &manager.mm;
    manager_unuse();
    hmm_fail(-ENODEV, "no device is open");
    return NULL;
}

void manager_unuse(void)
{
    __atomic_fetch_sub(&manager.users, 1, __ATOMIC_SEQ_CST);
    futex_wake(&manager.users, INT_MAX);
}

/* ---- calls into library threads ---- */

static void run_call(struct work *work, unsigned worker)
{
    (void)worker;
    struct call *c = container_of(work, struct call, work);
    __atomic_store_n(&c->begun, 1, __ATOMIC_RELAXED);
    c->fn(c);
    if (__atomic_exchange_n(&c->state, CALL_DONE, __ATOMIC_ACQ_REL) == CALL_ABANDONED)
        c->abandoned(c);
    else
        futex_wake(&c->state, INT_MAX);
}

void manager_start_call(struct call *c)
{
    work_init(&c->work, run_call);
    c->begun = 0;
    c->state = CALL_RUNS;
    workers_queue(&manager.callers, &c->work);
}

/* Every thread may be held up by a device that does not let go of its pages. A call that no thread takes gets one more. */
bool manager_call_done_for(struct call *c, int64_t timeout_ns)
{
    uint64_t end = os_now() + (uint64_t)timeout_ns, now;
    while (__atomic_load_n(&c->state, __ATOMIC_ACQUIRE) != CALL_DONE) {
        now = os_now();
        if (timeout_ns >= 0 && now >= end)
            return false;
        uint64_t left = timeout_ns >= 0 && end - now < GROW_NS ? end - now : GROW_NS;
        bool begun = __atomic_load_n(&c->begun, __ATOMIC_RELAXED);
        int r = futex_wait(&c->state, CALL_RUNS, begun && timeout_ns < 0 ? -1 : (int64_t)left);
        if (r == -ETIMEDOUT && !__atomic_load_n(&c->begun, __ATOMIC_RELAXED) && !mutate("callers-grow"))
            workers_grow(&manager.callers);
    }
    return true;
}

void manager_wait_call(struct call *c)
{
    manager_call_done_for(c, -1);
}

bool manager_wait_call_for(struct call *c, int64_t timeout_ns)
{
    uint32_t runs = CALL_RUNS;
    return manager_call_done_for(c, timeout_ns) ||
           !__atomic_compare_exchange_n(&c->state, &runs, CALL_ABANDONED, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

void manager_call(struct call *c)
{
    manager_start_call(c);
    manager_wait_call(c);
}

bool manager_validates(void)
{
    return manager.validate;
}

uint64_t manager_patience_ns(void)
{
    return __atomic_load_n(&manager.patience_ns, __ATOMIC_RELAXED);
}

unsigned manager_callers(void)
{
    return CALLERS;
}
