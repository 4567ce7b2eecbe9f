/* SPDX-License-Identifier: MIT */
/*
 * The page table of a mirror: what its entries say, against what the kernel, the range query and the bytes in device memory say; its
 * bits, its bound, and what a change of the address space does to it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "debug/inject.h"
#include "eye.h"

#define DIRS 4u
#define PAGES (LIVE_BLOCK / page)
#define SECONDS_MAX 50 /* a hang is a failure */

static size_t page;
static char *arena; /* DIRS blocks */
static uint8_t *oracle;
static hmm_dev dev;
static struct eye eye;
static unsigned errors_logged;
static char last_error[512];

static void count_errors(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level == HMM_LOG_ERROR) {
        errors_logged++;
        strncpy(last_error, line, sizeof(last_error) - 1);
    }
}

static int set_up(void **state)
{
    (void)state;
    page = hmm_page_size();
    errors_logged = 0;
    alarm(SECONDS_MAX);
    hmm_set_log(count_errors, NULL);
    arena = live_reserve((DIRS + 2) * LIVE_BLOCK) + LIVE_BLOCK; /* nobody's stack is a neighbour, and part of the mapping */
    oracle = mmap(NULL, DIRS * LIVE_BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(live_map(arena, DIRS * LIVE_BLOCK));
    for (size_t i = 0; i < DIRS * LIVE_BLOCK; i += sizeof(uint64_t)) {
        uint64_t word = random_mix(i);
        memcpy(oracle + i, &word, sizeof(word));
    }
    memcpy(arena, oracle, DIRS * LIVE_BLOCK);
    assert_int_equal(hmm_device_open("soft:memory=16M,engines=1", &dev), 0);
    eye_init(&eye, dev);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    unsigned errors = errors_logged;
    if (eye.m && !eye.freed)
        hmm_mirror_unregister(eye.m);
    eye.m = NULL;
    int r = hmm_audit() || hmm_device_close(dev);
    hmm_set_log(NULL, NULL);
    munmap(arena, DIRS * LIVE_BLOCK);
    munmap(oracle, DIRS * LIVE_BLOCK);
    alarm(0);
    return r || errors ? -1 : 0;
}

static void open_eye(uint32_t flags, uint32_t directories)
{
    eye.flags = flags;
    eye.directories = directories;
    int r = eye_open(&eye);
    if (r)
        fail_msg("registering: %d, %s", r, hmm_last_message());
}

static uintptr_t at(size_t i)
{
    return (uintptr_t)arena + i * page;
}

static void to_device(size_t first, size_t n)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    int r = hmm_migrate_to_device(dev, (void *)at(first), n * page, &res);
    if (r || res.moved != n)
        fail_msg("to the device: %d, %llu of %zu pages", r, (unsigned long long)res.moved, n);
}

/* Whether a run may be used, once what the program did has reached the sequence numbers. */
static bool current(const struct hmm_mirror_run *run)
{
    hmm_event_sync(eye.dev);
    return eye_current(run);
}

/* The table learns of pages when somebody asks for one of their directory. */
static void look_at(size_t i)
{
    char byte;
    assert_int_equal(eye_access(&eye, at(i), &byte, 1, false, NULL), 0);
}

static struct hmm_mirror_info info(void)
{
    struct hmm_mirror_info x;
    assert_int_equal(hmm_mirror_info(eye.m, &x), 0);
    return x;
}

/* Until it has reached the sequence numbers. */
static void drop(size_t first, size_t n)
{
    assert_int_equal(madvise((void *)at(first), n * page, MADV_DONTNEED), 0);
    memset(oracle + first * page, 0, n * page);
    hmm_event_sync(eye.dev);
}

/* ---- entries ----------------------------------------------------------------------------------------------------------- */

struct seen {
    uint8_t bits[4 * 512]; /* what a walk said of each page: 1 valid, 2 write, 4 dirty, 8 select */
    size_t runs, pages;
    uintptr_t last_end;
};

static int see(const struct hmm_mirror_run *run, void *arg)
{
    struct seen *s = arg;
    assert_true(run->start >= s->last_end && run->start < run->end);
    assert_int_equal(run->start / HMM_MIRROR_DIR, (run->end - 1) / HMM_MIRROR_DIR);
    for (uintptr_t a = run->start; a < run->end; a += page) {
        size_t i = (a - (uintptr_t)arena) / page;
        s->bits[i] = (run->flags & HMM_MIRROR_VALID ? 1 : 0) + (run->flags & HMM_MIRROR_WRITE ? 2 : 0) +
                     (run->flags & HMM_MIRROR_DIRTY ? 4 : 0) + (run->flags & HMM_MIRROR_SELECT ? 8 : 0);
        /* Where it says that the page is, its bytes are. */
        if (run->flags & HMM_MIRROR_VALID && eye_current(run))
            assert_memory_equal(eye_at(&eye, run, a), oracle + i * page, page);
        s->pages++;
    }
    s->runs++;
    s->last_end = run->end;
    return 0;
}

static struct seen walk(uint64_t bits)
{
    struct seen s = {.runs = 0};
    assert_int_equal(hmm_mirror_walk(eye.m, at(0), at(DIRS * PAGES), bits, see, &s), 0);
    return s;
}

static size_t on_device(size_t first, size_t n, uint8_t *which)
{
    struct hmm_page_info *pages = calloc(n + 1, sizeof(*pages));
    size_t count = 0;
    assert_int_equal(hmm_range_query((void *)at(first), n * page, pages, n + 1), n);
    for (size_t i = 0; i < n; i++)
        count += which[i] = pages[i].state == HMM_PAGE_DEVICE;
    free(pages);
    return count;
}

