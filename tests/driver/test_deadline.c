/* SPDX-License-Identifier: MIT */
/*
 * Kernels that hold what the CPU wants, and kernels that never end: an invalidation waits for a span, but not for ever, and
 * nothing else waits for a kernel.
 */
#include <dirent.h>
#include <signal.h>
#include <sys/syscall.h>

#include "support.h"

#define SHORT_MS 200
#define GRACE_MS 2000 /* a busy machine */

struct holder {
    struct control control; /* flags[0]: holds its span, [1]: go on */
    char *p;
};

/* Writes, says so, and never gives the span back. */
HMM_KERNEL(hold_for_ever)
{
    struct holder *h = arg;
    volatile uint32_t *flags = open_control(&h->control);
    size_t len = 8;
    char *span = hmm_span_write(acc, h->p, &len);
    memcpy(span, "written", 8);
    __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
    while (!flags[1])
        ;
    memcpy(span, "TOOLATE", 8);
    return 0;
}

HMM_KERNEL(loop_without_a_span)
{
    struct holder *h = arg;
    volatile uint32_t *flags = open_control(&h->control);
    hmm_yield(acc);
    __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
    while (!flags[1])
        ;
    return 1;
}

HMM_KERNEL(loop_over_spans)
{
    struct holder *h = arg;
    volatile uint32_t *flags = open_control(&h->control);
    __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
    for (uint64_t n = 0; !flags[1]; n++) {
        size_t len = 8;
        uint64_t *span = hmm_span_write(acc, h->p + n % 4 * page_size(), &len);
        *span = n;
    }
    return 1;
}

/* Holds a span, but yields every now and then. */
HMM_KERNEL(hold_and_yield)
{
    struct holder *h = arg;
    volatile uint32_t *flags = open_control(&h->control);
    __atomic_add_fetch(&flags[0], 1, __ATOMIC_SEQ_CST);
    while (!flags[1]) {
        size_t len = 8;
        hmm_span_read(acc, h->p, &len);
        for (volatile int spin = 0; spin < 100000; spin++)
            ;
        hmm_yield(acc);
    }
    return 1;
}

static struct holder make_holder(size_t bytes)
{
    return (struct holder){make_control(), map_pages(bytes)};
}

static void free_holder(struct holder *h, size_t bytes)
{
    free_control(&h->control);
    unmap_pages(h->p, bytes);
}

static void a_kernel_that_holds_a_span_for_ever_is_ended(void **state)
{
    (void)state;
    skip_without_device_faults();
    struct holder h = make_holder(page_size());
    hmm_fence *fence = launch(device, hold_for_ever, &h, sizeof(h), SHORT_MS);
    wait_for(h.control.flags, 1);
    assert_int_equal(pages_in_state(h.p, 8, HMM_PAGE_DEVICE), 1);
    uint64_t before = now_ms();
    assert_string_equal(h.p, "written"); /* the CPU touches the page */
    uint64_t took = now_ms() - before;
    h.control.flags[1] = 1;
    struct hmm_fence_info info = finish(fence);
    assert_true(took >= SHORT_MS - 20 && took < SHORT_MS + GRACE_MS);
    assert_int_equal(info.status, -ETIMEDOUT);
    assert_non_null(strstr(info.message, "held a span for 200 ms"));
    assert_string_equal(h.p, "written");
    free_holder(&h, page_size());
}

static void a_span_given_back_in_time_costs_nothing(void **state)
{
    (void)state;
    struct holder h = make_holder(page_size());
    hmm_fence *fence = launch(device, hold_for_ever, &h, sizeof(h), 20000);
    wait_for(h.control.flags, 1);
    h.control.flags[1] = 1;
    must(fence);
    assert_string_equal(h.p, "TOOLATE");
    free_holder(&h, page_size());
}

static void an_engine_works_on_after_ending_a_kernel(void **state)
{
    (void)state;
    skip_without_device_faults();
    hmm_dev dev = open_with("engines=1");
    struct holder h = make_holder(page_size());
    for (int i = 0; i < 5; i++) {
        h.control.flags[0] = 0;
        hmm_fence *fence = launch(dev, hold_for_ever, &h, sizeof(h), 30);
        wait_for(h.control.flags, 1);
        assert_string_equal(h.p, "written");
        assert_int_equal(finish(fence).status, -ETIMEDOUT);
        assert_int_equal(device_crc(dev, "123456789", 9), 0xe3069283);
    }
    free_holder(&h, page_size());
}

