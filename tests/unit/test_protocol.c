/* SPDX-License-Identifier: MIT */
/*
 * Every step of the protocol, met by a change of the program at exactly that point, without luck: sequence points call a hook that
 * unmaps, drops, moves or touches the pages under migration; a wrapped table of system calls does what another thread could have done
 * between two of them. Content is compared with a copy that the library never sees, by the CPU and by the device.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "api/manager.h"
#include "arena.h"
#include "events.h"
#include "points.h"

#define PAGES 32u
#define FIRST 8u /* what changes: pages [FIRST, LAST) */
#define LAST 16u
#define SECONDS_MAX 50 /* a hang is a failure */

static bool moved_away; /* pages [FIRST, LAST) of oracle are at away */

/* Data, zero pages and absent pages. */
static void fill_arena(uint64_t seed)
{
    assert_true(live_map(arena, bytes(PAGES)));
    memset(oracle, 0, bytes(PAGES));
    for (unsigned i = 0; i < PAGES; i++) {
        if (i % 4 == 3)
            continue;
        if (i % 4 == 2) {
            assert_int_equal(*(volatile char *)(arena + bytes(i)), 0);
            continue;
        }
        live_fill(oracle + bytes(i), page, seed * PAGES + i);
        memcpy(arena + bytes(i), oracle + bytes(i), page);
    }
    moved_away = false;
}

static int set_up(void **state)
{
    (void)state;
    live_set_up(SECONDS_MAX);
    arena_set_up(PAGES);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    forget_point();
    bool good = live_tear_down(); /* of a test that failed, the device is open */
    inject_stop();
    arena_tear_down(PAGES);
    return good ? 0 : -1;
}

static void open_device(void)
{
    open_spec("soft:memory=8M,engines=1");
}

static void close_device(void)
{
    assert_int_equal(hmm_audit(), 0);
    assert_int_equal(hmm_device_close(dev), 0);
    dev = 0;
}

static uint32_t device_crc(const void *at, size_t len)
{
    hmm_fence *fence;
    struct hmm_fence_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_job_crc32c(dev, at, len, &fence), 0);
    hmm_fence_wait(fence, -1);
    assert_int_equal(hmm_fence_info(fence, &info), 0);
    if (info.status)
        fail_msg("crc32c: %d, %s", info.status, info.message);
    hmm_fence_put(fence);
    return (uint32_t)info.result;
}

static void check_part(const char *what, const char *at, const uint8_t *expected, size_t len, bool by_device)
{
    if (by_device && device_crc(at, len) != crc_oracle(expected, len))
        fail_msg("%s: the device reads something else", what);
    for (size_t i = 0; i < len; i++)
        if (((const volatile uint8_t *)at)[i] != expected[i])
            fail_msg("%s: byte %zu (page %zu) is %#x, not %#x", what, i, i / page, (uint8_t)at[i], expected[i]);
}

static void check_all(const char *what, bool by_device)
{
    check_part(what, arena, oracle, bytes(FIRST), by_device);
    check_part(what, (moved_away ? away : arena) + bytes(FIRST), oracle + bytes(FIRST), bytes(LAST - FIRST), by_device);
    check_part(what, arena + bytes(LAST), oracle + bytes(LAST), bytes(PAGES - LAST), by_device);
}

/* ---- what the program does meanwhile ---- */

static void drop(void)
{
    madvise(arena + bytes(FIRST), bytes(LAST - FIRST), MADV_DONTNEED);
    memset(oracle + bytes(FIRST), 0, bytes(LAST - FIRST));
}

static void drop_and_write(void)
{
    drop();
    live_fill(arena + bytes(FIRST), page, 77);
    live_fill(oracle + bytes(FIRST), page, 77);
}

static void map_again(void)
{
    munmap(arena + bytes(FIRST), bytes(LAST - FIRST));
    live_map(arena + bytes(FIRST), bytes(LAST - FIRST));
    memset(oracle + bytes(FIRST), 0, bytes(LAST - FIRST));
}

static void map_again_and_write(void)
{
    map_again();
    live_fill(arena + bytes(FIRST), bytes(LAST - FIRST), 78);
    live_fill(oracle + bytes(FIRST), bytes(LAST - FIRST), 78);
}

static void move(void)
{
    mremap(arena + bytes(FIRST), bytes(LAST - FIRST), bytes(LAST - FIRST), MREMAP_MAYMOVE | MREMAP_FIXED, away + bytes(FIRST));
    moved_away = true;
}

