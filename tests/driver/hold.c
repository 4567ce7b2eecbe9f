/* SPDX-License-Identifier: MIT */
/* See hold.h. */
#include "hold.h"

#include <dlfcn.h>

struct stuck_interface *stuck;
unsigned bound_ms;

struct stuck_device *knobs(unsigned slot)
{
    return &stuck->devices[slot];
}

hmm_dev open_stuck(unsigned slot)
{
    char spec[64];
    assert_int_equal(setenv("HMM_DRIVER_PATH", MODULES, 1), 0);
    snprintf(spec, sizeof(spec), "stuck:slot=%u,memory=16M", slot);
    hmm_dev dev = open_spec(spec);
    if (!stuck) {
        void *file = dlopen(MODULES "/libhmm-stuck.so", RTLD_NOW | RTLD_NOLOAD);
        stuck = file ? dlsym(file, STUCK_SYMBOL) : NULL;
        assert_non_null(stuck);
    }
    return dev;
}

int setup_hold(void **state)
{
    char words[32];
    bound_ms = SHORT_MS;
    snprintf(words, sizeof(words), "patience=%u", bound_ms);
    return setenv("HMM_DEBUG", words, 1) || setup_none(state);
}

int setup_hold_long(void **state)
{
    bound_ms = BOUND_MS;
    return unsetenv("HMM_DEBUG") || setup_none(state);
}

int release_all(void **state)
{
    for (unsigned i = 0; stuck && i < STUCK_SLOTS; i++)
        knobs(i)->hold = knobs(i)->sleep_ms = 0;
    hmm_set_limit(0);
    return teardown(state);
}

void watch(unsigned slot, const char *p, size_t len)
{
    assert_int_equal(stuck->watch(slot, (uintptr_t)p, (uintptr_t)p + len), 0);
}

void all_to_device(hmm_dev dev, const char *p, size_t len)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(dev, p, len, &res), 0);
    assert_int_equal(res.moved, len / page_size());
}

void close_gives_up(hmm_dev dev, const char *const *words)
{
    uint64_t began = now_ms();
    int r = hmm_device_close(dev);
    uint64_t took = now_ms() - began;
    char said[256];
    snprintf(said, sizeof(said), "%s", hmm_last_message());
    if (r != -EBUSY)
        fail_msg("close gave %d, '%s'", r, said);
    if (took < bound_ms - 500 || took > BOUND_MS + SLACK_MS)
        fail_msg("close gave up after %llu ms", (unsigned long long)took);
    for (; *words; words++)
        if (!strstr(said, *words))
            fail_msg("'%s' is not in the message: %s", *words, said);
}

void close_in_time(hmm_dev dev)
{
    uint64_t began = now_ms();
    close_device(dev);
    assert_true(now_ms() - began < SLACK_MS);
}

void unmap_and_keep(char *p, size_t len)
{
    void *at = mmap(p, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    assert_ptr_equal(at, p);
}
