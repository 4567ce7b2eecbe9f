/* SPDX-License-Identifier: MIT */
/*
 * `hmm demo [FILE]`: a device works on ordinary malloc memory. This file is the main road; what it does, in order:
 *
 *   1. The CPU reads a file into malloc memory and builds a hash table of its words, with chained nodes.
 *   2. A device is opened whose memory is too small for all of it.
 *   3. The device walks the table through the process's own pointers, checksums the text, and counts the words of the text
 *      into the nodes of the table. It faults; pages come to its memory and make room for others.
 *   4. The CPU changes words in the text and in the table. It faults; pages come home.
 *   5. The device does everything again, and must see the changes.
 *   6. Every result is compared with what the CPU works out by itself from a second read of the file (demo_expect.c).
 *
 * Nowhere does the program say which memory the device may use, and nowhere does it copy to or from the device.
 *
 * Exit status: 0 verified, 1 something differs or failed on the way, 2 the input or the system does not allow it.
 */
#include <argp.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "commands.h"
#include "demo.h"

#define TEXT_AT_LEAST ((uint64_t)32 << 20) /* a shorter file is repeated, so that there is something to move */
#define DEVICE_AT_LEAST ((uint64_t)4 << 20)
#define CHANGES 256
#define DEFAULT_LIMIT 60

/* ---- options ------------------------------------------------------------------------------------------------------- */

struct options {
    const char *file;
    const char *device; /* NULL: built from memory */
    uint64_t memory;    /* 0: chosen to be too small */
    uint64_t seed;
    uint64_t repeat; /* 0: chosen */
    uint64_t limit;  /* seconds */
    bool json;
    bool stats;
};

/* Texts of packages that every Debian has, best first. */
static const char *const default_files[] = {
    "/usr/share/common-licenses/GPL-3", "/usr/share/common-licenses/GPL-2", "/var/lib/dpkg/status", "/etc/services", NULL,
};

enum { KEY_LIMIT = 256, KEY_REPEAT, KEY_STATS };

static const struct argp_option demo_options[] = {
    {"memory", 'm', "SIZE", 0, "Memory of the device, with K, M or G (default: too small for text and table)", 0},
    {"device", 'd', "SPEC", 0, "Device to open, see `hmm devices` (default: soft:memory=SIZE)", 0},
    {"seed", 's', "N", 0, "Chooses what the CPU changes (default: 1)", 0},
    {"repeat", KEY_REPEAT, "N", 0, "Take the file N times over (default: as often as it takes to fill 32 MiB)", 0},
    {"limit", KEY_LIMIT, "SECONDS", 0, "Longest time for the device to count words, twice (default: 60)", 0},
    {"stats", KEY_STATS, NULL, 0, "Print all numbers that the library keeps, too", 0},
    {"json", 'j', NULL, 0, "Print one JSON object", 0},
    {0},
};

static const char demo_doc[] =
    "A device computes on the words of FILE in ordinary malloc memory: pages move to its memory when it touches them and "
    "come back when the CPU does. Every result is compared with the CPU's own."
    "\vFILE may be any file, text or binary. Without it the demo reads /usr/share/common-licenses/GPL-3, which every Debian "
    "has "
    "(or GPL-2 beside it, /var/lib/dpkg/status or /etc/services if that is missing).\n\n"
    "Exit status: 0 verified; 1 a result differs; 2 bad input, or the system does not allow it (see `hmm check`).";

static bool parse_number(const char *text, uint64_t *value, const char **end)
{
    char *stop;

    if (*text < '0' || *text > '9')
        return false; /* strtoull would take signs and spaces */
    errno = 0;
    *value = strtoull(text, &stop, 0);
    *end = stop;
    return errno == 0;
}

/* A number of bytes with an optional K, M, G or T, and after that an optional B or iB. */
static bool parse_size(const char *text, uint64_t *value)
{
    static const char suffixes[] = "KMGT";
    const char *end, *suffix;

    if (!parse_number(text, value, &end))
        return false;
    if (*end && (suffix = strchr(suffixes, *end & ~0x20))) {
        unsigned shift = 10 * (unsigned)(suffix - suffixes + 1);

        if (*value > UINT64_MAX >> shift)
            return false;
        *value <<= shift;
        end++;
        end += *end == 'i' ? 1 : 0;
        end += *end == 'B' ? 1 : 0;
    }
    return *end == '\0';
}

