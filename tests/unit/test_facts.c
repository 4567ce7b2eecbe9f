/* SPDX-License-Identifier: MIT */
/* The deep check: on this kernel every fact holds; over a system that behaves differently the fact concerned, and not another,
 * is reported; hanging and dying are results. Skipped where no userfaultfd is permitted. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "common/oracle.h"
#include "inspect/facts.h"
#include "sim/sim.h"

static struct os_ops odd; /* the real system, but for what a test changes */

static int start_real(void **state)
{
    (void)state;
    odd = os_linux;
    os = &os_linux;
    return 0;
}

static bool permitted(void)
{
    struct os_uffd u;

    if (os_linux.uffd_open(OS_UFFD_REQUIRED, &u) < 0) {
        print_message("no userfaultfd is permitted here\n");
        return false;
    }
    os_linux.close(u.fd);
    return !u.user_mode_only;
}

/* ---- the real kernel ---- */

struct tally {
    unsigned items, ok, unseen, missing;
};

/* May stay unseen: races, and what needs swap space, a huge page or locked memory. */
static bool may_be_unseen(const char *name)
{
    static const char *const prefixes[] = {"1:", "5:", "6:", "10:", "19:", "20:", "18: mlockall", "26:"};

    for (size_t i = 0; i < sizeof(prefixes) / sizeof(prefixes[0]); i++)
        if (!strncmp(name, prefixes[i], strlen(prefixes[i])))
            return true;
    return false;
}

static void count_item(const struct hmm_check_item *item, void *arg)
{
    struct tally *t = arg;

    t->items++;
    t->ok += item->status == HMM_CHECK_OK;
    t->missing += item->status == HMM_CHECK_MISSING;
    t->unseen += item->status == HMM_CHECK_NOT_SEEN;
    assert_true(item->status != HMM_CHECK_DEGRADED);
    assert_non_null(strstr(item->detail, "; libhmm: "));
    assert_int_equal(item->remedy[0] != 0, item->status == HMM_CHECK_MISSING);
    if (item->status == HMM_CHECK_NOT_SEEN || item->status == HMM_CHECK_MISSING)
        print_message("    %d %s\n        %s\n", item->status, item->name, item->detail);
    if (item->status == HMM_CHECK_NOT_SEEN && !may_be_unseen(item->name))
        fail_msg("not seen: %s", item->name);
}

static void test_this_kernel(void **state)
{
    struct tally t = {0};
    uint64_t begin = os_now();
    int before = open_descriptors();

    (void)state;
    if (!permitted())
        skip();
    assert_int_equal(hmm_check_deep(count_item, &t), 0);
    assert_int_equal(t.missing, 0);
    assert_int_equal(t.items, t.ok + t.unseen);
    assert_true(t.items >= 20);
    assert_true(os_now() - begin < 20000000000);
    /* Nothing is left: no descriptor, no child. */
    assert_int_equal(open_descriptors(), before);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
    assert_int_equal(facts_run("3:", 3000, NULL, NULL), 0); /* nobody listens */
}

static void test_no_permission(void **state)
{
    struct sim s = sim_complete;
    struct tally t = {0};

    (void)state;
    s.uffd_error = -EPERM;
    sim_start(&s);
    assert_int_equal(hmm_check_deep(count_item, &t), -EPERM);
    assert_non_null(strstr(hmm_last_message(), "/dev/userfaultfd"));
    s.uffd_error = 0;
    s.uffd_absent = UFFD_FEATURE_MOVE;
    sim_start(&s);
    assert_int_equal(hmm_check_deep(count_item, &t), -ENOSYS);
    assert_non_null(strstr(hmm_last_message(), "6.8"));
    s.uffd_error = -EMFILE;
    sim_start(&s);
    assert_int_equal(hmm_check_deep(count_item, &t), -EMFILE);
    assert_non_null(strstr(hmm_last_message(), "EMFILE"));
    assert_int_equal(sim_stop(), 0);
    assert_int_equal(t.items, 0);
}

