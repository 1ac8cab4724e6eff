/*
 * The commands that run for the host: starting them, their streams with flow control, and their ends.
 *
 * A stream's sender may have WINDOW_BYTES under way that its receiver has not taken; CREDIT frames give them
 * back. So a stream nobody reads holds up its own command and nothing else. EXIT is a channel's last frame:
 * all output has been sent before it.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define COMMANDS_MAX 256
#define FOREVER UINT32_MAX
/* How long a terminal without a user is left alone before it is looked at again. */
#define HUNG_MS 50
/* How long the answer to an exec waits, at most, for an end that comes as soon. */
#define HOLD_MS 100
/* And a stream's end, which most often comes just before the command's. */
#define HOLD_END_MS 20

struct output {
	int fd; /* -1 when it has ended */
	uint32_t credit;
	bool end_owed; /* END has not been sent */
	int64_t rest_until; /* not looked at before: a terminal that nobody has open just now */
	struct pollfd *slot;
};

struct command {
	bool used;
	bool orphaned; /* its session is over, and it was started to outlive it */
	uint16_t channel;
	pid_t pid; /* 0 once reaped */
	int status;
	uint32_t flags, linger, oom_before;
	int64_t reaped_at;
	int report; /* where the child says why it could not be started; -1 once it was */
	struct cgroup cgroup;
	/* Input from the host on its way to the command. With a terminal the same descriptor as output[0]'s. */
	int input;
	uint8_t *waiting;
	uint32_t waiting_at, waiting_size;
	uint32_t taken; /* bytes that CREDIT has not given back yet */
	bool input_ended, stop_sent;
	struct output output[2];
	struct pollfd *input_slot, *report_slot;
};

static struct command commands[COMMANDS_MAX];
/* No place from here on is used: the pages behind it need not be looked at. */
static int places;
static int null_fd = -1;
/* Pipes for the next command's output and errors: our end, and its own. */
static int spare_pipes[2][2] = { { -1, -1 }, { -1, -1 } };
/* Whose turn it is: the first to be served in a round changes, lest it take all the room there is. */
static unsigned turn;

static struct command *find(uint16_t channel)
{
	for (int at = 0; at < places; at++)
		if (commands[at].used && !commands[at].orphaned && commands[at].channel == channel)
			return &commands[at];
	return NULL;
}

bool command_exists(uint16_t channel)
{
	return find(channel) != NULL;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static bool has_terminal(const struct command *command)
{
	return command->flags & EXEC_TTY;
}

static void close_input(struct command *command)
{
	if (!has_terminal(command))
		close_fd(&command->input);
	command->input = -1;
	free(command->waiting);
	command->waiting = NULL;
	command->waiting_size = command->waiting_at = 0;
}

static void close_output(struct output *output)
{
	close_fd(&output->fd);
}

static void forget(struct command *command)
{
	command->input_slot = command->report_slot = NULL;
	command->output[0].slot = command->output[1].slot = NULL;
	close_input(command);
	close_output(&command->output[0]);
	close_output(&command->output[1]);
	close_fd(&command->report);
	if (!command->pid)
		cgroup_remove(&command->cgroup);
	/* Until it is reaped its process id, and with it the slot, is not free. */
	command->orphaned = true;
	command->used = command->pid != 0;
	while (places && !commands[places - 1].used)
		places--;
}

static int pipe_with(int *ours, int *theirs, bool they_read)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC) < 0)
		return -1;
	*ours = ends[they_read ? 1 : 0];
	*theirs = ends[they_read ? 0 : 1];
	/* Of our end only: each end is a file of its own. */
	fcntl(*ours, F_SETFL, O_NONBLOCK);
	fcntl(*ours, F_SETPIPE_SZ, (int)WINDOW_BYTES);
	return 0;
}

static int output_pipe(int which, int *ours, int *theirs)
{
	int *pipe = spare_pipes[which];

	if (pipe[0] < 0)
		return pipe_with(ours, theirs, false);
	*ours = pipe[0];
	*theirs = pipe[1];
	pipe[0] = pipe[1] = -1;
	return 0;
}

/* Nothing runs: have ready what the next command needs. */
static void prepare_next(void)
{
	for (int which = 0; which < 2; which++)
		if (spare_pipes[which][0] < 0)
			pipe_with(&spare_pipes[which][0], &spare_pipes[which][1], false);
	cgroup_spare();
}

