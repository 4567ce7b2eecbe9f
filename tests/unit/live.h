/* SPDX-License-Identifier: MIT */
/* For tests that run the whole library on memory of their own: memory, oracles, and what the kernel says. */
#ifndef TESTS_UNIT_LIVE_H
#define TESTS_UNIT_LIVE_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <hmm/hmm.h>

#define LIVE_BLOCK ((size_t)2 << 20)

static inline uint64_t live_mix(uint64_t x) /* splitmix64 (Steele, Lea, Flood 2014) */
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static inline void live_fill(void *to, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i < bytes; i++)
        ((volatile uint8_t *)to)[i] = (uint8_t)live_mix(seed + i);
}

/* Block-aligned address space without access, of whole blocks. */
static inline char *live_reserve(size_t bytes)
{
    char *raw = mmap(NULL, bytes + LIVE_BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return raw == MAP_FAILED ? NULL : (char *)(((uintptr_t)raw + LIVE_BLOCK - 1) & ~(LIVE_BLOCK - 1));
}

/* Fresh small pages at a place of the program's own. */
static inline bool live_map(void *at, size_t bytes)
{
    void *p = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return p == at && madvise(at, bytes, MADV_NOHUGEPAGE) == 0;
}

/* Present or swapped, as the kernel reports it. Touches nothing. */
static inline bool live_present(const void *at)
{
    uint64_t word = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    ssize_t n = pread(fd, &word, sizeof(word), (off_t)((uintptr_t)at / hmm_page_size() * sizeof(word)));
    close(fd);
    return n == sizeof(word) && word >> 62 != 0;
}

/* CRC-32C bit by bit, as the definition says. */
static inline uint32_t live_crc(const void *data, size_t len)
{
    uint32_t crc = ~0u;
    for (const uint8_t *p = data; len--; p++) {
        crc ^= *p;
        for (int k = 0; k < 8; k++)
            crc = crc >> 1 ^ (0x82f63b78u & -(crc & 1));
    }
    return ~crc;
}

#endif
