/* SPDX-License-Identifier: MIT */
/*
 * What the demo shows: the phases with what each cost, the comparisons, and all of it as a table for people or as one JSON
 * object. Nothing is printed before the end, so that stdout holds a whole report or none.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "demo.h"

/* ---- phases -------------------------------------------------------------------------------------------------------- */

static bool read_stats(struct hmm_stats *stats)
{
    *stats = (struct hmm_stats){.size = sizeof(*stats)};
    if (hmm_stats(stats) == 0)
        return true;
    *stats = (struct hmm_stats){0}; /* no device is open yet */
    return false;
}

void report_phase_begin(struct report *report, const char *name)
{
    report->phases[report->phase_count].name = name;
    report->managed = read_stats(&report->stats) && report->device.size;
    report->began = demo_now();
}

void report_phase_end(struct report *report, uint64_t bytes)
{
    struct phase *phase = &report->phases[report->phase_count];
    struct hmm_stats now, *was = &report->stats;

    phase->seconds = demo_now() - report->began;
    phase->bytes = bytes;
    phase->managed = read_stats(&now) && report->managed;
    phase->stats.cpu_faults = now.cpu_faults - was->cpu_faults;
    phase->stats.device_faults = now.device_faults - was->device_faults;
    phase->stats.pages_to_device = now.pages_to_device - was->pages_to_device;
    phase->stats.pages_to_system = now.pages_to_system - was->pages_to_system;
    phase->stats.evicted = now.evicted - was->evicted;
    if (report->phase_count < MAX_PHASES - 1)
        report->phase_count++;
}

static double gib_per_second(const struct phase *phase)
{
    return phase->seconds > 0 ? (double)phase->bytes / phase->seconds / (double)(1 << 30) : 0;
}

/* ---- comparisons --------------------------------------------------------------------------------------------------- */

static struct check *check_add(struct report *report, const char *name, uint64_t values)
{
    struct check *check = &report->checks[report->check_count];

    if (report->check_count < MAX_CHECKS - 1)
        report->check_count++;
    report->values += values;
    snprintf(check->name, sizeof(check->name), "%s", name);
    return check;
}

static void check_decide(struct check *check)
{
    check->equal = strcmp(check->expected, check->found) == 0;
}

void report_check(struct report *report, const char *name, uint64_t expected, uint64_t found)
{
    struct check *check = check_add(report, name, 1);

    snprintf(check->expected, sizeof(check->expected), "%" PRIu64, expected);
    snprintf(check->found, sizeof(check->found), "%" PRIu64, found);
    check_decide(check);
}

void report_check_many(struct report *report, const char *name, uint64_t values, uint64_t different)
{
    struct check *check = check_add(report, name, values);

    snprintf(check->expected, sizeof(check->expected), "%" PRIu64 " equal", values);
    snprintf(check->found, sizeof(check->found), "%" PRIu64 " equal", values - different);
    check_decide(check);
}

static void rank_text(char *to, size_t size, const struct census *census, uint32_t i)
{
    const struct rank *rank = &census->rank[i];

    if (i < census->ranks) {
        snprintf(to, size, "%.*s %" PRIu64, (int)(rank->length < WORD_MAX ? rank->length : WORD_MAX), rank->spelling,
                 rank->count);
    } else {
        snprintf(to, size, "no word");
    }
}

void report_check_census(struct report *report, int round, const struct census *expected, const struct census *found)
{
    const char *when = round == BEFORE ? "before" : "after";
    char name[64];

    snprintf(name, sizeof(name), "walk %s: different words", when);
    report_check(report, name, expected->words, found->words);
    snprintf(name, sizeof(name), "walk %s: occurrences", when);
    report_check(report, name, expected->occurrences, found->occurrences);
    snprintf(name, sizeof(name), "walk %s: fingerprint of all words", when);
    report_check(report, name, expected->fingerprint, found->fingerprint);
    snprintf(name, sizeof(name), "walk %s: misplaced nodes", when);
    report_check(report, name, expected->misplaced, found->misplaced);
    for (uint32_t i = 0; i < expected->ranks || i < found->ranks; i++) {
        snprintf(name, sizeof(name), "walk %s: rank %u", when, i + 1);
        struct check *check = check_add(report, name, 1);

        rank_text(check->expected, sizeof(check->expected), expected, i);
        rank_text(check->found, sizeof(check->found), found, i);
        check_decide(check);
    }
}

static size_t differing(const struct report *report)
{
    size_t n = 0;

    for (size_t i = 0; i < report->check_count; i++)
        n += !report->checks[i].equal;
    return n;
}

bool report_verified(const struct report *report)
{
    return report->check_count > 0 && differing(report) == 0;
}

/* ---- for people ---------------------------------------------------------------------------------------------------- */

