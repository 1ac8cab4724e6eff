/*
 * virtio-blk (virtio 1.2, section 5.2): every request type and the errors of each, through both register
 * layouts and all three ways of learning of an end. What it writes, the host finds in the image.
 */
#include "blk.h"

#define SECTOR 512u
#define UNLIKELY_STATUS 0xEE

struct segment {
    uint64_t sector;
    uint32_t count, flags;
};

struct queue *blk_begin(struct virtio *device, enum signal signal, uint16_t size) {
    if (!virtio_begin(device, BLK_WANTED, signal))
        note("%s does not accept the features", device->pci->name);
    struct queue *queue = virtio_queue(device, 0, size);
    virtio_ready(device);
    return queue;
}

struct blk_answer blk_request(struct queue *queue, uint32_t type, uint64_t sector, void *data,
                              uint32_t size) {
    size_t mark = dma_mark();
    struct blk_header *header = dma(sizeof *header, 16);
    volatile uint8_t *status = dma(1, 1);
    *header = (struct blk_header){type, 0, sector};
    *status = UNLIKELY_STATUS;
    bool outgoing = type == BLK_OUT || type == BLK_DISCARD || type == BLK_WRITE_ZEROES;
    struct buffer buffers[3] = {{header, sizeof *header}, {data, size}, {(void *)status, 1}};
    if (!size)
        buffers[1] = buffers[2];
    unsigned readable = 1 + (outgoing && size), total = 2 + (size != 0);
    struct blk_answer answer;
    answer.used_length = queue_request(queue, buffers, readable, total - readable);
    answer.status = *status;
    dma_release(mark);
    return answer;
}

static void tell(const char *name, struct blk_answer answer) {
    char of_length[48];
    format_into(of_length, sizeof of_length, "%s.used", name);
    if (answer.used_length == ~0u) {
        report(name, "NO ANSWER");
        return;
    }
    report(name, "status %u", answer.status);
    report(of_length, "%u", answer.used_length);
}

static void report_config(struct virtio *device) {
    uint64_t features = virtio_offered(device);
    report("config.capacity", "%u%s", virtio_config(device, 0, 4),
           virtio_config(device, 4, 4) ? " and more" : "");
    report("config.capacity.bytes", "%s",
           virtio_config(device, 1, 1) == (virtio_config(device, 0, 4) >> 8 & 0xFF) ? "agree" : "DISAGREE");
    if (features & 1 << 2)
        report("config.seg_max", "%u", virtio_config(device, 12, 4));
    if (features & 1 << 6)
        report("config.blk_size", "%u", virtio_config(device, 20, 4));
    if (features & 1 << 10)
        report("config.topology", "physical %u alignment %u min %u opt %u", virtio_config(device, 24, 1),
               virtio_config(device, 25, 1), virtio_config(device, 26, 2), virtio_config(device, 28, 4));
    if (features & 1 << 13)
        report("config.discard", "sectors %u segments %u alignment %u", virtio_config(device, 36, 4),
               virtio_config(device, 40, 4), virtio_config(device, 44, 4));
    if (features & 1 << 14)
        report("config.write_zeroes", "sectors %u segments %u unmap %u", virtio_config(device, 48, 4),
               virtio_config(device, 52, 4), virtio_config(device, 56, 1));
}

