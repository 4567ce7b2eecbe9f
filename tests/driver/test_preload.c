/* SPDX-License-Identifier: MIT */
/*
 * An unmodified program under libhmm-preload.so: this file makes plain calls only, and looks at what the library counts as announced. It
 * starts itself again with the library preloaded. (The C library's functions stand behind ours then: their results are right, too.)
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/shm.h>
#include <sys/wait.h>

#include "support.h"

static char *away_with(size_t bytes, char value)
{
    char *p = map_pages(bytes);
    memset(p, value, bytes);
    assert_int_equal(hmm_migrate_to_device(device, p, bytes, NULL), 0);
    return p;
}

/* The counters of announced calls, each once. */
static void plain_calls_are_announced(void **state)
{
    (void)state;
    char *p = away_with(2 * MIB, 1), *q = map_pages(2 * MIB);
    struct hmm_stats a = stats_now();
    assert_int_equal(madvise(p, MIB / 2, MADV_DONTNEED), 0);
    assert_int_equal(mprotect(p + MIB / 2, MIB / 2, PROT_READ), 0);
    assert_int_equal(pkey_mprotect(p + MIB / 2, MIB / 2, PROT_READ | PROT_WRITE, -1), 0);
    assert_ptr_equal(mremap(p + MIB, MIB, MIB, MREMAP_MAYMOVE | MREMAP_FIXED, q), q);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    assert_ptr_equal(mmap(p, MIB / 4, PROT_READ | PROT_WRITE, flags, -1, 0), p);
    assert_ptr_equal(mmap64(p, MIB / 4, PROT_READ | PROT_WRITE, flags, -1, 0), p);
    assert_int_equal(munmap(p, MIB / 4), 0);
    struct hmm_stats b = stats_now();
    assert_int_equal(b.calls_remove - a.calls_remove, 1);
    assert_int_equal(b.calls_protect - a.calls_protect, 2);
    assert_int_equal(b.calls_remap - a.calls_remap, 1);
    assert_true(b.calls_unmap - a.calls_unmap >= 1); /* the rest may be nobody's by then */
    for (size_t i = 0; i < MIB; i++)
        assert_int_equal(q[i], 1);
    for (size_t i = MIB / 4; i < MIB; i++)
        assert_int_equal(p[i], i >= MIB / 2);
    munmap(p, MIB);
    unmap_pages(q, 2 * MIB);
}

