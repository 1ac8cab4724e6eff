/*
 * virtio-scsi with a CD-ROM at target 0 (virtio 1.2, section 5.6; SPC-3 and MMC-4 for the commands): what a
 * driver asks of a drive when it finds one, reads, and the sense data of what cannot be.
 */
#include "virtio.h"

#define SCSI_WANTED (F_VERSION_1 | F_INDIRECT)
#define REQUESTS 2 /* queues 0 and 1 are control and events */
#define BLOCK 2048u

struct scsi_request {
    uint8_t lun[8];
    uint64_t id;
    uint8_t attribute, priority, crn, cdb[32];
} __attribute__((packed));

struct scsi_response {
    uint32_t sense_length, residual;
    uint16_t qualifier;
    uint8_t status, response, sense[96];
} __attribute__((packed));

static struct queue *queue;
static uint8_t *data;
static uint8_t target, lun;

/* Carry out `cdb` and tell what came of it, with a checksum of the data when `with_data`. */
static void command(const char *name, const char *cdb, unsigned cdb_size, uint32_t size, bool with_data) {
    size_t mark = dma_mark();
    struct scsi_request *request = dma(sizeof *request, 16);
    struct scsi_response *answer = dma(sizeof *answer, 16);
    *request = (struct scsi_request){.lun = {1, target, 0x40, lun}, .id = 7};
    memcpy(request->cdb, cdb, cdb_size);
    memset(answer, 0xEE, sizeof *answer);
    memset(data, 0, 65536);
    struct buffer buffers[] = {{request, sizeof *request}, {answer, sizeof *answer}, {data, size}};
    uint32_t used = queue_request(queue, buffers, 1, size ? 2 : 1);
    if (used == ~0u)
        report(name, "NO ANSWER");
    else if (answer->response)
        report(name, "response %u", answer->response);
    else if (answer->status == 2)
        report(name, "check condition, sense length %u: %02x %x/%02x/%02x", answer->sense_length,
               answer->sense[0] & 0x7F, answer->sense[2] & 15, answer->sense[12], answer->sense[13]);
    else if (with_data)
        report(name, "status %u residual %u crc %08x", answer->status, answer->residual, crc32(data, size));
    else
        report(name, "status %u residual %u", answer->status, answer->residual);
    dma_release(mark);
}

#define COMMAND(name, cdb, size, with_data) command(name, cdb, sizeof cdb - 1, size, with_data)

static void report_data(const char *name, unsigned size) {
    char text[96];
    for (unsigned index = 0; index < size; index++)
        format_into(text + 2 * index, sizeof text - 2 * index, "%02x", data[index]);
    report(name, "%s", text);
}

static void questions(void) {
    COMMAND("inquiry", "\x12\0\0\0\x24\0", 36, false);
    report("inquiry.data", "type %02x removable %02x version %02x format %x length %u", data[0], data[1],
           data[2], data[3] & 15, data[4]);
    COMMAND("inquiry.short", "\x12\0\0\0\x05\0", 5, false);
    COMMAND("inquiry.vpd", "\x12\1\0\0\x40\0", 64, false);
    report("inquiry.vpd.data", "type %02x page %02x first %02x", data[0], data[1], data[4]);
    COMMAND("inquiry.vpd.unknown", "\x12\1\x55\0\x40\0", 64, false);
    COMMAND("inquiry.page.without.vpd", "\x12\0\x55\0\x40\0", 64, false);
    COMMAND("request.sense", "\x03\0\0\0\x12\0", 18, false);
    report("request.sense.data", "%02x %x/%02x", data[0] & 0x7F, data[2] & 15, data[12]);
    COMMAND("ready", "\0\0\0\0\0\0", 0, false);
    COMMAND("ready.again", "\0\0\0\0\0\0", 0, false);
    COMMAND("capacity", "\x25\0\0\0\0\0\0\0\0\0", 8, true);
    report("capacity.data", "last %02x%02x%02x%02x size %02x%02x", data[0], data[1], data[2], data[3],
           data[6], data[7]);
    COMMAND("luns", "\xa0\0\0\0\0\0\0\0\0\x10\0\0", 16, true);
    COMMAND("toc", "\x43\0\0\0\0\0\0\0\x14\0", 20, false);
    report_data("toc.data", 20);
    COMMAND("toc.msf", "\x43\2\0\0\0\0\0\0\x14\0", 20, false);
    report_data("toc.msf.data", 20);
    COMMAND("toc.sessions", "\x43\0\1\0\0\0\0\0\x0c\0", 12, false);
    report_data("toc.sessions.data", 12);
    COMMAND("configuration", "\x46\0\0\0\0\0\0\0\x08\0", 8, false);
    report("configuration.profile", "%02x%02x", data[6], data[7]);
    COMMAND("event.status", "\x4a\1\0\0\x10\0\0\0\x08\0", 8, false);
    report("event.status.data", "%02x%02x class %02x media %02x", data[0], data[1], data[2] & 7, data[5]);
    COMMAND("event.status.asynchronous", "\x4a\0\0\0\x10\0\0\0\x08\0", 8, false);
    COMMAND("mode.sense.2a", "\x5a\0\x2a\0\0\0\0\0\x40\0", 64, false);
    report("mode.sense.2a.page", "%02x", data[8] & 0x3F);
    COMMAND("mode.sense.unknown", "\x5a\0\x11\0\0\0\0\0\x40\0", 64, false);
}

