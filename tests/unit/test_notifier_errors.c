/* SPDX-License-Identifier: MIT */
/* Notifiers used wrongly, and callbacks that take long: nothing is corrupted, nobody waits without saying for whom. */
#include "notifier.h"

#define MS 1000000ull

static uint32_t entered, gate_open;

static const char *device_name(const struct hmm_device *dev)
{
    return dev == DEVICE(1) ? "first-device" : "other-device";
}

static int set_up(void **state)
{
    (void)state;
    notifier_tree_init(&tree);
    tree.device_name = device_name;
    lock_violations = 0;
    log_lines = wrong_levels = entered = gate_open = 0;
    hmm_set_log(keep, NULL);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    bool bad =
        lock_violations != 0 || wrong_levels != 0 || tree.count != 0 || !list_empty(&tree.running) || !list_empty(&tree.active);
    hmm_set_log(NULL, NULL);
    notifier_tree_destroy(&tree);
    return bad;
}

static int quick(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    (void)event;
    __atomic_fetch_add(&entered, 1, __ATOMIC_ACQ_REL);
    return 0;
}

static int gated(struct hmm_notifier *n, const struct hmm_event *event)
{
    quick(n, event);
    while (!load(&gate_open))
        os_sleep(MS);
    return 0;
}

static const struct hmm_notifier_ops quick_ops = {.invalidate = quick};
static const struct hmm_notifier_ops gated_ops = {.invalidate = gated, .name = "stuck-in-the-gate"};

static int insert(struct hmm_notifier *n, uintptr_t first, uintptr_t end, const struct hmm_notifier_ops *ops)
{
    return notifier_insert(&tree, n, DEVICE(1), first * PAGE, end * PAGE, ops);
}

static void invalidate(uintptr_t first, uintptr_t end)
{
    struct invalidation inv;
    notifier_begin(&tree, &inv, first * PAGE, end * PAGE, HMM_EVENT_UNMAP, NULL);
    notifier_call(&tree, &inv, NOTIFIER_WAIT);
    notifier_end(&tree, &inv);
}

static void *invalidate_all(void *arg)
{
    (void)arg;
    invalidate(0, 100);
    return NULL;
}

/* ---- twice ---- */

static void test_inserting_twice_is_refused_and_changes_nothing(void **state)
{
    (void)state;
    struct hmm_notifier n = {0}, others[20];
    for (uintptr_t i = 0; i < 20; i++)
        assert_int_equal(insert(&others[i], i, i + 5, &quick_ops), 0);
    assert_int_equal(insert(&n, 10, 20, &quick_ops), 0);
    uint64_t seq = notifier_read_begin(&tree, &n);
    assert_int_equal(insert(&n, 10, 20, &quick_ops), -EEXIST);
    assert_int_equal(insert(&n, 50, 60, &gated_ops), -EEXIST); /* also elsewhere */
    assert_non_null(strstr(hmm_last_message(), "inserted already"));
    assert_int_equal(tree.count, 21);
    assert_true(notifier_tree_is_valid(&tree));
    assert_false(hmm_notifier_read_retry(&n, seq));
    invalidate(55, 56);
    assert_int_equal(entered, 0);
    invalidate(15, 16);
    assert_int_equal(entered, 6); /* those at 11 to 15, and it */
    assert_int_equal(notifier_remove(&tree, &n), 0);
    assert_int_equal(insert(&n, 50, 60, &quick_ops), 0);
    assert_int_equal(notifier_remove(&tree, &n), 0);
    for (unsigned i = 0; i < 20; i++)
        assert_int_equal(notifier_remove(&tree, &others[i]), 0);
}

static void test_removing_twice_is_refused(void **state)
{
    (void)state;
    struct hmm_notifier n = {0}, other;
    assert_int_equal(notifier_remove(&tree, &n), -ENOENT); /* never inserted */
    assert_int_equal(insert(&other, 10, 20, &quick_ops), 0);
    assert_int_equal(insert(&n, 10, 20, &quick_ops), 0);
    assert_int_equal(notifier_remove(&tree, &n), 0);
    assert_int_equal(notifier_remove(&tree, &n), -ENOENT);
    assert_non_null(strstr(hmm_last_message(), "not inserted"));
    assert_int_equal(tree.count, 1);
    assert_true(notifier_tree_is_valid(&tree));
    assert_int_equal(notifier_remove(&tree, &other), 0);
}

