/* SPDX-License-Identifier: MIT */
/*
 * The device's side of the demo: two kernels in C that run on the device and follow the program's own pointers, and the host
 * code that launches them.
 *
 * The rules for a kernel (see hmm_kernel in hmm.h): it reaches process memory only through its accessor, with hmm_get() to
 * copy some out, hmm_put() to copy some in, or a span to work in place; it does not allocate, lock or do I/O. What it needs
 * for itself is on its stack and in its argument block, which is the device's own copy.
 *
 * Counting kernels run one after the other, because two that add to one counter at a time could lose an addition.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "demo.h"

/* ---- kernel: walk the table ---------------------------------------------------------------------------------------- */

struct walk_args {
    struct word **buckets; /* process pointers, both */
    struct census *census; /* goes from one launch to the next in process memory */
    uint64_t first, last;  /* buckets of this launch */
    uint64_t mask;
    struct census sum; /* the kernel's own from here on */
    struct word *heads[64];
};

static bool ranks_before(const struct rank *a, const struct rank *b)
{
    uint32_t shorter = a->length < b->length ? a->length : b->length;

    if (a->count != b->count)
        return a->count > b->count;
    int order = memcmp(a->spelling, b->spelling, shorter);

    return order ? order < 0 : a->length < b->length;
}

/* Keeps the best RANKS words, by insertion. */
static void rank_word(struct census *census, const struct rank *candidate)
{
    uint32_t at = census->ranks;

    if (at == RANKS) {
        if (!ranks_before(candidate, &census->rank[RANKS - 1]))
            return;
        at = RANKS - 1;
    } else {
        census->ranks++;
    }
    for (; at > 0 && ranks_before(candidate, &census->rank[at - 1]); at--)
        census->rank[at] = census->rank[at - 1];
    census->rank[at] = *candidate;
}

/* Copies the node at a process pointer to the device's own memory: first what has a fixed size, then the spelling. */
static void get_word(hmm_accessor *acc, const struct word *at, struct word *word, struct spelling *s)
{
    char bytes[WORD_MAX];

    hmm_get(acc, word, at, sizeof(*word));
    if (word->length > WORD_MAX)
        word->length = 0; /* no such word was ever made: it will count as misplaced */
    if (word->length)
        hmm_get(acc, bytes, at->spelling, word->length);
    spelling_reset(s);
    for (uint32_t i = 0; i < word->length; i++)
        spelling_add(s, (unsigned char)bytes[i]);
}

static void walk_chain(hmm_accessor *acc, struct walk_args *a, uint64_t bucket, struct word *at)
{
    struct word word;
    struct spelling s;

    for (; at; at = word.next) {
        get_word(acc, at, &word, &s);
        if (s.hash != word.hash || bucket_of(s.hash, a->mask) != bucket)
            a->sum.misplaced++;
        if (word.count == 0)
            continue;
        struct rank candidate = {.count = word.count, .length = s.length};

        memcpy(candidate.spelling, s.bytes, s.length);
        rank_word(&a->sum, &candidate);
        a->sum.words++;
        a->sum.occurrences += word.count;
        a->sum.fingerprint += word_fingerprint(s.hash, word.count);
    }
}

static uint64_t walk_kernel(hmm_accessor *acc, void *arg)
{
    struct walk_args *a = arg;
    const uint64_t room = sizeof(a->heads) / sizeof(a->heads[0]);

    hmm_get(acc, &a->sum, a->census, sizeof(a->sum));
    for (uint64_t bucket = a->first; bucket < a->last;) {
        uint64_t n = a->last - bucket < room ? a->last - bucket : room;

        hmm_get(acc, a->heads, &a->buckets[bucket], n * sizeof(a->heads[0]));
        for (uint64_t i = 0; i < n; i++)
            walk_chain(acc, a, bucket + i, a->heads[i]);
        bucket += n;
    }
    hmm_put(acc, a->census, &a->sum, sizeof(a->sum));
    return a->sum.words;
}

/* ---- kernel: count the words of a piece of the text ----------------------------------------------------------------- */

/* A few words come up again and again. The kernel adds them up here and goes to the table only now and then. */
#define CACHE_BITS 10
#define CACHE_SPELLING 19

struct cached {
    struct word *word; /* process pointer; NULL: free */
    uint32_t pending;  /* occurrences not yet added in the table */
    uint8_t length;
    char spelling[CACHE_SPELLING];
};