static void count_check(const struct hmm_check_item *item, void *arg)
{
    assert_true(item->name[0] && item->detail[0]);
    assert_int_equal(item->remedy[0] != 0, item->status == HMM_CHECK_MISSING || item->status == HMM_CHECK_DEGRADED);
    ++*(unsigned *)arg;
}

/* hmm_check() is os_probe() in public words. */
static void test_check(void **state)
{
    struct sim s = sim_complete;
    unsigned items = 0;

    (void)state;
    sim_start(&s);
    assert_int_equal(hmm_check(count_check, &items), 0);
    assert_true(items >= 15);
    assert_string_equal(hmm_last_message(), "");
    s.user_mode_only = true;
    sim_start(&s);
    assert_int_equal(hmm_check(NULL, NULL), 1);
    s.uffd_error = -EPERM;
    sim_start(&s);
    assert_int_equal(hmm_check(count_check, &items), -EPERM);
    assert_non_null(strstr(hmm_last_message(), "userfaultfd"));
    assert_non_null(strstr(hmm_last_message(), "vm.unprivileged_userfaultfd=1"));
    assert_int_equal(sim_stop(), 0);
}

/* ---- systems that behave differently ---- */

static int lie_pending(int uffd)
{
    (void)uffd;
    return 0;
}

static int64_t lie_move(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    (void)uffd, (void)dst, (void)src;
    return (int64_t)len;
}

static int64_t garble_move(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    int64_t r = os_linux.uffd_move(uffd, dst, src, len);

    if (r == (int64_t)len)
        ++*(char *)dst;
    return r;
}

/* A kernel that would lose a page. */
static int64_t lose_page(int uffd, uintptr_t dst, uintptr_t src, size_t len)
{
    int64_t r = os_linux.uffd_move(uffd, dst, src, len);

    if (r > (int64_t)(2 * os_page_size()))
        os_linux.advise((char *)dst + os_page_size(), os_page_size(), OS_ADVISE_DONTNEED);
    return r;
}

/* As if COPY, too, refused what is not writable. */
static int64_t refuse_copy(int uffd, uintptr_t dst, const void *src, size_t len)
{
    struct os_vma v;
    int fd = os_linux.maps_open(), err = os_linux.vma_query(fd, dst, &v);

    os_linux.close(fd);
    return !err && !v.write ? -EINVAL : os_linux.uffd_copy(uffd, dst, src, len);
}

static int64_t copy_later(int uffd, uintptr_t dst, const void *src, size_t len)
{
    (void)uffd, (void)dst, (void)src, (void)len;
    return -EAGAIN;
}

static int keep_files(const int *keep, unsigned n)
{
    (void)keep, (void)n;
    return 0;
}

static int no_advice(void *addr, size_t len, int advice)
{
    return advice == OS_ADVISE_DONTFORK ? 0 : os_linux.advise(addr, len, advice);
}

static int no_populate(void *addr, size_t len, int advice)
{
    return advice == OS_ADVISE_POPULATE_WRITE ? 0 : os_linux.advise(addr, len, advice);
}

static int64_t no_vm_read(uintptr_t addr, void *buf, size_t len)
{
    (void)addr, (void)buf, (void)len;
    return -EFAULT;
}

static int one_block(uintptr_t *tcbs, unsigned max)
{
    return os_linux.thread_blocks(tcbs, max) > 0;
}

static int wrong_blocks(uintptr_t *tcbs, unsigned max)
{
    int n = os_linux.thread_blocks(tcbs, max);

    for (int i = 0; i < n && i < (int)max; i++)
        tcbs[i] += 100 * os_page_size();
    return n;
}

static int plain_map(size_t len, size_t align, unsigned flags, void **out)
{
    void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    (void)align, (void)flags;
    *out = p;
    return p == MAP_FAILED ? -ENOMEM : 0;
}

static int anybody_registers(int uffd, uintptr_t start, size_t len)
{
    int err = os_linux.uffd_register(uffd, start, len);

    return err == -EBUSY ? 0 : err;
}

