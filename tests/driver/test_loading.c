/* SPDX-License-Identifier: MIT */
/* Drivers in shared objects: how they are found, what is refused and why, and that a loaded one is a device like any other. */
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "support.h"

#define BAD MODULES "/bad"

static void look_in(const char *path)
{
    if (path)
        assert_int_equal(setenv("HMM_DRIVER_PATH", path, 1), 0);
    else
        unsetenv("HMM_DRIVER_PATH");
}

static void assert_refused(const char *spec, int err, const char *word)
{
    hmm_dev dev = 4711;
    int r = hmm_device_open(spec, &dev);
    if (r != err || !strstr(hmm_last_message(), word) || dev != 4711)
        fail_msg("'%s' gave %d (device %d), '%s'; not %d with '%s'", spec, r, dev, hmm_last_message(), err, word);
}

static void assert_gives(const char *spec, const char *values)
{
    assert_refused(spec, -EIO, values);
}

/* ---- finding ------------------------------------------------------------------------------------------------------------- */

static void a_name_that_is_nowhere_says_where_it_was_looked_for(void **state)
{
    (void)state;
    look_in(NULL);
    assert_refused("absent", -ENODEV, "HMM_DRIVER_PATH");
    assert_refused("absent", -ENODEV, "'absent'");
    look_in("");
    assert_refused("absent", -ENODEV, "HMM_DRIVER_PATH");
    look_in("/nowhere:" MODULES);
    assert_refused("absent", -ENODEV, "libhmm-absent.so");
    assert_refused("absent:memory=1M", -ENODEV, "/nowhere:" MODULES);
}

static void folders_must_be_absolute(void **state)
{
    (void)state;
    look_in("drivers:" MODULES);
    assert_refused("absent", -EINVAL, "'drivers'");
    look_in("/nowhere:./x");
    assert_refused("absent", -EINVAL, "'./x'");
    look_in("soft");
    close_device(open_spec("soft:memory=1M")); /* those of the build are not looked for */
}

static void names_are_no_paths(void **state)
{
    static const char *const names[] = {"../ram", "a/b", "ram.so", "r m", "", "12345678901234567890123456789012", "r\xc3\xa4m"};
    (void)state;
    look_in(MODULES);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        assert_refused(names[i], names[i][0] ? -ENODEV : -EINVAL, names[i][0] ? "no driver is called" : "empty");
}

static void make_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void the_first_folder_that_has_it_is_taken(void **state)
{
    (void)state;
    char folder[] = "/tmp/hmm-loading-XXXXXX", file[64], path[1024];
    assert_non_null(mkdtemp(folder));
    snprintf(file, sizeof(file), "%s/libhmm-newer.so", folder);
    make_file(file, "this is no shared object\n");
    snprintf(path, sizeof(path), "::%s::%s:", folder, MODULES);
    look_in(path);
    assert_refused("newer", -ENOEXEC, file);
    unlink(file);
    close_device(open_spec("newer"));
    make_file(file, "this is no shared object\n");
    close_device(open_spec("newer")); /* loaded: not looked for again */
    unlink(file);
    rmdir(folder);
}

/* ---- refusing ------------------------------------------------------------------------------------------------------------ */

static void drivers_that_cannot_be_used_are_refused_with_the_reason(void **state)
{
    static const struct {
        const char *name;
        int err;
        const char *word;
    } bad[] = {
        {"abi", -EINVAL, "built for ABI 2"},
        {"size", -EINVAL, "64 bytes"},
        {"name", -EINVAL, "'somethingelse'"},
        {"slot", -EINVAL, "copy"},
        {"symbol", -EINVAL, "hmm_driver_entry"},
        {"choices", -EINVAL, "driver choices is malformed: option 'mode' has no choices"},
        {"emptychoice", -EINVAL, "driver emptychoice is malformed: option 'mode' has no choices"},
        {"fallback", -EINVAL, "driver fallback is malformed: option 'size'"},
        {"range", -EINVAL, "driver range is malformed: option 'size'"},
        {"flag", -EINVAL, "driver flag is malformed: option 'deep'"},
        {"spec", -EINVAL, "driver spec is malformed: option 'over' is a spec and not the last"},
        {"twice", -EINVAL, "driver twice is malformed: option 'more' is there twice"},
        {"nameless", -EINVAL, "driver nameless is malformed: option 'a=b'"},
        {"type", -EINVAL, "driver type is malformed: option 'more'"},
        {"many", -EINVAL, "driver many is malformed: it has more than 16 options"},
        {"static", -ENOEXEC, "another copy of libhmm"},
        {"halfway", -EIO, "does not answer"},
        {"nomemory", -EINVAL, "no device memory"},
    };
    (void)state;
    look_in(BAD);
    for (int round = 0; round < 2; round++)
        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
            assert_refused(bad[i].name, bad[i].err, bad[i].word);
    look_in(MODULES);
    close_device(open_spec("ram:memory=1M")); /* and after all that everything works */
}

