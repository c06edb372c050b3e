/* Makes the calls by which a process changes a disk or talks to a server fail, or be its last ones.

   Loaded with LD_PRELOAD. A process arms itself (`faults_arm`), or is armed by its environment:

     FAULTS_ROOT    only files below this folder count
     FAULTS_PORTS   and connections to these ports: "mlflow=5000,mongo=27017"
     FAULTS_TRACE   a file that gets the name of each such call, a line each
     FAULTS_NAME    only calls of this name count, e.g. "rename:zip"; empty for all
     FAULTS_AT      the number of the call that the fault comes at, from 1
     FAULTS_CLOCK   a file that holds by how many seconds the clock is wrong
     FAULTS_ACTION  before | after (SIGKILL), tear (half of a write, then SIGKILL), short (half of a write),
                    fail (with FAULTS_ERRNO), fail-on (that one and all later ones) */
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
#include <time.h>
#include <unistd.h>

enum action { NONE, BEFORE, AFTER, TEAR, SHORT, FAIL, FAIL_ON };

static char root[PATH_MAX], ports[256], trace_path[PATH_MAX], wanted[128];
static long at, seen;
static enum action action;
static int failure, linkless;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static enum action parse(const char *text) {
    static const char *names[] = {"", "before", "after", "tear", "short", "fail", "fail-on"};
    for (int i = BEFORE; i <= FAIL_ON; i++)
        if (text && !strcmp(text, names[i])) return (enum action)i;
    return NONE;
}

/* Counts from now on. An empty `root_` disarms. */
void faults_arm(const char *root_, const char *ports_, const char *trace_, const char *name_, long at_,
                const char *action_, int errno_) {
    pthread_mutex_lock(&lock);
    snprintf(root, sizeof root, "%s", root_);
    snprintf(ports, sizeof ports, "%s", ports_);
    snprintf(trace_path, sizeof trace_path, "%s", trace_);
    snprintf(wanted, sizeof wanted, "%s", name_);
    at = at_, seen = 0, action = parse(action_), failure = errno_;
    pthread_mutex_unlock(&lock);
}

/* Whether hard links are refused, as on a file system that has none. */
void faults_forbid_links(int forbidden) { linkless = forbidden; }

/* Whether the call came that the fault is put into. */
int faults_came(void) { return at > 0 && seen >= at; }

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

__attribute__((constructor)) static void from_environment(void) {
    if (*setting("FAULTS_ROOT"))
        faults_arm(setting("FAULTS_ROOT"), setting("FAULTS_PORTS"), setting("FAULTS_TRACE"), setting("FAULTS_NAME"),
                   atol(setting("FAULTS_AT")), setting("FAULTS_ACTION"), atoi(setting("FAULTS_ERRNO")));
}

static int ends(const char *text, const char *end) {
    size_t a = strlen(text), b = strlen(end);
    return a >= b && !strcmp(text + a - b, end);
}

static const char *role(const char *path, int folder) {
    const char *base = strrchr(path, '/');
    base = base ? base + 1 : path;
    if (strstr(path, "/artifacts/")) return folder ? "artifact-folder" : ends(base, ".json") ? "artifact-metadata" : "artifact";
    if (folder) return ends(path, "/replay") ? "chunk-folder" : "folder";
    if (ends(base, ".zst")) return "chunk";
    if (ends(base, "_metadata.json")) return "metadata";
    if (ends(base, ".zip")) return "zip";
    if (ends(base, "run.json")) return "record";
    if (ends(base, "metrics.jsonl")) return "curve";
    if (ends(base, "checkpoints.jsonl")) return "ledger";
    if (!strcmp(base, ".lock")) return "lock";
    if (ends(base, ".pin")) return "pin";
    if (ends(base, ".lease")) return "lease";
    if (strstr(base, ".db")) return "database";
    return "other";
}

static void die(void) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); for (;;) pause(); }

