/* SPDX-License-Identifier: MIT */
/* Interval notifiers: who is called, in which order, who waits for whom; against a plain list, and under threads that follow
 * the driver's protocol and check what it promises. */
#include "notifier.h"

static int set_up(void **state)
{
    (void)state;
    notifier_tree_init(&tree);
    lock_violations = 0;
    log_lines = 0;
    hmm_set_log(keep, NULL);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    bool bad = lock_violations != 0;
    hmm_set_log(NULL, NULL);
    notifier_tree_destroy(&tree);
    return bad;
}

/* ---- a recording notifier ---- */

#define CALLS_MAX 512

static struct hmm_notifier *called[CALLS_MAX];
static unsigned ncalled;
static struct hmm_event last_event;

static int record(struct hmm_notifier *n, const struct hmm_event *event)
{
    assert_true(ncalled < CALLS_MAX);
    assert_int_equal(lock_held_ranks(), 0);
    called[ncalled++] = n;
    last_event = *event;
    return 0;
}

static const struct hmm_notifier_ops recording = {.invalidate = record};

static void insert(struct hmm_notifier *n, uintptr_t first, uintptr_t end, const struct hmm_notifier_ops *ops)
{
    memset(n, 0xdd, sizeof(*n));
    assert_int_equal(notifier_insert(&tree, n, DEVICE(1), first * PAGE, end * PAGE, ops), 0);
}

static bool begin(struct invalidation *inv, uintptr_t first, uintptr_t end)
{
    return notifier_begin(&tree, inv, first * PAGE, end * PAGE, HMM_EVENT_UNMAP, NULL);
}

/* Begin, call, end; returns the number of callbacks. */
static unsigned invalidate(uintptr_t first, uintptr_t end)
{
    struct invalidation inv;
    ncalled = 0;
    bool marked = begin(&inv, first, end);
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_WAIT), 0);
    notifier_end(&tree, &inv);
    assert_int_equal(marked, ncalled > 0);
    return ncalled;
}

/* ---- who is called ---- */

static void test_overlap_is_half_open(void **state)
{
    (void)state;
    struct hmm_notifier n;
    insert(&n, 10, 20, &recording);
    assert_int_equal(invalidate(0, 10), 0);
    assert_int_equal(invalidate(20, 30), 0);
    assert_int_equal(invalidate(9, 11), 1);
    assert_int_equal(invalidate(19, 21), 1);
    assert_int_equal(invalidate(12, 13), 1);
    assert_int_equal(invalidate(0, 100), 1);
    assert_int_equal(invalidate(15, 15), 0);
    assert_int_equal(invalidate(16, 15), 0);
    assert_int_equal(tree.callbacks, 4);
    notifier_remove(&tree, &n);
    assert_int_equal(invalidate(0, 100), 0);
}

static void test_event_is_passed_on(void **state)
{
    (void)state;
    struct hmm_notifier n;
    struct invalidation inv;
    insert(&n, 10, 20, &recording);
    ncalled = 0;
    assert_true(notifier_begin(&tree, &inv, 5 * PAGE, 12 * PAGE, HMM_EVENT_MIGRATE, DEVICE(2)));
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_AT_ONCE), 0);
    assert_int_equal(last_event.start, 5 * PAGE);
    assert_int_equal(last_event.end, 12 * PAGE);
    assert_int_equal(last_event.type, HMM_EVENT_MIGRATE);
    assert_ptr_equal(last_event.owner, DEVICE(2));
    assert_false(last_event.blockable);
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_WAIT), 0);
    assert_true(last_event.blockable);
    notifier_end(&tree, &inv);
    notifier_remove(&tree, &n);
}

static void test_owners_leave_out_and_nothing_else(void **state)
{
    (void)state;
    struct hmm_notifier n;
    struct invalidation inv;
    insert(&n, 10, 20, &recording);
    for (int type = HMM_EVENT_UNMAP; type <= HMM_EVENT_RELEASE; type++) {
        for (int owner = 0; owner <= 2; owner++) {
            bool own = type == HMM_EVENT_MIGRATE && owner == 1;
            uint64_t seq = hmm_notifier_seq(&n);
            ncalled = 0;
            assert_int_equal(notifier_begin(&tree, &inv, 10 * PAGE, 11 * PAGE, (enum hmm_event_type)type, DEVICE(owner)), !own);
            assert_int_equal(hmm_notifier_read_retry(&n, seq), !own);
            if (own) /* does not wait */
                assert_int_equal(notifier_read_begin(&tree, &n), seq);
            assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_WAIT), 0);
            assert_int_equal(ncalled, own ? 0 : 1);
            notifier_end(&tree, &inv);
        }
    }
    notifier_remove(&tree, &n);
}

