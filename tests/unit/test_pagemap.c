/* SPDX-License-Identifier: MIT */
/* Pagemaps: set-up and its undoing, allocation, counts against a plain array, the end of life, threads. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mem_source.h"
#include "os/os.h"
#include "pagemap/pagemap.h"

#define PAGES 1000

static char logged[400];

static void keep(enum hmm_log_level level, const char *line, void *arg)
{
    (void)level;
    (void)arg;
    snprintf(logged, sizeof(logged), "%s", line);
}

static int set_up(void **state)
{
    (void)state;
    source_start();
    lock_violations = 0;
    logged[0] = 0;
    hmm_set_log(keep, NULL);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    bool bad = mem_used() != 0 || lock_violations != 0;
    if (bad)
        print_error("%lu bytes leaked, %lu lock violations\n", (unsigned long)mem_used(), (unsigned long)lock_violations);
    mem_fail = NULL;
    hmm_set_log(NULL, NULL);
    mem_exit();
    return bad;
}

static struct pagemap *make(uint64_t pages, const struct hmm_pagemap_ops *ops, void *priv)
{
    struct hmm_pagemap_desc desc = {.type = HMM_PAGEMAP_PRIVATE, .pages = pages, .ops = ops};
    struct pagemap *pm = NULL;
    assert_int_equal(pagemap_create(&desc, NULL, priv, &pm), 0);
    assert_non_null(pm);
    return pm;
}

static void finish(struct pagemap *pm)
{
    pagemap_kill(pm);
    assert_int_equal(pagemap_wait(pm, 0), 0);
    assert_true(pagemap_is_valid(pm));
    pagemap_destroy(pm);
}

/* One page. */
static uint64_t take(struct pagemap *pm)
{
    struct page_run run;
    unsigned n;
    assert_int_equal(pagemap_alloc(pm, 1, &run, 1, &n), 1);
    assert_int_equal(n, 1);
    return run.page;
}

/* ---- creation ---- */

static void expect_refused(struct hmm_pagemap_desc desc, int err, const char *word)
{
    struct pagemap *pm = (struct pagemap *)&desc;
    assert_int_equal(pagemap_create(&desc, NULL, NULL, &pm), err);
    assert_ptr_equal(pm, &desc); /* outputs only on success */
    assert_non_null(strstr(hmm_last_message(), word));
}

static void test_wrong_descriptions_are_refused(void **state)
{
    (void)state;
    struct hmm_pagemap_desc good = {.type = HMM_PAGEMAP_PRIVATE, .pages = 10}, d;
    struct pagemap *pm;
    assert_int_equal(pagemap_create(NULL, NULL, NULL, &pm), -EINVAL);
    for (int type = -1; type < 8; type++) {
        d = good;
        d.type = (enum hmm_pagemap_type)type;
        if (type != HMM_PAGEMAP_PRIVATE)
            expect_refused(d, -EINVAL, "type");
    }
    d = good, d.pages = 0;
    expect_refused(d, -EINVAL, "0 pages");
    d = good, d.pages = PAGEMAP_PAGES_MAX + 1;
    expect_refused(d, -EINVAL, "more than");
    d = good, d.pages = UINT64_MAX;
    expect_refused(d, -EINVAL, "more than");
    static const uint64_t granules[] = {1, 2048, 3 * 4096, (uint64_t)4 << 20, UINT64_MAX};
    for (unsigned i = 0; i < sizeof(granules) / sizeof(granules[0]); i++) {
        d = good, d.granule = granules[i];
        expect_refused(d, -EINVAL, "granule");
    }
    d = good, d.granule = 16 * os_page_size();
    expect_refused(d, -EINVAL, "less than a granule");
    d = good, d.cpu_map = (void *)4097;
    expect_refused(d, -EINVAL, "aligned");
    d = good, d.cpu_map = (void *)(UINTPTR_MAX - 3 * os_page_size() + 1);
    expect_refused(d, -EINVAL, "wraps");
}