static void entries_say_what_the_range_query_says(void **state)
{
    (void)state;
    static uint8_t which[4 * 512];
    open_eye(0, 0);
    to_device(3, 5);
    to_device(10, 1);
    to_device(PAGES - 2, 6); /* across two directories */
    look_at(3);
    look_at(PAGES);
    eye_touch(arena + 5 * page); /* and one comes home, perhaps with its neighbours */
    look_at(PAGES - 1);
    size_t n = on_device(0, DIRS * PAGES, which);
    assert_true(n > 0 && n < 12);
    struct seen s = walk(0);
    assert_int_equal(s.pages, n);
    for (size_t i = 0; i < DIRS * PAGES; i++)
        assert_int_equal(s.bits[i], which[i] ? 3 : 0);
    assert_int_equal(info().valid, n);
}

static void a_run_is_pages_that_lie_together(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    open_eye(0, 0);
    to_device(8, 16);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(9), HMM_FAULT_READ, &run), -ENOENT);
    assert_int_equal(eye_resolve(&eye, at(9) + 7, HMM_FAULT_READ, &run), 0);
    assert_true(run.start <= at(9) && run.end > at(9) && run.start >= at(8) && run.end <= at(24));
    assert_int_equal(run.flags, HMM_MIRROR_VALID | HMM_MIRROR_WRITE | HMM_MIRROR_DEVICE);
    assert_memory_equal(eye_at(&eye, &run, run.start), oracle + (run.start - at(0)), run.end - run.start);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(9), HMM_FAULT_WRITE, &run), 0);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(8) - 1, HMM_FAULT_READ, &run), -ENOENT);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(PAGES), HMM_FAULT_READ, &run), -ENOENT);
}

static void what_cannot_be_translated_says_why(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    open_eye(0, 0);
    assert_int_equal(munmap((void *)at(4), page), 0);
    assert_int_equal(eye_resolve(&eye, at(4), HMM_FAULT_READ, &run), -EFAULT);
    assert_int_equal(mprotect((void *)at(6), page, PROT_READ), 0);
    assert_int_equal(eye_resolve(&eye, at(6), HMM_FAULT_WRITE, &run), -EACCES);
    assert_int_equal(eye_resolve(&eye, (uintptr_t)oracle, HMM_FAULT_WRITE, &run), 1); /* shared: it stays */
    assert_int_equal(eye_resolve(&eye, UINTPTR_MAX - 5, HMM_FAULT_READ, &run), 1);    /* no directory can be there */
}

/* The directory that is invalidated is stale as a whole at once; the part that did not change is found again. */
static void a_change_makes_runs_stale(void **state)
{
    (void)state;
    struct hmm_mirror_run before, other, after;
    open_eye(0, 0);
    to_device(0, 8);
    to_device(PAGES, 8);
    assert_int_equal(eye_resolve(&eye, at(0), HMM_FAULT_READ, &before), 0);
    assert_int_equal(eye_resolve(&eye, at(PAGES), HMM_FAULT_READ, &other), 0);
    assert_int_equal(madvise((void *)at(4), page, MADV_DONTNEED), 0);
    assert_false(current(&before));
    assert_true(current(&other));
    assert_int_equal(hmm_mirror_lookup(eye.m, at(0), HMM_FAULT_READ, &after), -ENOENT);
    assert_int_equal(eye_resolve(&eye, at(0), HMM_FAULT_READ, &after), 0);
    assert_true(after.start == at(0) && after.end <= at(4));
    memset(oracle + 4 * page, 0, page);
    uint8_t byte = 1;
    assert_int_equal(eye_access(&eye, at(4), &byte, 1, false, NULL), 0);
    assert_int_equal(byte, 0);
    walk(0); /* compares bytes */
}

static void an_event_tells_the_part_of_the_directory(void **state)
{
    (void)state;
    open_eye(0, 0);
    to_device(PAGES - 4, 8);
    look_at(PAGES - 1);
    look_at(PAGES);
    uint32_t before = eye.invalidated;
    assert_int_equal(madvise((void *)at(PAGES - 2), 4 * page, MADV_DONTNEED), 0);
    memset(oracle + (PAGES - 2) * page, 0, 4 * page);
    look_at(PAGES + 2); /* waits for the end */
    assert_int_equal(eye.invalidated, before + 2);
    assert_int_equal(eye.last.type, HMM_EVENT_CLEAR);
    assert_int_equal(eye.last_start, at(PAGES));
    assert_int_equal(eye.last_end, at(PAGES + 2));
}

static void a_callback_that_fails_is_named_and_taken_as_done(void **state)
{
    (void)state;
    open_eye(0, 0);
    to_device(0, 4);
    look_at(0);
    eye.wrong = -EIO;
    eye_touch(arena + 0);
    eye.wrong = 0;
    for (int i = 0; i < 1000 && !errors_logged; i++)
        os_sleep(1000000);
    assert_int_equal(errors_logged, 1);
    assert_non_null(strstr(last_error, "eye"));
    assert_non_null(strstr(last_error, "-5"));
    errors_logged = 0;
    walk(0);
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
    assert_int_equal(eye.released, 1);
    assert_int_equal(eye.freed, 1);
}

/* ---- the answer that is old ------------------------------------------------------------------------------------------------ */

static unsigned snapshots;

/* Page 2 of the directory is dropped, and the mirror told, when it has been asked where it is, before the answer is written down. */
static void drop_at_snapshot(const char *point)
{
    if (strcmp(point, "snapshot-taken") || ++snapshots > 1)
        return;
    uint32_t before = __atomic_load_n(&eye.invalidated, __ATOMIC_SEQ_CST);
    madvise((void *)at(2), page, MADV_DONTNEED);
    for (int i = 0; i < 5000 && __atomic_load_n(&eye.invalidated, __ATOMIC_SEQ_CST) == before; i++)
        os_sleep(1000000);
}

static void an_answer_that_is_old_is_not_written_down(void **state)
{
    (void)state;
    uint8_t byte = 1;
    open_eye(0, 0);
    to_device(0, 8);
    snapshots = 0;
    inject_point_hook = drop_at_snapshot;
    inject_points_on = 1;
    look_at(0);
    inject_points_on = 0;
    inject_point_hook = NULL;
    assert_true(snapshots >= 2);
    memset(oracle + 2 * page, 0, page);
    assert_int_equal(walk(0).bits[2] & 1, 0);
    assert_int_equal(eye_access(&eye, at(2), &byte, 1, false, NULL), 0);
    assert_int_equal(byte, 0);
}

