/* SPDX-License-Identifier: MIT */
/*
 * Each call that may fail, fails: the nth system call, allocation or driver operation of a short life of the library, for as many n
 * as the time allows. Every call of the program then succeeds, or fails with an errno and words; no byte is lost; the audit finds
 * nothing; nothing hangs (an alarm ends the test otherwise).
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "debug/inject.h"
#include "live.h"

#define BUDGET_SECONDS 6.0 /* for each of the sweeps */
#define CLOSE_TRIES 5
#define SMALL_PAGES 24u

static size_t page;
static uint64_t seed;
static unsigned errors_logged;
static char first_error[200];

/* The memory of a life: small pages with holes, and a huge page. */
static struct {
    char *at;      /* two blocks: small pages in the first, the second is huge */
    uint8_t *copy; /* what it holds */
    size_t bytes;
} m;

static void watch(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level == HMM_LOG_ERROR && errors_logged++ == 0)
        snprintf(first_error, sizeof(first_error), "%s", line);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int set_up(void **state)
{
    (void)state;
    const char *text = getenv("HMM_SEED");
    page = hmm_page_size();
    seed = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    print_message("seed %llu (HMM_SEED repeats it)\n", (unsigned long long)seed);
    m.bytes = 2 * LIVE_BLOCK;
    m.at = live_reserve(m.bytes);
    m.copy = mmap(NULL, m.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    hmm_set_log(watch, NULL);
    errors_logged = 0;
    alarm(55);
    return m.at && m.copy != MAP_FAILED ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    munmap(m.at, m.bytes);
    munmap(m.copy, m.bytes);
    hmm_set_log(NULL, NULL);
    alarm(0);
    return 0;
}

static void fill(uint64_t nth)
{
    size_t small = SMALL_PAGES * page;
    assert_true(live_map(m.at, LIVE_BLOCK));
    assert_ptr_equal(
        mmap(m.at + LIVE_BLOCK, LIVE_BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
        m.at + LIVE_BLOCK);
    madvise(m.at + LIVE_BLOCK, LIVE_BLOCK, MADV_HUGEPAGE);
    memset(m.copy, 0, m.bytes);
    for (size_t i = 0; i < LIVE_BLOCK; i += 512) { /* a word every 512 bytes, another one each time */
        uint64_t v = random_mix(seed ^ nth << 20 ^ i);
        memcpy(m.copy + LIVE_BLOCK + i, &v, sizeof(v));
    }
    live_fill(m.copy, small, seed ^ nth);
    for (unsigned i = 0; i < SMALL_PAGES; i++)
        if (i % 5 == 4)
            memset(m.copy + i * page, 0, page); /* absent */
        else
            memcpy(m.at + i * page, m.copy + i * page, page);
    memcpy(m.at + LIVE_BLOCK, m.copy + LIVE_BLOCK, LIVE_BLOCK);
}

static const char *stage;

/* 0, or a clean failure: an errno that has words. */
static int clean(const char *what, int r)
{
    stage = what;
    if (r > 0 || r < -4095)
        fail_msg("%s returned %d", what, r);
    if (r && !hmm_last_message()[0])
        fail_msg("%s failed with %d after %s and said nothing", what, r, inject_last());
    return r;
}

static void check_content(const char *when, uint64_t nth)
{
    for (size_t at = 0; at < m.bytes; at += page)
        if (memcmp(m.at + at, m.copy + at, page))
            fail_msg("%s: page %zu changed when call %llu failed (%s)", when, at / page, (unsigned long long)nth,
                     inject_last());
}

/* The checksum job may fail, but never with a wrong result. */
static void checksum(hmm_dev dev, uint64_t nth)
{
    hmm_fence *fence = NULL;
    size_t len = SMALL_PAGES * page - 100;
    if (clean("hmm_job_crc32c", hmm_job_crc32c(dev, m.at + 50, len, &fence)))
        return;
    int r = hmm_fence_wait(fence, 20000000000ll);
    struct hmm_fence_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_fence_info(fence, &info), 0);
    if (r == -EAGAIN && info.status == -EINPROGRESS)
        fail_msg("a job hangs since call %llu failed (%s)", (unsigned long long)nth, inject_last());
    if (info.status == 0 && info.result != crc_oracle(m.copy + 50, len))
        fail_msg("a wrong checksum after call %llu failed (%s)", (unsigned long long)nth, inject_last());
    if (info.status && !info.message[0])
        fail_msg("a job failed with %d after %s and says nothing", info.status, inject_last());
    hmm_fence_put(fence);
}

static void write_some(uint64_t nth)
{
    for (unsigned i = 0; i < SMALL_PAGES; i += 3) {
        m.at[i * page + 77] = (char)(nth + i);
        m.copy[i * page + 77] = (uint8_t)(nth + i);
    }
    m.at[LIVE_BLOCK + 4 * page] = (char)nth;
    m.copy[LIVE_BLOCK + 4 * page] = (uint8_t)nth;
}

static void audit(uint64_t nth)
{
    int n = hmm_audit();
    if (n == -ENOMEM) /* it needs memory for its report; one failure is all there is in a sweep */
        n = hmm_audit();
    if (n == -ENOMEM)
        return;
    if (n)
        fail_msg("audit after call %llu failed (%s): %d, %s", (unsigned long long)nth, inject_last(), n, hmm_last_message());
}

static void use(hmm_dev dev, uint64_t nth)
{
    clean("hmm_migrate_to_device", hmm_migrate_to_device(dev, m.at, m.bytes, NULL));
    audit(nth);
    checksum(dev, nth);
    write_some(nth);
    audit(nth);
    clean("hmm_migrate_to_device again", hmm_migrate_to_device(dev, m.at, m.bytes, NULL));
    checksum(dev, nth);
    clean("hmm_migrate_to_system", hmm_migrate_to_system(m.at, m.bytes, NULL));
    audit(nth);
    check_content("at home", nth);
    clean("hmm_migrate_to_device a third time", hmm_migrate_to_device(dev, m.at, m.bytes, NULL));
}

/* One life. The number of calls that could have failed: the bound of the sweep. */
static uint64_t live(const struct inject_config *c, const char *spec)
{
    hmm_dev dev;
    fill(c->fail_nth);
    inject_start(c);
    if (clean("hmm_device_open", hmm_device_open(spec, &dev)) == 0) {
        use(dev, c->fail_nth);
        int r = -1;
        for (unsigned i = 0; r && i < CLOSE_TRIES; i++)
            r = clean("hmm_device_close", hmm_device_close(dev));
        if (r)
            fail_msg("the device cannot be closed after call %llu failed (%s): %d, %s", (unsigned long long)c->fail_nth,
                     inject_last(), r, hmm_last_message());
    }
    uint64_t calls = inject_calls();
    inject_stop();
    check_content("at the end", c->fail_nth);
    if (errors_logged)
        fail_msg("after call %llu failed (%s): %s", (unsigned long long)c->fail_nth, inject_last(), first_error);
    return calls;
}

/* Every call fails once, or as many of them as the time allows, evenly spread. */
static void sweep(const char *spec)
{
    struct inject_config c = {.seed = seed};
    uint64_t calls = live(&c, spec), done = 0, failed = 0, from = random_mix(seed) % calls;
    assert_true(calls > 100);
    /* A stride that has no common divisor with the number of calls meets each once, in no order. */
    uint64_t stride = calls * 618 / 1000 | 1;
    for (uint64_t a = stride, b = calls; b;) {
        uint64_t rest = a % b;
        a = b, b = rest;
        if (!b && a != 1)
            a = stride += 2, b = calls;
    }
    double end = now() + BUDGET_SECONDS;
    for (; done < calls && now() < end; done++) {
        c.fail_nth = 1 + (from + done * stride) % calls;
        live(&c, spec);
        failed += inject_failures();
    }
    print_message("%llu of %llu calls tried, %llu failures\n", (unsigned long long)done, (unsigned long long)calls,
                  (unsigned long long)failed);
    assert_true(failed >= done / 2); /* a run in which nothing failed proves nothing */
}

static void one_failure_at_a_time(void **state)
{
    (void)state;
    sweep("soft:memory=16M,engines=1");
}

static void one_failure_at_a_time_on_a_device_that_is_too_small(void **state)
{
    (void)state;
    sweep("soft:memory=1M,engines=1");
}

/* Many failures in one life: whatever works, works right. */
static void many_failures(void **state)
{
    (void)state;
    double end = now() + BUDGET_SECONDS / 2;
    uint64_t failed = 0;
    for (unsigned round = 0; round < 1000 && now() < end; round++) {
        struct inject_config c = {.seed = random_mix(seed + round)};
        for (int k = 0; k < INJECT_KINDS; k++)
            c.permille[k] = 1u << round % 6;
        live(&c, round % 2 ? "soft:memory=1M,engines=1" : "soft:memory=16M,engines=1");
        failed += inject_failures();
    }
    assert_true(failed > 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(one_failure_at_a_time),
        TEST(one_failure_at_a_time_on_a_device_that_is_too_small),
        TEST(many_failures),
    };
    return cmocka_run_group_tests_name("rollback", tests, NULL, NULL);
}
