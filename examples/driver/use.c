/* SPDX-License-Identifier: MIT */
/* Sends memory to the device of ram.c and back, and lets it run a job: HMM_DRIVER_PATH=$PWD ./use */
#include <hmm/hmm.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define BYTES ((size_t)8 << 20)

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, hmm_last_message());
    return 1;
}

static unsigned char expected(size_t i)
{
    return (unsigned char)(i * 2654435761u >> 13);
}

int main(void)
{
    struct hmm_migrate_result there = {.size = sizeof(there)}, back = {.size = sizeof(back)};
    hmm_fence *fence;
    hmm_dev dev;

    unsigned char *data = malloc(BYTES);
    if (!data)
        return 1;
    for (size_t i = 0; i < BYTES; i++)
        data[i] = expected(i);

    if (hmm_device_open("ram:memory=16M", &dev)) /* finds and loads libhmm-ram.so */
        return failed("open");
    if (hmm_migrate_to_device(dev, data, BYTES, &there))
        return failed("to the device");
    if (data[BYTES / 2] != expected(BYTES / 2)) /* a touch brings a page home */
        return 1;
    if (hmm_job_fill(dev, data, 7, 10000, &fence) || hmm_fence_wait(fence, -1))
        return failed("fill");
    hmm_fence_put(fence);
    if (hmm_migrate_to_system(data, BYTES, &back))
        return failed("home");

    size_t wrong = 0;
    for (size_t i = 0; i < BYTES; i++)
        wrong += data[i] != (i < 10000 ? 7 : expected(i));
    printf("%llu pages to the device, %llu back, %zu bytes wrong\n", (unsigned long long)there.moved,
           (unsigned long long)back.moved, wrong);
    if (hmm_device_close(dev))
        return failed("close");
    free(data);
    return wrong || !there.moved || !back.moved;
}