/* ---- bits ---------------------------------------------------------------------------------------------------------------- */

static void marks_stand_until_they_are_cleared(void **state)
{
    (void)state;
    open_eye(0, 0);
    to_device(0, 16);
    look_at(0);
    assert_int_equal(hmm_mirror_mark(eye.m, at(0), at(40), HMM_MIRROR_SELECT, 0), 0);
    assert_int_equal(hmm_mirror_mark(eye.m, at(4), at(6), HMM_MIRROR_DIRTY, HMM_MIRROR_SELECT), 0);
    struct seen s = walk(HMM_MIRROR_SELECT);
    assert_int_equal(s.pages, 14); /* only what is there can be selected */
    assert_int_equal(s.bits[3], 11);
    assert_int_equal(s.bits[4], 0);
    s = walk(HMM_MIRROR_DIRTY);
    assert_int_equal(s.pages, 2);
    assert_int_equal(s.bits[5], 7);
    assert_int_equal(info().selected, 14);
    assert_int_equal(info().dirty, 2);
    /* Another page changes: all is read anew, and the marks stay. */
    drop(12, 1);
    look_at(0);
    assert_int_equal(info().selected, 13);
    assert_int_equal(info().dirty, 2);
    /* They come home: what selected them is gone, that they were written is not. */
    assert_int_equal(hmm_migrate_to_system((void *)at(0), 16 * page, NULL), 0);
    assert_int_equal(info().selected, 0);
    assert_int_equal(info().dirty, 2);
    assert_int_equal(walk(0).pages, 0);
    /* And their content: that, too. */
    to_device(4, 2);
    look_at(4);
    drop(4, 1);
    look_at(5);
    assert_int_equal(info().dirty, 1);
}

static void tracked_runs_are_written_page_by_page(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    uint64_t dirty[DIRS * 512 / 64];
    open_eye(HMM_MIRROR_TRACK_DIRTY, 0);
    to_device(0, 16);
    assert_int_equal(eye_resolve(&eye, at(3), HMM_FAULT_READ, &run), 0);
    assert_int_equal(run.flags & HMM_MIRROR_WRITE, 0);
    assert_true(run.end - run.start > page);
    assert_int_equal(eye_resolve(&eye, at(3), HMM_FAULT_WRITE, &run), 0);
    assert_true(run.start == at(3) && run.end == at(4) && run.flags & HMM_MIRROR_WRITE);
    assert_int_equal(eye_resolve(&eye, at(4), HMM_FAULT_WRITE, &run), 0);
    assert_true(run.start == at(3) && run.end == at(5)); /* both may be written: it was noted of both */
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(DIRS * PAGES), dirty), 2);
    assert_int_equal(dirty[0], 3 << 3);
    assert_int_equal(eye.last.type, HMM_EVENT_SOFT_DIRTY);
    assert_true(eye.last.start == at(0) && eye.last.end == at(PAGES)); /* of the directory that has them, no more */
    assert_false(current(&run));                                       /* the device has to ask again */
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(DIRS * PAGES), dirty), 0);
    assert_int_equal(eye_resolve(&eye, at(5), HMM_FAULT_WRITE, &run), 0);
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(2), at(7), dirty), 1);
    assert_int_equal(dirty[0], 1 << 3);
    assert_int_equal(eye.last.type, HMM_EVENT_SOFT_DIRTY);
    assert_true(eye.last.start == at(2) && eye.last.end == at(7));
    assert_true(eye.last_start == at(2) && eye.last_end == at(7));
    assert_int_equal(eye_resolve(&eye, at(4), HMM_FAULT_READ, &run), 0);
    assert_int_equal(run.flags & HMM_MIRROR_WRITE, 0);
}

/* ---- what is handed out, and marked, while the mirror has its device let go ------------------------------------------------- */

static struct hmm_mirror_run taken;
static void (*step)(void);

static void at_collect(const char *point)
{
    if (strcmp(point, "mirror-collect") || !step)
        return;
    void (*once)(void) = step;
    step = NULL;
    once();
}

static int64_t collect_with(void (*what)(void), size_t n, uint64_t *dirty)
{
    step = what;
    inject_point_hook = at_collect;
    inject_points_on = 1;
    int64_t got = hmm_mirror_collect_dirty(eye.m, at(0), at(n), dirty);
    inject_points_on = 0;
    inject_point_hook = NULL;
    assert_null(step);
    return got;
}

static void take_for_writing(void)
{
    assert_int_equal(eye_resolve(&eye, at(3), HMM_FAULT_WRITE, &taken), 0);
}

/* Of a directory with nothing dirty: the device is not asked, and goes on writing through what it gets just then. */
static void what_is_handed_out_meanwhile_is_collected_later(void **state)
{
    (void)state;
    uint64_t dirty[1];
    open_eye(HMM_MIRROR_TRACK_DIRTY, 0);
    to_device(0, 16);
    look_at(0);
    assert_int_equal(collect_with(take_for_writing, 64, dirty), 0);
    assert_true(current(&taken));
    eye_at(&eye, &taken, at(3))[0]++;
    oracle[3 * page]++;
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(64), dirty), 1);
    assert_int_equal(dirty[0], 1 << 3);
    assert_false(current(&taken));
}

static void mark_what_was_written(struct eye *e, const struct hmm_mirror_change *c)
{
    if (c->event->type == HMM_EVENT_SOFT_DIRTY)
        assert_int_equal(hmm_mirror_mark(e->m, at(5), at(7), HMM_MIRROR_DIRTY, 0), 0);
}

