/* SPDX-License-Identifier: MIT */
/*
 * Where the kernel does not tell of forks: managed memory is MADV_DONTFORK, so that a child of a raw clone() can crash on it but never
 * reads zeros for data; a fork() is seen to by fork handlers (process/window.c). What the program itself had marked MADV_DONTFORK is
 * remembered, and stays marked when we have no need for it any more, and in the moment of a fork(). (A mark that it sets or takes away
 * while the memory is managed is not seen.)
 */
#include "mm/arm.h"

#include <errno.h>

#include "debug/inject.h"

#define TRIES 3

/* Holes are no failure: what was there is unmapped, and its event still to come. */
static int advise(uintptr_t start, uintptr_t end, int advice)
{
    int r = -ENOMEM;
    for (unsigned tries = 0; tries < TRIES && r; tries++)
        r = os->advise((void *)start, end - start, advice);
    return r;
}

/* A mapping that has grown by mremap has its mark in the new part, too, of which we were not told. */
static uintptr_t with_growth(struct mm *mm, uintptr_t end)
{
    struct os_vma vma;
    const struct region *next = region_next(&mm->regions, end);
    if (os->vma_query(mm->maps_fd, end - os_page_size(), &vma) || vma.start >= end || vma.end <= end)
        return end;
    if (!next || next->start >= vma.end)
        return vma.end;
    return next->start > end ? next->start : end;
}

int region_hide(struct mm *mm, const struct region *g)
{
    if (!g->missing || mm->forking || mm_has_fork_event(mm) || mutate("dontfork"))
        return 0; /* when the window around a fork() closes, everything is hidden again */
    return advise(g->start, g->end, OS_ADVISE_DONTFORK) ? -ENOMEM : 0;
}

void region_show(struct mm *mm, uintptr_t start, uintptr_t end)
{
    if (mm_has_fork_event(mm))
        return;
    end = with_growth(mm, end);
    for (uintptr_t at = start; at < end;) {
        const struct region *kept = region_next(&mm->kept, at);
        uintptr_t stop = kept && kept->start < end ? kept->start : end;
        if (stop > at)
            advise(at, stop, OS_ADVISE_DOFORK);
        at = stop < end ? kept->end : end;
    }
}

void hide_managed(struct mm *mm, uintptr_t start, uintptr_t end)
{
    if (mm_has_fork_event(mm))
        return;
    for (const struct region *g = region_next(&mm->regions, start); g && g->start < end; g = region_next(&mm->regions, g->end))
        region_hide(mm, g);
}

void hide_unmapped(struct mm *mm, uintptr_t start, uintptr_t end)
{
    if (mm_has_fork_event(mm) || !region_first_missing(mm, start, end))
        return;
    region_cut(&mm->kept, start, end);
    os->advise((void *)start, end - start, OS_ADVISE_DOFORK);
}

/* Whether the mark of the mapping is ours, because a part of it is managed: one that has grown, or of which one was moved. */
static bool is_ours(struct mm *mm, uintptr_t start, uintptr_t end)
{
    const struct region *g = region_first_missing(mm, start, end);
    return g && !region_any(&mm->kept, g->start, g->end); /* one mapping: what holds for a part of it holds for all */
}

bool hide_look(struct mm *mm, uintptr_t addr, struct hide_look *look)
{
    *look = (struct hide_look){0};
    if (mm_has_fork_event(mm))
        return false;
    rwlock_read_lock(&mm->as);
    bool ours = is_ours(mm, addr, addr + 1);
    look->inserted = mm->regions.inserted;
    rwlock_read_unlock(&mm->as);
    if (ours || os->marked(OS_MARK_KEEP, addr, addr + 1, &look->kept, 1) <= 0)
        return false;
    rwlock_read_lock(&mm->as);
    ours = is_ours(mm, look->kept.start, look->kept.end);
    rwlock_read_unlock(&mm->as);
    return !ours;
}

bool hide_is_old(const struct mm *mm, const struct hide_look *look)
{
    return look->inserted != mm->regions.inserted;
}

void hide_note(struct mm *mm, uintptr_t start, uintptr_t end, const struct hide_look *look)
{
    if (look) {
        start = look->kept.start > start ? look->kept.start : start;
        end = look->kept.end < end ? look->kept.end : end;
    } else if (!region_any(&mm->kept, start, end)) { /* the mapping has grown: what holds for a part of it holds for all */
        return;
    }
    if (start >= end)
        return;
    region_cut(&mm->kept, start, end);
    region_insert_must(&mm->kept, start, end, true, REGION_PROVED);
}

void hide_moved(struct mm *mm, uintptr_t from, uintptr_t to, size_t len)
{
    uintptr_t end = from + len, next;
    const struct region *r;
    region_cut(&mm->kept, to, to + len);
    for (uintptr_t at = from; (r = region_next(&mm->kept, at)) && r->start < end; at = next) {
        uintptr_t start = r->start > from ? r->start : from;
        next = r->end < end ? r->end : end;
        region_cut(&mm->kept, start, next);
        region_insert_must(&mm->kept, start - from + to, next - from + to, true, REGION_PROVED);
    }
}
