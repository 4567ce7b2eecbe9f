/* SPDX-License-Identifier: MIT */
/*
 * Announced changes where something is missing: somebody who is told, a slot, a thread that takes them, the process itself. And what the
 * last close does about them.
 */
#include "watcher.h"

#include <signal.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "notifier/changing.h"

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

/* Away from thread stacks, which it could become one mapping with. */
static char *mapped_apart(size_t bytes)
{
    char *p = map_alone(bytes);
    memset(p, 1, bytes);
    return p;
}

/* For 5 s; how it ended is the answer. */
static bool comes_to(const uint32_t *word, uint32_t value)
{
    for (int i = 0; i < 5000 && __atomic_load_n(word, __ATOMIC_ACQUIRE) != value; i++)
        usleep(1000);
    return __atomic_load_n(word, __ATOMIC_ACQUIRE) == value;
}

static const char *stop_at;
static uint32_t at_point, go_on;

static void stop_there(const char *point)
{
    if (strcmp(point, stop_at) != 0)
        return;
    __atomic_store_n(&at_point, 1, __ATOMIC_RELEASE);
    comes_to(&go_on, 1);
}

static void set_stop(const char *point)
{
    stop_at = point;
    at_point = go_on = 0;
    inject_point_hook = stop_there;
}

struct unmapping {
    char *at;
    size_t len;
    uint32_t done;
    pthread_t thread;
};