static void what_is_marked_when_the_device_lets_go_is_collected(void **state)
{
    (void)state;
    uint64_t dirty[1];
    open_eye(0, 0);
    to_device(0, 16);
    look_at(0);
    eye.meanwhile = mark_what_was_written;
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(64), dirty), 2);
    assert_int_equal(dirty[0], 3 << 5);
    eye.meanwhile = NULL;
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(64), dirty), 0);
}

static int take_first(const struct hmm_mirror_run *run, void *arg)
{
    *(struct hmm_mirror_run *)arg = *run;
    return 1;
}

static void walk_meanwhile(struct eye *e, const struct hmm_mirror_change *c)
{
    (void)c;
    assert_int_equal(hmm_mirror_walk(e->m, at(0), at(16), 0, take_first, &taken), 1);
}

static void a_walk_hands_out_nothing_that_is_let_go_of(void **state)
{
    (void)state;
    uint64_t dirty[1];
    open_eye(0, 0);
    to_device(0, 16);
    look_at(0);
    eye.meanwhile = walk_meanwhile;
    assert_int_equal(hmm_mirror_discard(eye.m, at(0), at(16)), 0);
    eye.meanwhile = NULL;
    assert_false(current(&taken));
    look_at(0);
    eye.meanwhile = walk_meanwhile;
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(64), dirty), 0);
    eye.meanwhile = NULL;
    assert_false(current(&taken));
    assert_int_equal(hmm_mirror_walk(eye.m, at(0), at(16), 0, take_first, &taken), 1);
    assert_true(current(&taken));
}

static void a_walk_lets_write_what_was_noted(void **state)
{
    (void)state;
    struct hmm_mirror_dir *dir;
    uint64_t entries[16], seq;
    struct hmm_mirror_run run;
    open_eye(HMM_MIRROR_TRACK_DIRTY, 0);
    to_device(0, 16);
    assert_int_equal(eye_resolve(&eye, at(3), HMM_FAULT_WRITE, &run), 0);
    struct seen s = walk(0);
    assert_int_equal(hmm_mirror_dir_get(eye.m, at(0), &dir), 0);
    assert_int_equal(hmm_mirror_dir_read(dir, at(0), at(16), entries, &seq), 0);
    for (size_t i = 0; i < 16; i++) {
        assert_int_equal(s.bits[i], i == 3 ? 7 : 1);
        assert_int_equal(!!(entries[i] & HMM_MIRROR_WRITE), i == 3);
    }
    hmm_mirror_dir_put(dir);
}

static uint32_t reads, lets_go, has_let_go;

static void let_go_slowly(struct eye *e, const struct hmm_mirror_change *c)
{
    (void)e;
    (void)c;
    __atomic_store_n(&lets_go, 1, __ATOMIC_SEQ_CST);
    os_sleep(50000000);
    __atomic_store_n(&has_let_go, 1, __ATOMIC_SEQ_CST);
}

static void *discard_there(void *arg)
{
    (void)arg;
    hmm_mirror_discard(eye.m, at(0), at(8));
    return NULL;
}

static pthread_t discarder;

/* When it was read from core, before it is copied. */
static void discard_at_read(const char *point)
{
    if (strcmp(point, "mirror-read") || ++reads > 1)
        return;
    eye.meanwhile = let_go_slowly;
    pthread_create(&discarder, NULL, discard_there, NULL);
    for (int i = 0; i < 5000 && !__atomic_load_n(&lets_go, __ATOMIC_SEQ_CST); i++)
        os_sleep(1000000);
}

static void a_directory_is_not_read_while_it_is_let_go_of(void **state)
{
    (void)state;
    struct hmm_mirror_dir *dir;
    uint64_t entries[8], seq;
    open_eye(0, 0);
    to_device(0, 8);
    reads = lets_go = has_let_go = 0;
    assert_int_equal(hmm_mirror_dir_get(eye.m, at(0), &dir), 0);
    inject_point_hook = discard_at_read;
    inject_points_on = 1;
    assert_int_equal(hmm_mirror_dir_read(dir, at(0), at(8), entries, &seq), 0);
    assert_int_equal(__atomic_load_n(&has_let_go, __ATOMIC_SEQ_CST), 1);
    inject_points_on = 0;
    inject_point_hook = NULL;
    assert_int_equal(reads, 2);
    pthread_join(discarder, NULL);
    eye.meanwhile = NULL;
    hmm_mirror_dir_put(dir);
}

static void send_bitmap_away(void)
{
    to_device(20, 1);
}

/* What brings them home has this directory invalidated. */
static void answers_may_stand_in_memory_that_is_away(void **state)
{
    (void)state;
    uint64_t *dirty = (uint64_t *)at(20);
    struct hmm_mirror_run *run = (struct hmm_mirror_run *)at(21);
    open_eye(0, 0);
    to_device(0, 8);
    look_at(0);
    assert_int_equal(hmm_mirror_mark(eye.m, at(2), at(4), HMM_MIRROR_DIRTY, 0), 0);
    assert_int_equal(collect_with(send_bitmap_away, 64, dirty), 2);
    assert_int_equal(dirty[0], 3 << 2);
    look_at(0);
    to_device(21, 1);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, run), 0);
    assert_true(run->start <= at(1) && run->end > at(1));
    memcpy(oracle + 20 * page, (void *)at(20), 2 * page);
}

/* ---- against a set ------------------------------------------------------------------------------------------------------- */

