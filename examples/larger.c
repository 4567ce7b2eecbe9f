/* SPDX-License-Identifier: MIT */
/* Data four times larger than the device's memory: cold pages are evicted to make room, and nothing is lost. */
#include <hmm/hmm.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define DEVICE "soft:memory=8M"
#define WORDS (((size_t)32 << 20) / sizeof(uint64_t))

struct range {
    uint64_t *words;
    size_t n;
};

/* Squares every word in place, one span after the other: a span is the device's own mapping of as much as lies together. */
static uint64_t square(hmm_accessor *acc, void *arg)
{
    const struct range *r = arg;
    for (size_t done = 0, len; done < r->n; done += len / sizeof(uint64_t)) {
        len = (r->n - done) * sizeof(uint64_t);
        uint64_t *span = hmm_span_write(acc, r->words + done, &len);
        for (size_t i = 0; i < len / sizeof(uint64_t); i++)
            span[i] *= span[i];
    }
    return r->n;
}

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, hmm_last_message());
    return 1;
}

int main(void)
{
    struct range r = {aligned_alloc(4096, WORDS * sizeof(uint64_t)), WORDS}; /* so that no word lies across two spans */
    struct hmm_launch launch = {.size = sizeof(launch), .kernel = square, .arg = &r, .arg_size = sizeof(r)};
    struct hmm_device_info info = {.size = sizeof(info)};
    struct hmm_stats stats = {.size = sizeof(stats)};
    hmm_fence *fence;
    hmm_dev dev;

    if (!r.words)
        return 1;
    for (size_t i = 0; i < WORDS; i++)
        r.words[i] = i;
    if (hmm_device_open(DEVICE, &dev))
        return failed("open");
    if (hmm_job_launch(dev, &launch, &fence))
        return failed("launch");
    if (hmm_fence_wait(fence, -1))
        return failed("square");
    hmm_fence_put(fence);

    hmm_device_info(dev, &info);
    hmm_stats(&stats);
    printf("%zu MiB of data on a device of %llu MiB: %llu pages came, %llu were evicted\n", WORDS * sizeof(uint64_t) >> 20,
           (unsigned long long)info.memory_bytes >> 20, (unsigned long long)stats.pages_to_device,
           (unsigned long long)stats.evicted);

    size_t wrong = 0;
    for (size_t i = 0; i < WORDS; i++) /* the CPU touches them: the rest comes home */
        wrong += r.words[i] != (uint64_t)i * i;
    printf("%zu words are wrong\n", wrong);
    if (hmm_device_close(dev))
        return failed("close");
    free(r.words);
    return wrong ? 1 : 0;
}
