/* SPDX-License-Identifier: MIT */
/*
 * What a program does to its address space, against migrations, jobs, forks and devices that come and go.
 *
 * Actors, one thread each, own a slice of one mapping, of which two stand in every block of 2 MiB. An actor does to its slice whatever a
 * program may: touch, jobs, munmap and mmap, mmap over it, MADV_DONTNEED, MADV_FREE, mremap (moved, grown, left in place), mprotect,
 * fork. Only the actor knows what its pages hold, in memory that libhmm never sees, so that every look has one right answer: the model
 * of the address space. Others migrate everything to and fro without asking anybody, and open and close a second device.
 *
 * Half of the actors make system calls that libhmm is only told of by events; the others use the wrappers of <hmm/hmm.h>.
 *
 * stress_races [seconds] [seed]      HMM_DEBUG=delay widens every race.
 */
#include "versions.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ACTORS 6u
#define SLICE 256u /* pages of an actor */
#define PAGES (ACTORS * SLICE)

static char *arena;
static uint64_t seed;
static atomic_int stop;
static hmm_dev dev;
static uint64_t failures;

enum op { TOUCH, JOB, JOB_BESIDE, UNMAP, MAP_OVER, DONTNEED, FREE, MOVE, MOVE_AWAY, PROTECT, FORK, OPS };
static const char *const op_names[OPS] = {
    "touch", "job",    "job beside a change", "munmap and mmap", "mmap over it", "DONTNEED",
    "FREE",  "mremap", "mremap DONTUNMAP",    "mprotect",        "fork"};
static uint64_t count[OPS], closings, migrations, forked_pages, splits;

struct actor {
    unsigned index;
    char *slice;
    char *aside; /* reserved, as long as the slice */
    uint64_t version[SLICE];
    uint64_t next; /* version */
    uint64_t random;
    enum op doing;
};

/* What an actor calls. */
struct calls {
    void *(*mmap)(void *, size_t, int, int, int, off_t);
    int (*munmap)(void *, size_t);
    void *(*mremap)(void *, size_t, size_t, int, ...);
    int (*madvise)(void *, size_t, int);
    int (*mprotect)(void *, size_t, int);
    pid_t (*fork)(void);
};
static const struct calls plain = {mmap, munmap, mremap, madvise, mprotect, fork};
static const struct calls wrapped = {hmm_mmap, hmm_munmap, hmm_mremap, hmm_madvise, hmm_mprotect, fork};

static const struct calls *calls_of(const struct actor *a)
{
    return a->index % 2 ? &wrapped : &plain;
}

/* ---- what pages hold ---- */

static volatile uint64_t *word(const struct actor *a, unsigned p, unsigned w)
{
    return (volatile uint64_t *)(a->slice + p * page + word_offset(w));
}

/* enum hmm_page_state; -1: it is not known, in a child. */
static int state_of(const void *at)
{
    struct hmm_page_info info;
    return hmm_range_query(at, page, &info, 1) == 1 ? info.state : -1;
}

static void fail(const struct actor *a, const char *what, unsigned p, uint64_t found, uint64_t right)
{
    if (__atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED) < 8)
        printf("FAIL actor %u (%s), %s, page %u at %p, state %d: found %#llx, expected %#llx\n", a->index, op_names[a->doing],
               what, p, (void *)(a->slice + p * page), state_of(a->slice + p * page), (unsigned long long)found,
               (unsigned long long)right);
}

static void __attribute__((noreturn)) broken(const struct actor *a, const char *call)
{
    printf("FAIL actor %u (%s): %s: %s\n", a->index, op_names[a->doing], call, strerror(errno));
    fflush(stdout);
    _exit(1);
}

/* How much of a page is not as the model says: one word tells of a race, all of a page that was lost. */
static void report(const struct actor *a, const char *what, unsigned p, uint64_t found, uint64_t right)
{
    unsigned wrong = 0, zero = 0;
    for (unsigned w = 0; w < WORDS; w++) {
        wrong += *word(a, p, w) != expected(a->index, a->version[p], w);
        zero += *word(a, p, w) == 0;
    }
    fail(a, what, p, found, right);
    printf("     of %u words %u are wrong, %u are zero\n", WORDS, wrong, zero);
}

