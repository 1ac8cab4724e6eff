/* Processes: fork, exec, pipes, waiting. */
#include "checks.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void fork_and_wait(void) {
    int status, codes = 0;
    for (int index = 0; index < 10; index++) {
        pid_t child = fork();
        if (child == 0)
            _exit(index + 1);
        REQUIRE(child > 0);
    }
    for (int index = 0; index < 10; index++) {
        REQUIRE(wait(&status) > 0 && WIFEXITED(status));
        codes += WEXITSTATUS(status);
    }
    REQUIRE(codes == 55 && wait(&status) == -1 && errno == ECHILD);
}

static void death_by_signal(void) {
    int status;
    pid_t child = fork();
    if (child == 0)
        for (;;)
            ;
    REQUIRE(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static void pipe_carries_all(void) {
    int ends[2], status;
    static uint8_t block[4096];
    REQUIRE(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        close(ends[0]);
        for (int index = 0; index < 64; index++) {
            memset(block, index, sizeof block);
            REQUIRE(write(ends[1], block, sizeof block) == sizeof block);
        }
        _exit(0);
    }
    close(ends[1]);
    long total = 0;
    for (ssize_t size; (size = read(ends[0], block, sizeof block)) > 0; total += size)
        for (ssize_t index = 0; index < size; index++)
            REQUIRE(block[index] == (total + index) / 4096);
    REQUIRE(total == 64 * 4096 && waitpid(child, &status, 0) == child && status == 0);
}

static void read_back(int fd, const char *wanted) {
    char text[64] = "";
    size_t length = 0;
    for (ssize_t size; (size = read(fd, text + length, sizeof text - 1 - length)) > 0; length += size)
        ;
    REQUIRE(strcmp(text, wanted) == 0);
    close(fd);
}

static void exec_after_fork(void) {
    int ends[2], status;
    REQUIRE(pipe2(ends, O_CLOEXEC) == 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        execl("/init", "init", "echo", "hello from exec", (char *)NULL);
        _exit(99);
    }
    close(ends[1]);
    read_back(ends[0], "hello from exec\n");
    REQUIRE(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7);
}

static volatile int shared = 1;

static void vfork_shares_memory(void) {
    int status;
    pid_t child = vfork();
    if (child == 0) {
        shared = 2;
        _exit(3);
    }
    REQUIRE(shared == 2 && waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 3);
}

static void spawn(void) {
    int ends[2], status;
    pid_t child;
    posix_spawn_file_actions_t actions;
    char *words[] = {"init", "echo", "spawned", NULL}, *environment[] = {NULL};
    REQUIRE(pipe2(ends, O_CLOEXEC) == 0);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    REQUIRE(posix_spawn(&child, "/init", &actions, NULL, words, environment) == 0);
    close(ends[1]);
    read_back(ends[0], "spawned\n");
    REQUIRE(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7);
    REQUIRE(posix_spawn(&child, "/nothing", NULL, NULL, words, environment) == ENOENT);
}

static void proc_files(void) {
    char line[256], own[32];
    int lines = 0, found = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    REQUIRE(maps);
    for (; fgets(line, sizeof line, maps); lines++)
        found |= strstr(line, "[stack]") != NULL;
    fclose(maps);
    REQUIRE(lines > 3 && found);
    ssize_t length = readlink("/proc/self", own, sizeof own - 1);
    REQUIRE(length > 0);
    own[length] = 0;
    REQUIRE(atoi(own) == getpid());
}

const struct check process_checks[] = {
    {"fork_and_wait", fork_and_wait},
    {"death_by_signal", death_by_signal},
    {"pipe_carries_all", pipe_carries_all},
    {"exec_after_fork", exec_after_fork},
    {"vfork_shares_memory", vfork_shares_memory},
    {"spawn", spawn},
    {"proc_files", proc_files},
    {NULL, NULL},
};
