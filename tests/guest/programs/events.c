/* Time, timers, and waiting for several things at once. */
#include "checks.h"
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

static int64_t now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void time_goes_forward(void) {
    int64_t before = now(CLOCK_MONOTONIC);
    for (int round = 0; round < 200000; round++) {
        int64_t after = now(CLOCK_MONOTONIC);
        REQUIRE(after >= before);
        before = after;
    }
    REQUIRE(now(CLOCK_REALTIME) > 1600000000LL * 1000000000LL);
}

static void sleeps_long_enough(void) {
    struct timespec span = {.tv_nsec = 30000000};
    int64_t before = now(CLOCK_MONOTONIC);
    for (int round = 0; round < 3; round++)
        REQUIRE(nanosleep(&span, NULL) == 0);
    REQUIRE(now(CLOCK_MONOTONIC) - before >= 90000000);
}

static volatile int ticks;

static void tick(int number) {
    (void)number;
    ticks++;
}

static void interval_timer(void) {
    signal(SIGALRM, tick);
    struct itimerval interval = {{0, 20000}, {0, 20000}};
    REQUIRE(setitimer(ITIMER_REAL, &interval, NULL) == 0);
    while (ticks < 3) /* interrupts user mode that never calls the kernel */
        ;
    REQUIRE(setitimer(ITIMER_REAL, &(struct itimerval){0}, NULL) == 0);
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    REQUIRE(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
    struct itimerspec once = {.it_value.tv_nsec = 10000000};
    int before = ticks;
    REQUIRE(timer_settime(timer, 0, &once, NULL) == 0);
    while (ticks == before)
        ;
}

static void interrupted_sleep(void) {
    signal(SIGALRM, tick);
    struct itimerval once = {{0, 0}, {0, 30000}};
    struct timespec span = {.tv_sec = 30}, left;
    setitimer(ITIMER_REAL, &once, NULL);
    REQUIRE(nanosleep(&span, &left) == -1 && errno == EINTR && left.tv_sec >= 1);
}

static void select_and_poll(void) {
    int ends[2];
    fd_set set;
    REQUIRE(pipe(ends) == 0);
    struct timeval short_time = {.tv_usec = 10000};
    FD_ZERO(&set);
    FD_SET(ends[0], &set);
    REQUIRE(select(ends[0] + 1, &set, NULL, NULL, &short_time) == 0);
    REQUIRE(write(ends[1], "x", 1) == 1);
    FD_SET(ends[0], &set);
    REQUIRE(select(ends[0] + 1, &set, NULL, NULL, NULL) == 1 && FD_ISSET(ends[0], &set));
    struct pollfd fds[2] = {{.fd = ends[0], .events = POLLIN}, {.fd = ends[1], .events = POLLOUT}};
    REQUIRE(poll(fds, 2, -1) == 2 && fds[0].revents == POLLIN && fds[1].revents == POLLOUT);
    close(ends[1]);
    char byte;
    REQUIRE(read(ends[0], &byte, 1) == 1 && poll(fds, 1, 1000) == 1 && fds[0].revents == POLLHUP);
}

static void epoll_sees_them_all(void) {
    int set = epoll_create1(0), counter = eventfd(0, EFD_NONBLOCK);
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    int signals = signalfd(-1, &mask, 0);
    int fds[] = {counter, timer, signals};
    REQUIRE(set >= 0 && counter >= 0 && timer >= 0 && signals >= 0);
    for (int index = 0; index < 3; index++) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fds[index]};
        REQUIRE(epoll_ctl(set, EPOLL_CTL_ADD, fds[index], &event) == 0);
    }
    struct epoll_event found[4];
    REQUIRE(epoll_wait(set, found, 4, 0) == 0 && epoll_wait(set, found, 4, 10) == 0);
    uint64_t value = 5;
    REQUIRE(write(counter, &value, 8) == 8);
    REQUIRE(epoll_wait(set, found, 4, -1) == 1 && found[0].data.fd == counter);
    REQUIRE(read(counter, &value, 8) == 8 && value == 5 && read(counter, &value, 8) == -1);
    struct itimerspec soon = {.it_value.tv_nsec = 10000000};
    REQUIRE(timerfd_settime(timer, 0, &soon, NULL) == 0);
    REQUIRE(epoll_wait(set, found, 4, -1) == 1 && found[0].data.fd == timer);
    REQUIRE(read(timer, &value, 8) == 8 && value >= 1);
    raise(SIGUSR1);
    REQUIRE(epoll_wait(set, found, 4, -1) == 1 && found[0].data.fd == signals);
}

const struct check event_checks[] = {
    {"time_goes_forward", time_goes_forward},
    {"sleeps_long_enough", sleeps_long_enough},
    {"interval_timer", interval_timer},
    {"interrupted_sleep", interrupted_sleep},
    {"select_and_poll", select_and_poll},
    {"epoll_sees_them_all", epoll_sees_them_all},
    {NULL, NULL},
};