/* Returns what is to happen at this call. `what` is its name. */
static enum action met(const char *what) {
    enum action now = NONE;
    pthread_mutex_lock(&lock);
    if (!*wanted || !strcmp(wanted, what)) {
        seen++;
        if (*trace_path) {
            char line[160];
            int length = snprintf(line, sizeof line, "%s\n", what);
            int file = (int)syscall(SYS_openat, AT_FDCWD, trace_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
            if (file >= 0) {
                syscall(SYS_write, file, line, (size_t)length);
                syscall(SYS_close, file);
            }
        }
        if (seen == at || (seen > at && at > 0 && action == FAIL_ON)) now = action;
    }
    pthread_mutex_unlock(&lock);
    if (now == BEFORE) die();
    return now;
}

static enum action met_path(const char *operation, int dir, const char *path, int folder) {
    char whole[2 * PATH_MAX], what[128];
    if (!*root || !path) return NONE;
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        char place[64], base[PATH_MAX];
        if (dir == AT_FDCWD) {
            if (syscall(SYS_getcwd, base, sizeof base) < 0) return NONE;
        } else {
            snprintf(place, sizeof place, "/proc/self/fd/%d", dir);
            ssize_t length = readlink(place, base, sizeof base - 1);
            if (length < 0) return NONE;
            base[length] = 0;
        }
        snprintf(whole, sizeof whole, "%s/%s", base, path);
    }
    size_t length = strlen(root);
    if (strncmp(whole, root, length) || (whole[length] && whole[length] != '/')) return NONE;
    const char *base = strrchr(whole, '/');
    /* A checkpoint is withdrawn by giving its metadata a temporary name. */
    if (!strcmp(operation, "rename") && base && !strncmp(base + 1, ".tmp-", 5)) operation = "withdraw";
    snprintf(what, sizeof what, "%s:%s", operation, role(whole, folder));
    return met(what);
}

static enum action met_file(const char *operation, int file) {
    char place[64], path[PATH_MAX];
    struct stat found;
    if (!*root) return NONE;
    snprintf(place, sizeof place, "/proc/self/fd/%d", file);
    ssize_t length = readlink(place, path, sizeof path - 1);
    if (length <= 0 || path[0] != '/') return NONE;
    path[length] = 0;
    return met_path(operation, AT_FDCWD, path, fstat(file, &found) == 0 && S_ISDIR(found.st_mode));
}

static enum action met_port(const char *operation, const struct sockaddr *address) {
    if (!*ports || !address || address->sa_family != AF_INET) return NONE;
    char number[16], list[256], what[128], *rest;
    snprintf(number, sizeof number, "%d", ntohs(((const struct sockaddr_in *)address)->sin_port));
    snprintf(list, sizeof list, "%s", ports);
    for (char *entry = strtok_r(list, ",", &rest); entry; entry = strtok_r(NULL, ",", &rest)) {
        char *sign = strchr(entry, '=');
        if (sign && !strcmp(sign + 1, number)) {
            *sign = 0;
            snprintf(what, sizeof what, "%s:%s", operation, entry);
            return met(what);
        }
    }
    return NONE;
}

static enum action met_socket(const char *operation, int file) {
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    if (!*ports || getpeername(file, (struct sockaddr *)&address, &size)) return NONE;
    return met_port(operation, (struct sockaddr *)&address);
}

/* Around a call that does all or nothing. */
#define WHOLE(met_, call) \
    do { \
        enum action now = met_; \
        if (now == FAIL || now == FAIL_ON) { errno = failure; return -1; } \
        __typeof__(call) result = call; \
        if (now == AFTER || now == TEAR) die(); \
        return result; \
    } while (0)

/* Around a call that may move only a part of its bytes. */
#define PARTS(met_, count_, whole, half) \
    do { \
        enum action now = met_; \
        if (now == FAIL || now == FAIL_ON) { errno = failure; return -1; } \
        ssize_t result = (now == TEAR || now == SHORT) && (count_) > 1 ? half : whole; \
        if (now == AFTER || now == TEAR) die(); \
        return result; \
    } while (0)

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

#define OPEN(name, dir_, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            mode = va_arg(more, mode_t); \
            va_end(more); \
        } \
        WHOLE(changes(flags) ? met_path("open", dir_, path, 0) : NONE, real arguments); \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, dir, (int dir, const char *path, int flags, ...), (dir, path, flags, mode))
OPEN(openat64, dir, (int dir, const char *path, int flags, ...), (dir, path, flags, mode))

