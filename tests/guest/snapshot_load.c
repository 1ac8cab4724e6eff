/*
 * What a machine is snapshotted in the middle of: memory that is hashed by a thread on each CPU, blocks that are
 * written to the disk and read back, packets to the host and from it. All of it is counted, and what is wrong is
 * counted too.
 *
 * It obeys lines on the console, each with a word that comes back in the answer:
 *   work | rest WORD     let the threads go on, or sleep
 *   clock WORD           the wall clock
 *   status WORD          the counters, a random number, the card's address
 *   disc WORD            the hash of the disc's first bytes, from the drive
 *   end WORD             look through all blocks, tell the hashes of memory, and exit
 * With arguments, on the host: `snapshot_load CPU ROUNDS` prints the hash that memory must have after so many
 * rounds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define CPUS 8
#define PAGES 256 /* of memory, for each CPU */
#define WORDS 512 /* in a page or block */
#define BLOCKS 256
#define TOGETHER 16 /* blocks that are read or written at once, at the start and at the end */
#define BLOCK 4096
#define SEEN 4096 /* the latest packets that are remembered */
#define DISC_BYTES (1 << 18)

typedef uint64_t four __attribute__((vector_size(32)));

struct memory {
	uint64_t pages[PAGES][WORDS];
	uint64_t state;
	double fraction;
	four lanes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static enum { RESTING, WORKING, ENDING } wanted = WORKING;

static struct memory *memories[CPUS];
static _Atomic uint64_t rounds[CPUS];
static _Atomic uint64_t writes, reads, bad_blocks, failures, sent, received, doubled, corrupt;
static uint32_t generations[BLOCKS];
static int block_fd;

static uint64_t mix(uint64_t value)
{
	value ^= value >> 31;
	value *= 0x9e3779b97f4a7c15;
	return value ^ value >> 29;
}

static struct memory *new_memory(int cpu)
{
	struct memory *memory = aligned_alloc(BLOCK, sizeof *memory + BLOCK - sizeof *memory % BLOCK);

	for (int page = 0; page < PAGES; page++)
		for (int word = 0; word < WORDS; word++)
			memory->pages[page][word] = mix(cpu * 1000003 + page * WORDS + word + 1);
	memory->state = cpu + 1;
	memory->fraction = 1;
	memory->lanes = (four){1, 2, 3, 4};
	return memory;
}

/* All of it depends on all that was before, also what lives in vector registers for most of the time. */
__attribute__((target_clones("avx2", "default"))) static void round_of(struct memory *memory)
{
	uint64_t *page = memory->pages[memory->state % PAGES], state = memory->state;
	four lanes = memory->lanes;
	double fraction = memory->fraction;

	for (int word = 0; word < WORDS; word += 4) {
		lanes = (lanes ^ *(four *)(page + word)) * 0x9e3779b97f4a7c15 + (lanes >> 7);
		*(four *)(page + word) += lanes;
		state = mix(state ^ page[word + 1]);
		fraction = fraction * 0.5 + (double)(state >> 12);
	}
	memory->lanes = lanes;
	memory->state = state;
	memory->fraction = fraction;
}

static uint64_t hash_of(const struct memory *memory)
{
	uint64_t hash = memory->state ^ (uint64_t)memory->fraction, lanes[4];

	memcpy(lanes, &memory->lanes, sizeof lanes);
	for (int lane = 0; lane < 4; lane++)
		hash = mix(hash ^ lanes[lane]);
	for (int page = 0; page < PAGES; page++)
		for (int word = 0; word < WORDS; word++)
			hash = mix(hash ^ memory->pages[page][word]) + 1;
	return hash;
}

/* Waits while there is to be rest; whether to go on. */
static int go_on(void)
{
	int answer;

	pthread_mutex_lock(&lock);
	while (wanted == RESTING)
		pthread_cond_wait(&changed, &lock);
	answer = wanted == WORKING;
	pthread_mutex_unlock(&lock);
	return answer;
}

static void want(int what)
{
	pthread_mutex_lock(&lock);
	wanted = what;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}

static void *hash_memory(void *argument)
{
	int cpu = (int)(intptr_t)argument;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set))
		failures++;
	while (go_on()) {
		for (int count = 0; count < 5000; count++)
			round_of(memories[cpu]);
		rounds[cpu] += 5000;
		usleep(40000);
	}
	return NULL;
}

