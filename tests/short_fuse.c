// A file system that shows the files of one directory, past the page cache, and answers every read short.
// It speaks the kernel's protocol itself, so that nothing but a compiler is needed.
// Arguments: the directory, and where it is mounted. It ends when it is unmounted.
// With a third one, a file, answers are whole, and it says how they come, also later on: "hang NAME" for never where
// the name of the file that is read has NAME in it, "slow MICROSECONDS" for so much later, one after the other.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_FILES 256
#define MOST 4096

static char names[MAX_FILES][256];
static int n_files, device;
static const char *source, *control;

static void answer(const struct fuse_in_header *in, int error, const void *data, size_t size) {
    static char out[1 << 20];
    struct fuse_out_header header = {sizeof header + size, error, in->unique};
    memcpy(out, &header, sizeof header);
    memcpy(out + sizeof header, data, size);
    if (write(device, out, header.len) < 0 && errno != ENOENT) exit(3);
}

// Node 1 is the directory; file i is node i + 2.
static int describe(unsigned long node, struct fuse_attr *attr) {
    char path[4096];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", source, node == 1 ? "." : names[node - 2]);
    if (stat(path, &st)) return -errno;
    memset(attr, 0, sizeof *attr);
    attr->ino = node;
    attr->size = st.st_size;
    attr->mode = st.st_mode;
    attr->nlink = 1;
    attr->mtime = st.st_mtim.tv_sec;
    attr->mtimensec = st.st_mtim.tv_nsec;
    attr->blksize = 4096;
    return 0;
}

static void serve(struct fuse_in_header *in, char *body) {
    static char data[1 << 19];
    int code = 0;
    switch (in->opcode) {
    case FUSE_INIT: {
        struct fuse_init_in *asked = (void *)body;
        struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION};
        out.max_readahead = asked->max_readahead;
        out.flags = FUSE_ASYNC_READ;
        out.flags &= asked->flags;
        out.max_write = 1 << 17;
        out.max_background = 64;
        out.congestion_threshold = 48;
        answer(in, 0, &out, sizeof out);
        break;
    }
    case FUSE_LOOKUP: {
        struct fuse_entry_out out = {0};
        code = -ENOENT;
        for (int i = 0; i < n_files; i++)
            if (!strcmp(names[i], body)) {
                out.nodeid = i + 2;
                code = describe(i + 2, &out.attr);
            }
        answer(in, code, &out, code ? 0 : sizeof out);
        break;
    }
    case FUSE_GETATTR: {
        struct fuse_attr_out out = {0};
        code = describe(in->nodeid, &out.attr);
        answer(in, code, &out, code ? 0 : sizeof out);
        break;
    }
    case FUSE_OPEN: {
        char path[4096];
        struct fuse_open_out out = {0};
        snprintf(path, sizeof path, "%s/%s", source, names[in->nodeid - 2]);
        int fd = open(path, O_RDONLY);
        out.fh = fd;
        out.open_flags = FOPEN_DIRECT_IO;
        answer(in, fd < 0 ? -errno : 0, &out, fd < 0 ? 0 : sizeof out);
        break;
    }
    case FUSE_READ: {
        struct fuse_read_in *asked = (void *)body;
        size_t most = control ? sizeof data : MOST, size = asked->size > most ? most : asked->size;
        char how[16] = "", what[256] = "";
        FILE *file = control ? fopen(control, "r") : NULL;
        if (file) {
            if (fscanf(file, "%15s %255s", how, what) < 2) how[0] = 0;
            fclose(file);
        }
        if (!strcmp(how, "hang") && strstr(names[in->nodeid - 2], what)) break;
        if (!strcmp(how, "slow")) usleep(atoi(what));
        ssize_t n = pread(asked->fh, data, size, asked->offset);
        answer(in, n < 0 ? -errno : 0, data, n < 0 ? 0 : n);
        break;
    }
    case FUSE_RELEASE:
        close(((struct fuse_release_in *)body)->fh);
        answer(in, 0, data, 0);
        break;
    case FUSE_OPENDIR: {
        struct fuse_open_out out = {0};
        answer(in, 0, &out, sizeof out);
        break;
    }
    case FUSE_READDIR: {
        struct fuse_read_in *asked = (void *)body;
        size_t size = 0;
        for (int i = asked->offset; i < n_files; i++) {
            struct fuse_dirent *entry = (void *)(data + size);
            size_t length = strlen(names[i]);
            if (size + FUSE_NAME_OFFSET + length + 8 > asked->size) break;
            memset(entry, 0, FUSE_NAME_OFFSET + length + 8);
            entry->ino = i + 2;
            entry->off = i + 1;
            entry->namelen = length;
            entry->type = DT_REG;
            memcpy(entry->name, names[i], length);
            size += FUSE_DIRENT_SIZE(entry);
        }
        answer(in, 0, data, size);
        break;
    }
    case FUSE_RELEASEDIR:
    case FUSE_FLUSH:
    case FUSE_ACCESS:
        answer(in, 0, data, 0);
        break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        break;
    case FUSE_STATFS: {
        struct fuse_statfs_out out = {0};
        answer(in, 0, &out, sizeof out);
        break;
    }
    default:
        answer(in, -ENOSYS, data, 0);
    }
}

int main(int argc, char **argv) {
    static char request[1 << 20];
    char options[128];
    source = argv[1];
    if (argc > 3) control = argv[3];
    DIR *dir = opendir(source);
    struct dirent *found;
    while (dir && (found = readdir(dir)) && n_files < MAX_FILES)
        if (found->d_type == DT_REG) strcpy(names[n_files++], found->d_name);
    device = open("/dev/fuse", O_RDWR);
    if (device < 0) return 2;
    snprintf(options, sizeof options, "fd=%d,rootmode=40755,user_id=0,group_id=0,allow_other", device);
    if (mount("short", argv[2], "fuse.short", MS_NOSUID | MS_NODEV, options)) return 2;
    printf("mounted\n");
    fflush(stdout);
    ssize_t n;
    while ((n = read(device, request, sizeof request)) > 0 || errno == EINTR || errno == ENOENT) {
        if (n <= 0) continue;
        request[n] = 0;
        serve((void *)request, request + sizeof(struct fuse_in_header));
    }
    return errno == ENODEV ? 0 : 3;
}