static void reads_and_writes(struct queue *queue, uint32_t capacity) {
    uint8_t *data = dma(128 * SECTOR, 4096), *back = dma(128 * SECTOR, 4096);
    tell("read", blk_request(queue, BLK_IN, 0, data, 128 * SECTOR));
    report("read.crc", "%08x", crc32(data, 128 * SECTOR));
    tell("read.last", blk_request(queue, BLK_IN, capacity - 1, data, SECTOR));
    report("read.last.crc", "%08x", crc32(data, SECTOR));
    fill_pattern(data, 16 * SECTOR, queue->device->transport + 1u);
    uint64_t target = queue->device->transport == MODERN ? 256 : 320;
    tell("write", blk_request(queue, BLK_OUT, target, data, 16 * SECTOR));
    tell("write.back", blk_request(queue, BLK_IN, target, back, 16 * SECTOR));
    report("write.back.data", "%s", memcmp(data, back, 16 * SECTOR) ? "DIFFERS" : "same");
    tell("flush", blk_request(queue, BLK_FLUSH, 0, NULL, 0));
    tell("read.past.end", blk_request(queue, BLK_IN, capacity, data, SECTOR));
    tell("read.across.end", blk_request(queue, BLK_IN, capacity - 1, data, 2 * SECTOR));
    tell("read.far", blk_request(queue, BLK_IN, 1ul << 62, data, SECTOR));
    tell("read.sector.overflow", blk_request(queue, BLK_IN, ~0ul, data, SECTOR));
    tell("write.past.end", blk_request(queue, BLK_OUT, capacity, data, SECTOR));
    tell("write.across.end", blk_request(queue, BLK_OUT, capacity - 1, data, 2 * SECTOR));
    tell("read.half.sector", blk_request(queue, BLK_IN, 0, data, 256));
    tell("write.half.sector", blk_request(queue, BLK_OUT, 8, data, 768));
    tell("unsupported", blk_request(queue, 99, 0, NULL, 0));
    tell("unsupported.with.data", blk_request(queue, 98, 0, back, 64));
    memset(back, 0xAA, 32);
    tell("id", blk_request(queue, BLK_GET_ID, 0, back, 20));
    report("id.text", "%s", (back[20] = 0, (char *)back));
    report("id.end", "%02x", back[21]);
    memset(back, 0xAA, 32);
    tell("id.short", blk_request(queue, BLK_GET_ID, 0, back, 8));
    report("id.short.data", "%02x %02x", back[7], back[8]);
}

static void deallocation(struct queue *queue, uint32_t capacity) {
    uint8_t *data = dma(16 * SECTOR, 4096);
    struct segment *segments = dma(64 * sizeof *segments, 16);
    if (!(queue->device->features & 1ul << 13 && queue->device->features & 1ul << 14))
        return;
    uint64_t target = queue->device->transport == MODERN ? 384 : 448;
    fill_pattern(data, 16 * SECTOR, 77);
    blk_request(queue, BLK_OUT, target, data, 16 * SECTOR);
    segments[0] = (struct segment){target + 2, 4, 0};
    tell("zero", blk_request(queue, BLK_WRITE_ZEROES, 0, segments, sizeof *segments));
    blk_request(queue, BLK_IN, target, data, 16 * SECTOR);
    report("zero.crc", "%08x", crc32(data, 16 * SECTOR));
    segments[0] = (struct segment){target + 8, 8, 1};
    tell("zero.unmap", blk_request(queue, BLK_WRITE_ZEROES, 0, segments, sizeof *segments));
    blk_request(queue, BLK_IN, target, data, 16 * SECTOR);
    report("zero.unmap.crc", "%08x", crc32(data, 16 * SECTOR));
    segments[0].flags = 2;
    tell("zero.reserved.flag", blk_request(queue, BLK_WRITE_ZEROES, 0, segments, sizeof *segments));
    segments[0] = (struct segment){capacity - 1, 2, 0};
    tell("zero.across.end", blk_request(queue, BLK_WRITE_ZEROES, 0, segments, sizeof *segments));
    segments[0] = (struct segment){512, 8, 0};
    tell("discard", blk_request(queue, BLK_DISCARD, 0, segments, sizeof *segments));
    segments[0].flags = 1;
    tell("discard.unmap.flag", blk_request(queue, BLK_DISCARD, 0, segments, sizeof *segments));
    segments[0] = (struct segment){capacity, 1, 0};
    tell("discard.past.end", blk_request(queue, BLK_DISCARD, 0, segments, sizeof *segments));
    segments[0] = (struct segment){~0ul, ~0u, 0};
    tell("discard.overflow", blk_request(queue, BLK_DISCARD, 0, segments, sizeof *segments));
}

