/* SPDX-License-Identifier: MIT */
/* Messages made on the fault path, where stdio is not allowed. Too long ones are cut; always terminated. */
#include "engine.h"

static void add(struct text *t, char c)
{
    if (t->len + 1 < t->size) {
        t->buf[t->len++] = c;
        t->buf[t->len] = '\0';
    }
}

void soft_text_str(struct text *t, const char *s)
{
    for (; *s; s++)
        add(t, *s);
}

static void number(struct text *t, uint64_t n, unsigned base)
{
    char digits[24];
    unsigned k = 0;
    do {
        digits[k++] = "0123456789abcdef"[n % base];
        n /= base;
    } while (n);
    while (k)
        add(t, digits[--k]);
}

void soft_text_dec(struct text *t, uint64_t n)
{
    number(t, n, 10);
}

void soft_text_hex(struct text *t, uint64_t n)
{
    soft_text_str(t, "0x");
    number(t, n, 16);
}
