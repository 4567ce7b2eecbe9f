/* SPDX-License-Identifier: MIT */
/* See harness.h. One thread. */
#include "harness.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <hmm/driver.h>

int bench_fail(const struct bench_env *env, const char *fmt, ...)
{
    va_list args;

    fflush(stdout);
    fprintf(stderr, "hmm bench: %s: ", env->name);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
    return 1;
}

/* ---- the device ------------------------------------------------------------------------------------------------------ */

int bench_open(struct bench_env *env)
{
    int err = hmm_device_open(env->device_spec, &env->device);

    return err ? bench_fail(env, "the device '%s' cannot be opened: %s", env->device_spec, hmm_last_message()) : 0;
}

int bench_close(struct bench_env *env)
{
    int err = hmm_device_close(env->device);

    return err ? bench_fail(env, "the device cannot be closed: %s", hmm_last_message()) : 0;
}

int bench_each_page(struct bench_env *env, int (*one_kind)(struct bench_env *env, enum bench_page page))
{
    int failed = bench_open(env);

    if (failed)
        return failed;
    for (enum bench_page page = BENCH_4K; page < BENCH_PAGES && !failed; page++) {
        if (bench_page_available(env, page))
            failed = one_kind(env, page);
    }
    return bench_close(env) || failed;
}

int bench_stats(struct bench_env *env, struct hmm_stats *stats)
{
    stats->size = sizeof(*stats);
    return hmm_stats(stats) ? bench_fail(env, "no statistics: %s", hmm_last_message()) : 0;
}

static int let_go(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    (void)event;
    return 0;
}

const struct hmm_notifier_ops bench_lets_go = {.invalidate = let_go, .name = "bench"};

/* ---- memory ---------------------------------------------------------------------------------------------------------- */

bool bench_page_available(const struct bench_env *env, enum bench_page page)
{
    char line[128] = "";
    FILE *file;

    if (page == BENCH_4K)
        return true;
    file = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "re");
    if (file) {
        if (!fgets(line, sizeof(line), file))
            line[0] = 0;
        fclose(file);
    }
    if (strstr(line, "[always]") || strstr(line, "[madvise]"))
        return true;
    fprintf(stderr, "hmm bench: %s: thp left out: this system gives no transparent huge pages\n", env->name);
    return false;
}

/* A page on each side that is nobody's: next to the stack of a thread, the library would leave the first page of the memory where
 * it is, because the thread's control block may reach into it. */
void *bench_map(struct bench_env *env, size_t bytes, enum bench_page page)
{
    size_t guard = hmm_page_size(), room = bytes + BENCH_BLOCK + 2 * guard;
    char *raw = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *memory, *end;
    const char *step = "mapped";

    if (raw == MAP_FAILED)
        goto failed;
    memory = (char *)(((uintptr_t)raw + guard + BENCH_BLOCK - 1) & ~(uintptr_t)(BENCH_BLOCK - 1));
    end = memory + bytes + guard;
    if (memory - guard > raw)
        munmap(raw, (size_t)(memory - guard - raw));
    if (end < raw + room)
        munmap(end, (size_t)(raw + room - end));
    if (mprotect(memory, bytes, PROT_READ | PROT_WRITE))
        goto unmap;
    step = "made of huge pages";
    if (madvise(memory, bytes, page == BENCH_THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) && page == BENCH_THP)
        goto unmap;
    return memory;
unmap:
    bench_fail(env, "%zu bytes cannot be %s: %s", bytes, step, strerror(errno));
    bench_unmap(memory, bytes);
    return NULL;
failed:
    bench_fail(env, "%zu bytes cannot be %s: %s", bytes, step, strerror(errno));
    return NULL;
}

void bench_unmap(void *memory, size_t bytes)
{
    size_t guard = hmm_page_size();

    if (memory)
        munmap((char *)memory - guard, bytes + 2 * guard);
}