/* Whoever still looks at a removed notifier finds nothing current. */
static void test_nothing_is_current_after_removal(void **state)
{
    (void)state;
    struct hmm_notifier n;
    assert_int_equal(insert(&n, 10, 20, &quick_ops), 0);
    uint64_t seq = notifier_read_begin(&tree, &n);
    assert_true(seq != 0);
    assert_int_equal(notifier_remove(&tree, &n), 0);
    assert_true(hmm_notifier_read_retry(&n, seq));
    assert_int_equal(notifier_read_begin(&tree, &n), 0);
    assert_true(hmm_notifier_read_retry(&n, 0));
    assert_int_equal(hmm_notifier_remove(&n), -ENOENT); /* the public call, which has nothing else to go by */
    assert_int_equal(hmm_notifier_read_begin(&n), 0);
}

static void *remove_it(void *n)
{
    return (void *)(intptr_t)notifier_remove(&tree, n);
}

static unsigned inserted(void)
{
    mutex_lock(&tree.lock);
    unsigned n = tree.count;
    mutex_unlock(&tree.lock);
    return n;
}

static void test_two_removers_one_succeeds(void **state)
{
    (void)state;
    struct hmm_notifier n;
    void *a, *b;
    assert_int_equal(insert(&n, 10, 20, &gated_ops), 0);
    pthread_t running = start(invalidate_all, NULL);
    wait_for(&entered, 1);
    pthread_t first = start(remove_it, &n), second = start(remove_it, &n);
    while (inserted())
        sched_yield();
    os_sleep(50 * MS);
    __atomic_store_n(&gate_open, 1, __ATOMIC_RELEASE);
    pthread_join(first, &a);
    pthread_join(second, &b);
    pthread_join(running, NULL);
    assert_true(((intptr_t)a == 0 && (intptr_t)b == -ENOENT) || ((intptr_t)a == -ENOENT && (intptr_t)b == 0));
}

/* ---- questions ---- */

static void test_any(void **state)
{
    (void)state;
    struct hmm_notifier a, b;
    assert_false(notifier_any(&tree, 0, UINTPTR_MAX));
    assert_int_equal(insert(&a, 10, 20, &quick_ops), 0);
    assert_int_equal(insert(&b, 30, 31, &quick_ops), 0);
    assert_true(notifier_any(&tree, 0, UINTPTR_MAX));
    assert_false(notifier_any(&tree, 0, 10 * PAGE));
    assert_true(notifier_any(&tree, 0, 10 * PAGE + 1));
    assert_true(notifier_any(&tree, 19 * PAGE, 25 * PAGE));
    assert_false(notifier_any(&tree, 20 * PAGE, 30 * PAGE));
    assert_true(notifier_any(&tree, 30 * PAGE, 31 * PAGE));
    assert_false(notifier_any(&tree, 31 * PAGE, UINTPTR_MAX));
    assert_int_equal(notifier_remove(&tree, &a), 0);
    assert_int_equal(notifier_remove(&tree, &b), 0);
}

/* ---- callbacks that take long ---- */

static void test_overdue_callback_is_found(void **state)
{
    (void)state;
    struct hmm_notifier n;
    struct notifier_overdue o = {.ns = 7};
    char text[256];
    assert_int_equal(insert(&n, 10, 20, &gated_ops), 0);
    assert_false(notifier_overdue(&tree, NULL, 0, &o));
    pthread_t t = start(invalidate_all, NULL);
    wait_for(&entered, 1);
    assert_false(notifier_overdue(&tree, DEVICE(1), 3600 * 1000 * MS, &o));
    assert_false(notifier_overdue(&tree, DEVICE(2), 0, &o));
    assert_int_equal(o.ns, 7);
    while (!notifier_overdue(&tree, DEVICE(1), 20 * MS, &o))
        os_sleep(MS);
    assert_true(notifier_overdue(&tree, NULL, 20 * MS, &o));
    assert_ptr_equal(o.callback, gated);
    assert_string_equal(o.name, "stuck-in-the-gate");
    assert_ptr_equal(o.dev, DEVICE(1));
    assert_int_equal(o.start, 10 * PAGE);
    assert_int_equal(o.end, 20 * PAGE);
    assert_int_equal(o.event.start, 0);
    assert_int_equal(o.event.end, 100 * PAGE);
    assert_int_equal(o.event.type, HMM_EVENT_UNMAP);
    assert_in_range(o.ns, 20 * MS, 60000 * MS);
    o.ns = 3250 * MS;
    notifier_overdue_text(&tree, &o, text, sizeof(text));
    assert_non_null(strstr(text, "stuck-in-the-gate"));
    assert_non_null(strstr(text, "first-device"));
    assert_non_null(strstr(text, "3.2 s"));
    assert_non_null(strstr(text, "unmap"));
    __atomic_store_n(&gate_open, 1, __ATOMIC_RELEASE);
    pthread_join(t, NULL);
    assert_false(notifier_overdue(&tree, NULL, 0, &o));
    assert_in_range(tree.callback_ns, 20 * MS, 60000 * MS);
    assert_int_equal(notifier_remove(&tree, &n), 0);
}

