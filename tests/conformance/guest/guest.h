/* What the parts of the conformance guest offer each other; each part's own file tells what it is. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* console.c: the transcript. */
void print(const char *format, ...); /* %s %u %x %lu %lx, widths as in %04x */
void scope(const char *format, ...); /* what the names of the lines that follow begin with */
void report(const char *name, const char *format, ...); /* "scope.name = value" */
void note(const char *format, ...);                     /* a line that nobody compares */
void format_into(char *to, size_t size, const char *format, ...);
_Noreturn void guest_exit(uint8_t code);

/* cpu.c: ports, traps, interrupts, time. */
#define INTX_VECTOR 0x3A /* IDT vector of whichever INTx line is routed */
#define MSIX_VECTOR 0x30 /* of MSI-X vector 0; the others follow */
#define MSI_ADDRESS 0xFEE00000u
extern volatile uint32_t interrupts[64]; /* how many came, by IDT vector; of INTx those with ISR set */
extern volatile uint8_t intx_isr_seen;   /* what the INTx handler read from ISR registers, or'ed */
void cpu_setup(void);
void route_line(uint8_t line, bool enabled); /* IOAPIC input to INTX_VECTOR, level-triggered */
void intx_listen(uint16_t isr_port, volatile uint8_t *isr_register); /* what the INTx handler reads */
uint64_t cycles(void);
#define PATIENCE 8000000000ul /* cycles until something that must happen counts as not happening: seconds */
#define WHILE(condition)      /* wait while `condition` holds, but not for ever; true when it ended */       \
    ({                                                                                                       \
        uint64_t started_ = cycles();                                                                        \
        bool waiting_;                                                                                       \
        while ((waiting_ = (condition)) && cycles() - started_ < PATIENCE)                                   \
            __builtin_ia32_pause();                                                                          \
        !waiting_;                                                                                           \
    })

static inline void out8(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}
static inline void out16(uint16_t port, uint16_t value) {
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}
static inline void out32(uint16_t port, uint32_t value) {
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}
static inline uint8_t in8(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline uint16_t in16(uint16_t port) {
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline uint32_t in32(uint16_t port) {
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* memory.c: what gcc and the others need of a C library, and memory for rings and buffers. */
void *memset(void *to, int byte, size_t count);
void *memcpy(void *to, const void *from, size_t count);
int memcmp(const void *one, const void *other, size_t count);
size_t strlen(const char *text);
bool starts_with(const char *text, const char *start);
uint32_t crc32(const void *data, size_t size);
void fill_pattern(void *data, size_t size, uint32_t seed);
void *dma(size_t size,
          size_t alignment); /* zeroed; identity-mapped, so its address is its guest-physical one */
size_t dma_mark(void);
void dma_release(size_t mark);

/* pci.c: bus 0. */
#define PCI_COMMAND 0x04
#define PCI_STATUS 0x06
#define PCI_STATUS_INTERRUPT 8
#define PCI_INTERRUPT_LINE 0x3C
struct pci_function {
    uint8_t slot, number;
    uint16_t vendor, device;
    char name[8]; /* "blk0" and so on for virtio devices, else empty */
};
extern struct pci_function pci_functions[32];
extern unsigned pci_function_count;
extern uint32_t ecam_base; /* 0: configuration mechanism 1 only */
uint32_t pci_read(const struct pci_function *function, uint16_t offset, unsigned size);
void pci_write(const struct pci_function *function, uint16_t offset, unsigned size, uint32_t value);
void pci_scan(void);
void pci_report(void);
uint64_t pci_bar(const struct pci_function *function, unsigned bar); /* address; 0 when there is none */
bool pci_bar_is_io(const struct pci_function *function, unsigned bar);
uint8_t pci_capability(const struct pci_function *function, uint8_t id, uint8_t after); /* 0: no more */
struct pci_function *pci_find(const char *name);

/* The sections: each takes the devices it finds. */
void blk_section(void);
void net_section(void);
void rng_section(void);
void scsi_section(void);
void hostile_section(void);
void net_storm(void); /* the hostile part of each: what they are given beside disks */
void rng_storm(void);
void scsi_storm(void);
bool neighbour_is_well(void);  /* hostile.c: a second disk still reads what it read */
bool option(const char *name); /* the word `name` is on the command line */
