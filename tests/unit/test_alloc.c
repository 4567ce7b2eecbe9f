/* SPDX-License-Identifier: MIT */
/* The internal allocator: memory is zeroed, aligned, not handed out twice, accounted, and given back. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/lock.h"
#include "mem_source.h"
#include <hmm/driver.h>

#define CHUNK ((uint64_t)2 << 20)

static int set_up(void **state)
{
    (void)state;
    source_exhausted = false;
    mem_fail = NULL;
    source_start();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    mem_fail = NULL;
    mem_exit();
    if (source_mappings != 0)
        print_error("%ld mappings left\n", source_mappings);
    return source_mappings != 0;
}

static bool all(const unsigned char *p, unsigned char value, size_t n)
{
    return p[0] == value && memcmp(p, p + 1, n - 1) == 0;
}

static void test_every_size_is_zeroed_aligned_and_accounted(void **state)
{
    (void)state;
    for (int life = 0; life < 2; life++) { /* the second one gets used memory */
        for (size_t n = 1; n <= 40000; n += n < 300 ? 1 : 97) {
            unsigned char *p = mem_alloc(n), *q = mem_alloc(n);
            assert_non_null(p);
            assert_non_null(q);
            assert_int_equal((uintptr_t)p % 16, 0);
            assert_true(all(p, 0, n) && all(q, 0, n));
            memset(p, 0xa5, n);
            memset(q, 0x5a, n);
            assert_true(all(p, 0xa5, n));
            assert_true(mem_used() >= 2 * n && mem_used() <= 2 * (n + n / 4 + 4096));
            mem_free(p, n);
            mem_free(q, n);
            assert_int_equal(mem_used(), 0);
        }
    }
}

static void test_class_waste_is_bounded(void **state)
{
    (void)state;
    for (size_t n = 1; n <= 32768; n++) {
        void *p = mem_alloc(n);
        uint64_t got = mem_used();
        assert_true(got >= n && (n <= 16 || got - n < 16 || (got - n) * 4 <= n));
        mem_free(p, n);
    }
}

#define OBJECTS 700

struct object {
    unsigned char *p;
    size_t bytes;
    unsigned char fill;
};

static size_t random_size(unsigned *seed)
{
    switch (rand_r(seed) % 8) {
    case 0: return 1 + (size_t)rand_r(seed) % 100000;
    case 1: return 1 + (size_t)rand_r(seed) % 32768;
    case 2: return 4096;
    default: return 1 + (size_t)rand_r(seed) % 512;
    }
}

static void churn(struct object *o, int rounds, unsigned seed)
{
    for (int i = 0; i < rounds; i++) {
        struct object *x = &o[(unsigned)rand_r(&seed) % OBJECTS];
        if (x->p) {
            assert_true(all(x->p, x->fill, x->bytes));
            mem_free(x->p, x->bytes);
            x->p = NULL;
        } else {
            x->bytes = random_size(&seed);
            x->fill = (unsigned char)rand_r(&seed);
            x->p = mem_alloc(x->bytes);
            assert_non_null(x->p);
            assert_true(all(x->p, 0, x->bytes));
            memset(x->p, x->fill, x->bytes);
        }
    }
    for (int i = 0; i < OBJECTS; i++) {
        if (o[i].p) {
            assert_true(all(o[i].p, o[i].fill, o[i].bytes));
            mem_free(o[i].p, o[i].bytes);
            o[i].p = NULL;
        }
    }
}

static void test_random_objects_never_overlap(void **state)
{
    (void)state;
    static struct object o[OBJECTS];
    churn(o, 40000, 1);
    assert_int_equal(mem_used(), 0);
    assert_true(mem_mapped() <= CHUNK); /* one empty chunk may be kept */
}

static void *churn_thread(void *arg)
{
    struct object *o = calloc(OBJECTS, sizeof(*o));
    churn(o, 8000, (unsigned)(uintptr_t)arg);
    free(o);
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    pthread_t t[4];
    for (uintptr_t i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&t[i], NULL, churn_thread, (void *)(i + 10)), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    assert_int_equal(mem_used(), 0);
    assert_true(mem_mapped() <= 5 * CHUNK); /* each thread may have added one at the same time */
}

