/* SPDX-License-Identifier: MIT */
/*
 * What a child of fork is to get when events come out of order: an unmap that a remap has overtaken takes nothing of what was moved there
 * (kernel facts 7 and 23), and of two things that stood at one place the older is the child's. Messages are made up; places are staging slots, which count who holds them.
 */
#include <errno.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "live.h"
#include "mem_source.h"
#include "process/gather.h"
#include "process/heirs.h"

#define BASE ((uintptr_t)1 << 30)
#define SLOTS ((uintptr_t)1 << 40)
#define MESSAGES 8
#define MANY 65536u

static struct mm mm;
static struct os_ops told;
static struct heir heir;
static int64_t held;
static struct uffd_msg messages[MESSAGES];
static unsigned n_messages, n_errors;
static char last_error[512];
static int pending; /* events that are not told yet */

static void keep(uintptr_t addr, uint64_t pages)
{
    (void)addr;
    held += (int64_t)pages;
}

static void drop(uintptr_t addr, uint64_t pages)
{
    (void)addr;
    held -= (int64_t)pages;
}

static int read_messages(int uffd, struct uffd_msg *m, unsigned n)
{
    unsigned got = n_messages;
    (void)uffd;
    assert_true(got <= n);
    memcpy(m, messages, got * sizeof(*m));
    n_messages = 0;
    return (int)got;
}

static int more_pending(int uffd)
{
    (void)uffd;
    return n_messages > 0 || pending;
}

static uintptr_t at(unsigned page)
{
    return BASE + page * os_page_size();
}

static void count_errors(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    n_errors += level == HMM_LOG_ERROR;
    snprintf(last_error, sizeof(last_error), "%s", line);
}

static int set_up(void **state)
{
    (void)state;
    source_start();
    memset(&mm, 0, sizeof(mm));
    memset(&heir, 0, sizeof(heir));
    mm.slot_keep = keep;
    mm.slot_drop = drop;
    held = 0;
    n_messages = n_errors = 0;
    pending = 0;
    told = os_linux;
    told.uffd_read = read_messages;
    told.uffd_pending = more_pending;
    os = &told;
    hmm_set_log(count_errors, NULL);
    heir.mm = &mm;
    estate_init(&heir.estate, &mm, NULL);
    return pagetable_init(&mm.pt);
}

static int tear_down(void **state)
{
    (void)state;
    estate_free(&heir.estate);
    regions_exit(&heir.known);
    pagetable_exit(&mm.pt);
    hmm_set_log(NULL, NULL);
    os = &os_linux;
    int left = mem_used() != 0 || held != 0;
    mem_exit();
    return left;
}

static void registered(unsigned first, unsigned end)
{
    struct regions rs = {0};
    region_insert_must(&rs, at(first), at(end), true, REGION_PROVED);
    follow_regions(&heir, &rs);
    regions_exit(&rs);
}

/* Pages [first, end) are still to be filled. */
static void wanted(unsigned first, unsigned end)
{
    for (unsigned i = first; i < end; i++)
        estate_add(&heir.estate,
                   (struct estate_run){.addr = at(i), .source = SLOTS + i * os_page_size(), .pages = 1, .range = ESTATE_QUIET});
}

static void unmap(unsigned first, unsigned end)
{
    struct uffd_msg *m = &messages[n_messages++];
    *m = (struct uffd_msg){.event = UFFD_EVENT_UNMAP};
    m->arg.remove.start = at(first);
    m->arg.remove.end = at(end);
}

static void remap(unsigned from, unsigned to, unsigned pages)
{
    struct uffd_msg *m = &messages[n_messages++];
    *m = (struct uffd_msg){.event = UFFD_EVENT_REMAP};
    m->arg.remap.from = at(from);
    m->arg.remap.to = at(to);
    m->arg.remap.len = pages * os_page_size();
}

/* Where page i gets its bytes from, as the page that it was; -1: nowhere. */
static int origin(unsigned i)
{
    size_t k = estate_find(&heir.estate, at(i));
    return k < heir.estate.n ? (int)((heir.estate.v[k].source - SLOTS) / os_page_size()) : -1;
}

static void what_moves_to_where_another_has_left_stays(void **state)
{
    (void)state;
    registered(0, 8);
    registered(16, 24);
    wanted(0, 24);
    remap(0, 32, 8);
    remap(16, 0, 8); /* before the unmap of what the first leaves */
    unmap(0, 8);
    unmap(16, 24);
    follow_child(&heir);
    assert_int_equal(origin(0), 16);
    assert_int_equal(origin(7), 23);
    assert_int_equal(origin(32), 0);
    assert_int_equal(origin(16), -1);
    unmap(0, 8); /* and this is its own */
    follow_child(&heir);
    assert_int_equal(origin(0), -1);
}

