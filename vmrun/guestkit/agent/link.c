/*
 * The stream to the host: frames in and out, and the hello that both sides begin anew with.
 *
 * After a snapshot was restored, another host is at the other end and knows nothing of what was under way:
 * bytes of the old session may lie in the rings, and the frame that we were in the middle of never ends. So
 * MAGIC is looked for in all that comes in, wherever it stands. No frame can hold it: the host cuts payloads
 * where it would appear, and a header has none of its bytes where it would have to.
 */
#include "agent.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define OUT_BYTES (4 * (PAYLOAD_MAX + HEADER_BYTES))

static int in_fd = -1;
/* LOST: what comes is not understood. ANSWERED: our hello went out, the host's echo has not come. */
static enum { LOST, ANSWERED, SYNCHRONOUS } state;
static uint8_t host_nonce[NONCE_BYTES], own_nonce[NONCE_BYTES];

/* What the last read brought: [in_at, in_frames) are frames; a MAGIC that follows them ends at `magic_end`. */
static uint8_t in[PAYLOAD_MAX];
static uint32_t in_at, in_frames, in_size, magic_end;
/* How much of MAGIC the bytes seen last are. */
static uint32_t matched;
/* How much of a hello is here, from its MAGIC on. */
static uint8_t hello[HELLO_BYTES];
static uint32_t hello_size;

static uint8_t frame[HEADER_BYTES + PAYLOAD_MAX];
static uint32_t frame_size;

static uint8_t out[OUT_BYTES];
static uint32_t out_at, out_end;
static int64_t hold_until; /* 0: what is there goes out */
/*
 * The port was seen to be open on the host's side. Linux hands out what the host sends at once, and works off
 * later that the host has opened: until then a read has no end and no data, but zero bytes, as when it has left.
 */
static bool host_seen;

static uint32_t little(const uint8_t *bytes, int count)
{
	uint32_t value = 0;

	while (count--)
		value = value << 8 | bytes[count];
	return value;
}

static void put_little(uint8_t *to, uint32_t value, int count)
{
	for (int at = 0; at < count; at++, value >>= 8)
		to[at] = (uint8_t)value;
}

void link_open(int fd)
{
	in_fd = fd;
	state = LOST;
	in_at = in_frames = in_size = magic_end = matched = hello_size = frame_size = out_at = out_end = 0;
	memset(host_nonce, 0, sizeof host_nonce);
	host_seen = false;
}

bool link_host_may_come(void)
{
	return state == SYNCHRONOUS && !host_seen;
}

void link_close(void)
{
	close(in_fd);
	in_fd = -1;
}

bool link_is_open(void)
{
	return in_fd >= 0;
}

bool link_is_synchronous(void)
{
	return in_fd >= 0 && state == SYNCHRONOUS;
}

static void compact(void)
{
	if (!out_at)
		return;
	memmove(out, out + out_at, out_end - out_at);
	out_end -= out_at;
	out_at = 0;
}

uint32_t link_room(void)
{
	return OUT_BYTES - (out_end - out_at);
}

static void put_header(uint8_t type, uint8_t flags, uint16_t channel, uint32_t size)
{
	uint8_t *header = out + out_end;

	header[0] = type;
	header[1] = flags;
	put_little(header + 2, channel, 2);
	put_little(header + 4, size, 4);
	out_end += HEADER_BYTES;
}

void link_send(enum frame type, uint8_t flags, uint16_t channel, const void *payload, uint32_t size)
{
	/* Who sends has asked for room; without a session there is nobody to send to. */
	if (state != SYNCHRONOUS || link_room() < HEADER_BYTES + size)
		return;
	if (OUT_BYTES - out_end < HEADER_BYTES + size)
		compact();
	put_header((uint8_t)type, flags, channel, size);
	if (size)
		memcpy(out + out_end, payload, size);
	out_end += size;
	hold_until = 0;
}

uint8_t *link_data_place(void)
{
	if (OUT_BYTES - out_end < HEADER_BYTES + PAYLOAD_MAX)
		compact();
	return out + out_end + HEADER_BYTES;
}

void link_data_done(uint8_t stream, uint16_t channel, uint32_t size)
{
	put_header(FRAME_DATA, stream, channel, size);
	out_end += size;
	hold_until = 0;
}

void link_lost(const char *why)
{
	say("the host broke the protocol: %s", why);
	state = LOST;
	frame_size = 0;
}

static void send_hello(uint8_t flags)
{
	uint8_t *to;

	if (OUT_BYTES - out_end < HELLO_BYTES)
		compact();
	to = out + out_end;
	memset(to, 0, HELLO_BYTES);
	memcpy(to, MAGIC, MAGIC_BYTES);
	put_little(to + 16, AGENT_VERSION, 2);
	to[18] = flags;
	put_little(to + 20, WINDOW_BYTES, 4);
	memcpy(to + 24, own_nonce, NONCE_BYTES);
	memcpy(to + 40, host_nonce, NONCE_BYTES);
	out_end += HELLO_BYTES;
	hold_until = 0;
}

