/* SPDX-License-Identifier: MIT */
/* hmm_check(): the probe of src/os in the words of the public interface. No state; any thread. */
#include <errno.h>
#include <stdio.h>

#include "base/error.h"
#include "os/os.h"

_Static_assert(HMM_CHECK_OK == 0 && HMM_CHECK_DEGRADED == 1 && HMM_CHECK_MISSING == 2 && HMM_CHECK_NOT_SEEN == 3,
               "the probe counts on these values");

struct check {
    hmm_check_fn fn;
    void *arg;
    /* The first thing missing, for the message. */
    char what[256], remedy[256];
};

static void check_item(const struct os_check_item *item, void *arg)
{
    struct check *c = arg;
    struct hmm_check_item pub = {
        .name = item->name,
        .detail = item->detail,
        .remedy = item->remedy,
        .status = (enum hmm_check_status)item->status,
    };

    if (item->status == HMM_CHECK_MISSING && !c->what[0]) {
        snprintf(c->what, sizeof(c->what), "%s: %s", item->name, item->detail);
        snprintf(c->remedy, sizeof(c->remedy), "%s", item->remedy);
    }
    if (c->fn)
        c->fn(&pub, c->arg);
}

int hmm_check(hmm_check_fn fn, void *arg)
{
    struct check c = {.fn = fn, .arg = arg};
    int err;

    message_clear();
    err = os_probe(check_item, &c);
    if (err < 0)
        return hmm_fail(err, "check: %s; remedy: %s", c.what, c.remedy);
    return err;
}
