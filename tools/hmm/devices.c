/* SPDX-License-Identifier: MIT */
/* `hmm devices`: the drivers in this build and their options. One thread. */
#include <argp.h>
#include <stdbool.h>
#include <stdio.h>

#include <hmm/hmm.h>

#include "commands.h"
#include "output.h"

enum { OPTION_JSON = 'j', NAME_WIDTH = 24 };

/* hmm_drivers() calls once per driver and then once per option of it. */
static void print_driver(const char *name, const char *description, const char *option, const char *help, void *arg)
{
    bool *any = arg;
    int column;

    if (!option) {
        if (*any)
            printf("\n");
        *any = true;
        column = printf("%-*s ", NAME_WIDTH, name);
        output_wrapped(column, column, description);
    } else {
        column = printf("  %-*s ", NAME_WIDTH - 2, option);
        output_wrapped(column, column, help);
    }
}

static void add_driver(const char *name, const char *description, const char *option, const char *help, void *arg)
{
    struct json_object *drivers = arg;
    struct json_object *object = json_object_new_object();

    if (!option) {
        json_add_string(object, "name", name);
        json_add_string(object, "description", description);
        json_object_object_add(object, "options", json_object_new_array());
        json_object_array_add(drivers, object);
    } else {
        struct json_object *driver = json_object_array_get_idx(drivers, json_object_array_length(drivers) - 1);

        json_add_string(object, "name", option);
        json_add_string(object, "help", help);
        json_object_array_add(json_object_object_get(driver, "options"), object);
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    bool *json = state->input;

    switch (key) {
    case OPTION_JSON: *json = true; return 0;
    case ARGP_KEY_ARG: argp_error(state, "'%s' is one argument too many; hmm devices takes options only", arg); return EINVAL;
    default: return ARGP_ERR_UNKNOWN;
    }
}

int cmd_devices(int argc, char **argv)
{
    static const struct argp_option argp_options[] = {{"json", OPTION_JSON, NULL, 0, "Print one JSON object", 0}, {0}};
    static const struct argp argp = {argp_options, parse, NULL, "Lists the device drivers in this build and their options.",
                                     NULL,         NULL,  NULL};
    bool json = false, any = false;

    if (argp_parse(&argp, argc, argv, 0, NULL, &json) != 0)
        return STATUS_USAGE;
    if (json) {
        struct json_object *object = json_object_new_object(), *drivers = json_object_new_array();

        hmm_drivers(add_driver, drivers);
        json_object_object_add(object, "drivers", drivers);
        output_json(object);
    } else {
        hmm_drivers(print_driver, &any);
        printf("\nA device is opened by NAME or NAME:option=value,option=value: hmm demo --device soft:memory=64M\n");
    }
    return 0;
}