static uint64_t number_or_fail(struct argp_state *state, const char *option, const char *text, uint64_t least)
{
    const char *end;
    uint64_t value = 0;

    if (!parse_number(text, &value, &end) || *end || value < least) {
        argp_failure(state, DEMO_BAD_INPUT, 0, "%s '%s' is not a number from %" PRIu64 " up; give one, such as %s 7", option,
                     text, least, option);
    }
    return value;
}

static uint64_t memory_or_fail(struct argp_state *state, const char *text)
{
    uint64_t value = 0, exists = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    char have[32];

    if (!parse_size(text, &value))
        argp_failure(state, DEMO_BAD_INPUT, 0, "--memory '%s' is not a size; give a number with K, M or G, such as 64M", text);
    if (value == 0)
        argp_failure(state, DEMO_BAD_INPUT, 0, "--memory '%s' is no memory at all; a device needs some, such as 64M", text);
    if (value > exists) {
        argp_failure(state, DEMO_BAD_INPUT, 0, "--memory '%s' is more than this machine has (%s); give less, such as 64M", text,
                     format_bytes(have, exists));
    }
    return value;
}

static error_t parse_option(int key, char *arg, struct argp_state *state)
{
    struct options *options = state->input;

    switch (key) {
    case 'm': options->memory = memory_or_fail(state, arg); return 0;
    case 'd': options->device = arg; return 0;
    case 's': options->seed = number_or_fail(state, "--seed", arg, 0); return 0;
    case KEY_REPEAT: options->repeat = number_or_fail(state, "--repeat", arg, 1); return 0;
    case KEY_LIMIT: options->limit = number_or_fail(state, "--limit", arg, 0); return 0;
    case 'j': options->json = true; return 0;
    case KEY_STATS: options->stats = true; return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num > 0)
            argp_failure(state, DEMO_BAD_INPUT, 0, "'%s' is one file too many; give one", arg);
        options->file = arg;
        return 0;
    case ARGP_KEY_END:
        if (options->device && options->memory)
            argp_failure(state, DEMO_BAD_INPUT, 0, "--memory and --device both say how much memory; give one of them");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static const char *default_file(void)
{
    for (size_t i = 0; default_files[i]; i++)
        if (access(default_files[i], R_OK) == 0)
            return default_files[i];
    return default_files[0]; /* the error names it */
}

/* ---- what the system allows ---------------------------------------------------------------------------------------- */

static void first_missing(const struct hmm_check_item *item, void *arg)
{
    char *reason = arg;

    if (item->status == HMM_CHECK_MISSING && !*reason)
        snprintf(reason, 512, "%s: %s; %s", item->name, item->detail, item->remedy);
}

/* 0, or an exit status when pages of a process cannot be managed here. */
static int check_system(struct report *report)
{
    char reason[512] = "";
    int rc = hmm_check(first_missing, reason);

    if (rc < 0) {
        return output_error(DEMO_BAD_INPUT, "this system does not let a process manage its pages: %s",
                            *reason ? reason : hmm_last_message());
    }
    report->restricted = rc > 0;
    return 0;
}

/* MemAvailable: what can be used without pushing others out. */
static uint64_t available_memory(void)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *f = fopen("/proc/meminfo", "re");

    while (f && fgets(line, sizeof(line), f) && sscanf(line, "MemAvailable: %llu", &kib) != 1) {
    }
    if (f)
        fclose(f);
    return kib ? (uint64_t)kib << 10 : UINT64_MAX;
}

/* ---- the road ------------------------------------------------------------------------------------------------------ */

struct demo {
    struct options options;
    struct source source;
    char *text;
    struct table table;
    struct expect *expect;
    hmm_dev dev; /* 0: not open */
    struct edit *edits;
    struct report report;
};

static int open_device(struct demo *d, const char *spec)
{
    int rc = hmm_device_open(spec, &d->dev);

    if (rc < 0)
        return output_error(DEMO_BAD_INPUT, "cannot open the device '%s': %s (%s)", spec, hmm_last_message(), hmm_strerror(rc));
    d->report.device.size = sizeof(d->report.device);
    rc = hmm_device_info(d->dev, &d->report.device);
    return rc < 0 ? output_error(DEMO_DIFFERS, "the device does not describe itself: %s", hmm_last_message()) : 0;
}

