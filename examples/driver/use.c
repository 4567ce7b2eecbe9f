/* SPDX-License-Identifier: MIT */
/* Sends memory to the device of ram.c, or another one, and back, and lets it run jobs: HMM_DRIVER_PATH=$PWD ./use [tiny] */
#include <hmm/hmm.h>

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define BYTES ((size_t)8 << 20)
#define ROUNDS 4u
#define FILL ((size_t)1000001) /* bytes of each */

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, hmm_last_message());
    return 1;
}

static unsigned char expected(size_t i)
{
    return (unsigned char)(i * 2654435761u >> 13);
}

int main(int argc, char **argv)
{
    struct hmm_migrate_result there = {.size = sizeof(there)}, back = {.size = sizeof(back)};
    hmm_fence *fence;
    hmm_dev dev;

    unsigned char *data = malloc(BYTES);
    if (!data)
        return 1;
    for (size_t i = 0; i < BYTES; i++)
        data[i] = expected(i);

    if (hmm_device_open(argc > 1 ? argv[1] : "ram:memory=16M", &dev)) /* finds and loads libhmm-ram.so */
        return failed("open");
    if (hmm_migrate_to_device(dev, data, BYTES, &there))
        return failed("to the device");
    if (data[BYTES / 2] != expected(BYTES / 2)) /* a touch brings a page home */
        return 1;
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned char *at = data + round * BYTES / ROUNDS;
        if (hmm_job_fill(dev, at, 7, FILL, &fence))
            return failed("fill");
        /* Meanwhile the CPU wants pages back. */
        for (size_t i = 0; hmm_fence_wait(fence, 0) == -EAGAIN; i = (i + 4099) % FILL)
            ((volatile unsigned char *)at)[i];
        if (hmm_fence_wait(fence, -1))
            return failed("fill");
        hmm_fence_put(fence);
    }
    if (hmm_migrate_to_system(data, BYTES, &back))
        return failed("home");

    size_t wrong = 0;
    for (size_t i = 0; i < BYTES; i++)
        wrong += data[i] != (i % (BYTES / ROUNDS) < FILL ? 7 : expected(i));
    printf("%llu pages to the device, %llu back, %zu bytes wrong\n", (unsigned long long)there.moved,
           (unsigned long long)back.moved, wrong);
    if (hmm_device_close(dev))
        return failed("close");
    free(data);
    return wrong || !there.moved || !back.moved;
}
