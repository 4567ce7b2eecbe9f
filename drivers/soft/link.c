/* SPDX-License-Identifier: MIT */
/* Life of an engine process. See link.h. */
#include "link.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#define PROGRAM "hmm-soft-engine"
#define PATH_BYTES 4096
#define HELLO_MS 10000
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* ---- finding the program ----------------------------------------------------------------------------------------- */

/* The folder of the object that this code is in. A program that the library is linked into may have been started by a name without
 * a folder. */
static bool own_folder(char *folder, size_t size)
{
    Dl_info info;
    if (!dladdr((void *)own_folder, &info) || !info.dli_fname)
        return false;
    ssize_t n = -1;
    if (strchr(info.dli_fname, '/'))
        n = snprintf(folder, size, "%s", info.dli_fname);
    else
        n = readlink("/proc/self/exe", folder, size - 1);
    if (n <= 0 || (size_t)n >= size)
        return false;
    folder[n] = '\0';
    *strrchr(folder, '/') = '\0';
    return true;
}

static bool try_program(char *path, const char *folder, const char *below)
{
    size_t n = strlen(folder) + strlen(below) + sizeof("/" PROGRAM);
    if (n > PATH_BYTES)
        return false;
    snprintf(path, PATH_BYTES, "%s%s/" PROGRAM, folder, below);
    return access(path, X_OK) == 0;
}

static int find_program(char *path)
{
    const char *named = secure_getenv("HMM_SOFT_ENGINE");
    char folder[PATH_BYTES - sizeof(PROGRAM)];
    if (named && *named) {
        if (*named != '/' || strlen(named) >= PATH_BYTES)
            return hmm_fail(-ENOEXEC, "soft: HMM_SOFT_ENGINE is '%s', and must be the absolute path of " PROGRAM, named);
        if (access(named, X_OK))
            return hmm_fail(-ENOEXEC, "soft: HMM_SOFT_ENGINE names %s, which cannot be executed: %s", named,
                            errno == ENOENT ? "there is no such file" : "is it a program, and permitted?");
        strcpy(path, named);
        return 0;
    }
    bool here = own_folder(folder, sizeof(folder));
    if (here && (try_program(path, folder, "") || try_program(path, folder, "/libhmm")))
        return 0;
    if (try_program(path, HMM_LIBDIR, "/libhmm"))
        return 0;
    return hmm_fail(-ENOEXEC,
                    "soft: the program " PROGRAM " for isolated engines is neither in %s nor in its libhmm/, nor in "
                    "%s/libhmm: install it, or name it in HMM_SOFT_ENGINE",
                    here ? folder : "the library's folder", HMM_LIBDIR);
}

/* The program's environment as it is now, in our own memory: the strings may be on a device when the process is started. */
static int copy_environment(struct link *link)
{
    size_t n = 0, bytes = 0;
    for (char **e = environ; e && *e; e++, n++)
        bytes += strlen(*e) + 1;
    link->environment_bytes = (n + 1) * sizeof(char *) + bytes;
    link->environment = hmm_mem_alloc(link->environment_bytes);
    if (!link->environment)
        return hmm_fail(-ENOMEM, "soft: no memory for the environment of the engine process");
    char *at = (char *)(link->environment + n + 1), *end = (char *)link->environment + link->environment_bytes;
    for (size_t i = 0; i < n && environ[i]; i++) {
        size_t len = strlen(environ[i]) + 1;
        if (len > (size_t)(end - at))
            break;
        link->environment[i] = memcpy(at, environ[i], len);
        at += len;
    }
    return 0;
}

/* ---- killing ----------------------------------------------------------------------------------------------------- */

/* By those who come first. No stdio: CPU faults may wait for who calls this. */
static struct text begin_reason(struct link *link)
{
    struct text t = {.buf = link->reason, .size = sizeof(link->reason)};
    soft_text_str(&t, "the engine process (pid ");
    soft_text_dec(&t, (uint64_t)link->pid);
    soft_text_str(&t, ") ");
    return t;
}

static bool take_reason(struct link *link)
{
    return __atomic_exchange_n(&link->reason_taken, 1, __ATOMIC_SEQ_CST) == 0;
}

static void give_reason(struct link *link)
{
    __atomic_store_n(&link->reason_there, 1, __ATOMIC_RELEASE);
}

