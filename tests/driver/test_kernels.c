/* SPDX-License-Identifier: MIT */
/* User kernels that follow the program's own pointers, and what CPU and device see of each other's writes. */
#include "support.h"

/* ---- lists --------------------------------------------------------------------------------------------------------- */

struct node {
    struct node *next;
    uint64_t value;
    char padding[100];
};

/* Nodes made in one order and linked in another, each an allocation of its own. */
static struct node *make_list(unsigned n, uint64_t *sum)
{
    struct node **nodes = malloc(n * sizeof(*nodes)), *head = NULL;
    uint64_t seed = 11;
    *sum = 0;
    for (unsigned i = 0; i < n; i++) {
        nodes[i] = calloc(1, sizeof(struct node));
        nodes[i]->value = random_next(&seed) >> 32;
        *sum += nodes[i]->value;
    }
    for (unsigned i = n; i > 1; i--) {
        unsigned k = random_next(&seed) % i;
        struct node *t = nodes[i - 1];
        nodes[i - 1] = nodes[k];
        nodes[k] = t;
    }
    for (unsigned i = 0; i < n; i++) {
        nodes[i]->next = head;
        head = nodes[i];
    }
    free(nodes);
    return head;
}

static void free_list(struct node *n)
{
    while (n) {
        struct node *next = n->next;
        free(n);
        n = next;
    }
}

HMM_KERNEL(sum_list)
{
    uint64_t sum = 0;
    struct node n;
    for (const struct node *at = *(struct node **)arg; at; at = n.next) {
        hmm_get(acc, &n, at, offsetof(struct node, padding));
        sum += n.value;
    }
    return sum;
}

HMM_KERNEL(add_one_to_list)
{
    uint64_t count = 0;
    struct node n;
    for (struct node *at = *(struct node **)arg; at; at = n.next) {
        hmm_get(acc, &n, at, offsetof(struct node, padding));
        n.value++;
        hmm_put(acc, &at->value, &n.value, sizeof(n.value));
        count++;
    }
    return count;
}

static void a_linked_list_is_walked(void **state)
{
    (void)state;
    uint64_t sum;
    struct node *head = make_list(20000, &sum);
    assert_int_equal(must_run(device, sum_list, &head, sizeof(head)), sum);
    free_list(head);
}

static void a_linked_list_is_changed_in_place(void **state)
{
    (void)state;
    uint64_t sum, seen = 0;
    struct node *head = make_list(20000, &sum);
    assert_int_equal(must_run(device, add_one_to_list, &head, sizeof(head)), 20000);
    for (struct node *n = head; n; n = n->next)
        seen += n->value;
    assert_int_equal(seen, sum + 20000);
    free_list(head);
}

static void cpu_and_device_take_turns_on_a_list(void **state)
{
    (void)state;
    uint64_t sum;
    struct node *head = make_list(3000, &sum);
    for (int round = 0; round < 20; round++) {
        must_run(device, add_one_to_list, &head, sizeof(head));
        for (struct node *n = head; n; n = n->next)
            n->value += 2;
        sum += 3 * 3000;
        assert_int_equal(must_run(device, sum_list, &head, sizeof(head)), sum);
    }
    free_list(head);
}

/* ---- a hash table with chains ---------------------------------------------------------------------------------------- */

#define BUCKETS 1024

struct entry {
    struct entry *next;
    uint64_t key, value;
};

struct lookup {
    struct entry **table;
    uint64_t *keys, *values;
    uint64_t n;
};

HMM_KERNEL(look_up_all)
{
    struct lookup *l = arg;
    uint64_t found = 0;
    for (uint64_t i = 0; i < l->n; i++) {
        struct entry *at, e;
        uint64_t key;
        hmm_get(acc, &key, &l->keys[i], sizeof(key));
        hmm_get(acc, &at, &l->table[key % BUCKETS], sizeof(at));
        for (; at; at = e.next) {
            hmm_get(acc, &e, at, sizeof(e));
            if (e.key == key) {
                hmm_put(acc, &l->values[i], &e.value, sizeof(e.value));
                found++;
                break;
            }
        }
    }
    return found;
}

