/* SPDX-License-Identifier: MIT */
/*
 * hmm_range_fault() where pages are on devices: on this one, on another, lost; where the protection changed since; what is refused. And
 * the same from a library thread, which makes the call itself.
 */
#include "range.h"

#define FOREVER -1

static size_t bytes;
static char *memory, *oracle;

/* PAGES pages of content with a notifier over them; every fourth was never touched. */
static int set_up_memory(void **state)
{
    int r = setup_device(state);
    page = page_size();
    bytes = PAGES * page;
    memory = map_pages(bytes);
    oracle = calloc(1, bytes);
    fill_random(oracle, bytes, 5);
    for (size_t i = 0; i < PAGES; i++) {
        if (i % 4 == 3)
            memset(oracle + i * page, 0, page);
        else
            memcpy(memory + i * page, oracle + i * page, page);
    }
    return r || hmm_notifier_insert(dev(), &notifier, (uintptr_t)memory, (uintptr_t)memory + bytes, &ops);
}

static int tear_down_memory(void **state)
{
    hmm_notifier_remove(&notifier);
    munmap(memory, bytes);
    free(oracle);
    return teardown(state);
}

static void migrate(hmm_dev to, size_t first, size_t end)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(to, memory + first * page, (end - first) * page, &res), 0);
    assert_int_equal(res.moved, end - first);
}

static bool in_system(uint64_t pfn, size_t i, uint64_t rights)
{
    return pfn == (HMM_PFN_VALID | rights | ((uintptr_t)memory / page + i));
}

/* ---- on this device ---- */

static void assert_on_device(size_t first, size_t end, uint64_t rights)
{
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(device, &info), 0);
    for (size_t i = first; i < end; i++) {
        assert_int_equal(pfns[i] & ~HMM_PFN_MASK, HMM_PFN_VALID | HMM_PFN_DEVICE | rights);
        assert_in_range(pfns[i] & HMM_PFN_MASK, 0, info.memory_bytes / page - 1);
        for (size_t k = first; k < i; k++)
            assert_true(pfns[i] != pfns[k]);
    }
}

static void pages_of_this_device_stay_there(void **state)
{
    (void)state;
    static const uint64_t requests[] = {0, REQ_READ, REQ_WRITE};
    migrate(device, 10, 30);
    struct hmm_stats before = stats_now();
    for (size_t n = 0; n < 3; n++) {
        assert_int_equal(ask_watched(memory, bytes, requests[n], 0), 0);
        assert_on_device(10, 30, HMM_PFN_WRITE);
        for (size_t i = 0; i < PAGES; i++) {
            if (i >= 10 && i < 30)
                continue;
            if (i % 4 == 3 && n == 0)
                assert_int_equal(pfns[i], 0);
            else
                assert_true(in_system(pfns[i], i, i % 4 == 3 && n == 1 ? 0 : HMM_PFN_WRITE));
        }
        assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_DEVICE), 20);
    }
    assert_int_equal(stats_now().pages_to_system, before.pages_to_system);
    assert_int_equal(stats_now().pages_to_device, before.pages_to_device);
    assert_memory_equal(memory, oracle, bytes);
}

static void the_device_alone(void **state)
{
    (void)state;
    migrate(device, 10, 30);
    assert_int_equal(ask_watched(memory, bytes, REQ_WRITE, HMM_RANGE_DEVICE_ONLY), 0); /* nothing is brought */
    assert_on_device(10, 30, HMM_PFN_WRITE);
    for (size_t i = 0; i < PAGES; i++)
        if (i < 10 || i >= 30)
            assert_int_equal(pfns[i], 0);
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_ABSENT), 20 / 4);
    assert_int_equal(mprotect(memory + 12 * page, 4 * page, PROT_READ), 0);
    assert_int_equal(mprotect(memory + 16 * page, 4 * page, PROT_NONE), 0);
    assert_int_equal(ask_watched(memory, bytes, 0, HMM_RANGE_DEVICE_ONLY), 0);
    assert_on_device(10, 12, HMM_PFN_WRITE);
    assert_on_device(12, 16, 0);
    for (size_t i = 16; i < 20; i++)
        assert_int_equal(pfns[i], HMM_PFN_ERROR);
    assert_on_device(20, 30, HMM_PFN_WRITE);
    assert_int_equal(mprotect(memory, bytes, PROT_READ | PROT_WRITE), 0);
    assert_memory_equal(memory, oracle, bytes);
}

