/* SPDX-License-Identifier: MIT */
/*
 * Jobs. A job is the inner driver's from submit() on; its completion comes back here first, through hmm_job.done, and goes on to the
 * program as it was, as an error, or later.
 */
#include "faulty.h"

#include <errno.h>
#include <string.h>

static void set_status(struct record *r, int status, const char *message)
{
    r->status = (struct hmm_job_status){.status = status, .message = message};
}

static void take_status(struct record *r, const struct hmm_job_status *status)
{
    r->status = *status;
    if (!status->message)
        return;
    strncpy(r->message, status->message, sizeof(r->message) - 1); /* valid during the call only */
    r->status.message = r->message;
}

static void job_ended(struct hmm_job *job, const struct hmm_job_status *status)
{
    struct record *r = job->wrapper;
    struct faulty *f = r->faulty;
    uint64_t more;
    job->done = r->done;
    job->wrapper = r->wrapper;
    take_status(r, status);
    if (faulty_engines_lost(f))
        set_status(r, -ENODEV, "faulty: the device was lost while the job ran");
    else if (faulty_hit(f, HIT_JOB, &more) && status->status == 0)
        set_status(r, -EIO, "faulty: job_error");
    faulty_delays_add(f, r);
}

void faulty_complete(struct record *r)
{
    hmm_job_done(r->job, &r->status);
    hmm_mem_free(r, sizeof(*r));
}

int faulty_submit(void *priv, struct hmm_job *job)
{
    struct faulty *f = priv;
    uint64_t more;
    if (!f->inner->submit)
        return -EOPNOTSUPP;
    if (faulty_memory_lost(f) || faulty_engines_lost(f))
        return -ENODEV;
    if (faulty_hit(f, HIT_SUBMIT, &more))
        return -EIO;
    struct record *r = hmm_mem_alloc(sizeof(*r));
    if (!r)
        return -ENOMEM;
    *r = (struct record){.faulty = f, .job = job, .done = job->done, .wrapper = job->wrapper};
    job->done = job_ended;
    job->wrapper = r;
    int err = f->inner->submit(f->inner_priv, job);
    if (err) { /* it is the caller's again, as it was */
        job->done = r->done;
        job->wrapper = r->wrapper;
        hmm_mem_free(r, sizeof(*r));
    }
    return err;
}

/* What is held back here is done for the inner driver. */
void faulty_cancel(void *priv, struct hmm_job *job, int status, const char *message)
{
    struct faulty *f = priv;
    if (!faulty_delays_hurry(f, job) && f->inner->cancel)
        f->inner->cancel(f->inner_priv, job, status, message);
}
