/*
 * The way to the host: the virtio console ports with the names "vmrun.agent.0", "vmrun.agent.1" and so on.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PORTS "/sys/class/virtio-ports"
#define PORT_NAME "vmrun.agent.%d"

int port_open(void)
{
	DIR *directory = opendir(PORTS);
	struct dirent *entry;
	char wanted[64];
	int fd = -1;

	snprintf(wanted, sizeof wanted, PORT_NAME, settings.port);
	while (directory && fd < 0 && (entry = readdir(directory))) {
		char path[512], name[64];

		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, PORTS "/%s/name", entry->d_name);
		if (!read_file(path, name, sizeof name))
			continue;
		name[strcspn(name, "\n")] = 0;
		if (strcmp(name, wanted))
			continue;
		snprintf(path, sizeof path, "/dev/%s", entry->d_name);
		fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	}
	if (directory)
		closedir(directory);
	return fd;
}
