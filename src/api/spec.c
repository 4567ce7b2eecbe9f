/* SPDX-License-Identifier: MIT */
/*
 * Device specs: "NAME" or "NAME:word,word", a word being option=value, or the name of an option that is on or off. The option that is
 * a spec itself takes all that is left. Every complaint quotes the word it is about.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "api/drivers.h"

#define SPEC_MAX 127 /* a value must hold what an option takes */

/* ---- values ---- */

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
        if (!unit || !*unit) /* a blank would be the end of units */
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

int parse_size(const char *word, size_t len, uint64_t *out)
{
    return parse_number(word, len, true, out);
}

static int set_number(const struct hmm_option *o, const char *driver, const char *word, size_t len, union hmm_option_value *v)
{
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

static int set_string(const struct hmm_option *o, const char *driver, const char *word, size_t len, union hmm_option_value *v)
{
    if (len >= sizeof(v->string))
        return hmm_fail(-EINVAL, "device %s: value '%.*s' of option '%s' is too long", driver, (int)len, word, o->name);
    if (len == 0 && o->type == HMM_OPTION_SPEC)
        return hmm_fail(-EINVAL, "device %s: '%s=' is not followed by a device spec", driver, o->name);
    memset(v, 0, sizeof(*v));
    memcpy(v->string, word, len);
    return 0;
}

static int set_choice(const struct hmm_option *o, const char *driver, const char *word, size_t len, union hmm_option_value *v)
{
    uint64_t place = 0;
    for (const char *c = o->choices; *c; c += *c == '|', place++) {
        size_t n = strcspn(c, "|");
        if (n == len && !memcmp(c, word, n)) {
            v->number = place;
            return 0;
        }
        c += n;
    }
    return hmm_fail(-EINVAL, "device %s: '%.*s' for option '%s' is none of %s", driver, (int)len, word, o->name, o->choices);
}

static int parse_value(const struct hmm_option *o, const char *driver, const char *word, size_t len, union hmm_option_value *v)
{
    switch (o->type) {
    case HMM_OPTION_STRING:
    case HMM_OPTION_SPEC: return set_string(o, driver, word, len, v);
    case HMM_OPTION_CHOICE: return set_choice(o, driver, word, len, v);
    default: return set_number(o, driver, word, len, v);
    }
}

/* What stands behind the '=', for messages. */
static const char *value_word(const struct hmm_option *o)
{
    switch (o->type) {
    case HMM_OPTION_SIZE: return "SIZE";
    case HMM_OPTION_UINT: return "NUMBER";
    case HMM_OPTION_CHOICE: return o->choices;
    case HMM_OPTION_SPEC: return "SPEC";
    default: return "TEXT";
    }
}

/* ---- the table of a driver ---- */

static int malformed(const struct hmm_driver *d, const char *option, const char *why)
{
    return hmm_fail(-EINVAL, "driver %s is malformed: option '%s' %s", d->name, option, why);
}

static bool has_empty_word(const char *choices)
{
    size_t len = strlen(choices);
    return len == 0 || choices[0] == '|' || choices[len - 1] == '|' || strstr(choices, "||");
}

static int check_option(const struct hmm_driver *d, const struct hmm_option *o)
{
    union hmm_option_value unused;
    if (!*o->name || strpbrk(o->name, "=,: \t"))
        return malformed(d, o->name, "has no name that a spec can hold");
    for (const struct hmm_option *other = d->options; other < o; other++)
        if (!strcmp(other->name, o->name))
            return malformed(d, o->name, "is there twice");
    if ((unsigned)o->type > HMM_OPTION_SPEC)
        return malformed(d, o->name, "is of a type that this library does not know");
    if (o->type == HMM_OPTION_CHOICE && (!o->choices || has_empty_word(o->choices)))
        return malformed(d, o->name, "has no choices (\"one|two\")");
    if ((o->type == HMM_OPTION_SIZE || o->type == HMM_OPTION_UINT) && o->min > o->max)
        return malformed(d, o->name, "has a minimum above its maximum");
    if (o->type == HMM_OPTION_SPEC && o[1].name)
        return malformed(d, o->name, "is a spec and not the last one");
    if (o->type == HMM_OPTION_FLAG && o->fallback)
        return malformed(d, o->name, "is a flag and has a fallback");
    if (o->fallback && parse_value(o, d->name, o->fallback, strlen(o->fallback), &unused))
        return malformed(d, o->name, "has a fallback that is no value of it");
    return 0;
}

int options_check(const struct hmm_driver *d)
{
    int r = 0;
    for (unsigned i = 0; d->options && d->options[i].name && !r; i++)
        r = i < HMM_OPTIONS_MAX
                ? check_option(d, &d->options[i])
                : hmm_fail(-EINVAL, "driver %s is malformed: it has more than %d options", d->name, HMM_OPTIONS_MAX);
    return r;
}

/* ---- the words of a spec ---- */

struct parse {
    const struct hmm_driver *d;
    union hmm_option_value *values;
    bool given[HMM_OPTIONS_MAX];
};

static int find_option(const struct parse *p, const char *word, size_t name)
{
    for (int i = 0; p->d->options && p->d->options[i].name; i++)
        if (strlen(p->d->options[i].name) == name && !memcmp(p->d->options[i].name, word, name))
            return i;
    return hmm_fail(-EINVAL, "device %s has no option '%.*s': `hmm devices` lists them", p->d->name, (int)name, word);
}

/* One word of *len characters; a spec's is longer, up to the end. */
static int parse_word(struct parse *p, const char *word, size_t *len)
{
    size_t name = strcspn(word, "=,");
    bool equals = word[name] == '=';
    if (name == 0)
        return hmm_fail(-EINVAL, "device %s: '%.*s' is not option=value", p->d->name, (int)*len, word);
    int i = find_option(p, word, name);
    if (i < 0)
        return i;
    const struct hmm_option *o = &p->d->options[i];
    p->given[i] = true;
    if (o->type == HMM_OPTION_FLAG) {
        p->values[i].number = 1;
        return equals ? hmm_fail(-EINVAL, "device %s: '%.*s': option '%s' is on or off: give the bare word, or leave it out",
                                 p->d->name, (int)*len, word, o->name)
                      : 0;
    }
    if (!equals)
        return hmm_fail(-EINVAL, "device %s: '%.*s' needs a value: %s=%s", p->d->name, (int)name, word, o->name, value_word(o));
    if (o->type == HMM_OPTION_SPEC)
        *len = strlen(word);
    return parse_value(o, p->d->name, word + name + 1, *len - name - 1, &p->values[i]);
}

static int parse_words(struct parse *p, const char *word)
{
    if (!*word)
        return hmm_fail(-EINVAL, "device %s: ':' is not followed by option=value", p->d->name);
    while (*word) {
        size_t len = strcspn(word, ",");
        int r = parse_word(p, word, &len);
        if (r)
            return r;
        word += len;
        if (*word == ',' && !*++word)
            return hmm_fail(-EINVAL, "device %s: the spec ends with ','", p->d->name);
    }
    return 0;
}

static int set_fallbacks(struct parse *p)
{
    int r = 0;
    for (unsigned i = 0; p->d->options && p->d->options[i].name && !r; i++) {
        const struct hmm_option *o = &p->d->options[i];
        if (p->given[i])
            continue;
        if (o->type == HMM_OPTION_FLAG)
            p->values[i].number = 0;
        else if (o->fallback)
            r = parse_value(o, p->d->name, o->fallback, strlen(o->fallback), &p->values[i]);
        else
            r = hmm_fail(-EINVAL, "device %s needs %s=%s: %s", p->d->name, o->name, value_word(o), o->help ? o->help : "");
    }
    return r;
}

int spec_parse(const char *spec, const struct hmm_driver **driver, union hmm_option_value *values)
{
    if (!spec || !*spec)
        return hmm_fail(-EINVAL, "the device spec is empty: give NAME or NAME:option=value,...");
    if (strlen(spec) > SPEC_MAX)
        return hmm_fail(-EINVAL, "the device spec is longer than %d characters", SPEC_MAX);
    struct parse p = {.values = values};
    size_t name = strcspn(spec, ":");
    int r = driver_by_name(spec, name, &p.d);
    if (!r && spec[name] == ':')
        r = parse_words(&p, spec + name + 1);
    if (!r)
        r = set_fallbacks(&p);
    if (!r)
        *driver = p.d;
    return r;
}