/* Nor does it matter that what stood there is filled. */
static void what_moves_to_what_is_unmapped_stays(void **state)
{
    (void)state;
    registered(0, 8);
    registered(16, 24);
    wanted(16, 24);
    remap(16, 0, 8);
    unmap(0, 8);
    unmap(16, 24);
    follow_child(&heir);
    assert_int_equal(origin(3), 19);
}

/* An unmap of several things. */
static void an_unmap_heeds_every_debt(void **state)
{
    (void)state;
    registered(10, 20);
    registered(5, 8);
    registered(40, 60);
    wanted(0, 60);
    remap(40, 10, 10);
    remap(50, 5, 3);
    unmap(0, 30);
    follow_child(&heir);
    assert_int_equal(origin(4), -1);
    assert_int_equal(origin(5), 50);
    assert_int_equal(origin(7), 52);
    assert_int_equal(origin(8), -1);
    assert_int_equal(origin(10), 40);
    assert_int_equal(origin(19), 49);
    assert_int_equal(origin(20), -1);
    assert_int_equal(n_errors, 0);
}

/* It is told as a whole, of which only a part was registered, or is known to be. */
static void an_unmap_of_what_was_not_registered_is_owed(void **state)
{
    (void)state;
    registered(2, 4);
    registered(16, 24);
    wanted(2, 4);
    wanted(16, 24);
    remap(16, 0, 8);
    unmap(0, 8);
    unmap(16, 24);
    follow_child(&heir);
    for (unsigned i = 0; i < 8; i++)
        assert_int_equal(origin(i), 16 + (int)i);
}

/* What is left of a debt when nothing is pending was never owed, as where MREMAP_DONTUNMAP has left something, or the parent a remap. */
static void a_debt_ends_with_the_events(void **state)
{
    (void)state;
    registered(0, 8);
    registered(16, 24);
    wanted(0, 24);
    remap(0, 32, 8);
    follow_child(&heir);
    remap(16, 0, 8);
    follow_child(&heir);
    unmap(0, 4);
    follow_child(&heir);
    assert_int_equal(origin(3), -1);
    assert_int_equal(origin(4), 20);
}

/* One that is told in order is no debt. */
static void an_unmap_in_order_owes_nothing(void **state)
{
    (void)state;
    registered(0, 8);
    registered(16, 24);
    wanted(0, 24);
    unmap(0, 8);
    remap(16, 0, 8);
    unmap(16, 24);
    unmap(0, 4);
    follow_child(&heir);
    assert_int_equal(origin(3), -1);
    assert_int_equal(origin(4), 20);
}

static void too_many_debts_are_said(void **state)
{
    (void)state;
    pending = 1;
    for (unsigned i = 0; i <= DEBTS; i++) {
        registered(2 * i, 2 * i + 1);
        remap(100, 2 * i, 1);
        follow_child(&heir);
    }
    assert_int_equal(n_errors, 1);
}

/* ---- what cannot be given ---- */

static int64_t refused; /* what the child's userfaultfd answers to poison */
static unsigned refusals;

static int64_t no_copy(int uffd, uintptr_t dst, const void *src, size_t len)
{
    (void)uffd, (void)dst, (void)src, (void)len;
    return -EFAULT;
}

static int64_t poison_or_refuse(int uffd, uintptr_t dst, size_t len)
{
    (void)uffd, (void)dst;
    if (!refusals)
        return (int64_t)len;
    refusals--;
    return refused;
}

static int wake_nobody(int uffd, uintptr_t start, size_t len)
{
    (void)uffd, (void)start, (void)len;
    return 0;
}

/* Page 0 is wanted, and has not been given for long. */
static void fail_for_long(void)
{
    static struct heir_board board;
    heirs.board = &board;
    told.uffd_copy = no_copy;
    told.uffd_poison = poison_or_refuse;
    told.uffd_wake = wake_nobody;
    wanted(0, 1);
    heir.chunk = 1;
    heir.failing_since = 1;
}

