/* SPDX-License-Identifier: MIT */
/*
 * The life of mirrors: release once, free last, nothing after it, whoever else is at it: faults, invalidations, closing, the loss of the
 * device, other threads that unregister, and children.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "eye.h"
#include "points.h"

#define PAGES 64u
#define SECONDS_MAX 55 /* a hang is a failure */
#define PATIENCE_MS 3000

static size_t page;
static char *arena;
static hmm_dev dev;
static struct eye eye;
static unsigned errors_logged, errors_expected;
static unsigned left_behind; /* of errors_logged: that a driver left its mirror behind */
static char last_error[512];

static void count_errors(enum hmm_log_level level, const char *line, void *arg)
{
    (void)arg;
    if (level == HMM_LOG_ERROR) {
        strncpy(last_error, line, sizeof(last_error) - 1);
        __atomic_fetch_add(&left_behind, strstr(line, "left the mirror 'eye' behind") != NULL, __ATOMIC_SEQ_CST);
        __atomic_fetch_add(&errors_logged, 1, __ATOMIC_SEQ_CST);
    }
}

static int set_up(void **state)
{
    (void)state;
    page = hmm_page_size();
    errors_logged = errors_expected = left_behind = 0;
    alarm(SECONDS_MAX);
    hmm_set_log(count_errors, NULL);
    arena = live_reserve(3 * LIVE_BLOCK) + LIVE_BLOCK; /* nobody's stack is a neighbour, and part of the mapping */
    assert_true(live_map(arena, LIVE_BLOCK));
    live_fill(arena, PAGES * page, 5);
    assert_int_equal(hmm_device_open("soft:memory=8M,engines=1", &dev), 0);
    eye_init(&eye, dev);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    forget_point();
    int r = dev ? hmm_audit() || hmm_device_close(dev) : 0;
    for (unsigned i = 0; i < 1000 && errors_logged < errors_expected; i++)
        os_sleep(1000000);
    hmm_set_log(NULL, NULL);
    munmap(arena, LIVE_BLOCK);
    alarm(0);
    if (errors_logged != errors_expected)
        fprintf(stderr, "%u errors were logged, the last: %s\n", errors_logged, last_error);
    return r || errors_logged != errors_expected ? -1 : 0;
}

static uintptr_t at(size_t i)
{
    return (uintptr_t)arena + i * page;
}

static void open_eye(struct eye *e)
{
    int r = eye_open(e);
    if (r)
        fail_msg("registering: %d, %s", r, hmm_last_message());
}

static void look(struct eye *e)
{
    char byte;
    struct hmm_migrate_result res = {.size = sizeof(res)};
    assert_int_equal(hmm_migrate_to_device(dev, arena, PAGES * page, &res), 0);
    if (res.moved + res.already != PAGES)
        fail_msg("only %llu of %u pages came to the device (%llu busy, %llu unmovable, %llu pinned, limited %llu)",
                 (unsigned long long)(res.moved + res.already), PAGES, (unsigned long long)res.busy,
                 (unsigned long long)res.unmovable, (unsigned long long)res.pinned, (unsigned long long)res.limited);
    assert_int_equal(eye_access(e, at(1), &byte, 1, false, NULL), 0);
}

/* ---- one after the other ----------------------------------------------------------------------------------------------- */

static void release_comes_once_and_free_last(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    struct hmm_mirror_info info;
    uint64_t dirty;
    open_eye(&eye);
    look(&eye);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &run), 0);
    hmm_mirror_get(eye.m);
    uint32_t asked = eye.invalidated;
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
    assert_int_equal(eye.released, 1);
    assert_true(eye.invalidated > asked); /* the device let go of what it had */
    assert_int_equal(eye.freed, 0);
    /* The structure is there, the view is not. */
    assert_false(eye_current(&run));
    assert_int_equal(eye_resolve(&eye, at(1), HMM_FAULT_READ, &run), -ENODEV);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &run), -ENODEV);
    assert_int_equal(hmm_mirror_collect_dirty(eye.m, at(0), at(1), &dirty), -ENODEV);
    assert_int_equal(hmm_mirror_discard(eye.m, at(0), at(1)), -ENODEV);
    assert_int_equal(hmm_mirror_info(eye.m, &info), -ENODEV);
    assert_int_equal(hmm_mirror_unregister(eye.m), -ENODEV);
    assert_non_null(strstr(hmm_last_message(), "unregistered"));
    asked = eye.invalidated;
    eye_touch(arena + page);
    assert_int_equal(eye.invalidated, asked); /* nor is it called */
    hmm_mirror_put(eye.m);
    assert_int_equal(eye.freed, 1);
    assert_int_equal(eye.released, 1);
    assert_int_equal(eye.after_free, 0);
}