static void test_each_failing_allocation_is_undone(void **state)
{
    (void)state;
    struct hmm_pagemap_desc desc = {.type = HMM_PAGEMAP_PRIVATE, .pages = PAGES};
    struct pagemap *pm = NULL;
    long n;
    mem_fail = fail_nth;
    for (n = 0;; n++) {
        alloc_until_fail = n;
        int err = pagemap_create(&desc, NULL, NULL, &pm);
        if (!err)
            break;
        assert_int_equal(err, -ENOMEM);
        assert_non_null(strstr(hmm_last_message(), "memory"));
        assert_null(pm);
        assert_int_equal(mem_used(), 0);
    }
    mem_fail = NULL;
    assert_int_equal(n, 3); /* the object, descriptors, buddy */
    for (uint32_t id = 0; id < PAGEMAP_IDS; id++)
        assert_ptr_equal(pagemap_by_id(id), id == pm->id ? pm : NULL);
    finish(pm);
}

static void test_cpu_maps_may_not_overlap(void **state)
{
    (void)state;
    size_t page = os_page_size();
    char *base = (char *)(100 * page);
    struct hmm_pagemap_desc d = {.type = HMM_PAGEMAP_PRIVATE, .pages = 10, .cpu_map = base};
    struct pagemap *a, *before, *behind;
    assert_int_equal(pagemap_create(&d, NULL, NULL, &a), 0);
    for (int off = -9; off <= 9; off++) {
        d.cpu_map = base + off * (long)page;
        expect_refused(d, -EEXIST, "overlaps");
    }
    d.cpu_map = base - page, d.pages = 12; /* around it */
    expect_refused(d, -EEXIST, "overlaps");
    d.cpu_map = base - 10 * page, d.pages = 10;
    assert_int_equal(pagemap_create(&d, NULL, NULL, &before), 0);
    d.cpu_map = base + 10 * page;
    assert_int_equal(pagemap_create(&d, NULL, NULL, &behind), 0);
    finish(a);
    d.cpu_map = base;
    assert_int_equal(pagemap_create(&d, NULL, NULL, &a), 0);
    finish(a);
    finish(before);
    finish(behind);
}

static void test_ids(void **state)
{
    (void)state;
    static struct pagemap *pm[PAGEMAP_IDS];
    struct hmm_pagemap_desc desc = {.type = HMM_PAGEMAP_PRIVATE, .pages = 1};
    struct pagemap *none = NULL;
    assert_null(pagemap_by_id(0));
    assert_null(pagemap_by_id(PAGEMAP_IDS));
    assert_null(pagemap_by_id(UINT32_MAX));
    for (unsigned i = 1; i < PAGEMAP_IDS; i++) {
        pm[i] = make(1, NULL, NULL);
        assert_in_range(pm[i]->id, 1, 255);
        assert_ptr_equal(pagemap_by_id(pm[i]->id), pm[i]);
    }
    assert_int_equal(pagemap_create(&desc, NULL, NULL, &none), -ENFILE);
    assert_null(none);
    uint32_t gap = pm[7]->id;
    finish(pm[7]);
    assert_null(pagemap_by_id(gap));
    pm[7] = make(1, NULL, NULL);
    assert_int_equal(pm[7]->id, gap);
    for (unsigned i = 1; i < PAGEMAP_IDS; i++)
        finish(pm[i]);
    struct pagemap *a = make(1, NULL, NULL);
    uint32_t id = a->id;
    finish(a);
    a = make(1, NULL, NULL); /* ids go round */
    assert_int_not_equal(a->id, id);
    finish(a);
}

/* ---- allocation ---- */

