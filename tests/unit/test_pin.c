/* SPDX-License-Identifier: MIT */
/* Pins: what is pinned is in system memory, as the kernel says, until it is unpinned; whoever migrates it, and at whatever moment. */
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/wait.h>

#include "live_device.h"
#include "points.h"

#define PAGES 64u
#define FIRST 10u /* pages that are pinned */
#define LAST 20u
#define SECONDS_MAX 50

static char *area, *p;
static const char key[] = "owner";

static int set_up(void **state)
{
    (void)state;
    live_set_up(SECONDS_MAX);
    arm_point(NULL, NULL);
    area = live_reserve(2 * LIVE_BLOCK);
    p = area + page; /* next to the stack of a thread it would not move */
    open_spec("soft:memory=8M,engines=2");
    if (!live_map(p, PAGES * page))
        return -1;
    live_fill(p, PAGES * page, 5);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    release_point();
    bool good = live_tear_down();
    forget_point();
    munmap(area, 2 * LIVE_BLOCK);
    return good ? 0 : -1;
}

static hmm_pin pin_part(unsigned first, unsigned last, uint32_t flags)
{
    hmm_pin pin = 0;
    struct hmm_pin_desc desc = {.size = sizeof(desc), .flags = flags, .owner = key};
    int r = hmm_pin_range(p + first * page, (last - first) * page, &desc, &pin);
    if (r)
        fail_msg("pin: %d, %s", r, hmm_last_message());
    assert_true(pin != 0);
    return pin;
}

static void expect_here(unsigned first, unsigned last)
{
    for (unsigned i = first; i < last; i++)
        assert_true(page_present(p + i * page));
}

static void expect_content(void)
{
    for (size_t i = 0; i < PAGES * page; i++)
        if ((uint8_t)p[i] != (uint8_t)random_mix(5 + i))
            fail_msg("byte %zu is %#x", i, (uint8_t)p[i]);
}

static void a_pinned_page_does_not_leave(void **state)
{
    struct hmm_page_info info[PAGES];
    (void)state;
    hmm_pin pin = pin_part(FIRST, LAST, 0);
    struct hmm_migrate_result res = to_device(p, PAGES * page);
    assert_int_equal(res.moved, PAGES - (LAST - FIRST));
    assert_int_equal(res.pinned, LAST - FIRST);
    assert_int_equal(res.first_stayed, (uintptr_t)p + FIRST * page);
    expect_here(FIRST, LAST);
    assert_int_equal(hmm_range_query(p, PAGES * page, info, PAGES), PAGES);
    for (unsigned i = 0; i < PAGES; i++) {
        assert_int_equal(info[i].pinned, i >= FIRST && i < LAST);
        assert_int_equal(info[i].state, i >= FIRST && i < LAST ? HMM_PAGE_SYSTEM : HMM_PAGE_DEVICE);
    }
    assert_true(hmm_may_be_pinned(p + FIRST * page, 1));
    assert_true(hmm_may_be_pinned(p, PAGES * page));
    assert_false(hmm_may_be_pinned(p + LAST * page, page));
    assert_false(hmm_may_be_pinned(p, FIRST * page));
    assert_int_equal(hmm_unpin(pin, key, false), 0);
    assert_false(hmm_may_be_pinned(p, PAGES * page));
    assert_int_equal(to_device(p, PAGES * page).moved, LAST - FIRST);
    expect_content();
}

static void what_is_away_comes_home(void **state)
{
    (void)state;
    assert_int_equal(to_device(p, PAGES * page).moved, PAGES);
    assert_false(page_present(p + FIRST * page));
    hmm_pin pin = pin_part(FIRST, LAST, HMM_PIN_WRITE);
    expect_here(FIRST, LAST);
    assert_int_equal(to_device(p, PAGES * page).pinned, LAST - FIRST);
    assert_int_equal(hmm_unpin(pin, key, true), 0);
    expect_content();
}