static void test_large_requests_are_given_back(void **state)
{
    (void)state;
    char *p = mem_alloc(32769);
    assert_int_equal(source_mappings, 1);
    assert_int_equal(mem_mapped(), mem_used());
    assert_true(mem_used() >= 32769);
    p[32768] = 1;
    mem_free(p, 32769);
    assert_int_equal(source_mappings, 0);
    assert_int_equal(mem_mapped(), 0);
}

static void test_empty_chunks_are_given_back_and_serve_other_sizes(void **state)
{
    (void)state;
    enum { N = 4000 };
    static void *p[N];
    for (int i = 0; i < N; i++)
        p[i] = mem_alloc(4096);
    uint64_t peak = mem_mapped();
    assert_true(peak >= N * 4096u);
    for (int i = 0; i < N; i++)
        mem_free(p[i], 4096);
    assert_int_equal(mem_mapped(), CHUNK);
    for (int i = 0; i < N; i++)
        assert_non_null(p[i] = mem_alloc(100)); /* less than a chunk of another class */
    assert_int_equal(mem_mapped(), CHUNK);
    for (int i = 0; i < N; i++)
        mem_free(p[i], 100);
}

static void test_injected_failure(void **state)
{
    (void)state;
    mem_fail = fail_nth;
    alloc_until_fail = 1;
    void *p = mem_alloc(64);
    assert_non_null(p);
    assert_null(mem_alloc(64));
    void *q = mem_alloc(100000);
    assert_non_null(q);
    mem_free(p, 64);
    mem_free(q, 100000);
    assert_int_equal(mem_used(), 0);
}

static void test_no_memory(void **state)
{
    (void)state;
    source_exhausted = true;
    assert_null(mem_alloc(64));
    assert_null(mem_alloc(100000));
    assert_null(mem_alloc(SIZE_MAX));
    assert_null(mem_alloc(SIZE_MAX - 4095));
    assert_int_equal(mem_used(), 0);
    assert_int_equal(mem_mapped(), 0);
    source_exhausted = false;
    void *p = mem_alloc(64);
    assert_non_null(p);
    mem_free(p, 64);
    mem_free(NULL, 64);
}

static void test_not_started(void **state)
{
    (void)state;
    mem_exit();
    assert_null(mem_alloc(1));
    assert_null(mem_alloc(100000));
    source_start();
    void *p = mem_alloc(1);
    assert_non_null(p);
    mem_free(p, 1);
}

static char logged[300];

static void keep_line(enum hmm_log_level level, const char *line, void *arg)
{
    (void)level;
    (void)arg;
    strncpy(logged, line, sizeof(logged) - 1);
}

static void test_wrong_size_is_reported_and_not_reused(void **state)
{
    (void)state;
    hmm_set_log(keep_line, NULL);
    void *p = mem_alloc(64);
    mem_free(p, 640);
    assert_non_null(strstr(logged, "640 bytes"));
    void *q = mem_alloc(640);
    assert_ptr_not_equal(p, q);
    mem_free(q, 640);
    mem_free(p, 64);
    assert_int_equal(mem_used(), 0);
    hmm_set_log(NULL, NULL);
}

/* The child has lost the chunks; it must not look for them. The parent keeps its own. */
static void test_forget_in_a_child(void **state)
{
    (void)state;
    char *p = mem_alloc(64);
    memset(p, 1, 64);
    pid_t pid = fork();
    if (pid == 0) {
        mem_forget();
        char *q = mem_alloc(64);
        bool ok = mem_used() == 64 && mem_mapped() == CHUNK && q && q != p;
        mem_free(q, 64);
        _exit(ok ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    mem_free(p, 64);
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_every_size_is_zeroed_aligned_and_accounted),
        T(test_class_waste_is_bounded),
        T(test_random_objects_never_overlap),
        T(test_threads),
        T(test_large_requests_are_given_back),
        T(test_empty_chunks_are_given_back_and_serve_other_sizes),
        T(test_injected_failure),
        T(test_no_memory),
        T(test_not_started),
        T(test_wrong_size_is_reported_and_not_reused),
        T(test_forget_in_a_child),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
