/*
 * Bus 0: configuration accesses, and a report of every virtio function's configuration space.
 *
 * PCI Local Bus 3.0, sections 3.2.2.3.2 (mechanism 1), 6.1, 6.2 and 6.8.2 (MSI-X); virtio 1.2, section 4.1.4
 * (vendor capabilities). Devices are named by kind and order, because slots differ from machine to machine.
 */
#include "guest.h"

#define VIRTIO_VENDOR 0x1AF4
#define HEADER_TYPE 0x0E
#define ROM 0x30
#define CAPABILITIES 0x34
#define INTERRUPT_PIN 0x3D
#define CAP_VENDOR 9
#define CAP_MSIX 0x11

struct pci_function pci_functions[32];
unsigned pci_function_count;
uint32_t ecam_base;

static uint32_t config_address(const struct pci_function *function, uint16_t offset) {
    return 1u << 31 | (uint32_t)function->slot << 11 | (uint32_t)function->number << 8 | (offset & 0xFC);
}

uint32_t pci_read(const struct pci_function *function, uint16_t offset, unsigned size) {
    uint16_t port = 0xCFC + (offset & 3);
    out32(0xCF8, config_address(function, offset));
    return size == 1 ? in8(port) : size == 2 ? in16(port) : in32(port);
}

void pci_write(const struct pci_function *function, uint16_t offset, unsigned size, uint32_t value) {
    uint16_t port = 0xCFC + (offset & 3);
    out32(0xCF8, config_address(function, offset));
    if (size == 1)
        out8(port, (uint8_t)value);
    else if (size == 2)
        out16(port, (uint16_t)value);
    else
        out32(port, value);
}

static volatile uint32_t *ecam(const struct pci_function *function, uint16_t offset) {
    return (void *)(uint64_t)(ecam_base +
                              ((uint32_t)function->slot << 15 | (uint32_t)function->number << 12) + offset);
}

static const char *kind_of(const struct pci_function *function) {
    static const char *const names[] = {[1] = "net", [2] = "blk", [3] = "console", [4] = "rng", [8] = "scsi"};
    unsigned id = 0;
    if (function->vendor != VIRTIO_VENDOR)
        return NULL;
    if (function->device >= 0x1040)
        id = function->device - 0x1040;
    else if (function->device >= 0x1000) /* transitional: the subsystem is the device type (4.1.2.1) */
        id = pci_read(function, 0x2E, 2);
    return id < sizeof names / sizeof *names ? names[id] : NULL;
}

void pci_scan(void) {
    for (unsigned slot = 0; slot < 32; slot++) {
        unsigned numbers = 1;
        for (unsigned number = 0; number < numbers; number++) {
            struct pci_function *function = &pci_functions[pci_function_count];
            *function = (struct pci_function){.slot = (uint8_t)slot, .number = (uint8_t)number};
            uint32_t ids = pci_read(function, 0, 4);
            if ((ids & 0xFFFF) == 0xFFFF || pci_function_count == 31)
                continue;
            if (number == 0 && pci_read(function, HEADER_TYPE, 1) & 0x80)
                numbers = 8;
            function->vendor = (uint16_t)ids;
            function->device = (uint16_t)(ids >> 16);
            const char *kind = kind_of(function);
            if (kind) {
                unsigned order = 0;
                for (unsigned index = 0; index < pci_function_count; index++)
                    order += starts_with(pci_functions[index].name, kind);
                format_into(function->name, sizeof function->name, "%s%u", kind, order);
            }
            pci_function_count++;
        }
    }
}

struct pci_function *pci_find(const char *name) {
    for (unsigned index = 0; index < pci_function_count; index++)
        if (memcmp(pci_functions[index].name, name, strlen(name) + 1) == 0)
            return &pci_functions[index];
    return NULL;
}

static uint16_t bar_offset(unsigned bar) {
    return (uint16_t)(0x10 + 4 * bar);
}

bool pci_bar_is_io(const struct pci_function *function, unsigned bar) {
    return pci_read(function, bar_offset(bar), 4) & 1;
}

uint64_t pci_bar(const struct pci_function *function, unsigned bar) {
    uint32_t low = pci_read(function, bar_offset(bar), 4);
    if (low & 1)
        return low & ~3u;
    uint64_t high = (low & 6) == 4 ? pci_read(function, bar_offset(bar + 1), 4) : 0;
    return high << 32 | (low & ~0xFu);
}

