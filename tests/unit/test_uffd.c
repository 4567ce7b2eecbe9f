/* SPDX-License-Identifier: MIT */
/* The userfaultfd operations of os_linux on the running kernel, each against its contract in os/os.h. Skipped where the system
 * permits no userfaultfd. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "common/oracle.h"
#include "os/linux.h"

#define PAGE os_page_size()

/* In a child: failures are told by line, cmocka's asserts belong to the parent. */
#define CHILD_CHECK(x)                                                                                                         \
    do {                                                                                                                       \
        if (!(x)) {                                                                                                            \
            dprintf(2, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #x, errno);                                               \
            _exit(1);                                                                                                          \
        }                                                                                                                      \
    } while (0)

static struct os_uffd u;

static int open_it(void **state)
{
    (void)state;
    if (os->uffd_open(OS_UFFD_REQUIRED, &u) < 0)
        u.fd = -1;
    return 0;
}

static int close_it(void **state)
{
    (void)state;
    if (u.fd >= 0)
        os->close(u.fd);
    return 0;
}

#define NEED_UFFD()                                                                                                            \
    do {                                                                                                                       \
        (void)state;                                                                                                           \
        if (u.fd < 0) {                                                                                                        \
            print_message("no userfaultfd is permitted here\n");                                                               \
            skip();                                                                                                            \
        }                                                                                                                      \
    } while (0)

/* n pages of own memory; registered when the test is about filling them. */
static char *area(size_t n, bool registered)
{
    void *p;

    assert_int_equal(os->map(n * PAGE, PAGE, OS_MAP_NOHUGE, &p), 0);
    if (registered)
        assert_int_equal(os->uffd_register(u.fd, (uintptr_t)p, n * PAGE), 0);
    return p;
}

static void area_free(char *p, size_t n)
{
    os->uffd_unregister(u.fd, (uintptr_t)p, n * PAGE);
    assert_int_equal(os->unmap(p, n * PAGE), 0);
}

/* Bit per page that is present. */
static unsigned present(const char *p, size_t pages)
{
    struct os_region r[32];
    uintptr_t walked, start = (uintptr_t)p;
    int fd = os->pagemap_open();
    int n = os->pagemap_scan(fd, start, start + pages * PAGE, r, 32, &walked);
    unsigned bits = 0;

    os->close(fd);
    assert_true(n >= 0);
    for (int i = 0; i < n; i++)
        for (uintptr_t at = r[i].start; at < r[i].end; at += PAGE)
            bits |= 1u << (at - start) / PAGE;
    return bits;
}

/* ---- opening ---- */

static void test_open(void **state)
{
    struct os_uffd other, untouched;
    int before;

    NEED_UFFD();
    assert_true((u.features & OS_UFFD_REQUIRED) == OS_UFFD_REQUIRED);
    assert_non_null(u.route);
    assert_int_equal(u.user_mode_only, strstr(u.route, "user-mode-only") != NULL);
    assert_true(fcntl(u.fd, F_GETFD) & FD_CLOEXEC);
    assert_true(fcntl(u.fd, F_GETFL) & O_NONBLOCK);
    /* A feature that no kernel has: refused, nothing written, nothing left open. */
    before = open_descriptors();
    memset(&other, 0x77, sizeof(other));
    untouched = other;
    assert_int_equal(os->uffd_open((uint64_t)1 << 60, &other), -EINVAL);
    assert_memory_equal(&other, &untouched, sizeof(other));
    /* Without features: says what there is. */
    assert_int_equal(os->uffd_open(0, &other), 0);
    assert_int_equal(other.features, u.features);
    os->close(other.fd);
    assert_int_equal(open_descriptors(), before);
}

/* From here on userfaultfd(2) answers with this error, to calls without any of the flags in `except`. */
static void forbid_call(int error)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog prog = {sizeof(code) / sizeof(code[0]), code};

    CHILD_CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHILD_CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog) == 0);
}

static void become_nobody(void)
{
    if (getuid() == 0)
        CHILD_CHECK(setgid(65534) == 0 && setuid(65534) == 0);
}

/* A user without rights: faults of user mode only, unless the administrator gave more. */
static void child_unprivileged(void)
{
    struct os_uffd n;
    char text[8] = "";
    bool all = os->read_text("/proc/sys/vm/unprivileged_userfaultfd", text, sizeof(text)) > 0 && text[0] == '1';

    become_nobody();
    if (access("/dev/userfaultfd", R_OK | W_OK) == 0)
        return;
    CHILD_CHECK(os->uffd_open(OS_UFFD_REQUIRED, &n) == 0);
    CHILD_CHECK(n.user_mode_only == !all);
    CHILD_CHECK(!strcmp(n.route, all ? "userfaultfd(2)" : "userfaultfd(2) user-mode-only"));
}

