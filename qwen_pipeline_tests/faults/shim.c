/* Faults at system calls on the files below a directory: preloaded into the process under test, and armed by it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL, FAIL_FROM, SHORT, SHORT_FROM, SIGNAL, CUT };
enum { OPEN = 1, READ = 2, WRITE = 4, SYNC = 8, NAME = 16 };

static char prefix[4096];
static size_t prefix_length;
static long nth = -1, count, fired;
static int mode, value, mask;
static unsigned char watched[65536];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(const char *below, long number, int kind, int argument, int operations) {
    strncpy(prefix, below, sizeof prefix - 1);
    prefix_length = strlen(prefix);
    nth = number, mode = kind, value = argument, mask = operations, count = fired = 0;
}
void fault_disarm(void) { nth = -1, prefix_length = 0; }
long fault_count(void) { return count; }
long fault_fired(void) { return fired; }

/* Returns 0 to go on, -1 to fail with errno, 1 to transfer half of the bytes, 2 to do so and die. */
static int strike(int operation) {
    if (!(operation & mask)) return 0;
    pthread_mutex_lock(&lock);
    long now = count++;
    int hits = nth >= 0 && (mode == FAIL_FROM || mode == SHORT_FROM ? now >= nth : now == nth);
    fired += hits;
    pthread_mutex_unlock(&lock);
    if (!hits) return 0;
    switch (mode) {
    case FAIL: case FAIL_FROM: errno = value; return -1;
    case SHORT: case SHORT_FROM: return 1;
    case CUT: if (operation & (READ | WRITE)) return 2; /* fall through */
    default: kill(getpid(), mode == CUT ? SIGKILL : value); return 0;
    }
}
static int below(const char *path) {
    return prefix_length && path && !strncmp(path, prefix, prefix_length);
}
static int is_watched(int fd) { return prefix_length && fd >= 0 && fd < (int)sizeof watched && watched[fd]; }
#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPENER(name, parameters, path, call, last) \
    int name parameters { \
        REAL(name); mode_t m = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, last); m = va_arg(list, mode_t); va_end(list); } \
        int found = below(path); \
        if (found && strike(OPEN) < 0) return -1; \
        int fd = call; \
        if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = found; \
        return fd; \
    }
OPENER(open, (const char *path, int flags, ...), path, real(path, flags, m), flags)
OPENER(open64, (const char *path, int flags, ...), path, real(path, flags, m), flags)
OPENER(openat, (int at, const char *path, int flags, ...), path, real(at, path, flags, m), flags)
OPENER(openat64, (int at, const char *path, int flags, ...), path, real(at, path, flags, m), flags)

#define TRANSFER(name, operation, parameters, whole, half, n) \
    ssize_t name parameters { \
        REAL(name); \
        if (!is_watched(fd)) return whole; \
        int found = strike(operation); \
        if (found < 0) return -1; \
        if (found == 0 || n < 2) { if (found == 2) kill(getpid(), SIGKILL); return whole; } \
        ssize_t done = half; \
        if (found == 2) kill(getpid(), SIGKILL); \
        return done; \
    }
TRANSFER(read, READ, (int fd, void *b, size_t n), real(fd, b, n), real(fd, b, n / 2), n)
TRANSFER(write, WRITE, (int fd, const void *b, size_t n), real(fd, b, n), real(fd, b, n / 2), n)
TRANSFER(pread, READ, (int fd, void *b, size_t n, off_t o), real(fd, b, n, o), real(fd, b, n / 2, o), n)
TRANSFER(pread64, READ, (int fd, void *b, size_t n, off64_t o), real(fd, b, n, o), real(fd, b, n / 2, o), n)
TRANSFER(pwrite, WRITE, (int fd, const void *b, size_t n, off_t o), real(fd, b, n, o), real(fd, b, n / 2, o), n)
TRANSFER(pwrite64, WRITE, (int fd, const void *b, size_t n, off64_t o), real(fd, b, n, o), real(fd, b, n / 2, o), n)
TRANSFER(preadv, READ, (int fd, const struct iovec *v, int n, off_t o), real(fd, v, n, o), real(fd, v, n / 2, o), n)
TRANSFER(preadv64, READ, (int fd, const struct iovec *v, int n, off64_t o), real(fd, v, n, o), real(fd, v, n / 2, o), n)
TRANSFER(pwritev, WRITE, (int fd, const struct iovec *v, int n, off_t o), real(fd, v, n, o), real(fd, v, n / 2, o), n)
TRANSFER(pwritev64, WRITE, (int fd, const struct iovec *v, int n, off64_t o), real(fd, v, n, o), real(fd, v, n / 2, o), n)

#define PLAIN(name, operation, parameters, matches, call) \
    int name parameters { REAL(name); if (matches && strike(operation) < 0) return -1; return call; }
PLAIN(fsync, SYNC, (int fd), is_watched(fd), real(fd))
PLAIN(fdatasync, SYNC, (int fd), is_watched(fd), real(fd))
PLAIN(rename, NAME, (const char *a, const char *b), below(a), real(a, b))
PLAIN(renameat, NAME, (int x, const char *a, int y, const char *b), below(a), real(x, a, y, b))
PLAIN(mkdir, NAME, (const char *a, mode_t m), below(a), real(a, m))
PLAIN(unlink, NAME, (const char *a), below(a), real(a))
PLAIN(ftruncate, WRITE, (int fd, off_t n), is_watched(fd), real(fd, n))
PLAIN(ftruncate64, WRITE, (int fd, off64_t n), is_watched(fd), real(fd, n))

int close(int fd) {
    REAL(close);
    if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = 0;
    return real(fd);
}