static void move_and_map(void)
{
    move();
    live_map(arena + bytes(FIRST), bytes(LAST - FIRST));
    live_fill(arena + bytes(FIRST), bytes(LAST - FIRST), 79);
}

static void move_and_back(void)
{
    move();
    mremap(away + bytes(FIRST), bytes(LAST - FIRST), bytes(LAST - FIRST), MREMAP_MAYMOVE | MREMAP_FIXED, arena + bytes(FIRST));
    moved_away = false;
}

/* A thread that touches a page which is away: it sleeps until whoever lands the flight wakes it. */
static struct {
    pthread_t thread;
    bool running, write;
    uint8_t seen;
} toucher;

static void *touch_page(void *arg)
{
    volatile uint8_t *at = (uint8_t *)arena + bytes(FIRST) + 5;
    (void)arg;
    toucher.seen = *at;
    if (toucher.write)
        *at = (uint8_t)~toucher.seen;
    return NULL;
}

static uint64_t cpu_faults(void)
{
    struct hmm_stats s = {.size = sizeof(s)};
    hmm_stats(&s);
    return s.cpu_faults;
}

static void start_touch(bool write)
{
    uint64_t before = cpu_faults();
    toucher.write = write;
    toucher.running = true;
    pthread_create(&toucher.thread, NULL, touch_page, NULL);
    for (int i = 0; i < 20 && cpu_faults() == before; i++)
        usleep(1000); /* where the page is present there is no fault to wait for */
    usleep(2000);     /* counted, but perhaps not served yet */
}

static void touch_read(void)
{
    start_touch(false);
}

static void touch_write(void)
{
    start_touch(true);
}

static void end_touch(const char *what)
{
    if (!toucher.running)
        return;
    pthread_join(toucher.thread, NULL);
    toucher.running = false;
    uint8_t *expected = oracle + bytes(FIRST) + 5;
    if (toucher.seen != *expected)
        fail_msg("%s: a touch saw %#x, not %#x", what, toucher.seen, *expected);
    if (toucher.write)
        *expected = (uint8_t)~toucher.seen;
}

/* A child that lives on, so that what it shares stays shared. It must have the bytes of the moment. */
static struct {
    pid_t pid; /* 0: none */
    char said; /* 'r' right, 'w' wrong, 0: ended without a word */
} child;

static void fork_child(void)
{
    int said[2];
    child.said = 0;
    if (pipe(said) || (child.pid = fork()) < 0) {
        child.said = 'w';
        child.pid = 0;
        return;
    }
    if (child.pid == 0) {
        signal(SIGSEGV, SIG_DFL);
        bool right = memcmp(arena + bytes(FIRST), oracle + bytes(FIRST), bytes(LAST - FIRST)) == 0;
        if (write(said[1], right ? "r" : "w", 1) == 1)
            pause();
        _exit(0);
    }
    close(said[1]);
    if (read(said[0], &child.said, 1) < 0)
        child.said = 'w';
    close(said[0]);
}

static void end_child(const char *what)
{
    if (!child.pid && !child.said)
        return;
    int status = 0;
    if (child.pid) {
        kill(child.pid, SIGKILL);
        assert_int_equal(waitpid(child.pid, &status, 0), child.pid);
    }
    char word = child.said;
    child.pid = 0;
    child.said = 0;
    if (word == 'w')
        fail_msg("%s: the child read other bytes", what);
    if (word == 0)
        fail_msg("%s: the child ended with status %#x", what, status);
}

static const struct change {
    const char *name;
    void (*apply)(void);
} changes[] = {
    {"MADV_DONTNEED", drop},
    {"MADV_DONTNEED and a write", drop_and_write},
    {"munmap and mmap", map_again},
    {"munmap, mmap and a write", map_again_and_write},
    {"mremap", move},
    {"mremap, mmap and a write", move_and_map},
    {"mremap and back", move_and_back},
    {"a touch", touch_read},
    {"a touch that writes", touch_write},
    {"fork", fork_child},
};
#define CHANGES (sizeof(changes) / sizeof(*changes))

/* ---- one change at one point ---- */

enum direction { OUT, OUT_FAILING, HOME };

