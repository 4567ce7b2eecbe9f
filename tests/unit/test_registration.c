/* SPDX-License-Identifier: MIT */
/*
 * Registrations that are refused, half done, or met by a change of the program: whatever becomes of them, no page that is away is lost, and
 * what the program has said of its memory stays. A wrapped table of system calls does what another thread, or the kernel, could have
 * done between two of them.
 */
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "events.h"
#include "maps.h"
#include "watcher.h"

#define PAGES 32u

static struct os_ops hooked;
static unsigned warnings;
static char warned[512];

static void note_log(enum hmm_log_level level, const char *line, void *arg)
{
    watcher_log(level, line, arg);
    if (level != HMM_LOG_WARNING)
        return;
    snprintf(warned, sizeof(warned), "%s", line);
    __atomic_fetch_add(&warnings, 1, __ATOMIC_SEQ_CST);
}

static int open_without_fork_event(uint64_t features, struct os_uffd *out)
{
    return features & UFFD_FEATURE_EVENT_FORK ? -EPERM : os_linux.uffd_open(features, out);
}

static int set_up(void **state)
{
    hooked = os_linux;
    os = &hooked;
    warnings = 0;
    int r = watcher_set_up(state);
    hmm_set_log(note_log, NULL);
    return r;
}

static int set_up_handlers(void **state)
{
    hooked = os_linux;
    hooked.uffd_open = open_without_fork_event;
    os = &hooked;
    warnings = 0;
    return watcher_set_up(state);
}

static int tear_down(void **state)
{
    int r = watcher_tear_down(state);
    os = &os_linux;
    return r;
}

static size_t bytes(unsigned pages)
{
    return pages * page;
}

/* ---- calls of the core, which need a library thread ---- */

struct core_call {
    struct call call;
    struct mm *mm;
    uintptr_t addr, end;
    unsigned tries;
    int result;
    void (*what)(struct core_call *c);
};

static void run_core(struct call *call)
{
    struct core_call *c = container_of(call, struct core_call, call);
    c->what(c);
}

static int core(void (*what)(struct core_call *c), const void *at, size_t len, unsigned tries)
{
    struct core_call c = {.call.fn = run_core,
                          .addr = (uintptr_t)at,
                          .end = (uintptr_t)at + len,
                          .tries = tries,
                          .what = what,
                          .mm = manager_use()};
    assert_non_null(c.mm);
    manager_call(&c.call);
    manager_unuse();
    return c.result;
}

static void call_watch(struct core_call *c)
{
    uintptr_t part_end;
    for (unsigned i = 0; i < c->tries; i++) {
        c->result = mm_watch(c->mm, c->addr, c->end, WATCH_REGISTER, &part_end);
        if (c->result != -EAGAIN)
            return;
        mm_backoff(c->mm, i);
    }
}

static void call_prune(struct core_call *c)
{
    c->result = mm_prune(c->mm, c->addr, c->end);
}

static void call_owes(struct core_call *c)
{
    rwlock_read_lock(&c->mm->as);
    c->result = c->mm->owes;
    rwlock_read_unlock(&c->mm->as);
}

static int watch_core(const void *at, size_t len, unsigned tries)
{
    return core(call_watch, at, len, tries);
}

/* ---- an unmap that a remap overtakes, onto memory whose registration was not proved ---- */

static int watched_error;

static int refuse_to_prove(int uffd, uintptr_t start, size_t len)
{
    return watched_error ? watched_error : os_linux.uffd_watched(uffd, start, len);
}

static int held_is_pending(int uffd)
{
    return __atomic_load_n(&holding, __ATOMIC_SEQ_CST) == 2 ? 1 : os_linux.uffd_pending(uffd);
}

/* Registered, but it could not be proved. */
static char *map_unproved(void)
{
    char *at = map_alone(bytes(PAGES));
    watched_error = -EAGAIN;
    hooked.uffd_watched = refuse_to_prove;
    assert_int_equal(watch_core(at, bytes(PAGES), 1), -EAGAIN);
    watched_error = 0;
    return at;
}

