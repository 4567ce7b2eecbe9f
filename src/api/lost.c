/* SPDX-License-Identifier: MIT */
/*
 * Devices that are gone or broken. Losing one is a word that everybody who would use it looks at: jobs end and are refused (job/sched.c), no page
 * goes there (migrate/to_device.c), the driver's copies are not called (migrate/dma.c), and what only the device had is poisoned when
 * it is brought home: by a touch, an eviction or hmm_device_close() (migrate/to_system.c).
 */
#include <errno.h>
#include <string.h>

#include "api/manager.h"
#include "base/error.h"
#include "job/job.h"
#include "mirror/mirror.h"

/* The reason for this loss is written before the word says so, and never again. True: it is worse than what was known. */
static bool set_lost(struct hmm_device *dev, enum hmm_loss loss, const char *reason)
{
    uint32_t lost = (uint32_t)loss + 1;
    mutex_lock(&dev->mm->queue_lock);
    bool worse = dev->lost < lost;
    if (worse) {
        strncpy(dev->lost_why[loss], reason && *reason ? reason : "the driver gave no reason", sizeof(dev->lost_why[loss]) - 1);
        __atomic_store_n(&dev->lost, lost, __ATOMIC_RELEASE);
    }
    mutex_unlock(&dev->mm->queue_lock);
    return worse;
}

void hmm_device_lost(struct hmm_device *dev, enum hmm_loss loss, const char *reason)
{
    bool memory = loss == HMM_LOST_MEMORY;
    if (!set_lost(dev, memory ? HMM_LOST_MEMORY : HMM_LOST_ENGINES, reason))
        return;
    sched_lost(dev, device_lost_why(dev));
    mirrors_lost(dev);
    if (memory)
        hmm_log(HMM_LOG_ERROR,
                "device %s has lost its memory (%s): pages that only it had are gone, touching them is SIGBUS; close it",
                dev->driver->name, device_lost_why(dev));
    else
        hmm_log(HMM_LOG_WARNING, "device %s takes no jobs any more (%s): its pages can still come home; close it",
                dev->driver->name, device_lost_why(dev));
}

int device_refuse_lost(const struct hmm_device *dev)
{
    return device_is_lost(dev) ? hmm_fail(-ENODEV, "device %s is lost: %s; close it", dev->driver->name, device_lost_why(dev))
                               : 0;
}