static void a_hash_table_is_searched(void **state)
{
    (void)state;
    enum { N = 5000 };
    struct entry **table = calloc(BUCKETS, sizeof(*table));
    struct lookup l = {.table = table, .keys = malloc(2 * N * 8), .values = calloc(2 * N, 8), .n = 2 * N};
    for (uint64_t i = 0; i < N; i++) {
        struct entry *e = malloc(sizeof(*e));
        *e = (struct entry){table[i * 7 % BUCKETS], i * 7, i * i};
        table[i * 7 % BUCKETS] = e;
    }
    for (uint64_t i = 0; i < 2 * N; i++)
        l.keys[i] = i * 7; /* the second half is not in the table */
    assert_int_equal(must_run(device, look_up_all, &l, sizeof(l)), N);
    for (uint64_t i = 0; i < 2 * N; i++)
        assert_int_equal(l.values[i], i < N ? i * i : 0);
    for (unsigned b = 0; b < BUCKETS; b++)
        for (struct entry *e = table[b], *next; e; e = next) {
            next = e->next;
            free(e);
        }
    free(table);
    free(l.keys);
    free(l.values);
}

/* ---- a binary tree ---------------------------------------------------------------------------------------------------- */

struct branch {
    struct branch *child[2];
    uint32_t key;
};

HMM_KERNEL(depth_sum)
{
    struct branch *stack[64], b;
    uint64_t sum = 0, level[64], top = 0;
    stack[top] = *(struct branch **)arg;
    level[top++] = 1;
    while (top) {
        struct branch *at = stack[--top];
        uint64_t depth = level[top];
        hmm_get(acc, &b, at, sizeof(b));
        sum += depth * b.key;
        for (int side = 0; side < 2; side++)
            if (b.child[side]) {
                stack[top] = b.child[side];
                level[top++] = depth + 1;
            }
    }
    return sum;
}

static uint64_t cpu_depth_sum(const struct branch *b, uint64_t depth)
{
    return b ? depth * b->key + cpu_depth_sum(b->child[0], depth + 1) + cpu_depth_sum(b->child[1], depth + 1) : 0;
}

static void free_tree(struct branch *b)
{
    if (b) {
        free_tree(b->child[0]);
        free_tree(b->child[1]);
        free(b);
    }
}

static void a_binary_tree_is_traversed(void **state)
{
    (void)state;
    struct branch *root = NULL;
    uint64_t seed = 12;
    for (int i = 0; i < 10000; i++) {
        uint32_t key = (uint32_t)random_next(&seed);
        struct branch **at = &root;
        while (*at)
            at = &(*at)->child[key > (*at)->key];
        *at = calloc(1, sizeof(**at));
        (*at)->key = key;
    }
    uint64_t expected = cpu_depth_sum(root, 1);
    assert_int_equal(must_run(device, depth_sum, &root, sizeof(root)), expected);
    assert_int_equal(cpu_depth_sum(root, 1), expected);
    free_tree(root);
}

/* ---- spans ------------------------------------------------------------------------------------------------------------ */

struct piece {
    char *at;
    size_t len;
};

/* Goes through a range span by span, and adds one to each byte. Returns 0, or what was wrong. */
HMM_KERNEL(increment_bytes)
{
    struct piece *p = arg;
    for (size_t done = 0, n; done < p->len; done += n) {
        n = p->len - done;
        char *span = hmm_span_write(acc, p->at + done, &n);
        if (!span || n == 0 || n > p->len - done)
            return 1;
        for (size_t i = 0; i < n; i++)
            span[i]++;
    }
    return 0;
}