ssize_t write(int file, const void *bytes, size_t count) {
    REAL(write);
    PARTS(met_file("write", file), count, real(file, bytes, count), real(file, bytes, count / 2));
}
ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t offset) {
    REAL(pwrite64);
    PARTS(met_file("write", file), count, real(file, bytes, count, offset), real(file, bytes, count / 2, offset));
}
ssize_t pwrite(int file, const void *bytes, size_t count, off_t offset) {
    REAL(pwrite);
    PARTS(met_file("write", file), count, real(file, bytes, count, offset), real(file, bytes, count / 2, offset));
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    PARTS(met_file("write", file), count, real(file, parts, count), real(file, parts, count / 2));
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t count) {
    REAL(sendfile64);
    PARTS(met_file("write", to), count, real(to, from, offset, count), real(to, from, offset, 100));
}
ssize_t sendfile(int to, int from, off_t *offset, size_t count) {
    REAL(sendfile);
    PARTS(met_file("write", to), count, real(to, from, offset, count), real(to, from, offset, 100));
}
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t count, unsigned flags) {
    REAL(copy_file_range);
    PARTS(met_file("write", to), count, real(from, a, to, b, count, flags), real(from, a, to, b, 100, flags));
}
int fsync(int file) { REAL(fsync); WHOLE(met_file("fsync", file), real(file)); }
int fdatasync(int file) { REAL(fdatasync); WHOLE(met_file("fsync", file), real(file)); }
int ftruncate(int file, off_t size) { REAL(ftruncate); WHOLE(met_file("truncate", file), real(file, size)); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); WHOLE(met_file("truncate", file), real(file, size)); }
int rename(const char *from, const char *to) {
    REAL(rename);
    WHOLE(met_path("rename", AT_FDCWD, to, 0), real(from, to));
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    WHOLE(met_path("rename", b, to, 0), real(a, from, b, to));
}
int unlink(const char *path) { REAL(unlink); WHOLE(met_path("unlink", AT_FDCWD, path, 0), real(path)); }
int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat);
    WHOLE(met_path("unlink", dir, path, (flags & AT_REMOVEDIR) != 0), real(dir, path, flags));
}
int rmdir(const char *path) { REAL(rmdir); WHOLE(met_path("unlink", AT_FDCWD, path, 1), real(path)); }
int link(const char *from, const char *to) {
    REAL(link);
    if (linkless) { errno = EXDEV; return -1; }
    WHOLE(met_path("link", AT_FDCWD, to, 0), real(from, to));
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat);
    if (linkless) { errno = EXDEV; return -1; }
    WHOLE(met_path("link", b, to, 0), real(a, from, b, to, flags));
}
int symlink(const char *from, const char *to) { REAL(symlink); WHOLE(met_path("link", AT_FDCWD, to, 0), real(from, to)); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); WHOLE(met_path("mkdir", AT_FDCWD, path, 1), real(path, mode)); }
int mkdirat(int dir, const char *path, mode_t mode) {
    REAL(mkdirat);
    WHOLE(met_path("mkdir", dir, path, 1), real(dir, path, mode));
}
int connect(int file, const struct sockaddr *address, socklen_t size) {
    REAL(connect);
    WHOLE(met_port("connect", address), real(file, address, size));
}
ssize_t send(int file, const void *bytes, size_t count, int flags) {
    REAL(send);
    PARTS(met_socket("send", file), count, real(file, bytes, count, flags), real(file, bytes, count / 2, flags));
}
ssize_t sendto(int file, const void *bytes, size_t count, int flags, const struct sockaddr *to, socklen_t size) {
    REAL(sendto);
    PARTS(met_socket("send", file), count, real(file, bytes, count, flags, to, size),
          real(file, bytes, count / 2, flags, to, size));
}
ssize_t sendmsg(int file, const struct msghdr *message, int flags) {
    REAL(sendmsg);
    WHOLE(met_socket("send", file), real(file, message, flags));
}
ssize_t recv(int file, void *bytes, size_t count, int flags) {
    REAL(recv);
    WHOLE(met_socket("receive", file), real(file, bytes, count, flags));
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    const char *path = clock == CLOCK_REALTIME ? getenv("FAULTS_CLOCK") : NULL;
    if (path && !result) {
        char text[32] = "";
        int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
        if (file >= 0) {
            if (syscall(SYS_read, file, text, sizeof text - 1) > 0) now->tv_sec += atol(text);
            syscall(SYS_close, file);
        }
    }
    return result;
}