/* The child has unmapped it meanwhile, or ended: whoever fills it does not go round for ever. */
static void a_page_that_is_given_up_ends_whatever_the_kernel_says(void **state)
{
    static const struct {
        int64_t refused;
        int result;
        uint64_t left;
        unsigned errors;
    } cases[] = {{-ENOENT, 0, 0, 0},       {-EEXIST, 0, 0, 0},     {-EAGAIN, -EAGAIN, 1, 0},
                 {-ENOMEM, -EAGAIN, 1, 0}, {-ESRCH, -ESRCH, 1, 0}, {4096, 0, 0, 1}};
    (void)state;
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        n_errors = 0;
        fail_for_long();
        refused = cases[i].refused;
        refusals = UINT_MAX;
        assert_int_equal(fill_slice(&heir), cases[i].result);
        assert_int_equal(heir.estate.pages, cases[i].left);
        assert_int_equal(n_errors, cases[i].errors);
        estate_free(&heir.estate);
    }
}

/* At the end: an event of a child that runs is over soon. */
static void what_is_left_is_poisoned_when_the_event_is_over(void **state)
{
    (void)state;
    fail_for_long();
    wanted(4, 12);
    refused = -EAGAIN;
    refusals = 3;
    fill_poison_rest(&heir);
    assert_int_equal(heir.estate.pages, 0);
    assert_int_equal(refusals, 0);
    assert_non_null(strstr(last_error, " 9 pages"));
    assert_non_null(strstr(last_error, "but for 0 that"));
    wanted(4, 12);
    refusals = UINT_MAX;
    fill_poison_rest(&heir);
    assert_non_null(strstr(last_error, "but for 8 that"));
}

/* What came away from one place twice: the first is the child's, whatever it touches first. */
static void no_page_is_given_twice(void **state)
{
    struct estate came[2], *later = &came[1];
    (void)state;
    wanted(4, 8);
    wanted(20, 22);
    came[0] = heir.estate;
    estate_init(&heir.estate, &mm, NULL);
    estate_init(later, &mm, NULL);
    for (unsigned i = 0; i < 24; i++)
        estate_add(later, (struct estate_run){
                              .addr = at(i), .source = SLOTS + (100 + i) * os_page_size(), .pages = 1, .range = ESTATE_QUIET});
    estate_add(later, (struct estate_run){.addr = at(2), .source = SLOTS, .pages = 1, .range = ESTATE_QUIET});
    gather(&heir.estate, came, 2);
    estate_free(&came[0]);
    estate_free(later);
    assert_int_equal(heir.estate.pages, 24);
    for (unsigned i = 0; i < 24; i++)
        assert_int_equal(origin(i), (i >= 4 && i < 8) || i == 20 || i == 21 ? i : 100 + i);
}

/* All faults wait meanwhile: 512 MiB that were dropped, of which every other page was away, twice. */
static void many_runs_are_gathered_in_time(void **state)
{
    struct estate both[2];
    struct timespec from, to;
    (void)state;
    estate_init(&both[0], &mm, NULL);
    estate_init(&both[1], &mm, NULL);
    for (unsigned i = 0; i < MANY; i++) {
        estate_add(&both[0],
                   (struct estate_run){.addr = at(2 * i), .source = SLOTS + at(2 * i), .pages = 1, .range = ESTATE_QUIET});
        estate_add(&both[1],
                   (struct estate_run){.addr = at(2 * i), .source = SLOTS + at(2 * i + 1), .pages = 2, .range = ESTATE_QUIET});
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
    gather(&heir.estate, both, 2);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
    estate_free(&both[0]);
    estate_free(&both[1]);
    assert_int_equal(heir.estate.pages, 2 * MANY);
    int64_t ms = (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000;
    if (ms > 2000)
        fail_msg("%u runs took %lld ms", 2 * MANY, (long long)ms);
    print_message("%u runs took %lld ms\n", 2 * MANY, (long long)ms);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(what_moves_to_where_another_has_left_stays),
        TEST(what_moves_to_what_is_unmapped_stays),
        TEST(an_unmap_heeds_every_debt),
        TEST(an_unmap_of_what_was_not_registered_is_owed),
        TEST(a_debt_ends_with_the_events),
        TEST(an_unmap_in_order_owes_nothing),
        TEST(too_many_debts_are_said),
        TEST(a_page_that_is_given_up_ends_whatever_the_kernel_says),
        TEST(what_is_left_is_poisoned_when_the_event_is_over),
        TEST(no_page_is_given_twice),
        TEST(many_runs_are_gathered_in_time),
    };
    return cmocka_run_group_tests_name("what a child does while it is filled", tests, NULL, NULL);
}
