/* SPDX-License-Identifier: MIT */
/*
 * The judge of the demo: what the results must be. It works them out from a second read of the file, with its own way to
 * split words, its own table and its own checksum, and shares nothing with the code it judges but the definition of
 * word_fingerprint(). It never looks at the text or the table that the device works on.
 *
 * Its memory is a shared mapping, which the library never moves: no page of the judge ever passes through what is judged.
 *
 * Invariant: an entry is never removed; counts[set] of a word that is not in that set is 0.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "demo.h"

struct entry {
    uint64_t counts[EXPECT_SETS];
    uint32_t hash;
    uint8_t length;
    char spelling[WORD_MAX];
};

#define BATCH_ENTRIES 65536u
#define MAX_BATCHES 4096u /* 268 million words */

struct expect {
    const struct source *source;
    const struct edit *edits; /* sorted by offset */
    size_t edit_count;
    uint64_t pieces;
    uint32_t *crc[ROUNDS];
    char *buffer;    /* one piece, with a byte before it and WORD_MAX + 1 after it */
    uint32_t *slots; /* open addressing: number of the entry + 1, or 0 */
    uint64_t slot_mask;
    uint32_t entries;
    struct entry *batches[MAX_BATCHES];
    unsigned char lower[256]; /* letters and digits in lower case, 0 for others */
    uint32_t crc_table[256];
};

#define BUFFER_BYTES (1 + PIECE_BYTES + WORD_MAX + 1)
#define FIRST_SLOTS ((uint64_t)1 << 16)

/* ---- memory of its own --------------------------------------------------------------------------------------------- */

static void *own_memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    return p == MAP_FAILED ? NULL : p;
}

static void own_free(void *p, size_t bytes)
{
    if (p)
        munmap(p, bytes);
}

static int no_memory(void)
{
    return output_error(DEMO_BAD_INPUT,
                        "no memory to work out the expected results; use a smaller file or close other programs");
}

struct expect *expect_open(const struct source *source)
{
    static const char letters[] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    struct expect *e = own_memory(sizeof(*e));

    if (!e)
        return NULL;
    e->source = source;
    e->pieces = (source->length + PIECE_BYTES - 1) / PIECE_BYTES;
    e->slot_mask = FIRST_SLOTS - 1;
    e->slots = own_memory(FIRST_SLOTS * sizeof(*e->slots));
    e->buffer = own_memory(BUFFER_BYTES);
    e->crc[BEFORE] = own_memory(e->pieces * sizeof(uint32_t));
    e->crc[AFTER] = own_memory(e->pieces * sizeof(uint32_t));
    if (!e->slots || !e->buffer || !e->crc[BEFORE] || !e->crc[AFTER]) {
        expect_close(e);
        return NULL;
    }
    for (size_t i = 0; letters[i]; i++)
        e->lower[(unsigned char)letters[i]] = (unsigned char)(i < 36 ? letters[i] : letters[i - 26]);
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;

        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1; /* Castagnoli's polynomial, reflected */
        e->crc_table[i] = crc;
    }
    return e;
}

void expect_close(struct expect *e)
{
    if (!e)
        return;
    for (size_t i = 0; i < MAX_BATCHES && e->batches[i]; i++)
        own_free(e->batches[i], BATCH_ENTRIES * sizeof(struct entry));
    own_free(e->crc[BEFORE], e->pieces * sizeof(uint32_t));
    own_free(e->crc[AFTER], e->pieces * sizeof(uint32_t));
    own_free(e->buffer, BUFFER_BYTES);
    own_free(e->slots, (e->slot_mask + 1) * sizeof(*e->slots));
    own_free(e, sizeof(*e));
}

/* ---- its table ----------------------------------------------------------------------------------------------------- */

static struct entry *entry_at(const struct expect *e, uint32_t n)
{
    return &e->batches[n / BATCH_ENTRIES][n % BATCH_ENTRIES];
}

static uint32_t own_hash(const char *s, size_t length)
{
    uint32_t h = 5381;

    for (size_t i = 0; i < length; i++)
        h = h * 33 + (unsigned char)s[i];
    return (h ^ h >> 15) * 0x2c1b3c6du;
}

/* The slot of a word, or the free slot where it belongs. */
static uint32_t *slot_of(const struct expect *e, const char *s, size_t length, uint32_t hash)
{
    for (uint64_t i = hash & e->slot_mask;; i = (i + 1) & e->slot_mask) {
        const struct entry *entry = e->slots[i] ? entry_at(e, e->slots[i] - 1) : NULL;

        if (!entry || (entry->hash == hash && entry->length == length && !memcmp(entry->spelling, s, length)))
            return &e->slots[i];
    }
}

