/* SPDX-License-Identifier: MIT */
/*
 * fork, met by something at exactly the wrong moment: while a child's memory is being filled, and between the moment at which the kernel
 * copies the address space and that at which we learn of it. HMM_TEST_FORK=handlers runs the same without EVENT_FORK. Children say by
 * their exit status what they found: 0 is right. What is right stands in shared memory.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "api/manager.h"
#include "arena.h"
#include "points.h"

#define PAGES 64u
#define SECONDS_MAX 50 /* a hang is a failure */

static int set_up(void **state)
{
    (void)state;
    live_set_up(SECONDS_MAX);
    arena_set_up(PAGES);
    arm_point(NULL, NULL);
    open_spec("soft:memory=8M,engines=2");
    assert_true(live_map(arena, bytes(PAGES)));
    live_fill(oracle, bytes(PAGES), 7);
    memcpy(arena, oracle, bytes(PAGES));
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    release_point(); /* a test that failed */
    hooked.page_alone = os_linux.page_alone;
    bool good = live_tear_down();
    forget_point();
    arena_tear_down(PAGES);
    return good ? 0 : -1;
}

static void all_to_device(void)
{
    to_device(arena, bytes(PAGES));
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
    all_to_device();
    arm_point("fork-fill", NULL);
    start_fork(look);
    wait_point();
    hmm_fence *fence = fill_by_device(arena);
    assert_int_equal(hmm_fence_wait(fence, 100000000), -EAGAIN);
    release_point();
    assert_int_equal(end_fork(), 0);
    assert_int_equal(hmm_fence_wait(fence, -1), 0);
    hmm_fence_put(fence);
    assert_int_equal((uint8_t)arena[5], 0xee);
}

/* Nor at the address to which the parent has remapped it. */
static void nor_at_another_address(void **state)
{
    (void)state;
    all_to_device();
    arm_point("fork-fill", NULL);
    start_fork(look);
    wait_point();
    assert_ptr_equal(mremap(arena, bytes(PAGES), bytes(PAGES), MREMAP_MAYMOVE | MREMAP_FIXED, away), away);
    hmm_fence *fence = fill_by_device(away);
    assert_int_equal(hmm_fence_wait(fence, 100000000), -EAGAIN);
    release_point();
    assert_int_equal(end_fork(), 0);
    assert_int_equal(hmm_fence_wait(fence, -1), 0);
    hmm_fence_put(fence);
}

/* What the parent does to its pages is no concern of the child: they come home, are written, dropped, unmapped. */
static void the_parent_does_what_it_likes_meanwhile(void **state)
{
    (void)state;
    all_to_device();
    arm_point("fork-fill", NULL);
    start_fork(look);
    wait_point();
    memset(arena, 1, bytes(PAGES / 4)); /* home */
    assert_int_equal(hmm_migrate_to_device(dev, arena, bytes(PAGES / 4), NULL), 0);
    madvise(arena + bytes(PAGES / 4), bytes(PAGES / 4), MADV_DONTNEED);
    munmap(arena + bytes(PAGES / 2), bytes(PAGES / 2));
    assert_true(live_map(away, bytes(PAGES)));
    memset(away, 2, bytes(PAGES)); /* and new pages take device memory */
    assert_int_equal(hmm_migrate_to_device(dev, away, bytes(PAGES), NULL), 0);
    release_point();
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
    all_to_device();
    arm_point("fork-fill", NULL);
    start_fork(drop_and_look);
    wait_point();
    usleep(50000);
    release_point();
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
    all_to_device();
    arm_point("fork-fill", NULL);
    start_fork(fork_and_look);
    wait_point();
    usleep(50000);
    release_point();
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
    arm_point("fork-fill", NULL);
    start_fork(look);
    wait_point();
}

static void a_migration_is_rolled_back_meanwhile(void **state)
{
    pthread_t migrator;
    (void)state;
    arm_point("to-device-taken", fork_when_taken);
    struct inject_config c = {.seed = 1, .permille[INJECT_DRIVER] = 1000};
    inject_start(&c);
    assert_int_equal(pthread_create(&migrator, NULL, migrate_and_fail, NULL), 0);
    pthread_join(migrator, NULL);
    inject_stop();
    assert_true(is_right(arena, 0, PAGES));
    release_point();
    assert_int_equal(end_fork(), 0);
    assert_true(is_right(arena, 0, PAGES));
}

