/* SPDX-License-Identifier: MIT */
/* Device specs: "NAME" or "NAME:option=value,option=value". Every complaint quotes the word it is about. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "api/manager.h"

#define SPEC_MAX 127

static int parse_number(const char *word, size_t len, bool suffix, uint64_t *out)
{
    char text[32];
    if (len == 0 || len >= sizeof(text) || word[0] == '-' || word[0] == '+' || word[0] == ' ')
        return -EINVAL;
    memcpy(text, word, len);
    text[len] = 0;
    char *end;
    errno = 0;
    uint64_t n = strtoull(text, &end, 0);
    if (errno || end == text)
        return -EINVAL;
    if (*end && suffix) {
        static const char units[] = "KMGT";
        const char *unit = strchr(units, *end & ~0x20);
        if (!unit)
            return -EINVAL;
        unsigned shift = 10 * (unit - units + 1);
        if (n > UINT64_MAX >> shift)
            return -EINVAL;
        n <<= shift;
        end++;
    }
    if (*end)
        return -EINVAL;
    *out = n;
    return 0;
}

static int parse_value(const struct hmm_option *o, const char *driver, const char *word, size_t len, union hmm_option_value *v)
{
    if (o->type == HMM_OPTION_STRING) {
        if (len >= sizeof(v->string))
            return hmm_fail(-EINVAL, "device %s: value '%.*s' of option '%s' is too long", driver, (int)len, word, o->name);
        memset(v, 0, sizeof(*v));
        memcpy(v->string, word, len);
        return 0;
    }
    uint64_t n;
    bool size = o->type == HMM_OPTION_SIZE;
    if (parse_number(word, len, size, &n))
        return hmm_fail(-EINVAL, "device %s: '%.*s' for option '%s' is not a %s", driver, (int)len, word, o->name,
                        size ? "size (a number with an optional K, M, G or T)" : "number");
    if (n < o->min || n > o->max)
        return hmm_fail(-EINVAL, "device %s: '%.*s' for option '%s' is out of range: %llu to %llu", driver, (int)len, word,
                        o->name, (unsigned long long)o->min, (unsigned long long)o->max);
    v->number = n;
    return 0;
}

static const struct hmm_driver *find_driver(const char *name, size_t len)
{
    for (unsigned i = 0; hmm_builtin_drivers[i]; i++) {
        const struct hmm_driver *d = hmm_builtin_drivers[i];
        if (strlen(d->name) == len && !memcmp(d->name, name, len))
            return d;
    }
    return NULL;
}

static int set_fallbacks(const struct hmm_driver *d, union hmm_option_value *values)
{
    int r = 0;
    for (unsigned i = 0; d->options && d->options[i].name && !r; i++)
        r = i < OPTIONS_MAX
                ? parse_value(&d->options[i], d->name, d->options[i].fallback, strlen(d->options[i].fallback), &values[i])
                : hmm_fail(-EINVAL, "driver %s has more than %d options", d->name, OPTIONS_MAX);
    return r;
}

static int parse_word(const struct hmm_driver *d, const char *word, size_t len, union hmm_option_value *values)
{
    const char *eq = memchr(word, '=', len);
    if (!eq || eq == word)
        return hmm_fail(-EINVAL, "device %s: '%.*s' is not option=value", d->name, (int)len, word);
    size_t name = eq - word;
    for (unsigned i = 0; d->options && d->options[i].name; i++)
        if (strlen(d->options[i].name) == name && !memcmp(d->options[i].name, word, name))
            return parse_value(&d->options[i], d->name, eq + 1, len - name - 1, &values[i]);
    return hmm_fail(-EINVAL, "device %s has no option '%.*s': `hmm devices` lists them", d->name, (int)name, word);
}

int spec_parse(const char *spec, const struct hmm_driver **driver, union hmm_option_value *values)
{
    if (!spec || !*spec)
        return hmm_fail(-EINVAL, "the device spec is empty: give NAME or NAME:option=value,...");
    if (strlen(spec) > SPEC_MAX)
        return hmm_fail(-EINVAL, "the device spec is longer than %d characters", SPEC_MAX);
    size_t name = strcspn(spec, ":");
    const struct hmm_driver *d = find_driver(spec, name);
    if (!d)
        return hmm_fail(-ENODEV, "no driver is called '%.*s': `hmm devices` lists them", (int)name, spec);
    int r = set_fallbacks(d, values);
    const char *word = spec + name + (spec[name] == ':');
    if (!r && spec[name] == ':' && !*word)
        r = hmm_fail(-EINVAL, "device %s: ':' is not followed by option=value", d->name);
    while (!r && *word) {
        size_t len = strcspn(word, ",");
        r = parse_word(d, word, len, values);
        word += len;
        if (!r && *word == ',' && !*++word)
            r = hmm_fail(-EINVAL, "device %s: the spec ends with ','", d->name);
    }
    if (!r)
        *driver = d;
    return r;
}