static void try_change(const char *point, const struct change *c, enum direction direction, uint64_t seed, bool device_first)
{
    char what[120];
    snprintf(what, sizeof(what), "%s at %s%s", c->name, point, direction == OUT_FAILING ? " of a failing migration" : "");
    fill_arena(seed);
    if (direction == HOME)
        to_device(arena, bytes(PAGES));
    arm_point(point, c->apply);
    int r = direction == HOME ? hmm_migrate_to_system(arena, bytes(PAGES), NULL)
                              : hmm_migrate_to_device(dev, arena, bytes(PAGES), NULL);
    disarm_point(what);
    if (direction != OUT_FAILING && r)
        fail_msg("%s: %d, %s", what, r, hmm_last_message());
    if (direction == OUT_FAILING)
        assert_true(r < 0);
    end_touch(what);
    end_child(what);
    assert_int_equal(hmm_audit(), 0);
    check_all(what, device_first && direction != OUT_FAILING);
    assert_int_equal(hmm_audit(), 0);
    munmap(arena, LIVE_BLOCK);
    munmap(away, LIVE_BLOCK);
    assert_ptr_equal(mmap(arena, LIVE_BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0), arena);
    assert_ptr_equal(mmap(away, LIVE_BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0), away);
}

static void try_all(const char *const *points, enum direction direction)
{
    uint64_t seed = 1;
    for (; *points; points++)
        for (unsigned i = 0; i < CHANGES; i++)
            for (int device_first = 0; device_first < 2; device_first++)
                try_change(*points, &changes[i], direction, seed++, device_first);
}

static void changes_on_the_way_to_the_device(void **state)
{
    static const char *const points[] = {"to-device-take", "to-device-taken", "to-device-copied", "to-device-published", NULL};
    (void)state;
    open_device();
    try_all(points, OUT);
    close_device();
}

static void changes_on_the_way_home(void **state)
{
    static const char *const points[] = {"to-system-departed", "to-system-quiet", NULL};
    (void)state;
    open_device();
    try_all(points, HOME);
    close_device();
}

static void changes_while_a_migration_is_rolled_back(void **state)
{
    static const char *const points[] = {"to-device-take", "to-device-taken", NULL};
    struct inject_config c = {.seed = 1, .permille[INJECT_DRIVER] = 1000};
    (void)state;
    inject_start(&c);
    open_device();
    try_all(points, OUT_FAILING);
    close_device();
    inject_stop();
}

/* ---- between two system calls ---- */

/* A zero page of the program is written after it was scanned and before it is moved. */
static char *zero_page;

static int64_t write_then_move(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    if (zero_page && src <= (uintptr_t)zero_page && (uintptr_t)zero_page < src + len) {
        *(volatile char *)zero_page = 55;
        zero_page = NULL;
    }
    return os_linux.uffd_move(uffd, dst, src, len);
}

static void a_zero_page_that_is_written_before_the_move_keeps_the_write(void **state)
{
    (void)state;
    hooked.uffd_move = write_then_move;
    open_device();
    fill_arena(1);
    zero_page = arena + bytes(2) + 9;
    to_device(arena, bytes(PAGES));
    assert_null(zero_page); /* else nothing was tried */
    oracle[bytes(2) + 9] = 55;
    check_all("a write before the move", true);
    close_device();
}

/* The mapping shrinks after it was looked at and before it is registered. */
static bool shrink;

static int shrink_then_register(int uffd, uintptr_t start, size_t len)
{
    if (shrink && start == (uintptr_t)arena) {
        shrink = false;
        munmap(arena + bytes(FIRST), bytes(LAST - FIRST));
    }
    return os_linux.uffd_register(uffd, start, len);
}

static void a_mapping_that_changes_before_it_is_registered_is_looked_at_again(void **state)
{
    (void)state;
    hooked.uffd_register = shrink_then_register;
    open_device();
    fill_arena(1);
    shrink = true;
    struct hmm_migrate_result res = to_device(arena, bytes(PAGES));
    assert_false(shrink);
    assert_int_equal(res.unmapped, LAST - FIRST);
    live_map(arena + bytes(FIRST), bytes(LAST - FIRST));
    live_fill(arena + bytes(FIRST), bytes(LAST - FIRST), 5);
    live_fill(oracle + bytes(FIRST), bytes(LAST - FIRST), 5);
    assert_int_equal(hmm_audit(), 0);
    check_all("a mapping in the hole", true);
    close_device();
}

