/* SPDX-License-Identifier: MIT */
/*
 * What holds when a program changes its address space: one table of calls, run over every place that pages may be in (only mirrored,
 * on a device, on their way there) and over the ways to make the call (announced; the C library's, where events tell of it). Each
 * cell checks the notifier's events with their ranges, when they came, and the content that the CPU and the device find afterwards,
 * against a model that the library never sees. docs/calls.md shows the same table; that it does is a test, too.
 */
#include <sys/syscall.h>

#include "common/uapi.h"
#include "watcher.h"

#define PAGES 32u
#define FIRST 8u /* what the calls change: pages [FIRST, LAST) */
#define LAST 16u
#define NOTHING (-1) /* no event */

enum how { ANNOUNCED, PLAIN, HOWS };
enum place { MIRRORED, ON_DEVICE, IN_FLIGHT, PLACES };

static char *arena, *away; /* a block each */
static uint8_t *oracle;    /* what arena is to hold */

static char *part(void)
{
    return arena + FIRST * page;
}

static size_t part_bytes(void)
{
    return (LAST - FIRST) * page;
}

/* ---- a notifier that remembers ---- */

#define EVENTS 64
static struct hmm_notifier notifier;
static struct {
    pthread_mutex_t lock;
    struct hmm_event event[EVENTS];
    bool inside[EVENTS]; /* it came before the call was made */
    unsigned n;
    bool made;
} seen = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int remember(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    pthread_mutex_lock(&seen.lock);
    bool own = event->type == HMM_EVENT_MIGRATE; /* pages that move are not what is asked about here */
    for (unsigned i = 0; i < seen.n && !own; i++)
        own = seen.event[i].type == event->type && seen.event[i].start == event->start && seen.event[i].end == event->end &&
              seen.inside[i] == !seen.made; /* asked briefly, and then again */
    if (!own && seen.n < EVENTS) {
        seen.event[seen.n] = *event;
        seen.inside[seen.n++] = !seen.made;
    }
    pthread_mutex_unlock(&seen.lock);
    return 0;
}

static const struct hmm_notifier_ops remembers = {.invalidate = remember};

static void forget_events(void)
{
    pthread_mutex_lock(&seen.lock);
    seen.n = 0;
    seen.made = false;
    pthread_mutex_unlock(&seen.lock);
}

static bool saw(int type, const void *at, size_t len, bool inside)
{
    bool found = false;
    pthread_mutex_lock(&seen.lock);
    for (unsigned i = 0; i < seen.n; i++)
        found |= (int)seen.event[i].type == type && seen.event[i].start == (uintptr_t)at &&
                 seen.event[i].end == (uintptr_t)at + len && seen.inside[i] == inside;
    pthread_mutex_unlock(&seen.lock);
    return found;
}

static unsigned events_seen(void)
{
    pthread_mutex_lock(&seen.lock);
    unsigned n = seen.n;
    pthread_mutex_unlock(&seen.lock);
    return n;
}

/* ---- the calls ---- */

/* Marks the moment between the announcement and the call itself. */
static void made(void)
{
    pthread_mutex_lock(&seen.lock);
    seen.made = true;
    pthread_mutex_unlock(&seen.lock);
}

static void between(const char *point)
{
    if (!strcmp(point, "change-made"))
        made();
}

#define CALL(how, name, ...) ((how) == ANNOUNCED ? hmm_##name(__VA_ARGS__) : (made(), name(__VA_ARGS__)))

static int do_munmap(enum how how, char *at, size_t len)
{
    return CALL(how, munmap, at, len);
}

