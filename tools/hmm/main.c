/* SPDX-License-Identifier: MIT */
/* The hmm command: finds the sub-command and runs it. One thread. Exit status 2: the command line cannot be understood. */
#include <argp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <hmm/hmm.h>

#include "commands.h"
#include "output.h"

struct command {
    const char *name; /* of messages, too */
    int (*run)(int argc, char **argv);
    const char *summary;
};

/* The names begin with "hmm ", because argp prints argv[0]. */
static const struct command commands[] = {
    {"hmm check", cmd_check, "Say what this kernel and these permissions allow"},
    {"hmm devices", cmd_devices, "List the device drivers and their options"},
    {"hmm demo", cmd_demo, "Let a device work on the malloc memory of a program"},
    {"hmm bench", cmd_bench, "Measure the library against what the machine can do"},
};

#define COMMANDS (sizeof(commands) / sizeof(commands[0]))

static const char *short_name(const struct command *c)
{
    return strchr(c->name, ' ') + 1;
}

static const struct command *find_command(const char *name)
{
    for (size_t i = 0; i < COMMANDS; i++) {
        if (strcmp(short_name(&commands[i]), name) == 0)
            return &commands[i];
    }
    return NULL;
}

struct chosen {
    const struct command *command;
    int argc;
    char **argv;
};

static char *print_help(int key, const char *text, void *input)
{
    char *list = NULL;
    size_t size;
    FILE *out;

    (void)input;
    if (key != ARGP_KEY_HELP_POST_DOC)
        return (char *)text;
    out = open_memstream(&list, &size);
    if (!out)
        return NULL;
    fprintf(out, "Commands:\n");
    for (size_t i = 0; i < COMMANDS; i++)
        fprintf(out, "  %-10s %s\n", short_name(&commands[i]), commands[i].summary);
    fprintf(out, "\n`hmm COMMAND --help' tells more about a command.");
    fclose(out);
    return list;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct chosen *chosen = state->input;

    switch (key) {
    case ARGP_KEY_ARG:
        chosen->command = find_command(arg);
        if (!chosen->command)
            argp_error(state, "there is no command '%s'; commands are check, devices, demo and bench", arg);
        /* The rest is for the command. */
        chosen->argc = state->argc - state->next + 1;
        chosen->argv = state->argv + state->next - 1;
        state->next = state->argc;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "a command is missing; commands are check, devices, demo and bench");
        return EINVAL;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static void print_version(FILE *out, struct argp_state *state)
{
    (void)state;
    fprintf(out, "hmm %s\n", hmm_version());
}

int main(int argc, char **argv)
{
    static const struct argp argp = {
        NULL,
        parse,
        "COMMAND [ARGUMENT...]",
        "Heterogeneous memory management in user space: devices that work on the memory of a process.\v",
        NULL,
        print_help,
        NULL};
    struct chosen chosen = {NULL, 0, NULL};

    output_setup();
    argp_program_version_hook = print_version;
    argp_err_exit_status = STATUS_USAGE;
    if (argp_parse(&argp, argc, argv, ARGP_IN_ORDER, NULL, &chosen) != 0)
        return STATUS_USAGE;
    output_name(chosen.command->name);
    chosen.argv[0] = (char *)chosen.command->name;
    return output_finish(chosen.command->run(chosen.argc, chosen.argv));
}
