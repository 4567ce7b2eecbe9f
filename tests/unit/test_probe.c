/* SPDX-License-Identifier: MIT */
/* os_probe() on simulated systems: each that lacks a thing is reported by the name of that thing, with a remedy, and nothing is
 * left open; and on the real one. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/oracle.h"
#include "sim/sim.h"

enum { OK, DEGRADED, MISSING, NOT_SEEN };

#define ITEMS 32

static struct os_check_item items[ITEMS];
static unsigned count;

static void collect(const struct os_check_item *item, void *arg)
{
    assert_ptr_equal(arg, items);
    assert_true(count < ITEMS);
    assert_true(item->detail[0]);
    /* Whoever is told that something is missing is told what to do; who lacks nothing is not. */
    if (item->status == MISSING || item->status == DEGRADED)
        assert_true(item->remedy[0]);
    if (item->status == OK)
        assert_string_equal(item->remedy, "");
    items[count++] = *item;
}

static int probe_on(const struct sim *system)
{
    int result;

    count = 0;
    sim_start(system);
    result = os_probe(collect, items);
    assert_int_equal(sim_stop(), 0);
    return result;
}

static const struct os_check_item *item(const char *name)
{
    for (unsigned i = 0; i < count; i++)
        if (!strcmp(items[i].name, name))
            return &items[i];
    fail_msg("no item \"%s\"", name);
    return NULL;
}

/* All items but those named (ends with NULL) are OK. */
static void assert_rest_ok(const char *const *names)
{
    for (unsigned i = 0; i < count; i++) {
        bool named = false;

        for (unsigned k = 0; names[k]; k++)
            named |= !strcmp(items[i].name, names[k]);
        if (!named && items[i].status != OK)
            fail_msg("%s: status %d, %s", items[i].name, items[i].status, items[i].detail);
    }
}

#define REST_OK(...) assert_rest_ok((const char *const[]){__VA_ARGS__, NULL})

static void test_complete(void **state)
{
    (void)state;
    assert_int_equal(probe_on(&sim_complete), 0);
    assert_rest_ok((const char *const[]){NULL});
    assert_true(count >= 15);
}

static void test_kernel_below_minimum(void **state)
{
    struct sim s = sim_complete;

    (void)state;
    s.version = 6007;
    s.uffd_absent = UFFD_FEATURE_MOVE;
    assert_int_equal(probe_on(&s), -ENOSYS);
    assert_int_equal(item("kernel")->status, MISSING);
    assert_non_null(strstr(item("kernel")->detail, "Linux 6.7"));
    assert_non_null(strstr(item("kernel")->remedy, "6.8"));
    assert_int_equal(item("feature MOVE")->status, MISSING);
    assert_int_equal(item("moving a page")->status, NOT_SEEN);
    REST_OK("kernel", "feature MOVE", "moving a page");
    s = sim_complete;
    s.version = 6008;
    assert_int_equal(probe_on(&s), 0);
    s.version = 5019;
    assert_int_equal(probe_on(&s), -ENOSYS);
    s.version = -EFAULT;
    assert_int_equal(probe_on(&s), 0);
    assert_int_equal(item("kernel")->status, NOT_SEEN);
}

static void test_no_permission(void **state)
{
    struct sim s = sim_complete;

    (void)state;
    s.uffd_error = -EPERM;
    assert_int_equal(probe_on(&s), -EPERM);
    assert_int_equal(item("userfaultfd")->status, MISSING);
    assert_non_null(strstr(item("userfaultfd")->remedy, "/dev/userfaultfd"));
    assert_non_null(strstr(item("userfaultfd")->remedy, "vm.unprivileged_userfaultfd=1"));
    assert_non_null(strstr(item("userfaultfd")->remedy, "CAP_SYS_PTRACE"));
    assert_int_equal(item("feature EVENT_UNMAP")->status, NOT_SEEN);
    assert_int_equal(item("faults inside system calls")->status, NOT_SEEN);
    /* An old kernel is the first reason, whatever else is missing. */
    s.version = 5010;
    assert_int_equal(probe_on(&s), -ENOSYS);
}

static void test_no_userfaultfd(void **state)
{
    struct sim s = sim_complete;

    (void)state;
    s.uffd_error = -ENOSYS;
    assert_int_equal(probe_on(&s), -ENOSYS);
    assert_non_null(strstr(item("userfaultfd")->remedy, "CONFIG_USERFAULTFD"));
    s.uffd_error = -EMFILE;
    assert_true(probe_on(&s) < 0);
    assert_non_null(strstr(item("userfaultfd")->detail, "EMFILE"));
    assert_non_null(strstr(item("userfaultfd")->remedy, "ulimit -n"));
}

static void test_user_mode_only(void **state)
{
    struct sim s = sim_complete;

    (void)state;
    s.user_mode_only = true;
    assert_int_equal(probe_on(&s), 1);
    assert_int_equal(item("faults inside system calls")->status, DEGRADED);
    assert_non_null(strstr(item("faults inside system calls")->detail, "EFAULT"));
    assert_non_null(strstr(item("faults inside system calls")->remedy, "vm.unprivileged_userfaultfd=1"));
    REST_OK("faults inside system calls");
}

