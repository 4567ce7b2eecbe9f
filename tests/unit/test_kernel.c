/* SPDX-License-Identifier: MIT */
/* Kernels and their names: found both ways, kept, and what cannot be found. TEST_OBJECT is the file of tests/objects. */
#include <dlfcn.h>
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "job/job.h"
#include "os/own.h"

static int by_names(const char *object, const char *symbol, struct hmm_launch *l)
{
    *l = (struct hmm_launch){.size = sizeof(*l), .object = object, .symbol = symbol};
    return kernel_resolve(l, false);
}

static void names_give_the_function(void **state)
{
    (void)state;
    struct hmm_launch l, again;
    char object[PATH_MAX], symbol[] = "object_answer";
    strcpy(object, TEST_OBJECT);
    assert_int_equal(by_names(object, symbol, &l), 0);
    uint64_t n = 2;
    assert_int_equal(l.kernel(NULL, &n), 84);
    memset(object, 'x', 5);
    memset(symbol, 'x', 5);
    assert_string_equal(l.object, TEST_OBJECT); /* strings of its own */
    assert_string_equal(l.symbol, "object_answer");
    assert_int_equal(by_names(TEST_OBJECT, "object_answer", &again), 0);
    assert_ptr_equal(again.object, l.object); /* kept */
    assert_ptr_equal(again.kernel, l.kernel);
    uintptr_t start, end;
    assert_true(own_overlap((uintptr_t)l.object, (uintptr_t)l.object + 1, &start, &end)); /* where no device takes it */
}

static void a_relative_path_is_made_absolute(void **state)
{
    (void)state;
    struct hmm_launch l;
    char folder[PATH_MAX], file[PATH_MAX], relative[PATH_MAX + 2], before[PATH_MAX];
    strcpy(folder, TEST_OBJECT);
    strcpy(file, TEST_OBJECT);
    snprintf(relative, sizeof(relative), "./%s", basename(file));
    assert_non_null(getcwd(before, sizeof(before)));
    assert_int_equal(chdir(dirname(folder)), 0);
    int r = by_names(relative, "object_other", &l);
    assert_int_equal(chdir(before), 0);
    assert_int_equal(r, 0);
    assert_string_equal(l.object, TEST_OBJECT);
    assert_int_equal(l.kernel(NULL, NULL), 7);
    assert_int_equal(by_names(relative, "object_other", &l), -ENOENT); /* not here */
}

static void a_function_gives_its_names(void **state)
{
    (void)state;
    void *handle = dlopen(TEST_OBJECT, RTLD_NOW);
    assert_non_null(handle);
    struct hmm_launch l = {.size = sizeof(l), .kernel = (hmm_kernel)dlsym(handle, "object_answer")}, again = l;
    assert_int_equal(kernel_resolve(&l, false), 0);
    assert_null(l.object); /* nobody asked */
    assert_int_equal(kernel_resolve(&l, true), 0);
    assert_string_equal(l.object, TEST_OBJECT);
    assert_string_equal(l.symbol, "object_answer");
    assert_int_equal(kernel_resolve(&again, true), 0);
    assert_ptr_equal(again.object, l.object);
    hmm_kernel (*hidden)(void) = (hmm_kernel(*)(void))dlsym(handle, "object_hidden");
    l = (struct hmm_launch){.size = sizeof(l), .kernel = hidden()};
    assert_int_equal(kernel_resolve(&l, true), -ENOEXEC);
    assert_non_null(strstr(hmm_last_message(), "HMM_KERNEL"));
    assert_int_equal(kernel_resolve(&l, false), 0); /* it can run here */
    assert_int_equal(l.kernel(NULL, NULL), 3);
    dlclose(handle);
}

