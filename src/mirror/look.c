/* SPDX-License-Identifier: MIT */
/* See look.h. */
#include "mirror/look.h"

#include <errno.h>

#include "debug/inject.h"

#define REGIONS 128

/* ---- words ---- */

/* Two at a time, twice: for memory of huge pages, of which the kernel says much in little time, this is what the call costs. */
typedef uint64_t two_words __attribute__((vector_size(16), aligned(8)));

static void fill_words(uint64_t *pfns, size_t n, uint64_t value, uint64_t step)
{
    two_words a = {value, value + step}, b = a + 2 * step, by = {4 * step, 4 * step};
    size_t i = 0;
    for (; i + 4 <= n; i += 4, a += by, b += by) {
        *(two_words *)(void *)(pfns + i) = a;
        *(two_words *)(void *)(pfns + i + 2) = b;
    }
    for (; i < n; i++)
        pfns[i] = value + i * step;
}

static void fill_words_keeping(uint64_t *pfns, size_t n, uint64_t value, uint64_t step)
{
    for (size_t i = 0; i < n; i++)
        pfns[i] = (pfns[i] & PFN_KEPT) | (value + i * step);
}

/* value, value + step, ... */
static void fill(const struct look *l, uintptr_t start, uintptr_t end, uint64_t value, uint64_t step)
{
    size_t n = (end - start) >> os_page_shift();
    if (l->kept)
        fill_words_keeping(look_pfn(l, start), n, value, step);
    else
        fill_words(look_pfn(l, start), n, value, step);
}

void look_fill(const struct look *l, uintptr_t start, uintptr_t end, uint64_t value)
{
    fill(l, start, end, value, 0);
}

static void set(const struct look *l, uintptr_t addr, uint64_t value)
{
    uint64_t *pfn = look_pfn(l, addr);
    *pfn = (l->kept ? *pfn & PFN_KEPT : 0) | value;
}

/* ---- system memory ---- */

static unsigned log2_pages(size_t bytes)
{
    return (unsigned)__builtin_ctzl(bytes >> os_page_shift());
}

/* Of a page that a large entry of the page table maps. */
static unsigned huge_order(const struct os_vma *vma)
{
    return log2_pages(vma->page_size > os_page_size() ? vma->page_size : OS_BLOCK_SIZE);
}

/* What the device may do with pages of a region that the kernel reports. A write to the zero page, or to a private file's page, would put
 * another page in its place: that is to be asked for. */
static uint64_t rights(const struct os_vma *vma, uint64_t flags)
{
    bool replaced = (flags & OS_PG_ZERO && !mutate("range-zero")) || (flags & OS_PG_FILE && !vma->shared);
    return HMM_PFN_VALID | (vma->write && !replaced ? HMM_PFN_WRITE : 0) |
           (uint64_t)(flags & OS_PG_HUGE ? huge_order(vma) : 0) << HMM_PFN_ORDER_SHIFT;
}

static void fill_absent(struct look *l, uintptr_t start, uintptr_t end)
{
    if (start == end)
        return;
    fill(l, start, end, 0, 0);
    l->common = 0;
}

static int look_at_system(struct look *l, const struct os_vma *vma, uintptr_t start, uintptr_t end)
{
    struct os_region v[REGIONS];
    for (uintptr_t at = start, walked; at < end; at = walked) {
        int n = os->pagemap_scan(l->dev->mm->pagemap_fd, at, end, v, REGIONS, &walked);
        if (n < 0)
            return n;
        for (int i = 0; i < n; i++) {
            if (!(v[i].flags & OS_PG_PRESENT))
                continue; /* swapped: covered as absent */
            uint64_t bits = rights(vma, v[i].flags);
            fill_absent(l, at, v[i].start);
            fill(l, v[i].start, v[i].end, bits | v[i].start >> os_page_shift(), 1);
            l->common &= bits;
            at = v[i].end;
        }
        fill_absent(l, at, walked);
    }
    return 0;
}