static int do_mmap(enum how how, char *at, size_t len)
{
    return CALL(how, mmap, at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at ? 0 : -1;
}

static int do_move(enum how how, char *at, size_t len)
{
    char *to = away + FIRST * page;
    return CALL(how, mremap, at, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to ? 0 : -1;
}

static int do_move_leaving(enum how how, char *at, size_t len)
{
    char *to = away + FIRST * page;
    return CALL(how, mremap, at, len, len, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == to ? 0 : -1;
}

/* From the first page of the arena: [at, at + len) is cut off its end. */
static int do_shrink(enum how how, char *at, size_t len)
{
    size_t kept = (size_t)(at - arena);
    return CALL(how, mremap, arena, kept + len, kept, 0) == arena ? 0 : -1;
}

static int do_advise(enum how how, char *at, size_t len, int advice)
{
    return CALL(how, madvise, at, len, advice);
}

#define ADVISE(name, advice)                                                                                                   \
    static int do_##name(enum how how, char *at, size_t len)                                                                   \
    {                                                                                                                          \
        return do_advise(how, at, len, advice);                                                                                \
    }
ADVISE(dontneed, MADV_DONTNEED)
ADVISE(dontneed_locked, MADV_DONTNEED_LOCKED)
ADVISE(free, MADV_FREE)
ADVISE(guard, MADV_GUARD_INSTALL)
ADVISE(cold, MADV_COLD)
ADVISE(pageout, MADV_PAGEOUT)
ADVISE(willneed, MADV_WILLNEED)
ADVISE(hugepage, MADV_HUGEPAGE)
ADVISE(populate, MADV_POPULATE_READ)
ADVISE(populate_write, MADV_POPULATE_WRITE)

/* Refused where pages are away; the kernel may find no huge page either. */
static int do_collapse(enum how how, char *at, size_t len)
{
    do_advise(how, at, len, MADV_COLLAPSE);
    return 0;
}

static int do_dontfork(enum how how, char *at, size_t len)
{
    return do_advise(how, at, len, MADV_DONTFORK) || do_advise(how, at, len, MADV_DOFORK);
}

static int do_wipeonfork(enum how how, char *at, size_t len)
{
    return do_advise(how, at, len, MADV_WIPEONFORK) || do_advise(how, at, len, MADV_KEEPONFORK);
}

static int do_posix(enum how how, char *at, size_t len)
{
    (void)how;
    made();
    return posix_madvise(at, len, POSIX_MADV_DONTNEED);
}

static int do_remove(enum how how, char *at, size_t len)
{
    return do_advise(how, at, len, MADV_REMOVE) == -1 && errno == EINVAL ? 0 : -1;
}

static int do_protect_read(enum how how, char *at, size_t len)
{
    return CALL(how, mprotect, at, len, PROT_READ);
}

static int do_protect_none(enum how how, char *at, size_t len)
{
    return CALL(how, mprotect, at, len, PROT_NONE);
}

static int do_pkey(enum how how, char *at, size_t len)
{
    return CALL(how, pkey_mprotect, at, len, PROT_READ, -1);
}

static int do_mlock(enum how how, char *at, size_t len)
{
    (void)how;
    made();
    return syscall(SYS_mlock, at, len) || syscall(SYS_munlock, at, len); /* sanitizers make those of the C library do nothing */
}

/* What the CPU and the device find at the part afterwards. */
enum after {
    STAYS,        /* the content, at its place */
    ZEROS,        /* zeros */
    FREED,        /* zeros or the content, page by page */
    GONE,         /* nothing: SIGSEGV; zeros in what is mapped there next */
    MOVED,        /* nothing; the content at the new place */
    MOVED_LEAVING /* zeros; the content at the new place */
};

struct row {
    const char *name;
    int (*make)(enum how, char *, size_t);
    void (*undo)(char *, size_t); /* so that the part can be looked at; or NULL */
    int announced, by_event;      /* types, or NOTHING */
    enum after after;
    enum after unannounced_away; /* of a plain call, of pages on a device or in flight */
    bool home;                   /* pages that stay come home; else they stay where they are */
};

static void writable(char *at, size_t len)
{
    assert_int_equal(mprotect(at, len, PROT_READ | PROT_WRITE), 0);
}

static void unguard(char *at, size_t len)
{
    assert_int_equal(madvise(at, len, MADV_GUARD_REMOVE), 0);
}

static void small_pages(char *at, size_t len)
{
    assert_int_equal(madvise(at, len, MADV_NOHUGEPAGE), 0);
}

static const struct row rows[] = {
    {"munmap", do_munmap, NULL, HMM_EVENT_UNMAP, HMM_EVENT_UNMAP, GONE, GONE, false},
    {"mmap over it (MAP_FIXED)", do_mmap, NULL, HMM_EVENT_UNMAP, HMM_EVENT_UNMAP, ZEROS, ZEROS, false},
    {"mremap, moved", do_move, NULL, HMM_EVENT_UNMAP, HMM_EVENT_UNMAP, MOVED, MOVED, false},
    {"mremap, MREMAP_DONTUNMAP", do_move_leaving, NULL, HMM_EVENT_UNMAP, HMM_EVENT_UNMAP, MOVED_LEAVING, MOVED_LEAVING, false},
    {"mremap, cut off", do_shrink, NULL, HMM_EVENT_UNMAP, HMM_EVENT_UNMAP, GONE, GONE, false},
    {"MADV_DONTNEED", do_dontneed, NULL, HMM_EVENT_CLEAR, HMM_EVENT_CLEAR, ZEROS, ZEROS, false},
    {"MADV_DONTNEED_LOCKED", do_dontneed_locked, NULL, HMM_EVENT_CLEAR, HMM_EVENT_CLEAR, ZEROS, ZEROS, false},
    {"MADV_FREE", do_free, NULL, HMM_EVENT_CLEAR, HMM_EVENT_CLEAR, FREED, FREED, false},
    {"MADV_REMOVE (refused: not shared)", do_remove, NULL, HMM_EVENT_CLEAR, NOTHING, STAYS, STAYS, false},
    {"MADV_GUARD_INSTALL, then REMOVE", do_guard, unguard, HMM_EVENT_CLEAR, NOTHING, ZEROS, STAYS, false},
    {"mprotect, PROT_READ", do_protect_read, writable, HMM_EVENT_PROTECTION_VMA, NOTHING, STAYS, STAYS, false},
    {"mprotect, PROT_NONE", do_protect_none, writable, HMM_EVENT_PROTECTION_VMA, NOTHING, STAYS, STAYS, false},
    {"pkey_mprotect", do_pkey, writable, HMM_EVENT_PROTECTION_VMA, NOTHING, STAYS, STAYS, false},
    {"MADV_COLD", do_cold, NULL, NOTHING, NOTHING, STAYS, STAYS, false},
    {"MADV_PAGEOUT", do_pageout, NULL, NOTHING, NOTHING, STAYS, STAYS, false},
    {"MADV_WILLNEED", do_willneed, NULL, NOTHING, NOTHING, STAYS, STAYS, false},
    {"MADV_HUGEPAGE, NOHUGEPAGE", do_hugepage, small_pages, NOTHING, NOTHING, STAYS, STAYS, false},
    {"MADV_COLLAPSE", do_collapse, NULL, NOTHING, NOTHING, STAYS, STAYS, false},
    {"MADV_POPULATE_READ", do_populate, NULL, NOTHING, NOTHING, STAYS, STAYS, true},
    {"MADV_POPULATE_WRITE", do_populate_write, NULL, NOTHING, NOTHING, STAYS, STAYS, true},
    {"MADV_DONTFORK, DOFORK", do_dontfork, NULL, NOTHING, NOTHING, STAYS, STAYS, false},
    {"MADV_WIPEONFORK, KEEPONFORK", do_wipeonfork, NULL, NOTHING, NOTHING, STAYS, STAYS, false},
    {"posix_madvise, DONTNEED", do_posix, NULL, NOTHING, NOTHING, STAYS, STAYS, false},
    {"mlock", do_mlock, NULL, NOTHING, NOTHING, STAYS, STAYS, true},
};
#define ROWS (sizeof(rows) / sizeof(rows[0]))

/* ---- content ---- */

static void same(const char *what, const char *at, const uint8_t *expected, size_t len)
{
    if (device_crc(at, len) != crc_oracle(expected, len))
        fail_msg("%s: the device reads something else", what);
    for (size_t i = 0; i < len; i++)
        if (((const volatile uint8_t *)at)[i] != expected[i])
            fail_msg("%s: byte %zu is %d, not %d", what, i, ((const volatile uint8_t *)at)[i], expected[i]);
}

static void same_or_zeros(const char *what, const char *at, const uint8_t *expected, size_t len)
{
    static const uint8_t zeros[65536];
    for (size_t i = 0; i < len; i += page)
        if (memcmp(at + i, expected + i, page) != 0 && memcmp(at + i, zeros, page) != 0)
            fail_msg("%s: page %zu is neither zeros nor what it was", what, i / page);
    assert_int_equal(device_crc(at, len), crc_oracle(at, len));
}

static bool is_mapped(const char *at)
{
    unsigned char vec;
    return mincore((void *)(uintptr_t)at, page, &vec) == 0;
}

static void check_content(const char *what, enum after after)
{
    size_t len = part_bytes();
    uint8_t *old = malloc(len), *zeros = calloc(1, len);
    memcpy(old, oracle + FIRST * page, len);
    if (after == GONE || after == MOVED) {
        for (unsigned i = FIRST; i < LAST; i++)
            assert_false(is_mapped(arena + i * page));
        assert_true(live_map(part(), len)); /* the address is used again */
    }
    if (after == MOVED || after == MOVED_LEAVING)
        same(what, away + FIRST * page, old, len);
    if (after == STAYS)
        same(what, part(), old, len);
    else if (after == FREED)
        same_or_zeros(what, part(), old, len);
    else
        same(what, part(), zeros, len);
    same(what, arena, oracle, FIRST * page);
    same(what, arena + LAST * page, oracle + LAST * page, (PAGES - LAST) * page);
    free(old);
    free(zeros);
}

/* ---- one cell ---- */

static uint32_t flying; /* futex-less: 1 while a migration stands at its sequence point */
static uint32_t done;

static void *call_in_flight(void *arg)
{
    void **a = arg;
    const struct row *row = a[0];
    while (!__atomic_load_n(&flying, __ATOMIC_ACQUIRE))
        usleep(100);
    intptr_t r = row->make((enum how)(intptr_t)a[1], part(), part_bytes());
    __atomic_store_n(&done, 1, __ATOMIC_RELEASE);
    return (void *)r;
}

/* A call that waits for the flight to land is not waited for. */
static void hold_flight(const char *point)
{
    between(point);
    if (strcmp(point, "to-device-taken") != 0 || __atomic_exchange_n(&flying, 1, __ATOMIC_ACQ_REL))
        return;
    for (int i = 0; i < 200 && !__atomic_load_n(&done, __ATOMIC_ACQUIRE); i++)
        usleep(1000);
}

static void migrate(void)
{
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(handle, arena, PAGES * page, &res), 0);
    assert_int_equal(res.unmovable + res.pinned + res.unmapped, 0);
}

static int make_in_flight(const struct row *row, enum how how)
{
    void *args[] = {(void *)(uintptr_t)row, (void *)(intptr_t)how}, *r;
    pthread_t thread;
    flying = done = 0;
    inject_point_hook = hold_flight;
    pthread_create(&thread, NULL, call_in_flight, args);
    migrate();
    pthread_join(thread, &r);
    inject_point_hook = between;
    return (int)(intptr_t)r;
}

/* An event is delivered by another thread, soon. The numbers that devices look at have moved by then. */
static void expect_event(const char *what, int type, bool inside)
{
    for (int i = 0; i < 3000 && !saw(type, part(), part_bytes(), inside); i++)
        usleep(1000);
    if (!saw(type, part(), part_bytes(), inside))
        fail_msg("%s: no event %d of the part, %s the call", what, type, inside ? "before" : "after");
}

/* Nothing else was told: no other type, nothing wider, nothing beside. */
static void expect_no_other(const char *what, int type)
{
    pthread_mutex_lock(&seen.lock);
    struct hmm_event other = {0};
    bool found = false;
    for (unsigned i = 0; i < seen.n && !found; i++) {
        other = seen.event[i];
        found = (int)other.type != type || other.start != (uintptr_t)part() || other.end != (uintptr_t)part() + part_bytes();
    }
    pthread_mutex_unlock(&seen.lock);
    if (found)
        fail_msg("%s: event %d of [%#lx, %#lx), beside the part", what, other.type, (unsigned long)other.start,
                 (unsigned long)other.end);
}

static void fill(uint64_t seed)
{
    assert_true(live_map(arena, PAGES * page));
    live_fill(oracle, PAGES * page, seed);
    memcpy(arena, oracle, PAGES * page);
    assert_true(live_map(away, PAGES * page));
    hmm_event_sync(dev); /* what these calls raised began before the notifier is inserted */
}

/* As a device does that puts system pages into its table: from then on the mapping is watched. */
static void mirror_arena(void)
{
    static uint64_t pfns[PAGES];
    struct hmm_fault_range range = {.size = sizeof(range),
                                    .notifier = &notifier,
                                    .start = (uintptr_t)arena,
                                    .end = (uintptr_t)arena + PAGES * page,
                                    .pfns = pfns,
                                    .default_flags = HMM_PFN_REQ_FAULT};
    assert_int_equal(hmm_range_fault_timeout(dev, &range, -1), 0);
    for (unsigned i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i] & (HMM_PFN_VALID | HMM_PFN_DEVICE | HMM_PFN_MASK),
                         HMM_PFN_VALID | ((uintptr_t)arena / page + i));
}

/* Pages that keep their content keep their place, too, unless the call touches them. */
static void check_place(const char *what, const struct row *row, enum after after)
{
    bool moved = after == MOVED || after == MOVED_LEAVING;
    size_t here = on_device(part(), part_bytes()), there = on_device(away + FIRST * page, part_bytes());
    if (here != (after == STAYS && !row->home ? LAST - FIRST : 0) || there != (moved ? LAST - FIRST : 0))
        fail_msg("%s: %zu pages on the device, and %zu at the new address", what, here, there);
}

static void run_cell(const struct row *row, enum place place, enum how how)
{
    char what[128];
    static const char *const places[] = {"mirrored", "on the device", "in flight"};
    snprintf(what, sizeof(what), "%s, %s, %s", row->name, places[place], how == ANNOUNCED ? "announced" : "plain");
    fill(random_mix((uint64_t)(row - rows) * 16 + place * 4 + how));
    assert_int_equal(hmm_notifier_insert(dev, &notifier, (uintptr_t)arena, (uintptr_t)arena + PAGES * page, &remembers), 0);
    if (place == ON_DEVICE)
        migrate();
    if (place == MIRRORED)
        mirror_arena();
    uint64_t seq = hmm_notifier_read_begin(&notifier);
    forget_events();
    int r = place == IN_FLIGHT ? make_in_flight(row, how) : row->make(how, part(), part_bytes());
    if (r)
        fail_msg("%s: the call failed: %s", what, strerror(errno));
    hmm_event_sync(dev);
    int type = how == ANNOUNCED ? row->announced : row->by_event;
    if (type != NOTHING) {
        assert_true(place == IN_FLIGHT || hmm_notifier_read_retry(&notifier, seq));
        expect_event(what, type, how == ANNOUNCED);
        expect_no_other(what, type);
    } else if (events_seen()) {
        fail_msg("%s: event %d of [%#lx, %#lx)", what, seen.event[0].type, (unsigned long)seen.event[0].start,
                 (unsigned long)seen.event[0].end);
    }
    enum after after = how == PLAIN && place != MIRRORED ? row->unannounced_away : row->after;
    if (place == ON_DEVICE)
        check_place(what, row, how == ANNOUNCED && row->make == do_guard ? ZEROS : after);
    if (row->undo)
        row->undo(part(), part_bytes());
    check_content(what, after);
    assert_int_equal(hmm_notifier_remove(&notifier), 0);
    assert_int_equal(hmm_audit(), 0);
}

static void every_cell_of_the_table(void **state)
{
    (void)state;
    const char *only = getenv("CALL");
    for (unsigned i = 0; i < ROWS; i++)
        for (int place = 0; place < PLACES; place++)
            for (int how = 0; how < HOWS && (!only || strstr(rows[i].name, only)); how++)
                run_cell(&rows[i], place, how);
}

/* ---- the document ---- */

static const char *event_name(int type)
{
    switch (type) {
    case HMM_EVENT_UNMAP: return "UNMAP";
    case HMM_EVENT_CLEAR: return "CLEAR";
    case HMM_EVENT_PROTECTION_VMA: return "PROTECTION_VMA";
    default: return "-";
    }
}

static const char *after_name(const struct row *row, enum after after, enum place place)
{
    bool away_ = place != MIRRORED;
    switch (after) {
    case STAYS: return !away_ ? "stays" : row->home ? "stays; comes home" : "stays, on the device";
    case ZEROS: return "zeros";
    case FREED: return "zeros or the content";
    case GONE: return "gone; zeros in what comes there next";
    case MOVED: return away_ ? "at the new address, on the device" : "at the new address";
    case MOVED_LEAVING: return away_ ? "at the new address, on the device; zeros here" : "at the new address; zeros here";
    }
    return "";
}

/* One line of the table in docs/calls.md. */
static void describe(const struct row *row, char *line, size_t size)
{
    int n = snprintf(line, size, "| %s | %s | %s |", row->name, event_name(row->announced), event_name(row->by_event));
    for (int place = 0; place < PLACES; place++) {
        enum after plain = place == MIRRORED ? row->after : row->unannounced_away;
        n += snprintf(line + n, size - (size_t)n, " %s", after_name(row, row->after, place));
        if (plain != row->after)
            n += snprintf(line + n, size - (size_t)n, ". Not announced: %s", after_name(row, plain, place));
        n += snprintf(line + n, size - (size_t)n, " |");
    }
}

static void docs_calls_md_shows_this_table(void **state)
{
    (void)state;
    static char text[65536];
    char line[512];
    unsigned missing = 0;
    FILE *file = fopen(DOCS "/calls.md", "r");
    assert_non_null(file);
    text[fread(text, 1, sizeof(text) - 1, file)] = 0;
    fclose(file);
    for (unsigned i = 0; i < ROWS; i++) {
        describe(&rows[i], line, sizeof(line));
        if (strstr(text, line))
            continue;
        fprintf(stderr, "%s\n", line);
        missing++;
    }
    assert_int_equal(missing, 0);
}

/* ---- life ---- */

static int set_up(void **state)
{
    if (watcher_set_up(state))
        return -1;
    arena = live_reserve(LIVE_BLOCK);
    away = live_reserve(LIVE_BLOCK);
    oracle = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    inject_point_hook = between;
    return 0;
}

static int tear_down(void **state)
{
    hmm_notifier_remove(&notifier); /* of a test that failed */
    int r = watcher_tear_down(state);
    munmap(arena, LIVE_BLOCK);
    munmap(away, LIVE_BLOCK);
    munmap(oracle, PAGES * page);
    return r;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(every_cell_of_the_table, set_up, tear_down),
        cmocka_unit_test(docs_calls_md_shows_this_table),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
