/*
 * PID 1's work: the kernel's file systems, the loopback interface, and from an initramfs the way to the root.
 *
 * On the kernel command line:
 *   root=/dev/vda       with an initramfs: the disk that holds the root file system
 *   rootfstype=ext4     its file systems to try, with commas between (ext4 when left out)
 *   ro, rw              how it is mounted (rw when left out)
 *   vmrun.overlay=tmpfs what is written goes to memory, and the disk stays as it is (then `ro` is implied)
 *   vmrun.init=PATH     the image's own init: it becomes PID 1, and the agent runs beside it
 */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define NEW_ROOT "/.vmrun-root"
#define CGROUPS "/sys/fs/cgroup"
#define TMPFS_MAGIC_NUMBER 0x01021994
#define RAMFS_MAGIC_NUMBER 0x858458f6
/* A disk is there when the kernel starts PID 1, or a moment later when its driver probes late. */
#define DISK_WAIT_MS 10000

/* The value of the first word `name`=VALUE, cut off at `size`; false when there is none. */
static bool parameter(const char *name, char *value, size_t size)
{
	static char line[4096];
	size_t length = strlen(name);

	if (!line[0] && !read_file("/proc/cmdline", line, sizeof line))
		return false;
	for (const char *word = line; *word; word += strcspn(word, " \n"), word += strspn(word, " \n")) {
		if (strncmp(word, name, length) || !strchr("= \n", word[length]))
			continue;
		word += length + (word[length] == '=');
		snprintf(value, size, "%.*s", (int)strcspn(word, " \n"), word);
		return true;
	}
	return false;
}

/* Mounted already is as good; a root that is read-only may lack the directory, and then goes without. */
static void mount_at(const char *type, const char *where, unsigned long flags, const char *data, mode_t mode)
{
	struct stat here, above;
	char parent[128];

	mkdir(where, mode);
	snprintf(parent, sizeof parent, "%s/..", where);
	if (!stat(where, &here) && !stat(parent, &above) && here.st_dev != above.st_dev)
		return;
	if (mount(type, where, type, flags, data) < 0 && errno != EBUSY)
		say("cannot mount %s at %s: %s", type, where, strerror(errno));
}

static void mount_kernel(void)
{
	mount_at("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, 0555);
	mount_at("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, 0555);
	mount_at("devtmpfs", "/dev", MS_NOSUID, "mode=0755", 0755);
}

static void mount_rest(void)
{
	static const char *const links[][2] = {
		{ "/proc/self/fd", "/dev/fd" },
		{ "fd/0", "/dev/stdin" },
		{ "fd/1", "/dev/stdout" },
		{ "fd/2", "/dev/stderr" },
	};

	mount_at("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5", 0755);
	mount_at("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777", 01777);
	mount_at("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755", 0755);
	mkdir("/tmp", 01777);
	if (access("/tmp", W_OK) < 0)
		mount_at("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777", 01777);
	if (access(CGROUPS, F_OK) == 0)
		mount_at("cgroup2", CGROUPS, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, 0555);
	for (size_t at = 0; at < sizeof links / sizeof links[0]; at++)
		if (symlink(links[at][0], links[at][1]) < 0 && errno != EEXIST)
			say("cannot make %s: %s", links[at][1], strerror(errno));
}

static bool in_initramfs(void)
{
	struct statfs about;

	/* A root on a tmpfs or ramfs that has /init is the kernel's initramfs. */
	return !statfs("/", &about) &&
	       (about.f_type == TMPFS_MAGIC_NUMBER || about.f_type == RAMFS_MAGIC_NUMBER) &&
	       !access("/init", F_OK);
}

__attribute__((noreturn)) static void give_up(const char *why, const char *what)
{
	say("%s %s: %s", why, what, strerror(errno));
	/* PID 1's end is a kernel panic, which the host sees at once. */
	_exit(1);
}

static void mount_disk(const char *disk, const char *where, unsigned long flags)
{
	char types[128] = "ext4", *rest = types, *type;

	parameter("rootfstype", types, sizeof types);
	for (int waited = 0; access(disk, F_OK) < 0; waited += 10) {
		struct timespec moment = { .tv_nsec = 10000000 };

		if (waited >= DISK_WAIT_MS)
			give_up("there is no", disk);
		nanosleep(&moment, NULL);
	}
	while ((type = strsep(&rest, ",")))
		if (mount(disk, where, type, flags, NULL) == 0)
			return;
	give_up("cannot mount", disk);
}

static void mount_overlay(const char *disk)
{
	mkdir("/.lower", 0755);
	mkdir("/.upper", 0755);
	mount_disk(disk, "/.lower", MS_RDONLY);
	if (mount("tmpfs", "/.upper", "tmpfs", 0, "mode=0755") < 0 || mkdir("/.upper/data", 0755) < 0 ||
	    mkdir("/.upper/work", 0755) < 0 ||
	    mount("overlay", NEW_ROOT, "overlay", 0,
		  "lowerdir=/.lower,upperdir=/.upper/data,workdir=/.upper/work") < 0)
		give_up("cannot lay memory over", disk);
}

static void switch_root(void)
{
	static const char *const kept[] = { "/dev", "/proc", "/sys" };
	char disk[128], value[32];
	bool read_only = parameter("ro", value, sizeof value) && !parameter("rw", value, sizeof value);

	if (!parameter("root", disk, sizeof disk))
		return; /* the initramfs is all there is */
	mkdir(NEW_ROOT, 0755);
	if (parameter("vmrun.overlay", value, sizeof value))
		mount_overlay(disk);
	else
		mount_disk(disk, NEW_ROOT, read_only ? MS_RDONLY : 0);
	for (size_t at = 0; at < sizeof kept / sizeof kept[0]; at++) {
		char to[64];

		snprintf(to, sizeof to, NEW_ROOT "%s", kept[at]);
		mkdir(to, 0755);
		if (mount(kept[at], to, NULL, MS_MOVE, NULL) < 0) {
			/* An image on a read-only root may lack it: its programs go without, and so do we. */
			say("cannot move %s: %s", kept[at], strerror(errno));
		}
	}
	/* The running program stays, though it has no name any more. */
	unlink("/init");
	if (chdir(NEW_ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		give_up("cannot change the root to", disk);
}

void boot_prepare(void)
{
	static char name[65];

	mount_kernel();
	if (in_initramfs())
		switch_root();
	mount_rest();
	set_network("lo", INADDR_LOOPBACK, 8, 0);
	if (parameter("vmrun.host", name, sizeof name) && sethostname(name, strlen(name)) < 0)
		say("cannot set the host's name");
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
}

char **boot_init(int argc, char **argv)
{
	static char path[256];
	static char *words[3];

	/* `vmrun-agent --init PROGRAM ARGUMENT...` and vmrun.init=PROGRAM mean the same. */
	if (argc > 0)
		return argv;
	if (!parameter("vmrun.init", path, sizeof path) || !path[0])
		return NULL;
	words[0] = path;
	return words;
}
