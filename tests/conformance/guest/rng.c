/* virtio-rng (virtio 1.2, section 5.4): bytes come, as many as the used length says, and not the same twice.
 */
#include "virtio.h"

static bool all_are(const uint8_t *data, uint32_t size, uint8_t byte) {
    for (uint32_t index = 0; index < size; index++)
        if (data[index] != byte)
            return false;
    return true;
}

static void ask(struct queue *queue, const char *name, uint32_t size, uint32_t room) {
    uint8_t *data = dma(room + 64, 64);
    memset(data, 0, room + 64);
    struct buffer buffers[] = {{data, size / 3 + 1}, {data + size / 3 + 1, size - size / 3 - 1}};
    uint32_t length = queue_request(queue, buffers, 0, size > 1 ? 2 : 1);
    bool sane = length && length <= size;
    report(name, "used length %s, %s, %s", sane ? "in 1 to the size asked" : "WRONG",
           sane && (length < 16 || !all_are(data, length, 0)) ? "filled" : "ALL ZERO",
           !sane || all_are(data + length, room + 64 - length, 0) ? "nothing behind it" : "MORE BEHIND IT");
}

static void by_transport(const struct pci_function *pci, enum transport transport) {
    struct virtio device;
    scope("%s.%s", pci->name, transport_name(transport));
    if (!virtio_open(&device, pci, transport)) {
        report("layout", "none");
        return;
    }
    virtio_report_registers(&device);
    virtio_begin(&device, F_VERSION_1 | F_INDIRECT, POLLING);
    struct queue *queue = virtio_queue(&device, 0, 0);
    virtio_ready(&device);
    ask(queue, "one", 1, 1);
    ask(queue, "some", 64, 64);
    ask(queue, "page", 4096, 4096);
    ask(queue, "much", 1 << 18, 1 << 18);
    uint8_t *twice = dma(64, 64);
    queue_request(queue, &(struct buffer){twice, 32}, 0, 1);
    queue_request(queue, &(struct buffer){twice + 32, 32}, 0, 1);
    report("twice", "%s", memcmp(twice, twice + 32, 32) ? "different" : "THE SAME");
    for (enum signal signal = INTX; signal <= MSIX; signal++) {
        virtio_begin(&device, F_VERSION_1, signal);
        queue = virtio_queue(&device, 0, 0);
        virtio_ready(&device);
        volatile uint32_t *count = &interrupts[signal == INTX ? INTX_VECTOR : MSIX_VECTOR + 1];
        uint32_t before = *count;
        queue_request(queue, &(struct buffer){twice, 32}, 0, 1);
        bool came = WHILE(*count == before);
        report(signal == INTX ? "intx" : "msix", "%s",
               !came                  ? "NO INTERRUPT"
               : *count == before + 1 ? "interrupted once"
                                      : "INTERRUPTED TOO OFTEN");
        virtio_end(&device);
    }
}

void rng_section(void) {
    for (unsigned index = 0; index < pci_function_count; index++)
        if (starts_with(pci_functions[index].name, "rng"))
            for (enum transport transport = MODERN; transport <= LEGACY; transport++) {
                size_t mark = dma_mark();
                by_transport(&pci_functions[index], transport);
                dma_release(mark);
            }
}

/* Buffers the wrong way round, nowhere and without end. */
void rng_storm(void) {
    static const struct {
        const char *name;
        uint64_t at;
        uint32_t size;
        bool readable;
    } requests[] = {{"readable", 0x200000, 64, true},
                    {"nowhere", 0xA0000000, 64, false},
                    {"without.end", 0x200000, 0xFFFFFFFF, false},
                    {"empty", 0x200000, 0, false}};
    const struct pci_function *pci = pci_find("rng0");
    struct virtio device;
    if (!pci)
        return;
    size_t mark = dma_mark();
    scope("hostile.rng0");
    virtio_open(&device, pci, MODERN);
    for (unsigned index = 0; index < sizeof requests / sizeof *requests; index++) {
        virtio_begin(&device, F_VERSION_1, POLLING);
        struct queue *queue = virtio_queue(&device, 0, 0);
        virtio_ready(&device);
        struct buffer buffer = {(void *)requests[index].at, requests[index].size};
        queue_add(queue, &buffer, requests[index].readable, !requests[index].readable);
        queue_kick(queue);
        bool told = WHILE(queue->used->index == 0 && !(virtio_status(&device) & NEEDS_RESET));
        report(requests[index].name, "%s",
               !told                                  ? "SILENCE"
               : virtio_status(&device) & NEEDS_RESET ? "needs reset"
               : queue->used->elements[0].length == 0 ? "used, 0 bytes"
                                                      : "FILLED");
    }
    virtio_begin(&device, F_VERSION_1, POLLING);
    struct queue *queue = virtio_queue(&device, 0, 0);
    virtio_ready(&device);
    uint32_t length = queue_request(queue, &(struct buffer){dma(64, 64), 64}, 0, 1);
    report("recovered", "%s; neighbour %s", length == 64 ? "64 bytes" : "NO",
           neighbour_is_well() ? "well" : "ILL");
    virtio_end(&device);
    dma_release(mark);
}
