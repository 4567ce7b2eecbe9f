/* SPDX-License-Identifier: MIT */
/*
 * Finding drivers. One that is not in this build is looked for as libhmm-NAME.so in the folders of HMM_DRIVER_PATH.
 *
 * What was loaded is kept in static memory of ours, which never migrates and is there in a child of fork, too. Records are only ever
 * added, so a pointer to one stays good.
 */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api/drivers.h"
#include "base/error.h"
#include "base/lock.h"
#include "base/util.h"

#define PATH_VARIABLE "HMM_DRIVER_PATH"
#define FILE_PREFIX "libhmm-"
#define FILE_SUFFIX ".so"
#define NAME_MAX_LENGTH 31 /* hmm_device_info.name */
#define FOLDER_BYTES 448
#define PATH_BYTES (FOLDER_BYTES + NAME_MAX_LENGTH + 16)
#define LOADED_MAX 32
/* What the first interface of this ABI number had. Slots that came later are NULL in drivers that were built before. */
#define SIZE_MINIMUM (offsetof(struct hmm_driver, cancel) + sizeof(((struct hmm_driver *)NULL)->cancel))

static struct {
    struct mutex lock; /* RANK_MANAGER: held while one is loaded */
    unsigned n;
    struct loaded {
        char path[PATH_BYTES];
        struct hmm_driver driver; /* a copy, as long as ours */
    } all[LOADED_MAX];
} loaded = {.lock = MUTEX_INITIALIZER(RANK_MANAGER)};

/* Another thread may have been loading one. */
static void forget_lock(void)
{
    loaded.lock = (struct mutex)MUTEX_INITIALIZER(RANK_MANAGER);
}

__attribute__((constructor)) static void watch_fork(void)
{
    pthread_atfork(NULL, NULL, forget_lock);
}

/* ---- checks ---- */

static int check_slots(const struct hmm_driver *d)
{
    const struct {
        const char *name;
        bool there;
    } slots[] = {{"open", d->open}, {"stop", d->stop}, {"close", d->close}, {"copy", d->copy}, {"clear", d->clear}};
    for (unsigned i = 0; i < ARRAY_LEN(slots); i++)
        if (!slots[i].there)
            return hmm_fail(-EINVAL, "driver %s lacks the operation %s, which is required", d->name, slots[i].name);
    return 0;
}

/* Nothing behind size and abi is looked at before they are known to be ours. */
static int check_driver(const struct hmm_driver *d, const char *name, size_t len)
{
    if (d->abi != HMM_DRIVER_ABI || d->size < SIZE_MINIMUM)
        return hmm_fail(-EINVAL,
                        "driver %.*s was built for ABI %u (%u bytes), this library has ABI %u (at least %zu): rebuild it",
                        (int)len, name, d->abi, d->size, HMM_DRIVER_ABI, SIZE_MINIMUM);
    if (!d->name || strlen(d->name) != len || memcmp(d->name, name, len))
        return hmm_fail(-EINVAL, "the driver in %s%.*s%s calls itself '%.31s': name the file after it", FILE_PREFIX, (int)len,
                        name, FILE_SUFFIX, d->name ? d->name : "");
    int r = check_slots(d);
    return r ? r : options_check(d);
}

/* ---- one file ---- */

/* A second copy of the library would have a manager of its own: nothing that the driver calls would reach this one. */
static int check_library(void *handle, const char *path)
{
    void *theirs = dlsym(handle, "hmm_pagemap_add");
    if (!theirs || (uintptr_t)theirs == (uintptr_t)hmm_pagemap_add)
        return 0;
    return hmm_fail(-ENOEXEC,
                    "%s uses another copy of libhmm than this program: link both to the same libhmm.so, neither to libhmm.a",
                    path);
}

static int check_file(void *handle, const char *path, const char *name, size_t len, const struct hmm_driver **d)
{
    int r = check_library(handle, path);
    if (r)
        return r;
    *d = dlsym(handle, HMM_DRIVER_SYMBOL);
    if (!*d)
        return hmm_fail(-EINVAL, "%s has no symbol %s: define the driver with HMM_DRIVER_EXPORT", path, HMM_DRIVER_SYMBOL);
    return check_driver(*d, name, len);
}