/* The deadline is the job's: the next job on the engine is not hit. */
static void ending_a_kernel_never_hits_the_next_job(void **state)
{
    (void)state;
    hmm_dev dev = open_with("engines=1");
    struct holder h = make_holder(4 * page_size());
    for (int i = 0; i < 40; i++) {
        h.control.flags[0] = h.control.flags[1] = 0;
        hmm_fence *held = launch(dev, hold_for_ever, &h, sizeof(h), 10);
        hmm_fence *next[8];
        for (int k = 0; k < 8; k++)
            next[k] = launch(dev, loop_over_spans, &h, sizeof(h), 10);
        wait_for(h.control.flags, 1);
        for (volatile int spin = 0; spin < i * 1000; spin++)
            ;
        volatile char touch = *(volatile char *)h.p;
        (void)touch;
        h.control.flags[1] = 1;
        int status = finish(held).status;
        assert_true(status == -ETIMEDOUT || status == 0);
        for (int k = 0; k < 8; k++)
            assert_int_equal(finish(next[k]).status, 0);
    }
    free_holder(&h, 4 * page_size());
}

static void several_engines_that_hold_one_page_are_all_ended(void **state)
{
    (void)state;
    skip_without_device_faults();
    hmm_dev dev = open_with("engines=3");
    struct holder h = make_holder(page_size());
    hmm_fence *fences[3];
    for (int i = 0; i < 3; i++)
        fences[i] = launch(dev, hold_for_ever, &h, sizeof(h), SHORT_MS);
    wait_for(h.control.flags, 3);
    assert_int_equal(pages_in_state(h.p, 8, HMM_PAGE_DEVICE), 1);
    assert_string_equal(h.p, "written");
    h.control.flags[1] = 1;
    for (int i = 0; i < 3; i++)
        assert_int_equal(finish(fences[i]).status, -ETIMEDOUT);
    assert_string_equal(h.p, "written");
    free_holder(&h, page_size());
}

static void a_kernel_that_yields_is_not_ended(void **state)
{
    (void)state;
    struct holder h = make_holder(page_size());
    hmm_fence *fence = launch(device, hold_and_yield, &h, sizeof(h), 100);
    wait_for(h.control.flags, 1);
    for (uint64_t until = now_ms() + 500; now_ms() < until;)
        (*(volatile char *)h.p)++;
    h.control.flags[1] = 1;
    assert_int_equal(must(fence), 1);
    free_holder(&h, page_size());
}

static void a_kernel_that_goes_from_span_to_span_is_not_ended(void **state)
{
    (void)state;
    struct holder h = make_holder(4 * page_size());
    hmm_fence *fence = launch(device, loop_over_spans, &h, sizeof(h), 100);
    wait_for(h.control.flags, 1);
    for (uint64_t until = now_ms() + 500; now_ms() < until;)
        for (int i = 0; i < 4; i++)
            ((volatile char *)h.p)[i * page_size() + 100]++;
    h.control.flags[1] = 1;
    assert_int_equal(must(fence), 1);
    free_holder(&h, 4 * page_size());
}

#define SPARSE 200

/* One word in each of many blocks, so that the device must keep track of more blocks than it can. */
HMM_KERNEL(touch_many_blocks)
{
    char *first = *(char **)arg;
    uint64_t sum = 0, word;
    for (int round = 0; round < 3; round++)
        for (size_t i = 0; i < SPARSE; i++) {
            hmm_get(acc, &word, first + i * BLOCK, sizeof(word));
            sum += word;
        }
    return sum;
}