/* Buffers cut in odd places, and tables of descriptors. */
static void layouts(struct queue *queue) {
    struct blk_header *header = dma(sizeof *header, 16);
    uint8_t *data = dma(8 * SECTOR, 4096), *status = dma(1, 1);
    struct buffer pieces[] = {
        {header, sizeof *header}, {data, 512}, {data + 512, 1024}, {data + 1536, 2560}, {status, 1}};
    uint32_t length;
    *header = (struct blk_header){BLK_IN, 0, 4};
    length = queue_request(queue, pieces, 1, 4);
    report("pieces", "status %u used %u crc %08x", *status, length, crc32(data, 8 * SECTOR));
    if (queue->device->features & (F_VERSION_1 | F_ANY_LAYOUT)) {
        struct buffer cut[] = {
            {header, 5}, {(uint8_t *)header + 5, 11}, {data, 100}, {data + 100, 412}, {data + 512, 513}};
        *header = (struct blk_header){BLK_IN, 0, 6};
        memset(data, 0xEE, 8 * SECTOR);
        length = queue_request(queue, cut, 2, 3);
        report("cut", "status %u used %u crc %08x", data[1024], length, crc32(data, 2 * SECTOR));
    }
    if (queue->device->features & F_INDIRECT) {
        uint32_t head;
        *header = (struct blk_header){BLK_IN, 0, 4};
        *status = UNLIKELY_STATUS;
        memset(data, 0xEE, 8 * SECTOR);
        queue_add_indirect(queue, pieces, 1, 4);
        queue_kick(queue);
        length = queue_wait(queue, &head, &length) ? length : ~0u;
        report("indirect", "status %u used %u crc %08x", *status, length, crc32(data, 8 * SECTOR));
        struct buffer *many = (struct buffer[66]){{header, sizeof *header}, {status, 1}};
        for (unsigned index = 0; index < 64; index++)
            many[1 + index] = (struct buffer){data + (63 - index) * 64, 64};
        many[65] = (struct buffer){status, 1};
        queue_add_indirect(queue, many, 1, 65);
        queue_kick(queue);
        length = queue_wait(queue, &head, &length) ? length : ~0u;
        report("indirect.long", "status %u used %u crc %08x", *status, length, crc32(data, 8 * SECTOR));
    }
}

/* Put `count` reads of one sector each into the ring; the buffers, by number. */
static void add_reads(struct queue *queue, unsigned count, uint8_t *data, uint8_t *statuses) {
    struct blk_header *headers = dma(count * sizeof *headers, 16);
    for (unsigned index = 0; index < count; index++) {
        headers[index] = (struct blk_header){BLK_IN, 0, index};
        statuses[index] = UNLIKELY_STATUS;
        struct buffer buffers[] = {
            {&headers[index], sizeof *headers}, {data + index * SECTOR, SECTOR}, {&statuses[index], 1}};
        queue_add(queue, buffers, 1, 2);
    }
}

static void many_at_once(struct queue *queue) {
    enum { COUNT = 64 };
    uint8_t *data = dma(COUNT * SECTOR, 4096), *statuses = dma(COUNT, 1);
    uint64_t seen = 0;
    unsigned came = 0, good = 0;
    uint32_t head, length;
    uint16_t first = queue->next;
    add_reads(queue, COUNT, data, statuses);
    queue_kick(queue);
    for (; came < COUNT && queue_wait(queue, &head, &length); came++)
        seen |= 1ul << (head - first + queue->size) % queue->size / 3;
    for (unsigned index = 0; index < COUNT; index++)
        good += statuses[index] == 0;
    report("many", "%u used, %s, %u good, crc %08x", came, seen == ~0ul ? "each once" : "NOT EACH ONCE", good,
           crc32(data, COUNT * SECTOR));
}