/* Random reads and writes of the device, touches of the CPU, drops and collections of parts, against a set of pages. */
static void collections_match_a_set(void **state)
{
    (void)state;
    static uint8_t expected[4 * 512];
    static uint64_t dirty[4 * 512 / 64];
    uint64_t random = 7;
    memset(expected, 0, sizeof(expected));
    open_eye(HMM_MIRROR_TRACK_DIRTY, 0);
    struct hmm_mirror_run cached = {.start = 0};
    for (unsigned round = 0; round < 4000; round++) {
        random = random_mix(random + round);
        size_t i = random % (DIRS * PAGES), n = 1 + (random >> 20) % 8;
        uint64_t value = random;
        if (i + n > DIRS * PAGES)
            n = DIRS * PAGES - i;
        switch ((random >> 32) % 8) {
        case 0:
        case 1:
        case 2:
        case 3: /* the device writes */
            assert_int_equal(eye_access(&eye, at(i) + 8, &value, sizeof(value), true, &cached), 0);
            memcpy(oracle + i * page + 8, &value, sizeof(value));
            expected[i] = 1;
            break;
        case 4: /* the device reads */
            assert_int_equal(eye_access(&eye, at(i) + 8, &value, sizeof(value), false, &cached), 0);
            assert_memory_equal(&value, oracle + i * page + 8, sizeof(value));
            break;
        case 5: /* the CPU writes: none of the mirror's business */
            memcpy((void *)(at(i) + 16), &value, sizeof(value));
            memcpy(oracle + i * page + 16, &value, sizeof(value));
            break;
        case 6:
            if (random >> 60)
                break;
            assert_int_equal(madvise((void *)at(i), n * page, MADV_DONTNEED), 0);
            memset(oracle + i * page, 0, n * page);
            look_at(i); /* it has come through; events of absent pages reach nobody's table otherwise */
            memset(expected + i, 0, n);
            break;
        default: {
            n = (random >> 40) % 3 ? n * 16 : DIRS * PAGES;
            i = n == DIRS * PAGES ? 0 : i;
            if (i + n > DIRS * PAGES)
                n = DIRS * PAGES - i;
            int64_t got = hmm_mirror_collect_dirty(eye.m, at(i), at(i + n), dirty), want = 0;
            for (size_t k = 0; k < n; k++) {
                want += expected[i + k];
                if ((dirty[k / 64] >> k % 64 & 1) != expected[i + k])
                    fail_msg("round %u: page %zu is%s dirty", round, i + k, expected[i + k] ? " not" : "");
                expected[i + k] = 0;
            }
            assert_int_equal(got, want);
        }
        }
    }
    assert_memory_equal(arena, oracle, DIRS * LIVE_BLOCK);
}

/* ---- a copy that follows what writers do, as a checkpoint does ----------------------------------------------------------- */

#define WRITERS 3
#define FOLLOW_PAGES 64u

static uint32_t stop_writers, written;

