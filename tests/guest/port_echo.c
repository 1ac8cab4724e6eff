/*
 * PID 1 of a guest with a virtio console: sends back what comes through port "test.echo", floods port
 * "test.flood", and says on /dev/hvc0 how large that is whenever it changes.
 */
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

static char buffer[1 << 16];

static int open_port(const char *wanted)
{
	for (;; usleep(10000)) {
		DIR *ports = opendir("/sys/class/virtio-ports");
		struct dirent *entry;

		while (ports && (entry = readdir(ports))) {
			char path[512], name[128] = "";
			snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
			FILE *file = fopen(path, "r");
			if (!file)
				continue;
			if (!fgets(name, sizeof name, file))
				name[0] = 0;
			fclose(file);
			name[strcspn(name, "\n")] = 0;
			if (strcmp(name, wanted))
				continue;
			snprintf(path, sizeof path, "/dev/%s", entry->d_name);
			int fd = open(path, O_RDWR);
			if (fd < 0) /* devtmpfs may be a moment behind sysfs */
				continue;
			printf("%s is %s\n", wanted, path);
			fflush(stdout);
			closedir(ports);
			return fd;
		}
		if (ports)
			closedir(ports);
	}
}

static void tell_size(int number)
{
	struct winsize size = {0};
	char text[64];
	int fd = open("/dev/hvc0", O_RDWR | O_NOCTTY);

	(void)number;
	if (fd < 0 || ioctl(fd, TIOCGWINSZ, &size))
		return;
	int length = snprintf(text, sizeof text, "size %d %d\n", size.ws_row, size.ws_col);
	if (write(fd, text, length) != length)
		perror("hvc0");
	close(fd);
}

int main(void)
{
	mkdir("/dev", 0755);
	mkdir("/sys", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	if (fork() == 0) {
		int flood = open_port("test.flood");
		while (write(flood, buffer, sizeof buffer) > 0)
			;
		_exit(1);
	}
	if (fork() == 0) {
		setsid();
		signal(SIGWINCH, tell_size);
		/* As the terminal's session, it is told of a new size. */
		int terminal = open("/dev/hvc0", O_RDWR);
		ioctl(terminal, TIOCSCTTY, 0);
		tell_size(0);
		for (;;)
			pause();
	}
	int port = open_port("test.echo");
	for (;;) {
		ssize_t size = read(port, buffer, sizeof buffer), done = 0;
		if (size <= 0) { /* nobody is there */
			usleep(10000);
			continue;
		}
		while (done < size) {
			ssize_t written = write(port, buffer + done, size - done);
			if (written > 0)
				done += written;
		}
	}
}
