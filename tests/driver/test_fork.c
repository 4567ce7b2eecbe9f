/* SPDX-License-Identifier: MIT */
/* fork where the kernel tells of it, which takes CAP_SYS_PTRACE. */
#include "fork_cases.h"
#include "support.h"

#include <sys/ioctl.h>
#include <sys/syscall.h>

#include <fcntl.h>
#include <linux/userfaultfd.h>

static bool kernel_tells_of_fork(void)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_FORK};
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    bool tells = fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0;
    close(fd);
    return tells;
}

int test_main(void)
{
    if (!kernel_tells_of_fork()) {
        printf("skipped: the kernel tells of forks only with CAP_SYS_PTRACE\n");
        return 77;
    }
    return fork_cases("fork by event", true);
}