static int slots_double(struct expect *e)
{
    uint64_t mask = 2 * e->slot_mask + 1;
    uint32_t *slots = own_memory((mask + 1) * sizeof(*slots));

    if (!slots)
        return -ENOMEM;
    for (uint32_t n = 0; n < e->entries; n++) {
        uint64_t i = entry_at(e, n)->hash & mask;

        while (slots[i])
            i = (i + 1) & mask;
        slots[i] = n + 1;
    }
    own_free(e->slots, (e->slot_mask + 1) * sizeof(*e->slots));
    e->slots = slots;
    e->slot_mask = mask;
    return 0;
}

/* A new entry with all counts 0. NULL: no memory. */
static struct entry *entry_new(struct expect *e, const char *s, size_t length, uint32_t hash)
{
    uint32_t batch = e->entries / BATCH_ENTRIES;

    if ((uint64_t)e->entries * 2 > e->slot_mask && slots_double(e) < 0)
        return NULL;
    if (batch < MAX_BATCHES && !e->batches[batch])
        e->batches[batch] = own_memory(BATCH_ENTRIES * sizeof(struct entry));
    if (batch == MAX_BATCHES || !e->batches[batch])
        return NULL;
    struct entry *entry = entry_at(e, e->entries);

    entry->hash = hash;
    entry->length = (uint8_t)length;
    memcpy(entry->spelling, s, length);
    *slot_of(e, s, length, hash) = ++e->entries;
    return entry;
}

static int count_add(struct expect *e, int set, const char *s, size_t length, int64_t by)
{
    uint32_t hash = own_hash(s, length), slot = *slot_of(e, s, length, hash);
    struct entry *entry = slot ? entry_at(e, slot - 1) : entry_new(e, s, length, hash);

    if (!entry)
        return no_memory();
    entry->counts[set] += (uint64_t)by;
    return 0;
}

/* ---- reading a piece ----------------------------------------------------------------------------------------------- */

static uint64_t piece_bytes(const struct expect *e, uint64_t piece)
{
    uint64_t left = e->source->length - piece * PIECE_BYTES;

    return left < PIECE_BYTES ? left : PIECE_BYTES;
}

