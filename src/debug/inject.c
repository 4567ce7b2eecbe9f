/* SPDX-License-Identifier: MIT */
/*
 * Fault injection behind inject.h. Every decision is a hash of (seed, call site, how often that site was called), so the same
 * seed decides alike however the threads interleave.
 *
 * What is injected is what the kernel may really do in our use, nothing else: an error that it cannot return would prove
 * nothing. What a fill reports, and what it did, differ only where the kernel's may (design fact 1: MOVE). Waking, reading,
 * polling and closing never fail, because the real ones do not.
 *
 * Concurrency: atomics only; callable on the fault path. Start and stop while no manager runs.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"
#include "base/error.h"
#include "base/lock.h"
#include "debug/inject.h"

/* Failures that are not an error code. */
enum {
    SHORT = 1, /* does the first half, and says so */
    LIE_HALF,  /* does the first half, and answers EEXIST */
    LIE_WHOLE, /* does everything, and answers EEXIST */
    PENDING,   /* says that an event is pending */
};

struct site {
    const char *name;
    enum inject_kind kind;
    bool sweep_only; /* fails only as the nth call: without it nothing works */
    int failures[8]; /* errors and modes; ends with 0 */
    uint64_t calls;  /* atomic */
};

enum site_id {
    UFFD_OPEN,
    UFFD_REGISTER,
    UFFD_WATCH,
    UFFD_WATCHED,
    UFFD_UNREGISTER,
    UFFD_COPY,
    UFFD_ZEROPAGE,
    UFFD_MOVE,
    UFFD_POISON,
    UFFD_PENDING,
    EVENT_OPEN,
    PAGEMAP_OPEN,
    MAPS_OPEN,
    PAGEMAP_SCANS,
    VMA_QUERY,
    MAP,
    REMAP_FRESH,
    UNMAP,
    ADVISE_FORK,
    ADVISE_POPULATE,
    VM_READ,
    VM_WRITE,
    THREAD_CPU,
    BIND_CPU,
    THREAD_BLOCKS,
    PRIVATE_FILES,
    ALLOCATE,
    DRIVER_OPEN,
    DRIVER_COPY,
    DRIVER_CLEAR,
    DRIVER_SUBMIT,
    DRIVER_OTHER,
    POINT,
    LOCK,
    SITES,
};