static void keep(const struct hmm_driver *d, const char *path)
{
    struct loaded *l = &loaded.all[loaded.n++];
    memcpy(&l->driver, d, d->size < sizeof(l->driver) ? d->size : sizeof(l->driver));
    l->driver.size = sizeof(l->driver);
    strcpy(l->path, path);
}

/* Caller holds the lock. */
static int load(const char *path, const char *name, size_t len)
{
    const struct hmm_driver *d = NULL;
    if (loaded.n == LOADED_MAX)
        return hmm_fail(-ENOMEM, "driver %.*s: %d drivers are loaded, which is the most there can be", (int)len, name,
                        LOADED_MAX);
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return hmm_fail(-ENOEXEC, "driver %.*s cannot be loaded: %s", (int)len, name, dlerror());
    int r = check_file(handle, path, name, len, &d);
    if (r)
        dlclose(handle);
    else
        keep(d, path); /* the handle stays open for good */
    return r;
}

/* ---- the folders ---- */

/* The next folder of the path, from *at on; its length, or 0 at the end. */
static size_t next_folder(const char **at, const char **folder)
{
    while (**at == ':')
        ++*at;
    *folder = *at;
    size_t n = strcspn(*at, ":");
    *at += n;
    return n;
}

static int check_folder(const char *folder, size_t n)
{
    if (folder[0] != '/')
        return hmm_fail(-EINVAL,
                        PATH_VARIABLE ": '%.*s' does not begin with '/': drivers are loaded from absolute folders only", (int)n,
                        folder);
    if (n >= FOLDER_BYTES)
        return hmm_fail(-EINVAL, PATH_VARIABLE ": folder '%.40s...' is longer than %d characters", folder, FOLDER_BYTES - 1);
    return 0;
}

/* The folder has been checked, and so has the name. */
static void make_path(char *path, const char *folder, size_t n, const char *name, size_t len)
{
    char *end = stpcpy(mempcpy(path, folder, n), "/" FILE_PREFIX);
    strcpy(mempcpy(end, name, len), FILE_SUFFIX);
}

/* The file of the driver: 0 and its path, or -ENODEV, -EINVAL. That it cannot be reached is for dlopen() to say. */
static int find_file(const char *name, size_t len, char *path)
{
    const char *variable = secure_getenv(PATH_VARIABLE), *at = variable ? variable : "", *folder;
    for (size_t n; (n = next_folder(&at, &folder)) != 0;) {
        int r = check_folder(folder, n);
        if (r)
            return r;
        make_path(path, folder, n, name, len);
        if (access(path, F_OK) == 0 || (errno != ENOENT && errno != ENOTDIR))
            return 0;
    }
    if (!variable || !*variable)
        return hmm_fail(
            -ENODEV, "no driver is called '%.*s': `hmm devices` lists them, and " PATH_VARIABLE " can name folders with more",
            (int)len, name);
    return hmm_fail(-ENODEV,
                    "no driver is called '%.*s': there is no " FILE_PREFIX "%.*s" FILE_SUFFIX " in %s (" PATH_VARIABLE ")",
                    (int)len, name, (int)len, name, variable);
}