/* Two threads' events arrive in the other order: the remap before the unmap of what stood at its target. */
static void an_unmap_that_a_remap_has_overtaken_is_of_the_old_mapping(void **state)
{
    (void)state;
    hooked.uffd_read = read_held;
    open_device();
    fill_arena(1);
    assert_true(live_map(away, bytes(PAGES)));
    live_fill(away, bytes(PAGES), 3);
    to_device(arena, bytes(PAGES));
    to_device(away, bytes(PAGES));
    hold_unmap_of(away + bytes(FIRST));
    munmap(away + bytes(FIRST), bytes(LAST - FIRST));
    move();
    expect_holding(3);
    assert_int_equal(hmm_audit(), 0);
    check_all("after an overtaken unmap", true);
    close_device();
    holding = 0;
}

/* The same of a range of which only the beginning was registered: it is told as a whole. */
static void an_overtaken_unmap_of_more_than_is_registered(void **state)
{
    (void)state;
    hooked.uffd_read = read_held;
    open_device();
    fill_arena(1);
    assert_true(live_map(away, bytes(FIRST)));
    live_fill(away, bytes(FIRST), 3);
    to_device(arena, bytes(PAGES));
    to_device(away, bytes(FIRST));
    hold_unmap_of(away);
    munmap(away, bytes(PAGES));
    assert_ptr_equal(mremap(arena, bytes(PAGES), bytes(PAGES), MREMAP_MAYMOVE | MREMAP_FIXED, away), away);
    expect_holding(3);
    assert_int_equal(hmm_audit(), 0);
    check_part("after an overtaken unmap of more", away, oracle, bytes(PAGES), true);
    munmap(away + bytes(LAST), bytes(PAGES - LAST)); /* and this is its own */
    assert_true(live_map(away + bytes(LAST), bytes(PAGES - LAST)));
    memset(oracle + bytes(LAST), 0, bytes(PAGES - LAST));
    check_part("after an unmap in order", away, oracle, bytes(PAGES), true);
    close_device();
    holding = 0;
}

/* A remap that is not read yet has left, and another mapping stands at its place: what looks absent there must not be taken. */
static pthread_t mover;
static uint32_t moving; /* 1: move at the next look; 2: it has been done */

static void *move_main(void *arg)
{
    (void)arg;
    mremap(arena, bytes(PAGES), bytes(PAGES), MREMAP_MAYMOVE | MREMAP_FIXED, away);
    return NULL;
}

/* Called with the reader kept off: the event stays unread until the caller's hold of the lock ends. */
static int move_then_query(int fd, uintptr_t addr, struct os_vma *out)
{
    if (moving == 1 && addr == (uintptr_t)arena) {
        moving = 2;
        pthread_create(&mover, NULL, move_main, NULL);
        while (mmap(arena, bytes(PAGES), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) !=
               arena)
            usleep(100);
    }
    return os_linux.vma_query(fd, addr, out);
}

/* At this point the survey is over: the next look is the one under the lock that takes. */
static void move_at_next_query(void)
{
    moving = 1;
}

static void absent_pages_are_not_taken_while_an_event_is_pending(void **state)
{
    (void)state;
    hooked.vma_query = move_then_query;
    open_device();
    fill_arena(1);
    to_device(arena, bytes(PAGES)); /* armed; then all but one page comes home */
    assert_int_equal(hmm_migrate_to_system(arena, bytes(PAGES - 1), NULL), 0);
    arm_point("to-device-take", move_at_next_query);
    hmm_migrate_to_device(dev, arena, bytes(PAGES - 1), NULL);
    disarm_point("the take");
    assert_int_equal(moving, 2);
    pthread_join(mover, NULL);
    assert_int_equal(hmm_audit(), 0);
    check_part("after a remap", away, oracle, bytes(PAGES), true);
    memset(oracle, 0, bytes(PAGES));
    check_part("the new mapping", arena, oracle, bytes(PAGES), true);
    close_device();
    moving = 0;
}

/* A REMOVE is read: its caller will drop the pages only later, or, if it was MADV_FREE, leave them. */
static void pages_are_not_taken_before_they_are_dropped(void **state)
{
    (void)state;
    const size_t at = bytes(FIRST), len = bytes(LAST - FIRST);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    hooked.uffd_read = read_and_remove;
    open_device();
    fill_arena(1);
    to_device(arena, bytes(PAGES));
    assert_int_equal(hmm_migrate_to_system(arena + at, len, NULL), 0);
    assert_true(page_present(arena + at));
    expect_remove(arena + at, len);
    assert_int_equal(*(volatile uint8_t *)arena, oracle[0]); /* a fault, for the reader to read */
    assert_int_equal(__atomic_load_n(&fake_remove.start, __ATOMIC_SEQ_CST),
                     0); /* events are applied before faults are served */
    assert_int_equal(hmm_migrate_to_device(dev, arena + at, len, &res), 0);
    assert_int_equal(res.moved, 0);
    assert_int_equal(res.busy, LAST - FIRST);
    madvise(arena + at, len, MADV_DONTNEED);
    memset(oracle + at, 0, len);
    check_part("after the drop", arena + at, oracle + at, len, true);
    assert_int_equal(hmm_migrate_to_device(dev, arena + at, len, &res), 0); /* touched since: they may go */
    assert_int_equal(res.moved, LAST - FIRST);
    check_all("at the end", true);
    close_device();
}

