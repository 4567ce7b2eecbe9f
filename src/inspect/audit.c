/* SPDX-License-Identifier: MIT */
/*
 * The whole-process audit: every structure is valid, every device page has exactly one home, and no page that is away is present in
 * the CPU page table as the kernel sees it.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "inspect/inspect.h"

#define SCAN_TRIES 8
#define REGIONS 64

struct audit {
    struct mm *mm;
    struct audit_report *report;
    uint64_t entries; /* DEVICE entries seen */
    bool pending;     /* an event is unread: what the kernel says may be newer than what we know */
};

static void __attribute__((format(printf, 2, 3))) violation(struct audit *a, const char *fmt, ...)
{
    char line[160];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    if (a->report->violations++ == 0)
        strcpy(a->report->first, line);
    hmm_log(HMM_LOG_ERROR, "audit: %s", line);
}

/* Without registration a touch of it would give zeros. */
static void audit_region(struct audit *a, uintptr_t addr)
{
    const struct region *r = region_find(&a->mm->regions, addr);
    if (!r || !r->missing)
        violation(a, "page %#lx is away, and its memory is not registered", (unsigned long)addr);
}

static void audit_entry(struct audit *a, const struct block *b, unsigned i)
{
    entry_t e = block_entry(b, i);
    uintptr_t addr = block_addr(b, i);
    if (e)
        audit_region(a, addr);
    if (entry_kind(e) == ENTRY_DEVICE) {
        struct pagemap *pm = pagemap_by_id(entry_id(e));
        a->entries++;
        if (!pm || entry_page(e) >= pm->desc.pages)
            violation(a, "entry of %#lx names page %llu of pagemap %u, which is not there", (unsigned long)addr,
                      (unsigned long long)entry_page(e), entry_id(e));
        else if (page_owner(&pm->pages[entry_page(e)]) != addr)
            violation(a, "device page %llu of %#lx says that it belongs to %#llx", (unsigned long long)entry_page(e),
                      (unsigned long)addr, (unsigned long long)page_owner(&pm->pages[entry_page(e)]));
        else if (pm->pages[entry_page(e)].refs == 0)
            violation(a, "device page %llu of %#lx has no reference", (unsigned long long)entry_page(e), (unsigned long)addr);
    } else if (entry_kind(e) == ENTRY_FLIGHT) {
        if (entry_id(e) >= a->mm->nflights || a->mm->flights[entry_id(e)]->home[entry_page(e)] != addr)
            violation(a, "entry of %#lx names flight %u, which has its home elsewhere", (unsigned long)addr, entry_id(e));
    }
}

/* The marker of a poisoned page looks like a page that is swapped. */
static bool is_missing(entry_t e)
{
    return e && entry_kind(e) != ENTRY_POISON;
}

static int scan(struct audit *a, uintptr_t at, uintptr_t end, struct os_region *v, uintptr_t *walked)
{
    int n = -1;
    for (unsigned tries = 0; tries < SCAN_TRIES && n < 0; tries++)
        n = os->pagemap_scan(a->mm->pagemap_fd, at, end, v, REGIONS, walked);
    return n;
}

/* Pages that are away are missing for the CPU. */
static void audit_missing(struct audit *a, const struct block *b)
{
    struct os_region v[REGIONS];
    uintptr_t end = b->base + OS_BLOCK_SIZE;
    for (uintptr_t at = b->base, walked; at < end && !a->pending; at = walked) {
        int n = scan(a, at, end, v, &walked);
        if (n < 0) {
            violation(a, "block %#lx could not be looked at (PAGEMAP_SCAN: %s)", (unsigned long)b->base, hmm_strerror(n));
            return;
        }
        for (int k = 0; k < n; k++)
            for (uintptr_t addr = v[k].start; addr < v[k].end; addr += os_page_size())
                if (is_missing(block_entry(b, block_index(addr))) && os->uffd_pending(a->mm->uffd.fd) == 0)
                    violation(a, "page %#lx is away and present at once", (unsigned long)addr);
    }
}

static void audit_pagemap(struct pagemap *pm, void *arg)
{
    struct audit *a = arg;
    if (!pagemap_is_valid(pm))
        violation(a, "pagemap %u: allocator, counts and references do not agree", pm->id);
    uint64_t used = pagemap_used(pm);
    a->entries -= used < a->entries ? used : a->entries; /* what is left over has no page */
}

int inspect_audit(struct mm *mm, void (*each_pagemap)(void (*fn)(struct pagemap *, void *), void *),
                  struct audit_report *report)
{
    struct audit a = {.mm = mm, .report = report};
    memset(report, 0, sizeof(*report));
    rwlock_write_lock(&mm->as);
    a.pending = os->uffd_pending(mm->uffd.fd) != 0;
    for (struct block *b = pagetable_next(&mm->pt, 0, UINTPTR_MAX); b;
         b = pagetable_next(&mm->pt, b->base + OS_BLOCK_SIZE, UINTPTR_MAX)) {
        if (!block_is_valid(b))
            violation(&a, "block %#lx: counts do not match its entries", (unsigned long)b->base);
        for (unsigned i = 0; i < block_pages(); i++)
            audit_entry(&a, b, i);
        audit_missing(&a, b);
    }
    if (!regions_are_valid(&mm->regions))
        violation(&a, "the tree of regions is not valid");
    if (!notifier_tree_is_valid(&mm->notifiers))
        violation(&a, "the notifier tree is not valid");
    each_pagemap(audit_pagemap, &a);
    if (a.entries)
        violation(&a, "%llu entries name device pages that no pagemap counts", (unsigned long long)a.entries);
    rwlock_write_unlock(&mm->as);
    return report->violations;
}