static void a_mirror_outlives_its_device(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    open_eye(&eye);
    look(&eye);
    assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &run), 0);
    hmm_mirror_get(eye.m);
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
    assert_int_equal(munmap(arena, LIVE_BLOCK), 0); /* and its ranges */
    assert_int_equal(hmm_device_close(dev), 0);
    dev = 0;
    assert_false(eye_current(&run)); /* what it points to is still there */
    assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &run), -ENODEV);
    assert_int_equal(eye.freed, 0);
    hmm_mirror_put(eye.m);
    assert_int_equal(eye.freed, 1);
    assert_int_equal(hmm_device_open("soft:memory=8M,engines=1", &dev), 0); /* all can begin anew */
}

/* All that it had is unmapped, and something else comes there. */
static void a_mirror_outlives_its_ranges(void **state)
{
    (void)state;
    struct hmm_mirror_run run, old;
    struct hmm_mirror_info info;
    for (int announced = 0; announced < 2; announced++) {
        eye_init(&eye, dev);
        open_eye(&eye);
        look(&eye);
        assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &old), 0);
        uint32_t asked = eye.invalidated;
        assert_int_equal(announced ? hmm_munmap(arena, LIVE_BLOCK) : munmap(arena, LIVE_BLOCK), 0);
        hmm_event_sync(eye.dev);
        assert_false(eye_current(&old));
        for (unsigned i = 0; i < 5000 && eye.invalidated == asked; i++)
            os_sleep(1000000);
        assert_true(eye.invalidated > asked);
        assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &run), -ENOENT);
        assert_int_equal(eye_resolve(&eye, at(1), HMM_FAULT_READ, &run), -EFAULT);
        assert_int_equal(hmm_mirror_info(eye.m, &info), 0);
        assert_int_equal(info.valid, 0);
        assert_true(live_map(arena, LIVE_BLOCK));
        live_fill(arena, PAGES * page, 6);
        char byte, expected = arena[3 * page + 5];
        look(&eye); /* of what is there now */
        assert_int_equal(eye_access(&eye, at(3) + 5, &byte, 1, false, NULL), 0);
        assert_int_equal(byte, expected);
        assert_int_equal(munmap(arena, LIVE_BLOCK), 0);
        assert_int_equal(hmm_mirror_unregister(eye.m), 0); /* with nothing left of it */
        assert_int_equal(eye.released, 1);
        assert_int_equal(eye.freed, 1);
        assert_int_equal(eye.after_free, 0);
        assert_true(live_map(arena, LIVE_BLOCK));
    }
}

static void what_a_driver_leaves_behind_ends_with_the_device(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    errors_expected = 1;
    open_eye(&eye);
    look(&eye);
    hmm_mirror_get(eye.m);
    assert_int_equal(hmm_device_close(dev), 0);
    dev = 0;
    assert_int_equal(eye.released, 1); /* when it was closed */
    uint32_t asked = eye.invalidated;
    assert_int_equal(hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &run), -ENODEV);
    assert_int_equal(eye.invalidated, asked);
    hmm_mirror_put(eye.m);
    assert_non_null(strstr(last_error, "left the mirror 'eye' behind"));
}

static int answer_late;

static void resolve_late(const char *point)
{
    struct hmm_mirror_run run;
    if (strcmp(point, "device-emptied"))
        return;
    answer_late = eye_resolve(&eye, at(1), HMM_FAULT_READ, &run);
    hmm_mirror_unregister(eye.m);
}

/* A thread of the driver that close() has not ended yet. */
static void a_fault_while_the_device_is_closed_is_refused(void **state)
{
    (void)state;
    open_eye(&eye);
    look(&eye);
    answer_late = 0;
    inject_point_hook = resolve_late;
    inject_points_on = 1;
    assert_int_equal(hmm_device_close(dev), 0);
    dev = 0;
    assert_int_equal(answer_late, 1); /* over the bus */
    assert_int_equal(eye.freed, 1);
}

/* ---- from inside --------------------------------------------------------------------------------------------------------- */

static int answer_inside;

static void unregister_inside(struct eye *e, const struct hmm_mirror_change *c)
{
    (void)c;
    answer_inside = hmm_mirror_unregister(e->m);
}

