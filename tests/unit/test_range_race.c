/* SPDX-License-Identifier: MIT */
/*
 * hmm_range_fault() while the address space changes: at each of its steps the program unmaps, drops, moves or migrates. An answer that
 * is given is right; else it says -EBUSY. The whole library on memory of its own.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>

#include <cmocka.h>

#include "api/manager.h"
#include "live.h"
#include "points.h"
#include "notifier/notifier.h"
#include <hmm/driver.h>

#define PAGES 64u
#define FIRST 16u /* what changes: pages [FIRST, LAST) */
#define LAST 24u
#define MS 1000000ll
#define REQ_READ HMM_PFN_REQ_FAULT
#define REQ_WRITE (HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)

static size_t page, bytes;
static char *arena, *elsewhere;
static hmm_dev dev_handle;
static struct hmm_device *dev;
static struct hmm_notifier notifier;
static struct hmm_fault_range range;
static uint64_t pfns[PAGES];
static unsigned calls;

static int let_go(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    (void)event;
    __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
    return 0;
}

static const struct hmm_notifier_ops ops = {.invalidate = let_go};

static int set_up(void **state)
{
    (void)state;
    page = hmm_page_size();
    bytes = PAGES * page;
    alarm(50);
    arena = live_reserve(LIVE_BLOCK);
    elsewhere = live_reserve(LIVE_BLOCK);
    if (!live_map(arena, bytes) || hmm_device_open("soft:memory=8M,engines=1", &dev_handle))
        return -1;
    dev = hmm_device_of(dev_handle);
    memset(arena, 5, bytes);
    calls = 0;
    range = (struct hmm_fault_range){
        .size = sizeof(range),
        .notifier = &notifier,
        .start = (uintptr_t)arena,
        .end = (uintptr_t)arena + bytes,
        .pfns = pfns,
        .default_flags = REQ_READ,
    };
    return hmm_notifier_insert(dev, &notifier, range.start, range.end, &ops);
}

static int tear_down(void **state)
{
    (void)state;
    forget_point();
    hmm_notifier_remove(&notifier);
    int audit = hmm_audit(), r = hmm_device_close(dev_handle);
    munmap(arena, LIVE_BLOCK);
    munmap(elsewhere, LIVE_BLOCK);
    alarm(0);
    return audit || r;
}

/* One page of the changing part is on the device, so that all is registered; the rest is in system memory. */
static void register_it(void)
{
    assert_int_equal(hmm_migrate_to_device(dev_handle, arena, bytes, NULL), 0);
    assert_int_equal(hmm_migrate_to_system(arena, FIRST * page, NULL), 0);
    assert_int_equal(hmm_migrate_to_system(arena + (FIRST + 1) * page, (PAGES - FIRST - 1) * page, NULL), 0);
}

/* ---- something happens at a step ---- */

static void drop(void)
{
    madvise(arena + FIRST * page, (LAST - FIRST) * page, MADV_DONTNEED);
    hmm_event_sync(dev);
}

static void unmap(void)
{
    munmap(arena + FIRST * page, (LAST - FIRST) * page);
    hmm_event_sync(dev);
}

static void map_anew(void)
{
    unmap();
    live_map(arena + FIRST * page, (LAST - FIRST) * page);
    memset(arena + FIRST * page, 9, (LAST - FIRST) * page);
}

static void move(void)
{
    mremap(arena + FIRST * page, (LAST - FIRST) * page, (LAST - FIRST) * page, MREMAP_MAYMOVE | MREMAP_FIXED,
           elsewhere + FIRST * page);
    hmm_event_sync(dev);
}

static const struct {
    const char *name;
    void (*action)(void);
    bool hole; /* afterwards */
} changes[] = {{"drop", drop, false}, {"unmap", unmap, true}, {"map anew", map_anew, false}, {"move", move, true}};

static const char *const points[] = {"range-watched", "range-scanned", "range-looked"};

/* What the kernel says now, under the answer that was given. */
static void assert_answer_is_right(const char *what, bool hole)
{
    for (unsigned i = 0; i < PAGES; i++) {
        bool gone = hole && i >= FIRST && i < LAST;
        if (gone != !!(pfns[i] & HMM_PFN_ERROR))
            fail_msg("%s: page %u is %#lx", what, i, (unsigned long)pfns[i]);
        if (pfns[i] & HMM_PFN_VALID && !(pfns[i] & HMM_PFN_DEVICE)) {
            assert_int_equal(pfns[i] & HMM_PFN_MASK, (uintptr_t)arena / page + i);
            if (!page_present(arena + i * page))
                fail_msg("%s: page %u is said to be present", what, i);
        }
    }
}