/* Two flights: staged pages that continue each other lie in two slots. */
static unsigned flights_taken;

static void fork_at_the_second(void)
{
    if (++flights_taken == 1) {
        __atomic_store_n(&point_hits, 0, __ATOMIC_SEQ_CST);
        return;
    }
    start_fork(look);
    assert_int_equal(end_fork(), 0); /* and the child has given back what it held */
}

static void a_migration_of_two_blocks_is_under_way(void **state)
{
    char *both = live_reserve(2 * LIVE_BLOCK), *at = both + LIVE_BLOCK - bytes(PAGES - 1), *usual = arena;
    (void)state;
    assert_true(live_map(at, bytes(PAGES)));
    memcpy(at, oracle, bytes(PAGES));
    arena = at;
    flights_taken = 0;
    arm_point("to-device-taken", fork_at_the_second);
    all_to_device();
    assert_int_equal(flights_taken, 2);
    assert_true(is_right(at, 0, PAGES));
    arena = usual;
    munmap(both, 2 * LIVE_BLOCK);
}

static void *migrate(void *arg)
{
    (void)arg;
    all_to_device();
    return NULL;
}

/* One that succeeds: the device may write to the page as soon as it is there, but for the child. */
static void a_migration_lands_meanwhile(void **state)
{
    pthread_t migrator;
    (void)state;
    arm_point("to-device-taken", fork_when_taken);
    assert_int_equal(pthread_create(&migrator, NULL, migrate, NULL), 0);
    pthread_join(migrator, NULL);
    hmm_fence *fence = fill_by_device(arena);
    hmm_fence_wait(fence, 100000000);
    release_point();
    assert_int_equal(end_fork(), 0);
    assert_int_equal(hmm_fence_wait(fence, -1), 0);
    hmm_fence_put(fence);
}

/* What only a device had that is lost meanwhile is lost in the child, too: SIGBUS, never zeros. */
static void a_device_is_lost_meanwhile(void **state)
{
    (void)state;
    all_to_device();
    arm_point("fork-fill", NULL);
    start_fork(look);
    wait_point();
    struct hmm_device *device = device_get(dev);
    hmm_device_lost(device, HMM_LOST_MEMORY, "the test said so");
    device_put(device);
    release_point();
    assert_int_equal(end_fork(), -SIGBUS);
    errors_logged = 0; /* that the device is lost */
}

/* A device whose memory the process cannot see: its copy engine is asked. */
static void a_device_that_is_not_mapped(void **state)
{
    (void)state;
    struct hmm_device *device = device_get(dev);
    void *map = device->pagemap->desc.cpu_map;
    all_to_device();
    device->pagemap->desc.cpu_map = NULL;
    start_fork(look);
    assert_int_equal(end_fork(), 0);
    start_fork(fork_and_look);
    assert_int_equal(end_fork(), 0);
    device->pagemap->desc.cpu_map = map;
    device_put(device);
}

/* ---- while a region is armed or given up ---- */

static struct {
    pthread_t thread;
    uint32_t go;
    bool before; /* the fork begins before the system call, or after it */
    uint32_t met;
} beside;

static void *fork_when_told(void *arg)
{
    while (!__atomic_load_n(&beside.go, __ATOMIC_SEQ_CST))
        usleep(50);
    return fork_here(arg);
}

/* Called under the lock that keeps the reader off. A fork by event is under way when its event is pending; one by handlers, or of memory
 * that is not registered, gets some time for it. */
static void fork_beside(int uffd)
{
    __atomic_store_n(&beside.go, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 100 && os_linux.uffd_pending(uffd) != 1; i++)
        usleep(200);
}

static bool beside_arena(uintptr_t start, size_t len)
{
    return start <= (uintptr_t)arena && (uintptr_t)arena < start + len &&
           !__atomic_exchange_n(&beside.met, 1, __ATOMIC_SEQ_CST);
}

static int register_beside_fork(int uffd, uintptr_t start, size_t len)
{
    bool now = beside_arena(start, len);
    if (now && beside.before)
        fork_beside(uffd);
    int r = os_linux.uffd_register(uffd, start, len);
    if (now && !beside.before)
        fork_beside(uffd);
    return r;
}