static void spans_cover_any_range_exactly(void **state)
{
    (void)state;
    size_t bytes = 5 * MIB;
    char *p = map_pages(bytes), *oracle = malloc(bytes);
    uint64_t seed = 13;
    fill_random(p, bytes, 14);
    memcpy(oracle, p, bytes);
    for (int i = 0; i < 200; i++) {
        size_t from = random_next(&seed) % bytes, len = 1 + random_next(&seed) % (bytes - from);
        if (i % 2)
            len = 1 + len % 5000;
        struct piece piece = {p + from, len};
        assert_int_equal(must_run(device, increment_bytes, &piece, sizeof(piece)), 0);
        for (size_t k = 0; k < len; k++)
            oracle[from + k]++;
    }
    assert_memory_equal(p, oracle, bytes);
    free(oracle);
    unmap_pages(p, bytes);
}

struct transfer {
    char *from, *to;
    size_t len;
    char local[5000];
};

HMM_KERNEL(through_local)
{
    struct transfer *t = arg;
    hmm_get(acc, t->local, t->from, t->len);
    hmm_put(acc, t->to, t->local, t->len);
    return t->len;
}

static void get_and_put_cross_pages_and_blocks(void **state)
{
    (void)state;
    char *p = map_pages(8 * MIB);
    struct transfer t = {.len = sizeof(t.local)};
    fill_random(p, 8 * MIB, 15);
    for (size_t shift = 0; shift <= sizeof(t.local); shift += 625) {
        t.from = p + 2 * MIB - shift;
        t.to = p + 6 * MIB - shift + 3;
        assert_int_equal(must_run(device, through_local, &t, sizeof(t)), t.len);
        assert_memory_equal(t.from, t.to, t.len);
    }
    unmap_pages(p, 8 * MIB);
}

/* ---- arguments and results -------------------------------------------------------------------------------------------- */

struct slow_arg {
    struct control control; /* flags[0]: go on */
    uint64_t value;
};

HMM_KERNEL(value_when_told)
{
    struct slow_arg *a = arg;
    volatile uint32_t *go = open_control(&a->control);
    while (!*go)
        hmm_yield(acc);
    return (uintptr_t)arg % 16 == 0 ? a->value : 0;
}

static void arguments_are_copied_at_launch_and_aligned(void **state)
{
    (void)state;
    struct slow_arg a = {make_control(), 4711};
    hmm_fence *fence = launch(device, value_when_told, &a, sizeof(a), 0);
    a.value = 1;
    *a.control.flags = 1;
    assert_int_equal(must(fence), 4711);
    free_control(&a.control);
}

HMM_KERNEL(clobber_arg)
{
    (void)acc;
    memset(arg, 0xff, 64 << 10);
    return 1;
}

static void the_argument_copy_is_the_kernels_own(void **state)
{
    (void)state;
    char *arg = calloc(1, 64 << 10);
    assert_int_equal(must_run(device, clobber_arg, arg, 64 << 10), 1);
    for (int i = 0; i < 64 << 10; i++)
        assert_int_equal(arg[i], 0);
    free(arg);
}

HMM_KERNEL(no_argument)
{
    (void)acc;
    (void)arg;
    return UINT64_MAX;
}

static void results_have_64_bits_and_arguments_may_be_absent(void **state)
{
    (void)state;
    assert_true(must_run(device, no_argument, NULL, 0) == UINT64_MAX);
}

static void a_wait_that_runs_out_says_so_and_the_job_goes_on(void **state)
{
    (void)state;
    struct slow_arg a = {make_control(), 5};
    struct hmm_fence_info info = {.size = sizeof(info)};
    hmm_fence *fence = launch(device, value_when_told, &a, sizeof(a), 0);
    assert_int_equal(hmm_fence_wait(fence, 10000000), -EAGAIN);
    assert_int_equal(hmm_fence_info(fence, &info), 0);
    assert_int_equal(info.status, -EINPROGRESS);
    *a.control.flags = 1;
    assert_int_equal(must(fence), 5);
    free_control(&a.control);
}

/* ---- both sides at once ------------------------------------------------------------------------------------------------ */

