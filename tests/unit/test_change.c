/* SPDX-License-Identifier: MIT */
/*
 * Announced changes beyond the table of test_calls: who waits for whom, what a failed call leaves, what is freed at once, what costs
 * nothing, and what a device may do after mprotect.
 */
#include "common/uapi.h"
#include "points.h"
#include "watcher.h"

/* ---- who waits for whom ---- */

static struct {
    char *at;
    size_t len;
    uint32_t done;
} unmapping;

static void *unmap_it(void *arg)
{
    (void)arg;
    intptr_t r = hmm_munmap(unmapping.at, unmapping.len);
    __atomic_store_n(&unmapping.done, 1, __ATOMIC_RELEASE);
    return (void *)r;
}

static pthread_t start_unmapping(char *at, size_t len)
{
    pthread_t thread;
    unmapping.at = at;
    unmapping.len = len;
    unmapping.done = 0;
    pthread_create(&thread, NULL, unmap_it, NULL);
    return thread;
}

static void wait_until(const uint32_t *word, uint32_t value)
{
    while (__atomic_load_n(word, __ATOMIC_ACQUIRE) != value)
        usleep(200);
}

static uint32_t reader_runs;

static void *read_begin(void *arg)
{
    __atomic_store_n(&reader_runs, 1, __ATOMIC_RELEASE);
    return (void *)(uintptr_t)(hmm_notifier_read_begin(arg) != 0);
}

static void the_call_waits_for_the_device_and_others_do_not_wait_for_it(void **state)
{
    (void)state;
    static struct watcher w, other;
    char *p = mapped(MIB, 1), *q = mapped(MIB, 2);
    watch(&w, p, MIB);
    watch(&other, q, MIB);
    w.hold = 1;
    pthread_t thread = start_unmapping(p, MIB);
    wait_until(&w.held, 1);
    for (int i = 0; i < 20; i++) /* more than there are threads */
        assert_int_equal(hmm_mprotect(q, MIB, PROT_READ | PROT_WRITE), 0);
    assert_int_equal(watcher_saw(&other, HMM_EVENT_PROTECTION_VMA, q, MIB), 20);
    assert_int_equal(*(volatile char *)p, (char)random_mix(1)); /* the call was not made yet */
    assert_int_equal(unmapping.done, 0);
    w.hold = 0;
    void *r;
    pthread_join(thread, &r);
    assert_ptr_equal(r, NULL);
    assert_false(page_present(p));
    unwatch(&w);
    unwatch(&other);
    munmap(q, MIB);
}

static struct watcher in_call;

/* Between begin and end nobody may take hold of the range again, nor may anything of it leave for a device. */
static void nobody_takes_hold_of_it_during_the_call(void **state)
{
    (void)state;
    pthread_t thread, reader;
    struct hmm_migrate_result res = {.size = sizeof(res)};
    char *p = mapped(MIB, 3);
    watch(&in_call, p, MIB);
    arm_point("change-made", NULL);
    thread = start_unmapping(p, MIB / 2);
    wait_point();
    reader_runs = 0;
    pthread_create(&reader, NULL, read_begin, &in_call.notifier);
    wait_until(&reader_runs, 1);
    int migrated = hmm_migrate_to_device(handle, p, MIB, &res);
    usleep(50000);
    int waiting = pthread_tryjoin_np(reader, NULL);
    release_point();
    void *unmapped, *read = NULL;
    pthread_join(thread, &unmapped);
    if (waiting)
        pthread_join(reader, &read);
    assert_int_equal(migrated, 0);
    assert_int_equal(res.busy, MIB / 2 / page);
    assert_int_equal(res.moved, MIB / 2 / page);
    assert_int_equal(waiting, EBUSY);
    assert_ptr_equal(unmapped, NULL);
    assert_ptr_equal(read, (void *)1);
    unwatch(&in_call);
    munmap(p, MIB);
}

/* Nobody was there when the call began, so nobody was told. A device that comes then waits until it is over: of file memory it would
 * never hear. */