static int unregister_beside_fork(int uffd, uintptr_t start, size_t len)
{
    bool now = beside_arena(start, len);
    if (now && beside.before)
        fork_beside(uffd);
    int r = os_linux.uffd_unregister(uffd, start, len);
    if (now && !beside.before)
        fork_beside(uffd);
    return r;
}

static void get_ready_to_fork(bool before)
{
    memset(&beside, 0, sizeof(beside));
    beside.before = before;
    forker.child = look;
    assert_int_equal(pthread_create(&beside.thread, NULL, fork_when_told, NULL), 0);
    forker.thread = beside.thread;
}

static void expect_fork_was_met(void)
{
    for (int i = 0; i < 5000 && !__atomic_load_n(&beside.met, __ATOMIC_SEQ_CST); i++)
        usleep(1000);
    uint32_t met = __atomic_exchange_n(&beside.go, 1, __ATOMIC_SEQ_CST) && beside.met;
    assert_int_equal(end_fork(), 0);
    assert_true(met);
    assert_true(is_right(arena, 0, PAGES));
    assert_int_equal(hmm_audit(), 0);
}

static void while_a_region_is_armed(void **state)
{
    (void)state;
    for (int round = 0; round < 8; round++) {
        get_ready_to_fork(round % 2);
        hooked.uffd_register = register_beside_fork;
        all_to_device();
        expect_fork_was_met();
        hooked.uffd_register = os_linux.uffd_register;
        start_fork(look); /* and of what is away */
        assert_int_equal(end_fork(), 0);
        munmap(arena, bytes(PAGES));
        assert_true(live_map(arena, bytes(PAGES)));
        memcpy(arena, oracle, bytes(PAGES));
    }
}

static void while_a_region_is_given_up(void **state)
{
    (void)state;
    for (int round = 0; round < 8; round++) {
        all_to_device();
        get_ready_to_fork(round % 2);
        hooked.uffd_unregister = unregister_beside_fork;
        assert_int_equal(hmm_migrate_to_system(arena, bytes(PAGES), NULL), 0);
        expect_fork_was_met();
        hooked.uffd_unregister = os_linux.uffd_unregister;
    }
}

/* Two devices hold pages; the child gets what the second has as soon as that lets go, whatever the first does. */
struct holder {
    struct hmm_notifier notifier;
    uint32_t hold;
};

static int let_go_later(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct holder *h = container_of(n, struct holder, notifier);
    while (__atomic_load_n(&h->hold, __ATOMIC_ACQUIRE)) {
        if (event->brief || !event->blockable)
            return -EAGAIN;
        usleep(500);
    }
    return 0;
}

static char *higher;

static int look_higher(void)
{
    return memcmp(higher, oracle, bytes(PAGES)) != 0;
}

static void devices_are_not_waited_for_one_after_the_other(void **state)
{
    static const struct hmm_notifier_ops ops = {.invalidate = let_go_later};
    struct holder holders[2] = {{.hold = 0}, {.hold = 0}};
    char *lower = arena < away ? arena : away;
    struct timespec from, to;
    (void)state;
    if (by_handlers)
        return; /* the child does not run before it has everything */
    alarm(20);
    higher = arena < away ? away : arena;
    assert_true(live_map(away, bytes(PAGES)));
    memcpy(away, oracle, bytes(PAGES));
    all_to_device();
    assert_int_equal(hmm_migrate_to_device(dev, away, bytes(PAGES), NULL), 0);
    struct hmm_device *device = device_get(dev);
    hmm_notifier_insert(device, &holders[0].notifier, (uintptr_t)lower, (uintptr_t)lower + bytes(PAGES), &ops);
    hmm_notifier_insert(device, &holders[1].notifier, (uintptr_t)higher, (uintptr_t)higher + bytes(PAGES), &ops);
    holders[0].hold = holders[1].hold = 1;
    start_fork(look_higher);
    usleep(100000); /* now they are waited for */
    __atomic_store_n(&holders[1].hold, 0, __ATOMIC_RELEASE);
    clock_gettime(CLOCK_MONOTONIC, &from);
    assert_int_equal(end_fork(), 0);
    clock_gettime(CLOCK_MONOTONIC, &to);
    assert_true(to.tv_sec - from.tv_sec < 5); /* that it has ended is seen */
    __atomic_store_n(&holders[0].hold, 0, __ATOMIC_RELEASE);
    hmm_notifier_remove(&holders[0].notifier);
    hmm_notifier_remove(&holders[1].notifier);
    device_put(device);
}

