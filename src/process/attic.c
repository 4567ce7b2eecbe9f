/* SPDX-License-Identifier: MIT */
/*
 * Events of different threads can be read out of order (kernel fact 7): a munmap or mremap that came after a fork may be read before it,
 * and would take away what the child still has. T is the moment at which the kernel copies the address space.
 *
 * The witness is a page of ours that children inherit, and that was written before: as soon as it is mapped twice, T of some fork has
 * passed. From then on we are in doubt, until the witness is ours alone again and no event was pending after it was written: a fork whose
 * T lies before the write is pending until it has been read, one whose T lies behind shows.
 *
 * In doubt, what an event is about to take away goes to the attic, with references, and a mark is made: one page after the other of an
 * area that children inherit, too, and which is registered, so that the child's userfaultfd can be asked whether the child has a
 * page of it. A child that has a mark was made after it: what went to the attic before is none of the child's business, and other memory may
 * stand there by then. A child that has not was made before: the attic has what it lacks, the oldest first. A mark is made
 * when an event is applied, and whoever caused it has gone on since it was read: so fork() waits until what was read is applied. (A raw
 * clone() does not.)
 *
 * Out of doubt, which is nearly always, the area is not registered, and an event costs a look at the witness.
 */
#include "process/attic.h"

#include <errno.h>
#include <string.h>

#include "base/alloc.h"
#include "debug/inject.h"
#include "mm/thread.h"
#include "os/own.h"
#include "process/gather.h"
#include "process/heir.h"

#define MARKS 1024 /* then the last stands for what follows */
#define REVIEW_NS 200000
#define STOP_TRIES 100
#define MARK_TRIES 5           /* of 1 ms: memory or mappings are short, and everybody waits meanwhile */
#define MARK_NS 10000000000ull /* then not again for so long */

static struct {
    struct mm *mm;
    uint32_t running; /* atomic */
    uint32_t *witness;
    char *marks; /* MARKS pages */
    bool doubt, registered;
    uint64_t refused;      /* os_now() when the marks could not be registered; 0: they could */
    bool marked;           /* since events were last read */
    unsigned n;            /* marks made */
    struct estate *estate; /* MARKS: what was taken away before mark i was made, and after the one before */
    struct work review;
} attic;

static size_t area_bytes(void)
{
    return MARKS * os_page_size();
}

bool attic_may_have_forked(struct mm *mm)
{
    return os->page_alone(mm->pagemap_fd, (uintptr_t)attic.witness) != 1;
}

void attic_reset(void)
{
    ++*(volatile uint32_t *)attic.witness;
}

/* ---- doubt ---- */

static void register_marks(void)
{
    int r = -ENOMEM;
    if (attic.refused && os_now() - attic.refused < MARK_NS)
        return;
    for (unsigned tries = 0; r == -ENOMEM && tries < MARK_TRIES; tries++) {
        if (tries)
            os_sleep(1000000);
        r = os->uffd_watch(attic.mm->uffd.fd, (uintptr_t)attic.marks, area_bytes());
    }
    attic.registered = !r;
    attic.refused = r == -ENOMEM ? os_now() : 0;
    if (r)
        hmm_log(HMM_LOG_ERROR,
                "fork: the marks of the library cannot be registered: %s; a child may find what its parent has dropped before",
                hmm_strerror(r));
}

static void begin_doubt(void)
{
    if (attic.doubt)
        return;
    attic.doubt = true;
    register_marks();
    heirs_run(&attic.review);
}

/* Only library threads have the descriptor. */
static bool unregister_marks(void)
{
    if (attic.registered && os->uffd_unregister(attic.mm->uffd.fd, (uintptr_t)attic.marks, area_bytes()))
        return false;
    attic.registered = false;
    return true;
}

/* Takes the marks away for the next time. */
static bool clear_marks(void)
{
    return unregister_marks() && os->advise(attic.marks, area_bytes(), OS_ADVISE_DONTNEED) == 0;
}

/* Moves what is in the attic to `old`, to be freed without locks. */
static void end_doubt(struct estate *old)
{
    for (unsigned i = 0; i < attic.n; i++) {
        estate_take(&attic.estate[i], 0, UINTPTR_MAX, old);
        estate_free(&attic.estate[i]); /* its list */
    }
    attic.n = 0;
    attic.doubt = attic.marked = false;
}

