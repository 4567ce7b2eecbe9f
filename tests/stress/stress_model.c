/* SPDX-License-Identifier: MIT */
/*
 * Random operations by one thread, each compared with a plain array: what the CPU and two devices read and write, where pages are,
 * and what the program does to its mappings. One thread, so that every step has one right result. Jobs are waited for.
 *
 * stress_model [seconds] [seed]
 *
 * With HMM_DEBUG=inject=2 (with more per mille the manager hardly ever starts), and over the device `faulty`, a call may fail, with an errno and words, and a job that failed may have done a part of its work: then the
 * bytes in its range are either the old or the new ones. Everything else holds as without.
 */
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 2048u /* four blocks; the devices hold less than half of it */
#define DEVICES 2
#define RANGE_MAX (64u << 10)

static char *arena;
static uint8_t *model; /* what arena holds, in shared memory that no device can take */
static bool mapped[PAGES];
static size_t page, arena_bytes;
static hmm_dev devs[DEVICES];
static uint64_t state, step, refused;
static bool injecting;
static int pagemap_fd;
static const char *doing = "";

static void __attribute__((format(printf, 1, 2), noreturn)) wrong(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    printf("FAIL step %llu (%s): ", (unsigned long long)step, doing);
    vprintf(fmt, ap);
    printf("\n");
    fflush(stdout);
    _exit(1);
}

/* True: it worked. Without injection nothing may fail. */
static bool worked(const char *what, int64_t r)
{
    if (r >= 0)
        return true;
    if (!injecting || !hmm_last_message()[0])
        wrong("%s: %s (%s)", what, hmm_strerror((int)r), hmm_last_message());
    refused++;
    return false;
}

/* ---- ranges ---- */

struct range {
    size_t at, len;
};

static bool all_mapped(struct range r)
{
    for (size_t p = r.at / page; p <= (r.at + r.len - 1) / page; p++)
        if (!mapped[p])
            return false;
    return true;
}

/* Any alignment, any length, mapped; len 0: no luck. */
static struct range random_range(size_t max)
{
    for (int tries = 0; tries < 10; tries++) {
        struct range r = {.at = random_next(&state) % arena_bytes};
        r.len = 1 + random_next(&state) % (below(&state, 3) ? max / 16 : max);
        if (r.at + r.len > arena_bytes)
            r.len = arena_bytes - r.at;
        if (all_mapped(r))
            return r;
    }
    return (struct range){0, 0};
}

static void random_pages(unsigned max, unsigned *first, unsigned *n)
{
    *first = below(&state, PAGES);
    *n = 1 + below(&state, max);
    if (*first + *n > PAGES)
        *n = PAGES - *first;
}

static void compare(size_t at, size_t len)
{
    for (size_t i = at; i < at + len; i++)
        if (((volatile uint8_t *)arena)[i] != model[i])
            wrong("byte %zu of page %zu (%p) is %#x, not %#x", i % page, i / page, (void *)(arena + i), (uint8_t)arena[i],
                  model[i]);
}

/* ---- the CPU ---- */

static void cpu_read(void)
{
    struct range r = random_range(RANGE_MAX);
    compare(r.at, r.len);
}

static void cpu_write(void)
{
    struct range r = random_range(RANGE_MAX);
    uint8_t value = (uint8_t)random_next(&state);
    for (size_t i = r.at; i < r.at + r.len; i++)
        arena[i] = (char)(model[i] = (uint8_t)(value + i * 7));
}

/* ---- jobs ---- */

/* The job's status; its result in *result. */
static int finish(hmm_fence *fence, uint64_t *result)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    int r = hmm_fence_wait(fence, 60000000000ll);
    if (hmm_fence_info(fence, &info) || info.status == -EINPROGRESS)
        wrong("a job hangs (%d)", r);
    if (info.status && !injecting)
        wrong("a job failed: %d, %s", info.status, info.message);
    if (info.status && !info.message[0])
        wrong("a job failed with %d and says nothing", info.status);
    refused += info.status != 0;
    *result = info.result;
    hmm_fence_put(fence);
    return info.status;
}

