/* SPDX-License-Identifier: MIT */
/* `hmm bench`: chooses benchmarks, runs them one after the other and prints their results as a table or as JSON lines. */
#include <argp.h>
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <hmm/hmm.h>

#include "commands.h"
#include "harness.h"
#include "output.h"

#define DEFAULT_SIZE ((uint64_t)256 << 20)
#define DEFAULT_RUNS 11
#define DEVICE_ROOM ((uint64_t)32 << 20) /* of the default device, above the size */

static const struct bench *const benches[] = {
    &bench_migrate_to_device,    &bench_migrate_to_system,    &bench_cpu_fault_random,
    &bench_cpu_touch_sequential, &bench_unmanaged_touch,      &bench_metadata,
    &bench_device_fault,         &bench_operations,           &bench_empty_job,
    &bench_range_snapshot,       &bench_range_fault,          &bench_notifier_lookup,
    &bench_munmap_managed,       &bench_fork_device_resident, &bench_pin_system,
    &bench_pin_private,
};
#define BENCHES (sizeof(benches) / sizeof(benches[0]))

static const char *const page_names[] = {[BENCH_4K] = "4k", [BENCH_THP] = "thp"};
static const char *const better_names[] = {[BENCH_HIGHER] = "higher", [BENCH_LOWER] = "lower"};

struct options {
    bool json, list, chosen[BENCHES];
    const char *device;
    uint64_t size, seed;
    unsigned runs;
};

/* ---- output ---------------------------------------------------------------------------------------------------------- */

static void emit_json(const struct bench_result *r)
{
    printf("{\"bench\":\"%s\",\"size\":%" PRIu64 ",\"page\":\"%s\",\"value\":%.6g,\"unit\":\"%s\",\"reference\":%.6g,"
           "\"ratio\":%.4f,\"better\":\"%s\",\"runs\":%u,\"spread\":%.4f}\n",
           r->bench, r->size, page_names[r->page], r->value, r->unit, r->reference, r->ratio, better_names[r->better], r->runs,
           r->spread);
    fflush(stdout);
}

static void print_head(void)
{
    printf("%-30s %9s %-4s %10s %10s %-10s %7s %-7s %8s %5s\n", "bench", "size", "page", "value", "reference", "unit", "ratio",
           "better", "spread", "runs");
}

static void emit_row(const struct bench_result *r)
{
    static bool head;
    char size[32], spread[32] = "-";

    if (!head)
        print_head();
    head = true;
    if (r->size >= 1 << 20)
        snprintf(size, sizeof(size), "%" PRIu64 " MiB", r->size >> 20);
    else
        snprintf(size, sizeof(size), "%" PRIu64 " KiB", r->size >> 10);
    if (r->runs > 1)
        snprintf(spread, sizeof(spread), "%.1f %%", r->spread * 100);
    printf("%-30s %9s %-4s %10.4g %10.4g %-10s %7.3f %-7s %8s %5u", r->bench, size, page_names[r->page], r->value, r->reference,
           r->unit, r->ratio, better_names[r->better], spread, r->runs);
    if (r->note)
        printf("  %s", r->note);
    printf("\n");
    fflush(stdout);
}

static void print_list(void)
{
    for (size_t i = 0; i < BENCHES; i++)
        printf("%-24s %s\n", benches[i]->name, benches[i]->summary);
}

/* ---- running --------------------------------------------------------------------------------------------------------- */

/* On the device that was asked for, or on the default one, and then on that with its engines in a process of their own. */
static int run_bench(struct bench_env *env, const struct bench *bench, const struct options *options)
{
    char device[64], name[64];

    env->name = bench->name;
    env->suffix = "";
    env->device_spec = options->device ? options->device : device;
    snprintf(device, sizeof(device), "soft:memory=%" PRIu64, options->size + DEVICE_ROOM);
    if (bench->run(env))
        return 1;
    if (!bench->engines || options->device)
        return 0;
    env->suffix = "_isolated";
    snprintf(name, sizeof(name), "%s%s", bench->name, env->suffix);
    snprintf(device, sizeof(device), "soft:isolated,memory=%" PRIu64, options->size + DEVICE_ROOM);
    env->name = name;
    return bench->run(env);
}

