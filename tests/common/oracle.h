/* SPDX-License-Identifier: MIT */
/* What is right, found without the library: numbers that repeat with their seed, CRC-32C, and what the kernel says. */
#ifndef TESTS_COMMON_ORACLE_H
#define TESTS_COMMON_ORACLE_H

#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* splitmix64 (Steele, Lea, Flood 2014): as a hash, and as a sequence. */
#define RANDOM_GAMMA 0x9e3779b97f4a7c15ull

static inline uint64_t random_mix(uint64_t x)
{
    x += RANDOM_GAMMA;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static inline uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state;
    *state += RANDOM_GAMMA;
    return random_mix(x);
}

/* CRC-32C, from a table that is made bit by bit, as the definition says. */
static uint32_t crc_table[256];

__attribute__((constructor)) static void make_crc_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        crc_table[i] = i;
        for (int bit = 0; bit < 8; bit++)
            crc_table[i] = crc_table[i] >> 1 ^ (0x82f63b78u & -(crc_table[i] & 1));
    }
}

static inline uint32_t crc_oracle(const void *data, size_t len)
{
    uint32_t crc = ~0u;
    for (const uint8_t *p = data; len--; p++)
        crc = crc >> 8 ^ crc_table[(crc ^ *p) & 0xff];
    return ~crc;
}

/* The kernel's word about a page, of the process that opened /proc/self/pagemap. Touches nothing. */
static inline uint64_t pagemap_read(int fd, const void *at)
{
    uint64_t word;
    off_t offset = (off_t)((uintptr_t)at / (size_t)sysconf(_SC_PAGESIZE) * sizeof(word));
    if (pread(fd, &word, sizeof(word), offset) != sizeof(word)) {
        perror("/proc/self/pagemap");
        abort();
    }
    return word;
}

static inline uint64_t pagemap_word(const void *at)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t word = pagemap_read(fd, at);
    close(fd);
    return word;
}

/* Present or swapped. */
static inline bool page_present(const void *at)
{
    return pagemap_word(at) >> 62 != 0;
}

static inline bool all_bytes(const char *p, char value, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (p[i] != value)
            return false;
    return true;
}

static inline int open_descriptors(void)
{
    int n = 0;
    for (int fd = 0; fd < 1024; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

#endif
