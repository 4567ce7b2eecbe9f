/* SPDX-License-Identifier: MIT */
/*
 * What hmm_range_fault() has looked at is watched: no page of it need ever have been on a device, and yet the program's system calls, which
 * nobody announces here, are told to the notifier with their exact range; and the CPU's first touches cost nothing extra.
 */
#include <pthread.h>

#include <hmm/driver.h>

#include "support.h"
#include "unit/maps.h"

#define PAGES 64
#define FIRST 16u
#define LAST 24u
#define EVENTS_MAX 16
#define REQ_READ HMM_PFN_REQ_FAULT

static struct hmm_notifier notifier;
static uint64_t pfns[PAGES];
static size_t page, bytes;
static struct hmm_event events[EVENTS_MAX];
static uint32_t nevents;
static pthread_mutex_t record_lock = PTHREAD_MUTEX_INITIALIZER; /* several threads call */

static int record(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    pthread_mutex_lock(&record_lock);
    uint32_t i = nevents;
    if (i < EVENTS_MAX)
        events[i] = *event;
    __atomic_store_n(&nevents, i + 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&record_lock);
    return 0;
}

static const struct hmm_notifier_ops ops = {.invalidate = record, .name = "watch"};

static int look(const char *p, uint64_t request, unsigned flags)
{
    struct hmm_fault_range r = {
        .size = sizeof(r),
        .flags = flags,
        .notifier = &notifier,
        .start = (uintptr_t)p,
        .end = (uintptr_t)p + bytes,
        .pfns = pfns,
        .default_flags = request,
    };
    return hmm_range_fault_timeout(hmm_device_of(device), &r, JOB_SECONDS * 1000000000ll);
}

static void start_watching(const char *p, unsigned flags)
{
    nevents = 0;
    hmm_event_sync(hmm_device_of(device)); /* what stood here before is gone, for us, too */
    assert_int_equal(hmm_notifier_insert(hmm_device_of(device), &notifier, (uintptr_t)p, (uintptr_t)p + bytes, &ops), 0);
    assert_int_equal(look(p, 0, flags), 0);
}

/* What the call since start_watching() was told as; for mremap the kernel tells that it moved, and that its old place was unmapped. */
static void expect_event(const char *what, enum hmm_event_type type, const char *start, const char *end, uint32_t most)
{
    for (uint64_t until = now_ms() + JOB_SECONDS * 1000; !__atomic_load_n(&nevents, __ATOMIC_ACQUIRE) && now_ms() < until;)
        sleep_ms(1);
    uint32_t n = __atomic_load_n(&nevents, __ATOMIC_ACQUIRE);
    assert_in_range(n, 1, most);
    for (uint32_t i = 0; i < n; i++)
        if (events[i].type != type || events[i].start != (uintptr_t)start || events[i].end != (uintptr_t)end)
            fail_msg("%s: type %d of [%#lx, %#lx)", what, events[i].type, (unsigned long)events[i].start,
                     (unsigned long)events[i].end);
}

/* ---- what the program does ---- */

static char *target;

static void unmap(char *p)
{
    munmap(p + FIRST * page, (LAST - FIRST) * page);
}

