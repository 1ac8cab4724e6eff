/* Processes that fill every vector register with patterns of their own, and look whether they stay. */
#include "checks.h"
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct round { /* vector_round.S knows this layout */
    uint8_t patterns[32][64], results[32][64];
    uint64_t masks[8], mask_results[8];
    int64_t number;
    uint64_t arguments[2], spins;
};

void zmm_round(struct round *), ymm_round(struct round *);

static int wide;
static volatile long handled;

static int has_wide_registers(void) {
    unsigned a, b = 0, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 16 & 1) || !(b >> 30 & 1)) /* AVX512F, AVX512BW */
        return 0;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 0xE0) == 0xE0;
}

static void clobber(int number, siginfo_t *info, void *context) {
    (void)number, (void)info, (void)context;
    static __thread struct round junk;
    memset(junk.patterns, 0x77, sizeof junk.patterns);
    memset(junk.masks, 0x77, sizeof junk.masks);
    junk.number = -1;
    (wide ? zmm_round : ymm_round)(&junk);
    handled++;
}

static void hammer(int who, double seconds) {
    static struct round round;
    struct timespec started, now, nap = {.tv_nsec = 1000};
    struct sigaction action = {.sa_sigaction = clobber, .sa_flags = SA_SIGINFO | SA_RESTART};
    struct itimerval interval = {{0, 30000 + 7000 * who}, {0, 30000}};
    struct rusage usage;
    long rounds = 0;
    sigaction(SIGALRM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    setitimer(ITIMER_REAL, &interval, NULL);
    clock_gettime(CLOCK_MONOTONIC, &started);
    for (;; rounds++) {
        for (int index = 0; index < 32; index++)
            for (int byte = 0; byte < 64; byte++)
                round.patterns[index][byte] = who << 6 | ((index + byte + rounds) & 0x3F);
        for (int index = 0; index < 8; index++)
            round.masks[index] = (uint64_t)(who + 1) * 0x0101010101010101 * (1 + index) + rounds;
        round.spins = rounds % 8 == 7 ? 20000000 : rounds % 16 == 0 ? 0 : 1000;
        switch (rounds % 4) {
        case 0:
            round.number = SYS_nanosleep;
            round.arguments[0] = (uintptr_t)&nap;
            round.arguments[1] = 0;
            break;
        case 1:
            round.number = SYS_kill;
            round.arguments[0] = getpid();
            round.arguments[1] = SIGUSR1;
            break;
        case 2:
            round.number = SYS_sched_yield;
            break;
        default:
            round.number = -1; /* no call: a timer's interrupt takes the processor away, or not */
        }
        (wide ? zmm_round : ymm_round)(&round);
        int width = wide ? 64 : 32;
        for (int index = 0; index < (wide ? 32 : 16); index++)
            if (memcmp(round.results[index], round.patterns[index], width) != 0) {
                printf("why process %d round %ld: register %d lost its value, has", who, rounds, index);
                for (int byte = 0; byte < width; byte += 8)
                    printf(" %016lx", *(uint64_t *)(round.results[index] + byte));
                puts("");
                _exit(1);
            }
        REQUIRE(!wide || memcmp(round.mask_results, round.masks, sizeof round.masks) == 0);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec - started.tv_sec + (now.tv_nsec - started.tv_nsec) / 1e9 >= seconds)
            break;
    }
    getrusage(RUSAGE_SELF, &usage);
    long switches = usage.ru_nvcsw + usage.ru_nivcsw;
    printf("vectors process %d: %ld rounds, %ld context switches, %ld signals, %d bits\n", who, rounds, switches,
           handled, wide ? 512 : 256);
    fflush(stdout);
    _exit(0);
}

static void registers_stay(void) {
    const char *text = getenv("VECTOR_SECONDS");
    double seconds = text ? atof(text) : 8;
    int status, wrong = 0;
    alarm(0);
    wide = has_wide_registers();
    for (int who = 0; who < 3; who++)
        if (fork() == 0)
            hammer(who, seconds);
    for (int who = 0; who < 3; who++)
        wrong |= wait(&status) < 0 || status != 0;
    REQUIRE(!wrong);
}

const struct check vector_checks[] = {{"registers_stay", registers_stay}, {NULL, NULL}};