/*
 * A quarter of text and table: too small for everything. But a walk visits the nodes in no order of their addresses, so where
 * the table is most of it, the device gets room for the table: else every step of the walk would be a fault.
 */
static uint64_t memory_too_small(const struct demo *d)
{
    uint64_t all = d->source.length + d->table.bytes, memory = all / 4, table = d->table.bytes + d->table.bytes / 4;

    if (memory < table)
        memory = table < all / 4 * 3 ? table : all / 4 * 3;
    memory = (memory + (2 << 20) - 1) & ~(((uint64_t)2 << 20) - 1);
    return memory < DEVICE_AT_LEAST ? DEVICE_AT_LEAST : memory;
}

static int open_soft_device(struct demo *d, uint64_t memory)
{
    char spec[64];

    static const char *const suffixes[] = {"", "K", "M", "G"};
    unsigned suffix = 0;

    while (memory % 1024 == 0 && suffix < 3) {
        memory /= 1024;
        suffix++;
    }
    snprintf(spec, sizeof(spec), "soft:memory=%" PRIu64 "%s", memory, suffixes[suffix]);
    return open_device(d, spec);
}

static int no_memory(uint64_t bytes)
{
    char text[32];

    return output_error(DEMO_BAD_INPUT, "not enough memory: %s are needed; use a smaller file or close other programs",
                        format_bytes(text, bytes));
}

/* Phase: the file into malloc memory. */
static int read_text(struct demo *d, struct progress *progress)
{
    const struct source *s = &d->source;

    report_phase_begin(&d->report, "CPU reads the file");
    progress_begin(progress, "reading the file", s->length);
    d->text = s->length < available_memory() / 2 ? malloc(s->length) : NULL;
    if (!d->text)
        return no_memory(2 * s->length);
    for (uint64_t done = 0; done < s->length; done += PIECE_BYTES) {
        uint64_t left = s->length - done;
        int rc = source_read(s, done, d->text + done, left < PIECE_BYTES ? left : PIECE_BYTES);

        if (rc)
            return rc;
        progress_update(progress, done);
    }
    report_phase_end(&d->report, s->length);
    return 0;
}

/* Phases: the table, and the results to expect. */
static int prepare(struct demo *d, struct progress *progress)
{
    report_phase_begin(&d->report, "CPU builds the table of words");
    progress_begin(progress, "building the table", d->source.length);
    if (table_init(&d->table) < 0 || table_build(&d->table, d->text, d->source.length, progress) < 0)
        return no_memory(d->source.length + d->table.bytes);
    report_phase_end(&d->report, d->source.length);

    report_phase_begin(&d->report, "CPU works out what to expect");
    progress_begin(progress, "working out what to expect", d->source.length);
    d->expect = expect_open(&d->source);
    if (!d->expect)
        return no_memory(d->source.length + d->table.bytes);
    int rc = expect_before(d->expect, progress);

    rc = rc ? rc : edits_plan(&d->source, d->options.seed, CHANGES, &d->edits, &d->report.edit_count);
    report_phase_end(&d->report, d->source.length);
    d->report.table_bytes = d->table.bytes;
    d->report.table_words = d->table.words;
    d->report.chains = d->table.mask + 1;
    return rc;
}

static int draw(struct demo *d, const char *when)
{
    size_t n = d->report.picture_count, parts = 0;
    unsigned columns = picture_columns() - 8; /* the labels */
    struct span_of_memory text = {d->text, d->source.length};
    struct span_of_memory *table = calloc(d->table.chunk_count + 1, sizeof(*table));

    if (!table)
        return no_memory(d->table.chunk_count * sizeof(*table));
    table[parts++] = (struct span_of_memory){d->table.buckets, (d->table.mask + 1) * sizeof(struct word *)};
    for (size_t i = 0; i < d->table.chunk_count; i++)
        table[parts++] = (struct span_of_memory){d->table.chunks[i], CHUNK_BYTES};
    int rc = picture_draw(&d->report.pictures[n].text, &text, 1, columns);

    rc = rc ? rc : picture_draw(&d->report.pictures[n].table, table, parts, columns);
    d->report.pictures[n].when = when;
    d->report.picture_count = n + 1;
    free(table);
    return rc;
}

