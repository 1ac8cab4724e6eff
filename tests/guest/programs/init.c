/* PID 1 of the check guest: runs every check in a process of its own, prints a line for each, restarts.

   The console gets "check NAME ok", "check NAME FAIL (wait status)", and "done" at the end. Parameters on the
   kernel's command line arrive in the environment. */
#include "checks.h"
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void run(const struct check *check) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        const char *seconds = getenv("CHECK_SECONDS");
        alarm(seconds ? atoi(seconds) : 60);
        check->run();
        fflush(stdout);
        _exit(0);
    }
    int status = -1;
    if (child > 0)
        waitpid(child, &status, 0);
    if (status == 0)
        printf("check %s ok\n", check->name);
    else
        printf("check %s FAIL (wait status %#x)\n", check->name, status);
}

int main(int count, char **words) {
    if (count > 2 && strcmp(words[1], "echo") == 0) { /* what the checks of exec start */
        puts(words[2]);
        return 7;
    }
    if (getpid() == 1) {
        mkdir("/proc", 0755);
        mkdir("/sys", 0755);
        mount("proc", "/proc", "proc", 0, NULL);
        mount("sysfs", "/sys", "sysfs", 0, NULL); /* the C library counts the processors there */
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("start");
    printf("cpus %ld\n", sysconf(_SC_NPROCESSORS_ONLN));
    const char *wanted = getenv("CHECKS");
    const struct {
        const char *name;
        const struct check *checks;
    } groups[] = {
        {"floats", float_checks},   {"threads", thread_checks}, {"signals", signal_checks},
        {"processes", process_checks}, {"memory", memory_checks}, {"events", event_checks},
        {"vectors", vector_checks}, {"hostile", hostile_checks},
    };
    for (unsigned index = 0; index < sizeof groups / sizeof *groups; index++)
        if (!wanted || strstr(wanted, groups[index].name))
            for (const struct check *check = groups[index].checks; check->name; check++)
                run(check);
    puts("done");
    fflush(stdout);
    const char *end = getenv("END");
    if (getpid() != 1)
        return 0; /* tried out on the host */
    if (end && strcmp(end, "exit") == 0)
        return 3; /* the kernel panics when PID 1 exits */
    while (end && strcmp(end, "pause") == 0)
        pause();
    reboot(RB_AUTOBOOT); /* the kit's kernel has no ACPI, so no power-off either */
    return 1;
}
