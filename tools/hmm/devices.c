/* SPDX-License-Identifier: MIT */
/* `hmm devices`: the drivers of this build, those in HMM_DRIVER_PATH, and their options. One thread. */
#include <argp.h>
#include <stdbool.h>
#include <stdio.h>

#include <hmm/hmm.h>

#include "commands.h"
#include "output.h"

enum { OPTION_JSON = 'j', NAME_WIDTH = 24 };

/* What an option may be, and what it is when it is not given. */
static void print_option(const struct hmm_driver_item *item)
{
    char text[512];
    int column = printf("  %-*s ", NAME_WIDTH - 2, item->option);

    if (item->fallback)
        snprintf(text, sizeof(text), "%s (%s; %s unless given)", item->help, item->values,
                 *item->fallback ? item->fallback : "empty");
    else
        snprintf(text, sizeof(text), "%s (%s; must be given)", item->help, item->values);
    output_wrapped(column, column, text);
}

/* hmm_drivers() calls once per driver and then once per option of it. */
static void print_driver(const struct hmm_driver_item *item, void *arg)
{
    bool *any = arg;
    int column;

    if (item->option) {
        print_option(item);
        return;
    }
    if (*any)
        printf("\n");
    *any = true;
    column = printf("%-*s ", NAME_WIDTH, item->driver);
    output_wrapped(column, column, item->description);
    if (item->origin[0] == '/')
        printf("%-*s from %s\n", NAME_WIDTH, "", item->origin);
}

static void add_driver(const struct hmm_driver_item *item, void *arg)
{
    struct json_object *drivers = arg;
    struct json_object *object = json_object_new_object();

    if (!item->option) {
        json_add_string(object, "name", item->driver);
        json_add_string(object, "description", item->description);
        json_add_string(object, "origin", item->origin);
        json_object_object_add(object, "options", json_object_new_array());
        json_object_array_add(drivers, object);
    } else {
        struct json_object *driver = json_object_array_get_idx(drivers, json_object_array_length(drivers) - 1);

        json_add_string(object, "name", item->option);
        json_add_string(object, "help", item->help);
        json_add_string(object, "values", item->values);
        if (item->fallback)
            json_add_string(object, "default", item->fallback);
        else
            json_object_object_add(object, "default", NULL);
        json_object_array_add(json_object_object_get(driver, "options"), object);
    }
}

/* A driver that cannot be loaded is left out, and this says why. */
static void complain(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level <= HMM_LOG_WARNING)
        fprintf(stderr, "hmm devices: %s\n", line);
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
    static const struct argp argp = {argp_options, parse, NULL, "Lists the device drivers and their options.",
                                     NULL,         NULL,  NULL};
    bool json = false, any = false;

    if (argp_parse(&argp, argc, argv, 0, NULL, &json) != 0)
        return STATUS_USAGE;
    hmm_set_log(complain, NULL);
    if (json) {
        struct json_object *object = json_object_new_object(), *drivers = json_object_new_array();

        hmm_drivers(add_driver, drivers);
        json_object_object_add(object, "drivers", drivers);
        output_json(object);
    } else {
        hmm_drivers(print_driver, &any);
        printf("\nA device is opened by NAME or NAME:option=value,option=value: hmm demo --device soft:memory=64M\n"
               "An option that is on or off is a bare word. HMM_DRIVER_PATH names folders with further drivers.\n");
    }
    return 0;
}