static struct site sites[SITES] = {
    [UFFD_OPEN] = {"uffd_open", INJECT_OS, true, {-EPERM, -ENOSYS, -EMFILE, -ENOMEM}, 0},
    /* The limit of mappings; another userfaultfd of the program; a mapping that changed since it was looked at. */
    [UFFD_REGISTER] = {"uffd_register", INJECT_OS, false, {-ENOMEM, -EBUSY, -EINVAL}, 0},
    [UFFD_WATCH] = {"uffd_watch", INJECT_OS, false, {-ENOMEM, -EBUSY, -EINVAL}, 0},
    [UFFD_WATCHED] = {"uffd_watched", INJECT_OS, false, {-EAGAIN, -ENOENT}, 0},
    [UFFD_UNREGISTER] = {"uffd_unregister", INJECT_OS, false, {-ENOMEM}, 0},
    [UFFD_COPY] = {"uffd_copy", INJECT_OS, false, {-EAGAIN, -ENOMEM, SHORT}, 0},
    [UFFD_ZEROPAGE] = {"uffd_zeropage", INJECT_OS, false, {-EAGAIN, -ENOMEM, SHORT}, 0},
    [UFFD_MOVE] = {"uffd_move", INJECT_OS, false, {-EAGAIN, -EBUSY, -EINVAL, -ENOMEM, SHORT, LIE_HALF, LIE_WHOLE}, 0},
    [UFFD_POISON] = {"uffd_poison", INJECT_OS, false, {-EAGAIN, -ENOMEM, SHORT}, 0},
    [UFFD_PENDING] = {"uffd_pending", INJECT_OS, false, {PENDING}, 0},
    [EVENT_OPEN] = {"event_open", INJECT_OS, true, {-EMFILE, -ENFILE, -ENOMEM}, 0},
    [PAGEMAP_OPEN] = {"pagemap_open", INJECT_OS, true, {-EMFILE, -EACCES}, 0},
    [MAPS_OPEN] = {"maps_open", INJECT_OS, true, {-EMFILE, -ENOMEM}, 0},
    [PAGEMAP_SCANS] = {"pagemap_scan", INJECT_OS, false, {-ENOMEM, SHORT}, 0},
    [VMA_QUERY] = {"vma_query", INJECT_OS, false, {-ENOMEM}, 0},
    [MAP] = {"map", INJECT_OS, true, {-ENOMEM}, 0},
    [REMAP_FRESH] = {"remap_fresh", INJECT_OS, false, {-ENOMEM}, 0},
    [UNMAP] = {"unmap", INJECT_OS, true, {-ENOMEM}, 0},
    [ADVISE_FORK] = {"advise (fork)", INJECT_OS, false, {-ENOMEM}, 0},
    [ADVISE_POPULATE] = {"advise (populate)", INJECT_OS, false, {-ENOMEM, -EFAULT}, 0},
    [VM_READ] = {"vm_read", INJECT_OS, false, {SHORT}, 0},
    [VM_WRITE] = {"vm_write", INJECT_OS, false, {SHORT}, 0},
    [THREAD_CPU] = {"thread_cpu", INJECT_OS, false, {-ENOENT, -EMFILE}, 0},
    [BIND_CPU] = {"bind_cpu", INJECT_OS, false, {-EINVAL}, 0},
    [THREAD_BLOCKS] = {"thread_blocks", INJECT_OS, false, {-EMFILE, -ENOMEM}, 0},
    [PRIVATE_FILES] = {"private_files", INJECT_OS, true, {-ENOMEM}, 0},
    [ALLOCATE] = {"mem_alloc", INJECT_ALLOC, false, {-ENOMEM}, 0},
    [DRIVER_OPEN] = {"open", INJECT_DRIVER, true, {-ENOMEM, -EIO, -ENODEV}, 0},
    [DRIVER_COPY] = {"copy", INJECT_DRIVER, false, {-EIO, -ENOMEM, -ENODEV}, 0},
    [DRIVER_CLEAR] = {"clear", INJECT_DRIVER, false, {-EIO, -ENOMEM, -ENODEV}, 0},
    [DRIVER_SUBMIT] = {"submit", INJECT_DRIVER, false, {-EBUSY}, 0},
    [DRIVER_OTHER] = {"driver", INJECT_DRIVER, false, {-EIO}, 0},
    [POINT] = {"sequence point", INJECT_DELAY, false, {0}, 0},
    [LOCK] = {"lock", INJECT_DELAY, false, {0}, 0},
};

static struct inject_config config;
static const struct os_ops *real; /* the table that was in use before; NULL: not active */
static uint64_t eligible, failed; /* atomic */
static uint32_t last;             /* atomic: site << 8 | index of the failure, plus 1; 0: none */

int inject_points_on;
void (*inject_point_hook)(const char *point);

/* ---- decisions ---- */

/* The finalizer of splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static uint64_t decision(enum site_id id, uint64_t call, uint64_t salt)
{
    return mix(mix(mix(config.seed) ^ (uint64_t)id << 32 ^ salt) ^ call);
}

/* 0: the call goes through. Else one of the site's failures. */
static int fails(enum site_id id)
{
    struct site *s = &sites[id];
    uint64_t call = __atomic_fetch_add(&s->calls, 1, __ATOMIC_RELAXED);
    uint64_t nth = __atomic_add_fetch(&eligible, 1, __ATOMIC_RELAXED);
    uint64_t hash = decision(id, call, 0);
    unsigned n = 1, pick; /* every site that may fail has at least one failure */

    if (config.fail_nth ? nth != config.fail_nth : s->sweep_only || hash % 1000 >= config.permille[s->kind])
        return 0;
    while (s->failures[n])
        n++;
    pick = (unsigned)(hash >> 32) % n;
    __atomic_fetch_add(&failed, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&last, ((uint32_t)id << 8 | pick) + 1, __ATOMIC_RELAXED);
    return s->failures[pick];
}

