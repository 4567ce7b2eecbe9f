/* SPDX-License-Identifier: MIT */
/* Mutations of the soft device: protocol steps left out on purpose, in test builds only. See tests/MUTATIONS.md. */
#include "engine.h"

#ifdef HMM_MUTATIONS
#include <stdlib.h>
#include <string.h>

bool soft_mutate(const char *name)
{
    const char *text = getenv("HMM_MUTATE");
    return text && strcmp(text, name) == 0;
}
#endif