static void reads(void) {
    COMMAND("read", "\x28\0\0\0\0\0\0\0\1\0", BLOCK, true);
    COMMAND("read.several", "\x28\0\0\0\0\x02\0\0\x08\0", 8 * BLOCK, true);
    COMMAND("read.none", "\x28\0\0\0\0\0\0\0\0\0", 0, false);
    COMMAND("read12", "\xa8\0\0\0\0\1\0\0\0\2\0\0", 2 * BLOCK, true);
    COMMAND("read.more.room", "\x28\0\0\0\0\0\0\0\1\0", 3 * BLOCK, true);
    COMMAND("read.past.end", "\x28\0\0\1\0\0\0\0\1\0", BLOCK, false);
    COMMAND("read.far", "\x28\0\xff\xff\xff\xff\0\0\1\0", BLOCK, false);
    COMMAND("write", "\x2a\0\0\0\0\0\0\0\1\0", 0, false);
    COMMAND("unknown", "\xff\0\0\0\0\0", 0, false);
    COMMAND("prevent", "\x1e\0\0\0\1\0", 0, false);
    COMMAND("eject.prevented", "\x1b\0\0\0\2\0", 0, false);
    COMMAND("allow", "\x1e\0\0\0\0\0", 0, false);
    COMMAND("start", "\x1b\0\0\0\1\0", 0, false);
    COMMAND("ready.at.end", "\0\0\0\0\0\0", 0, false);
    lun = 5;
    COMMAND("other.lun.inquiry", "\x12\0\0\0\x24\0", 36, false);
    COMMAND("other.lun.ready", "\0\0\0\0\0\0", 0, false);
    lun = 0;
    target = 9;
    COMMAND("other.target", "\0\0\0\0\0\0", 0, false);
    target = 0;
}

static void begin(struct virtio *device, enum signal signal) {
    virtio_begin(device, SCSI_WANTED, signal);
    virtio_queue(device, 0, 0);
    virtio_queue(device, 1, 0);
    queue = virtio_queue(device, REQUESTS, 0);
    virtio_ready(device);
}

static void by_transport(const struct pci_function *pci, enum transport transport) {
    struct virtio device;
    scope("%s.%s", pci->name, transport_name(transport));
    if (!virtio_open(&device, pci, transport)) {
        report("layout", "none");
        return;
    }
    virtio_report_registers(&device);
    report("config.queues", "%u", virtio_config(&device, 0, 4));
    report("config.sizes", "event %u sense %u cdb %u", virtio_config(&device, 16, 4),
           virtio_config(&device, 20, 4), virtio_config(&device, 24, 4));
    report("config.limits", "channel %u target %u lun %u", virtio_config(&device, 28, 2),
           virtio_config(&device, 30, 2), virtio_config(&device, 32, 4));
    data = dma(65536, 4096);
    begin(&device, POLLING);
    questions();
    reads();
    for (enum signal signal = INTX; signal <= MSIX; signal++) {
        begin(&device, signal);
        COMMAND(signal == INTX ? "intx.unit.attention" : "msix.unit.attention", "\0\0\0\0\0\0", 0, false);
        volatile uint32_t *count = &interrupts[signal == INTX ? INTX_VECTOR : MSIX_VECTOR + 1 + REQUESTS];
        uint32_t before = *count;
        COMMAND(signal == INTX ? "intx.read" : "msix.read", "\x28\0\0\0\0\0\0\0\1\0", BLOCK, true);
        report(signal == INTX ? "intx" : "msix", "%s",
               WHILE(*count == before) ? "interrupted" : "NO INTERRUPT");
        virtio_end(&device);
    }
}

