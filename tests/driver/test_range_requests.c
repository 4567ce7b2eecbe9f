/* SPDX-License-Identifier: MIT */
/* hmm_range_fault(): each page gets what is asked of it and nothing else, over ranges of any length; requests survive an error. */
#include "range.h"

/* ---- requests ---- */

/* Each page gets what is asked of it, and nothing else. */
static void each_page_gets_what_is_asked_of_it(void **state)
{
    (void)state;
    static const uint64_t requests[] = {0, REQ_READ, REQ_WRITE, HMM_PFN_REQ_WRITE};
    char *p = anonymous();
    struct hmm_fault_range r = range_of(p, PAGES * page, 0);
    r.pfn_flags_mask = REQ_WRITE;
    watch(p, PAGES * page);
    for (size_t i = 0; i < PAGES; i++)
        pfns[i] = requests[i % 4] | 0x1234 | HMM_PFN_ERROR | HMM_PFN_DEVICE; /* only the requests count */
    assert_int_equal(hmm_range_fault_timeout(dev(), &r, -1), 0);
    for (size_t i = 0; i < PAGES; i++) {
        uint64_t bits = i % 4 == 1 ? HMM_PFN_VALID : i % 4 == 2 ? HMM_PFN_VALID | HMM_PFN_WRITE : 0;
        assert_int_equal(pfns[i], bits ? bits | ((uintptr_t)p / page + i) : 0);
        assert_int_equal(is_present(p + i * page), bits != 0);
    }
    unwatch();
    munmap(p, PAGES * page);
}

/* The mask leaves out what it does not have; the default counts for all. The kernel's own example. */
static void the_mask_and_the_default(void **state)
{
    (void)state;
    char *p = anonymous();
    struct hmm_fault_range r = range_of(p, PAGES * page, HMM_PFN_REQ_FAULT);
    r.pfn_flags_mask = HMM_PFN_REQ_WRITE;
    watch(p, PAGES * page);
    memset(pfns, 0, sizeof(pfns));
    pfns[7] = HMM_PFN_REQ_WRITE;
    assert_int_equal(hmm_range_fault_timeout(dev(), &r, -1), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i], HMM_PFN_VALID | (i == 7 ? HMM_PFN_WRITE : 0) | ((uintptr_t)p / page + i));
    r.default_flags = 0;
    r.pfn_flags_mask = HMM_PFN_REQ_FAULT;
    munmap(p, PAGES * page);
    assert_int_equal(mmap(p, PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p, 1);
    for (size_t i = 0; i < PAGES; i++)
        pfns[i] = i == 9 ? REQ_WRITE : HMM_PFN_REQ_WRITE;
    assert_int_equal(hmm_range_fault_timeout(dev(), &r, -1), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i], i == 9 ? HMM_PFN_VALID | ((uintptr_t)p / page + i) : 0); /* for reading */
    unwatch();
    munmap(p, PAGES * page);
}

/* After an error the requests stand where they were: the caller can ask again. */
static void requests_survive_an_error(void **state)
{
    (void)state;
    char *p = anonymous();
    struct hmm_fault_range r = range_of(p, PAGES * page, 0);
    uint64_t asked[PAGES];
    r.pfn_flags_mask = REQ_WRITE;
    munmap(p + 20 * page, page);
    watch(p, PAGES * page);
    for (size_t i = 0; i < PAGES; i++)
        asked[i] = pfns[i] = i % 2 ? REQ_WRITE : i % 3 ? REQ_READ : 0;
    assert_int_equal(hmm_range_fault_timeout(dev(), &r, -1), -EFAULT);
    assert_memory_equal(pfns, asked, sizeof(asked));
    pfns[20] = asked[20] = 0;
    assert_int_equal(hmm_range_fault_timeout(dev(), &r, -1), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(pfns[i] >> 61, i == 20 ? HMM_PFN_ERROR >> 61 : asked[i] >> 61);
    unwatch();
    munmap(p, PAGES * page);
}

/* ---- large ranges ---- */

static void a_range_of_many_mappings_and_blocks(void **state)
{
    (void)state;
    size_t bytes = 7 * BLOCK + 5 * page;
    char *p = map_pages(8 * BLOCK) + 3 * page;
    for (size_t i = 0; i < bytes / page; i++)
        if (i % 5 == 0)
            p[i * page] = 1;
    munmap(p + 2 * BLOCK, 3 * page);
    assert_int_equal(mprotect(p + 3 * BLOCK, BLOCK, PROT_READ), 0);
    assert_int_equal(ask(p, bytes, 0), 0);
    for (size_t i = 0; i < bytes / page; i++) {
        bool hole = i * page >= 2 * BLOCK && i * page < 2 * BLOCK + 3 * page, fixed = i * page / BLOCK == 3;
        uint64_t bits = hole ? HMM_PFN_ERROR : i % 5 ? 0 : HMM_PFN_VALID | (fixed ? 0 : HMM_PFN_WRITE);
        assert_int_equal(pfns[i], bits & HMM_PFN_VALID ? bits | ((uintptr_t)p / page + i) : bits);
    }
    assert_int_equal(ask(p, 2 * BLOCK, REQ_WRITE), 0);
    for (size_t i = 0; i < 2 * BLOCK / page; i++)
        assert_int_equal(pfns[i], HMM_PFN_VALID | HMM_PFN_WRITE | ((uintptr_t)p / page + i));
    unmap_pages(p - 3 * page, 8 * BLOCK);
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(each_page_gets_what_is_asked_of_it),
        TEST(the_mask_and_the_default),
        TEST(requests_survive_an_error),
        TEST(a_range_of_many_mappings_and_blocks),
    };
    page = page_size();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
