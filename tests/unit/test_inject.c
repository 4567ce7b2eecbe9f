/* SPDX-License-Identifier: MIT */
/* Injection: the same seed decides alike, the nth call and only that fails, rates are kept, what cannot fail does not, and a
 * failed operation did exactly what its failure may do. Over a table of counting stand-ins, without a kernel. */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "debug/inject.h"

#define PAGE os_page_size()

/* ---- the stand-ins: succeed, and note what was asked ---- */

static struct {
    unsigned calls;
    int64_t len;
    unsigned flags, n;
} done;

static int64_t fill(size_t len)
{
    done.calls++;
    done.len = (int64_t)len;
    return (int64_t)len;
}

static int ok(void)
{
    done.calls++;
    return 0;
}

static int fake_uffd_open(uint64_t features, struct os_uffd *out)
{
    (void)features, (void)out;
    return ok();
}

static int fake_range(int uffd, uintptr_t start, size_t len)
{
    (void)uffd, (void)start, (void)len;
    return ok();
}

static int64_t fake_copy(int uffd, uintptr_t dst, const void *src, size_t len)
{
    (void)uffd, (void)dst, (void)src;
    return fill(len);
}

static int64_t fake_zeropage(int uffd, uintptr_t dst, size_t len)
{
    (void)uffd, (void)dst;
    return fill(len);
}

static int64_t fake_move(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    (void)uffd, (void)dst, (void)src;
    return fill(len);
}

static int fake_fd(int fd)
{
    (void)fd;
    return ok();
}

static int fake_read(int uffd, struct uffd_msg *msgs, unsigned n)
{
    (void)uffd, (void)msgs, (void)n;
    return ok();
}

static int fake_poll(const int *fds, unsigned n, int timeout_ms)
{
    (void)fds, (void)n, (void)timeout_ms;
    return ok();
}

static int fake_open(void)
{
    return ok();
}

static int fake_scan(int fd, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n, uintptr_t *walked)
{
    (void)fd, (void)v;
    done.n = n;
    *walked = n > 1 ? end : start + PAGE;
    return ok();
}

static int fake_vma(int fd, uintptr_t addr, struct os_vma *out)
{
    (void)fd, (void)addr, (void)out;
    return ok();
}

static int fake_map(size_t len, size_t align, unsigned flags, void **out)
{
    (void)len, (void)align, (void)flags, (void)out;
    return ok();
}

static int fake_remap(void *addr, size_t len, unsigned flags)
{
    (void)addr, (void)len;
    done.flags = flags;
    return ok();
}

static int fake_unmap(void *addr, size_t len)
{
    (void)addr, (void)len;
    return ok();
}

static int fake_advise(void *addr, size_t len, int advice)
{
    (void)addr, (void)len, (void)advice;
    return ok();
}

static int64_t fake_vm_read(uintptr_t addr, void *buf, size_t len)
{
    (void)addr, (void)buf;
    return fill(len);
}

static int64_t fake_vm_write(uintptr_t addr, const void *buf, size_t len)
{
    (void)addr, (void)buf;
    return fill(len);
}

static int fake_blocks(uintptr_t *tcbs, unsigned max)
{
    (void)tcbs, (void)max;
    return ok();
}

static int fake_files(const int *keep, unsigned n)
{
    (void)keep, (void)n;
    return ok();
}

static int fake_text(const char *path, char *buf, size_t size)
{
    (void)path, (void)buf, (void)size;
    return ok();
}

static const struct os_ops fake = {
    .uffd_open = fake_uffd_open,
    .uffd_register = fake_range,
    .uffd_unregister = fake_range,
    .uffd_copy = fake_copy,
    .uffd_zeropage = fake_zeropage,
    .uffd_move = fake_move,
    .uffd_wake = fake_range,
    .uffd_pending = fake_fd,
    .uffd_read = fake_read,
    .poll = fake_poll,
    .event_open = fake_open,
    .event_set = fake_fd,
    .event_clear = fake_fd,
    .pagemap_open = fake_open,
    .maps_open = fake_open,
    .pagemap_scan = fake_scan,
    .vma_query = fake_vma,
    .map = fake_map,
    .remap_fresh = fake_remap,
    .unmap = fake_unmap,
    .advise = fake_advise,
    .vm_read = fake_vm_read,
    .vm_write = fake_vm_write,
    .thread_cpu = fake_fd,
    .bind_cpu = fake_fd,
    .thread_blocks = fake_blocks,
    .private_files = fake_files,
    .close = fake_fd,
    .kernel_version = fake_open,
    .vma_query_fast = fake_fd,
    .read_text = fake_text,
};