/* All but the last page, which is on the device, so that the mapping is registered. */
static void *free_lazily(void *arg)
{
    (void)arg;
    madvise(arena, bytes(PAGES - 1), MADV_FREE);
    return NULL;
}

/* Whoever called MADV_FREE goes on as soon as the event is read, and writes. */
static void write_freed_pages(void)
{
    live_fill(arena, bytes(PAGES - 1), 77);
}

static void what_is_written_after_a_lazy_free_stays(void **state)
{
    (void)state;
    pthread_t freer;
    open_device();
    fill_arena(1);
    live_fill(arena, bytes(PAGES), 76); /* every page is there */
    memcpy(oracle, arena, bytes(PAGES));
    to_device(arena + bytes(PAGES - 1), page);
    for (unsigned i = 0; i < PAGES - 1; i++)
        assert_true(page_present(arena + bytes(i)));
    arm_point("events-read", write_freed_pages);
    pthread_create(&freer, NULL, free_lazily, NULL);
    pthread_join(freer, NULL);
    while (!__atomic_load_n(&point_hits,
                            __ATOMIC_SEQ_CST)) /* it goes on as soon as its event is read, which is before the point */
        usleep(100);
    disarm_point("the free");
    live_fill(oracle, bytes(PAGES - 1), 77);
    check_part("freed and written", arena, oracle, bytes(PAGES), true);
    close_device();
}

/* ---- the device ---- */

/* A page goes home, and changes, after the device asked where it is and before it believes the answer. */
static void bring_home_and_write(void)
{
    hmm_migrate_to_system(arena, page, NULL);
    live_fill(arena, page, 91);
}

static void the_device_asks_again_when_the_answer_is_old(void **state)
{
    (void)state;
    open_device();
    fill_arena(1);
    to_device(arena, bytes(PAGES));
    arm_point("snapshot-taken", bring_home_and_write);
    uint32_t found = device_crc(arena, page);
    disarm_point("the snapshot");
    live_fill(oracle, page, 91);
    assert_int_equal(found, crc_oracle(oracle, page));
    check_all("after a stale answer", true);
    close_device();
}

/* A kernel holds a page for writing while the page is called home: the copy waits for what it writes. */
static volatile uint32_t span_held, span_go;

static uint64_t hold_and_write(hmm_accessor *acc, void *arg)
{
    size_t len = page;
    char *span = hmm_span_write(acc, *(char **)arg, &len);
    span_held = 1;
    while (!span_go)
        ;
    for (uint64_t until = os_now() + 30000000; os_now() < until;) /* time enough for a copy that does not wait */
        ;
    span[5] = 99;
    return 0;
}

static void let_span_go(void)
{
    span_go = 1;
}

static void a_page_that_the_device_writes_is_waited_for(void **state)
{
    struct hmm_launch launch = {.size = sizeof(launch), .kernel = hold_and_write, .arg = &arena, .arg_size = sizeof(arena)};
    hmm_fence *fence;
    (void)state;
    open_device();
    fill_arena(1);
    span_held = span_go = 0;
    assert_int_equal(hmm_job_launch(dev, &launch, &fence), 0);
    while (!span_held)
        usleep(100);
    arm_point("to-system-departed", let_span_go);
    assert_int_equal(hmm_migrate_to_system(arena, page, NULL), 0);
    disarm_point("the way home");
    oracle[5] = 99;
    check_all("after a span", false);
    assert_int_equal(hmm_fence_wait(fence, -1), 0);
    hmm_fence_put(fence);
    close_device();
}

/* ---- pins, fork ---- */

