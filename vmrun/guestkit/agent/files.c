/*
 * Copying trees of files, in a child: files_put reads a stream of entries on descriptor 0 and makes them,
 * files_get reads a tree and writes its entries to descriptor 1. docs/agent.md has the format.
 *
 * An entry has a name and no path: a directory's entries stand between its own and its end, and are made
 * relative to the directory's descriptor. So nothing in a stream can name a place outside of the target, and
 * no symbolic link is followed below it.
 */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEPTH_MAX 200
#define NAME_BYTES 256
#define CHUNK_BYTES 65536u
#define CHUNK_FAILED UINT32_MAX

static const struct copy *copy;
/* Input or output under way. */
static uint8_t buffer[CHUNK_BYTES];
static uint32_t buffer_at, buffer_end;

static bool failed(const char *what, const char *name)
{
	dprintf(2, "%s %s: %s\n", what, name, strerror(errno));
	return false;
}

static bool wrong(const char *what)
{
	dprintf(2, "the stream of files is wrong: %s\n", what);
	return false;
}

static bool fill(void)
{
	ssize_t count = read(0, buffer, sizeof buffer);

	if (count <= 0)
		return wrong("it ends early");
	buffer_at = 0;
	buffer_end = (uint32_t)count;
	return true;
}

static bool get_bytes(void *to, uint32_t size)
{
	uint8_t *at = to;

	while (size) {
		uint32_t part = buffer_end - buffer_at;

		if (!part) {
			if (!fill())
				return false;
			continue;
		}
		if (part > size)
			part = size;
		memcpy(at, buffer + buffer_at, part);
		buffer_at += part;
		at += part;
		size -= part;
	}
	return true;
}

static bool get_text(char *to, uint32_t room)
{
	uint32_t size;

	if (!get_bytes(&size, 4))
		return false;
	if (size >= room)
		return wrong("a name is too long");
	if (!get_bytes(to, size))
		return false;
	to[size] = 0;
	return strlen(to) == size || wrong("a NUL in a name");
}

/* The root of the copy has no name in the stream; all else has one of a directory entry's form. */
static bool get_name(char *name, bool root)
{
	if (!get_text(name, NAME_BYTES))
		return false;
	if (root)
		return !name[0] || wrong("the first entry has a name");
	if (!name[0] || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, ".."))
		return wrong("a name that is none");
	return true;
}

static bool make_directories(const char *path)
{
	char part[4096];
	size_t size = strlen(path);

	if (size >= sizeof part) {
		errno = ENAMETOOLONG;
		return failed("cannot make", path);
	}
	for (size_t at = 1; at <= size; at++) {
		if (path[at] && path[at] != '/')
			continue;
		memcpy(part, path, at);
		part[at] = 0;
		if (mkdir(part, 0755) == 0) {
			if (copy && chown(part, copy->uid, copy->gid) < 0 && geteuid() == 0)
				return failed("cannot give away", part);
		} else if (errno != EEXIST && errno != EISDIR) {
			return failed("cannot make", part);
		}
	}
	return true;
}

static int open_directory(const char *path)
{
	int fd;

	if (!make_directories(path))
		return -1;
	fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		failed("cannot open", path);
	return fd;
}

/* Where the root of the copy goes when it is no directory: into `path`, or to be `path`. */
static int open_parent(char *name)
{
	struct stat about;
	char parent[4096];
	const char *slash = strrchr(copy->path, '/');

	if (!slash || (slash[1] == 0) || (!stat(copy->path, &about) && S_ISDIR(about.st_mode))) {
		snprintf(name, NAME_BYTES, "%s", copy->name);
		return open_directory(copy->path);
	}
	snprintf(parent, sizeof parent, "%.*s", (int)(slash - copy->path), copy->path);
	snprintf(name, NAME_BYTES, "%s", slash + 1);
	return open_directory(parent[0] ? parent : "/");
}

static bool give(int at, const char *name)
{
	/* Without root rights everything belongs to who copies. */
	if (fchownat(at, name, copy->uid, copy->gid, AT_SYMLINK_NOFOLLOW) < 0 && geteuid() == 0)
		return failed("cannot give away", name);
	return true;
}

static mode_t allowed(uint32_t mode)
{
	return mode & (copy->flags & COPY_SPECIAL_BITS ? 07777 : 0777);
}