static void reset_while_busy(struct virtio *device, struct queue *queue) {
    uint8_t *data = dma(64 * SECTOR, 4096), *statuses = dma(64, 1);
    add_reads(queue, 64, data, statuses);
    queue_kick(queue);
    bool done = virtio_reset(device);
    report("busy.reset", "%s, status %02x", done ? "done" : "HANGS", virtio_status(device));
    /* Whatever comes after the reset would come into memory that is no longer the device's. */
    memset(data, 0x55, 64 * SECTOR);
    queue = blk_begin(device, POLLING, 0);
    struct blk_answer answer = blk_request(queue, BLK_IN, 0, dma(SECTOR, 512), SECTOR);
    unsigned touched = 0;
    for (unsigned index = 0; index < 64 * SECTOR; index++)
        touched += data[index] != 0x55;
    report("busy.after", "status %u used %u, %s", answer.status, answer.used_length,
           touched || queue->used->index != 1 ? "OLD BUFFERS TOUCHED" : "old buffers left alone");
}

/* A queue of 4 goes round often: its ring, and the 16-bit indices in between. */
static void going_round(struct virtio *device, uint16_t size, unsigned count) {
    struct queue *queue = blk_begin(device, POLLING, size);
    uint8_t *data = dma(SECTOR, 512);
    unsigned good = 0;
    for (unsigned index = 0; index < count; index++)
        good += blk_request(queue, BLK_IN, index % 64, data, SECTOR).status == 0;
    report(device->io ? "round" : "round.small", "%u of %u good, used index %u", good, count,
           queue->used->index);
}

static void by_intx(struct virtio *device) {
    uint8_t *data = dma(SECTOR, 512), line = (uint8_t)pci_read(device->pci, PCI_INTERRUPT_LINE, 1);
    struct queue *queue = blk_begin(device, INTX, 0);
    uint32_t before = interrupts[INTX_VECTOR];
    struct blk_answer answer = blk_request(queue, BLK_IN, 1, data, SECTOR);
    bool came = WHILE(interrupts[INTX_VECTOR] == before);
    report("intx", "status %u, %s, isr %02x", answer.status, came ? "interrupted" : "NO INTERRUPT",
           intx_isr_seen);
    /* The same with the line masked in the IOAPIC: now ISR and the PCI status bit can be watched. */
    route_line(line, false);
    blk_request(queue, BLK_IN, 1, data, SECTOR);
    bool pending = WHILE(!(pci_read(device->pci, PCI_STATUS, 2) & PCI_STATUS_INTERRUPT));
    uint8_t isr = virtio_isr(device), again = virtio_isr(device);
    report("intx.isr", "%s, isr %02x then %02x, %s",
           pending ? "pending in PCI status" : "NOT PENDING in PCI status", isr, again,
           pci_read(device->pci, PCI_STATUS, 2) & PCI_STATUS_INTERRUPT ? "STILL PENDING"
                                                                       : "no longer pending");
    route_line(line, true);
    /* INTx disabled in COMMAND: pending, but silent; the interrupt comes when it is enabled again. */
    pci_write(device->pci, PCI_COMMAND, 2, 0x0407);
    before = interrupts[INTX_VECTOR];
    blk_request(queue, BLK_IN, 1, data, SECTOR);
    WHILE(!(pci_read(device->pci, PCI_STATUS, 2) & PCI_STATUS_INTERRUPT));
    bool silent = interrupts[INTX_VECTOR] == before;
    pci_write(device->pci, PCI_COMMAND, 2, 0x0007);
    report("intx.disabled", "%s, %s", silent ? "silent" : "NOT SILENT",
           WHILE(interrupts[INTX_VECTOR] == before) ? "comes when enabled" : "NEVER COMES");
    virtio_end(device);
}

