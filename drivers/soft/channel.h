/* SPDX-License-Identifier: MIT */
/*
 * What the program and the engine process share (soft:isolated), besides device memory and the event gate: a memory file in which
 * they talk. Both map it where they like: there is no pointer in it that means something to the other side.
 *
 * An engine and its port talk in turns, like two at one telephone. The port begins, with a job; then the engine asks for what only
 * the program can do (a page fault, system memory, a wait for events), one thing at a time, and the port answers; then the engine
 * says how the job ended. `turn` counts what was said: even, it is the program's turn; odd, the engine's. Who has spoken sets
 * it to the next number, and wakes the other side if that sleeps, as bit 0 says.
 *
 * Invalidations are requests of the program to the control thread of the engine process, any number at a time, each in a slot of
 * its own; and so are requests to end a job. `bell` wakes that thread.
 *
 * The program believes nothing that it reads here: it copies it out once and then checks it.
 */
#ifndef HMM_SOFT_CHANNEL_H
#define HMM_SOFT_CHANNEL_H

#include <hmm/driver.h>

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "engine/engine.h"
#include "patience.h"

#define CHANNEL_MAGIC 0x6c656e6e61686373ull
#define CHANNEL_VERSION 1u

/* Descriptors that the engine process begins with, and no others. 0 to 2 lead nowhere. */
enum channel_fd { CHANNEL_FD_SOCKET = 3, CHANNEL_FD_MEMORY, CHANNEL_FD_CHANNEL, CHANNEL_FD_GATE, CHANNEL_FD_END };

/* What the engine process says once on the socket. Then it is silent: a socket that ends says that the other side is gone. */
struct hello {
    uint64_t magic;
    uint32_t version;
    int32_t status; /* 0: the engines are ready; else a negative errno and why */
    char message[240];
};

/* ---- an engine and its port -------------------------------------------------------------------------------------- */

#define CHANNEL_ARG_BYTES ((size_t)64 << 10)
#define CHANNEL_BOUNCE_BYTES ((size_t)64 << 10)
#define CHANNEL_NAME_BYTES 4096

enum said_kind {
    SAID_JOB = 1, /* program: generation, operation; of a kernel: arg, object, symbol */
    SAID_ANSWER,  /* program: status, or what follows it */

    SAID_FAULT,     /* engine: addr, write. Answer: status 0 and start, end, page, write, gate, held; 1: use the bus; error */
    SAID_BUS_READ,  /* addr, len. Answer: status bytes in bounce, at least 1; or error */
    SAID_BUS_WRITE, /* addr, len and bounce. Answer: bytes done, at least 1; or error */
    SAID_SYNC,      /* answered when all events that were read are applied */
    SAID_WARN,      /* message, for the log */
    SAID_DONE,      /* status, result, addr, message. The job is over */
};

struct from_program {
    uint32_t kind;
    uint32_t cpu; /* that it speaks from */
    uint32_t generation;
    int64_t status;
    uint64_t start, end, page;
    uint32_t write, gate;
    uint32_t held;                  /* until the job is over, whatever happens to the addresses */
    struct hmm_operation operation; /* its pointers are addresses of the program; those of a kernel's launch are NULL */
};

struct from_engine {
    uint32_t kind;
    uint32_t cpu;
    uint32_t write;
    uint64_t addr, len;
    int64_t status;
    uint64_t result;
    char message[160];
};

struct channel {
    uint32_t turn; /* futex: count << 1 | the other side sleeps */
    char pad[60];
    uint64_t kill; /* generation << 16 | force << 8 | enum kill_cause */
    char pad_kill[56];
    struct from_program program;
    struct from_engine engine;
    char object[CHANNEL_NAME_BYTES], symbol[CHANNEL_NAME_BYTES];
    char arg[CHANNEL_ARG_BYTES] __attribute__((aligned(4096)));
    char bounce[CHANNEL_BOUNCE_BYTES] __attribute__((aligned(4096)));
};

/* ---- invalidations ----------------------------------------------------------------------------------------------- */

#define CHANNEL_SLOTS 64

enum slot_state {
    SLOT_IDLE,
    SLOT_POSTED, /* by the program: start, end, nowait */
    SLOT_ASLEEP, /* the same, and it sleeps */
    SLOT_QUIET,  /* nothing of the block is in use */
    SLOT_USED,   /* nothing of the range is in use, but something of the block; with nowait: of the range */
};

/* A range within one block. */
struct recall_slot {
    uint32_t state; /* futex */
    uint32_t nowait;
    uint64_t start, end;
    char pad[40];
};

/* ---- all of it --------------------------------------------------------------------------------------------------- */

struct channels {
    uint64_t magic;
    uint32_t version;
    uint32_t layout; /* CHANNEL_LAYOUT */
    uint64_t memory_bytes;
    uint32_t page_shift;
    uint32_t nengines;
    char pad[32];

    uint32_t bell; /* futex: moves after each of the following */
    uint32_t control_sleeps;
    uint32_t leave; /* the engine process is to end */
    uint32_t pad_leave;
    uint64_t posted; /* slots that are new, a bit each */
    uint64_t kills;  /* channels in which `kill` is new, a bit each */
    char pad_bell[32];

    struct recall_slot slots[CHANNEL_SLOTS];
    struct channel engines[] __attribute__((aligned(4096)));
};

_Static_assert(SOFT_ENGINES_MAX <= 64, "a bit of channels.kills each");

/* Both sides were made from the same headers. */
#define CHANNEL_LAYOUT ((uint32_t)(sizeof(struct channels) * 31 + sizeof(struct channel) * 7 + sizeof(struct hmm_operation)))

static inline size_t channels_bytes(unsigned engines)
{
    return sizeof(struct channels) + engines * sizeof(struct channel);
}

/* ---- futexes between processes ----------------------------------------------------------------------------------- */

/* Waits while *word == value, at most ms; 0: for ever. May return early. */
static inline void channel_futex_wait(const uint32_t *word, uint32_t value, uint32_t ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    syscall(SYS_futex, word, FUTEX_WAIT, value, ms ? &t : NULL, NULL, 0);
}

static inline void channel_futex_wake(const uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

#define TURN_SLEEPS 1u
#define TURN_GONE UINT32_MAX /* the engine process has ended: no count */

static inline uint32_t channel_next(uint32_t count)
{
    return (count + 1) & 0x3fffffff;
}

/* The other side's turn. Returns the count that was there. Everything written before is seen by who sees the new count. */
static inline uint32_t channel_speak(uint32_t *turn, uint32_t count)
{
    uint32_t old = __atomic_exchange_n(turn, count << 1, __ATOMIC_SEQ_CST);
    if (old & TURN_SLEEPS)
        channel_futex_wake(turn);
    return old >> 1;
}

/* Sleeps while it is still the turn `count` of the other side, at most ms (0: for ever). May return early. */
static inline void channel_listen(uint32_t *turn, uint32_t count, uint32_t ms)
{
    uint32_t value = count << 1;
    if (__atomic_compare_exchange_n(turn, &value, value | TURN_SLEEPS, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) ||
        value == (count << 1 | TURN_SLEEPS))
        channel_futex_wait(turn, count << 1 | TURN_SLEEPS, ms);
}

#endif