static void child_forbidden(void)
{
    struct os_uffd n;

    become_nobody();
    if (access("/dev/userfaultfd", R_OK | W_OK) == 0)
        return;
    forbid_call(EPERM);
    CHILD_CHECK(os->uffd_open(OS_UFFD_REQUIRED, &n) == -EPERM);
}

static void child_no_such_call(void)
{
    struct os_uffd n;

    become_nobody();
    if (access("/dev/userfaultfd", R_OK | W_OK) == 0)
        return;
    forbid_call(ENOSYS);
    CHILD_CHECK(os->uffd_open(OS_UFFD_REQUIRED, &n) == -ENOSYS);
}

/* Errors that are not about rights are told as they are. */
static void child_no_descriptors(void)
{
    struct os_uffd n;

    while (os->event_open() >= 0)
        ;
    CHILD_CHECK(os->uffd_open(OS_UFFD_REQUIRED, &n) == -EMFILE);
}

/* The device makes no difference to what the call permits. */
static void child_device_only(void)
{
    struct os_uffd n;
    int err;

    if (access("/dev/userfaultfd", R_OK | W_OK) != 0)
        return;
    forbid_call(EPERM);
    err = os->uffd_open(OS_UFFD_REQUIRED, &n);
    CHILD_CHECK(err == 0 && !strcmp(n.route, "/dev/userfaultfd") && !n.user_mode_only);
}

static void test_routes(void **state)
{
    void (*const children[])(void) = {child_unprivileged, child_forbidden, child_no_such_call, child_no_descriptors,
                                      child_device_only};

    (void)state;
    for (unsigned i = 0; i < sizeof(children) / sizeof(children[0]); i++) {
        pid_t pid = fork();
        int status;

        if (!pid) {
            alarm(10);
            children[i]();
            _exit(0);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(status, 0);
    }
}

/* ---- registering and filling ---- */

static void test_register(void **state)
{
    char *p;
    struct os_uffd other;

    NEED_UFFD();
    p = area(4, true);
    assert_int_equal(os->uffd_register(u.fd, (uintptr_t)p, 4 * PAGE), 0); /* again: nothing happens */
    assert_int_equal(os->uffd_open(OS_UFFD_REQUIRED, &other), 0);
    assert_int_equal(os->uffd_register(other.fd, (uintptr_t)p, PAGE), -EBUSY);
    os->close(other.fd);
    assert_int_equal(os->uffd_register(u.fd, (uintptr_t)p + 1, PAGE), -EINVAL);
    assert_int_equal(os->uffd_register(u.fd, (uintptr_t)p, 0), -EINVAL);
    assert_int_equal(os->uffd_unregister(u.fd, (uintptr_t)p, 4 * PAGE), 0);
    assert_true(all_bytes(p, 0, 4 * PAGE)); /* missing pages are zeros again */
    area_free(p, 4);
    assert_int_equal(os->uffd_register(u.fd, (uintptr_t)p, PAGE), -EINVAL); /* nothing there */
}

static void test_copy(void **state)
{
    char *p, *src;

    NEED_UFFD();
    p = area(8, true);
    src = area(8, false);
    memset(src, 'c', 8 * PAGE);
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)p + 4 * PAGE, src, PAGE), PAGE);
    assert_true(all_bytes(p + 4 * PAGE, 'c', PAGE));
    /* Up to the page that is there already: short; on it: EEXIST. */
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)p + PAGE, src, 7 * PAGE), 3 * PAGE);
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)p + 4 * PAGE, src, 2 * PAGE), -EEXIST);
    assert_int_equal(present(p, 8), 0x1e);
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)p, NULL, PAGE), -EFAULT);
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)src, p + PAGE, PAGE), -ENOENT);
    assert_int_equal(present(p, 8), 0x1e);
    area_free(src, 8);
    area_free(p, 8);
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)p, "x", PAGE), -ENOENT);
}

