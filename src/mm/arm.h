/* SPDX-License-Identifier: MIT */
/* Between arm.c, which makes regions, and settle.c, which gives them up. Callers hold mm->as exclusively. */
#ifndef HMM_MM_ARM_H
#define HMM_MM_ARM_H

#include "mm/mm.h"

struct hide_look;

/* The first region in MISSING mode in [start, end), or NULL. */
const struct region *region_first_missing(struct mm *mm, uintptr_t start, uintptr_t end);
/* Registers in the one mode or the other, which is then the only one: the kernel changes it in one step. */
int region_register(struct mm *mm, uintptr_t start, uintptr_t end, bool missing);
/* Registers [start, end) in MISSING mode, mapping by mapping, whatever was to be done there: what an event that is pending has brought may have
 * pages away. Where nothing is, it costs a fault each until the mode is set back. Whether all of it that can be is registered; else the
 * log says so. */
bool region_take_again(struct mm *mm, uintptr_t start, uintptr_t end);
/* As mm_arm(). Without tcbs: for memory that was registered before. look: the program keeps it from children; or NULL. */
int region_arm(struct mm *mm, uintptr_t addr, const struct tcb_list *tcbs, const struct hide_look *look, uintptr_t *part_end);
/* The part of the mapping at addr, as far as it is not own memory, that lies in the region of addr, or in none. False: nothing is
 * mapped there, or it is own memory, or it cannot be known. */
bool region_gap(struct mm *mm, uintptr_t addr, struct os_vma *vma, uintptr_t *start, uintptr_t *end);

/* ---- hide.c: keeping memory from children, where the kernel does not tell of forks; else nothing ---- */

/* A child must not get the region without its missing pages. 0 or -ENOMEM. */
int region_hide(struct mm *mm, const struct region *g);
/* Children get [start, end) again, but for what the program keeps from them itself. */
void region_show(struct mm *mm, uintptr_t start, uintptr_t end);
/* [start, end) was unmapped: another mapping may stand there by now, that we have marked for what stood there before. Before the regions
 * are cut. */
void hide_unmapped(struct mm *mm, uintptr_t start, uintptr_t end);
/* Marks what of [start, end) is in regions in MISSING mode once more. */
void hide_managed(struct mm *mm, uintptr_t start, uintptr_t end);
/* Whether the program keeps the mapping at addr from children, which is in no region in MISSING mode. No locks held: slow. */
struct hide_look {
    struct os_region kept;
    uint64_t inserted;
};
bool hide_look(struct mm *mm, uintptr_t addr, struct hide_look *look);
/* A region was made since, whose mark may have been taken for the program's. Caller holds mm->as. */
bool hide_is_old(const struct mm *mm, const struct hide_look *look);
/* What was seen, or without look what is known of a part, holds for a region [start, end) of one mapping that is about to be made; and
 * where it is after a remap. */
void hide_note(struct mm *mm, uintptr_t start, uintptr_t end, const struct hide_look *look);
void hide_moved(struct mm *mm, uintptr_t from, uintptr_t to, size_t len);

/* Unregisters it and forgets it, whatever is away: at the end, when nothing but poison is and no event is read any more. */
void region_drop(struct mm *mm, struct region *r);

#endif