static void what_was_never_touched_is_made(void **state)
{
    (void)state;
    char *fresh = area + LIVE_BLOCK;
    hmm_pin read, write;
    struct hmm_pin_desc desc = {.size = sizeof(desc), .flags = HMM_PIN_WRITE};
    assert_true(live_map(fresh, 2 * page));
    assert_false(page_present(fresh));
    assert_int_equal(hmm_pin_range(fresh + 100, 1, NULL, &read), 0);
    assert_int_equal(hmm_pin_range(fresh + page, page, &desc, &write), 0);
    assert_true(page_present(fresh) && page_present(fresh + page));
    assert_int_equal(fresh[0] | fresh[page], 0);
    assert_int_equal(hmm_unpin(read, NULL, false), 0);
    assert_int_equal(hmm_unpin(write, NULL, false), 0);
}

static int open_user_mode(uint64_t features, struct os_uffd *out)
{
    int r = os_linux.uffd_open(features, out);
    out->user_mode_only = true;
    return r;
}

/* As the kernel, where its own faults are not served. */
static int refuse_populate(void *addr, size_t len, int what)
{
    bool ours = (char *)addr >= area && (char *)addr < area + 2 * LIVE_BLOCK;
    return ours && what >= OS_ADVISE_POPULATE_WRITE ? -EFAULT : os_linux.advise(addr, len, what);
}

static void where_system_calls_cannot_fault_pages_in_they_are_touched(void **state)
{
    (void)state;
    char *fresh = p + PAGES * page;
    assert_int_equal(hmm_device_close(dev), 0);
    hooked.uffd_open = open_user_mode;
    hooked.advise = refuse_populate;
    open_spec("soft:memory=8M,engines=2");
    assert_true(live_map(fresh, 4 * page));
    assert_int_equal(to_device(p, PAGES * page).moved, PAGES);
    for (uint32_t flags = 0; flags <= HMM_PIN_WRITE; flags++) {
        hmm_pin pin;
        struct hmm_pin_desc desc = {.size = sizeof(desc), .flags = flags};
        assert_int_equal(hmm_pin_range(p, (PAGES + 2 + 2 * flags) * page, &desc, &pin), 0);
        expect_here(0, PAGES + 2 + 2 * flags);
        assert_int_equal(hmm_unpin(pin, NULL, false), 0);
    }
    expect_content();
}

/* ---- at the wrong moment ---- */

static hmm_pin from_thread;
static uint32_t pinned;

static void *pin_in_thread(void *unused)
{
    from_thread = pin_part(FIRST, LAST, 0);
    expect_here(FIRST, LAST);
    __atomic_store_n(&pinned, 1, __ATOMIC_SEQ_CST);
    return unused;
}

static void *migrate_all(void *res)
{
    *(struct hmm_migrate_result *)res = to_device(p, PAGES * page);
    return NULL;
}

/* What a migration has taken already comes home again. */
static void pages_on_their_way_are_waited_for(void **state)
{
    struct hmm_migrate_result res;
    pthread_t migrator, pinner;
    (void)state;
    pinned = 0;
    arm_point("to-device-taken", NULL);
    pthread_create(&migrator, NULL, migrate_all, &res);
    wait_point();
    pthread_create(&pinner, NULL, pin_in_thread, NULL);
    usleep(50000);
    assert_int_equal(__atomic_load_n(&pinned, __ATOMIC_SEQ_CST), 0);
    release_point();
    pthread_join(migrator, NULL);
    pthread_join(pinner, NULL);
    assert_int_equal(res.moved, PAGES);
    expect_here(FIRST, LAST);
    assert_int_equal(hmm_unpin(from_thread, key, false), 0);
    expect_content();
}

static void pin_now(void)
{
    pin_in_thread(NULL);
}

