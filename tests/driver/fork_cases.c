/* SPDX-License-Identifier: MIT */
/*
 * See fork_cases.h. What children must find is in shared memory, written before anything migrates. A child says what it found by its
 * exit status: 0 is right.
 */
#include "fork_cases.h"

#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "support.h"

#define BYTES (4 * MIB)
#define FORKS 20
#define CHILD_SECONDS 60

static bool by_event;

/* ---- memory and what it holds -------------------------------------------------------------------------------------- */

static char *memory;   /* BYTES, of which every fourth page is absent, every fourth a zero page */
static uint8_t *truth; /* the same, shared */

static int setup(void **state)
{
    int r = setup_device(state);
    if (r)
        return r;
    memory = map_pages(BYTES);
    truth = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(truth, MAP_FAILED);
    for (size_t at = 0; at < BYTES; at += page_size()) {
        if (at / page_size() % 4 == 3)
            continue;
        if (at / page_size() % 4 == 2) {
            assert_int_equal(*(volatile char *)(memory + at), 0);
            continue;
        }
        fill_random(truth + at, page_size(), at + 1);
        memcpy(memory + at, truth + at, page_size());
    }
    return 0;
}

static int clean_up(void **state)
{
    unmap_pages(memory, BYTES);
    munmap(truth, BYTES);
    return teardown(state);
}

static void migrate(void *at, size_t len)
{
    int r = hmm_migrate_to_device(device, at, len, NULL);
    if (r)
        fail_msg("to the device: %d, %s", r, hmm_last_message());
}

static size_t on_device(const void *at, size_t len)
{
    return pages_in_state(at, len, HMM_PAGE_DEVICE);
}

static void assert_same(const void *at, const void *expected, size_t len, const char *who)
{
    for (size_t i = 0; i < len; i++)
        if (((const volatile uint8_t *)at)[i] != ((const uint8_t *)expected)[i])
            fail_msg("%s: byte %zu is %#x, not %#x", who, i, ((const uint8_t *)at)[i], ((const uint8_t *)expected)[i]);
}

/* ---- children ------------------------------------------------------------------------------------------------------- */

typedef void child_fn(void *arg);

static void be_child(child_fn *fn, void *arg)
{
    struct sigaction act = {.sa_handler = SIG_DFL};
    sigaction(SIGSEGV, &act, NULL); /* not cmocka's */
    sigaction(SIGBUS, &act, NULL);
    alarm(CHILD_SECONDS);
    fn(arg);
    syscall(SYS_exit_group, 0);
}

static pid_t start(child_fn *fn, void *arg)
{
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        be_child(fn, arg);
    return pid;
}

/* A child that no fork handler sees. */
static pid_t start_raw(child_fn *fn, void *arg)
{
    fflush(NULL);
    pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    assert_true(pid >= 0);
    if (pid == 0)
        be_child(fn, arg);
    return pid;
}

