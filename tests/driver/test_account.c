/* SPDX-License-Identifier: MIT */
/*
 * Accounting and limits. What is on a device is counted by the test itself, and by the kernel: memory that was written, and of which
 * the kernel has no page, is on a device.
 */
#include <pthread.h>

#include <hmm/driver.h>

#include "support.h"

#define DEVICE_MEMORY "memory=16M"

static size_t page;

static char *written(size_t bytes, uint64_t seed)
{
    char *p = map_pages(bytes);
    fill_random(p, bytes, seed);
    return p;
}

/* Pages of written memory of which the kernel has nothing. */
static size_t away(const char *p, size_t bytes)
{
    size_t n = 0;
    for (size_t i = 0; i < bytes; i += page)
        n += !page_present(p + i);
    return n;
}

static struct hmm_device_info info_of(hmm_dev dev)
{
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    return info;
}

static size_t used_pages(hmm_dev dev)
{
    return info_of(dev).used_bytes / page;
}

static void wait_until_used(hmm_dev dev, size_t pages)
{
    wait_used(dev, pages * page);
    assert_int_equal(used_pages(dev), pages);
}

static struct hmm_migrate_result to_device(hmm_dev dev, const char *p, size_t bytes)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    int r = hmm_migrate_to_device(dev, p, bytes, &res);
    if (r)
        fail_msg("to device: %d, %s", r, hmm_last_message());
    assert_int_equal(res.moved + res.already + res.pinned + res.unmovable + res.unmapped + res.busy, bytes / page);
    return res;
}

static void to_system(const char *p, size_t bytes)
{
    assert_int_equal(hmm_migrate_to_system(p, bytes, NULL), 0);
}

static void assert_says(const char *word)
{
    if (!strstr(hmm_last_message(), word))
        fail_msg("'%s' is not in the message: %s", word, hmm_last_message());
}

static int no_limit(void **state)
{
    hmm_set_limit(0);
    return teardown(state);
}

#define TEST_ACCOUNT(f) cmocka_unit_test_setup_teardown(f, setup_none, no_limit)

/* ---- the environment; first, because what the program sets counts more ------------------------------------------------------------ */

static void the_environment_sets_the_limit_of_the_process(void **state)
{
    (void)state;
    hmm_dev dev = 0;
    static const char *const bad[] = {"64X", "-1", "lots", "1", "4K K", "0x"};
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        setenv("HMM_LIMIT", bad[i], 1);
        assert_int_equal(hmm_device_open(spec_with(DEVICE_MEMORY), &dev), -EINVAL);
        assert_says("HMM_LIMIT");
        assert_says(bad[i]);
    }
    setenv("HMM_LIMIT", "3M", 1);
    dev = open_with(DEVICE_MEMORY);
    assert_int_equal(stats_now().limit_bytes, 3 * MIB);
    char *p = written(8 * MIB, 1);
    for (size_t i = 0; i < 8; i++)
        to_device(dev, p + i * MIB, MIB);
    assert_true(used_pages(dev) <= 3 * MIB / page);
    assert_true(used_pages(dev) >= MIB / page);
    assert_int_equal(away(p, 8 * MIB), used_pages(dev));
    close_device(dev);
    check_content(p, 8 * MIB, 1);
    unmap_pages(p, 8 * MIB);

    unsetenv("HMM_LIMIT"); /* and with the next manager it is gone */
    dev = open_with(DEVICE_MEMORY);
    assert_int_equal(stats_now().limit_bytes, 0);
    setenv("HMM_LIMIT", "1M", 1); /* not looked at any more when the program has set one */
    assert_int_equal(hmm_set_limit(5 * MIB), 0);
    close_device(dev);
    dev = open_with(DEVICE_MEMORY);
    assert_int_equal(stats_now().limit_bytes, 5 * MIB);
    close_device(dev);
    unsetenv("HMM_LIMIT");
}

/* ---- what is where ------------------------------------------------------------------------------------------------------------------ */