static int unregister_in_walk(const struct hmm_mirror_run *run, void *arg)
{
    (void)run;
    answer_inside = hmm_mirror_unregister(((struct eye *)arg)->m);
    return 7;
}

static void release_and_unregister(void *priv)
{
    eye_release(priv);
    answer_inside = hmm_mirror_unregister(((struct eye *)priv)->m);
}

static int fault_and_unregister(void *priv, uintptr_t addr, unsigned flags)
{
    (void)addr;
    (void)flags;
    answer_inside = hmm_mirror_unregister(((struct eye *)priv)->m);
    return 1;
}

static void nobody_unregisters_from_a_fault(void **state)
{
    (void)state;
    struct hmm_mirror_run run;
    eye.ops.fault = fault_and_unregister;
    open_eye(&eye);
    answer_inside = 0;
    assert_int_equal(eye_resolve(&eye, at(1), HMM_FAULT_READ, &run), 1);
    assert_int_equal(answer_inside, -EDEADLK);
    assert_int_equal(eye.released, 0);
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
}

static void nobody_unregisters_from_inside(void **state)
{
    (void)state;
    eye.ops.release = release_and_unregister;
    open_eye(&eye);
    look(&eye);
    eye.meanwhile = unregister_inside;
    eye_touch(arena + page); /* a touch: the device is asked */
    eye.meanwhile = NULL;
    assert_int_equal(answer_inside, -EDEADLK);
    assert_int_equal(eye.released, 0);
    answer_inside = 0;
    look(&eye);
    assert_int_equal(hmm_mirror_walk(eye.m, at(0), at(PAGES), 0, unregister_in_walk, &eye), 7);
    assert_int_equal(answer_inside, -EDEADLK);
    answer_inside = 0;
    look(&eye); /* it is as it was */
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
    assert_int_equal(answer_inside, -EDEADLK);
    assert_int_equal(eye.released, 1);
    assert_int_equal(eye.freed, 1);
}

/* ---- children ------------------------------------------------------------------------------------------------------------- */

/* Which call does not say -ESRCH; 0: all do. */
static int child_tries(void)
{
    struct hmm_mirror_run run;
    uint64_t dirty;
    struct hmm_mirror_dir *dir;
    if (hmm_mirror_resolve(eye.m, at(1), HMM_FAULT_READ, &run) != -ESRCH)
        return 1;
    if (hmm_mirror_lookup(eye.m, at(1), HMM_FAULT_READ, &run) != -ESRCH)
        return 2;
    if (hmm_mirror_collect_dirty(eye.m, at(0), at(1), &dirty) != -ESRCH)
        return 3;
    if (hmm_mirror_dir_get(eye.m, at(0), &dir) != -ESRCH)
        return 4;
    if (hmm_mirror_unregister(eye.m) != -ESRCH)
        return 5;
    hmm_mirror_get(eye.m);
    hmm_mirror_put(eye.m);
    hmm_mirror_put(eye.m);
    return eye.released || eye.freed ? 6 : 0;
}

static void a_child_has_no_mirrors(void **state)
{
    (void)state;
    int status;
    open_eye(&eye);
    look(&eye);
    pid_t child = fork();
    if (child == 0)
        _exit(child_tries());
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    look(&eye);
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
    assert_int_equal(eye.freed, 1);
}

/* ---- losing and closing --------------------------------------------------------------------------------------------------- */

static void wait_for(const uint32_t *word, uint32_t value)
{
    for (unsigned i = 0; i < 5000 && __atomic_load_n(word, __ATOMIC_SEQ_CST) < value; i++)
        os_sleep(1000000);
    assert_int_equal(__atomic_load_n(word, __ATOMIC_SEQ_CST), value);
}

static void a_loss_releases_once(void **state)
{
    (void)state;
    open_eye(&eye);
    look(&eye);
    hmm_device_lost(eye.dev, HMM_LOST_ENGINES, "the test says so");
    wait_for(&eye.released, 1);
    hmm_device_lost(eye.dev, HMM_LOST_ENGINES, "again");
    eye_touch(arena + page); /* it still answers */
    assert_int_equal(hmm_mirror_unregister(eye.m), 0);
    assert_int_equal(eye.freed, 1);
    assert_int_equal(eye.released, 1);
    assert_int_equal(eye.after_free, 0);
}

static uint32_t let_return;

static void release_that_stays(void *priv)
{
    eye_release(priv);
    while (!__atomic_load_n(&let_return, __ATOMIC_SEQ_CST))
        os_sleep(1000000);
}