/* It has surveyed the pages, and takes them next. */
static void a_pin_comes_before_pages_are_taken(void **state)
{
    (void)state;
    to_device(area + page + PAGES * page - page, page); /* the mapping is managed: what it waits for would show */
    arm_point("to-device-take", NULL);
    struct hmm_migrate_result res;
    pthread_t migrator;
    pthread_create(&migrator, NULL, migrate_all, &res);
    wait_point();
    pin_now();
    release_point();
    pthread_join(migrator, NULL);
    assert_int_equal(res.pinned, LAST - FIRST);
    expect_here(FIRST, LAST);
    assert_int_equal(hmm_unpin(from_thread, key, false), 0);
    expect_content();
}

static struct hmm_migrate_result met;

static void migrate_now(void)
{
    met = to_device(p, PAGES * page);
}

/* The pin is entered, and does not know yet whether anything is managed. */
static void a_migration_comes_before_the_pin_has_looked(void **state)
{
    (void)state;
    arm_point("pin-entered", migrate_now);
    hmm_pin pin = pin_part(FIRST, LAST, 0);
    assert_int_equal(met.pinned, LAST - FIRST);
    assert_int_equal(met.moved, PAGES - (LAST - FIRST));
    expect_here(FIRST, LAST);
    assert_int_equal(hmm_unpin(pin, key, false), 0);
    expect_content();
}

struct storm {
    pthread_t thread;
    uint64_t random;
    unsigned wrong;
};

static uint32_t storm_over;

static void *pin_and_look(void *arg)
{
    struct storm *s = arg;
    while (!__atomic_load_n(&storm_over, __ATOMIC_RELAXED)) {
        unsigned first = random_next(&s->random) % PAGES, last = first + 1 + random_next(&s->random) % (PAGES - first);
        hmm_pin pin;
        int r = hmm_pin_range(p + first * page, (last - first) * page, NULL, &pin);
        for (unsigned i = first; i < last && !r; i++)
            s->wrong += !page_present(p + i * page);
        s->wrong += r || hmm_unpin(pin, NULL, false);
    }
    return NULL;
}

static void pins_in_a_storm_of_migrations(void **state)
{
    struct storm s[3] = {{.random = 1}, {.random = 2}, {.random = 3}};
    (void)state;
    storm_over = 0;
    for (unsigned i = 0; i < 3; i++)
        pthread_create(&s[i].thread, NULL, pin_and_look, &s[i]);
    for (unsigned i = 0; i < 400; i++) {
        to_device(p, PAGES * page);
        assert_int_equal(hmm_migrate_to_system(p, PAGES * page, NULL), 0);
    }
    __atomic_store_n(&storm_over, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < 3; i++) {
        pthread_join(s[i].thread, NULL);
        assert_int_equal(s[i].wrong, 0);
    }
    assert_false(hmm_may_be_pinned(p, PAGES * page));
    expect_content();
}

/* ---- what is refused ---- */

static int try_pin(const void *at, size_t len, uint32_t flags)
{
    hmm_pin pin = 0;
    struct hmm_pin_desc desc = {.size = sizeof(desc), .flags = flags};
    int r = hmm_pin_range(at, len, &desc, &pin);
    if (!r)
        hmm_unpin(pin, NULL, false);
    else
        assert_true(hmm_last_message()[0] && pin == 0);
    return r;
}

static void what_makes_no_sense_is_refused(void **state)
{
    (void)state;
    hmm_pin pin;
    struct hmm_pin_desc small = {.size = 4};
    assert_int_equal(try_pin(p, 0, 0), -EINVAL);
    assert_int_equal(try_pin(p, SIZE_MAX, 0), -EINVAL);
    assert_int_equal(try_pin(p, page, 4), -EINVAL);
    assert_int_equal(hmm_pin_range(p, page, NULL, NULL), -EINVAL);
    assert_int_equal(hmm_pin_range(p, page, &small, &pin), -EINVAL);
    assert_int_equal(try_pin(p, (PAGES + 1) * page, 0), -EFAULT);
    assert_non_null(strstr(hmm_last_message(), "nothing is mapped"));
    assert_int_equal(mprotect(p + page, page, PROT_READ), 0);
    assert_int_equal(try_pin(p, 4 * page, HMM_PIN_WRITE), -EPERM);
    assert_int_equal(try_pin(p, 4 * page, 0), 0);
    assert_int_equal(mprotect(p + page, page, PROT_NONE), 0);
    assert_int_equal(try_pin(p, 4 * page, 0), -EFAULT);
    assert_int_equal(mprotect(p + page, page, PROT_READ | PROT_WRITE), 0);
    assert_int_equal(hmm_unpin(0, NULL, false), -EINVAL);
    assert_int_equal(hmm_unpin(77, NULL, false), -EINVAL);
    assert_int_equal(hmm_unpin(UINT64_MAX, NULL, false), -EINVAL);
    assert_false(hmm_may_be_pinned(p, PAGES * page)); /* nothing is left of any of them */
}