/* Its exit status, or minus the signal. */
static int status_of(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static int in_child(child_fn *fn, void *arg)
{
    return status_of(start(fn, arg));
}

static bool is_right(size_t from, size_t to)
{
    return memcmp(memory + from, truth + from, to - from) == 0;
}

static void look(void *arg)
{
    (void)arg;
    _exit(is_right(0, BYTES) ? 0 : 1);
}

/* What happens in children must not reach the parent, nor leave anything on the device. */
static void assert_parent_has_all(void)
{
    assert_same(memory, truth, BYTES, "the parent");
}

/* ---- content ----------------------------------------------------------------------------------------------------------- */

static void write_and_look(void *arg)
{
    int *pipes = arg;
    char word;
    if (!is_right(0, BYTES))
        _exit(1);
    memset(memory, 0x5a, BYTES);
    if (write(pipes[1], "w", 1) != 1 || read(pipes[2], &word, 1) != 1) /* now the parent has written, too */
        _exit(2);
    for (size_t i = 0; i < BYTES; i++)
        if (memory[i] != 0x5a)
            _exit(3);
    _exit(0);
}

static void both_have_the_data_and_write_independently(void **state)
{
    (void)state;
    int pipes[4];
    char word;
    assert_int_equal(pipe(pipes) + pipe(pipes + 2), 0);
    migrate(memory, BYTES);
    size_t there = on_device(memory, BYTES);
    pid_t pid = start(write_and_look, pipes);
    assert_int_equal(read(pipes[0], &word, 1), 1);
    assert_int_equal(on_device(memory, BYTES), there); /* nothing came home for it */
    assert_parent_has_all();
    memset(memory, 0x3c, BYTES);
    assert_int_equal(write(pipes[3], "w", 1), 1);
    assert_int_equal(status_of(pid), 0);
    for (size_t i = 0; i < BYTES; i++)
        assert_int_equal(memory[i], 0x3c);
    for (int i = 0; i < 4; i++)
        close(pipes[i]);
}

static void what_the_device_writes_after_fork_is_the_parents(void **state)
{
    (void)state;
    migrate(memory, BYTES);
    pid_t pid = start(look, NULL);
    device_fill(device, memory, 0x77, BYTES);
    assert_int_equal(status_of(pid), 0);
    for (size_t i = 0; i < BYTES; i += 511)
        assert_int_equal(memory[i], 0x77);
}

/* Every other page, a piece in huge pages, and a mapping that is read-only by now. */
static void all_kinds_of_pages(void **state)
{
    (void)state;
    for (size_t at = 0; at < BYTES; at += 2 * page_size())
        migrate(memory + at, page_size());
    assert_int_equal(mprotect(memory + MIB, MIB, PROT_READ), 0);
    assert_int_equal(in_child(look, NULL), 0);
    assert_int_equal(mprotect(memory + MIB, MIB, PROT_READ | PROT_WRITE), 0);
    assert_parent_has_all();
}

static char *huge;

static void look_at_huge(void *arg)
{
    (void)arg;
    _exit(memcmp(huge, truth, BLOCK) ? 1 : 0);
}

static void huge_pages(void **state)
{
    (void)state;
    huge = map_huge(2 * BLOCK);
    fill_random(truth, BLOCK, 9);
    memcpy(huge, truth, BLOCK);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(device, huge, 2 * BLOCK, &res), 0);
    assert_int_equal(res.moved, 2 * BLOCK / page_size());
    if (res.huge != res.moved) {
        unmap_pages(huge, 2 * BLOCK);
        fprintf(stderr, "skipped: the kernel split the huge pages\n");
        skip();
    }
    assert_int_equal(in_child(look_at_huge, NULL), 0);
    assert_same(huge, truth, BLOCK, "the parent");
    unmap_pages(huge, 2 * BLOCK);
    memset(truth, 0, BLOCK);
    memcpy(memory, truth, BLOCK); /* what clean-up compares nobody, but the next lines of a test may */
}

static void many_children_at_once(void **state)
{
    (void)state;
    pid_t pid[8];
    migrate(memory, BYTES);
    for (int i = 0; i < 8; i++)
        pid[i] = start(look, NULL);
    for (int i = 0; i < 8; i++)
        assert_int_equal(status_of(pid[i]), 0);
    assert_parent_has_all();
}

static void fork_and_look(void *arg)
{
    (void)arg;
    pid_t pid = fork();
    if (pid == 0)
        look(NULL);
    int status;
    bool right = is_right(0, BYTES);
    _exit(waitpid(pid, &status, 0) == pid && status == 0 && right ? 0 : 1);
}

static void a_grandchild_has_the_data(void **state)
{
    (void)state;
    migrate(memory, BYTES);
    for (int i = 0; i < 5; i++)
        assert_int_equal(in_child(fork_and_look, NULL), 0);
    assert_parent_has_all();
}