uint8_t pci_capability(const struct pci_function *function, uint8_t id, uint8_t after) {
    uint8_t at = (uint8_t)pci_read(function, after ? after + 1 : CAPABILITIES, 1) & 0xFC;
    for (unsigned count = 0; at && count < 48; count++) {
        if (pci_read(function, at, 1) == id)
            return at;
        at = (uint8_t)pci_read(function, at + 1, 1) & 0xFC;
    }
    return 0;
}

/* Which bits of a register a write of ones can set; the register is as before afterwards. */
static uint32_t writable(const struct pci_function *function, uint16_t offset, unsigned size) {
    uint32_t before = pci_read(function, offset, size);
    pci_write(function, offset, size, 0);
    uint32_t zeroes = pci_read(function, offset, size);
    pci_write(function, offset, size, 0xFFFFFFFF);
    uint32_t ones = pci_read(function, offset, size);
    pci_write(function, offset, size, before);
    return zeroes ^ ones;
}

static uint32_t bar_sizes[6];

static void report_bars(const struct pci_function *function) {
    uint32_t command = pci_read(function, PCI_COMMAND, 2);
    pci_write(function, PCI_COMMAND, 2, command & ~3u); /* nothing is decoded while addresses are nonsense */
    for (unsigned bar = 0; bar < 6; bar++) {
        uint16_t offset = bar_offset(bar);
        char name[16];
        uint32_t before = pci_read(function, offset, 4);
        uint32_t mask = writable(function, offset, 4);
        bar_sizes[bar] = ~mask + 1;
        format_into(name, sizeof name, "bar%u", bar);
        if (!mask && !before)
            continue;
        bool wide = !(before & 1) && (before & 6) == 4;
        report(name, "%s%s size %x%s",
               before & 1 ? "io"
               : wide     ? "memory64"
                          : "memory32",
               !(before & 1) && before & 8 ? " prefetchable" : "",
               before & 1 ? bar_sizes[bar] & 0xFFFF : bar_sizes[bar],
               pci_read(function, offset, 4) == before ? "" : " not restored");
        if (wide) {
            format_into(name, sizeof name, "bar%u.upper", bar);
            report(name, "writable %08x", writable(function, offset + 4, 4));
            bar++;
        }
    }
    report("rom", "%s", writable(function, ROM, 4) ? "yes" : "none");
    pci_write(function, PCI_COMMAND, 2, command);
}

static const char *inside(uint32_t bar, uint64_t offset, uint64_t length) {
    return bar < 6 && bar_sizes[bar] && offset + length <= bar_sizes[bar] ? "inside its bar"
                                                                          : "OUTSIDE its bar";
}

static void report_msix(const struct pci_function *function, uint8_t at) {
    uint32_t vectors = (pci_read(function, at + 2, 2) & 0x7FF) + 1;
    uint32_t table = pci_read(function, at + 4, 4), pending = pci_read(function, at + 8, 4);
    report("msix.vectors", "%u", vectors);
    report("msix.table", "bar %u, %s", table & 7, inside(table & 7, table & ~7u, 16 * vectors));
    report("msix.pending", "bar %u, %s", pending & 7,
           inside(pending & 7, pending & ~7u, (vectors + 63) / 64 * 8));
    report("msix.control.writable", "%04x", writable(function, at + 2, 2));
    report("msix.table.writable", "%08x", writable(function, at + 4, 4));
}

static void report_vendor_capability(const struct pci_function *function, uint8_t at) {
    static const uint32_t least[] = {0, 56, 2, 1, 4, 0}; /* what a driver may rely on, by cfg_type */
    uint32_t length = pci_read(function, at + 2, 1), type = pci_read(function, at + 3, 1);
    uint32_t bar = pci_read(function, at + 4, 1);
    uint32_t offset = pci_read(function, at + 8, 4), size = pci_read(function, at + 12, 4);
    char name[16];
    format_into(name, sizeof name, "cap%u", type);
    if (type == 5) {
        report(name, "length %u, bar %02x offset %08x length %08x can be written", length,
               writable(function, at + 4, 1), writable(function, at + 8, 4), writable(function, at + 12, 4));
        return;
    }
    report(name, "length %u, bar %u, %s, %s, %s", length, bar, inside(bar, offset, size),
           offset % 4 ? "MISALIGNED" : "aligned",
           type < 5 && size >= least[type] ? "large enough" : "TOO SMALL");
    if (type == 2) {
        uint32_t multiplier = pci_read(function, at + 16, 4);
        report("notify.multiplier", "%s",
               multiplier & (multiplier - 1) || multiplier == 1 ? "BAD" : "power of two or 0");
    }
}