struct count_args {
    const char *text;
    struct word **buckets;
    uint64_t mask;
    uint64_t length;      /* of the text */
    uint64_t first, last; /* words that begin in [first, last) are counted */
    uint32_t round;
    uint64_t occurrences; /* the kernel's own from here on */
    char buffer[16384];
    struct cached cache[1 << CACHE_BITS];
};

/* Adds to the counter in the table, in place: the one store that the device makes to the program's memory. */
static void add_to_word(hmm_accessor *acc, const struct count_args *a, struct word *word, uint64_t occurrences)
{
    size_t len = sizeof(uint64_t);
    uint64_t *counter = hmm_span_write(acc, &word->device[a->round], &len);

    *counter += occurrences; /* aligned, so it lies in one page and the span is whole */
}

static struct word *find_word(hmm_accessor *acc, const struct count_args *a, const struct spelling *s)
{
    struct word *at, word;
    char bytes[WORD_MAX];

    hmm_get(acc, &at, &a->buckets[bucket_of(s->hash, a->mask)], sizeof(at));
    for (; at; at = word.next) {
        hmm_get(acc, &word, at, sizeof(word));
        if (word.hash != s->hash || word.length != s->length)
            continue;
        hmm_get(acc, bytes, at->spelling, s->length);
        if (!memcmp(bytes, s->bytes, s->length))
            break;
    }
    return at;
}

static void count_word(hmm_accessor *acc, struct count_args *a, const struct spelling *s)
{
    struct cached *c = &a->cache[(s->hash ^ (s->hash >> 32)) >> 7 & ((1 << CACHE_BITS) - 1)];

    if (c->word && c->length == s->length && !memcmp(c->spelling, s->bytes, s->length)) {
        c->pending++;
        a->occurrences++;
        return;
    }
    struct word *word = find_word(acc, a, s);

    if (!word)
        return; /* not in the table: the sum will be short, and the comparison will say so */
    a->occurrences++;
    if (s->length > CACHE_SPELLING) {
        add_to_word(acc, a, word, 1);
        return;
    }
    if (c->word)
        add_to_word(acc, a, c->word, c->pending);
    *c = (struct cached){.word = word, .pending = 1, .length = (uint8_t)s->length};
    memcpy(c->spelling, s->bytes, s->length);
}

/* Splits the piece into words. A word belongs to the piece that it begins in. */
static void count_piece(hmm_accessor *acc, struct count_args *a)
{
    struct spelling s;
    bool ours = true; /* false: in a word that began in the piece before */

    if (a->first > 0) {
        hmm_get(acc, a->buffer, a->text + a->first - 1, 1);
        ours = !word_byte((unsigned char)a->buffer[0]);
    }
    spelling_reset(&s);
    for (uint64_t at = a->first, n; at < a->length; at += n) {
        uint64_t left = at < a->last ? a->last - at : a->length - at;
        uint64_t most = at < a->last ? sizeof(a->buffer) : WORD_MAX + 1;

        n = left < most ? left : most;
        hmm_get(acc, a->buffer, a->text + at, n);
        for (uint64_t i = 0; i < n; i++) {
            unsigned char c = word_byte((unsigned char)a->buffer[i]);

            if (c && ours && (s.length || at + i < a->last)) {
                spelling_add(&s, c);
                continue;
            }
            if (s.length) {
                count_word(acc, a, &s);
                spelling_reset(&s);
            }
            if (at + i >= a->last)
                return;
            ours = ours || !c;
        }
        if (at >= a->last && s.length == WORD_MAX)
            break; /* known by what was read; its rest, however long, belongs to nobody */
    }
    if (s.length)
        count_word(acc, a, &s);
}

static uint64_t count_kernel(hmm_accessor *acc, void *arg)
{
    struct count_args *a = arg;

    count_piece(acc, a);
    for (size_t i = 0; i < 1 << CACHE_BITS; i++)
        if (a->cache[i].word)
            add_to_word(acc, a, a->cache[i].word, a->cache[i].pending);
    return a->occurrences;
}

/* ---- host: launch and wait ------------------------------------------------------------------------------------------ */