/* ---- devices ---- */

/* What of a page is lost looks like poison. Caller holds b->lock: afterwards the device of another page may be closed. */
static entry_t entry_of(const struct block *b, unsigned i)
{
    entry_t e = block_entry(b, i);
    bool lost = entry_kind(e) == ENTRY_DEVICE && device_memory_is_lost(pagemap_by_id(entry_id(e))->dev);
    return lost ? entry_make(ENTRY_POISON, 0, 0) : e;
}

static bool is_lost(entry_t e)
{
    return entry_kind(e) == ENTRY_POISON;
}

static bool is_here(const struct look *l, entry_t e)
{
    return entry_kind(e) == ENTRY_DEVICE && entry_id(e) == l->dev->pagemap->id && !is_lost(e);
}

/* The entries of a part of one block, at one moment. */
struct part {
    uintptr_t start, end;
    unsigned n;
    bool huge; /* all of the block is on one device, side by side and aligned, as it came */
    entry_t entries[BLOCK_PAGES_MAX];
};

/* Caller holds b->lock. */
static bool is_huge_here(const struct look *l, const struct block *b)
{
    entry_t first = entry_of(b, 0);
    if (!b->huge || b->on_device < block_pages() || !is_here(l, first) || entry_page(first) % block_pages())
        return false;
    for (unsigned i = 1; i < block_pages(); i++)
        if (block_entry(b, i) != entry_make(ENTRY_DEVICE, entry_id(first), entry_page(first) + i))
            return false;
    return true;
}

/* Reads the first block of [at, end) that has entries. False: there is none. */
static bool next_part(const struct look *l, uintptr_t at, uintptr_t end, struct part *p)
{
    struct mm *mm = l->dev->mm;
    bool found = false;
    rwlock_read_lock(&mm->as);
    for (struct block *b; !found && at < end && (b = pagetable_next(&mm->pt, at, end)) != NULL; at = b->base + OS_BLOCK_SIZE) {
        p->start = b->base > at ? b->base : at;
        p->end = b->base + OS_BLOCK_SIZE < end ? b->base + OS_BLOCK_SIZE : end;
        p->n = (p->end - p->start) >> os_page_shift();
        mutex_lock(&b->lock);
        found = b->used > 0;
        for (unsigned i = 0; found && i < p->n; i++)
            p->entries[i] = entry_of(b, block_index(p->start) + i);
        p->huge = found && is_huge_here(l, b);
        mutex_unlock(&b->lock);
    }
    rwlock_read_unlock(&mm->as);
    return found;
}

static uint64_t answer_of(const struct look *l, const struct part *p, entry_t e, const struct os_vma *vma)
{
    if (is_lost(e))
        return HMM_PFN_ERROR;
    if (!is_here(l, e))
        return 0;
    return HMM_PFN_VALID | HMM_PFN_DEVICE | (vma->write || mutate("range-protection") ? HMM_PFN_WRITE : 0) |
           (uint64_t)(p->huge ? log2_pages(OS_BLOCK_SIZE) : 0) << HMM_PFN_ORDER_SHIFT | entry_page(e);
}

static void look_at_entries(struct look *l, const struct os_vma *vma, uintptr_t start, uintptr_t end)
{
    struct part p;
    for (uintptr_t at = start; next_part(l, at, end, &p); at = p.end)
        for (unsigned i = 0; i < p.n; i++) {
            if (!p.entries[i])
                continue;
            uint64_t answer = answer_of(l, &p, p.entries[i], vma);
            set(l, p.start + ((uintptr_t)i << os_page_shift()), answer);
            l->common &= answer;
        }
}

int look_at_mapping(struct look *l, const struct os_vma *vma, uintptr_t start, uintptr_t end)
{
    l->common = UINT64_MAX;
    int r = look_at_system(l, vma, start, end);
    if (r)
        return r;
    SEQ_POINT("range-scanned");
    look_at_entries(l, vma, start, end);
    return 0;
}