static void errors_are_those_of_the_calls(void **state)
{
    (void)state;
    char *p = away_with(MIB, 2);
    errno = 0;
    assert_int_equal(munmap(p + 1, MIB), -1);
    assert_int_equal(errno, EINVAL);
    assert_ptr_equal(mmap(p, MIB, PROT_READ, MAP_PRIVATE | MAP_FIXED, -1, 0), MAP_FAILED);
    assert_int_equal(errno, EBADF);
    assert_ptr_equal(mremap(p, MIB, 0, 0), MAP_FAILED);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(mprotect(p, MIB, 0x7000), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(shmdt(p), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(brk((void *)(UINTPTR_MAX / 4)), -1);
    assert_int_equal(errno, ENOMEM);
    char *args[] = {(char *)"x", NULL};
    assert_int_equal(execv("/nowhere", args), -1);
    assert_int_equal(errno, ENOENT);
    assert_int_equal(execl("/nowhere", "a", "b", (char *)NULL), -1);
    assert_int_equal(errno, ENOENT);
    errno = 5;
    assert_int_equal(madvise(p, MIB / 2, MADV_DONTNEED), 0);
    assert_int_equal(errno, 5);
    assert_int_equal(p[MIB - 1], 2);
    unmap_pages(p, MIB);
}

static void the_heap_grows_and_shrinks(void **state)
{
    (void)state;
    char *old = sbrk(0), *p = sbrk((intptr_t)(2 * MIB));
    bool same = p == old;
    memset(p, 3, 2 * MIB);
    int r = hmm_migrate_to_device(device, p, 2 * MIB, NULL);
    struct hmm_stats a = stats_now();
    void *top = sbrk(-(intptr_t)MIB);
    int set = brk(old);
    struct hmm_stats b = stats_now();
    assert_true(same);
    assert_int_equal(r, 0);
    assert_ptr_equal(top, p + 2 * MIB);
    assert_int_equal(set, 0);
    assert_ptr_equal(sbrk(0), old);
    assert_int_equal(b.calls_unmap - a.calls_unmap, 2);
}

/* Every way to call exec gives its arguments and its environment on. */
static void start_sh(int way)
{
    char *args[] = {(char *)"sh", (char *)"-c", (char *)"exit $((A + $1))", (char *)"sh", (char *)"4", NULL};
    char *env[] = {(char *)"A=30", (char *)"PATH=/bin:/usr/bin", NULL};
    setenv("A", "30", 1);
    switch (way) {
    case 0: execve("/bin/sh", args, env); break;
    case 1: execv("/bin/sh", args); break;
    case 2: execvp("sh", args); break;
    case 3: execvpe("sh", args, env); break;
    case 4: execl("/bin/sh", args[0], args[1], args[2], args[3], args[4], (char *)NULL); break;
    case 5: execlp("sh", args[0], args[1], args[2], args[3], args[4], (char *)NULL); break;
    case 6: execle("/bin/sh", args[0], args[1], args[2], args[3], args[4], (char *)NULL, env); break;
    case 7: fexecve(open("/bin/sh", O_RDONLY), args, env); break;
    case 8: execveat(AT_FDCWD, "/bin/sh", args, env, 0); break;
    case 9: _Exit(34);
    case 10: _exit(34);
    default: exit(34);
    }
}

static void programs_are_started_in_every_way(void **state)
{
    (void)state;
    for (int way = 0; way < 12; way++) {
        int status;
        pid_t child = fork();
        if (child == 0) {
            hmm_dev dev; /* so that there is somebody to be told */
            alarm(20);
            if (hmm_device_open("soft:memory=4M,engines=1", &dev))
                _exit(90);
            start_sh(way);
            _exit(91);
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        if (status != 34 << 8)
            fail_msg("way %d: status %#x", way, status);
    }
    assert_int_equal(system("exit 3") >> 8, 3);
}

struct churn {
    pthread_t thread;
    uint64_t seed;
    char *at;
    unsigned wrong;
};

#define CHURN_STEPS 300

/* Owns its range: everything it finds there it has put there itself. */
static void *churn(void *arg)
{
    struct churn *c = arg;
    char value = 0;
    for (int step = 0; step < CHURN_STEPS; step++) {
        size_t page = page_size(), i = random_next(&c->seed) % 64;
        switch (random_next(&c->seed) % 6) {
        case 0:
            munmap(c->at, 256 * page);
            c->wrong += mmap(c->at, 256 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
                             0) != c->at;
            value = 0;
            break;
        case 1:
            madvise(c->at, 256 * page, MADV_DONTNEED);
            value = 0;
            break;
        case 2:
            value = (char)(step + 1);
            memset(c->at, value, 256 * page);
            break;
        case 3:
            mprotect(c->at + i * page, 64 * page, PROT_READ);
            c->wrong += c->at[i * page] != value;
            mprotect(c->at + i * page, 64 * page, PROT_READ | PROT_WRITE);
            break;
        default: hmm_migrate_to_device(device, c->at, 256 * page, NULL);
        }
        for (size_t k = 0; k < 256; k += 1 + i)
            c->wrong += c->at[k * page + i] != value;
    }
    return NULL;
}

static void threads_change_their_own_memory(void **state)
{
    (void)state;
    struct churn c[6];
    unsigned wrong = 0;
    for (unsigned i = 0; i < 6; i++) {
        c[i] = (struct churn){.seed = i + 50, .at = map_pages(256 * page_size())};
        pthread_create(&c[i].thread, NULL, churn, &c[i]);
    }
    for (unsigned i = 0; i < 6; i++) {
        pthread_join(c[i].thread, NULL);
        wrong += c[i].wrong;
        unmap_pages(c[i].at, 256 * page_size());
    }
    assert_int_equal(wrong, 0);
}

static void without_a_device_calls_are_only_made(void **state)
{
    (void)state;
    size_t bytes = 1 << 20;
    for (int i = 0; i < 100; i++) {
        char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(p, i, bytes);
        assert_int_equal(mprotect(p, bytes, PROT_READ), 0);
        p = mremap(p, bytes, 2 * bytes, MREMAP_MAYMOVE);
        assert_int_equal(p[bytes - 1], (char)i);
        assert_int_equal(munmap(p, 2 * bytes), 0);
    }
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(without_a_device_calls_are_only_made),
        TEST(plain_calls_are_announced),
        TEST(errors_are_those_of_the_calls),
        TEST(the_heap_grows_and_shrinks),
        TEST(programs_are_started_in_every_way),
        TEST(threads_change_their_own_memory),
        TEST_WITHOUT_DEVICE(without_a_device_calls_are_only_made), /* any more */
    };
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    printf("skipped: a sanitizer's own library has to come first\n");
    return 77;
#endif
    if (!getenv("LD_PRELOAD")) {
        char *args[] = {(char *)"test_preload", NULL};
        setenv("LD_PRELOAD", PRELOAD, 1);
        execv("/proc/self/exe", args);
        return 1;
    }
    return cmocka_run_group_tests_name("preload", tests, NULL, NULL);
}
