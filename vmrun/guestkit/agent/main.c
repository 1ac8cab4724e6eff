/*
 * The guest agent: runs commands in the guest for the host, over a virtio console port.
 *
 *   vmrun-agent --init [PROGRAM ARGUMENT...]   PID 1: prepares the system; then serves alone, or serves in a
 *                                              child and becomes PROGRAM, the image's own init
 *   vmrun-agent                                beside an init that runs already; as PID 1 the same as --init
 *   vmrun-agent --warm [FILE...]               only reads the files; not as PID 1
 *   vmrun-agent --fd N [--cgroup DIRECTORY]    serves the socket N and ends when it is closed: for tests
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SLOTS_MAX 1040
#define CGROUPS "/sys/fs/cgroup"
#define CGROUP2_MAGIC_NUMBER 0x63677270
#define WARM_BYTES (4 << 20) /* of each file: libraries have two */
#define PORT_WAIT_MS 50 /* while there is no port */

struct settings settings;
static int signals = -1;
/*
 * The host has closed its end of the port, which poll reports without end. This epoll instance tells only of
 * changes; -1: the host is there.
 */
static int away = -1;

int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void say(const char *format, ...)
{
	char text[512];
	va_list values;
	int count;

	va_start(values, format);
	count = vsnprintf(text, sizeof text, format, values);
	va_end(values);
	if (count > 0)
		dprintf(2, "vmrun agent: %s\n", text);
}

bool read_file(const char *path, char *to, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t have = 0;
	ssize_t count = -1;

	if (fd < 0)
		return false;
	while (have < size - 1 && (count = read(fd, to + have, size - 1 - have)) > 0)
		have += (size_t)count;
	close(fd);
	to[have] = 0;
	return have > 0;
}

bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool good;

	if (fd < 0)
		return false;
	good = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return good;
}

static void reap(void)
{
	struct signalfd_siginfo about[4]; /* the kernel keeps one of each signal */
	int status;
	pid_t pid;

	if (read(signals, about, sizeof about) < 0 && errno != EAGAIN)
		say("signals: %s", strerror(errno));
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		command_reaped(pid, status);
}

static void watch_signals(void)
{
	sigset_t set;

	/* Commands begin with all signals as they are by default, and none blocked. */
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	sigaddset(&set, SIGPIPE);
	sigprocmask(SIG_BLOCK, &set, NULL);
}

/* Everything that is the same for all commands. */
static void prepare(void)
{
	watch_signals();
	system_prepare();
	spawn_prepare();
	command_prepare();
}

static void host_left(int port)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };

	away = epoll_create1(EPOLL_CLOEXEC);
	if (away >= 0 && epoll_ctl(away, EPOLL_CTL_ADD, port, &event) == 0)
		return;
	say("cannot wait for the host: %s", strerror(errno));
	exit(1);
}

static void forget_away(void)
{
	if (away >= 0)
		close(away);
	away = -1;
}

static int nearer(int one, int other)
{
	return one < 0 ? other : other < 0 || one < other ? one : other;
}

/* `port` is a test's socket, or -1: then it is looked for. */
__attribute__((noreturn)) static void serve(int port)
{
	static struct pollfd slots[SLOTS_MAX];
	bool fixed = port >= 0;

	if (fixed)
		link_open(port);
	for (;;) {
		int count = 1, timeout = commands_timeout();
		bool port_slot = false;

		if (!link_is_open() && (port = port_open()) >= 0) {
			link_open(port);
		}
		slots[0] = (struct pollfd){ .fd = signals, .events = POLLIN };
		if (!link_is_open()) {
			timeout = nearer(timeout, PORT_WAIT_MS);
		} else {
			slots[1] = (struct pollfd){ .fd = port, .events = link_wants() };
			if (away >= 0)
				slots[1] = (struct pollfd){ .fd = away, .events = POLLIN };
			timeout = nearer(timeout, link_timeout());
			port_slot = true;
			count = 2;
		}
		count += commands_poll(slots + count, SLOTS_MAX - count);
		if (poll(slots, (nfds_t)count, timeout) < 0 && errno != EINTR)
			say("poll: %s", strerror(errno));
		if (slots[0].revents)
			reap();
		commands_serve();
		if (!link_is_open() || !port_slot)
			continue;
		if (away >= 0) {
			struct epoll_event event;

			if (!slots[1].revents || epoll_wait(away, &event, 1, 0) < 1)
				continue;
			slots[1].revents = POLLIN; /* the next read tells */
		}
		if (link_serve(slots[1].revents) && link_flush()) {
			forget_away();
			continue;
		}
		if (fixed) {
			session_ended();
			exit(0);
		}
		/* The commands of this session wait for another host; its hello decides about them. */
		if (errno == ENODEV) {
			link_close();
			forget_away();
			continue;
		}
		if (!link_host_may_come())
			link_open(port);
		if (away < 0)
			host_left(port);
	}
}

