/* Makes libc's calls that change a disk or talk to a server fail, tear or kill the process: real errors for real
 * processes. Loaded by LD_PRELOAD; does nothing until it is told a folder or a port.
 *
 * A call is known by a named point: its operation and the role of its file, as in `rename:zip` or `fsync:metadata`.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { PASS, KILL_BEFORE, KILL_AFTER, TEAR, FAIL, SHORT };
enum { RULES = 4, PORTS = 4, NAME = 96 };

struct rule {
    char name[NAME]; /* empty: every point but those that only read */
    long nth, met;
    int action, error, forever;
};
struct decision {
    int action, error;
};

static char root[PATH_MAX];
static int trace_fd = -1, rules, ports;
static struct rule rule[RULES];
static struct { int number; char role[32]; } port[PORTS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* ---- what the outside tells ---- */

void injector_watch(const char *folder, int trace)
{
    snprintf(root, sizeof root, "%s", folder);
    trace_fd = trace;
}

void injector_port(int number, const char *role)
{
    if (ports < PORTS) {
        port[ports].number = number;
        snprintf(port[ports++].role, sizeof port[0].role, "%s", role);
    }
}

void injector_rule(const char *name, long nth, int action, int error, int forever)
{
    if (rules < RULES) {
        struct rule *r = &rule[rules++];
        snprintf(r->name, sizeof r->name, "%s", name);
        r->nth = nth;
        r->met = 0;
        r->action = action;
        r->error = error;
        r->forever = forever;
    }
}

void injector_reset(void)
{
    rules = ports = 0;
    root[0] = 0;
    trace_fd = -1;
}

__attribute__((constructor)) static void from_environment(void)
{
    const char *folder = getenv("INJECTOR_ROOT"), *trace = getenv("INJECTOR_TRACE"), *text = getenv("INJECTOR_RULE");
    if (!folder)
        return;
    int fd = trace ? (int)syscall(SYS_openat, AT_FDCWD, trace, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    injector_watch(folder, fd);
    /* action,errno,forever,nth,name */
    int action, error, forever;
    long nth;
    char name[NAME] = "";
    if (text && sscanf(text, "%d,%d,%d,%ld,%95s", &action, &error, &forever, &nth, name) >= 4)
        injector_rule(name, nth, action, error, forever);
}

/* ---- naming ---- */

static int below_root(const char *path)
{
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int absolute(int folder, const char *path, char *out)
{
    char prefix[PATH_MAX] = "", link[64];
    if (path[0] != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(prefix, sizeof prefix))
                return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, prefix, sizeof prefix - 1);
            if (n < 0)
                return 0;
            prefix[n] = 0;
        }
    }
    return snprintf(out, PATH_MAX, "%s%s%s", prefix, prefix[0] ? "/" : "", path) < PATH_MAX;
}

static int of_descriptor(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n <= 0 || out[0] != '/')
        return 0;
    out[n] = 0;
    return 1;
}

static int ends(const char *text, const char *with)
{
    size_t a = strlen(text), b = strlen(with);
    return a >= b && !strcmp(text + a - b, with);
}

static int is_temporary(const char *path)
{
    const char *base = strrchr(path, '/');
    return base && !strncmp(base + 1, ".tmp-", 5);
}

static const char *role_of(const char *path, int is_folder, char *out)
{
    const char *base = strrchr(path, '/') + 1, *role = "other";
    if (!strncmp(base, ".tmp-", 5)) { /* .tmp-<pid>-<token>-<name> */
        const char *dash = strchr(base + 5, '-');
        dash = dash ? strchr(dash + 1, '-') : NULL;
        base = dash ? dash + 1 : base;
    }
    if (is_folder)
        role = !strcmp(base, "replay") ? "replay-folder" : "folder";
    else if (!strcmp(base, "run.json"))
        role = "record";
    else if (!strcmp(base, "metrics.jsonl"))
        role = "metrics";
    else if (!strcmp(base, "checkpoints.jsonl"))
        role = "ledger";
    else if (!strcmp(base, ".lock"))
        role = "lock";
    else if (ends(base, "_metadata.json"))
        role = "metadata";
    else if (!strncmp(base, "ep", 2) && ends(base, ".zip"))
        role = "zip";
    else if (ends(base, ".zst"))
        role = "replay-chunk";
    else if (strstr(base, ".db"))
        role = "database";
    else if (base[0] == '#' || ends(path, " (deleted)"))
        role = "probe";
    snprintf(out, NAME, "%s%s", strstr(path, "/artifacts/") ? "artifact-" : "", role);
    return out;
}

