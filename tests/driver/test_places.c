/* SPDX-License-Identifier: MIT */
/*
 * Where pages are and what that costs: memory that cannot move (stack, static, files, shared, pinned) is used in place over the
 * bus; memory that can is really copied; huge pages travel whole; system calls work on migrated buffers; and the range query
 * agrees with the kernel's page map.
 */
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "support.h"

static char initialized[20000] = "initialized";
static char uninitialized[20000];

/* ---- memory that stays ---------------------------------------------------------------------------------------------------------- */

/* Reads, writes and copies over p, which holds `bytes` bytes of any content; nothing of it may be on a device afterwards. */
static void use_in_place(char *p, size_t bytes, bool stays)
{
    char *oracle = malloc(bytes);
    fill_random(oracle, bytes, (uintptr_t)p);
    memcpy(p, oracle, bytes);
    assert_int_equal(device_crc(device, p, bytes), crc_oracle(oracle, bytes));
    device_fill(device, p + 13, 0x5a, bytes / 2);
    memset(oracle + 13, 0x5a, bytes / 2);
    assert_memory_equal(p, oracle, bytes);
    device_copy(device, p + 1, p, bytes - 1);
    memmove(oracle + 1, oracle, bytes - 1);
    assert_int_equal(device_crc(device, p, bytes), crc_oracle(oracle, bytes));
    if (stays)
        assert_int_equal(pages_in_state(p, bytes, HMM_PAGE_DEVICE), 0);
    assert_memory_equal(p, oracle, bytes);
    free(oracle);
}

static void the_stack_is_used_in_place(void **state)
{
    (void)state;
    char local[30000];
    use_in_place(local, sizeof(local), true);
}

struct lent_stack {
    char *local;
    size_t bytes;
    volatile uint32_t ready, done;
};

static void *lend_stack(void *arg)
{
    struct lent_stack *l = arg;
    char local[30000];
    l->local = local;
    l->bytes = sizeof(local);
    __atomic_store_n(&l->ready, 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&l->done, __ATOMIC_ACQUIRE))
        sleep_ms(1);
    return NULL;
}

static void the_stack_of_a_thread_can_be_used(void **state)
{
    (void)state;
    struct lent_stack l = {.ready = 0};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, lend_stack, &l), 0);
    wait_for(&l.ready, 1);
    use_in_place(l.local, l.bytes, false); /* it may move, under a thread that sleeps and wakes up on it */
    __atomic_store_n(&l.done, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
}

static void static_data_can_be_used(void **state)
{
    (void)state;
    use_in_place(initialized, sizeof(initialized), false);
    use_in_place(uninitialized, sizeof(uninitialized), false);
}

static void constants_of_the_program_can_be_read(void **state)
{
    (void)state;
    static const char text[] = "a string constant in the program's file";
    assert_int_equal(device_crc(device, text, sizeof(text)), crc_oracle(text, sizeof(text)));
    assert_int_equal(device_crc(device, (const void *)(uintptr_t)static_data_can_be_used, 64),
                     crc_oracle((const void *)(uintptr_t)static_data_can_be_used, 64));
}

static int temporary_file(size_t bytes)
{
    FILE *f = tmpfile();
    assert_non_null(f);
    int fd = dup(fileno(f));
    fclose(f);
    assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
    return fd;
}

static void shared_memory_is_used_in_place(void **state)
{
    (void)state;
    size_t bytes = 3 * MIB;
    int fd = memfd_create("test", MFD_CLOEXEC);
    assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *other = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    use_in_place(p, bytes, true);
    assert_memory_equal(p, other, bytes); /* the device wrote where everybody sees it */
    munmap(p, bytes);
    munmap(other, bytes);
    close(fd);
}

static void file_mappings_are_used_in_place(void **state)
{
    (void)state;
    size_t bytes = 300000;
    int fd = temporary_file(bytes);
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), *file = malloc(bytes);
    use_in_place(p, bytes, true);
    assert_int_equal(pread(fd, file, bytes, 0), bytes);
    assert_memory_equal(p, file, bytes);
    char *private = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    use_in_place(private, bytes, true);
    assert_memory_equal(p, file, bytes); /* the file has not changed */
    char *readable = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    assert_int_equal(device_crc(device, readable, bytes), crc_oracle(file, bytes));
    munmap(p, bytes);
    munmap(private, bytes);
    munmap(readable, bytes);
    free(file);
    close(fd);
}

static void reading_behind_the_end_of_a_file_ends_the_job(void **state)
{
    (void)state;
    int fd = temporary_file(100);
    char *p = mmap(NULL, 2 * page_size(), PROT_READ, MAP_SHARED, fd, 0);
    hmm_fence *fence;
    assert_int_equal(hmm_job_crc32c(device, p, 2 * page_size(), &fence), 0);
    struct hmm_fence_info info = finish(fence);
    assert_int_equal(info.status, -EFAULT);
    assert_int_equal(info.address, (uintptr_t)p + page_size());
    munmap(p, 2 * page_size());
    close(fd);
}