static void by_msix(struct virtio *device) {
    uint8_t *data = dma(SECTOR, 512);
    struct queue *queue = blk_begin(device, MSIX, 0);
    volatile uint32_t *count = &interrupts[MSIX_VECTOR + 1], *lines = &interrupts[INTX_VECTOR];
    uint32_t before = *count, lines_before = *lines;
    report("msix.capacity", "%u", virtio_config(device, 0, 4));
    struct blk_answer answer = blk_request(queue, BLK_IN, 1, data, SECTOR);
    report("msix", "status %u, %s", answer.status, WHILE(*count == before) ? "interrupted" : "NO INTERRUPT");
    msix_entry(device, 1, true);
    before = *count;
    blk_request(queue, BLK_IN, 1, data, SECTOR);
    bool pending = WHILE(!(device->msix_pending[0] & 2));
    report("msix.masked", "%s, %s", pending ? "pending" : "NOT PENDING",
           *count == before ? "silent" : "NOT SILENT");
    msix_entry(device, 1, false);
    report("msix.unmasked", "%s, pending bits %x", WHILE(*count == before) ? "interrupted" : "NO INTERRUPT",
           device->msix_pending[0]);
    msix_control(device, 0xC000);
    before = *count;
    blk_request(queue, BLK_IN, 1, data, SECTOR);
    pending = WHILE(!(device->msix_pending[0] & 2));
    report("msix.function.masked", "%s, %s", pending ? "pending" : "NOT PENDING",
           *count == before ? "silent" : "NOT SILENT");
    msix_control(device, 0x8000);
    report("msix.function.unmasked", "%s", WHILE(*count == before) ? "interrupted" : "NO INTERRUPT");
    report("msix.line", "%s", *lines == lines_before ? "silent" : "NOT SILENT");
    virtio_end(device);
}

/* The registers' BAR elsewhere, as an operating system may place it; and home again. */
static void moved(const struct pci_function *pci, struct virtio *device) {
    struct virtio there;
    uint16_t offset = (uint16_t)(0x10 + 4 * device->bar);
    uint32_t home = pci_read(pci, offset, 4);
    for (unsigned way = 0; way < 2; way++) {
        pci_write(pci, PCI_COMMAND, 2, 0);
        pci_write(pci, offset, 4, way ? home : home ^ (device->io ? 0x1800 : 0x00100000));
        virtio_open(&there, pci, device->transport);
        struct queue *queue = blk_begin(&there, POLLING, 0);
        struct blk_answer answer = blk_request(queue, BLK_IN, 0, dma(SECTOR, 512), SECTOR);
        report(way ? "moved.home" : "moved", "status %u used %u", answer.status, answer.used_length);
        virtio_end(&there);
    }
}

static void by_transport(const struct pci_function *pci, enum transport transport) {
    struct virtio device;
    scope("%s.%s", pci->name, transport_name(transport));
    if (!virtio_open(&device, pci, transport)) {
        report("layout", "none");
        return;
    }
    virtio_report_registers(&device);
    report_config(&device);
    uint32_t capacity = virtio_config(&device, 0, 4);
    bool read_only = virtio_offered(&device) & 1ul << 5;
    struct queue *queue = blk_begin(&device, POLLING, 0);
    report("status.running", "%02x", virtio_status(&device));
    if (read_only) {
        uint8_t *data = dma(SECTOR, 512);
        tell("readonly.read", blk_request(queue, BLK_IN, 0, data, SECTOR));
        report("readonly.read.crc", "%08x", crc32(data, SECTOR));
        tell("readonly.write", blk_request(queue, BLK_OUT, 0, data, SECTOR));
        virtio_end(&device);
        return;
    }
    reads_and_writes(queue, capacity);
    deallocation(queue, capacity);
    layouts(queue);
    many_at_once(queue);
    reset_while_busy(&device, queue);
    going_round(&device, 4, 300);
    by_intx(&device);
    by_msix(&device);
    moved(pci, &device);
    queue = blk_begin(&device, POLLING, 0);
    report("after.all", "status %u", blk_request(queue, BLK_FLUSH, 0, NULL, 0).status);
    virtio_end(&device);
}

void blk_section(void) {
    for (unsigned index = 0; index < pci_function_count; index++) {
        const struct pci_function *pci = &pci_functions[index];
        if (!starts_with(pci->name, "blk"))
            continue;
        for (enum transport transport = MODERN; transport <= LEGACY; transport++) {
            size_t mark = dma_mark();
            by_transport(pci, transport);
            dma_release(mark);
        }
    }
}
