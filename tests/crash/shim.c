/* Counts the calls by which a process changes files below a directory, and makes one of them fail, or kills the process at it.
 *
 * Preloaded (LD_PRELOAD) into a program that is under test; `shim.py` builds it and says what the variables mean. Only calls that
 * go from one library to another can be seen: those that libc makes inside of itself (fwrite) cannot, fopen excepted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PASS = 0, KILL = -1, KILL_AFTER = -2, SHORT = -3, SHORT_KILL = -4 }; /* what else to do is an errno */

static char root[PATH_MAX];
static size_t root_length; /* 0: see nothing */
static long at;
static int todo, stay, log_file = -1;
static atomic_long count;

/* Read the environment again, and begin to count anew: a process that was forked calls it. */
__attribute__((constructor)) void hydra_pipe_shim_begin(void) {
    static const struct { const char *name; int todo; } known[] = {
        {"kill", KILL}, {"kill-after", KILL_AFTER}, {"short", SHORT}, {"short-kill", SHORT_KILL}, {"enospc", ENOSPC}, {"eio", EIO}};
    const char *value = getenv("HYDRA_PIPE_SHIM_ROOT");
    snprintf(root, sizeof root, "%s", value ? value : "");
    value = getenv("HYDRA_PIPE_SHIM_AT");
    at = value ? atol(value) : 0;
    value = getenv("HYDRA_PIPE_SHIM_DO");
    todo = PASS;
    for (size_t i = 0; value && i < sizeof known / sizeof *known; i++)
        if (!strcmp(value, known[i].name)) todo = known[i].todo;
    stay = getenv("HYDRA_PIPE_SHIM_STAY") != NULL;
    value = getenv("HYDRA_PIPE_SHIM_LOG");
    if (log_file >= 0) syscall(SYS_close, log_file);
    log_file = value ? (int)syscall(SYS_openat, AT_FDCWD, value, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    count = 0;
    root_length = strlen(root);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* The path of an open file, or "" if it has none. */
static void path_of(int file, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = 0;
}

/* `path`, relative to `directory`, in full. */
static void full(int directory, const char *path, char *out) {
    char base[PATH_MAX] = "";
    if (path[0] != '/') {
        if (directory == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) base[0] = 0;
        } else
            path_of(directory, base);
    }
    if (snprintf(out, PATH_MAX, base[0] ? "%s/%s" : "%s%s", base, path) >= PATH_MAX) out[0] = 0;
}

static int is_below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* Count a call on `path` (and `to`), note it, and say what is to become of it. */
static int counted(const char *name, const char *path, const char *to) {
    if (!is_below(path) && !(to && is_below(to))) return PASS;
    long number = atomic_fetch_add(&count, 1) + 1;
    if (log_file >= 0) {
        char line[2 * PATH_MAX + 64];
        int n = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", number, name, path, to ? to : "");
        syscall(SYS_write, log_file, line, n);
    }
    /* on a full disk that stays full, what needs no room goes on */
    int needs_room = strcmp(name, "unlink") && strcmp(name, "rmdir") && strcmp(name, "rename");
    if (!at || (number != at && !(stay && number > at && needs_room))) return PASS;
    if (todo == KILL) die();
    return todo;
}

static int counted_fd(const char *name, int file) {
    char path[PATH_MAX];
    if (!root_length) return PASS;
    int before = errno;
    path_of(file, path);
    errno = before;
    return counted(name, path, NULL);
}

static int counted_at(const char *name, int directory, const char *path) {
    char whole[PATH_MAX];
    if (!root_length) return PASS;
    full(directory, path, whole);
    return counted(name, whole, NULL);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* The call itself, or its failure, or the end before or after it. */
#define ACT(type, what, failed, call) do { \
        int act_ = (what); \
        if (act_ > 0) { errno = act_; return failed; } \
        if (act_ == SHORT_KILL) die(); \
        type result_ = (call); \
        if (act_ == KILL_AFTER) die(); \
        return result_; \
    } while (0)

/* The same of what writes `n` bytes, of which it may write `half` by the call `part`. */
#define ACT_WRITE(what, n, call, part) do { \
        int act_ = (what); \
        if (act_ > 0) { errno = act_; return -1; } \
        ssize_t result_ = (act_ == SHORT || act_ == SHORT_KILL) && (n) > 1 ? (part) : (call); \
        if (act_ == KILL_AFTER || act_ == SHORT_KILL) die(); \
        return result_; \
    } while (0)

