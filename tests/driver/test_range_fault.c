/* SPDX-License-Identifier: MIT */
/*
 * hmm_range_fault() over every kind of mapping. What is right comes from the kernel: /proc/self/pagemap says what is present,
 * /proc/self/smaps what is huge, the way in which the test mapped it what may be written.
 */
#include <linux/perf_event.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "range.h"

/* ---- kinds of mappings ---- */

struct kind {
    const char *name;
    char *(*map)(void); /* PAGES pages, or more if huge; NULL: this system gives none */
    bool writable;      /* by the mapping */
    /* What is said of the pages that are present at first: WRITE or not; page i is touched before if touched(i). */
    bool (*touched)(size_t i);
    bool touch_writes;
    bool write_before;    /* pages that were touched may be written without a fault */
    bool read_makes_zero; /* what a read request brings cannot be written */
};

static int temporary_file(void)
{
    char path[] = "/tmp/hmm-range-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    unlink(path);
    char *content = malloc(PAGES * page);
    memset(content, 7, PAGES * page);
    assert_int_equal(write(fd, content, PAGES * page), PAGES * page);
    free(content);
    return fd;
}

static char *shared_anonymous(void)
{
    return map_with(PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
}

static char *memfd(void)
{
    int fd = memfd_create("hmm-range", MFD_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)(PAGES * page)), 0);
    char *p = map_with(PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    close(fd);
    return p;
}

static char *of_file(int protection, int flags)
{
    int fd = temporary_file();
    char *p = map_with(protection, flags, fd);
    madvise(p, PAGES * page, MADV_RANDOM); /* a touch maps one page */
    close(fd);
    return p;
}

static char *file_private(void)
{
    return of_file(PROT_READ | PROT_WRITE, MAP_PRIVATE);
}

static char *file_shared(void)
{
    return of_file(PROT_READ | PROT_WRITE, MAP_SHARED);
}

static char *file_read_only(void)
{
    return of_file(PROT_READ, MAP_PRIVATE);
}

static char *read_only_after_writing(void)
{
    char *p = anonymous();
    for (size_t i = 0; i < PAGES; i += 3)
        p[i * page] = 1;
    assert_int_equal(mprotect(p, PAGES * page, PROT_READ), 0);
    return p;
}

static bool no_page(size_t i)
{
    (void)i;
    return false;
}

static bool each_third(size_t i)
{
    return i % 3 == 0;
}

static bool all_pages(size_t i)
{
    (void)i;
    return true;
}

static const struct kind kinds[] = {
    {"never touched", anonymous, true, no_page, false, true, true},
    {"written", anonymous, true, each_third, true, true, true},
    {"read: the zero page", anonymous, true, each_third, false, false, true},
    {"shared anonymous", shared_anonymous, true, each_third, true, true, false},
    {"memfd", memfd, true, each_third, false, true, false},
    {"private file", file_private, true, each_third, false, false, true},
    {"private file, written", file_private, true, all_pages, true, true, false},
    {"shared file", file_shared, true, each_third, true, true, false},
    {"read-only file", file_read_only, false, each_third, false, false, false},
    {"read-only, written before", read_only_after_writing, false, no_page, false, false, false},
};

static void touch(const struct kind *k, char *p)
{
    for (size_t i = 0; i < PAGES; i++) {
        if (k->touched(i) && k->touch_writes)
            ((volatile char *)p)[i * page] = 3;
        else if (k->touched(i))
            (void)((volatile char *)p)[i * page];
    }
}

static void expect(const struct kind *k, const char *p, size_t i, uint64_t bits)
{
    uint64_t expected = bits & HMM_PFN_VALID ? bits | ((uintptr_t)p / page + i) : bits;
    if (pfns[i] != expected)
        fail_msg("%s: page %zu is %#lx, not %#lx", k->name, i, (unsigned long)pfns[i], (unsigned long)expected);
}

/* A look reports what is present, says what may be written, and changes nothing. */
static void check_snapshot(const struct kind *k, char *p)
{
    bool before[PAGES];
    for (size_t i = 0; i < PAGES; i++)
        before[i] = is_present(p + i * page);
    assert_int_equal(ask(p, PAGES * page, 0), 0);
    for (size_t i = 0; i < PAGES; i++) {
        assert_int_equal(is_present(p + i * page), before[i]);
        expect(k, p, i, !before[i] ? 0 : HMM_PFN_VALID | (k->write_before ? HMM_PFN_WRITE : 0));
    }
}

static void check_read(const struct kind *k, char *p)
{
    bool before[PAGES];
    for (size_t i = 0; i < PAGES; i++)
        before[i] = is_present(p + i * page);
    assert_int_equal(ask(p, PAGES * page, REQ_READ), 0);
    for (size_t i = 0; i < PAGES; i++) {
        bool write = k->writable && (before[i] ? k->write_before : !k->read_makes_zero);
        assert_true(is_present(p + i * page));
        expect(k, p, i, HMM_PFN_VALID | (write ? HMM_PFN_WRITE : 0));
    }
}

