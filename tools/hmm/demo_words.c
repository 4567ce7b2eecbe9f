/* SPDX-License-Identifier: MIT */
/*
 * The CPU's side of the demo: the file, the hash table of its words, and the changes the CPU makes while the text and the
 * table live on the device. Nothing here knows about devices, but for one question that does not matter to the result
 * (edits_apply() asks where a page is, to tell the reader).
 *
 * One thread; no kernel of the device runs meanwhile.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "demo.h"

/* ---- the file ------------------------------------------------------------------------------------------------------ */

int source_open(struct source *source, const char *path, uint64_t repeat, uint64_t at_least)
{
    struct stat st;
    /* Without O_NONBLOCK, a pipe that nobody writes to would hold us here for ever. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);

    if (fd < 0) {
        int err = errno;
        const char *remedy = err == EACCES ? "ask its owner for permission, or name another file" : "give the path of a file";

        return output_error(DEMO_BAD_INPUT, "cannot open '%s': %s; %s", path, strerror(err), remedy);
    }
    if (fstat(fd, &st) < 0) {
        int err = errno;

        close(fd);
        return output_error(DEMO_BAD_INPUT, "cannot look at '%s': %s; name another file", path, strerror(err));
    }
    if (S_ISDIR(st.st_mode)) {
        close(fd);
        return output_error(DEMO_BAD_INPUT, "'%s' is a directory; name a file in it", path);
    }
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return output_error(DEMO_BAD_INPUT,
                            "'%s' is %s, and the demo reads its input twice; save what comes out of it to a file", path,
                            S_ISFIFO(st.st_mode)   ? "a pipe"
                            : S_ISSOCK(st.st_mode) ? "a socket"
                                                   : "a device");
    }
    if (st.st_size == 0) {
        close(fd);
        return output_error(DEMO_BAD_INPUT, "'%s' is empty; name a file with something in it", path);
    }
    uint64_t bytes = (uint64_t)st.st_size;

    if (repeat == 0)
        repeat = (at_least + bytes - 1) / bytes;
    if (bytes > UINT64_MAX / 16 / repeat) {
        close(fd);
        return output_error(DEMO_BAD_INPUT, "'%s' times %llu is more than memory can hold; repeat it less often", path,
                            (unsigned long long)repeat);
    }
    *source = (struct source){
        .path = path,
        .fd = fd,
        .file_bytes = bytes,
        .repeat = repeat,
        .length = bytes * repeat,
        .changed = st.st_mtim,
    };
    return 0;
}

void source_close(struct source *source)
{
    close(source->fd);
}

static int changed_meanwhile(const struct source *source)
{
    return output_error(DEMO_BAD_INPUT, "'%s' was changed while the demo read it; use a file that nobody writes to",
                        source->path);
}

static int read_fully(const struct source *source, uint64_t offset, char *to, uint64_t len)
{
    while (len > 0) {
        ssize_t n = pread(source->fd, to, len, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return output_error(DEMO_BAD_INPUT, "cannot read '%s': %s; name another file", source->path, strerror(errno));
        if (n == 0)
            return changed_meanwhile(source);
        to += n;
        offset += (uint64_t)n;
        len -= (uint64_t)n;
    }
    return 0;
}

/* Reads the file once around, from `offset` on; the stream repeats what is then there. */
int source_read(const struct source *source, uint64_t offset, void *to, uint64_t len)
{
    uint64_t at = offset % source->file_bytes;
    uint64_t done = len < source->file_bytes ? len : source->file_bytes;
    uint64_t tail = done < source->file_bytes - at ? done : source->file_bytes - at;
    int rc = read_fully(source, at, to, tail);

    rc = rc ? rc : read_fully(source, 0, (char *)to + tail, done - tail);
    while (rc == 0 && done < len) {
        uint64_t n = done < len - done ? done : len - done; /* done is a multiple of the file's size here */

        memcpy((char *)to + done, to, n);
        done += n;
    }
    return rc;
}

int source_unchanged(const struct source *source)
{
    struct stat st;

    if (fstat(source->fd, &st) < 0 || (uint64_t)st.st_size != source->file_bytes ||
        st.st_mtim.tv_sec != source->changed.tv_sec || st.st_mtim.tv_nsec != source->changed.tv_nsec)
        return changed_meanwhile(source);
    return 0;
}

/* ---- the hash table ------------------------------------------------------------------------------------------------ */

#define FIRST_BUCKETS ((uint64_t)1 << 14)

int table_init(struct table *table)
{
    *table = (struct table){.mask = FIRST_BUCKETS - 1, .bytes = FIRST_BUCKETS * sizeof(struct word *)};
    table->buckets = calloc(FIRST_BUCKETS, sizeof(*table->buckets));
    return table->buckets ? 0 : -ENOMEM;
}

void table_free(struct table *table)
{
    for (size_t i = 0; i < table->chunk_count; i++)
        free(table->chunks[i]);
    free(table->chunks);
    free(table->buckets);
}

static int chunk_add(struct table *table)
{
    if (table->chunk_count == table->chunk_room) {
        size_t room = table->chunk_room ? 2 * table->chunk_room : 16;
        char **chunks = realloc(table->chunks, room * sizeof(*chunks));

        if (!chunks)
            return -ENOMEM;
        table->chunks = chunks;
        table->chunk_room = room;
    }
    char *chunk = malloc(CHUNK_BYTES);

    if (!chunk)
        return -ENOMEM;
    table->chunks[table->chunk_count++] = chunk;
    table->used = 0;
    table->bytes += CHUNK_BYTES;
    return 0;
}

static struct word *word_alloc(struct table *table, size_t length)
{
    size_t bytes = (sizeof(struct word) + length + 7) & ~(size_t)7;

    if ((table->chunk_count == 0 || table->used + bytes > CHUNK_BYTES) && chunk_add(table) < 0)
        return NULL;
    struct word *word = (struct word *)(table->chunks[table->chunk_count - 1] + table->used);

    table->used += bytes;
    return word;
}

/* Twice the buckets; every node stays where it is and gets a place in another chain. */
static int table_grow(struct table *table)
{
    uint64_t old = table->mask + 1, mask = 2 * old - 1;
    struct word **buckets = calloc(2 * old, sizeof(*buckets));

    if (!buckets)
        return -ENOMEM;
    for (uint64_t i = 0; i < old; i++) {
        struct word *word = table->buckets[i], *next;

        for (; word; word = next) {
            struct word **bucket = &buckets[bucket_of(word->hash, mask)];

            next = word->next;
            word->next = *bucket;
            *bucket = word;
        }
    }
    free(table->buckets);
    table->buckets = buckets;
    table->mask = mask;
    table->bytes += old * sizeof(*buckets);
    return 0;
}

struct word *table_find(const struct table *table, const struct spelling *s)
{
    struct word *word = table->buckets[bucket_of(s->hash, table->mask)];

    while (word && !(word->hash == s->hash && word->length == s->length && !memcmp(word->spelling, s->bytes, s->length)))
        word = word->next;
    return word;
}

int table_add(struct table *table, const struct spelling *s)
{
    struct word *word = table_find(table, s);

    if (word) {
        word->count++;
        return 0;
    }
    if (table->words > table->mask && table_grow(table) < 0)
        return -ENOMEM;
    word = word_alloc(table, s->length);
    if (!word)
        return -ENOMEM;
    struct word **bucket = &table->buckets[bucket_of(s->hash, table->mask)];

    *word = (struct word){.next = *bucket, .hash = s->hash, .count = 1, .length = (uint8_t)s->length};
    memcpy(word->spelling, s->bytes, s->length);
    *bucket = word;
    table->words++;
    return 0;
}

int table_build(struct table *table, const char *text, uint64_t length, struct progress *progress)
{
    struct spelling s;

    spelling_reset(&s);
    for (uint64_t i = 0; i < length; i++) {
        unsigned char c = word_byte((unsigned char)text[i]);

        if (c) {
            spelling_add(&s, c);
        } else if (s.length) {
            if (table_add(table, &s) < 0)
                return -ENOMEM;
            spelling_reset(&s);
        }
        if (i % PIECE_BYTES == 0)
            progress_update(progress, i);
    }
    return s.length ? table_add(table, &s) : 0;
}

/* ---- what the CPU changes ------------------------------------------------------------------------------------------ */

/* splitmix64: every seed gives a good sequence. */
static uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15ull;

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Another letter for a letter, another digit for a digit: the word stays a word of the same length. */
static char other_letter(char c, unsigned shift)
{
    if (c >= '0' && c <= '9')
        return (char)('0' + (c - '0' + 1 + (int)(shift % 9)) % 10);
    char first = c >= 'a' ? 'a' : 'A';

    return (char)(first + (c - first + 1 + (int)(shift % 25)) % 26);
}

/* Makes the edit of the first word that starts in window[1..n) and ends before n. False: there is none. */
static bool edit_in_window(struct edit *edit, const char *window, size_t n, uint64_t offset, unsigned shift)
{
    for (size_t i = 1; i < n; i++) {
        size_t end = i;

        if (word_byte((unsigned char)window[i - 1]) || !word_byte((unsigned char)window[i]))
            continue;
        while (end < n && word_byte((unsigned char)window[end]))
            end++;
        if (end == n)
            return false;
        edit->offset = offset + i;
        edit->length = (uint32_t)(end - i < WORD_MAX ? end - i : WORD_MAX);
        for (uint32_t k = 0; k < edit->length; k++) {
            edit->before[k] = window[i + k];
            edit->after[k] = other_letter(window[i + k], shift);
        }
        return true;
    }
    return false;
}

static int by_offset(const void *a, const void *b)
{
    const struct edit *x = a, *y = b;

    return (x->offset > y->offset) - (x->offset < y->offset);
}

int edits_plan(const struct source *source, uint64_t seed, size_t want, struct edit **edits, size_t *count)
{
    char window[256];
    struct edit *plan = calloc(want, sizeof(*plan));
    size_t n = 0, unique = 0;

    if (!plan)
        return output_error(DEMO_BAD_INPUT, "no memory to plan the changes; close other programs");
    for (size_t i = 0; i < want; i++) {
        uint64_t offset = random_next(&seed) % source->length;
        unsigned shift = (unsigned)(random_next(&seed) >> 40);
        size_t bytes = source->length - offset < sizeof(window) ? (size_t)(source->length - offset) : sizeof(window);
        int rc = source_read(source, offset, window, bytes);

        if (rc) {
            free(plan);
            return rc;
        }
        n += edit_in_window(&plan[n], window, bytes, offset, shift);
    }
    qsort(plan, n, sizeof(*plan), by_offset);
    for (size_t i = 0; i < n; i++)
        if (unique == 0 || plan[i].offset != plan[unique - 1].offset)
            plan[unique++] = plan[i];
    *edits = plan;
    *count = unique;
    return 0;
}

static void spell(struct spelling *s, const char *bytes, size_t length)
{
    spelling_reset(s);
    for (size_t i = 0; i < length; i++)
        spelling_add(s, word_byte((unsigned char)bytes[i]));
}

static bool lives_on_device(const void *address)
{
    struct hmm_page_info page;

    return hmm_range_query(address, 1, &page, 1) == 1 && page.state == HMM_PAGE_DEVICE;
}

/* Ordinary loads and stores. Where a page is on the device, the CPU faults and the page comes home. */
int edits_apply(const struct edit *edits, size_t count, char *text, struct table *table, struct edit_result *result)
{
    *result = (struct edit_result){0};
    for (size_t i = 0; i < count; i++) {
        const struct edit *edit = &edits[i];
        char *bytes = text + edit->offset;
        struct spelling s;

        result->on_device += lives_on_device(bytes);
        result->differed += memcmp(bytes, edit->before, edit->length) != 0;
        memcpy(bytes, edit->after, edit->length);

        spell(&s, edit->before, edit->length);
        struct word *word = table_find(table, &s);

        if (word && word->count > 0)
            word->count--; /* a word that is gone keeps its node, with a count of 0 */
        else
            result->differed++;
        spell(&s, edit->after, edit->length);
        if (table_add(table, &s) < 0)
            return -ENOMEM;
    }
    return 0;
}