static void the_numbers_are_those_of_the_kernel(void **state)
{
    (void)state;
    hmm_dev a = open_with(DEVICE_MEMORY), b = open_with(DEVICE_MEMORY);
    size_t bytes = 6 * MIB, pages = bytes / page;
    char *p = written(bytes, 2);
    uint64_t seed = 3;
    uint8_t *where = calloc(pages, 1); /* the test's own account */
    for (int round = 0; round < 60; round++) {
        size_t from = random_next(&seed) % pages, n = 1 + random_next(&seed) % (pages - from);
        uint8_t to = (uint8_t)(random_next(&seed) % 3);
        if (to)
            assert_int_equal(hmm_migrate_to_device(to == 1 ? a : b, p + from * page, n * page, NULL), 0);
        else
            to_system(p + from * page, n * page);
        memset(where + from, to, n);
        size_t on[3] = {0};
        for (size_t i = 0; i < pages; i++)
            on[where[i]]++;
        assert_int_equal(used_pages(a), on[1]);
        assert_int_equal(used_pages(b), on[2]);
        assert_int_equal(stats_now().device_pages, on[1] + on[2]);
        assert_int_equal(away(p, bytes), on[1] + on[2]);
        assert_int_equal(info_of(a).transit_bytes + info_of(b).transit_bytes, 0);
        assert_int_equal(stats_now().transit_pages, 0);
    }
    close_device(a);
    close_device(b);
    check_content(p, bytes, 2);
    free(where);
    unmap_pages(p, bytes);
}

/* A call may return when its event has been read: it is counted when that is applied. */
static struct hmm_stats settled_stats(hmm_dev dev)
{
    hmm_event_sync(hmm_device_of(dev));
    return stats_now();
}

/* Each call of the program is one event, and drops exactly what it covered. */
static void every_event_is_counted(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    char *p = written(MIB, 4), *away_to = map_pages(MIB);
    to_device(dev, p, MIB);
    struct hmm_stats s = stats_now(), t;

    madvise(p, 16 * page, MADV_DONTNEED);
    wait_until_used(dev, MIB / page - 16);
    t = settled_stats(dev);
    assert_int_equal(t.events_remove - s.events_remove, 1);
    assert_int_equal(t.dropped - s.dropped, 16);

    assert_ptr_equal(mremap(p + 16 * page, 8 * page, 8 * page, MREMAP_MAYMOVE | MREMAP_FIXED, away_to), away_to);
    t = settled_stats(dev);
    assert_int_equal(t.events_remap - s.events_remap, 1);
    uint64_t unmaps = t.events_unmap; /* a kernel may report the old place of a remap as unmapped, too */
    munmap(p + 24 * page, 32 * page);
    wait_until_used(dev, MIB / page - 16 - 32);
    t = settled_stats(dev);
    assert_int_equal(t.events_remap - s.events_remap, 1);
    assert_int_equal(t.events_unmap - unmaps, 1);
    assert_int_equal(t.events_remove - s.events_remove, 1);
    assert_int_equal(t.dropped - s.dropped, 16 + 32);
    assert_int_equal(t.events_fork - s.events_fork, 0);

    /* Nothing of these was on a device: nothing is counted. */
    s = stats_now();
    char *plain = written(MIB, 5);
    madvise(plain, MIB, MADV_DONTNEED);
    unmap_pages(plain, MIB);
    t = settled_stats(dev);
    assert_int_equal(t.events_remove + t.events_unmap + t.events_remap, s.events_remove + s.events_unmap + s.events_remap);
    assert_int_equal(t.calls_unmap + t.calls_remove + t.calls_remap + t.calls_protect + t.calls_fork + t.calls_release, 0);
    close_device(dev);
    unmap_pages(p, 16 * page);
    unmap_pages(p + 56 * page, MIB - 56 * page);
    unmap_pages(away_to, MIB);
}

#define FREED_MS 90 /* a call that takes longer may return before its device pages are free: it waits for 100 ms at most */

