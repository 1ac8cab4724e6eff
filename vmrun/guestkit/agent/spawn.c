/*
 * The way to a child: its cgroup, its terminal or pipes, its user, its directory, its environment.
 *
 * A command of root's starts as with vfork(2): the child borrows the agent's memory, and the agent stands still
 * until the program runs. That spares the kernel a copy of the agent's page tables, and each of the two a copy
 * of every page they write to; and the agent knows at once what became of it. A directory or a program on a
 * file system that does not answer holds the agent of this port up until then, and no other.
 *
 * All others are forked, and tell through the report pipe. Whose user is another must not share our memory
 * (its user's other processes could stop it), and a function of our own does not end in a program.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define STACK_BYTES 65536
#define DEFAULTS 3

/* /proc/self/oom_score_adj. Ours, which a child has from us. */
static int oom_fd = -1;

struct child {
	struct spawning *spawning;
	struct identity identity;
	char **env;
	bool borrows; /* our memory */
	bool in_cgroup;
};

__attribute__((noreturn)) static void fail(struct child *child, enum stage stage, int error)
{
	uint8_t why[5] = { (uint8_t)stage, (uint8_t)error, (uint8_t)(error >> 8), 0, 0 };

	if (child->borrows) {
		child->spawning->stage = (uint8_t)stage;
		child->spawning->error = error;
	} else if (write(child->spawning->report, why, sizeof why) != sizeof why) {
		say("a command could not be started, and nobody listens");
	}
	_exit(127);
}

static void take_streams(struct child *child, const int standard[3], bool terminal)
{
	int away[3];

	for (int at = 0; at < 3; at++) {
		away[at] = standard[at];
		/* They may have the numbers 0 to 2 themselves, in another order. */
		if (away[at] < 3)
			away[at] = fcntl(standard[at], F_DUPFD_CLOEXEC, 3);
		if (away[at] < 0)
			fail(child, STAGE_SETUP, errno);
	}
	if (child->spawning->report >= 0 && child->spawning->report < 3)
		child->spawning->report = fcntl(child->spawning->report, F_DUPFD_CLOEXEC, 3);
	for (int at = 0; at < 3; at++)
		dup2(away[at], at);
	if (terminal && ioctl(0, TIOCSCTTY, 0) < 0)
		fail(child, STAGE_SETUP, errno);
}

static void become(struct child *child)
{
	const struct identity *identity = &child->identity;

	if (geteuid() == 0) {
		if (setgroups((size_t)identity->group_count, identity->groups) < 0 ||
		    setresgid(identity->gid, identity->gid, identity->gid) < 0 ||
		    setresuid(identity->uid, identity->uid, identity->uid) < 0)
			fail(child, STAGE_USER, errno);
	} else if (identity->uid != geteuid() || identity->gid != getegid()) {
		fail(child, STAGE_USER, EPERM);
	}
}

/*
 * execvp(3); the errno. That one tries each directory of PATH with execve, which costs the kernel ten times what
 * access does where there is no such file.
 */
static int execute(char **argv)
{
	const char *path = getenv("PATH");
	bool refused = false;
	char place[4096];

	if (strchr(argv[0], '/') || !path)
		path = "";
	for (const char *end;; path = end + 1) {
		int length = (int)((end = strchrnul(path, ':')) - path);

		if (snprintf(place, sizeof place, "%.*s%s%s", length, path, length ? "/" : "", argv[0]) >=
		    (int)sizeof place) {
			errno = ENAMETOOLONG;
		} else if (!length || access(place, X_OK) == 0) {
			/* A script without #! is the shell's, which execvp sees to. */
			execvp(strchr(place, '/') ? place : argv[0], argv);
		}
		refused = refused || errno == EACCES;
		if (!*end || (errno != ENOENT && errno != ENOTDIR && errno != EACCES))
			return refused && errno == ENOENT ? EACCES : errno;
	}
}

/* In the child. With borrowed memory it must leave all as it found it; `environ` the parent puts back. */
__attribute__((noreturn)) static void run(void *context)
{
	struct child *child = context;
	struct job *job = child->spawning->job;
	sigset_t none;

	setsid();
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	umask(022);
	if (child->spawning->cgroup->path[0] && !child->in_cgroup) {
		char path[192];

		snprintf(path, sizeof path, "%s/cgroup.procs", child->spawning->cgroup->path);
		if (!write_file(path, "0"))
			fail(child, STAGE_SETUP, errno);
	}
	take_streams(child, child->spawning->standard, job->flags & EXEC_TTY);
	if (job->function) {
		/* Without an exec, other commands' pipes stay open here unless they are closed. */
		close_range(3, ~0u, 0);
		_exit(job->function(job->context) & 0xff);
	}
	if (job->user && job->user[0])
		become(child);
	environ = child->env;
	if (chdir(job->cwd && job->cwd[0] ? job->cwd : "/") < 0)
		fail(child, STAGE_CWD, errno);
	fail(child, STAGE_EXEC, execute(job->argv));
}

