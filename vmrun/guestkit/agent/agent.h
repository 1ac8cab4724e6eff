/*
 * The guest agent: what its files share. docs/agent.md is the protocol, main.c the way in.
 *
 * One thread, one poll loop. What may wait for a disk or for another file system (copying files, mounting,
 * syncing) runs in a child, like a command, so that the loop never waits; but for the start of root's commands
 * (spawn.c). Nothing grows without a bound: a command has at most one window of input waiting, and output is
 * read only when there is room to send it.
 *
 * Where the guest's kernel is interpreted, a system call costs it 0.2 to 5 ms, and the first write to a page
 * 2 ms: what a command needs besides is kept ready, and what its end leaves to do is done after it was told.
 */
#ifndef AGENT_H
#define AGENT_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define AGENT_VERSION 1
#define HEADER_BYTES 8
#define PAYLOAD_MAX 65536u
#define WINDOW_BYTES 262144u
#define REQUEST_MAX (4u << 20)
#define NONCE_BYTES 16
#define HELLO_BYTES 56
#define HELLO_AT_ONCE 1 /* frames follow, without the third hello */
#define MAGIC "\xF5vmrun-agent\xC1\xE2\xD3\xB4"
#define MAGIC_BYTES 16
/* The room for one answer: input is not looked at without it. */
#define ANSWER_MAX 8192u

enum frame {
	FRAME_REQUEST = 1,
	FRAME_REPLY = 2,
	FRAME_DATA = 3,
	FRAME_END = 4,
	FRAME_CREDIT = 5,
	FRAME_EXIT = 6,
	FRAME_SIGNAL = 7,
	FRAME_RESIZE = 8,
	FRAME_STOP = 9,
};

#define FLAG_MORE 1 /* of a REQUEST: another part follows */
#define FLAG_FAMILY 1 /* of a SIGNAL: all descendants, not only the process group */

enum operation {
	OP_EXEC = 1,
	OP_PUT = 2,
	OP_GET = 3,
	OP_PING = 4,
	OP_SET_TIME = 5,
	OP_ADD_ENTROPY = 6,
	OP_INFO = 7,
	OP_MOUNT = 8,
	OP_HOSTNAME = 9,
	OP_POWER = 10,
	OP_SYNC = 11,
	OP_NETWORK = 12,
};

#define EXEC_TTY 1
#define EXEC_MERGE 2
#define EXEC_NO_STDIN 4
#define EXEC_KEEP 8

enum stage { STAGE_SETUP = 1, STAGE_USER = 2, STAGE_CWD = 3, STAGE_EXEC = 4 };

/* A reader of a request's fields. After the first field that is not there, `bad` is set and all are 0. */
struct fields {
	const uint8_t *at, *end;
	bool bad;
};
uint32_t take_u32(struct fields *fields);
uint64_t take_u64(struct fields *fields);
/* A string: its length (u32), its bytes; it holds no NUL. The copy is freed by the caller; 0 when bad. */
char *take_text(struct fields *fields);

/* How the agent was started. */
struct settings {
	bool init; /* PID 1 of the guest */
	bool guest; /* in a guest: it may protect itself from the OOM killer */
	int port; /* which of the ports this process serves */
	const char *cgroup; /* the cgroup v2 directory that commands get theirs below, or 0 */
};
extern struct settings settings;

/* link.c: the stream to the host. */
void link_open(int fd);
void link_close(void);
bool link_is_open(void);
/* Whether there is a session: both hellos went both ways. */
bool link_is_synchronous(void);
/* Whether the port's end is perhaps only that Linux has not said yet that the host has opened it. */
bool link_host_may_come(void);
short link_wants(void);
/* Read, handle and write what poll found; false when the host has gone. */
bool link_serve(short found);
bool link_flush(void);
/* What is in the way out may wait so long for more to go with it: each write is an interrupt or two. */
void link_hold(int ms);
bool link_is_empty(void);
int link_timeout(void);
uint32_t link_room(void);
void link_send(enum frame type, uint8_t flags, uint16_t channel, const void *payload, uint32_t size);
/* Where a DATA payload may be put, then how much of it there is. Needs room for HEADER_BYTES more. */
uint8_t *link_data_place(void);
void link_data_done(uint8_t stream, uint16_t channel, uint32_t size);
/* The host broke the protocol: nothing is understood before its next hello. */
void link_lost(const char *why);

