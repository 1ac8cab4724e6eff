/*
 * All that a command has started, however far it went from its parent.
 *
 * With a cgroup v2 for each command the kernel knows. Without, the agent is the reaper of what its commands
 * left behind (PR_SET_CHILD_SUBREAPER, or as PID 1), and /proc says who descends from whom.
 */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PROCESSES_MAX 8192
/* A fork bomb makes processes while they are counted; each round stops those it finds. */
#define ROUNDS 8

static struct {
	pid_t pid, parent;
	bool doomed, spared;
} processes[PROCESSES_MAX];

static int read_processes(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	int count = 0;

	while (proc && count < PROCESSES_MAX && (entry = readdir(proc))) {
		char path[64], text[512], *after;
		int pid = atoi(entry->d_name), parent;

		if (pid <= 0)
			continue;
		snprintf(path, sizeof path, "/proc/%d/stat", pid);
		/* The name is in parentheses and may hold any byte but NUL. */
		if (!read_file(path, text, sizeof text) || !(after = strrchr(text, ')')))
			continue;
		if (sscanf(after + 1, " %*c %d", &parent) != 1 || after[2] == 'Z')
			continue;
		processes[count].pid = pid;
		processes[count].parent = parent;
		processes[count].doomed = processes[count].spared = false;
		count++;
	}
	if (proc)
		closedir(proc);
	return count;
}

/* Dooms all below `root`, without `root`; children of what is spared are spared. */
static int doom(int count, pid_t root, const pid_t *kept, int kept_count)
{
	int doomed = 0;
	bool more = true;

	for (int at = 0; at < count; at++)
		for (int which = 0; which < kept_count; which++)
			if (processes[at].pid == kept[which])
				processes[at].spared = true;
	while (more) {
		more = false;
		for (int at = 0; at < count; at++) {
			bool below = processes[at].parent == root;

			if (processes[at].doomed || processes[at].spared)
				continue;
			for (int other = 0; other < count && !below; other++)
				if (processes[other].pid == processes[at].parent) {
					below = processes[other].doomed;
					if (processes[other].spared)
						processes[at].spared = more = true;
					break;
				}
			if (below && !processes[at].spared) {
				processes[at].doomed = more = true;
				doomed++;
			}
		}
	}
	return doomed;
}

static void kill_below(pid_t root, const pid_t *kept, int kept_count, int number)
{
	for (int round = 0; round < (number == SIGKILL ? ROUNDS : 1); round++) {
		int count = read_processes();

		if (!doom(count, root, kept, kept_count))
			return;
		for (int at = 0; at < count; at++)
			if (processes[at].doomed && processes[at].pid != getpid())
				kill(processes[at].pid, number);
	}
}

void family_kill(pid_t pid, const char *cgroup, int number)
{
	char path[192];

	if (cgroup[0] && number == SIGKILL) {
		snprintf(path, sizeof path, "%s/cgroup.kill", cgroup);
		if (write_file(path, "1"))
			return;
	}
	if (!pid)
		return;
	/* Children first, for when their parent is gone they are found no more; it must not see them go. */
	if (number == SIGKILL)
		kill(pid, SIGSTOP);
	kill_below(pid, NULL, 0, number);
	if (kill(-pid, number) < 0)
		kill(pid, number);
}

/* Cgroups that are there, the spare one excepted. An agent before this one may have left some. */
static int groups_there = 1;
static struct cgroup spare = { .fd = -1 };

static bool is_spare(const char *name)
{
	const char *last = strrchr(spare.path, '/');

	return last && !strcmp(last + 1, name);
}

/* No command of this session has a cgroup yet, or has one any more. */
static void sweep_cgroups(void)
{
	int left = 0;
	DIR *directory = settings.cgroup ? opendir(settings.cgroup) : NULL;
	struct dirent *entry;
	char prefix[32];

	snprintf(prefix, sizeof prefix, "vmrun-%d-", settings.port);
	while (directory && (entry = readdir(directory))) {
		char path[512];

		if (strncmp(entry->d_name, prefix, strlen(prefix)) || is_spare(entry->d_name))
			continue;
		snprintf(path, sizeof path, "%s/%s/cgroup.kill", settings.cgroup, entry->d_name);
		write_file(path, "1");
		snprintf(path, sizeof path, "%s/%s", settings.cgroup, entry->d_name);
		left += rmdir(path) < 0; /* EBUSY while anything runs in it: the next time, then */
	}
	if (directory)
		closedir(directory);
	groups_there = left;
}

