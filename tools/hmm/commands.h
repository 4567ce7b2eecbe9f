/* SPDX-License-Identifier: MIT */
/*
 * The sub-commands of `hmm`. Each gets its own arguments (argv[0] is "hmm NAME", for messages) and returns the exit status of
 * the process. Adding one: a function here, and a line in the table of main.c.
 */
#ifndef HMM_COMMANDS_H
#define HMM_COMMANDS_H

enum { STATUS_USAGE = 2 }; /* the command line cannot be understood */

int cmd_check(int argc, char **argv);
int cmd_devices(int argc, char **argv);
int cmd_demo(int argc, char **argv);
int cmd_bench(int argc, char **argv);

#endif