void command_prepare(void)
{
	null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	prepare_next();
}

static int open_terminal(struct command *command, const struct job *job, int standard[3])
{
	struct winsize size = { .ws_row = job->rows, .ws_col = job->columns };
	int zero = 0, master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);

	if (master < 0)
		return -1;
	command->output[0].fd = command->input = master;
	if (ioctl(master, TIOCSPTLCK, &zero) < 0 || ioctl(master, TIOCSWINSZ, &size) < 0)
		return -1;
	standard[0] = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	return standard[0] < 0 ? -1 : 0;
}

/* What outlives its session would die of its output's pipe. In tests the console is not ours. */
static int open_console(void)
{
	int fd = settings.guest ? open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC) : -1;

	return fd < 0 ? open("/dev/null", O_WRONLY | O_CLOEXEC) : fd;
}

static int open_streams(struct command *command, const struct job *job, int standard[3])
{
	if (job->flags & EXEC_TTY) {
		if (open_terminal(command, job, standard) < 0)
			return -1;
		standard[1] = standard[2] = standard[0];
		return 0;
	}
	if (job->flags & EXEC_NO_STDIN)
		standard[0] = null_fd;
	else if (pipe_with(&command->input, &standard[0], true) < 0)
		return -1;
	if (job->flags & EXEC_KEEP) {
		standard[1] = standard[2] = open_console();
		return standard[1] < 0 ? -1 : 0;
	}
	if (output_pipe(0, &command->output[0].fd, &standard[1]) < 0)
		return -1;
	if (job->flags & EXEC_MERGE) {
		standard[2] = standard[1];
		return 0;
	}
	return output_pipe(1, &command->output[1].fd, &standard[2]);
}

static void reply_started(const struct command *command)
{
	uint32_t pid = (uint32_t)command->pid;
	uint8_t bytes[4] = { (uint8_t)pid, (uint8_t)(pid >> 8), (uint8_t)(pid >> 16), (uint8_t)(pid >> 24) };

	reply(command->channel, 0, 0, bytes, sizeof bytes);
}

void command_start(uint16_t channel, struct job *job)
{
	struct command *command = NULL;
	int standard[3] = { -1, -1, -1 }, report[2] = { -1, -1 }, error = EAGAIN;
	struct spawning spawning = { .job = job, .standard = standard, .report = -1 };
	int64_t begin = now_ms(), took;

	for (int at = 0; at < COMMANDS_MAX && !command; at++)
		if (!commands[at].used)
			command = &commands[at];
	if (!command) {
		reply(channel, EAGAIN, STAGE_SETUP, NULL, 0);
		return;
	}
	memset(command, 0, sizeof *command);
	command->channel = channel;
	command->flags = job->flags;
	command->linger = job->linger;
	command->report = command->input = command->output[0].fd = command->output[1].fd = -1;
	command->cgroup.fd = -1;
	if (open_streams(command, job, standard) < 0 ||
	    (spawn_reports(job) && pipe2(report, O_CLOEXEC | O_NONBLOCK) < 0)) {
		error = errno;
		goto failed;
	}
	spawning.report = report[1];
	cgroup_make(&command->cgroup, job->flags & EXEC_KEEP);
	spawning.cgroup = &command->cgroup;
	command->oom_before = oom_kills(command->cgroup.path, false);
	command->pid = spawn(&spawning);
	if (command->pid < 0) {
		error = errno;
		command->pid = 0;
		cgroup_remove(&command->cgroup);
		goto failed;
	}
	command->used = true;
	if (places <= command - commands)
		places = (int)(command - commands) + 1;
	if (spawning.started) {
		if ((error = spawning.error))
			goto failed; /* its place is free when it has been reaped */
	} else {
		command->report = report[0];
		report[0] = -1;
	}
	for (int at = 0; at < 2; at++) {
		command->output[at].credit = WINDOW_BYTES;
		command->output[at].end_owed = command->output[at].fd >= 0;
	}
	error = 0;
	if (spawning.started) {
		reply_started(command);
		/* What ends at once is told of at once. */
		took = now_ms() - begin;
		link_hold((int)(took * 3 < HOLD_MS ? took * 3 : HOLD_MS));
	}
failed:
	close_fd(&report[0]);
	close_fd(&report[1]);
	if (standard[2] != standard[1])
		close_fd(&standard[2]);
	if (standard[1] != standard[0])
		close_fd(&standard[1]);
	if (standard[0] != null_fd)
		close_fd(&standard[0]);
	if (error) {
		forget(command);
		reply(channel, error, spawning.stage ? spawning.stage : STAGE_SETUP, NULL, 0);
	}
}