static void test_each_feature(void **state)
{
    static const struct {
        uint64_t bit;
        const char *name;
    } f[] = {
        {UFFD_FEATURE_EVENT_REMOVE, "feature EVENT_REMOVE"},
        {UFFD_FEATURE_EVENT_UNMAP, "feature EVENT_UNMAP"},
        {UFFD_FEATURE_EVENT_REMAP, "feature EVENT_REMAP"},
        {UFFD_FEATURE_THREAD_ID, "feature THREAD_ID"},
        {UFFD_FEATURE_POISON, "feature POISON"},
        {UFFD_FEATURE_MOVE, "feature MOVE"},
    };
    uint64_t all = 0;

    (void)state;
    for (unsigned i = 0; i < sizeof(f) / sizeof(f[0]); i++) {
        struct sim s = sim_complete;

        s.uffd_absent = f[i].bit;
        assert_int_equal(probe_on(&s), -ENOSYS);
        assert_int_equal(item(f[i].name)->status, MISSING);
        REST_OK(f[i].name, "moving a page");
        all |= f[i].bit;
    }
    assert_int_equal(all, OS_UFFD_REQUIRED);
}

static void test_move_fails(void **state)
{
    struct sim s = sim_complete;

    (void)state;
    s.move_result = -EPERM;
    assert_int_equal(probe_on(&s), -EPERM);
    assert_int_equal(item("moving a page")->status, MISSING);
    s.move_result = 1; /* part of a page: nonsense */
    assert_int_equal(probe_on(&s), -ENOSYS);
    s = sim_complete;
    s.move_lies = true;
    assert_int_equal(probe_on(&s), -ENOSYS);
    assert_non_null(strstr(item("moving a page")->detail, "EIO"));
    s = sim_complete;
    s.register_error = -EPERM;
    assert_int_equal(probe_on(&s), -EPERM);
    REST_OK("moving a page");
}

/* Calls without which nothing works. */
static void test_calls_missing(void **state)
{
    struct sim s = sim_complete;

    (void)state;
    s.scan_error = -ENOTTY;
    assert_int_equal(probe_on(&s), -ENOSYS);
    assert_int_equal(item("PAGEMAP_SCAN")->status, MISSING);
    REST_OK("PAGEMAP_SCAN");
    s = sim_complete;
    s.pagemap_error = -EACCES;
    assert_int_equal(probe_on(&s), -EPERM);
    REST_OK("PAGEMAP_SCAN");
    s = sim_complete;
    s.vm_error = -EPERM;
    assert_int_equal(probe_on(&s), -EPERM);
    assert_non_null(strstr(item("process_vm_readv")->remedy, "seccomp"));
    REST_OK("process_vm_readv");
    s = sim_complete;
    s.threads = 0;
    assert_int_equal(probe_on(&s), -ENOSYS);
    REST_OK("get_robust_list");
    s = sim_complete;
    s.maps_error = -ENOENT;
    assert_int_equal(probe_on(&s), -ENOSYS);
    assert_int_equal(item("PROCMAP_QUERY")->status, MISSING);
    s = sim_complete;
    s.vma_error = -EIO;
    assert_int_equal(probe_on(&s), -ENOSYS);
    REST_OK("PROCMAP_QUERY");
}

/* What only makes it slower, or leaves some pages where they are. */
static void test_degraded(void **state)
{
    struct sim s = sim_complete;

    (void)state;
    s.vma_slow = true;
    assert_int_equal(probe_on(&s), 1);
    assert_int_equal(item("PROCMAP_QUERY")->status, DEGRADED);
    assert_non_null(strstr(item("PROCMAP_QUERY")->remedy, "6.11"));
    REST_OK("PROCMAP_QUERY");
    s = sim_complete;
    s.populate_error = -EINVAL;
    assert_int_equal(probe_on(&s), 1);
    assert_int_equal(item("MADV_POPULATE_WRITE")->status, DEGRADED);
    REST_OK("MADV_POPULATE_WRITE");
    s = sim_complete;
    s.thp = "always madvise [never]";
    assert_int_equal(probe_on(&s), 1);
    assert_non_null(strstr(item("transparent huge pages")->remedy, "madvise"));
    s.thp = NULL;
    assert_int_equal(probe_on(&s), 1);
    REST_OK("transparent huge pages");
    s = sim_complete;
    s.map_count = "1024";
    assert_int_equal(probe_on(&s), 1);
    assert_non_null(strstr(item("vm.max_map_count")->detail, "1024"));
    s.map_count = NULL;
    assert_int_equal(probe_on(&s), 0);
    assert_int_equal(item("vm.max_map_count")->status, NOT_SEEN);
}

static void test_no_memory(void **state)
{
    struct sim s = sim_complete;

    (void)state;
    s.map_error = -ENOMEM;
    assert_true(probe_on(&s) < 0);
    assert_int_equal(item("PAGEMAP_SCAN")->status, MISSING);
    assert_int_equal(item("moving a page")->status, NOT_SEEN);
}

/* The machine that runs the test: the result agrees with the items, and the descriptors with what was open before. */
static void test_real(void **state)
{
    int before = open_descriptors(), result;
    bool missing = false, degraded = false;

    (void)state;
    count = 0;
    result = os_probe(collect, items);
    for (unsigned i = 0; i < count; i++) {
        missing |= items[i].status == MISSING;
        degraded |= items[i].status == DEGRADED;
        print_message("    %-28s %d %s\n", items[i].name, items[i].status, items[i].detail);
    }
    assert_int_equal(result < 0, missing);
    if (result >= 0)
        assert_int_equal(result, degraded);
    assert_int_equal(open_descriptors(), before);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_complete),       cmocka_unit_test(test_kernel_below_minimum),
        cmocka_unit_test(test_no_permission),  cmocka_unit_test(test_no_userfaultfd),
        cmocka_unit_test(test_user_mode_only), cmocka_unit_test(test_each_feature),
        cmocka_unit_test(test_move_fails),     cmocka_unit_test(test_calls_missing),
        cmocka_unit_test(test_degraded),       cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_real),
    };

    return cmocka_run_group_tests_name("probe", tests, NULL, NULL);
}
