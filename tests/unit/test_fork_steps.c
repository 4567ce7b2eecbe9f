/* SPDX-License-Identifier: MIT */
/*
 * fork, met by something at exactly the wrong moment: while a child's memory is being filled, and between the moment at which the kernel
 * copies the address space and that at which we learn of it. HMM_TEST_FORK=handlers runs the same without EVENT_FORK. Children say by
 * their exit status what they found: 0 is right. What is right stands in shared memory.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "api/manager.h"
#include "debug/inject.h"
#include "live.h"

#define PAGES 64u
#define SECONDS_MAX 50 /* a hang is a failure */

static size_t page;
static char *arena, *away; /* PAGES each, in blocks of their own */
static uint8_t *oracle;    /* what arena held when it was filled; shared */
static hmm_dev dev;
static struct os_ops hooked;
static bool by_handlers;
static unsigned errors_logged;

static void count_errors(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level <= HMM_LOG_WARNING)
        fprintf(stderr, "library: %s\n", line);
    errors_logged += level == HMM_LOG_ERROR;
}

static size_t bytes(unsigned pages)
{
    return pages * page;
}

static int open_without_fork_event(uint64_t features, struct os_uffd *out)
{
    return features & UFFD_FEATURE_EVENT_FORK ? -EPERM : os_linux.uffd_open(features, out);
}

static void at_point(const char *point);
static void let_go(void);

static int set_up(void **state)
{
    const char *fork_by = getenv("HMM_TEST_FORK");
    (void)state;
    page = hmm_page_size();
    errors_logged = 0;
    alarm(SECONDS_MAX);
    hmm_set_log(count_errors, NULL);
    arena = live_reserve(LIVE_BLOCK);
    away = live_reserve(LIVE_BLOCK);
    oracle = mmap(NULL, bytes(PAGES), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    hooked = os_linux;
    by_handlers = fork_by && !strcmp(fork_by, "handlers");
    if (by_handlers)
        hooked.uffd_open = open_without_fork_event;
    os = &hooked;
    inject_point_hook = at_point;
    __atomic_store_n(&inject_points_on, 1, __ATOMIC_SEQ_CST);
    int r = hmm_device_open("soft:memory=8M,engines=2", &dev);
    if (r)
        fail_msg("open: %d, %s", r, hmm_last_message());
    assert_true(live_map(arena, bytes(PAGES)));
    live_fill(oracle, bytes(PAGES), 7);
    memcpy(arena, oracle, bytes(PAGES));
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    let_go(); /* a test that failed */
    hooked.page_alone = os_linux.page_alone;
    int violations = hmm_audit();
    int r = hmm_device_close(dev);
    inject_point_hook = NULL;
    inject_points_on = 0;
    os = &os_linux;
    munmap(arena, LIVE_BLOCK);
    munmap(away, LIVE_BLOCK);
    munmap(oracle, bytes(PAGES));
    hmm_set_log(NULL, NULL);
    alarm(0);
    return errors_logged || violations || r ? -1 : 0;
}

static void to_device(void)
{
    int r = hmm_migrate_to_device(dev, arena, bytes(PAGES), NULL);
    if (r)
        fail_msg("to device: %d, %s", r, hmm_last_message());
}

/* ---- points that hold up whoever passes them ---- */

static const char *held_point;
static void (*point_action)(void); /* or NULL: hold */
static uint32_t arrived, released;

static void at_point(const char *point)
{
    const char *wanted = __atomic_load_n(&held_point, __ATOMIC_SEQ_CST);
    if (!wanted || strcmp(point, wanted) || __atomic_fetch_add(&arrived, 1, __ATOMIC_SEQ_CST))
        return;
    if (point_action)
        point_action();
    else
        while (!__atomic_load_n(&released, __ATOMIC_SEQ_CST))
            usleep(100);
}

static void hold_at(const char *point, void (*action)(void))
{
    arrived = released = 0;
    point_action = action;
    __atomic_store_n(&held_point, point, __ATOMIC_SEQ_CST);
}

static void wait_arrival(void)
{
    while (!__atomic_load_n(&arrived, __ATOMIC_SEQ_CST))
        usleep(100);
}

static void let_go(void)
{
    __atomic_store_n(&released, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&held_point, NULL, __ATOMIC_SEQ_CST);
}

/* ---- children ---- */

static bool is_right(const char *at, unsigned first, unsigned end)
{
    return memcmp(at + bytes(first), oracle + bytes(first), bytes(end - first)) == 0;
}

static int look(void)
{
    return is_right(arena, 0, PAGES) ? 0 : 1;
}

/* fork() in a thread of its own: it returns when the child has everything. */
static struct {
    pthread_t thread;
    int (*child)(void);
    pid_t pid;
} forker;

static void *fork_here(void *arg)
{
    (void)arg;
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGSEGV, SIG_DFL);
        signal(SIGBUS, SIG_DFL);
        alarm(30);
        syscall(SYS_exit_group, forker.child());
    }
    forker.pid = pid;
    return NULL;
}