void family_kill_orphans(const pid_t *kept, int count)
{
	if (settings.cgroup) {
		if (groups_there > 0)
			sweep_cgroups();
		return;
	}
	kill_below(getpid(), kept, count, SIGKILL);
}

void cgroup_prepare(void)
{
	char path[192];

	if (!settings.cgroup)
		return;
	snprintf(path, sizeof path, "%s/cgroup.subtree_control", settings.cgroup);
	/* Each by itself: a kernel may lack one. */
	write_file(path, "+memory");
	write_file(path, "+pids");
}

static void make(struct cgroup *cgroup, bool kept)
{
	static unsigned number;
	int failed;

	cgroup->fd = -1;
	/* An agent before this one may have left some. */
	do {
		snprintf(cgroup->path, sizeof cgroup->path, "%s/%s-%d-%u", settings.cgroup,
			 kept ? "kept" : "vmrun", settings.port, ++number);
		failed = mkdir(cgroup->path, 0755);
	} while (failed && errno == EEXIST);
	if (failed)
		cgroup->path[0] = 0;
	else
		cgroup->fd = open(cgroup->path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

void cgroup_make(struct cgroup *cgroup, bool kept)
{
	cgroup->path[0] = 0;
	cgroup->fd = -1;
	if (!settings.cgroup)
		return;
	if (!kept && spare.path[0]) {
		*cgroup = spare;
		spare.path[0] = 0;
		spare.fd = -1;
	} else {
		make(cgroup, kept);
	}
	/* What is kept has another name, for nobody is to find it. */
	if (cgroup->path[0] && !kept)
		groups_there++;
}

void cgroup_spare(void)
{
	if (settings.cgroup && !spare.path[0])
		make(&spare, false);
}

void cgroup_remove(struct cgroup *cgroup)
{
	const char *name = strrchr(cgroup->path, '/');

	if (cgroup->fd >= 0)
		close(cgroup->fd);
	cgroup->fd = -1;
	if (!name)
		return;
	if (rmdir(cgroup->path) == 0)
		groups_there -= !strncmp(name, "/vmrun", 6);
	else if (errno != EBUSY && errno != ENOENT) /* What a command left behind may live on in it, until the session's end. */
		say("cannot remove %s: %s", cgroup->path, strerror(errno));
	cgroup->path[0] = 0;
}

static uint32_t counter(const char *path, const char *name)
{
	static char text[16384];
	size_t size = strlen(name);

	if (!read_file(path, text, sizeof text))
		return 0;
	for (char *line = text; line; line = strchr(line, '\n')) {
		if (*line == '\n')
			line++;
		if (!strncmp(line, name, size) && line[size] == ' ')
			return (uint32_t)strtoul(line + size, NULL, 10);
	}
	return 0;
}

/*
 * /proc/vmstat has many numbers, and is read only when the kernel has said something since the last time: it
 * never kills a process without a message.
 */
static uint32_t kills_anywhere(bool sure)
{
	static uint32_t known;
	static int messages = -2;
	char message[1024];

	if (messages == -2)
		messages = settings.guest ? open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC) : -1;
	else if (messages >= 0 && !sure && read(messages, message, sizeof message) < 0 && errno == EAGAIN)
		return known;
	if (messages >= 0)
		lseek(messages, 0, SEEK_END);
	known = counter("/proc/vmstat", "oom_kill");
	return known;
}

uint32_t oom_kills(const char *cgroup, bool sure)
{
	static bool no_events;
	char path[192];

	if (cgroup[0] && !no_events) {
		snprintf(path, sizeof path, "%s/memory.events", cgroup);
		if (access(path, R_OK) == 0)
			return counter(path, "oom_kill");
		/* Where the kernel does not account memory to groups it will not do so later. */
		no_events = errno == ENOENT;
	}
	return kills_anywhere(sure);
}
