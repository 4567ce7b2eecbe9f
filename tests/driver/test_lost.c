/* SPDX-License-Identifier: MIT */
/*
 * Devices that are lost: what only they had raises SIGBUS and never reads as zeros, everything else goes on, and nothing hangs. The
 * device of the suite is wrapped by `faulty`, which loses it after a number of operations.
 */
#include <fcntl.h>
#include <sys/wait.h>

#include "lost.h"

/* ---- devices to lose ---- */

static char spec[128];

static hmm_dev open_wrapped(const char *options)
{
    assert_true(snprintf(spec, sizeof(spec), "faulty:%s,over=%s", options, spec_with(NULL)) < (int)sizeof(spec));
    return open_spec(spec);
}

static void assert_gone(int r, const char *reason)
{
    if (r != -ENODEV || !strstr(hmm_last_message(), reason))
        fail_msg("%d, '%s'; not %d with '%s'", r, hmm_last_message(), -ENODEV, reason);
}

static bool info_says_lost(hmm_dev dev)
{
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    return info.lost;
}

/* The first half of memory is on a device that has lost its memory since. */
static hmm_dev lose_memory(void)
{
    expect_errors();
    make_memory();
    hmm_dev dev = open_wrapped("lose_after=1");
    assert_int_equal(hmm_migrate_to_device(dev, memory, bytes, NULL), 0);
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_DEVICE), PAGES);
    assert_false(info_says_lost(dev));
    assert_gone(hmm_migrate_to_device(dev, memory + bytes, bytes, NULL), "lose_after");
    assert_true(info_says_lost(dev));
    return dev;
}

/* ---- memory ---- */

static void what_only_the_device_had_is_lost_and_the_rest_is_not(void **state)
{
    (void)state;
    hmm_dev dev = lose_memory();
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_POISONED), PAGES); /* before anybody touched them */
    assert_int_equal(stats_now().poisoned, 0);
    assert_lost(memory, bytes);
    assert_int_equal(stats_now().poisoned, PAGES);
    assert_lost(memory, bytes);
    assert_holds(memory + bytes, bytes, 6);
    assert_int_equal(stats_now().poisoned, PAGES);
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_POISONED), PAGES);
    assert_int_equal(pages_in_state(memory + bytes, bytes, HMM_PAGE_SYSTEM), PAGES);
    assert_logged(HMM_LOG_ERROR, 1);
    close_device(dev); /* audits */
    unmap_pages(memory, 2 * bytes);
}

static void system_calls_on_it_fail(void **state)
{
    (void)state;
    hmm_dev dev = lose_memory();
    int pipe_ends[2];
    assert_int_equal(pipe2(pipe_ends, O_CLOEXEC), 0);
    assert_int_equal(write(pipe_ends[1], memory, 10), -1);
    assert_int_equal(errno, EFAULT);
    assert_int_equal(write(pipe_ends[1], memory, 10), -1); /* poisoned by now */
    assert_int_equal(errno, EFAULT);
    assert_int_equal(write(pipe_ends[1], memory + bytes, 10), 10);
    assert_int_equal(read(pipe_ends[0], memory + page, 10), -1);
    assert_int_equal(errno, EFAULT);
    close(pipe_ends[0]);
    close(pipe_ends[1]);
    close_device(dev);
    unmap_pages(memory, 2 * bytes);
}

static void dropping_it_makes_it_clean(void **state)
{
    (void)state;
    hmm_dev dev = lose_memory();
    char value;
    assert_lost(memory + 4 * page, page);
    assert_int_equal(madvise(memory, 2 * page, MADV_DONTNEED), 0);        /* never touched since */
    assert_int_equal(madvise(memory + 4 * page, page, MADV_DONTNEED), 0); /* poisoned */
    assert_holds(memory, 2 * page, 0);
    assert_holds(memory + 4 * page, page, 0);
    assert_lost(memory + 5 * page, page);
    assert_ptr_equal(mmap(memory + 5 * page, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
                     memory + 5 * page);
    assert_holds(memory + 5 * page, 2 * page, 0);
    memory[5 * page] = 9;
    assert_int_equal(pages_in_state(memory + 5 * page, page, HMM_PAGE_SYSTEM), 1);
    assert_true(is_lost(memory + 7 * page, &value));
    /* What is clean can move again, and what is lost cannot. */
    hmm_dev other = open_with(NULL);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(other, memory, 8 * page, &res), 0);
    assert_int_equal(res.moved, 5);
    assert_int_equal(res.unmovable, 3);
    assert_ptr_equal(res.first_stayed, memory + 2 * page);
    assert_int_equal(memory[5 * page], 9);
    close_device(other);
    close_device(dev);
    unmap_pages(memory, 2 * bytes);
}

