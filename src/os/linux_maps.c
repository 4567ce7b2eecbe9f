/* SPDX-License-Identifier: MIT */
/*
 * What stands where: PAGEMAP_SCAN for pages, PROCMAP_QUERY (else the text of /proc/self/maps) for mappings. Answers are
 * snapshots; whoever needs them to hold keeps the mappings from changing, or asks again. No state; any thread may call.
 */
#include <string.h>

#include "os/linux.h"

int linux_pagemap_open(void)
{
    return sys_open("/proc/self/pagemap", O_RDONLY);
}

int linux_maps_open(void)
{
    return sys_open("/proc/self/maps", O_RDONLY);
}

/* ---- pages ---- */

#define SCAN_CATEGORIES (PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_HUGE | PAGE_IS_FILE)

/* The kernel writes its regions where ours are wanted. */
_Static_assert(sizeof(struct os_region) == sizeof(struct page_region), "regions are translated in place");
_Static_assert(offsetof(struct os_region, end) == offsetof(struct page_region, end), "regions are translated in place");
_Static_assert(offsetof(struct os_region, flags) == offsetof(struct page_region, categories),
               "regions are translated in place");

static uint64_t region_flags(uint64_t categories)
{
    return (categories & PAGE_IS_PRESENT ? OS_PG_PRESENT : 0) | (categories & PAGE_IS_SWAPPED ? OS_PG_SWAPPED : 0) |
           (categories & PAGE_IS_PFNZERO ? OS_PG_ZERO : 0) | (categories & PAGE_IS_HUGE ? OS_PG_HUGE : 0) |
           (categories & PAGE_IS_FILE ? OS_PG_FILE : 0);
}

int linux_pagemap_scan(int fd, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n, uintptr_t *walked)
{
    struct pm_scan_arg arg = {
        .size = sizeof(arg),
        .start = start,
        .end = end,
        .vec = (uintptr_t)v,
        .vec_len = n,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        .return_mask = SCAN_CATEGORIES,
    };
    int64_t got;
    uintptr_t last;

    if (!n || start > end)
        return -EINVAL;
    if (start == end) {
        *walked = end;
        return 0;
    }
    got = sys_result(ioctl(fd, PAGEMAP_SCAN, &arg));
    if (got < 0)
        return (int)got;
    /* The kernel walks in steps and may leave walk_end at an earlier one. A vector with room left means that it came to the
     * end; a full one, that it came at least behind the last region. */
    last = got ? v[got - 1].end : start;
    if ((unsigned)got < n)
        *walked = end;
    else
        *walked = arg.walk_end > last && arg.walk_end <= end ? arg.walk_end : last;
    for (int64_t i = 0; i < got; i++)
        v[i].flags = region_flags(v[i].flags);
    return (int)got;
}

/* ---- mappings ---- */

/* Long enough for every name that the kernel gives to memory without a file: "[anon:" and 80 characters. */
#define NAME_MAX_SPECIAL 96

