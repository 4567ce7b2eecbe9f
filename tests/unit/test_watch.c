/* SPDX-License-Identifier: MIT */
/*
 * Memory that is only mirrored: events of every kind reach a notifier, first touches are native, and nothing that the program writes is
 * lost. Then the orders of events that need care, made by hand; and mlockall().
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "api/manager.h"
#include "events.h"
#include "live_device.h"
#include "maps.h"

#define SECONDS_MAX 50
#define PAGES 64u

static struct hmm_device *device;

static void open_device(void)
{
    open_spec("soft:memory=32M,engines=1");
    device = hmm_device_of(dev);
}

static int set_up(void **state)
{
    (void)state;
    live_set_up(SECONDS_MAX);
    open_device();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    return live_tear_down() ? 0 : -1;
}

static uint64_t cpu_faults(void)
{
    struct hmm_stats s = {.size = sizeof(s)};
    assert_int_equal(hmm_stats(&s), 0);
    return s.cpu_faults;
}

/* ---- calls of the core, which need a library thread ---- */

struct watch_call {
    struct call call;
    struct mm *mm;
    uintptr_t addr, end, part_end;
    enum watch_how how;
    int result;
};

static void run_watch(struct call *call)
{
    struct watch_call *c = container_of(call, struct watch_call, call);
    unsigned attempt = 0;
    while ((c->result = mm_watch(c->mm, c->addr, c->end, c->how, &c->part_end)) == -EAGAIN)
        mm_backoff(c->mm, attempt++);
}

static int watch(const void *at, size_t len, enum watch_how how, size_t *part)
{
    struct watch_call c = {.call.fn = run_watch, .addr = (uintptr_t)at, .end = (uintptr_t)at + len, .how = how};
    c.mm = manager_use();
    assert_non_null(c.mm);
    manager_call(&c.call);
    manager_unuse();
    if (part)
        *part = c.part_end - c.addr;
    return c.result;
}

static void run_release(struct call *call)
{
    struct watch_call *c = container_of(call, struct watch_call, call);
    mm_release(c->mm, c->addr, c->end);
}

static void release(const void *at, size_t len)
{
    struct watch_call c = {.call.fn = run_release, .addr = (uintptr_t)at, .end = (uintptr_t)at + len};
    c.mm = manager_use();
    assert_non_null(c.mm);
    manager_call(&c.call);
    manager_unuse();
}

/* ---- a notifier that remembers ---- */

static struct {
    struct hmm_notifier n;
    uint32_t calls;
    struct hmm_event last;
} seen;