/* Phase: the device follows the chains of the table. */
static int walk(struct demo *d, int round, struct progress *progress)
{
    struct census expected;
    struct census *found = &d->report.census[round];

    report_phase_begin(&d->report, round == BEFORE ? "device walks the table" : "device walks it again");
    progress_begin(progress, "device walks the table", d->table.mask + 1);
    int rc = device_walk(d->dev, &d->table, found, progress);

    report_phase_end(&d->report, d->table.bytes);
    if (rc)
        return rc;
    expect_census(d->expect, round, &expected);
    report_check_census(&d->report, round, &expected, found);
    return 0;
}

/* Phase: the device checksums the text, piece by piece. */
static int checksum(struct demo *d, int round, struct progress *progress)
{
    uint64_t pieces = (d->source.length + PIECE_BYTES - 1) / PIECE_BYTES, different = 0;
    uint32_t *crc = calloc(pieces, sizeof(*crc));

    if (!crc)
        return no_memory(pieces * sizeof(*crc));
    report_phase_begin(&d->report, round == BEFORE ? "device checksums the text" : "device checksums it again");
    progress_begin(progress, "device checksums the text", d->source.length);
    int rc = device_checksums(d->dev, d->text, d->source.length, crc, progress);

    report_phase_end(&d->report, d->source.length);
    for (uint64_t i = 0; i < pieces; i++)
        different += crc[i] != expect_crc(d->expect, round, i);
    free(crc);
    if (rc == 0)
        report_check_many(&d->report, round == BEFORE ? "checksums before" : "checksums after", pieces, different);
    return rc;
}

/* Phase: the device splits the text into words and counts them in the nodes of the table. */
static int count(struct demo *d, int round, struct progress *progress)
{
    struct census expected;
    uint64_t *done = &d->report.counted[round], occurrences;
    int set = round;

    report_phase_begin(&d->report, round == BEFORE ? "device counts the words" : "device counts them again");
    progress_begin(progress, "device counts the words", d->source.length);
    int rc = device_count(d->dev, d->text, d->source.length, &d->table, round, (double)d->options.limit, done, &occurrences,
                          progress);

    report_phase_end(&d->report, *done);
    if (rc == 0 && *done < d->source.length) {
        set = round == BEFORE ? EXPECT_PART_BEFORE : EXPECT_PART_AFTER;
        progress_begin(progress, "working out what to expect", *done);
        rc = expect_part(d->expect, round, *done, progress);
    }
    if (rc)
        return rc;
    expect_census(d->expect, set, &expected);
    report_check(&d->report, round == BEFORE ? "words counted before" : "words counted after", expected.occurrences,
                 occurrences);
    return 0;
}

/* Phase: the CPU changes text and table, while parts of both live on the device. */
static int change(struct demo *d, struct progress *progress)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < d->report.edit_count; i++)
        bytes += d->edits[i].length;
    report_phase_begin(&d->report, "CPU changes words");
    progress_begin(progress, "CPU changes words", 0);
    int rc = edits_apply(d->edits, d->report.edit_count, d->text, &d->table, &d->report.edits);

    report_phase_end(&d->report, bytes);
    if (rc < 0)
        return no_memory(CHUNK_BYTES);
    report_check_many(&d->report, "words that the CPU found as it left them", 2 * d->report.edit_count,
                      d->report.edits.differed);
    return expect_after(d->expect, d->edits, d->report.edit_count);
}

/* Phase: the CPU reads all counts, its own and the device's, where the device left them. */
static void read_back(struct demo *d)
{
    uint64_t different[ROUNDS] = {0}, kept = 0;
    int set[ROUNDS] = {EXPECT_BEFORE, EXPECT_AFTER};

    for (int round = 0; round < ROUNDS; round++)
        if (d->report.counted[round] < d->source.length)
            set[round] = round == BEFORE ? EXPECT_PART_BEFORE : EXPECT_PART_AFTER;
    report_phase_begin(&d->report, "CPU reads all counts");
    for (uint64_t i = 0; i <= d->table.mask; i++) {
        for (const struct word *w = d->table.buckets[i]; w; w = w->next) {
            kept += w->count != expect_count(d->expect, AFTER, w->spelling, w->length);
            for (int round = 0; round < ROUNDS; round++)
                different[round] += w->device[round] != expect_count(d->expect, set[round], w->spelling, w->length);
        }
    }
    report_phase_end(&d->report, d->table.bytes);
    report_check_many(&d->report, "counts of the CPU in the table", d->table.words, kept);
    report_check_many(&d->report, "counts of the device before", d->table.words, different[BEFORE]);
    report_check_many(&d->report, "counts of the device after", d->table.words, different[AFTER]);
}