static void test_alloc_is_contiguous_where_possible(void **state)
{
    (void)state;
    struct pagemap *pm = make(1024, NULL, NULL);
    struct page_run runs[8];
    unsigned n;
    assert_int_equal(pagemap_alloc(pm, 512, runs, 8, &n), 512);
    assert_int_equal(n, 1);
    assert_int_equal(runs[0].page, 0);
    assert_int_equal(runs[0].count, 512);
    assert_int_equal(pagemap_alloc(pm, 7, runs, 8, &n), 7); /* 4 + 2 + 1, one after the other */
    assert_int_equal(n, 1);
    assert_int_equal(runs[0].page, 512);
    assert_int_equal(runs[0].count, 7);
    assert_int_equal(pm->used, 519);
    assert_true(pagemap_is_valid(pm));
    assert_int_equal(pagemap_alloc(pm, 1000, runs, 8, &n), 505); /* what is left */
    assert_int_equal(pagemap_alloc(pm, 1, runs, 8, &n), 0);
    assert_int_equal(n, 0);
    assert_true(pagemap_is_valid(pm));
    pagemap_put(pm, 0, 1024);
    finish(pm);
}

static void test_alloc_keeps_to_max_runs(void **state)
{
    (void)state;
    struct pagemap *pm = make(64, NULL, NULL);
    struct page_run runs[40];
    unsigned n;
    assert_int_equal(pagemap_alloc(pm, 64, runs, 1, &n), 64);
    for (uint64_t i = 0; i < 64; i += 2)
        pagemap_put(pm, i, 1);
    runs[3].page = 12345;
    assert_int_equal(pagemap_alloc(pm, 10, runs, 3, &n), 3);
    assert_int_equal(n, 3);
    assert_int_equal(runs[3].page, 12345);
    assert_true(pagemap_is_valid(pm));
    assert_int_equal(pagemap_alloc(pm, 10, runs, 0, &n), 0);
    assert_int_equal(pagemap_alloc(pm, 100, runs, 40, &n), 29);
    assert_int_equal(n, 29);
    pagemap_put(pm, 0, 64);
    finish(pm);
}

/* ---- counts ---- */

struct freed {
    struct pagemap *pm;
    unsigned calls[PAGES];
    unsigned total;
    bool bad;
};

static void page_free(void *priv, uint64_t page)
{
    struct freed *f = priv;
    f->calls[page]++;
    f->total++;
    /* Not given to anybody yet, nobody's page any more, and no lock is held. */
    f->bad |= f->pm->pages[page].refs != 0 || buddy_is_free(f->pm->buddy, page) || lock_held_ranks() != 0;
}

static const struct hmm_pagemap_ops counting_ops = {.page_free = page_free};

static void test_last_reference_frees_once(void **state)
{
    (void)state;
    static struct freed f;
    struct page_run run;
    unsigned n;
    memset(&f, 0, sizeof(f));
    struct pagemap *pm = f.pm = make(PAGES, &counting_ops, &f);
    assert_int_equal(pagemap_alloc(pm, 100, &run, 1, &n), 100);
    uint64_t first = run.page;
    for (uint64_t i = 0; i < 100; i++)
        page_set_owner(&pm->pages[first + i], 0x1000 * (i + 1));
    for (uint64_t i = 0; i < 100; i += 3)
        pagemap_get(pm, first + i);
    pagemap_put(pm, first, 100);
    assert_int_equal(f.total, 66);
    assert_int_equal(pm->used, 34);
    for (uint64_t i = 0; i < 100; i++) {
        assert_int_equal(f.calls[first + i], i % 3 ? 1 : 0);
        assert_int_equal(page_owner(&pm->pages[first + i]), i % 3 ? 0 : 0x1000 * (i + 1));
    }
    assert_true(pagemap_is_valid(pm));
    for (uint64_t i = 0; i < 100; i += 3)
        pagemap_put(pm, first + i, 1);
    assert_int_equal(f.total, 100);
    assert_false(f.bad);
    finish(pm);
}

