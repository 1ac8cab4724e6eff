/* Signals: queued values, alternate stacks, jumps out of handlers, and what each processor fault becomes. */
#include "checks.h"
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/ucontext.h>
#include <unistd.h>

enum { FAULT_PRESENT = 1, FAULT_WRITE = 2, FAULT_USER = 4, FAULT_FETCH = 16 };

static volatile siginfo_t last;
static volatile int seen, on_stack;
static volatile uint64_t last_rip, last_error, last_trap;
static sigjmp_buf out;
static char *alternate;

static void note(int number, siginfo_t *info, void *context) {
    const greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    memcpy((void *)&last, info, sizeof last);
    seen = number;
    last_rip = registers[REG_RIP];
    last_error = registers[REG_ERR];
    last_trap = registers[REG_TRAPNO];
    char here;
    on_stack = alternate && &here >= alternate && &here < alternate + 65536;
}

static void note_and_jump(int number, siginfo_t *info, void *context) {
    note(number, info, context);
    siglongjmp(out, 1);
}

static void handle(int number, void (*handler)(int, siginfo_t *, void *), int flags) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    sigaction(number, &action, NULL);
}

static void queued_value(void) {
    handle(SIGUSR1, note, 0);
    union sigval value = {.sival_int = 42};
    REQUIRE(sigqueue(getpid(), SIGUSR1, value) == 0);
    REQUIRE(seen == SIGUSR1 && last.si_code == SI_QUEUE && last.si_value.sival_int == 42);
    REQUIRE(last.si_pid == getpid());
}

static void blocked_until_unblocked(void) {
    sigset_t set, pending;
    handle(SIGUSR2, note, 0);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigprocmask(SIG_BLOCK, &set, NULL);
    raise(SIGUSR2);
    REQUIRE(seen == 0 && sigpending(&pending) == 0 && sigismember(&pending, SIGUSR2));
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    REQUIRE(seen == SIGUSR2);
}

/* Every register but those of the system call itself survives a handler. */
static void registers_survive(void) {
    handle(SIGUSR1, note, 0);
    uint64_t number = 39, wrong = 0;
    for (int round = 0; round < 20; round++) {
        asm volatile("mov $0x1111, %%r12\n mov $0x2222, %%r13\n mov $0x3333, %%r14\n mov $0x4444, %%r15\n"
                     "mov $0x5555, %%r8\n mov $0x6666, %%r9\n mov $0x7777, %%r10\n mov $0x8888, %%rbx\n"
                     "stc\n syscall\n"
                     "adc $0, %1\n" /* the carry flag survived: wrong is 1 */
                     "sub $0x1111, %%r12\n or %%r12, %1\n sub $0x2222, %%r13\n or %%r13, %1\n"
                     "sub $0x3333, %%r14\n or %%r14, %1\n sub $0x4444, %%r15\n or %%r15, %1\n"
                     "sub $0x5555, %%r8\n or %%r8, %1\n sub $0x6666, %%r9\n or %%r9, %1\n"
                     "sub $0x7777, %%r10\n or %%r10, %1\n sub $0x8888, %%rbx\n or %%rbx, %1\n"
                     : "+a"(number), "=&D"(wrong)
                     : "1"(0)
                     : "rcx", "r11", "r12", "r13", "r14", "r15", "r8", "r9", "r10", "rbx", "memory", "cc");
        REQUIRE(wrong == 1 && number == (uint64_t)getpid());
        number = 39; /* getpid */
    }
}

static void jump_restores_mask(void) {
    sigset_t mask;
    handle(SIGUSR1, note_and_jump, 0);
    for (volatile int round = 0; round < 5; round++) {
        if (sigsetjmp(out, 1) == 0)
            raise(SIGUSR1);
        sigprocmask(SIG_BLOCK, NULL, &mask);
        REQUIRE(seen == SIGUSR1 && !sigismember(&mask, SIGUSR1));
    }
}

#define FAULTS(signal_number, what)                                                              \
    do {                                                                                         \
        seen = 0;                                                                                \
        if (sigsetjmp(out, 1) == 0) {                                                            \
            what;                                                                                \
            REQUIRE(!"it did not fault");                                                        \
        }                                                                                        \
        REQUIRE(seen == (signal_number));                                                        \
    } while (0)