static void *write_on(void *arg)
{
    uint64_t seed = (uintptr_t)arg, random = seed;
    struct hmm_mirror_run cached = {.start = 0};
    for (uint64_t n = 0; !__atomic_load_n(&stop_writers, __ATOMIC_RELAXED); n++) {
        random = random_mix(random + n);
        size_t i = random % FOLLOW_PAGES;
        uint64_t value = random;
        /* Words of its own, many on one page through one run. */
        for (unsigned k = 0; k < 4000; k++) {
            value++;
            if (eye_access(&eye, at(i) + 8 * (seed * 16 + k % 16), &value, sizeof(value), true, &cached))
                return (void *)1;
        }
        __atomic_fetch_add(&written, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void collect_into(uint8_t *copy)
{
    uint64_t dirty[FOLLOW_PAGES / 64];
    assert_true(hmm_mirror_collect_dirty(eye.m, at(0), at(FOLLOW_PAGES), dirty) >= 0);
    for (size_t i = 0; i < FOLLOW_PAGES; i++)
        if (dirty[i / 64] >> i % 64 & 1)
            assert_int_equal(eye_access(&eye, at(i), copy + i * page, page, false, NULL), 0);
}

static void a_copy_of_what_is_collected_misses_nothing(void **state)
{
    (void)state;
    pthread_t writers[WRITERS];
    void *failed;
    uint8_t *copy = malloc(FOLLOW_PAGES * page);
    memcpy(copy, oracle, FOLLOW_PAGES * page);
    open_eye(HMM_MIRROR_TRACK_DIRTY, 0);
    stop_writers = written = 0;
    for (uintptr_t i = 0; i < WRITERS; i++)
        assert_int_equal(pthread_create(&writers[i], NULL, write_on, (void *)i), 0);
    for (unsigned i = 0; i < 300 || __atomic_load_n(&written, __ATOMIC_RELAXED) < 300; i++) {
        collect_into(copy);
        if (i % 8 == 0)
            ((volatile char *)arena)[random_mix(i) % FOLLOW_PAGES * page + 4000] = 0; /* the CPU has it back */
    }
    __atomic_store_n(&stop_writers, 1, __ATOMIC_RELAXED);
    collect_into(copy); /* while they write for the last time, through runs that they have */
    for (unsigned i = 0; i < WRITERS; i++) {
        pthread_join(writers[i], &failed);
        assert_null(failed);
    }
    collect_into(copy);
    for (size_t i = 0; i < FOLLOW_PAGES; i++) { /* the CPU's byte is not of the mirror */
        copy[i * page + 4000] = 0;
        arena[i * page + 4000] = 0;
        if (memcmp(copy + i * page, (void *)at(i), page))
            fail_msg("a write to page %zu was not collected", i);
    }
    assert_true(eye.stale > 0);
    free(copy);
}

/* ---- discarding, and the bound ------------------------------------------------------------------------------------------- */

static void what_is_discarded_is_gone_and_nothing_else(void **state)
{
    (void)state;
    struct hmm_mirror_run part, whole, other, found;
    open_eye(0, 0);
    to_device(0, 16);
    to_device(PAGES, 8);
    to_device(2 * PAGES, 8);
    assert_int_equal(eye_resolve(&eye, at(0), HMM_FAULT_READ, &part), 0);
    assert_int_equal(eye_resolve(&eye, at(PAGES), HMM_FAULT_READ, &whole), 0);
    assert_int_equal(eye_resolve(&eye, at(2 * PAGES), HMM_FAULT_READ, &other), 0);
    assert_int_equal(info().directories, 3);
    uint32_t before = eye.invalidated;
    assert_int_equal(hmm_mirror_discard(eye.m, at(4), at(8)), 0);
    assert_int_equal(eye.invalidated, before + 1);
    assert_int_equal(eye.last_start, at(4));
    assert_int_equal(eye.last_end, at(8));
    assert_int_equal(*part.seq, part.seq_seen); /* nothing happened to the memory: */
    assert_false(current(&part));               /* the generation has moved */
    struct seen s = walk(0);
    for (size_t i = 0; i < 16; i++)
        assert_int_equal(s.bits[i], i >= 4 && i < 8 ? 0 : 3);
    assert_int_equal(hmm_mirror_discard(eye.m, at(PAGES), at(2 * PAGES)), 0);
    assert_int_equal(info().directories, 2);
    assert_false(current(&whole));
    assert_true(current(&other));
    /* The pages are where they were. */
    static uint8_t which[512];
    assert_int_equal(on_device(0, 16, which), 16);
    assert_int_equal(eye_resolve(&eye, at(5), HMM_FAULT_READ, &found), 0);
    assert_memory_equal(eye_at(&eye, &found, at(5)), oracle + 5 * page, page);
}

static void the_table_is_bounded(void **state)
{
    (void)state;
    struct hmm_mirror_run first, run;
    struct hmm_mirror_dir *kept[2], *none = NULL;
    open_eye(0, 2);
    for (unsigned round = 0; round < 3; round++)
        for (size_t d = 0; d < DIRS; d++) {
            if (round == 0)
                to_device(d * PAGES, 4);
            look_at(d * PAGES + 1);
            if (d == 0 && round == 0)
                assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &first), 0);
            assert_true(info().directories <= 2);
        }
    assert_false(current(&first));
    walk(0);
    /* Those that are dirty, used or kept are not given up. */
    assert_int_equal(hmm_mirror_discard(eye.m, at(0), at(DIRS * PAGES)), 0);
    assert_int_equal(info().directories, 0);
    assert_int_equal(hmm_mirror_dir_get(eye.m, at(0), &kept[0]), 0);
    assert_int_equal(hmm_mirror_mark(eye.m, at(PAGES), at(PAGES + 1), HMM_MIRROR_DIRTY, 0), 0);
    assert_int_equal(eye_resolve(&eye, at(2 * PAGES), HMM_FAULT_READ, &run), 1);
    assert_int_equal(hmm_mirror_dir_get(eye.m, at(2 * PAGES), &none), -ENOSPC);
    assert_null(none);
    assert_int_equal(hmm_mirror_mark(eye.m, at(2 * PAGES), at(2 * PAGES + 1), HMM_MIRROR_DIRTY, 0), -ENOSPC);
    hmm_mirror_dir_put(kept[0]);
    eye.answer = -EAGAIN; /* the device says that it uses something */
    assert_int_equal(hmm_mirror_dir_get(eye.m, at(2 * PAGES), &none), -ENOSPC);
    eye.answer = 0;
    assert_int_equal(hmm_mirror_dir_get(eye.m, at(2 * PAGES), &kept[1]), 0);
    hmm_mirror_dir_put(kept[1]);
    assert_int_equal(info().dirty, 1);
}

static void a_kept_directory_is_read_at_one_moment(void **state)
{
    (void)state;
    struct hmm_mirror_dir *dir;
    uint64_t entries[8], seq = 0;
    open_eye(0, 0);
    to_device(2, 4);
    assert_int_equal(hmm_mirror_dir_get(eye.m, at(5), &dir), 0);
    assert_int_equal(hmm_mirror_dir_read(dir, at(0), at(8), entries, &seq), 0);
    for (size_t i = 0; i < 8; i++) {
        assert_int_equal(!!(entries[i] & HMM_MIRROR_VALID), i >= 2 && i < 6);
        struct hmm_mirror_run run = {.start = at(i), .page = entries[i] & HMM_PFN_MASK, .flags = HMM_MIRROR_DEVICE};
        if (entries[i])
            assert_memory_equal(eye_at(&eye, &run, at(i)), oracle + i * page, page);
    }
    assert_int_equal(hmm_mirror_dir_seq(dir), seq);
    eye_touch(arena + 2 * page);
    assert_int_not_equal(hmm_mirror_dir_seq(dir), seq);
    assert_int_equal(hmm_mirror_dir_read(dir, at(0), at(PAGES + 1), entries, &seq), -EINVAL);
    assert_int_equal(hmm_mirror_dir_read(dir, at(8), at(4), entries, &seq), -EINVAL);
    hmm_mirror_dir_put(dir);
}

/* ---- DMA hooks ----------------------------------------------------------------------------------------------------------- */

#define BUS_OFFSET 0x40000000ull

static uint8_t mapped[4 * 512];
static unsigned maps, unmaps, wrong_maps;
static size_t refuse = SIZE_MAX;
static uint32_t invalidated_at_unmap;

static int map_page(void *priv, uintptr_t addr, uint64_t *entry)
{
    (void)priv;
    size_t i = (addr - (uintptr_t)arena) / page;
    if (i == refuse)
        return -ENOMEM;
    wrong_maps += mapped[i]++ != 0;
    maps++;
    *entry += BUS_OFFSET;
    return 0;
}

static void unmap_page(void *priv, uintptr_t addr, uint64_t entry)
{
    struct eye *e = priv;
    size_t i = (addr - (uintptr_t)arena) / page;
    wrong_maps += --mapped[i] != 0 || (entry & HMM_PFN_MASK) < BUS_OFFSET;
    unmaps++;
    invalidated_at_unmap = e->invalidated;
}

static void pages_are_mapped_for_the_bus_once(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    memset(mapped, 0, sizeof(mapped));
    maps = unmaps = wrong_maps = 0;
    refuse = 6;
    eye.ops.dma_map = map_page;
    eye.ops.dma_unmap = unmap_page;
    open_eye(0, 0);
    to_device(0, 8);
    assert_int_equal(eye_resolve(&eye, at(0), HMM_FAULT_READ, &run), 0);
    assert_true(run.page >= BUS_OFFSET && run.end <= at(6));
    run.page -= BUS_OFFSET;
    assert_memory_equal(eye_at(&eye, &run, at(0)), oracle, page);
    assert_int_equal(maps, 7);
    assert_int_equal(eye_resolve(&eye, at(6), HMM_FAULT_READ, &run), 1); /* refused: over the bus */
    refuse = SIZE_MAX;
    /* One page changes: the others keep what they have. */
    drop(1, 1);
    assert_int_equal(eye_resolve(&eye, at(0), HMM_FAULT_READ, &run), 0);
    assert_int_equal(unmaps, 1);
    assert_int_equal(maps, 8); /* that which had been refused */
    /* The device is asked first. */
    uint32_t before = eye.invalidated;
    assert_int_equal(hmm_migrate_to_system((void *)at(0), 8 * page, NULL), 0);
    assert_true(invalidated_at_unmap > before);
    assert_int_equal(unmaps, maps);
    to_device(PAGES, 8);
    assert_int_equal(eye_resolve(&eye, at(PAGES), HMM_FAULT_READ, &run), 0);
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
    assert_int_equal(unmaps, maps);
    assert_int_equal(wrong_maps, 0);
}

static unsigned device_pages;

static void unmap_and_count(void *priv, uintptr_t addr, uint64_t entry)
{
    device_pages += !!(entry & HMM_MIRROR_DEVICE);
    unmap_page(priv, addr, entry);
}

/* A page that comes to the mirror's own device is not invalidated: what it is called by stays in use. */
static void what_was_not_invalidated_stays_mapped(void **state)
{
    (void)state;
    struct hmm_mirror_run run, other;
    memset(mapped, 0, sizeof(mapped));
    maps = unmaps = wrong_maps = device_pages = 0;
    eye.ops.dma_map = map_page;
    eye.ops.dma_unmap = unmap_and_count;
    open_eye(HMM_MIRROR_SYSTEM, 0);
    to_device(8, 4);
    drop(20, 1);
    assert_int_equal(eye_resolve(&eye, at(2), HMM_FAULT_READ, &run), 0);
    to_device(2, 1);
    assert_true(current(&run));
    assert_int_equal(eye_resolve(&eye, at(20), HMM_FAULT_READ, &other), 0);
    assert_true(current(&run));
    assert_int_equal(unmaps, 0);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(2), HMM_FAULT_READ, &other), 0);
    assert_int_equal(other.page, run.page);
    /* Those of the device and the others are told apart when they are taken back. */
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
    assert_int_equal(unmaps, maps);
    assert_int_equal(device_pages, 4);
    assert_int_equal(wrong_maps, 0);
}

