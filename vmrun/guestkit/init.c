/*
 * PID 1 of the guest kit, in the initramfs (/init) and on the disk (/sbin/init).
 *
 * It has no C library and fits in two pages, because on a KVM without VMX or SVM each page a program
 * touches costs the interpreted guest kernel thousands of instructions: a busybox shell as init takes
 * seconds, this takes tens of milliseconds to its first line.
 *
 * It prints "vmrun guest: init", mounts the kernel's file systems, and obeys the kernel command line:
 *   vmrun.host=NAME               host name
 *   vmrun.ip=ADDR/LEN[:GATEWAY]   IPv4 address of eth0
 *   vmrun.run=PATH                a program or script to run in place of the interactive shell
 * It starts the guest agent beside that, which waits until the host has something for it.
 * When that program ends, or on SIGUSR1, SIGUSR2 or SIGTERM (busybox halt, poweroff, reboot), it syncs,
 * makes the root read-only and ends the machine. A kernel without ACPI cannot power off: then it resets,
 * which vmrun takes for the end as well.
 */
#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/reboot.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>

static inline long syscall5(long number, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

#define CALL(name, a, b, c, d, e) \
	syscall5(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

/* gcc may turn loops and initializers into calls to these two. */
void *memset(void *to, int byte, unsigned long count)
{
	char *at = to;

	while (count--) {
		*at++ = (char)byte;
		__asm__ volatile("");
	}
	return to;
}

void *memcpy(void *to, const void *from, unsigned long count)
{
	char *at = to;
	const char *source = from;

	while (count--) {
		*at++ = *source++;
		__asm__ volatile("");
	}
	return to;
}

static unsigned long length(const char *text)
{
	unsigned long count = 0;

	while (text[count])
		count++;
	return count;
}

static void say(const char *text)
{
	CALL(write, 1, text, length(text), 0, 0);
}

static void say_number(unsigned long number)
{
	char digits[24];
	int at = sizeof digits - 1;

	digits[at] = 0;
	do {
		digits[--at] = (char)('0' + number % 10);
		number /= 10;
	} while (number);
	say(digits + at);
}

/* Reads the kernel command line as words that each end in a NUL, and an empty word after the last. */
static void read_command_line(char *line, unsigned long size)
{
	long fd = CALL(open, "/proc/cmdline", O_RDONLY, 0, 0, 0);
	long count = fd < 0 ? 0 : CALL(read, fd, line, size - 2, 0, 0);
	char *to = line;

	for (long at = 0; at < count; at++) {
		char byte = line[at];

		if (byte == ' ' || byte == '\n')
			byte = 0;
		if (byte || (to > line && to[-1]))
			*to++ = byte;
	}
	to[0] = to[1] = 0;
	CALL(close, fd, 0, 0, 0, 0);
}

/* The value of the first "name=" word, or 0. */
static char *option(char *line, const char *name)
{
	unsigned long size = length(name);

	for (char *word = line; *word; word += length(word) + 1) {
		unsigned long at = 0;

		while (at < size && word[at] == name[at])
			at++;
		if (at == size)
			return word + size;
	}
	return 0;
}

static unsigned long parse_number(char **text)
{
	unsigned long number = 0;

	while (**text >= '0' && **text <= '9')
		number = number * 10 + (unsigned long)(*(*text)++ - '0');
	return number;
}

static in_addr_t parse_address(char **text)
{
	in_addr_t address = 0;

	for (int shift = 0; shift < 32; shift += 8) {
		address |= (in_addr_t)(parse_number(text) & 0xff) << shift;
		if (shift < 24 && **text == '.')
			(*text)++;
	}
	return address;
}

static void set_address(struct sockaddr *where, in_addr_t address)
{
	struct sockaddr_in *ipv4 = (struct sockaddr_in *)where;

	ipv4->sin_family = AF_INET;
	ipv4->sin_addr.s_addr = address;
}

static long interface_call(long fd, const char *name, long request, in_addr_t address)
{
	struct ifreq interface = { 0 };

	memcpy(interface.ifr_name, name, length(name));
	if (request == SIOCSIFFLAGS)
		interface.ifr_flags = IFF_UP | IFF_RUNNING;
	else
		set_address(&interface.ifr_addr, address);
	return CALL(ioctl, fd, request, &interface, 0, 0);
}

static void set_network(char *where)
{
	long fd = CALL(socket, AF_INET, SOCK_DGRAM, 0, 0, 0);
	long failed = 0;

	if (fd < 0)
		return;
	interface_call(fd, "lo", SIOCSIFADDR, __builtin_bswap32(INADDR_LOOPBACK));
	interface_call(fd, "lo", SIOCSIFFLAGS, 0);
	if (where) {
		in_addr_t address = parse_address(&where);
		unsigned long bits = 32;
		in_addr_t mask;

		if (*where == '/') {
			where++;
			bits = parse_number(&where);
		}
		mask = bits && bits <= 32 ? __builtin_bswap32(0xffffffffu << (32 - bits)) : 0;
		failed |= interface_call(fd, "eth0", SIOCSIFADDR, address);
		failed |= interface_call(fd, "eth0", SIOCSIFNETMASK, mask);
		failed |= interface_call(fd, "eth0", SIOCSIFFLAGS, 0);
		if (!failed && *where == ':') {
			struct rtentry route = { 0 };

			where++;
			set_address(&route.rt_dst, 0);
			set_address(&route.rt_genmask, 0);
			set_address(&route.rt_gateway, parse_address(&where));
			route.rt_flags = RTF_UP | RTF_GATEWAY;
			failed |= CALL(ioctl, fd, SIOCADDRT, &route, 0, 0);
		}
		if (failed)
			say("vmrun guest: eth0 could not be configured\n");
	}
	CALL(close, fd, 0, 0, 0, 0);
}

static void mount_all(void)
{
	CALL(mount, "proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0);
	CALL(mount, "sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0);
	/* On the disk the kernel has mounted it already, and this fails with EBUSY. */
	CALL(mount, "devtmpfs", "/dev", "devtmpfs", MS_NOSUID, 0);
	CALL(mkdir, "/dev/pts", 0755, 0, 0, 0);
	CALL(mount, "devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5");
	CALL(mkdir, "/dev/shm", 01777, 0, 0, 0);
	CALL(mount, "tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	CALL(mount, "tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
	CALL(symlink, "/proc/self/fd", "/dev/fd", 0, 0, 0);
	CALL(symlink, "fd/0", "/dev/stdin", 0, 0, 0);
	CALL(symlink, "fd/1", "/dev/stdout", 0, 0, 0);
	CALL(symlink, "fd/2", "/dev/stderr", 0, 0, 0);
}

static void end_machine(void)
{
	long command = LINUX_REBOOT_CMD_RESTART;

	CALL(kill, -1, SIGTERM, 0, 0, 0);
	CALL(kill, -1, SIGKILL, 0, 0, 0);
	CALL(sync, 0, 0, 0, 0, 0);
	CALL(mount, 0, "/", 0, MS_REMOUNT | MS_RDONLY, 0);
	if (CALL(access, "/sys/firmware/acpi", 0, 0, 0, 0) == 0)
		command = LINUX_REBOOT_CMD_POWER_OFF;
	CALL(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, command, 0, 0);
	for (;;)
		CALL(pause, 0, 0, 0, 0, 0);
}

/* The kernel wants a restorer; this handler never returns to one. */
struct kernel_sigaction {
	void (*handler)(int);
	unsigned long flags;
	void (*restorer)(void);
	unsigned long mask;
};

static void on_signal(int signal)
{
	(void)signal;
	end_machine();
}

static void run(char *program)
{
	static char *const environment[] = { "PATH=/usr/local/bin:/bin", "HOME=/root", "TERM=linux", "USER=root", 0 };
	char *shell[] = { "-sh", 0 };
	char *script[] = { program, 0 };
	long fd;

	CALL(setsid, 0, 0, 0, 0, 0);
	CALL(chdir, "/root", 0, 0, 0, 0);
	/* /dev/console cannot be a controlling terminal, and job control needs one. */
	fd = CALL(open, "/dev/ttyS0", O_RDWR, 0, 0, 0);
	if (fd >= 0) {
		CALL(ioctl, fd, TIOCSCTTY, 0, 0, 0);
		for (int to = 0; to < 3; to++)
			CALL(dup2, fd, to, 0, 0, 0);
		if (fd > 2)
			CALL(close, fd, 0, 0, 0, 0);
	}
	if (program)
		CALL(execve, program, script, environment, 0, 0);
	else
		CALL(execve, "/bin/sh", shell, environment, 0, 0);
	say("vmrun guest: cannot run ");
	say(program ? program : "/bin/sh");
	say("\n");
	CALL(exit_group, 127, 0, 0, 0, 0);
}

static void run_agent(void)
{
	static char *const environment[] = { "PATH=/usr/local/bin:/bin", "HOME=/root", 0 };
	static char *const agent[] = { "vmrun-agent", 0 };

	CALL(setsid, 0, 0, 0, 0, 0);
	CALL(execve, "/bin/vmrun-agent", agent, environment, 0, 0);
	CALL(exit_group, 127, 0, 0, 0, 0);
}

__attribute__((noreturn, used)) void start(void)
{
	static const struct kernel_sigaction end = { .handler = on_signal, .flags = 0x04000000 /* SA_RESTORER */ };
	char line[2048]; /* COMMAND_LINE_SIZE on x86 */
	char *value;
	long child;

	say("vmrun guest: init\n");
	mount_all();
	read_command_line(line, sizeof line);
	value = option(line, "vmrun.host=");
	if (value)
		CALL(sethostname, value, length(value), 0, 0, 0);
	set_network(option(line, "vmrun.ip="));
	CALL(rt_sigaction, SIGUSR1, &end, 0, 8, 0);
	CALL(rt_sigaction, SIGUSR2, &end, 0, 8, 0);
	CALL(rt_sigaction, SIGTERM, &end, 0, 8, 0);
	value = option(line, "vmrun.run=");
	child = CALL(vfork, 0, 0, 0, 0, 0);
	if (child == 0)
		run(value);
	if (CALL(access, "/sys/class/virtio-ports", 0, 0, 0, 0) == 0 && CALL(vfork, 0, 0, 0, 0, 0) == 0)
		run_agent();
	for (;;) {
		int status = 0;
		long ended = CALL(wait4, -1, &status, 0, 0, 0);

		if (ended == child || (ended < 0 && ended != -EINTR)) {
			say("vmrun guest: exit ");
			say_number(status & 0x7f ? 128u + (status & 0x7f) : (unsigned)(status >> 8) & 0xff);
			say("\n");
			end_machine();
		}
	}
}

/* At entry RSP is 16-byte aligned; a C function expects it 8 off, as after a call. */
__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tcall start\n");