static int do_nothing(void)
{
    return 0;
}

/* Nor does another fork() wait for that child. */
static void another_fork_does_not_wait_for_this_child(void **state)
{
    struct timespec from, to;
    int status;
    (void)state;
    all_to_device();
    arm_point("fork-fill", NULL);
    start_fork(look);
    wait_point();
    clock_gettime(CLOCK_MONOTONIC, &from);
    pid_t pid = fork();
    if (pid == 0)
        syscall(SYS_exit_group, look());
    clock_gettime(CLOCK_MONOTONIC, &to);
    release_point();
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    assert_int_equal(end_fork(), 0);
    assert_true(to.tv_sec - from.tv_sec < 5);
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
    arm_point("fork-window-close", change_now);
    start_fork(look);
    wait_point();
}

static void fork_and_change(void (*fn)(void))
{
    all_to_device();
    if (by_handlers)
        fork_and_change_by_handlers(fn);
    else
        fork_and_change_by_event(fn);
    assert_int_equal(end_fork(), 0);
    release_point();
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
    if (!by_handlers) {
        fprintf(stderr, "skipped: the kernel tells of the fork before anything can come home\n");
        skip();
    }
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
    all_to_device();
    touch_all(); /* pages that have come home before, too */
    drop_all();
    start_fork(look_at_zeros);
    assert_int_equal(end_fork(), 0);
}

/* The same by the thread that forks, while the reader has read its event and has not applied it yet. */
static void *drop_and_fork(void *arg)
{
    drop_all();
    return fork_here(arg);
}

static void a_drop_just_before_the_fork(void **state)
{
    (void)state;
    all_to_device();
    arm_point("events-read", NULL);
    forker.child = look_at_zeros;
    assert_int_equal(pthread_create(&forker.thread, NULL, drop_and_fork, NULL), 0);
    wait_point();
    usleep(100000); /* it is copied now, or waits for us */
    release_point();
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
    all_to_device();
    munmap(arena, bytes(PAGES));
    assert_true(live_map(arena, bytes(PAGES)));
    live_fill(oracle, bytes(PAGES), 8);
    memcpy(arena, oracle, bytes(PAGES));
    all_to_device();
    start_fork(look);
    assert_int_equal(end_fork(), 0);
    drop_all(); /* and of nothing there is nothing old */
    start_fork(look_at_zeros);
    assert_int_equal(end_fork(), 0);
    hooked.page_alone = os_linux.page_alone;
}

/* Who would have to wait for the marks of the attic holds everybody up: where mappings have run out that is not for long, and not each time. */
static unsigned marks_refused;

static int refuse_marks(int uffd, uintptr_t start, size_t len)
{
    (void)uffd, (void)start, (void)len;
    __atomic_fetch_add(&marks_refused, 1, __ATOMIC_SEQ_CST);
    return -ENOMEM;
}