static void start_fork(int (*child)(void))
{
    forker.child = child;
    assert_int_equal(pthread_create(&forker.thread, NULL, fork_here, NULL), 0);
}

static int end_fork(void)
{
    int status;
    pthread_join(forker.thread, NULL);
    assert_true(forker.pid > 0);
    assert_int_equal(waitpid(forker.pid, &status, 0), forker.pid);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

/* ---- while a child is filled ---- */

static hmm_fence *fill_by_device(void *at)
{
    hmm_fence *fence;
    assert_int_equal(hmm_job_fill(dev, at, 0xee, bytes(PAGES), &fence), 0);
    return fence;
}

/* A job that the parent submits meanwhile must not write what the child is still to get. */
static void a_device_does_not_write_before_the_child_has_the_page(void **state)
{
    (void)state;
    to_device();
    hold_at("fork-fill", NULL);
    start_fork(look);
    wait_arrival();
    hmm_fence *fence = fill_by_device(arena);
    assert_int_equal(hmm_fence_wait(fence, 100000000), -EAGAIN);
    let_go();
    assert_int_equal(end_fork(), 0);
    assert_int_equal(hmm_fence_wait(fence, -1), 0);
    hmm_fence_put(fence);
    assert_int_equal((uint8_t)arena[5], 0xee);
}

/* Nor at the address to which the parent has remapped it. */
static void nor_at_another_address(void **state)
{
    (void)state;
    to_device();
    hold_at("fork-fill", NULL);
    start_fork(look);
    wait_arrival();
    assert_ptr_equal(mremap(arena, bytes(PAGES), bytes(PAGES), MREMAP_MAYMOVE | MREMAP_FIXED, away), away);
    hmm_fence *fence = fill_by_device(away);
    assert_int_equal(hmm_fence_wait(fence, 100000000), -EAGAIN);
    let_go();
    assert_int_equal(end_fork(), 0);
    assert_int_equal(hmm_fence_wait(fence, -1), 0);
    hmm_fence_put(fence);
}

/* What the parent does to its pages is no concern of the child: they come home, are written, dropped, unmapped. */
static void the_parent_does_what_it_likes_meanwhile(void **state)
{
    (void)state;
    to_device();
    hold_at("fork-fill", NULL);
    start_fork(look);
    wait_arrival();
    memset(arena, 1, bytes(PAGES / 4)); /* home */
    assert_int_equal(hmm_migrate_to_device(dev, arena, bytes(PAGES / 4), NULL), 0);
    madvise(arena + bytes(PAGES / 4), bytes(PAGES / 4), MADV_DONTNEED);
    munmap(arena + bytes(PAGES / 2), bytes(PAGES / 2));
    assert_true(live_map(away, bytes(PAGES)));
    memset(away, 2, bytes(PAGES)); /* and new pages take device memory */
    assert_int_equal(hmm_migrate_to_device(dev, away, bytes(PAGES), NULL), 0);
    let_go();
    assert_int_equal(end_fork(), 0);
    assert_int_equal(arena[bytes(1)], 1);
    assert_int_equal(arena[bytes(PAGES / 4)], 0);
}

static int drop_and_look(void)
{
    if (madvise(arena, bytes(PAGES / 2), MADV_DONTNEED))
        return 2;
    for (size_t i = 0; i < bytes(PAGES / 2); i++)
        if (arena[i])
            return 3;
    if (!is_right(arena, PAGES / 2, PAGES))
        return 4;
    return mremap(arena + bytes(PAGES / 2), bytes(PAGES / 2), bytes(PAGES / 2), MREMAP_MAYMOVE | MREMAP_FIXED, arena) !=
               arena ||
           memcmp(arena, oracle + bytes(PAGES / 2), bytes(PAGES / 2));
}

/* The child is in madvise() while its memory is to be filled: dropped memory stays dropped. */
static void what_the_child_drops_stays_dropped(void **state)
{
    (void)state;
    to_device();
    hold_at("fork-fill", NULL);
    start_fork(drop_and_look);
    wait_arrival();
    usleep(50000);
    let_go();
    assert_int_equal(end_fork(), 0);
}

static int fork_and_look(void)
{
    int status;
    pid_t pid = fork();
    if (pid == 0)
        syscall(SYS_exit_group, look());
    if (waitpid(pid, &status, 0) != pid || status)
        return 2;
    return look();
}

static void a_grandchild_that_comes_before_its_parent_is_filled(void **state)
{
    (void)state;
    to_device();
    hold_at("fork-fill", NULL);
    start_fork(fork_and_look);
    wait_arrival();
    usleep(50000);
    let_go();
    assert_int_equal(end_fork(), 0);
}

/* A migration whose copy fails puts the pages home, while a child is to get them from where they are staged. */
static void *migrate_and_fail(void *arg)
{
    (void)arg;
    assert_true(hmm_migrate_to_device(dev, arena, bytes(PAGES), NULL) < 0);
    return NULL;
}

static void fork_when_taken(void)
{
    hold_at("fork-fill", NULL);
    start_fork(look);
    wait_arrival();
}

static void a_migration_is_rolled_back_meanwhile(void **state)
{
    pthread_t migrator;
    (void)state;
    hold_at("to-device-taken", fork_when_taken);
    struct inject_config c = {.seed = 1, .permille[INJECT_DRIVER] = 1000};
    inject_start(&c);
    assert_int_equal(pthread_create(&migrator, NULL, migrate_and_fail, NULL), 0);
    pthread_join(migrator, NULL);
    inject_stop();
    assert_true(is_right(arena, 0, PAGES));
    let_go();
    assert_int_equal(end_fork(), 0);
    assert_true(is_right(arena, 0, PAGES));
}

static void *migrate(void *arg)
{
    (void)arg;
    to_device();
    return NULL;
}

/* One that succeeds: the device may write to the page as soon as it is there, but for the child. */
static void a_migration_lands_meanwhile(void **state)
{
    pthread_t migrator;
    (void)state;
    hold_at("to-device-taken", fork_when_taken);
    assert_int_equal(pthread_create(&migrator, NULL, migrate, NULL), 0);
    pthread_join(migrator, NULL);
    hmm_fence *fence = fill_by_device(arena);
    hmm_fence_wait(fence, 100000000);
    let_go();
    assert_int_equal(end_fork(), 0);
    assert_int_equal(hmm_fence_wait(fence, -1), 0);
    hmm_fence_put(fence);
}

/* What only a device had that is lost meanwhile is lost in the child, too: SIGBUS, never zeros. */
static void a_device_is_lost_meanwhile(void **state)
{
    (void)state;
    to_device();
    hold_at("fork-fill", NULL);
    start_fork(look);
    wait_arrival();
    struct hmm_device *device = device_get(dev);
    hmm_device_lost(device, HMM_LOST_MEMORY, "the test said so");
    device_put(device);
    let_go();
    assert_int_equal(end_fork(), -SIGBUS);
    errors_logged = 0; /* that the device is lost */
}

/* A device whose memory the process cannot see: its copy engine is asked. */
static void a_device_that_is_not_mapped(void **state)
{
    (void)state;
    struct hmm_device *device = device_get(dev);
    void *map = device->pagemap->desc.cpu_map;
    to_device();
    device->pagemap->desc.cpu_map = NULL;
    start_fork(look);
    assert_int_equal(end_fork(), 0);
    start_fork(fork_and_look);
    assert_int_equal(end_fork(), 0);
    device->pagemap->desc.cpu_map = map;
    device_put(device);
}

/* ---- events that are read out of order ---- */

static void unmap_all(void)
{
    munmap(arena, bytes(PAGES));
}

static void drop_all(void)
{
    madvise(arena, bytes(PAGES), MADV_DONTNEED);
}

static void move_all(void)
{
    mremap(arena, bytes(PAGES), bytes(PAGES), MREMAP_MAYMOVE | MREMAP_FIXED, away);
}

static void touch_all(void)
{
    for (size_t i = 0; i < bytes(PAGES); i += page)
        ((volatile char *)arena)[i] ^= 0x11;
}

/* In a thread that is there before the fork, which holds locks of the C library. */
static struct {
    pthread_t thread;
    void (*fn)(void);
    uint32_t go, begun;
} changer;

static void *change_here(void *arg)
{
    (void)arg;
    while (!__atomic_load_n(&changer.go, __ATOMIC_SEQ_CST))
        usleep(100);
    __atomic_store_n(&changer.begun, 1, __ATOMIC_SEQ_CST);
    changer.fn();
    return NULL;
}

static void start_changer(void (*fn)(void))
{
    changer.fn = fn;
    changer.go = changer.begun = 0;
    assert_int_equal(pthread_create(&changer.thread, NULL, change_here, NULL), 0);
}

static void begin_change(void)
{
    __atomic_store_n(&changer.go, 1, __ATOMIC_SEQ_CST);
    while (!__atomic_load_n(&changer.begun, __ATOMIC_SEQ_CST))
        usleep(100);
}

/* By event: the reader sees nothing until both the fork and the change are pending, and then the change first. */
static struct {
    uint32_t closed, fork_pending, open;
} gate;

static int read_change_first(int uffd, struct uffd_msg *msgs, unsigned n)
{
    if (!__atomic_load_n(&gate.closed, __ATOMIC_SEQ_CST))
        return os_linux.uffd_read(uffd, msgs, n);
    if (!__atomic_load_n(&gate.fork_pending, __ATOMIC_SEQ_CST) && os_linux.uffd_pending(uffd) == 1)
        __atomic_store_n(&gate.fork_pending, 1, __ATOMIC_SEQ_CST);
    if (!__atomic_load_n(&gate.open, __ATOMIC_SEQ_CST)) {
        usleep(200);
        return 0;
    }
    struct uffd_msg both[2];
    int got = 0;
    while (got < 2)
        got += os_linux.uffd_read(uffd, both + got, 1);
    assert_int_equal(both[0].event, UFFD_EVENT_FORK); /* else nothing was tried */
    msgs[0] = both[1];
    msgs[1] = both[0];
    __atomic_store_n(&gate.closed, 0, __ATOMIC_SEQ_CST);
    return 2;
}

static void fork_and_change_by_event(void (*fn)(void))
{
    memset(&gate, 0, sizeof(gate));
    start_changer(fn);
    hooked.uffd_read = read_change_first;
    __atomic_store_n(&gate.closed, 1, __ATOMIC_SEQ_CST);
    start_fork(look);
    while (!__atomic_load_n(&gate.fork_pending, __ATOMIC_SEQ_CST))
        usleep(100);
    begin_change();
    usleep(100000); /* it sleeps until its event is read */
    __atomic_store_n(&gate.open, 1, __ATOMIC_SEQ_CST);
    pthread_join(changer.thread, NULL);
}

static void change_now(void)
{
    begin_change();
    pthread_join(changer.thread, NULL);
}

/* By handlers: behind the fork, and before the window closes. */
static void fork_and_change_by_handlers(void (*fn)(void))
{
    start_changer(fn);
    hold_at("fork-window-close", change_now);
    start_fork(look);
    wait_arrival();
}

static void fork_and_change(void (*fn)(void))
{
    to_device();
    if (by_handlers)
        fork_and_change_by_handlers(fn);
    else
        fork_and_change_by_event(fn);
    assert_int_equal(end_fork(), 0);
    let_go();
}

static void an_unmap_after_the_fork(void **state)
{
    (void)state;
    fork_and_change(unmap_all);
}

static void a_drop_after_the_fork(void **state)
{
    (void)state;
    fork_and_change(drop_all);
}

static void a_remap_after_the_fork(void **state)
{
    (void)state;
    fork_and_change(move_all);
    assert_true(is_right(away, 0, PAGES));
}

/* By handlers only: by event nothing comes home before the fork is read. */
static void a_touch_after_the_fork(void **state)
{
    (void)state;
    if (!by_handlers)
        return;
    fork_and_change(touch_all);
    for (size_t i = 0; i < bytes(PAGES); i += page)
        assert_int_equal((uint8_t)arena[i], oracle[i] ^ 0x11);
}

/* The same before it: what was dropped then is not the child's. */
static int look_at_zeros(void)
{
    for (size_t i = 0; i < bytes(PAGES); i++)
        if (arena[i])
            return 1;
    return 0;
}

static void a_drop_before_the_fork(void **state)
{
    (void)state;
    to_device();
    touch_all(); /* pages that have come home before, too */
    drop_all();
    start_fork(look_at_zeros);
    assert_int_equal(end_fork(), 0);
}

/* While it is not known whether some other fork has come already, what is taken away is kept. It is none of a later fork's business. */
static int never_alone(int pagemap_fd, uintptr_t addr)
{
    (void)pagemap_fd;
    (void)addr;
    return 0;
}

static void what_was_mapped_anew_before_the_fork(void **state)
{
    (void)state;
    hooked.page_alone = never_alone;
    to_device();
    munmap(arena, bytes(PAGES));
    assert_true(live_map(arena, bytes(PAGES)));
    live_fill(oracle, bytes(PAGES), 8);
    memcpy(arena, oracle, bytes(PAGES));
    to_device();
    start_fork(look);
    assert_int_equal(end_fork(), 0);
    drop_all(); /* and of nothing there is nothing old */
    start_fork(look_at_zeros);
    assert_int_equal(end_fork(), 0);
    hooked.page_alone = os_linux.page_alone;
}

/* Pages that a child shares are made the parent's own before they can leave. Doing so may wait for a page that has left meanwhile, and so for
 * another migration, which may wait for ours: nothing of ours may be in flight. */
static unsigned populated;
static bool populated_in_flight;

static int look_then_advise(void *addr, size_t len, int advice)
{
    struct mm *mm = manager_use();
    for (unsigned i = 0; advice == OS_ADVISE_POPULATE_WRITE && i < mm->nflights; i++)
        for (unsigned k = 0; mm->flights[i]->staging && k < block_pages(); k++)
            populated_in_flight |= mm->flights[i]->home[k] != 0;
    populated += advice == OS_ADVISE_POPULATE_WRITE;
    manager_unuse();
    return os_linux.advise(addr, len, advice);
}

static int stay(void)
{
    pause();
    return 0;
}

static void pages_are_made_our_own_with_nothing_in_flight(void **state)
{
    (void)state;
    madvise(arena + bytes(PAGES / 2), bytes(PAGES / 2), MADV_DONTNEED); /* absent pages are taken at once */
    memset(oracle + bytes(PAGES / 2), 0, bytes(PAGES / 2));
    start_fork(stay);
    pthread_join(forker.thread, NULL);
    hooked.advise = look_then_advise;
    populated = 0;
    populated_in_flight = false;
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(dev, arena, bytes(PAGES), &res), 0);
    assert_int_equal(res.moved, PAGES);
    assert_int_equal(res.pinned + res.busy + res.already, 0);
    hooked.advise = os_linux.advise;
    assert_true(populated > 0); /* else nothing was tried */
    assert_false(populated_in_flight);
    kill(forker.pid, SIGKILL);
    assert_int_equal(waitpid(forker.pid, NULL, 0), forker.pid);
    assert_true(is_right(arena, 0, PAGES));
}