/* Through the wrappers, with pages on the device: each call once, and no other. */
static void every_announced_call_is_counted(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    char *p = written(MIB, 12), *plain = written(MIB, 13);
    to_device(dev, p, MIB);
    struct hmm_stats s = stats_now();
    uint64_t began = now_ms();
    assert_int_equal(hmm_madvise(p, 16 * page, MADV_DONTNEED), 0);
    assert_int_equal(hmm_mprotect(p + 16 * page, page, PROT_READ), 0);
    assert_int_equal(hmm_mprotect(p + 16 * page, page, PROT_READ | PROT_WRITE), 0);
    assert_ptr_equal(hmm_mremap(p, MIB, MIB / 2, 0), p);
    assert_int_equal(hmm_munmap(p + 16 * page, 32 * page), 0);
    /* Nobody has anything here. */
    assert_int_equal(hmm_madvise(plain, MIB, MADV_DONTNEED), 0);
    assert_int_equal(hmm_mprotect(plain, MIB, PROT_READ), 0);
    assert_int_equal(hmm_munmap(plain, MIB), 0);
    struct hmm_stats t = stats_now();
    assert_int_equal(t.calls_remove - s.calls_remove, 1);
    assert_int_equal(t.calls_protect - s.calls_protect, 2);
    assert_int_equal(t.calls_remap - s.calls_remap, 1);
    assert_int_equal(t.calls_unmap - s.calls_unmap, 1);
    assert_int_equal(t.calls_release + t.calls_fork, 0);
    if (now_ms() - began < FREED_MS)
        assert_int_equal(used_pages(dev), MIB / page / 2 - 48); /* free when the call returns */
    wait_until_used(dev, MIB / page / 2 - 48);
    close_device(dev);
    unmap_pages(p, MIB);
    unmap_pages(plain, MIB);
}

/* ---- the limit of a device -------------------------------------------------------------------------------------------------------- */

static void a_device_stays_within_its_limit(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    size_t bytes = 8 * MIB, limit = 3 * MIB;
    char *p = written(bytes, 6);
    assert_int_equal(hmm_device_set_limit(dev, limit + 1), 0); /* whole pages */
    assert_int_equal(info_of(dev).limit_bytes, limit);
    uint64_t evicted = stats_now().evicted, moved = 0;
    for (int round = 0; round < 3; round++)
        for (size_t i = 0; i < bytes; i += MIB) {
            moved += to_device(dev, p + i, MIB).moved;
            assert_true(used_pages(dev) <= limit / page);
            assert_int_equal(away(p, bytes), used_pages(dev));
            assert_int_equal(away(p + i, MIB), MIB / page); /* what was asked for is there */
        }
    assert_int_equal(stats_now().evicted - evicted, moved - used_pages(dev)); /* who came and is not there was sent home */
    assert_int_equal(stats_now().limited, 0);
    assert_int_equal(device_crc(dev, p, bytes), crc_oracle(p, bytes));
    close_device(dev);
    check_content(p, bytes, 6);
    unmap_pages(p, bytes);
}

static void what_does_not_fit_stays_and_is_counted(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    size_t bytes = 2 * BLOCK, limit = 64 * page;
    char *p = written(bytes, 7);
    assert_int_equal(hmm_device_set_limit(dev, limit), 0);
    /* Of each block as many pages find room as the limit allows; the second block's send those of the first home. */
    struct hmm_migrate_result res = to_device(dev, p, bytes);
    assert_int_equal(res.moved, 2 * 64);
    assert_int_equal(res.busy, bytes / page - 2 * 64);
    assert_int_equal(res.limited, res.busy);
    assert_int_equal(res.first_stayed, (uintptr_t)p + limit);
    assert_int_equal(stats_now().limited, res.limited);
    assert_int_equal(away(p, BLOCK), 0);
    assert_int_equal(away(p + BLOCK, BLOCK), 64);

    /* Pages that are there count as that, and not as busy. */
    res = to_device(dev, p + BLOCK, 100 * page);
    assert_int_equal(res.already, 64);
    assert_int_equal(res.limited, 36);
    assert_int_equal(res.busy, 36);

    /* A block does not send its own pages home: nothing can be moved, and that is an error with words. */
    res = (struct hmm_migrate_result){.size = sizeof(res), .moved = 4711};
    assert_int_equal(hmm_migrate_to_device(dev, p + BLOCK + limit, 10 * page, &res), -ENOSPC);
    assert_int_equal(res.moved, 4711);
    char number[32];
    snprintf(number, sizeof(number), "%zu", limit);
    assert_says(number);
    assert_says("none of 10 pages");
    assert_says("hmm_device_set_limit");
    close_device(dev);
    check_content(p, bytes, 7);
    unmap_pages(p, bytes);
}

