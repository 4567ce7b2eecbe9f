/* SPDX-License-Identifier: MIT */
/*
 * `hmm check`: prints what hmm_check() and hmm_check_deep() find, one line per item, and a summary. Runs before any thread is
 * started: hmm_check_deep() forks.
 */
#include <argp.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <hmm/hmm.h>

#include "commands.h"
#include "output.h"

enum { CHECK_STATUSES = 4, OPTION_DEEP = 'd', OPTION_JSON = 'j' };

/* Exit statuses. */
enum { EXIT_OK = 0, EXIT_DEGRADED = 1, EXIT_MISSING = 2 };

static const char *const status_names[CHECK_STATUSES] = {
    [HMM_CHECK_OK] = "ok",
    [HMM_CHECK_DEGRADED] = "degraded",
    [HMM_CHECK_MISSING] = "missing",
    [HMM_CHECK_NOT_SEEN] = "not seen",
};

struct options {
    bool deep, json;
};

struct findings {
    bool json;
    struct json_object *items; /* JSON only */
    const char *part;          /* "system" or "kernel behaviour" */
    unsigned counts[CHECK_STATUSES];
};

#define STATUS_WIDTH 10
#define NAME_WIDTH 30

static void print_item(const struct hmm_check_item *item)
{
    int column = printf("%-*s", STATUS_WIDTH, status_names[item->status]);
    int indent = STATUS_WIDTH + NAME_WIDTH + 1;

    if (strlen(item->name) <= NAME_WIDTH) {
        column += printf("%-*s ", NAME_WIDTH, item->name);
    } else {
        output_wrapped(column, STATUS_WIDTH, item->name);
        indent = STATUS_WIDTH + 2;
        column = printf("%*s", indent, "");
    }
    output_wrapped(column, indent, item->detail);
    if (item->remedy && item->remedy[0]) {
        column = printf("%*sremedy: ", STATUS_WIDTH + 2, "");
        output_wrapped(column, column, item->remedy);
    }
}

static void add_item(const struct hmm_check_item *item, void *arg)
{
    struct findings *f = arg;
    struct json_object *object;

    f->counts[item->status]++;
    if (!f->json) {
        print_item(item);
        fflush(stdout); /* deep items take their time */
        return;
    }
    object = json_object_new_object();
    json_add_string(object, "part", f->part);
    json_add_string(object, "status", status_names[item->status]);
    json_add_string(object, "name", item->name);
    json_add_string(object, "detail", item->detail);
    json_add_string(object, "remedy", item->remedy ? item->remedy : "");
    json_object_array_add(f->items, object);
}

static int exit_status(int result)
{
    return result < 0 ? EXIT_MISSING : result > 0 ? EXIT_DEGRADED : EXIT_OK;
}

static const char *verdict(int status, bool deep)
{
    switch (status) {
    case EXIT_OK: return deep ? "everything is there and behaves as it must" : "everything is there";
    case EXIT_DEGRADED: return "the library works, with restrictions";
    default: return "the library does not work here";
    }
}

static void print_summary(const struct findings *f, int status, bool deep)
{
    printf("%s: %u ok, %u degraded, %u missing", verdict(status, deep), f->counts[HMM_CHECK_OK], f->counts[HMM_CHECK_DEGRADED],
           f->counts[HMM_CHECK_MISSING]);
    if (deep)
        printf(", %u not seen", f->counts[HMM_CHECK_NOT_SEEN]);
    printf("\n");
}

static void print_summary_json(struct findings *f, int status, bool deep)
{
    struct json_object *object = json_object_new_object();

    json_add_string(object, "status", status_names[status]); /* the same order as the exit statuses */
    json_add_string(object, "verdict", verdict(status, deep));
    json_object_object_add(object, "items", f->items);
    output_json(object);
}

_Static_assert(HMM_CHECK_OK == (int)EXIT_OK && HMM_CHECK_DEGRADED == (int)EXIT_DEGRADED &&
                   HMM_CHECK_MISSING == (int)EXIT_MISSING,
               "print_summary_json counts on it");

static int check(const struct options *options)
{
    struct findings f = {.json = options->json, .part = "system"};
    int status, result;

    if (f.json)
        f.items = json_object_new_array();
    status = exit_status(hmm_check(add_item, &f));

    if (options->deep && status != EXIT_MISSING) {
        f.part = "kernel behaviour";
        if (!f.json)
            printf("\nKernel behaviour that the library depends on, tried now:\n");
        result = hmm_check_deep(add_item, &f);
        if (result < 0) {
            if (f.json)
                json_object_put(f.items);
            return output_error(EXIT_MISSING, "the kernel's behaviour could not be tried: %s", hmm_last_message());
        }
        if (result > 0)
            status = EXIT_MISSING;
    }
    if (f.json) {
        print_summary_json(&f, status, options->deep);
    } else {
        printf("\n");
        print_summary(&f, status, options->deep);
    }
    return status;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *options = state->input;

    switch (key) {
    case OPTION_DEEP: options->deep = true; return 0;
    case OPTION_JSON: options->json = true; return 0;
    case ARGP_KEY_ARG: argp_error(state, "'%s' is one argument too many; hmm check takes options only", arg); return EINVAL;
    default: return ARGP_ERR_UNKNOWN;
    }
}

int cmd_check(int argc, char **argv)
{
    static const struct argp_option argp_options[] = {
        {"deep", OPTION_DEEP, NULL, 0, "Also try, in a few seconds, each kernel behaviour that the library depends on", 0},
        {"json", OPTION_JSON, NULL, 0, "Print one JSON object", 0},
        {0}};
    static const struct argp argp = {
        argp_options,
        parse,
        NULL,
        "Says, line by line, what this kernel and these permissions allow, and what to do about what is missing."
        "\vExit status: 0 all is there, 1 the library works with restrictions, 2 it does not work.\n"
        "A race that did not show itself is reported as \"not seen\", which is neither good nor bad.",
        NULL,
        NULL,
        NULL};
    struct options options = {0};

    if (argp_parse(&argp, argc, argv, 0, NULL, &options) != 0)
        return STATUS_USAGE;
    return check(&options);
}
