/* SPDX-License-Identifier: MIT */
/*
 * The device's side of the demo: two kernels in C that run on the device and follow the program's own pointers.
 *
 * The rules for a kernel (see hmm_kernel in hmm.h): it reaches process memory only through its accessor, with hmm_get() to
 * copy some out, hmm_put() to copy some in, or a span to work in place; it does not allocate, lock or do I/O. What it needs
 * for itself is on its stack and in its argument block, which is the device's own copy.
 *
 * This folder is a shared object of its own (libhmm_demo.so), because a device whose engines are in another process loads
 * kernels there, by file and name. So nothing here may refer to the command's functions or variables.
 *
 * Counting kernels run one after the other, because two that add to one counter at a time could lose an addition.
 */
#include "demo_kernels.h"

#include <stdbool.h>
#include <string.h>

/* ---- kernel: walk the table ---------------------------------------------------------------------------------------- */

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

HMM_KERNEL(demo_walk)
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

HMM_KERNEL(demo_count)
{
    struct count_args *a = arg;

    count_piece(acc, a);
    for (size_t i = 0; i < 1 << CACHE_BITS; i++)
        if (a->cache[i].word)
            add_to_word(acc, a, a->cache[i].word, a->cache[i].pending);
    return a->occurrences;
}