/* ---- deciding ---- */

static void die(void)
{
    syscall(SYS_kill, (pid_t)syscall(SYS_getpid), SIGKILL);
    for (;;)
        pause();
}

static struct decision meet(const char *name, const char *path, int reads)
{
    struct decision d = {PASS, 0};
    int before = errno;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < rules; i++) {
        struct rule *r = &rule[i];
        if (r->name[0] ? strcmp(r->name, name) != 0 : reads)
            continue;
        r->met++;
        if (d.action == PASS && (r->met == r->nth || (r->forever && r->met > r->nth))) {
            d.action = r->action;
            d.error = r->error;
        }
    }
    if (trace_fd >= 0 && (!reads || d.action != PASS)) {
        char line[PATH_MAX + 2 * NAME];
        int n = snprintf(line, sizeof line, "%s\t%d\t%d\t%s\n", name, d.action, d.error, path);
        syscall(SYS_write, trace_fd, line, n);
    }
    pthread_mutex_unlock(&mutex);
    if (d.action == KILL_BEFORE)
        die();
    errno = before;
    return d;
}

static struct decision meet_path(const char *operation, int folder, const char *path, int is_folder)
{
    char whole[PATH_MAX], role[NAME], name[NAME];
    struct decision none = {PASS, 0};
    if (!root[0] || !path || !absolute(folder, path, whole) || !below_root(whole))
        return none;
    role_of(whole, is_folder, role);
    if (!strcmp(operation, "unlink") && is_temporary(whole))
        snprintf(role, sizeof role, "temporary");
    snprintf(name, sizeof name, "%.24s:%.64s", operation, role);
    return meet(name, whole, 0);
}

static struct decision meet_rename(int from_folder, const char *from, int folder, const char *path)
{
    char whole[PATH_MAX], source[PATH_MAX], role[NAME], name[NAME];
    struct decision none = {PASS, 0};
    if (!root[0] || !absolute(folder, path, whole) || !below_root(whole) || !absolute(from_folder, from, source))
        return none;
    /* A name taken away: a committed file becomes a temporary. */
    const char *operation = is_temporary(whole) && !is_temporary(source) ? "withdraw" : "rename";
    snprintf(name, sizeof name, "%s:%.64s", operation, role_of(whole, 0, role));
    return meet(name, source, 0);
}

static struct decision meet_descriptor(const char *operation, int fd, int reads)
{
    char whole[PATH_MAX], role[NAME], name[NAME];
    struct decision none = {PASS, 0};
    struct stat status;
    int before = errno;
    if (!root[0] || fd == trace_fd || !of_descriptor(fd, whole) || !below_root(whole) || fstat(fd, &status)) {
        errno = before;
        return none;
    }
    errno = before;
    if (!strcmp(operation, "write") && (fcntl(fd, F_GETFL) & O_APPEND))
        operation = "append";
    snprintf(name, sizeof name, "%.24s:%.64s", operation, role_of(whole, S_ISDIR(status.st_mode), role));
    return meet(name, whole, reads);
}

static struct decision meet_address(const char *operation, const struct sockaddr *address)
{
    struct decision none = {PASS, 0};
    char name[NAME];
    int number = address->sa_family == AF_INET    ? ntohs(((const struct sockaddr_in *)address)->sin_port)
                 : address->sa_family == AF_INET6 ? ntohs(((const struct sockaddr_in6 *)address)->sin6_port)
                                                  : -1;
    for (int i = 0; i < ports; i++)
        if (port[i].number == number) {
            snprintf(name, sizeof name, "%s:%s", operation, port[i].role);
            return meet(name, "", 0);
        }
    return none;
}

static struct decision meet_socket(const char *operation, int fd)
{
    struct decision none = {PASS, 0};
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    int before = errno;
    if (!ports || getpeername(fd, (struct sockaddr *)&address, &length)) {
        errno = before;
        return none;
    }
    return meet_address(operation, (struct sockaddr *)&address);
}

/* ---- the calls ---- */

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) \
        real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define REFUSE(d) \
    if ((d).action == FAIL) { \
        errno = (d).error; \
        return -1; \
    }
#define GIVE(type, d, call) \
    REFUSE(d) \
    type result = call; \
    if ((d).action == KILL_AFTER || (d).action == TEAR) \
        die(); \
    return result