static void test_pins_hold_references(void **state)
{
    (void)state;
    struct pagemap *pm = make(PAGES, NULL, NULL);
    uint64_t page = take(pm);
    assert_int_equal(pagemap_pin(pm, page), 0);
    assert_int_equal(pagemap_pin(pm, page), 0);
    assert_int_equal(pagemap_pins(pm, page), 2);
    assert_int_equal(pm->pages[page].refs, 3);
    pagemap_put(pm, page, 1);
    assert_true(pagemap_is_valid(pm));
    pagemap_unpin(pm, page);
    assert_int_equal(pagemap_pins(pm, page), 1);
    assert_int_equal(pm->used, 1);
    pagemap_unpin(pm, page);
    assert_int_equal(pm->used, 0);
    assert_string_equal(logged, "");
    finish(pm);
}

static void test_misuse_is_reported_and_harmless(void **state)
{
    (void)state;
    struct pagemap *pm = make(PAGES, NULL, NULL);
    uint64_t page = take(pm);
    pagemap_unpin(pm, page);
    assert_non_null(strstr(logged, "pin"));
    assert_int_equal(pm->pages[page].refs, 1);
    logged[0] = 0;
    pagemap_put(pm, page + 1, 1);
    assert_non_null(strstr(logged, "nobody holds"));
    logged[0] = 0;
    pagemap_put(pm, PAGES - 1, 2);
    assert_non_null(strstr(logged, "nobody holds"));
    logged[0] = 0;
    pagemap_get(pm, page + 1);
    assert_non_null(strstr(logged, "free"));
    logged[0] = 0;
    assert_int_equal(pagemap_pin(pm, page + 1), -EINVAL);
    assert_non_null(strstr(logged, "free"));
    assert_true(pagemap_is_valid(pm));
    pagemap_put(pm, page, 1);
    finish(pm);
}

static void test_counts_against_model(void **state)
{
    (void)state;
    static struct freed f;
    static uint32_t refs[PAGES], pins[PAGES];
    static unsigned calls[PAGES];
    unsigned seed = 5, n;
    memset(&f, 0, sizeof(f));
    struct pagemap *pm = f.pm = make(PAGES, &counting_ops, &f);
    for (int step = 0; step < 20000; step++) {
        uint64_t page = (uint64_t)rand_r(&seed) % PAGES, count = 1 + (uint64_t)rand_r(&seed) % 20;
        struct page_run runs[4];
        switch (rand_r(&seed) % 5) {
        case 0: {
            int64_t got = pagemap_alloc(pm, count, runs, 4, &n), sum = 0;
            for (unsigned r = 0; r < n; r++)
                for (uint64_t i = 0; i < runs[r].count; i++, sum++)
                    assert_int_equal(refs[runs[r].page + i]++, 0);
            assert_int_equal(sum, got);
            break;
        }
        case 1:
            if (refs[page])
                pagemap_get(pm, page), refs[page]++;
            break;
        case 2:
            if (refs[page])
                assert_int_equal(pagemap_pin(pm, page), 0), refs[page]++, pins[page]++;
            break;
        case 3:
            if (pins[page])
                pagemap_unpin(pm, page), pins[page]--, calls[page] += --refs[page] == 0;
            break;
        default: /* a run, as long as it has references that are not pins */
            for (n = 0; n < count && page + n < PAGES && refs[page + n] > pins[page + n]; n++)
                calls[page + n] += --refs[page + n] == 0;
            pagemap_put(pm, page, n);
        }
        if (step % 64 == 0)
            assert_true(pagemap_is_valid(pm));
        assert_int_equal(pm->pages[page].refs, refs[page]);
        assert_int_equal(pagemap_pins(pm, page), pins[page]);
    }
    uint64_t used = 0;
    for (uint64_t i = 0; i < PAGES; i++) {
        used += refs[i] > 0;
        assert_int_equal(f.calls[i], calls[i]);
    }
    assert_int_equal(pm->used, used);
    for (uint64_t i = 0; i < PAGES; i++) {
        for (; pins[i]; pins[i]--, refs[i]--)
            pagemap_unpin(pm, i);
        for (; refs[i]; refs[i]--)
            pagemap_put(pm, i, 1);
    }
    assert_false(f.bad);
    assert_string_equal(logged, "");
    finish(pm);
}