/* The first half of a range in whole pages; 0 for a single page. */
static size_t half(size_t len)
{
    return len / 2 & ~(os_page_size() - 1);
}

/* ---- the wrapped table ---- */

static int inj_uffd_open(uint64_t features, struct os_uffd *out)
{
    int f = fails(UFFD_OPEN);

    return f ? f : real->uffd_open(features, out);
}

static int inj_uffd_register(int uffd, uintptr_t start, size_t len)
{
    int f = fails(UFFD_REGISTER);

    return f ? f : real->uffd_register(uffd, start, len);
}

static int inj_uffd_watch(int uffd, uintptr_t start, size_t len)
{
    int f = fails(UFFD_WATCH);

    return f ? f : real->uffd_watch(uffd, start, len);
}

static int inj_uffd_watched(int uffd, uintptr_t start, size_t len)
{
    int f = fails(UFFD_WATCHED);

    return f ? f : real->uffd_watched(uffd, start, len);
}

static int inj_uffd_unregister(int uffd, uintptr_t start, size_t len)
{
    int f = fails(UFFD_UNREGISTER);

    return f ? f : real->uffd_unregister(uffd, start, len);
}

static int64_t inj_uffd_copy(int uffd, uintptr_t dst, const void *src, size_t len)
{
    int f = fails(UFFD_COPY);

    if (f == SHORT)
        return half(len) ? real->uffd_copy(uffd, dst, src, half(len)) : -EAGAIN;
    return f ? f : real->uffd_copy(uffd, dst, src, len);
}

static int64_t inj_uffd_zeropage(int uffd, uintptr_t dst, size_t len)
{
    int f = fails(UFFD_ZEROPAGE);

    if (f == SHORT)
        return half(len) ? real->uffd_zeropage(uffd, dst, half(len)) : -EAGAIN;
    return f ? f : real->uffd_zeropage(uffd, dst, len);
}

static int64_t inj_uffd_move(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    int f = fails(UFFD_MOVE);

    switch (f) {
    case 0: return real->uffd_move(uffd, dst, src, len);
    case SHORT: return half(len) ? real->uffd_move(uffd, dst, src, half(len)) : -EAGAIN;
    case LIE_HALF:
        if (half(len))
            real->uffd_move(uffd, dst, src, half(len));
        return -EEXIST;
    case LIE_WHOLE: real->uffd_move(uffd, dst, src, len); return -EEXIST;
    default: return f;
    }
}

static int64_t inj_uffd_poison(int uffd, uintptr_t dst, size_t len)
{
    int f = fails(UFFD_POISON);

    if (f == SHORT)
        return half(len) ? real->uffd_poison(uffd, dst, half(len)) : -EAGAIN;
    return f ? f : real->uffd_poison(uffd, dst, len);
}

static int inj_uffd_pending(int uffd)
{
    return fails(UFFD_PENDING) ? 1 : real->uffd_pending(uffd);
}

static int inj_event_open(void)
{
    int f = fails(EVENT_OPEN);

    return f ? f : real->event_open();
}

static int inj_pagemap_open(void)
{
    int f = fails(PAGEMAP_OPEN);

    return f ? f : real->pagemap_open();
}

static int inj_maps_open(void)
{
    int f = fails(MAPS_OPEN);

    return f ? f : real->maps_open();
}

static int inj_pagemap_scan(int fd, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n, uintptr_t *walked)
{
    int f = fails(PAGEMAP_SCANS);

    if (f == SHORT) /* stops early, as with a full vector */
        return real->pagemap_scan(fd, start, end, v, n ? 1 : 0, walked);
    return f ? f : real->pagemap_scan(fd, start, end, v, n, walked);
}

static int inj_vma_query(int fd, uintptr_t addr, struct os_vma *out)
{
    int f = fails(VMA_QUERY);

    return f ? f : real->vma_query(fd, addr, out);
}

static int inj_map(size_t len, size_t align, unsigned flags, void **out)
{
    int f = fails(MAP);

    return f ? f : real->map(len, align, flags, out);
}