static void test_zeropage(void **state)
{
    char *p;

    NEED_UFFD();
    p = area(4, true);
    assert_int_equal(os->uffd_zeropage(u.fd, (uintptr_t)p + 2 * PAGE, PAGE), PAGE);
    assert_int_equal(os->uffd_zeropage(u.fd, (uintptr_t)p, 4 * PAGE), 2 * PAGE);
    assert_int_equal(os->uffd_zeropage(u.fd, (uintptr_t)p, PAGE), -EEXIST);
    assert_true(all_bytes(p, 0, 3 * PAGE));
    assert_int_equal(present(p, 4), 7);
    area_free(p, 4);
    p = area(1, false);
    assert_int_equal(os->uffd_zeropage(u.fd, (uintptr_t)p, PAGE), -ENOENT);
    area_free(p, 1);
}

static void test_move(void **state)
{
    char *p, *src;

    NEED_UFFD();
    p = area(8, true);
    src = area(8, false);
    for (int i = 0; i < 8; i++)
        memset(src + i * PAGE, 'm' + i, PAGE);
    assert_int_equal(os->uffd_move(u.fd, (uintptr_t)p, (uintptr_t)src, 4 * PAGE), 4 * PAGE);
    assert_int_equal(present(p, 8), 0x0f);
    assert_int_equal(present(src, 8), 0xf0);
    for (int i = 0; i < 4; i++)
        assert_true(all_bytes(p + i * PAGE, 'm' + i, PAGE));
    assert_int_equal(os->uffd_move(u.fd, (uintptr_t)p, (uintptr_t)src + 4 * PAGE, PAGE), -EEXIST);
    assert_int_equal(os->uffd_move(u.fd, (uintptr_t)p + 4 * PAGE, (uintptr_t)src, PAGE), -ENOENT); /* source missing */
    assert_int_equal(present(src, 8), 0xf0);
    /* Not registered: what errors of it there are is the kernel's choice, but nothing may move. */
    assert_true(os->uffd_move(u.fd, (uintptr_t)src, (uintptr_t)p, PAGE) < 0);
    assert_int_equal(present(p, 8), 0x0f);
    assert_int_equal(mprotect(src + 4 * PAGE, PAGE, PROT_READ), 0);
    assert_int_equal(os->uffd_move(u.fd, (uintptr_t)p + 4 * PAGE, (uintptr_t)src + 4 * PAGE, PAGE), -EINVAL);
    area_free(src, 8);
    area_free(p, 8);
}

static void test_poison(void **state)
{
    char *p, *src;
    char byte;

    NEED_UFFD();
    p = area(4, true);
    src = area(1, false);
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)p + 2 * PAGE, src, PAGE), PAGE);
    /* Up to the page that is there: short; on it, and on one that is poisoned: EEXIST. */
    assert_int_equal(os->uffd_poison(u.fd, (uintptr_t)p, 4 * PAGE), 2 * PAGE);
    assert_int_equal(os->uffd_poison(u.fd, (uintptr_t)p + 2 * PAGE, PAGE), -EEXIST);
    assert_int_equal(os->uffd_poison(u.fd, (uintptr_t)p, PAGE), -EEXIST);
    assert_int_equal(os->vm_read((uintptr_t)p, &byte, 1), -EFAULT);
    assert_int_equal(os->vm_read((uintptr_t)p + 2 * PAGE, &byte, 1), 1);
    assert_int_equal(os->uffd_zeropage(u.fd, (uintptr_t)p, PAGE), -EEXIST);
    assert_int_equal(present(p, 4), 7); /* the marker looks like a swapped page */
    assert_int_equal(os->uffd_poison(u.fd, (uintptr_t)src, PAGE), -ENOENT);
    area_free(src, 1);
    area_free(p, 4);
}

/* ---- faults ---- */

struct toucher {
    volatile char *at;
    char value;
    pid_t tid;
};

static void *touch(void *arg)
{
    struct toucher *t = arg;

    __atomic_store_n(&t->tid, os_tid(), __ATOMIC_RELEASE);
    __atomic_store_n(&t->value, *t->at, __ATOMIC_RELEASE);
    return NULL;
}