static void a_limit_that_is_lowered_sends_pages_home(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    size_t bytes = 8 * MIB;
    char *p = written(bytes, 8);
    to_device(dev, p, bytes);
    assert_int_equal(used_pages(dev), bytes / page);
    for (int mib = 7; mib > 0; mib -= 2) {
        size_t limit = (size_t)mib * MIB;
        assert_int_equal(hmm_device_set_limit(dev, limit), 0);
        assert_true(used_pages(dev) <= limit / page);
        assert_true(used_pages(dev) + BLOCK / page > limit / page); /* and not more than needed, in blocks */
        assert_int_equal(away(p, bytes), used_pages(dev));
    }
    assert_int_equal(hmm_device_set_limit(dev, 0), 0);
    assert_int_equal(info_of(dev).limit_bytes, 0);
    to_device(dev, p, bytes);
    assert_int_equal(used_pages(dev), bytes / page);
    assert_int_equal(hmm_device_set_limit(dev, 1ull << 50), 0); /* more than it has: no difference */
    assert_int_equal(used_pages(dev), bytes / page);
    close_device(dev);
    check_content(p, bytes, 8);
    unmap_pages(p, bytes);
}

static void jobs_on_more_than_the_limit_are_right(void **state)
{
    (void)state;
    hmm_dev dev = open_with(DEVICE_MEMORY);
    size_t bytes = 8 * MIB, limit = 2 * MIB;
    char *p = written(bytes, 9), *q = map_pages(bytes);
    assert_int_equal(hmm_device_set_limit(dev, limit), 0);
    for (int round = 0; round < 2; round++) {
        device_copy(dev, q, p, bytes);
        assert_true(used_pages(dev) <= limit / page);
    }
    check_content(q, bytes, 9);
    check_content(p, bytes, 9);
    close_device(dev);
    unmap_pages(p, bytes);
    unmap_pages(q, bytes);
}

/* ---- the limit of the process ------------------------------------------------------------------------------------------------------ */

static void devices_share_the_limit_of_the_process(void **state)
{
    (void)state;
    hmm_dev a = open_with(DEVICE_MEMORY), b = open_with(DEVICE_MEMORY);
    char *p = written(4 * BLOCK, 10), *q = written(4 * BLOCK, 11);
    assert_int_equal(hmm_set_limit(4 * BLOCK), 0);
    assert_int_equal(stats_now().limit_bytes, 4 * BLOCK);
    to_device(a, p, 4 * BLOCK);
    assert_int_equal(used_pages(a), 4 * BLOCK / page);
    for (size_t i = 1; i <= 4; i++) { /* the coldest go, whosever they are */
        assert_int_equal(to_device(b, q + (i - 1) * BLOCK, BLOCK).moved, BLOCK / page);
        assert_int_equal(used_pages(b), i * BLOCK / page);
        assert_int_equal(used_pages(a), (4 - i) * BLOCK / page);
        assert_int_equal(away(p, i * BLOCK), 0);
    }
    assert_int_equal(hmm_set_limit(BLOCK), 0);
    assert_true(stats_now().device_pages <= BLOCK / page);
    assert_int_equal(away(p, 4 * BLOCK) + away(q, 4 * BLOCK), stats_now().device_pages);
    assert_int_equal(hmm_set_limit(16 * page), 0);
    to_system(q, 4 * BLOCK);
    to_device(a, p, 16 * page);
    assert_int_equal(hmm_migrate_to_device(a, p + 16 * page, 5 * page, NULL), -ENOSPC);
    assert_says("hmm_set_limit");
    assert_says("HMM_LIMIT");
    assert_says("none of 5 pages");
    /* A page of another block: room is made. */
    assert_int_equal(to_device(b, q, 16 * page).moved, 16);
    assert_int_equal(used_pages(a), 0);
    close_device(a);
    close_device(b);
    check_content(p, 4 * BLOCK, 10);
    check_content(q, 4 * BLOCK, 11);
    unmap_pages(p, 4 * BLOCK);
    unmap_pages(q, 4 * BLOCK);
}

#define MOVERS 3

struct mover {
    pthread_t thread;
    hmm_dev dev;
    char *p;
    unsigned failed;
    uint64_t most; /* bytes on devices, of all that it saw between its own moves */
};