/* Each byte of a job that failed is the old or the new one; the model takes what is there. */
static void settle(size_t at, const uint8_t *after, size_t len, int status)
{
    for (size_t i = 0; i < len; i++) {
        uint8_t found = status ? ((volatile uint8_t *)arena)[at + i] : after[i];
        if (found != after[i] && found != model[at + i])
            wrong("a failed job left %#x at byte %zu, which is neither the old (%#x) nor the new one (%#x)", found, at + i,
                  model[at + i], after[i]);
        model[at + i] = found;
    }
}

static hmm_dev any_device(void)
{
    return devs[below(&state, DEVICES)];
}

static uint8_t after[RANGE_MAX];

static void job_fill(void)
{
    struct range r = random_range(RANGE_MAX);
    uint8_t value = (uint8_t)random_next(&state);
    hmm_fence *fence;
    uint64_t result;
    if (r.len == 0 || !worked("fill", hmm_job_fill(any_device(), arena + r.at, value, r.len, &fence)))
        return;
    memset(after, value, r.len);
    settle(r.at, after, r.len, finish(fence, &result));
}

static void job_copy(void)
{
    struct range from = random_range(RANGE_MAX), to = random_range(RANGE_MAX);
    hmm_fence *fence;
    uint64_t result;
    size_t len = from.len < to.len ? from.len : to.len;
    if (below(&state, 3) == 0 && from.len > 1) { /* overlapping, like memmove */
        to.at = from.at + below(&state, (unsigned)from.len / 2);
        len = from.at + from.len - to.at;
    }
    if (len == 0 || !worked("copy", hmm_job_copy(any_device(), arena + to.at, arena + from.at, len, &fence)))
        return;
    memcpy(after, model + from.at, len);
    bool overlap = to.at < from.at + len && from.at < to.at + len;
    int status = finish(fence, &result);
    if (status && overlap) { /* it has overwritten its own source: any byte of the source may stand anywhere */
        memcpy(model + to.at, arena + to.at, len);
        return;
    }
    settle(to.at, after, len, status);
}

static void job_crc(void)
{
    struct range r = random_range(RANGE_MAX);
    hmm_fence *fence;
    uint64_t result;
    if (r.len == 0 || !worked("crc32c", hmm_job_crc32c(any_device(), arena + r.at, r.len, &fence)))
        return;
    if (finish(fence, &result) == 0 && result != crc_oracle(model + r.at, r.len))
        wrong("the device's checksum of %zu bytes at %zu differs", r.len, r.at);
}

/* ---- migration ---- */

static void check_counts(const struct hmm_migrate_result *res, unsigned n, bool out)
{
    uint64_t sum = res->moved + res->already + res->pinned + res->unmovable + res->unmapped + res->busy;
    if (out && sum != n)
        wrong("a migration of %u pages counts %llu", n, (unsigned long long)sum);
    if (res->cleared > res->moved || res->huge > res->moved)
        wrong("more pages are cleared or huge than moved");
}

static void migrate_out(void)
{
    unsigned first, n;
    random_pages(below(&state, 4) ? 40 : 700, &first, &n);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    int r = hmm_migrate_to_device(any_device(), arena + first * page + below(&state, 5), n * page - 5, &res);
    bool any = false;
    for (unsigned p = first; p < first + n; p++)
        any |= mapped[p];
    if (!any && r == -EFAULT)
        return;
    if (worked("to device", r))
        check_counts(&res, n, true);
}

static void migrate_home(void)
{
    unsigned first, n;
    random_pages(below(&state, 4) ? 40 : 700, &first, &n);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    if (worked("to system", hmm_migrate_to_system(arena + first * page, n * page, &res)))
        check_counts(&res, n, false);
}

/* ---- mappings ---- */

