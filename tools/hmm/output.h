/* SPDX-License-Identifier: MIT */
/*
 * Output of the commands: results on stdout, errors on stderr, and no result that was lost on the way without a word or an exit
 * status. A closed pipe is seen as EPIPE, not as SIGPIPE: its reader has what it wanted, so that is silent, but it is not success.
 */
#ifndef HMM_OUTPUT_H
#define HMM_OUTPUT_H

#include <json-c/json.h>

/* Once, first thing in main(): SIGPIPE, descriptors 0 to 2, and the check of stdout at exit. */
void output_setup(void);
/* Names the command that errors are from: "hmm check". */
void output_name(const char *name);

/* Writes what is buffered. Returns `status`, or 1 when stdout could not be written and status was 0. */
int output_finish(int status);

/* "hmm check: ..." on stderr. Returns `status`: return output_error(1, "..."). */
int output_error(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Prints text on stdout, broken between words to the width of the terminal (100 where there is none); lines after the first are
 * indented by `indent`; the first is at column `column` already. Ends with a newline. */
void output_wrapped(int column, int indent, const char *text);

/* Prints the object on one line and drops it. */
void output_json(struct json_object *object);

/* json_object_object_add() with a string. */
void json_add_string(struct json_object *object, const char *key, const char *value);

#endif