static void *move_about(void *arg)
{
    struct mover *m = arg;
    uint64_t seed = (uintptr_t)m->p;
    for (int i = 0; i < 40; i++) {
        size_t from = random_next(&seed) % (4 * MIB), len = 1 + random_next(&seed) % (2 * MIB);
        int r = hmm_migrate_to_device(m->dev, m->p + from, len, NULL);
        m->failed += r != 0 && r != -ENOSPC;
        struct hmm_stats s = {.size = sizeof(s)};
        m->failed += hmm_stats(&s) != 0;
        m->most = s.device_pages * page > m->most ? s.device_pages * page : m->most;
        if (i % 4 == 0)
            m->failed += hmm_migrate_to_system(m->p + from, len / 2 + 1, NULL) != 0;
    }
    return NULL;
}

static void the_limit_holds_at_every_moment(void **state)
{
    (void)state;
    struct mover m[MOVERS];
    hmm_dev devices[2] = {open_with(DEVICE_MEMORY), open_with(DEVICE_MEMORY)};
    uint64_t limit = 3 * MIB, most = 0;
    assert_int_equal(hmm_set_limit(limit), 0);
    for (unsigned i = 0; i < MOVERS; i++) {
        m[i] = (struct mover){.dev = devices[i % 2], .p = written(6 * MIB, 20 + i)};
        pthread_create(&m[i].thread, NULL, move_about, &m[i]);
    }
    for (unsigned i = 0; i < MOVERS;) {
        uint64_t now = stats_now().device_pages * page;
        most = now > most ? now : most;
        if (pthread_tryjoin_np(m[i].thread, NULL) == 0)
            i++;
        else
            sleep_ms(1);
    }
    for (unsigned i = 0; i < MOVERS; i++)
        most = m[i].most > most ? m[i].most : most;
    if (most > limit)
        fail_msg("%llu bytes were on devices", (unsigned long long)most);
    assert_true(most > limit / 2);
    for (unsigned i = 0; i < MOVERS; i++) {
        assert_int_equal(m[i].failed, 0);
        check_content(m[i].p, 6 * MIB, 20 + i);
        unmap_pages(m[i].p, 6 * MIB);
    }
    for (unsigned i = 0; i < 2; i++)
        wait_until_used(devices[i], 0);
    assert_int_equal(stats_now().device_pages, 0);
}

/* ---- bad input ----------------------------------------------------------------------------------------------------------------------- */

static void limits_that_make_no_sense_are_refused(void **state)
{
    (void)state;
    assert_int_equal(hmm_set_limit(page - 1), -EINVAL);
    assert_says("less than a page");
    assert_int_equal(hmm_set_limit(page), 0); /* no device is open */
    assert_int_equal(hmm_set_limit(0), 0);
    assert_int_equal(hmm_device_set_limit(4711, MIB), -ENODEV);
    hmm_dev dev = open_with(DEVICE_MEMORY);
    assert_int_equal(hmm_device_set_limit(dev, 2 * MIB), 0);
    assert_int_equal(hmm_device_set_limit(dev, info_of(dev).page_size - 1), -EINVAL);
    assert_says("less than a page");
    assert_int_equal(hmm_set_limit(1), -EINVAL);
    assert_int_equal(info_of(dev).limit_bytes, 2 * MIB); /* as it was */
    assert_int_equal(stats_now().limit_bytes, 0);
    close_device(dev);
    assert_int_equal(hmm_device_set_limit(dev, MIB), -ENODEV);
}

int test_main(void)
{
    page = page_size();
    const struct CMUnitTest tests[] = {
        TEST_ACCOUNT(the_environment_sets_the_limit_of_the_process), /* the first one */
        TEST_ACCOUNT(the_numbers_are_those_of_the_kernel),
        TEST_ACCOUNT(every_event_is_counted),
        TEST_ACCOUNT(every_announced_call_is_counted),
        TEST_ACCOUNT(a_device_stays_within_its_limit),
        TEST_ACCOUNT(what_does_not_fit_stays_and_is_counted),
        TEST_ACCOUNT(a_limit_that_is_lowered_sends_pages_home),
        TEST_ACCOUNT(jobs_on_more_than_the_limit_are_right),
        TEST_ACCOUNT(devices_share_the_limit_of_the_process),
        TEST_ACCOUNT(the_limit_holds_at_every_moment),
        TEST_ACCOUNT(limits_that_make_no_sense_are_refused),
    };
    return cmocka_run_group_tests_name("account", tests, NULL, NULL);
}
