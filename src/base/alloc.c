/* SPDX-License-Identifier: MIT */
/*
 * See alloc.h. A slab allocator after Bonwick (USENIX 1994).
 *
 *   chunk   one mapping of 2 MiB: a header, then slabs aligned to their size, so that an object finds its slab by masking
 *   slab    a header, then objects of one size class, carved in order; freed ones are listed through their first word
 *
 * A chunk is on `chunks` while it lives; a slab is on its class's `partial` list while it has an object to give, on its chunk's
 * `slabs` list while it serves no class. Memory is cleared when it is handed out, unless it was never used before.
 *
 * Under the address sanitizer memory that is not handed out is poisoned, so that it sees misuse as it does malloc's.
 */
#include "base/alloc.h"

#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/list.h"
#include "base/lock.h"

#define CHUNK_BYTES ((size_t)2 << 20)
#define SLAB_BYTES ((size_t)128 << 10)
#define SMALL_MAX ((size_t)32 << 10)
#define GRAIN 16u
#define CLASSES 40

#if defined(__SANITIZE_ADDRESS__)
#define HAVE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAVE_ASAN 1
#endif
#endif

#ifdef HAVE_ASAN
#include <sanitizer/asan_interface.h>
#define POISON(ptr, n) __asan_poison_memory_region(ptr, n)
#define UNPOISON(ptr, n) __asan_unpoison_memory_region(ptr, n)
#define TOUCH(ptr) ((void)*(volatile char *)(ptr)) /* shows a double free with its stack */
#else
#define POISON(ptr, n) ((void)0)
#define UNPOISON(ptr, n) ((void)0)
#define TOUCH(ptr) ((void)0)
#endif

struct chunk {
    struct list link;
    struct list slabs; /* serving no class */
    void *map;
    unsigned fresh; /* slabs from here on were never used */
    unsigned used;  /* slabs serving a class */
};

struct slab {
    struct list link;
    struct chunk *chunk;
    void *free;     /* freed objects */
    uint32_t fresh; /* offset of the first object never handed out */
    uint32_t used;  /* objects handed out */
    uint16_t cls;
    bool dirty; /* had another life: fresh objects are not zero */
};

#define SLAB_FIRST 64u
_Static_assert(sizeof(struct slab) <= SLAB_FIRST, "a slab's header fits before its first object");

int (*mem_fail)(size_t bytes);

static struct mutex lock = MUTEX_INITIALIZER(RANK_ALLOC);
static struct mem_source source;
static struct list chunks = {&chunks, &chunks};
static struct list partial[CLASSES];
static unsigned empty_chunks;
static uint64_t used_bytes, mapped_bytes; /* atomic */

/* Classes: 16 to 128 in steps of 16, then four to each doubling. */
static unsigned class_of(size_t bytes)
{
    if (bytes <= 128)
        return bytes <= GRAIN ? 0 : (unsigned)((bytes + GRAIN - 1) / GRAIN - 1);
    unsigned top = 63 - (unsigned)__builtin_clzl(bytes - 1); /* 2^top < bytes <= 2^(top+1) */
    return 8 + (top - 7) * 4 + (unsigned)((bytes - 1) >> (top - 2) & 3);
}

static size_t class_bytes(unsigned cls)
{
    if (cls < 8)
        return (cls + 1) * GRAIN;
    unsigned top = 7 + (cls - 8) / 4, quarter = (cls - 8) % 4;
    return ((size_t)1 << top) + (quarter + 1) * ((size_t)1 << (top - 2));
}

static size_t page_round(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return bytes > SIZE_MAX - page ? 0 : (bytes + page - 1) / page * page;
}

static void *source_map(size_t bytes)
{
    void *ptr;
    if (source.map(bytes, &ptr) != 0)
        return NULL;
    __atomic_fetch_add(&mapped_bytes, bytes, __ATOMIC_RELAXED);
    return ptr;
}

static void source_unmap(void *ptr, size_t bytes)
{
    source.unmap(ptr, bytes);
    __atomic_fetch_sub(&mapped_bytes, bytes, __ATOMIC_RELAXED);
}

static char *first_slab(const struct chunk *c)
{
    return (char *)(((uintptr_t)c->map + sizeof(*c) + SLAB_BYTES - 1) & ~(SLAB_BYTES - 1));
}

static bool has_fresh_slab(const struct chunk *c)
{
    return first_slab(c) + (c->fresh + 1) * SLAB_BYTES <= (char *)c->map + CHUNK_BYTES;
}

/* Gives a new chunk to the list. Caller holds the lock, which is let go meanwhile. */
static bool add_chunk(void)
{
    mutex_unlock(&lock);
    struct chunk *c = source_map(CHUNK_BYTES);
    mutex_lock(&lock);
    if (!c)
        return false;
    list_init(&c->slabs);
    c->map = c;
    list_add_tail(&chunks, &c->link);
    empty_chunks++;
    return true;
}

/* A slab that serves no class, taken from a chunk, or NULL when no chunk has one. Caller holds the lock. */
static struct slab *take_slab(void)
{
    list_for_each (pos, &chunks) {
        struct chunk *c = container_of(pos, struct chunk, link);
        struct slab *s = NULL;
        if (!list_empty(&c->slabs)) {
            s = container_of(c->slabs.next, struct slab, link);
            list_del(&s->link);
        } else if (has_fresh_slab(c)) {
            s = (struct slab *)(first_slab(c) + c->fresh++ * SLAB_BYTES);
            s->chunk = c;
            POISON((char *)s + SLAB_FIRST, SLAB_BYTES - SLAB_FIRST);
        }
        if (s) {
            if (c->used++ == 0)
                empty_chunks--;
            return s;
        }
    }
    return NULL;
}

