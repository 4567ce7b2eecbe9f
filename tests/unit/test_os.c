/* SPDX-License-Identifier: MIT */
/* os_linux on the running kernel: each operation against its contract in os/os.h. (userfaultfd has a
 * file of its own, test_uffd.c.) What changes the process is done in children. */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/utsname.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "common/oracle.h"
#include "os/linux.h"

#define PAGE os_page_size()

static char *map_pages(size_t n)
{
    void *p = NULL;

    assert_int_equal(os->map(n * PAGE, PAGE, OS_MAP_NOHUGE, &p), 0);
    return p;
}

static void unmap_pages(void *p, size_t n)
{
    assert_int_equal(os->unmap(p, n * PAGE), 0);
}

/* In a child: failures are told by line, cmocka's asserts belong to the parent. */
#define CHILD_CHECK(x)                                                                                                         \
    do {                                                                                                                       \
        if (!(x)) {                                                                                                            \
            dprintf(2, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #x, errno);                                               \
            _exit(1);                                                                                                          \
        }                                                                                                                      \
    } while (0)

static void in_child(void (*fn)(void *), void *arg)
{
    pid_t pid = fork();
    int status;

    assert_true(pid >= 0);
    if (!pid) {
        alarm(10);
        fn(arg);
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
}

static bool resident(const void *p, size_t pages, unsigned want_flags)
{
    struct os_region r[64];
    uintptr_t walked, start = (uintptr_t)p, end = start + pages * PAGE;
    int fd = os->pagemap_open();
    int n = os->pagemap_scan(fd, start, end, r, 64, &walked);
    size_t seen = 0;

    os->close(fd);
    for (int i = 0; i < n; i++)
        if ((r[i].flags & want_flags) == want_flags)
            seen += r[i].end - r[i].start;
    return seen == pages * PAGE;
}

/* ---- helpers without a table ---- */

static void test_constants(void **state)
{
    (void)state;
    assert_int_equal(PAGE, sysconf(_SC_PAGESIZE));
    assert_int_equal((size_t)1 << os_page_shift(), PAGE);
    assert_ptr_equal(os, &os_linux);
}

static void child_tid(void *parent)
{
    CHILD_CHECK(os_tid() == getpid());
    CHILD_CHECK(os_tid() != *(pid_t *)parent);
}

static void test_time_and_tid(void **state)
{
    uint64_t t = os_now();
    pid_t tid = os_tid();

    (void)state;
    os_sleep(3000000);
    assert_true(os_now() - t >= 3000000);
    assert_int_equal(tid, gettid());
    in_child(child_tid, &tid);
}

static void test_kernel_version(void **state)
{
    struct utsname u;
    int major, minor;

    (void)state;
    assert_int_equal(uname(&u), 0);
    assert_int_equal(sscanf(u.release, "%d.%d", &major, &minor), 2);
    assert_int_equal(os->kernel_version(), major * 1000 + minor);
}

static void test_read_text(void **state)
{
    char text[64], cut[4];

    (void)state;
    assert_true(os->read_text("/proc/sys/kernel/ostype", text, sizeof(text)) == 5);
    assert_string_equal(text, "Linux");
    assert_int_equal(os->read_text("/proc/sys/kernel/ostype", cut, sizeof(cut)), 3);
    assert_string_equal(cut, "Lin");
    assert_int_equal(os->read_text("/proc/no-such-file", text, sizeof(text)), -ENOENT);
}

/* ---- own memory ---- */

/* Pages of address space in use. */
static size_t space(void)
{
    char text[64];

    assert_true(os->read_text("/proc/self/statm", text, sizeof(text)) > 0);
    return strtoul(text, NULL, 10);
}

static void test_map(void **state)
{
    static const size_t aligns[] = {1, 4096, 8192, (size_t)1 << 16, (size_t)2 << 20, (size_t)1 << 30};
    void *p = (void *)8;

    (void)state;
    for (unsigned i = 0; i < sizeof(aligns) / sizeof(aligns[0]); i++) {
        struct os_vma v;
        int fd = os->maps_open();
        size_t before = space();

        assert_int_equal(os->map(3 * PAGE, aligns[i], OS_MAP_NOHUGE, &p), 0);
        assert_int_equal((uintptr_t)p & (aligns[i] - 1), 0);
        assert_true(all_bytes(p, 0, 3 * PAGE));
        memset(p, 1, 3 * PAGE);
        assert_int_equal(space(), before + 3); /* nothing of the slack is left */
        assert_int_equal(os->vma_query(fd, (uintptr_t)p, &v), 0);
        assert_true(v.start <= (uintptr_t)p && v.end >= (uintptr_t)p + 3 * PAGE);
        assert_true(v.read && v.write && !v.exec && !v.shared && v.anonymous && !v.stack && !v.special);
        os->close(fd);
        unmap_pages(p, 3);
    }
    p = (void *)8;
    assert_int_equal(os->map(0, PAGE, 0, &p), -EINVAL);
    assert_int_equal(os->map(PAGE, 3 * PAGE, 0, &p), -EINVAL);
    assert_int_equal(os->map((size_t)1 << 60, PAGE, 0, &p), -ENOMEM);
    assert_int_equal(os->map(~(size_t)0 & ~(PAGE - 1), (size_t)2 << 20, 0, &p), -ENOMEM);
    assert_ptr_equal(p, (void *)8); /* no output on failure */
}

static void child_not_inherited(void *p)
{
    char c;

    CHILD_CHECK(os->vm_read((uintptr_t)p, &c, 1) == -EFAULT);
}

static void child_wiped(void *p)
{
    CHILD_CHECK(all_bytes(p, 0, 2 * PAGE));
}

static void test_fork(void **state)
{
    char *p = map_pages(2);
    void *wipe;

    (void)state;
    memset(p, 1, 2 * PAGE);
    in_child(child_not_inherited, p);
    assert_int_equal(os->remap_fresh(p, 2 * PAGE, OS_MAP_NOHUGE), 0);
    assert_true(all_bytes(p, 0, 2 * PAGE));
    memset(p, 1, 2 * PAGE);
    in_child(child_not_inherited, p + PAGE);
    unmap_pages(p, 2);

    assert_int_equal(os->map(2 * PAGE, PAGE, OS_MAP_WIPE, &wipe), 0);
    memset(wipe, 1, 2 * PAGE);
    in_child(child_wiped, wipe);
    assert_true(all_bytes(wipe, 1, 2 * PAGE));
    unmap_pages(wipe, 2);
}

static void test_reserve(void **state)
{
    void *p;
    char c = 0;

    (void)state;
    assert_int_equal(os->map(4 * PAGE, PAGE, OS_MAP_RESERVE, &p), 0);
    assert_int_equal(os->vm_read((uintptr_t)p, &c, 1), -EFAULT);
    assert_int_equal(os->vm_write((uintptr_t)p, &c, 1), -EFAULT);
    assert_int_equal(os->remap_fresh(p, 4 * PAGE, 0), 0);
    memset(p, 1, 4 * PAGE);
    assert_int_equal(os->remap_fresh(p, 4 * PAGE, OS_MAP_RESERVE), 0);
    assert_int_equal(os->vm_read((uintptr_t)p, &c, 1), -EFAULT);
    unmap_pages(p, 4);
}

static bool smaps_has(const void *p, const char *field, const char *word)
{
    FILE *f = fopen("/proc/self/smaps", "r");
    char line[512];
    unsigned long start, end;
    bool inside = false, has = false;

    while (fgets(line, sizeof(line), f)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            inside = (uintptr_t)p >= start && (uintptr_t)p < end;
        else if (inside && !strncmp(line, field, strlen(field)))
            has |= strstr(line, word) != NULL;
    }
    fclose(f);
    return has;
}

static void test_huge_flags(void **state)
{
    void *p;

    (void)state;
    assert_int_equal(os->map(2 * OS_BLOCK_SIZE, OS_BLOCK_SIZE, OS_MAP_HUGE, &p), 0);
    assert_true(smaps_has(p, "VmFlags:", " hg"));
    assert_int_equal(os->remap_fresh(p, OS_BLOCK_SIZE, OS_MAP_NOHUGE), 0);
    assert_true(smaps_has(p, "VmFlags:", " nh"));
    assert_true(smaps_has((char *)p + OS_BLOCK_SIZE, "VmFlags:", " hg"));
    assert_int_equal(os->remap_fresh(p, OS_BLOCK_SIZE, OS_MAP_HUGE), 0);
    assert_true(smaps_has(p, "VmFlags:", " hg"));
    assert_true(smaps_has(p, "VmFlags:", " dc"));
    assert_int_equal(os->unmap(p, 2 * OS_BLOCK_SIZE), 0);
}

/* A program that locks all its memory, also what comes: ours stays unlocked, and empty. */
static void child_mlockall(void *arg)
{
    void *p;

    (void)arg;
    CHILD_CHECK(syscall(SYS_mlockall, MCL_FUTURE) == 0); /* sanitizers make that of the C library do nothing */
    CHILD_CHECK(os->map(8 * PAGE, PAGE, OS_MAP_NOHUGE, &p) == 0);
    CHILD_CHECK(!smaps_has(p, "VmFlags:", " lo"));
    CHILD_CHECK(resident(p, 0, OS_PG_PRESENT));
    memset(p, 1, 8 * PAGE);
    CHILD_CHECK(os->remap_fresh(p, 8 * PAGE, OS_MAP_NOHUGE) == 0);
    CHILD_CHECK(!smaps_has(p, "VmFlags:", " lo"));
    CHILD_CHECK(resident(p, 0, OS_PG_PRESENT));
}

static void test_mlockall(void **state)
{
    (void)state;
    in_child(child_mlockall, NULL);
}

static void test_advise(void **state)
{
    char *p = map_pages(4);

    (void)state;
    assert_int_equal(os->advise(p, 2 * PAGE, OS_ADVISE_POPULATE_WRITE), 0);
    assert_true(resident(p, 2, OS_PG_PRESENT));
    assert_false(resident(p, 3, OS_PG_PRESENT));
    memset(p, 7, 4 * PAGE);
    assert_int_equal(os->advise(p, 4 * PAGE, OS_ADVISE_DONTNEED), 0);
    assert_true(resident(p, 0, OS_PG_PRESENT));
    assert_int_equal(os->advise(p, 4 * PAGE, OS_ADVISE_DOFORK), 0);
    assert_false(smaps_has(p, "VmFlags:", " dc"));
    assert_int_equal(os->advise(p, 4 * PAGE, OS_ADVISE_DONTFORK), 0);
    assert_true(smaps_has(p, "VmFlags:", " dc"));
    assert_int_equal(os->advise(p, PAGE, 17), -EINVAL);
    assert_int_equal(os->advise(p, PAGE, -1), -EINVAL);
    unmap_pages(p + PAGE, 1);
    assert_int_equal(os->advise(p, 4 * PAGE, OS_ADVISE_DONTFORK), -ENOMEM); /* a hole */
    unmap_pages(p, 4);
}

/* ---- the program's memory by copy ---- */

static void test_vm_copy(void **state)
{
    char *p = map_pages(3), buf[100], *big = malloc(3 * PAGE);

    (void)state;
    memset(p, 'a', 3 * PAGE);
    memset(buf, 0, sizeof(buf));
    assert_int_equal(os->vm_read((uintptr_t)p + 17, buf, 63), 63);
    assert_true(all_bytes(buf, 'a', 63) && buf[63] == 0);
    memset(buf, 'b', sizeof(buf));
    assert_int_equal(os->vm_write((uintptr_t)p + PAGE - 50, buf, 100), 100);
    assert_true(p[PAGE - 51] == 'a' && all_bytes(p + PAGE - 50, 'b', 100) && p[PAGE + 50] == 'a');
    /* Up to the hole, then nothing. */
    unmap_pages(p + PAGE, 1);
    assert_int_equal(os->vm_read((uintptr_t)p + 10, big, 2 * PAGE), PAGE - 10);
    assert_int_equal(os->vm_read((uintptr_t)p + PAGE, big, 10), -EFAULT);
    assert_int_equal(os->vm_read(0, big, 10), -EFAULT);
    assert_int_equal(os->vm_read(~(uintptr_t)0 - 5, big, 10), -EFAULT);
    assert_int_equal(mprotect(p, PAGE, PROT_READ), 0);
    assert_int_equal(os->vm_write((uintptr_t)p, buf, 10), -EFAULT);
    assert_int_equal(os->vm_read((uintptr_t)p, buf, 10), 10);
    unmap_pages(p, 3);
    free(big);
}

static void *read_without_leader(void *leader)
{
    int value = 42, copy = 0;
    char c = 0;

    pthread_join(*(pthread_t *)leader, NULL);
    while (c != 'Z') { /* joined is not yet gone: the kernel's part of the exit comes after */
        char stat[256];

        CHILD_CHECK(os->read_text("/proc/self/stat", stat, sizeof(stat)) > 0);
        c = strrchr(stat, ')')[2];
        sched_yield();
    }
    CHILD_CHECK(os->vm_read((uintptr_t)&value, &copy, sizeof(copy)) == sizeof(copy));
    CHILD_CHECK(copy == 42);
    _exit(0);
}

/* A process whose first thread has ended still reads itself. */
static void child_without_leader(void *arg)
{
    static pthread_t leader;
    pthread_t t;

    (void)arg;
    leader = pthread_self();
    CHILD_CHECK(pthread_create(&t, NULL, read_without_leader, &leader) == 0);
    pthread_exit(NULL);
}

static void test_vm_copy_without_leader(void **state)
{
    (void)state;
    in_child(child_without_leader, NULL);
}

/* ---- pages ---- */

static unsigned next_random(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 16;
}

/* Scans with a vector of n regions and compares with what was touched: 0 absent, 1 written, 2 zero page. */
static void scan_and_compare(const char *p, const char *touched, size_t pages, unsigned n)
{
    struct os_region *v = calloc(n + 1, sizeof(*v)); /* one more, which must stay as it is */
    uintptr_t at = (uintptr_t)p, end = at + pages * PAGE, walked, last = at;
    size_t page = 0;
    int fd = os->pagemap_open();

    while (at < end) {
        int got = os->pagemap_scan(fd, at, end, v, n, &walked);

        assert_in_range(got, 0, n);
        assert_true(walked > at && walked <= end);
        assert_int_equal(v[n].start | v[n].end | v[n].flags, 0);
        for (int i = 0; i < got; i++) {
            assert_true(v[i].start >= last && v[i].end > v[i].start && v[i].end <= walked);
            if (i)
                assert_true(v[i].start > v[i - 1].end || v[i].flags != v[i - 1].flags);
            for (; (uintptr_t)p + page * PAGE < v[i].start; page++)
                assert_int_equal(touched[page], 0);
            for (; (uintptr_t)p + page * PAGE < v[i].end; page++) {
                assert_int_equal(v[i].flags, touched[page] == 1 ? OS_PG_PRESENT : OS_PG_PRESENT | OS_PG_ZERO);
                assert_true(touched[page]);
            }
            last = v[i].end;
        }
        for (; (uintptr_t)p + page * PAGE < walked; page++)
            assert_int_equal(touched[page], 0);
        at = walked;
    }
    assert_int_equal(page, pages);
    os->close(fd);
    free(v);
}

static void test_scan(void **state)
{
    enum { PAGES = 2048 };
    static const unsigned sizes[] = {1, 2, 3, 7, 64, 511, 512, 513, 4096};
    char *p = map_pages(PAGES), touched[PAGES] = {0};
    uint32_t seed = 1;
    volatile char sink;

    (void)state;
    scan_and_compare(p, touched, PAGES, 1);
    for (size_t i = 0; i < PAGES; i++) {
        touched[i] = (char)(next_random(&seed) % 3);
        if (touched[i] == 1)
            p[i * PAGE] = 1;
        else if (touched[i] == 2)
            sink = p[i * PAGE];
    }
    (void)sink;
    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        scan_and_compare(p, touched, PAGES, sizes[i]);
    /* Vectors that are full exactly at the end, where the kernel's own idea of how far it came may be an older one. */
    for (unsigned n = 1200; n < 1400; n++)
        scan_and_compare(p, touched, PAGES, n);
    unmap_pages(p + 100 * PAGE, 50);
    memset(touched + 100, 0, 50);
    scan_and_compare(p, touched, PAGES, 64);
    unmap_pages(p, PAGES);
}

static void test_scan_bad_input(void **state)
{
    char *p = map_pages(1);
    struct os_region r;
    uintptr_t walked = 1, at = (uintptr_t)p;
    int fd = os->pagemap_open();

    (void)state;
    assert_int_equal(os->pagemap_scan(fd, at, at + PAGE, &r, 0, &walked), -EINVAL);
    assert_int_equal(os->pagemap_scan(fd, at + PAGE, at, &r, 1, &walked), -EINVAL);
    assert_int_equal(os->pagemap_scan(fd, at + 1, at + PAGE, &r, 1, &walked), -EINVAL);
    assert_int_equal(os->pagemap_scan(-1, at, at + PAGE, &r, 1, &walked), -EBADF);
    assert_int_equal(walked, 1);
    assert_int_equal(os->pagemap_scan(fd, at, at, &r, 1, &walked), 0);
    assert_int_equal(walked, at);
    os->close(fd);
    unmap_pages(p, 1);
}

static void test_scan_file(void **state)
{
    int fd = open("/proc/self/exe", O_RDONLY);
    char *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    volatile char sink;

    (void)state;
    assert_ptr_not_equal(p, MAP_FAILED);
    sink = *(volatile char *)p;
    (void)sink;
    assert_true(resident(p, 1, OS_PG_PRESENT | OS_PG_FILE));
    *p = 0; /* a private copy is memory like any other */
    assert_true(resident(p, 1, OS_PG_PRESENT));
    assert_false(resident(p, 1, OS_PG_FILE));
    unmap_pages(p, 1);
    close(fd);
}

static void test_scan_huge(void **state)
{
    void *p;
    char text[64];
    volatile char sink;

    (void)state;
    if (os->read_text("/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof(text)) < 0 || strstr(text, "[never]"))
        skip();
    assert_int_equal(os->map(2 * OS_BLOCK_SIZE, OS_BLOCK_SIZE, OS_MAP_HUGE, &p), 0);
    *(char *)p = 1;
    sink = ((char *)p)[OS_BLOCK_SIZE];
    (void)sink;
    if (!resident(p, OS_BLOCK_SIZE / PAGE, OS_PG_PRESENT | OS_PG_HUGE)) {
        print_message("no huge page was to be had\n");
        os->unmap(p, 2 * OS_BLOCK_SIZE);
        skip();
    }
    assert_false(resident(p, OS_BLOCK_SIZE / PAGE, OS_PG_ZERO));
    assert_true(resident((char *)p + OS_BLOCK_SIZE, OS_BLOCK_SIZE / PAGE, OS_PG_ZERO | OS_PG_HUGE) ||
                resident((char *)p + OS_BLOCK_SIZE, 1, OS_PG_ZERO));
    os->unmap(p, 2 * OS_BLOCK_SIZE);
}

/* ---- mappings ---- */

/* What /proc/self/maps says, read the C library's way. */
static bool reference_vma(uintptr_t addr, struct os_vma *out, char *name, size_t name_size)
{
    FILE *f = fopen("/proc/self/maps", "r");
    char line[8192], perm[5];
    unsigned long start, end, inode;
    unsigned major, minor;
    int name_at;
    bool found = false;

    while (!found && fgets(line, sizeof(line), f)) {
        line[strcspn(line, "\n")] = '\0';
        assert_true(sscanf(line, "%lx-%lx %4s %*x %x:%x %lu %n", &start, &end, perm, &major, &minor, &inode, &name_at) == 6);
        if (end <= addr)
            continue;
        *out = (struct os_vma){
            .start = start,
            .end = end,
            .read = perm[0] == 'r',
            .write = perm[1] == 'w',
            .exec = perm[2] == 'x',
            .shared = perm[3] == 's',
            .anonymous = !inode && !major && !minor,
            .stack = !strcmp(line + name_at, "[stack]"),
            .special = !strncmp(line + name_at, "[v", 2),
        };
        snprintf(name, name_size, "%s", line + name_at);
        found = strcmp(name, "[vsyscall]") != 0;
    }
    fclose(f);
    return found;
}

static void assert_same_vma(const struct os_vma *a, const struct os_vma *b, const char *name)
{
    if (a->start != b->start || a->end != b->end || a->read != b->read || a->write != b->write || a->exec != b->exec ||
        a->shared != b->shared || a->anonymous != b->anonymous || a->stack != b->stack || a->special != b->special)
        fail_msg("differ about %s: %lx-%lx %lx-%lx", name, a->start, a->end, b->start, b->end);
}

static char *map_long_name(void)
{
    char dir[] = "/tmp/hmm-os-XXXXXX", path[400], name[200];
    char *p;
    int fd;

    memset(name, 'n', sizeof(name) - 1);
    name[sizeof(name) - 1] = '\0';
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)PAGE), 0);
    p = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    close(fd);
    unlink(path);
    rmdir(dir);
    return p;
}

static void test_vma(void **state)
{
    int fd = os->maps_open(), seen = 0, stacks = 0, specials = 0;
    char *named = map_pages(3), *file = map_long_name(), name[256];
    char *shared = mmap(NULL, PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct os_vma query, parse, reference;
    uintptr_t at = 0;

    (void)state;
    assert_int_equal(mprotect(named, PAGE, PROT_READ), 0);
    assert_int_equal(mprotect(named + PAGE, PAGE, PROT_NONE), 0);
    assert_int_equal(mprotect(named + 2 * PAGE, PAGE, PROT_READ | PROT_EXEC), 0);
    /* May be refused: a kernel can be built without names. */
    prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, named, PAGE,
          "a name as long as they may be: seventy-nine characters, counted and not guessed");
    while (reference_vma(at, &reference, name, sizeof(name))) {
        uintptr_t where[] = {at, reference.start, reference.start + PAGE / 2, reference.end - 1};

        for (unsigned i = 0; i < 4; i++) {
            assert_int_equal(os->vma_query(fd, where[i], &query), 0);
            assert_int_equal(linux_vma_parse(where[i], &parse), 0);
            /* The stack grows while we look. */
            if (!reference.stack) {
                assert_same_vma(&query, &reference, name);
                assert_same_vma(&parse, &reference, name);
            }
        }
        stacks += query.stack && parse.stack;
        specials += query.special && parse.special;
        seen++;
        at = reference.end;
    }
    assert_true(seen > 10 && stacks == 1 && specials >= 1);
    assert_int_equal(os->vma_query(fd, at, &query), -ENOENT);
    assert_int_equal(linux_vma_parse(at, &query), -ENOENT);
    assert_int_equal(os->vma_query(fd, (uintptr_t)shared, &query), 0);
    assert_true(query.shared && !query.anonymous);
    assert_int_equal(os->vma_query(fd, (uintptr_t)&at, &query), 0);
    assert_true(query.stack);
    assert_true(os->vma_query_fast(fd) == (os->kernel_version() >= 6011));
    os->close(fd);
    unmap_pages(named, 3);
    unmap_pages(file, 1);
    unmap_pages(shared, 1);
}

static void test_vma_line(void **state)
{
    static const struct {
        const char *line;
        bool valid;
        struct os_vma v;
    } lines[] = {
        {"55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]",
         true,
         {0x55d0c0000000, 0x55d0c0021000, .read = true, .write = true, .anonymous = true}},
        {"7ffe0000-7fff0000 rw-p 00000000 00:00 0 [stack]",
         true,
         {0x7ffe0000, 0x7fff0000, .read = true, .write = true, .anonymous = true, .stack = true}},
        {"1000-2000 r-xp 00000000 00:00 0 [vdso]",
         true,
         {0x1000, 0x2000, .read = true, .exec = true, .anonymous = true, .special = true}},
        {"1000-2000 r--p 00000000 00:00 0 [vvar_vclock]",
         true,
         {0x1000, 0x2000, .read = true, .anonymous = true, .special = true}},
        {"1000-2000 rw-p 00000000 00:00 0 [anon:my buffer [stack]]",
         true,
         {0x1000, 0x2000, .read = true, .write = true, .anonymous = true}},
        {"1000-2000 ---p 00000000 00:00 0 ", true, {0x1000, 0x2000, .anonymous = true}},
        {"1000-2000 ---p 00000000 00:00 0", true, {0x1000, 0x2000, .anonymous = true}},
        /* A file may be called anything. */
        {"1000-2000 rw-s 0000f000 00:01 4711 [stack]", true, {0x1000, 0x2000, .read = true, .write = true, .shared = true}},
        {"1000-2000 rw-p 00000000 fe:00 10 [vdso]", true, {0x1000, 0x2000, .read = true, .write = true}},
        {"1000-2000 rw-p 00000000 00:0e 0 x", true, {0x1000, 0x2000, .read = true, .write = true}},
        {"", false, {0}},
        {"1000", false, {0}},
        {"1000-", false, {0}},
        {"1000-2000", false, {0}},
        {"1000-2000 rw", false, {0}},
        {"1000-2000 rw-p", false, {0}},
        {"1000-2000 rw-p 0 00", false, {0}},
        {"1000-2000 rw-p 0 00:", false, {0}},
        {"-2000 rw-p 0 00:00 0", false, {0}},
        {"Size:                  4 kB", false, {0}},
    };

    (void)state;
    for (unsigned i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        struct os_vma v = {.start = 1};

        assert_int_equal(linux_vma_parse_line(lines[i].line, &v), lines[i].valid);
        if (lines[i].valid)
            assert_same_vma(&v, &lines[i].v, lines[i].line);
        else
            assert_int_equal(v.start, 1);
    }
}

/* Without PROCMAP_QUERY the answer comes from the text. A descriptor of another kind stands for a kernel without it. */
static void test_vma_fallback(void **state)
{
    int fd = open("/dev/null", O_RDONLY);
    char *p = map_pages(1);
    struct os_vma v, w;

    (void)state;
    assert_int_equal(os->vma_query(fd, (uintptr_t)p, &v), 0);
    assert_int_equal(linux_vma_parse((uintptr_t)p, &w), 0);
    assert_same_vma(&v, &w, "own memory");
    assert_int_equal(os->vma_query_fast(fd), 0);
    close(fd);
    assert_int_equal(os->vma_query(-1, (uintptr_t)p, &v), -EBADF);
    unmap_pages(p, 1);
}

/* ---- threads, CPUs, descriptors ---- */

static void test_events_and_poll(void **state)
{
    int fds[3] = {os->event_open(), os->event_open(), os->event_open()};
    uint64_t t;

    (void)state;
    assert_int_equal(os->poll(fds, 3, 0), 0);
    assert_int_equal(os->event_set(fds[1]), 0);
    assert_int_equal(os->poll(fds, 3, -1), 2);
    assert_int_equal(os->event_set(fds[1]), 0);
    assert_int_equal(os->event_set(fds[2]), 0);
    assert_int_equal(os->poll(fds, 3, 1000), 6);
    assert_int_equal(os->event_clear(fds[1]), 0);
    assert_int_equal(os->event_clear(fds[1]), 0); /* not set: no error, no wait */
    assert_int_equal(os->poll(fds, 3, -1), 4);
    assert_int_equal(os->event_clear(fds[2]), 0);
    t = os_now();
    assert_int_equal(os->poll(fds, 3, 20), 0);
    assert_true(os_now() - t >= 20000000);
    /* A full count is set already. */
    assert_int_equal(write(fds[0], &(uint64_t){0xfffffffffffffffe}, 8), 8);
    assert_int_equal(os->event_set(fds[0]), 0);
    assert_int_equal(os->event_clear(fds[0]), 0);
    assert_true(fcntl(fds[0], F_GETFD) & FD_CLOEXEC);
    for (int i = 0; i < 3; i++)
        assert_int_equal(os->close(fds[i]), 0);
    assert_int_equal(os->poll(fds, 3, -1), -EBADF); /* does not wait for ever */
    assert_int_equal(os->close(fds[0]), -EBADF);
    assert_int_equal(os->event_set(fds[0]), -EBADF);
    assert_int_equal(os->event_clear(fds[0]), -EBADF);
}

static void test_cpu(void **state)
{
    cpu_set_t all, now;

    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof(all), &all), 0);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &all))
            continue;
        assert_int_equal(os->bind_cpu(cpu), 0);
        assert_int_equal(os->thread_cpu(os_tid()), cpu);
        assert_int_equal(sched_getcpu(), cpu);
    }
    assert_int_equal(os->bind_cpu(-1), 0);
    assert_int_equal(sched_getaffinity(0, sizeof(now), &now), 0);
    assert_true(CPU_EQUAL(&all, &now));
    assert_int_equal(os->bind_cpu(1 << 20), -EINVAL);
    assert_int_equal(os->bind_cpu(8191), -EINVAL); /* no machine that runs this has it */
    assert_int_equal(os->thread_cpu(0), -EINVAL);
    assert_true(os->thread_cpu(0x3fffffff) < 0);
    /* A name made to confuse the reader of stat. */
    assert_int_equal(prctl(PR_SET_NAME, "a) 1 2 (b"), 0);
    assert_int_equal(os->bind_cpu(sched_getcpu()), 0);
    assert_int_equal(os->thread_cpu(os_tid()), sched_getcpu());
    assert_int_equal(os->bind_cpu(-1), 0);
}

