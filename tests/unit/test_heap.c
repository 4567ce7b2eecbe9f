/* SPDX-License-Identifier: MIT */
/* The pairing heap against a plain array, and a heap as deep as it is large. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "base/heap.h"
#include "base/util.h"
#include "common/oracle.h"

#define NODES 2000

struct item {
    struct heap_node node;
    uint64_t key;
    bool in;
};

static bool before(const struct heap_node *a, const struct heap_node *b)
{
    return container_of(a, struct item, node)->key < container_of(b, struct item, node)->key;
}

static uint64_t smallest(const struct item *items)
{
    uint64_t key = UINT64_MAX;
    for (int i = 0; i < NODES; i++)
        if (items[i].in && items[i].key < key)
            key = items[i].key;
    return key;
}

static void test_against_an_array(void **state)
{
    (void)state;
    static struct item items[NODES];
    struct heap h = {.before = before};
    uint64_t seed = 42;
    for (int step = 0; step < 20000; step++) {
        struct item *i = &items[random_next(&seed) % NODES];
        bool pop = random_next(&seed) % 4 == 0 && h.first;
        if (pop)
            i = container_of(h.first, struct item, node);
        if (i->in) {
            heap_remove(&h, &i->node);
        } else {
            i->key = random_next(&seed) % 1000; /* some are equal */
            heap_insert(&h, &i->node);
        }
        i->in = !i->in;
        uint64_t least = smallest(items);
        assert_int_equal(h.first ? container_of(h.first, struct item, node)->key : UINT64_MAX, least);
    }
}

/* Descending keys make a path, removals from its middle make others. */
static void test_deep(void **state)
{
    (void)state;
    enum { MANY = 300000 };
    struct item *items = calloc(MANY, sizeof(*items));
    struct heap h = {.before = before};
    for (int i = 0; i < MANY; i++) {
        items[i].key = (uint64_t)(MANY - i);
        heap_insert(&h, &items[i].node);
    }
    for (int i = 1; i < MANY; i += 2)
        heap_remove(&h, &items[i].node);
    uint64_t last = 0;
    unsigned n = 0;
    while (h.first) {
        struct item *i = container_of(h.first, struct item, node);
        assert_true(i->key > last);
        last = i->key;
        heap_remove(&h, &i->node);
        n++;
    }
    assert_int_equal(n, MANY / 2);
    free(items);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_against_an_array), cmocka_unit_test(test_deep)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