/* As a daemon does: the parent of the process that goes on ends at once. */
static void fork_and_end(void *arg)
{
    int *word = arg;
    hmm_dev dev;
    if (hmm_device_open(spec_with(NULL), &dev) || hmm_migrate_to_device(dev, memory, BYTES, NULL))
        _exit(1);
    if (fork() == 0) {
        usleep(20000); /* the parent is gone */
        bool right = is_right(0, BYTES);
        _exit(write(word[1], right ? "r" : "w", 1) == 1 ? 0 : 1);
    }
    _exit(0);
}

static void a_parent_may_end_at_once(void **state)
{
    (void)state;
    int word[2];
    char said = 0;
    assert_int_equal(pipe(word), 0);
    assert_int_equal(in_child(fork_and_end, word), 0);
    close(word[1]);
    assert_int_equal(read(word[0], &said, 1), 1);
    assert_int_equal(said, 'r');
    close(word[0]);
}

/* ---- what children do at once --------------------------------------------------------------------------------------------- */

static void call_exec(void *arg)
{
    (void)arg;
    execl("/bin/true", "true", NULL);
    _exit(1);
}

static void give_up_memory(void *arg)
{
    (void)arg;
    if (munmap(memory, MIB) || madvise(memory + MIB, MIB, MADV_DONTNEED))
        _exit(1);
    for (size_t i = 0; i < MIB; i += 64)
        if (memory[MIB + i])
            _exit(2);
    char *fresh = mmap(memory, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (size_t i = 0; i < MIB; i += 64)
        if (fresh[i])
            _exit(3);
    char *moved = mremap(memory + 2 * MIB, MIB, MIB, MREMAP_MAYMOVE | MREMAP_FIXED, memory);
    if (moved != memory || memcmp(moved, truth + 2 * MIB, MIB))
        _exit(4);
    _exit(is_right(3 * MIB, BYTES) ? 0 : 5);
}

static void close_all(void *arg)
{
    syscall(SYS_close_range, 3, ~0u, 0);
    look(arg);
}

static void children_do_what_they_like_at_once(void **state)
{
    (void)state;
    migrate(memory, BYTES);
    for (int i = 0; i < FORKS; i++) {
        assert_int_equal(in_child(call_exec, NULL), 0);
        assert_int_equal(in_child(give_up_memory, NULL), 0);
        assert_int_equal(in_child(close_all, NULL), 0);
        pid_t pid = start(look, NULL);
        usleep(i * 50);
        kill(pid, SIGKILL);
        int status = status_of(pid);
        assert_true(status == 0 || status == -SIGKILL);
    }
    assert_parent_has_all();
}

static void use_a_device(void *arg)
{
    (void)arg;
    hmm_dev dev;
    if (hmm_migrate_to_system(memory, BYTES, NULL) != -ESRCH)
        _exit(1);
    if (hmm_device_open(spec_with(NULL), &dev))
        _exit(2);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    if (hmm_migrate_to_device(dev, memory, BYTES, &res))
        _exit(3);
    if (res.moved != BYTES / page_size())
        _exit(4);
    if (!is_right(0, BYTES))
        _exit(5);
    _exit(hmm_device_close(dev) ? 6 : 0);
}

static void a_child_may_use_devices_of_its_own(void **state)
{
    (void)state;
    migrate(memory, BYTES);
    for (int i = 0; i < 3; i++)
        assert_int_equal(in_child(use_a_device, NULL), 0);
    assert_parent_has_all();
}

/* ---- what the program asked for ---------------------------------------------------------------------------------------------- */

static void look_at_wiped(void *arg)
{
    (void)arg;
    for (size_t i = 0; i < MIB; i++)
        if (memory[i])
            _exit(1);
    _exit(is_right(MIB, BYTES) ? 0 : 2);
}

static void memory_to_be_wiped_is_wiped(void **state)
{
    (void)state;
    assert_int_equal(madvise(memory, MIB, MADV_WIPEONFORK), 0);
    migrate(memory, BYTES);
    assert_int_equal(in_child(look_at_wiped, NULL), 0);
    assert_int_equal(madvise(memory, MIB, MADV_KEEPONFORK), 0);
    assert_parent_has_all();
}

static void touch(void *arg)
{
    _exit(*(volatile char *)arg == 0 ? 100 : 101);
}

static void look_behind(void *arg)
{
    (void)arg;
    _exit(is_right(MIB, BYTES) ? 0 : 2);
}

static void memory_to_be_kept_is_not_there(void **state)
{
    (void)state;
    assert_int_equal(madvise(memory, MIB, MADV_DONTFORK), 0);
    migrate(memory, BYTES);
    assert_int_equal(in_child(touch, memory + page_size()), -SIGSEGV);
    assert_int_equal(in_child(look_behind, NULL), 0);
    assert_parent_has_all();
}

/* Without the right to be told, a child that nobody sees does not have the memory, and never zeros for it. */
static void a_raw_clone_has_the_data_or_no_memory(void **state)
{
    (void)state;
    migrate(memory, BYTES);
    for (int i = 0; i < 5; i++)
        assert_int_equal(status_of(start_raw(look, NULL)), by_event ? 0 : -SIGSEGV);
    for (int i = 0; i < FORKS && by_event; i++) {
        assert_int_equal(status_of(start_raw(give_up_memory, NULL)), 0);
        assert_int_equal(status_of(start_raw(fork_and_look, NULL)), 0);
    }
    assert_parent_has_all();
}

/* ---- what is no fork ---------------------------------------------------------------------------------------------------------- */

static void *no_work(void *arg)
{
    return arg;
}

static void vfork_spawn_and_threads_cost_nothing(void **state)
{
    (void)state;
    char *argv[] = {"true", NULL};
    pthread_t thread;
    pid_t pid;
    migrate(memory, BYTES);
    struct hmm_stats before = stats_now();
    for (int i = 0; i < 10; i++) {
        assert_int_equal(posix_spawn(&pid, "/bin/true", NULL, NULL, argv, NULL), 0);
        assert_int_equal(status_of(pid), 0);
        if ((pid = vfork()) == 0)
            _exit(0);
        assert_int_equal(status_of(pid), 0);
        assert_int_equal(pthread_create(&thread, NULL, no_work, NULL), 0);
        pthread_join(thread, NULL);
    }
    struct hmm_stats after = stats_now();
    assert_int_equal(after.events_fork, before.events_fork);
    assert_int_equal(after.forks, before.forks);
    assert_int_equal(after.calls_fork, before.calls_fork);
    assert_int_equal(after.pages_to_children, before.pages_to_children);
    assert_int_equal(in_child(look, NULL), 0); /* while this does */
    after = stats_now();
    assert_int_equal(after.forks, before.forks + 1);
    assert_int_equal(after.calls_fork, before.calls_fork + 1);
    assert_int_equal(after.events_fork, before.events_fork + by_event);
    assert_in_range(after.pages_to_children, BYTES / page_size() / 2, BYTES / page_size());
}

/* ---- while everything moves ------------------------------------------------------------------------------------------------------ */

static volatile uint32_t stop;

/* First MiB: migrated there and back. */
static void *migrate_for_ever(void *arg)
{
    while (!stop) {
        hmm_migrate_to_device(device, memory, MIB, NULL);
        hmm_migrate_to_system(memory, MIB, NULL);
    }
    return arg;
}

/* Second: touched and migrated. */
static void *touch_for_ever(void *arg)
{
    uint64_t random = 5;
    while (!stop) {
        size_t at = MIB + random_next(&random) % MIB;
        if (((volatile uint8_t *)memory)[at] != truth[at])
            return memory;
        hmm_migrate_to_device(device, memory + MIB + random_next(&random) % MIB, 1, NULL);
    }
    return arg;
}

/* Third: used by jobs. */
static void *run_jobs(void *arg)
{
    while (!stop)
        if (device_crc(device, memory + 2 * MIB, MIB) != crc_oracle(truth + 2 * MIB, MIB))
            return memory;
    return arg;
}

static void forks_while_everything_moves(void **state)
{
    (void)state;
    void *(*const fns[])(void *) = {migrate_for_ever, touch_for_ever, run_jobs};
    pthread_t thread[3];
    migrate(memory, BYTES);
    stop = 0;
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, fns[i], NULL), 0);
    int wrong = 0;
    for (int i = 0; i < 2 * FORKS; i++)
        wrong += in_child(i % 4 ? look : fork_and_look, NULL) != 0;
    stop = 1;
    for (int i = 0; i < 3; i++) {
        void *result;
        pthread_join(thread[i], &result);
        assert_null(result);
    }
    assert_int_equal(wrong, 0);
    assert_parent_has_all();
}

