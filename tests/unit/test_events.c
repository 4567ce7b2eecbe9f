/* SPDX-License-Identifier: MIT */
/*
 * What is left to do when events have been read: notes of memory that is about to be dropped, batches in limbo, reads that fail. And whom
 * nothing of it may hold up.
 */
#include <sys/prctl.h>

#include "base/futex.h"

#include "mm/event.h"
#include "watcher.h"

#define PAGES 32u

static struct os_ops hooked;

static int set_up(void **state)
{
    hooked = os_linux;
    os = &hooked;
    return watcher_set_up(state);
}

static int tear_down(void **state)
{
    int r = watcher_tear_down(state);
    os = &os_linux;
    return r;
}

struct core_call {
    struct call call;
    struct mm *mm;
    uintptr_t addr, end;
    void (*what)(struct core_call *c);
};

static void run_core(struct call *call)
{
    struct core_call *c = container_of(call, struct core_call, call);
    c->what(c);
}

static void core(void (*what)(struct core_call *c), const void *at, size_t len)
{
    struct core_call c = {
        .call.fn = run_core, .addr = (uintptr_t)at, .end = (uintptr_t)at + len, .what = what, .mm = manager_use()};
    assert_non_null(c.mm);
    manager_call(&c.call);
    manager_unuse();
}

static void call_prune(struct core_call *c)
{
    mm_prune(c->mm, c->addr, c->end);
}

static void call_watch(struct core_call *c)
{
    uintptr_t part_end;
    for (unsigned i = 0; mm_watch(c->mm, c->addr, c->end, WATCH_FREE, &part_end) == -EAGAIN; i++)
        mm_backoff(c->mm, i);
}

/* ---- notes ---- */

static uintptr_t fake_start, fake_end;

/* As if a thread were in MADV_DONTNEED, and had dropped nothing yet: with the next message that there is. */
static int read_and_remove(int uffd, struct uffd_msg *msgs, unsigned n)
{
    int got = os_linux.uffd_read(uffd, msgs, n - 1);
    if (got > 0 && fake_start) {
        memset(&msgs[got], 0, sizeof(msgs[got]));
        msgs[got].event = UFFD_EVENT_REMOVE;
        msgs[got].arg.remove.start = fake_start;
        msgs[got++].arg.remove.end = fake_end;
        fake_start = 0;
    }
    return got;
}

static void fake_remove(const void *at, size_t len)
{
    char *other = map_alone(page);
    other[0] = 1;
    to_device(other, page);
    fake_end = (uintptr_t)at + len;
    __atomic_store_n(&fake_start, (uintptr_t)at, __ATOMIC_SEQ_CST);
    assert_int_equal(*(volatile char *)other, 1); /* a fault, for the reader to read */
    assert_int_equal(__atomic_load_n(&fake_start, __ATOMIC_SEQ_CST), 0);
    munmap(other, page);
}

static uint32_t finish_held; /* 1: is to be held up; 2: is; 3: goes on */

static void hold_finish(const char *point)
{
    if (strcmp(point, "change-finish") != 0 || __atomic_load_n(&finish_held, __ATOMIC_SEQ_CST) != 1)
        return;
    __atomic_store_n(&finish_held, 2, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&finish_held, __ATOMIC_SEQ_CST) == 2)
        usleep(500);
}

static void the_end_of_a_call_leaves_what_was_dropped_since(void **state)
{
    static struct watcher w;
    struct hmm_migrate_result res = {.size = sizeof(res)};
    (void)state;
    hooked.uffd_read = read_and_remove;
    char *at = map_alone(PAGES * page);
    live_fill(at, PAGES * page, 1);
    uint32_t crc = crc_oracle(at, PAGES * page);
    watch(&w, at, PAGES * page);
    inject_point_hook = hold_finish;
    __atomic_store_n(&finish_held, 1, __ATOMIC_SEQ_CST);
    struct hmm_change change;
    hmm_change_begin(&change, HMM_CHANGE_CLEAR, at, PAGES * page);
    hmm_change_end(&change);
    while (__atomic_load_n(&finish_held, __ATOMIC_SEQ_CST) != 2)
        usleep(500);
    fake_remove(at, PAGES * page);
    __atomic_store_n(&finish_held, 3, __ATOMIC_SEQ_CST);
    usleep(50000);
    assert_int_equal(hmm_migrate_to_device(handle, at, PAGES * page, &res), 0);
    assert_int_equal(res.moved, 0);
    assert_int_equal(res.busy, PAGES);
    assert_int_equal(crc_oracle(at, PAGES * page), crc);
    unwatch(&w);
    munmap(at, PAGES * page);
}