/* requests.c */
void handle_frame(uint8_t type, uint8_t flags, uint16_t channel, const uint8_t *payload, uint32_t size);
void session_ended(void);
void reply(uint16_t channel, int error, uint8_t stage, const void *data, uint32_t size);

/* command.c: what runs for the host, and its streams. */
struct job {
	char **argv, **env;
	char *user, *cwd;
	uint32_t flags;
	uint16_t rows, columns;
	uint32_t linger; /* ms to wait for the streams' ends after the exit; ~0: forever */
	/* In place of argv: a function of the agent's own. Its result is the exit code. */
	int (*function)(void *context);
	void *context;
};
void command_start(uint16_t channel, struct job *job);
bool command_exists(uint16_t channel);
void command_data(uint16_t channel, const uint8_t *data, uint32_t size);
void command_end(uint16_t channel);
void command_credit(uint16_t channel, uint8_t stream, uint32_t size);
void command_stop(uint16_t channel, uint8_t stream);
void command_signal(uint16_t channel, int number, bool family);
void command_resize(uint16_t channel, uint16_t rows, uint16_t columns);
void command_reaped(pid_t pid, int status);
void commands_end_session(void);
int commands_poll(struct pollfd *slots, int most);
void commands_serve(void);
/* Milliseconds until something is due, or -1. */
int commands_timeout(void);

void command_prepare(void);

/* spawn.c: the way to a child. */
struct cgroup {
	char path[128]; /* empty: none */
	int fd; /* of the directory, or -1: the child goes there by itself */
};
/*
 * The child's process id, or -1 and errno. With `started` set it runs its program already, or could not: then
 * `stage` and `error` tell. Else the child tells through `report`, as a stage (u8) and an errno (u32), or by
 * closing it.
 */
struct spawning {
	struct job *job;
	const int *standard;
	int report;
	const struct cgroup *cgroup;
	bool started;
	uint8_t stage;
	int error;
};
pid_t spawn(struct spawning *spawning);
/* Whether a child of this job tells through a pipe. */
bool spawn_reports(const struct job *job);
void spawn_prepare(void);

/* user.c: "name", "uid", "name:group", "uid:gid" looked up in the guest's own files; 0 or an errno. */
#define GROUPS_MAX 64
struct identity {
	uid_t uid;
	gid_t gid;
	gid_t groups[GROUPS_MAX];
	int group_count;
	char name[64], home[256];
};
int look_up_user(const char *specification, struct identity *identity);

/* family.c: all that a command has started. */
void family_kill(pid_t pid, const char *cgroup, int number);
void family_kill_orphans(const pid_t *kept, int count);
void cgroup_make(struct cgroup *cgroup, bool kept);
void cgroup_remove(struct cgroup *cgroup);
void cgroup_prepare(void);
/* Have the next command's ready. */
void cgroup_spare(void);
/* Processes killed for want of memory, in the cgroup or anywhere. `sure`: one may have been just now. */
uint32_t oom_kills(const char *cgroup, bool sure);

/* files.c */
struct copy {
	char *path;
	uint32_t flags;
	uid_t uid;
	gid_t gid;
	char *name;
};
#define COPY_SPECIAL_BITS 1
int files_put(void *copy);
int files_get(void *copy);

/* system.c */
void system_prepare(void);
int set_time(uint64_t seconds, uint32_t nanoseconds);
int add_entropy(const uint8_t *bytes, uint32_t size);
uint32_t describe(char *to, uint32_t size);
int set_network(const char *interface, uint32_t address, uint32_t bits, uint32_t gateway);
struct mounting {
	char *type, *source, *target, *data;
	uint32_t flags;
};
int do_mount(void *mounting);
int do_sync(void *unused);
/* mkdir -p; 0 or an errno. */
int do_mkdir(const char *path);
enum { POWER_OFF = 0, POWER_RESET = 1 };
int do_power(void *how);

/* boot.c: PID 1's work before it serves. */
void boot_prepare(void);
/* The image's own init, with its arguments, or NULL: the agent serves alone. */
char **boot_init(int argc, char **argv);

/* port.c */
#define PORTS_MAX 8
/* The open port number settings.port, or -1 while there is none, or while somebody else has it. */
int port_open(void);
/* Told at the first session of a port: somebody else may want the next one. */
void port_in_use(void);

bool read_file(const char *path, char *to, size_t size);
bool write_file(const char *path, const char *text);
int64_t now_ms(void);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