static void what_moves_to_where_nothing_was_proved_stays(void **state)
{
    (void)state;
    hooked.uffd_read = read_held;
    hooked.uffd_pending = held_is_pending;
    char *u = map_unproved(), *c = map_alone(bytes(PAGES));
    assert_int_equal(maps_look(u, bytes(PAGES)).watched, bytes(PAGES));
    live_fill(c, bytes(PAGES), 1);
    uint32_t crc = crc_oracle(c, bytes(PAGES));
    to_device(c, bytes(PAGES));
    hold_unmap_of(u);
    munmap(u, bytes(PAGES));
    expect_holding(2);
    assert_ptr_equal(mremap(c, bytes(PAGES), bytes(PAGES), MREMAP_MAYMOVE | MREMAP_FIXED, u), u);
    expect_holding(3);
    assert_int_equal(hmm_audit(), 0);
    assert_int_equal(on_device(u, bytes(PAGES)), PAGES);
    assert_int_equal(crc_oracle(u, bytes(PAGES)), crc);
    munmap(u, bytes(PAGES));
    holding = 0;
}

static bool fake_watch;

static int say_watched(int uffd, uintptr_t start, size_t len)
{
    return fake_watch ? 0 : os_linux.uffd_watch(uffd, start, len);
}

/* As above, but it was not registered: no unmap is owed, and the next is of what came there. */
static char *map_unregistered(void)
{
    fake_watch = true;
    hooked.uffd_watch = say_watched;
    char *u = map_unproved();
    fake_watch = false;
    assert_int_equal(maps_look(u, bytes(PAGES)).watched, 0);
    return u;
}

static void expect_used(uint64_t n)
{
    for (int i = 0; i < 5000 && used_bytes() != n; i++)
        usleep(1000);
    assert_int_equal(used_bytes(), n);
}

static void an_unmap_that_was_never_owed_is_not_waited_for(void **state)
{
    (void)state;
    for (int later = 0; later < 2; later++) {
        char *u = map_unregistered(), *c = map_alone(bytes(PAGES));
        live_fill(c, bytes(PAGES), 2);
        to_device(c, bytes(PAGES));
        assert_ptr_equal(mremap(c, bytes(PAGES), bytes(PAGES), MREMAP_MAYMOVE | MREMAP_FIXED, u), u);
        if (later) { /* also where something else stands there at once */
            for (int i = 0; i < 1000 && core(call_owes, u, page, 1); i++)
                usleep(1000);
            assert_true(live_map(u, bytes(PAGES)));
        } else {
            munmap(u, bytes(PAGES));
        }
        expect_used(0);
        assert_int_equal(hmm_audit(), 0);
        munmap(u, bytes(PAGES));
    }
}

/* ---- giving up ---- */

/* Armed, and all of it home again, so that it is given up or only watched next. */
static char *map_brought_home(size_t len)
{
    char *at = map_alone(len);
    live_fill(at, len, 3);
    to_device(at, page);
    return at;
}

static size_t partly; /* of the next watch: so many bytes are registered before the mappings run out */
static uintptr_t partly_at;

static int watch_partly(int uffd, uintptr_t start, size_t len)
{
    if (!partly || start != partly_at)
        return os_linux.uffd_watch(uffd, start, len);
    int r = os_linux.uffd_watch(uffd, start, partly);
    return r ? r : -ENOMEM;
}

static void what_is_watched_in_part_is_armed_again(void **state)
{
    static struct watcher w;
    (void)state;
    hooked.uffd_watch = watch_partly;
    char *at = map_brought_home(bytes(PAGES));
    watch(&w, at, bytes(PAGES));
    partly_at = (uintptr_t)at;
    partly = bytes(PAGES / 2);
    assert_int_equal(hmm_migrate_to_system(at, page, NULL), 0);
    struct maps_range m = maps_look(at, bytes(PAGES));
    assert_int_equal(m.watched, 0);
    assert_int_equal(m.missing, bytes(PAGES));
    uint32_t crc = crc_oracle(at, bytes(PAGES));
    to_device(at, bytes(PAGES));
    assert_int_equal(crc_oracle(at, bytes(PAGES)), crc);
    partly = 0;
    unwatch(&w);
    munmap(at, bytes(PAGES));
}

static struct {
    char *at, *from;
    size_t len;
    char *foreign; /* goes behind what is moved there; or NULL */
    pthread_t thread;
    bool done;
    bool seen; /* something was unregistered while an event was pending */
} moving;

static void *move_there(void *arg)
{
    (void)arg;
    void *to = mremap(moving.from, moving.len, moving.len, MREMAP_MAYMOVE | MREMAP_FIXED, moving.at);
    return to == moving.at ? NULL : to;
}

/* In a library thread that holds mm->as: the event is read later. */
static void start_move(void)
{
    unsigned char in[PAGES];
    moving.done = true;
    pthread_create(&moving.thread, NULL, move_there, NULL);
    while (mincore(moving.from, moving.len, in) == 0)
        usleep(100);
}