/* ---- calls by number ---- */

enum call {
    C_OPEN,
    C_REGISTER,
    C_UNREGISTER,
    C_COPY,
    C_ZEROPAGE,
    C_MOVE,
    C_PENDING,
    C_EVENT_OPEN,
    C_PAGEMAP_OPEN,
    C_MAPS_OPEN,
    C_SCAN,
    C_VMA,
    C_MAP,
    C_REMAP,
    C_UNMAP,
    C_DONTFORK,
    C_POPULATE,
    C_VM_READ,
    C_VM_WRITE,
    C_THREAD_CPU,
    C_BIND_CPU,
    C_BLOCKS,
    C_FILES,
    CALLS,
};

#define LEN ((int64_t)(8 * PAGE))

/* What the call returned; sound when it is what the stand-in returned and was asked in full. */
static int64_t call(enum call c, bool *sound)
{
    struct os_region v[4];
    uintptr_t walked = 0;
    int64_t r = 0;
    bool full = true;

    memset(&done, 0, sizeof(done));
    switch (c) {
    case C_OPEN: r = os->uffd_open(0, NULL); break;
    case C_REGISTER: r = os->uffd_register(3, 0, LEN); break;
    case C_UNREGISTER: r = os->uffd_unregister(3, 0, LEN); break;
    case C_COPY: r = os->uffd_copy(3, 0, NULL, LEN); break;
    case C_ZEROPAGE: r = os->uffd_zeropage(3, 0, LEN); break;
    case C_MOVE: r = os->uffd_move(3, 0, LEN, LEN); break;
    case C_PENDING: r = os->uffd_pending(3); break;
    case C_EVENT_OPEN: r = os->event_open(); break;
    case C_PAGEMAP_OPEN: r = os->pagemap_open(); break;
    case C_MAPS_OPEN: r = os->maps_open(); break;
    case C_SCAN:
        r = os->pagemap_scan(3, 0, LEN, v, 4, &walked);
        full = !r && walked == (uintptr_t)LEN;
        break;
    case C_VMA: r = os->vma_query(3, 0, NULL); break;
    case C_MAP: r = os->map(LEN, PAGE, 0, NULL); break;
    case C_REMAP:
        r = os->remap_fresh(NULL, LEN, 0);
        full = !done.flags;
        break;
    case C_UNMAP: r = os->unmap(NULL, LEN); break;
    case C_DONTFORK: r = os->advise(NULL, LEN, OS_ADVISE_DONTFORK); break;
    case C_POPULATE: r = os->advise(NULL, LEN, OS_ADVISE_POPULATE_WRITE); break;
    case C_VM_READ: r = os->vm_read(0, NULL, LEN); break;
    case C_VM_WRITE: r = os->vm_write(0, NULL, LEN); break;
    case C_THREAD_CPU: r = os->thread_cpu(1); break;
    case C_BIND_CPU: r = os->bind_cpu(0); break;
    case C_BLOCKS: r = os->thread_blocks(NULL, 0); break;
    case C_FILES: r = os->private_files(NULL, 0); break;
    case CALLS: break;
    }
    *sound = done.calls == 1 && full && (done.len ? r == LEN && done.len == LEN : r == 0);
    return r;
}

static void start(uint64_t seed, uint32_t os_rate, uint64_t nth)
{
    struct inject_config c = {.seed = seed, .permille = {[INJECT_OS] = os_rate}, .fail_nth = nth};

    os = &fake;
    inject_start(&c);
    assert_true(inject_active());
    assert_ptr_not_equal(os, &fake);
}

static void stop(void)
{
    inject_stop();
    assert_false(inject_active());
    assert_ptr_equal(os, &fake);
    os = &os_linux;
}

/* Calls that set the library up: not at random. */
static bool set_up_call(enum call c)
{
    return c == C_OPEN || c == C_EVENT_OPEN || c == C_PAGEMAP_OPEN || c == C_MAPS_OPEN || c == C_MAP || c == C_UNMAP ||
           c == C_FILES;
}

