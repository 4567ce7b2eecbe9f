/* SPDX-License-Identifier: MIT */
/* What of a range is not in system memory. */
#include "mm/mm.h"

/* Whether the block has an entry of this kind in the range; ENTRY_NONE: any entry. Caller holds mm->as. */
static bool block_has(struct block *b, uintptr_t start, uintptr_t end, enum entry_kind kind)
{
    bool found = false;
    unsigned behind = block_behind(b, end);
    mutex_lock(&b->lock);
    for (unsigned i = block_first(b, start); i < behind && b->used && !found; i++) {
        entry_t e = block_entry(b, i);
        found = kind == ENTRY_NONE ? e != 0 : entry_kind(e) == kind;
    }
    mutex_unlock(&b->lock);
    return found;
}

/* *landings, as it was then, is for flight_wait(). */
static bool range_has(struct mm *mm, uintptr_t start, uintptr_t end, enum entry_kind kind, uint32_t *landings)
{
    bool found = false;
    rwlock_read_lock(&mm->as);
    *landings = __atomic_load_n(&mm->landings, __ATOMIC_SEQ_CST);
    for (struct block *b = pagetable_next(&mm->pt, start, end); b && !found;
         b = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, end))
        found = block_has(b, start, end, kind);
    rwlock_read_unlock(&mm->as);
    return found;
}

bool mm_range_has(struct mm *mm, uintptr_t start, uintptr_t end, enum entry_kind kind)
{
    uint32_t unused;
    return range_has(mm, start, end, kind, &unused);
}

void mm_land_range(struct mm *mm, uintptr_t start, uintptr_t end)
{
    uint32_t landings;
    rwlock_write_lock(&mm->as); /* whoever looked before has taken its pages */
    rwlock_write_unlock(&mm->as);
    while (range_has(mm, start, end, ENTRY_FLIGHT, &landings))
        flight_wait(mm, landings);
}
