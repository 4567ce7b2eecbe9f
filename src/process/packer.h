/* SPDX-License-Identifier: MIT */
/* The parent's side of a nursery (nursery.h): packs pages into messages. One heir's; any library thread, no locks. */
#ifndef HMM_PROCESS_PACKER_H
#define HMM_PROCESS_PACKER_H

#include "mm/estate.h"

struct nursery;

struct packer {
    struct nursery *nursery; /* NULL: the heir has none */
    int alive;               /* readable when there is no child any more; or an error */
    unsigned turn;           /* message that is being written */
    bool begun;              /* it has runs of ours */
    bool ended;              /* the last was sent */
    uint64_t waiting_since;  /* for the child to take a message; 0: not */
};

/*
 * Packs the first pages of a run. Pages packed: they are the child's, whatever becomes of us. 0: the message was full, and is sent. -EAGAIN:
 * the child has not taken the one before; packer_wait(). -ESRCH: there is no child. -EFAULT: the bytes cannot be read.
 * `bytes` NULL: poison.
 */
int packer_add(struct packer *p, uintptr_t addr, const char *bytes, uint32_t pages);
/* Sends the last message: 0, or -EAGAIN, -ESRCH. */
int packer_end(struct packer *p);
/* Whether the child has ended or called exec, as far as that can be known. */
bool packer_is_gone(const struct packer *p);
/* Until the child takes a message, for a millisecond at most; where it has, a millisecond. */
void packer_wait(struct packer *p);
/* Tells the child that we are at work. */
void packer_beat(struct packer *p);
/* Gives the nursery up. A child that has not got its last message ends, saying so. */
void packer_close(struct packer *p);

#endif
