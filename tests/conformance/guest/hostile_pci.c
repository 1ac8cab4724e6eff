/*
 * The hostile driver in configuration space: noise in every register, BARs over each other and over what is
 * no PCI function, an MSI-X table of noise. See hostile.c for how it is told.
 */
#include "hostile.h"

/* Configuration space full of nonsense, then BARs over each other and over what is no PCI function. */
void bad_configuration(void) {
    static uint32_t before[64];
    const struct pci_function *pci = victim.pci;
    uint32_t value = 99;
    for (unsigned index = 0; index < 64; index++)
        before[index] = pci_read(pci, (uint16_t)(4 * index), 4);
    pci_write(pci, PCI_COMMAND, 2, 0);
    for (unsigned round = 0; round < 2; round++)
        for (unsigned offset = 6; offset < 256; offset++) {
            value = value * 1664525u + 1013904223u;
            unsigned width = 1u << (value >> 8 & 1);
            pci_write(pci, (uint16_t)(offset & -width), width, value >> 16);
        }
    pci_write(pci, PCI_COMMAND, 2, 0);
    for (unsigned index = 63; index > 0; index--)
        pci_write(pci, (uint16_t)(4 * index), 4, before[index]);
    conclude("configuration.garbage", "restored");

    /* Each place: what lies there must go on working, and blk0 must be back once its BAR is. */
    static const struct {
        const char *name;
        uint32_t address;
    } places[] = {{"bar.over.ram", 0x00200000},
                  {"bar.over.lapic", 0xFEE00000},
                  {"bar.over.ioapic", 0xFEC00000},
                  {"bar.at.zero", 0},
                  {"bar.at.top", 0xFFFFF000}};
    for (unsigned bar = 0; bar < 6; bar++) {
        uint16_t offset = (uint16_t)(0x10 + 4 * bar);
        uint32_t home = pci_read(pci, offset, 4);
        if (!home || home & 1)
            continue;
        for (unsigned index = 0; index < sizeof places / sizeof *places; index++) {
            char name[32];
            format_into(name, sizeof name, "%s.%u", places[index].name, bar);
            pci_write(pci, offset, 4, places[index].address);
            bool well = neighbour_is_well();
            pci_write(pci, offset, 4, home);
            conclude(name, well ? "withstood" : "NOT WITHSTOOD");
        }
        char name[32];
        format_into(name, sizeof name, "bar.over.neighbour.%u", bar);
        pci_write(pci, offset, 4, (uint32_t)pci_bar(neighbour.pci, bar));
        bool well = neighbour_is_well();
        pci_write(pci, offset, 4, home);
        conclude(name, well ? "withstood" : "NOT WITHSTOOD");
        if ((home & 6) == 4)
            bar++;
    }
    if (pci_bar_is_io(pci, 0)) {
        uint32_t home = pci_read(pci, 0x10, 4);
        static const uint16_t ports[] = {0x03F8 & ~127, 0x0CF8 & ~127, 0xFF80, 0};
        for (unsigned index = 0; index < sizeof ports / sizeof *ports; index++) {
            pci_write(pci, 0x10, 4, ports[index]);
            bool well = neighbour_is_well();
            pci_write(pci, 0x10, 4, home);
            char name[32];
            format_into(name, sizeof name, "bar.over.ports.%04x", ports[index]);
            conclude(name, well ? "withstood" : "NOT WITHSTOOD");
        }
    }
}

void bad_msix(void) {
    uint32_t value = 4711, silent = 0;
    uint8_t *data = dma(SECTOR, 512);
    struct queue *queue;
    volatile uint32_t *table = victim.msix_table;
    for (unsigned index = 0; index < 64; index++)
        silent += interrupts[index];
    msix_control(&victim, 0x8000);
    for (unsigned round = 0; round < 8; round++)
        for (unsigned index = 0; index < 64; index++) {
            /* Addresses below 0xFEE00000: messages there reach no processor. */
            value = value * 1664525u + 1013904223u;
            table[index] = index % 4 == 3 ? value >> 31 : value & 0x7FFFFFFF;
            ((volatile uint8_t *)table)[4 * index + 1] = (uint8_t)value;
        }
    queue = blk_begin(&victim, MSIX, 0);
    for (unsigned index = 0; index < 8; index++)
        table[index] = index % 4 == 0 ? 0x12345678 : 0; /* nowhere, unmasked */
    struct blk_answer answer = blk_request(queue, BLK_IN, 0, data, SECTOR);
    virtio_end(&victim);
    for (unsigned index = 0; index < 64; index++)
        silent -= interrupts[index];
    conclude("msix.garbage", answer.status ? "NOT ANSWERED" : silent ? "INTERRUPTED" : "answered in silence");
    queue = blk_begin(&victim, MSIX, 0);
    uint32_t before = interrupts[MSIX_VECTOR + 1];
    blk_request(queue, BLK_IN, 0, data, SECTOR);
    bool came = WHILE(interrupts[MSIX_VECTOR + 1] == before);
    virtio_end(&victim);
    conclude("msix.after.garbage", came ? "interrupted" : "NO INTERRUPT");
}