/* The move comes after the first mapping was unregistered; or, with foreign memory, directly before, when nobody looks any more. */
static int unregister_and_move(int uffd, uintptr_t start, size_t len)
{
    bool now = !moving.done && start == (uintptr_t)moving.at;
    if (now && moving.foreign)
        start_move();
    moving.seen |= moving.done && !moving.foreign && os_linux.uffd_pending(uffd) == 1;
    int r = os_linux.uffd_unregister(uffd, start, len);
    if (now && !moving.foreign)
        start_move();
    void *behind = moving.at + moving.len;
    if (now && moving.foreign)
        mremap(moving.foreign, moving.len, moving.len, MREMAP_MAYMOVE | MREMAP_FIXED, behind);
    return r;
}

/* What is away, and moves to u: its CRC. */
static uint32_t prepare_move(char *u, char *foreign)
{
    char *c = map_alone(bytes(PAGES / 2));
    live_fill(c, bytes(PAGES / 2), 4);
    uint32_t crc = crc_oracle(c, bytes(PAGES / 2));
    to_device(c, bytes(PAGES / 2));
    memset(&moving, 0, sizeof(moving));
    moving.at = u;
    moving.from = c;
    moving.len = bytes(PAGES / 2);
    moving.foreign = foreign;
    return crc;
}

static void expect_moved(char *u, uint32_t crc)
{
    void *failed = NULL;
    assert_true(moving.done);
    pthread_join(moving.thread, &failed);
    assert_null(failed);
    assert_int_equal(maps_look(u, bytes(PAGES / 2)).missing, bytes(PAGES / 2));
    assert_int_equal(hmm_audit(), 0);
    assert_int_equal(crc_oracle(u, bytes(PAGES / 2)), crc);
}

static void try_move_while_given_up(char *foreign)
{
    char *u = map_brought_home(bytes(PAGES));
    uint32_t crc = prepare_move(u, foreign);
    if (!foreign) /* two mappings, and so two looks */
        assert_int_equal(mprotect(u + moving.len, moving.len, PROT_READ), 0);
    hooked.uffd_unregister = unregister_and_move;
    assert_int_equal(hmm_migrate_to_system(u, page, NULL), 0);
    expect_moved(u, crc);
    assert_false(moving.seen);
    hooked.uffd_unregister = os_linux.uffd_unregister;
    munmap(u, bytes(PAGES));
}

static void what_moves_to_where_something_is_given_up_stays(void **state)
{
    (void)state;
    try_move_while_given_up(NULL);
}

static void foreign_memory_beside_it_does_not_matter(void **state)
{
    (void)state;
    char path[] = "/tmp/hmm-registration-XXXXXX";
    int file = mkstemp(path);
    assert_true(file >= 0 && ftruncate(file, (off_t)bytes(PAGES)) == 0);
    char *foreign = mmap(NULL, bytes(PAGES / 2), PROT_READ, MAP_PRIVATE, file, 0);
    assert_true(foreign != MAP_FAILED);
    try_move_while_given_up(foreign);
    close(file);
    unlink(path);
}

/* What was only watched is in WP mode, which would be too little for what moves there. */
static void what_moves_to_where_a_watch_ends_stays(void **state)
{
    static struct watcher w;
    (void)state;
    char *u = map_alone(bytes(PAGES));
    memset(u, 1, bytes(PAGES));
    watch(&w, u, bytes(PAGES));
    assert_int_equal(watch_core(u, bytes(PAGES), 10), 0);
    unwatch(&w);
    uint32_t crc = prepare_move(u, NULL);
    assert_int_equal(mprotect(u + moving.len, moving.len, PROT_READ), 0);
    hooked.uffd_unregister = unregister_and_move;
    core(call_prune, u, bytes(PAGES), 1);
    expect_moved(u, crc);
    hooked.uffd_unregister = os_linux.uffd_unregister;
    munmap(u, bytes(PAGES));
}

static int move_and_watch(int uffd, uintptr_t start, size_t len)
{
    if (!moving.done && start == (uintptr_t)moving.at)
        start_move();
    return os_linux.uffd_watch(uffd, start, len);
}