static void fill(uint64_t *block, int number)
{
	uint64_t value = (uint64_t)generations[number] << 32 | (unsigned)number;

	for (int word = 0; word < WORDS; word++)
		block[word] = value = mix(value + word + 1);
}

static void write_block(uint64_t *block, int number)
{
	generations[number]++;
	fill(block, number);
	if (pwrite(block_fd, block, BLOCK, (off_t)number * BLOCK) != BLOCK)
		failures++;
	writes++;
}

static void check_block(uint64_t *block, uint64_t *other, int number)
{
	fill(block, number);
	if (pread(block_fd, other, BLOCK, (off_t)number * BLOCK) != BLOCK)
		failures++;
	else if (memcmp(block, other, BLOCK))
		bad_blocks++;
	reads++;
}

/* New contents in all blocks, or what they are now compared with what they should be. */
static void write_all(void)
{
	uint64_t *blocks = aligned_alloc(BLOCK, TOGETHER * BLOCK);

	for (int first = 0; first < BLOCKS; first += TOGETHER) {
		for (int number = 0; number < TOGETHER; number++)
			fill(blocks + number * WORDS, first + number);
		if (pwrite(block_fd, blocks, TOGETHER * BLOCK, (off_t)first * BLOCK) != TOGETHER * BLOCK)
			failures++;
	}
	free(blocks);
}

static void check_all(void)
{
	uint64_t *blocks = aligned_alloc(BLOCK, TOGETHER * BLOCK), block[WORDS];

	for (int first = 0; first < BLOCKS; first += TOGETHER) {
		if (pread(block_fd, blocks, TOGETHER * BLOCK, (off_t)first * BLOCK) != TOGETHER * BLOCK)
			failures++;
		for (int number = 0; number < TOGETHER; number++) {
			fill(block, first + number);
			if (memcmp(block, blocks + number * WORDS, BLOCK))
				bad_blocks++;
		}
	}
	free(blocks);
}

static void *use_disk(void *argument)
{
	uint64_t *block = aligned_alloc(BLOCK, BLOCK), *other = aligned_alloc(BLOCK, BLOCK), state = 1;

	while (go_on()) {
		state = mix(state + 1);
		write_block(block, state % BLOCKS);
		check_block(block, other, (state >> 32) % BLOCKS);
		if (state % 16 == 0 && fsync(block_fd))
			failures++;
		usleep(20000);
	}
	check_all();
	if (fsync(block_fd))
		failures++;
	return argument;
}

/* A packet is a kind ('g' from the guest and echoed, 'h' the host's own), a number, and what follows from it. */
struct packet {
	uint64_t kind, number, content[30];
};

static void make(struct packet *packet, uint64_t kind, uint64_t number)
{
	packet->kind = kind;
	packet->number = number;
	for (int word = 0; word < 30; word++)
		packet->content[word] = (number + word) * 0x9e3779b97f4a7c15 ^ kind;
}

static void *use_network(void *argument)
{
	static uint64_t seen[2][SEEN];
	struct sockaddr_in host = {.sin_family = AF_INET, .sin_port = htons(7777)};
	struct packet ours, theirs;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);

	inet_pton(AF_INET, argument, &host.sin_addr);
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(7777)};
	if (bind(fd, (struct sockaddr *)&here, sizeof here))
		failures++;
	while (go_on()) {
		make(&ours, 'g', sent + 1);
		if (sendto(fd, &ours, sizeof ours, 0, (struct sockaddr *)&host, sizeof host) == sizeof ours)
			sent++;
		struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
		for (int most = 3; most > 0 && poll(&poll_fd, 1, 50) == 1; most--) {
			ssize_t count = recv(fd, &theirs, sizeof theirs, 0);

			if (count < 0)
				break;
			make(&ours, theirs.kind, theirs.number);
			if (count != sizeof theirs || memcmp(&ours, &theirs, sizeof ours)) {
				corrupt++;
				continue;
			}
			uint64_t *slot = &seen[theirs.kind == 'h'][theirs.number % SEEN];
			if (*slot == theirs.number)
				doubled++;
			*slot = theirs.number;
			received++;
		}
	}
	return NULL;
}

