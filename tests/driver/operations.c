/* SPDX-License-Identifier: MIT */
/* See operations.h. */
#include "operations.h"

/* ---- jobs ---- */

hmm_fence *submit_operation(hmm_dev dev, const struct hmm_operation *operation)
{
    struct hmm_job_desc desc = {.size = sizeof(desc), .operation = *operation};
    hmm_fence *fence = NULL;
    int r = hmm_job_submit(dev, &desc, &fence);
    if (r)
        fail_msg("operation %u: %d, %s", operation->kind, r, hmm_last_message());
    return fence;
}

uint64_t must_operate(hmm_dev dev, const struct hmm_operation *operation)
{
    return must(submit_operation(dev, operation));
}

void must_fail(hmm_dev dev, const struct hmm_operation *operation, int status, const void *address)
{
    struct hmm_fence_info info = finish(submit_operation(dev, operation));
    if (info.status != status || info.address != (uintptr_t)address)
        fail_msg("operation %u: status %d at %#zx, not %d at %p (%s)", operation->kind, info.status, (size_t)info.address,
                 status, address, info.message);
    assert_true(info.message[0] != '\0');
}

/* ---- memory ---- */

/* Runs of 1 to 5 pages; every run of a kind has a number. */
static unsigned run_of(size_t page)
{
    return (unsigned)(page / 16 * 7 + page % 16 * 5 / 16);
}

static bool behind_bus(const struct memory *m, size_t page)
{
    return m->place == BEHIND_BUS || (m->place == IN_ALL_THREE && run_of(page) % 3 == 1);
}

struct memory memory_new(enum place place, size_t bytes)
{
    struct memory m = {.p = map_pages(bytes), .bytes = bytes, .place = place};
    for (size_t at = 0, page = page_size(); at < bytes; at += page)
        if (behind_bus(&m, at / page)) {
            void *p = mmap(m.p + at, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            assert_ptr_equal(p, m.p + at);
        }
    return m;
}

void memory_settle(hmm_dev dev, const struct memory *m)
{
    size_t page = page_size();
    if (m->place == ON_DEVICE)
        assert_int_equal(hmm_migrate_to_device(dev, m->p, m->bytes, NULL), 0);
    if (m->place != IN_BOTH && m->place != IN_ALL_THREE)
        return;
    for (size_t at = 0; at < m->bytes; at += page)
        if (run_of(at / page) % 3 == 0)
            assert_int_equal(hmm_migrate_to_device(dev, m->p + at, page, NULL), 0);
}

void memory_free(struct memory *m)
{
    unmap_pages(m->p, m->bytes);
}

/* ---- a CPU that reads ---- */

static void *touch(void *arg)
{
    struct touching *t = arg;
    uint64_t seed = 1;
    while (!t->stop) {
        (void)t->p[random_next(&seed) % t->bytes];
        if (random_next(&seed) % 8 == 0)
            usleep(20);
    }
    return NULL;
}

void touching_begin(struct touching *t, const void *p, size_t bytes)
{
    *t = (struct touching){.p = p, .bytes = bytes};
    assert_int_equal(pthread_create(&t->thread, NULL, touch, t), 0);
}

void touching_end(struct touching *t)
{
    t->stop = 1;
    pthread_join(t->thread, NULL);
}