static int inj_remap_fresh(void *addr, size_t len, unsigned flags)
{
    int f = fails(REMAP_FRESH);

    if (f)
        real->remap_fresh(addr, len, flags | OS_MAP_RESERVE); /* as its contract says of a failure */
    return f ? f : real->remap_fresh(addr, len, flags);
}

static int inj_unmap(void *addr, size_t len)
{
    int f = fails(UNMAP);

    return f ? f : real->unmap(addr, len);
}

static int inj_advise(void *addr, size_t len, int advice)
{
    int f = 0;

    if (advice == OS_ADVISE_DONTFORK || advice == OS_ADVISE_DOFORK)
        f = fails(ADVISE_FORK);
    else if (advice == OS_ADVISE_POPULATE_WRITE || advice == OS_ADVISE_POPULATE_READ)
        f = fails(ADVISE_POPULATE);
    return f ? f : real->advise(addr, len, advice);
}

static int64_t inj_vm_read(uintptr_t addr, void *buf, size_t len)
{
    return real->vm_read(addr, buf, fails(VM_READ) && len > 1 ? len / 2 : len);
}

static int64_t inj_vm_write(uintptr_t addr, const void *buf, size_t len)
{
    return real->vm_write(addr, buf, fails(VM_WRITE) && len > 1 ? len / 2 : len);
}

static int inj_thread_cpu(pid_t tid)
{
    int f = fails(THREAD_CPU);

    return f ? f : real->thread_cpu(tid);
}

static int inj_bind_cpu(int cpu)
{
    int f = fails(BIND_CPU);

    return f ? f : real->bind_cpu(cpu);
}

static int inj_thread_blocks(uintptr_t *tcbs, unsigned max)
{
    int f = fails(THREAD_BLOCKS);

    return f ? f : real->thread_blocks(tcbs, max);
}

static int inj_private_files(const int *keep, unsigned n)
{
    int f = fails(PRIVATE_FILES);

    return f ? f : real->private_files(keep, n);
}

static struct os_ops wrapped; /* filled at start: what is not listed there is the real one's */

static void wrap(void)
{
    wrapped = *real;
    wrapped.uffd_open = inj_uffd_open;
    wrapped.uffd_register = inj_uffd_register;
    wrapped.uffd_watch = inj_uffd_watch;
    wrapped.uffd_watched = inj_uffd_watched;
    wrapped.uffd_unregister = inj_uffd_unregister;
    wrapped.uffd_copy = inj_uffd_copy;
    wrapped.uffd_zeropage = inj_uffd_zeropage;
    wrapped.uffd_move = inj_uffd_move;
    wrapped.uffd_poison = inj_uffd_poison;
    wrapped.uffd_pending = inj_uffd_pending;
    wrapped.event_open = inj_event_open;
    wrapped.pagemap_open = inj_pagemap_open;
    wrapped.maps_open = inj_maps_open;
    wrapped.pagemap_scan = inj_pagemap_scan;
    wrapped.vma_query = inj_vma_query;
    wrapped.map = inj_map;
    wrapped.remap_fresh = inj_remap_fresh;
    wrapped.unmap = inj_unmap;
    wrapped.advise = inj_advise;
    wrapped.vm_read = inj_vm_read;
    wrapped.vm_write = inj_vm_write;
    wrapped.thread_cpu = inj_thread_cpu;
    wrapped.bind_cpu = inj_bind_cpu;
    wrapped.thread_blocks = inj_thread_blocks;
    wrapped.private_files = inj_private_files;
}

/* ---- the allocator and drivers ---- */

static int alloc_fails(size_t bytes)
{
    (void)bytes;
    return fails(ALLOCATE) != 0;
}

int inject_driver(const char *op)
{
    enum site_id id = DRIVER_OPEN;

    if (!real)
        return 0;
    while (id < DRIVER_OTHER && strcmp(sites[id].name, op) != 0)
        id++;
    return fails(id);
}

/* ---- delays ---- */

/* Mostly short, now and then as long as a scheduler's slice: both sorts of race are hit. */
static uint64_t delay_ns(uint64_t hash)
{
    return hash % 32 == 0 ? 4000000 : hash / 32 % 200000;
}