static void a_pin_is_ended_once_and_by_its_owner(void **state)
{
    (void)state;
    hmm_pin pin = pin_part(FIRST, LAST, 0);
    assert_int_equal(hmm_unpin(pin, NULL, false), -EPERM);
    assert_true(hmm_may_be_pinned(p + FIRST * page, page));
    assert_int_equal(hmm_unpin(pin, key, false), 0);
    assert_int_equal(hmm_unpin(pin, key, false), -EINVAL);
    hmm_pin other = pin_part(FIRST, LAST, 0); /* in the same slot */
    assert_true(other != pin);
    assert_int_equal(hmm_unpin(pin, key, false), -EINVAL);
    assert_int_equal(hmm_unpin(other, key, false), 0);
}

static void there_is_an_end_to_pins(void **state)
{
    (void)state;
    static hmm_pin pins[65536];
    unsigned n = 0;
    int r;
    while (n < 65536 && (r = hmm_pin_range(p, page, NULL, &pins[n])) == 0)
        n++;
    assert_int_equal(r, -EOVERFLOW);
    assert_int_equal(n, 65535);
    hmm_pin elsewhere, more;
    assert_true(live_map(area + LIVE_BLOCK, page));
    assert_int_equal(hmm_pin_range(area + LIVE_BLOCK, page, NULL, &elsewhere), 0);
    assert_int_equal(hmm_pin_range(area + LIVE_BLOCK, page, NULL, &more), -ENFILE);
    assert_int_equal(hmm_unpin(elsewhere, NULL, false), 0);
    while (n--)
        assert_int_equal(hmm_unpin(pins[n], NULL, false), 0);
    assert_int_equal(to_device(p, PAGES * page).moved, PAGES);
}

static void a_lost_page_cannot_be_pinned(void **state)
{
    (void)state;
    to_device(p, PAGES * page);
    hmm_device_lost(hmm_device_of(dev), HMM_LOST_MEMORY, "the test says so");
    assert_int_equal(try_pin(p, PAGES * page, 0), -EHWPOISON);
    errors_logged = 0; /* that of the loss */
}

static void a_child_has_no_pins(void **state)
{
    (void)state;
    int status;
    hmm_pin pin = pin_part(FIRST, LAST, 0);
    pid_t pid = fork();
    if (pid == 0)
        _exit(hmm_unpin(pin, key, false) == -ESRCH && !hmm_may_be_pinned(p + FIRST * page, page) ? 0 : 1);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    assert_int_equal(hmm_unpin(pin, key, false), 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(a_pinned_page_does_not_leave),
        TEST(what_is_away_comes_home),
        TEST(what_was_never_touched_is_made),
        TEST(where_system_calls_cannot_fault_pages_in_they_are_touched),
        TEST(pages_on_their_way_are_waited_for),
        TEST(a_pin_comes_before_pages_are_taken),
        TEST(a_migration_comes_before_the_pin_has_looked),
        TEST(pins_in_a_storm_of_migrations),
        TEST(what_makes_no_sense_is_refused),
        TEST(a_pin_is_ended_once_and_by_its_owner),
        TEST(there_is_an_end_to_pins),
        TEST(a_lost_page_cannot_be_pinned),
        TEST(a_child_has_no_pins),
    };
    return cmocka_run_group_tests_name("pin", tests, NULL, NULL);
}