static void what_moves_to_where_a_watch_begins_stays(void **state)
{
    static struct watcher w;
    (void)state;
    char *u = map_alone(bytes(PAGES / 2));
    memset(u, 1, bytes(PAGES / 2));
    watch(&w, u, bytes(PAGES / 2));
    uint32_t crc = prepare_move(u, NULL);
    hooked.uffd_watch = move_and_watch;
    assert_int_equal(watch_core(u, bytes(PAGES / 2), 1), -EAGAIN);
    expect_moved(u, crc);
    hooked.uffd_watch = os_linux.uffd_watch;
    unwatch(&w);
    munmap(u, bytes(PAGES / 2));
}

/* ---- what the program keeps from children ---- */

static uintptr_t unproved_at;
static uint32_t unproved_left;

static int64_t refuse_zeropage(int uffd, uintptr_t dst, size_t len)
{
    if (dst - unproved_at < bytes(PAGES) && unproved_left && unproved_left--)
        return -EAGAIN;
    return os_linux.uffd_zeropage(uffd, dst, len);
}

static char *map_kept(void)
{
    char *at = map_alone(bytes(PAGES));
    memset(at, 5, bytes(PAGES));
    assert_int_equal(madvise(at, bytes(PAGES), MADV_DONTFORK), 0);
    return at;
}

static void expect_kept_when_given_up(char *at)
{
    for (int i = 0; i < 2000 && maps_look(at, bytes(PAGES)).missing + maps_look(at, bytes(PAGES)).watched; i++)
        core(call_prune, at, bytes(PAGES), 1);
    struct maps_range m = maps_look(at, bytes(PAGES));
    assert_int_equal(m.missing + m.watched, 0);
    assert_int_equal(m.hidden_from_fork, bytes(PAGES));
    munmap(at, bytes(PAGES));
}

static void a_mark_of_the_program_outlives_a_failed_arming(void **state)
{
    (void)state;
    hooked.uffd_zeropage = refuse_zeropage;
    char *at = map_kept();
    unproved_at = (uintptr_t)at;
    unproved_left = 1;
    to_device(at, bytes(PAGES));
    assert_int_equal(unproved_left, 0);
    assert_int_equal(hmm_migrate_to_system(at, bytes(PAGES), NULL), 0);
    expect_kept_when_given_up(at);
}

static void a_mark_of_the_program_outlives_a_failed_watch(void **state)
{
    (void)state;
    hooked.uffd_watched = refuse_to_prove;
    char *at = map_kept();
    watched_error = -EAGAIN;
    assert_int_equal(watch_core(at, bytes(PAGES), 1), -EAGAIN);
    assert_int_equal(maps_look(at, bytes(PAGES)).hidden_from_fork, bytes(PAGES));
    watched_error = 0;
    assert_int_equal(watch_core(at, bytes(PAGES), 10), 0);
    expect_kept_when_given_up(at);
}

/* ---- kinds of memory ---- */

static void shared_memory_that_nobody_may_write_is_not_watched(void **state)
{
    (void)state;
    char path[64];
    int mem = (int)syscall(319 /* memfd_create */, "registration", 0);
    assert_true(mem >= 0 && ftruncate(mem, (off_t)page) == 0);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", mem);
    int reader = open(path, O_RDONLY | O_CLOEXEC);
    assert_true(reader >= 0);
    char *at = mmap(NULL, page, PROT_READ, MAP_SHARED, reader, 0);
    assert_true(at != MAP_FAILED);
    assert_int_equal(watch_core(at, page, 10), -EOPNOTSUPP);
    munmap(at, page);
    close(reader);
    close(mem);
}

/* The kernel answers for whole pages of hugetlb memory only. */
static uintptr_t huge_at;

static int query_huge(int fd, uintptr_t addr, struct os_vma *out)
{
    int r = os_linux.vma_query(fd, addr, out);
    if (!r && out->start == huge_at)
        out->page_size = LIVE_BLOCK;
    return r;
}

static int watched_if_whole(int uffd, uintptr_t start, size_t len)
{
    if (start - huge_at < 2 * LIVE_BLOCK && ((start | len) & (LIVE_BLOCK - 1)))
        return -EINVAL;
    return os_linux.uffd_watched(uffd, start, len);
}

static void huge_pages_are_proved_whole(void **state)
{
    (void)state;
    hooked.vma_query = query_huge;
    hooked.uffd_watched = watched_if_whole;
    char *at = map_alone(2 * LIVE_BLOCK);
    huge_at = (uintptr_t)at;
    assert_int_equal(watch_core(at + LIVE_BLOCK + page, page, 10), 0);
    huge_at = 0;
    munmap(at, 2 * LIVE_BLOCK);
}

