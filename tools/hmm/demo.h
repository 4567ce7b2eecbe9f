/* SPDX-License-Identifier: MIT */
/*
 * What the files of `hmm demo` share. The main road is demo.c; read it first.
 *
 *  - demo_words.c    the CPU's side: the file, the text in malloc memory, the hash table of its words
 *  - kernels/        the device's side: C functions that run on the device and follow the same pointers
 *  - demo_jobs.c     launches them, and waits
 *  - demo_expect.c   the judge: the same answers, worked out by other code from a second read of the file
 *  - demo_report.c   what is shown: phases, results, JSON;  demo_picture.c: the picture and the progress bar;  demo_stats.c: all
 *                    numbers of the library
 *
 * One application thread. Kernels run on engine threads of the device while this thread waits for their fences.
 */
#ifndef HMM_DEMO_H
#define HMM_DEMO_H

#include <hmm/hmm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "kernels/demo_kernels.h"
#include "output.h"

/* Exit statuses; functions that can fail for the user return one, and have said why with output_error(). */
enum { DEMO_VERIFIED = 0, DEMO_DIFFERS = 1, DEMO_BAD_INPUT = 2 };

#define PIECE_BYTES ((uint64_t)1 << 20) /* the text is checksummed and counted in pieces of this size */

/* ---- demo_words.c: the file, the text, the table ------------------------------------------------------------------- */

struct progress;

/* The file, as a stream of `length` bytes: its contents, `repeat` times. */
struct source {
    const char *path;
    int fd;
    uint64_t file_bytes;
    uint64_t repeat;
    uint64_t length;
    struct timespec changed; /* when the file last changed */
};

/* Opens a regular file that is not empty. repeat 0: as often as it takes to fill `at_least` bytes. 0 or an exit status. */
int source_open(struct source *source, const char *path, uint64_t repeat, uint64_t at_least);
void source_close(struct source *source);
/* Reads [offset, offset + len) of the stream. 0 or an exit status. */
int source_read(const struct source *source, uint64_t offset, void *to, uint64_t len);
/* 0, or an exit status when the file was changed since it was opened. */
int source_unchanged(const struct source *source);

/* The hash table: ordinary C. Nodes come from big malloc chunks, as in many programs. */
struct table {
    struct word **buckets;
    uint64_t mask; /* buckets - 1; a power of two less one */
    uint64_t words;
    char **chunks;
    size_t chunk_count, chunk_room;
    size_t used;    /* bytes of the last chunk */
    uint64_t bytes; /* buckets and chunks */
};

#define CHUNK_BYTES ((size_t)1 << 20)

/* All return 0 or -ENOMEM. table_add makes the word if it is missing, and counts it. */
int table_init(struct table *table);
void table_free(struct table *table);
int table_add(struct table *table, const struct spelling *s);
struct word *table_find(const struct table *table, const struct spelling *s); /* NULL: not there */
int table_build(struct table *table, const char *text, uint64_t length, struct progress *progress);

/* A word that the CPU overwrites with another of the same length. */
struct edit {
    uint64_t offset;
    uint32_t length;
    char before[WORD_MAX], after[WORD_MAX];
};

/* Chooses up to `want` words, by the seed, from the file alone; sorted by offset. *edits is the caller's to free.
 * 0 or an exit status. */
int edits_plan(const struct source *source, uint64_t seed, size_t want, struct edit **edits, size_t *count);

struct edit_result {
    uint64_t on_device; /* words whose page was in device memory when the CPU came to change it */
    uint64_t differed;  /* words that were not what the file says: bytes were lost on the way */
};

/* Changes the text and the counts in the table. 0 or -ENOMEM. */
int edits_apply(const struct edit *edits, size_t count, char *text, struct table *table, struct edit_result *result);

/* ---- demo_jobs.c: jobs on the device ------------------------------------------------------------------------------- */

/* All return 0 or an exit status, and wait until the device has finished. */
int device_walk(hmm_dev dev, const struct table *table, struct census *census, struct progress *progress);
int device_checksums(hmm_dev dev, const char *text, uint64_t length, uint32_t *crc, struct progress *progress);
/* Adds to device[round] of every word. Stops between pieces after `seconds`: *done says how many bytes were counted. */
int device_count(hmm_dev dev, const char *text, uint64_t length, const struct table *table, int round, double seconds,
                 uint64_t *done, uint64_t *occurrences, struct progress *progress);

/* ---- demo_expect.c: the judge -------------------------------------------------------------------------------------- */

struct expect;

/* Which set of counts: of the whole text before and after the changes, or of the part that the device had time to count. */
enum { EXPECT_BEFORE = BEFORE, EXPECT_AFTER = AFTER, EXPECT_PART_BEFORE, EXPECT_PART_AFTER, EXPECT_SETS };