/* Zeros a page instead of giving it back: what is freed is used again. */
static int reuse(void *addr, size_t len, unsigned flags)
{
    (void)addr, (void)len, (void)flags;
    return 0;
}

static int64_t zeros_for_poison(int uffd, uintptr_t dst, size_t len)
{
    return os_linux.uffd_zeropage(uffd, dst, len);
}

/* The marker goes with the registration. */
static int clean_unregister(int uffd, uintptr_t start, size_t len)
{
    madvise((void *)start, len, MADV_DONTNEED);
    return os_linux.uffd_unregister(uffd, start, len);
}

/* WP is added to what there is. */
static int watch_too(int uffd, uintptr_t start, size_t len)
{
    struct uffdio_register r = {.range = {start, len}, .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP};

    return ioctl(uffd, UFFDIO_REGISTER, &r) < 0 ? -errno : 0;
}

static int watch_all(int uffd, uintptr_t start, size_t len)
{
    (void)uffd, (void)start, (void)len;
    return 0;
}

/* Unmaps are not told of. */
static int no_unmaps(int uffd, struct uffd_msg *msgs, unsigned n)
{
    int got = os_linux.uffd_read(uffd, msgs, n);

    return got > 0 && msgs[0].event == UFFD_EVENT_UNMAP ? 0 : got;
}

static char reported[200], why[512];

static void collect(const struct hmm_check_item *item, void *arg)
{
    (void)arg;
    if (item->status == HMM_CHECK_MISSING) {
        snprintf(reported, sizeof(reported), "%s", item->name);
        snprintf(why, sizeof(why), "%s", item->detail);
    }
}

/* Under the odd system as it stands, this fact is different, for this reason. */
static void expect_different(const char *fact, const char *reason)
{
    reported[0] = why[0] = '\0';
    os = &odd;
    if (facts_run(fact, 3500, collect, NULL) < 1)
        fail_msg("fact %s: nothing was noticed (%s)", fact, reason);
    os = &os_linux;
    if (!strstr(why, reason))
        fail_msg("fact %s: \"%s\" is not about \"%s\"", fact, why, reason);
    odd = os_linux;
}

static void test_differences(void **state)
{
    (void)state;
    if (!permitted())
        skip();
    odd.uffd_move = lie_move;
    expect_different("1:", "MOVE");
    odd.uffd_move = lose_page;
    expect_different("1:", "no place after MOVE");
    odd.uffd_move = lie_move;
    expect_different("2:", "MOVE of a page shared after fork gave");
    odd.advise = no_populate;
    expect_different("2:", "populated");
    odd.remap_fresh = reuse;
    expect_different("3:", "its reader got other data");
    odd.uffd_pending = lie_pending;
    expect_different("4:", "empty WRITEPROTECT");
    odd.uffd_copy = copy_later;
    expect_different("6:", "EAGAIN for a second");
    odd.private_files = keep_files;
    expect_different("8:", "");
    odd.advise = no_advice;
    expect_different("9:", "DONTFORK");
    odd.uffd_copy = refuse_copy;
    expect_different("12:", "COPY into a read-only target gave EINVAL");
    odd.uffd_register = anybody_registers;
    expect_different("16:", "not EBUSY");
    odd.thread_blocks = one_block;
    expect_different("17:", "control blocks");
    odd.thread_blocks = wrong_blocks;
    expect_different("17:", "another page");
    odd.vm_read = no_vm_read;
    expect_different("18: system", "process_vm_readv of a missing page gave EFAULT");
    odd.map = plain_map;
    expect_different("18: mlockall", "filled");
    odd.uffd_move = lie_move;
    expect_different("20:", "huge");
    odd.uffd_poison = zeros_for_poison;
    expect_different("21:", "could be read");
    odd.uffd_unregister = clean_unregister;
    expect_different("21:", "after mremap");
    odd.uffd_watch = watch_too;
    expect_different("22:", "a first touch in WP mode raises a fault");
    odd.uffd_watch = watch_all;
    expect_different("22:", "is not said to be");
    odd.uffd_read = no_unmaps;
    expect_different("23:", "never came");
    odd.uffd_move = garble_move;
    expect_different("24:", "something else");
    odd.uffd_move = garble_move;
    expect_different("25:", "something else");
}