/* At each lock, before it is taken and while it is held. Shorter than at sequence points, which are fewer. */
static void delay_lock(enum lock_rank rank, bool taken)
{
    uint64_t hash = decision(LOCK, __atomic_fetch_add(&sites[LOCK].calls, 1, __ATOMIC_RELAXED), 2 * (uint64_t)rank + taken);

    if (hash % 1000 < config.permille[INJECT_DELAY])
        os_sleep(delay_ns(hash / 1000) / 8);
}

/* ---- start and stop ---- */

void inject_start(const struct inject_config *c)
{
    if (real)
        inject_stop();
    config = *c;
    for (int i = 0; i < SITES; i++)
        sites[i].calls = 0;
    eligible = failed = 0;
    last = 0;
    real = os;
    wrap();
    os = &wrapped;
    mem_fail = alloc_fails;
    if (config.permille[INJECT_DELAY]) {
        __atomic_store_n(&inject_points_on, 1, __ATOMIC_RELAXED);
        lock_delay = delay_lock;
    }
    hmm_log(HMM_LOG_INFO, "inject: seed %llu, per mille: system calls %u, memory %u, drivers %u, delays %u; failing call %llu",
            (unsigned long long)config.seed, config.permille[INJECT_OS], config.permille[INJECT_ALLOC],
            config.permille[INJECT_DRIVER], config.permille[INJECT_DELAY], (unsigned long long)config.fail_nth);
}

void inject_stop(void)
{
    if (!real)
        return;
    __atomic_store_n(&inject_points_on, inject_point_hook != NULL, __ATOMIC_RELAXED);
    mem_fail = NULL;
    lock_delay = NULL;
    os = real;
    real = NULL;
}

bool inject_active(void)
{
    return real != NULL;
}

uint64_t inject_calls(void)
{
    return __atomic_load_n(&eligible, __ATOMIC_RELAXED);
}

uint64_t inject_failures(void)
{
    return __atomic_load_n(&failed, __ATOMIC_RELAXED);
}

static const char *failure_name(int failure)
{
    static const char *const modes[] = {[SHORT] = "half of it",
                                        [LIE_HALF] = "EEXIST after half of it",
                                        [LIE_WHOLE] = "EEXIST after all of it",
                                        [PENDING] = "an event is pending"};
    const char *name = failure > 0 ? modes[failure] : strerrorname_np(-failure);

    return name ? name : "?";
}

const char *inject_last(void)
{
    static __thread char text[64] __attribute__((tls_model("initial-exec")));
    uint32_t l = __atomic_load_n(&last, __ATOMIC_RELAXED);
    const struct site *s;

    if (!l)
        return "";
    s = &sites[(l - 1) >> 8];
    snprintf(text, sizeof(text), "%s: %s", s->name, failure_name(s->failures[(l - 1) & 0xff]));
    return text;
}

/* ---- sequence points ---- */

/* FNV-1a: each point has a sequence of its own. */
static uint64_t name_hash(const char *name)
{
    uint64_t h = 0xcbf29ce484222325;

    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * 0x100000001b3;
    return h;
}

void inject_point_slow(const char *point)
{
    void (*hook)(const char *) = __atomic_load_n(&inject_point_hook, __ATOMIC_ACQUIRE);
    uint64_t hash;

    if (hook)
        hook(point);
    if (!real || !config.permille[INJECT_DELAY])
        return;
    hash = decision(POINT, __atomic_fetch_add(&sites[POINT].calls, 1, __ATOMIC_RELAXED), name_hash(point));
    if (hash % 1000 < config.permille[INJECT_DELAY])
        os_sleep(delay_ns(hash / 1000));
}

/* ---- mutations ---- */

#ifdef HMM_MUTATIONS
static char mutations[256];

static void mutations_read(void)
{
    const char *list = getenv("HMM_MUTATE");

    if (list)
        snprintf(mutations, sizeof(mutations), "%s", list);
}

bool mutate(const char *name)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    size_t len = strlen(name);

    pthread_once(&once, mutations_read);
    for (const char *p = mutations; *p; p += strcspn(p, ","), p += *p == ',') {
        if (strcspn(p, ",") == len && !strncmp(p, name, len))
            return true;
    }
    return false;
}
#endif
