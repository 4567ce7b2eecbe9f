/* SPDX-License-Identifier: MIT */
/* Blocks with pages on devices, coldest first. The block is the unit of eviction. */
#include "mm/mm.h"

void lru_touch(struct mm *mm, struct block *b)
{
    mutex_lock(&mm->queue_lock);
    list_del(&b->lru);
    list_add_tail(&mm->lru, &b->lru);
    mutex_unlock(&mm->queue_lock);
}

void lru_remove(struct mm *mm, struct block *b)
{
    mutex_lock(&mm->queue_lock);
    list_del(&b->lru);
    mutex_unlock(&mm->queue_lock);
}
