/* SPDX-License-Identifier: MIT */
/* Making room on a device, and migrations that do so. No locks held; blocks. */
#ifndef HMM_RECLAIM_H
#define HMM_RECLAIM_H

#include "migrate/migrate.h"

/* Sends cold blocks of the device home until `pages` pages came free. Returns the pages that came free (>= pages), or less when
 * nothing more can be evicted: everything else is pinned, in flight or gone. Where the limit of the process is what is short, the blocks
 * are of any device, but none that is in use, and `pages` come on top of what exceeds a limit. `keep`: a block that is not to be evicted. */
uint64_t reclaim_make_room(struct mm *mm, struct hmm_device *dev, uint64_t pages, uintptr_t keep);

/* Sends pages home until the device (NULL: the process) is within its limit. False: pages that are pinned, in use or in flight stand in
 * the way. */
bool reclaim_to_limit(struct mm *mm, struct hmm_device *dev);

/* migrate_range_to_device() that makes room when the device is full. 0, -ENOMEM, -ENODEV (lost), or the driver's error; pages for which no room
 * could be made are counted as busy. */
int reclaim_migrate_to_device(struct mm *mm, struct hmm_device *dev, uintptr_t start, uintptr_t end,
                              struct hmm_migrate_result *res);

#endif