/* A device with little memory keeps track of few blocks. One of which a span is in use must not be forgotten. */
static void a_span_is_waited_for_after_many_other_blocks_were_used(void **state)
{
    (void)state;
    skip_without_device_faults();
    hmm_dev dev = open_with("memory=4M,engines=2");
    struct holder h = make_holder(page_size());
    char *area = mmap(NULL, (SPARSE + 1) * BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *first = (char *)(((uintptr_t)area + BLOCK - 1) & ~(BLOCK - 1));
    for (size_t i = 0; i < SPARSE; i++) {
        mprotect(first + i * BLOCK, page_size(), PROT_READ | PROT_WRITE); /* a mapping of one page: neighbours do not come */
        *(uint64_t *)(first + i * BLOCK) = i;
    }
    hmm_fence *fence = launch(dev, hold_for_ever, &h, sizeof(h), SHORT_MS);
    wait_for(h.control.flags, 1);
    assert_int_equal(must_run(dev, touch_many_blocks, &first, sizeof(first)), 3 * SPARSE * (SPARSE - 1) / 2);
    assert_int_equal(pages_in_state(h.p, 8, HMM_PAGE_DEVICE), 1);
    uint64_t before = now_ms();
    assert_string_equal(h.p, "written");
    assert_true(now_ms() - before >= SHORT_MS - 20);
    h.control.flags[1] = 1;
    assert_int_equal(finish(fence).status, -ETIMEDOUT);
    assert_string_equal(h.p, "written");
    munmap(area, (SPARSE + 1) * BLOCK);
    free_holder(&h, page_size());
}

static void munmap_does_not_wait_for_a_span(void **state)
{
    (void)state;
    skip_without_device_faults();
    struct holder h = make_holder(page_size());
    hmm_fence *fence = launch(device, hold_for_ever, &h, sizeof(h), 1000);
    wait_for(h.control.flags, 1);
    uint64_t before = now_ms();
    unmap_pages(h.p, page_size());
    assert_true(now_ms() - before < 500);
    assert_int_equal(finish(fence).status, -ETIMEDOUT); /* what it holds was taken away */
    free_control(&h.control);
}

/* ---- nothing waits for a kernel ------------------------------------------------------------------------------------------------- */

static void migration_goes_on_while_all_engines_are_busy(void **state)
{
    (void)state;
    hmm_dev dev = open_with("engines=1,copies=1");
    struct holder h = make_holder(page_size());
    char *p = map_pages(8 * MIB), *oracle = malloc(8 * MIB);
    fill_random(oracle, 8 * MIB, 51);
    memcpy(p, oracle, 8 * MIB);
    hmm_fence *fence = launch(dev, hold_for_ever, &h, sizeof(h), 20000);
    wait_for(h.control.flags, 1);
    uint64_t before = now_ms();
    assert_int_equal(hmm_migrate_to_device(dev, p, 8 * MIB, NULL), 0);
    assert_memory_equal(p, oracle, 4 * MIB);
    assert_int_equal(hmm_migrate_to_system(p, 8 * MIB, NULL), 0);
    assert_memory_equal(p, oracle, 8 * MIB);
    assert_true(now_ms() - before < GRACE_MS);
    h.control.flags[1] = 1;
    must(fence);
    free(oracle);
    unmap_pages(p, 8 * MIB);
    free_holder(&h, page_size());
}

/* ---- closing ------------------------------------------------------------------------------------------------------------------------ */

static void check_close(hmm_kernel kernel, uint32_t deadline_ms, uint64_t at_most_ms)
{
    hmm_dev dev = open_with("engines=1");
    struct holder h = make_holder(4 * page_size());
    hmm_fence *running = launch(dev, kernel, &h, sizeof(h), deadline_ms);
    hmm_fence *queued[5];
    for (int i = 0; i < 5; i++)
        queued[i] = launch(dev, kernel, &h, sizeof(h), deadline_ms);
    wait_for(h.control.flags, 1);
    uint64_t before = now_ms();
    close_device(dev);
    assert_true(now_ms() - before < at_most_ms);
    struct hmm_fence_info info = finish(running);
    assert_int_equal(info.status, -ECANCELED);
    assert_non_null(strstr(info.message, "closed"));
    for (int i = 0; i < 5; i++)
        assert_int_equal(finish(queued[i]).status, -ECANCELED);
    free_holder(&h, 4 * page_size());
}

static void closing_ends_a_kernel_at_its_next_access(void **state)
{
    (void)state;
    check_close(loop_over_spans, 20000, GRACE_MS);
}

static void closing_ends_a_kernel_that_holds_a_span(void **state)
{
    (void)state;
    check_close(hold_for_ever, SHORT_MS, SHORT_MS + GRACE_MS);
}

static void closing_ends_a_kernel_that_computes_for_ever(void **state)
{
    (void)state;
    check_close(loop_without_a_span, SHORT_MS, SHORT_MS + GRACE_MS);
}

static void closing_ends_a_long_copy(void **state)
{
    (void)state;
    hmm_dev dev = open_with("memory=1M,engines=1");
    size_t bytes = 64 * MIB;
    char *p = map_pages(bytes);
    hmm_fence *fences[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(hmm_job_copy(dev, p + 1, p, bytes - 1, &fences[i]), 0);
    uint64_t before = now_ms();
    close_device(dev);
    assert_true(now_ms() - before < GRACE_MS);
    for (int i = 0; i < 4; i++)
        assert_int_equal(finish(fences[i]).status, -ECANCELED);
    unmap_pages(p, bytes);
}

/* ---- the signal --------------------------------------------------------------------------------------------------------------------- */

static void ours(int number)
{
    (void)number;
}

static void signals_of_the_program_are_left_alone(void **state)
{
    (void)state;
    skip_without_device_faults();
    struct sigaction mine = {.sa_handler = ours}, now;
    assert_int_equal(sigaction(SIGRTMAX, &mine, NULL), 0);
    hmm_dev a = open_with(NULL), b = open_with(NULL);
    struct holder h = make_holder(page_size());
    hmm_fence *fence = launch(a, hold_for_ever, &h, sizeof(h), 30);
    wait_for(h.control.flags, 1);
    close_device(b); /* the signal stays for the other one */
    assert_string_equal(h.p, "written");
    assert_int_equal(finish(fence).status, -ETIMEDOUT);
    close_device(a);
    assert_int_equal(sigaction(SIGRTMAX, NULL, &now), 0);
    assert_ptr_equal(now.sa_handler, ours);
    for (int n = SIGRTMIN; n < SIGRTMAX; n++) {
        assert_int_equal(sigaction(n, NULL, &now), 0);
        assert_ptr_equal(now.sa_handler, SIG_DFL);
    }
    signal(SIGRTMAX, SIG_DFL);
    free_holder(&h, page_size());
}

static void send_to_every_thread(int number)
{
    DIR *dir = opendir("/proc/self/task");
    assert_non_null(dir);
    for (struct dirent *d; (d = readdir(dir));)
        if (d->d_name[0] != '.')
            syscall(SYS_tgkill, getpid(), atoi(d->d_name), number);
    closedir(dir);
}

/* The device's signal, sent by somebody else, to threads in kernels and to all others. */
static void signals_from_elsewhere_end_no_job(void **state)
{
    (void)state;
    if (!engines_in_this_process()) {
        fprintf(stderr, "skipped: the engines of %s are no threads of this process, and take no signal of it\n",
                spec_with(NULL));
        skip();
    }
    struct holder h = make_holder(4 * page_size());
    struct sigaction now;
    hmm_fence *spans = launch(device, loop_over_spans, &h, sizeof(h), 0);
    hmm_fence *computes = launch(device, loop_without_a_span, &h, sizeof(h), 0);
    wait_for(h.control.flags, 2);
    for (int n = SIGRTMIN; n <= SIGRTMAX; n++)
        if (sigaction(n, NULL, &now) == 0 && now.sa_handler != SIG_DFL)
            for (int i = 0; i < 100; i++)
                send_to_every_thread(n);
    sleep_ms(20);
    h.control.flags[1] = 1;
    assert_int_equal(must(spans), 1);
    assert_int_equal(must(computes), 1);
    free_holder(&h, 4 * page_size());
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_kernel_that_holds_a_span_for_ever_is_ended),
        TEST(a_span_given_back_in_time_costs_nothing),
        TEST_WITHOUT_DEVICE(an_engine_works_on_after_ending_a_kernel),
        TEST_WITHOUT_DEVICE(ending_a_kernel_never_hits_the_next_job),
        TEST_WITHOUT_DEVICE(several_engines_that_hold_one_page_are_all_ended),
        TEST(a_kernel_that_yields_is_not_ended),
        TEST(a_kernel_that_goes_from_span_to_span_is_not_ended),
        TEST_WITHOUT_DEVICE(a_span_is_waited_for_after_many_other_blocks_were_used),
        TEST(munmap_does_not_wait_for_a_span),
        TEST_WITHOUT_DEVICE(migration_goes_on_while_all_engines_are_busy),
        TEST_WITHOUT_DEVICE(closing_ends_a_kernel_at_its_next_access),
        TEST_WITHOUT_DEVICE(closing_ends_a_kernel_that_holds_a_span),
        TEST_WITHOUT_DEVICE(closing_ends_a_kernel_that_computes_for_ever),
        TEST_WITHOUT_DEVICE(closing_ends_a_long_copy),
        TEST_WITHOUT_DEVICE(signals_of_the_program_are_left_alone),
        TEST(signals_from_elsewhere_end_no_job),
    };
    return cmocka_run_group_tests_name("deadline", tests, NULL, NULL);
}