static void check_write(const struct kind *k, char *p)
{
    int r = ask(p, PAGES * page, REQ_WRITE);
    assert_int_equal(r, k->writable ? 0 : -EPERM);
    for (size_t i = 0; !r && i < PAGES; i++)
        expect(k, p, i, HMM_PFN_VALID | HMM_PFN_WRITE);
    assert_int_equal(ask(p, PAGES * page, 0), 0);
    for (size_t i = 0; i < PAGES; i++)
        expect(k, p, i, HMM_PFN_VALID | (k->writable ? HMM_PFN_WRITE : 0));
}

static void every_kind_of_mapping(void **state)
{
    (void)state;
    for (size_t n = 0; n < sizeof(kinds) / sizeof(kinds[0]); n++) {
        const struct kind *k = &kinds[n];
        char *p = k->map();
        touch(k, p);
        char *content = malloc(PAGES * page);
        check_snapshot(k, p);
        check_read(k, p);
        memcpy(content, p, PAGES * page);
        check_write(k, p);
        assert_memory_equal(p, content, PAGES * page);
        assert_int_equal(pages_in_state(p, PAGES * page, HMM_PAGE_DEVICE), 0);
        free(content);
        munmap(p, PAGES * page);
    }
}

/* Pages that were never there are made for writing at once, without the zero page in between. */
static void never_touched_memory_is_made_for_writing(void **state)
{
    (void)state;
    char *p = anonymous();
    assert_int_equal(ask(p, PAGES * page, REQ_WRITE), 0);
    for (size_t i = 0; i < PAGES; i++) {
        assert_int_equal(pfns[i], HMM_PFN_VALID | HMM_PFN_WRITE | ((uintptr_t)p / page + i));
        assert_int_equal(p[i * page], 0);
    }
    munmap(p, PAGES * page);
}

/* ---- huge pages ---- */

static void huge_pages_have_their_order(void **state)
{
    (void)state;
    char *p = map_huge(2 * BLOCK);
    size_t n = BLOCK / page;
    assert_true(anon_huge_bytes(p) >= 2 * BLOCK);
    assert_int_equal(madvise(p + page, page, MADV_DONTNEED), 0); /* the first is split */
    char *middle = p + BLOCK - 10 * page;
    assert_int_equal(ask(middle, 30 * page, REQ_READ), 0);
    for (size_t i = 0; i < 30; i++) {
        assert_int_equal(HMM_PFN_ORDER(pfns[i]), i < 10 ? 0 : __builtin_ctzl(n));
        assert_int_equal(pfns[i] & HMM_PFN_MASK, (uintptr_t)middle / page + i);
        assert_int_equal(pfns[i] >> 57, (HMM_PFN_VALID | HMM_PFN_WRITE) >> 57);
    }
    unmap_pages(p, 2 * BLOCK);
}

static void hugetlb_pages_have_their_order(void **state)
{
    (void)state;
    char *p = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (p == MAP_FAILED) {
        print_message("no huge page is reserved (vm.nr_hugepages): left out\n");
        skip();
    }
    assert_int_equal(ask(p, BLOCK, 0), 0);
    assert_int_equal(pfns[0], 0);
    assert_int_equal(ask(p, BLOCK, REQ_WRITE), 0);
    for (size_t i = 0; i < BLOCK / page; i++) {
        assert_int_equal(HMM_PFN_ORDER(pfns[i]), __builtin_ctzl(BLOCK / page));
        assert_int_equal(pfns[i] & HMM_PFN_MASK, (uintptr_t)p / page + i);
        assert_true(pfns[i] & HMM_PFN_WRITE);
    }
    munmap(p, BLOCK);
}

/* ---- memory that a device cannot have ---- */

static void holes_are_errors(void **state)
{
    (void)state;
    char *p = anonymous();
    memset(p, 1, PAGES * page);
    munmap(p + 10 * page, 5 * page);
    assert_int_equal(ask(p, PAGES * page, 0), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i] >> 57, (i < 10 || i >= 15 ? HMM_PFN_VALID | HMM_PFN_WRITE : HMM_PFN_ERROR) >> 57);
    assert_int_equal(ask(p, PAGES * page, REQ_READ), -EFAULT);
    assert_int_equal(ask(p + 15 * page, 5 * page, REQ_READ), 0);
    assert_int_equal(ask(p + 14 * page, page, REQ_WRITE), -EFAULT);
    munmap(p, PAGES * page);
}

static void memory_without_access_is_an_error(void **state)
{
    (void)state;
    char *p = anonymous();
    memset(p, 1, PAGES * page);
    assert_int_equal(mprotect(p + 10 * page, 5 * page, PROT_NONE), 0);
    assert_int_equal(ask(p, PAGES * page, 0), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i] >> 57, (i < 10 || i >= 15 ? HMM_PFN_VALID | HMM_PFN_WRITE : HMM_PFN_ERROR) >> 57);
    assert_int_equal(ask(p, PAGES * page, REQ_READ), -EFAULT);
    munmap(p, PAGES * page);
}