void scsi_section(void) {
    for (unsigned index = 0; index < pci_function_count; index++)
        if (starts_with(pci_functions[index].name, "scsi"))
            for (enum transport transport = MODERN; transport <= LEGACY; transport++) {
                size_t mark = dma_mark();
                by_transport(&pci_functions[index], transport);
                dma_release(mark);
            }
}

static size_t storm_mark; /* memory of the rings begins here: each beginning anew takes it again */

/* One request with everything in the wrong size; true when it comes back or the device asks for a reset. */
static bool comes_back(struct virtio *device, struct buffer *buffers, unsigned readable, unsigned writable) {
    uint16_t before = queue->used->index;
    queue_add(queue, buffers, readable, writable);
    queue_kick(queue);
    bool told = WHILE(queue->used->index == before && !(virtio_status(device) & NEEDS_RESET));
    if (told && virtio_status(device) & NEEDS_RESET) {
        dma_release(storm_mark);
        begin(device, POLLING);
    } else if (told)
        queue->seen++;
    return told;
}

/* Every opcode with CDBs of noise and data of several sizes; requests and responses too short; noise to the
   control queue. */
void scsi_storm(void) {
    static const uint32_t sizes[] = {0, 1, 8, 255, 4096};
    const struct pci_function *pci = pci_find("scsi0");
    struct virtio device;
    if (!pci)
        return;
    size_t mark = dma_mark();
    scope("hostile.scsi0");
    virtio_open(&device, pci, MODERN);
    data = dma(65536, 4096);
    struct scsi_request *request = dma(sizeof *request, 16);
    struct scsi_response *answer = dma(sizeof *answer, 16);
    storm_mark = dma_mark();
    begin(&device, POLLING);
    unsigned sane = 0, known = 0, count = 0;
    for (unsigned opcode = 0; opcode < 256; opcode++)
        for (unsigned index = 0; index < sizeof sizes / sizeof *sizes; index++, count++) {
            *request = (struct scsi_request){.lun = {1, 0, 0x40, 0}, .id = count};
            fill_pattern(request->cdb, sizeof request->cdb, count);
            request->cdb[0] = (uint8_t)opcode;
            if (index == 0)
                memset(request->cdb + 1, 0xFF, sizeof request->cdb - 1);
            if (opcode == 0x1B)
                request->cdb[4] |= 1; /* not the tray */
            memset(answer, 0xEE, sizeof *answer);
            struct buffer buffers[] = {
                {request, sizeof *request}, {answer, sizeof *answer}, {data, sizes[index]}};
            sane += comes_back(&device, buffers, 1, sizes[index] ? 2 : 1);
            /* An answer longer than the room for it is response 1, VIRTIO_SCSI_S_OVERRUN. */
            known += answer->response == 1 ||
                     (answer->response == 0 && (answer->status == 0 || answer->status == 2));
        }
    report("opcodes", "%u of %u back, %u make sense", sane, count, known);
    sane = 0;
    for (uint32_t size = 1; size < sizeof *request; size++)
        sane += comes_back(&device, (struct buffer[]){{request, size}, {answer, sizeof *answer}}, 1, 1);
    report("requests.short", "%u of %u back", sane, (unsigned)sizeof *request - 1);
    sane = 0;
    for (uint32_t size = 1; size < sizeof *answer; size++)
        sane += comes_back(&device, (struct buffer[]){{request, sizeof *request}, {answer, size}}, 1, 1);
    report("responses.short", "%u of %u back", sane, (unsigned)sizeof *answer - 1);
    sane = 0;
    for (unsigned type = 0; type < 64; type++) {
        queue = &device.queues[0];
        fill_pattern(data, 64, type);
        memcpy(data, &(uint32_t){type % 4}, 4);
        if (comes_back(&device, (struct buffer[]){{data, 4 + type}, {answer, 8}}, 1, 1))
            sane++;
    }
    report("control.noise", "%u of 64 back", sane);
    begin(&device, POLLING);
    COMMAND("recovered.ready", "\0\0\0\0\0\0", 0, false);
    COMMAND("recovered.load", "\x1b\0\0\0\3\0", 0, false);
    COMMAND("recovered.read", "\x28\0\0\0\0\0\0\0\1\0", BLOCK, true);
    report("neighbour", "%s", neighbour_is_well() ? "well" : "ILL");
    virtio_end(&device);
    dma_release(mark);
}