static bool slab_full(const struct slab *s)
{
    return !s->free && s->fresh + class_bytes(s->cls) > SLAB_BYTES;
}

/* A slab of the class with an object to give. Caller holds the lock, which may be let go meanwhile. */
static struct slab *slab_for(unsigned cls)
{
    for (;;) {
        if (!list_empty(&partial[cls]))
            return container_of(partial[cls].next, struct slab, link);
        struct slab *s = take_slab();
        if (s) {
            s->free = NULL;
            s->fresh = SLAB_FIRST;
            s->used = 0;
            s->cls = (uint16_t)cls;
            list_add_tail(&partial[cls], &s->link);
            return s;
        }
        if (!add_chunk())
            return NULL;
    }
}

/* Takes an object; *clean says that it is zero already. Caller holds the lock. */
static void *slab_take(struct slab *s, bool *clean)
{
    void *ptr = s->free;
    *clean = !ptr && !s->dirty;
    if (ptr) {
        UNPOISON(ptr, sizeof(void *));
        memcpy(&s->free, ptr, sizeof(void *));
    } else {
        ptr = (char *)s + s->fresh;
        s->fresh += (uint32_t)class_bytes(s->cls);
    }
    s->used++;
    if (slab_full(s))
        list_del(&s->link);
    return ptr;
}

/* Caller holds the lock. Returns a chunk to unmap after the lock is let go, or NULL. */
static struct chunk *slab_give(struct slab *s, void *ptr)
{
    if (slab_full(s))
        list_add_tail(&partial[s->cls], &s->link);
    UNPOISON(ptr, sizeof(void *)); /* the request may have been smaller */
    memcpy(ptr, &s->free, sizeof(void *));
    POISON(ptr, class_bytes(s->cls));
    s->free = ptr;
    if (--s->used > 0)
        return NULL;
    struct chunk *c = s->chunk;
    list_del(&s->link);
    list_add_tail(&c->slabs, &s->link);
    s->dirty = true;
    if (--c->used > 0 || empty_chunks++ == 0)
        return NULL;
    empty_chunks--;
    list_del(&c->link);
    return c;
}

static void free_chunk(struct chunk *c)
{
    UNPOISON(c->map, CHUNK_BYTES);
    source_unmap(c->map, CHUNK_BYTES);
}

static void *alloc_small(size_t bytes)
{
    unsigned cls = class_of(bytes);
    void *ptr = NULL;
    bool clean = false;
    mutex_lock(&lock);
    struct slab *s = slab_for(cls);
    if (s)
        ptr = slab_take(s, &clean);
    mutex_unlock(&lock);
    if (!ptr)
        return NULL;
    __atomic_fetch_add(&used_bytes, class_bytes(cls), __ATOMIC_RELAXED);
    UNPOISON(ptr, bytes);
    if (!clean)
        memset(ptr, 0, bytes);
    return ptr;
}

static void free_small(void *ptr, size_t bytes)
{
    struct slab *s = (struct slab *)((uintptr_t)ptr & ~(SLAB_BYTES - 1));
    TOUCH(ptr);
    mutex_lock(&lock);
    bool matches = s->cls == class_of(bytes) && s->used > 0;
    struct chunk *c = matches ? slab_give(s, ptr) : NULL;
    mutex_unlock(&lock);
    if (!matches) {
        hmm_log(HMM_LOG_ERROR, "allocator: %zu bytes at %p freed that were not allocated so; they are lost", bytes, ptr);
        return;
    }
    if (c)
        free_chunk(c);
    __atomic_fetch_sub(&used_bytes, class_bytes(class_of(bytes)), __ATOMIC_RELAXED);
}

void *mem_alloc(size_t bytes)
{
    if (!source.map || (mem_fail && mem_fail(bytes)))
        return NULL;
    if (bytes == 0)
        bytes = 1;
    if (bytes <= SMALL_MAX)
        return alloc_small(bytes);
    size_t size = page_round(bytes);
    void *ptr = size ? source_map(size) : NULL;
    if (ptr)
        __atomic_fetch_add(&used_bytes, size, __ATOMIC_RELAXED);
    return ptr;
}

void mem_free(void *ptr, size_t bytes)
{
    if (!ptr)
        return;
    if (bytes == 0)
        bytes = 1;
    if (bytes <= SMALL_MAX) {
        free_small(ptr, bytes);
        return;
    }
    __atomic_fetch_sub(&used_bytes, page_round(bytes), __ATOMIC_RELAXED);
    source_unmap(ptr, page_round(bytes));
}

static void reset(void)
{
    list_init(&chunks);
    for (unsigned i = 0; i < CLASSES; i++)
        list_init(&partial[i]);
    empty_chunks = 0;
    __atomic_store_n(&used_bytes, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&mapped_bytes, 0, __ATOMIC_RELAXED);
}

void mem_init(const struct mem_source *from)
{
    source = *from;
    reset();
}

void mem_exit(void)
{
    while (!list_empty(&chunks)) {
        struct chunk *c = container_of(chunks.next, struct chunk, link);
        list_del(&c->link);
        free_chunk(c);
    }
    source = (struct mem_source){NULL, NULL};
    reset();
}

void mem_forget(void)
{
    mutex_init(&lock, RANK_ALLOC); /* another thread may have held it at fork */
    reset();
}

uint64_t mem_used(void)
{
    return __atomic_load_n(&used_bytes, __ATOMIC_RELAXED);
}

uint64_t mem_mapped(void)
{
    return __atomic_load_n(&mapped_bytes, __ATOMIC_RELAXED);
}