/* True: every page is as the model says. */
static bool check(const struct actor *a, const char *what, unsigned first, unsigned n)
{
    for (unsigned p = first; p < first + n; p++)
        for (unsigned w = 0; w < WORDS; w++) {
            uint64_t found = *word(a, p, w), right = expected(a->index, a->version[p], w);
            if (found != right) {
                report(a, what, p, found, right);
                return false;
            }
        }
    return true;
}

static void write_pages(struct actor *a, unsigned first, unsigned n)
{
    for (unsigned p = first; p < first + n; p++) {
        a->version[p] = ++a->next;
        for (unsigned w = 0; w < WORDS; w++)
            *word(a, p, w) = expected(a->index, a->version[p], w);
    }
}

/* The pages read as zeros now; most of them are written then. */
static void renewed(struct actor *a, const char *what, unsigned first, unsigned n)
{
    memset(a->version + first, 0, n * sizeof(*a->version));
    check(a, what, first, n);
    if (below(&a->random, 4))
        write_pages(a, first, n);
}

static unsigned choose(struct actor *a, unsigned max, unsigned *first)
{
    unsigned n = 1 + below(&a->random, max);
    *first = below(&a->random, SLICE - n + 1);
    return n;
}

static char *at(const struct actor *a, unsigned p)
{
    return a->slice + p * page;
}

/* ---- jobs ---- */

/* A job that looks at n pages and writes their next versions. */
static hmm_fence *start_job(struct actor *a, unsigned first, unsigned n)
{
    struct job_arg arg = {0};
    for (unsigned p = first; p < first + n; p++) {
        struct job_page *j = &arg.pages[arg.n++];
        j->addr = at(a, p);
        for (unsigned w = 0; w < WORDS; w++) {
            j->offset[w] = word_offset(w);
            j->before[w] = expected(a->index, a->version[p], w);
            j->after[w] = expected(a->index, a->next + arg.n, w);
        }
    }
    struct hmm_range range = {.addr = (uintptr_t)at(a, first), .bytes = n * page, .write = 1};
    struct hmm_launch launch = {.size = sizeof(launch),
                                .kernel = check_pages,
                                .arg = &arg,
                                .arg_size = sizeof(arg),
                                .ranges = &range,
                                .nranges = 1,
                                .deadline_ms = 20000};
    hmm_fence *fence;
    REQUIRE(hmm_job_launch(dev, &launch, &fence));
    return fence;
}

static void end_job(struct actor *a, hmm_fence *fence, unsigned first, unsigned n)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    REQUIRE(hmm_fence_wait(fence, 60000000000ll));
    REQUIRE(hmm_fence_info(fence, &info));
    if (info.result)
        fail(a, "the device looks", first + (unsigned)((info.result - 1) / 256), 0, (info.result - 1) % 256);
    hmm_fence_put(fence);
    for (unsigned p = first; p < first + n; p++)
        a->version[p] = ++a->next;
}

static void job(struct actor *a)
{
    unsigned first, n = choose(a, JOB_PAGES, &first);
    end_job(a, start_job(a, first, n), first, n);
    if (below(&a->random, 2))
        check(a, "after the job", first, n);
}

/* ---- changes ---- */