static void marks_that_are_refused_are_not_waited_for(void **state)
{
    (void)state;
    if (by_handlers)
        return;
    all_to_device();
    marks_refused = 0;
    hooked.uffd_watch = refuse_marks;
    for (unsigned i = 0; i < 4; i++) {
        hooked.page_alone = never_alone;
        madvise(arena + bytes(i), page, MADV_DONTNEED); /* in doubt */
        usleep(20000);
        hooked.page_alone = os_linux.page_alone;
        usleep(50000); /* not any more */
    }
    hooked.uffd_watch = os_linux.uffd_watch;
    assert_true(marks_refused > 0); /* else nothing was tried */
    assert_true(marks_refused <= 5);
    assert_int_equal(errors_logged, 1);
    errors_logged = 0;
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

/* ---- at the end ---- */

static void *close_last(void *arg)
{
    (void)arg;
    assert_int_equal(hmm_device_close(dev), 0);
    return NULL;
}

/* The last device is closed when fork() has begun and the kernel has not copied anything. Its event wants a reader: something is
 * registered as long as there is doubt. */
static void the_last_device_is_closed_meanwhile(void **state)
{
    pthread_t closer;
    (void)state;
    alarm(10);
    all_to_device();
    memset(arena, 0, bytes(PAGES / 2)); /* home: what is dropped is not on the device, which is to be closed */
    hooked.page_alone = never_alone;
    madvise(arena, bytes(PAGES / 2), MADV_DONTNEED);
    arm_point("fork-before", NULL);
    start_fork(do_nothing);
    wait_point();
    assert_int_equal(pthread_create(&closer, NULL, close_last, NULL), 0);
    usleep(200000); /* it waits for the fork, or has stopped the reader */
    release_point();
    assert_int_equal(end_fork(), 0);
    pthread_join(closer, NULL);
    hooked.page_alone = os_linux.page_alone;
    assert_int_equal(hmm_device_open("soft:memory=8M,engines=2", &dev), 0);
}

/* A child that is stopped in the middle of a call takes nothing at the end, and no poison either: what it will read is said. What it lacks
 * is staged: no device is closed while a child wants pages of it. */
static int parents_uffd;

static int64_t refuse_copy(int uffd, uintptr_t dst, const void *src, size_t len)
{
    return uffd == parents_uffd ? os_linux.uffd_copy(uffd, dst, src, len) : -EAGAIN;
}

static int64_t refuse_poison(int uffd, uintptr_t dst, size_t len)
{
    return uffd == parents_uffd ? os_linux.uffd_poison(uffd, dst, len) : -EAGAIN;
}

static void fork_what_is_staged(pid_t *pid)
{
    pthread_t migrator;
    struct inject_config c = {.seed = 1, .permille[INJECT_DRIVER] = 1000};
    arm_point("to-device-taken", NULL);
    inject_start(&c);
    assert_int_equal(pthread_create(&migrator, NULL, migrate_and_fail, NULL), 0);
    wait_point();
    *pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL); /* nobody waits for its memory */
    if (*pid == 0)
        alarm(40);
    while (*pid == 0)
        syscall(SYS_pause);
    release_point();
    pthread_join(migrator, NULL);
    inject_stop();
}

static void what_a_stopped_child_will_read_is_said(void **state)
{
    char expected[64];
    pid_t pid;
    (void)state;
    if (by_handlers)
        return;
    parents_uffd = manager_use()->uffd.fd;
    manager_unuse();
    hooked.uffd_copy = refuse_copy;
    hooked.uffd_poison = refuse_poison;
    fork_what_is_staged(&pid);
    assert_int_equal(hmm_device_close(dev), 0);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_int_equal(errors_logged, 1);
    snprintf(expected, sizeof(expected), "but for %u that read as zeros", PAGES);
    assert_non_null(strstr(last_error, expected));
    errors_logged = 0;
    assert_int_equal(hmm_device_open("soft:memory=8M,engines=2", &dev), 0);
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
        TEST(a_migration_of_two_blocks_is_under_way),
        TEST(a_migration_lands_meanwhile),
        TEST(a_device_is_lost_meanwhile),
        TEST(a_device_that_is_not_mapped),
        TEST(while_a_region_is_armed),
        TEST(while_a_region_is_given_up),
        TEST(devices_are_not_waited_for_one_after_the_other),
        TEST(another_fork_does_not_wait_for_this_child),
        TEST(an_unmap_after_the_fork),
        TEST(a_drop_after_the_fork),
        TEST(a_remap_after_the_fork),
        TEST(a_touch_after_the_fork),
        TEST(a_drop_before_the_fork),
        TEST(a_drop_just_before_the_fork),
        TEST(what_was_mapped_anew_before_the_fork),
        TEST(marks_that_are_refused_are_not_waited_for),
        TEST(pages_are_made_our_own_with_nothing_in_flight),
        TEST(the_last_device_is_closed_meanwhile),
        TEST(what_a_stopped_child_will_read_is_said),
        TEST(forks_while_calls_fail),
    };
    return cmocka_run_group_tests_name("steps of fork", tests, NULL, NULL);
}