static void words_of_each_type_are_understood(void **state)
{
    (void)state;
    look_in(MODULES);
    assert_gives("words:must=0", "size 1024 number 3 text '' flag 0 mode 1 must 0 rest 'none'");
    assert_gives("words:flag,must=4", "flag 1 mode 1 must 4");
    assert_gives("words:must=4,flag", "flag 1 mode 1 must 4");
    assert_gives("words:must=4,mode=one", "mode 0");
    assert_gives("words:must=4,mode=three", "mode 2");
    assert_gives("words:must=4,text=a b:c=d", "text 'a b:c=d'");
    assert_gives("words:must=4,text=", "text ''");
    assert_gives("words:must=4,rest=soft:memory=1M,engines=2,", "rest 'soft:memory=1M,engines=2,'");
    assert_gives("words:must=4,rest=,", "rest ','");
    assert_refused("words", -EINVAL, "device words needs must=NUMBER");
    assert_refused("words:size=1K", -EINVAL, "device words needs must=NUMBER");
    assert_refused("words:must", -EINVAL, "'must'");
    assert_refused("words:must=4,flag=1", -EINVAL, "'flag=1'");
    assert_refused("words:must=4,flag=", -EINVAL, "'flag='");
    assert_refused("words:must=4,mode", -EINVAL, "mode=one|two|three");
    assert_refused("words:must=4,mode=four", -EINVAL, "'four' for option 'mode' is none of one|two|three");
    assert_refused("words:must=4,mode=one|two", -EINVAL, "'one|two'");
    assert_refused("words:must=4,mode=", -EINVAL, "''");
    assert_refused("words:must=4,mode=on", -EINVAL, "'on'");
    assert_refused("words:must=4,rest", -EINVAL, "'rest'");
    assert_refused("words:must=4,rest=", -EINVAL, "'rest='");
    assert_refused("words:must=4,fla", -EINVAL, "'fla'");
    assert_refused("words:must=4,,flag", -EINVAL, "''");
    assert_refused("words:must=4,flag,", -EINVAL, "','");
}

/* ---- using --------------------------------------------------------------------------------------------------------------- */

static void use_ram(const char *spec)
{
    size_t bytes = 600 * page_size();
    char *p = map_pages(bytes), *copy = malloc(bytes);
    hmm_dev dev = open_spec(spec);
    struct hmm_migrate_result res = {.size = sizeof(res)};
    fill_random(p, bytes, 3);
    memcpy(copy, p, bytes);
    assert_int_equal(hmm_migrate_to_device(dev, p, bytes, &res), 0);
    assert_int_equal(res.moved, 600);
    assert_int_equal(pages_in_state(p, bytes, HMM_PAGE_DEVICE), 600);
    assert_memory_equal(p, copy, bytes);
    assert_int_equal(pages_in_state(p, bytes, HMM_PAGE_DEVICE), 0);
    assert_int_equal(hmm_migrate_to_device(dev, p, bytes, &res), 0);
    device_fill(dev, p + 100, 9, bytes - 200);
    memset(copy + 100, 9, bytes - 200);
    assert_memory_equal(p, copy, bytes);
    close_device(dev);
    unmap_pages(p, bytes);
    free(copy);
}

static void a_loaded_driver_is_a_device_like_any_other(void **state)
{
    (void)state;
    look_in(MODULES);
    use_ram("ram:memory=8M");
    use_ram("ram:memory=8M,mapped");
    look_in(NULL); /* it stays */
    use_ram("ram:memory=8M,granule=64K");
}

static void its_jobs_end_with_an_address_or_with_the_device(void **state)
{
    (void)state;
    look_in(MODULES);
    hmm_dev dev = open_spec("ram:memory=1M");
    size_t page = page_size();
    char *p = map_pages(2 * page);
    hmm_fence *fence = NULL;
    unmap_pages(p + page, page);
    assert_int_equal(hmm_job_fill(dev, p, 1, 2 * page, &fence), 0);
    struct hmm_fence_info info = finish(fence);
    assert_int_equal(info.status, -EFAULT);
    assert_int_equal(info.address, (uintptr_t)p + page);
    assert_int_equal(p[page - 1], 1);
    unmap_pages(p, page);
}

static void a_granule_is_what_a_fault_brings(void **state)
{
    (void)state;
    look_in(MODULES);
    size_t page = page_size(), granule = 16 * page;
    char spec[64];
    snprintf(spec, sizeof(spec), "ram:memory=4M,granule=%zu", granule);
    hmm_dev dev = open_spec(spec);
    struct hmm_device_info info = {.size = sizeof(info)};
    assert_int_equal(hmm_device_info(dev, &info), 0);
    assert_int_equal(info.page_size, granule);
    char *p = map_pages(4 * granule);
    fill_random(p, 4 * granule, 5);
    assert_int_equal(hmm_migrate_to_device(dev, p, 4 * granule, NULL), 0);
    (void)((volatile char *)p)[granule + 5 * page]; /* a touch */
    assert_int_equal(pages_in_state(p + granule, granule, HMM_PAGE_SYSTEM), 16);
    assert_int_equal(pages_in_state(p, 4 * granule, HMM_PAGE_SYSTEM), 16);
    assert_refused("ram:memory=4M,granule=12K", -EINVAL, "granule");
    assert_refused("ram:memory=4M,granule=1K", -EINVAL, "granule");
    unmap_pages(p, 4 * granule);
}

