/* Floating-point state: each process and thread keeps its own control words and registers. */
#include "checks.h"
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <sys/wait.h>
#include <unistd.h>

static uint32_t mxcsr(void) {
    uint32_t value;
    asm volatile("stmxcsr %0" : "=m"(value));
    return value;
}

static uint16_t control_word(void) {
    uint16_t value;
    asm volatile("fnstcw %0" : "=m"(value));
    return value;
}

static void set_control(uint32_t new_mxcsr, uint16_t new_control_word) {
    asm volatile("ldmxcsr %0\n fldcw %1" : : "m"(new_mxcsr), "m"(new_control_word));
}

static void own_control(unsigned which) {
    uint32_t wanted_mxcsr = 0x1F80 | which << 13; /* a rounding mode each */
    uint16_t wanted_control_word = (0x37F & ~0xC00) | which << 10;
    set_control(wanted_mxcsr, wanted_control_word);
    for (int round = 0; round < 100; round++) {
        sched_yield();
        REQUIRE(mxcsr() == wanted_mxcsr && control_word() == wanted_control_word);
    }
}

static void control_words_of_processes(void) {
    int status;
    for (unsigned which = 1; which < 4; which++) {
        pid_t child = fork();
        if (child == 0) {
            own_control(which);
            _exit(0);
        }
    }
    own_control(0);
    while (wait(&status) > 0)
        REQUIRE(status == 0);
}

static void *own_control_in_thread(void *which) {
    own_control((uintptr_t)which);
    return NULL;
}

static void control_words_of_threads(void) {
    pthread_t threads[3];
    for (uintptr_t which = 0; which < 3; which++)
        pthread_create(&threads[which], NULL, own_control_in_thread, (void *)which);
    for (int which = 0; which < 3; which++)
        pthread_join(threads[which], NULL);
}

static void fork_copies_state(void) {
    int status;
    set_control(0x9FC0, 0xF7F);
    double values[4] = {1.5, 2.5, 3.5, 4.5}, seen[4] = {0};
    pid_t child;
    asm volatile("vmovupd (%2), %%ymm9\n fldl (%2)\n syscall\n" /* fork */
                 "vmovupd %%ymm9, (%1)\n fstpl (%1)\n"
                 : "=a"(child)
                 : "r"(seen), "r"(values), "a"(57)
                 : "rcx", "r11", "xmm9", "memory");
    REQUIRE(mxcsr() == 0x9FC0 && control_word() == 0xF7F);
    for (int index = 0; index < 4; index++)
        REQUIRE(seen[index] == values[index]);
    if (child == 0)
        _exit(0);
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
}

static volatile uint32_t handler_mxcsr;
static volatile uint16_t handler_control_word;

static void change_state(int number) {
    (void)number;
    handler_mxcsr = mxcsr();
    handler_control_word = control_word();
    set_control(0x1F80, 0x37F);
    asm volatile("fninit\n fldpi\n vpcmpeqd %%xmm1, %%xmm1, %%xmm1\n vxorps %%ymm2, %%ymm2, %%ymm2"
                 :
                 :
                 : "xmm1", "xmm2");
}

static void signals_keep_state(void) {
    signal(SIGUSR1, change_state);
    set_control(0xBF80, 0x77F);
    for (int round = 0; round < 20; round++) {
        double values[4] = {round, 2.5, -3.5, 1e300}, seen[8] = {0};
        int result;
        asm volatile("vmovupd (%2), %%ymm1\n vmovupd (%2), %%ymm2\n fldl (%2)\n syscall\n"
                     "vmovupd %%ymm1, (%1)\n vmovupd %%ymm2, 32(%1)\n fstpl (%1)\n"
                     : "=a"(result)
                     : "r"(seen), "r"(values), "a"(62), "D"(getpid()), "S"(SIGUSR1)
                     : "rcx", "r11", "xmm1", "xmm2", "memory");
        REQUIRE(result == 0 && mxcsr() == 0xBF80 && control_word() == 0x77F);
        for (int index = 0; index < 8; index++)
            REQUIRE(seen[index] == values[index % 4]);
    }
    REQUIRE(handler_mxcsr == 0x1F80 || handler_mxcsr == 0xBF80); /* Linux hands on the interrupted MXCSR or its own */
}

static double part_of_pi(unsigned start) {
    double sum = 0;
    for (unsigned index = start; index < 3000000; index += 4)
        sum += 1 / (1.0 + 2 * index) * (index % 2 ? -1 : 1);
    return sum;
}

static void sums_under_preemption(void) {
    double alone[4];
    int status;
    for (unsigned start = 0; start < 4; start++)
        alone[start] = part_of_pi(start);
    REQUIRE(fabs(4 * (alone[0] + alone[1] + alone[2] + alone[3]) - 3.14159) < 0.0001);
    for (unsigned start = 0; start < 4; start++)
        if (fork() == 0)
            _exit(part_of_pi(start) != alone[start]);
    while (wait(&status) > 0)
        REQUIRE(status == 0);
}

static sigjmp_buf out;
static volatile int code;

static void note(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    code = info->si_code;
    siglongjmp(out, 1);
}

static volatile double zero;
static volatile float float_zero;

static void unmasked_exceptions(void) {
    struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO};
    sigaction(SIGFPE, &action, NULL);
    if (sigsetjmp(out, 1) == 0) {
        feenableexcept(FE_DIVBYZERO);
        zero = 1 / zero; /* #XM */
        REQUIRE(!"no SSE exception");
    }
    REQUIRE(code == FPE_FLTDIV);
    code = 0;
    if (sigsetjmp(out, 1) == 0) {
        set_control(0x1F80, 0x37B);
        asm volatile("fninit\n fldcw %0\n fldz\n fld1\n fdivp\n fwait" : : "m"((uint16_t){0x37B})); /* #MF */
        REQUIRE(!"no x87 exception");
    }
    REQUIRE(code == FPE_FLTDIV || code == FPE_FLTINV);
}

const struct check float_checks[] = {
    {"control_words_of_processes", control_words_of_processes},
    {"control_words_of_threads", control_words_of_threads},
    {"fork_copies_state", fork_copies_state},
    {"signals_keep_state", signals_keep_state},
    {"sums_under_preemption", sums_under_preemption},
    {"unmasked_exceptions", unmasked_exceptions},
    {NULL, NULL},
};