#define OPEN(name, folder_parameter, folder_argument, folder) \
    int name(folder_parameter const char *path, int flags, ...) \
    { \
        REAL(int, name, folder_parameter const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list list; \
            va_start(list, flags); \
            mode = va_arg(list, mode_t); \
            va_end(list); \
        } \
        int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); \
        int temporary = (flags & O_TMPFILE) == O_TMPFILE; \
        struct decision d = {PASS, 0}; \
        if (writes) \
            d = meet_path(temporary ? "probe" : "open", folder, path, temporary); \
        else if (root[0]) { \
            char whole[PATH_MAX], role[NAME], point[NAME]; \
            struct stat status; \
            if (absolute(folder, path, whole) && below_root(whole) && !stat(whole, &status) && S_ISREG(status.st_mode)) { \
                snprintf(point, sizeof point, "open-to-read:%.64s", role_of(whole, 0, role)); \
                d = meet(point, whole, 1); \
            } \
        } \
        GIVE(int, d, real(folder_argument path, flags, mode)); \
    }
#define COMMA ,
OPEN(open, , , AT_FDCWD)
OPEN(open64, , , AT_FDCWD)
OPEN(openat, int folder COMMA, folder COMMA, folder)
OPEN(openat64, int folder COMMA, folder COMMA, folder)

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define WRITE(type, name, operation, parameters, types, all, half, fd, size) \
    type name parameters \
    { \
        REAL(type, name, types); \
        struct decision d = meet_descriptor(operation, fd, 0); \
        if (d.action == TEAR) { \
            if ((size) > 1) \
                real half; \
            die(); \
        } \
        if (d.action == SHORT && (size) > 1) \
            return real half; \
        GIVE(type, d, real all); \
    }
#define TYPES(...) __VA_ARGS__
WRITE(ssize_t, write, "write", (int fd, const void *bytes, size_t size), TYPES(int, const void *, size_t),
      (fd, bytes, size), (fd, bytes, size / 2), fd, size)
WRITE(ssize_t, pwrite, "write", (int fd, const void *bytes, size_t size, off_t at),
      TYPES(int, const void *, size_t, off_t), (fd, bytes, size, at), (fd, bytes, size / 2, at), fd, size)
WRITE(ssize_t, pwrite64, "write", (int fd, const void *bytes, size_t size, off64_t at),
      TYPES(int, const void *, size_t, off64_t), (fd, bytes, size, at), (fd, bytes, size / 2, at), fd, size)
WRITE(ssize_t, writev, "write", (int fd, const struct iovec *parts, int count),
      TYPES(int, const struct iovec *, int), (fd, parts, count), (fd, parts, 1), fd, count)
WRITE(ssize_t, sendfile, "write", (int fd, int from, off_t *at, size_t size), TYPES(int, int, off_t *, size_t),
      (fd, from, at, size), (fd, from, at, size > 64 ? 64 : size / 2), fd, size)
WRITE(ssize_t, sendfile64, "write", (int fd, int from, off64_t *at, size_t size), TYPES(int, int, off64_t *, size_t),
      (fd, from, at, size), (fd, from, at, size > 64 ? 64 : size / 2), fd, size)
WRITE(ssize_t, copy_file_range, "write",
      (int from, off64_t *from_at, int fd, off64_t *at, size_t size, unsigned flags),
      TYPES(int, off64_t *, int, off64_t *, size_t, unsigned), (from, from_at, fd, at, size, flags),
      (from, from_at, fd, at, size > 64 ? 64 : size / 2, flags), fd, size)

ssize_t read(int fd, void *bytes, size_t size)
{
    REAL(ssize_t, read, int, void *, size_t);
    struct decision d = meet_descriptor("read", fd, 1);
    if (d.action == SHORT && size > 1)
        return real(fd, bytes, size / 2);
    GIVE(ssize_t, d, real(fd, bytes, size));
}

#define ON_DESCRIPTOR(name, operation, parameters, types, arguments) \
    int name parameters \
    { \
        REAL(int, name, types); \
        struct decision d = meet_descriptor(operation, fd, 0); \
        GIVE(int, d, real arguments); \
    }
ON_DESCRIPTOR(fsync, "fsync", (int fd), TYPES(int), (fd))
ON_DESCRIPTOR(fdatasync, "fsync", (int fd), TYPES(int), (fd))
ON_DESCRIPTOR(ftruncate, "truncate", (int fd, off_t size), TYPES(int, off_t), (fd, size))
ON_DESCRIPTOR(ftruncate64, "truncate", (int fd, off64_t size), TYPES(int, off64_t), (fd, size))