static uintptr_t count_start, count_end;
static uint64_t scanned, scans;

static int count_scan(int fd, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n, uintptr_t *walked)
{
    int r = os_linux.pagemap_scan(fd, start, end, v, n, walked);
    if (start >= count_start && start < count_end) {
        __atomic_fetch_add(&scanned, *walked - start, __ATOMIC_SEQ_CST);
        __atomic_fetch_add(&scans, 1, __ATOMIC_SEQ_CST);
    }
    return r;
}

static void a_note_of_what_stays_costs_little_and_ends(void **state)
{
    static struct watcher w;
    size_t len = 8 * LIVE_BLOCK;
    (void)state;
    hooked.uffd_read = read_and_remove;
    hooked.pagemap_scan = count_scan;
    char *at = map_alone(len);
    memset(at, 1, len);
    watch(&w, at, len);
    core(call_watch, at, len);
    fake_remove(at, len);
    usleep(100000); /* limbo has looked often enough */
    count_start = (uintptr_t)at;
    count_end = (uintptr_t)at + len;
    scanned = scans = 0;
    core(call_prune, at, len);
    uint64_t early = scans, bytes = scanned;
    usleep(2000000);
    scanned = scans = 0;
    core(call_prune, at, len);
    uint64_t late = scans;
    unwatch(&w);
    munmap(at, len);
    count_start = count_end = 0;
    assert_true(early > 0);
    assert_true(bytes <= 2 * LIVE_BLOCK);
    assert_int_equal(late, 0);
}

/* ---- limbo ---- */

#define RANGES 12u
#define LIMBO_THREADS 3u

static uint32_t say_pending, asked;

static int pretend_pending(int uffd)
{
    __atomic_fetch_add(&asked, 1, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&say_pending, __ATOMIC_SEQ_CST) ? 1 : os_linux.uffd_pending(uffd);
}

static uintptr_t range_at[RANGES];

/* A batch that a thread takes and lands, and whose ranges it cannot prune. */
static void call_fill(struct core_call *c)
{
    rwlock_write_lock(&c->mm->as);
    struct limbo *l = limbo_filling(c->mm);
    for (unsigned i = 0; i < RANGES; i++)
        limbo_prune(l, range_at[i], range_at[i] + page);
    limbo_publish(c->mm, l);
    rwlock_write_unlock(&c->mm->as);
    for (bool empty = false; !empty; os_sleep(100000)) {
        rwlock_read_lock(&c->mm->as);
        mutex_lock(&c->mm->queue_lock);
        empty = l->state == LIMBO_FREE;
        mutex_unlock(&c->mm->queue_lock);
        rwlock_read_unlock(&c->mm->as);
    }
}

static void call_remap(struct core_call *c)
{
    rwlock_write_lock(&c->mm->as);
    struct limbo *l = limbo_filling(c->mm);
    l->remaps++;
    __atomic_fetch_add(&c->mm->remaps_pending, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&asked, 0, __ATOMIC_SEQ_CST);
    limbo_publish(c->mm, l);
    rwlock_write_unlock(&c->mm->as);
    mm_remaps_wait(c->mm);
}

static void a_remap_does_not_wait_for_what_cannot_be_pruned(void **state)
{
    char *at[RANGES];
    (void)state;
    hooked.uffd_pending = pretend_pending;
    for (unsigned i = 0; i < RANGES; i++) {
        at[i] = map_alone(page);
        at[i][0] = 1;
        to_device(at[i], page);
        range_at[i] = (uintptr_t)at[i];
    }
    __atomic_store_n(&say_pending, 1, __ATOMIC_SEQ_CST);
    for (unsigned i = 0; i < RANGES; i++)
        assert_int_equal(at[i][0], 1); /* home, and registered still */
    usleep(100000);
    for (unsigned i = 0; i < LIMBO_THREADS; i++)
        core(call_fill, at[0], page);
    core(call_remap, at[0], page);
    uint32_t n = __atomic_load_n(&asked, __ATOMIC_SEQ_CST);
    __atomic_store_n(&say_pending, 0, __ATOMIC_SEQ_CST);
    if (n > 2 * LIMBO_THREADS * RANGES)
        fail_msg("%u looks before the remap had landed", n);
    for (unsigned i = 0; i < RANGES; i++)
        munmap(at[i], page);
}