static void test_bad_intervals_are_refused(void **state)
{
    (void)state;
    static const struct hmm_notifier_ops empty = {.invalidate = NULL};
    const struct {
        uintptr_t start, end;
        const struct hmm_notifier_ops *ops;
    } bad[] = {
        {8192, 8192, &recording}, {8192, 4096, &recording}, {1, 8192, &recording},        {4096, 8191, &recording},
        {4096, 8192, NULL},       {4096, 8192, &empty},     {0 - PAGE, PAGE, &recording}, {PAGE, UINTPTR_MAX, &recording}};
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct hmm_notifier n = {0};
        assert_int_equal(notifier_insert(&tree, &n, DEVICE(1), bad[i].start, bad[i].end, bad[i].ops), -EINVAL);
        assert_non_null(strstr(hmm_last_message(), "notifier"));
        assert_int_equal(notifier_remove(&tree, &n), -ENOENT);
    }
    assert_int_equal(tree.count, 0);
}

/* ---- random operations against a list ---- */

#define NODES 300
#define SPACE 200

static struct hmm_notifier node[NODES];
static bool inserted[NODES];

static int by_key(const void *a, const void *b)
{
    const struct hmm_notifier *x = *(struct hmm_notifier *const *)a, *y = *(struct hmm_notifier *const *)b;
    if (x->start != y->start)
        return x->start < y->start ? -1 : 1;
    return x < y ? -1 : x > y;
}

static void check_invalidation(unsigned *seed)
{
    struct hmm_notifier *expected[NODES];
    uint64_t seq[NODES];
    unsigned n = 0, length = rand_r(seed) % 8 ? 10 : SPACE;
    uintptr_t start = (uintptr_t)rand_r(seed) % SPACE * PAGE, end = start + (uintptr_t)rand_r(seed) % length * PAGE;
    enum hmm_event_type type = (enum hmm_event_type)(rand_r(seed) % (HMM_EVENT_RELEASE + 1));
    struct hmm_device *owner = rand_r(seed) % 2 ? DEVICE(1 + rand_r(seed) % 2) : NULL;
    for (unsigned i = 0; i < NODES; i++) {
        seq[i] = inserted[i] ? hmm_notifier_seq(&node[i]) : 0;
        if (inserted[i] && start < end && node[i].start < end && start < node[i].end &&
            !(type == HMM_EVENT_MIGRATE && node[i].dev == owner))
            expected[n++] = &node[i];
    }
    qsort(expected, n, sizeof(expected[0]), by_key);
    struct invalidation inv;
    ncalled = 0;
    assert_int_equal(notifier_begin(&tree, &inv, start, end, type, owner), n > 0);
    for (unsigned i = 0; i < NODES; i++) {
        if (!inserted[i])
            continue;
        bool concerned = false;
        for (unsigned e = 0; e < n; e++)
            concerned |= expected[e] == &node[i];
        assert_int_equal(hmm_notifier_seq(&node[i]), seq[i] + concerned);
    }
    assert_int_equal(ncalled, 0);
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_WAIT), 0);
    notifier_end(&tree, &inv);
    assert_int_equal(ncalled, n);
    for (unsigned e = 0; e < n; e++)
        assert_ptr_equal(called[e], expected[e]);
}