/* Its address must not become that of another kernel. */
static void what_has_names_stays_loaded(void **state)
{
    (void)state;
    char copy[] = "/tmp/hmm-test-XXXXXX", command[PATH_MAX + 64];
    int fd = mkstemp(copy);
    assert_true(fd >= 0);
    close(fd);
    snprintf(command, sizeof(command), "cp '%s' %s", TEST_OBJECT, copy);
    assert_int_equal(system(command), 0);
    void *handle = dlopen(copy, RTLD_NOW);
    assert_non_null(handle);
    struct hmm_launch l = {.size = sizeof(l), .kernel = (hmm_kernel)dlsym(handle, "object_other")};
    assert_int_equal(kernel_resolve(&l, true), 0);
    assert_string_equal(l.object, copy);
    dlclose(handle);
    handle = dlopen(copy, RTLD_LAZY | RTLD_NOLOAD);
    unlink(copy);
    assert_non_null(handle);
    assert_int_equal(l.kernel(NULL, NULL), 7);
    dlclose(handle);
}

HMM_KERNEL(in_the_program)
{
    (void)acc;
    (void)arg;
    return 1;
}

static void the_program_is_no_shared_object(void **state)
{
    (void)state;
    struct hmm_launch l = {.size = sizeof(l), .kernel = in_the_program};
    assert_int_equal(kernel_resolve(&l, true), -ENOEXEC);
    assert_non_null(strstr(hmm_last_message(), "shared object"));
}

static void what_is_not_there(void **state)
{
    (void)state;
    struct hmm_launch l;
    char garbage[] = "/tmp/hmm-test-XXXXXX";
    assert_int_equal(by_names("/nowhere/kernels.so", "object_answer", &l), -ENOENT);
    assert_non_null(strstr(hmm_last_message(), "/nowhere/kernels.so"));
    assert_int_equal(by_names("hmm-no-such-kernels.so", "object_answer", &l), -ENOENT);
    assert_int_equal(by_names(TEST_OBJECT, "no_such_kernel", &l), -ENOENT);
    assert_non_null(strstr(hmm_last_message(), "no_such_kernel"));
    int fd = mkstemp(garbage);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, "this is no object", 17), 17);
    close(fd);
    assert_int_equal(by_names(garbage, "object_answer", &l), -ENOEXEC);
    assert_non_null(strstr(hmm_last_message(), garbage));
    unlink(garbage);
}

static void both_must_agree(void **state)
{
    (void)state;
    struct hmm_launch l;
    assert_int_equal(by_names(TEST_OBJECT, "object_answer", &l), 0);
    assert_int_equal(kernel_resolve(&l, true), 0); /* with all three */
    l.symbol = "object_other";
    assert_int_equal(kernel_resolve(&l, false), -EINVAL);
    assert_non_null(strstr(hmm_last_message(), "object_other"));
}

static void *find_often(void *arg)
{
    const char *symbols[] = {"object_answer", "object_other"};
    for (unsigned i = 0; i < 2000; i++) {
        struct hmm_launch l;
        if (by_names(TEST_OBJECT, symbols[i & 1], &l) || strcmp(l.symbol, symbols[i & 1]) != 0 ||
            l.kernel(NULL, NULL) != (i & 1 ? 7 : 42))
            return arg;
        l.object = l.symbol = NULL;
        if (kernel_resolve(&l, true) || strcmp(l.object, TEST_OBJECT) != 0 || strcmp(l.symbol, symbols[i & 1]) != 0)
            return arg;
    }
    return NULL;
}

static void many_threads_find_the_same(void **state)
{
    (void)state;
    pthread_t t[4];
    kernel_forget();
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&t[i], NULL, find_often, t), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(t[i], &wrong);
        assert_null(wrong);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_give_the_function),    cmocka_unit_test(a_relative_path_is_made_absolute),
        cmocka_unit_test(a_function_gives_its_names), cmocka_unit_test(the_program_is_no_shared_object),
        cmocka_unit_test(what_is_not_there),          cmocka_unit_test(both_must_agree),
        cmocka_unit_test(many_threads_find_the_same), cmocka_unit_test(what_has_names_stays_loaded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
