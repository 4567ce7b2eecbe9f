/* SPDX-License-Identifier: MIT */
/* What the command and the kernels of `hmm demo` both know: words, the table's nodes, results, and the kernels' argument blocks. */
#ifndef HMM_DEMO_KERNELS_H
#define HMM_DEMO_KERNELS_H

#include <hmm/hmm.h>
#include <stddef.h>
#include <stdint.h>

/* The CPU changes words between two rounds; the device answers every question once before and once after. */
enum { BEFORE, AFTER, ROUNDS };

/* ---- words: the rules that CPU and device share ------------------------------------------------------------------- */

/*
 * A word is a run of ASCII letters and digits, in lower case. It is known by its first WORD_MAX bytes: longer runs that begin
 * alike are one word. So who reads a piece of the text needs to look only one byte back and WORD_MAX bytes ahead.
 */
#define WORD_MAX 31

/* A node of the hash table, in malloc memory. CPU and device reach it through the same pointer. */
struct word {
    struct word *next; /* the chain */
    uint64_t hash;
    uint64_t count;          /* occurrences, counted and kept up to date by the CPU */
    uint64_t device[ROUNDS]; /* occurrences, counted by the device */
    uint8_t length;
    char spelling[];
};

/* A word as it is being read. */
struct spelling {
    uint64_t hash;
    uint32_t length; /* 0: no word */
    char bytes[WORD_MAX];
};

/* The letter or digit in lower case, or 0 for any other byte. Computed, because a kernel may not read tables of the host. */
static inline unsigned char word_byte(unsigned char c)
{
    unsigned char lower = c | 0x20;

    if (c >= '0' && c <= '9')
        return c;
    return lower >= 'a' && lower <= 'z' ? lower : 0;
}

/* FNV-1a. */
#define HASH_START 0xcbf29ce484222325ull
#define HASH_FACTOR 0x100000001b3ull

static inline void spelling_reset(struct spelling *s)
{
    s->hash = HASH_START;
    s->length = 0;
}

static inline void spelling_add(struct spelling *s, unsigned char c)
{
    if (s->length < WORD_MAX) {
        s->hash = (s->hash ^ c) * HASH_FACTOR;
        s->bytes[s->length++] = (char)c;
    }
}

/* The bucket of a hash. The high half is folded in because FNV mixes upwards. */
static inline uint64_t bucket_of(uint64_t hash, uint64_t mask)
{
    return (hash ^ (hash >> 32)) & mask;
}

/* One number for a word and its count. The sum over all words says, in any order, whether two tables hold the same. */
static inline uint64_t word_fingerprint(uint64_t hash, uint64_t count)
{
    uint64_t x = hash + count * 0x9e3779b97f4a7c15ull;

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* ---- what is known about all words together ------------------------------------------------------------------------ */

#define RANKS 10

struct rank {
    uint64_t count;
    uint32_t length;
    char spelling[WORD_MAX];
};

struct census {
    uint64_t words; /* different ones */
    uint64_t occurrences;
    uint64_t fingerprint; /* sum of word_fingerprint() */
    uint64_t misplaced;   /* nodes in a chain where their spelling does not belong */
    uint32_t ranks;       /* used entries of rank[]: most frequent first, equals by spelling */
    struct rank rank[RANKS];
};

/* ---- the kernels: plain data goes in, copied; pointers in it are of the program ------------------------------------- */

struct walk_args {
    struct word **buckets; /* process pointers, both */
    struct census *census; /* goes from one launch to the next in process memory */
    uint64_t first, last;  /* buckets of this launch */
    uint64_t mask;
    struct census sum; /* the kernel's own from here on */
    struct word *heads[64];
};

/* Adds what the chains of some buckets hold to *census. Returns the number of words in it. */
HMM_API uint64_t demo_walk(hmm_accessor *acc, void *arg);

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

/* Adds to device[round] of the words of a piece. Returns how many it counted. */
HMM_API uint64_t demo_count(hmm_accessor *acc, void *arg);

#endif
