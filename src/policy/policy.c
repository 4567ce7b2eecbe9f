/* SPDX-License-Identifier: MIT */
/* See policy.h. */
#include "policy/policy.h"

#define FIRST_WINDOW 16 /* pages: 64 KiB with 4 KiB pages */

static struct policy_range around(unsigned page, unsigned window, unsigned pages)
{
    if (window > pages)
        window = pages;
    unsigned first = page - page % window;
    unsigned end = first + window < pages ? first + window : pages;
    return (struct policy_range){first, end};
}

struct policy_range policy_device_fault(const struct policy_device_fault *in)
{
    unsigned window = FIRST_WINDOW;
    while (window < in->on_device * 2)
        window *= 2;
    if (in->huge || in->previous * 4 >= in->pages * 3)
        window = in->pages;
    uint64_t quarter = in->device_pages / 4;
    while (window > 1 && window > quarter)
        window /= 2;
    if (window < in->granule)
        window = in->granule;
    return around(in->page, window, in->pages);
}

/* Outwards, to granules. */
static struct policy_range whole(struct policy_range r, unsigned granule)
{
    if (granule > 1) {
        r.first -= r.first % granule;
        r.end += (granule - r.end % granule) % granule;
    }
    return r;
}

static unsigned stream_of(struct policy_streams *st, uintptr_t number, bool *continues)
{
    unsigned oldest = 0;
    for (unsigned i = 0; i < POLICY_STREAMS; i++) {
        if (st->s[i].window && st->s[i].next == number) {
            *continues = true;
            return i;
        }
        if (st->s[i].used < st->s[oldest].used)
            oldest = i;
    }
    *continues = false;
    return oldest;
}

struct policy_range policy_cpu_fault(struct policy_streams *st, const struct policy_cpu_fault *in)
{
    bool continues;
    unsigned i = stream_of(st, in->number, &continues);
    unsigned window = continues ? st->s[i].window * 2 : 1;
    struct policy_range r = {in->page, in->page + window};
    if (in->huge)
        r = (struct policy_range){0, in->pages};
    r = whole(r, in->granule);
    if (r.end > in->pages)
        r.end = in->pages;
    st->s[i].next = in->number - in->page + r.end;
    /* Not what the end of the block left of it: the stream goes on in the next one. */
    st->s[i].window = in->huge || window > in->pages ? in->pages : window;
    st->s[i].used = ++st->clock;
    return r;
}

/* The window counts, not what the end of the block or of the memory left of it. */
unsigned policy_zero_fault(struct policy_streams *st, const struct policy_zero_fault *in)
{
    bool continues;
    unsigned i = stream_of(st, in->number, &continues);
    unsigned window = continues ? st->s[i].window * 2 : FIRST_WINDOW;
    if (window < FIRST_WINDOW)
        window = FIRST_WINDOW;
    if (window > in->pages)
        window = in->pages;
    st->s[i].window = window;
    st->s[i].used = ++st->clock;
    st->last = i;
    return window < in->most ? window : in->most;
}

void policy_zero_given(struct policy_streams *st, uintptr_t number, unsigned pages)
{
    st->s[st->last].next = number + pages;
    if (pages == 0)
        st->s[st->last].window /= 2; /* it is asked for again */
}
