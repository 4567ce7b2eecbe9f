/* SPDX-License-Identifier: MIT */
/*
 * Private to the facts*.c files: what the proofs of hmm_check_deep() share.
 *
 * Each fact is a function that runs in a child process of its own, may leave threads and mappings behind, and ends by calling
 * one of the three verdicts, which do not return. The system is asked through `os` wherever the library itself does, so that a
 * test can put a kernel that behaves differently underneath.
 */
#ifndef HMM_INSPECT_FACTS_H
#define HMM_INSPECT_FACTS_H

#include "os/os.h"
#include <hmm/hmm.h>

/* Tries the facts whose name begins with `only`, each for at most limit_ms; fn may be NULL. Returns how many are different. */
int facts_run(const char *only, unsigned limit_ms, hmm_check_fn fn, void *arg);

/* ---- verdicts: end the child ---- */

/* The kernel behaves as the protocol expects, and what it guards against was seen. */
_Noreturn void fact_ok(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* The kernel lacks something that the protocol relies on. */
_Noreturn void fact_differs(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Neither: a race that did not show itself, or something this system does not permit to try. */
_Noreturn void fact_unseen(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* "EAGAIN", or "success" for what is not an error. */
const char *error_name(int64_t err);

/* ---- means: those that fail end the child as unseen ---- */

/* n pages of private memory, readable and writable, no huge pages, between inaccessible ones. */
char *pages(size_t n);
/* One huge page's worth, aligned, huge pages wanted. */
char *huge_area(void);
/* A userfaultfd with these features; -1 as bits: what the library asks for. */
struct os_uffd uffd_new(uint64_t features);
#define EVENTS OS_UFFD_REQUIRED
#define NO_EVENTS UFFD_FEATURE_MOVE
void watch(int uffd, char *p, size_t n);
/* The modes that the library does not use (UFFDIO_REGISTER_MODE_*): result. */
int watch_mode(int uffd, char *p, size_t n, uint64_t mode);
int write_protect(int uffd, char *p, size_t n);

/* Which of n pages are present or swapped; how many; and one. */
void present_map(const char *p, size_t n, bool *map);
size_t present_count(const char *p, size_t n);
bool present(const char *p);

void thread_start(void (*fn)(void *), void *arg);
/* Waits until *flag is not 0; ends the child as different (a hang) after two seconds. */
void wait_flag(const int *flag);
void set_flag(int *flag);
bool flag_set(const int *flag);

/* Binds the calling thread to the first (0) or second (1) CPU that it may use; false when there is none. */
bool on_cpu(unsigned which);

/* Waits until a message is there to be read; ends the child as different after two seconds. */
void wait_message(int uffd);
/* Reads one message, waiting for it. */
struct uffd_msg read_message(int uffd);

/* A thread that fills every missing page of this userfaultfd with a byte, and reads and forgets every event. */
void serve(int uffd, char byte);
/* The same, holding the descriptor in a table of its own, as the library's threads do. Returns when it does. */
void serve_private(int uffd, char byte);

/* Exit status of fn(arg) in a child of this one, or -1 when it did not end by itself in time. */
int in_child(int (*fn)(void *), void *arg);

/* ---- the facts, numbered as in docs/kernel-facts.md ---- */

void fact_move_result(void);
void fact_move_source(void);
void fact_move_references(void);
void fact_move_gate(void);
void fact_move_target(void);
void fact_move_huge(void);
void fact_remove_early(void);
void fact_again_outlives(void);
void fact_order(void);
void fact_dontneed(void);
void fact_collapse(void);
void fact_close(void);
void fact_fork(void);
void fact_mincore(void);
void fact_read_only(void);
void fact_growth(void);
void fact_one_owner(void);
void fact_thread_exit(void);
void fact_system_calls(void);
void fact_mlockall(void);
void fact_poison(void);
void fact_modes(void);
void fact_remap_leaves(void);
void fact_move_huge_zero(void);
void fact_move_lazy(void);
void fact_fork_event(void);

#endif