/* Waits for a job and gives its result. Every error about a job comes out here, with the address if it is about one. */
static int job_finish(hmm_fence *fence, const char *what, uint64_t *result)
{
    struct hmm_fence_info info = {.size = sizeof(info)};
    int rc = hmm_fence_wait(fence, -1);

    if (hmm_fence_info(fence, &info) == 0)
        *result = info.result;
    hmm_fence_put(fence);
    if (rc < 0 && info.address) {
        return output_error(DEMO_DIFFERS, "the device could not %s: %s (%s, at %p)", what, info.message, hmm_strerror(rc),
                            (void *)info.address);
    }
    return rc < 0 ? output_error(DEMO_DIFFERS, "the device could not %s: %s (%s)", what, info.message, hmm_strerror(rc)) : 0;
}

static int job_refused(const char *what, int err)
{
    return output_error(DEMO_DIFFERS, "the device does not take the job to %s: %s (%s)", what, hmm_last_message(),
                        hmm_strerror(err));
}

static int run_kernel(hmm_dev dev, hmm_kernel kernel, const void *arg, size_t arg_size, const char *what, uint64_t *result)
{
    struct hmm_launch launch = {.size = sizeof(launch), .kernel = kernel, .arg = arg, .arg_size = arg_size};
    hmm_fence *fence;
    int rc = hmm_job_launch(dev, &launch, &fence);

    return rc < 0 ? job_refused(what, rc) : job_finish(fence, what, result);
}

#define BUCKETS_PER_LAUNCH ((uint64_t)1 << 16)

int device_walk(hmm_dev dev, const struct table *table, struct census *census, struct progress *progress)
{
    uint64_t buckets = table->mask + 1, words;
    struct walk_args args = {.buckets = table->buckets, .census = malloc(sizeof(*census)), .mask = table->mask};
    int rc = 0;

    if (!args.census)
        return output_error(DEMO_BAD_INPUT, "no memory for the results; close other programs");
    *args.census = (struct census){0};
    while (args.first < buckets && rc == 0) {
        args.last = buckets - args.first < BUCKETS_PER_LAUNCH ? buckets : args.first + BUCKETS_PER_LAUNCH;
        rc = run_kernel(dev, walk_kernel, &args, sizeof(args), "walk the table", &words);
        args.first = args.last;
        progress_update(progress, args.first);
    }
    *census = *args.census; /* the device wrote it; reading it brings its page home */
    free(args.census);
    return rc;
}

int device_count(hmm_dev dev, const char *text, uint64_t length, const struct table *table, int round, double seconds,
                 uint64_t *done, uint64_t *occurrences, struct progress *progress)
{
    static struct count_args args; /* too big for a stack, and never written but for these: */
    double until = demo_now() + seconds;
    uint64_t counted;

    args.text = text;
    args.buckets = table->buckets;
    args.mask = table->mask;
    args.length = length;
    args.round = (uint32_t)round;
    *done = 0;
    *occurrences = 0;
    while (*done < length && (*done == 0 || demo_now() < until)) {
        args.first = *done;
        args.last = length - *done < PIECE_BYTES ? length : *done + PIECE_BYTES;
        int rc = run_kernel(dev, count_kernel, &args, sizeof(args), "count the words", &counted);

        if (rc)
            return rc;
        *occurrences += counted;
        *done = args.last;
        progress_update(progress, *done);
    }
    return 0;
}

/* Checksums need no kernel of ours: the device has an operation for it. A few pieces are under way at a time. */
#define IN_FLIGHT 4

int device_checksums(hmm_dev dev, const char *text, uint64_t length, uint32_t *crc, struct progress *progress)
{
    hmm_fence *fences[IN_FLIGHT];
    uint64_t pieces = (length + PIECE_BYTES - 1) / PIECE_BYTES, asked = 0, answered = 0, result;
    int status = 0;

    while (answered < pieces) {
        while (status == 0 && asked < pieces && asked < answered + IN_FLIGHT) {
            uint64_t at = asked * PIECE_BYTES;
            int rc = hmm_job_crc32c(dev, text + at, length - at < PIECE_BYTES ? length - at : PIECE_BYTES,
                                    &fences[asked % IN_FLIGHT]);

            if (rc < 0) {
                status = job_refused("checksum the text", rc);
                break;
            }
            asked++;
        }
        if (answered == asked)
            break; /* after an error, when nothing is under way any more */
        int rc = job_finish(fences[answered % IN_FLIGHT], "checksum the text", &result);

        if (rc)
            status = rc;
        else
            crc[answered] = (uint32_t)result;
        answered++;
        progress_update(progress, answered * PIECE_BYTES);
    }
    return status;
}