void soft_link_kill(struct link *link, const char *reason)
{
    if (take_reason(link)) {
        struct text t = begin_reason(link);
        soft_text_str(&t, "was killed: ");
        soft_text_str(&t, reason);
        give_reason(link);
    }
    syscall(SYS_pidfd_send_signal, link->pidfd, SIGKILL, NULL, 0);
}

const char *soft_link_reason(const struct link *link)
{
    return __atomic_load_n(&link->reason_there, __ATOMIC_ACQUIRE) ? link->reason : "the engine process ended";
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

/* What the library's headers do not have: how a process ended that is not our child (Linux 6.15). */
struct pidfd_exit {
    uint64_t mask, cgroup;
    uint32_t ids[11];
    int32_t exit_code;
};
_Static_assert(sizeof(struct pidfd_exit) == 64, "struct pidfd_info as it was first");
#define PIDFD_EXIT _IOWR(0xff, 11, struct pidfd_exit)
#define PIDFD_EXIT_KNOWN (1ull << 3)

/* Of a process that whoever adopted it has not waited for: the last field of its line in /proc. */
static bool zombie_exit_code(int pid, int *code)
{
    char path[32], text[1024];
    struct text t = {.buf = path, .size = sizeof(path)};
    soft_text_str(&t, "/proc/");
    soft_text_dec(&t, (uint64_t)pid);
    soft_text_str(&t, "/stat");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = '\0';
    const char *state = strrchr(text, ')'), *last = strrchr(text, ' ');
    if (!state || state[1] != ' ' || state[2] != 'Z')
        return false;
    *code = atoi(last + 1);
    return true;
}

/* It has been waited for, or it has not: one of the two knows. */
static bool exit_code(const struct link *link, int *code)
{
    struct pidfd_exit info = {.mask = PIDFD_EXIT_KNOWN};
    if (zombie_exit_code(link->pid, code))
        return true;
    if (ioctl(link->pidfd, PIDFD_EXIT, &info) || !(info.mask & PIDFD_EXIT_KNOWN))
        return false;
    *code = info.exit_code;
    return true;
}

static void describe_end(struct link *link)
{
    int code;
    if (!take_reason(link))
        return;
    struct text t = begin_reason(link);
    bool known = exit_code(link, &code);
    soft_text_str(&t, !known ? "ended" : code & 0x7f ? "was killed by signal " : "exited with ");
    if (known)
        soft_text_dec(&t, (uint64_t)(code & 0x7f ? code & 0x7f : code >> 8 & 0xff));
    give_reason(link);
}

/* Everybody who waits for an answer looks at `gone` after he said that he waits. */
static void wake_all(struct link *link)
{
    struct channels *c = link->channels;
    for (unsigned i = 0; i < link->engines; i++) {
        __atomic_store_n(&c->engines[i].turn, TURN_GONE, __ATOMIC_SEQ_CST);
        channel_futex_wake(&c->engines[i].turn);
    }
    for (unsigned i = 0; i < CHANNEL_SLOTS; i++) {
        __atomic_store_n(&c->slots[i].state, SLOT_QUIET, __ATOMIC_SEQ_CST);
        channel_futex_wake(&c->slots[i].state);
    }
    __atomic_fetch_add(&link->slot_freed, 1, __ATOMIC_SEQ_CST);
    soft_futex_wake(&link->slot_freed);
    soft_futex_wake(&link->gone);
}

static int wait_readable(int fd, int fd2, int timeout_ms)
{
    struct pollfd p[2] = {{.fd = fd, .events = POLLIN}, {.fd = fd2, .events = POLLIN}};
    struct timespec t = {.tv_sec = timeout_ms / 1000, .tv_nsec = timeout_ms % 1000 * 1000000L};
    int n = ppoll(p, fd2 < 0 ? 1 : 2, timeout_ms < 0 ? NULL : &t, NULL);
    return n <= 0 ? 0 : (p[0].revents ? 1 : 0) | (p[1].revents ? 2 : 0);
}

/* The process descriptor is readable when the last thread has ended; the socket ends a moment before. */
static void wait_for_end(struct link *link)
{
    if (wait_readable(link->pidfd, link->socket, -1) & 1 || wait_readable(link->pidfd, -1, LINK_PATIENCE_MS))
        return;
    soft_link_kill(link, "it broke the silence of its socket, or closed it");
    while (!wait_readable(link->pidfd, -1, -1))
        ;
}

/* Death by our own wish has no news for core. */
static void watch(struct link *link)
{
    wait_for_end(link);
    if (!__atomic_load_n(&link->closing, __ATOMIC_SEQ_CST))
        describe_end(link);
    __atomic_store_n(&link->gone, 1, __ATOMIC_SEQ_CST);
    wake_all(link);
    uint32_t before = __atomic_exchange_n(&link->state, LINK_GONE, __ATOMIC_SEQ_CST);
    if (before == LINK_OPEN && !__atomic_load_n(&link->closing, __ATOMIC_SEQ_CST))
        hmm_device_lost(link->soft->dev, HMM_LOST_ENGINES, soft_link_reason(link));
    while (!__atomic_load_n(&link->released, __ATOMIC_SEQ_CST))
        soft_futex_wait(&link->released, 0, 60000);
}

/* ---- the beginning ----------------------------------------------------------------------------------------------- */

static int make_channels(struct link *link)
{
    link->bytes = channels_bytes(link->engines);
    link->channel_fd = memfd_create("hmm-soft-channel", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (link->channel_fd < 0)
        return -errno;
    if (ftruncate(link->channel_fd, (off_t)link->bytes) || fcntl(link->channel_fd, F_ADD_SEALS, SEALS))
        return -errno;
    void *map = mmap(NULL, link->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, link->channel_fd, 0);
    if (map == MAP_FAILED)
        return -errno;
    link->channels = map;
    if (madvise(map, link->bytes, MADV_DONTFORK))
        return -errno;
    /* A page that does not exist yet may be refused later, as a SIGBUS. The areas of kernels come into being when they are used. */
    link->channels->magic = CHANNEL_MAGIC;
    link->channels->version = CHANNEL_VERSION;
    link->channels->layout = CHANNEL_LAYOUT;
    link->channels->memory_bytes = link->soft->memory.bytes;
    link->channels->page_shift = link->soft->memory.page_shift;
    link->channels->nengines = link->engines;
    return madvise(map, link->bytes, MADV_POPULATE_WRITE) ? -errno : 0;
}

static int start_process(struct link *link)
{
    char owner[16], what[80];
    int ends[2];
    snprintf(owner, sizeof(owner), "%d", getpid());
    snprintf(what, sizeof(what), "memory=%lluK,engines=%u", (unsigned long long)link->soft->memory.bytes >> 10, link->engines);
    char *argv[] = {PROGRAM, owner, what, NULL};
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return hmm_fail(-errno, "soft: no socket for the engine process: %s", hmm_strerror(-errno));
    struct spawn spawn = {
        .path = link->path,
        .argv = argv,
        .envp = link->environment,
        .fds = {ends[1], link->memory_fd, link->channel_fd, hmm_event_gate_fd(link->soft->dev)},
    };
    int r = soft_spawn(&spawn);
    close(ends[1]);
    if (r) {
        close(ends[0]);
        return hmm_fail(r == -ENOMEM || r == -EAGAIN || r == -EMFILE ? r : -ENOEXEC, "soft: %s cannot be executed (errno %d)",
                        link->path, -r);
    }
    link->socket = ends[0];
    link->pidfd = spawn.pidfd;
    link->pid = spawn.pid;
    return 0;
}

static void kill_and_wait(struct link *link)
{
    syscall(SYS_pidfd_send_signal, link->pidfd, SIGKILL, NULL, 0);
    while (!(wait_readable(link->pidfd, -1, -1) & 1))
        ;
}

/* One message, or the end. */
static int hear_hello(struct link *link)
{
    struct hello hello = {.magic = 0};
    int ready = wait_readable(link->pidfd, link->socket, HELLO_MS);
    ssize_t n = ready & 2 ? recv(link->socket, &hello, sizeof(hello), MSG_DONTWAIT) : 0;
    hello.message[sizeof(hello.message) - 1] = '\0';
    if (!ready)
        return hmm_fail(-ENOEXEC, "soft: %s said nothing for %d seconds; is it the right program?", link->path,
                        HELLO_MS / 1000);
    if (n <= 0)
        return hmm_fail(-ENOEXEC, "soft: %s ended at once; is it the right program?", link->path);
    if (n != sizeof(hello) || hello.magic != CHANNEL_MAGIC || hello.version != CHANNEL_VERSION)
        return hmm_fail(-ENOEXEC, "soft: %s is of another version than the library; install both together", link->path);
    if (hello.status)
        return hmm_fail(hello.status == -ENOMEM ? -ENOMEM : -ENOEXEC, "soft: %s cannot start: %s", link->path, hello.message);
    return 0;
}

static void close_all(struct link *link)
{
    int *fds[] = {&link->memory_fd, &link->channel_fd, &link->socket, &link->pidfd};
    for (unsigned i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (*fds[i] >= 0)
            close(*fds[i]);
        *fds[i] = -1;
    }
}

/* Message set on failure, of this thread. */
static int set_up(struct link *link)
{
    int r = soft_memory_init(&link->soft->memory, link->memory_bytes, &link->memory_fd);
    if (r)
        return r;
    r = make_channels(link);
    if (r)
        return hmm_fail(r, "soft: no memory for the channel to the engine process: %s", hmm_strerror(r));
    r = start_process(link);
    if (r)
        return r;
    r = hear_hello(link);
    if (r)
        kill_and_wait(link);
    return r;
}

static void set_state(struct link *link, enum link_state state)
{
    __atomic_store_n(&link->state, state, __ATOMIC_SEQ_CST);
    soft_futex_wake(&link->state);
}

static void watcher(void *arg)
{
    struct link *link = arg;
    link->result = set_up(link);
    if (link->result) {
        strncpy(link->reason, hmm_last_message(), sizeof(link->reason) - 1);
        set_state(link, LINK_FAILED);
    } else {
        set_state(link, LINK_UP);
        watch(link);
    }
    close_all(link);
}

/* ---- for the program's threads ----------------------------------------------------------------------------------- */

static void free_link(struct soft *s)
{
    struct link *link = s->link;
    if (link->watcher)
        hmm_thread_join(link->watcher);
    if (link->channels)
        munmap(link->channels, link->bytes);
    if (s->memory.map)
        soft_memory_exit(&s->memory);
    hmm_mem_free(link->environment, link->environment_bytes);
    hmm_mem_free(link, sizeof(*link));
    s->link = NULL;
}

static int start_watcher(struct soft *s)
{
    struct link *link = s->link;
    int r = hmm_thread_start(&link->watcher, "hmm-soft-link", watcher, link);
    if (r)
        return hmm_fail(r, "soft: the thread that starts the engine process cannot be started (%s)", hmm_strerror(r));
    while (__atomic_load_n(&link->state, __ATOMIC_SEQ_CST) == LINK_STARTING)
        soft_futex_wait(&link->state, LINK_STARTING, 1000);
    return link->result ? hmm_fail(link->result, "%s", link->reason) : 0;
}

int soft_link_open(struct soft *s, uint64_t memory_bytes, unsigned engines)
{
    char path[PATH_BYTES];
    int r = find_program(path);
    if (r)
        return r;
    struct link *link = hmm_mem_alloc(sizeof(*link));
    if (!link)
        return hmm_fail(-ENOMEM, "soft: no memory for the engine process");
    *link = (struct link){
        .soft = s,
        .path = path,
        .memory_bytes = memory_bytes,
        .engines = engines,
        .memory_fd = -1,
        .channel_fd = -1,
        .socket = -1,
        .pidfd = -1,
    };
    s->link = link;
    r = copy_environment(link);
    if (!r)
        r = start_watcher(s);
    link->path = NULL; /* only while it starts */
    if (r)
        free_link(s);
    return r;
}

int soft_link_opened(struct link *link)
{
    uint32_t up = LINK_UP;
    if (__atomic_compare_exchange_n(&link->state, &up, LINK_OPEN, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return 0;
    return hmm_fail(-ENODEV, "soft: %s", soft_link_reason(link));
}

static void kill_in_library_thread(void *arg)
{
    soft_link_kill(arg, "it did not end when it was asked to");
}

/* A process that is stopped, or that a kernel has broken, does not hear us. */
static void kill_from_here(struct link *link)
{
    struct hmm_thread *killer;
    if (hmm_thread_start(&killer, "hmm-soft-kill", kill_in_library_thread, link) == 0)
        hmm_thread_join(killer);
}

void soft_link_close(struct soft *s)
{
    struct link *link = s->link;
    uint64_t until = soft_now_ms() + LINK_PATIENCE_MS;
    __atomic_store_n(&link->closing, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&link->channels->leave, 1, __ATOMIC_SEQ_CST);
    soft_link_ring(link);
    while (!soft_link_gone(link)) {
        if (soft_now_ms() > until)
            kill_from_here(link);
        soft_futex_wait(&link->gone, 0, 200);
    }
    __atomic_store_n(&link->released, 1, __ATOMIC_SEQ_CST);
    soft_futex_wake(&link->released);
    free_link(s);
}