/* ---- several of them ----------------------------------------------------------------------------------------------------- */

static void several_mirrors_of_several_devices(void **state)
{
    (void)state;
    struct eye more[3]; /* another one of dev, and two of another device */
    struct hmm_mirror_run run;
    hmm_dev other;
    assert_int_equal(hmm_device_open("soft:memory=16M,engines=1", &other), 0);
    open_eye(0, 0);
    for (unsigned i = 0; i < 3; i++) {
        eye_init(&more[i], i == 0 ? dev : other);
        assert_int_equal(eye_open(&more[i]), 0);
    }
    to_device(0, 8);
    look_at(0);
    assert_int_equal(eye_resolve(&more[0], at(0), HMM_FAULT_READ, &run), 0);
    assert_int_equal(hmm_mirror_lookup(more[1].m, at(0), HMM_FAULT_READ, &run), -ENOENT);
    uint32_t dirty_asked = more[0].invalidated;
    uint64_t dirty[8];
    assert_int_equal(hmm_mirror_mark(eye.m, at(0), at(1), HMM_MIRROR_DIRTY, 0), 0);
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(8), dirty), 1);
    assert_int_equal(more[0].invalidated, dirty_asked); /* collecting is one mirror's own */
    assert_true(current(&run));
    /* To the other device: both mirrors of this one lose it, those of the other gain it. */
    assert_int_equal(eye_resolve(&more[1], at(0), HMM_FAULT_READ, &run), 0);
    assert_memory_equal(eye_at(&more[1], &run, at(0)), oracle, page);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(0), HMM_FAULT_READ, &run), -ENOENT);
    assert_int_equal(hmm_mirror_lookup(more[0].m, at(0), HMM_FAULT_READ, &run), -ENOENT);
    uint32_t quiet = more[2].invalidated;
    assert_int_equal(hmm_mirror_unregister(more[1].m), 0);
    assert_int_equal(more[1].freed, 1);
    assert_int_equal(eye_resolve(&more[2], at(0), HMM_FAULT_READ, &run), 0);
    eye_touch(arena + 0);
    assert_true(more[2].invalidated > quiet);
    assert_int_equal(more[1].after_free, 0);
    assert_int_equal(hmm_mirror_unregister(more[2].m), 0);
    assert_int_equal(hmm_mirror_unregister(more[0].m), 0);
    assert_int_equal(hmm_device_close(other), 0);
}

/* ---- system memory, too ---------------------------------------------------------------------------------------------------- */