static void a_release_that_does_not_return_is_named(void **state)
{
    (void)state;
    hmm_dev other;
    struct hmm_mirror_run run;
    char byte;
    struct eye second;
    let_return = 0;
    eye.ops.name = "one that stays";
    eye.ops.release = release_that_stays;
    open_eye(&eye);
    look(&eye);
    uint64_t before = os_now();
    assert_int_equal(hmm_device_close(dev), -EBUSY);
    uint64_t took = os_now() - before;
    assert_true(took > PATIENCE_MS * 1000000ull / 2 && took < 20000000000ull);
    assert_non_null(strstr(hmm_last_message(), "one that stays"));
    /* Others are none the worse. */
    assert_int_equal(hmm_device_open("soft:memory=8M,engines=1", &other), 0);
    eye_init(&second, other);
    open_eye(&second);
    assert_int_equal(eye_access(&second, at(1), &byte, 1, false, NULL), 0);
    assert_int_equal(eye_resolve(&second, at(1), HMM_FAULT_READ, &run), 0);
    assert_int_equal(hmm_mirror_unregister(second.m), 0);
    assert_int_equal(hmm_device_close(other), 0);
    __atomic_store_n(&let_return, 1, __ATOMIC_SEQ_CST);
    assert_int_equal(hmm_mirror_unregister(eye.m), 0); /* waits for it */
    assert_int_equal(hmm_device_close(dev), 0);
    dev = 0;
    assert_int_equal(eye.released, 1);
    assert_int_equal(eye.freed, 1);
}

/* ---- calls that are inside -------------------------------------------------------------------------------------------------- */

static uint32_t ended;

static void *resolve_once(void *arg)
{
    struct hmm_mirror_run run;
    (void)arg;
    return eye_resolve(&eye, at(1), HMM_FAULT_READ, &run) == 0 ? &eye : NULL;
}

