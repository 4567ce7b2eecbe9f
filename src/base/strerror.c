/* SPDX-License-Identifier: MIT */
/* What an error is called. It knows nothing else of the library: the engine process of a device has its own copy of it. */
#include <errno.h>

#include <hmm/hmm.h>

const char *hmm_strerror(int err)
{
    static const struct {
        int err;
        const char *text;
    } texts[] = {
        {0, "success"},
        {EPERM, "the system does not permit it (see `hmm check`)"},
        {ENOENT, "no such thing"},
        {ESRCH, "the handle belongs to the parent process"},
        {EINTR, "interrupted"},
        {EIO, "the device failed to transfer data"},
        {E2BIG, "too large"},
        {ENOEXEC, "it cannot be loaded, or has no name to be found by"},
        {EBADF, "bad file descriptor"},
        {EAGAIN, "not ready yet; try again"},
        {ENOMEM, "out of system memory"},
        {EACCES, "the mapping's protection forbids the access"},
        {EFAULT, "nothing is mapped at the address"},
        {EBUSY, "busy: in use, or the queue is full"},
        {EEXIST, "exists already"},
        {ENODEV, "no such device, or the device is closed"},
        {EINVAL, "invalid argument"},
        {ENFILE, "too many pagemaps in the process"},
        {EMFILE, "too many open devices or file descriptors"},
        {ENOSPC, "no room: out of device memory, or the caller's array is too small"},
        {ERANGE, "a value is out of range"},
        {EDEADLK, "would deadlock"},
        {ENOSYS, "not supported by this kernel or this build (see `hmm check`)"},
        {EOPNOTSUPP, "not supported"},
        {EPROTO, "the other side broke the protocol"},
        {EOVERFLOW, "the value does not fit"},
        {ETIMEDOUT, "ended at its deadline or time limit"},
        {EALREADY, "done already"},
        {EINPROGRESS, "still running"},
        {ECANCELED, "cancelled"},
        {EHWPOISON, "the only copy of the page was lost with its device"},
    };
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++)
        if (-texts[i].err == err)
            return texts[i].text;
    return "unknown error";
}