enum { THREADS = 40 };

static pthread_barrier_t threads_start, threads_end;

static void *stay(void *self)
{
    *(pthread_t *)self = pthread_self();
    pthread_barrier_wait(&threads_start);
    pthread_barrier_wait(&threads_end);
    return NULL;
}

static void test_thread_blocks(void **state)
{
    pthread_t t[THREADS], self[THREADS + 1];
    uintptr_t blocks[THREADS + 8] = {0};
    int n, before = os->thread_blocks(NULL, 0); /* a sanitizer may have a thread of its own */

    (void)state;
    assert_true(before >= 1);
    pthread_barrier_init(&threads_start, NULL, THREADS + 1);
    pthread_barrier_init(&threads_end, NULL, THREADS + 1);
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&t[i], NULL, stay, &self[i]), 0);
    self[THREADS] = pthread_self();
    pthread_barrier_wait(&threads_start);
    n = os->thread_blocks(blocks, THREADS + 8);
    assert_int_equal(n, before + THREADS);
    /* The C library's handle is the control block's address. */
    for (int i = 0; i <= THREADS; i++) {
        bool found = false;

        for (int k = 0; k < n; k++)
            found |= blocks[k] - (uintptr_t)self[i] < PAGE;
        assert_true(found);
    }
    blocks[3] = 0;
    assert_int_equal(os->thread_blocks(blocks, 3), before + THREADS); /* more than there is room for */
    assert_int_equal(blocks[3], 0);
    pthread_barrier_wait(&threads_end);
    for (int i = 0; i < THREADS; i++)
        pthread_join(t[i], NULL);
    pthread_barrier_destroy(&threads_start);
    pthread_barrier_destroy(&threads_end);
}

