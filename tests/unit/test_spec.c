/* SPDX-License-Identifier: MIT */
/* Device specs: what is understood, and that every complaint quotes the word that it is about. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "api/drivers.h"

static union hmm_option_value values[HMM_OPTIONS_MAX];
static const struct hmm_driver *driver;

static unsigned option(const char *name)
{
    for (unsigned i = 0; driver->options[i].name; i++)
        if (!strcmp(driver->options[i].name, name))
            return i;
    fail_msg("driver %s has no option %s", driver->name, name);
    return 0;
}

static uint64_t number(const char *spec, const char *name)
{
    driver = NULL;
    int r = spec_parse(spec, &driver, values);
    if (r)
        fail_msg("%s: %d, %s", spec, r, hmm_last_message());
    assert_non_null(driver);
    return values[option(name)].number;
}

static void refused(const char *spec, int error, const char *quoted)
{
    driver = NULL;
    int r = spec_parse(spec, &driver, values);
    if (r != error)
        fail_msg("'%s' gives %d, not %d", spec, r, error);
    assert_null(driver); /* outputs are written only on success */
    if (!strstr(hmm_last_message(), quoted))
        fail_msg("'%s': \"%s\" does not contain \"%s\"", spec, hmm_last_message(), quoted);
}

static void a_name_alone_has_the_defaults(void **state)
{
    (void)state;
    assert_int_equal(number("soft", "memory"), 256 << 20);
    assert_int_equal(number("soft", "engines"), 2);
    assert_string_equal(driver->name, "soft");
}

static void sizes_have_units(void **state)
{
    (void)state;
    assert_int_equal(number("soft:memory=65536", "memory"), 65536);
    assert_int_equal(number("soft:memory=0x10000", "memory"), 65536);
    assert_int_equal(number("soft:memory=64K", "memory"), 64 << 10);
    assert_int_equal(number("soft:memory=64k", "memory"), 64 << 10);
    assert_int_equal(number("soft:memory=3M", "memory"), 3 << 20);
    assert_int_equal(number("soft:memory=2g", "memory"), (uint64_t)2 << 30);
    assert_int_equal(number("soft:memory=4T", "memory"), (uint64_t)4 << 40);
}

static void several_options_and_the_last_of_the_same(void **state)
{
    (void)state;
    assert_int_equal(number("soft:memory=1M,engines=7", "engines"), 7);
    assert_int_equal(number("soft:engines=7,memory=1M", "memory"), 1 << 20);
    assert_int_equal(number("soft:engines=7,engines=3", "engines"), 3);
}

static void names_are_whole_words(void **state)
{
    (void)state;
    refused("sof", -ENODEV, "'sof'");
    refused("softer", -ENODEV, "'softer'");
    refused(" soft", -ENODEV, "' soft'");
    refused("SOFT", -ENODEV, "'SOFT'");
    refused(":memory=1M", -ENODEV, "''");
    refused("nothing:memory=1M", -ENODEV, "'nothing'");
}

static void empty_things_are_refused(void **state)
{
    (void)state;
    refused(NULL, -EINVAL, "empty");
    refused("", -EINVAL, "empty");
    refused("soft:", -EINVAL, "':'");
    refused("soft:memory=1M,", -EINVAL, "','");
    refused("soft:,memory=1M", -EINVAL, "''");
    refused("soft:memory=1M,,engines=1", -EINVAL, "''");
}

static void words_that_are_no_option_are_quoted(void **state)
{
    (void)state;
    refused("soft:memory", -EINVAL, "'memory'");
    refused("soft:=4", -EINVAL, "'=4'");
    refused("soft:memory=1M,colour=red", -EINVAL, "'colour'");
    refused("soft:mem=1M", -EINVAL, "'mem'");
    refused("soft:memory2=1M", -EINVAL, "'memory2'");
    refused("soft:MEMORY=1M", -EINVAL, "'MEMORY'");
}

static void values_that_are_no_number_are_quoted(void **state)
{
    static const char *const words[] = {"",
                                        "x",
                                        "-1",
                                        "+1",
                                        " 1",
                                        "1 ",
                                        "1MB",
                                        "1Q",
                                        "M",
                                        "1.5M",
                                        "99999999999999999999",
                                        "18446744073709551615K",
                                        "1M=2",
                                        "12345678901234567890123456789012345"};
    (void)state;
    for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++) {
        char spec[100], quoted[100];
        snprintf(spec, sizeof(spec), "soft:memory=%s", words[i]);
        snprintf(quoted, sizeof(quoted), "'%s' for option 'memory' is not a size", words[i]);
        refused(spec, -EINVAL, quoted);
    }
    refused("soft:engines=2K", -EINVAL, "'2K' for option 'engines'");
}