static void review(struct work *work, unsigned worker)
{
    struct mm *mm = attic.mm;
    struct estate old;
    (void)worker;
    os_sleep(REVIEW_NS);
    estate_init(&old, mm, NULL);
    rwlock_write_lock(&mm->as);
    attic_reset();
    bool over = os->uffd_pending(mm->uffd.fd) == 0 && !attic_may_have_forked(mm);
    bool stopping = !__atomic_load_n(&attic.running, __ATOMIC_SEQ_CST); /* nobody reads events any more */
    for (unsigned tries = 0; stopping && !mutate("fork-unmark") && tries < STOP_TRIES && !unregister_marks(); tries++)
        ; /* unmapping what is registered would wait for a reader */
    over = stopping || (over && clear_marks());
    if (over)
        end_doubt(&old);
    rwlock_write_unlock(&mm->as);
    estate_free(&old);
    if (!over)
        heirs_run(work);
}

/* ---- marks ---- */

void attic_reading(void)
{
    attic.marked = false;
}

static char *mark_at(unsigned i)
{
    return attic.marks + i * os_page_size();
}

/* What was read together lies between the same marks. */
static struct estate *estate_now(void)
{
    if (!attic.marked && attic.n < MARKS) {
        estate_init(&attic.estate[attic.n], attic.mm, NULL);
        *(volatile char *)mark_at(attic.n++) = 1;
        attic.marked = true;
    }
    return &attic.estate[attic.n - 1];
}

void attic_change(struct mm *mm, uintptr_t start, uintptr_t end)
{
    if ((!attic.doubt && !attic_may_have_forked(mm)) || mutate("fork-attic"))
        return;
    begin_doubt();
    estate_add_entries(estate_now(), start, end);
}

/* Only what is there already is refused so; what is not registered was not when the child was made, which is before all marks. */
static bool has_mark(int uffd, unsigned i)
{
    return os->uffd_zeropage(uffd, (uintptr_t)mark_at(i), os_page_size()) == -EEXIST && !mutate("fork-marks");
}

void attic_give(struct mm *mm, int uffd, struct estate *e)
{
    unsigned first = 0, end = attic.n;
    (void)mm;
    while (first < end) { /* the first mark that the child has not */
        unsigned middle = first + (end - first) / 2;
        if (has_mark(uffd, middle))
            first = middle + 1;
        else
            end = middle;
    }
    gather(e, attic.estate + first, attic.n - first);
    begin_doubt(); /* the witness is mapped twice, and others may have forked */
}

/* ---- life ---- */

int attic_start(struct mm *mm)
{
    void *witness = NULL, *marks = NULL;
    memset(&attic, 0, sizeof(attic));
    attic.mm = mm;
    work_init(&attic.review, review);
    attic.estate = mem_alloc(MARKS * sizeof(*attic.estate));
    if (!attic.estate)
        return -ENOMEM;
    int r = own_map(os_page_size(), os_page_size(), OS_MAP_INHERIT | OS_MAP_NOHUGE, &witness);
    if (r)
        goto free;
    r = own_map(area_bytes(), os_page_size(), OS_MAP_INHERIT | OS_MAP_NOHUGE, &marks);
    if (r)
        goto unmap;
    attic.witness = witness;
    attic.marks = marks;
    attic_reset();
    __atomic_store_n(&attic.running, 1, __ATOMIC_SEQ_CST);
    return 0;

unmap:
    own_unmap(witness, os_page_size());
free:
    mem_free(attic.estate, MARKS * sizeof(*attic.estate));
    return r;
}

void attic_ending(void)
{
    __atomic_store_n(&attic.running, 0, __ATOMIC_SEQ_CST);
}

void attic_stop(void)
{
    if (attic.registered && !mutate("fork-unmark"))
        hmm_log(HMM_LOG_WARNING, "fork: %zu KiB of the library's own memory cannot be unregistered, and are not given back",
                area_bytes() >> 10);
    else
        own_unmap(attic.marks, area_bytes());
    own_unmap(attic.witness, os_page_size());
    mem_free(attic.estate, MARKS * sizeof(*attic.estate));
}