static void a_mirror_of_system_memory(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    char *fresh = live_reserve(3 * LIVE_BLOCK) + LIVE_BLOCK;
    assert_true(live_map(fresh, LIVE_BLOCK));
    open_eye(HMM_MIRROR_SYSTEM, 0);
    to_device(8, 8);
    uint64_t moved_before = eye.dev->mm->stats.pages_to_device;
    /* What is there, where it is: on the device, and not. */
    assert_int_equal(eye_resolve(&eye, at(2), HMM_FAULT_READ, &run), 0);
    assert_int_equal(run.flags & HMM_MIRROR_DEVICE, 0);
    assert_true(run.start == at(0) && run.end == at(8) && run.page == at(0) / page);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(9), HMM_FAULT_WRITE, &run), 0);
    assert_true(run.start >= at(8) && run.end <= at(16) && run.flags & HMM_MIRROR_DEVICE);
    assert_memory_equal(eye_at(&eye, &run, at(9)), oracle + 9 * page, page);
    /* What is not there comes into system memory, the zero page only for reading. */
    assert_false(page_present(fresh + 5 * page));
    assert_int_equal(eye_resolve(&eye, (uintptr_t)fresh + 5 * page, HMM_FAULT_READ, &run), 0);
    assert_true(run.flags & HMM_MIRROR_VALID && !(run.flags & (HMM_MIRROR_WRITE | HMM_MIRROR_DEVICE)));
    assert_true(page_present(fresh + 5 * page));
    assert_int_equal(eye_resolve(&eye, (uintptr_t)fresh + 5 * page, HMM_FAULT_WRITE, &run), 0);
    assert_true(run.flags & HMM_MIRROR_WRITE);
    /* What the program does to it is seen, nothing of it being on a device. */
    assert_int_equal(munmap(fresh, LIVE_BLOCK), 0);
    assert_false(current(&run));
    assert_int_equal(eye_resolve(&eye, (uintptr_t)fresh + 5 * page, HMM_FAULT_READ, &run), -EFAULT);
    assert_int_equal(mprotect((void *)at(PAGES + 20), page, PROT_READ), 0); /* nothing is known of that directory yet */
    assert_int_equal(eye_resolve(&eye, at(PAGES + 20), HMM_FAULT_WRITE, &run), -EACCES);
    assert_int_equal(eye_resolve(&eye, (uintptr_t)oracle, HMM_FAULT_WRITE, &run), 0); /* shared memory */
    assert_int_equal(run.page << os_page_shift(), run.start);
    assert_int_equal(eye.dev->mm->stats.pages_to_device, moved_before);
}

/* ---- bad input ----------------------------------------------------------------------------------------------------------- */

static void what_makes_no_sense_is_refused(void **state)
{
    (void)state;
    struct hmm_mirror *none = NULL;
    struct hmm_mirror_ops ops = eye.ops;
    struct hmm_mirror_desc good = {.size = sizeof(good), .ops = &ops, .priv = &eye}, d;
    uint64_t dirty[1];
    assert_int_equal(hmm_mirror_register(eye.dev, NULL, &none), -EINVAL);
    assert_int_equal(hmm_mirror_register(eye.dev, &good, NULL), -EINVAL);
    d = good, d.size = 4;
    assert_int_equal(hmm_mirror_register(eye.dev, &d, &none), -EINVAL);
    d = good, d.flags = 0x80;
    assert_int_equal(hmm_mirror_register(eye.dev, &d, &none), -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "flags"));
    d = good, d.reserved = 1;
    assert_int_equal(hmm_mirror_register(eye.dev, &d, &none), -EINVAL);
    d = good, d.directories = UINT32_MAX;
    assert_int_equal(hmm_mirror_register(eye.dev, &d, &none), -EINVAL);
    d = good, d.ops = NULL;
    assert_int_equal(hmm_mirror_register(eye.dev, &d, &none), -EINVAL);
    ops.invalidate = NULL;
    assert_int_equal(hmm_mirror_register(eye.dev, &good, &none), -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "invalidate"));
    assert_null(none);
    open_eye(0, 0);
    static const struct {
        size_t start, end;
    } bad[] = {{0, 0}, {8, 4}, {0, 1}, {1, 8}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        uintptr_t start = at(0) + bad[i].start * 512, end = at(0) + bad[i].end * 512;
        struct seen s = {.runs = 0};
        assert_int_equal(hmm_mirror_walk(eye.m, start, end, 0, see, &s), -EINVAL);
        assert_int_equal(hmm_mirror_mark(eye.m, start, end, HMM_MIRROR_DIRTY, 0), -EINVAL);
        assert_int_equal(hmm_mirror_collect_dirty(eye.m, start, end, dirty), -EINVAL);
        assert_int_equal(hmm_mirror_discard(eye.m, start, end), -EINVAL);
    }
    assert_int_equal(hmm_mirror_walk(eye.m, at(0), at(1), 0, NULL, NULL), -EINVAL);
    assert_int_equal(hmm_mirror_mark(eye.m, at(0), at(1), HMM_MIRROR_VALID, 0), -EINVAL);
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(1), NULL), -EINVAL);
    assert_int_equal(hmm_mirror_discard(eye.m, UINTPTR_MAX & ~(page - 1), page), -EINVAL);
    assert_int_equal(info().directories, 0);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(entries_say_what_the_range_query_says),
        TEST(a_run_is_pages_that_lie_together),
        TEST(what_cannot_be_translated_says_why),
        TEST(a_change_makes_runs_stale),
        TEST(an_event_tells_the_part_of_the_directory),
        TEST(a_callback_that_fails_is_named_and_taken_as_done),
        TEST(an_answer_that_is_old_is_not_written_down),
        TEST(marks_stand_until_they_are_cleared),
        TEST(tracked_runs_are_written_page_by_page),
        TEST(what_is_handed_out_meanwhile_is_collected_later),
        TEST(what_is_marked_when_the_device_lets_go_is_collected),
        TEST(a_walk_hands_out_nothing_that_is_let_go_of),
        TEST(a_walk_lets_write_what_was_noted),
        TEST(a_directory_is_not_read_while_it_is_let_go_of),
        TEST(answers_may_stand_in_memory_that_is_away),
        TEST(collections_match_a_set),
        TEST(a_copy_of_what_is_collected_misses_nothing),
        TEST(what_is_discarded_is_gone_and_nothing_else),
        TEST(the_table_is_bounded),
        TEST(a_kept_directory_is_read_at_one_moment),
        TEST(pages_are_mapped_for_the_bus_once),
        TEST(what_was_not_invalidated_stays_mapped),
        TEST(several_mirrors_of_several_devices),
        TEST(a_mirror_of_system_memory),
        TEST(what_makes_no_sense_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