static void a_child_has_it_too(void **state)
{
    (void)state;
#ifdef __SANITIZE_ADDRESS__
    fprintf(
        stderr,
        "skipped: AddressSanitizer forks while other threads may hold its allocator's locks, and the child waits for them\n");
    skip();
#endif
    look_in(MODULES);
    hmm_dev dev = open_spec("ram:memory=1M");
    look_in(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        char *p = mmap(NULL, page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        hmm_dev mine;
        *p = 7;
        alarm(JOB_SECONDS);
        _exit(hmm_device_open("ram:memory=1M", &mine) || hmm_migrate_to_device(mine, p, 1, NULL) || *p != 7 ||
              hmm_device_close(mine));
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    close_device(dev);
}

static void *open_and_close(void *result)
{
    for (int i = 0; i < 5; i++) {
        hmm_dev dev;
        if (hmm_device_open("ram:memory=1M", &dev) || hmm_device_close(dev))
            *(int *)result = 1;
    }
    return NULL;
}

static void threads_may_load_at_the_same_time(void **state)
{
    (void)state;
    pthread_t threads[4];
    int failed[4] = {0};
    look_in(MODULES);
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, open_and_close, &failed[i]), 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(failed[i], 0);
    }
}

/* ---- listing ------------------------------------------------------------------------------------------------------------- */

static char listing[8192];

static void add_to_listing(const struct hmm_driver_item *item, void *arg)
{
    (void)arg;
    size_t n = strlen(listing);
    if (item->option)
        snprintf(listing + n, sizeof(listing) - n, "%s.%s [%s] [%s]\n", item->driver, item->option, item->values,
                 item->fallback ? item->fallback : "-");
    else
        snprintf(listing + n, sizeof(listing) - n, "%s from %s\n", item->driver, item->origin);
}

static void list(const char *path)
{
    look_in(path);
    listing[0] = '\0';
    hmm_drivers(add_to_listing, NULL);
}

static void assert_listed(const char *line)
{
    if (!strstr(listing, line))
        fail_msg("'%s' is not in the listing:\n%s", line, listing);
}

static void drivers_are_listed_with_origin_values_and_defaults(void **state)
{
    (void)state;
    list("relative:" MODULES ":" BAD);
    assert_listed("soft from built in\n");
    assert_listed("faulty from built in\n");
    assert_listed("ram from " MODULES "/libhmm-ram.so\n");
    assert_listed("ram.memory [64K to 1T] [64M]\n");
    assert_listed("ram.mapped [on or off] [off]\n");
    assert_listed("words.size [0 to 1M] [1K]\n");
    assert_listed("words.number [1 to 9] [3]\n");
    assert_listed("words.text [text without ','] []\n");
    assert_listed("words.mode [one|two|three] [two]\n");
    assert_listed("words.must [0 to 9] [-]\n");
    assert_listed("faulty.over [a device spec] [-]\n");
    assert_null(strstr(listing, "somethingelse"));
    assert_null(strstr(listing, "\nabi from"));
    assert_null(strstr(listing, "\nstatic from"));
    assert_true(logged(HMM_LOG_WARNING) >= 16); /* each that cannot be loaded, and the folder that is not absolute */
    assert_true(strstr(listing, "soft from") < strstr(listing, "ram from"));
    assert_string_equal(hmm_last_message(), "");
}

int test_main(void)
{
    const struct CMUnitTest tests[] = {
        TEST_WITHOUT_DEVICE(a_name_that_is_nowhere_says_where_it_was_looked_for),
        TEST_WITHOUT_DEVICE(folders_must_be_absolute),
        TEST_WITHOUT_DEVICE(names_are_no_paths),
        TEST_WITHOUT_DEVICE(threads_may_load_at_the_same_time),
        TEST_WITHOUT_DEVICE(the_first_folder_that_has_it_is_taken),
        TEST_WITHOUT_DEVICE(drivers_that_cannot_be_used_are_refused_with_the_reason),
        TEST_WITHOUT_DEVICE(words_of_each_type_are_understood),
        TEST_WITHOUT_DEVICE(a_loaded_driver_is_a_device_like_any_other),
        TEST_WITHOUT_DEVICE(its_jobs_end_with_an_address_or_with_the_device),
        TEST_WITHOUT_DEVICE(a_granule_is_what_a_fault_brings),
        TEST_WITHOUT_DEVICE(a_child_has_it_too),
        TEST_WITHOUT_DEVICE(drivers_are_listed_with_origin_values_and_defaults),
    };
    return cmocka_run_group_tests_name("loading", tests, NULL, NULL);
}