const char *format_bytes(char buffer[32], uint64_t bytes)
{
    static const char units[] = "KMGTPE";
    double value = (double)bytes / 1024;
    size_t unit = 0;

    if (bytes < 1024) {
        snprintf(buffer, 32, "%u bytes", (unsigned)bytes);
        return buffer;
    }
    while (value >= 1023.95 && unit < sizeof(units) - 2) {
        value /= 1024;
        unit++;
    }
    snprintf(buffer, 32, value == (double)(uint64_t)value ? "%.0f %ciB" : "%.1f %ciB", value, units[unit]);
    return buffer;
}

static void print_header(const struct report *r)
{
    const struct source *s = r->source;
    char a[32], b[32];

    printf("text    %s, %s", s->path, format_bytes(a, s->file_bytes));
    if (s->repeat > 1)
        printf(", repeated %" PRIu64 " times: %s", s->repeat, format_bytes(a, s->length));
    printf("\ntable   %" PRIu64 " words in %" PRIu64 " chains, %s\n", r->table_words, r->chains,
           format_bytes(a, r->table_bytes));
    printf("device  %s, %s of memory for %s of data\n", r->device.spec, format_bytes(a, r->device.memory_bytes),
           format_bytes(b, s->length + r->table_bytes));
    printf("change  %zu words by seed %" PRIu64 ", %" PRIu64 " of them while they were in device memory\n", r->edit_count,
           r->seed, r->edits.on_device);
    if (r->restricted)
        printf("note    this system restricts what the library can do: `hmm check` says how\n");
}

static void print_phases(const struct report *r)
{
    char bytes[32];

    printf("\n%-29s %10s %7s %7s %9s %9s %8s\n", "", "", "CPU", "device", "pages to", "pages to", "pages");
    printf("%-29s %10s %7s %7s %9s %9s %8s %6s %7s\n", "phase", "bytes", "faults", "faults", "device", "system", "evicted",
           "GiB/s", "seconds");
    for (size_t i = 0; i < r->phase_count; i++) {
        const struct phase *p = &r->phases[i];

        printf("%-29s %10s ", p->name, format_bytes(bytes, p->bytes));
        if (p->managed) {
            printf("%7" PRIu64 " %7" PRIu64 " %9" PRIu64 " %9" PRIu64 " %8" PRIu64, p->stats.cpu_faults, p->stats.device_faults,
                   p->stats.pages_to_device, p->stats.pages_to_system, p->stats.evicted);
        } else {
            printf("%7s %7s %9s %9s %8s", "-", "-", "-", "-", "-");
        }
        printf(" %6.2f %7.3f\n", gib_per_second(p), p->seconds);
    }
    for (int round = 0; round < ROUNDS; round++) {
        if (r->counted[round] < r->source->length) {
            printf("device counted words in the first %s only, %s the changes: its time was up (--limit)\n",
                   format_bytes(bytes, r->counted[round]), round == BEFORE ? "before" : "after");
        }
    }
}

static void print_pictures(const struct report *r)
{
    char a[32], b[32];

    if (r->picture_count == 0)
        return;
    printf("\nWhere it lives; a character is %s of the text, %s of the table:\n  %s\n",
           format_bytes(a, r->pictures[0].text.cell_bytes), format_bytes(b, r->pictures[0].table.cell_bytes), picture_legend);
    for (size_t i = 0; i < r->picture_count; i++)
        printf("%s\n  text  %s\n  table %s\n", r->pictures[i].when, r->pictures[i].text.text, r->pictures[i].table.text);
}

static void print_words(const struct report *r)
{
    const struct census *census = &r->census[AFTER];
    char text[64];

    printf("\nThe device found %" PRIu64 " words, %" PRIu64 " different; most frequent:\n ", census->occurrences,
           census->words);
    for (uint32_t i = 0; i < census->ranks; i++) {
        rank_text(text, sizeof(text), census, i);
        printf("%s%s %s", i ? "," : "", i == RANKS / 2 ? "\n " : "", text);
    }
    printf("\n\n");
}

static void print_verdict(const struct report *r)
{
    size_t different = differing(r);

    for (size_t i = 0; i < r->check_count; i++) {
        const struct check *c = &r->checks[i];

        if (!c->equal)
            printf("differs: %s: the CPU says %s, found %s\n", c->name, c->expected, c->found);
    }
    if (report_verified(r))
        printf("verified: %" PRIu64 " values from the device are the CPU's own; the audit found nothing wrong\n", r->values);
    else
        printf("failed: %zu of %zu comparisons differ\n", different, r->check_count);
}

/* ---- JSON ---------------------------------------------------------------------------------------------------------- */

static void put_number(json_object *to, const char *key, uint64_t value)
{
    json_object_object_add(to, key, json_object_new_uint64(value));
}