/* Everything the device answers, once. */
static int ask_device(struct demo *d, int round, struct progress *progress)
{
    int rc = walk(d, round, progress);

    progress_end(progress);
    rc = rc ? rc : checksum(d, round, progress);
    progress_end(progress);
    return rc ? rc : count(d, round, progress);
}

static int audit(struct demo *d)
{
    int rc = hmm_audit();

    if (rc < 0)
        return output_error(DEMO_DIFFERS, "the audit could not run: %s (%s)", hmm_last_message(), hmm_strerror(rc));
    if (rc > 0)
        output_error(DEMO_DIFFERS, "the audit found: %s", hmm_last_message());
    d->report.audit = rc;
    report_check(&d->report, "violations found by the audit", 0, (uint64_t)rc);
    return 0;
}

static int compute(struct demo *d, struct progress *progress)
{
    int rc = 0;

    if (d->dev == 0)
        rc = open_soft_device(d, memory_too_small(d));
    rc = rc ? rc : draw(d, "before the device ran");
    rc = rc ? rc : ask_device(d, BEFORE, progress);
    progress_end(progress);
    rc = rc ? rc : draw(d, "after the device ran");
    rc = rc ? rc : change(d, progress);
    rc = rc ? rc : draw(d, "after the CPU changed words");
    rc = rc ? rc : ask_device(d, AFTER, progress);
    progress_end(progress);
    if (rc)
        return rc;
    read_back(d);
    rc = draw(d, "after the CPU read all counts");
    d->report.end.size = sizeof(d->report.end);
    if (hmm_stats(&d->report.end))
        return output_error(DEMO_DIFFERS, "no statistics: %s", hmm_last_message());
    return rc ? rc : audit(d);
}

static int road(struct demo *d)
{
    struct progress progress = {0};
    int rc = check_system(&d->report);

    /* A device that was named is opened at once: if it cannot be had, nobody waits for a long file first. */
    if (rc == 0 && d->options.device)
        rc = open_device(d, d->options.device);
    else if (rc == 0 && d->options.memory)
        rc = open_soft_device(d, d->options.memory);
    rc = rc ? rc : read_text(d, &progress);
    progress_end(&progress);
    rc = rc ? rc : prepare(d, &progress);
    progress_end(&progress);
    rc = rc ? rc : compute(d, &progress);
    progress_end(&progress);
    return rc;
}

static int close_device(struct demo *d, int rc)
{
    if (d->dev == 0)
        return rc;
    int err = hmm_device_close(d->dev);

    if (err < 0 && rc == 0)
        return output_error(DEMO_DIFFERS, "cannot close the device: %s (%s)", hmm_last_message(), hmm_strerror(err));
    return rc;
}

int cmd_demo(int argc, char **argv)
{
    static const struct argp argp = {demo_options, parse_option, "[FILE]", demo_doc, NULL, NULL, NULL};
    struct demo d = {.options = {.seed = 1, .limit = DEFAULT_LIMIT}};

    argp_err_exit_status = DEMO_BAD_INPUT;
    argp_parse(&argp, argc, argv, 0, NULL, &d.options);

    int rc = source_open(&d.source, d.options.file ? d.options.file : default_file(), d.options.repeat, TEXT_AT_LEAST);

    if (rc)
        return rc;
    d.report.source = &d.source;
    d.report.seed = d.options.seed;
    d.report.json = d.options.json;
    d.report.all_stats = d.options.stats;
    rc = close_device(&d, road(&d));
    if (rc == 0) {
        report_print(&d.report);
        rc = report_verified(&d.report) ? DEMO_VERIFIED : DEMO_DIFFERS;
    }
    expect_close(d.expect);
    table_free(&d.table);
    free(d.edits);
    free(d.text);
    source_close(&d.source);
    return rc;
}
