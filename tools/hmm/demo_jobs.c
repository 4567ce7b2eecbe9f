/* SPDX-License-Identifier: MIT */
/* The host's side of the demo's jobs: launches kernels (kernels/demo_kernels.c) and waits for them. */
#include <stdlib.h>

#include "demo.h"

/* Waits for a job and gives its result. Every error about a job comes out here, with the address if it is about one. */
static int job_finish(hmm_fence *fence, const char *what, uint64_t *result)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    int rc = hmm_fence_wait(fence, -1);

    if (hmm_fence_info(fence, &info) == 0)
        *result = info.result;
    hmm_fence_put(fence);
    if (rc < 0 && info.address) {
        return output_error(DEMO_DIFFERS, "the device could not %s: %s (%s, at %p)", what, info.message, hmm_strerror(rc),
                            (void *)info.address);
    }
    return rc < 0 ? output_error(DEMO_DIFFERS, "the device could not %s: %s (%s)", what, info.message, hmm_strerror(rc)) : 0;
}

static int job_refused(const char *what, int err)
{
    return output_error(DEMO_DIFFERS, "the device does not take the job to %s: %s (%s)", what, hmm_last_message(),
                        hmm_strerror(err));
}

static int run_kernel(hmm_dev dev, hmm_kernel kernel, const void *arg, size_t arg_size, const char *what, uint64_t *result)
{
    struct hmm_launch launch = {.size = sizeof(launch), .kernel = kernel, .arg = arg, .arg_size = arg_size};
    hmm_fence *fence;
    int rc = hmm_job_launch(dev, &launch, &fence);

    return rc < 0 ? job_refused(what, rc) : job_finish(fence, what, result);
}

#define BUCKETS_PER_LAUNCH ((uint64_t)1 << 16)

int device_walk(hmm_dev dev, const struct table *table, struct census *census, struct progress *progress)
{
    uint64_t buckets = table->mask + 1, words;
    struct walk_args args = {.buckets = table->buckets, .census = malloc(sizeof(*census)), .mask = table->mask};
    int rc = 0;

    if (!args.census)
        return output_error(DEMO_BAD_INPUT, "no memory for the results; close other programs");
    *args.census = (struct census){0};
    while (args.first < buckets && rc == 0) {
        args.last = buckets - args.first < BUCKETS_PER_LAUNCH ? buckets : args.first + BUCKETS_PER_LAUNCH;
        rc = run_kernel(dev, demo_walk, &args, sizeof(args), "walk the table", &words);
        args.first = args.last;
        progress_update(progress, args.first);
    }
    *census = *args.census; /* the device wrote it; reading it brings its page home */
    free(args.census);
    return rc;
}

int device_count(hmm_dev dev, const char *text, uint64_t length, const struct table *table, int round, double seconds,
                 uint64_t *done, uint64_t *occurrences, struct progress *progress)
{
    static struct count_args args; /* too big for a stack, and never written but for these: */
    double until = demo_now() + seconds;
    uint64_t counted;

    args.text = text;
    args.buckets = table->buckets;
    args.mask = table->mask;
    args.length = length;
    args.round = (uint32_t)round;
    *done = 0;
    *occurrences = 0;
    while (*done < length && (*done == 0 || demo_now() < until)) {
        args.first = *done;
        args.last = length - *done < PIECE_BYTES ? length : *done + PIECE_BYTES;
        int rc = run_kernel(dev, demo_count, &args, sizeof(args), "count the words", &counted);

        if (rc)
            return rc;
        *occurrences += counted;
        *done = args.last;
        progress_update(progress, *done);
    }
    return 0;
}

/* Checksums need no kernel of ours: the device has an operation for it. A few pieces are under way at a time. */
#define IN_FLIGHT 4

int device_checksums(hmm_dev dev, const char *text, uint64_t length, uint32_t *crc, struct progress *progress)
{
    hmm_fence *fences[IN_FLIGHT];
    uint64_t pieces = (length + PIECE_BYTES - 1) / PIECE_BYTES, asked = 0, answered = 0, result;
    int status = 0;

    while (answered < pieces) {
        while (status == 0 && asked < pieces && asked < answered + IN_FLIGHT) {
            uint64_t at = asked * PIECE_BYTES;
            int rc = hmm_job_crc32c(dev, text + at, length - at < PIECE_BYTES ? length - at : PIECE_BYTES,
                                    &fences[asked % IN_FLIGHT]);

            if (rc < 0) {
                status = job_refused("checksum the text", rc);
                break;
            }
            asked++;
        }
        if (answered == asked)
            break; /* after an error, when nothing is under way any more */
        int rc = job_finish(fences[answered % IN_FLIGHT], "checksum the text", &result);

        if (rc)
            status = rc;
        else
            crc[answered] = (uint32_t)result;
        answered++;
        progress_update(progress, answered * PIECE_BYTES);
    }
    return status;
}
