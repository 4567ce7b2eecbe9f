/* SPDX-License-Identifier: MIT */
/* See support.h. */
#include "support.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <time.h>

hmm_dev device;
static hmm_dev opened[16];
static unsigned nopened;
static unsigned log_lines[HMM_LOG_DEBUG + 1];
static struct control controls[8];
static unsigned ncontrols;
static bool errors_expected;

/* ---- devices ---- */

/* Options that take a spec themselves, as the library lists them: "driver option". */
static char wrapping[16][80];
static unsigned nwrapping;

static void note_wrapping(const struct hmm_driver_item *item, void *arg)
{
    (void)arg;
    if (item->option && strcmp(item->values, "a device spec") == 0 && nwrapping < sizeof(wrapping) / sizeof(wrapping[0]))
        snprintf(wrapping[nwrapping++], sizeof(wrapping[0]), "%s %s", item->driver, item->option);
}

static void list_wrapping(void)
{
    hmm_drivers(note_wrapping, NULL);
}

static bool takes_spec(const char *driver, int driver_len, const char *option, int option_len)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    char both[160];
    pthread_once(&once, list_wrapping);
    snprintf(both, sizeof(both), "%.*s %.*s", driver_len, driver, option_len, option);
    for (unsigned i = 0; i < nwrapping; i++)
        if (strcmp(both, wrapping[i]) == 0)
            return true;
    return false;
}

/* The innermost of specs that wrap each other. */
static const char *innermost(const char *spec)
{
    int name = (int)strcspn(spec, ":");
    for (const char *word = spec[name] ? spec + name + 1 : ""; *word;) {
        int key = (int)strcspn(word, "=,");
        if (word[key] == '=' && takes_spec(spec, name, word, key))
            return innermost(word + key + 1);
        word += strcspn(word, ",");
        word += *word == ',';
    }
    return spec;
}

/* Whether one of the words of `options` is about the same option. */
static bool has_option(const char *options, const char *word, size_t key)
{
    for (const char *o = options; *o; o += strcspn(o, ","), o += *o == ',')
        if (strcspn(o, "=,") == key && strncmp(o, word, key) == 0)
            return true;
    return false;
}

const char *spec_with(const char *options)
{
    static __thread char spec[256];
    const char *env = getenv("HMM_TEST_DEVICE");
    const char *base = env && *env ? env : "soft:memory=64M", *inner = innermost(base);
    size_t name = strcspn(inner, ":");
    size_t len = (size_t)snprintf(spec, sizeof(spec), "%.*s", (int)(inner + name - base), base);
    char separator = ':';
    options = options ? options : "";
    /* Of an option that is given in both, only the new one stays. */
    for (const char *word = inner[name] ? inner + name + 1 : ""; *word;) {
        size_t n = strcspn(word, ",");
        if (!has_option(options, word, strcspn(word, "=,"))) {
            len += (size_t)snprintf(spec + len, sizeof(spec) - len, "%c%.*s", separator, (int)n, word);
            separator = ',';
        }
        word += n + (word[n] == ',');
    }
    if (*options)
        snprintf(spec + len, sizeof(spec) - len, "%c%s", separator, options);
    return spec;
}

void assert_audit_clean(void)
{
    int r = hmm_audit();
    if (r)
        fail_msg("the audit found %d violations; the first: %s", r, hmm_last_message());
}

static void forget(hmm_dev dev)
{
    for (unsigned i = 0; i < nopened; i++)
        if (opened[i] == dev)
            opened[i] = opened[--nopened];
}

void close_device(hmm_dev dev)
{
    assert_audit_clean();
    int r = hmm_device_close(dev);
    if (r)
        fail_msg("closing the device: %d, %s", r, hmm_last_message());
    forget(dev);
}

static void count_log(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    __atomic_fetch_add(&log_lines[level], 1, __ATOMIC_RELAXED);
    if (level <= HMM_LOG_WARNING)
        fprintf(stderr, "library: %s\n", line);
}

unsigned logged(enum hmm_log_level level)
{
    return __atomic_load_n(&log_lines[level], __ATOMIC_RELAXED);
}

void expect_errors(void)
{
    errors_expected = true;
}

hmm_dev open_spec(const char *spec)
{
    hmm_dev dev = 0;
    int r = hmm_device_open(spec, &dev);
    if (r)
        fail_msg("%s cannot be opened: %d, %s", spec, r, hmm_last_message());
    assert_true(nopened < sizeof(opened) / sizeof(opened[0]));
    opened[nopened++] = dev;
    return dev;
}

hmm_dev open_with(const char *options)
{
    return open_spec(spec_with(options));
}

int setup_none(void **state)
{
    (void)state;
    memset(log_lines, 0, sizeof(log_lines));
    errors_expected = false;
    hmm_set_log(count_log, NULL);
    return 0;
}

int setup_device(void **state)
{
    setup_none(state);
    device = open_with(NULL);
    return 0;
}