static void test_random_intervals_against_list(void **state)
{
    (void)state;
    unsigned seed = 11, count = 0;
    memset(inserted, 0, sizeof(inserted));
    for (int step = 0; step < 20000; step++) {
        unsigned i = (unsigned)rand_r(&seed) % (step < 10000 ? 30 : NODES);
        if (rand_r(&seed) % 4 == 0) {
            check_invalidation(&seed);
        } else if (inserted[i]) {
            notifier_remove(&tree, &node[i]);
            memset(&node[i], 0xee, sizeof(node[i]));
            inserted[i] = false;
            count--;
        } else {
            uintptr_t start = (uintptr_t)rand_r(&seed) % SPACE * PAGE;
            uintptr_t end = start + (1 + (uintptr_t)rand_r(&seed) % (rand_r(&seed) % 4 ? 6 : SPACE)) * PAGE;
            assert_int_equal(notifier_insert(&tree, &node[i], DEVICE(1 + rand_r(&seed) % 2), start, end, &recording), 0);
            inserted[i] = true;
            count++;
        }
        assert_int_equal(tree.count, count);
        if (step % 8 == 0)
            assert_true(notifier_tree_is_valid(&tree));
    }
    for (unsigned i = 0; i < NODES; i++)
        if (inserted[i])
            notifier_remove(&tree, &node[i]);
    assert_int_equal(tree.count, 0);
    assert_null(tree.root);
}

static unsigned depth(const struct hmm_notifier *n)
{
    unsigned deepest = 0;
    for (unsigned side = 0; n && side < 2; side++) {
        unsigned d = 1 + depth(n->link[side]);
        deepest = d > deepest ? d : deepest;
    }
    return deepest;
}

static void test_sorted_insertion_stays_shallow(void **state)
{
    (void)state;
    enum { N = 1 << 15 };
    struct hmm_notifier *v = calloc(N, sizeof(*v));
    for (uintptr_t i = 0; i < N; i++)
        insert(&v[i], i, i + 1, &recording);
    assert_true(notifier_tree_is_valid(&tree));
    assert_true(depth(tree.root) <= 64); /* expected: about 40; a list would be 32768 */
    assert_int_equal(invalidate(N / 2, N / 2 + 3), 3);
    for (uintptr_t i = 0; i < N; i++)
        notifier_remove(&tree, &v[i]);
    free(v);
}

static void test_validator_sees_damage(void **state)
{
    (void)state;
    struct hmm_notifier v[20];
    for (uintptr_t i = 0; i < 20; i++)
        insert(&v[i], i, i + 3, &recording);
    assert_true(notifier_tree_is_valid(&tree));
    for (unsigned i = 0; i < 20; i++) {
        v[i].max_end += PAGE;
        assert_false(notifier_tree_is_valid(&tree));
        v[i].max_end -= PAGE;
        v[i].left_end += PAGE;
        assert_false(notifier_tree_is_valid(&tree));
        v[i].left_end -= PAGE;
        uintptr_t start = v[i].start;
        v[i].start = i < 10 ? 1000 * PAGE : 0;
        v[i].end += 2000 * PAGE;
        v[i].max_end += 2000 * PAGE;
        assert_false(notifier_tree_is_valid(&tree));
        v[i].start = start;
        v[i].end -= 2000 * PAGE;
        v[i].max_end -= 2000 * PAGE;
    }
    tree.count++;
    assert_false(notifier_tree_is_valid(&tree));
    tree.count--;
    tree.root->priority = 0;
    assert_false(notifier_tree_is_valid(&tree));
    tree.root = NULL;
}

/* ---- several at once, and changes in between ---- */

static void test_overlapping_invalidations_of_one_notifier(void **state)
{
    (void)state;
    struct hmm_notifier n;
    struct invalidation a, b;
    insert(&n, 10, 20, &recording);
    uint64_t seq = notifier_read_begin(&tree, &n);
    assert_false(hmm_notifier_read_retry(&n, seq));
    assert_true(begin(&a, 0, 11));
    assert_true(hmm_notifier_read_retry(&n, seq));
    assert_true(begin(&b, 10, 30));
    assert_int_equal(hmm_notifier_seq(&n), seq + 2);
    ncalled = 0;
    assert_int_equal(notifier_call(&tree, &b, NOTIFIER_WAIT), 0);
    notifier_end(&tree, &b);
    assert_int_equal(notifier_call(&tree, &a, NOTIFIER_WAIT), 0);
    assert_int_equal(ncalled, 2);
    notifier_end(&tree, &a);
    assert_int_equal(notifier_read_begin(&tree, &n), seq + 2);
    notifier_remove(&tree, &n);
}