struct shared_bytes {
    char *at;
    struct control control; /* flags[0]: holds its span, [1]: go on */
};

/* Holds a write span over a page while the CPU writes beside it. */
HMM_KERNEL(write_around_the_cpu)
{
    struct shared_bytes *s = arg;
    volatile uint32_t *flags = open_control(&s->control);
    size_t len = page_size();
    char *span = hmm_span_write(acc, s->at, &len);
    span[0] = 'd';
    flags[0] = 1;
    while (!flags[1])
        ;
    span[200] = 'd';
    return len;
}

static void a_bus_write_leaves_bytes_alone_that_it_did_not_change(void **state)
{
    (void)state;
    struct shared_bytes s = {mmap(NULL, page_size(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0),
                             make_control()};
    hmm_fence *fence = launch(device, write_around_the_cpu, &s, sizeof(s), 20000);
    wait_for(s.control.flags, 1);
    memset(s.at + 1, 'c', 100);
    s.control.flags[1] = 1;
    assert_int_equal(must(fence), page_size());
    assert_int_equal(s.at[0], 'd');
    for (int i = 1; i <= 100; i++)
        assert_int_equal(s.at[i], 'c');
    assert_int_equal(s.at[200], 'd');
    munmap(s.at, page_size());
    free_control(&s.control);
}

/* ---- pages that the kernel holds ---------------------------------------------------------------------------------------------------- */

static int pin_with_io_uring(void *p, size_t bytes)
{
    struct io_uring_params params = {0};
    int ring = (int)syscall(SYS_io_uring_setup, 4, &params);
    if (ring < 0)
        return -errno;
    struct iovec v = {p, bytes};
    if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &v, 1)) {
        int err = errno;
        close(ring);
        return -err;
    }
    return ring;
}

static void a_page_pinned_by_the_kernel_stays_and_is_reported(void **state)
{
    (void)state;
    size_t page = page_size();
    char *p = map_pages(16 * page), *pinned = p + 5 * page;
    struct hmm_migrate_result r = {.size = sizeof(r)};
    fill_random(p, 16 * page, 61);
    uint32_t expected = crc_oracle(p, 16 * page);
    int ring = pin_with_io_uring(pinned, 2 * page);
    if (ring < 0) {
        fprintf(stderr, "skipped: io_uring is not available: %s\n", strerror(-ring));
        unmap_pages(p, 16 * page);
        skip();
    }
    uint64_t before = stats_now().pinned;
    assert_int_equal(hmm_migrate_to_device(device, p, 16 * page, &r), 0);
    assert_int_equal(r.pinned, 2);
    assert_int_equal(r.moved, 14);
    assert_ptr_equal(r.first_stayed, pinned);
    assert_int_equal(stats_now().pinned - before, 2);
    assert_int_equal(pages_in_state(pinned, 2 * page, HMM_PAGE_SYSTEM), 2);
    assert_int_equal(pages_in_state(p, 16 * page, HMM_PAGE_DEVICE), 14);
    assert_int_equal(device_crc(device, p, 16 * page), expected); /* the two over the bus */
    device_fill(device, pinned, 1, 2 * page);
    assert_int_equal(pinned[0], 1);
    close(ring);
    uint64_t until = now_ms() + 5000; /* the kernel lets go some time after the close */
    do {
        assert_int_equal(hmm_migrate_to_device(device, p, 16 * page, &r), 0);
    } while (r.pinned && now_ms() < until);
    assert_int_equal(r.pinned, 0);
    assert_int_equal(pages_in_state(p, 16 * page, HMM_PAGE_DEVICE), 16);
    unmap_pages(p, 16 * page);
}

/* ---- huge pages ------------------------------------------------------------------------------------------------------------------------ */

static void huge_pages_travel_whole_both_ways(void **state)
{
    (void)state;
    size_t bytes = 4 * BLOCK;
    char *p = map_huge(bytes);
    struct hmm_migrate_result r = {.size = sizeof(r)};
    fill_random(p, bytes, 62);
    uint32_t expected = crc_oracle(p, bytes);
    struct hmm_stats before = stats_now();
    assert_int_equal(hmm_migrate_to_device(device, p, bytes, &r), 0);
    assert_int_equal(r.moved, bytes / page_size());
    assert_int_equal(r.huge, bytes / page_size());
    assert_int_equal(anon_huge_bytes(p), 0);
    assert_int_equal(device_crc(device, p, bytes), expected);
    assert_int_equal(hmm_migrate_to_system(p, bytes, &r), 0);
    assert_int_equal(r.huge, bytes / page_size());
    assert_int_equal(anon_huge_bytes(p), bytes); /* by the kernel's account */
    struct hmm_stats after = stats_now();
    assert_int_equal(after.huge_to_device - before.huge_to_device, 4);
    assert_int_equal(after.huge_to_system - before.huge_to_system, 4);
    assert_int_equal(crc_oracle(p, bytes), expected);
    unmap_pages(p, bytes);
}

