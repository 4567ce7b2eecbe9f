/* SPDX-License-Identifier: MIT */
/*
 * The calls that the table of test_calls cannot hold: memory that is not private and anonymous, the heap's end, exec, exit, children,
 * signal handlers; and what is done to memory of which a part is in use.
 */
#include "watcher.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "os/uapi.h"

/* ---- shared and file-backed memory ------------------------------------------------------------------------------------------ */

enum { SHARED_ANONYMOUS, MEMFD, FILE_PRIVATE, FILE_SHARED, KINDS };
static const char *const kinds[] = {"shared anonymous", "memfd", "private file", "shared file"};

static char *map_kind(int kind, size_t len)
{
    char path[] = "/tmp/libhmm-calls-XXXXXX", *p;
    int fd = -1, flags = kind == FILE_PRIVATE ? MAP_PRIVATE : MAP_SHARED;
    if (kind == MEMFD)
        fd = memfd_create("calls", MFD_CLOEXEC);
    else if (kind != SHARED_ANONYMOUS)
        fd = mkstemp(path);
    if (fd >= 0)
        assert_int_equal(ftruncate(fd, (off_t)len), 0);
    if (kind == FILE_PRIVATE || kind == FILE_SHARED)
        unlink(path);
    p = mmap(NULL, len, PROT_READ | PROT_WRITE, flags | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    if (fd >= 0)
        close(fd);
    live_fill(p, len, (uint64_t)kind);
    return p;
}

struct shared_row {
    const char *name;
    int (*make)(bool announced, char *at, size_t len);
    enum hmm_event_type type;
    bool gone, zeros; /* of shared memory; in a private file mapping DONTNEED brings the file's zeros back, too */
};

#define EITHER(announced, name, ...) ((announced) ? hmm_##name(__VA_ARGS__) : name(__VA_ARGS__))

static int shared_munmap(bool announced, char *at, size_t len)
{
    return EITHER(announced, munmap, at, len);
}

static int shared_over(bool announced, char *at, size_t len)
{
    return EITHER(announced, mmap, at, len, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at ? 0 : -1;
}

static int shared_move(bool announced, char *at, size_t len)
{
    char *to = live_reserve(len);
    if (EITHER(announced, mremap, at, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
        return -1;
    return munmap(to, len);
}

static int shared_dontneed(bool announced, char *at, size_t len)
{
    return EITHER(announced, madvise, at, len, MADV_DONTNEED);
}

static int shared_remove(bool announced, char *at, size_t len)
{
    return EITHER(announced, madvise, at, len, MADV_REMOVE);
}

static int shared_protect(bool announced, char *at, size_t len)
{
    return EITHER(announced, mprotect, at, len, PROT_READ);
}

static const struct shared_row shared_rows[] = {
    {"munmap", shared_munmap, HMM_EVENT_UNMAP, true, false},
    {"mmap over it", shared_over, HMM_EVENT_UNMAP, false, true},
    {"mremap", shared_move, HMM_EVENT_UNMAP, true, false},
    {"MADV_DONTNEED", shared_dontneed, HMM_EVENT_CLEAR, false, false},
    {"MADV_REMOVE", shared_remove, HMM_EVENT_CLEAR, false, true},
    {"mprotect", shared_protect, HMM_EVENT_PROTECTION_VMA, false, false},
};

static void check_shared(const struct shared_row *row, int kind, const char *at, const uint8_t *old, size_t len)
{
    unsigned char vec;
    bool zeros = row->zeros || (kind == FILE_PRIVATE && row->make == shared_dontneed);
    assert_int_equal(mincore((void *)(uintptr_t)at, page, &vec), row->gone ? -1 : 0);
    if (row->gone)
        return;
    for (size_t i = 0; i < len; i++)
        if ((uint8_t)at[i] != (zeros ? 0 : old[i]))
            fail_msg("%s of %s: byte %zu", row->name, kinds[kind], i);
    assert_int_equal(device_crc(at, len), crc_oracle(at, len)); /* over the bus */
}

/* Of such memory the kernel tells us nothing unless it is registered, which would slow it down: only who announces is heard. */
static void shared_memory_is_heard_of_by_announcement_only(void **state)
{
    (void)state;
    static struct watcher w;
    size_t len = 16 * page, part = 8 * page;
    for (unsigned i = 0; i < sizeof(shared_rows) / sizeof(shared_rows[0]); i++)
        for (int kind = 0; kind < KINDS; kind++)
            for (int announced = 0; announced < 2; announced++) {
                const struct shared_row *row = &shared_rows[i];
                if (kind == FILE_PRIVATE && row->make == shared_remove)
                    continue; /* refused */
                char *p = map_kind(kind, len);
                uint8_t *old = copy_of(p + part, part);
                watch(&w, p, len);
                if (row->make(announced, p + part, part))
                    fail_msg("%s of %s: %s", row->name, kinds[kind], strerror(errno));
                hmm_event_sync(dev);
                assert_int_equal(w.n, announced ? watcher_saw(&w, row->type, p + part, part) : 0);
                assert_true(!announced || w.n > 0);
                check_shared(row, kind, p + part, old, part);
                unwatch(&w);
                munmap(p, len);
                free(old);
            }
}

static void shmdt_is_announced_for_the_whole_segment(void **state)
{
    (void)state;
    static struct watcher w;
    for (int announced = 0; announced < 2; announced++) {
        int id = shmget(IPC_PRIVATE, 5 * MIB, IPC_CREAT | 0600);
        assert_true(id >= 0);
        char *p = shmat(id, NULL, 0);
        shmctl(id, IPC_RMID, NULL);
        assert_ptr_not_equal(p, (void *)-1);
        watch(&w, p + 4 * MIB, MIB); /* its end only */
        assert_int_equal(announced ? hmm_shmdt(p) : shmdt(p), 0);
        assert_int_equal(watcher_saw(&w, HMM_EVENT_UNMAP, p, 5 * MIB), announced);
        assert_int_equal(hmm_shmdt(p), -1);
        assert_int_equal(errno, EINVAL);
        unwatch(&w);
    }
}

/* ---- the heap's end ----------------------------------------------------------------------------------------------------------- */

static void the_end_of_the_heap_is_announced(void **state)
{
    (void)state;
    static struct watcher w;
    char *old = sbrk(0), *start = (char *)(((uintptr_t)old + page - 1) & ~(page - 1));
    assert_ptr_equal(hmm_sbrk(start - old + (intptr_t)(3 * MIB)), old);
    memset(start, 5, 3 * MIB);
    to_device(start + MIB, MIB);
    watch(&w, start, 3 * MIB);
    assert_ptr_equal(hmm_sbrk(-(intptr_t)MIB), start + 3 * MIB);
    assert_int_equal(hmm_brk(start + MIB), 0);
    assert_int_equal(hmm_brk(start + 2 * MIB), 0); /* again, fresh */
    unsigned first = watcher_saw(&w, HMM_EVENT_UNMAP, start + 2 * MIB, MIB),
             second = watcher_saw(&w, HMM_EVENT_UNMAP, start + MIB, MIB);
    unsigned all = w.n;
    size_t wrong = 0;
    for (size_t i = 0; i < 2 * MIB; i++)
        wrong += start[i] != (i < MIB ? 5 : 0);
    uint32_t crc = device_crc(start, 2 * MIB), expected = crc_oracle(start, 2 * MIB);
    assert_int_equal(hmm_brk(old), 0);
    assert_ptr_equal(sbrk(0), old);
    assert_true(first > 0 && second > 0);
    assert_true(all >= first + second);
    assert_int_equal(wrong, 0);
    assert_int_equal(crc, expected);
    unwatch(&w);
}

/* ---- exec, exit, children ----------------------------------------------------------------------------------------------------- */

static uint32_t *told; /* shared with children: RELEASE events of everything */

static int tell(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    if (event->type == HMM_EVENT_RELEASE && event->start == 0 && event->end > (uintptr_t)1 << 62)
        __atomic_fetch_add(told, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static const struct hmm_notifier_ops tells = {.invalidate = tell};

/* A child with a device of its own that ends in a given way. Returns its status; *told says whether its device was told. */
static int run_child(void (*end)(void))
{
    static struct hmm_notifier n;
    *told = 0;
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        if (hmm_device_open("soft:memory=4M,engines=1", &handle))
            _exit(90);
        dev = device_get(handle);
        char *p = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(p, 1, MIB);
        if (hmm_notifier_insert(dev, &n, (uintptr_t)p, (uintptr_t)p + MIB, &tells) ||
            hmm_migrate_to_device(handle, p, MIB, NULL))
            _exit(91);
        end();
        _exit(92);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void end_by_exec(void)
{
    char *args[] = {"sh", "-c", "exit 7", NULL}, *env[] = {NULL};
    hmm_execve("/bin/sh", args, env);
}

static void end_by_exec_of_file(void)
{
    char *args[] = {"sh", "-c", "exit 8", NULL}, *env[] = {"PATH=/bin:/usr/bin", NULL};
    hmm_execvpe("sh", args, env);
}

static void end_by_exec_of_descriptor(void)
{
    char *args[] = {"true", NULL}, *env[] = {NULL};
    hmm_fexecve(open("/bin/true", O_RDONLY | O_CLOEXEC), args, env);
}

static void end_by_exit(void)
{
    hmm_exit(9);
}

static void end_by_plain_exit(void)
{
    _exit(10);
}

static void exec_and_exit_are_told_to_devices(void **state)
{
    (void)state;
    static const struct {
        void (*end)(void);
        int status;
        bool told;
    } ends[] = {{end_by_exec, 7, true},
                {end_by_exec_of_file, 8, true},
                {end_by_exec_of_descriptor, 0, true},
                {end_by_exit, 9, true},
                {end_by_plain_exit, 10, false}};
#ifdef __SANITIZE_ADDRESS__
    fprintf(stderr, "skipped: the child of a program under AddressSanitizer may find its allocator's locks taken\n");
    skip();
#endif
    told = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (unsigned i = 0; i < sizeof(ends) / sizeof(ends[0]); i++) {
        assert_int_equal(run_child(ends[i].end), ends[i].status);
        assert_int_equal(*told > 0, ends[i].told);
    }
    munmap(told, page);
}

static void a_failed_exec_is_ended_again(void **state)
{
    (void)state;
    static struct watcher w;
    char *p = mapped(MIB, 1), *args[] = {"x", NULL};
    uint8_t *oracle = copy_of(p, MIB);
    watch(&w, p, MIB);
    to_device(p, MIB);
    uint64_t before = stats_now().calls_release;
    for (int i = 0; i < 20; i++) {
        assert_int_equal(hmm_execve("/nowhere", args, args), -1);
        assert_int_equal(errno, ENOENT);
        assert_int_equal(device_crc(p, MIB), crc_oracle(oracle, MIB)); /* it would wait for ever */
    }
    assert_int_equal(stats_now().calls_release - before, 20);
    assert_true(w.n >= 20);
    assert_memory_equal(p, oracle, MIB);
    unwatch(&w);
    munmap(p, MIB);
    free(oracle);
}

/* A child of fork has no devices, one of vfork has its parent's memory: neither hands anything to threads of the parent. */
static void calls_in_children_are_only_made(void **state)
{
    (void)state;
    static struct watcher w;
    int status;
    char *p = mapped(2 * MIB, 2);
    watch(&w, p, 2 * MIB);
    pid_t child = fork();
    if (child == 0) {
        alarm(10);
        int r = hmm_mprotect(p, MIB, PROT_READ) || hmm_munmap(p + MIB, MIB);
        char *args[] = {"sh", "-c", "exit 3", NULL}, *env[] = {NULL};
        hmm_execve(r ? "/nowhere" : "/bin/sh", args, env);
        _exit(80);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(WEXITSTATUS(status), 3);
    struct hmm_stats before = stats_now();
    child = vfork();
    if (child == 0) {
        char *args[] = {"true", NULL}, *env[] = {NULL};
        hmm_mprotect(p, MIB, PROT_READ | PROT_WRITE);
        hmm_execve("/bin/true", args, env);
        _exit(80);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    struct hmm_stats after = stats_now();
    assert_int_equal(after.calls_protect + after.calls_release, before.calls_protect + before.calls_release);
    assert_int_equal(w.n, 0);
    assert_int_equal(device_crc(p, MIB), crc_oracle(p, MIB));
    unwatch(&w);
    munmap(p, 2 * MIB);
}

/* Only what the child is still to get is kept from the device, as one range. */
static void fork_is_told_with_what_is_away(void **state)
{
    (void)state;
    static struct watcher w;
    char *p = mapped(MIB, 50), *part = p + MIB / 4;
    uint8_t *oracle = copy_of(p, MIB);
    int status;
    watch(&w, p, MIB);
    to_device(part, MIB / 4);
    pid_t child = fork();
    if (child == 0)
        _exit(memcmp(p, oracle, MIB) ? 1 : 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    hmm_event_sync(dev);
    assert_true(hmm_notifier_read_begin(&w.notifier) != 0); /* it is over */
    assert_true(watcher_saw(&w, HMM_EVENT_PROTECTION_PAGE, part, MIB / 4) > 0);
    for (unsigned i = 0; i < w.n; i++) {
        assert_int_equal(w.event[i].type, HMM_EVENT_PROTECTION_PAGE);
        assert_int_equal(w.event[i].start, (uintptr_t)part);
        assert_int_equal(w.event[i].end, (uintptr_t)part + MIB / 4);
        assert_null(w.event[i].owner);
    }
    assert_int_equal(device_crc(p, MIB), crc_oracle(oracle, MIB));
    unwatch(&w);
    munmap(p, MIB);
    free(oracle);
}

/* ---- migrations ----------------------------------------------------------------------------------------------------------------- */

struct mover {
    struct hmm_notifier n;
    struct hmm_event last;
    uint32_t told;
};

static int note_move(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct mover *m = (struct mover *)n;
    m->last = *event;
    __atomic_fetch_add(&m->told, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static void expect_move(struct mover *m, const char *at, size_t len, const struct hmm_device *owner)
{
    assert_int_equal(__atomic_exchange_n(&m->told, 0, __ATOMIC_SEQ_CST), 1);
    assert_int_equal(m->last.type, HMM_EVENT_MIGRATE);
    assert_int_equal(m->last.start, (uintptr_t)at);
    assert_int_equal(m->last.end, (uintptr_t)at + len);
    assert_ptr_equal(m->last.owner, owner);
}

/* To a device: the other ones are told, with its name. Home: all, with no name. */
static void migrations_are_told_with_range_and_owner(void **state)
{
    (void)state;
    static const struct hmm_notifier_ops notes = {.invalidate = note_move};
    static struct mover own, other;
    hmm_dev second;
    assert_int_equal(hmm_device_open("soft:memory=4M,engines=1", &second), 0);
    struct hmm_device *there = device_get(second);
    device_put(there);
    char *p = mapped(MIB, 51), *part = p + 16 * page;
    assert_int_equal(hmm_notifier_insert(dev, &own.n, (uintptr_t)p, (uintptr_t)p + MIB, &notes), 0);
    assert_int_equal(hmm_notifier_insert(there, &other.n, (uintptr_t)p, (uintptr_t)p + MIB, &notes), 0);
    own.told = other.told = 0;
    to_device(part, 32 * page);
    assert_int_equal(own.told, 0);
    expect_move(&other, part, 32 * page, dev);
    assert_int_equal(hmm_migrate_to_system(part, 8 * page, NULL), 0);
    expect_move(&own, part, 8 * page, NULL);
    expect_move(&other, part, 8 * page, NULL);
    assert_int_equal(hmm_notifier_remove(&own.n), 0);
    assert_int_equal(hmm_notifier_remove(&other.n), 0);
    assert_int_equal(hmm_device_close(second), 0);
    munmap(p, MIB);
}

/* ---- signal handlers ---------------------------------------------------------------------------------------------------------- */

static char *handler_at;
static volatile unsigned handled, handler_failed;

static void change_in_handler(int signal)
{
    (void)signal;
    int err = errno;
    handler_failed += hmm_madvise(handler_at, MIB, MADV_DONTNEED) != 0;
    handler_failed += hmm_mprotect(handler_at, MIB, PROT_READ | PROT_WRITE) != 0;
    handler_failed +=
        hmm_mmap(handler_at, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != handler_at;
    *(volatile char *)handler_at = 1;
    handled++;
    errno = err;
}

static void handlers_may_announce_changes(void **state)
{
    (void)state;
    static struct watcher w;
    struct itimerval every = {{0, 3000}, {0, 3000}}, never = {{0, 0}, {0, 0}};
    struct sigaction sa = {.sa_handler = change_in_handler, .sa_flags = SA_RESTART}, old;
    handler_at = mapped(MIB, 3);
    char *p = mapped(MIB, 4);
    watch(&w, handler_at, MIB);
    handled = handler_failed = 0;
    sigaction(SIGALRM, &sa, &old);
    setitimer(ITIMER_REAL, &every, NULL);
    for (int i = 0; handled < 200 && i < 100000; i++) {
        hmm_migrate_to_device(handle, handler_at, MIB, NULL);
        assert_int_equal(hmm_madvise(p, MIB, MADV_DONTNEED), 0);
        to_device(p, MIB);
        free(malloc(100000 + i % 1000 * 1000));
    }
    setitimer(ITIMER_REAL, &never, NULL);
    sigaction(SIGALRM, &old, NULL);
    alarm(50); /* the watchdog's timer was the same */
    assert_int_equal(handler_failed, 0);
    assert_true(handled >= 200);
    unwatch(&w);
    munmap(handler_at, MIB);
    munmap(p, MIB);
}

/* ---- a part of what is in use ------------------------------------------------------------------------------------------------- */

static void a_part_is_unmapped_while_jobs_use_the_rest(void **state)
{
    (void)state;
    size_t len = 4 * MIB;
    char *p = mapped(len, 5);
    uint8_t *oracle = copy_of(p, len);
    unsigned running[2] = {0};
    for (int round = 0; round < 40; round++) {
        hmm_fence *low, *high;
        bool announced = round % 2;
        size_t at = MIB + (size_t)round * 3 * page, part = MIB;
        to_device(p, at);
        assert_int_equal(hmm_job_fill(handle, p, (uint8_t)round, at, &low), 0);
        assert_int_equal(hmm_job_crc32c(handle, p + at + part, len - at - part, &high), 0);
        assert_int_equal(announced ? hmm_munmap(p + at, part) : munmap(p + at, part), 0);
        running[announced] += hmm_fence_wait(low, 0) == -EAGAIN || hmm_fence_wait(high, 0) == -EAGAIN;
        memset(oracle, round, at);
        struct hmm_fence_info a = finish(low), b = finish(high);
        assert_int_equal(a.status, 0);
        assert_int_equal(b.status, 0);
        assert_int_equal((uint32_t)b.result, crc_oracle(oracle + at + part, len - at - part));
        assert_memory_equal(p, oracle, at);
        assert_memory_equal(p + at + part, oracle + at + part, len - at - part);
        assert_ptr_equal(hmm_mmap(p + at, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
                         p + at);
        memset(oracle + at, 0, part);
    }
    assert_true(running[0] > 0 && running[1] > 0); /* or nothing was in use */
    munmap(p, len);
    free(oracle);
}

static bool huge_to_device(const char *at)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(handle, at, LIVE_BLOCK, &res), 0);
    assert_int_equal(res.moved, LIVE_BLOCK / page);
    return res.huge == LIVE_BLOCK / page;
}

static void half_of_a_huge_page_that_is_away_is_moved(void **state)
{
    (void)state;
    for (int round = 0; round < 8; round++) {
        bool announced = round % 2, upper = round / 2 % 2, grown = round / 4;
        char *p = live_reserve(2 * LIVE_BLOCK), *to = live_reserve(2 * LIVE_BLOCK);
        assert_ptr_equal(mmap(p, LIVE_BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), p);
        madvise(p, LIVE_BLOCK, MADV_HUGEPAGE);
        live_fill(p, LIVE_BLOCK, 6);
        uint8_t *oracle = copy_of(p, LIVE_BLOCK);
        if (!huge_to_device(p)) {
            fprintf(stderr, "skipped: the kernel gave no huge page\n");
            munmap(p, LIVE_BLOCK);
            free(oracle);
            skip();
        }
        size_t half = LIVE_BLOCK / 2, new_len = grown ? LIVE_BLOCK : half;
        char *from = upper ? p + half : p, *rest = upper ? p : p + half;
        int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        char *q = announced ? hmm_mremap(from, half, new_len, flags, to) : mremap(from, half, new_len, flags, to);
        assert_ptr_equal(q, to);
        assert_int_equal(device_crc(q, half), crc_oracle(oracle + (from - p), half));
        assert_memory_equal(rest, oracle + (rest - p), half);
        assert_memory_equal(q, oracle + (from - p), half);
        for (size_t i = half; i < new_len; i++)
            assert_int_equal(q[i], 0);
        munmap(q, new_len);
        munmap(p, LIVE_BLOCK);
        free(oracle);
    }
}

/* Somebody else's userfaultfd on the range: its pages stay, and are counted; calls are announced as ever. */
static void memory_of_another_userfaultfd_stays(void **state)
{
    (void)state;
    static struct watcher w;
    struct hmm_migrate_result res = {.size = sizeof(res)};
    struct uffdio_api api = {.api = UFFD_API};
    char *p = mapped(MIB, 7);
    uint8_t *oracle = copy_of(p, MIB);
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* user mode only */);
    assert_true(fd >= 0);
    assert_int_equal(ioctl(fd, UFFDIO_API, &api), 0);
    struct uffdio_register reg = {.range = {(uintptr_t)p + MIB / 2, MIB / 2}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    assert_int_equal(ioctl(fd, UFFDIO_REGISTER, &reg), 0);
    watch(&w, p, MIB);
    assert_int_equal(hmm_migrate_to_device(handle, p, MIB, &res), 0);
    assert_int_equal(res.moved, MIB / 2 / page);
    assert_int_equal(res.unmovable, MIB / 2 / page);
    assert_int_equal(res.first_stayed, (uintptr_t)p + MIB / 2);
    assert_int_equal(device_crc(p, MIB), crc_oracle(oracle, MIB));
    assert_int_equal(hmm_munmap(p + MIB / 4, MIB / 2), 0);
    assert_true(watcher_saw(&w, HMM_EVENT_UNMAP, p + MIB / 4, MIB / 2) > 0);
    assert_memory_equal(p, oracle, MIB / 4);
    assert_memory_equal(p + 3 * MIB / 4, oracle + 3 * MIB / 4, MIB / 4);
    close(fd);
    unwatch(&w);
    munmap(p, MIB);
    free(oracle);
}

/* What the C library does for itself is not announced, and events see to it, beside calls that are. */
static void calls_inside_the_c_library_and_announced_ones_get_on(void **state)
{
    (void)state;
    char *p = mapped(MIB, 8), *big = NULL;
    uint8_t *oracle = copy_of(p, MIB);
    for (int round = 1; round <= 60; round++) {
        size_t bytes = (256 << 10) + (size_t)round * 8 * page;
        big = realloc(big, bytes); /* mremap */
        memset(big, round, bytes);
        assert_int_equal(hmm_migrate_to_device(handle, big, bytes, NULL), 0);
        to_device(p, MIB);
        assert_int_equal(hmm_madvise(p, MIB / 2, MADV_DONTNEED), 0);
        if (round == 1)
            memset(oracle, 0, MIB / 2);
        if (round % 6 == 1) {
            assert_int_equal(device_crc(p, MIB), crc_oracle(oracle, MIB));
            assert_int_equal(device_crc(big, bytes), crc_oracle(big, bytes));
        }
        for (size_t i = 0; i < bytes; i += 97)
            assert_int_equal(big[i], (char)round);
        if (round % 3 == 0) {
            free(big); /* munmap */
            big = NULL;
        }
    }
    free(big);
    munmap(p, MIB);
    free(oracle);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        WATCHER_TEST(shared_memory_is_heard_of_by_announcement_only),
        WATCHER_TEST(shmdt_is_announced_for_the_whole_segment),
        WATCHER_TEST(the_end_of_the_heap_is_announced),
        WATCHER_TEST(exec_and_exit_are_told_to_devices),
        WATCHER_TEST(a_failed_exec_is_ended_again),
        WATCHER_TEST(calls_in_children_are_only_made),
        WATCHER_TEST(fork_is_told_with_what_is_away),
        WATCHER_TEST(migrations_are_told_with_range_and_owner),
        WATCHER_TEST(handlers_may_announce_changes),
        WATCHER_TEST(a_part_is_unmapped_while_jobs_use_the_rest),
        WATCHER_TEST(half_of_a_huge_page_that_is_away_is_moved),
        WATCHER_TEST(memory_of_another_userfaultfd_stays),
        WATCHER_TEST(calls_inside_the_c_library_and_announced_ones_get_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