static void give_credit(struct command *command, uint32_t size)
{
	uint8_t bytes[4];

	command->taken += size;
	/* The host always has the rest of the window, so small pieces can wait. */
	if (command->taken < WINDOW_BYTES / 4 || command->orphaned)
		return;
	for (int at = 0; at < 4; at++)
		bytes[at] = (uint8_t)(command->taken >> 8 * at);
	link_send(FRAME_CREDIT, 0, command->channel, bytes, sizeof bytes);
	command->taken = 0;
}

static void input_broken(struct command *command)
{
	close_input(command);
	if (!command->stop_sent && !command->input_ended)
		link_send(FRAME_STOP, 0, command->channel, NULL, 0);
	command->stop_sent = true;
}

static void end_of_input(struct command *command)
{
	struct termios terminal;

	if (has_terminal(command) && command->input >= 0 && !tcgetattr(command->input, &terminal) &&
	    (terminal.c_lflag & ICANON)) {
		char end = (char)terminal.c_cc[VEOF];

		if (write(command->input, &end, 1) < 0)
			say("the terminal took no end of input");
	}
	close_input(command);
}

/* Writes what waits; what is left stays. */
static void write_input(struct command *command)
{
	while (command->waiting_size) {
		ssize_t count = write(command->input, command->waiting + command->waiting_at,
				      command->waiting_size);

		if (count < 0) {
			if (errno != EAGAIN && errno != EINTR)
				input_broken(command);
			return;
		}
		command->waiting_at += (uint32_t)count;
		command->waiting_size -= (uint32_t)count;
		give_credit(command, (uint32_t)count);
	}
	free(command->waiting);
	command->waiting = NULL;
	command->waiting_at = 0;
	if (command->input_ended)
		end_of_input(command);
}

void command_data(uint16_t channel, const uint8_t *data, uint32_t size)
{
	struct command *command = find(channel);
	ssize_t count = 0;

	if (!command || command->input < 0)
		return; /* it was on its way when the command ended, or closed its input */
	if (command->input_ended || command->waiting_size + command->taken + size > WINDOW_BYTES) {
		link_lost(command->input_ended ? "input after its end" : "more input than credit");
		return;
	}
	if (!command->waiting_size) {
		count = write(command->input, data, size);
		if (count < 0 && errno != EAGAIN && errno != EINTR) {
			input_broken(command);
			return;
		}
		if (count < 0)
			count = 0;
		give_credit(command, (uint32_t)count);
		if ((uint32_t)count == size)
			return;
	}
	if (!command->waiting)
		command->waiting = malloc(WINDOW_BYTES);
	if (!command->waiting) {
		input_broken(command);
		return;
	}
	if (command->waiting_at + command->waiting_size + size > WINDOW_BYTES) {
		memmove(command->waiting, command->waiting + command->waiting_at, command->waiting_size);
		command->waiting_at = 0;
	}
	memcpy(command->waiting + command->waiting_at + command->waiting_size, data + count, size - (uint32_t)count);
	command->waiting_size += size - (uint32_t)count;
}

void command_end(uint16_t channel)
{
	struct command *command = find(channel);

	if (!command || command->input_ended)
		return;
	command->input_ended = true;
	if (!command->waiting_size)
		end_of_input(command);
}

void command_credit(uint16_t channel, uint8_t stream, uint32_t size)
{
	struct command *command = find(channel);

	if (stream < 1 || stream > 2) {
		link_lost("credit for no stream");
		return;
	}
	if (!command)
		return;
	if (size > WINDOW_BYTES - command->output[stream - 1].credit) {
		link_lost("more credit than there was");
		return;
	}
	command->output[stream - 1].credit += size;
}

void command_stop(uint16_t channel, uint8_t stream)
{
	struct command *command = find(channel);

	if (command && (stream == 1 || stream == 2) && !has_terminal(command))
		close_output(&command->output[stream - 1]);
}