static void a_device_that_comes_during_a_silent_call_waits(void **state)
{
    (void)state;
    pthread_t thread, reader;
    char *p = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    arm_point("change-silent", NULL);
    thread = start_unmapping(p, MIB);
    wait_point();
    watch(&in_call, p, MIB);
    reader_runs = 0;
    pthread_create(&reader, NULL, read_begin, &in_call.notifier);
    wait_until(&reader_runs, 1);
    usleep(50000);
    int waiting = pthread_tryjoin_np(reader, NULL);
    release_point();
    void *read = NULL;
    if (waiting)
        pthread_join(reader, &read);
    pthread_join(thread, NULL);
    assert_int_equal(waiting, EBUSY);
    assert_ptr_equal(read, (void *)1);
    assert_int_equal(in_call.n, 0);
    unwatch(&in_call);
}

/* A device that never lets go does not keep the program from exec; when that fails, the device goes on. */
static void exec_waits_for_a_second_at_most(void **state)
{
    (void)state;
    static struct watcher w;
    char *p = mapped(MIB, 4), *args[] = {"x", NULL};
    struct timespec a, b;
    watch(&w, p, MIB);
    w.hold = 1;
    clock_gettime(CLOCK_MONOTONIC, &a);
    assert_int_equal(hmm_execve("/nowhere/at/all", args, args), -1);
    assert_int_equal(errno, ENOENT);
    clock_gettime(CLOCK_MONOTONIC, &b);
    assert_in_range((b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000, 900, 5000);
    w.hold = 0;
    assert_int_not_equal(hmm_notifier_read_begin(&w.notifier), 0); /* when the device is done, it is over */
    assert_true(w.n > 0 && w.event[0].type == HMM_EVENT_RELEASE);
    assert_int_equal(device_crc(p, MIB), crc_oracle(p, MIB));
    unwatch(&w);
    munmap(p, MIB);
}

/* ---- what is left, what is freed, what costs nothing ---- */

static void a_call_that_fails_loses_nothing(void **state)
{
    (void)state;
    static struct watcher w;
    char *p = mapped(MIB, 5);
    uint8_t *oracle = copy_of(p, MIB);
    watch(&w, p, MIB);
    to_device(p, MIB);
    errno = 0;
    assert_int_equal(hmm_munmap(p + 1, MIB), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(hmm_madvise(p, MIB, 12345), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(hmm_madvise(p, MIB, MADV_REMOVE), -1);
    assert_int_equal(errno, EINVAL);
    assert_ptr_equal(hmm_mmap(p, MIB, PROT_READ, MAP_PRIVATE | MAP_FIXED, -1, 0), MAP_FAILED);
    assert_int_equal(errno, EBADF);
    assert_ptr_equal(hmm_mremap(p, MIB, MIB, MREMAP_MAYMOVE | MREMAP_FIXED, p + page), MAP_FAILED);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(hmm_mprotect(p, MIB, 0x7000), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(on_device(p, MIB), MIB / page);
    assert_memory_equal(p, oracle, MIB);
    errno = 77;
    assert_int_equal(hmm_madvise(p, MIB, MADV_DONTNEED), 0);
    assert_int_equal(errno, 77); /* a call that succeeds does not touch it */
    unwatch(&w);
    munmap(p, MIB);
    free(oracle);
}

/* A call waits for that for 100 ms at most: one that took nearly so long says nothing. */
static unsigned calls_looked_at;

static void freed_to(uint64_t used, uint64_t began)
{
    bool prompt = os_now() - began < 90000000;
    for (int i = 0; !prompt && i < 5000 && used_bytes() != used; i++)
        usleep(1000);
    assert_int_equal(used_bytes(), used);
    calls_looked_at += prompt;
}

static void device_pages_are_free_when_the_call_returns(void **state)
{
    (void)state;
    calls_looked_at = 0;
    for (int round = 0; round < 20; round++) {
        char *p = mapped(4 * MIB, 6);
        to_device(p, 4 * MIB);
        assert_int_equal(used_bytes(), 4 * MIB);
        uint64_t began = os_now();
        assert_int_equal(hmm_madvise(p, MIB, MADV_DONTNEED), 0);
        freed_to(3 * MIB, began);
        began = os_now();
        assert_int_equal(hmm_munmap(p + MIB, MIB), 0);
        freed_to(2 * MIB, began);
        began = os_now();
        assert_ptr_equal(hmm_mmap(p + 2 * MIB, MIB, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), p + 2 * MIB);
        freed_to(MIB, began);
        began = os_now();
        assert_ptr_equal(hmm_mremap(p + 3 * MIB, MIB, page, 0), p + 3 * MIB);
        freed_to(page, began);
        began = os_now();
        hmm_munmap(p, 4 * MIB);
        freed_to(0, began);
    }
    assert_true(calls_looked_at > 0);
}

static uint64_t calls_counted(void)
{
    struct hmm_stats s = stats_now();
    return s.calls_unmap + s.calls_remove + s.calls_remap + s.calls_protect + s.calls_release;
}

/* Empty, or running over the end of the address space: nothing is announced, and the kernel's answer is the call's. */
static void ranges_that_make_no_sense_are_nothing(void **state)
{
    (void)state;
    static struct watcher w;
    struct hmm_change c;
    char *p = mapped(MIB, 40), *top = (char *)-(uintptr_t)page;
    uint8_t *oracle = copy_of(p, MIB);
    const struct {
        char *at;
        size_t len;
    } bad[] = {
        {p, 0},          {p, SIZE_MAX},       {p, -(size_t)p},  {p, SIZE_MAX - (size_t)p},
        {top, 2 * page}, {top + page - 1, 1}, {NULL, SIZE_MAX},
    };
    watch(&w, p, MIB);
    to_device(p, MIB);
    uint64_t before = calls_counted();
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        for (int kind = HMM_CHANGE_UNMAP; kind < HMM_CHANGE_DETACH; kind++) {
            hmm_change_begin(&c, kind, bad[i].at, bad[i].len);
            assert_int_equal(device_crc(p, MIB), crc_oracle(oracle, MIB)); /* it would wait for ever */
            hmm_change_end(&c);
            hmm_change_end(&c); /* it is over: nothing */
        }
    hmm_change_begin(&c, HMM_CHANGE_DETACH, top, 0);
    hmm_change_end(&c);
    assert_int_equal(hmm_munmap(p, SIZE_MAX), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(hmm_munmap(p, 0), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(hmm_munmap(top, 2 * page), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(hmm_madvise(p, SIZE_MAX, MADV_DONTNEED), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(hmm_mprotect(p, SIZE_MAX - page, PROT_READ), -1);
    assert_int_equal(errno, ENOMEM);
    assert_ptr_equal(hmm_mremap(p, SIZE_MAX, page, 0), MAP_FAILED);
    assert_ptr_equal(hmm_mmap(p, SIZE_MAX, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), MAP_FAILED);
    hmm_event_sync(dev);
    assert_int_equal(calls_counted(), before);
    assert_int_equal(w.n, 0);
    assert_int_equal(on_device(p, MIB), MIB / page);
    assert_memory_equal(p, oracle, MIB);
    unwatch(&w);
    munmap(p, MIB);
    free(oracle);
}

/* The kernel does it as far as it comes, and fails: so much is gone, for the device, too. */
static void a_call_that_fails_half_way_has_been_told(void **state)
{
    (void)state;
    static struct watcher w;
    char *p = mapped(MIB, 41), *last = p + MIB - page;
    uint8_t *oracle = copy_of(p, MIB);
    assert_int_equal(munmap(p + MIB, page), 0); /* a hole behind it */
    watch(&w, p, MIB);
    to_device(p, MIB);
    assert_int_equal(hmm_madvise(last, 2 * page, MADV_DONTNEED), -1);
    assert_int_equal(errno, ENOMEM);
    assert_true(watcher_saw(&w, HMM_EVENT_CLEAR, last, 2 * page) > 0);
    memset(oracle + MIB - page, 0, page);
    assert_int_equal(on_device(p, MIB), MIB / page - 1);
    assert_int_equal(device_crc(p, MIB), crc_oracle(oracle, MIB));
    assert_memory_equal(p, oracle, MIB);
    unwatch(&w);
    munmap(p, MIB);
    free(oracle);
}

static void memory_of_nobody_is_not_announced(void **state)
{
    (void)state;
    struct hmm_stats before = stats_now();
    for (int i = 0; i < 100; i++) {
        char *p = live_reserve(2 * MIB);
        assert_true(live_map(p, 2 * MIB));
        memset(p, 7, 2 * MIB);
        assert_int_equal(hmm_mprotect(p, MIB, PROT_READ), 0);
        assert_int_equal(hmm_madvise(p, MIB, MADV_DONTNEED), 0);
        assert_int_equal(hmm_munmap(p, 2 * MIB), 0);
    }
    struct hmm_stats after = stats_now();
    assert_int_equal(after.calls_unmap + after.calls_remove + after.calls_protect,
                     before.calls_unmap + before.calls_remove + before.calls_protect);
    assert_int_equal(after.events_unmap + after.events_remove, before.events_unmap + before.events_remove);
}

/* Registered, because a page of it was away: taken out of the registration before, so that the kernel need not wait for our reader. */
static void a_mapping_of_which_nothing_is_away_is_unmapped_without_an_event(void **state)
{
    (void)state;
    static struct watcher w;
    for (int announced = 0; announced < 2; announced++) {
        char *p = mapped(4 * MIB, 8);
        watch(&w, p, 4 * MIB);
        to_device(p + MIB, page);
        struct hmm_stats before = stats_now();
        if (announced)
            assert_int_equal(hmm_munmap(p + 2 * MIB, 2 * MIB), 0);
        else
            assert_int_equal(munmap(p + 2 * MIB, 2 * MIB), 0);
        hmm_event_sync(dev);
        struct hmm_stats after = stats_now();
        assert_int_equal(after.calls_unmap - before.calls_unmap, announced);
        assert_int_equal(after.events_unmap - before.events_unmap, !announced);
        assert_int_equal(on_device(p, 2 * MIB), 1);
        assert_int_equal(crc_oracle(p, 2 * MIB), device_crc(p, 2 * MIB));
        unwatch(&w);
        munmap(p, 2 * MIB);
    }
}

/* ---- mprotect ---- */

static int device_fill(char *at, size_t len, uint8_t value)
{
    hmm_fence *fence;
    assert_int_equal(hmm_job_fill(handle, at, value, len, &fence), 0);
    return finish(fence).status;
}

static int device_read(const char *at, size_t len)
{
    hmm_fence *fence;
    assert_int_equal(hmm_job_crc32c(handle, at, len, &fence), 0);
    return finish(fence).status;
}

static void a_device_obeys_mprotect(void **state)
{
    (void)state;
    char *p = mapped(MIB, 9);
    uint8_t *oracle = copy_of(p, MIB);
    assert_int_equal(device_fill(p, page, (uint8_t)p[0]), 0); /* in its table, with the right to write */
    memset(oracle, p[0], page);
    to_device(p, MIB);
    assert_int_equal(hmm_mprotect(p, MIB, PROT_READ), 0);
    assert_int_equal(on_device(p, MIB), MIB / page);
    assert_int_equal(device_fill(p, page, 1), -EACCES);
    assert_int_equal(device_fill(p + MIB / 2, page, 1), -EACCES);
    assert_int_equal(device_crc(p, MIB), crc_oracle(oracle, MIB));
    assert_memory_equal(p, oracle, MIB);
    assert_int_equal(hmm_mprotect(p, MIB, PROT_READ | PROT_WRITE), 0);
    to_device(p, MIB);
    assert_int_equal(hmm_mprotect(p, MIB, PROT_NONE), 0);
    assert_int_equal(device_read(p, MIB), -EACCES);
    assert_int_equal(device_fill(p, page, 1), -EACCES);
    assert_int_equal(hmm_mprotect(p, MIB, PROT_READ | PROT_WRITE), 0);
    assert_memory_equal(p, oracle, MIB);
    assert_int_equal(device_fill(p, page, 2), 0);
    assert_int_equal(p[1], 2);
    munmap(p, MIB);
    free(oracle);
}

static void a_device_obeys_guards(void **state)
{
    (void)state;
    char *p = mapped(MIB, 30);
    uint8_t *oracle = copy_of(p, MIB);
    to_device(p, MIB);
    if (hmm_madvise(p + MIB / 4, MIB / 4, MADV_GUARD_INSTALL)) {
        assert_int_equal(errno, EINVAL); /* Linux before 6.13 */
        skip();
    }
    assert_int_equal(on_device(p, MIB), (MIB - MIB / 4) / page);
    assert_int_equal(device_read(p + MIB / 4, MIB / 4), -EFAULT);
    assert_int_equal(device_fill(p + MIB / 4 + 5 * page, page, 1), -EFAULT);
    to_device(p, MIB / 4);
    assert_int_equal(device_crc(p, MIB / 4), crc_oracle(oracle, MIB / 4));
    assert_int_equal(madvise(p + MIB / 4, MIB / 4, MADV_GUARD_REMOVE), 0);
    memset(oracle + MIB / 4, 0, MIB / 4);
    assert_int_equal(device_crc(p, MIB), crc_oracle(oracle, MIB));
    assert_memory_equal(p, oracle, MIB);
    munmap(p, MIB);
    free(oracle);
}

static const char *protect_at;
static char *protected_part;
static uint32_t protect_now, protected_now;
static unsigned over_there; /* calls that were over while the migration stood at its point */

static void *protect(void *arg)
{
    (void)arg;
    wait_until(&protect_now, 1);
    intptr_t r = hmm_mprotect(protected_part, 16 * page, PROT_READ);
    __atomic_store_n(&protected_now, 1, __ATOMIC_RELEASE);
    return (void *)r;
}

static void hold_there(const char *point)
{
    if (strcmp(point, protect_at) != 0 || __atomic_exchange_n(&protect_now, 1, __ATOMIC_ACQ_REL))
        return;
    for (int i = 0; i < 300 && !__atomic_load_n(&protected_now, __ATOMIC_ACQUIRE); i++)
        usleep(1000);
    over_there += __atomic_load_n(&protected_now, __ATOMIC_ACQUIRE);
}

static void mprotect_in_the_middle_of_a_migration(void **state)
{
    (void)state;
    static const char *const points[] = {"to-device-take",      "to-device-taken",    "to-device-copied",
                                         "to-device-published", "to-system-departed", "to-system-quiet"};
    unsigned met = 0;
    over_there = 0;
    for (unsigned i = 0; i < sizeof(points) / sizeof(points[0]); i++) {
        pthread_t thread;
        void *r;
        bool home = strncmp(points[i], "to-system", 9) == 0;
        char *p = mapped(64 * page, 10 + i);
        uint8_t *oracle = copy_of(p, 64 * page);
        if (home)
            to_device(p, 64 * page);
        protect_at = points[i];
        protected_part = p + 24 * page;
        protect_now = protected_now = 0;
        inject_point_hook = hold_there;
        pthread_create(&thread, NULL, protect, NULL);
        assert_int_equal(home ? hmm_migrate_to_system(p, 64 * page, NULL) : hmm_migrate_to_device(handle, p, 64 * page, NULL),
                         0);
        met += protect_now;
        __atomic_store_n(&protect_now, 1, __ATOMIC_RELEASE);
        pthread_join(thread, &r);
        inject_point_hook = NULL;
        assert_ptr_equal(r, NULL);
        assert_int_equal(device_fill(protected_part + 3 * page, page, 1), -EACCES);
        assert_int_equal(device_crc(p, 64 * page), crc_oracle(oracle, 64 * page));
        assert_memory_equal(p, oracle, 64 * page);
        assert_int_equal(hmm_mprotect(protected_part, 16 * page, PROT_READ | PROT_WRITE), 0);
        assert_int_equal(device_fill(p, 64 * page, 3), 0);
        assert_int_equal(p[64 * page - 1] + p[30 * page], 6);
        munmap(p, 64 * page);
        free(oracle);
    }
    assert_int_equal(met, sizeof(points) / sizeof(points[0]));
    assert_true(over_there > 0); /* there are points at which the call does not wait */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        WATCHER_TEST(the_call_waits_for_the_device_and_others_do_not_wait_for_it),
        WATCHER_TEST(nobody_takes_hold_of_it_during_the_call),
        WATCHER_TEST(a_device_that_comes_during_a_silent_call_waits),
        WATCHER_TEST(exec_waits_for_a_second_at_most),
        WATCHER_TEST(a_call_that_fails_loses_nothing),
        WATCHER_TEST(ranges_that_make_no_sense_are_nothing),
        WATCHER_TEST(a_call_that_fails_half_way_has_been_told),
        WATCHER_TEST(device_pages_are_free_when_the_call_returns),
        WATCHER_TEST(memory_of_nobody_is_not_announced),
        WATCHER_TEST(a_mapping_of_which_nothing_is_away_is_unmapped_without_an_event),
        WATCHER_TEST(a_device_obeys_mprotect),
        WATCHER_TEST(a_device_obeys_guards),
        WATCHER_TEST(mprotect_in_the_middle_of_a_migration),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
