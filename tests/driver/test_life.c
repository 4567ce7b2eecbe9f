/* SPDX-License-Identifier: MIT */
/* The life of devices and of the manager, and what a forked child may do. */
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "support.h"

/* ---- opening and closing --------------------------------------------------------------------------------------------------------- */

static void without_a_device_there_is_no_thread_and_no_descriptor(void **state)
{
    (void)state;
    unsigned threads = thread_count(), descriptors = descriptor_count();
    for (int i = 0; i < 5; i++) {
        hmm_dev a = open_with(NULL), b = open_with(NULL);
        char *p = map_pages(MIB);
        assert_true(thread_count() > threads);
        device_fill(a, p, 1, MIB);
        device_fill(b, p, 2, MIB);
        close_device(a);
        close_device(b);
        assert_int_equal(p[5000], 2);
        uint64_t until = now_ms() + 5000; /* a joined thread leaves the list a moment later */
        while (thread_count() != threads && now_ms() < until)
            sleep_ms(1);
        assert_int_equal(thread_count(), threads);
        assert_int_equal(descriptor_count(), descriptors);
        unmap_pages(p, MIB);
    }
}

static void the_program_may_close_every_descriptor(void **state)
{
    (void)state;
    pid_t child = fork(); /* so that the suite keeps its own */
    if (child == 0) {
        hmm_dev dev;
        if (hmm_device_open(spec_with(NULL), &dev))
            _exit(1);
        char *p = malloc(4 * MIB);
        memset(p, 3, 4 * MIB);
        if (hmm_migrate_to_device(dev, p, 2 * MIB, NULL))
            _exit(2);
        syscall(SYS_close_range, 3, ~0u, 0);
        for (size_t i = 0; i < 4 * MIB; i++)
            if (p[i] != 3)
                _exit(3);
        if (hmm_migrate_to_device(dev, p, 4 * MIB, NULL) || hmm_migrate_to_system(p, 4 * MIB, NULL))
            _exit(4);
        for (size_t i = 0; i < 4 * MIB; i++)
            if (p[i] != 3)
                _exit(5);
        _exit(hmm_device_close(dev) ? 6 : 0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static void no_page_is_managed_after_the_last_close(void **state)
{
    (void)state;
    hmm_dev dev = open_with(NULL);
    char *p = map_pages(4 * MIB), *oracle = malloc(4 * MIB);
    fill_random(oracle, 4 * MIB, 81);
    memcpy(p, oracle, 4 * MIB);
    device_crc(dev, p, 4 * MIB);
    close_device(dev);
    for (size_t i = 0; i < 4 * MIB; i += page_size())
        assert_true(page_present(p + i));
    assert_memory_equal(p, oracle, 4 * MIB);
    madvise(p, 4 * MIB, MADV_DONTNEED); /* nobody waits for this any more */
    assert_int_equal(p[MIB], 0);
    pid_t child = fork(); /* and a child has it */
    if (child == 0)
        _exit(p[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    free(oracle);
    unmap_pages(p, 4 * MIB);
}

static void *open_and_close(void *arg)
{
    unsigned *failed = arg;
    for (int i = 0; i < 10; i++) {
        hmm_dev dev;
        hmm_fence *fence;
        if (hmm_device_open(spec_with("memory=1M"), &dev)) {
            (*failed)++;
            continue;
        }
        char *p = calloc(1, 100000);
        if (hmm_job_fill(dev, p, 5, 100000, &fence) || hmm_fence_wait(fence, -1) || p[99999] != 5)
            (*failed)++;
        else
            hmm_fence_put(fence);
        free(p);
        if (hmm_device_close(dev))
            (*failed)++;
    }
    return NULL;
}

static void threads_open_and_close_devices_at_once(void **state)
{
    (void)state;
    pthread_t threads[3];
    unsigned failed[3] = {0};
    (void)spec_with("memory=1M"); /* the same in every thread */
    for (int i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, open_and_close, &failed[i]);
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(failed[i], 0);
    }
}

struct submitter {
    pthread_t thread;
    hmm_dev dev;
    char *p;
    unsigned unexpected;
};

static void *submit_until_closed(void *arg)
{
    struct submitter *s = arg;
    for (;;) {
        hmm_fence *fence;
        int r = hmm_job_fill(s->dev, s->p, 1, 10000, &fence);
        if (r == -ENODEV)
            return NULL;
        if (r == 0) {
            r = hmm_fence_wait(fence, -1);
            hmm_fence_put(fence);
        }
        s->unexpected += r != 0 && r != -ECANCELED && r != -EBUSY;
    }
}

static void closing_races_with_submitting(void **state)
{
    (void)state;
    for (int round = 0; round < 10; round++) {
        hmm_dev stays = open_with("memory=1M"), dev = open_with("memory=1M");
        struct submitter s[2];
        for (int i = 0; i < 2; i++) {
            s[i] = (struct submitter){.dev = dev, .p = map_pages(MIB)};
            pthread_create(&s[i].thread, NULL, submit_until_closed, &s[i]);
        }
        sleep_ms(5);
        close_device(dev);
        for (int i = 0; i < 2; i++) {
            pthread_join(s[i].thread, NULL);
            assert_int_equal(s[i].unexpected, 0);
            unmap_pages(s[i].p, MIB);
        }
        close_device(stays);
    }
}

static void configuration_is_refused_while_a_device_is_open(void **state)
{
    (void)state;
    struct hmm_config c = {.size = sizeof(c), .staging_bytes = 8 * MIB};
    assert_int_equal(hmm_configure(&c), -EBUSY);
    close_device(device);
    assert_int_equal(hmm_configure(&c), 0);
    hmm_dev dev = open_with(NULL);
    char *p = map_pages(16 * MIB);
    memset(p, 1, 16 * MIB);
    assert_int_equal(hmm_migrate_to_device(dev, p, 16 * MIB, NULL), 0); /* twice what may be in transit */
    assert_int_equal(hmm_migrate_to_system(p, 16 * MIB, NULL), 0);
    for (size_t i = 0; i < 16 * MIB; i++)
        if (p[i] != 1)
            fail_msg("byte %zu is %d", i, p[i]);
    close_device(dev);
    c.staging_bytes = 0;
    assert_int_equal(hmm_configure(&c), 0);
    c.staging_bytes = 1;
    assert_int_equal(hmm_configure(&c), -EINVAL);
    assert_int_equal(hmm_configure(NULL), -EINVAL);
    unmap_pages(p, 16 * MIB);
}

/* ---- fork ----------------------------------------------------------------------------------------------------------------------------- */

/* How a child that does this ends: its exit status, or minus the signal. */
static int in_child(void (*fn)(void *arg), void *arg)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct sigaction act = {.sa_handler = SIG_DFL};
        sigaction(SIGSEGV, &act, NULL); /* not cmocka's */
        sigaction(SIGBUS, &act, NULL);
        fn(arg);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static void touch_in_child(void *arg)
{
    _exit(*(volatile char *)arg == 0 ? 100 : 101);
}

/* Zeros in place of data would be silent loss. (All of fork: test_fork, test_fork_handlers.) */
static void a_child_never_reads_zeros_for_migrated_data(void **state)
{
    (void)state;
    char *p = map_pages(MIB);
    memset(p, 9, MIB);
    assert_int_equal(hmm_migrate_to_device(device, p, MIB, NULL), 0);
    assert_int_equal(in_child(touch_in_child, p + 5000), 101);
    assert_int_equal(p[5000], 9); /* the parent's is untouched */
    assert_int_equal(hmm_migrate_to_system(p, MIB, NULL), 0);
    assert_int_equal(in_child(touch_in_child, p + 5000), 101);
    unmap_pages(p, MIB);
}

struct inherited {
    hmm_dev dev;
    hmm_fence *fence;
    char *p;
};

static void use_parents_handles(void *arg)
{
    struct inherited *i = arg;
    struct hmm_device_info info = {.size = sizeof(info)};
    struct hmm_stats stats = {.size = sizeof(stats)};
    hmm_fence *fence = NULL;
    if (hmm_device_close(i->dev) != -ESRCH)
        _exit(1);
    if (hmm_device_info(i->dev, &info) != -ESRCH)
        _exit(2);
    if (hmm_job_fill(i->dev, i->p, 1, 1, &fence) != -ESRCH)
        _exit(3);
    if (hmm_migrate_to_device(i->dev, i->p, 1, NULL) != -ESRCH)
        _exit(4);
    if (hmm_migrate_to_system(i->p, 1, NULL) != -ESRCH)
        _exit(5);
    if (hmm_audit() != -ESRCH)
        _exit(6);
    if (!strstr(hmm_last_message(), "fork"))
        _exit(7);
    hmm_stats(&stats); /* whatever it says, it lives */
}

static void a_child_cannot_use_its_parents_handles(void **state)
{
    (void)state;
    struct inherited i = {.dev = device, .p = map_pages(MIB)};
    assert_int_equal(in_child(use_parents_handles, &i), 0);
    device_fill(device, i.p, 4, MIB); /* and the parent goes on */
    assert_int_equal(i.p[1000], 4);
    unmap_pages(i.p, MIB);
}

static void open_own_device(void *arg)
{
    hmm_dev dev, parents = *(hmm_dev *)arg;
    hmm_fence *fence;
    if (hmm_device_open(spec_with("memory=4M"), &dev)) {
        fprintf(stderr, "in the child: %s\n", hmm_last_message());
        _exit(1);
    }
    if (dev == parents)
        _exit(2);
    char *p = calloc(1, 100000);
    if (hmm_job_fill(dev, p, 6, 100000, &fence) || hmm_fence_wait(fence, -1) || p[99999] != 6)
        _exit(3);
    hmm_fence_put(fence);
    if (hmm_job_fill(parents, p, 6, 1, &fence) != -ENODEV)
        _exit(4);
    if (hmm_audit())
        _exit(5);
    if (hmm_device_close(dev))
        _exit(6);
}

static void a_child_can_open_a_device_of_its_own(void **state)
{
    (void)state;
    char *p = map_pages(MIB);
    memset(p, 8, MIB);
    assert_int_equal(hmm_migrate_to_device(device, p, MIB, NULL), 0);
    assert_int_equal(in_child(open_own_device, &device), 0);
    assert_int_equal(p[99], 8);
    device_fill(device, p, 1, MIB);
    assert_int_equal(p[99], 1);
    unmap_pages(p, MIB);
}

static void look_for_device_memory(void *arg)
{
    FILE *f = fopen("/proc/self/maps", "re");
    char line[512];
    (void)arg;
    while (f && fgets(line, sizeof(line), f))
        if (strstr(line, "memfd:hmm"))
            _exit(1);
    _exit(f ? 0 : 2);
}

static void a_child_does_not_inherit_device_memory(void **state)
{
    (void)state;
    assert_int_equal(in_child(look_for_device_memory, NULL), 0);
}

static void count_descriptors(void *arg)
{
    unsigned n = 0;
    (void)arg;
    for (int fd = 3; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    _exit((int)n);
}

static void a_child_inherits_no_descriptor_of_the_library(void **state)
{
    (void)state;
    int with = in_child(count_descriptors, NULL);
    close_device(device);
    assert_int_equal(with, in_child(count_descriptors, NULL));
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(without_a_device_there_is_no_thread_and_no_descriptor),
        TEST_WITHOUT_DEVICE(the_program_may_close_every_descriptor),
        TEST_WITHOUT_DEVICE(no_page_is_managed_after_the_last_close),
        TEST_WITHOUT_DEVICE(threads_open_and_close_devices_at_once),
        TEST_WITHOUT_DEVICE(closing_races_with_submitting),
        TEST(configuration_is_refused_while_a_device_is_open),
        TEST(a_child_never_reads_zeros_for_migrated_data),
        TEST(a_child_cannot_use_its_parents_handles),
        TEST(a_child_can_open_a_device_of_its_own),
        TEST(a_child_does_not_inherit_device_memory),
        TEST(a_child_inherits_no_descriptor_of_the_library),
    };
    return cmocka_run_group_tests_name("life", tests, NULL, NULL);
}