static void test_inserted_after_begin_is_not_called(void **state)
{
    (void)state;
    struct hmm_notifier before, after;
    struct invalidation inv, later;
    insert(&before, 10, 20, &recording);
    assert_true(begin(&inv, 0, 100));
    insert(&after, 5, 30, &recording);
    uint64_t seq = hmm_notifier_seq(&after);
    ncalled = 0;
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_WAIT), 0);
    assert_int_equal(ncalled, 1);
    assert_ptr_equal(called[0], &before);
    assert_int_equal(hmm_notifier_seq(&after), seq);
    assert_true(begin(&later, 25, 26)); /* but by those that begin afterwards */
    ncalled = 0;
    assert_int_equal(notifier_call(&tree, &later, NOTIFIER_WAIT), 0);
    assert_int_equal(ncalled, 1);
    notifier_end(&tree, &later);
    notifier_end(&tree, &inv);
    notifier_remove(&tree, &before);
    notifier_remove(&tree, &after);
}

static void test_sequence_is_new_in_each_life(void **state)
{
    (void)state;
    struct hmm_notifier n;
    insert(&n, 10, 20, &recording);
    uint64_t seq = hmm_notifier_seq(&n);
    notifier_remove(&tree, &n);
    insert(&n, 30, 40, &recording);
    assert_true(hmm_notifier_read_retry(&n, seq));
    notifier_remove(&tree, &n);
}

static struct hmm_notifier trio[3], newcomer;

/* The first of the trio removes the second and inserts a new one. */
static int meddle(struct hmm_notifier *n, const struct hmm_event *event)
{
    record(n, event);
    notifier_remove(&tree, &trio[1]);
    memset(&trio[1], 0xdd, sizeof(trio[1]));
    insert(&newcomer, 12, 40, &recording);
    return 0;
}

static const struct hmm_notifier_ops meddling = {.invalidate = meddle};

static void test_callbacks_may_change_the_tree(void **state)
{
    (void)state;
    insert(&trio[0], 10, 20, &meddling);
    insert(&trio[1], 11, 20, &recording);
    insert(&trio[2], 13, 20, &recording);
    assert_int_equal(invalidate(0, 100), 2);
    assert_ptr_equal(called[0], &trio[0]);
    assert_ptr_equal(called[1], &trio[2]);
    assert_true(notifier_tree_is_valid(&tree));
    notifier_remove(&tree, &trio[0]);
    notifier_remove(&tree, &trio[2]);
    notifier_remove(&tree, &newcomer);
}

static int remove_self(struct hmm_notifier *n, const struct hmm_event *event)
{
    record(n, event);
    return notifier_remove(&tree, n) == -EDEADLK ? 0 : -EIO;
}

static const struct hmm_notifier_ops removing_self = {.invalidate = remove_self, .name = "removing-self"};

static void test_removal_by_own_callback_is_refused_by_name(void **state)
{
    (void)state;
    struct hmm_notifier a, b;
    insert(&a, 10, 20, &removing_self);
    insert(&b, 11, 20, &recording);
    assert_int_equal(invalidate(0, 100), 2);
    assert_int_equal(log_lines, 1);
    assert_non_null(strstr(logged, "removing-self"));
    assert_non_null(strstr(hmm_last_message(), "removing-self"));
    assert_int_equal(tree.count, 2); /* nothing was done */
    assert_int_equal(invalidate(0, 100), 2);
    assert_int_equal(notifier_remove(&tree, &a), 0);
    assert_int_equal(notifier_remove(&tree, &b), 0);
}

/* ---- answers of callbacks ---- */

static int answer, answer_blockable;

static int give_answer(struct hmm_notifier *n, const struct hmm_event *event)
{
    record(n, event);
    return event->blockable ? answer_blockable : answer;
}

static const struct hmm_notifier_ops answering = {.invalidate = give_answer};

static void test_answers(void **state)
{
    (void)state;
    struct hmm_notifier a, b;
    struct invalidation inv;
    insert(&a, 10, 20, &answering);
    insert(&b, 11, 20, &recording);
    assert_true(begin(&inv, 0, 100));
    answer = -EAGAIN, answer_blockable = 0, ncalled = 0;
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_AT_ONCE), -EAGAIN);
    assert_int_equal(ncalled, 1); /* at once */
    assert_int_equal(log_lines, 0);
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_WAIT), 0);
    assert_int_equal(ncalled, 3);
    assert_int_equal(log_lines, 0);
    answer = -EIO, ncalled = 0;
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_AT_ONCE), 0);
    assert_int_equal(ncalled, 2);
    assert_int_equal(log_lines, 1);
    char name[40];
    snprintf(name, sizeof(name), "%p", (void *)(uintptr_t)give_answer);
    assert_non_null(strstr(logged, name));
    assert_non_null(strstr(logged, "-5"));
    answer_blockable = -EAGAIN; /* legal only when it is not blockable */
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_WAIT), 0);
    assert_int_equal(log_lines, 2);
    answer_blockable = 1;
    assert_int_equal(notifier_call(&tree, &inv, NOTIFIER_WAIT), 0);
    assert_int_equal(log_lines, 3);
    notifier_end(&tree, &inv);
    notifier_remove(&tree, &a);
    notifier_remove(&tree, &b);
}

