/* SPDX-License-Identifier: MIT */
/* The fact about pages whose only copy is lost. */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

#include "inspect/facts.h"

/* ---- 21: poison ---- */

static sigjmp_buf caught;

static void leave(int sig)
{
    siglongjmp(caught, sig);
}

/* Whether touching p raises SIGBUS; else it is not what a lost page may do. */
static bool raises(const char *p)
{
    struct sigaction action = {.sa_handler = leave};
    volatile bool raised = true;

    sigaction(SIGBUS, &action, NULL);
    if (sigsetjmp(caught, 1) == 0) {
        (void)*(const volatile char *)p;
        raised = false;
    }
    return raised;
}

void fact_poison(void)
{
    enum { PAGES = 6, DROPPED = 1, MOVED = 2, REPLACED = 3, REST = 4 };
    struct os_uffd u = uffd_new(UFFD_FEATURE_POISON | UFFD_FEATURE_MOVE);
    size_t page = os_page_size();
    char *p = pages(PAGES), *q = pages(1), *staging = pages(1), byte;
    int64_t r;

    watch(u.fd, p, PAGES);
    watch(u.fd, staging, 1);
    r = os->uffd_poison(u.fd, (uintptr_t)p, PAGES * page);
    if (r != (int64_t)(PAGES * page))
        fact_differs("UFFDIO_POISON of %d missing pages gave %s", PAGES, error_name(r));
    if (!raises(p))
        fact_differs("a poisoned page could be read");
    r = os->vm_read((uintptr_t)p, &byte, 1);
    if (r != -EFAULT)
        fact_differs("process_vm_readv of a poisoned page gave %s", error_name(r));
    r = os->uffd_move(u.fd, (uintptr_t)staging, (uintptr_t)p, page);
    if (r >= 0 || present(staging))
        fact_differs("a poisoned page could be moved");
    madvise(p + DROPPED * page, page, MADV_DONTNEED);
    os->uffd_unregister(u.fd, (uintptr_t)p, PAGES * page);
    if (raises(p + DROPPED * page))
        fact_differs("a poisoned page stayed poisoned when its content was dropped");
    if (mremap(p + MOVED * page, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, q) != q || !raises(q))
        fact_differs("a poisoned page could be read after mremap");
    if (mmap(p + REPLACED * page, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ||
        raises(p + REPLACED * page))
        fact_differs("a mapping over a poisoned page was poisoned");
    os->close(u.fd);
    if (!raises(p + REST * page))
        fact_differs("a poisoned page could be read once its userfaultfd was closed");
    fact_ok(
        "SIGBUS, and EFAULT in system calls, until it is dropped or mapped over; it moves with its mapping, and outlives the "
        "userfaultfd");
}