struct files {
    int fd[6];
    int keep[3];
    unsigned keeps;
    bool open[6];
    int result;
};

static void *go_private(void *arg)
{
    struct files *f = arg;

    f->result = os->private_files(f->keep, f->keeps);
    for (int i = 0; i < 6; i++)
        f->open[i] = fcntl(f->fd[i], F_GETFD) >= 0;
    return NULL;
}

static void test_private_files(void **state)
{
    struct files f = {.keeps = 2};
    pthread_t t;

    (void)state;
    f.fd[0] = 0;
    for (int i = 1; i < 6; i++)
        f.fd[i] = fcntl(2, F_DUPFD_CLOEXEC, 100 + i * i);
    f.keep[0] = f.fd[2];
    f.keep[1] = f.fd[4];
    assert_int_equal(pthread_create(&t, NULL, go_private, &f), 0);
    pthread_join(t, NULL);
    assert_int_equal(f.result, 0);
    for (int i = 0; i < 6; i++) {
        assert_int_equal(f.open[i], i == 2 || i == 4);
        if (i)
            assert_true(fcntl(f.fd[i], F_GETFD) >= 0); /* the program's own table is as it was */
    }
    assert_true(fcntl(2, F_GETFD) >= 0);
    f.keeps = 0;
    assert_int_equal(pthread_create(&t, NULL, go_private, &f), 0);
    pthread_join(t, NULL);
    assert_int_equal(f.result, 0);
    for (int i = 0; i < 6; i++)
        assert_false(f.open[i]);
    for (int i = 1; i < 6; i++)
        close(f.fd[i]);
}

