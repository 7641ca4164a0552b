/* What a machine in trouble says to a process: preloaded (LD_PRELOAD), and steered by files in the folder $FAULTS.
 *
 *   disk   "28 poller.db": calls that change a file whose path has poller.db in it fail with error number 28
 *   dns    "-3 .test": names with .test in them are not resolved, and error -3 is answered
 *
 * A file that is absent or empty: nothing fails. Names that end in .test are this machine. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REAL(name) (*(__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* The fault of this kind that holds for the text, 0 for none. By system calls: what is preloaded is not asked. */
static int fault(const char *kind, const char *text) {
    char path[4096], line[4096], part[4096];
    int number = 0, saved = errno;
    const char *folder = getenv("FAULTS");
    if (!folder || !text) return 0;
    snprintf(path, sizeof path, "%s/%s", folder, kind);
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
        ssize_t length = syscall(SYS_read, file, line, sizeof line - 1);
        syscall(SYS_close, file);
        line[length > 0 ? length : 0] = 0;
        if (sscanf(line, "%d %4095s", &number, part) != 2 || !strstr(text, part)) number = 0;
    }
    errno = saved;
    return number;
}

static int file_fault(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    return fault("disk", path);
}

#define FAIL_FILE(file) do { int number = file_fault(file); if (number) { errno = number; return -1; } } while (0)

ssize_t write(int file, const void *data, size_t count) { FAIL_FILE(file); return REAL(write)(file, data, count); }
ssize_t pwrite(int file, const void *data, size_t count, off_t at) { FAIL_FILE(file); return REAL(pwrite)(file, data, count, at); }
ssize_t pwrite64(int file, const void *data, size_t count, off64_t at) { FAIL_FILE(file); return REAL(pwrite64)(file, data, count, at); }
int ftruncate(int file, off_t length) { FAIL_FILE(file); return REAL(ftruncate)(file, length); }
int ftruncate64(int file, off64_t length) { FAIL_FILE(file); return REAL(ftruncate64)(file, length); }
int fsync(int file) { FAIL_FILE(file); return REAL(fsync)(file); }
int fdatasync(int file) { FAIL_FILE(file); return REAL(fdatasync)(file); }

/* Of opening: on a full disk a file cannot be made, on a read-only one none can be opened to be written, on a broken one
 * none at all. */
static int open_fault(const char *path, int flags) {
    int number = fault("disk", path);
    if (number == EIO) return number;
    if (number == EROFS && (flags & O_ACCMODE) != O_RDONLY) return number;
    if (number && (flags & O_CREAT) && syscall(SYS_faccessat, AT_FDCWD, path, F_OK)) return number;
    return 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        int number = open_fault(path, flags); \
        if (number) { errno = number; return -1; } \
        return REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    int number = fault("dns", name);
    if (number) return number;
    size_t length = name ? strlen(name) : 0;
    if (length > 5 && !strcmp(name + length - 5, ".test")) name = "127.0.0.1";
    return REAL(getaddrinfo)(name, service, hints, found);
}