static void values_out_of_range_are_quoted_with_the_range(void **state)
{
    (void)state;
    refused("soft:memory=0", -EINVAL, "'0' for option 'memory' is out of range");
    refused("soft:memory=65535", -EINVAL, "65536");
    refused("soft:memory=5T", -EINVAL, "'5T'");
    refused("soft:engines=0", -EINVAL, "'0' for option 'engines'");
    refused("soft:engines=65", -EINVAL, "1 to 64");
}

static void a_long_spec_is_refused_before_it_is_kept(void **state)
{
    char spec[300] = "soft:memory=";
    (void)state;
    memset(spec + strlen(spec), '0', 127 - strlen(spec));
    refused(spec, -EINVAL, "is not a size");
    spec[127] = '0'; /* one more */
    refused(spec, -EINVAL, "longer than 127");
}

static void options_that_must_be_given_and_specs_that_take_the_rest(void **state)
{
    (void)state;
    assert_int_equal(number("faulty:seed=7,over=soft:memory=1M,engines=2", "seed"), 7);
    assert_string_equal(values[option("over")].string, "soft:memory=1M,engines=2");
    refused("faulty", -EINVAL, "over=SPEC");
    refused("faulty:seed=7", -EINVAL, "over=SPEC");
    refused("faulty:over", -EINVAL, "'over'");
    refused("faulty:over=", -EINVAL, "'over='");
    assert_int_equal(number("faulty:over=anything,seed=7", "seed"), 0);
    assert_string_equal(values[option("over")].string, "anything,seed=7");
}

/* A table of one option, or of two. */
static void malformed(struct hmm_option first, struct hmm_option second, const char *quoted)
{
    const struct hmm_option table[] = {first, second, {.name = NULL}};
    const struct hmm_driver bad = {.name = "bad", .options = table};
    assert_int_equal(options_check(&bad), -EINVAL);
    if (!strstr(hmm_last_message(), "driver bad is malformed") || !strstr(hmm_last_message(), quoted))
        fail_msg("\"%s\" does not contain \"%s\"", hmm_last_message(), quoted);
}

static void tables_that_no_spec_can_be_checked_against_are_refused(void **state)
{
    const struct hmm_option none = {.name = NULL}, number = {.name = "n", .type = HMM_OPTION_UINT, .max = 9, .fallback = "1"};
    struct hmm_option o = number;
    (void)state;
    assert_int_equal(options_check(&(struct hmm_driver){.name = "good", .options = (struct hmm_option[]){number, none}}), 0);
    assert_int_equal(options_check(&(struct hmm_driver){.name = "good"}), 0);
    malformed(number, number, "twice");
    o.fallback = "x";
    malformed(o, none, "fallback");
    o = number, o.min = 10;
    malformed(o, none, "minimum");
    o = number, o.name = "a b";
    malformed(o, none, "'a b'");
    o = number, o.name = "";
    malformed(o, none, "''");
    o = number, o.type = HMM_OPTION_CHOICE;
    malformed(o, none, "choices");
    o.choices = "|a";
    malformed(o, none, "choices");
    o.choices = "a|b";
    malformed(o, none, "fallback"); /* "1" is none of them */
    o = number, o.type = HMM_OPTION_SPEC;
    malformed(o, number, "last");
    o.type = HMM_OPTION_FLAG;
    malformed(o, none, "flag");
    o.type = (enum hmm_option_type) - 1;
    malformed(o, none, "type");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_name_alone_has_the_defaults),
        cmocka_unit_test(sizes_have_units),
        cmocka_unit_test(several_options_and_the_last_of_the_same),
        cmocka_unit_test(names_are_whole_words),
        cmocka_unit_test(empty_things_are_refused),
        cmocka_unit_test(words_that_are_no_option_are_quoted),
        cmocka_unit_test(values_that_are_no_number_are_quoted),
        cmocka_unit_test(values_out_of_range_are_quoted_with_the_range),
        cmocka_unit_test(a_long_spec_is_refused_before_it_is_kept),
        cmocka_unit_test(options_that_must_be_given_and_specs_that_take_the_rest),
        cmocka_unit_test(tables_that_no_spec_can_be_checked_against_are_refused),
    };
    return cmocka_run_group_tests_name("spec", tests, NULL, NULL);
}
