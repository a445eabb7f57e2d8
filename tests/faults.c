/*
 * A library for LD_PRELOAD that lets chosen system calls fail, fall short or hang. It reads the environment at every
 * call, so that a test can switch a fault on in the middle of an epoch:
 *
 *   FAULT_CALL     pread (preadv, too), open, sendfile, pthread_create or memfd_create
 *   FAULT_PATH     part of the path of the file that is concerned; not for the last two calls
 *   FAULT_KIND     a number of errno, "short" or "hang"
 *   FAULT_SKIP     let so many calls pass first, in each process
 *   FAULT_TIMES    how often, in each process; default: always
 *   FAULT_UNTIL_OPENED  fail until the file was opened so often since the fault was switched on
 *   FAULT_SECONDS  how long a call hangs; it goes on as soon as FAULT_KIND is another one
 *   FAULT_NO_RING  io_uring is not allowed, as in many containers: then reads are calls of pread and preadv
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_int n_done, n_opened, n_skipped;

static const char *get(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

static int is_named(const char *path) {
    const char *wanted = get("FAULT_PATH");
    return wanted && path && strstr(path, wanted) != NULL;
}

static int is_open_on(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return is_named(path);
}

/* What to do instead of a call: 0 nothing, -1 fail with errno, 1 fall short. */
static int decide(const char *call) {
    const char *wanted = get("FAULT_CALL"), *kind = get("FAULT_KIND");
    if (!wanted || !kind || strcmp(wanted, call)) return 0;
    const char *opened = get("FAULT_UNTIL_OPENED"), *times = get("FAULT_TIMES"), *skip = get("FAULT_SKIP");
    if (opened && atomic_load(&n_opened) >= atoi(opened)) return 0;
    if (skip && atomic_fetch_add(&n_skipped, 1) < atoi(skip)) return 0;
    if (times && atomic_fetch_add(&n_done, 1) >= atoi(times)) return 0;
    if (!strcmp(kind, "short")) return 1;
    if (!strcmp(kind, "hang")) {
        const char *seconds = get("FAULT_SECONDS");
        const struct timespec step = {0, 10000000};
        for (long left = 100 * (seconds ? atol(seconds) : 3600); left > 0; left--) {
            const char *now = get("FAULT_KIND");
            if (!now || strcmp(now, "hang")) break;
            nanosleep(&step, NULL);
        }
        return 0;
    }
    errno = atoi(kind);
    return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static ssize_t faulty_preadv(int fd, const struct iovec *vectors, int n, off_t offset) {
    int what = get("FAULT_CALL") && is_open_on(fd) ? decide("pread") : 0;
    if (what < 0) return -1;
    if (what > 0) {
        struct iovec first = {vectors[0].iov_base, vectors[0].iov_len / 2 + 1};
        return REAL(preadv)(fd, &first, 1, offset);
    }
    return REAL(preadv)(fd, vectors, n, offset);
}

ssize_t preadv(int fd, const struct iovec *vectors, int n, off_t offset) {
    return faulty_preadv(fd, vectors, n, offset);
}

ssize_t preadv64(int fd, const struct iovec *vectors, int n, off64_t offset) {
    return faulty_preadv(fd, vectors, n, offset);
}

static ssize_t faulty_pread(int fd, void *buffer, size_t n, off_t offset) {
    int what = get("FAULT_CALL") && is_open_on(fd) ? decide("pread") : 0;
    if (what < 0) return -1;
    return REAL(pread)(fd, buffer, what > 0 ? n / 2 + 1 : n, offset);
}

ssize_t pread(int fd, void *buffer, size_t n, off_t offset) { return faulty_pread(fd, buffer, n, offset); }

ssize_t pread64(int fd, void *buffer, size_t n, off64_t offset) { return faulty_pread(fd, buffer, n, offset); }

static int faulty_open(int directory, const char *path, int flags, mode_t mode) {
    if (get("FAULT_CALL") && is_named(path)) {
        atomic_fetch_add(&n_opened, 1);
        if (decide("open") < 0) return -1;
    }
    return REAL(openat)(directory, path, flags, mode);
}

#define MODE                                                   \
    mode_t mode = 0;                                           \
    if (flags & (O_CREAT | O_TMPFILE)) {                       \
        va_list rest;                                          \
        va_start(rest, flags);                                 \
        mode = va_arg(rest, mode_t);                           \
        va_end(rest);                                          \
    }

int open(const char *path, int flags, ...) { MODE return faulty_open(AT_FDCWD, path, flags, mode); }

int open64(const char *path, int flags, ...) { MODE return faulty_open(AT_FDCWD, path, flags | O_LARGEFILE, mode); }

int openat(int directory, const char *path, int flags, ...) { MODE return faulty_open(directory, path, flags, mode); }

int openat64(int directory, const char *path, int flags, ...) {
    MODE return faulty_open(directory, path, flags | O_LARGEFILE, mode);
}

static ssize_t faulty_sendfile(int to, int from, off_t *offset, size_t n) {
    if (get("FAULT_CALL") && is_open_on(from) && decide("sendfile") < 0) return -1;
    ssize_t (*real)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile");
    return real(to, from, offset, n);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t n) { return faulty_sendfile(to, from, offset, n); }

ssize_t sendfile64(int to, int from, off64_t *offset, size_t n) { return faulty_sendfile(to, from, offset, n); }

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg) {
    if (decide("pthread_create") < 0) return errno;
    return REAL(pthread_create)(thread, attr, run, arg);
}

long syscall(long number, ...) {
    long args[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) args[i] = va_arg(rest, long);
    va_end(rest);
    if (number == 425 && get("FAULT_NO_RING")) { /* io_uring_setup */
        errno = EPERM;
        return -1;
    }
    return REAL(syscall)(number, args[0], args[1], args[2], args[3], args[4], args[5]);
}

int memfd_create(const char *name, unsigned flags) {
    if (decide("memfd_create") < 0) return -1;
    return REAL(memfd_create)(name, flags);
}