static void change_at_a_step(unsigned c, unsigned p, uint64_t request)
{
    char what[80];
    void *state = NULL;
    snprintf(what, sizeof(what), "%s at %s, request %lx", changes[c].name, points[p], (unsigned long)(request >> 60));
    register_it();
    range.default_flags = request;
    range.notifier_seq = hmm_notifier_read_begin(&notifier);
    arm_point(points[p], changes[c].action);
    int r = hmm_range_fault(dev, &range);
    disarm_point(what);
    if (r != -EBUSY)
        fail_msg("%s: %d, not -EBUSY", what, r);
    r = hmm_range_fault_timeout(dev, &range, 10000 * MS);
    if (r != (changes[c].hole && request ? -EFAULT : 0))
        fail_msg("%s: %d afterwards", what, r);
    if (!r)
        assert_answer_is_right(what, changes[c].hole);
    assert_int_equal(tear_down(&state), 0);
    assert_int_equal(set_up(&state), 0);
}

static void a_change_at_any_step_is_noticed(void **state)
{
    static const uint64_t requests[] = {0, REQ_READ, REQ_WRITE};
    (void)state;
    for (unsigned c = 0; c < sizeof(changes) / sizeof(changes[0]); c++)
        for (unsigned p = 0; p < sizeof(points) / sizeof(points[0]); p++)
            for (unsigned n = 0; n < 3; n++)
                change_at_a_step(c, p, requests[n]);
}

/* A mapping that is replaced between looking at it and populating it: what is populated is the new one. */
static void map_read_only(void)
{
    mprotect(arena + FIRST * page, (LAST - FIRST) * page, PROT_READ);
}

static void protection_that_changes_unseen_does_not_hang(void **state)
{
    (void)state;
    madvise(arena + FIRST * page, (LAST - FIRST) * page, MADV_DONTNEED);
    range.default_flags = REQ_WRITE;
    range.notifier_seq = hmm_notifier_read_begin(&notifier);
    arm_point("range-looked", map_read_only);
    int r = hmm_range_fault(dev, &range);
    disarm_point(__func__);
    assert_true(r == -EPERM || r == -EFAULT); /* populating says the one, looking again the other */
    assert_int_equal(hmm_range_fault(dev, &range), -EPERM);
    assert_int_equal(mprotect(arena, bytes, PROT_READ | PROT_WRITE), 0);
    assert_int_equal(hmm_range_fault(dev, &range), 0);
}

/* By system calls that nobody hears of, the mapping not being registered yet. */
static void replace_unheard(void)
{
    char *p = arena + FIRST * page;
    size_t n = (LAST - FIRST) * page;
    syscall(SYS_munmap, p, n);
    syscall(SYS_mmap, p, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    memset(p, 7, n);
    syscall(SYS_mprotect, p, n, PROT_READ);
}

static void a_mapping_that_is_replaced_before_it_is_watched(void **state)
{
    (void)state;
    range.start = (uintptr_t)arena + FIRST * page;
    range.end = (uintptr_t)arena + LAST * page;
    range.notifier_seq = hmm_notifier_read_begin(&notifier);
    arm_point("range-queried", replace_unheard);
    assert_int_equal(hmm_range_fault(dev, &range), 0);
    disarm_point(__func__);
    for (unsigned i = 0; i < LAST - FIRST; i++)
        assert_int_equal(pfns[i], HMM_PFN_VALID | (range.start / page + i));
}

/* ---- pages in flight ---- */

static void *ask(void *arg)
{
    (void)arg;
    return (void *)(intptr_t)hmm_range_fault_timeout(dev, &range, -1);
}

static pthread_t asker;

/* The pages are in flight, and stay so for a while. */
static void ask_meanwhile(void)
{
    assert_int_equal(pthread_create(&asker, NULL, ask, NULL), 0);
    os_sleep(100 * MS);
}

static void pages_in_flight_are_waited_for(void **state)
{
    (void)state;
    void *result;
    arm_point("to-device-taken", ask_meanwhile);
    assert_int_equal(hmm_migrate_to_device(dev_handle, arena + FIRST * page, (LAST - FIRST) * page, NULL), 0);
    disarm_point(__func__);
    pthread_join(asker, &result);
    assert_int_equal((intptr_t)result, 0);
    for (unsigned i = 0; i < PAGES; i++)
        assert_int_equal(!!(pfns[i] & HMM_PFN_DEVICE), i >= FIRST && i < LAST);
    arm_point("to-system-departed", ask_meanwhile);
    assert_int_equal(hmm_migrate_to_system(arena, bytes, NULL), 0);
    disarm_point(__func__);
    pthread_join(asker, &result);
    assert_int_equal((intptr_t)result, 0);
    for (unsigned i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i], HMM_PFN_VALID | HMM_PFN_WRITE | ((uintptr_t)arena / page + i));
}