static void times_of(uint64_t nanoseconds, struct timespec times[2])
{
	times[0].tv_sec = 0;
	times[0].tv_nsec = UTIME_OMIT;
	times[1].tv_sec = (time_t)(nanoseconds / 1000000000u);
	times[1].tv_nsec = (long)(nanoseconds % 1000000000u);
}

static bool put_contents(int fd, const char *name)
{
	for (;;) {
		uint32_t left;

		if (!get_bytes(&left, 4))
			return false;
		if (!left)
			return true;
		if (left == CHUNK_FAILED)
			return wrong("the other side could not read a file");
		while (left) {
			uint32_t part = buffer_end - buffer_at;
			ssize_t count;

			if (!part) {
				if (!fill())
					return false;
				continue;
			}
			if (part > left)
				part = left;
			count = write(fd, buffer + buffer_at, part);
			if (count < 0)
				return failed("cannot write", name);
			buffer_at += (uint32_t)count;
			left -= (uint32_t)count;
		}
	}
}

static bool put_file(int at, const char *name, uint32_t mode, uint64_t mtime)
{
	struct timespec times[2];
	bool good;
	int fd;

	if (unlinkat(at, name, 0) < 0 && errno != ENOENT)
		return failed("cannot replace", name);
	fd = openat(at, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return failed("cannot make", name);
	good = put_contents(fd, name) && give(at, name);
	times_of(mtime, times);
	if (good && (fchmod(fd, allowed(mode)) < 0 || futimens(fd, times) < 0))
		good = failed("cannot finish", name);
	if (close(fd) < 0 && good)
		good = failed("cannot write", name);
	return good;
}

static bool put_link(int at, const char *name, uint64_t mtime)
{
	struct timespec times[2];
	char target[4096];

	if (!get_text(target, sizeof target))
		return false;
	if (unlinkat(at, name, 0) < 0 && errno != ENOENT)
		return failed("cannot replace", name);
	if (symlinkat(target, at, name) < 0)
		return failed("cannot make", name);
	times_of(mtime, times);
	utimensat(at, name, times, AT_SYMLINK_NOFOLLOW);
	return give(at, name);
}

static int put_directory(int at, const char *name)
{
	int fd;

	if (mkdirat(at, name, 0700) == 0) {
		if (!give(at, name))
			return -1;
	} else if (errno != EEXIST) {
		failed("cannot make", name);
		return -1;
	}
	fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		failed("cannot open", name);
	return fd;
}

int files_put(void *context)
{
	static struct {
		int fd;
		uint32_t mode;
		uint64_t mtime;
	} open_ones[DEPTH_MAX];
	int depth = 0;

	copy = context;
	for (bool root = true;; root = false) {
		char name[NAME_BYTES];
		uint8_t kind;
		uint32_t mode = 0;
		uint64_t mtime = 0;
		int at;

		if (!get_bytes(&kind, 1))
			return 1;
		if (kind == 'e')
			return depth ? !wrong("a directory has no end") : 0;
		if (kind == 'D') {
			struct timespec times[2];

			if (!depth)
				return !wrong("the end of no directory");
			depth--;
			times_of(open_ones[depth].mtime, times);
			if (fchmod(open_ones[depth].fd, allowed(open_ones[depth].mode)) < 0 ||
			    futimens(open_ones[depth].fd, times) < 0)
				return !failed("cannot finish", "a directory");
			close(open_ones[depth].fd);
			continue;
		}
		if (!strchr("dfl", kind) || !kind)
			return !wrong("an entry of no kind");
		if (!root && !depth)
			return !wrong("two roots");
		if (!get_bytes(&mode, 4) || !get_bytes(&mtime, 8) || !get_name(name, root))
			return 1;
		if (kind == 'd') {
			if (depth == DEPTH_MAX)
				return !wrong("directories too deep");
			at = root ? open_directory(copy->path) : put_directory(open_ones[depth - 1].fd, name);
			if (at < 0)
				return 1;
			open_ones[depth].fd = at;
			open_ones[depth].mode = mode;
			open_ones[depth++].mtime = mtime;
			continue;
		}
		at = root ? open_parent(name) : open_ones[depth - 1].fd;
		if (at < 0)
			return 1;
		if (!(kind == 'f' ? put_file(at, name, mode, mtime) : put_link(at, name, mtime)))
			return 1;
	}
}

static bool flush(void)
{
	uint32_t at = 0;

	while (at < buffer_end) {
		ssize_t count = write(1, buffer + at, buffer_end - at);

		if (count < 0)
			return false; /* the host wants no more */
		at += (uint32_t)count;
	}
	buffer_end = 0;
	return true;
}

static bool say_bytes(const void *from, uint32_t size)
{
	const uint8_t *at = from;

	while (size) {
		uint32_t part = (uint32_t)sizeof buffer - buffer_end;

		if (!part) {
			if (!flush())
				return false;
			continue;
		}
		if (part > size)
			part = size;
		memcpy(buffer + buffer_end, at, part);
		buffer_end += part;
		at += part;
		size -= part;
	}
	return true;
}

static bool say_text(const char *text)
{
	uint32_t size = (uint32_t)strlen(text);

	return say_bytes(&size, 4) && say_bytes(text, size);
}

static bool say_entry(char kind, const struct stat *about, const char *name)
{
	uint32_t mode = about->st_mode & 07777;
	uint64_t mtime = about->st_mtim.tv_sec < 0 ? 0
			 : (uint64_t)about->st_mtim.tv_sec * 1000000000u + (uint64_t)about->st_mtim.tv_nsec;

	return say_bytes(&kind, 1) && say_bytes(&mode, 4) && say_bytes(&mtime, 8) && say_text(name);
}

static bool get_contents(int fd, const char *name)
{
	static uint8_t chunk[CHUNK_BYTES];

	for (;;) {
		ssize_t count = read(fd, chunk, sizeof chunk);
		uint32_t size = count < 0 ? CHUNK_FAILED : (uint32_t)count;

		if (count < 0)
			failed("cannot read", name);
		if (!say_bytes(&size, 4))
			return false;
		if (count <= 0)
			return count == 0;
		if (!say_bytes(chunk, size))
			return false;
	}
}

/* `fd` is the entry itself, and is closed. */
static bool get_tree(int fd, const char *name, int depth)
{
	struct stat about;
	struct dirent *entry;
	DIR *directory;
	bool good = true;

	if (fstat(fd, &about) < 0) {
		close(fd);
		return failed("cannot look at", name);
	}
	if (S_ISREG(about.st_mode)) {
		good = say_entry('f', &about, name) && get_contents(fd, name);
		close(fd);
		return good;
	}
	if (!S_ISDIR(about.st_mode)) {
		dprintf(2, "left out %s: neither file nor directory\n", name);
		close(fd);
		return depth > 0;
	}
	if (depth == DEPTH_MAX || !(directory = fdopendir(fd))) {
		close(fd);
		return wrong("directories too deep");
	}
	good = say_entry('d', &about, name);
	while (good && (errno = 0, entry = readdir(directory))) {
		const char *inner = entry->d_name;
		char target[4096];
		ssize_t size;
		int next;

		if (!strcmp(inner, ".") || !strcmp(inner, ".."))
			continue;
		if (fstatat(fd, inner, &about, AT_SYMLINK_NOFOLLOW) < 0)
			continue; /* it went away meanwhile */
		if (S_ISLNK(about.st_mode)) {
			size = readlinkat(fd, inner, target, sizeof target - 1);
			if (size < 0)
				continue;
			target[size] = 0;
			good = say_entry('l', &about, inner) && say_text(target);
			continue;
		}
		if (!S_ISREG(about.st_mode) && !S_ISDIR(about.st_mode)) {
			dprintf(2, "left out %s: neither file, directory nor link\n", inner);
			continue;
		}
		next = openat(fd, inner, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
		good = next < 0 ? failed("cannot open", inner) : get_tree(next, inner, depth + 1);
	}
	if (good && errno)
		good = failed("cannot list", name);
	closedir(directory);
	return good && say_bytes("D", 1);
}

int files_get(void *context)
{
	int fd;

	copy = context;
	fd = open(copy->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return !failed("cannot open", copy->path);
	return !(get_tree(fd, "", 0) && say_bytes("e", 1) && flush());
}

int do_mkdir(const char *path)
{
	copy = NULL;
	return make_directories(path) ? 0 : errno;
}