static void *unregister_once(void *arg)
{
    (void)arg;
    hmm_mirror_unregister(eye.m);
    __atomic_store_n(&ended, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void unregistering_waits_for_calls_that_are_inside(void **state)
{
    (void)state;
    pthread_t inside, outside;
    void *found;
    ended = 0;
    open_eye(&eye);
    assert_int_equal(hmm_migrate_to_device(dev, arena, PAGES * page, NULL), 0);
    arm_point("snapshot-taken", NULL);
    assert_int_equal(pthread_create(&inside, NULL, resolve_once, NULL), 0);
    wait_point();
    assert_int_equal(pthread_create(&outside, NULL, unregister_once, NULL), 0);
    wait_for(&eye.released, 1); /* it has begun */
    os_sleep(50000000);
    assert_int_equal(__atomic_load_n(&ended, __ATOMIC_SEQ_CST), 0);
    assert_int_equal(eye.freed, 0);
    release_point();
    pthread_join(inside, &found);
    pthread_join(outside, NULL);
    assert_ptr_equal(found, &eye); /* what it came for was there */
    assert_int_equal(eye.freed, 1);
    assert_int_equal(eye.after_free, 0);
}

/* ---- at once -------------------------------------------------------------------------------------------------------------- */

#define ROUNDS 60
#define DROP_EVERY_NS 2000000

static uint32_t go_on;

/* Sequence points of mirrors take their time, by turns. */
static void dawdle(const char *point)
{
    static uint32_t turn;
    if (strncmp(point, "mirror-", 7) == 0 || strcmp(point, "snapshot-taken") == 0)
        os_sleep(1000 * (random_mix(__atomic_fetch_add(&turn, 1, __ATOMIC_RELAXED)) % 300));
}

/* What an engine does; it has a reference of its own. */
static void *resolve_on(void *arg)
{
    struct eye *e = arg;
    struct hmm_mirror_run run;
    char byte;
    for (uint64_t n = (uintptr_t)&run; __atomic_load_n(&go_on, __ATOMIC_SEQ_CST); n++) {
        uintptr_t addr = at(random_mix(n) % PAGES);
        int r = eye_access(e, addr, &byte, 1, n & 1, NULL);
        if (r == -ENODEV)
            break;
        if (r)
            return (void *)1;
        if (n % 5 == 0)
            hmm_mirror_mark(e->m, at(0), at(8), HMM_MIRROR_SELECT, 0);
        if (n % 7 == 0)
            hmm_mirror_discard(e->m, at(0), at(PAGES));
    }
    hmm_mirror_put(e->m);
    return NULL;
}

/* Touches, and now and then a drop: a device that meets one waits a while before it asks again, and does little else in a storm. */
static void *touch_on(void *arg)
{
    int (*drop)(void *, size_t, int) = arg ? hmm_madvise : madvise;
    uint64_t next_drop = 0;
    for (uint64_t n = 0; __atomic_load_n(&go_on, __ATOMIC_SEQ_CST); n++) {
        eye_touch(arena + random_mix(n) % PAGES * page);
        if (os_now() < next_drop)
            continue;
        drop((void *)at(random_mix(n) % PAGES), page, MADV_DONTNEED);
        next_drop = os_now() + DROP_EVERY_NS;
    }
    return NULL;
}

static void unregistering_races_with_faults_and_invalidations(void **state)
{
    (void)state;
    pthread_t resolvers[2], toucher;
    void *failed;
    inject_point_hook = dawdle;
    inject_points_on = 1;
    for (unsigned round = 0; round < ROUNDS; round++) {
        eye_init(&eye, dev);
        eye.directories = 1 + round % 3;
        open_eye(&eye);
        __atomic_store_n(&go_on, 1, __ATOMIC_SEQ_CST);
        for (unsigned i = 0; i < 2; i++) {
            hmm_mirror_get(eye.m);
            assert_int_equal(pthread_create(&resolvers[i], NULL, resolve_on, &eye), 0);
        }
        assert_int_equal(pthread_create(&toucher, NULL, touch_on, round % 2 ? &eye : NULL), 0);
        os_sleep(1000 * (random_mix(round) % 4000));
        assert_int_equal(hmm_mirror_unregister(eye.m), 0);
        for (unsigned i = 0; i < 2; i++) {
            assert_int_equal(pthread_join(resolvers[i], &failed), 0);
            assert_null(failed);
        }
        assert_int_equal(eye.released, 1);
        assert_int_equal(eye.freed, 1);
        os_sleep(200000); /* the touches go on */
        __atomic_store_n(&go_on, 0, __ATOMIC_SEQ_CST);
        assert_int_equal(pthread_join(toucher, NULL), 0);
        assert_int_equal(eye.after_free, 0);
    }
}

static int answers[2];

static void *unregister_there(void *arg)
{
    int *answer = arg;
    *answer = hmm_mirror_unregister(eye.m);
    return NULL;
}

static void *lose_there(void *arg)
{
    hmm_device_lost(arg, HMM_LOST_ENGINES, "the test says so");
    return NULL;
}

static void *close_there(void *arg)
{
    *(int *)arg = hmm_device_close(dev);
    return NULL;
}

/* Two threads unregister, and the device is lost, all at once: one of each comes of it. */
static void everybody_ends_it_at_once(void **state)
{
    (void)state;
    pthread_t threads[3];
    inject_point_hook = dawdle;
    inject_points_on = 1;
    for (unsigned round = 0; round < ROUNDS; round++) {
        eye_init(&eye, dev);
        open_eye(&eye);
        look(&eye);
        hmm_mirror_get(eye.m);
        assert_int_equal(pthread_create(&threads[0], NULL, lose_there, eye.dev), 0);
        assert_int_equal(pthread_create(&threads[1], NULL, unregister_there, &answers[0]), 0);
        assert_int_equal(pthread_create(&threads[2], NULL, unregister_there, &answers[1]), 0);
        for (unsigned i = 0; i < 3; i++)
            pthread_join(threads[i], NULL);
        assert_int_equal(answers[0] + answers[1], -ENODEV);
        hmm_mirror_put(eye.m);
        wait_for(&eye.freed, 1); /* the thread that releases after a loss may have the last reference */
        assert_int_equal(eye.released, 1);
        assert_int_equal(hmm_device_close(dev), 0);
        assert_int_equal(eye.after_free, 0);
        assert_int_equal(hmm_device_open("soft:memory=8M,engines=1", &dev), 0);
    }
}

static void unregistering_races_with_closing(void **state)
{
    (void)state;
    pthread_t threads[2];
    inject_point_hook = dawdle;
    inject_points_on = 1;
    for (unsigned round = 0; round < ROUNDS / 2; round++) {
        hmm_dev other; /* so that the manager goes on: it is not what the race is about */
        assert_int_equal(hmm_device_open("soft:memory=1M,engines=1", &other), 0);
        eye_init(&eye, dev);
        open_eye(&eye);
        look(&eye);
        hmm_mirror_get(eye.m);
        int order = round % 2;
        assert_int_equal(pthread_create(&threads[order], NULL, close_there, &answers[0]), 0);
        assert_int_equal(pthread_create(&threads[!order], NULL, unregister_there, &answers[1]), 0);
        pthread_join(threads[0], NULL);
        pthread_join(threads[1], NULL);
        assert_int_equal(answers[0], 0);
        assert_true(answers[1] == 0 || answers[1] == -ENODEV); /* or core did it */
        assert_int_equal(eye.released, 1);
        hmm_mirror_put(eye.m);
        if (answers[1] == 0)
            assert_int_equal(eye.freed, 1);
        assert_int_equal(eye.after_free, 0);
        assert_int_equal(hmm_device_open("soft:memory=8M,engines=1", &dev), 0);
        assert_int_equal(hmm_device_close(other), 0);
    }
    inject_points_on = 0;
    errors_expected = left_behind; /* whenever closing came first, and nothing else */
}

static void *exec_nothing(void *arg)
{
    char *args[] = {"x", NULL};
    *(int *)arg = hmm_execve("/nowhere", args, args);
    return NULL;
}

/* An exec tells all devices to let go of everything. It fails, and so all goes on. */
static void unregistering_races_with_exec(void **state)
{
    (void)state;
    pthread_t thread;
    int answer;
    inject_point_hook = dawdle;
    inject_points_on = 1;
    for (unsigned round = 0; round < ROUNDS; round++) {
        eye_init(&eye, dev);
        open_eye(&eye);
        look(&eye);
        assert_int_equal(pthread_create(&thread, NULL, exec_nothing, &answer), 0);
        os_sleep(1000 * (round * 37 % 500));
        assert_int_equal(hmm_mirror_unregister(eye.m), 0);
        assert_int_equal(pthread_join(thread, NULL), 0);
        assert_int_equal(answer, -1);
        assert_int_equal(eye.released, 1);
        assert_int_equal(eye.freed, 1);
        assert_int_equal(eye.after_free, 0);
    }
}

static void *unregister_now(void *arg)
{
    (void)arg;
    hmm_mirror_unregister(eye.m);
    return NULL;
}

/* In a child with a device of its own: its status is 0 if the exit was made. */
static void exit_while_unregistering(unsigned round)
{
    pthread_t thread;
    alarm(20);
    if (hmm_device_open("soft:memory=8M,engines=1", &dev))
        _exit(90);
    eye_init(&eye, dev);
    if (hmm_migrate_to_device(dev, arena, PAGES * page, NULL) || eye_open(&eye))
        _exit(91);
    struct hmm_mirror_run run;
    if (eye_resolve(&eye, at(1), HMM_FAULT_READ, &run) || pthread_create(&thread, NULL, unregister_now, NULL))
        _exit(92);
    os_sleep(1000 * (round * 37 % 300));
    hmm_exit(0);
}

static void unregistering_races_with_exit(void **state)
{
    (void)state;
#ifdef __SANITIZE_ADDRESS__
    fprintf(stderr, "skipped: the child of a program under AddressSanitizer may find its allocator's locks taken\n");
    skip();
#endif
    inject_point_hook = dawdle;
    inject_points_on = 1;
    for (unsigned round = 0; round < 12; round++) {
        int status;
        uint64_t began = os_now();
        pid_t child = fork();
        if (child == 0)
            exit_while_unregistering(round);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
        assert_true(os_now() - began < 10000000000ull);
    }
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(release_comes_once_and_free_last),
        TEST(a_mirror_outlives_its_device),
        TEST(a_mirror_outlives_its_ranges),
        TEST(what_a_driver_leaves_behind_ends_with_the_device),
        TEST(a_fault_while_the_device_is_closed_is_refused),
        TEST(nobody_unregisters_from_inside),
        TEST(nobody_unregisters_from_a_fault),
        TEST(a_child_has_no_mirrors),
        TEST(a_loss_releases_once),
        TEST(a_release_that_does_not_return_is_named),
        TEST(unregistering_waits_for_calls_that_are_inside),
        TEST(unregistering_races_with_faults_and_invalidations),
        TEST(everybody_ends_it_at_once),
        TEST(unregistering_races_with_closing),
        TEST(unregistering_races_with_exec),
        TEST(unregistering_races_with_exit),
    };
    char words[32];
    snprintf(words, sizeof(words), "patience=%u", PATIENCE_MS); /* of closing */
    setenv("HMM_DEBUG", words, 1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