static void drop(void)
{
    unsigned first, n;
    random_pages(below(&state, 8) ? 20 : 600, &first, &n);
    for (unsigned p = first; p < first + n; p++)
        if (mapped[p]) {
            unsigned k = 1;
            while (p + k < first + n && mapped[p + k])
                k++;
            if (madvise(arena + p * page, k * page, MADV_DONTNEED))
                wrong("MADV_DONTNEED: %s", strerror(errno));
            memset(model + p * page, 0, k * page);
            p += k;
        }
}

static void unmap(void)
{
    unsigned first, n;
    random_pages(below(&state, 8) ? 20 : 600, &first, &n);
    if (munmap(arena + first * page, n * page))
        wrong("munmap: %s", strerror(errno));
    memset(mapped + first, 0, n);
}

/* Holes are mapped again at once, most often: a hole could become somebody else's. */
static void map_holes(void)
{
    for (unsigned p = 0; p < PAGES; p++) {
        if (mapped[p])
            continue;
        unsigned n = 1;
        while (p + n < PAGES && !mapped[p + n])
            n++;
        char *at = arena + p * page;
        if (mmap(at, n * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != at)
            wrong("mmap in a hole: %s", strerror(errno));
        madvise(at, n * page, below(&state, 3) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        memset(model + p * page, 0, n * page);
        memset(mapped + p, 1, n);
    }
}

static void remove_and_map(void)
{
    unmap();
    if (below(&state, 2)) { /* the devices see the hole */
        migrate_out();
        migrate_home();
    }
    map_holes();
}

/* Page by page: a range that is managed in part is several mappings, which mremap takes only one of. */
static void move(void)
{
    unsigned from, n, to;
    random_pages(20, &from, &n);
    to = below(&state, PAGES - n + 1);
    for (unsigned i = 0; i < n; i++) {
        unsigned a = from + i, b = to + i;
        if (a == b || !mapped[a])
            continue;
        if (mremap(arena + a * page, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, arena + b * page) != arena + b * page)
            wrong("mremap: %s", strerror(errno));
        memcpy(model + b * page, model + a * page, page);
        mapped[b] = true;
        mapped[a] = false;
    }
    map_holes();
}

/* ---- where pages are ---- */

static bool present(unsigned p)
{
    return pagemap_read(pagemap_fd, arena + p * page) >> 62 != 0; /* present or swapped */
}

static bool zero_model(unsigned p)
{
    for (size_t i = 0; i < page; i++)
        if (model[p * page + i])
            return false;
    return true;
}

static void query(void)
{
    static struct hmm_page_info info[PAGES];
    unsigned first, n;
    random_pages(600, &first, &n);
    int64_t r = hmm_range_query(arena + first * page, n * page, info, PAGES);
    if (!worked("range query", r))
        return;
    if (r != n)
        wrong("a range query of %u pages answers for %lld", n, (long long)r);
    for (unsigned i = 0; i < n; i++) {
        unsigned p = first + i;
        bool here = present(p), device = info[i].device == devs[0] || info[i].device == devs[1];
        bool right = info[i].state == HMM_PAGE_SYSTEM   ? here && info[i].device == 0
                     : info[i].state == HMM_PAGE_DEVICE ? !here && device && mapped[p]
                     : info[i].state == HMM_PAGE_ABSENT ? !here && (!mapped[p] || zero_model(p))
                                                        : false;
        if (!right && !injecting) /* a system call of the query itself may have been made to fail */
            wrong("page %u: the query says state %d, device %d; the kernel says %s", p, info[i].state, info[i].device,
                  here ? "present" : "absent");
    }
}

static void audit(void)
{
    int n = hmm_audit();
    while (n == -ENOMEM) /* injected: the audit needs memory for its report */
        n = hmm_audit();
    if (n)
        wrong("audit: %d, %s", n, hmm_last_message());
}

/* ---- */

static const struct op {
    const char *name;
    void (*run)(void);
    unsigned weight;
} ops[] = {
    {"CPU reads", cpu_read, 10}, {"CPU writes", cpu_write, 10}, {"job fill", job_fill, 10},
    {"job copy", job_copy, 10},  {"job crc32c", job_crc, 10},   {"to device", migrate_out, 10},
    {"home", migrate_home, 6},   {"MADV_DONTNEED", drop, 4},    {"munmap, mmap", remove_and_map, 4},
    {"mremap", move, 4},         {"range query", query, 4},     {"audit", audit, 1},
};
#define OPS (sizeof(ops) / sizeof(*ops))

static void log_line(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level == HMM_LOG_ERROR || (level == HMM_LOG_WARNING && !injecting))
        printf("log: %s\n", line);
}

/* A manager that fails to start starts the same sequence of failures again: it gets another seed. */
static void open_device(int i, const char *spec)
{
    for (int tries = 0;; tries++) {
        struct hmm_config config = {.size = sizeof(config), .seed = random_next(&state) | 1};
        if (i == 0)
            REQUIRE(hmm_configure(&config));
        if (worked("open", hmm_device_open(spec, &devs[i])))
            return;
        if (tries == 200)
            wrong("the device cannot be opened: %s", hmm_last_message());
    }
}

static void set_up(int argc, char **argv)
{
    const char *debug = getenv("HMM_DEBUG");
    state = seed_of(argc, argv, 2);
    injecting = (debug && strstr(debug, "inject")) || strstr(device_spec(""), "_error="); /* of the device `faulty` */
    page = hmm_page_size();
    arena_bytes = PAGES * page;
    size_t align = 2u << 20;
    char *raw = mmap(NULL, arena_bytes + 2 * align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    arena = (char *)(((uintptr_t)raw + align) & ~(align - 1));
    model = mmap(NULL, arena_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    munmap(arena, arena_bytes);
    map_holes();
    pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (raw == MAP_FAILED || model == MAP_FAILED || pagemap_fd < 0)
        wrong("set-up: %s", strerror(errno));
    hmm_set_log(log_line, NULL);
    doing = "opening";
    open_device(0, device_spec("soft:memory=2M,engines=1"));
    open_device(1, device_spec("soft:memory=1M,engines=2"));
}

static void close_all(void)
{
    for (int i = 0; i < DEVICES; i++)
        for (int tries = 0; !worked("close", hmm_device_close(devs[i])); tries++)
            if (tries == 20)
                wrong("the device cannot be closed: %s", hmm_last_message());
}

int main(int argc, char **argv)
{
    double length = argc > 1 ? atof(argv[1]) : 6;
    uint64_t count[OPS] = {0};
    unsigned total = 0;
    for (size_t i = 0; i < OPS; i++)
        total += ops[i].weight;
    setvbuf(stdout, NULL, _IOLBF, 0);
    set_up(argc, argv);
    for (double end = seconds() + length; seconds() < end; step++) {
        unsigned pick = below(&state, total), i = 0;
        while (pick >= ops[i].weight)
            pick -= ops[i++].weight;
        doing = ops[i].name;
        ops[i].run();
        count[i]++;
    }
    doing = "the end";
    compare(0, arena_bytes);
    audit();
    struct hmm_stats s = {.size = sizeof(s)};
    REQUIRE(hmm_stats(&s));
    close_all();
    compare(0, arena_bytes);
    bool busy = s.pages_to_device && s.pages_to_system && s.device_faults && s.evicted && s.events_remove && s.events_remap;
    for (size_t i = 0; i < OPS; i++) {
        printf("%s %llu%s", ops[i].name, (unsigned long long)count[i], i + 1 < OPS ? ", " : "\n");
        busy &= count[i] > 0;
    }
    printf("pages out %llu, home %llu, evicted %llu, device faults %llu, CPU faults %llu, calls that failed %llu%s\n",
           (unsigned long long)s.pages_to_device, (unsigned long long)s.pages_to_system, (unsigned long long)s.evicted,
           (unsigned long long)s.device_faults, (unsigned long long)s.cpu_faults, (unsigned long long)refused,
           busy ? "" : ": not everything ran, which proves nothing");
    return busy ? 0 : 1;
}