struct counters {
    uint64_t *at;
    uint64_t rounds, stride, count;
};

/* Adds one to each counter, rounds times, not in a hurry. The CPU uses other bytes of the same pages meanwhile. */
HMM_KERNEL(count_up)
{
    struct counters *c = arg;
    for (uint64_t round = 0; round < c->rounds; round++)
        for (uint64_t i = 0; i < c->count; i++) {
            size_t len = sizeof(uint64_t);
            volatile uint64_t *word = hmm_span_write(acc, c->at + i * c->stride, &len);
            uint64_t value = *word;
            for (volatile int wait = 0; wait < 300; wait++)
                ;
            *word = value + 1;
        }
    return 0;
}

/* Three writers share each page: two kernels and the CPU; no write of any may be lost. */
static void no_write_is_lost_on_pages_that_both_sides_write(void **state)
{
    (void)state;
    enum { PAGES = 40, ROUNDS = 100 };
    char *p = map_pages(PAGES * page_size());
    uint64_t stride = page_size() / sizeof(uint64_t);
    struct counters a = {(uint64_t *)p, ROUNDS, stride, PAGES}, b = {(uint64_t *)p + 1, ROUNDS, stride, PAGES};
    hmm_fence *fa = launch(device, count_up, &a, sizeof(a), 0), *fb = launch(device, count_up, &b, sizeof(b), 0);
    volatile uint64_t *mine = (uint64_t *)p + 2;
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < PAGES; i++)
            mine[i * stride]++;
    must(fa);
    must(fb);
    for (int i = 0; i < PAGES; i++) {
        assert_int_equal(a.at[i * stride], ROUNDS);
        assert_int_equal(b.at[i * stride], ROUNDS);
        assert_int_equal(mine[i * stride], ROUNDS);
    }
    unmap_pages(p, PAGES * page_size());
}

struct mailbox {
    volatile uint64_t *to_device, *to_cpu;
    uint64_t rounds;
};

HMM_KERNEL(echo)
{
    struct mailbox *m = arg;
    for (uint64_t round = 1; round <= m->rounds; round++) {
        uint64_t v = 0;
        while (v != round)
            hmm_get(acc, &v, (const void *)m->to_device, sizeof(v));
        v *= 3;
        hmm_put(acc, (void *)m->to_cpu, &v, sizeof(v));
        hmm_yield(acc);
    }
    return 0;
}

/* While both run: each sees what the other wrote, in the same page. */
static void cpu_and_device_exchange_messages_through_memory(void **state)
{
    (void)state;
    char *p = map_pages(page_size());
    struct mailbox m = {(uint64_t *)p, (uint64_t *)(p + 128), 50};
    uint64_t until = now_ms() + JOB_SECONDS * 1000;
    hmm_fence *fence = launch(device, echo, &m, sizeof(m), 0);
    for (uint64_t round = 1; round <= m.rounds; round++) {
        *m.to_device = round;
        while (*m.to_cpu != round * 3)
            if (now_ms() > until)
                fail_msg("no answer in round %d", (int)round);
    }
    must(fence);
    unmap_pages(p, page_size());
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_linked_list_is_walked),
        TEST(a_linked_list_is_changed_in_place),
        TEST(cpu_and_device_take_turns_on_a_list),
        TEST(a_hash_table_is_searched),
        TEST(a_binary_tree_is_traversed),
        TEST(spans_cover_any_range_exactly),
        TEST(get_and_put_cross_pages_and_blocks),
        TEST(arguments_are_copied_at_launch_and_aligned),
        TEST(the_argument_copy_is_the_kernels_own),
        TEST(results_have_64_bits_and_arguments_may_be_absent),
        TEST(a_wait_that_runs_out_says_so_and_the_job_goes_on),
        TEST(no_write_is_lost_on_pages_that_both_sides_write),
        TEST(cpu_and_device_exchange_messages_through_memory),
    };
    return cmocka_run_group_tests_name("kernels", tests, NULL, NULL);
}