/* One that sleeps for longer than a second: its remover waits, and says for whom, once. */
static void test_remover_names_whom_it_waits_for(void **state)
{
    (void)state;
    struct hmm_notifier n;
    void *result;
    assert_int_equal(insert(&n, 10, 20, &gated_ops), 0);
    pthread_t running = start(invalidate_all, NULL);
    wait_for(&entered, 1);
    uint64_t began = os_now();
    pthread_t remover = start(remove_it, &n);
    wait_for(&log_lines, 1);
    assert_true(os_now() - began >= 990 * MS);
    assert_non_null(strstr(logged, "hmm_notifier_remove()"));
    assert_non_null(strstr(logged, "stuck-in-the-gate"));
    assert_non_null(strstr(logged, "first-device"));
    const char *running_for = strstr(logged, "has been running for ");
    assert_non_null(running_for);
    assert_true(atof(running_for + strlen("has been running for ")) >= 1.0);
    os_sleep(300 * MS);
    __atomic_store_n(&gate_open, 1, __ATOMIC_RELEASE);
    pthread_join(remover, &result);
    pthread_join(running, NULL);
    assert_int_equal((intptr_t)result, 0);
    assert_int_equal(log_lines, 1);
}

static void test_reader_names_whom_it_waits_for(void **state)
{
    (void)state;
    struct hmm_notifier n, other;
    assert_int_equal(insert(&n, 10, 20, &gated_ops), 0);
    assert_int_equal(insert(&other, 15, 30, &quick_ops), 0); /* its own callback is still to come */
    pthread_t running = start(invalidate_all, NULL);
    wait_for(&entered, 1);
    assert_int_equal(notifier_read_begin_timeout(&tree, &other, 100 * MS), 0);
    assert_int_equal(log_lines, 0);
    uint64_t began = os_now();
    assert_int_equal(notifier_read_begin_timeout(&tree, &other, 1200 * MS), 0);
    assert_in_range(os_now() - began, 1200 * MS, 60000 * MS);
    assert_int_equal(log_lines, 1);
    assert_non_null(strstr(logged, "hmm_notifier_read_begin()"));
    assert_non_null(strstr(logged, "stuck-in-the-gate"));
    __atomic_store_n(&gate_open, 1, __ATOMIC_RELEASE);
    uint64_t seq = notifier_read_begin_timeout(&tree, &other, 60000 * MS);
    assert_true(seq != 0);
    assert_false(hmm_notifier_read_retry(&other, seq));
    pthread_join(running, NULL);
    assert_int_equal(notifier_remove(&tree, &n), 0);
    assert_int_equal(notifier_remove(&tree, &other), 0);
}

/* A wait for 0 ns is a look. */
static void test_read_begin_without_time(void **state)
{
    (void)state;
    struct hmm_notifier n;
    struct invalidation inv;
    assert_int_equal(insert(&n, 10, 20, &quick_ops), 0);
    assert_true(notifier_read_begin_timeout(&tree, &n, 0) != 0);
    notifier_begin(&tree, &inv, 0, 11 * PAGE, HMM_EVENT_CLEAR, NULL);
    assert_int_equal(notifier_read_begin_timeout(&tree, &n, 0), 0);
    notifier_end(&tree, &inv);
    assert_true(notifier_read_begin_timeout(&tree, &n, 0) != 0);
    assert_int_equal(notifier_remove(&tree, &n), 0);
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_inserting_twice_is_refused_and_changes_nothing),
        T(test_removing_twice_is_refused),
        T(test_nothing_is_current_after_removal),
        T(test_two_removers_one_succeeds),
        T(test_any),
        T(test_overdue_callback_is_found),
        T(test_remover_names_whom_it_waits_for),
        T(test_reader_names_whom_it_waits_for),
        T(test_read_begin_without_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