static int run_benches(const struct options *options)
{
    struct bench_env env = {
        .size = options->size,
        .runs = options->runs,
        .seed = options->seed,
        .emit = options->json ? emit_json : emit_row,
    };

    for (size_t i = 0; i < BENCHES; i++) {
        if (!options->chosen[i])
            continue;
        if (run_bench(&env, benches[i], options))
            return 1;
        if (output_finish(0))
            return 1; /* nobody reads any more */
    }
    return 0;
}

/* ---- command line ---------------------------------------------------------------------------------------------------- */

enum { OPTION_DEVICE = 'd', OPTION_JSON = 'j', OPTION_LIST = 'l', OPTION_RUNS = 'r', OPTION_SIZE = 's', OPTION_SEED = 'S' };

/* A number with K, M or G behind it, from `least` to `most`. Does not return when it is none. */
static uint64_t parse_number(struct argp_state *state, const char *option, const char *text, uint64_t least, uint64_t most)
{
    char *end;
    uint64_t value;
    unsigned shift = 0;

    errno = 0;
    value = strtoull(text, &end, 0);
    if (end != text && *end)
        shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
    if (end == text || text[0] == '-' || errno || end[shift ? 1 : 0] || value > UINT64_MAX >> shift || value << shift < least ||
        value << shift > most)
        argp_error(state, "%s '%s' is not a number from %" PRIu64 " to %" PRIu64, option, text, least, most);
    return value << shift;
}

static void choose(struct argp_state *state, struct options *options, const char *name)
{
    for (size_t i = 0; i < BENCHES; i++) {
        if (strcmp(benches[i]->name, name) == 0) {
            options->chosen[i] = true;
            return;
        }
    }
    argp_error(state, "there is no benchmark '%s'; hmm bench --list names them", name);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *options = state->input;

    switch (key) {
    case OPTION_DEVICE: options->device = arg; return 0;
    case OPTION_JSON: options->json = true; return 0;
    case OPTION_LIST: options->list = true; return 0;
    case OPTION_RUNS: options->runs = (unsigned)parse_number(state, "--runs", arg, 1, BENCH_MAX_RUNS); return 0;
    case OPTION_SEED: options->seed = parse_number(state, "--seed", arg, 0, UINT64_MAX); return 0;
    case OPTION_SIZE:
        options->size = parse_number(state, "--size", arg, BENCH_BLOCK, (uint64_t)1 << 40);
        options->size &= ~(uint64_t)(BENCH_BLOCK - 1);
        return 0;
    case ARGP_KEY_ARG: choose(state, options, arg); return 0;
    case ARGP_KEY_NO_ARGS:
        for (size_t i = 0; i < BENCHES; i++)
            options->chosen[i] = true;
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

int cmd_bench(int argc, char **argv)
{
    static const struct argp_option argp_options[] = {
        {"device", OPTION_DEVICE, "SPEC", 0, "Device to measure (default: soft, with memory for all of it)", 0},
        {"json", OPTION_JSON, NULL, 0, "Print one JSON object per line", 0},
        {"list", OPTION_LIST, NULL, 0, "Name the benchmarks", 0},
        {"runs", OPTION_RUNS, "N", 0, "Pairs of runs of each (default 11)", 0},
        {"seed", OPTION_SEED, "N", 0, "Seed of contents and orders (default 1)", 0},
        {"size", OPTION_SIZE, "BYTES", 0, "Bytes to work on, with K, M or G; multiples of 2M (default 256M)", 0},
        {0}};
    static const struct argp argp = {
        argp_options,
        parse,
        "[NAME...]",
        "Measures the library (all benchmarks, or those named) against a reference that does the same work by other means."
        "\vLibrary and reference run in turns. The value, the reference and the ratio (library over reference) are medians. "
        "The spread says how far the reference differs from itself: of the ratios of each of its runs to the one before, nine "
        "in "
        "ten are not further from 1. A ratio within 1 +- spread cannot be told from the reference.\n"
        "Exit status: 0, or 1 when a benchmark failed or found wrong content.",
        NULL,
        NULL,
        NULL};
    struct options options = {.size = DEFAULT_SIZE, .runs = DEFAULT_RUNS, .seed = 1};

    if (argp_parse(&argp, argc, argv, 0, NULL, &options) != 0)
        return STATUS_USAGE;
    if (options.list) {
        print_list();
        return 0;
    }
    return run_benches(&options);
}