#define MAKES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        ACT(int, MAKES(flags) ? counted_at("open", AT_FDCWD, path) : PASS, -1, real(path, flags, mode)); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        ACT(int, MAKES(flags) ? counted_at("open", directory, path) : PASS, -1, real(directory, path, flags, mode)); \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name) \
    int name(const char *path, mode_t mode) { \
        REAL(name); \
        ACT(int, counted_at("open", AT_FDCWD, path), -1, real(path, mode)); \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        int makes = mode[0] != 'r' || strchr(mode, '+'); \
        ACT(FILE *, makes ? counted_at("open", AT_FDCWD, path) : PASS, NULL, real(path, mode)); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *bytes, size_t n) {
    REAL(write);
    ACT_WRITE(counted_fd("write", file), n, real(file, bytes, n), real(file, bytes, n / 2));
}

ssize_t writev(int file, const struct iovec *parts, int n_parts) {
    REAL(writev);
    struct iovec half = n_parts > 0 ? parts[0] : (struct iovec){0};
    size_t n = n_parts > 1 ? 2 : half.iov_len;
    half.iov_len = (half.iov_len + 1) / 2;
    ACT_WRITE(counted_fd("writev", file), n, real(file, parts, n_parts), real(file, &half, 1));
}

ssize_t pwrite(int file, const void *bytes, size_t n, off_t place) {
    REAL(pwrite);
    ACT_WRITE(counted_fd("pwrite", file), n, real(file, bytes, n, place), real(file, bytes, n / 2, place));
}

ssize_t pwrite64(int file, const void *bytes, size_t n, off64_t place) {
    REAL(pwrite64);
    ACT_WRITE(counted_fd("pwrite", file), n, real(file, bytes, n, place), real(file, bytes, n / 2, place));
}

int fsync(int file) {
    REAL(fsync);
    ACT(int, counted_fd("fsync", file), -1, real(file));
}

int fdatasync(int file) {
    REAL(fdatasync);
    ACT(int, counted_fd("fdatasync", file), -1, real(file));
}

int ftruncate(int file, off_t length) {
    REAL(ftruncate);
    ACT(int, counted_fd("ftruncate", file), -1, real(file, length));
}

int ftruncate64(int file, off64_t length) {
    REAL(ftruncate64);
    ACT(int, counted_fd("ftruncate", file), -1, real(file, length));
}

static int counted_rename(int from_directory, const char *from, int to_directory, const char *to) {
    char whole_from[PATH_MAX], whole_to[PATH_MAX];
    if (!root_length) return PASS;
    full(from_directory, from, whole_from);
    full(to_directory, to, whole_to);
    return counted("rename", whole_from, whole_to);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    ACT(int, counted_rename(AT_FDCWD, from, AT_FDCWD, to), -1, real(from, to));
}

int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    REAL(renameat);
    ACT(int, counted_rename(from_directory, from, to_directory, to), -1, real(from_directory, from, to_directory, to));
}

int renameat2(int from_directory, const char *from, int to_directory, const char *to, unsigned int flags) {
    REAL(renameat2);
    ACT(int, counted_rename(from_directory, from, to_directory, to), -1, real(from_directory, from, to_directory, to, flags));
}

int unlink(const char *path) {
    REAL(unlink);
    ACT(int, counted_at("unlink", AT_FDCWD, path), -1, real(path));
}

int rmdir(const char *path) {
    REAL(rmdir);
    ACT(int, counted_at("rmdir", AT_FDCWD, path), -1, real(path));
}

int unlinkat(int directory, const char *path, int flags) {
    REAL(unlinkat);
    ACT(int, counted_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, path), -1, real(directory, path, flags));
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    ACT(int, counted_at("mkdir", AT_FDCWD, path), -1, real(path, mode));
}

int mkdirat(int directory, const char *path, mode_t mode) {
    REAL(mkdirat);
    ACT(int, counted_at("mkdir", directory, path), -1, real(directory, path, mode));
}