static void test_validator_sees_damage(void **state)
{
    (void)state;
    struct pagemap *pm = make(PAGES, NULL, NULL);
    uint64_t page = take(pm), other = page + 1;
    assert_true(pagemap_is_valid(pm));
    pm->used++;
    assert_false(pagemap_is_valid(pm));
    pm->used--;
    pm->pages[page].pins = 2; /* more pins than references */
    assert_false(pagemap_is_valid(pm));
    pm->pages[page].pins = 0;
    page_set_owner(&pm->pages[other], 0x1000); /* a free page with an owner */
    assert_false(pagemap_is_valid(pm));
    page_set_owner(&pm->pages[other], 0);
    pm->pages[other].refs = 1; /* the reference moved to a page that the buddy thinks free */
    pm->pages[page].refs = 0;
    assert_false(pagemap_is_valid(pm));
    pm->pages[other].refs = 0;
    assert_false(pagemap_is_valid(pm)); /* a reference lost */
    pm->pages[page].refs = 1;
    assert_true(pagemap_is_valid(pm));
    pagemap_put(pm, page, 1);
    finish(pm);
}

static void test_metadata_is_accounted(void **state)
{
    (void)state;
    struct pagemap *pm = make(100000, NULL, NULL);
    uint64_t bytes = pagemap_metadata_bytes(pm);
    assert_true(bytes >= 100000 * 12 && bytes <= 100000 * 12 + 100000 / 3 + 4096);
    assert_true(mem_used() >= bytes && mem_used() <= bytes + 16384);
    finish(pm);
}

/* ---- the end ---- */

static void test_dying_gives_nothing_and_is_still_found(void **state)
{
    (void)state;
    struct pagemap *pm = make(PAGES, NULL, NULL);
    uint64_t page = take(pm);
    struct page_run run;
    unsigned n;
    assert_int_equal(pagemap_wait(pm, 1000000), -ETIMEDOUT);
    pagemap_kill(pm);
    assert_int_equal(pagemap_alloc(pm, 1, &run, 1, &n), -ENODEV);
    assert_int_equal(pagemap_pin(pm, page), -ENODEV);
    assert_int_equal(pagemap_pins(pm, page), 0);
    assert_ptr_equal(pagemap_by_id(pm->id), pm);
    uint64_t before = os_now();
    assert_int_equal(pagemap_wait(pm, 20000000), -ETIMEDOUT);
    assert_true(os_now() - before >= 20000000);
    assert_int_equal(pagemap_wait(pm, 0), -ETIMEDOUT);
    pagemap_put(pm, page, 1);
    finish(pm);
}

static void test_destroy_in_use_is_reported(void **state)
{
    (void)state;
    struct pagemap *pm = make(PAGES, NULL, NULL);
    take(pm);
    pagemap_kill(pm);
    pagemap_destroy(pm);
    assert_non_null(strstr(logged, "in use"));
}

/* ---- threads ---- */

static uint32_t frees_slowly;

static void slow_free(void *priv, uint64_t page)
{
    (void)page;
    for (int i = 0; i < 20; i++)
        sched_yield();
    __atomic_fetch_add((uint32_t *)priv, 1, __ATOMIC_RELEASE);
}

static void *put_all(void *arg)
{
    struct pagemap *pm = arg;
    pagemap_put(pm, 0, 3);
    pagemap_put(pm, 3, 1);
    return NULL;
}

/* wait must not return before the last page_free has, and the memory may go at once, though the putter has not returned. */
static void test_wait_covers_page_free_and_putters(void **state)
{
    (void)state;
    static const struct hmm_pagemap_ops ops = {.page_free = slow_free};
    for (int round = 0; round < 200; round++) {
        struct page_run run;
        unsigned n;
        pthread_t t;
        frees_slowly = 0;
        struct pagemap *pm = make(4, round % 2 ? &ops : NULL, &frees_slowly);
        assert_int_equal(pagemap_alloc(pm, 4, &run, 1, &n), 4);
        pagemap_kill(pm);
        assert_int_equal(pthread_create(&t, NULL, put_all, pm), 0);
        assert_int_equal(pagemap_wait(pm, round % 4 < 2 ? -1 : 5000000000), 0);
        assert_int_equal(__atomic_load_n(&frees_slowly, __ATOMIC_ACQUIRE), round % 2 ? 4 : 0);
        pagemap_destroy(pm);
        pthread_join(t, NULL);
    }
}