/* ---- tests ---- */

static void test_off(void **state)
{
    bool sound;

    (void)state;
    start(1, 0, 0);
    for (int i = 0; i < 1000; i++) {
        call((enum call)(i % CALLS), &sound);
        assert_true(sound);
    }
    assert_int_equal(inject_calls(), 1000);
    assert_int_equal(inject_failures(), 0);
    assert_string_equal(inject_last(), "");
    stop();
}

static void test_always(void **state)
{
    bool sound;

    (void)state;
    start(1, 1000, 0);
    for (int i = 0; i < 50 * CALLS; i++) {
        enum call c = (enum call)(i % CALLS);

        call(c, &sound);
        assert_int_equal(sound, set_up_call(c));
    }
    stop();
}

static void test_nth(void **state)
{
    bool sound;

    (void)state;
    for (unsigned nth = 1; nth <= 2 * CALLS; nth++) {
        start(nth, 0, nth);
        for (unsigned i = 1; i <= 3 * CALLS; i++) {
            call((enum call)((i - 1) % CALLS), &sound);
            if (sound != (i != nth))
                fail_msg("call %u, nth %u: %s", i, nth, inject_last());
        }
        assert_int_equal(inject_failures(), 1);
        assert_true(inject_last()[0]);
        assert_int_equal(inject_calls(), 3 * CALLS);
        stop();
    }
}

static void test_rate(void **state)
{
    unsigned failures[CALLS] = {0};
    bool sound;

    (void)state;
    start(7, 100, 0);
    for (int i = 0; i < 10000 * CALLS; i++) {
        call((enum call)(i % CALLS), &sound);
        failures[i % CALLS] += !sound;
    }
    for (int c = 0; c < CALLS; c++) {
        if (set_up_call((enum call)c))
            assert_int_equal(failures[c], 0);
        else
            assert_in_range(failures[c], 800, 1200); /* more than six sigma around 1000 */
    }
    stop();
}

static void record(uint64_t seed, int64_t *out, unsigned n, unsigned stride)
{
    bool sound;

    start(seed, 300, 0);
    for (unsigned i = 0; i < n; i++) {
        out[i] = call(C_MOVE, &sound);
        /* What other sites do in between changes nothing. */
        for (unsigned k = 0; k < stride; k++)
            call((enum call)(k % 3), &sound);
    }
    stop();
}

static void test_same_seed(void **state)
{
    int64_t a[500], b[500], c[500];

    (void)state;
    record(42, a, 500, 0);
    record(42, b, 500, 5);
    record(43, c, 500, 0);
    assert_memory_equal(a, b, sizeof(a));
    assert_memory_not_equal(a, c, sizeof(a));
}

/* What came out of MOVE, and what was done: every way that the real one has, and none that it has not. */
static void test_move_failures(void **state)
{
    unsigned seen_error[5] = {0}, half = 0, lie_half = 0, lie_whole = 0;
    static const int errors[5] = {-EAGAIN, -EBUSY, -EINVAL, -ENOMEM, -EEXIST};
    bool sound;

    (void)state;
    start(3, 1000, 0);
    for (int i = 0; i < 2000; i++) {
        int64_t r = call(C_MOVE, &sound);
        unsigned e = 0;

        if (r == LEN / 2) {
            assert_int_equal(done.len, LEN / 2);
            half++;
            continue;
        }
        while (e < 5 && r != errors[e])
            e++;
        assert_true(e < 5);
        seen_error[e]++;
        /* Only EEXIST lies. */
        assert_int_equal(done.calls, r == -EEXIST);
        lie_half += r == -EEXIST && done.len == LEN / 2;
        lie_whole += r == -EEXIST && done.len == LEN;
    }
    for (unsigned e = 0; e < 5; e++)
        assert_true(seen_error[e] > 100);
    assert_true(half > 100 && lie_half > 100 && lie_whole > 100);
    /* A single page is moved whole or not at all. */
    for (int i = 0; i < 500; i++) {
        memset(&done, 0, sizeof(done));
        os->uffd_move(3, 0, LEN, PAGE);
        assert_true(!done.calls || done.len == (int64_t)PAGE);
    }
    stop();
}

