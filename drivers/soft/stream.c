/* SPDX-License-Identifier: MIT */
/*
 * Copying a block to device memory past the caches: nobody reads it soon from here, and ordinary stores would first fetch every line
 * they overwrite. (The C library does the same, from sizes on that no block reaches.)
 */
#include "soft.h"

#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

/* Both sides are page aligned, bytes a multiple of the page size. */
void soft_stream_copy(void *to, const void *from, size_t bytes)
{
    __m128i *d = to;
    const __m128i *s = from;
    for (size_t i = 0; i < bytes / sizeof(*d); i += 4) {
        __m128i a = _mm_load_si128(s + i), b = _mm_load_si128(s + i + 1);
        __m128i c = _mm_load_si128(s + i + 2), e = _mm_load_si128(s + i + 3);
        _mm_stream_si128(d + i, a);
        _mm_stream_si128(d + i + 1, b);
        _mm_stream_si128(d + i + 2, c);
        _mm_stream_si128(d + i + 3, e);
    }
    _mm_sfence(); /* before the fence is signalled */
}
#else
void soft_stream_copy(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
}
#endif