void command_signal(uint16_t channel, int number, bool everybody)
{
	struct command *command = find(channel);

	if (!command || number < 1 || number > 64)
		return;
	if (everybody)
		family_kill(command->pid, command->cgroup.path, number);
	else if (command->pid && kill(-command->pid, number) < 0)
		kill(command->pid, number); /* before its setsid */
}

void command_resize(uint16_t channel, uint16_t rows, uint16_t columns)
{
	struct command *command = find(channel);
	struct winsize size = { .ws_row = rows, .ws_col = columns };

	if (command && has_terminal(command) && command->output[0].fd >= 0)
		ioctl(command->output[0].fd, TIOCSWINSZ, &size);
}

/* The child's word on its start: nothing at all when its program runs. */
static void read_report(struct command *command)
{
	uint8_t why[5];
	ssize_t count = read(command->report, why, sizeof why);

	if (count < 0)
		return;
	close_fd(&command->report);
	if (count == sizeof why) {
		uint16_t channel = command->channel;
		bool orphaned = command->orphaned;

		forget(command);
		if (!orphaned)
			reply(channel, (int)why[1] | (int)why[2] << 8, why[0], NULL, 0);
	} else if (!command->orphaned) {
		reply_started(command);
	}
}

void command_reaped(pid_t pid, int status)
{
	for (int at = 0; at < places; at++) {
		struct command *command = &commands[at];

		if (!command->used || command->pid != pid)
			continue;
		/* It wrote before it ended, and nobody else holds the other end. */
		if (command->report >= 0)
			read_report(command);
		if (!command->used)
			return;
		command->pid = 0;
		command->output[0].rest_until = 0;
		command->status = status;
		command->reaped_at = now_ms();
		if (command->orphaned)
			forget(command);
		return;
	}
}

static void send_exit(struct command *command)
{
	bool by_signal = WIFSIGNALED(command->status);
	uint32_t value = (uint32_t)(by_signal ? WTERMSIG(command->status) : WEXITSTATUS(command->status));
	bool killed = value == SIGKILL || value == 128 + SIGKILL;
	uint32_t kills = oom_kills(command->cgroup.path, killed) - command->oom_before;
	uint8_t payload[8] = { by_signal, by_signal && WCOREDUMP(command->status), 0, 0 };

	payload[2] = (uint8_t)value;
	for (int at = 0; at < 4; at++)
		payload[4 + at] = (uint8_t)(kills >> 8 * at);
	link_send(FRAME_EXIT, 0, command->channel, payload, sizeof payload);
	/* The host need not wait for what is left to do. */
	link_flush();
	forget(command);
	if (!places)
		prepare_next();
}