struct adopted {
    pid_t from;
    int fd, copy, none, nobody;
};

static void *adopt(void *arg)
{
    struct adopted *a = arg;

    a->none = os->private_files(NULL, 0);
    a->copy = os->fd_of_thread(a->from, a->fd);
    if (!a->none)
        a->none = os->fd_of_thread(a->from, 1000000);
    a->nobody = os->fd_of_thread(INT_MAX, a->fd);
    if (a->copy >= 0)
        os->event_set(a->copy);
    return NULL;
}

/* A thread with a table of its own gets a duplicate of a descriptor of a thread, here not the first one of the process. */
static void *offer(void *arg)
{
    struct adopted a = {.from = os_tid(), .fd = os->event_open()};
    uint64_t count = 0;
    pthread_t t;

    (void)arg;
    if (pthread_create(&t, NULL, adopt, &a))
        return "no thread";
    pthread_join(t, NULL);
    if (a.copy < 0 || a.none != -EBADF || a.nobody >= 0)
        return "wrong results";
    if (read(a.fd, &count, sizeof(count)) != sizeof(count) || count != 1)
        return "not the same file";
    close(a.fd);
    return NULL;
}

static void test_fd_of_thread(void **state)
{
    pthread_t t;
    void *wrong;

    (void)state;
    assert_int_equal(pthread_create(&t, NULL, offer, NULL), 0);
    pthread_join(t, &wrong);
    if (wrong)
        fail_msg("%s", (const char *)wrong);
}