/* ---- a worker and a remap ---- */

static struct mm *the_mm;
static uint32_t remapped, passed;

/* The reader may not wait; the worker asks, and a remap comes meanwhile. */
static int remap_meanwhile(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    if (!event->blockable)
        return -EAGAIN;
    if (event->brief && !__atomic_exchange_n(&remapped, 1, __ATOMIC_SEQ_CST))
        __atomic_fetch_add(&the_mm->remaps_pending, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static void name_who_passes(const char *point)
{
    char name[16] = "";
    prctl(PR_GET_NAME, name);
    if (!strcmp(point, "to-system-quiet") && !strncmp(name, "hmm-fault", 10) && __atomic_load_n(&remapped, __ATOMIC_SEQ_CST))
        __atomic_store_n(&passed, 1, __ATOMIC_SEQ_CST);
}

static void *touch(void *at)
{
    return (void *)(uintptr_t) * (volatile uint8_t *)at;
}

static void a_worker_does_not_wait_for_a_remap(void **state)
{
    static const struct hmm_notifier_ops ops = {.invalidate = remap_meanwhile};
    struct hmm_notifier n;
    pthread_t thread;
    void *seen;
    (void)state;
    char *at = map_alone(page);
    at[0] = 9;
    to_device(at, page);
    the_mm = manager_use();
    assert_int_equal(hmm_notifier_insert(dev, &n, (uintptr_t)at, (uintptr_t)at + page, &ops), 0);
    inject_point_hook = name_who_passes;
    pthread_create(&thread, NULL, touch, at);
    for (int i = 0; i < 3000 && !__atomic_load_n(&passed, __ATOMIC_SEQ_CST); i++)
        usleep(1000);
    bool free_again = __atomic_load_n(&passed, __ATOMIC_SEQ_CST);
    __atomic_fetch_sub(&the_mm->remaps_pending, 1, __ATOMIC_SEQ_CST);
    futex_wake(&the_mm->remaps_pending, INT32_MAX);
    pthread_join(thread, &seen);
    assert_int_equal(hmm_notifier_remove(&n), 0);
    manager_unuse();
    munmap(at, page);
    assert_true(free_again);
    assert_int_equal((uintptr_t)seen, 9);
}

/* ---- reads that fail ---- */

static uint32_t failing, refused, held_lock;

static int read_fails(int uffd, struct uffd_msg *msgs, unsigned n)
{
    if (__atomic_load_n(&failing, __ATOMIC_SEQ_CST) && __atomic_fetch_sub(&failing, 1, __ATOMIC_SEQ_CST))
        return -ENOMEM;
    return os_linux.uffd_read(uffd, msgs, n);
}

static void look_at_locks(const char *point)
{
    if (strcmp(point, "events-refused") != 0)
        return;
    __atomic_fetch_add(&refused, 1, __ATOMIC_SEQ_CST);
    if (lock_held_ranks())
        __atomic_store_n(&held_lock, 1, __ATOMIC_SEQ_CST);
}

static char said[512];

static void keep_line(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level == HMM_LOG_ERROR)
        snprintf(said, sizeof(said), "%s", line);
}

static void a_read_that_fails_is_waited_for_without_a_lock(void **state)
{
    (void)state;
    hooked.uffd_read = read_fails;
    char *at = map_alone(page);
    at[0] = 5;
    to_device(at, page);
    hmm_set_log(keep_line, NULL);
    inject_point_hook = look_at_locks;
    __atomic_store_n(&failing, 3, __ATOMIC_SEQ_CST);
    assert_int_equal(at[0], 5);
    assert_int_equal(refused, 3);
    assert_int_equal(held_lock, 0);
    for (int i = 0; i < 2000 && !strstr(said, "cannot be read"); i++)
        usleep(1000);
    assert_non_null(strstr(said, "cannot be read"));
    munmap(at, page);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(the_end_of_a_call_leaves_what_was_dropped_since), TEST(a_note_of_what_stays_costs_little_and_ends),
        TEST(a_remap_does_not_wait_for_what_cannot_be_pruned), TEST(a_worker_does_not_wait_for_a_remap),
        TEST(a_read_that_fails_is_waited_for_without_a_lock),
    };
    return cmocka_run_group_tests_name("events", tests, NULL, NULL);
}