/* The descriptor that comes with the event is the parent's. */
static int parents_descriptor(int uffd, struct uffd_msg *msgs, unsigned n)
{
    int got = os_linux.uffd_read(uffd, msgs, n);

    for (int i = 0; i < got; i++)
        if (msgs[i].event == UFFD_EVENT_FORK)
            msgs[i].arg.fork.ufd = (uint32_t)uffd;
    return got;
}

static int no_fork_event(uint64_t features, struct os_uffd *out)
{
    return features & UFFD_FEATURE_EVENT_FORK ? -EPERM : os_linux.uffd_open(features, out);
}

static void collect_any(const struct hmm_check_item *item, void *arg)
{
    (void)arg;
    snprintf(why, sizeof(why), "%s", item->detail);
}

static void expect_said(const char *fact, const char *words)
{
    int different = facts_run(fact, 3500, collect_any, NULL);

    if (different || !strstr(why, words))
        fail_msg("fact %s: \"%s\" is not about \"%s\"", fact, why, words);
}

/* Without the right to the event that is said, and nothing is different. */
static void test_fork_event(void **state)
{
    struct os_uffd u;
    int err = os_linux.uffd_open(OS_UFFD_REQUIRED | UFFD_FEATURE_EVENT_FORK, &u);

    (void)state;
    if (!permitted())
        skip();
    odd.uffd_open = no_fork_event;
    os = &odd;
    expect_said("26:", "CAP_SYS_PTRACE");
    os = &os_linux;
    odd = os_linux;
    if (err)
        skip();
    os_linux.close(u.fd);
    expect_said("26:", "reached the child");
    odd.uffd_read = parents_descriptor;
    expect_different("26:", "");
}

/* ---- hanging and dying ---- */

static int hang(int uffd, uintptr_t start, size_t len)
{
    (void)uffd, (void)start, (void)len;
    while (os_now())
        os_sleep(1000000000);
    return 0;
}

static int die(int uffd, uintptr_t start, size_t len)
{
    (void)uffd, (void)start, (void)len;
    signal(SIGABRT, SIG_DFL);
    kill(getpid(), SIGABRT);
    return 0;
}

static int leave(int uffd, uintptr_t start, size_t len)
{
    (void)uffd, (void)start, (void)len;
    _exit(0);
}

static void test_hang_and_death(void **state)
{
    uint64_t begin = os_now();

    (void)state;
    if (!permitted())
        skip();
    odd.uffd_register = hang;
    os = &odd;
    assert_int_equal(facts_run("4:", 300, collect, NULL), 1);
    assert_non_null(strstr(why, "hung for 0.3 seconds"));
    assert_true(os_now() - begin >= 300000000 && os_now() - begin < 2000000000);
    odd.uffd_register = die;
    assert_int_equal(facts_run("4:", 3000, collect, NULL), 1);
    assert_non_null(strstr(why, "died of signal 6"));
    odd.uffd_register = leave;
    assert_int_equal(facts_run("4:", 3000, collect, NULL), 1);
    assert_non_null(strstr(why, "without a verdict"));
    os = &os_linux;
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    assert_int_equal(facts_run("no such fact", 3000, collect, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_this_kernel, start_real),    cmocka_unit_test_setup(test_no_permission, start_real),
        cmocka_unit_test_setup(test_check, start_real),          cmocka_unit_test_setup(test_differences, start_real),
        cmocka_unit_test_setup(test_hang_and_death, start_real), cmocka_unit_test_setup(test_fork_event, start_real),
    };

    return cmocka_run_group_tests_name("facts", tests, NULL, NULL);
}
