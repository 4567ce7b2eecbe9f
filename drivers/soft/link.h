/* SPDX-License-Identifier: MIT */
/*
 * The program's side of an engine process (soft:isolated; the other side is process/, what they share is in channel.h).
 *
 *   link.c     life: finding the program, the handshake, death
 *   spawn.c    starting a process that is nobody's child
 *   talk.c     a job, over the channel of its engine
 *   recall.c   invalidations
 *
 * Descriptors are those of the library's threads, so only they can kill the process. One of them, the watcher, starts it, and waits
 * for its end from then on. When that comes, whatever the reason, it says so (`gone`) and wakes everybody who waits for an answer.
 * `gone` means that no thread of the process runs any more: what it held is free.
 */
#ifndef HMM_SOFT_LINK_H
#define HMM_SOFT_LINK_H

#include "channel.h"
#include "engine/futex.h"
#include "soft.h"

#define LINK_PATIENCE_MS 5000 /* for an answer that cannot take long; then the process is killed */

struct link {
    struct soft *soft;
    struct channels *channels;
    size_t bytes; /* of the mapping */
    struct hmm_thread *watcher;
    const char *path;
    char **environment; /* a copy */
    size_t environment_bytes;
    uint64_t memory_bytes;
    unsigned engines;

    uint32_t state; /* futex: enum link_state */
    uint32_t gone;  /* futex: 1: the process has ended */
    uint32_t closing;
    uint32_t released; /* futex: nobody kills it any more, and its descriptor may become another's */
    int result;        /* of starting */
    int pid;

    /* Library threads only. */
    int memory_fd, channel_fd, socket, pidfd;

    uint32_t reason_taken, reason_there; /* atomic: who comes first says why */
    char reason[200];

    uint64_t slots;      /* atomic: those in use */
    uint32_t slot_freed; /* futex */
};

enum link_state { LINK_STARTING, LINK_FAILED, LINK_UP, LINK_OPEN, LINK_GONE };

/* ---- link.c ------------------------------------------------------------------------------------------------------ */

/* Makes device memory, too (it must exist where the descriptor is). Message set on failure. Program context. */
int soft_link_open(struct soft *s, uint64_t memory_bytes, unsigned engines);
/* The device is complete: from here on core is told when the process ends. -ENODEV: it has ended. */
int soft_link_opened(struct link *link);
/* Ends the process. No job, no invalidation is left. Program context. */
void soft_link_close(struct soft *s);
/* Kills the process for this reason, if it is not dying already. Library threads. */
void soft_link_kill(struct link *link, const char *reason);
/* Why it ended. After `gone`. */
const char *soft_link_reason(const struct link *link);

static inline bool soft_link_gone(const struct link *link)
{
    return __atomic_load_n(&link->gone, __ATOMIC_SEQ_CST);
}

/* Something changed for the control thread of the process. Any thread. */
static inline void soft_link_ring(struct link *link)
{
    __atomic_fetch_add(&link->channels->bell, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&link->channels->control_sleeps, __ATOMIC_SEQ_CST))
        channel_futex_wake(&link->channels->bell);
}

/* ---- spawn.c ----------------------------------------------------------------------------------------------------- */

struct spawn {
    const char *path;
    char *const *argv, *const *envp;
    int fds[CHANNEL_FD_END - CHANNEL_FD_SOCKET]; /* what it gets, in the order of enum channel_fd */
    int pid, pidfd;                              /* out */
    int err;
    char *stack;
};

/* Starts it. Its process descriptor is the caller's to close. Library threads, all signals blocked. Negative errno. */
int soft_spawn(struct spawn *spawn);

/* ---- talk.c ------------------------------------------------------------------------------------------------------ */

/* Runs the job on the port's engine; says in p->talk how it went. -ENODEV when the process is gone. */
void soft_talk_run(struct port *p, const struct hmm_job *job);
/* Asks the job of this generation to end. Any thread, no matter whether it runs. */
void soft_talk_ask_to_end(struct port *p, uint32_t generation, enum kill_cause cause, bool force);

/* ---- recall.c ---------------------------------------------------------------------------------------------------- */

/*
 * Makes all translations of the block of `start` unusable and waits until no engine uses a page of [start, end), which is within it.
 * True: nor any other page of the block. Library threads; blocks, at most for the deadlines of the kernels that run.
 */
bool soft_recall(struct link *link, uintptr_t start, uintptr_t end);
/* The same without waiting for engines. True: none uses a page of the range any more. */
bool soft_recall_nowait(struct link *link, uintptr_t start, uintptr_t end);
/* Returns when the process has answered, whatever its engines do, or is gone: one that does not answer is killed. The same threads. */
void soft_link_probe(struct link *link);

#endif