static void test_copy_failures(void **state)
{
    unsigned again = 0, memory = 0, partial = 0;
    bool sound;

    (void)state;
    start(4, 1000, 0);
    for (int i = 0; i < 1000; i++) {
        int64_t r = call(i & 1 ? C_COPY : C_ZEROPAGE, &sound);

        again += r == -EAGAIN;
        memory += r == -ENOMEM;
        partial += r == LEN / 2;
        assert_int_equal(done.len, r > 0 ? r : 0);
    }
    assert_int_equal(again + memory + partial, 1000);
    assert_true(again > 100 && memory > 100 && partial > 100);
    for (int i = 0; i < 100; i++)
        assert_true(os->uffd_copy(3, 0, NULL, PAGE) < 0);
    stop();
}

static void test_other_failures(void **state)
{
    bool sound;

    (void)state;
    start(5, 1000, 0);
    for (int i = 0; i < 200; i++) {
        int64_t r = call(C_SCAN, &sound);

        assert_true(r == -ENOMEM ? !done.calls : r == 0 && done.n == 1); /* stopped early, by contract */
        assert_int_equal(call(C_REMAP, &sound), -ENOMEM);
        assert_int_equal(done.flags, OS_MAP_RESERVE); /* without access, by contract */
        assert_int_equal(call(C_VM_READ, &sound), LEN / 2);
        assert_int_equal(call(C_VM_WRITE, &sound), LEN / 2);
        assert_int_equal(call(C_PENDING, &sound), 1);
        memset(&done, 0, sizeof(done));
        assert_int_equal(os->vm_read(0, NULL, 1), 1);
    }
    stop();
}

/* What the real ones cannot fail to do. */
static void test_never(void **state)
{
    (void)state;
    for (int nth = 0; nth < 2; nth++) {
        start(6, 1000, nth ? 1 : 0);
        for (int i = 0; i < 200; i++) {
            assert_int_equal(os->uffd_wake(3, 0, LEN), 0);
            assert_int_equal(os->uffd_read(3, NULL, 0), 0);
            assert_int_equal(os->poll(NULL, 0, 0), 0);
            assert_int_equal(os->event_set(3), 0);
            assert_int_equal(os->event_clear(3), 0);
            assert_int_equal(os->close(3), 0);
            assert_int_equal(os->advise(NULL, LEN, OS_ADVISE_DONTNEED), 0);
            assert_int_equal(os->kernel_version(), 0);
            assert_int_equal(os->vma_query_fast(3), 0);
            assert_int_equal(os->read_text("", NULL, 0), 0);
        }
        assert_int_equal(inject_calls(), 0);
        stop();
    }
}

static int source_map(size_t bytes, void **out)
{
    return os_linux.map(bytes, PAGE, 0, out);
}

static void source_unmap(void *ptr, size_t bytes)
{
    os_linux.unmap(ptr, bytes);
}

static void test_allocator(void **state)
{
    static const struct mem_source source = {source_map, source_unmap};
    struct inject_config c = {.seed = 9, .permille = {[INJECT_ALLOC] = 500}};
    unsigned failures = 0;
    void *p;

    (void)state;
    mem_init(&source);
    inject_start(&c);
    for (int i = 0; i < 1000; i++) {
        p = mem_alloc(100);
        failures += !p;
        mem_free(p, 100);
    }
    assert_in_range(failures, 400, 600);
    assert_int_equal(inject_failures(), failures);
    assert_string_equal(inject_last(), "mem_alloc: ENOMEM");
    inject_stop();
    for (int i = 0; i < 100; i++) {
        p = mem_alloc(100);
        assert_non_null(p);
        mem_free(p, 100);
    }
    mem_exit();
}

static void test_driver(void **state)
{
    struct inject_config c = {.seed = 9, .permille = {[INJECT_DRIVER] = 500}};
    unsigned copies = 0, submits = 0;

    (void)state;
    assert_int_equal(inject_driver("copy"), 0);
    inject_start(&c);
    for (int i = 0; i < 1000; i++) {
        int err = inject_driver("copy");

        assert_true(err == 0 || err == -EIO || err == -ENOMEM || err == -ENODEV);
        copies += err != 0;
        err = inject_driver("submit");
        assert_true(err == 0 || err == -EBUSY);
        submits += err != 0;
        assert_int_equal(inject_driver("open"), 0); /* set-up: not at random */
        err = inject_driver("no such operation");
        assert_true(err == 0 || err == -EIO);
    }
    assert_in_range(copies, 400, 600);
    assert_in_range(submits, 400, 600);
    inject_stop();
    c = (struct inject_config){.fail_nth = 2};
    inject_start(&c);
    assert_int_equal(inject_driver("open"), 0);
    assert_true(inject_driver("open") < 0);
    assert_int_equal(inject_driver("open"), 0);
    inject_stop();
}