/* What came before the protection changed stays, and may be used as the mapping says. */
static void protection_is_that_of_the_mapping(void **state)
{
    (void)state;
    migrate(device, 10, 30);
    assert_int_equal(mprotect(memory, bytes, PROT_READ), 0);
    assert_int_equal(ask_watched(memory, bytes, REQ_READ, 0), 0);
    assert_on_device(10, 30, 0);
    assert_int_equal(ask_watched(memory + 12 * page, page, REQ_WRITE, 0), -EPERM);
    assert_int_equal(ask_watched(memory, page, REQ_WRITE, 0), -EPERM);
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_DEVICE), 20);
    assert_int_equal(mprotect(memory, bytes, PROT_NONE), 0);
    assert_int_equal(ask_watched(memory, bytes, REQ_READ, 0), -EFAULT);
    assert_int_equal(ask_watched(memory, bytes, 0, 0), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i], HMM_PFN_ERROR);
    assert_int_equal(mprotect(memory, bytes, PROT_READ | PROT_WRITE), 0);
    assert_int_equal(ask_watched(memory, bytes, REQ_WRITE, 0), 0);
    assert_on_device(10, 30, HMM_PFN_WRITE);
    assert_memory_equal(memory, oracle, bytes);
}

static void a_huge_page_on_the_device_has_its_order(void **state)
{
    (void)state;
    size_t n = BLOCK / page;
    char *huge = map_huge(BLOCK);
    struct hmm_notifier own = notifier;
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(device, huge, BLOCK, &res), 0);
    if (res.huge != n)
        skip(); /* the kernel has split it */
    assert_int_equal(hmm_notifier_remove(&notifier), 0);
    assert_int_equal(hmm_notifier_insert(dev(), &own, (uintptr_t)huge, (uintptr_t)huge + BLOCK, &ops), 0);
    struct hmm_fault_range r = range_of(huge + 7 * page, 20 * page, 0);
    r.notifier = &own;
    assert_int_equal(hmm_range_fault_timeout(dev(), &r, FOREVER), 0);
    bool together = (pfns[0] & HMM_PFN_MASK) % n == 7;
    for (size_t i = 0; i < 20; i++) {
        assert_int_equal(HMM_PFN_ORDER(pfns[i]), together ? __builtin_ctzl(n) : 0);
        assert_true(pfns[i] & HMM_PFN_DEVICE);
        assert_true(!together || pfns[i] == pfns[0] + i);
    }
    assert_int_equal(hmm_migrate_to_system(huge, page, NULL), 0); /* not whole any more */
    assert_int_equal(hmm_range_fault_timeout(dev(), &r, FOREVER), 0);
    for (size_t i = 0; i < 20; i++)
        assert_int_equal(HMM_PFN_ORDER(pfns[i]), 0);
    assert_int_equal(hmm_notifier_remove(&own), 0);
    unmap_pages(huge, BLOCK);
}

/* ---- on another device ---- */

static void pages_of_another_device_come_home(void **state)
{
    (void)state;
    hmm_dev other = open_spec("soft:memory=8M");
    migrate(other, 10, 30);
    migrate(device, 0, 5);
    assert_int_equal(ask_watched(memory, bytes, 0, 0), 0);
    assert_on_device(0, 5, HMM_PFN_WRITE);
    for (size_t i = 10; i < 30; i++)
        assert_int_equal(pfns[i], 0);
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_DEVICE), 25);

    /* One attempt: bringing them home invalidates the range. */
    struct hmm_fault_range r = range_of(memory, bytes, REQ_READ);
    r.notifier_seq = hmm_notifier_read_begin(&notifier);
    assert_int_equal(hmm_range_fault(dev(), &r), -EBUSY);
    assert_int_equal(hmm_range_fault_timeout(dev(), &r, FOREVER), 0);
    assert_on_device(0, 5, HMM_PFN_WRITE);
    for (size_t i = 5; i < PAGES; i++) /* what was never touched on the way there and back is memory of its own by now */
        assert_int_equal(pfns[i] & ~HMM_PFN_WRITE, HMM_PFN_VALID | ((uintptr_t)memory / page + i));
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_DEVICE), 5);
    assert_memory_equal(memory, oracle, bytes);
    close_device(other);
}