/* The first edit that ends behind `offset`. */
static size_t edit_from(const struct expect *e, uint64_t offset)
{
    size_t low = 0, high = e->edit_count;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if (e->edits[middle].offset + e->edits[middle].length <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Reads the piece with its surroundings; the piece begins at buffer + 1. *after: bytes there are behind it. */
static int piece_read(struct expect *e, uint64_t piece, bool edited, uint64_t *after)
{
    uint64_t begin = piece * PIECE_BYTES, end = begin + piece_bytes(e, piece);
    uint64_t from = begin ? begin - 1 : 0, to = e->source->length - end < WORD_MAX + 1 ? e->source->length : end + WORD_MAX + 1;
    char *at = begin ? e->buffer : e->buffer + 1;
    int rc = source_read(e->source, from, at, to - from);

    if (rc)
        return rc;
    e->buffer[0] = begin ? e->buffer[0] : '\0';
    *after = to - end;
    for (size_t i = edited ? edit_from(e, from) : e->edit_count; i < e->edit_count && e->edits[i].offset < to; i++) {
        const struct edit *edit = &e->edits[i];

        for (uint32_t k = 0; k < edit->length; k++) {
            uint64_t offset = edit->offset + k;

            if (offset >= from && offset < to)
                at[offset - from] = edit->after[k];
        }
    }
    return 0;
}

/* Adds `by` for every word that begins in the piece in the buffer. */
static int piece_count(struct expect *e, uint64_t bytes, uint64_t after, int set, int64_t by)
{
    const unsigned char *p = (const unsigned char *)e->buffer, *end = p + 1 + bytes, *stop = end + after;
    char word[WORD_MAX];

    for (const unsigned char *at = p + 1; at < end; at++) {
        size_t n = 0;

        if (!e->lower[*at] || e->lower[at[-1]])
            continue;
        while (at + n < stop && n < WORD_MAX && e->lower[at[n]]) {
            word[n] = (char)e->lower[at[n]];
            n++;
        }
        int rc = count_add(e, set, word, n, by);

        if (rc)
            return rc;
        at += n - 1; /* the rest of a longer run has a letter before it, and is passed over */
    }
    return 0;
}

static uint32_t piece_crc(const struct expect *e, uint64_t bytes)
{
    const unsigned char *p = (const unsigned char *)e->buffer + 1;
    uint32_t crc = 0xffffffffu;

    for (uint64_t i = 0; i < bytes; i++)
        crc = crc >> 8 ^ e->crc_table[(crc ^ p[i]) & 0xff];
    return ~crc;
}

/* ---- the answers --------------------------------------------------------------------------------------------------- */

int expect_before(struct expect *e, struct progress *progress)
{
    uint64_t after;

    for (uint64_t i = 0; i < e->pieces; i++) {
        int rc = piece_read(e, i, false, &after);

        rc = rc ? rc : piece_count(e, piece_bytes(e, i), after, EXPECT_BEFORE, 1);
        if (rc)
            return rc;
        e->crc[BEFORE][i] = piece_crc(e, piece_bytes(e, i));
        progress_update(progress, (i + 1) * PIECE_BYTES);
    }
    return source_unchanged(e->source);
}

/* Takes the words of a piece out as they were and puts them in as they are. */
static int piece_again(struct expect *e, uint64_t piece)
{
    uint64_t after, bytes = piece_bytes(e, piece);
    int rc = piece_read(e, piece, false, &after);

    rc = rc ? rc : piece_count(e, bytes, after, EXPECT_AFTER, -1);
    rc = rc ? rc : piece_read(e, piece, true, &after);
    rc = rc ? rc : piece_count(e, bytes, after, EXPECT_AFTER, 1);
    e->crc[AFTER][piece] = piece_crc(e, bytes);
    return rc;
}

int expect_after(struct expect *e, const struct edit *edits, size_t count)
{
    uint64_t next = 0; /* pieces below it are done */

    e->edits = edits;
    e->edit_count = count;
    memcpy(e->crc[AFTER], e->crc[BEFORE], e->pieces * sizeof(uint32_t));
    for (uint32_t n = 0; n < e->entries; n++)
        entry_at(e, n)->counts[EXPECT_AFTER] = entry_at(e, n)->counts[EXPECT_BEFORE];
    for (size_t i = 0; i < count; i++) {
        uint64_t first = edits[i].offset / PIECE_BYTES, last = (edits[i].offset + edits[i].length - 1) / PIECE_BYTES;

        for (uint64_t piece = first < next ? next : first; piece <= last; piece++) {
            int rc = piece_again(e, piece);

            if (rc)
                return rc;
            next = piece + 1;
        }
    }
    return source_unchanged(e->source);
}

int expect_part(struct expect *e, int round, uint64_t bytes, struct progress *progress)
{
    int set = round == AFTER ? EXPECT_PART_AFTER : EXPECT_PART_BEFORE;
    uint64_t after;

    for (uint64_t i = 0; i * PIECE_BYTES < bytes; i++) {
        int rc = piece_read(e, i, round == AFTER, &after);

        rc = rc ? rc : piece_count(e, piece_bytes(e, i), after, set, 1);
        if (rc)
            return rc;
        progress_update(progress, (i + 1) * PIECE_BYTES);
    }
    return source_unchanged(e->source);
}

/* Whether a comes before b in a ranking: more often, or as often and first in the order of the bytes. */
static bool more_frequent(const struct entry *a, const struct entry *b, int set)
{
    size_t both = a->length < b->length ? a->length : b->length;
    int order = memcmp(a->spelling, b->spelling, both);

    if (a->counts[set] != b->counts[set])
        return a->counts[set] > b->counts[set];
    return order < 0 || (order == 0 && a->length < b->length);
}

/* The best entry that comes after `previous`; NULL: there is none. Slow and plain, so that it can be believed. */
static const struct entry *next_best(const struct expect *e, int set, const struct entry *previous)
{
    const struct entry *best = NULL;

    for (uint32_t n = 0; n < e->entries; n++) {
        const struct entry *entry = entry_at(e, n);

        if (entry->counts[set] && (!previous || more_frequent(previous, entry, set)) &&
            (!best || more_frequent(entry, best, set)))
            best = entry;
    }
    return best;
}

void expect_census(const struct expect *e, int set, struct census *census)
{
    const struct entry *entry = NULL;

    *census = (struct census){0};
    for (uint32_t n = 0; n < e->entries; n++) {
        struct spelling s;

        entry = entry_at(e, n);
        if (entry->counts[set] == 0)
            continue;
        spelling_reset(&s);
        for (uint8_t i = 0; i < entry->length; i++)
            spelling_add(&s, (unsigned char)entry->spelling[i]);
        census->words++;
        census->occurrences += entry->counts[set];
        census->fingerprint += word_fingerprint(s.hash, entry->counts[set]);
    }
    entry = NULL;
    while (census->ranks < RANKS && (entry = next_best(e, set, entry))) {
        struct rank *rank = &census->rank[census->ranks++];

        rank->count = entry->counts[set];
        rank->length = entry->length;
        memcpy(rank->spelling, entry->spelling, entry->length);
    }
}

uint32_t expect_crc(const struct expect *e, int round, uint64_t piece)
{
    return e->crc[round][piece];
}

uint64_t expect_count(const struct expect *e, int set, const char *spelling, size_t length)
{
    uint32_t slot = *slot_of(e, spelling, length, own_hash(spelling, length));

    return slot ? entry_at(e, slot - 1)->counts[set] : 0;
}
