/* SPDX-License-Identifier: MIT */
/*
 * Engines in a process of their own: what that process is and sees, that it lives as long as the device and no longer, and that the
 * program loses nothing when it dies, wherever it was. Opens its own device whatever the suite runs over.
 */
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "support.h"

#define SPEC "soft:isolated,memory=16M"
#define ARENA (8 * MIB)

/* Closed by the test: teardown does not know it. */
static hmm_dev open_own(const char *spec)
{
    hmm_dev dev = 0;
    int r = hmm_device_open(spec, &dev);
    if (r)
        fail_msg("%s cannot be opened: %d, %s", spec, r, hmm_last_message());
    return dev;
}

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

struct work {
    struct control control; /* flags[0] counts up when it is at the point */
    uint64_t *p;
    size_t words;
    int how;
    uintptr_t nowhere;
};

HMM_KERNEL(isolated_pid)
{
    (void)acc;
    (void)arg;
    return (uint64_t)getpid();
}

HMM_KERNEL(isolated_compute)
{
    struct work *w = arg;
    volatile uint32_t *flags = open_control(&w->control);
    (void)acc;
    for (;;)
        __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
}

/* Writes the new value of a word, and holds on. */
HMM_KERNEL(isolated_hold)
{
    struct work *w = arg;
    volatile uint32_t *flags = open_control(&w->control);
    size_t len = sizeof(uint64_t);
    uint64_t *span = hmm_span_write(acc, w->p, &len);
    *span = ~*span;
    for (;;)
        __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
}

/* Page after page, for ever: what is not there is brought, and what is in the way goes home. */
HMM_KERNEL(isolated_read_all)
{
    struct work *w = arg;
    volatile uint32_t *flags = open_control(&w->control);
    for (size_t i = 0;; i = (i + 512) % w->words) {
        size_t len = sizeof(uint64_t);
        if (*(const uint64_t *)hmm_span_read(acc, w->p + i, &len) == 0)
            return 1;
        __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
    }
}

/* The same, and every word becomes its complement. */
HMM_KERNEL(isolated_write_all)
{
    struct work *w = arg;
    volatile uint32_t *flags = open_control(&w->control);
    for (size_t i = 0;; i = (i + 1) % w->words) {
        size_t len = sizeof(uint64_t);
        uint64_t *span = hmm_span_write(acc, w->p + i, &len);
        *span = ~*span;
        if (i % 512 == 0)
            __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
    }
}

HMM_KERNEL(isolated_crash)
{
    struct work *w = arg;
    size_t len = sizeof(uint64_t);
    uint64_t *span = hmm_span_write(acc, w->p, &len);
    *span = 1;
    switch (w->how) {
    case SIGSEGV: *(volatile int *)w->nowhere = 0; break;
    case SIGILL: __builtin_trap(); break;
    case SIGABRT: abort();
    default: raise(w->how);
    }
    return 0;
}

static uint64_t deeper(volatile char *last)
{
    volatile char here[4096];
    here[0] = last[0];
    return here[0] ? deeper(here) + (uint64_t)here[1] : 0;
}

HMM_KERNEL(isolated_stack)
{
    volatile char first = 1;
    (void)acc;
    (void)arg;
    return deeper(&first);
}

HMM_KERNEL(isolated_exit)
{
    (void)acc;
    (void)arg;
    _exit(3);
}