int teardown(void **state)
{
    (void)state;
    bool clean = true;
    if (nopened && hmm_audit() != 0) {
        fprintf(stderr, "audit: %s\n", hmm_last_message());
        clean = false;
    }
    while (nopened) {
        hmm_dev dev = opened[--nopened];
        int r = hmm_device_close(dev);
        if (r && r != -ENODEV) {
            fprintf(stderr, "close: %d, %s\n", r, hmm_last_message());
            clean = false;
        }
    }
    while (ncontrols) /* no kernel waits to open one any more */
        free_control(&controls[ncontrols - 1]);
    if (logged(HMM_LOG_ERROR) && !errors_expected) {
        fprintf(stderr, "the library logged %u errors\n", logged(HMM_LOG_ERROR));
        clean = false;
    }
    hmm_set_log(NULL, NULL);
    return clean ? 0 : -1;
}

/* ---- jobs ---- */

struct hmm_fence_info finish(hmm_fence *fence)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    int r = hmm_fence_wait(fence, JOB_SECONDS * 1000000000ll);
    assert_int_equal(hmm_fence_info(fence, &info), 0);
    if (info.status == -EINPROGRESS)
        fail_msg("a job is not done after %d seconds", JOB_SECONDS);
    assert_int_equal(r, info.status);
    hmm_fence_put(fence);
    return info;
}

hmm_fence *launch(hmm_dev dev, hmm_kernel kernel, const void *arg, size_t size, uint32_t deadline_ms)
{
    hmm_fence *fence = NULL;
    struct hmm_launch l = {.size = sizeof(l), .deadline_ms = deadline_ms, .kernel = kernel, .arg = arg, .arg_size = size};
    int r = hmm_job_launch(dev, &l, &fence);
    if (r)
        fail_msg("launch: %d, %s", r, hmm_last_message());
    return fence;
}

struct hmm_fence_info run_kernel(hmm_dev dev, hmm_kernel kernel, const void *arg, size_t size)
{
    return finish(launch(dev, kernel, arg, size, 0));
}

uint64_t must(hmm_fence *fence)
{
    struct hmm_fence_info info = finish(fence);
    if (info.status)
        fail_msg("a job failed: %d, %s", info.status, info.message);
    return info.result;
}

uint64_t must_run(hmm_dev dev, hmm_kernel kernel, const void *arg, size_t size)
{
    return must(launch(dev, kernel, arg, size, 0));
}

HMM_KERNEL(process_of_engine)
{
    (void)acc;
    (void)arg;
    return (uint64_t)getpid();
}

bool engines_in_this_process(void)
{
    return must_run(device, process_of_engine, NULL, 0) == (uint64_t)getpid();
}

void skip_without_device_faults(void)
{
    const char *spec = spec_with(NULL);
    if (!strstr(spec, "model=resident") && !strstr(spec, "model=register"))
        return;
    fprintf(stderr, "skipped: it is about page faults of the device, and %s has none\n", spec);
    skip();
}

uint32_t device_crc(hmm_dev dev, const void *src, size_t len)
{
    hmm_fence *fence = NULL;
    assert_int_equal(hmm_job_crc32c(dev, src, len, &fence), 0);
    return (uint32_t)must(fence);
}

void device_copy(hmm_dev dev, void *dst, const void *src, size_t len)
{
    hmm_fence *fence = NULL;
    assert_int_equal(hmm_job_copy(dev, dst, src, len, &fence), 0);
    must(fence);
}

void device_fill(hmm_dev dev, void *dst, uint8_t value, size_t len)
{
    hmm_fence *fence = NULL;
    assert_int_equal(hmm_job_fill(dev, dst, value, len, &fence), 0);
    must(fence);
}

/* More than the holes around map_pages(), which it must not fill. */
#define CONTROL_BYTES ((size_t)64 << 10)