static void page_fault_facts(void) {
    volatile char *none = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    volatile char *gone = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    volatile char *kernel = (char *)0xffffffff81000000;
    munmap((void *)gone, 4096);
    memset(code, 0xC3, 4096);
    handle(SIGSEGV, note_and_jump, 0);
    FAULTS(SIGSEGV, (void)gone[17]);
    REQUIRE(last.si_code == SEGV_MAPERR && last.si_addr == gone + 17 && last_error == FAULT_USER);
    FAULTS(SIGSEGV, gone[18] = 1);
    REQUIRE(last.si_code == SEGV_MAPERR && last.si_addr == gone + 18);
    REQUIRE(last_error == (FAULT_USER | FAULT_WRITE) && last_trap == 14);
    FAULTS(SIGSEGV, (void)none[3]);
    REQUIRE(last.si_code == SEGV_ACCERR && last.si_addr == none + 3 && last_error & FAULT_USER);
    FAULTS(SIGSEGV, (void)kernel[0]);
    REQUIRE(last.si_addr == kernel && last_error & FAULT_USER);
    FAULTS(SIGSEGV, ((void (*)(void))code)());
    REQUIRE(last.si_code == SEGV_ACCERR && last.si_addr == code && last_rip == (uint64_t)code);
    REQUIRE(last_error == (FAULT_USER | FAULT_FETCH | FAULT_PRESENT));
    mprotect(code, 4096, PROT_READ);
    FAULTS(SIGSEGV, *(volatile char *)code = 1);
    REQUIRE(last.si_code == SEGV_ACCERR && last_error == (FAULT_USER | FAULT_WRITE | FAULT_PRESENT));
    mprotect(code, 4096, PROT_READ | PROT_EXEC);
    ((void (*)(void))code)();
    FAULTS(SIGSEGV, (void)*(volatile char *)0x8000000000000000); /* not canonical: #GP, no address */
    REQUIRE(last_trap == 13);
}

static long deeper(long depth) {
    volatile char space[4096];
    space[0] = depth;
    return depth < 0 ? 0 : deeper(depth + 1) + space[0];
}

static void overflow_on_alternate_stack(void) {
    alternate = malloc(65536);
    stack_t stack = {.ss_sp = alternate, .ss_size = 65536};
    REQUIRE(sigaltstack(&stack, NULL) == 0);
    handle(SIGSEGV, note_and_jump, SA_ONSTACK);
    setrlimit(RLIMIT_STACK, &(struct rlimit){1 << 18, 1 << 18}); /* each page takes milliseconds */
    FAULTS(SIGSEGV, deeper(0));
    REQUIRE(on_stack);
}

static volatile int zero;

static void other_faults(void) {
    handle(SIGFPE, note_and_jump, 0);
    handle(SIGILL, note_and_jump, 0);
    handle(SIGSEGV, note_and_jump, 0);
    FAULTS(SIGFPE, asm volatile("cltd\n idivl %0" : : "m"(zero), "a"(1) : "edx"));
    REQUIRE(last.si_code == FPE_INTDIV && last_trap == 0 && last.si_addr == (void *)last_rip);
    FAULTS(SIGILL, asm volatile("ud2"));
    REQUIRE(last_trap == 6 && last.si_addr == (void *)last_rip);
    FAULTS(SIGSEGV, asm volatile("hlt"));
    REQUIRE(last_trap == 13);
}

static void breakpoint(void) {
    handle(SIGTRAP, note, 0);
    asm volatile("int3");
    REQUIRE(seen == SIGTRAP && last_trap == 3 && *(uint8_t *)(last_rip - 1) == 0xCC);
}

static volatile int steps;

static void count_step(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    steps += info->si_code == TRAP_TRACE;
}

/* The trap flag: a #DB after each instruction, over a system call and a page fault too. */
static void single_steps(void) {
    handle(SIGTRAP, count_step, 0);
    long number = 39;
    char *fresh = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    asm volatile("pushf\n orq $0x100, (%%rsp)\n popf\n"
                 "nop\n nop\n nop\n syscall\n nop\n movb $1, (%1)\n nop\n"
                 "pushf\n andq $~0x100, (%%rsp)\n popf\n nop\n"
                 : "+a"(number)
                 : "r"(fresh)
                 : "rcx", "r11", "memory", "cc");
    REQUIRE(number == getpid() && *fresh == 1);
    REQUIRE(steps == 9); /* not after SYSCALL, whose trap flag the kernel masks */
}

const struct check signal_checks[] = {
    {"queued_value", queued_value},
    {"blocked_until_unblocked", blocked_until_unblocked},
    {"registers_survive", registers_survive},
    {"jump_restores_mask", jump_restores_mask},
    {"page_fault_facts", page_fault_facts},
    {"overflow_on_alternate_stack", overflow_on_alternate_stack},
    {"other_faults", other_faults},
    {"breakpoint", breakpoint},
    {"single_steps", single_steps},
    {NULL, NULL},
};
