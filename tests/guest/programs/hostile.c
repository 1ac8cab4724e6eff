/* Programs that do what no program should: each may die, the machine must not. A check fails only by a hang. */
#include "checks.h"
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* Run `what` in a child; whatever becomes of it, this process and its system calls go on. */
#define SURVIVE(...)                                                                             \
    do {                                                                                         \
        int status;                                                                              \
        pid_t child = fork();                                                                    \
        if (child == 0) {                                                                        \
            alarm(3);                                                                            \
            __VA_ARGS__;                                                                           \
            _exit(0);                                                                            \
        }                                                                                        \
        REQUIRE(waitpid(child, &status, 0) == child);                                            \
        printf("hostile %s: status %#x\n", #__VA_ARGS__, status);                                       \
    } while (0)

/* No clobbers are told: nothing runs after it but _exit. */
#define ASM(code) asm volatile(code)

static void privileged_instructions(void) {
    SURVIVE(ASM("hlt"));
    SURVIVE(ASM("cli"));
    SURVIVE(ASM("mov %cr3, %rax"));
    SURVIVE(ASM("mov $0xC0000082, %ecx; rdmsr"));
    SURVIVE(ASM("mov $0xC0000082, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr"));
    SURVIVE(ASM("xor %ecx, %ecx; mov $7, %eax; xor %edx, %edx; xsetbv"));
    SURVIVE(ASM("mov $0x80, %dx; in %dx, %al"));
    SURVIVE(ASM("mov $0x64, %dx; mov $0xFE, %al; out %al, %dx"));
    SURVIVE(ASM("swapgs"));
    SURVIVE(ASM("clac"));
    SURVIVE(ASM("sysretq"));
    SURVIVE(ASM("mov %rax, %dr7"));
    SURVIVE(ASM("lgdt (%rsp)"));
    SURVIVE(ASM("invlpg (%rsp)"));
}

static void odd_instructions(void) {
    SURVIVE(ASM("ud2"));
    SURVIVE(ASM("ud1 %eax, %eax"));
    SURVIVE(ASM("int $0x80"));
    SURVIVE(ASM("int $0x0e"));
    SURVIVE(ASM("int $0x20"));
    SURVIVE(ASM("int3"));
    SURVIVE(ASM(".byte 0xF1")); /* icebp */
    SURVIVE(ASM("sysenter"));
    SURVIVE(ASM("vmcall"));
    SURVIVE(ASM("vmmcall"));
    SURVIVE(ASM("monitor"));
    SURVIVE(ASM("rsm"));
    SURVIVE(ASM("rdpmc"));
    SURVIVE(ASM("rdtscp"));
    SURVIVE(ASM("sgdt -32(%rsp)"));
    SURVIVE(ASM("smsw %eax"));
    SURVIVE(ASM("str %eax"));
    SURVIVE(ASM("wrfsbase %rax; mov %fs:0, %rax"));
    SURVIVE(ASM("wrgsbase %rax; mov %gs:0, %rax"));
    SURVIVE(ASM("mov $0x8000000000000000, %rax; wrgsbase %rax"));
    SURVIVE(ASM(".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90"));
    SURVIVE(ASM("xrstor64 (%rsp)"));
    SURVIVE(ASM("xsave64 1(%rsp)"));
}

static void odd_segments(void) {
    SURVIVE(ASM("mov $0x10, %eax; mov %ax, %ss"));
    SURVIVE(ASM("mov $0xFFFF, %eax; mov %ax, %ds"));
    SURVIVE(ASM("pushq $0x10; lea 1f(%rip), %rax; push %rax; lretq; 1: nop"));
    SURVIVE(ASM("pushq $0x23; lea 1f(%rip), %rax; push %rax; lretq; 1: nop; .code32; 2: jmp 2b; .code64"));
    SURVIVE(ASM("pushq $0x2B; pushq $0; pushq $2; pushq $0x33; pushq $0; iretq"));
    SURVIVE(ASM("pushq $0; pushq $0; pushq $0; pushq $0; pushq $0; iretq"));
}

/* Like a system call, from where the processor would fault after SYSCALL: RIP is LSTAR, in user mode. */
static void jumps_into_the_kernel(void) {
    uint64_t entries[] = {0xffffffff81000000, 0xffffffff81800000, 0xffffffff81a00000, 0xffffffff81c00000,
                          0xfffffe0000000000, 0xffffffffff600000, 0xffffffff81000080};
    for (unsigned index = 0; index < sizeof entries / sizeof *entries; index++)
        SURVIVE(asm volatile("mov $39, %%eax; mov $0x1234, %%ecx; jmp *%0" ::"r"(entries[index])));
    const char *more[] = {getenv("LSTAR"), getenv("FAULT_HANDLER")};
    for (int index = 0; index < 2; index++) {
        if (!more[index])
            continue;
        uint64_t entry = strtoull(more[index], NULL, 16);
        SURVIVE(asm volatile("mov $39, %%eax; mov $0x8000000000001234, %%rcx; jmp *%0" ::"r"(entry)));
        SURVIVE(asm volatile("mov $39, %%eax; xor %%ecx, %%ecx; mov %%rcx, %%rsp; jmp *%0" ::"r"(entry)));
        SURVIVE(asm volatile("mov $39, %%eax; pushf; orq $0x100, (%%rsp); popf; jmp *%0" ::"r"(entry)));
        SURVIVE(asm volatile("call *%0" ::"r"(entry)));
    }
}

static void odd_system_calls(void) {
    SURVIVE(ASM("mov $0x8000000000000000, %rsp; mov $39, %eax; syscall; mov $60, %eax; xor %edi, %edi; syscall"));
    SURVIVE(ASM("xor %esp, %esp; mov $39, %eax; syscall; mov $60, %eax; xor %edi, %edi; syscall"));
    SURVIVE(ASM("mov $-1, %rax; syscall"));
    SURVIVE(ASM("mov $0x7FFFFFFF, %eax; syscall"));
    SURVIVE(ASM("std; mov $39, %eax; syscall; cld"));
    SURVIVE(ASM("pushf; orq $0x44000, (%rsp); popf; mov $39, %eax; syscall")); /* NT and AC */
    SURVIVE(ASM("pushf; orq $0x40000, (%rsp); popf; mov 1(%rsp), %eax"));      /* AC: unaligned */
    SURVIVE(ASM("pushf; orq $0x100, (%rsp); popf; mov $39, %eax; syscall; mov $39, %eax; syscall"));
    /* A SYSCALL whose return address is the first that is not canonical. */
    SURVIVE({
        char *top = mmap((void *)0x7ffffffff000 - 4096, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        REQUIRE(top != MAP_FAILED);
        memcpy(top + 4094, "\x0f\x05", 2);
        asm volatile("mov $39, %%eax; jmp *%0" ::"r"(top + 4094));
    });
}

/* An area for the processor state at the end of a signal frame, and the rest of it missing. */
static void broken_signal_frames(void) {
    SURVIVE(ASM("mov $15, %eax; xor %esp, %esp; syscall")); /* rt_sigreturn */
    SURVIVE({
        static uint64_t frame[2048] __attribute__((aligned(64)));
        memset(frame, 0xFF, sizeof frame);
        asm volatile("mov $15, %%eax; mov %0, %%rsp; syscall" ::"r"(frame + 16));
    });
    SURVIVE({
        char *stack = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(stack, 4096, PROT_READ);
        stack_t alternate = {.ss_sp = stack, .ss_size = 8192};
        sigaltstack(&alternate, NULL);
        struct sigaction action = {.sa_handler = _exit, .sa_flags = SA_ONSTACK};
        sigaction(SIGUSR1, &action, NULL);
        raise(SIGUSR1);
    });
}

const struct check hostile_checks[] = {
    {"privileged_instructions", privileged_instructions},
    {"odd_instructions", odd_instructions},
    {"odd_segments", odd_segments},
    {"jumps_into_the_kernel", jumps_into_the_kernel},
    {"odd_system_calls", odd_system_calls},
    {"broken_signal_frames", broken_signal_frames},
    {NULL, NULL},
};