/* NULL: no memory. */
struct expect *expect_open(const struct source *source);
void expect_close(struct expect *expect);

/* Reads the whole file: fills EXPECT_BEFORE and the checksums of BEFORE. 0 or an exit status. */
int expect_before(struct expect *expect, struct progress *progress);
/* Works the edits in: fills EXPECT_AFTER and the checksums of AFTER. The edits must outlive `expect`. */
int expect_after(struct expect *expect, const struct edit *edits, size_t count);
/* Fills EXPECT_PART_BEFORE or _AFTER: the first `bytes` (whole pieces) as they are in `round`. Once per round. */
int expect_part(struct expect *expect, int round, uint64_t bytes, struct progress *progress);

void expect_census(const struct expect *expect, int set, struct census *census);
uint32_t expect_crc(const struct expect *expect, int round, uint64_t piece);
uint64_t expect_count(const struct expect *expect, int set, const char *spelling, size_t length);

/* ---- demo_picture.c: progress bar and picture ---------------------------------------------------------------------- */

/* A bar on stderr, only on a terminal, only for work that takes long, redrawn at most ten times a second. */
struct progress {
    bool terminal, shown;
    const char *label;
    uint64_t total;
    double began, drawn;
};

double demo_now(void); /* seconds, monotonic */
void progress_begin(struct progress *progress, const char *label, uint64_t total);
void progress_update(struct progress *progress, uint64_t done);
void progress_end(struct progress *progress);

#define PICTURE_COLUMNS 100

struct span_of_memory {
    const void *address;
    uint64_t bytes;
};

/* Where memory lives, one character for `cell_bytes` of it. */
struct picture {
    char text[PICTURE_COLUMNS + 1];
    uint64_t cell_bytes;
    uint64_t pages[HMM_PAGE_POISONED + 1]; /* by enum hmm_page_state */
};

extern const char picture_legend[];
/* The width to draw in: the terminal's, at most PICTURE_COLUMNS. */
unsigned picture_columns(void);
/* Draws spans one after the other in at most `columns` characters. 0 or an exit status. */
int picture_draw(struct picture *picture, const struct span_of_memory *spans, size_t count, unsigned columns);

/* ---- demo_report.c: what is shown ---------------------------------------------------------------------------------- */

#define MAX_PHASES 16
#define MAX_CHECKS 64
#define MAX_PICTURES 4

struct phase {
    const char *name;
    uint64_t bytes;
    double seconds;
    bool managed;           /* a device was open: the statistics mean something */
    struct hmm_stats stats; /* what the phase added */
};

/* One result of the device, or many of one kind (then the strings say how many differ), and the CPU's own. */
struct check {
    char name[64];
    char expected[64], found[64];
    bool equal;
};

struct report {
    /* what was asked for */
    const struct source *source;
    uint64_t seed;
    bool json;
    bool all_stats; /* for people; JSON has them always */
    /* what was there */
    struct hmm_device_info device;
    uint64_t table_bytes, table_words, chains;
    size_t edit_count;
    struct edit_result edits;
    bool restricted; /* hmm_check() said so */
    /* what happened */
    struct phase phases[MAX_PHASES];
    size_t phase_count;
    struct {
        const char *when;
        struct picture text, table;
    } pictures[MAX_PICTURES];
    size_t picture_count;
    struct census census[ROUNDS]; /* the device's */
    uint64_t counted[ROUNDS];     /* bytes of the text that the device had time to count words in */
    int audit;                    /* violations */
    struct hmm_stats end;         /* all of it, before the device was closed */
    /* the verdict */
    struct check checks[MAX_CHECKS];
    size_t check_count;
    uint64_t values; /* single values compared */
    /* of the phase that runs */
    double began;
    bool managed;
    struct hmm_stats stats;
};

void report_phase_begin(struct report *report, const char *name);
void report_phase_end(struct report *report, uint64_t bytes);

void report_check(struct report *report, const char *name, uint64_t expected, uint64_t found);
/* `values` were compared one by one, and `different` of them were not as expected. */
void report_check_many(struct report *report, const char *name, uint64_t values, uint64_t different);
void report_check_census(struct report *report, int round, const struct census *expected, const struct census *found);

bool report_verified(const struct report *report);

void report_print(const struct report *report);

/* ---- demo_stats.c ---- */

/* Every number of the library, with its name and what it means. */
void stats_print(const struct hmm_stats *stats);
json_object *stats_json(const struct hmm_stats *stats);

/* "35.1 KiB". Returns buffer. */
const char *format_bytes(char buffer[32], uint64_t bytes);

#endif