static void it_moves_with_its_mapping(void **state)
{
    (void)state;
    hmm_dev dev = lose_memory();
    char *target = map_pages(4 * page);
    assert_lost(memory, page);
    /* One page that is poisoned and one that will be. */
    for (int i = 0; i < 2; i++)
        assert_ptr_equal(mremap(memory + i * page, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, target + i * page),
                         target + i * page);
    assert_lost(target, 2 * page);
    assert_int_equal(pages_in_state(target, 2 * page, HMM_PAGE_POISONED), 2);
    assert_audit_clean();
    unmap_pages(target, 4 * page);
    close_device(dev);
    unmap_pages(memory + 2 * page, 2 * bytes - 2 * page);
}

static void migrations_count_it_as_unmovable(void **state)
{
    (void)state;
    hmm_dev dev = lose_memory(), other = open_with(NULL);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(other, memory, 2 * bytes, &res), 0);
    assert_int_equal(res.unmovable, PAGES);
    assert_int_equal(res.moved, PAGES);
    assert_int_equal(hmm_migrate_to_system(memory, 2 * bytes, &res), 0);
    assert_int_equal(res.unmovable, PAGES);
    assert_int_equal(res.moved, PAGES);
    assert_int_equal(res.already, 0);
    assert_lost(memory, bytes);
    assert_holds(memory + bytes, bytes, 6);
    close_device(other);
    close_device(dev);
    unmap_pages(memory, 2 * bytes);
}

static void jobs_elsewhere_end_with_the_address(void **state)
{
    (void)state;
    hmm_dev dev = lose_memory(), other = open_with(NULL);
    for (int i = 0; i < 2; i++) {
        hmm_fence *fence = NULL;
        char *at = memory + (bytes - page) - i * page;
        assert_int_equal(hmm_job_crc32c(other, at, 2 * bytes - (size_t)(at - memory), &fence), 0);
        struct hmm_fence_info info = finish(fence);
        assert_int_equal(info.status, -EHWPOISON);
        assert_int_equal(info.address, (uintptr_t)at);
        device_fill(other, memory + bytes, 7, bytes); /* and the device goes on */
        assert_int_equal(hmm_job_fill(other, at, 1, page, &fence), 0);
        assert_int_equal(finish(fence).status, -EHWPOISON);
    }
    assert_holds(memory + bytes, bytes, 7);
    close_device(other);
    close_device(dev);
    unmap_pages(memory, 2 * bytes);
}

static void it_stays_lost_when_the_library_is_gone(void **state)
{
    (void)state;
    hmm_dev dev = lose_memory();
    assert_lost(memory, page); /* one by a touch, the others by closing */
    close_device(dev);
    assert_int_equal(hmm_audit(), -ENODEV);
    assert_lost(memory, bytes);
    assert_holds(memory + bytes, bytes, 6);
    pid_t pid = fork();
    if (pid == 0) {
        char value;
        _exit(!is_lost(memory + page, &value) || memory[bytes] != 6);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    /* A later manager does not know of it, the kernel does. */
    dev = open_with(NULL);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(dev, memory, 2 * bytes, &res), 0);
    assert_int_equal(res.unmovable, PAGES);
    assert_int_equal(res.moved, PAGES);
    assert_lost(memory, bytes);
    assert_int_equal(madvise(memory, page, MADV_DONTNEED), 0);
    memory[0] = 1; /* absent, next to what is lost: neighbours are given zeros with it, but these are not absent */
    assert_lost(memory + page, bytes - page);
    close_device(dev);
    assert_int_equal(madvise(memory, bytes, MADV_DONTNEED), 0);
    assert_holds(memory, bytes, 0);
    unmap_pages(memory, 2 * bytes);
}

static void a_huge_page_is_lost_whole(void **state)
{
    (void)state;
    expect_errors();
    page = page_size();
    char *p = map_huge(2 * BLOCK);
    hmm_dev dev = open_wrapped("lose_after=1");
    assert_int_equal(hmm_migrate_to_device(dev, p, BLOCK, NULL), 0);
    assert_gone(hmm_migrate_to_device(dev, p + BLOCK, BLOCK, NULL), "lose_after");
    assert_lost(p, BLOCK);
    assert_holds(p + BLOCK, BLOCK, 1);
    close_device(dev);
    unmap_pages(p, 2 * BLOCK);
}