/* Memory that others unmap, drop and remap in the parent is the child's as it was. */
static void *change_for_ever(void *arg)
{
    char *place = arg;
    while (!stop) {
        char *p = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(p, 1, MIB);
        hmm_migrate_to_device(device, p, MIB, NULL);
        p = mremap(p, MIB, MIB, MREMAP_MAYMOVE | MREMAP_FIXED, place);
        madvise(p, MIB / 2, MADV_DONTNEED);
        munmap(p, MIB);
    }
    return NULL;
}

static void forks_while_others_unmap(void **state)
{
    (void)state;
    pthread_t thread[2];
    char *place = map_pages(4 * MIB);
    migrate(memory, BYTES);
    stop = 0;
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, change_for_ever, place + 2 * i * MIB), 0);
    int wrong = 0;
    for (int i = 0; i < 2 * FORKS; i++)
        wrong += in_child(look, NULL) != 0;
    stop = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
    assert_int_equal(wrong, 0);
    assert_parent_has_all();
    unmap_pages(place, 4 * MIB);
}

/* ---- limits ------------------------------------------------------------------------------------------------------------------------ */

static void no_room_is_kept_when_children_are_done(void **state)
{
    (void)state;
    migrate(memory, BYTES);
    for (int i = 0; i < 5; i++)
        assert_int_equal(in_child(call_exec, NULL), 0);
    assert_int_equal(hmm_migrate_to_system(memory, BYTES, NULL), 0);
    struct hmm_device_info info = {.size = sizeof(info)};
    for (uint64_t until = now_ms() + 5000; now_ms() < until; sleep_ms(1)) { /* the attic is emptied a little later */
        assert_int_equal(hmm_device_info(device, &info), 0);
        if (info.used_bytes == 0)
            break;
    }
    assert_int_equal(info.used_bytes, 0);
}

int fork_cases(const char *name, bool event)
{
#if defined(__SANITIZE_ADDRESS__)
    printf("skipped: AddressSanitizer's own memory is not in a child as it should be\n");
    return 77;
#endif
#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, clean_up)
    const struct CMUnitTest tests[] = {
        CASE(both_have_the_data_and_write_independently),
        CASE(what_the_device_writes_after_fork_is_the_parents),
        CASE(all_kinds_of_pages),
        CASE(huge_pages),
        CASE(many_children_at_once),
        CASE(a_grandchild_has_the_data),
        CASE(a_parent_may_end_at_once),
        CASE(children_do_what_they_like_at_once),
        CASE(a_child_may_use_devices_of_its_own),
        CASE(memory_to_be_wiped_is_wiped),
        CASE(memory_to_be_kept_is_not_there),
        CASE(a_raw_clone_has_the_data_or_no_memory),
        CASE(vfork_spawn_and_threads_cost_nothing),
        CASE(forks_while_everything_moves),
        CASE(forks_while_others_unmap),
        CASE(no_room_is_kept_when_children_are_done),
    };
    by_event = event;
    return cmocka_run_group_tests_name(name, tests, NULL, NULL);
}