static void test_fault(void **state)
{
    struct uffd_msg msg[4];
    struct toucher t = {0};
    pthread_t thread;
    char *p, *src;

    NEED_UFFD();
    p = area(2, true);
    src = area(1, false);
    memset(src, 'f', PAGE);
    assert_int_equal(os->uffd_read(u.fd, msg, 4), 0); /* none: does not wait */
    assert_int_equal(os->poll(&u.fd, 1, 0), 0);
    t.at = p + PAGE + 5;
    assert_int_equal(pthread_create(&thread, NULL, touch, &t), 0);
    assert_int_equal(os->poll(&u.fd, 1, 10000), 1);
    assert_int_equal(os->uffd_read(u.fd, msg, 4), 1);
    assert_int_equal(msg[0].event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(msg[0].arg.pagefault.address & ~(PAGE - 1), (uintptr_t)p + PAGE);
    assert_int_equal(msg[0].arg.pagefault.feat.ptid, __atomic_load_n(&t.tid, __ATOMIC_ACQUIRE));
    /* The copy wakes nobody; that is the next call's work. */
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)p + PAGE, src, PAGE), PAGE);
    os_sleep(2000000);
    assert_int_equal(__atomic_load_n(&t.value, __ATOMIC_ACQUIRE), 0);
    assert_int_equal(os->uffd_wake(u.fd, (uintptr_t)p + PAGE, PAGE), 0);
    pthread_join(thread, NULL);
    assert_int_equal(t.value, 'f');
    assert_int_equal(os->uffd_wake(u.fd, (uintptr_t)p, 2 * PAGE), 0); /* nobody */
    area_free(src, 1);
    area_free(p, 2);
}

/* ---- events ---- */

static void *drop(void *p)
{
    madvise(p, PAGE, MADV_DONTNEED);
    return NULL;
}

static void test_pending(void **state)
{
    struct uffd_msg msg;
    pthread_t thread;
    char *p, *src, *q;

    NEED_UFFD();
    p = area(2, true);
    q = area(1, true);
    src = area(1, false);
    *src = 'e';
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)p, src, PAGE), PAGE);
    assert_int_equal(os->uffd_pending(u.fd), 0);
    assert_int_equal(pthread_create(&thread, NULL, drop, p), 0);
    assert_int_equal(os->poll(&u.fd, 1, 10000), 1);
    /* The caller of madvise waits for us: nothing can be filled, anywhere, and nothing is. */
    assert_int_equal(os->uffd_pending(u.fd), 1);
    assert_int_equal(os->uffd_copy(u.fd, (uintptr_t)q, src, PAGE), -EAGAIN);
    assert_int_equal(os->uffd_zeropage(u.fd, (uintptr_t)q, PAGE), -EAGAIN);
    assert_int_equal(os->uffd_poison(u.fd, (uintptr_t)q, PAGE), -EAGAIN);
    assert_int_equal(os->uffd_move(u.fd, (uintptr_t)q, (uintptr_t)src, PAGE), -EAGAIN);
    assert_int_equal(present(q, 1), 0);
    assert_int_equal(present(p, 1), 1);
    assert_int_equal(os->uffd_read(u.fd, &msg, 1), 1);
    assert_int_equal(msg.event, UFFD_EVENT_REMOVE);
    assert_int_equal(msg.arg.remove.start, (uintptr_t)p);
    assert_int_equal(msg.arg.remove.end, (uintptr_t)p + PAGE);
    pthread_join(thread, NULL);
    assert_int_equal(os->uffd_pending(u.fd), 0);
    assert_int_equal(os->uffd_move(u.fd, (uintptr_t)q, (uintptr_t)src, PAGE), PAGE);
    assert_int_equal(*q, 'e');
    area_free(src, 1);
    area_free(q, 1);
    area_free(p, 2);
}

static void test_bad_descriptor(void **state)
{
    struct uffd_msg msg;
    char *p;
    int fd = os->event_open();

    NEED_UFFD();
    p = area(1, false);
    for (int i = 0; i < 2; i++) {
        int bad = i ? fd : -1;

        assert_true(os->uffd_register(bad, (uintptr_t)p, PAGE) < 0);
        assert_true(os->uffd_unregister(bad, (uintptr_t)p, PAGE) < 0);
        assert_true(os->uffd_copy(bad, (uintptr_t)p, p, PAGE) < 0);
        assert_true(os->uffd_move(bad, (uintptr_t)p, (uintptr_t)p, PAGE) < 0);
        assert_true(os->uffd_poison(bad, (uintptr_t)p, PAGE) < 0);
        assert_true(os->uffd_zeropage(bad, (uintptr_t)p, PAGE) < 0);
        assert_true(os->uffd_wake(bad, (uintptr_t)p, PAGE) < 0);
        assert_true(os->uffd_pending(bad) < 0);
    }
    assert_int_equal(os->uffd_read(-1, &msg, 1), -EBADF);
    os->close(fd);
    area_free(p, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_open, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_routes, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_register, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_copy, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_zeropage, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_move, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_poison, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_fault, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_pending, open_it, close_it),
        cmocka_unit_test_setup_teardown(test_bad_descriptor, open_it, close_it),
    };

    return cmocka_run_group_tests_name("uffd", tests, NULL, NULL);
}
