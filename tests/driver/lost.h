/* SPDX-License-Identifier: MIT */
/* For tests of pages that a device may not give back: memory for them, and touching what may raise SIGBUS. */
#ifndef TESTS_DRIVER_LOST_H
#define TESTS_DRIVER_LOST_H

#include <signal.h>

#include "support.h"

#define PAGES 64

static char *memory; /* PAGES that are to go to a device, and PAGES that are not */
static size_t page, bytes;

static inline void make_memory(void)
{
    page = page_size();
    bytes = PAGES * page;
    memory = map_pages(2 * bytes);
    memset(memory, 5, bytes);
    memset(memory + bytes, 6, bytes);
}

static sigjmp_buf lost_caught;
static void *volatile lost_address;

static inline void lost_catch(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    lost_address = info->si_addr;
    siglongjmp(lost_caught, 1);
}

/* Whether touching raises SIGBUS at this very address; else the byte is in *value. */
static inline bool is_lost(const char *at, char *value)
{
    struct sigaction action = {.sa_sigaction = lost_catch, .sa_flags = SA_SIGINFO}, before;
    volatile bool lost = true;
    sigaction(SIGBUS, &action, &before);
    if (sigsetjmp(lost_caught, 1) == 0) {
        *value = *(const volatile char *)at;
        lost = false;
    } else {
        assert_ptr_equal(lost_address, at);
    }
    sigaction(SIGBUS, &before, NULL);
    return lost;
}

static inline void assert_lost(const char *at, size_t len)
{
    char value;
    for (size_t i = 0; i < len; i += page)
        if (!is_lost(at + i, &value))
            fail_msg("page %zu reads as %d", i / page, value);
}

static inline void assert_holds(const char *at, size_t len, char value)
{
    for (size_t i = 0; i < len; i++)
        if (at[i] != value)
            fail_msg("byte %zu is %d, not %d", i, at[i], value);
}

/* Lines of library threads come a little later. */
static inline void assert_logged(enum hmm_log_level level, unsigned n)
{
    for (uint64_t until = now_ms() + JOB_SECONDS * 1000; logged(level) < n && now_ms() < until;)
        sleep_ms(1);
    assert_int_equal(logged(level), n);
}

#endif