static void hugetlb_memory_is_watched(void **state)
{
    (void)state;
    char *at = mmap(NULL, LIVE_BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | 21 << 26, -1, 0);
    if (at == MAP_FAILED) {
        print_message("no huge pages (/proc/sys/vm/nr_hugepages): skipped\n");
        skip();
    }
    assert_int_equal(watch_core(at + page, page, 10), 0);
    assert_int_equal(maps_look(at, LIVE_BLOCK).watched, LIVE_BLOCK);
    munmap(at, LIVE_BLOCK);
}

/* ---- what is refused is said ---- */

static int register_error;
static uintptr_t register_at;

static int refuse_register(int uffd, uintptr_t start, size_t len)
{
    if (register_error && start == register_at)
        return register_error;
    return os_linux.uffd_register(uffd, start, len);
}

static void a_lack_of_mappings_is_said_and_counted_as_busy(void **state)
{
    (void)state;
    struct hmm_migrate_result res = {.size = sizeof(res)};
    hooked.uffd_register = refuse_register;
    char *at = map_alone(bytes(PAGES));
    memset(at, 7, bytes(PAGES));
    register_at = (uintptr_t)at;
    register_error = -ENOMEM;
    assert_int_equal(hmm_migrate_to_device(handle, at, bytes(PAGES), &res), 0);
    assert_int_equal(res.busy, PAGES);
    assert_int_equal(res.unmovable + res.moved, 0);
    for (int i = 0; i < 2000 && !__atomic_load_n(&warnings, __ATOMIC_SEQ_CST); i++)
        usleep(1000);
    assert_non_null(strstr(warned, "vm.max_map_count"));
    register_error = 0;
    munmap(at, bytes(PAGES));
}

/* Our registration goes, and cannot be taken again for a while. */
static uint32_t unregistered;

static int64_t lose_registration(int uffd, uintptr_t dst, const void *src, size_t len)
{
    if (dst == register_at && !unregistered) {
        unregistered = 1;
        os_linux.uffd_unregister(uffd, dst, bytes(PAGES));
    }
    return os_linux.uffd_copy(uffd, dst, src, len);
}

static void *bring_home(void *at)
{
    return (void *)(intptr_t)hmm_migrate_to_system(at, bytes(PAGES), NULL);
}

static void a_page_that_cannot_come_home_is_named(void **state)
{
    (void)state;
    pthread_t thread;
    void *result;
    hooked.uffd_register = refuse_register;
    hooked.uffd_copy = lose_registration;
    char *at = map_alone(bytes(PAGES));
    live_fill(at, bytes(PAGES), 8);
    uint32_t crc = crc_oracle(at, bytes(PAGES));
    to_device(at, bytes(PAGES));
    unregistered = 0;
    register_at = (uintptr_t)at;
    register_error = -EBUSY;
    pthread_create(&thread, NULL, bring_home, at);
    for (int i = 0; i < 20000 && !__atomic_load_n(&warnings, __ATOMIC_SEQ_CST); i++)
        usleep(1000);
    assert_non_null(strstr(warned, "cannot come home"));
    assert_non_null(strstr(warned, "another userfaultfd"));
    __atomic_store_n(&register_error, 0, __ATOMIC_SEQ_CST);
    pthread_join(thread, &result);
    assert_null(result);
    assert_int_equal(crc_oracle(at, bytes(PAGES)), crc);
    register_at = 0;
    munmap(at, bytes(PAGES));
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
#define HANDLERS(f) cmocka_unit_test_setup_teardown(f, set_up_handlers, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(what_moves_to_where_nothing_was_proved_stays),
        TEST(an_unmap_that_was_never_owed_is_not_waited_for),
        TEST(what_is_watched_in_part_is_armed_again),
        TEST(what_moves_to_where_something_is_given_up_stays),
        TEST(what_moves_to_where_a_watch_ends_stays),
        TEST(what_moves_to_where_a_watch_begins_stays),
        TEST(foreign_memory_beside_it_does_not_matter),
        HANDLERS(a_mark_of_the_program_outlives_a_failed_arming),
        HANDLERS(a_mark_of_the_program_outlives_a_failed_watch),
        TEST(shared_memory_that_nobody_may_write_is_not_watched),
        TEST(huge_pages_are_proved_whole),
        TEST(hugetlb_memory_is_watched),
        TEST(a_lack_of_mappings_is_said_and_counted_as_busy),
        TEST(a_page_that_cannot_come_home_is_named),
    };
    return cmocka_run_group_tests_name("registration", tests, NULL, NULL);
}