static void *unmap_it(void *arg)
{
    struct unmapping *u = arg;
    hmm_munmap(u->at, u->len);
    __atomic_store_n(&u->done, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void start_unmapping(struct unmapping *u, char *at, size_t len)
{
    *u = (struct unmapping){.at = at, .len = len};
    pthread_create(&u->thread, NULL, unmap_it, u);
}

static void *read_begin(void *arg)
{
    return (void *)(uintptr_t)(hmm_notifier_read_begin(arg) != 0);
}

/* ---- nobody to tell ---- */

/* A neighbour in the same 2 MiB makes the change one that may matter. Then nobody is found; and of file memory no event tells. */
static void a_device_that_comes_when_nobody_was_found_waits(void **state)
{
    (void)state;
    static struct watcher neighbour, w;
    static struct unmapping u;
    pthread_t reader;
    void *read = NULL;
    char *p = live_reserve(2 * MIB);
    p = mmap(p, 2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    watch(&neighbour, p + MIB, MIB);
    set_stop("change-made");
    start_unmapping(&u, p, MIB / 2);
    assert_true(comes_to(&at_point, 1));
    watch(&w, p, MIB / 2);
    pthread_create(&reader, NULL, read_begin, &w.notifier);
    usleep(50000);
    int waiting = pthread_tryjoin_np(reader, NULL);
    __atomic_store_n(&go_on, 1, __ATOMIC_RELEASE);
    if (waiting)
        pthread_join(reader, &read);
    pthread_join(u.thread, NULL);
    assert_int_equal(waiting, EBUSY);
    assert_ptr_equal(read, (void *)1);
    assert_int_equal(neighbour.n, 0);
    unwatch(&w);
    unwatch(&neighbour);
    munmap(p + MIB / 2, 2 * MIB - MIB / 2);
}

static void *guard(void *arg)
{
    return (void *)(intptr_t)hmm_madvise(arg, MIB / 2, MADV_GUARD_INSTALL);
}

/* No event tells of guards: a page that left after nobody was found would come back from under them. */
static void nothing_leaves_while_guards_are_made_silently(void **state)
{
    (void)state;
    struct hmm_migrate_result res = {.size = sizeof(res)};
    pthread_t thread;
    char *p = mapped_apart(2 * MIB);
    set_stop("change-silent");
    pthread_create(&thread, NULL, guard, p);
    assert_true(comes_to(&at_point, 1));
    int migrated = hmm_migrate_to_device(handle, p, MIB, &res);
    __atomic_store_n(&go_on, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    assert_int_equal(migrated, 0);
    assert_int_equal(res.busy, MIB / 2 / page);
    assert_int_equal(res.moved, MIB / 2 / page);
    madvise(p, MIB / 2, MADV_GUARD_REMOVE);
    to_device(p, MIB);
    munmap(p, 2 * MIB);
}

static struct os_ops short_of_memory;
static uint64_t short_until;

static int64_t refuse_copy(int uffd, uintptr_t dst, const void *src, size_t len)
{
    return os_now() < short_until ? -ENOMEM : os_linux.uffd_copy(uffd, dst, src, len);
}

/* Else they would be back when the guards are gone. */
static void pages_come_home_before_guards_although_memory_is_short(void **state)
{
    (void)state;
    char *p = mapped_apart(2 * MIB);
    to_device(p, MIB);
    short_of_memory = os_linux;
    short_of_memory.uffd_copy = refuse_copy;
    short_until = os_now() + 200000000;
    os = &short_of_memory;
    int r = hmm_madvise(p, MIB / 4, MADV_GUARD_INSTALL);
    int err = errno;
    os = &os_linux;
    assert_int_equal(on_device(p, MIB), (MIB - MIB / 4) / page);
    assert_true(r == 0 || err == EINVAL); /* Linux before 6.13 */
    madvise(p, MIB / 4, MADV_GUARD_REMOVE);
    munmap(p, 2 * MIB);
}

static void *protect_silently(void *arg)
{
    return (void *)(intptr_t)hmm_mprotect(arg, MIB, PROT_READ);
}

static void a_reader_waits_for_a_silent_call_no_longer_than_it_said(void **state)
{
    (void)state;
    static struct watcher w;
    pthread_t thread;
    char *p = mapped_apart(2 * MIB);
    set_stop("change-silent");
    pthread_create(&thread, NULL, protect_silently, p);
    assert_true(comes_to(&at_point, 1));
    watch(&w, p, MIB);
    uint64_t began = os_now();
    uint64_t seq = notifier_read_begin_timeout(&dev->mm->notifiers, &w.notifier, 50000000);
    uint64_t took = os_now() - began;
    __atomic_store_n(&go_on, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    assert_int_equal(seq, 0);
    assert_in_range(took, 50000000, 3000000000);
    assert_int_not_equal(hmm_notifier_read_begin(&w.notifier), 0);
    unwatch(&w);
    munmap(p, 2 * MIB);
}

/* ---- slots ---- */

#define MOVERS 140
static uint32_t movers_there;
static __thread bool was_there;

static void gather(const char *point)
{
    if (strcmp(point, "change-silent") != 0 || was_there)
        return;
    was_there = true;
    __atomic_fetch_add(&movers_there, 1, __ATOMIC_ACQ_REL);
    for (int i = 0; i < 1000 && __atomic_load_n(&movers_there, __ATOMIC_ACQUIRE) < CHANGING_SLOTS; i++)
        usleep(1000);
}

static void *move(void *arg)
{
    char *to = (char *)arg + 64 * 4096;
    return hmm_mremap(arg, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to ? arg : NULL;
}

/* Each has one slot and needs another. */
static void more_mremaps_than_slots_end(void **state)
{
    (void)state;
    static pthread_t thread[MOVERS];
    static char *at[MOVERS];
    movers_there = 0;
    inject_point_hook = gather;
    for (int i = 0; i < MOVERS; i++) {
        at[i] = mmap(NULL, 128 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        pthread_create(&thread[i], NULL, move, at[i]);
    }
    for (int i = 0; i < MOVERS; i++) {
        void *r;
        pthread_join(thread[i], &r);
        assert_ptr_equal(r, at[i]);
        munmap(at[i], 128 * 4096);
    }
}

static void the_same_change_is_announced_once(void **state)
{
    (void)state;
    static struct watcher w;
    struct hmm_change outer, inner, other;
    char *p = mapped_apart(2 * MIB);
    watch(&w, p, 2 * MIB);
    hmm_change_begin(&outer, HMM_CHANGE_PROTECT, p, MIB);
    hmm_change_begin(&inner, HMM_CHANGE_PROTECT, p + page, page);
    hmm_change_begin(&other, HMM_CHANGE_PROTECT, p, 2 * MIB);
    hmm_change_end(&other);
    hmm_change_end(&inner);
    hmm_change_end(&outer);
    assert_int_equal(w.n, 2);
    hmm_change_begin(&inner, HMM_CHANGE_PROTECT, p + page, page);
    hmm_change_end(&inner);
    assert_int_equal(watcher_saw(&w, HMM_EVENT_PROTECTION_VMA, p + page, page), 1);
    unwatch(&w);
    munmap(p, 2 * MIB);
}

/* ---- threads ---- */

#define STUCK 6 /* more than there are threads to wait */

static void those_who_wait_for_one_device_do_not_keep_others(void **state)
{
    (void)state;
    static struct watcher stuck, slow;
    static struct unmapping u[STUCK], other;
    char *p = mapped_apart(STUCK * MIB), *q = mapped_apart(MIB);
    watch(&stuck, p, STUCK * MIB);
    watch(&slow, q, MIB);
    stuck.hold = slow.hold = 1;
    for (int i = 0; i < STUCK; i++)
        start_unmapping(&u[i], p + i * MIB, MIB);
    bool all = comes_to(&stuck.held, STUCK);
    start_unmapping(&other, q, MIB);
    bool taken = comes_to(&slow.held, 1);
    slow.hold = 0;
    bool done = comes_to(&other.done, 1);
    stuck.hold = 0;
    for (int i = 0; i < STUCK; i++)
        pthread_join(u[i].thread, NULL);
    pthread_join(other.thread, NULL);
    assert_true(all && taken && done);
    unwatch(&stuck);
    unwatch(&slow);
}

static uint32_t gate, in_gate;

static int wait_always(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    if (event->type == HMM_EVENT_MIGRATE)
        return 0;
    __atomic_fetch_add(&in_gate, 1, __ATOMIC_ACQ_REL);
    while (!__atomic_load_n(&gate, __ATOMIC_ACQUIRE))
        usleep(500);
    return 0;
}

/* A callback that waits although it was told to be brief. A change that was begun before ends all the same. */
static void a_callback_that_is_not_brief_does_not_keep_others(void **state)
{
    (void)state;
    static const struct hmm_notifier_ops ops = {.invalidate = wait_always, .name = "never-brief"};
    static struct watcher w;
    static struct unmapping u[STUCK], other;
    struct hmm_notifier n = {0};
    char *p = mapped_apart(STUCK * MIB), *q = mapped_apart(2 * MIB);
    gate = in_gate = 0;
    assert_int_equal(hmm_notifier_insert(dev, &n, (uintptr_t)p, (uintptr_t)p + STUCK * MIB, &ops), 0);
    watch(&w, q, 2 * MIB);
    to_device(q, MIB);
    set_stop("change-made");
    start_unmapping(&other, q, MIB);
    bool begun = comes_to(&at_point, 1);
    inject_point_hook = NULL;
    for (int i = 0; i < STUCK; i++)
        start_unmapping(&u[i], p + i * MIB, MIB);
    bool some = comes_to(&in_gate, STUCK);
    __atomic_store_n(&go_on, 1, __ATOMIC_RELEASE);
    bool ended = comes_to(&other.done, 1);
    pthread_join(other.thread, NULL);
    start_unmapping(&other, q + MIB, MIB);
    bool done = comes_to(&other.done, 1);
    __atomic_store_n(&gate, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < STUCK; i++)
        pthread_join(u[i].thread, NULL);
    pthread_join(other.thread, NULL);
    assert_true(begun && some && ended && done);
    assert_int_equal(hmm_notifier_remove(&n), 0);
    unwatch(&w);
}

#define CROWD 40

/* However many end at a time, and an event before theirs is held up. */
static void the_end_of_a_call_takes_no_longer_than_it_said(void **state)
{
    (void)state;
    static struct watcher stuck;
    static struct unmapping u[CROWD];
    char *p = mapped_apart(CROWD * 2 * MIB), *q = mapped_apart(MIB);
    for (int i = 0; i < CROWD; i++)
        to_device(p + i * 2 * MIB, page);
    to_device(q, MIB);
    watch(&stuck, q, MIB);
    stuck.hold = 1;
    munmap(q, MIB); /* not announced */
    bool held = comes_to(&stuck.held, 1);
    uint64_t began = os_now();
    for (int i = 0; i < CROWD; i++)
        start_unmapping(&u[i], p + i * 2 * MIB, MIB);
    for (int i = 0; i < CROWD; i++)
        pthread_join(u[i].thread, NULL);
    uint64_t took = os_now() - began;
    stuck.hold = 0;
    assert_true(held);
    assert_in_range(took, 50000000, 700000000); /* 1 s where each of four threads waits for 100 ms ten times */
    unwatch(&stuck);
    munmap(p, CROWD * 2 * MIB);
}

/* ---- processes ---- */

static pid_t child;
static __thread bool is_child;

static void fork_in_handler(int sig)
{
    (void)sig;
    int err = errno;
    pid_t pid = fork();
    if (pid)
        __atomic_store_n(&child, pid, __ATOMIC_RELEASE);
    is_child = pid == 0;
    errno = err;
}

static void *unmap_and_leave(void *arg)
{
    struct unmapping *u = arg;
    hmm_munmap(u->at, u->len);
    if (is_child)
        syscall(SYS_exit_group, 23);
    return NULL;
}

/* The child's copy of the call is not known to anybody. */
static void a_handler_may_fork_in_the_middle_of_a_call(void **state)
{
    (void)state;
    static struct watcher w;
    static struct unmapping u;
    struct sigaction act = {.sa_handler = fork_in_handler, .sa_flags = SA_RESTART}, old;
    char *p = mapped_apart(MIB);
    int status = -1;
    watch(&w, p, MIB);
    w.hold = 1;
    child = 0;
    sigaction(SIGUSR2, &act, &old);
    u = (struct unmapping){.at = p, .len = MIB};
    pthread_create(&u.thread, NULL, unmap_and_leave, &u);
    assert_true(comes_to(&w.held, 1));
    pthread_kill(u.thread, SIGUSR2);
    while (!__atomic_load_n(&child, __ATOMIC_ACQUIRE))
        usleep(1000);
    pid_t ended = 0;
    for (int i = 0; i < 5000 && !ended; i++, usleep(1000))
        ended = waitpid(child, &status, WNOHANG);
    if (!ended) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    w.hold = 0;
    pthread_join(u.thread, NULL);
    sigaction(SIGUSR2, &old, NULL);
    assert_int_equal(ended, child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 23);
    unwatch(&w);
}

/* Fences of the parent stay what they were to the child: not its own. */
static void a_child_without_a_device_of_its_own_cannot_configure(void **state)
{
    (void)state;
    struct hmm_config config = {.size = sizeof(config)};
    hmm_fence *fence;
    int status;
    assert_int_equal(hmm_fence_create(&fence), 0);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(5);
        int r = hmm_configure(&config);
        _exit(r != -EBUSY ? 1 : hmm_fence_wait(fence, 0) != -ESRCH ? 2 : 0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    hmm_fence_complete(fence, 0);
    hmm_fence_put(fence);
}

static pid_t told_in;

static void who_is_told(enum hmm_log_level level, const char *line, void *arg)
{
    (void)level;
    (void)arg;
    if (strstr(line, "exec or exit"))
        told_in = (pid_t)syscall(SYS_gettid);
}

/* It may be called in a signal handler, where the program's callback may not run. */
static void what_exec_complains_of_is_told_by_another_thread(void **state)
{
    (void)state;
    static struct watcher w;
    char *p = mapped_apart(MIB), *args[] = {"x", NULL};
    watch(&w, p, MIB);
    w.hold = 1;
    told_in = 0;
    hmm_set_log(who_is_told, NULL);
    assert_int_equal(hmm_execve("/nowhere/at/all", args, args), -1);
    assert_true(told_in != 0 && told_in != (pid_t)syscall(SYS_gettid));
    w.hold = 0;
    hmm_set_log(watcher_log, NULL);
    assert_int_not_equal(hmm_notifier_read_begin(&w.notifier), 0);
    unwatch(&w);
    munmap(p, MIB);
}

/* ---- huge pages ---- */

static struct os_ops with_huge_pages;
static char *huge;

static int say_huge(int maps_fd, uintptr_t addr, struct os_vma *out)
{
    int r = os_linux.vma_query(maps_fd, addr, out);
    if (!r && out->start == (uintptr_t)huge)
        out->page_size = 2 * MIB;
    return r;
}

static void *move_five_pages(void *arg)
{
    char **p = arg;
    return hmm_mremap(p[0], 5 * page, 5 * page, MREMAP_MAYMOVE | MREMAP_FIXED, p[1]);
}

/* The kernel takes whole ones, here and there, whatever length it is told. Seldom are there any: the answers of the kernel are made up. */
static void mremap_of_huge_pages_is_announced_for_whole_ones(void **state)
{
    (void)state;
    static struct watcher here, there, beside;
    char *p[] = {mapped_apart(2 * MIB), mapped_apart(4 * MIB)};
    huge = p[0];
    with_huge_pages = os_linux;
    with_huge_pages.vma_query = say_huge;
    os = &with_huge_pages;
    watch(&here, p[0] + MIB, MIB);
    watch(&there, p[1] + MIB, MIB);
    watch(&beside, p[1] + 2 * MIB, 2 * MIB);
    assert_ptr_equal(move_five_pages(p), p[1]);
    os = &os_linux;
    assert_int_equal(watcher_saw(&here, HMM_EVENT_UNMAP, p[0], 2 * MIB), 1);
    assert_int_equal(watcher_saw(&there, HMM_EVENT_UNMAP, p[1], 2 * MIB), 1);
    assert_int_equal(beside.n, 0);
    unwatch(&here);
    unwatch(&there);
    unwatch(&beside);
}

/* Nobody is told of it then: whoever comes has to wait. Of small pages it tells nobody behind them. */
static void whoever_comes_waits_for_a_silent_mremap_of_huge_pages(void **state)
{
    (void)state;
    static struct watcher near;
    pthread_t thread;
    char *p[] = {mapped_apart(2 * MIB), mapped_apart(4 * MIB)};
    huge = p[0];
    set_stop("change-silent");
    pthread_create(&thread, NULL, move_five_pages, p);
    assert_true(comes_to(&at_point, 1));
    bool waits = !changing_wait_timeout((uintptr_t)p[0] + MIB, (uintptr_t)p[0] + 2 * MIB, 1000000);
    bool beside = changing_wait_timeout((uintptr_t)p[0] + 2 * MIB, (uintptr_t)p[0] + 4 * MIB, 1000000);
    __atomic_store_n(&go_on, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    assert_true(waits && beside);
    inject_point_hook = NULL;
    watch(&near, p[1] + MIB, MIB);
    assert_ptr_equal(move_five_pages((char *[]){p[1], p[0]}), p[0]);
    assert_int_equal(near.n, 0);
    unwatch(&near);
}

/* ---- segments ---- */

/* The program has protected a part, and unmapped the beginning. */
static void shmdt_is_announced_for_what_is_left_of_a_segment(void **state)
{
    (void)state;
    static struct watcher w;
    for (int cut = 0; cut < 2; cut++) {
        int id = shmget(IPC_PRIVATE, 4 * MIB, IPC_CREAT | 0600);
        assert_true(id >= 0);
        char *p = shmat(id, NULL, 0);
        shmctl(id, IPC_RMID, NULL);
        assert_ptr_not_equal(p, (void *)-1);
        assert_int_equal(mprotect(p + MIB, MIB, PROT_READ), 0);
        if (cut)
            assert_int_equal(munmap(p, MIB / 2), 0);
        watch(&w, p, 4 * MIB);
        assert_int_equal(hmm_shmdt(p), 0);
        assert_int_equal(watcher_saw(&w, HMM_EVENT_UNMAP, p, 4 * MIB), 1);
        assert_false(changing_keeps_off(0, UINTPTR_MAX));
        unwatch(&w);
    }
}

/* ---- the last close ---- */

static struct watcher at_the_end;
static struct unmapping last;
static uint32_t told_at_the_end;

static void unmap_when_pages_are_home(const char *point)
{
    if (strcmp(point, "close-changes") != 0)
        return;
    at_the_end.n = 0;
    start_unmapping(&last, last.at, last.len);
    pthread_join(last.thread, NULL);
    told_at_the_end = at_the_end.n;
    hmm_notifier_remove(&at_the_end.notifier);
}

/* It would use what the driver's close() frees. */
static void no_callback_begins_when_only_the_drivers_close_is_left(void **state)
{
    (void)state;
    watch(&at_the_end, last.at = mapped_apart(last.len = MIB), MIB);
    inject_point_hook = unmap_when_pages_are_home;
    assert_int_equal(hmm_device_close(handle), 0);
    inject_point_hook = NULL;
    assert_int_equal(last.done, 1);
    assert_int_equal(told_at_the_end, 0);
    assert_int_equal(watcher_set_up(NULL), 0);
}

/* Its thread has left it by siglongjmp, or the call takes long. */
static void a_change_that_does_not_end_does_not_keep_the_last_close(void **state)
{
    (void)state;
    static struct watcher w;
    struct hmm_change change;
    hmm_dev second;
    char *p = mapped_apart(2 * MIB);
    watch(&w, p, MIB);
    hmm_change_begin(&change, HMM_CHANGE_PROTECT, p, MIB);
    unwatch(&w);
    assert_int_equal(hmm_device_close(handle), -EBUSY);
    assert_non_null(strstr(hmm_last_message(), "a change of ["));
    assert_int_equal(hmm_device_open("soft:memory=4M,engines=1", &second), 0);
    hmm_change_end(&change);
    assert_int_equal(hmm_device_close(handle), 0);
    handle = second;
    dev = device_get(handle);
    device_put(dev);
    watch(&w, p, 2 * MIB); /* changes are announced as before */
    assert_int_equal(hmm_mprotect(p, 2 * MIB, PROT_READ), 0);
    assert_int_equal(watcher_saw(&w, HMM_EVENT_PROTECTION_VMA, p, 2 * MIB), 1);
    unwatch(&w);
    munmap(p, 2 * MIB);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        WATCHER_TEST(a_device_that_comes_when_nobody_was_found_waits),
        WATCHER_TEST(nothing_leaves_while_guards_are_made_silently),
        WATCHER_TEST(pages_come_home_before_guards_although_memory_is_short),
        WATCHER_TEST(a_reader_waits_for_a_silent_call_no_longer_than_it_said),
        WATCHER_TEST(more_mremaps_than_slots_end),
        WATCHER_TEST(the_same_change_is_announced_once),
        WATCHER_TEST(those_who_wait_for_one_device_do_not_keep_others),
        WATCHER_TEST(a_callback_that_is_not_brief_does_not_keep_others),
        WATCHER_TEST(the_end_of_a_call_takes_no_longer_than_it_said),
        WATCHER_TEST(a_handler_may_fork_in_the_middle_of_a_call),
        WATCHER_TEST(a_child_without_a_device_of_its_own_cannot_configure),
        WATCHER_TEST(what_exec_complains_of_is_told_by_another_thread),
        WATCHER_TEST(mremap_of_huge_pages_is_announced_for_whole_ones),
        WATCHER_TEST(whoever_comes_waits_for_a_silent_mremap_of_huge_pages),
        WATCHER_TEST(shmdt_is_announced_for_what_is_left_of_a_segment),
        WATCHER_TEST(no_callback_begins_when_only_the_drivers_close_is_left),
        WATCHER_TEST(a_change_that_does_not_end_does_not_keep_the_last_close),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
