/*
 * What the host asks for: taking requests apart, doing the short ones, starting the long ones.
 */
#include "agent.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define WORDS_MAX 65536

/* A request in parts: no other begins before it is whole. */
static uint8_t *request;
static uint32_t request_size;
static uint16_t request_channel;

uint32_t take_u32(struct fields *fields)
{
	uint32_t value;

	if (fields->bad || fields->end - fields->at < 4) {
		fields->bad = true;
		return 0;
	}
	memcpy(&value, fields->at, 4); /* x86-64 is little-endian, as the protocol is */
	fields->at += 4;
	return value;
}

uint64_t take_u64(struct fields *fields)
{
	uint64_t low = take_u32(fields);

	return low | (uint64_t)take_u32(fields) << 32;
}

char *take_text(struct fields *fields)
{
	uint32_t size = take_u32(fields);
	char *text;

	if (fields->bad || size > (size_t)(fields->end - fields->at) || memchr(fields->at, 0, size) ||
	    !(text = malloc((size_t)size + 1))) {
		fields->bad = true;
		return NULL;
	}
	memcpy(text, fields->at, size);
	text[size] = 0;
	fields->at += size;
	return text;
}

static void free_words(char **words)
{
	for (char **word = words; words && *word; word++)
		free(*word);
	free(words);
}

static char **take_words(struct fields *fields)
{
	uint32_t count = take_u32(fields);
	char **words;

	/* Each word has at least its length. */
	if (fields->bad || count > WORDS_MAX || count > (size_t)(fields->end - fields->at) / 4 ||
	    !(words = calloc((size_t)count + 1, sizeof *words))) {
		fields->bad = true;
		return NULL;
	}
	for (uint32_t at = 0; at < count && !fields->bad; at++)
		words[at] = take_text(fields);
	return words;
}

void reply(uint16_t channel, int error, uint8_t stage, const void *data, uint32_t size)
{
	static uint8_t payload[ANSWER_MAX - HEADER_BYTES];
	uint32_t number = (uint32_t)error;

	if (size > sizeof payload - 8)
		size = sizeof payload - 8;
	memset(payload, 0, 8);
	memcpy(payload, &number, 4);
	payload[4] = stage;
	if (size)
		memcpy(payload + 8, data, size);
	link_send(FRAME_REPLY, 0, channel, payload, size + 8);
}

static void start_exec(uint16_t channel, struct fields *fields)
{
	struct job job = { 0 };
	uint32_t size;

	job.flags = take_u32(fields) & (EXEC_TTY | EXEC_MERGE | EXEC_NO_STDIN | EXEC_KEEP);
	job.linger = take_u32(fields);
	size = take_u32(fields);
	job.rows = (uint16_t)size;
	job.columns = (uint16_t)(size >> 16);
	job.user = take_text(fields);
	job.cwd = take_text(fields);
	job.argv = take_words(fields);
	job.env = take_words(fields);
	if (fields->bad || !job.argv[0])
		reply(channel, EINVAL, STAGE_SETUP, NULL, 0);
	else
		command_start(channel, &job);
	free(job.user);
	free(job.cwd);
	free_words(job.argv);
	free_words(job.env);
}

static void start_function(uint16_t channel, int (*function)(void *), void *context, uint32_t flags)
{
	struct job job = { .function = function, .context = context, .linger = UINT32_MAX, .flags = flags };

	command_start(channel, &job);
}

static void start_copy(uint16_t channel, struct fields *fields, bool put)
{
	struct copy copy = { 0 };
	struct identity identity;
	char *user;
	int error;

	copy.flags = take_u32(fields);
	copy.path = take_text(fields);
	copy.name = take_text(fields);
	user = take_text(fields);
	if (fields->bad) {
		reply(channel, EINVAL, STAGE_SETUP, NULL, 0);
	} else if ((error = look_up_user(user, &identity))) {
		reply(channel, error, STAGE_USER, NULL, 0);
	} else {
		copy.uid = identity.uid;
		copy.gid = identity.gid;
		start_function(channel, put ? files_put : files_get, &copy, put ? 0 : EXEC_NO_STDIN);
	}
	free(copy.path);
	free(copy.name);
	free(user);
}

static void start_mount(uint16_t channel, struct fields *fields)
{
	struct mounting mounting = { 0 };

	mounting.flags = take_u32(fields);
	mounting.type = take_text(fields);
	mounting.source = take_text(fields);
	mounting.target = take_text(fields);
	mounting.data = take_text(fields);
	if (fields->bad)
		reply(channel, EINVAL, STAGE_SETUP, NULL, 0);
	else
		start_function(channel, do_mount, &mounting, EXEC_NO_STDIN);
	free(mounting.type);
	free(mounting.source);
	free(mounting.target);
	free(mounting.data);
}