static unsigned hooked;

static void hook(const char *point)
{
    assert_string_equal(point, "test");
    hooked++;
}

static void test_points(void **state)
{
    struct inject_config c = {.seed = 11, .permille = {[INJECT_DELAY] = 1000}};
    uint64_t t, with, without;

    (void)state;
    SEQ_POINT("test");
    assert_int_equal(hooked, 0);
    inject_point_hook = hook;
    inject_points_on = 1;
    SEQ_POINT("test");
    assert_int_equal(hooked, 1);
    t = os_now();
    for (int i = 0; i < 50; i++)
        SEQ_POINT("test");
    without = os_now() - t;
    inject_start(&c);
    t = os_now();
    for (int i = 0; i < 50; i++)
        SEQ_POINT("test");
    with = os_now() - t;
    assert_int_equal(hooked, 101);
    assert_true(with > 3000000 && with > without); /* 50 of 100 us on average */
    inject_stop();
    assert_int_equal(inject_points_on, 1); /* the hook still wants them */
    inject_point_hook = NULL;
    inject_points_on = 0;
    inject_start(&c);
    assert_int_equal(inject_points_on, 1);
    inject_stop();
    assert_int_equal(inject_points_on, 0);
    SEQ_POINT("test");
    assert_int_equal(hooked, 101);
}

static void *hammer(void *failures)
{
    unsigned n = 0;

    for (int i = 0; i < 20000; i++)
        n += os->uffd_register(3, 0, LEN) != 0;
    __atomic_fetch_add((unsigned *)failures, n, __ATOMIC_RELAXED);
    return NULL;
}

static int quiet_register(int uffd, uintptr_t start, size_t len)
{
    (void)uffd, (void)start, (void)len;
    return 0;
}

/* Threads share the sequence: together they see what one would have seen. */
static void test_threads(void **state)
{
    struct inject_config c = {.seed = 12, .permille = {[INJECT_OS] = 100}};
    static const struct os_ops quiet = {.uffd_register = quiet_register};
    unsigned alone = 0, together = 0;
    pthread_t t[4];

    (void)state;
    os = &quiet;
    inject_start(&c);
    for (int i = 0; i < 4; i++)
        hammer(&alone);
    inject_stop();
    inject_start(&c);
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&t[i], NULL, hammer, &together), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    assert_int_equal(inject_calls(), 80000);
    assert_int_equal(inject_failures(), together);
    inject_stop();
    os = &os_linux;
    assert_int_equal(alone, together);
}

#ifdef HMM_MUTATIONS
static void test_mutations(void **state)
{
    (void)state; /* main() set HMM_MUTATE=first,second one,third */
    assert_true(mutate("first"));
    assert_true(mutate("second one"));
    assert_true(mutate("third"));
    assert_false(mutate("firs"));
    assert_false(mutate("first,"));
    assert_false(mutate("firstly"));
    assert_false(mutate("hird"));
    assert_false(mutate(""));
}
#else
static void test_mutations(void **state)
{
    (void)state;
    assert_false(mutate("first"));
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_off),           cmocka_unit_test(test_always),         cmocka_unit_test(test_nth),
        cmocka_unit_test(test_rate),          cmocka_unit_test(test_same_seed),      cmocka_unit_test(test_move_failures),
        cmocka_unit_test(test_copy_failures), cmocka_unit_test(test_other_failures), cmocka_unit_test(test_never),
        cmocka_unit_test(test_allocator),     cmocka_unit_test(test_driver),         cmocka_unit_test(test_points),
        cmocka_unit_test(test_threads),       cmocka_unit_test(test_mutations),
    };

    setenv("HMM_MUTATE", "first,second one,third", 1);
    return cmocka_run_group_tests_name("inject", tests, NULL, NULL);
}