/* Its variables, and the defaults for those it lacks; the three strings are the caller's to free. */
static char **environment(const struct job *job, const struct identity *identity, char *defaults[DEFAULTS])
{
	const char *names[DEFAULTS] = { "PATH", "HOME", "USER" };
	const char *values[DEFAULTS] = { DEFAULT_PATH, identity->home, identity->name };
	size_t count = 0;
	char **env;

	while (job->env && job->env[count])
		count++;
	env = calloc(count + DEFAULTS + 1, sizeof *env);
	if (!env)
		return NULL;
	memcpy(env, job->env, count * sizeof *env);
	for (size_t at = 0; at < DEFAULTS; at++) {
		size_t length = strlen(names[at]);
		bool there = !values[at][0];

		for (char **word = env; *word && !there; word++)
			there = !strncmp(*word, names[at], length) && (*word)[length] == '=';
		if (!there && asprintf(&defaults[at], "%s=%s", names[at], values[at]) >= 0)
			env[count++] = defaults[at];
	}
	return env;
}

/*
 * clone3(2), with the child in run() on the stack that `clone` names: it must not return into a frame that is
 * the parent's too.
 */
static long clone_to_run(struct clone_args *clone, struct child *child)
{
	register void (*entry)(void *) __asm__("r8") = run;
	register struct child *argument __asm__("r9") = child;
	long result;

	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "mov %%r9, %%rdi\n\t"
			 "call *%%r8\n\t"
			 "hlt\n"
			 "1:"
			 : "=a"(result)
			 : "0"((long)SYS_clone3), "D"(clone), "S"(sizeof *clone), "r"(entry), "r"(argument)
			 : "rcx", "r11", "memory", "cc");
	return result;
}

static pid_t borrow(struct child *child)
{
	static char stack[STACK_BYTES] __attribute__((aligned(16)));
	const struct cgroup *cgroup = child->spawning->cgroup;
	struct clone_args clone = { .flags = CLONE_VM | CLONE_VFORK, .exit_signal = SIGCHLD };
	size_t size = 0;
	char *place = stack;
	char **env = environ;
	long pid;

	/* execvp(3) copies the arguments to the stack when the program is a script without #!. */
	while (child->spawning->job->argv[size])
		size++;
	size = STACK_BYTES + (size > 1024 ? size * sizeof(char *) / 16 * 16 + 16 : 0);
	if (size > STACK_BYTES && posix_memalign((void **)&place, 16, size))
		return errno = ENOMEM, -1;
	clone.stack = (uintptr_t)place;
	clone.stack_size = size;
	if (cgroup->fd >= 0) {
		clone.flags |= CLONE_INTO_CGROUP;
		clone.cgroup = (uint64_t)cgroup->fd;
	}
	child->in_cgroup = cgroup->fd >= 0;
	/* We have no signal handlers, which might run in it. */
	pid = clone_to_run(&clone, child);
	environ = env;
	if (place != stack)
		free(place);
	if (pid >= 0)
		return (pid_t)pid;
	errno = (int)-pid;
	return -1;
}

bool spawn_reports(const struct job *job)
{
	return job->function || (job->user && job->user[0]);
}

static void protect(const char *score)
{
	if (oom_fd >= 0 && pwrite(oom_fd, score, strlen(score), 0) < 0)
		say("oom_score_adj: %s", strerror(errno));
}

static pid_t start(struct child *child)
{
	pid_t pid = -1;

	child->borrows = child->spawning->started = !spawn_reports(child->spawning->job);
	protect("0");
	if (child->borrows) {
		pid = borrow(child);
		/* Linux before 5.7, or one that filters clone3. */
		if (pid < 0 && (errno == ENOSYS || errno == EINVAL || errno == E2BIG || errno == EPERM))
			child->borrows = child->spawning->started = false;
	}
	if (!child->borrows) {
		child->in_cgroup = false;
		pid = fork();
		if (pid == 0)
			run(child);
	}
	protect("-1000");
	return pid;
}

pid_t spawn(struct spawning *spawning)
{
	struct job *job = spawning->job;
	struct child child = { .spawning = spawning };
	char *defaults[DEFAULTS] = { NULL };
	pid_t pid = -1;

	spawning->started = false;
	spawning->stage = 0;
	spawning->error = 0;
	if (job->function)
		return start(&child);
	spawning->error = look_up_user(job->user ? job->user : "", &child.identity);
	spawning->stage = STAGE_USER;
	if (spawning->error)
		return errno = spawning->error, -1;
	spawning->stage = 0;
	child.env = environment(job, &child.identity, defaults);
	if (child.env)
		pid = start(&child);
	for (int at = 0; at < DEFAULTS; at++)
		free(defaults[at]);
	free(child.env);
	return pid;
}

void spawn_prepare(void)
{
	if (settings.guest)
		oom_fd = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
}
