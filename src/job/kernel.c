/* SPDX-License-Identifier: MIT */
/*
 * Names of kernels: from object and symbol to the function, and from the function to object and symbol, so that engines elsewhere
 * can find it.
 *
 * What was found is kept for the life of the process, bounded: jobs point to it, and a launch costs a look into a table. Entries
 * and strings stand in mappings of the library, which no device takes. They are only added, published by a release store to the
 * head of their chain, so that a reader needs no lock. Nothing of the loader is called under a lock: it runs constructors.
 */
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <limits.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "job/job.h"
#include "os/own.h"

#define CHAINS 256
#define AREA_BYTES ((size_t)64 << 10)
#define AREAS_MAX 64 /* some thousands of kernels */

struct entry {
    struct entry *by_function, *by_name; /* next in the chain */
    hmm_kernel kernel;
    const char *given;  /* the object's name as the program gave it, or as the loader knows it */
    const char *object; /* its absolute path */
    const char *symbol;
};

static struct {
    struct mutex lock; /* RANK_QUEUE: writers */
    struct entry *by_function[CHAINS], *by_name[CHAINS];
    char *area; /* the last one */
    size_t used;
    unsigned areas;
} kernels = {.lock = MUTEX_INITIALIZER(RANK_QUEUE)};

void kernel_forget(void)
{
    memset(&kernels, 0, sizeof(kernels));
    mutex_init(&kernels.lock, RANK_QUEUE);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

static unsigned hash(const char *text, unsigned h)
{
    for (; *text; text++)
        h = (h ^ (unsigned char)*text) * 16777619u; /* FNV-1a */
    return h;
}

static struct entry **chain_of_function(hmm_kernel kernel)
{
    return &kernels.by_function[((uintptr_t)kernel >> 4) % CHAINS];
}

static struct entry **chain_of_name(const char *object, const char *symbol)
{
    return &kernels.by_name[hash(symbol, hash(object, 2166136261u)) % CHAINS];
}

static struct entry *find_function(hmm_kernel kernel)
{
    struct entry *e = __atomic_load_n(chain_of_function(kernel), __ATOMIC_ACQUIRE);
    while (e && e->kernel != kernel)
        e = e->by_function;
    return e;
}

static struct entry *find_name(const char *object, const char *symbol)
{
    struct entry *e = __atomic_load_n(chain_of_name(object, symbol), __ATOMIC_ACQUIRE);
    while (e && (strcmp(e->given, object) || strcmp(e->symbol, symbol)))
        e = e->by_name;
    return e;
}

/* Memory that stays. Caller holds the lock. NULL: no memory, or the bound is reached. */
static void *keep(size_t bytes)
{
    void *area;
    bytes = (bytes + 15) & ~(size_t)15;
    if (bytes > AREA_BYTES)
        return NULL;
    if (!kernels.area || kernels.used + bytes > AREA_BYTES) {
        if (kernels.areas == AREAS_MAX || own_map(AREA_BYTES, os_page_size(), 0, &area))
            return NULL;
        kernels.area = area;
        kernels.used = 0;
        kernels.areas++;
    }
    void *at = kernels.area + kernels.used;
    kernels.used += bytes;
    return at;
}

static char *put_string(char **at, const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *here = memcpy(*at, text, bytes);
    *at += bytes;
    return here;
}

static void publish(struct entry **chain, struct entry *e)
{
    __atomic_store_n(chain, e, __ATOMIC_RELEASE);
}

/* Caller holds the lock. */
static struct entry *add_locked(hmm_kernel kernel, const char *given, const char *object, const char *symbol)
{
    struct entry *e = find_name(given, symbol);
    if (e && e->kernel == kernel)
        return e;
    e = keep(sizeof(*e) + strlen(given) + strlen(object) + strlen(symbol) + 3);
    if (!e)
        return NULL;
    char *at = (char *)(e + 1);
    e->kernel = kernel;
    e->given = put_string(&at, given);
    e->object = put_string(&at, object);
    e->symbol = put_string(&at, symbol);
    struct entry **function = chain_of_function(kernel), **name = chain_of_name(given, symbol);
    e->by_function = *function;
    e->by_name = *name;
    publish(function, e);
    publish(name, e);
    return e;
}

static int add(hmm_kernel kernel, const char *given, const char *object, const char *symbol, struct entry **out)
{
    mutex_lock(&kernels.lock);
    *out = add_locked(kernel, given, object, symbol);
    mutex_unlock(&kernels.lock);
    return *out
               ? 0
               : hmm_fail(-ENOMEM, "kernel %s of %s: no room to keep its name: too many kernels, or no memory", symbol, object);
}

/* ---- from a function to its names -------------------------------------------------------------------------------- */

static int nameless(hmm_kernel kernel, const char *reason)
{
    return hmm_fail(-ENOEXEC,
                    "kernel %p %s, so the engines, which run elsewhere, cannot find it: put it in a shared object and begin it "
                    "with HMM_KERNEL",
                    (void *)kernel, reason);
}

/* The object and symbol that the loader knows for exactly this address. object: PATH_MAX bytes. */
static int look_up(hmm_kernel kernel, char *object, const char **symbol)
{
    Dl_info info;
    const ElfW(Sym) *sym = NULL;
    struct link_map *map = NULL;
    if (!dladdr1((void *)kernel, &info, (void **)&sym, RTLD_DL_SYMENT) || !info.dli_sname || !sym ||
        info.dli_saddr != (void *)kernel || ELF64_ST_BIND(sym->st_info) == STB_LOCAL)
        return nameless(kernel, "is no function that a shared object exports");
    if (!dladdr1((void *)kernel, &info, (void **)&map, RTLD_DL_LINKMAP) || !map || !map->l_name[0])
        return nameless(kernel, "is in the program itself");
    /* Stays loaded, too: its address must not become another object's, of which the table would say these names. */
    if (!realpath(map->l_name, object) || !dlopen(map->l_name, RTLD_LAZY | RTLD_NOLOAD))
        return nameless(kernel, "is in an object whose file is not there any more");
    *symbol = info.dli_sname;
    return 0;
}

static int name_function(struct hmm_launch *l)
{
    char object[PATH_MAX];
    const char *symbol = NULL;
    struct entry *e = find_function(l->kernel);
    if (!e) {
        int r = look_up(l->kernel, object, &symbol);
        if (!r)
            r = add(l->kernel, object, object, symbol, &e);
        if (r)
            return r;
    }
    l->object = e->object;
    l->symbol = e->symbol;
    return 0;
}

/* ---- from names to the function ---------------------------------------------------------------------------------- */

/* Whether dlopen() failed because there is no such file: of a path the system is asked; of a plain name, which is looked for in
 * many places, the loader's text must say it. */
static bool no_such_file(const char *object, const char *text)
{
    size_t n = strlen(object);
    if (strchr(object, '/'))
        return access(object, F_OK) != 0;
    return text && !strncmp(text, object, n) && strstr(text + n, "cannot open shared object file");
}

static int load(const char *object, const char *symbol, hmm_kernel *kernel)
{
    void *handle = dlopen(object, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        const char *text = dlerror();
        if (no_such_file(object, text))
            return hmm_fail(-ENOENT, "kernel %s: there is no object %s; give its path", symbol, object);
        return hmm_fail(-ENOEXEC, "kernel %s: its object cannot be loaded: %s", symbol, text ? text : object);
    }
    *kernel = (hmm_kernel)dlsym(handle, symbol);
    if (*kernel)
        return 0; /* it stays loaded */
    dlclose(handle);
    return hmm_fail(-ENOENT, "object %s exports no symbol %s; begin the kernel with HMM_KERNEL", object, symbol);
}

/* The path of the object that the function is in, or what was given. */
static void path_of(hmm_kernel kernel, const char *given, char *path)
{
    Dl_info info;
    struct link_map *map = NULL;
    if (dladdr1((void *)kernel, &info, (void **)&map, RTLD_DL_LINKMAP) && map && map->l_name[0] && realpath(map->l_name, path))
        return;
    snprintf(path, PATH_MAX, "%s", given);
}

static int find_by_names(struct hmm_launch *l)
{
    char path[PATH_MAX], full[PATH_MAX];
    const char *given = l->object;
    hmm_kernel kernel = NULL;
    struct entry *e = NULL;
    int r = 0;
    /* What a relative path means depends on the folder of the day. */
    if (given[0] != '/' && strchr(given, '/') && realpath(given, full))
        given = full;
    e = find_name(given, l->symbol);
    if (!e) {
        r = load(given, l->symbol, &kernel);
        if (!r) {
            path_of(kernel, given, path);
            r = add(kernel, given, path, l->symbol, &e);
        }
    }
    if (!r && l->kernel && l->kernel != e->kernel)
        r = hmm_fail(-EINVAL, "kernel %p is not %s of %s: give one of them", (void *)l->kernel, e->symbol, e->object);
    if (r)
        return r;
    l->kernel = e->kernel;
    l->object = e->object;
    l->symbol = e->symbol;
    return 0;
}

int kernel_resolve(struct hmm_launch *l, bool named)
{
    if (l->object)
        return find_by_names(l);
    return named ? name_function(l) : 0;
}