static void *map_control(int fd)
{
    return mmap(NULL, CONTROL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
}

struct control make_control(void)
{
    struct control c;
    const char *folder = getenv("TMPDIR");
    int n = snprintf(c.path, sizeof(c.path), "%s/hmm-test-XXXXXX", folder && *folder ? folder : "/tmp");
    assert_true(n < (int)sizeof(c.path) && ncontrols < sizeof(controls) / sizeof(controls[0]));
    int fd = mkostemp(c.path, O_CLOEXEC);
    if (fd < 0 || ftruncate(fd, CONTROL_BYTES))
        fail_msg("%s cannot be made: %s", c.path, strerror(errno));
    c.flags = map_control(fd);
    assert_true(c.flags != MAP_FAILED);
    close(fd);
    controls[ncontrols++] = c;
    return c;
}

void free_control(struct control *control)
{
    unsigned i = 0;
    while (i < ncontrols && controls[i].flags != control->flags)
        i++;
    assert_true(i < ncontrols);
    unlink(controls[i].path);
    munmap((void *)controls[i].flags, CONTROL_BYTES);
    controls[i] = controls[--ncontrols];
}

volatile uint32_t *open_control(const struct control *control)
{
    int fd = open(control->path, O_RDWR | O_CLOEXEC);
    void *p = fd < 0 ? MAP_FAILED : map_control(fd);
    if (p == MAP_FAILED)
        abort(); /* there is nobody to tell */
    close(fd);
    return p;
}

/* ---- memory ---- */

size_t page_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

/* The address space around it stays reserved for ever, but for the two holes. */
static char *map_aligned(size_t bytes)
{
    size_t total = bytes + 2 * BLOCK, page = page_size();
    char *area = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(area != MAP_FAILED);
    char *at = (char *)(((uintptr_t)area + BLOCK) & ~(BLOCK - 1));
    assert_true(mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
    munmap(at - page, page);
    munmap(at + bytes, page);
    return at;
}

char *map_pages(size_t bytes)
{
    char *at = map_aligned(bytes);
    madvise(at, bytes, MADV_NOHUGEPAGE);
    return at;
}

char *map_huge(size_t bytes)
{
    char *at = map_aligned(bytes);
    madvise(at, bytes, MADV_HUGEPAGE);
    memset(at, 1, bytes);
    madvise(at, bytes, MADV_COLLAPSE);
    if (anon_huge_bytes(at) < bytes) {
        fprintf(stderr, "skipped: the system gives no huge pages here\n");
        munmap(at, bytes);
        skip();
    }
    return at;
}

void *map_shared(void)
{
    void *at = mmap(NULL, page_size(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(at != MAP_FAILED);
    return at;
}

void unmap_pages(void *ptr, size_t bytes)
{
    assert_int_equal(munmap(ptr, bytes), 0);
}

void fill_random(void *ptr, size_t bytes, uint64_t seed)
{
    char *p = ptr;
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
        uint64_t r = random_next(&seed);
        memcpy(p + i, &r, bytes - i < sizeof(r) ? bytes - i : sizeof(r));
    }
}

void check_content(const char *p, size_t bytes, uint64_t seed)
{
    char *oracle = malloc(bytes);
    fill_random(oracle, bytes, seed);
    assert_memory_equal(p, oracle, bytes);
    free(oracle);
}

static void *touch_once(void *arg)
{
    struct touch *t = arg;
    uint64_t before = now_ms();
    t->value = *t->at;
    t->took = now_ms() - before;
    __atomic_store_n(&t->done, 1, __ATOMIC_RELEASE);
    return NULL;
}

void start_touch(struct touch *t, char *at)
{
    *t = (struct touch){.at = at};
    assert_int_equal(pthread_create(&t->thread, NULL, touch_once, t), 0);
}

/* ---- what the kernel says ---- */

size_t anon_huge_bytes(const void *ptr)
{
    FILE *f = fopen("/proc/self/smaps", "re");
    char line[512];
    unsigned long start, end, kib;
    bool inside = false;
    size_t huge = 0;
    assert_non_null(f);
    while (fgets(line, sizeof(line), f)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            inside = start <= (uintptr_t)ptr && (uintptr_t)ptr < end;
        else if (inside && sscanf(line, "AnonHugePages: %lu kB", &kib) == 1)
            huge = kib << 10;
    }
    fclose(f);
    return huge;
}

static unsigned entries_of(const char *path)
{
    DIR *dir = opendir(path);
    unsigned n = 0;
    assert_non_null(dir);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n - 2;
}

unsigned thread_count(void)
{
    return entries_of("/proc/self/task");
}

unsigned descriptor_count(void)
{
    return entries_of("/proc/self/fd") - 1;
}

/* ---- what the library says ---- */

struct hmm_stats stats_now(void)
{
    struct hmm_stats s = {.size = sizeof(s)};
    assert_int_equal(hmm_stats(&s), 0);
    return s;
}

uint64_t used_bytes(hmm_dev dev)
{
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    return info.used_bytes;
}

void wait_used(hmm_dev dev, uint64_t bytes)
{
    for (uint64_t until = now_ms() + JOB_SECONDS * 1000; used_bytes(dev) > bytes; sleep_ms(1))
        if (now_ms() > until)
            fail_msg("%llu bytes of the device are still in use, not %llu", (unsigned long long)used_bytes(dev),
                     (unsigned long long)bytes);
}

size_t pages_in_state(const void *ptr, size_t len, enum hmm_page_state state)
{
    size_t max = len / page_size() + 2, n = 0;
    struct hmm_page_info *pages = calloc(max, sizeof(*pages));
    int64_t count = hmm_range_query(ptr, len, pages, max);
    if (count < 0)
        fail_msg("range query: %d, %s", (int)count, hmm_last_message());
    for (int64_t i = 0; i < count; i++)
        n += pages[i].state == state;
    free(pages);
    return n;
}

uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void sleep_ms(unsigned ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&t, NULL);
}

void wait_for(const volatile uint32_t *word, uint32_t value)
{
    uint64_t until = now_ms() + JOB_SECONDS * 1000;
    while (*word < value) {
        if (now_ms() > until)
            fail_msg("nothing happened for %d seconds", JOB_SECONDS);
        sched_yield();
    }
}