/* The same registers by bytes, words and dwords, and by ECAM. */
static void report_widths(const struct pci_function *function) {
    unsigned wrong = 0, wrong_in_ecam = 0;
    for (uint16_t offset = 0; offset < 256; offset += 4) {
        if (offset == 0x94 || offset >= 0x98) /* the data window of the PCI configuration access capability */
            break;
        uint32_t dword = pci_read(function, offset, 4);
        uint32_t words = pci_read(function, offset, 2) | pci_read(function, offset + 2, 2) << 16;
        uint32_t bytes = 0;
        for (unsigned byte = 0; byte < 4; byte++)
            bytes |= pci_read(function, (uint16_t)(offset + byte), 1) << 8 * byte;
        wrong += dword != words || dword != bytes;
        if (ecam_base) {
            volatile uint8_t *at = (volatile uint8_t *)ecam(function, offset);
            wrong_in_ecam += *ecam(function, offset) != dword ||
                             *(volatile uint16_t *)(at + 2) != dword >> 16 || at[1] != (dword >> 8 & 0xFF);
        }
    }
    report("widths", "%s", wrong ? "DISAGREE" : "agree");
    if (ecam_base) {
        report("ecam", "%s", wrong_in_ecam ? "DISAGREES" : "agrees");
        report("ecam.extended", "%08x", *ecam(function, 0x100));
    }
}

static void report_function(const struct pci_function *function) {
    scope("%s.pci", function->name);
    report("ids", "%04x:%04x", function->vendor, function->device);
    report("subsystem", "%04x:%04x", pci_read(function, 0x2C, 2), pci_read(function, 0x2E, 2));
    report("class", "%06x", pci_read(function, 8, 4) >> 8);
    report("revision", "%02x", pci_read(function, 8, 1));
    report("header", "%02x", pci_read(function, HEADER_TYPE, 1));
    report("pin", "%u", pci_read(function, INTERRUPT_PIN, 1));
    report("line", "%s", pci_read(function, PCI_INTERRUPT_LINE, 1) < 24 ? "is an input" : "IS NONE");
    report("status", "%04x", pci_read(function, PCI_STATUS, 2));
    report("ids.writable", "%08x", writable(function, 0, 4));
    report("class.writable", "%08x", writable(function, 8, 4));
    report("subsystem.writable", "%08x", writable(function, 0x2C, 4));
    report("command.writable", "%04x", writable(function, PCI_COMMAND, 2));
    report("status.writable", "%04x", writable(function, PCI_STATUS, 2));
    report("cacheline.writable", "%02x", writable(function, 0x0C, 1));
    report("latency.writable", "%02x", writable(function, 0x0D, 1));
    report("capabilities.writable", "%02x", writable(function, CAPABILITIES, 1));
    report("line.writable", "%02x", writable(function, PCI_INTERRUPT_LINE, 1));
    report("pin.writable", "%02x", writable(function, INTERRUPT_PIN, 1));
    report_bars(function);
    unsigned count = 0;
    for (uint8_t at = (uint8_t)pci_read(function, CAPABILITIES, 1); at && count < 48; count++) {
        uint8_t id = (uint8_t)pci_read(function, at, 1);
        if (id == CAP_MSIX)
            report_msix(function, at);
        else if (id == CAP_VENDOR)
            report_vendor_capability(function, at);
        else
            note("%s has a capability %02x", function->name, id);
        at = (uint8_t)pci_read(function, at + 1, 1);
        if (at & 3 || (at && at < 0x40))
            report("chain", "BROKEN at %02x", at);
    }
    report("capabilities", "%u", count);
    report_widths(function);
}

void pci_report(void) {
    const struct pci_function absent = {.slot = 31}, no_function = {.slot = 0, .number = 7};
    scope("pci");
    report("absent.slot", "%08x", pci_read(&absent, 0, 4));
    report("absent.function", "%08x", pci_read(&no_function, 0, 4));
    pci_write(&absent, 0, 4, 0x12345678);
    out32(0xCF8, 0x80000000);
    report("address", "%08x", in32(0xCF8));
    out8(0xCF8, 0x55);
    report("address.after.byte", "%08x", in32(0xCF8));
    out32(0xCF8, 0);
    report("data.when.off", "%08x", in32(0xCFC));
    report("host.class", "%04x", pci_read(&pci_functions[0], 8, 4) >> 16);
    for (unsigned index = 0; index < pci_function_count; index++) {
        const struct pci_function *function = &pci_functions[index];
        note("00:%02x.%u %04x:%04x %s", function->slot, function->number, function->vendor, function->device,
             function->name);
        if (*function->name)
            report_function(function);
    }
}