/* A descriptor opened by the program afterwards does not appear in the private table: nor does closing it there matter. */
static void *keep_and_wait(void *arg)
{
    struct files *f = arg;

    f->result = os->private_files(f->keep, 1);
    pthread_barrier_wait(&threads_start);
    pthread_barrier_wait(&threads_end);
    f->open[0] = fcntl(f->fd[0], F_GETFD) >= 0;
    f->open[1] = fcntl(f->fd[1], F_GETFD) >= 0;
    return NULL;
}

static void test_private_files_outlive(void **state)
{
    struct files f = {.result = 1};
    pthread_t t;

    (void)state;
    pthread_barrier_init(&threads_start, NULL, 2);
    pthread_barrier_init(&threads_end, NULL, 2);
    f.fd[0] = f.keep[0] = fcntl(2, F_DUPFD_CLOEXEC, 200);
    assert_int_equal(pthread_create(&t, NULL, keep_and_wait, &f), 0);
    pthread_barrier_wait(&threads_start);
    close(f.fd[0]);
    f.fd[1] = fcntl(2, F_DUPFD_CLOEXEC, 201);
    pthread_barrier_wait(&threads_end);
    pthread_join(t, NULL);
    assert_int_equal(f.result, 0);
    assert_true(f.open[0]);
    assert_false(f.open[1]);
    close(f.fd[1]);
    pthread_barrier_destroy(&threads_start);
    pthread_barrier_destroy(&threads_end);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_constants),
        cmocka_unit_test(test_time_and_tid),
        cmocka_unit_test(test_kernel_version),
        cmocka_unit_test(test_read_text),
        cmocka_unit_test(test_map),
        cmocka_unit_test(test_fork),
        cmocka_unit_test(test_reserve),
        cmocka_unit_test(test_huge_flags),
        cmocka_unit_test(test_mlockall),
        cmocka_unit_test(test_advise),
        cmocka_unit_test(test_vm_copy),
        cmocka_unit_test(test_vm_copy_without_leader),
        cmocka_unit_test(test_scan),
        cmocka_unit_test(test_scan_bad_input),
        cmocka_unit_test(test_scan_file),
        cmocka_unit_test(test_scan_huge),
        cmocka_unit_test(test_vma),
        cmocka_unit_test(test_vma_line),
        cmocka_unit_test(test_vma_fallback),
        cmocka_unit_test(test_events_and_poll),
        cmocka_unit_test(test_cpu),
        cmocka_unit_test(test_thread_blocks),
        cmocka_unit_test(test_private_files),
        cmocka_unit_test(test_fd_of_thread),
        cmocka_unit_test(test_private_files_outlive),
    };

    return cmocka_run_group_tests_name("os", tests, NULL, NULL);
}