/* JSON is UTF-8 and a file name is bytes: what is not plain ASCII becomes '?'. */
static void put_text(json_object *to, const char *key, const char *value)
{
    char plain[4096];
    size_t n = 0;

    for (; n < sizeof(plain) - 1 && value[n]; n++)
        plain[n] = value[n] >= ' ' && value[n] <= '~' ? value[n] : '?';
    json_object_object_add(to, key, json_object_new_string_len(plain, (int)n));
}

static json_object *json_phases(const struct report *r)
{
    json_object *list = json_object_new_array();

    for (size_t i = 0; i < r->phase_count; i++) {
        const struct phase *p = &r->phases[i];
        json_object *o = json_object_new_object();

        put_text(o, "name", p->name);
        put_number(o, "bytes", p->bytes);
        json_object_object_add(o, "seconds", json_object_new_double(p->seconds));
        json_object_object_add(o, "gib_per_second", json_object_new_double(gib_per_second(p)));
        put_number(o, "cpu_faults", p->stats.cpu_faults);
        put_number(o, "device_faults", p->stats.device_faults);
        put_number(o, "pages_to_device", p->stats.pages_to_device);
        put_number(o, "pages_to_system", p->stats.pages_to_system);
        put_number(o, "pages_evicted", p->stats.evicted);
        json_object_array_add(list, o);
    }
    return list;
}

static json_object *json_census(const struct report *r, int round)
{
    const struct census *census = &r->census[round];
    json_object *o = json_object_new_object(), *top = json_object_new_array();

    put_number(o, "words", census->words);
    put_number(o, "occurrences", census->occurrences);
    put_number(o, "counted_bytes", r->counted[round]);
    for (uint32_t i = 0; i < census->ranks; i++) {
        json_object *word = json_object_new_object();

        json_object_object_add(word, "word", json_object_new_string_len(census->rank[i].spelling, (int)census->rank[i].length));
        put_number(word, "count", census->rank[i].count);
        json_object_array_add(top, word);
    }
    json_object_object_add(o, "most_frequent", top);
    return o;
}

static json_object *json_picture(const struct picture *p)
{
    json_object *o = json_object_new_object();

    put_text(o, "cells", p->text);
    put_number(o, "cell_bytes", p->cell_bytes);
    put_number(o, "system_pages", p->pages[HMM_PAGE_SYSTEM]);
    put_number(o, "device_pages", p->pages[HMM_PAGE_DEVICE]);
    put_number(o, "absent_pages", p->pages[HMM_PAGE_ABSENT]);
    return o;
}

static json_object *json_pictures(const struct report *r)
{
    json_object *list = json_object_new_array();

    for (size_t i = 0; i < r->picture_count; i++) {
        json_object *o = json_object_new_object();

        put_text(o, "when", r->pictures[i].when);
        json_object_object_add(o, "text", json_picture(&r->pictures[i].text));
        json_object_object_add(o, "table", json_picture(&r->pictures[i].table));
        json_object_array_add(list, o);
    }
    return list;
}

static json_object *json_checks(const struct report *r)
{
    json_object *list = json_object_new_array();

    for (size_t i = 0; i < r->check_count; i++) {
        json_object *o = json_object_new_object();

        put_text(o, "name", r->checks[i].name);
        put_text(o, "expected", r->checks[i].expected);
        put_text(o, "found", r->checks[i].found);
        json_object_object_add(o, "equal", json_object_new_boolean(r->checks[i].equal));
        json_object_array_add(list, o);
    }
    return list;
}

static void print_json(const struct report *r)
{
    json_object *o = json_object_new_object();

    put_text(o, "file", r->source->path);
    put_number(o, "file_bytes", r->source->file_bytes);
    put_number(o, "repeat", r->source->repeat);
    put_number(o, "text_bytes", r->source->length);
    put_number(o, "table_bytes", r->table_bytes);
    put_number(o, "table_words", r->table_words);
    put_text(o, "device", r->device.spec);
    put_number(o, "device_memory_bytes", r->device.memory_bytes);
    put_number(o, "seed", r->seed);
    put_number(o, "changed_words", r->edit_count);
    put_number(o, "changed_on_device", r->edits.on_device);
    json_object_object_add(o, "phases", json_phases(r));
    json_object_object_add(o, "before", json_census(r, BEFORE));
    json_object_object_add(o, "after", json_census(r, AFTER));
    json_object_object_add(o, "pictures", json_pictures(r));
    json_object_object_add(o, "checks", json_checks(r));
    json_object_object_add(o, "statistics", stats_json(&r->end));
    put_number(o, "values_compared", r->values);
    json_object_object_add(o, "audit_violations", json_object_new_int(r->audit));
    json_object_object_add(o, "verified", json_object_new_boolean(report_verified(r)));
    output_json(o);
}

void report_print(const struct report *r)
{
    if (r->json) {
        print_json(r);
        return;
    }
    print_header(r);
    print_phases(r);
    print_pictures(r);
    print_words(r);
    if (r->all_stats)
        stats_print(&r->end);
    print_verdict(r);
}
