/*
 * What the host asks of the machine itself: clock, entropy, mounts, network, power, and facts about it.
 */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <linux/reboot.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define ENTROPY_MAX 512u

static int random_fd = -1;

void system_prepare(void)
{
	random_fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
}

int set_time(uint64_t seconds, uint32_t nanoseconds)
{
	struct timespec now = { .tv_sec = (time_t)seconds, .tv_nsec = (long)nanoseconds };

	return clock_settime(CLOCK_REALTIME, &now) < 0 ? errno : 0;
}

int add_entropy(const uint8_t *bytes, uint32_t size)
{
	struct {
		struct rand_pool_info info;
		uint8_t bytes[ENTROPY_MAX];
	} entropy;
	int error = 0;

	if (size < 32 || size > ENTROPY_MAX)
		return EINVAL;
	if (random_fd < 0)
		return ENODEV;
	entropy.info.entropy_count = (int)size * 8;
	entropy.info.buf_size = (int)size;
	memcpy((uint8_t *)&entropy + sizeof entropy.info, bytes, size);
	/* The second call makes the generator take it now and not at its next turn: clones differ from here on. */
	if (ioctl(random_fd, RNDADDENTROPY, &entropy) < 0 || ioctl(random_fd, RNDRESEEDCRNG) < 0)
		error = errno;
	explicit_bzero(&entropy, sizeof entropy);
	return error;
}

static unsigned long long meminfo(const char *text, const char *name)
{
	const char *line = strstr(text, name);
	unsigned long long kilobytes = 0;

	if (line)
		sscanf(line + strlen(name), " %llu", &kilobytes);
	return kilobytes * 1024;
}

uint32_t describe(char *to, uint32_t size)
{
	static char memory[8192];
	struct utsname names = { 0 };
	struct sysinfo system = { 0 };
	struct timespec uptime = { 0 };
	int count;

	uname(&names);
	sysinfo(&system);
	clock_gettime(CLOCK_BOOTTIME, &uptime);
	if (!read_file("/proc/meminfo", memory, sizeof memory))
		memory[0] = 0;
	count = snprintf(to, size,
			 "version=%d\nkernel=%s\nmachine=%s\nhostname=%s\nuptime_ms=%lld\nmemory=%llu\n"
			 "memory_free=%llu\nmemory_available=%llu\nprocesses=%u\noom_kills=%u\npid=%d\ncgroup=%d\n",
			 AGENT_VERSION, names.release, names.machine, names.nodename,
			 (long long)uptime.tv_sec * 1000 + uptime.tv_nsec / 1000000, meminfo(memory, "MemTotal:"),
			 meminfo(memory, "MemFree:"), meminfo(memory, "MemAvailable:"), (unsigned)system.procs,
			 oom_kills("", true), (int)getpid(), settings.cgroup != NULL);
	return count < 0 ? 0 : (uint32_t)count < size ? (uint32_t)count : size - 1;
}

static bool interface_call(int fd, struct ifreq *interface, unsigned long request, uint32_t address)
{
	struct sockaddr_in ipv4 = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(address) };

	memcpy(&interface->ifr_addr, &ipv4, sizeof ipv4);
	return ioctl(fd, request, interface) == 0;
}

int set_network(const char *name, uint32_t address, uint32_t bits, uint32_t gateway)
{
	struct ifreq interface = { 0 };
	struct rtentry route = { 0 };
	struct sockaddr_in any = { .sin_family = AF_INET };
	int fd, error = 0;

	if (!name[0] || strlen(name) >= sizeof interface.ifr_name || bits > 32)
		return EINVAL;
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return errno;
	strcpy(interface.ifr_name, name);
	errno = 0;
	if ((address && (!interface_call(fd, &interface, SIOCSIFADDR, address) ||
			 !interface_call(fd, &interface, SIOCSIFNETMASK, bits ? ~0u << (32 - bits) : 0))) ||
	    ioctl(fd, SIOCGIFFLAGS, &interface) < 0)
		error = errno;
	interface.ifr_flags |= IFF_UP;
	if (!error && ioctl(fd, SIOCSIFFLAGS, &interface) < 0)
		error = errno;
	if (!error && gateway) {
		memcpy(&route.rt_dst, &any, sizeof any);
		memcpy(&route.rt_genmask, &any, sizeof any);
		any.sin_addr.s_addr = htonl(gateway);
		memcpy(&route.rt_gateway, &any, sizeof any);
		route.rt_flags = RTF_UP | RTF_GATEWAY;
		if (ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST)
			error = errno;
	}
	close(fd);
	return error;
}

int do_mount(void *context)
{
	const struct mounting *mounting = context;
	unsigned long allowed = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_BIND | MS_REMOUNT | MS_NOATIME;

	if (do_mkdir(mounting->target))
		return 1;
	if (mount(mounting->source, mounting->target, mounting->type, mounting->flags & allowed,
		  mounting->data) == 0)
		return 0;
	dprintf(2, "cannot mount %s (%s) at %s: %s\n", mounting->source, mounting->type, mounting->target,
		strerror(errno));
	return 1;
}

int do_sync(void *unused)
{
	(void)unused;
	sync();
	return 0;
}

int do_power(void *how)
{
	int command = *(int *)how == POWER_RESET ? RB_AUTOBOOT : RB_POWER_OFF;
	char nothing[16];

	/* At its end the kernel resets the port, with all that is still to go out of it: the reply goes first. */
	while (read(0, nothing, sizeof nothing) > 0)
		;
	sync();
	/* Fails with EBUSY while files are open for writing; then the sync has to do. */
	mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
	/* A kernel without ACPI cannot power off and would halt: a reset ends the machine as well. */
	if (access("/sys/firmware/acpi", F_OK) < 0)
		command = RB_AUTOBOOT;
	reboot(command);
	dprintf(2, "cannot end the machine: %s\n", strerror(errno));
	return 1;
}
