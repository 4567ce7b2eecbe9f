/* SPDX-License-Identifier: MIT */
/* What access.c (spans) and hold.c share: hazards, the TLB, the bus. The argument for it stands at the top of access.c. */
#ifndef HMM_SOFT_ACCESS_H
#define HMM_SOFT_ACCESS_H

#include "engine.h"

#define ACCESS_TRIES 16 /* translations that were stale before they were used; then the bus, which is right at any time */

enum check { CHECK_GOOD, CHECK_STALE, CHECK_EVENTS };

/* The hazard word for these bytes: at least their pages. */
uint64_t soft_hazard_of(const struct world *w, uintptr_t addr, size_t len);
/* Step 1: publishes them, 1..HAZARDS. Nothing is held before. */
void soft_hazards_publish(struct engine *e, const uint64_t *hazards, unsigned n);
/* Ends whatever is held. */
void soft_hazards_drop(struct engine *e);
/* Steps 2 and 3, for a translation whose pages are published. */
enum check soft_translation_check(const struct engine *e, const struct translation *t);

/* A cached translation, or NULL. */
struct tlb_entry *soft_tlb_find(struct engine *e, uintptr_t addr, bool write);
void soft_tlb_fill(struct engine *e, uintptr_t addr, const struct translation *t);
/* This one is stale. */
void soft_tlb_forget(struct tlb_entry *x);

/* Asks the other side; 0, 1 or the error, as outside.resolve(). Nothing is held. */
int soft_resolve(struct engine *e, uintptr_t addr, bool write, struct translation *t);
/* Fills e->status and returns err. */
int soft_access_error(struct engine *e, uintptr_t addr, bool write, int err);
/* The next run of bytes that were changed, from *from on; false: none. */
bool soft_bounce_changed(const struct bounce *b, size_t *from, size_t *to);
/* Fills a bounce with up to len bytes at addr, of one page. Nothing is held. 0 or the error, with e->status filled. */
int soft_bounce_read(struct engine *e, struct bounce *b, uintptr_t addr, size_t len, bool write);
/* Writes back what was changed. Nothing is held. The same. */
int soft_bounce_write_back(struct engine *e, struct bounce *b);

#endif
