/*
 * Traps and interrupts. This is all that runs at CPL 0: a set-up, and handlers of a few instructions.
 *
 * 64 IDT vectors: 0 to 31 are exceptions, which print and end the guest; the rest are device interrupts,
 * which are counted. Intel SDM volume 3, chapters 6 and 11; 82093AA (IOAPIC).
 */
#include "guest.h"

#define LAPIC ((volatile uint32_t *)0xFEE00000ul)
#define LAPIC_EOI (0xB0 / 4)
#define LAPIC_SPURIOUS (0xF0 / 4)
#define LAPIC_ENABLE 0x100
#define SPURIOUS_VECTOR 0x3F
#define IOAPIC_SELECT ((volatile uint32_t *)0xFEC00000ul)
#define IOAPIC_DATA ((volatile uint32_t *)0xFEC00010ul)
#define IOAPIC_REDIRECTION 0x10
#define LEVEL (1u << 15)
#define MASKED (1u << 16)
#define GATE_INTERRUPT 0x8E00
#define KERNEL_CODE 0x10

struct gate {
    uint16_t offset_low, selector, type, offset_middle;
    uint32_t offset_high, zero;
};

struct trap_frame {
    uint64_t r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
    uint64_t vector, error, rip, cs, rflags, rsp, ss;
};

extern char trap_entries[64][16];
static struct gate idt[64] __attribute__((aligned(16)));
volatile uint32_t interrupts[64];
volatile uint8_t intx_isr_seen;
static uint16_t isr_port;
static volatile uint8_t *isr_register;

void trap(struct trap_frame *frame) {
    if (frame->vector < 32) {
        uint64_t address;
        __asm__ volatile("mov %%cr2, %0" : "=r"(address));
        print("\n# exception %lu error %lx at %lx cs %lx rsp %lx cr2 %lx\n", frame->vector, frame->error,
              frame->rip, frame->cs, frame->rsp, address);
        guest_exit(99);
    }
    bool ours = true;
    if (frame->vector == INTX_VECTOR) {
        /* Reading ISR lowers a level-triggered line; it must be low before the end of interrupt. An interrupt
           without ISR is another's on a shared line; KVM's IOAPIC was seen to deliver one twice. */
        uint8_t isr = isr_port ? in8(isr_port) : isr_register ? *isr_register : 0;
        ours = isr != 0;
        intx_isr_seen |= isr;
    }
    interrupts[frame->vector] += ours;
    if (frame->vector != SPURIOUS_VECTOR)
        LAPIC[LAPIC_EOI] = 0;
}

void cpu_setup(void) {
    for (unsigned vector = 0; vector < 64; vector++) {
        uint64_t entry = (uint64_t)trap_entries[vector];
        idt[vector] =
            (struct gate){(uint16_t)entry, KERNEL_CODE, GATE_INTERRUPT, (uint16_t)(entry >> 16), 0, 0};
    }
    struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t address;
    } pointer = {sizeof idt - 1, (uint64_t)idt};
    __asm__ volatile("lidt %0" : : "m"(pointer));
    out8(0x21, 0xFF); /* the PICs stay out of it */
    out8(0xA1, 0xFF);
    LAPIC[LAPIC_SPURIOUS] = LAPIC_ENABLE | SPURIOUS_VECTOR;
}

void route_line(uint8_t line, bool enabled) {
    *IOAPIC_SELECT = IOAPIC_REDIRECTION + 2u * line + 1;
    *IOAPIC_DATA = 0; /* to the CPU with APIC id 0 */
    *IOAPIC_SELECT = IOAPIC_REDIRECTION + 2u * line;
    *IOAPIC_DATA = INTX_VECTOR | LEVEL | (enabled ? 0 : MASKED);
}

void intx_listen(uint16_t port, volatile uint8_t *address) {
    isr_port = port;
    isr_register = address;
    intx_isr_seen = 0;
}

uint64_t cycles(void) {
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}