/* ---- lost ---- */

static void lost_pages_are_errors(void **state)
{
    (void)state;
    char spec[128];
    expect_errors();
    hmm_dev other = (snprintf(spec, sizeof(spec), "faulty:lose_after=2,over=soft:memory=8M"), open_spec(spec));
    migrate(other, 10, 30);
    hmm_migrate_to_device(other, memory, page, NULL); /* this one loses it */
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(other, &info), 0);
    assert_true(info.lost);
    assert_int_equal(ask_watched(memory, bytes, 0, 0), 0);
    for (size_t i = 10; i < 30; i++)
        assert_int_equal(pfns[i], HMM_PFN_ERROR);
    assert_int_equal(ask_watched(memory, bytes, REQ_READ, 0), -EHWPOISON);
    assert_int_equal(ask_watched(memory, 10 * page, REQ_READ, 0), 0);
    close_device(other); /* poisons them; nobody knows of a device any more */
    assert_int_equal(ask_watched(memory, bytes, REQ_READ, 0), -EHWPOISON);
    assert_int_equal(ask_watched(memory, bytes, 0, 0), 0);
    for (size_t i = 10; i < 30; i++)
        assert_int_equal(pfns[i], HMM_PFN_ERROR);
    assert_int_equal(madvise(memory + 10 * page, 20 * page, MADV_DONTNEED), 0);
    assert_int_equal(ask_watched(memory, bytes, REQ_WRITE, 0), 0);
    memset(oracle + 10 * page, 0, 20 * page);
    assert_memory_equal(memory, oracle, bytes);
}

/* ---- invalidation ---- */

static void a_stale_number_is_refused(void **state)
{
    (void)state;
    migrate(device, 0, PAGES);
    struct hmm_fault_range r = range_of(memory, bytes, REQ_READ);
    uint64_t seq = r.notifier_seq = hmm_notifier_read_begin(&notifier);
    assert_int_equal(hmm_range_fault(dev(), &r), 0);
    assert_false(hmm_notifier_read_retry(&notifier, seq));
    assert_int_equal(madvise(memory, page, MADV_DONTNEED), 0);
    hmm_event_sync(dev()); /* it has been read, but perhaps not yet applied */
    assert_true(hmm_notifier_read_retry(&notifier, seq));
    assert_int_equal(hmm_range_fault(dev(), &r), -EBUSY);
    r.notifier_seq = hmm_notifier_read_begin(&notifier);
    assert_int_equal(hmm_range_fault(dev(), &r), 0);
    assert_false(pfns[0] & HMM_PFN_DEVICE);
    assert_on_device(1, PAGES, HMM_PFN_WRITE);
}

/* ---- refused ---- */

