/* SPDX-License-Identifier: MIT */
/*
 * What may happen to a child while it is filled is told by its userfaultfd, and follows the same rules as in the parent
 * (mm/event.c): a fill is refused while an event is pending, so reading all events and applying them to the estate before each
 * attempt keeps dropped memory dropped. The child's threads wait until we have read what they did.
 *
 *   the child...              what we see
 *   touches a missing page    a fault: that page is next, where devices let go of it already; what the estate does not give is zeros
 *   unmaps, drops             the pages are taken from the estate
 *   remaps                    they move in the estate
 *   forks                     an heir for its child, with what is not filled yet
 *   calls exec, ends          ESRCH
 *
 * A descriptor that is closed turns missing pages into zeros: it is closed when the estate is empty, and not before.
 */
#include "process/heirs.h"

#include <errno.h>
#include <string.h>

#include "debug/inject.h"

#define MESSAGES 64
#define ZERO_PAGES 16 /* absent ones given at once */

static size_t page_bytes(uint64_t pages)
{
    return pages << os_page_shift();
}

void follow_drop(struct heir *h, uintptr_t start, uintptr_t end)
{
    struct estate gone;
    estate_init(&gone, h->mm, NULL);
    estate_take(&h->estate, start, end, &gone);
    gone.capture = h->estate.capture;
    for (size_t i = 0; i < gone.n; i++)
        if (gone.v[i].pages)
            estate_consume(&gone, i, gone.v[i].pages);
    gone.capture = NULL;
    estate_free(&gone);
}

static void owe(struct heir *h, uintptr_t start, uintptr_t end)
{
    h->owes = true;
    for (unsigned i = 0; i < DEBTS; i++)
        if (h->debts[i].start == h->debts[i].end) {
            h->debts[i] = (struct debt){start, end};
            return;
        }
    hmm_log(HMM_LOG_ERROR,
            "more than %d unmaps overtaken by remaps in a child of fork: pages of [%#lx, %#lx) may be lost there", DEBTS,
            (unsigned long)start, (unsigned long)end);
}

/* An unmap that is owed keeps an event pending until it has been read: some were owed by mistake. */
static void forget_debts(struct heir *h)
{
    if (!h->owes || os->uffd_pending(h->uffd) != 0 || mutate("fork-child-stale"))
        return;
    memset(h->debts, 0, sizeof(h->debts));
    h->owes = false;
}

/* Applies an unmap but for what is owed, which concerns an older mapping. */
static void unmapped(struct heir *h, uintptr_t start, uintptr_t end)
{
    for (unsigned i = 0; i < DEBTS; i++) {
        struct debt *d = &h->debts[i];
        if (d->start == d->end || d->end <= start || d->start >= end)
            continue;
        uintptr_t from = d->start > start ? d->start : start, to = d->end < end ? d->end : end;
        struct debt rest = {to, d->end};
        d->end = from;
        if (rest.start < rest.end)
            owe(h, rest.start, rest.end);
        if (start < from)
            unmapped(h, start, from); /* another debt may lie there */
        if (to < end)
            unmapped(h, to, end);
        return;
    }
    follow_drop(h, start, end);
    region_cut(&h->known, start, end);
}

/*
 * What is registered at the target, or left there by a remap, belongs to a mapping whose unmap is still to be told, with all that
 * was unmapped with it, registered or not: the whole target is owed. Where too much is owed, what was unmapped is offered in vain.
 */
static void clear_target(struct heir *h, uintptr_t start, uintptr_t end)
{
    bool gives = estate_next(&h->estate, start, end) < end || estate_find(&h->estate, start) < h->estate.n;
    if ((gives || region_any(&h->known, start, end)) && !mutate("fork-child-left"))
        owe(h, start, end);
    region_cut(&h->known, start, end);
    follow_drop(h, start, end);
}

static void remapped(struct heir *h, uintptr_t from, uintptr_t to, size_t len)
{
    uintptr_t end = from + len, part_end;
    struct region *r;
    clear_target(h, to, to + len);
    estate_move(&h->estate, from, end, to - from);
    for (uintptr_t at = from; (r = region_next(&h->known, at)) && r->start < end; at = part_end) {
        uintptr_t start = r->start > from ? r->start : from;
        bool left = r->state == REGION_LEFT;
        part_end = r->end < end ? r->end : end;
        region_cut(&h->known, start, part_end);
        region_insert_must(&h->known, start, part_end, true, REGION_LEFT);
        if (!left)
            region_insert_must(&h->known, start - from + to, part_end - from + to, true, REGION_PROVED);
    }
}

void follow_regions(struct heir *h, const struct regions *from)
{
    for (const struct region *r = region_next(from, 0); r; r = region_next(from, r->end))
        if (r->state != REGION_UNPROVED)
            region_insert_must(&h->known, r->start, r->end, true, r->state);
}

static void touched(struct heir *h, uintptr_t addr)
{
    size_t i = estate_find(&h->estate, addr);
    if (i < h->estate.n) {
        if (i != h->next)
            h->chunk = TOUCH_PAGES;
        h->next = i; /* filling wakes it */
        return;
    }
    uintptr_t end = estate_next(&h->estate, addr, addr + page_bytes(ZERO_PAGES));
    int64_t r = os->uffd_zeropage(h->uffd, addr, end - addr);
    if (r == -ENOENT || r == -EINVAL) /* two mappings */
        os->uffd_zeropage(h->uffd, addr, page_bytes(1));
    fill_wake(h, addr, ZERO_PAGES); /* where nothing was given it is tried again */
}

void follow_child(struct heir *h)
{
    struct uffd_msg m[MESSAGES];
    for (int n = 1; heir_is_by_event(h) && n > 0;) {
        forget_debts(h);
        n = os->uffd_read(h->uffd, m, MESSAGES);
        for (int i = 0; i < n; i++)
            switch (m[i].event) {
            case UFFD_EVENT_PAGEFAULT: touched(h, m[i].arg.pagefault.address & ~(uintptr_t)(os_page_size() - 1)); break;
            case UFFD_EVENT_FORK: heir_forked(h, (int)m[i].arg.fork.ufd); break;
            case UFFD_EVENT_REMAP: remapped(h, m[i].arg.remap.from, m[i].arg.remap.to, m[i].arg.remap.len); break;
            case UFFD_EVENT_UNMAP: unmapped(h, m[i].arg.remove.start, m[i].arg.remove.end); break;
            case UFFD_EVENT_REMOVE:
                if (!mutate("fork-child-drop"))
                    follow_drop(h, m[i].arg.remove.start, m[i].arg.remove.end);
                break;
            default: break;
            }
    }
}