int close(int fd)
{
    REAL(int, close, int);
    struct decision d = {PASS, 0};
    int before = errno;
    if (root[0] && fd != trace_fd && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY)
        d = meet_descriptor("close", fd, 0);
    errno = before;
    int result = real(fd); /* Linux frees the descriptor whatever close() says. */
    if (d.action == KILL_AFTER || d.action == TEAR)
        die();
    REFUSE(d)
    return result;
}

#define ON_PATH(name, operation, parameters, types, arguments, folder, path, is_folder) \
    int name parameters \
    { \
        REAL(int, name, types); \
        struct decision d = meet_path(operation, folder, path, is_folder); \
        GIVE(int, d, real arguments); \
    }
ON_PATH(unlink, "unlink", (const char *path), TYPES(const char *), (path), AT_FDCWD, path, 0)
ON_PATH(unlinkat, "unlink", (int folder, const char *path, int flags), TYPES(int, const char *, int),
        (folder, path, flags), folder, path, 0)
ON_PATH(rmdir, "rmdir", (const char *path), TYPES(const char *), (path), AT_FDCWD, path, 1)
ON_PATH(mkdir, "mkdir", (const char *path, mode_t mode), TYPES(const char *, mode_t), (path, mode), AT_FDCWD, path, 1)
ON_PATH(mkdirat, "mkdir", (int folder, const char *path, mode_t mode), TYPES(int, const char *, mode_t),
        (folder, path, mode), folder, path, 1)
ON_PATH(link, "link", (const char *from, const char *path), TYPES(const char *, const char *), (from, path), AT_FDCWD,
        path, 0)
ON_PATH(linkat, "link", (int from_folder, const char *from, int folder, const char *path, int flags),
        TYPES(int, const char *, int, const char *, int), (from_folder, from, folder, path, flags), folder, path, 0)
ON_PATH(symlink, "symlink", (const char *from, const char *path), TYPES(const char *, const char *), (from, path),
        AT_FDCWD, path, 0)

#define RENAME(name, parameters, types, arguments, from_folder, folder) \
    int name parameters \
    { \
        REAL(int, name, types); \
        struct decision d = meet_rename(from_folder, from, folder, path); \
        GIVE(int, d, real arguments); \
    }
RENAME(rename, (const char *from, const char *path), TYPES(const char *, const char *), (from, path), AT_FDCWD,
       AT_FDCWD)
RENAME(renameat, (int a, const char *from, int b, const char *path), TYPES(int, const char *, int, const char *),
       (a, from, b, path), a, b)
RENAME(renameat2, (int a, const char *from, int b, const char *path, unsigned flags),
       TYPES(int, const char *, int, const char *, unsigned), (a, from, b, path, flags), a, b)

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
    REAL(int, connect, int, const struct sockaddr *, socklen_t);
    struct decision d = meet_address("connect", address);
    GIVE(int, d, real(fd, address, length));
}

#define ON_SOCKET(name, operation, parameters, types, arguments) \
    ssize_t name parameters \
    { \
        REAL(ssize_t, name, types); \
        struct decision d = meet_socket(operation, fd); \
        GIVE(ssize_t, d, real arguments); \
    }
ssize_t send(int fd, const void *bytes, size_t size, int flags)
{
    REAL(ssize_t, send, int, const void *, size_t, int);
    struct decision d = meet_socket("send", fd);
    if (d.action == TEAR) {
        real(fd, bytes, size / 2, flags);
        die();
    }
    if (d.action == SHORT && size > 1)
        return real(fd, bytes, size / 2, flags);
    GIVE(ssize_t, d, real(fd, bytes, size, flags));
}
ON_SOCKET(sendto, "send",
          (int fd, const void *bytes, size_t size, int flags, const struct sockaddr *address, socklen_t length),
          TYPES(int, const void *, size_t, int, const struct sockaddr *, socklen_t),
          (fd, bytes, size, flags, address, length))
ON_SOCKET(sendmsg, "send", (int fd, const struct msghdr *message, int flags),
          TYPES(int, const struct msghdr *, int), (fd, message, flags))
ON_SOCKET(recv, "recv", (int fd, void *bytes, size_t size, int flags), TYPES(int, void *, size_t, int),
          (fd, bytes, size, flags))