static bool starts_with(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

/* What a name says of memory without a file. Names in brackets are the kernel's own, except those that a program gave. */
static void classify(const char *name, struct os_vma *v)
{
    v->stack = v->anonymous && strcmp(name, "[stack]") == 0;
    v->special = v->anonymous && name[0] == '[' && !v->stack && strcmp(name, "[heap]") != 0 && !starts_with(name, "[anon");
}

static int procmap_query(int fd, uintptr_t addr, struct procmap_query *q, char *name, unsigned name_size)
{
    *q = (struct procmap_query){
        .size = sizeof(*q),
        .query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
        .query_addr = addr,
        .vma_name_addr = (uintptr_t)name,
        .vma_name_size = name_size,
    };
    if (name_size)
        name[0] = '\0'; /* left alone where there is no name */
    return (int)sys_result(ioctl(fd, PROCMAP_QUERY, q));
}

int linux_vma_query_fast(int fd)
{
    struct procmap_query q;
    int err = procmap_query(fd, 0, &q, NULL, 0);

    return err == -ENOTTY ? 0 : err < 0 ? err : 1;
}

int linux_vma_query(int fd, uintptr_t addr, struct os_vma *out)
{
    struct procmap_query q;
    char name[NAME_MAX_SPECIAL];
    int err = procmap_query(fd, addr, &q, name, sizeof(name));

    if (err == -ENAMETOOLONG) {
        /* The path of a file: not wanted. */
        name[0] = '\0';
        err = procmap_query(fd, addr, &q, NULL, 0);
    }
    if (err == -ENOTTY)
        return linux_vma_parse(addr, out);
    if (err < 0)
        return err;
    *out = (struct os_vma){
        .start = q.vma_start,
        .end = q.vma_end,
        .read = q.vma_flags & PROCMAP_QUERY_VMA_READABLE,
        .write = q.vma_flags & PROCMAP_QUERY_VMA_WRITABLE,
        .exec = q.vma_flags & PROCMAP_QUERY_VMA_EXECUTABLE,
        .shared = q.vma_flags & PROCMAP_QUERY_VMA_SHARED,
        .anonymous = !q.inode && !q.dev_major && !q.dev_minor,
        .page_size = q.vma_page_size,
        .offset = q.vma_offset,
        .inode = q.inode,
        .device = (uint64_t)q.dev_major << 32 | q.dev_minor,
    };
    classify(name, out);
    return 0;
}

/* ---- the list as text ---- */

/* A line up to where the name of special memory ends; the rest of a longer one is skipped. */
struct line {
    char text[80 + NAME_MAX_SPECIAL];
    unsigned len;
};

static const char *parse_hex(const char *p, uintptr_t *out)
{
    uintptr_t v = 0;
    const char *first = p;

    for (;; p++) {
        if (*p >= '0' && *p <= '9')
            v = v << 4 | (uintptr_t)(*p - '0');
        else if (*p >= 'a' && *p <= 'f')
            v = v << 4 | (uintptr_t)(*p - 'a' + 10);
        else
            break;
    }
    *out = v;
    return p == first ? NULL : p;
}

/* "start-end rwxp offset major:minor inode   name" */
bool linux_vma_parse_line(const char *p, struct os_vma *out)
{
    struct os_vma v = {0};
    uintptr_t offset, major, minor;
    const char *inode;

    p = parse_hex(p, &v.start);
    if (!p || *p++ != '-')
        return false;
    p = parse_hex(p, &v.end);
    if (!p || *p++ != ' ' || strnlen(p, 5) < 5)
        return false;
    v.read = p[0] == 'r';
    v.write = p[1] == 'w';
    v.exec = p[2] == 'x';
    v.shared = p[3] == 's';
    p = parse_hex(p + 5, &offset);
    if (!p || *p++ != ' ')
        return false;
    p = parse_hex(p, &major);
    if (!p || *p++ != ':')
        return false;
    p = parse_hex(p, &minor);
    if (!p || *p++ != ' ')
        return false;
    inode = p;
    for (; *p >= '0' && *p <= '9'; p++)
        v.inode = v.inode * 10 + (uint64_t)(*p - '0');
    v.offset = offset;
    v.device = (uint64_t)major << 32 | minor;
    v.anonymous = !major && !minor && p == inode + 1 && *inode == '0';
    while (*p == ' ')
        p++;
    classify(p, &v);
    *out = v;
    return true;
}

/* Takes characters up to the end of a line; true when the line is whole. */
static bool line_take(struct line *l, const char **p, const char *end)
{
    while (*p < end) {
        char c = *(*p)++;

        if (c == '\n') {
            l->text[l->len] = '\0';
            l->len = 0;
            return true;
        }
        if (l->len < sizeof(l->text) - 1)
            l->text[l->len++] = c;
    }
    return false;
}

int linux_vma_parse(uintptr_t addr, struct os_vma *out)
{
    /* A descriptor of our own: the reading position of a shared one would be another thread's as well. */
    int fd = linux_maps_open();
    struct line line = {.len = 0};
    struct os_vma v;
    char buf[2048];
    int64_t got;

    if (fd < 0)
        return fd;
    while ((got = sys_read(fd, buf, sizeof(buf))) > 0) {
        const char *p = buf;

        while (line_take(&line, &p, buf + got)) {
            if (!linux_vma_parse_line(line.text, &v) || v.end <= addr || (intptr_t)v.start < 0)
                continue; /* (the last line may be "[vsyscall]", which is the kernel's address space, not a mapping) */
            *out = v;
            sys_close(fd);
            return 0;
        }
    }
    sys_close(fd);
    return got < 0 ? (int)got : -ENOENT;
}

/* ---- fork ---- */

#define PM_EXCLUSIVE ((uint64_t)1 << 56) /* of an entry of /proc/PID/pagemap: mapped once */

int linux_page_alone(int fd, uintptr_t addr)
{
    uint64_t entry = 0;
    int64_t r = sys_result(syscall(SYS_pread64, fd, &entry, sizeof(entry), addr / os_page_size() * sizeof(entry)));

    if (r < 0)
        return (int)r;
    return r == sizeof(entry) && entry & PM_EXCLUSIVE ? 1 : 0;
}

/* Whether a line "VmFlags: rd wr ..." has this one of two letters. */
static bool has_flag(const char *line, const char *flag)
{
    for (const char *p = line + strlen("VmFlags:"); *p; p++)
        if (*p == ' ' && p[1] == flag[0] && p[2] == flag[1])
            return true;
    return false;
}

/* smaps: the line of each mapping, lines about it, the last of them its flags. */
int linux_marked(enum os_mark mark, uintptr_t start, uintptr_t end, struct os_region *v, unsigned n)
{
    static const char *const flags[] = {[OS_MARK_WIPE] = "wf", [OS_MARK_KEEP] = "dc"};
    int fd = sys_open("/proc/thread-self/smaps", O_RDONLY);
    struct line line = {.len = 0};
    struct os_vma vma = {0};
    unsigned found = 0;
    char buf[4096];
    int64_t got = 0;

    if (fd < 0)
        return fd;
    while (found < n && (got = sys_read(fd, buf, sizeof(buf))) > 0) {
        const char *p = buf;

        while (found < n && line_take(&line, &p, buf + got)) {
            if (!starts_with(line.text, "VmFlags:")) {
                linux_vma_parse_line(line.text, &vma);
                continue;
            }
            if (vma.start >= end) {
                sys_close(fd);
                return (int)found;
            }
            if (vma.end > start && has_flag(line.text, flags[mark]))
                v[found++] = (struct os_region){.start = vma.start, .end = vma.end};
        }
    }
    sys_close(fd);
    return found < n && got < 0 ? (int)got : (int)found;
}