static void a_pinned_device_page_stays(void **state)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    struct pagemap *pm;
    uint64_t at = UINT64_MAX;
    (void)state;
    open_device();
    fill_arena(1);
    to_device(arena, bytes(PAGES));
    pm = hmm_device_of(dev)->pagemap;
    for (uint64_t i = 0; i < pm->desc.pages; i++)
        if (page_owner(&pm->pages[i]) == (uintptr_t)arena)
            at = i;
    assert_true(at != UINT64_MAX);
    assert_int_equal(pagemap_pin(pm, at), 0);
    assert_int_equal(hmm_migrate_to_system(arena, bytes(PAGES), &res), 0);
    assert_int_equal(res.pinned, 1);
    assert_int_equal(res.moved, PAGES - 1);
    assert_false(page_present(arena));
    pagemap_unpin(pm, at);
    check_all("after the pin", false);
    close_device();
}

static uint64_t used_bytes(void)
{
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    return info.used_bytes;
}

/* A fault is over a moment before its device pages are free. */
static void expect_used(uint64_t n)
{
    for (int i = 0; i < 10000 && used_bytes() != n; i++)
        os_sleep(1000000);
    assert_int_equal(used_bytes(), n);
}

static int ignore(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    (void)event;
    return 0;
}

static const struct hmm_notifier_ops nothing_to_do = {.invalidate = ignore};

/* A driver's reference keeps the device page, but not the address: that may come home, or be unmapped. */
static void a_device_page_with_a_reference_is_not_freed(void **state)
{
    struct pagemap *pm;
    uint64_t pfn = 0;
    (void)state;
    open_device();
    fill_arena(1);
    to_device(arena, bytes(PAGES));
    pm = hmm_device_of(dev)->pagemap;
    struct hmm_notifier n;
    assert_int_equal(hmm_notifier_insert(pm->dev, &n, (uintptr_t)arena, (uintptr_t)arena + page, &nothing_to_do), 0);
    struct hmm_fault_range range = {
        .size = sizeof(range),
        .flags = HMM_RANGE_DEVICE_ONLY,
        .notifier = &n,
        .notifier_seq = hmm_notifier_read_begin(&n),
        .start = (uintptr_t)arena,
        .end = (uintptr_t)arena + page,
        .pfns = &pfn,
    };
    assert_int_equal(hmm_range_fault(pm->dev, &range), 0);
    assert_int_equal(hmm_notifier_remove(&n), 0);
    assert_true(pfn & HMM_PFN_VALID);
    hmm_page_get(pm->dev, pfn & HMM_PFN_MASK, 1);
    check_all("with a reference", false);
    expect_used(page);
    assert_int_equal(pm->pages[pfn & HMM_PFN_MASK].refs, 1);
    assert_int_equal(hmm_audit(), 0);
    hmm_page_put(pm->dev, pfn & HMM_PFN_MASK, 1);
    expect_used(0);
    assert_int_equal(errors_logged, 0);
    hmm_page_get(pm->dev, pm->desc.pages - 1, 2); /* named, and not followed */
    hmm_page_put(pm->dev, UINT64_MAX, 1);
    expect_used(0);
    assert_int_equal(errors_logged, 2);
    errors_logged = 0;
    close_device();
}

/* Nobody sees a raw clone(): where the kernel does not tell of it, the child may crash on managed memory, but never reads zeros. */
static void a_child_that_no_handler_sees_does_not_read_zeros(void **state)
{
    (void)state;
    open_device();
    fill_arena(1);
    to_device(arena, bytes(PAGES));
    pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) {
        signal(SIGSEGV, SIG_DFL);
        alarm(10);
        _exit(memcmp(arena, oracle, page) ? 1 : 0);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (by_handlers)
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    else
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    check_all("after fork", true);
    close_device();
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(changes_on_the_way_to_the_device),
        TEST(changes_on_the_way_home),
        TEST(changes_while_a_migration_is_rolled_back),
        TEST(a_zero_page_that_is_written_before_the_move_keeps_the_write),
        TEST(a_mapping_that_changes_before_it_is_registered_is_looked_at_again),
        TEST(an_unmap_that_a_remap_has_overtaken_is_of_the_old_mapping),
        TEST(an_overtaken_unmap_of_more_than_is_registered),
        TEST(absent_pages_are_not_taken_while_an_event_is_pending),
        TEST(pages_are_not_taken_before_they_are_dropped),
        TEST(what_is_written_after_a_lazy_free_stays),
        TEST(the_device_asks_again_when_the_answer_is_old),
        TEST(a_page_that_the_device_writes_is_waited_for),
        TEST(a_pinned_device_page_stays),
        TEST(a_device_page_with_a_reference_is_not_freed),
        TEST(a_child_that_no_handler_sees_does_not_read_zeros),
    };
    return cmocka_run_group_tests_name("protocol", tests, NULL, NULL);
}