static void a_touch_brings_a_huge_page_back_as_one(void **state)
{
    (void)state;
    char *p = map_huge(BLOCK);
    fill_random(p, BLOCK, 63);
    uint32_t expected = crc_oracle(p, BLOCK);
    assert_int_equal(device_crc(device, p, BLOCK), expected);
    assert_int_equal(pages_in_state(p, BLOCK, HMM_PAGE_DEVICE), BLOCK / page_size());
    volatile char touch = *(volatile char *)(p + 1234567);
    (void)touch;
    assert_int_equal(anon_huge_bytes(p), BLOCK);
    assert_int_equal(crc_oracle(p, BLOCK), expected);
    unmap_pages(p, BLOCK);
}

static void a_part_of_a_huge_page_can_go(void **state)
{
    (void)state;
    char *p = map_huge(BLOCK);
    fill_random(p, BLOCK, 64);
    uint32_t expected = crc_oracle(p, BLOCK);
    assert_int_equal(hmm_migrate_to_device(device, p + 5 * page_size(), 7 * page_size(), NULL), 0);
    assert_int_equal(pages_in_state(p, BLOCK, HMM_PAGE_DEVICE), 7);
    assert_int_equal(device_crc(device, p, BLOCK), expected);
    assert_int_equal(crc_oracle(p, BLOCK), expected);
    unmap_pages(p, BLOCK);
}

/* ---- system calls ------------------------------------------------------------------------------------------------------------------------ */

static void system_calls_work_on_migrated_buffers(void **state)
{
    (void)state;
    size_t bytes = MIB;
    int fd = temporary_file(bytes);
    char *p = map_pages(bytes), *q = map_pages(bytes), *oracle = malloc(bytes);
    fill_random(oracle, bytes, 65);
    memcpy(p, oracle, bytes);
    assert_int_equal(hmm_migrate_to_device(device, p, bytes, NULL), 0);
    assert_int_equal(hmm_migrate_to_device(device, q, bytes, NULL), 0);
    assert_int_equal(pwrite(fd, p, bytes, 0), bytes); /* reads the buffer */
    assert_int_equal(pread(fd, q, bytes, 0), bytes);  /* writes it */
    assert_memory_equal(q, oracle, bytes);
    assert_memory_equal(p, oracle, bytes);
    assert_int_equal(device_crc(device, q, bytes), crc_oracle(oracle, bytes));
    free(oracle);
    unmap_pages(p, bytes);
    unmap_pages(q, bytes);
    close(fd);
}

static void a_path_on_the_device_can_be_opened(void **state)
{
    (void)state;
    char *path = map_pages(page_size());
    strcpy(path, "/proc/self/status");
    assert_int_equal(hmm_migrate_to_device(device, path, page_size(), NULL), 0);
    assert_int_equal(pages_in_state(path, 1, HMM_PAGE_DEVICE), 1);
    int fd = open(path, O_RDONLY);
    assert_true(fd >= 0);
    close(fd);
    unmap_pages(path, page_size());
}

/* ---- counters and queries ------------------------------------------------------------------------------------------------------------------ */

static void the_bytes_copied_are_the_bytes_migrated(void **state)
{
    (void)state;
    size_t page = page_size();
    char *p = map_pages(128 * page);
    struct hmm_migrate_result r = {.size = sizeof(r)};
    fill_random(p, 100 * page, 66); /* 28 pages are never touched */
    struct hmm_stats a = stats_now();
    assert_int_equal(hmm_migrate_to_device(device, p, 128 * page, &r), 0);
    struct hmm_stats b = stats_now();
    assert_int_equal(r.moved, 128);
    assert_int_equal(r.cleared, 28);
    assert_int_equal(b.pages_to_device - a.pages_to_device, 128);
    assert_int_equal(b.pages_cleared - a.pages_cleared, 28);
    assert_int_equal(b.bytes_to_device - a.bytes_to_device, 100 * page);
    assert_int_equal(b.bytes_to_system, a.bytes_to_system);
    assert_int_equal(hmm_migrate_to_device(device, p, 128 * page, &r), 0);
    assert_int_equal(r.already, 128);
    assert_int_equal(r.moved, 0);
    assert_int_equal(stats_now().bytes_to_device, b.bytes_to_device);
    assert_int_equal(hmm_migrate_to_system(p, 128 * page, &r), 0);
    assert_int_equal(r.moved, 128);
    struct hmm_stats c = stats_now();
    assert_int_equal(c.pages_to_system - b.pages_to_system, 128);
    assert_int_equal(c.bytes_to_system - b.bytes_to_system, 128 * page);
    assert_int_equal(c.device_pages, a.device_pages);
    unmap_pages(p, 128 * page);
}

