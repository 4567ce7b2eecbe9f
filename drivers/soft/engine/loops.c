/* SPDX-License-Identifier: MIT */
/* Copies, comparisons, histograms, saxpy. See loops.h. */
#include "loops.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

typedef uint64_t u64x2 __attribute__((vector_size(16), aligned(1), may_alias));
typedef float f32x4 __attribute__((vector_size(16), aligned(1), may_alias));

#ifdef __SSE2__
#define LINE 64

/* Whole lines, of which the destination is aligned. */
static void copy_lines(char *to, const char *from, size_t n)
{
    for (size_t i = 0; i < n; i += LINE) {
        __m128i a = _mm_loadu_si128((const __m128i *)(from + i)), b = _mm_loadu_si128((const __m128i *)(from + i + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + i + 32)), d = _mm_loadu_si128((const __m128i *)(from + i + 48));
        _mm_stream_si128((__m128i *)(to + i), a);
        _mm_stream_si128((__m128i *)(to + i + 16), b);
        _mm_stream_si128((__m128i *)(to + i + 32), c);
        _mm_stream_si128((__m128i *)(to + i + 48), d);
    }
    _mm_sfence(); /* before others are told that it is written */
}

void loop_copy_large(void *to, const void *from, size_t n)
{
    size_t head = -(uintptr_t)to % LINE;
    if (n < head + LINE) {
        memcpy(to, from, n);
        return;
    }
    size_t lines = (n - head) / LINE * LINE;
    memcpy(to, from, head);
    copy_lines((char *)to + head, (const char *)from + head, lines);
    memcpy((char *)to + head + lines, (const char *)from + head + lines, n - head - lines);
}
#else
void loop_copy_large(void *to, const void *from, size_t n)
{
    memcpy(to, from, n);
}
#endif

static size_t compare_bytes(const char *a, const char *b, size_t from, size_t n)
{
    while (from < n && a[from] == b[from])
        from++;
    return from;
}

size_t loop_compare(const void *a, const void *b, size_t n)
{
    const char *p = a, *q = b;
    size_t i = 0;
    for (; n - i >= 64; i += 64) {
        const u64x2 *x = (const u64x2 *)(p + i), *y = (const u64x2 *)(q + i);
        u64x2 differs = (x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3]);
        if (differs[0] | differs[1])
            break;
    }
    return compare_bytes(p, q, i, n);
}

void loop_saxpy(any_f32 *y, const any_f32 *x, size_t n, float a)
{
    size_t i = 0;
    f32x4 factor = {a, a, a, a};
    for (; n - i >= 8; i += 8) {
        f32x4 *to = (f32x4 *)(y + i);
        const f32x4 *from = (const f32x4 *)(x + i);
        f32x4 low = factor * from[0] + to[0], high = factor * from[1] + to[1];
        to[0] = low;
        to[1] = high;
    }
    for (; i < n; i++)
        y[i] = a * x[i] + y[i];
}

void loop_histogram(struct loop_histogram *h, const void *p, size_t n)
{
    const unsigned char *bytes = p;
    size_t i = 0;
    for (; n - i >= 8; i += 8) {
        uint64_t word = *(const volatile any_u64 *)(bytes + i);
        h->part[0][word & 0xff]++;
        h->part[1][word >> 8 & 0xff]++;
        h->part[2][word >> 16 & 0xff]++;
        h->part[3][word >> 24 & 0xff]++;
        h->part[0][word >> 32 & 0xff]++;
        h->part[1][word >> 40 & 0xff]++;
        h->part[2][word >> 48 & 0xff]++;
        h->part[3][word >> 56]++;
    }
    for (; i < n; i++)
        h->part[0][bytes[i]]++;
}
