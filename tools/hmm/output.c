/* SPDX-License-Identifier: MIT */
/* See output.h. One thread. */
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static const char *command = "hmm";
static bool write_failed; /* and was reported */

void output_name(const char *name)
{
    command = name;
}

int output_error(int status, const char *fmt, ...)
{
    va_list args;

    fflush(stdout);
    fprintf(stderr, "%s: ", command);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
    return status;
}

/* The error of an earlier write: stdio remembers only that there was one. */
static int past_error(void)
{
    struct pollfd p = {.fd = STDOUT_FILENO};

    return poll(&p, 1, 0) == 1 && (p.revents & POLLERR) ? EPIPE : EIO;
}

int output_finish(int status)
{
    int err = 0;

    errno = 0;
    if (fflush(stdout) != 0)
        err = errno;
    else if (ferror(stdout))
        err = past_error();
    if (!err && !write_failed)
        return status;
    if (!write_failed && err != EPIPE)
        output_error(0, "the output could not be written: %s", strerror(err));
    write_failed = true;
    return status ? status : 1;
}

/* --help and --version leave through exit() inside of argp; their output counts, too. */
static void finish_at_exit(void)
{
    if (!write_failed && output_finish(0))
        _exit(1);
}

void output_setup(void)
{
    signal(SIGPIPE, SIG_IGN);
    /* A descriptor from 0 to 2 that is closed would be given to a file of the library, and output would go into it. What is put
     * there cannot be used in that direction, so that the error is not hidden. */
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) < 0)
            _exit(1);
    }
    atexit(finish_at_exit);
}

static int width(void)
{
    struct winsize size;

    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col >= 40)
        return size.ws_col;
    return isatty(STDOUT_FILENO) ? 80 : 100;
}

void output_wrapped(int column, int indent, const char *text)
{
    int limit = width();
    bool first = true;

    while (*text) {
        int word = (int)strcspn(text, " ");

        if (!first && column + 1 + word > limit) {
            printf("\n%*s", indent, "");
            column = indent;
        } else if (!first) {
            putchar(' ');
            column++;
        }
        printf("%.*s", word, text);
        column += word;
        text += word;
        text += strspn(text, " ");
        first = false;
    }
    putchar('\n');
}

void output_json(struct json_object *object)
{
    puts(json_object_to_json_string_ext(object, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
    json_object_put(object);
}

void json_add_string(struct json_object *object, const char *key, const char *value)
{
    json_object_object_add(object, key, json_object_new_string(value));
}