/* The device's copy is another memory: a write there is not seen through anything that still aliases the old page. */
static void the_old_page_is_given_back_to_the_system(void **state)
{
    (void)state;
    size_t bytes = 16 * MIB;
    char *p = map_pages(bytes);
    memset(p, 1, bytes);
    long before = 0, after = 0;
    for (int i = 0; i < 2; i++) {
        FILE *f = fopen("/proc/self/smaps_rollup", "re");
        char line[256];
        long kib;
        assert_non_null(f);
        while (fgets(line, sizeof(line), f))
            if (sscanf(line, "Anonymous: %ld kB", &kib) == 1)
                *(i ? &after : &before) = kib;
        fclose(f);
        if (!i)
            assert_int_equal(hmm_migrate_to_device(device, p, bytes, NULL), 0);
    }
    if (before - after < (long)(15 * MIB >> 10))
        fail_msg("anonymous memory went from %ld to %ld KiB", before, after);
    unmap_pages(p, bytes);
}

static void the_query_agrees_with_the_page_map(void **state)
{
    (void)state;
    size_t page = page_size(), pages = 3 * BLOCK / page;
    char *p = map_pages(3 * BLOCK);
    struct hmm_page_info *info = calloc(pages + 2, sizeof(*info));
    uint64_t seed = 67;
    for (int step = 0; step < 60; step++) {
        size_t from = random_next(&seed) % pages, n = 1 + random_next(&seed) % (pages - from);
        n = step % 2 ? n : 1 + n % 20;
        switch (random_next(&seed) % 4) {
        case 0: memset(p + from * page, step, n * page); break;
        case 1: madvise(p + from * page, n * page, MADV_DONTNEED); break;
        case 2: device_crc(device, p + from * page, n * page); break;
        default: hmm_migrate_to_system(p + from * page, n * page, NULL);
        }
        assert_int_equal(hmm_range_query(p - page, (pages + 2) * page, info, pages + 2), pages + 2);
        assert_int_equal(info[0].state, HMM_PAGE_ABSENT); /* the holes around */
        assert_int_equal(info[pages + 1].state, HMM_PAGE_ABSENT);
        for (size_t i = 0; i < pages; i++) {
            bool present = page_present(p + i * page);
            int says = info[i + 1].state;
            if (present != (says == HMM_PAGE_SYSTEM))
                fail_msg("step %d, page %zu: the kernel says %s, the query %d", step, i, present ? "present" : "absent", says);
            assert_int_equal(info[i + 1].device, says == HMM_PAGE_DEVICE ? device : 0);
        }
    }
    free(info);
    unmap_pages(p, 3 * BLOCK);
}

static void a_query_that_does_not_fit_or_make_sense_is_refused(void **state)
{
    (void)state;
    char *p = map_pages(4 * page_size());
    struct hmm_page_info info[4];
    assert_int_equal(hmm_range_query(p, 4 * page_size(), info, 3), -ENOSPC);
    assert_int_equal(hmm_range_query(p, 0, info, 4), -EINVAL);
    assert_int_equal(hmm_range_query(p, SIZE_MAX, info, 4), -EINVAL);
    assert_int_equal(hmm_range_query(p + 1, 4 * page_size() - 1, info, 4), 4);
    assert_int_equal(hmm_range_query(p + page_size() - 1, 2, info, 4), 2);
    unmap_pages(p, 4 * page_size());
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(the_stack_is_used_in_place),
        TEST(the_stack_of_a_thread_can_be_used),
        TEST(static_data_can_be_used),
        TEST(constants_of_the_program_can_be_read),
        TEST(shared_memory_is_used_in_place),
        TEST(file_mappings_are_used_in_place),
        TEST(reading_behind_the_end_of_a_file_ends_the_job),
        TEST(a_bus_write_leaves_bytes_alone_that_it_did_not_change),
        TEST(a_page_pinned_by_the_kernel_stays_and_is_reported),
        TEST(huge_pages_travel_whole_both_ways),
        TEST(a_touch_brings_a_huge_page_back_as_one),
        TEST(a_part_of_a_huge_page_can_go),
        TEST(system_calls_work_on_migrated_buffers),
        TEST(a_path_on_the_device_can_be_opened),
        TEST(the_bytes_copied_are_the_bytes_migrated),
        TEST(the_old_page_is_given_back_to_the_system),
        TEST(the_query_agrees_with_the_page_map),
        TEST(a_query_that_does_not_fit_or_make_sense_is_refused),
    };
    return cmocka_run_group_tests_name("places", tests, NULL, NULL);
}