/* Read once and send; false when there is nothing to be had now. */
static bool pass_on(struct command *command, uint8_t stream)
{
	struct output *output = &command->output[stream - 1];
	uint32_t size = output->credit < PAYLOAD_MAX ? output->credit : PAYLOAD_MAX;
	ssize_t count;

	if (output->fd < 0 || !size || link_room() < HEADER_BYTES + PAYLOAD_MAX + ANSWER_MAX)
		return false;
	count = read(output->fd, link_data_place(), size);
	if (count < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (count <= 0) {
		/*
		 * A terminal says EIO while nobody has it open. Its command may just be about to exit, and closing our
		 * end would kill it with SIGHUP; or it may open /dev/tty again.
		 */
		if (has_terminal(command) && command->pid) {
			output->rest_until = now_ms() + HUNG_MS;
			return false;
		}
		if (has_terminal(command))
			close_input(command);
		close_output(output);
		return false;
	}
	output->credit -= (uint32_t)count;
	link_data_done(stream, command->channel, (uint32_t)count);
	return true;
}

static bool over(struct command *command)
{
	bool waited;

	if (command->pid || command->report >= 0)
		return false;
	waited = command->linger != FOREVER && now_ms() - command->reaped_at >= (int64_t)command->linger;
	for (uint8_t stream = 1; stream <= 2; stream++) {
		struct output *output = &command->output[stream - 1];
		int left = 0;

		if (output->fd < 0)
			continue;
		/* What was written before the exit is in the pipe; a process that lives on may hold it open. */
		if (!waited || (!ioctl(output->fd, FIONREAD, &left) && left > 0))
			return false;
		close_output(output);
	}
	return true;
}

int commands_poll(struct pollfd *slots, int most)
{
	/* While the host is away, commands go on until their pipes are full. */
	bool room = link_room() >= HEADER_BYTES + PAYLOAD_MAX + ANSWER_MAX;
	int64_t now = now_ms();
	int count = 0;

	if (!link_is_synchronous())
		return 0;
	for (int at = 0; at < places && count + 4 <= most; at++) {
		struct command *command = &commands[at];

		command->input_slot = command->report_slot = NULL;
		command->output[0].slot = command->output[1].slot = NULL;
		if (!command->used)
			continue;
		if (command->report >= 0) {
			slots[count] = (struct pollfd){ .fd = command->report, .events = POLLIN };
			command->report_slot = &slots[count++];
		}
		if (command->input >= 0 && (command->waiting_size || !has_terminal(command))) {
			/* Without POLLOUT it still tells that the reader has gone. */
			slots[count] = (struct pollfd){ .fd = command->input,
							.events = command->waiting_size ? POLLOUT : 0 };
			command->input_slot = &slots[count++];
		}
		for (int which = 0; which < 2; which++) {
			struct output *output = &command->output[which];

			if (output->fd < 0 || !output->credit || !room || now < output->rest_until)
				continue;
			slots[count] = (struct pollfd){ .fd = output->fd, .events = POLLIN };
			output->slot = &slots[count++];
		}
	}
	return count;
}

void commands_serve(void)
{
	if (!link_is_synchronous())
		return;
	turn++;
	for (int round = 0, all = places; round < all; round++) {
		struct command *command = &commands[(turn + (unsigned)round) % (unsigned)all];

		if (!command->used || link_room() < ANSWER_MAX)
			continue;
		if (command->report_slot && command->report_slot->revents && command->report >= 0)
			read_report(command);
		if (!command->used)
			continue;
		if (command->input_slot && command->input_slot->revents && command->input >= 0) {
			if (command->waiting_size)
				write_input(command);
			else if (command->input_slot->revents & POLLERR)
				input_broken(command);
		}
		/* The answer to the request is the channel's first frame. */
		if (command->report >= 0 || command->orphaned)
			continue;
		for (uint8_t stream = 1; stream <= 2; stream++) {
			struct output *output = &command->output[stream - 1];

			if (output->slot && output->slot->revents)
				pass_on(command, stream);
		}
		if (over(command)) {
			if (link_room() < ANSWER_MAX)
				continue;
			for (uint8_t stream = 1; stream <= 2; stream++)
				if (command->output[stream - 1].end_owed)
					link_send(FRAME_END, stream, command->channel, NULL, 0);
			send_exit(command);
			continue;
		}
		for (uint8_t stream = 1; stream <= 2; stream++) {
			struct output *output = &command->output[stream - 1];

			if (output->end_owed && output->fd < 0 && link_room() >= ANSWER_MAX) {
				bool alone = link_is_empty();

				output->end_owed = false;
				link_send(FRAME_END, stream, command->channel, NULL, 0);
				if (alone)
					link_hold(HOLD_END_MS);
			}
		}
	}
}

/* When something about it is due without poll telling, in ms from now; -1 for never. */
static int64_t due(const struct command *command, int64_t now)
{
	int64_t left;

	if (!command->used || command->orphaned)
		return -1;
	if (command->pid) {
		left = command->output[0].rest_until - now;
		return left > 0 ? left : -1;
	}
	if (command->linger == FOREVER)
		return -1;
	left = command->reaped_at + (int64_t)command->linger - now;
	/* Past it, only output that is held up keeps it, and that has its own wake-up. */
	return left > 0 ? left : 100;
}

int commands_timeout(void)
{
	int64_t now = places ? now_ms() : 0, nearest = -1;

	for (int at = 0; at < places; at++) {
		int64_t left = due(&commands[at], now);

		if (left >= 0 && (nearest < 0 || left < nearest))
			nearest = left;
	}
	return nearest > INT_MAX ? INT_MAX : (int)nearest;
}

void commands_end_session(void)
{
	pid_t kept[COMMANDS_MAX];
	int count = 0;

	for (int at = places - 1; at >= 0; at--) {
		struct command *command = &commands[at];

		if (!command->used)
			continue;
		if (command->flags & EXEC_KEEP) {
			if (command->pid)
				kept[count++] = command->pid;
		} else {
			family_kill(command->pid, command->cgroup.path, SIGKILL);
		}
		if (!command->orphaned)
			forget(command);
	}
	family_kill_orphans(kept, count);
}