/* ---- this device alone ---- */

/* The mapping of a page that is on the device. False: there is none, and an event says so. */
static bool find_mapping(struct look *l, uintptr_t addr)
{
    if (addr >= l->vma.start && addr < l->vma.end)
        return true;
    if (os->vma_query(l->dev->mm->maps_fd, addr, &l->vma)) {
        l->vma = (struct os_vma){0};
        return false;
    }
    return l->vma.start <= addr;
}

/* The protection is asked for after the entry was read: who changes it in between invalidates. */
static uint64_t answer_by_device(struct look *l, const struct part *p, entry_t e, uintptr_t addr)
{
    if (!is_here(l, e))
        return is_lost(e) ? HMM_PFN_ERROR : 0;
    if (!find_mapping(l, addr))
        return 0;
    return l->vma.read ? answer_of(l, p, e, &l->vma) : HMM_PFN_ERROR;
}

int look_at_device(struct look *l, uintptr_t start, uintptr_t end)
{
    struct part p;
    uintptr_t at = start;
    for (; next_part(l, at, end, &p); at = p.end) {
        fill(l, at, p.start, 0, 0);
        for (unsigned i = 0; i < p.n; i++) {
            uintptr_t addr = p.start + ((uintptr_t)i << os_page_shift());
            set(l, addr, answer_by_device(l, &p, p.entries[i], addr));
        }
    }
    fill(l, at, end, 0, 0);
    return 0;
}

/* ---- what stands in the way ---- */

static enum obstacle_kind obstacle_of(const struct look *l, entry_t e)
{
    if (!e)
        return OBSTACLE_NONE;
    if (is_lost(e))
        return OBSTACLE_LOST;
    if (entry_kind(e) == ENTRY_FLIGHT)
        return OBSTACLE_FLIGHT;
    return is_here(l, e) ? OBSTACLE_HERE : OBSTACLE_OTHER_DEVICE;
}

/* Caller holds mm->as shared. */
static enum obstacle_kind kind_in_block(const struct look *l, struct block *b, uintptr_t addr, uintptr_t end,
                                        uintptr_t *same_end)
{
    unsigned i = block_index(addr), n = (end - addr) >> os_page_shift(), k = 1;
    mutex_lock(&b->lock);
    enum obstacle_kind kind = obstacle_of(l, entry_of(b, i));
    while (k < n && obstacle_of(l, entry_of(b, i + k)) == kind)
        k++;
    mutex_unlock(&b->lock);
    *same_end = addr + ((uintptr_t)k << os_page_shift());
    return kind;
}

enum obstacle_kind look_at_entry(const struct look *l, uintptr_t addr, uintptr_t end, uintptr_t *same_end, uint32_t *landings)
{
    struct mm *mm = l->dev->mm;
    enum obstacle_kind kind = OBSTACLE_NONE;
    rwlock_read_lock(&mm->as);
    *landings = __atomic_load_n(&mm->landings, __ATOMIC_SEQ_CST);
    for (*same_end = addr; kind == OBSTACLE_NONE && *same_end < end;) {
        uintptr_t at = *same_end, block_end = (at & BLOCK_MASK) + OS_BLOCK_SIZE, to = block_end < end ? block_end : end;
        struct block *b = pagetable_find(&mm->pt, at);
        if (!b) {
            *same_end = to;
            continue;
        }
        uintptr_t part_end;
        enum obstacle_kind found = kind_in_block(l, b, at, to, &part_end);
        if (found != OBSTACLE_NONE && at > addr)
            break; /* up to here there was nothing */
        kind = found;
        *same_end = part_end;
        if (kind == OBSTACLE_NONE && part_end < to)
            break;
    }
    rwlock_read_unlock(&mm->as);
    return kind;
}