static void unmap(struct actor *a, unsigned first, unsigned n)
{
    const struct calls *c = calls_of(a);
    if (c->munmap(at(a, first), n * page))
        broken(a, "munmap");
    for (;;) { /* the kernel may have given the hole to somebody for a moment */
        char *p =
            c->mmap(at(a, first), n * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (p == at(a, first))
            break;
        if (p != MAP_FAILED || errno != EEXIST)
            broken(a, "mmap into a hole");
        sched_yield();
    }
    renewed(a, "mapped anew", first, n);
}

static void map_over(struct actor *a, unsigned first, unsigned n)
{
    if (calls_of(a)->mmap(at(a, first), n * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
        at(a, first))
        broken(a, "mmap");
    madvise(at(a, first), n * page, below(&a->random, 2) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    renewed(a, "mapped over", first, n);
}

static void dontneed(struct actor *a, unsigned first, unsigned n)
{
    if (calls_of(a)->madvise(at(a, first), n * page, MADV_DONTNEED))
        broken(a, "MADV_DONTNEED");
    renewed(a, "dropped", first, n);
}

/* Each page is what it was, or zeros, until it is written. */
static void lazily_free(struct actor *a, unsigned first, unsigned n)
{
    if (calls_of(a)->madvise(at(a, first), n * page, MADV_FREE))
        broken(a, "MADV_FREE");
    for (unsigned p = first; p < first + n; p++) {
        uint64_t found = *word(a, p, 1);
        if (found != 0 && found != expected(a->index, a->version[p], 1))
            fail(a, "freed", p, found, expected(a->index, a->version[p], 1));
    }
    write_pages(a, first, n);
}

/* The range goes elsewhere and comes back; what it leaves behind meanwhile is a hole, or zeros. One new mapping first: mremap refuses
 * two at once, or moves the first of them before it does. */
static void move(struct actor *a, unsigned first, unsigned n, bool leave)
{
    const struct calls *c = calls_of(a);
    if (c->mmap(at(a, first), n * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != at(a, first))
        broken(a, "mmap");
    write_pages(a, first, n);
    if (below(&a->random, 2)) {
        int e = hmm_migrate_to_device(dev, at(a, first), n * page, NULL);
        if (e)
            broken(a, hmm_last_message());
    }
    int flags = MREMAP_MAYMOVE | (leave ? MREMAP_DONTUNMAP : 0);
    char *away = c->mremap(at(a, first), n * page, n * page, flags | MREMAP_FIXED, a->aside);
    if (away == MAP_FAILED && errno == EFAULT) { /* docs/protocol.md: met by a migration, it may be split in two */
        __atomic_fetch_add(&splits, 1, __ATOMIC_RELAXED);
        map_over(a, first, n);
        return;
    }
    if (away == MAP_FAILED)
        broken(a, "mremap away");
    struct actor there = *a;
    there.slice = away - first * page;
    check(&there, "moved away", first, n);
    if (leave) {
        uint64_t saved[SLICE];
        memcpy(saved, a->version, sizeof(saved));
        memset(a->version + first, 0, n * sizeof(*saved));
        check(a, "left behind", first, n);
        memcpy(a->version, saved, sizeof(saved));
    }
    if (c->mremap(away, n * page, n * page, MREMAP_MAYMOVE | MREMAP_FIXED, at(a, first)) != at(a, first))
        broken(a, "mremap back");
    if (mmap(a->aside, SLICE * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != a->aside)
        broken(a, "mmap aside");
    check(a, "moved back", first, n);
}

static void protect(struct actor *a, unsigned first, unsigned n)
{
    const struct calls *c = calls_of(a);
    bool none = below(&a->random, 2);
    if (c->mprotect(at(a, first), n * page, none ? PROT_NONE : PROT_READ))
        broken(a, "mprotect");
    if (!none)
        check(a, "read-only", first, n);
    if (c == &wrapped) { /* a device obeys */
        hmm_fence *fence = start_job(a, first, n > JOB_PAGES ? JOB_PAGES : n);
        int r = hmm_fence_wait(fence, 60000000000ll);
        if (r != -EACCES)
            fail(a, "a device got at protected memory", first, (uint64_t)r, 0);
        hmm_fence_put(fence);
    }
    if (c->mprotect(at(a, first), n * page, PROT_READ | PROT_WRITE))
        broken(a, "mprotect back");
    check(a, "writable again", first, n);
}

/* ---- fork ---- */

/* In the child: everything is as it was, and can be written. */
static void child(struct actor *a)
{
    bool ok = check(a, "in the child", 0, SLICE);
    write_pages(a, 0, SLICE);
    ok &= check(a, "written in the child", 0, SLICE);
    pid_t grandchild = ok && below(&a->random, 4) == 0 ? syscall(SYS_fork) : 1;
    if (grandchild == 0)
        _exit(!check(a, "in the grandchild", 0, SLICE));
    int status = 0;
    if (grandchild > 1 && (waitpid(grandchild, &status, 0) != grandchild || status))
        ok = false;
    fflush(stdout);
    _exit(!ok);
}

static void do_fork(struct actor *a)
{
    pid_t pid = calls_of(a)->fork();
    if (pid < 0)
        broken(a, "fork");
    if (pid == 0)
        child(a);
    unsigned first, n = choose(a, 40, &first);
    write_pages(a, first, n); /* while the child looks */
    int status;
    if (waitpid(pid, &status, 0) != pid)
        broken(a, "waitpid");
    if (status)
        fail(a, "the child ended with", 0, (uint64_t)status, 0);
    __atomic_fetch_add(&forked_pages, SLICE, __ATOMIC_RELAXED);
    check(a, "after the child", 0, SLICE);
}

/* ---- actors ---- */

static void touch(struct actor *a)
{
    unsigned first, n = choose(a, 40, &first);
    check(a, "touched", first, n);
    if (below(&a->random, 2))
        write_pages(a, first, n);
}

static void change(struct actor *a, enum op op, unsigned first, unsigned n)
{
    switch (op) {
    case UNMAP: unmap(a, first, n); break;
    case MAP_OVER: map_over(a, first, n); break;
    case DONTNEED: dontneed(a, first, n); break;
    case FREE: lazily_free(a, first, n); break;
    case MOVE: move(a, first, n, false); break;
    case MOVE_AWAY: move(a, first, n, true); break;
    case PROTECT: protect(a, first, n); break;
    default: break;
    }
}

/* A change of one half while a job runs on the other. */
static void job_beside(struct actor *a)
{
    unsigned pages = 1 + below(&a->random, JOB_PAGES), first = below(&a->random, SLICE / 2 - pages);
    hmm_fence *fence = start_job(a, first, pages);
    uint64_t next = a->next; /* versions that the job writes */
    a->next += pages;
    unsigned from = first + pages, n = 1 + below(&a->random, SLICE - from);
    static const enum op ops[] = {UNMAP, MAP_OVER, DONTNEED, FREE, MOVE};
    change(a, ops[below(&a->random, 5)], from, n);
    uint64_t after = a->next;
    a->next = next;
    end_job(a, fence, first, pages);
    a->next = after;
    check(a, "after the job beside", first, pages);
}

static void *actor_main(void *arg)
{
    struct actor *a = arg;
    while (!stop && !failures) {
        static const unsigned weights[OPS] = {20, 12, 10, 8, 6, 8, 6, 8, 4, 6, 2};
        unsigned total = 0, pick, first;
        for (unsigned i = 0; i < OPS; i++)
            total += weights[i];
        pick = below(&a->random, total);
        for (a->doing = 0; pick >= weights[a->doing]; a->doing++)
            pick -= weights[a->doing];
        unsigned n = choose(a, below(&a->random, 4) ? 24 : SLICE, &first);
        switch (a->doing) {
        case TOUCH: touch(a); break;
        case JOB: job(a); break;
        case JOB_BESIDE: job_beside(a); break;
        case FORK: do_fork(a); break;
        default: change(a, a->doing, first, n);
        }
        __atomic_fetch_add(&count[a->doing], 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* ---- the others ---- */

static void *migrate_main(void *arg)
{
    uint64_t r = random_mix(seed ^ (uintptr_t)arg);
    while (!stop && !failures) {
        unsigned p = below(&r, PAGES), n = 1 + below(&r, below(&r, 4) ? 64 : PAGES);
        n = p + n > PAGES ? PAGES - p : n;
        int e = below(&r, 3) ? hmm_migrate_to_device(dev, arena + p * page, n * page, NULL)
                             : hmm_migrate_to_system(arena + p * page, n * page, NULL);
        if (e && e != -EFAULT) { /* nothing was mapped just then */
            printf("FAIL migration: %s\n", hmm_last_message());
            __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
        }
        __atomic_fetch_add(&migrations, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* A device that comes, takes what it gets, and goes, while others touch its pages. */
static void *closer_main(void *arg)
{
    uint64_t r = random_mix(seed ^ (uintptr_t)arg);
    while (!stop && !failures) {
        hmm_dev other;
        REQUIRE(hmm_device_open("soft:memory=1M,engines=1", &other));
        for (unsigned i = below(&r, 6); i > 0; i--) {
            unsigned p = below(&r, PAGES - 200);
            int e = hmm_migrate_to_device(other, arena + p * page, 200 * page, NULL);
            if (e && e != -EFAULT) {
                printf("FAIL migration to the other device: %s\n", hmm_last_message());
                __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
            }
        }
        REQUIRE(hmm_device_close(other));
        __atomic_fetch_add(&closings, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static struct actor *new_actor(unsigned i)
{
    struct actor *a = mmap(NULL, sizeof(*a), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    a->index = i;
    a->slice = arena + i * SLICE * page;
    a->aside = arena + (PAGES + i * SLICE) * page;
    a->random = random_mix(seed + i);
    write_pages(a, 0, SLICE);
    return a;
}

/* Far below where the kernel puts mappings by itself: the holes that actors leave must not become somebody else's. Above the shadow of
 * AddressSanitizer. */
#define ARENA ((char *)((uintptr_t)1 << 45))

static void map_arena(void)
{
    size_t bytes = PAGES * page;
    arena = mmap(ARENA, 2 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (arena != ARENA || mprotect(arena, bytes, PROT_READ | PROT_WRITE)) {
        printf("FAIL no arena at %p: %s\n", (void *)ARENA, strerror(errno));
        _exit(1);
    }
}

int main(int argc, char **argv)
{
    double length = argc > 1 ? atof(argv[1]) : 5;
    struct actor *actors[ACTORS];
    pthread_t threads[ACTORS + 2];
    bool busy = true;
    setvbuf(stdout, NULL, _IOLBF, 0);
    seed = seed_of(argc, argv, 2);
    page = hmm_page_size();
    hmm_set_log(print_warnings, NULL);
    map_arena();
    REQUIRE(hmm_device_open(device_spec("soft:memory=3M,engines=2"), &dev));
    for (unsigned i = 0; i < ACTORS; i++) {
        actors[i] = new_actor(i);
        pthread_create(&threads[i], NULL, actor_main, actors[i]);
    }
    pthread_create(&threads[ACTORS], NULL, migrate_main, (void *)1);
    pthread_create(&threads[ACTORS + 1], NULL, closer_main, (void *)2);
    for (double end = seconds() + length; seconds() < end && !failures;)
        usleep(20000);
    stop = 1;
    for (unsigned i = 0; i < ACTORS + 2; i++)
        pthread_join(threads[i], NULL);
    for (unsigned i = 0; i < ACTORS; i++)
        check(actors[i], "at the end", 0, SLICE);
    int violations = hmm_audit();
    struct hmm_stats s = {.size = sizeof(s)};
    REQUIRE(hmm_stats(&s));
    REQUIRE(hmm_device_close(dev));
    for (unsigned i = 0; i < ACTORS; i++)
        check(actors[i], "after closing", 0, SLICE);
    for (unsigned i = 0; i < OPS; i++) {
        printf("%s %llu%s", op_names[i], (unsigned long long)count[i], i + 1 < OPS ? ", " : "\n");
        busy &= count[i] > 0;
    }
    if (splits > (count[MOVE] + count[MOVE_AWAY] + count[JOB_BESIDE]) / 20) {
        printf("FAIL %llu mappings were split\n", (unsigned long long)splits);
        failures++;
    }
    busy &= migrations && closings && s.pages_to_device && s.pages_to_system && s.device_faults;
    printf("migrations %llu, devices closed %llu, pages out %llu, home %llu, events %llu/%llu/%llu, retries %llu, "
           "split %llu\n",
           (unsigned long long)migrations, (unsigned long long)closings, (unsigned long long)s.pages_to_device,
           (unsigned long long)s.pages_to_system, (unsigned long long)s.events_unmap, (unsigned long long)s.events_remove,
           (unsigned long long)s.events_remap, (unsigned long long)s.retries, (unsigned long long)splits);
    printf("%llu failures, %d audit violations%s\n", (unsigned long long)failures, violations,
           busy ? "" : ", but not everything ran, which proves nothing");
    return failures || violations || !busy;
}