static void map_over(char *p)
{
    mmap(p + FIRST * page, (LAST - FIRST) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

static void drop(char *p)
{
    madvise(p + FIRST * page, (LAST - FIRST) * page, MADV_DONTNEED);
}

static void release(char *p)
{
    madvise(p + FIRST * page, (LAST - FIRST) * page, MADV_FREE);
}

static void move(char *p)
{
    mremap(p + FIRST * page, (LAST - FIRST) * page, (LAST - FIRST) * page, MREMAP_MAYMOVE | MREMAP_FIXED,
           target + FIRST * page);
}

static const struct {
    const char *name;
    void (*action)(char *p);
    enum hmm_event_type type;
} calls[] = {
    {"munmap", unmap, HMM_EVENT_UNMAP},      {"mmap over", map_over, HMM_EVENT_UNMAP}, {"MADV_DONTNEED", drop, HMM_EVENT_CLEAR},
    {"MADV_FREE", release, HMM_EVENT_CLEAR}, {"mremap", move, HMM_EVENT_UNMAP},
};

static void each_call(char *(*map)(void), unsigned flags, bool only_shared)
{
    for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
        if (only_shared && calls[i].type == HMM_EVENT_CLEAR)
            continue; /* a shared mapping keeps its content: not a change of what the device sees */
        char *p = map();
        target = map_pages(bytes);
        start_watching(p, flags);
        uint64_t seq = hmm_notifier_seq(&notifier);
        calls[i].action(p);
        hmm_event_sync(hmm_device_of(device));
        if (!hmm_notifier_read_retry(&notifier, seq))
            fail_msg("%s: the sequence number did not move", calls[i].name);
        expect_event(calls[i].name, calls[i].type, p + FIRST * page, p + LAST * page, calls[i].action == move ? 2 : 1);
        assert_int_equal(hmm_notifier_remove(&notifier), 0);
        munmap(p, bytes);
        unmap_pages(target, bytes);
    }
}

static char *never_touched(void)
{
    return map_pages(bytes);
}

static char *touched(void)
{
    return memset(map_pages(bytes), 5, bytes);
}

static char *read_only(void)
{
    char *p = touched();
    assert_int_equal(mprotect(p, bytes, PROT_READ), 0);
    return p;
}

static char *shared(void)
{
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    memset(p, 5, bytes);
    return p;
}

static void calls_that_nobody_announces_are_seen(void **state)
{
    (void)state;
    each_call(touched, 0, false);
    each_call(never_touched, 0, false);
}

static void read_only_memory_is_watched(void **state)
{
    (void)state;
    each_call(read_only, 0, false);
}

static void shared_memory_is_watched_on_request(void **state)
{
    (void)state;
    each_call(shared, HMM_RANGE_REGISTER, true);
}

/* Memory that was not registered before is not slowed down by being watched. */
static void first_touches_cost_no_faults_of_ours(void **state)
{
    (void)state;
    char *p = never_touched();
    start_watching(p, 0);
    uint64_t before = stats_now().cpu_faults;
    for (size_t i = 0; i < PAGES; i++)
        p[i * page] = (char)i;
    assert_int_equal(stats_now().cpu_faults, before);
    assert_int_equal(look(p, REQ_READ, 0), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i], HMM_PFN_VALID | HMM_PFN_WRITE | ((uintptr_t)p / page + i));
    assert_int_equal(stats_now().cpu_faults, before);
    assert_int_equal(nevents, 0);
    assert_int_equal(hmm_notifier_remove(&notifier), 0);
    unmap_pages(p, bytes);
}

/* It was on a device, and is not any more: it is watched as before. */
static void memory_that_came_home_is_still_watched(void **state)
{
    (void)state;
    char *p = touched();
    start_watching(p, 0);
    assert_int_equal(hmm_migrate_to_device(device, p, bytes, NULL), 0);
    assert_int_equal(hmm_migrate_to_system(p, bytes, NULL), 0);
    for (uint64_t until = now_ms() + JOB_SECONDS * 1000; maps_look(p, bytes).missing && now_ms() < until;)
        sleep_ms(1);
    assert_int_equal(maps_look(p, bytes).missing, 0);
    assert_int_equal(maps_look(p, bytes).watched, bytes);
    uint64_t seq = hmm_notifier_read_begin(&notifier);
    drop(p);
    hmm_event_sync(hmm_device_of(device));
    assert_true(hmm_notifier_read_retry(&notifier, seq));
    assert_int_equal(hmm_notifier_remove(&notifier), 0);
    unmap_pages(p, bytes);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(calls_that_nobody_announces_are_seen),   TEST(read_only_memory_is_watched),
        TEST(shared_memory_is_watched_on_request),    TEST(first_touches_cost_no_faults_of_ours),
        TEST(memory_that_came_home_is_still_watched),
    };
    page = page_size();
    bytes = PAGES * page;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