static void behind_the_end_of_a_file_is_an_error(void **state)
{
    (void)state;
    int fd = temporary_file();
    char *p = map_with(PROT_READ, MAP_SHARED, fd);
    assert_int_equal(ftruncate(fd, (off_t)(10 * page)), 0);
    assert_int_equal(ask(p, PAGES * page, REQ_READ), -EFAULT);
    assert_int_equal(ask(p, 10 * page, REQ_READ), 0);
    assert_int_equal(ask(p, PAGES * page, 0), 0);
    for (size_t i = 10; i < PAGES; i++)
        assert_int_equal(pfns[i], 0);
    close(fd);
    munmap(p, PAGES * page);
}

static void the_vdso_is_an_error(void **state)
{
    (void)state;
    char *vdso = (char *)getauxval(AT_SYSINFO_EHDR);
    if (!vdso)
        skip();
    assert_int_equal(ask(vdso, page, 0), 0);
    assert_int_equal(pfns[0], HMM_PFN_ERROR);
    assert_int_equal(ask(vdso, page, REQ_READ), -EFAULT);
}

static void the_stack_and_static_data_are_there(void **state)
{
    (void)state;
    char local[100];
    static char data[100] = "data";
    char *const places[] = {local, data};
    memset(local, 1, sizeof(local));
    for (size_t n = 0; n < 2; n++) {
        char *p = (char *)((uintptr_t)places[n] & ~(page - 1));
        assert_int_equal(ask(p, page, REQ_WRITE), 0);
        assert_int_equal(pfns[0], HMM_PFN_VALID | HMM_PFN_WRITE | (uintptr_t)p / page);
    }
}

static void guard_pages_are_errors(void **state)
{
    (void)state;
    char *p = anonymous();
    memset(p, 1, PAGES * page);
    if (madvise(p + 10 * page, 5 * page, MADV_GUARD_INSTALL)) {
        munmap(p, PAGES * page);
        skip(); /* Linux 6.13 */
    }
    assert_int_equal(ask(p, PAGES * page, 0), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i] >> 57, (i < 10 || i >= 15 ? HMM_PFN_VALID | HMM_PFN_WRITE : 0) >> 57);
    assert_int_equal(ask(p, PAGES * page, REQ_READ), -EFAULT);
    assert_int_equal(ask(p, 10 * page, REQ_READ), 0);
    munmap(p, PAGES * page);
}

/* Memory that the kernel lets nobody reach by another way than the mapping itself: no page of it is reported, nor can one be made. */
static void memory_of_a_device_file_is_an_error(void **state)
{
    (void)state;
    struct perf_event_attr attr = {
        .type = PERF_TYPE_SOFTWARE, .size = sizeof(attr), .config = PERF_COUNT_SW_CPU_CLOCK, .disabled = 1};
    int fd = (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
    char *p = fd < 0 ? MAP_FAILED : mmap(NULL, 5 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        print_message("no performance counters for this user: left out\n");
        skip();
    }
    (void)*(volatile char *)p;
    char byte;
    struct iovec local = {&byte, 1}, remote = {p, 1};
    bool reachable = process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == 1; /* pages like others, in older kernels */
    assert_int_equal(ask(p, page, 0), 0);
    assert_int_equal(pfns[0], reachable ? HMM_PFN_VALID | HMM_PFN_WRITE | (uintptr_t)p / page : 0);
    assert_int_equal(ask(p, page, REQ_READ), reachable ? 0 : -EFAULT);
    munmap(p, 5 * page);
    close(fd);
}

/* A write replaces such a page under its address. */
static void pages_shared_since_a_fork_can_be_written(void **state)
{
    (void)state;
    char *p = anonymous();
    int pipes[2];
    memset(p, 1, PAGES * page);
    assert_int_equal(pipe(pipes), 0);
    pid_t pid = fork();
    if (pid == 0) {
        close(pipes[1]);
        char byte;
        _exit(read(pipes[0], &byte, 1) == 0 && p[0] == 1 ? 0 : 1);
    }
    close(pipes[0]);
    assert_int_equal(ask(p, PAGES * page, REQ_WRITE), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i], HMM_PFN_VALID | HMM_PFN_WRITE | ((uintptr_t)p / page + i));
    struct iovec local = {"2", 1}, remote = {p, 1};
    assert_int_equal(process_vm_writev(getpid(), &local, 1, &remote, 1, 0), 1); /* as a device would */
    close(pipes[1]);
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0); /* the child kept its own */
    assert_int_equal(p[0], '2');
    munmap(p, PAGES * page);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(every_kind_of_mapping),
        TEST(never_touched_memory_is_made_for_writing),
        TEST(huge_pages_have_their_order),
        TEST(hugetlb_pages_have_their_order),
        TEST(holes_are_errors),
        TEST(memory_without_access_is_an_error),
        TEST(behind_the_end_of_a_file_is_an_error),
        TEST(the_vdso_is_an_error),
        TEST(guard_pages_are_errors),
        TEST(memory_of_a_device_file_is_an_error),
        TEST(pages_shared_since_a_fork_can_be_written),
        TEST(the_stack_and_static_data_are_there),
    };
    page = page_size();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