struct stress {
    struct pagemap *pm;
    uint32_t *holders; /* per page: threads that think it is theirs */
    uint32_t *rounds;  /* of all threads */
    unsigned seed;
    bool bad;
};

/* Takes pages, pins them now and then, gives them back. No page may have two holders. */
static void *stress_thread(void *arg)
{
    struct stress *s = arg;
    for (;; __atomic_fetch_add(s->rounds, 1, __ATOMIC_RELAXED)) {
        struct page_run runs[8];
        unsigned n;
        int64_t got = pagemap_alloc(s->pm, 1 + (uint64_t)rand_r(&s->seed) % 64, runs, 8, &n);
        if (got == -ENODEV)
            return NULL;
        for (unsigned r = 0; r < n; r++) {
            for (uint64_t p = runs[r].page; p < runs[r].page + runs[r].count; p++) {
                s->bad |= __atomic_fetch_add(&s->holders[p], 1, __ATOMIC_RELAXED) != 0;
                page_set_owner(&s->pm->pages[p], p << 12);
                if (p % 5 == 0 && pagemap_pin(s->pm, p) == 0)
                    pagemap_unpin(s->pm, p);
                __atomic_fetch_sub(&s->holders[p], 1, __ATOMIC_RELAXED);
            }
            pagemap_put(s->pm, runs[r].page, runs[r].count);
        }
    }
}

static void quick_free(void *priv, uint64_t page)
{
    struct stress *s = priv;
    if (__atomic_load_n(&s->holders[page], __ATOMIC_RELAXED))
        __atomic_store_n(&s->bad, true, __ATOMIC_RELAXED);
}

static void test_threads_never_share_a_page(void **state)
{
    (void)state;
    static const struct hmm_pagemap_ops ops = {.page_free = quick_free};
    static uint32_t holders[300];
    struct stress own = {.holders = holders};
    for (int with_ops = 0; with_ops < 2; with_ops++) {
        struct pagemap *pm = make(300, with_ops ? &ops : NULL, &own);
        struct stress s[3];
        uint32_t rounds = 0;
        pthread_t t[3];
        for (unsigned i = 0; i < 3; i++) {
            s[i] = (struct stress){.pm = pm, .holders = holders, .rounds = &rounds, .seed = i};
            assert_int_equal(pthread_create(&t[i], NULL, stress_thread, &s[i]), 0);
        }
        bool valid = true;
        while (__atomic_load_n(&rounds, __ATOMIC_RELAXED) < 6000)
            valid &= pagemap_is_valid(pm); /* holds at any moment */
        pagemap_kill(pm);
        assert_int_equal(pagemap_wait(pm, -1), 0);
        for (int i = 0; i < 3; i++) {
            pthread_join(t[i], NULL);
            assert_false(s[i].bad);
        }
        assert_true(valid);
        finish(pm);
    }
    assert_false(own.bad);
    assert_string_equal(logged, "");
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_wrong_descriptions_are_refused),
        T(test_each_failing_allocation_is_undone),
        T(test_cpu_maps_may_not_overlap),
        T(test_ids),
        T(test_alloc_is_contiguous_where_possible),
        T(test_alloc_keeps_to_max_runs),
        T(test_last_reference_frees_once),
        T(test_pins_hold_references),
        T(test_misuse_is_reported_and_harmless),
        T(test_counts_against_model),
        T(test_validator_sees_damage),
        T(test_metadata_is_accounted),
        T(test_dying_gives_nothing_and_is_still_found),
        T(test_destroy_in_use_is_reported),
        T(test_wait_covers_page_free_and_putters),
        T(test_threads_never_share_a_page),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