static int remember(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    seen.last = *event;
    __atomic_fetch_add(&seen.calls, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static void notify(const void *at, size_t len)
{
    static const struct hmm_notifier_ops ops = {.invalidate = remember, .name = "remember"};
    memset(&seen, 0, sizeof(seen));
    assert_int_equal(hmm_notifier_insert(device, &seen.n, (uintptr_t)at, (uintptr_t)at + len, &ops), 0);
}

static void expect_event(enum hmm_event_type type, const void *at, size_t len)
{
    for (int i = 0; i < 5000 && !__atomic_load_n(&seen.calls, __ATOMIC_SEQ_CST); i++)
        usleep(1000);
    assert_int_equal(seen.calls, 1);
    assert_int_equal(seen.last.type, type);
    assert_int_equal(seen.last.start, (uintptr_t)at);
    assert_int_equal(seen.last.end, (uintptr_t)at + len);
    __atomic_store_n(&seen.calls, 0, __ATOMIC_SEQ_CST);
}

static void events_of_watched_memory_are_told(void **state)
{
    (void)state;
    char *at = map_alone(PAGES * page), *to = map_alone(PAGES * page);
    size_t part;
    notify(at, PAGES * page);
    assert_int_equal(watch(at + page, 3 * page, WATCH_FREE, &part), 0);
    assert_int_equal(part, 3 * page);
    assert_int_equal(watch(at, 2 * PAGES * page, WATCH_FREE, &part), 0);
    assert_int_equal(part, PAGES * page); /* the whole mapping, and no more */
    struct maps_range m = maps_look(at, PAGES * page);
    assert_int_equal(m.watched, PAGES * page);
    assert_int_equal(m.missing + m.hidden_from_fork, 0);
    assert_int_equal(m.mappings, 1);
    madvise(at + 4 * page, 2 * page, MADV_DONTNEED);
    expect_event(HMM_EVENT_CLEAR, at + 4 * page, 2 * page);
    madvise(at + 7 * page, page, MADV_FREE);
    expect_event(HMM_EVENT_CLEAR, at + 7 * page, page);
    munmap(at, page);
    expect_event(HMM_EVENT_UNMAP, at, page);
    mremap(at + 8 * page, 8 * page, 8 * page, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    for (int i = 0; i < 5000 && __atomic_load_n(&seen.calls, __ATOMIC_SEQ_CST) < 2; i++)
        usleep(1000);
    assert_int_equal(seen.calls, 2); /* the pages go, and their place is unmapped */
    assert_int_equal(seen.last.start, (uintptr_t)at + 8 * page);
    assert_int_equal(seen.last.end, (uintptr_t)at + 16 * page);
    assert_int_equal(hmm_notifier_remove(&seen.n), 0);
    munmap(at, PAGES * page);
    munmap(to, PAGES * page);
}

static void first_touches_of_watched_memory_are_native(void **state)
{
    (void)state;
    size_t bytes = 8 * LIVE_BLOCK;
    char *at = map_alone(bytes);
    notify(at, bytes);
    assert_int_equal(watch(at, bytes, WATCH_FREE, NULL), 0);
    uint64_t before = cpu_faults();
    for (size_t i = 0; i < bytes; i += page)
        at[i] = (char)(i >> 12);
    for (size_t i = 0; i < bytes; i += page)
        assert_int_equal(at[i], (char)(i >> 12));
    assert_int_equal(cpu_faults(), before);
    assert_int_equal(hmm_notifier_remove(&seen.n), 0);
    munmap(at, bytes);
}

static struct maps_range wait_for(const void *at, size_t len, bool (*is)(const struct maps_range *))
{
    struct maps_range m = maps_look(at, len);
    for (int i = 0; i < 2000 && !is(&m); i++) {
        usleep(1000);
        m = maps_look(at, len);
    }
    return m;
}

static bool nothing_missing(const struct maps_range *m)
{
    return m->missing == 0;
}

static bool nothing_registered(const struct maps_range *m)
{
    return m->missing + m->watched == 0;
}

/* Armed and away, home again: watched as before, not a moment without; first touches are native again. Without notifier it goes with
 * the next event. */
static void what_has_been_away_is_watched_again(void **state)
{
    (void)state;
    size_t bytes = 4 * LIVE_BLOCK;
    char *at = map_alone(bytes);
    memset(at, 5, LIVE_BLOCK);
    notify(at, bytes);
    assert_int_equal(watch(at, bytes, WATCH_FREE, NULL), 0);
    to_device(at, LIVE_BLOCK);
    struct maps_range m = maps_look(at, bytes);
    assert_int_equal(m.missing, bytes);
    assert_int_equal(m.watched, 0);
    assert_int_equal(hmm_migrate_to_system(at, LIVE_BLOCK, NULL), 0);
    m = wait_for(at, bytes, nothing_missing);
    assert_int_equal(m.watched, bytes);
    assert_int_equal(m.hidden_from_fork, 0);
    uint64_t before = cpu_faults();
    for (size_t i = 0; i < bytes; i += page)
        assert_int_equal(at[i], i < LIVE_BLOCK ? 5 : 0);
    assert_int_equal(cpu_faults(), before);
    assert_int_equal(hmm_notifier_remove(&seen.n), 0);
    assert_int_equal(madvise(at + LIVE_BLOCK, page, MADV_DONTNEED), 0);
    m = wait_for(at, bytes, nothing_registered);
    assert_int_equal(m.watched + m.missing, 0);
    munmap(at, bytes);
}

/* A wrapper tells the notifiers itself, and wants no event; what is away is left to one. */
static void what_a_wrapper_releases_raises_no_event(void **state)
{
    (void)state;
    char *at = map_alone(4 * LIVE_BLOCK);
    memset(at, 6, 4 * LIVE_BLOCK);
    notify(at, 4 * LIVE_BLOCK);
    assert_int_equal(watch(at, 4 * LIVE_BLOCK, WATCH_FREE, NULL), 0);
    release(at + page, 2 * page);
    assert_int_equal(maps_look(at, 4 * LIVE_BLOCK).watched, 4 * LIVE_BLOCK - 2 * page);
    munmap(at + page, 2 * page);
    munmap(at + 5 * page, page); /* of what was not released: events come in their order, so this is the first */
    expect_event(HMM_EVENT_UNMAP, at + 5 * page, page);
    assert_int_equal(hmm_notifier_remove(&seen.n), 0);
    to_device(at + LIVE_BLOCK, page);
    release(at + LIVE_BLOCK, page);
    assert_int_equal(maps_look(at + LIVE_BLOCK, page).missing, page);
    assert_int_equal(at[LIVE_BLOCK], 6);
    munmap(at, 4 * LIVE_BLOCK);
}

static void each_kind_of_memory_is_watched_or_refused(void **state)
{
    (void)state;
    size_t len = 4 * page, part;
    char path[] = "/tmp/hmm-watch-XXXXXX";
    int mem = (int)syscall(319 /* memfd_create */, "watch", 0), file = mkstemp(path);
    assert_true(mem >= 0 && file >= 0 && ftruncate(mem, (off_t)len) == 0 && ftruncate(file, (off_t)len) == 0);
    struct {
        const char *name;
        int prot, flags, fd, free, asked;
    } kinds[] = {
        {"private", PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, 0},
        {"read-only", PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, 0},
        {"no access", PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, 0},
        {"executable", PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, 0},
        {"shared", PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, -EOPNOTSUPP, 0},
        {"memfd", PROT_READ | PROT_WRITE, MAP_SHARED, mem, -EOPNOTSUPP, 0},
        {"memfd, private", PROT_READ | PROT_WRITE, MAP_PRIVATE, mem, -EOPNOTSUPP, 0},
        {"file, shared", PROT_READ | PROT_WRITE, MAP_SHARED, file, -EOPNOTSUPP, -EOPNOTSUPP},
        {"file, private", PROT_READ | PROT_WRITE, MAP_PRIVATE, file, -EOPNOTSUPP, -EOPNOTSUPP},
    };
    char *place = live_reserve(LIVE_BLOCK);
    for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
        char *at = mmap(place, len, kinds[i].prot, kinds[i].flags | MAP_FIXED, kinds[i].fd, 0);
        assert_ptr_equal(at, place);
        notify(at, len);
        int free = watch(at, 2 * len, WATCH_FREE, &part);
        if (free != kinds[i].free || part != len)
            fail_msg("%s: %d for %zu pages", kinds[i].name, free, part / page);
        int asked = watch(at, 2 * len, WATCH_REGISTER, &part);
        if (asked != kinds[i].asked || part != len)
            fail_msg("%s, on request: %d for %zu pages", kinds[i].name, asked, part / page);
        assert_int_equal(maps_look(at, len).watched, asked ? 0 : len);
        munmap(at, len);
        if (!asked)
            expect_event(HMM_EVENT_UNMAP, at, len);
        assert_int_equal(watch(at, len, WATCH_REGISTER, &part), -ENOENT);
        assert_int_equal(hmm_notifier_remove(&seen.n), 0);
    }
    munmap(place, LIVE_BLOCK);
    close(mem);
    close(file);
    unlink(path);
}

/* ---- orders of events ---- */

/* Its touch of watched memory is native, so when the event is applied the caller may be back and have written. And it may not yet have
 * dropped anything: so what is there is not taken away from it. */
static void what_is_written_after_a_drop_stays(void **state)
{
    (void)state;
    hooked.uffd_read = read_and_remove;
    char *at = map_alone(PAGES * page), *other = map_alone(page);
    memset(at, 9, PAGES * page);
    notify(at, PAGES * page);
    assert_int_equal(watch(at, PAGES * page, WATCH_FREE, NULL), 0);
    other[0] = 1;
    to_device(other, page);
    expect_remove(at + 3 * page, page);
    assert_int_equal(*(volatile char *)other, 1); /* a fault, for the reader to read */
    assert_int_equal(__atomic_load_n(&fake_remove.start, __ATOMIC_SEQ_CST), 0);
    assert_true(page_present(at + 3 * page));
    assert_int_equal(at[3 * page], 9);
    assert_int_equal(to_device(at, PAGES * page).moved, PAGES - 1);
    assert_true(os_now() - fake_remove.read >= 20000000);
    for (unsigned i = 0; i < PAGES; i++)
        assert_int_equal(at[i * page], 9);
    assert_int_equal(hmm_notifier_remove(&seen.n), 0);
    munmap(at, PAGES * page);
    munmap(other, page);
}

/* An event that was not read is pending. */
static int held_is_pending(int uffd)
{
    return __atomic_load_n(&holding, __ATOMIC_SEQ_CST) == 2 ? 1 : os_linux.uffd_pending(uffd);
}

/* The unmap of what a remap left is told after the remap; another remap onto the place may be told in between. */
static void what_moves_to_where_another_has_left_stays(void **state)
{
    (void)state;
    hooked.uffd_read = read_held;
    hooked.uffd_pending = held_is_pending;
    char *a = map_alone(PAGES * page), *b = map_alone(PAGES * page), *away = map_alone(PAGES * page);
    live_fill(a, PAGES * page, 1);
    live_fill(b, PAGES * page, 2);
    uint32_t crc_a = crc_oracle(a, PAGES * page), crc_b = crc_oracle(b, PAGES * page);
    to_device(a, PAGES * page);
    to_device(b, PAGES * page);
    hold_unmap_of(a);
    assert_ptr_equal(mremap(a, PAGES * page, PAGES * page, MREMAP_MAYMOVE | MREMAP_FIXED, away), away);
    expect_holding(2);
    assert_ptr_equal(mremap(b, PAGES * page, PAGES * page, MREMAP_MAYMOVE | MREMAP_FIXED, a), a);
    expect_holding(3);
    assert_int_equal(hmm_audit(), 0);
    assert_int_equal(crc_oracle(a, PAGES * page), crc_b);
    assert_int_equal(crc_oracle(away, PAGES * page), crc_a);
    munmap(a, PAGES * page);
    munmap(away, PAGES * page);
    holding = 0;
}

/* ---- mlockall ---- */

static uint32_t stop_dropping;

static void *drop_main(void *arg)
{
    char *at = arg;
    while (!__atomic_load_n(&stop_dropping, __ATOMIC_RELAXED)) {
        at[0] = 1;
        madvise(at, 8 * page, MADV_DONTNEED);
    }
    return NULL;
}

/* In a child of its own: locked memory would stay. */
static int lock_everything(void)
{
    pthread_t thread;
    size_t pages = 600;
    char *early = map_alone(pages * page), *drops = map_alone(page * 16);
    alarm(30);
    signal(SIGALRM, SIG_DFL);
    open_device();
    memset(early, 3, pages * page);
    memset(drops, 4, 16 * page);
    to_device(drops + 8 * page, page); /* so that drops are discarded */
    pthread_create(&thread, NULL, drop_main, drops);
    to_device(early, pages * page);
    for (int i = 0; i < 30; i++)
        if (mlockall(MCL_CURRENT)) {
            perror("mlockall");
            return 2;
        }
    __atomic_store_n(&stop_dropping, 1, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    for (size_t i = 0; i < pages * page; i++)
        if (early[i] != 3)
            return 3;
    if (drops[8 * page] != 4)
        return 4;
    /* What is new is not locked, and goes to the device through slots that were filled. */
    for (int round = 0; round < 20; round++) {
        char *late = map_alone(pages * page);
        live_fill(late, pages * page, (uint64_t)round);
        uint32_t crc = crc_oracle(late, pages * page);
        if (to_device(late, pages * page).moved != pages)
            return 5;
        if (page_present(late) || crc_oracle(late, pages * page) != crc)
            return 6;
        munmap(late, pages * page);
    }
    return hmm_audit() ? 7 : hmm_device_close(dev) ? 8 : 0;
}

static void mlockall_ends_and_loses_nothing(void **state)
{
    int status;
    (void)state;
    page = hmm_page_size();
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        _exit(lock_everything());
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        fail_msg("the child ended with status %#x", status);
}

/* The first of arming: an event is unread, whose pages stood where the mapping stands now. */
static uintptr_t held_back;
static unsigned pendings, registered_too_early;

static int pending_at_first(int uffd)
{
    return __atomic_fetch_add(&pendings, 1, __ATOMIC_SEQ_CST) < 3 ? 1 : os_linux.uffd_pending(uffd);
}

static int register_counted(int uffd, uintptr_t start, size_t len)
{
    bool ours = start <= held_back && held_back < start + len;
    registered_too_early += ours && __atomic_load_n(&pendings, __ATOMIC_SEQ_CST) <= 3;
    return os_linux.uffd_register(uffd, start, len);
}

static void nothing_is_registered_while_an_event_is_pending(void **state)
{
    (void)state;
    char *at = map_alone(PAGES * page);
    live_fill(at, PAGES * page, 4);
    uint32_t crc = crc_oracle(at, PAGES * page);
    held_back = (uintptr_t)at;
    pendings = registered_too_early = 0;
    hooked.uffd_pending = pending_at_first;
    hooked.uffd_register = register_counted;
    assert_int_equal(to_device(at + 8 * page, 8 * page).moved, 8);
    struct maps_range m = maps_look(at, PAGES * page);
    assert_true(pendings > 3);
    assert_int_equal(registered_too_early, 0);
    assert_int_equal(m.mappings, 1);
    assert_int_equal(m.missing, PAGES * page);
    assert_int_equal(crc_oracle(at, PAGES * page), crc);
    munmap(at, PAGES * page);
}

/* The thread that drops has not run again since its event was read: giving back is tried again. */
static int pending_for_a_while(int uffd)
{
    return __atomic_fetch_add(&pendings, 1, __ATOMIC_SEQ_CST) < 4 ? 1 : os_linux.uffd_pending(uffd);
}

static void what_is_dropped_is_given_back_when_its_event_is_over(void **state)
{
    (void)state;
    char *at = map_alone(PAGES * page);
    memset(at, 1, PAGES * page);
    assert_int_equal(to_device(at, PAGES * page).moved, PAGES);
    __atomic_store_n(&pendings, 0, __ATOMIC_SEQ_CST);
    hooked.uffd_pending = pending_for_a_while;
    madvise(at, PAGES * page, MADV_DONTNEED);
    assert_int_equal(wait_for(at, PAGES * page, nothing_registered).missing, 0);
    assert_true(pendings > 4);
    assert_int_equal(at[page], 0);
    munmap(at, PAGES * page);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mlockall_ends_and_loses_nothing), /* first: it forks */
        TEST(events_of_watched_memory_are_told),
        TEST(first_touches_of_watched_memory_are_native),
        TEST(what_has_been_away_is_watched_again),
        TEST(what_a_wrapper_releases_raises_no_event),
        TEST(each_kind_of_memory_is_watched_or_refused),
        TEST(what_is_written_after_a_drop_stays),
        TEST(what_moves_to_where_another_has_left_stays),
        TEST(nothing_is_registered_while_an_event_is_pending),
        TEST(what_is_dropped_is_given_back_when_its_event_is_over),
    };
    return cmocka_run_group_tests_name("watch", tests, NULL, NULL);
}