static void handle_hello(void)
{
	static const uint8_t nobody[NONCE_BYTES];
	const uint8_t *nonce = hello + 24, *echo = hello + 40;
	bool same = !memcmp(nonce, host_nonce, NONCE_BYTES);
	bool at_once = hello[18] & HELLO_AT_ONCE;

	if (!memcmp(echo, nobody, NONCE_BYTES)) {
		if (same && state == SYNCHRONOUS)
			return;
		if (!same || state == LOST) {
			session_ended();
			memcpy(host_nonce, nonce, NONCE_BYTES);
			if (getrandom(own_nonce, NONCE_BYTES, GRND_NONBLOCK) != NONCE_BYTES)
				own_nonce[0]++; /* Too early for random numbers: the host's nonce does the work. */
			state = ANSWERED;
			/* The host looks for its nonce in whatever comes; what was half sent does not matter. */
			out_at = out_end = 0;
		}
		if (link_room() >= HELLO_BYTES)
			send_hello(at_once ? HELLO_AT_ONCE : 0);
		if (at_once) {
			state = SYNCHRONOUS;
			port_in_use();
		}
	} else if (same && state == ANSWERED && !memcmp(echo, own_nonce, NONCE_BYTES)) {
		state = SYNCHRONOUS;
		port_in_use();
	}
}

/* Look for MAGIC from in_at on; sets in_frames, magic_end and `matched`. */
static void scan(void)
{
	uint32_t at = in_at;

	magic_end = 0;
	in_frames = in_size;
	while (at < in_size) {
		if (!matched) {
			const uint8_t *first = memchr(in + at, (uint8_t)MAGIC[0], in_size - at);

			if (!first)
				return;
			at = (uint32_t)(first - in);
		}
		if (in[at] != (uint8_t)MAGIC[matched]) {
			/* MAGIC has its first byte only once, so no other match can have begun before this byte. */
			matched = 0;
			continue;
		}
		at++;
		if (++matched == MAGIC_BYTES) {
			matched = 0;
			magic_end = at;
			in_frames = at >= in_at + MAGIC_BYTES ? at - MAGIC_BYTES : in_at;
			return;
		}
	}
}

/* One frame out of [in_at, in_frames); false when there is no whole one. */
static bool next_frame(void)
{
	for (;;) {
		uint32_t wanted = HEADER_BYTES, left = in_frames - in_at;

		if (state != SYNCHRONOUS) {
			in_at = in_frames;
			return false;
		}
		if (frame_size >= HEADER_BYTES) {
			if (frame[0] == (uint8_t)MAGIC[0] && matched && !left)
				return false; /* perhaps the first bytes of a hello */
			wanted += little(frame + 4, 4);
			if (frame[0] < FRAME_REQUEST || frame[0] > FRAME_STOP || wanted > sizeof frame) {
				link_lost("no such frame");
				continue;
			}
		}
		if (frame_size >= HEADER_BYTES && frame_size == wanted) {
			frame_size = 0;
			handle_frame(frame[0], frame[1], (uint16_t)little(frame + 2, 2), frame + HEADER_BYTES,
				     wanted - HEADER_BYTES);
			return true;
		}
		if (!left)
			return false;
		if (left > wanted - frame_size)
			left = wanted - frame_size;
		memcpy(frame + frame_size, in + in_at, left);
		frame_size += left;
		in_at += left;
	}
}

static void take_hello(void)
{
	uint32_t count = HELLO_BYTES - hello_size;

	if (count > in_size - in_at)
		count = in_size - in_at;
	memcpy(hello + hello_size, in + in_at, count);
	hello_size += count;
	in_at += count;
	in_frames = in_at;
	if (hello_size == HELLO_BYTES) {
		hello_size = 0;
		handle_hello();
		scan();
	}
}

/* Handle what was read; false when there is no room for answers. */
static bool digest(void)
{
	for (;;) {
		if (link_room() < ANSWER_MAX)
			return false;
		if (next_frame())
			continue;
		if (magic_end) {
			in_at = magic_end;
			magic_end = 0;
			memcpy(hello, MAGIC, MAGIC_BYTES);
			hello_size = MAGIC_BYTES;
			frame_size = 0;
		}
		if (!hello_size || in_at == in_size)
			return true;
		take_hello();
	}
}

static bool held(void)
{
	if (hold_until && (now_ms() >= hold_until || link_room() < OUT_BYTES / 2))
		hold_until = 0;
	return hold_until != 0;
}

short link_wants(void)
{
	short wants = 0;

	if (link_room() >= ANSWER_MAX)
		wants |= POLLIN;
	if (out_end > out_at && !held())
		wants |= POLLOUT;
	return wants;
}

bool link_is_empty(void)
{
	return out_end == out_at;
}

void link_hold(int ms)
{
	hold_until = now_ms() + ms;
}

int link_timeout(void)
{
	int64_t left = hold_until ? hold_until - now_ms() : 0;

	return out_end == out_at || !hold_until ? -1 : left < 0 ? 0 : (int)left;
}

bool link_flush(void)
{
	if (out_end > out_at && held())
		return true;
	hold_until = 0;
	while (out_end > out_at) {
		ssize_t count = write(in_fd, out + out_at, out_end - out_at);

		if (count < 0)
			return errno == EAGAIN || errno == EINTR;
		host_seen = true;
		out_at += (uint32_t)count;
		if (out_at == out_end)
			out_at = out_end = 0;
	}
	return true;
}

bool link_serve(short found)
{
	if ((found & POLLOUT) && !link_flush())
		return false;
	/* What was held back for want of room comes before anything new. */
	if (!digest() || !(found & (POLLIN | POLLHUP | POLLERR)))
		return true;
	{
		ssize_t count = read(in_fd, in, sizeof in);

		if (count < 0) {
			host_seen = host_seen || errno == EAGAIN;
			return errno == EAGAIN || errno == EINTR;
		}
		if (count == 0) {
			errno = 0;
			return false;
		}
		in_at = in_frames = 0;
		in_size = (uint32_t)count;
		if (!hello_size)
			scan();
		digest();
	}
	return link_flush();
}