static bool is_name(const char *name, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (!strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-", name[i]))
            return false;
    return len > 0 && len <= NAME_MAX_LENGTH;
}

/* ---- all of them ---- */

static const struct hmm_driver *builtin(const char *name, size_t len)
{
    for (unsigned i = 0; hmm_builtin_drivers[i]; i++) {
        const struct hmm_driver *d = hmm_builtin_drivers[i];
        if (strlen(d->name) == len && !memcmp(d->name, name, len))
            return d;
    }
    return NULL;
}

static const struct loaded *find_loaded(const char *name, size_t len)
{
    for (unsigned i = 0; i < loaded.n; i++)
        if (strlen(loaded.all[i].driver.name) == len && !memcmp(loaded.all[i].driver.name, name, len))
            return &loaded.all[i];
    return NULL;
}

/* file: where it stands, or NULL: to be looked for. */
static int get_loaded(const char *name, size_t len, const char *file, const struct loaded **out)
{
    char path[PATH_BYTES];
    mutex_lock(&loaded.lock);
    *out = find_loaded(name, len);
    int r = *out || file ? 0 : find_file(name, len, path);
    if (!r && !*out)
        r = load(file ? file : path, name, len);
    if (!r && !*out)
        *out = &loaded.all[loaded.n - 1];
    mutex_unlock(&loaded.lock);
    return r;
}

int driver_by_name(const char *name, size_t len, const struct hmm_driver **driver)
{
    const struct hmm_driver *d = builtin(name, len);
    const struct loaded *l = NULL;
    if (!d && !is_name(name, len))
        return hmm_fail(-ENODEV, "no driver is called '%.*s': `hmm devices` lists them", (int)len, name);
    int r = d ? check_driver(d, name, len) : get_loaded(name, len, NULL, &l);
    if (!r)
        *driver = d ? d : &l->driver;
    return r;
}

int hmm_driver_find(const char *spec, const struct hmm_driver **driver, union hmm_option_value *values)
{
    message_clear();
    if (!driver || !values)
        return hmm_fail(-EINVAL, "hmm_driver_find: the place for the %s is NULL", driver ? "values" : "driver");
    return spec_parse(spec, driver, values);
}

/* ---- listing ---- */

static int is_driver_file(const struct dirent *e)
{
    size_t len = strlen(e->d_name), fixed = strlen(FILE_PREFIX) + strlen(FILE_SUFFIX);
    return len > fixed && !strncmp(e->d_name, FILE_PREFIX, strlen(FILE_PREFIX)) &&
           !strcmp(e->d_name + len - strlen(FILE_SUFFIX), FILE_SUFFIX) && is_name(e->d_name + strlen(FILE_PREFIX), len - fixed);
}

/* Loads what is not loaded yet. A name that another folder had first stays that one's. */
static void load_folder(const char *folder)
{
    struct dirent **files;
    const struct loaded *unused;
    char path[PATH_BYTES];
    int n = scandir(folder, &files, is_driver_file, alphasort);
    if (n < 0) {
        hmm_log(HMM_LOG_WARNING, PATH_VARIABLE ": %s cannot be read: %s", folder, strerrordesc_np(errno));
        return;
    }
    for (int i = 0; i < n; i++) {
        const char *name = files[i]->d_name + strlen(FILE_PREFIX);
        size_t len = strlen(name) - strlen(FILE_SUFFIX);
        make_path(path, folder, strlen(folder), name, len);
        if (!builtin(name, len) && get_loaded(name, len, path, &unused))
            hmm_log(HMM_LOG_WARNING, "%s", hmm_last_message());
        free(files[i]);
    }
    free(files);
}

static void load_all(void)
{
    const char *at = secure_getenv(PATH_VARIABLE), *folder;
    char path[FOLDER_BYTES];
    at = at ? at : "";
    for (size_t n; (n = next_folder(&at, &folder)) != 0;) {
        if (check_folder(folder, n)) {
            hmm_log(HMM_LOG_WARNING, "%s", hmm_last_message());
            continue;
        }
        snprintf(path, sizeof(path), "%.*s", (int)n, folder);
        load_folder(path);
    }
    message_clear();
}

void drivers_each(void (*fn)(const struct hmm_driver *driver, const char *origin, void *arg), void *arg)
{
    load_all();
    for (unsigned i = 0; hmm_builtin_drivers[i]; i++)
        fn(hmm_builtin_drivers[i], "built in", arg);
    mutex_lock(&loaded.lock);
    unsigned n = loaded.n;
    mutex_unlock(&loaded.lock);
    for (unsigned i = 0; i < n; i++)
        fn(&loaded.all[i].driver, loaded.all[i].path, arg);
}