static void bad_input_is_refused_with_a_message(void **state)
{
    (void)state;
    struct hmm_notifier away = {0};
    const struct hmm_fault_range good = range_of(memory, bytes, 0);
    struct hmm_fault_range bad[11];
    for (size_t i = 0; i < 11; i++)
        bad[i] = good;
    bad[0].size = 8;
    bad[1].flags = 1u << 7;
    bad[2].end = bad[2].start;
    bad[3].start = good.end, bad[3].end = good.start;
    bad[4].start += 1;
    bad[5].end -= 1;
    bad[6].pfns = NULL;
    bad[7].default_flags = HMM_PFN_ERROR;
    bad[8].notifier = NULL;
    bad[9].notifier = &away;
    bad[10].end += page;
    for (size_t i = 0; i < 11; i++) {
        hmm_notifier_read_begin(&notifier);
        assert_int_equal(hmm_range_fault(dev(), &bad[i]), -EINVAL);
        assert_non_null(strstr(hmm_last_message(), "hmm_range_fault"));
        assert_int_equal(hmm_range_fault_timeout(dev(), &bad[i], 1000), -EINVAL);
    }
    assert_int_equal(hmm_range_fault(dev(), NULL), -EINVAL);
    hmm_dev other = open_spec("soft:memory=8M");
    assert_int_equal(hmm_range_fault(hmm_device_of(other), &bad[0]), -EINVAL);
    struct hmm_fault_range r = good;
    assert_int_equal(hmm_range_fault(hmm_device_of(other), &r), -EINVAL); /* the notifier is another device's */
    close_device(other);
    assert_null(hmm_device_of(other));
    assert_null(hmm_device_of(-1));
}

/* ---- library threads ---- */

static int thread_result;
static struct hmm_fault_range thread_range;

static void ask_here(void *arg)
{
    (void)arg;
    thread_result = hmm_range_fault_timeout(dev(), &thread_range, FOREVER);
}

static void a_library_thread_asks_itself(void **state)
{
    (void)state;
    struct hmm_thread *thread;
    migrate(device, 10, 30);
    thread_range = range_of(memory, bytes, REQ_WRITE);
    assert_int_equal(hmm_thread_start(&thread, "range", ask_here, NULL), 0);
    hmm_thread_join(thread);
    assert_int_equal(thread_result, 0);
    assert_on_device(10, 30, HMM_PFN_WRITE);
    for (size_t i = 0; i < PAGES; i++)
        assert_true((i >= 10 && i < 30) || in_system(pfns[i], i, HMM_PFN_WRITE));
    assert_memory_equal(memory, oracle, bytes);
}

/* ---- device faults where the protection has changed since ---- */

static uintptr_t fault_at;
static unsigned fault_flags;

static void fault_here(void *arg)
{
    (void)arg;
    thread_result = hmm_device_fault(dev(), fault_at, fault_flags);
}

static int fault(size_t i, unsigned flags)
{
    struct hmm_thread *thread;
    fault_at = (uintptr_t)memory + i * page;
    fault_flags = flags;
    assert_int_equal(hmm_thread_start(&thread, "fault", fault_here, NULL), 0);
    hmm_thread_join(thread);
    return thread_result;
}

/* What is on the device stays there, for what the mapping still allows. */
static void device_faults_follow_the_protection(void **state)
{
    (void)state;
    migrate(device, 10, 30);
    assert_int_equal(fault(12, HMM_FAULT_WRITE), 0);
    assert_int_equal(mprotect(memory, bytes, PROT_READ), 0);
    assert_int_equal(fault(12, HMM_FAULT_WRITE), -EACCES);
    assert_int_equal(fault(12, HMM_FAULT_READ), 0);
    assert_int_equal(fault(4, HMM_FAULT_WRITE), -EACCES);
    assert_int_equal(fault(4, HMM_FAULT_READ), 1); /* read-only memory does not migrate */
    assert_int_equal(mprotect(memory, bytes, PROT_NONE), 0);
    assert_int_equal(fault(12, HMM_FAULT_READ), -EACCES);
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_DEVICE), 20);
    assert_int_equal(mprotect(memory, bytes, PROT_READ | PROT_WRITE), 0);
    assert_int_equal(fault(12, HMM_FAULT_WRITE), 0);
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_DEVICE), 20);
    assert_memory_equal(memory, oracle, bytes);
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up_memory, tear_down_memory)

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        T(pages_of_this_device_stay_there),   T(the_device_alone),
        T(protection_is_that_of_the_mapping), T(a_huge_page_on_the_device_has_its_order),
        T(pages_of_another_device_come_home), T(lost_pages_are_errors),
        T(a_stale_number_is_refused),         T(bad_input_is_refused_with_a_message),
        T(a_library_thread_asks_itself),      T(device_faults_follow_the_protection),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