/* Cheap, so that filling and checking do not dominate; different for each word, page and seed. */
static inline uint64_t word_at(uint64_t index, uint64_t seed)
{
    uint64_t x = (index + seed) * 0x9e3779b97f4a7c15ull;

    return x ^ (x >> 29);
}

uint64_t bench_word(size_t offset, uint64_t seed)
{
    return word_at(offset / sizeof(uint64_t), seed);
}

/* splitmix64 (Steele, Lea, Flood 2014) */
uint64_t bench_random(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15ull;

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

void bench_fill(void *memory, size_t bytes, uint64_t seed)
{
    uint64_t *words = memory;

    for (size_t i = 0; i < bytes / sizeof(*words); i++)
        words[i] = word_at(i, seed);
}

int bench_verify(struct bench_env *env, const void *memory, size_t bytes, uint64_t seed)
{
    const uint64_t *words = memory;

    for (size_t i = 0; i < bytes / sizeof(*words); i++) {
        uint64_t found = words[i], right = word_at(i, seed);

        if (found != right)
            return bench_fail(env, "WRONG CONTENT at offset %zu: %016" PRIx64 " in place of %016" PRIx64, i * sizeof(*words),
                              found, right);
    }
    return 0;
}

int bench_to_device(struct bench_env *env, const void *memory, size_t bytes, enum bench_page page)
{
    struct hmm_migrate_result result = {.size = sizeof(result)};
    uint64_t pages = bytes / hmm_page_size();

    if (hmm_migrate_to_device(env->device, memory, bytes, &result))
        return bench_fail(env, "migration to the device: %s", hmm_last_message());
    if (result.moved != pages)
        return bench_fail(env,
                          "only %" PRIu64 " of %" PRIu64 " pages moved to the device (%" PRIu64 " pinned, %" PRIu64
                          " unmovable, %" PRIu64 " unmapped, %" PRIu64 " busy; the first is at %#zx)",
                          result.moved, pages, result.pinned, result.unmovable, result.unmapped, result.busy,
                          (size_t)(result.first_stayed - (uintptr_t)memory));
    /* A kernel short of huge pages gives small ones: then this is not what the line says. */
    if (page == BENCH_THP && result.huge < pages / 10 * 9)
        return bench_fail(env, "only %" PRIu64 " of %" PRIu64 " pages moved as huge pages", result.huge, pages);
    return 0;
}

int bench_to_system(struct bench_env *env, const void *memory, size_t bytes)
{
    struct hmm_migrate_result result = {.size = sizeof(result)};
    uint64_t pages = bytes / hmm_page_size();

    if (hmm_migrate_to_system(memory, bytes, &result))
        return bench_fail(env, "migration to the system: %s", hmm_last_message());
    if (result.moved != pages)
        return bench_fail(
            env, "only %" PRIu64 " of %" PRIu64 " pages moved to the system (%" PRIu64 " were there, %" PRIu64 " busy)",
            result.moved, pages, result.already, result.busy);
    return 0;
}

uint64_t bench_resident(void)
{
    FILE *file = fopen("/proc/self/status", "re");
    char line[256];
    uint64_t kib = 0;

    while (file && fgets(line, sizeof(line), file)) {
        if (sscanf(line, "RssAnon: %" SCNu64, &kib) == 1)
            break;
    }
    if (file)
        fclose(file);
    return kib << 10;
}

/* ---- measuring ------------------------------------------------------------------------------------------------------- */

double bench_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static cpu_set_t all_cpus;

int bench_pin_cpu(struct bench_env *env, int *cpu)
{
    cpu_set_t one;
    int last = -1;

    if (sched_getaffinity(0, sizeof(all_cpus), &all_cpus))
        return bench_fail(env, "which CPUs there are is not known: %s", strerror(errno));
    for (int i = 0; i < CPU_SETSIZE; i++) {
        if (CPU_ISSET(i, &all_cpus))
            last = i; /* the first one has more interrupts, as a rule */
    }
    CPU_ZERO(&one);
    CPU_SET(last, &one);
    if (sched_setaffinity(0, sizeof(one), &one))
        return bench_fail(env, "the thread cannot be kept on CPU %d: %s", last, strerror(errno));
    *cpu = last;
    return 0;
}

void bench_unpin_cpu(void)
{
    sched_setaffinity(0, sizeof(all_cpus), &all_cpus);
}

void samples_add(struct samples *s, double reference, double ours)
{
    s->reference[s->n] = reference;
    s->ours[s->n] = ours;
    s->n++;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* The value that a share of `part` of all values does not exceed. Sorts. */
static double quantile(double *v, unsigned n, double part)
{
    double at = part * (n - 1);
    unsigned low = (unsigned)at;

    if (n == 0)
        return 0;
    qsort(v, n, sizeof(*v), by_value);
    if (low + 1 >= n)
        return v[n - 1];
    return v[low] + (v[low + 1] - v[low]) * (at - low);
}

static double median_of(const double *v, unsigned n)
{
    double copy[BENCH_MAX_RUNS];

    memcpy(copy, v, n * sizeof(*v));
    return quantile(copy, n, 0.5);
}

/* Times of ours over those of the reference; times of each reference over those of the reference before it. */
static void pair_ratios(const struct samples *s, double *ratios)
{
    for (unsigned i = 0; i < s->n; i++)
        ratios[i] = s->ours[i] / s->reference[i];
}

static unsigned self_ratios(const struct samples *s, double *ratios)
{
    for (unsigned i = 1; i < s->n; i++)
        ratios[i - 1] = s->reference[i] / s->reference[i - 1];
    return s->n ? s->n - 1 : 0;
}

static double spread_of(const struct samples *s)
{
    double distance[BENCH_MAX_RUNS];
    unsigned n = self_ratios(s, distance);

    for (unsigned i = 0; i < n; i++)
        distance[i] = fabs(distance[i] - 1);
    return quantile(distance, n, 0.9);
}

bool samples_overlap(const struct samples *s)
{
    double ours[BENCH_MAX_RUNS], self[BENCH_MAX_RUNS];
    unsigned n = self_ratios(s, self);

    pair_ratios(s, ours);
    return quantile(ours, s->n, 0.1) <= quantile(self, n, 0.9) && quantile(ours, s->n, 0.9) >= quantile(self, n, 0.1);
}

void samples_report(struct bench_env *env, const struct samples *s, enum bench_page page, uint64_t size, enum bench_measure how,
                    uint64_t operations, const char *note)
{
    double ratios[BENCH_MAX_RUNS];
    double ours = median_of(s->ours, s->n), reference = median_of(s->reference, s->n);
    bool speed = how == BENCH_GIB_PER_SECOND;
    double unit = speed ? (double)size / (1 << 30) : 1e9 / (double)operations;
    double ratio;

    pair_ratios(s, ratios);
    ratio = quantile(ratios, s->n, 0.5);
    env->emit(&(struct bench_result){
        .bench = env->name,
        .size = size,
        .page = page,
        .value = speed ? unit / ours : ours * unit,
        .unit = speed ? "GiB/s" : "ns",
        .reference = speed ? unit / reference : reference * unit,
        .ratio = speed ? 1 / ratio : ratio,
        .better = speed ? BENCH_HIGHER : BENCH_LOWER,
        .runs = s->n,
        .spread = spread_of(s),
        .note = note,
    });
}

int bench_copies_of(struct bench_env *env, enum bench_page page,
                    int (*one_run)(struct bench_env *env, enum bench_page page, const char *origin, struct samples *s))
{
    struct samples s = {0};
    char *origin = bench_map(env, env->size, page);
    int failed;

    if (!origin)
        return 1;
    bench_fill(origin, env->size, env->seed);
    failed = one_run(env, page, origin, NULL); /* warms up */
    for (unsigned i = 0; i < env->runs && !failed; i++)
        failed = one_run(env, page, origin, &s);
    if (!failed)
        samples_report(env, &s, page, env->size, BENCH_GIB_PER_SECOND, 0, NULL);
    bench_unmap(origin, env->size);
    return failed;
}
