/* SPDX-License-Identifier: MIT */
/*
 * What the benchmarks share. A benchmark compares the library (B) with a reference (A) that does the same work by other means, in
 * the same run, in turns: A B A B ... Of the pairs that stand next to each other it takes ratios, and of these the median, so that
 * a slow drift of the machine hits both sides. How far the reference differs from itself (A/A) stands beside each ratio.
 *
 * Every benchmark checks what it moved: wrong content is a failure, not a number. One application thread.
 */
#ifndef HMM_BENCH_HARNESS_H
#define HMM_BENCH_HARNESS_H

#include <hmm/hmm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BENCH_MAX_RUNS 1000
#define BENCH_BLOCK ((size_t)2 << 20) /* a huge page */

enum bench_page { BENCH_4K, BENCH_THP, BENCH_PAGES };
enum bench_better { BENCH_HIGHER, BENCH_LOWER };

/* One line of output. */
struct bench_result {
    const char *bench;
    uint64_t size; /* bytes */
    enum bench_page page;
    double value;     /* ours, the median */
    const char *unit; /* of value and reference */
    double reference; /* the median */
    double ratio;     /* ours over reference: the median of the pairs' ratios */
    enum bench_better better;
    unsigned runs;    /* pairs */
    double spread;    /* see samples_report() */
    const char *note; /* for people; may be NULL */
};

struct bench_env {
    const char *device_spec;
    uint64_t size; /* bytes that a benchmark works on, a multiple of BENCH_BLOCK */
    unsigned runs;
    uint64_t seed;      /* of contents and orders */
    hmm_dev device;     /* between bench_open() and bench_close() */
    const char *name;   /* of the benchmark that runs */
    const char *suffix; /* of every name that it reports: where the engines are */
    void (*emit)(const struct bench_result *result);
};

struct bench {
    const char *name;
    const char *summary;
    /* 0, or 1 after bench_fail(). */
    int (*run)(struct bench_env *env);
    bool engines; /* it is about engines: worth running on a device that has them in a process of their own, too */
};

extern const struct bench bench_migrate_to_device, bench_migrate_to_system, bench_cpu_fault_random, bench_cpu_touch_sequential,
    bench_unmanaged_touch, bench_metadata, bench_operations, bench_empty_job, bench_device_fault, bench_range_snapshot,
    bench_range_fault, bench_notifier_lookup, bench_munmap_managed, bench_fork_device_resident, bench_pin_system,
    bench_pin_private;

/* Says on stderr what went wrong and returns 1. */
int bench_fail(const struct bench_env *env, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* All below return 0, or 1 after bench_fail(), where nothing else is said. */
int bench_open(struct bench_env *env);
int bench_close(struct bench_env *env);
/* Opens the device, runs one_kind for each kind of page that this system gives, up to the first failure, and closes. */
int bench_each_page(struct bench_env *env, int (*one_kind)(struct bench_env *env, enum bench_page page));
int bench_stats(struct bench_env *env, struct hmm_stats *stats);

/* Of a notifier with nothing to do. */
extern const struct hmm_notifier_ops bench_lets_go;

/* ---- memory -------------------------------------------------------------------------------------------------------- */

/* Whether this system gives huge pages to who asks for them; if not, says on stderr that this kind is left out. */
bool bench_page_available(const struct bench_env *env, enum bench_page page);
/* Private anonymous memory, aligned to BENCH_BLOCK, untouched, of one kind of page. NULL after bench_fail(). */
void *bench_map(struct bench_env *env, size_t bytes, enum bench_page page);
void bench_unmap(void *memory, size_t bytes);

/* The content of a word is a function of its place and the seed: so what is right needs no copy. */
void bench_fill(void *memory, size_t bytes, uint64_t seed);
int bench_verify(struct bench_env *env, const void *memory, size_t bytes, uint64_t seed);
/* The first word of the page at this offset. */
uint64_t bench_word(size_t offset, uint64_t seed);

uint64_t bench_random(uint64_t *state);

/* Migrations that must move every page. */
int bench_to_device(struct bench_env *env, const void *memory, size_t bytes, enum bench_page page);
int bench_to_system(struct bench_env *env, const void *memory, size_t bytes);

/* Bytes of private memory that the process has resident (RssAnon). */
uint64_t bench_resident(void);

/* ---- measuring ------------------------------------------------------------------------------------------------------ */

double bench_now(void); /* seconds */

/* Keeps the calling thread on one CPU, or gives it back all that the process may use. */
int bench_pin_cpu(struct bench_env *env, int *cpu);
void bench_unpin_cpu(void);

/* Seconds of each run; reference[i] was measured right before ours[i]. */
struct samples {
    unsigned n;
    double reference[BENCH_MAX_RUNS], ours[BENCH_MAX_RUNS];
};
void samples_add(struct samples *s, double reference, double ours);

enum bench_measure { BENCH_GIB_PER_SECOND, BENCH_NS_PER_OPERATION };

/*
 * Reports medians. The ratio is of speeds (higher is better) or of times (lower is better), and is the median over the pairs.
 * `spread`: of the ratios of each reference run to the one before, their distance from 1 that nine in ten do not exceed. A ratio
 * within 1 +- spread cannot be told from the reference.
 */
void samples_report(struct bench_env *env, const struct samples *s, enum bench_page page, uint64_t size, enum bench_measure how,
                    uint64_t operations, const char *note);
/* Fills env->size of memory, has one_run measure something with it env->runs times, and once before that without samples, and reports GiB/s. */
int bench_copies_of(struct bench_env *env, enum bench_page page,
                    int (*one_run)(struct bench_env *env, enum bench_page page, const char *origin, struct samples *s));

/* Whether the middle four fifths of ours/reference and of reference/reference overlap. */
bool samples_overlap(const struct samples *s);

#endif
