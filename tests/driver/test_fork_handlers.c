/* SPDX-License-Identifier: MIT */
/* fork without CAP_SYS_PTRACE: what users without rights have, and most containers. */
#include "fork_cases.h"
#include "support.h"

#include <sys/syscall.h>

#include <linux/capability.h>

static int drop_ptrace(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data))
        return -1;
    data[0].effective &= ~(1u << CAP_SYS_PTRACE);
    data[0].permitted &= ~(1u << CAP_SYS_PTRACE);
    data[0].inheritable &= ~(1u << CAP_SYS_PTRACE);
    return (int)syscall(SYS_capset, &header, data);
}

int test_main(void)
{
    if (drop_ptrace()) {
        perror("dropping CAP_SYS_PTRACE");
        return 1;
    }
    return fork_cases("fork by handlers", false);
}
