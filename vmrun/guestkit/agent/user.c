/*
 * Users and groups of the guest, from its own /etc/passwd and /etc/group.
 *
 * A static program cannot use the name service switch, and an image may have no such files: numbers always
 * work, as passwd(5) and the image formats' "user" field have it: name, uid, name:group, uid:gid.
 */
#include "agent.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINE_MAX_BYTES 4096

static bool is_number(const char *text, uint32_t *value)
{
	char *end;
	unsigned long number;

	if (text[0] < '0' || text[0] > '9')
		return false;
	errno = 0;
	number = strtoul(text, &end, 10);
	/* -1 means "leave it" to setresuid. */
	if (*end || errno || number >= UINT32_MAX)
		return false;
	*value = (uint32_t)number;
	return true;
}

/* Splits at colons; the number of fields. */
static int split(char *line, char *fields[], int most)
{
	int count = 0;

	line[strcspn(line, "\n")] = 0;
	while (line && count < most)
		fields[count++] = strsep(&line, ":");
	return count;
}

static bool find_user(const char *name, uint32_t uid, bool by_number, struct identity *identity)
{
	char line[LINE_MAX_BYTES], *fields[7];
	bool found = false;
	FILE *file = fopen("/etc/passwd", "re");

	while (file && !found && fgets(line, sizeof line, file)) {
		uint32_t number, group;

		if (split(line, fields, 7) < 6 || !is_number(fields[2], &number) || !is_number(fields[3], &group))
			continue;
		if (by_number ? number != uid : strcmp(fields[0], name) != 0)
			continue;
		identity->uid = number;
		identity->gid = group;
		snprintf(identity->name, sizeof identity->name, "%s", fields[0]);
		snprintf(identity->home, sizeof identity->home, "%s", fields[5]);
		found = true;
	}
	if (file)
		fclose(file);
	return found;
}

static bool is_member(char *members, const char *name)
{
	char *member;

	while ((member = strsep(&members, ",")))
		if (name[0] && !strcmp(member, name))
			return true;
	return false;
}

/* The number of the group `name`, if asked for, and the groups the user is a member of. */
static bool read_groups(const char *name, struct identity *identity)
{
	char line[LINE_MAX_BYTES], *fields[4];
	bool found = false;
	FILE *file = fopen("/etc/group", "re");

	while (file && fgets(line, sizeof line, file)) {
		uint32_t number;
		int count = split(line, fields, 4);

		if (count < 3 || !is_number(fields[2], &number))
			continue;
		if (name && !strcmp(fields[0], name) && !found) {
			identity->gid = number;
			found = true;
		}
		if (!name && count == 4 && identity->group_count < GROUPS_MAX && is_member(fields[3], identity->name))
			identity->groups[identity->group_count++] = number;
	}
	if (file)
		fclose(file);
	return found;
}

/* What root is called and where it lives, read again when the file is another. */
static void find_root(struct identity *identity)
{
	static struct identity known;
	static struct stat seen;
	struct stat now;

	if (stat("/etc/passwd", &now) < 0)
		return;
	if (now.st_ino != seen.st_ino || now.st_dev != seen.st_dev || now.st_size != seen.st_size ||
	    now.st_mtim.tv_sec != seen.st_mtim.tv_sec || now.st_mtim.tv_nsec != seen.st_mtim.tv_nsec ||
	    now.st_ctim.tv_sec != seen.st_ctim.tv_sec || now.st_ctim.tv_nsec != seen.st_ctim.tv_nsec) {
		known = *identity;
		find_user("", identity->uid, true, &known);
		seen = now;
	}
	*identity = known;
}

int look_up_user(const char *specification, struct identity *identity)
{
	char text[256], *group;
	uint32_t number;

	memset(identity, 0, sizeof *identity);
	snprintf(identity->home, sizeof identity->home, "/");
	if (strlen(specification) >= sizeof text)
		return EINVAL;
	strcpy(text, specification);
	group = strchr(text, ':');
	if (group)
		*group++ = 0;
	if (!text[0]) {
		identity->uid = geteuid();
		identity->gid = getegid();
		find_root(identity);
		if (!group)
			return 0; /* it stays as it is, groups and all */
	} else if (is_number(text, &number)) {
		identity->uid = number;
		find_user("", number, true, identity);
	} else if (!find_user(text, 0, false, identity)) {
		return ENOENT;
	}
	if (group && group[0]) {
		if (is_number(group, &number))
			identity->gid = number;
		else if (!read_groups(group, identity))
			return ENOENT;
	} else {
		read_groups(NULL, identity);
	}
	return 0;
}