void port_in_use(void)
{
	static bool told;

	if (settings.guest && !told)
		kill(getppid(), SIGUSR1);
	told = true;
}

static pid_t start_server(int port)
{
	pid_t pid = fork();

	if (pid)
		return pid;
	/* Children are killed at a session's end: a process for each port keeps sessions apart. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	settings.port = port;
	prepare();
	serve(-1);
}

/* Keeps a server for each port in use and one more, and reaps what nobody else does. */
__attribute__((noreturn)) static void keep_servers(void)
{
	pid_t servers[PORTS_MAX], pid;
	int count = 1;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	servers[0] = start_server(0);
	for (;;) {
		siginfo_t about;

		if (sigwaitinfo(&set, &about) == SIGUSR1)
			/* From the last one: the others have successors. */
			if (count < PORTS_MAX && about.si_pid == servers[count - 1]) {
				servers[count] = start_server(count);
				count++;
			}
		while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
			for (int at = 0; at < count; at++)
				if (servers[at] == pid)
					servers[at] = start_server(at);
	}
}

static void prepare_guest(void)
{
	struct statfs about;

	write_file("/proc/self/oom_score_adj", "-1000");
	if (!statfs(CGROUPS, &about) && about.f_type == CGROUP2_MAGIC_NUMBER) {
		settings.cgroup = CGROUPS;
		cgroup_prepare();
	}
}

/* Brings files into the page cache: what a command needs, when nothing of the image may run yet. */
static int warm(char **paths)
{
	static char nowhere[65536];
	struct stat about;
	off_t left;
	int fd;

	for (; *paths; paths++) {
		/* A FIFO waits for its other end, and /dev/zero has none. */
		fd = open(*paths, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			continue;
		left = !fstat(fd, &about) && S_ISREG(about.st_mode) ? WARM_BYTES : 0;
		while (left > 0 && read(fd, nowhere, sizeof nowhere) > 0)
			left -= (off_t)sizeof nowhere;
		close(fd);
	}
	return 0;
}

int main(int argc, char **argv)
{
	char **init = NULL;
	int fd = -1;

	settings.init = getpid() == 1;
	if (!settings.init && argc > 1 && !strcmp(argv[1], "--warm"))
		return warm(argv + 2);
	for (int at = 1; at < argc; at++) {
		if (!strcmp(argv[at], "--fd") && at + 1 < argc) {
			fd = atoi(argv[++at]);
		} else if (!strcmp(argv[at], "--cgroup") && at + 1 < argc) {
			settings.cgroup = argv[++at];
		} else if (!strcmp(argv[at], "--init")) {
			settings.init = true;
			init = boot_init(argc - at - 1, argv + at + 1);
			break;
		} else if (!settings.init) {
			say("what is %s?", argv[at]);
			return 64;
		}
	}
	if (fd >= 0) {
		fcntl(fd, F_SETFD, FD_CLOEXEC);
		fcntl(fd, F_SETFL, O_NONBLOCK);
	} else {
		settings.guest = true;
	}
	if (settings.init) {
		boot_prepare();
		if (!init)
			init = boot_init(0, NULL);
		if (init && fork() != 0) {
			execv(init[0], init);
			say("cannot run %s: %s", init[0], strerror(errno));
			return 127;
		}
		if (init)
			setsid();
	}
	if (settings.guest) {
		prepare_guest();
		keep_servers();
	}
	prepare();
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	serve(fd);
}
