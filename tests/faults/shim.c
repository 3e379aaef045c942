/* A disk that fails on demand: a library to preload, which does nothing until it is told to.
 *
 *   fail_at(folder, kind, nth, error, lasting)   the nth call of a kind below `folder` fails with errno `error`, those
 *                                                after it too where `lasting`
 *   fail_after(folder, bytes, error)             so many bytes can be written below `folder`; the write that reaches
 *                                                the limit is cut short there, the next one fails
 *   disarm()
 *   calls(kind), bytes()                         what was done below `folder` since it was armed
 *
 * error 0 kills the process instead (SIGKILL), in the middle of whatever it writes. Kinds: open (also to read), write
 * (and truncate), fsync, rename, mkdir.
 *
 * It stands in for libc's functions, which is what CPython and Rust's standard library call. One call of a save goes
 * past it: the safetensors library renames its own temporary file by a system call of its own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, MKDIR, KINDS };

static char below[PATH_MAX];
static size_t length; /* of `below`; 0 is inert */
static int failing = -1, failure, lasts;
static long first, room = -1, made[KINDS], written;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void disarm(void) {
    length = 0;
    failing = -1;
    room = -1;
}

static void arm(const char *folder) {
    disarm();
    memset(made, 0, sizeof made);
    written = 0;
    length = strlen(strncpy(below, folder, PATH_MAX - 1));
}

void fail_at(const char *folder, int kind, long nth, int error, int lasting) {
    arm(folder);
    failing = kind, first = nth, failure = error, lasts = lasting;
}

void fail_after(const char *folder, long bytes, int error) {
    arm(folder);
    room = bytes, failure = error;
}

long calls(int kind) { return made[kind]; }
long bytes(void) { return written; }

static int is_below(const char *path) {
    return !strncmp(path, below, length) && (path[length] == '/' || !path[length]);
}

/* Whether `path`, seen from the folder that `link` points to, is one of ours. An empty path is that file itself. */
static int seen_from(const char *link, const char *path) {
    char whole[2 * PATH_MAX + 2];
    int before = errno;
    ssize_t end = readlink(link, whole, PATH_MAX);
    errno = before;
    if (end < 0 || strlen(path) > PATH_MAX) return 0;
    sprintf(whole + end, "%s%s", *path ? "/" : "", path);
    return is_below(whole);
}

static int open_file(int descriptor) {
    char link[40];
    if (!length) return 0;
    sprintf(link, "/proc/self/fd/%d", descriptor);
    return seen_from(link, "");
}

static int path_at(int folder, const char *path) {
    char link[40] = "/proc/self/cwd";
    if (!length || !path) return 0;
    if (*path == '/') return is_below(path);
    if (folder != AT_FDCWD) sprintf(link, "/proc/self/fd/%d", folder);
    return seen_from(link, path);
}

static int fail(void) {
    if (!failure) kill(getpid(), SIGKILL);
    errno = failure;
    return 1;
}

/* Count a call below the folder; whether it is to fail. */
static int fails(int kind) {
    long number = ++made[kind];
    return kind == failing && (number == first || (lasts && number > first)) && fail();
}

/* -1 where a write is to fail, else how many of `count` bytes go through. */
static ssize_t allowed(int descriptor, size_t count) {
    if (!open_file(descriptor)) return count;
    if (fails(WRITE)) return -1;
    if (room >= 0 && count > (size_t)room) {
        if (!room && fail()) return -1;
        count = room;
    }
    if (room >= 0) room -= count;
    written += count;
    return count;
}

ssize_t write(int descriptor, const void *data, size_t count) {
    ssize_t part = allowed(descriptor, count);
    return part < 0 ? -1 : REAL(write)(descriptor, data, part);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    if (!open_file(descriptor)) return REAL(writev)(descriptor, parts, count);
    while (count > 1 && !parts->iov_len) parts++, count--;
    return write(descriptor, parts->iov_base, parts->iov_len); /* a short write, which any caller must expect */
}

#define PWRITE(name, offset)                                                                                           \
    ssize_t name(int descriptor, const void *data, size_t count, offset at) {                                          \
        ssize_t part = allowed(descriptor, count);                                                                     \
        return part < 0 ? -1 : REAL(name)(descriptor, data, part, at);                                                 \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define ON_FILE(name, kind, parameters, ...)                                                                           \
    int name parameters { return open_file(descriptor) && fails(kind) ? -1 : REAL(name)(__VA_ARGS__); }
ON_FILE(fsync, FSYNC, (int descriptor), descriptor)
ON_FILE(fdatasync, FSYNC, (int descriptor), descriptor)
ON_FILE(ftruncate, WRITE, (int descriptor, off_t size), descriptor, size)
ON_FILE(ftruncate64, WRITE, (int descriptor, off64_t size), descriptor, size)

#define ON_PATH(name, kind, folder, path, parameters, ...)                                                             \
    int name parameters { return path_at(folder, path) && fails(kind) ? -1 : REAL(name)(__VA_ARGS__); }
ON_PATH(mkdir, MKDIR, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, MKDIR, folder, path, (int folder, const char *path, mode_t mode), folder, path, mode)
ON_PATH(rename, RENAME, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(renameat, RENAME, there, to, (int here, const char *from, int there, const char *to), here, from, there, to)
ON_PATH(creat, OPEN, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH(creat64, OPEN, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)

#define OPENS(name, folder, parameters, ...)                                                                           \
    int name parameters {                                                                                              \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return path_at(folder, path) && fails(OPEN) ? -1 : REAL(name)(__VA_ARGS__, mode);                              \
    }
OPENS(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPENS(openat, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
OPENS(openat64, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
