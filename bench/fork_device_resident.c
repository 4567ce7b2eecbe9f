/* SPDX-License-Identifier: MIT */
/*
 * fork() of a process whose memory is on a device, until the child has read every page of it, against memcpy of as many bytes into fresh
 * memory of the same kind: the child gets a copy of its own, in system memory. The child checks what it reads.
 */
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

/* The child's half. Ends it. */
static void read_all(const struct bench_env *env, const char *memory, int done)
{
    char right = 1;

    for (size_t offset = 0; offset < env->size; offset += hmm_page_size())
        right &= *(const volatile uint64_t *)(memory + offset) == bench_word(offset, env->seed);
    _exit(write(done, &right, 1) != 1);
}

/* Seconds from before the fork to when the child has read. */
static int fork_and_read(struct bench_env *env, const char *memory, double *seconds)
{
    int done[2], status;
    char right = 0;

    if (pipe(done))
        return bench_fail(env, "no pipe");
    double start = bench_now();
    pid_t child = fork();

    if (child == 0)
        read_all(env, memory, done[1]);
    close(done[1]);
    ssize_t n = child > 0 ? read(done[0], &right, 1) : -1;
    *seconds = bench_now() - start;
    close(done[0]);
    if (child < 0 || waitpid(child, &status, 0) != child)
        return bench_fail(env, "no child");
    if (n != 1)
        return bench_fail(env, "the child did not read the memory: it ended with %s %d",
                          WIFSIGNALED(status) ? "signal" : "status",
                          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    return right ? 0 : bench_fail(env, "WRONG CONTENT in the child");
}

static int one_run(struct bench_env *env, enum bench_page page, const char *origin, struct samples *s)
{
    char *memory = bench_map(env, env->size, page), *fresh = bench_map(env, env->size, page);
    struct hmm_stats before, after;
    double start, reference, ours = 0;
    int failed = 1;

    if (!memory || !fresh)
        goto unmap;
    bench_fill(memory, env->size, env->seed);
    if (bench_to_device(env, memory, env->size, page))
        goto unmap;

    start = bench_now();
    memcpy(fresh, origin, env->size);
    reference = bench_now() - start;
    bench_unmap(fresh, env->size); /* so that the child does not have it */
    fresh = NULL;

    if (bench_stats(env, &before) || fork_and_read(env, memory, &ours) || bench_stats(env, &after))
        goto unmap;
    if (after.device_pages != before.device_pages)
        bench_fail(env, "pages of the parent left the device");
    else
        failed = bench_verify(env, memory, env->size, env->seed);
    if (!failed && s)
        samples_add(s, reference, ours);
unmap:
    bench_unmap(fresh, env->size);
    bench_unmap(memory, env->size);
    return failed;
}

static int one_kind(struct bench_env *env, enum bench_page page)
{
    return bench_copies_of(env, page, one_run);
}

static int run(struct bench_env *env)
{
    return bench_each_page(env, one_kind);
}

const struct bench bench_fork_device_resident = {
    .name = "fork_device_resident",
    .summary = "speed of a fork with memory on the device until the child has read it, against memcpy into fresh memory",
    .run = run,
};