/* At whatever operation the device goes: each page is as it was, or lost. */
static void loss_while_pages_come_and_go_ends_in_bytes_or_in_sigbus(void **state)
{
    (void)state;
    expect_errors();
    for (unsigned n = 2; n < 40; n += 3) {
        char options[32];
        make_memory();
        snprintf(options, sizeof(options), "lose_after=%u", n);
        hmm_dev dev = open_wrapped(options);
        unsigned lost = 0;
        for (unsigned i = 0; i < 30 && !info_says_lost(dev); i++) {
            size_t at = i % PAGES * page;
            int r = hmm_migrate_to_device(dev, memory + at, 8 * page, NULL);
            assert_true(r == 0 || r == -ENODEV);
            if (i % 2 && !info_says_lost(dev))
                assert_int_equal(memory[at], 5);
        }
        assert_true(n > 30 || info_says_lost(dev));
        for (size_t i = 0; i < bytes; i += page) {
            char value = 0;
            bool gone = is_lost(memory + i, &value);
            assert_true(gone || value == 5);
            lost += gone;
        }
        assert_true(lost < PAGES);
        close_device(dev);
        unmap_pages(memory, 2 * bytes);
    }
}

/* ---- engines ---- */

static void pages_of_a_device_without_engines_come_home(void **state)
{
    (void)state;
    make_memory();
    hmm_dev dev = open_wrapped("lose_engines_after=1");
    hmm_fence *fence = (hmm_fence *)memory;
    assert_int_equal(hmm_migrate_to_device(dev, memory, bytes, NULL), 0);
    int r = hmm_migrate_to_device(dev, memory + bytes, bytes, NULL); /* the operation that loses it may still succeed */
    assert_true(r == 0 || r == -ENODEV);
    assert_true(info_says_lost(dev));
    assert_gone(hmm_migrate_to_device(dev, memory, bytes, NULL), "lose_engines_after");
    assert_gone(hmm_job_fill(dev, memory, 1, bytes, &fence), "lose_engines_after");
    assert_ptr_equal(fence, memory);
    assert_int_equal(pages_in_state(memory, bytes, HMM_PAGE_DEVICE), PAGES);
    assert_holds(memory, page, 5);
    assert_int_equal(hmm_migrate_to_system(memory, bytes / 2, NULL), 0);
    assert_logged(HMM_LOG_WARNING, 1);
    close_device(dev);
    assert_holds(memory, bytes, 5);
    assert_holds(memory + bytes, bytes, 6);
    unmap_pages(memory, 2 * bytes);
}

static void jobs_that_run_when_it_goes_end(void **state)
{
    (void)state;
    expect_errors();
    static const char *const losses[] = {"lose_after=30", "lose_engines_after=30"};
    for (int k = 0; k < 2; k++) {
        hmm_fence *fences[64] = {NULL};
        unsigned done = 0;
        make_memory();
        hmm_dev dev = open_wrapped(losses[k]);
        for (int i = 0; i < 64; i++) {
            int r = hmm_job_fill(dev, memory + (i % PAGES) * page, 5, page, &fences[i]);
            assert_true(r == 0 || r == -ENODEV);
        }
        for (int i = 0; i < 64; i++) {
            if (!fences[i])
                continue;
            int status = finish(fences[i]).status;
            assert_true(status == 0 || status == -ENODEV || status == -EHWPOISON);
            done += status == 0;
        }
        assert_true(done < 64);
        assert_true(info_says_lost(dev));
        close_device(dev);
        for (size_t i = 0; i < bytes; i += page) {
            char value = 5;
            bool gone = is_lost(memory + i, &value);
            assert_true(gone ? k == 0 : value == 5);
        }
        unmap_pages(memory, 2 * bytes);
    }
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(what_only_the_device_had_is_lost_and_the_rest_is_not),
        TEST_WITHOUT_DEVICE(system_calls_on_it_fail),
        TEST_WITHOUT_DEVICE(dropping_it_makes_it_clean),
        TEST_WITHOUT_DEVICE(it_moves_with_its_mapping),
        TEST_WITHOUT_DEVICE(migrations_count_it_as_unmovable),
        TEST_WITHOUT_DEVICE(jobs_elsewhere_end_with_the_address),
        TEST_WITHOUT_DEVICE(it_stays_lost_when_the_library_is_gone),
        TEST_WITHOUT_DEVICE(a_huge_page_is_lost_whole),
        TEST_WITHOUT_DEVICE(loss_while_pages_come_and_go_ends_in_bytes_or_in_sigbus),
        TEST_WITHOUT_DEVICE(pages_of_a_device_without_engines_come_home),
        TEST_WITHOUT_DEVICE(jobs_that_run_when_it_goes_end),
    };
    return cmocka_run_group_tests_name("lost", tests, NULL, NULL);
}