/* Whatever fails now and then: calls of the system, memory, the driver. Delays at every point. */
static void forks_while_calls_fail(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 40; seed++) {
        struct inject_config c = {
            .seed = seed, .permille = {[INJECT_OS] = 40, [INJECT_ALLOC] = 40, [INJECT_DRIVER] = 40, [INJECT_DELAY] = 40}};
        inject_start(&c);
        for (int i = 0; i < 3; i++) {
            hmm_migrate_to_device(dev, arena, bytes(PAGES), NULL);
            start_fork(i == 2 ? fork_and_look : look);
            int status = end_fork();
            if (status)
                fail_msg("seed %llu: %d (%s)", (unsigned long long)seed, status, inject_last());
        }
        inject_stop();
    }
    assert_true(is_right(arena, 0, PAGES));
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(a_device_does_not_write_before_the_child_has_the_page),
        TEST(nor_at_another_address),
        TEST(the_parent_does_what_it_likes_meanwhile),
        TEST(what_the_child_drops_stays_dropped),
        TEST(a_grandchild_that_comes_before_its_parent_is_filled),
        TEST(a_migration_is_rolled_back_meanwhile),
        TEST(a_migration_lands_meanwhile),
        TEST(a_device_is_lost_meanwhile),
        TEST(a_device_that_is_not_mapped),
        TEST(an_unmap_after_the_fork),
        TEST(a_drop_after_the_fork),
        TEST(a_remap_after_the_fork),
        TEST(a_touch_after_the_fork),
        TEST(a_drop_before_the_fork),
        TEST(what_was_mapped_anew_before_the_fork),
        TEST(pages_are_made_our_own_with_nothing_in_flight),
        TEST(forks_while_calls_fail),
    };
    return cmocka_run_group_tests_name("steps of fork", tests, NULL, NULL);
}