/* ---- who waits ---- */

static void store(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* Sleepers on the tree, as the tree itself counts them. */
static void wait_for_sleepers(unsigned n)
{
    for (unsigned now = 0; now != n; sched_yield()) {
        mutex_lock(&tree.lock);
        now = tree.waiters;
        mutex_unlock(&tree.lock);
    }
}

struct reader {
    struct hmm_notifier *n;
    uint64_t seq;
    uint32_t done;
};

static void *read_begin(void *arg)
{
    struct reader *r = arg;
    r->seq = notifier_read_begin(&tree, r->n);
    store(&r->done, 1);
    return NULL;
}

static void test_read_begin_waits_for_every_overlapping_end(void **state)
{
    (void)state;
    struct hmm_notifier n, elsewhere;
    struct invalidation a, b, far;
    insert(&n, 10, 20, &recording);
    insert(&elsewhere, 50, 60, &recording);
    begin(&a, 0, 11);
    begin(&b, 19, 30);
    begin(&far, 20, 40);
    assert_int_equal(notifier_read_begin(&tree, &elsewhere), hmm_notifier_seq(&elsewhere));
    struct reader r = {.n = &n};
    pthread_t t = start(read_begin, &r);
    wait_for_sleepers(1);
    notifier_end(&tree, &a);
    wait_for_sleepers(1); /* wakes, looks, sleeps again, for b */
    assert_int_equal(load(&r.done), 0);
    notifier_end(&tree, &b);
    pthread_join(t, NULL); /* far does not concern it */
    assert_int_equal(r.seq, hmm_notifier_seq(&n));
    notifier_end(&tree, &far);
    notifier_remove(&tree, &n);
    notifier_remove(&tree, &elsewhere);
}

static void test_newcomer_waits_for_what_began_before_it(void **state)
{
    (void)state;
    struct hmm_notifier n;
    struct invalidation a;
    assert_false(begin(&a, 0, 100));
    insert(&n, 10, 20, &recording);
    struct reader r = {.n = &n};
    pthread_t t = start(read_begin, &r);
    wait_for_sleepers(1);
    assert_int_equal(load(&r.done), 0);
    notifier_end(&tree, &a);
    pthread_join(t, NULL);
    assert_false(hmm_notifier_read_retry(&n, r.seq));
    notifier_remove(&tree, &n);
}

static uint32_t gate_entered, gate_open;

static int pass_gate(struct hmm_notifier *n, const struct hmm_event *event)
{
    (void)n;
    (void)event;
    __atomic_fetch_add(&gate_entered, 1, __ATOMIC_ACQ_REL);
    while (!load(&gate_open))
        sched_yield();
    return 0;
}

static const struct hmm_notifier_ops gated = {.invalidate = pass_gate};

static void *invalidate_all(void *arg)
{
    struct invalidation inv;
    (void)arg;
    begin(&inv, 0, 100);
    notifier_call(&tree, &inv, NOTIFIER_WAIT);
    notifier_end(&tree, &inv);
    return NULL;
}

static void *remove_it(void *arg)
{
    struct reader *r = arg;
    notifier_remove(&tree, r->n);
    memset(r->n, 0xdd, sizeof(*r->n));
    store(&r->done, 1);
    return NULL;
}

/* Ends the invalidation only when the notifier is gone: the end of the callback alone must wake the remover. */
static void *invalidate_until_removed(void *arg)
{
    struct invalidation inv;
    begin(&inv, 0, 100);
    notifier_call(&tree, &inv, NOTIFIER_WAIT);
    wait_for(arg, 1);
    notifier_end(&tree, &inv);
    return NULL;
}

static void test_remove_waits_for_all_running_callbacks(void **state)
{
    (void)state;
    struct hmm_notifier n;
    struct reader r = {.n = &n};
    gate_entered = gate_open = 0;
    insert(&n, 10, 20, &gated);
    pthread_t a = start(invalidate_until_removed, &r.done), b = start(invalidate_until_removed, &r.done);
    wait_for(&gate_entered, 2); /* one callback, twice at the same time */
    pthread_t t = start(remove_it, &r);
    wait_for_sleepers(1);
    assert_int_equal(load(&r.done), 0);
    assert_int_equal(tree.count, 0);
    store(&gate_open, 1);
    pthread_join(t, NULL);
    pthread_join(a, NULL);
    pthread_join(b, NULL);
}

/* A driver holds a lock that the callback of one notifier wants, and removes another one, whose turn is still to come. */
static void test_remove_does_not_wait_for_other_callbacks(void **state)
{
    (void)state;
    struct hmm_notifier first, second;
    gate_entered = gate_open = 0;
    insert(&first, 10, 20, &gated);
    insert(&second, 11, 20, &gated);
    pthread_t t = start(invalidate_all, NULL);
    wait_for(&gate_entered, 1);
    notifier_remove(&tree, &second); /* would hang */
    memset(&second, 0xdd, sizeof(second));
    store(&gate_open, 1);
    pthread_join(t, NULL);
    assert_int_equal(gate_entered, 1);
    notifier_remove(&tree, &first);
}

/* ---- the driver's protocol under threads ---- */

#define FILLERS 2
#define INVALIDATORS 3

struct mirror {
    struct hmm_notifier n;
    pthread_mutex_t lock; /* the driver's; protects entry */
    uint64_t entry;       /* device page table: the value seen, 0: none */
    uint64_t value;       /* what is at the address; changes only inside invalidations */
    uint32_t stop, bad, filled;
};

static struct mirror mirror;

static int drop_entry(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct mirror *m = (struct mirror *)n; /* n is first */
    (void)event;
    pthread_mutex_lock(&m->lock);
    m->entry = 0;
    pthread_mutex_unlock(&m->lock);
    return 0;
}

static const struct hmm_notifier_ops mirroring = {.invalidate = drop_entry};

static void *fill(void *arg)
{
    struct mirror *m = arg;
    while (!load(&m->stop)) {
        uint64_t seq = notifier_read_begin(&tree, &m->n);
        uint64_t value = __atomic_load_n(&m->value, __ATOMIC_RELAXED);
        if (value % 3 == 0)
            sched_yield(); /* time for an invalidation */
        pthread_mutex_lock(&m->lock);
        if (!hmm_notifier_read_retry(&m->n, seq)) {
            m->entry = value;
            __atomic_fetch_add(&m->filled, 1, __ATOMIC_RELAXED);
        }
        pthread_mutex_unlock(&m->lock);
    }
    return NULL;
}

static uint64_t entry_of(struct mirror *m)
{
    pthread_mutex_lock(&m->lock);
    uint64_t entry = m->entry;
    pthread_mutex_unlock(&m->lock);
    return entry;
}

/* Between the call and the end the device has no entry, whatever the fillers do; that is when the value may change. */
static void *change(void *arg)
{
    struct mirror *m = arg;
    for (int i = 0; i < 1000; i++) {
        struct invalidation inv;
        begin(&inv, 5, 15);
        notifier_call(&tree, &inv, NOTIFIER_WAIT);
        bool entry = entry_of(m) != 0;
        __atomic_fetch_add(&m->value, 1, __ATOMIC_RELAXED);
        if (i % 8 == 0)
            sched_yield();
        if (entry || entry_of(m) != 0)
            store(&m->bad, 1);
        notifier_end(&tree, &inv);
        if (i % 4 == 0)
            sched_yield();
    }
    return NULL;
}

static void test_protocol_keeps_device_entries_right(void **state)
{
    (void)state;
    pthread_t f[FILLERS], c[INVALIDATORS];
    memset(&mirror, 0, sizeof(mirror));
    pthread_mutex_init(&mirror.lock, NULL);
    mirror.value = 1;
    assert_int_equal(notifier_insert(&tree, &mirror.n, DEVICE(1), 10 * PAGE, 20 * PAGE, &mirroring), 0);
    for (int i = 0; i < FILLERS; i++)
        f[i] = start(fill, &mirror);
    for (int i = 0; i < INVALIDATORS; i++)
        c[i] = start(change, &mirror);
    for (int i = 0; i < INVALIDATORS; i++)
        pthread_join(c[i], NULL);
    uint32_t seen = load(&mirror.filled);
    while (load(&mirror.filled) == seen) /* the last value gets through */
        sched_yield();
    store(&mirror.stop, 1);
    for (int i = 0; i < FILLERS; i++)
        pthread_join(f[i], NULL);
    assert_int_equal(mirror.bad, 0);
    assert_int_equal(mirror.entry, mirror.value);
    notifier_remove(&tree, &mirror.n);
}

/* ---- removal and insertion under threads ---- */

struct mortal {
    struct hmm_notifier n;
    uint32_t alive;
};

static uint32_t ghosts, churning, mortal_calls;

static int check_alive(struct hmm_notifier *n, const struct hmm_event *event)
{
    struct mortal *m = (struct mortal *)n;
    (void)event;
    if (!load(&m->alive))
        store(&ghosts, 1);
    __atomic_fetch_add(&mortal_calls, 1, __ATOMIC_RELAXED);
    if (event->start / PAGE % 4 == 0)
        sched_yield();
    if (!load(&m->alive))
        store(&ghosts, 1);
    return 0;
}

static const struct hmm_notifier_ops mortal_ops = {.invalidate = check_alive};

static void *churn(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    struct mortal *v = calloc(16, sizeof(*v));
    for (int i = 0; i < 3000 || load(&mortal_calls) < 1500; i++) {
        struct mortal *m = &v[(unsigned)rand_r(&seed) % 16];
        if (load(&m->alive)) {
            notifier_remove(&tree, &m->n);
            store(&m->alive, 0);
            memset(&m->n, 0xdd, sizeof(m->n));
        } else {
            store(&m->alive, 1);
            uintptr_t first = (uintptr_t)rand_r(&seed) % 50;
            insert(&m->n, first, first + 1 + (uintptr_t)rand_r(&seed) % 10, &mortal_ops);
        }
    }
    for (unsigned i = 0; i < 16; i++)
        if (v[i].alive)
            notifier_remove(&tree, &v[i].n);
    free(v);
    __atomic_fetch_sub(&churning, 1, __ATOMIC_ACQ_REL);
    return NULL;
}

static void *keep_invalidating(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    while (load(&churning)) {
        struct invalidation inv;
        uintptr_t first = (uintptr_t)rand_r(&seed) % 50;
        begin(&inv, first, first + 1 + (uintptr_t)rand_r(&seed) % 20);
        notifier_call(&tree, &inv, NOTIFIER_WAIT);
        notifier_end(&tree, &inv);
    }
    return NULL;
}

static void test_removed_notifiers_are_never_called(void **state)
{
    (void)state;
    pthread_t t[4];
    ghosts = mortal_calls = 0;
    churning = 2;
    for (uintptr_t i = 0; i < 4; i++)
        t[i] = start(i < 2 ? churn : keep_invalidating, (void *)(i + 1));
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    assert_int_equal(ghosts, 0);
    assert_int_equal(tree.callbacks, mortal_calls);
    assert_int_equal(tree.count, 0);
    assert_true(notifier_tree_is_valid(&tree));
    assert_true(list_empty(&tree.active));
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_overlap_is_half_open),
        T(test_event_is_passed_on),
        T(test_owners_leave_out_and_nothing_else),
        T(test_bad_intervals_are_refused),
        T(test_random_intervals_against_list),
        T(test_sorted_insertion_stays_shallow),
        T(test_validator_sees_damage),
        T(test_overlapping_invalidations_of_one_notifier),
        T(test_inserted_after_begin_is_not_called),
        T(test_sequence_is_new_in_each_life),
        T(test_callbacks_may_change_the_tree),
        T(test_removal_by_own_callback_is_refused_by_name),
        T(test_answers),
        T(test_read_begin_waits_for_every_overlapping_end),
        T(test_newcomer_waits_for_what_began_before_it),
        T(test_remove_waits_for_all_running_callbacks),
        T(test_remove_does_not_wait_for_other_callbacks),
        T(test_protocol_keeps_device_entries_right),
        T(test_removed_notifiers_are_never_called),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