static void answer_set_time(uint16_t channel, struct fields *fields)
{
	uint64_t seconds = take_u64(fields);
	uint32_t nanoseconds = take_u32(fields);
	uint64_t tolerance = fields->bad || fields->at == fields->end ? 0 : take_u64(fields);
	struct timespec before;
	uint64_t was, now;
	int error = EINVAL;

	clock_gettime(CLOCK_REALTIME, &before);
	was = (uint64_t)before.tv_sec * 1000000000u + (uint64_t)before.tv_nsec;
	if (!fields->bad) {
		now = seconds * 1000000000u + nanoseconds;
		error = (was > now ? was - now : now - was) < tolerance ? 0 : set_time(seconds, nanoseconds);
	}
	reply(channel, error, 0, &was, sizeof was);
}

static void answer_hostname(uint16_t channel, struct fields *fields)
{
	char *name = take_text(fields);
	int error = EINVAL;

	if (!fields->bad && name[0])
		error = sethostname(name, strlen(name)) < 0 ? errno : 0;
	reply(channel, error, 0, NULL, 0);
	free(name);
}

static void answer_network(uint16_t channel, struct fields *fields)
{
	uint32_t address = take_u32(fields), bits = take_u32(fields), gateway = take_u32(fields);
	char *interface = take_text(fields);

	reply(channel, fields->bad ? EINVAL : set_network(interface, address, bits, gateway), 0, NULL, 0);
	free(interface);
}

static void handle_request(uint16_t channel, const uint8_t *bytes, uint32_t size)
{
	struct fields fields = { .at = bytes, .end = bytes + size };
	uint32_t operation = take_u32(&fields);
	static char text[4096];
	static int how;

	if (command_exists(channel)) {
		link_lost("a channel in use");
		return;
	}
	switch (operation) {
	case OP_EXEC:
		start_exec(channel, &fields);
		break;
	case OP_PUT:
	case OP_GET:
		start_copy(channel, &fields, operation == OP_PUT);
		break;
	case OP_PING:
		reply(channel, 0, 0, fields.at, (uint32_t)(fields.end - fields.at));
		break;
	case OP_SET_TIME:
		answer_set_time(channel, &fields);
		break;
	case OP_ADD_ENTROPY:
		reply(channel, add_entropy(fields.at, (uint32_t)(fields.end - fields.at)), 0, NULL, 0);
		break;
	case OP_INFO:
		reply(channel, 0, 0, text, describe(text, sizeof text));
		break;
	case OP_MOUNT:
		start_mount(channel, &fields);
		break;
	case OP_HOSTNAME:
		answer_hostname(channel, &fields);
		break;
	case OP_POWER:
		how = (int)take_u32(&fields);
		if (!settings.guest)
			reply(channel, EPERM, 0, NULL, 0);
		else
			start_function(channel, do_power, &how, 0);
		break;
	case OP_SYNC:
		start_function(channel, do_sync, NULL, EXEC_NO_STDIN);
		break;
	case OP_NETWORK:
		answer_network(channel, &fields);
		break;
	default:
		reply(channel, ENOSYS, 0, NULL, 0);
	}
}

static void drop_request(void)
{
	free(request);
	request = NULL;
	request_size = 0;
}

void session_ended(void)
{
	drop_request();
	commands_end_session();
}

static void take_request(uint8_t flags, uint16_t channel, const uint8_t *payload, uint32_t size)
{
	uint8_t *whole;

	if (!request_size && !(flags & FLAG_MORE)) {
		handle_request(channel, payload, size);
		return;
	}
	if ((request_size && channel != request_channel) || size > REQUEST_MAX - request_size || !size) {
		drop_request();
		link_lost("a request's parts do not fit");
		return;
	}
	whole = realloc(request, request_size + size);
	if (!whole) {
		drop_request();
		link_lost("no memory for a request");
		return;
	}
	request = whole;
	memcpy(request + request_size, payload, size);
	request_size += size;
	request_channel = channel;
	if (flags & FLAG_MORE)
		return;
	handle_request(channel, request, request_size);
	drop_request();
}

void handle_frame(uint8_t type, uint8_t flags, uint16_t channel, const uint8_t *payload, uint32_t size)
{
	struct fields fields = { .at = payload, .end = payload + size };
	uint32_t value = 0;

	if (type == FRAME_CREDIT || type == FRAME_SIGNAL || type == FRAME_RESIZE)
		value = take_u32(&fields);
	if (fields.bad) {
		link_lost("a short frame");
		return;
	}
	switch (type) {
	case FRAME_REQUEST:
		take_request(flags, channel, payload, size);
		break;
	case FRAME_DATA:
		command_data(channel, payload, size);
		break;
	case FRAME_END:
		command_end(channel);
		break;
	case FRAME_CREDIT:
		command_credit(channel, flags, value);
		break;
	case FRAME_STOP:
		command_stop(channel, flags);
		break;
	case FRAME_SIGNAL:
		command_signal(channel, (int)(value & 0xff), flags & FLAG_FAMILY);
		break;
	case FRAME_RESIZE:
		command_resize(channel, (uint16_t)value, (uint16_t)(value >> 16));
		break;
	default:
		link_lost("a frame that only the guest sends");
	}
}
