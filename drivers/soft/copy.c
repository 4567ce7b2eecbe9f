/* SPDX-License-Identifier: MIT */
/*
 * The copy engines. CPU faults and evictions wait for them, so they are threads of their own, which run nothing else: a copy is
 * never behind a job. Small copies are done at once by the caller, because waking a thread takes longer.
 *
 * Callers are library threads, so no signal handler of the program can run while one holds the lock.
 */
#include "soft.h"

#include <errno.h>
#include <string.h>

#define COPY_AT_ONCE ((size_t)64 << 10)

static int copy_piece(struct memory *m, int what, const struct hmm_dma *d)
{
    char *at = soft_memory_at(m, d->page);
    size_t bytes = d->pages << m->page_shift;
    if (d->pages == 0 || d->page + d->pages > m->pages)
        return -EIO;
    if (what == COPY_TO_SYSTEM) {
        memcpy(d->host, at, bytes);
        return 0;
    }
    int r = soft_memory_touch(m, d->page, d->pages);
    if (r)
        return r;
    if (what == COPY_TO_DEVICE && bytes > COPY_AT_ONCE)
        soft_stream_copy(at, d->host, bytes);
    else if (what == COPY_TO_DEVICE)
        memcpy(at, d->host, bytes);
    else
        memset(at, 0, bytes);
    return 0;
}

static uint64_t bytes_of(const struct memory *m, const struct copy_request *c)
{
    uint64_t pages = 0;
    for (unsigned i = 0; i < c->n; i++)
        pages += c->v[i].pages;
    return pages << m->page_shift;
}

/* Clearing crosses no link. */
static void copy_run(struct soft *s, const struct copy_request *c)
{
    uint64_t over = 0;
    int r = 0;
    if (c->what != COPY_CLEAR)
        over = soft_bus_begin(&s->bus, c->what == COPY_TO_DEVICE ? TO_DEVICE : TO_SYSTEM, bytes_of(&s->memory, c));
    for (unsigned i = 0; i < c->n && !r; i++)
        r = copy_piece(&s->memory, c->what, &c->v[i]);
    if (over)
        soft_bus_wait(&s->bus, over);
    hmm_fence_signal(c->fence, r);
}

static void enqueue(struct copy_queue *q, const struct copy_request *c)
{
    pthread_mutex_lock(&q->lock);
    while (q->count == COPY_RING)
        pthread_cond_wait(&q->emptied, &q->lock);
    q->ring[(q->head + q->count++) % COPY_RING] = *c;
    pthread_cond_signal(&q->filled);
    pthread_mutex_unlock(&q->lock);
}

static struct copy_request dequeue(struct copy_queue *q)
{
    pthread_mutex_lock(&q->lock);
    while (q->count == 0)
        pthread_cond_wait(&q->filled, &q->lock);
    struct copy_request c = q->ring[q->head];
    q->head = (q->head + 1) % COPY_RING;
    q->count--;
    pthread_cond_signal(&q->emptied);
    pthread_mutex_unlock(&q->lock);
    return c;
}

static void copy_thread(void *arg)
{
    struct soft *s = arg;
    for (;;) {
        struct copy_request c = dequeue(&s->copies);
        if (c.what == COPY_STOP)
            return;
        copy_run(s, &c);
    }
}

static int start(struct soft *s, const struct copy_request *c)
{
    if (soft_port_here() || bytes_of(&s->memory, c) <= COPY_AT_ONCE)
        copy_run(s, c);
    else
        enqueue(&s->copies, c);
    return 0;
}

int soft_copy(void *priv, enum hmm_dma_kind kind, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    int what = kind == HMM_DMA_TO_DEVICE ? COPY_TO_DEVICE : COPY_TO_SYSTEM;
    return start(priv, &(struct copy_request){.what = what, .v = v, .n = n, .fence = fence});
}

int soft_clear(void *priv, const struct hmm_dma *v, unsigned n, hmm_fence *fence)
{
    return start(priv, &(struct copy_request){.what = COPY_CLEAR, .v = v, .n = n, .fence = fence});
}

static void join_threads(struct copy_queue *q)
{
    for (unsigned i = 0; i < q->nthreads; i++)
        enqueue(q, &(struct copy_request){.what = COPY_STOP});
    for (unsigned i = 0; i < q->nthreads; i++)
        hmm_thread_join(q->threads[i]);
}

int soft_copy_init(struct soft *s, unsigned threads)
{
    struct copy_queue *q = &s->copies;
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->filled, NULL);
    pthread_cond_init(&q->emptied, NULL);
    while (q->nthreads < threads) {
        int r = hmm_thread_start(&q->threads[q->nthreads], "hmm-soft-copy", copy_thread, s);
        if (r) {
            soft_copy_exit(s);
            return hmm_fail(r, "soft: copy thread %u of %u cannot be started (%s)", q->nthreads + 1, threads, hmm_strerror(r));
        }
        q->nthreads++;
    }
    return 0;
}

void soft_copy_exit(struct soft *s)
{
    struct copy_queue *q = &s->copies;
    join_threads(q);
    pthread_cond_destroy(&q->emptied);
    pthread_cond_destroy(&q->filled);
    pthread_mutex_destroy(&q->lock);
}