static void status(const char *word, int cpus)
{
	char line[512], mac[32] = "none";
	uint64_t number = 0;
	int size, fd = open("/sys/class/net/eth0/address", O_RDONLY);

	if (fd >= 0) {
		ssize_t count = read(fd, mac, sizeof mac - 1);

		mac[count > 0 ? strcspn(mac, "\n") : 0] = 0;
		close(fd);
	}
	if (getrandom(&number, sizeof number, 0) != sizeof number)
		failures++;
	size = snprintf(line, sizeof line,
			"status %s random=%016lx mac=%s writes=%lu reads=%lu bad=%lu failures=%lu "
			"sent=%lu received=%lu doubled=%lu corrupt=%lu",
			word, number, mac, writes, reads, bad_blocks, failures, sent,
			received, doubled, corrupt);
	for (int cpu = 0; cpu < cpus; cpu++)
		size += snprintf(line + size, sizeof line - size, " cpu%d=%lu", cpu, rounds[cpu]);
	puts(line);
}

static void disc(const char *word)
{
	static uint8_t bytes[DISC_BYTES];
	uint64_t hash = 14695981039346656037u; /* FNV-1a */
	int fd = open("/dev/sr0", O_RDONLY);

	ioctl(fd, BLKFLSBUF, 0);
	for (ssize_t at = 0, count; at < DISC_BYTES; at += count) {
		count = read(fd, bytes + at, DISC_BYTES - at);
		if (count <= 0) {
			printf("disc %s failed\n", word);
			break;
		}
	}
	close(fd);
	for (int at = 0; at < DISC_BYTES; at++)
		hash = (hash ^ bytes[at]) * 1099511628211u;
	printf("disc %s %016lx\n", word, hash);
}

int main(int count, char **arguments)
{
	pthread_t threads[CPUS + 2];
	int cpus, others = 0;
	char line[128], command[16], word[64];
	struct termios terminal;
	struct timespec now;

	if (count == 3) {
		struct memory *memory = new_memory(atoi(arguments[1]));

		for (long left = atol(arguments[2]); left > 0; left--)
			round_of(memory);
		printf("%016lx\n", hash_of(memory));
		return 0;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (tcgetattr(0, &terminal) == 0) {
		terminal.c_lflag &= ~(tcflag_t)ECHO;
		tcsetattr(0, TCSANOW, &terminal);
	}
	cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
	block_fd = open("/root/blocks", O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
	if (block_fd < 0 || posix_fallocate(block_fd, 0, BLOCKS * BLOCK)) {
		puts("load: no disk");
		return 1;
	}
	write_all();
	for (int cpu = 0; cpu < cpus; cpu++) {
		memories[cpu] = new_memory(cpu);
		pthread_create(&threads[cpu], NULL, hash_memory, (void *)(intptr_t)cpu);
	}
	pthread_create(&threads[cpus + others++], NULL, use_disk, NULL);
	if (access("/sys/class/net/eth0", F_OK) == 0)
		pthread_create(&threads[cpus + others++], NULL, use_network, "10.88.0.1");
	printf("load: ready, %d CPUs\n", cpus);
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "%15s %63s", command, word) != 2) {
			puts("what?");
		} else if (!strcmp(command, "status")) {
			status(word, cpus);
		} else if (!strcmp(command, "clock")) {
			clock_gettime(CLOCK_REALTIME, &now);
			printf("clock %s %ld.%09ld\n", word, now.tv_sec, now.tv_nsec);
		} else if (!strcmp(command, "disc")) {
			disc(word);
		} else if (!strcmp(command, "work") || !strcmp(command, "rest")) {
			want(command[0] == 'w' ? WORKING : RESTING);
			printf("%s %s\n", command, word);
		} else if (!strcmp(command, "end")) {
			want(ENDING);
			for (int thread = 0; thread < cpus + others; thread++)
				pthread_join(threads[thread], NULL);
			status(word, cpus);
			for (int cpu = 0; cpu < cpus; cpu++)
				printf("memory %d %lu %016lx\n", cpu, rounds[cpu], hash_of(memories[cpu]));
			printf("end %s\n", word);
			return 0;
		}
	}
	return 1;
}
