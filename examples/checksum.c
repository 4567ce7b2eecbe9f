/* SPDX-License-Identifier: MIT */
/* A device computes the CRC-32C of ordinary malloc memory, through the program's own pointer. */
#include <hmm/hmm.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define BYTES ((size_t)8 << 20)

/* The same on the CPU, bit by bit. */
static uint32_t cpu_crc32c(const unsigned char *p, size_t len)
{
    uint32_t crc = 0xffffffff;
    while (len--) {
        crc ^= *p++;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
    }
    return ~crc;
}

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, hmm_last_message());
    return 1;
}

int main(void)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    struct hmm_stats stats = {.size = sizeof(stats)};
    hmm_fence *fence;
    hmm_dev dev;

    unsigned char *data = malloc(BYTES);
    if (!data)
        return 1;
    for (size_t i = 0; i < BYTES; i++)
        data[i] = (unsigned char)(i * i >> 8);

    if (hmm_device_open("soft:memory=64M", &dev))
        return failed("open");
    if (hmm_job_crc32c(dev, data, BYTES, &fence)) /* returns at once */
        return failed("submit");
    if (hmm_fence_wait(fence, -1))
        return failed("crc32c");
    hmm_fence_info(fence, &info);
    hmm_fence_put(fence);

    /* The device faulted on the pages, and they moved to its memory. Touching them brings them back. */
    hmm_stats(&stats);
    uint32_t expected = cpu_crc32c(data, BYTES);
    printf("device %08x, CPU %08x; %llu device faults moved %llu pages\n", (unsigned)info.result, (unsigned)expected,
           (unsigned long long)stats.device_faults, (unsigned long long)stats.pages_to_device);

    if (hmm_device_close(dev))
        return failed("close");
    free(data);
    return info.result == expected ? 0 : 1;
}