/* Both go on behind fork(), as if they were the engine; the child may write before it ends. */
HMM_KERNEL(isolated_fork)
{
    struct work *w = arg;
    size_t len = sizeof(uint64_t);
    uint64_t *span = hmm_span_write(acc, w->p, &len);
    *span = 1;
    pid_t child = fork();
    if (child == 0) {
        if (w->how)
            *span = 2;
        return 2;
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    return *span + (uint64_t)WIFSIGNALED(status) * 10;
}

/* Hears nothing. */
HMM_KERNEL(isolated_deaf)
{
    struct work *w = arg;
    volatile uint32_t *flags = open_control(&w->control);
    sigset_t all;
    (void)acc;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    for (;;)
        __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
}

/* ---- what the kernel says about the process ---------------------------------------------------------------------- */

static pid_t engine_of(hmm_dev dev)
{
    return (pid_t)must_run(dev, isolated_pid, NULL, 0);
}

/* Not even a zombie of ours; an adopted one that nobody has waited for yet does not run. */
static bool runs(pid_t pid)
{
    char path[64], text[512];
    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    size_t n = fread(text, 1, sizeof(text) - 1, f);
    fclose(f);
    text[n] = 0;
    const char *state = strrchr(text, ')');
    return state && state[2] != 'Z' && state[2] != 'X';
}

static void assert_ends(pid_t pid)
{
    uint64_t until = now_ms() + 10000;
    while (runs(pid) && now_ms() < until)
        sleep_ms(5);
    assert_false(runs(pid));
}

static volatile sig_atomic_t child_signals;

static void count_child(int n)
{
    (void)n;
    child_signals++;
}

static void it_is_nobodys_child(void **state)
{
    (void)state;
    struct sigaction a = {.sa_handler = count_child}, old;
    sigaction(SIGCHLD, &a, &old);
    child_signals = 0;
    for (int kill_it = 0; kill_it < 2; kill_it++) {
        hmm_dev dev = open_own(SPEC);
        pid_t pid = engine_of(dev);
        assert_true(pid > 0 && pid != getpid() && runs(pid));
        assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
        assert_int_equal(errno, ECHILD);
        assert_int_equal(waitpid(-1, NULL, WNOHANG | __WALL), -1);
        assert_int_equal(errno, ECHILD);
        if (kill_it)
            kill(pid, SIGKILL);
        else
            assert_int_equal(hmm_device_close(dev), 0);
        assert_ends(pid);
        if (kill_it)
            assert_int_equal(hmm_device_close(dev), 0);
        assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    }
    assert_int_equal(child_signals, 0);
    sigaction(SIGCHLD, &old, NULL);
}

static void it_has_no_descriptors_but_its_socket(void **state)
{
    (void)state;
    int secret = open("/proc/self/status", O_RDONLY); /* inherited by whom the program executes */
    hmm_dev dev = open_own(SPEC);
    char path[64], target[256];
    snprintf(path, sizeof(path), "/proc/%d/fd", engine_of(dev));
    DIR *dir = opendir(path);
    assert_non_null(dir);
    unsigned n = 0;
    for (struct dirent *d; (d = readdir(dir));) {
        if (d->d_name[0] == '.')
            continue;
        int fd = atoi(d->d_name);
        ssize_t len = readlinkat(dirfd(dir), d->d_name, target, sizeof(target) - 1);
        assert_true(len > 0);
        target[len] = 0;
        if (fd == 2 && strcmp(target, "/dev/null") != 0)
            fprintf(stderr, "descriptor 2 is %s\n", target); /* of a build with sanitizers, which report there */
        else
            assert_int_equal(strncmp(target, fd < 3 ? "/dev/null" : "socket:", fd < 3 ? 9 : 7), 0);
        assert_true(fd <= 3);
        n++;
    }
    closedir(dir);
    assert_int_equal(n, 4);
    assert_int_equal(hmm_device_close(dev), 0);
    close(secret);
}

static void it_shares_device_memory_the_channel_and_the_gate(void **state)
{
    (void)state;
    hmm_dev dev = open_own(SPEC);
    char path[64], line[512], rights[8], name[256];
    unsigned memory = 0, channel = 0, gate = 0, other = 0;
    snprintf(path, sizeof(path), "/proc/%d/maps", engine_of(dev));
    FILE *f = fopen(path, "re");
    assert_non_null(f);
    while (fgets(line, sizeof(line), f)) {
        name[0] = 0;
        if (sscanf(line, "%*s %7s %*s %*s %*s %255s", rights, name) < 1 || rights[3] != 's')
            continue;
        if (strcmp(name, "/memfd:hmm-soft") == 0)
            memory++;
        else if (strcmp(name, "/memfd:hmm-soft-channel") == 0)
            channel++;
        else if (strcmp(name, "/memfd:hmm-shown") == 0 && strncmp(rights, "r--", 3) == 0)
            gate++;
        else
            other++;
    }
    fclose(f);
    assert_true(memory && channel && gate);
    assert_int_equal(other, 0);
    assert_int_equal(hmm_device_close(dev), 0);
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static void ends_with_the_program(bool stopped)
{
    int ends[2];
    pid_t pid = 0;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        hmm_dev dev = 0;
        hmm_fence *fence = NULL;
        struct hmm_launch l = {.size = sizeof(l), .kernel = isolated_pid};
        struct hmm_fence_info info = {.size = sizeof(info)};
        if (hmm_device_open(SPEC, &dev) || hmm_job_launch(dev, &l, &fence) || hmm_fence_wait(fence, -1))
            _exit(1);
        hmm_fence_info(fence, &info);
        pid = (pid_t)info.result;
        if (write(ends[1], &pid, sizeof(pid)) != sizeof(pid))
            _exit(1);
        pause();
        _exit(0);
    }
    close(ends[1]);
    assert_int_equal(read(ends[0], &pid, sizeof(pid)), sizeof(pid));
    close(ends[0]);
    assert_true(runs(pid));
    if (stopped)
        kill(pid, SIGSTOP);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_ends(pid);
}

static void it_ends_with_the_program(void **state)
{
    (void)state;
    ends_with_the_program(false);
    ends_with_the_program(true);
}

static void it_starts_without_standard_descriptors_and_outlives_close_range(void **state)
{
    (void)state;
    pid_t child = fork();
    if (child == 0) {
        close(0);
        close(1);
        close(2);
        hmm_dev dev = 0;
        hmm_fence *fence = NULL;
        char text[] = "123456789";
        if (hmm_device_open(SPEC, &dev))
            _exit(1);
        close_range(0, ~0u, 0);
        if (hmm_job_crc32c(dev, text, 9, &fence) || hmm_fence_wait(fence, -1))
            _exit(2);
        struct hmm_fence_info info = {.size = sizeof(info)};
        hmm_fence_info(fence, &info);
        hmm_fence_put(fence);
        _exit(info.result != 0xe3069283 ? 3 : hmm_device_close(dev) ? 4 : 0);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static void terminal_signals_do_not_end_it(void **state)
{
    (void)state;
    static const int signals[] = {SIGINT, SIGQUIT, SIGHUP, SIGTERM, SIGPIPE};
    hmm_dev dev = open_own(SPEC);
    pid_t pid = engine_of(dev);
    for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
        kill(pid, signals[i]);
    assert_int_equal(engine_of(dev), pid);
    assert_int_not_equal(getpgid(pid), getpgid(0));
    assert_int_not_equal(getsid(pid), getsid(0));
    assert_int_equal(hmm_device_close(dev), 0);
}

static void children_of_the_program_do_not_disturb_it(void **state)
{
    (void)state;
    hmm_dev dev = open_own(SPEC);
    char *p = map_pages(ARENA), *oracle = malloc(ARENA);
    fill_random(oracle, ARENA, 5);
    memcpy(p, oracle, ARENA);
    for (int i = 0; i < 10; i++) {
        hmm_fence *fence = NULL;
        assert_int_equal(hmm_job_crc32c(dev, p, ARENA, &fence), 0);
        pid_t child = fork();
        if (child == 0)
            _exit(hmm_device_close(dev) == -ESRCH ? 0 : 1);
        int status = 0;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
        assert_int_equal(must(fence), crc_oracle(oracle, ARENA));
    }
    assert_int_equal(hmm_device_close(dev), 0);
    assert_memory_equal(p, oracle, ARENA);
    free(oracle);
    unmap_pages(p, ARENA);
}

static void several_devices_with_many_engines(void **state)
{
    (void)state;
    enum { DEVICES = 3, JOBS = 60, EACH = 20000 };
    hmm_dev devs[DEVICES];
    pid_t pids[DEVICES];
    hmm_fence *fences[JOBS];
    for (int i = 0; i < DEVICES; i++) {
        devs[i] = open_own("soft:isolated,memory=8M,engines=8");
        pids[i] = engine_of(devs[i]);
        for (int k = 0; k < i; k++)
            assert_int_not_equal(pids[k], pids[i]);
    }
    char *p = map_pages(JOBS * EACH);
    for (int round = 1; round <= 3; round++) {
        for (int i = 0; i < JOBS; i++)
            assert_int_equal(hmm_job_fill(devs[(i + round) % DEVICES], p + i * EACH, (uint8_t)(i + round), EACH, &fences[i]),
                             0);
        for (int i = 0; i < JOBS; i++)
            must(fences[i]);
        for (int i = 0; i < JOBS * EACH; i++)
            if ((uint8_t)p[i] != (uint8_t)(i / EACH + round))
                fail_msg("byte %d is %d", i, p[i]);
    }
    kill(pids[1], SIGKILL); /* the others go on */
    device_fill(devs[0], p, 7, EACH);
    device_fill(devs[2], p + EACH, 8, EACH);
    assert_int_equal(p[EACH - 1], 7);
    assert_int_equal(p[EACH], 8);
    for (int i = 0; i < DEVICES; i++)
        assert_int_equal(hmm_device_close(devs[i]), 0);
    unmap_pages(p, JOBS * EACH);
}

/* ---- death ------------------------------------------------------------------------------------------------------- */

/* The device takes no job any more, from some moment on. */
static void assert_lost(hmm_dev dev)
{
    uint64_t until = now_ms() + 10000;
    char text[] = "123456789";
    int r;
    do {
        hmm_fence *fence = NULL;
        r = hmm_job_crc32c(dev, text, 9, &fence);
        if (r == 0) {
            r = finish(fence).status;
            assert_true(r == 0 || r == -ENODEV);
        }
    } while (r == 0 && now_ms() < until);
    assert_int_equal(r, -ENODEV);
}

struct toucher {
    volatile char *p;
    size_t bytes;
    volatile uint32_t stop;
};

static void *touch(void *arg)
{
    struct toucher *t = arg;
    for (size_t i = 0; !t->stop; i = (i + 4096 * 7) % t->bytes)
        (void)t->p[i];
    return NULL;
}

struct death {
    const char *name;
    hmm_kernel kernel;
    const char *spec;
    bool shared, touched, old_or_new;
    int rounds;
};

static void check_words(const struct death *d, const uint64_t *p, const uint64_t *oracle, size_t words)
{
    for (size_t i = 0; i < words; i++)
        if (p[i] != oracle[i] && !(d->old_or_new && p[i] == ~oracle[i]))
            fail_msg("%s: word %zu is %#llx, was %#llx", d->name, i, (unsigned long long)p[i], (unsigned long long)oracle[i]);
}

/* In models that hold, it holds all of it. */
static hmm_fence *launch_death(hmm_dev dev, const struct death *d, const struct work *w)
{
    struct hmm_range range = {.addr = (uintptr_t)w->p, .bytes = ARENA, .write = 1};
    struct hmm_launch l = {.size = sizeof(l), .deadline_ms = 20000, .kernel = d->kernel, .arg = w, .arg_size = sizeof(*w)};
    hmm_fence *fence = NULL;
    if (strstr(d->spec, "model=")) {
        l.ranges = &range;
        l.nranges = 1;
    }
    assert_int_equal(hmm_job_launch(dev, &l, &fence), 0);
    return fence;
}

static void die_once(const struct death *d, uint64_t *seed)
{
    struct work w = {.control = make_control(), .words = ARENA / sizeof(uint64_t)};
    uint64_t *oracle = malloc(ARENA);
    hmm_dev dev = open_own(d->spec);
    w.p = d->shared ? mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) : (void *)map_pages(ARENA);
    fill_random(oracle, ARENA, *seed);
    memcpy(w.p, oracle, ARENA);
    pid_t pid = engine_of(dev);
    struct toucher t = {.p = (volatile char *)w.p, .bytes = ARENA};
    pthread_t thread;
    hmm_fence *fence = d->kernel ? launch_death(dev, d, &w) : NULL;
    if (!d->kernel)
        assert_int_equal(device_crc(dev, w.p, ARENA), crc_oracle(oracle, ARENA));
    else
        wait_for(w.control.flags, 1);
    if (d->touched)
        assert_int_equal(pthread_create(&thread, NULL, touch, &t), 0);
    for (uint64_t spin = random_next(seed) % 4000000; spin; spin--)
        __asm__ volatile("");
    kill(pid, SIGKILL);
    if (fence) {
        struct hmm_fence_info info = finish(fence);
        assert_int_equal(info.status, -ENODEV);
        assert_non_null(strstr(info.message, "the engine process (pid"));
    }
    assert_lost(dev);
    t.stop = 1;
    if (d->touched)
        pthread_join(thread, NULL);
    check_words(d, w.p, oracle, w.words);
    assert_audit_clean();
    assert_int_equal(hmm_device_close(dev), 0);
    check_words(d, w.p, oracle, w.words);
    assert_false(runs(pid));
    munmap(w.p, ARENA);
    free(oracle);
    free_control(&w.control);
}

static void nothing_is_lost_wherever_it_dies(void **state)
{
    static const struct death deaths[] = {
        {"idle", NULL, SPEC, false, false, false, 3},
        {"computing", isolated_compute, SPEC, false, false, false, 5},
        {"holding a span", isolated_hold, SPEC, false, false, true, 8},
        {"reading", isolated_read_all, SPEC, false, false, false, 5},
        {"faulting", isolated_read_all, "soft:isolated,memory=4M", false, false, false, 15},
        {"writing", isolated_write_all, SPEC, false, false, true, 10},
        {"writing and faulting", isolated_write_all, "soft:isolated,memory=4M,engines=1", false, false, true, 15},
        {"reading over the bus", isolated_read_all, SPEC, true, false, false, 10},
        {"writing over the bus", isolated_write_all, SPEC, true, false, true, 15},
        {"invalidated while it reads", isolated_read_all, SPEC, false, true, false, 15},
        {"invalidated while it writes", isolated_write_all, SPEC, false, true, true, 15},
        {"invalidated while it holds", isolated_hold, SPEC, false, true, true, 8},
        {"writing what it holds", isolated_write_all, SPEC ",model=resident", false, true, true, 8},
        {"writing what is registered", isolated_write_all, SPEC ",model=register", false, true, true, 8},
        {"writing what it holds in part", isolated_write_all, "soft:isolated,memory=4M,model=resident", false, true, true, 8},
    };
    uint64_t seed = 42;
    for (size_t i = 0; i < sizeof(deaths) / sizeof(deaths[0]); i++)
        for (int round = 0; round < deaths[i].rounds; round++)
            die_once(&deaths[i], &seed);
    setup_none(state); /* the library may have said how bad that is */
}

static void queued_jobs_end_with_it(void **state)
{
    enum { JOBS = 20 };
    struct work w = {.control = make_control()};
    hmm_dev dev = open_own("soft:isolated,memory=4M,engines=1");
    pid_t pid = engine_of(dev);
    hmm_fence *first = launch(dev, isolated_compute, &w, sizeof(w), 0), *fences[JOBS];
    char *p = map_pages(page_size());
    wait_for(w.control.flags, 1);
    for (int i = 0; i < JOBS; i++)
        assert_int_equal(hmm_job_fill(dev, p, 1, page_size(), &fences[i]), 0);
    kill(pid, SIGKILL);
    assert_int_equal(finish(first).status, -ENODEV);
    for (int i = 0; i < JOBS; i++)
        assert_int_equal(finish(fences[i]).status, -ENODEV);
    assert_int_equal(p[0], 0);
    assert_int_equal(hmm_device_close(dev), 0);
    unmap_pages(p, page_size());
    setup_none(state);
}

static void a_kernel_that_exits_loses_the_device(void **state)
{
    hmm_dev dev = open_own(SPEC);
    struct hmm_fence_info info = run_kernel(dev, isolated_exit, NULL, 0);
    assert_int_equal(info.status, -ENODEV);
    assert_non_null(strstr(info.message, "the engine process (pid"));
    assert_lost(dev);
    assert_int_equal(hmm_device_close(dev), 0);
    dev = open_own(SPEC);
    engine_of(dev);
    assert_int_equal(hmm_device_close(dev), 0);
    setup_none(state);
}

/* ---- crashes ----------------------------------------------------------------------------------------------------- */

static void a_kernel_that_crashes_ends_alone(void **state)
{
    (void)state;
    static const struct {
        int number;
        const char *name;
    } kinds[] = {{SIGSEGV, "SIGSEGV"}, {SIGBUS, "SIGBUS"},   {SIGFPE, "SIGFPE"},
                 {SIGILL, "SIGILL"},   {SIGABRT, "SIGABRT"}, {SIGTRAP, "SIGTRAP"}};
    hmm_dev dev = open_own("soft:isolated,memory=16M,engines=1");
    pid_t pid = engine_of(dev);
    struct work w = {.p = (void *)map_pages(page_size())};
    for (int round = 0; round < 3; round++)
        for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
            w.how = kinds[i].number;
            w.nowhere = 16;
            w.p[0] = 0;
            struct hmm_fence_info info = run_kernel(dev, isolated_crash, &w, sizeof(w));
            assert_int_equal(info.status, -EFAULT);
            assert_non_null(strstr(info.message, "kernel isolated_crash crashed: "));
            assert_non_null(strstr(info.message, kinds[i].name));
            assert_int_equal(info.address, kinds[i].number == SIGSEGV ? 16 : info.address);
            assert_int_equal(w.p[0], 1); /* its span is given back, with what it wrote */
            assert_int_equal(engine_of(dev), pid);
        }
    unmap_pages(w.p, page_size());
    assert_int_equal(hmm_device_close(dev), 0);
}

static void a_kernel_whose_stack_is_full_ends_alone(void **state)
{
    (void)state;
    hmm_dev dev = open_own(SPEC);
    pid_t pid = engine_of(dev);
    struct hmm_fence_info info = run_kernel(dev, isolated_stack, NULL, 0);
    assert_int_equal(info.status, -EFAULT);
    assert_non_null(strstr(info.message, "SIGSEGV"));
    assert_int_equal(engine_of(dev), pid);
    assert_int_equal(hmm_device_close(dev), 0);
}

/* ---- what does not answer ---------------------------------------------------------------------------------------- */

static void a_child_of_a_kernel_is_no_engine(void **state)
{
    (void)state;
    hmm_dev dev = open_own(SPEC);
    struct work w = {.p = (uint64_t *)map_pages(page_size()), .words = 1};
    for (w.how = 0; w.how < 2; w.how++)
        assert_int_equal(must_run(dev, isolated_fork, &w, sizeof(w)), 11);
    assert_int_equal(*w.p, 1);
    assert_int_equal(hmm_device_close(dev), 0);
    unmap_pages((char *)w.p, page_size());
}

static void closing_ends_a_kernel_that_never_returns(void **state)
{
    (void)state;
    struct work w = {.control = make_control()};
    hmm_dev dev = open_own(SPEC);
    hmm_fence *fence = launch(dev, isolated_compute, &w, sizeof(w), 100);
    wait_for(w.control.flags, 1);
    uint64_t before = now_ms();
    assert_int_equal(hmm_device_close(dev), 0);
    assert_true(now_ms() - before < 4000);
    assert_int_equal(finish(fence).status, -ECANCELED);
}

static void closing_ends_a_kernel_that_hears_nothing(void **state)
{
    struct work w = {.control = make_control()};
    hmm_dev dev = open_own(SPEC);
    pid_t pid = engine_of(dev);
    hmm_fence *fence = launch(dev, isolated_deaf, &w, sizeof(w), 100);
    wait_for(w.control.flags, 1);
    assert_int_equal(hmm_device_close(dev), 0);
    struct hmm_fence_info info = finish(fence);
    assert_int_equal(info.status, -ENODEV);
    assert_non_null(strstr(info.message, "did not end when it was asked to"));
    assert_ends(pid);
    setup_none(state);
}

/* Once with pages that it may use, once with nothing but the process itself to be ended. */
static void a_stopped_process_does_not_hold_up_the_program(void **state)
{
    for (int touched = 0; touched < 2; touched++) {
        hmm_dev dev = open_own(SPEC);
        pid_t pid = engine_of(dev);
        char *p = map_pages(ARENA), *oracle = malloc(ARENA);
        fill_random(oracle, ARENA, 9);
        memcpy(p, oracle, ARENA);
        if (touched)
            assert_int_equal(device_crc(dev, p, ARENA), crc_oracle(oracle, ARENA));
        kill(pid, SIGSTOP);
        assert_memory_equal(p, oracle, ARENA);
        assert_int_equal(hmm_device_close(dev), 0);
        assert_ends(pid);
        assert_memory_equal(p, oracle, ARENA);
        free(oracle);
        unmap_pages(p, ARENA);
    }
    setup_none(state);
}

/* Its job holds what it works on, and an operation has no deadline. */
static void a_stopped_process_does_not_keep_what_its_job_holds(void **state)
{
    static const char *const specs[] = {SPEC ",model=resident", SPEC ",model=register"};
    for (int i = 0; i < 2; i++) {
        hmm_dev dev = open_own(specs[i]);
        pid_t pid = engine_of(dev);
        char *p = map_pages(ARENA), *oracle = malloc(ARENA);
        hmm_fence *fence = NULL;
        fill_random(oracle, ARENA, 10);
        memcpy(p, oracle, ARENA);
        kill(pid, SIGSTOP);
        assert_int_equal(hmm_job_crc32c(dev, p, ARENA, &fence), 0);
        while (pages_in_state(p, ARENA, HMM_PAGE_DEVICE) < ARENA / page_size())
            sleep_ms(5);
        sleep_ms(100); /* they are held */
        assert_memory_equal(p, oracle, ARENA);
        assert_int_equal(finish(fence).status, -ENODEV);
        assert_ends(pid);
        assert_int_equal(hmm_device_close(dev), 0);
        free(oracle);
        unmap_pages(p, ARENA);
    }
    setup_none(state);
}

/* ---- the program that is started --------------------------------------------------------------------------------- */

static char folder[] = "/tmp/hmm-test-engine-XXXXXX";

static const char *script(const char *name, const char *text, mode_t mode)
{
    static char path[128];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
    chmod(path, mode);
    return path;
}

static void assert_refused(const char *path, const char *why)
{
    hmm_dev dev = 0;
    setenv("HMM_SOFT_ENGINE", path, 1);
    int r = hmm_device_open(SPEC, &dev);
    unsetenv("HMM_SOFT_ENGINE");
    assert_int_equal(r, -ENOEXEC);
    if (!strstr(hmm_last_message(), why))
        fail_msg("'%s' does not say '%s'", hmm_last_message(), why);
    assert_int_equal(dev, 0);
}

static void a_wrong_program_is_an_error_of_open(void **state)
{
    (void)state;
    unsigned descriptors = descriptor_count(), threads = thread_count();
    assert_non_null(mkdtemp(folder));
    assert_refused("/nowhere/hmm-soft-engine", "there is no such file");
    assert_refused("hmm-soft-engine", "absolute path");
    if (geteuid() != 0)
        assert_refused(script("data", "#!/bin/sh\n", 0600), "cannot be executed");
    assert_refused(script("nothing", "", 0700), "cannot be executed");
    assert_refused(script("ends", "#!/bin/sh\nexit 0\n", 0700), "ended at once");
    assert_refused(script("talks", "#!/bin/sh\nprintf hello >&3\nexec sleep 60\n", 0700), "another version");
    assert_refused(script("sleeps", "#!/bin/sh\nexec sleep 60\n", 0700), "said nothing for 10 seconds");
    assert_int_equal(descriptor_count(), descriptors);
    assert_int_equal(thread_count(), threads);
    hmm_dev dev = open_own(SPEC);
    assert_int_equal(hmm_device_close(dev), 0);
    char command[160];
    snprintf(command, sizeof(command), "rm -r %s", folder);
    assert_int_equal(system(command), 0);
}

static void a_kernel_that_is_not_there_is_an_error_of_its_job(void **state)
{
    (void)state;
    hmm_dev dev = open_own(SPEC);
    static const struct {
        const char *object, *symbol;
        int status;
    } wrong[] = {
        {"/nowhere/libnothing.so", "isolated_pid", -ENOENT},
        {"/proc/self/status", "isolated_pid", -ENOEXEC},
        {"libc.so.6", "no_such_kernel", -ENOENT},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct hmm_launch l = {.size = sizeof(l), .object = wrong[i].object, .symbol = wrong[i].symbol};
        hmm_fence *fence = NULL;
        int r = hmm_job_launch(dev, &l, &fence);
        assert_int_equal(r ? r : finish(fence).status, wrong[i].status);
    }
    engine_of(dev);
    assert_int_equal(hmm_device_close(dev), 0);
}

#define ALONE(f) cmocka_unit_test_setup_teardown(f, setup_none, teardown)

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        ALONE(it_is_nobodys_child),
        ALONE(it_has_no_descriptors_but_its_socket),
        ALONE(it_shares_device_memory_the_channel_and_the_gate),
        ALONE(it_ends_with_the_program),
        ALONE(it_starts_without_standard_descriptors_and_outlives_close_range),
        ALONE(terminal_signals_do_not_end_it),
        ALONE(children_of_the_program_do_not_disturb_it),
        ALONE(several_devices_with_many_engines),
        ALONE(nothing_is_lost_wherever_it_dies),
        ALONE(queued_jobs_end_with_it),
        ALONE(a_kernel_that_exits_loses_the_device),
        ALONE(a_kernel_that_crashes_ends_alone),
        ALONE(a_kernel_whose_stack_is_full_ends_alone),
        ALONE(a_child_of_a_kernel_is_no_engine),
        ALONE(closing_ends_a_kernel_that_never_returns),
        ALONE(closing_ends_a_kernel_that_hears_nothing),
        ALONE(a_stopped_process_does_not_hold_up_the_program),
        ALONE(a_stopped_process_does_not_keep_what_its_job_holds),
        ALONE(a_wrong_program_is_an_error_of_open),
        ALONE(a_kernel_that_is_not_there_is_an_error_of_its_job),
    };
    return cmocka_run_group_tests_name("isolated", tests, NULL, NULL);
}