/* Nothing that is only asked about is waited for. */
static void look_only(void)
{
    range.default_flags = 0;
    range.flags = HMM_RANGE_DEVICE_ONLY;
    range.notifier_seq = hmm_notifier_seq(&notifier);
    assert_int_equal(hmm_range_fault(dev, &range), 0);
    for (unsigned i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i], 0);
}

static void pages_in_flight_are_not_there_yet(void **state)
{
    (void)state;
    arm_point("to-device-taken", look_only);
    assert_int_equal(hmm_migrate_to_device(dev_handle, arena + FIRST * page, (LAST - FIRST) * page, NULL), 0);
    disarm_point(__func__);
}

/* ---- deadlines ---- */

static uint64_t time_out(int64_t ns)
{
    uint64_t began = os_now();
    assert_int_equal(hmm_range_fault_timeout(dev, &range, ns), -ETIMEDOUT);
    return os_now() - began;
}

static void an_invalidation_that_does_not_end(void **state)
{
    (void)state;
    struct invalidation inv;
    notifier_begin(&dev->mm->notifiers, &inv, range.start, range.start + page, HMM_EVENT_PROTECTION_VMA, NULL);
    assert_in_range(time_out(0), 0, 5000 * MS);
    assert_in_range(time_out(150 * MS), 150 * MS, 5000 * MS);
    notifier_end(&dev->mm->notifiers, &inv);
    assert_int_equal(hmm_range_fault_timeout(dev, &range, 0), 0); /* one attempt there always is */
}

static unsigned attempts;

static void count_attempts(const char *point)
{
    attempts += strcmp(point, "snapshot-taken") == 0;
}

/* Pinned on another device: nothing changes that could be waited for. */
static void a_page_that_cannot_come_is_asked_for_with_pauses(void **state)
{
    (void)state;
    hmm_dev other;
    assert_int_equal(hmm_device_open("soft:memory=1M,engines=1", &other), 0);
    assert_int_equal(hmm_migrate_to_device(other, arena, page, NULL), 0);
    struct pagemap *pm = hmm_device_of(other)->pagemap;
    uint64_t at = 0;
    while (pagemap_pin(pm, at))
        at++;
    uint64_t pauses = dev->mm->stats.retries;
    attempts = 0;
    inject_point_hook = count_attempts;
    inject_points_on = 1;
    assert_in_range(time_out(400 * MS), 400 * MS, 5000 * MS);
    inject_points_on = 0;
    inject_point_hook = NULL;
    assert_true(attempts > 1);
    assert_in_range(dev->mm->stats.retries - pauses, attempts - 1, UINT64_MAX);
    assert_non_null(strstr(hmm_last_message(), "400 ms"));
    pagemap_unpin(pm, at);
    assert_int_equal(hmm_range_fault_timeout(dev, &range, 10000 * MS), 0);
    assert_int_equal(hmm_device_close(other), 0);
}

static uint32_t storming;

static void *storm(void *arg)
{
    (void)arg;
    while (__atomic_load_n(&storming, __ATOMIC_ACQUIRE)) {
        struct invalidation inv;
        notifier_begin(&dev->mm->notifiers, &inv, range.start, range.end, HMM_EVENT_CLEAR, NULL);
        notifier_end(&dev->mm->notifiers, &inv);
    }
    return NULL;
}

/* One invalidation after the other: no attempt succeeds, or one does by luck; it ends in time. */
static void invalidations_without_end(void **state)
{
    (void)state;
    pthread_t t[2];
    storming = 1;
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&t[i], NULL, storm, NULL), 0);
    for (unsigned i = 0; i < 10; i++) {
        uint64_t began = os_now();
        int r = hmm_range_fault_timeout(dev, &range, 50 * MS);
        assert_true(r == 0 || r == -ETIMEDOUT);
        assert_in_range(os_now() - began, 0, 10000 * MS);
    }
    __atomic_store_n(&storming, 0, __ATOMIC_RELEASE);
    for (unsigned i = 0; i < 2; i++)
        pthread_join(t[i], NULL);
}

static void remove_notifier(void)
{
    hmm_notifier_remove(&notifier);
}

static void a_notifier_that_is_removed_meanwhile(void **state)
{
    (void)state;
    arm_point("range-scanned", remove_notifier);
    assert_int_equal(hmm_range_fault_timeout(dev, &range, -1), -EINVAL);
    disarm_point(__func__);
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_change_at_any_step_is_noticed),
        T(protection_that_changes_unseen_does_not_hang),
        T(a_mapping_that_is_replaced_before_it_is_watched),
        T(pages_in_flight_are_waited_for),
        T(pages_in_flight_are_not_there_yet),
        T(a_page_that_cannot_come_is_asked_for_with_pauses),
        T(an_invalidation_that_does_not_end),
        T(invalidations_without_end),
        T(a_notifier_that_is_removed_meanwhile),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
