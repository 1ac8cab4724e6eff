/*
 * The child between fork and exec: its terminal or pipes, its user, its directory, its environment.
 *
 * What goes wrong is told through the report pipe as a stage and an errno; the pipe closes at the exec.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static int report_fd;

__attribute__((noreturn)) static void fail(enum stage stage, int error)
{
	uint8_t why[5] = { (uint8_t)stage, (uint8_t)error, (uint8_t)(error >> 8), 0, 0 };

	if (write(report_fd, why, sizeof why) != sizeof why)
		say("a command could not be started, and nobody listens");
	_exit(127);
}

static void reset_signals(void)
{
	sigset_t none;

	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static void take_streams(const int standard[3], bool terminal)
{
	int away[3];

	/* They may have the numbers 0 to 2 themselves, in another order. */
	for (int at = 0; at < 3; at++) {
		away[at] = fcntl(standard[at], F_DUPFD_CLOEXEC, 3);
		if (away[at] < 0)
			fail(STAGE_SETUP, errno);
	}
	report_fd = fcntl(report_fd, F_DUPFD_CLOEXEC, 3);
	for (int at = 0; at < 3; at++)
		dup2(away[at], at);
	if (terminal && ioctl(0, TIOCSCTTY, 0) < 0)
		fail(STAGE_SETUP, errno);
}

static void become(const struct identity *identity)
{
	if (geteuid() == 0) {
		if (setgroups((size_t)identity->group_count, identity->groups) < 0 ||
		    setresgid(identity->gid, identity->gid, identity->gid) < 0 ||
		    setresuid(identity->uid, identity->uid, identity->uid) < 0)
			fail(STAGE_USER, errno);
	} else if (identity->uid != geteuid() || identity->gid != getegid()) {
		fail(STAGE_USER, EPERM);
	}
}

static void set_default(const char *name, const char *value)
{
	if (value[0] && setenv(name, value, 0) < 0)
		fail(STAGE_SETUP, errno);
}

__attribute__((noreturn)) void spawn_child(struct job *job, const int standard[3], int report, const char *cgroup)
{
	struct identity identity;
	int error;

	report_fd = report;
	setsid();
	reset_signals();
	umask(022);
	if (cgroup[0]) {
		char path[192];

		snprintf(path, sizeof path, "%s/cgroup.procs", cgroup);
		if (!write_file(path, "0"))
			fail(STAGE_SETUP, errno);
	}
	if (settings.guest)
		write_file("/proc/self/oom_score_adj", "0");
	take_streams(standard, job->flags & EXEC_TTY);
	if (job->function) {
		/* Without an exec, other commands' pipes stay open here unless they are closed. */
		close_range(3, ~0u, 0);
		_exit(job->function(job->context) & 0xff);
	}
	error = look_up_user(job->user ? job->user : "", &identity);
	if (error)
		fail(STAGE_USER, error);
	if (job->user && job->user[0])
		become(&identity);
	environ = job->env;
	set_default("PATH", DEFAULT_PATH);
	set_default("HOME", identity.home);
	set_default("USER", identity.name);
	if (chdir(job->cwd && job->cwd[0] ? job->cwd : "/") < 0)
		fail(STAGE_CWD, errno);
	execvp(job->argv[0], job->argv);
	fail(STAGE_EXEC, errno);
}
