/*
 * What a hostile or broken driver does: bad rings, bad registers, bad configuration space. blk0 is the
 * victim; blk1, another device in the same machine, must go on working throughout.
 *
 * After each misdeed a line says what came of it, whether a reset and an ordinary request put blk0 right
 * again, and whether blk1 still reads the same. The guest has no protection from itself here: what is tried
 * are the things that a device must withstand, not those by which a guest ends itself (an NMI by MSI-X, say).
 */
#include "hostile.h"

#define INTERRUPT_CONTROLLER 0xFEE00000ul
#define BEYOND_RAM 0xA0000000ul /* above RAM, below the PCI windows of either machine */

struct virtio victim, neighbour;
static struct queue *ring, *neighbour_ring;
static uint32_t neighbour_crc;
static struct blk_header *header;
static uint8_t *data, *status;

bool neighbour_is_well(void) {
    size_t mark = dma_mark();
    uint8_t *sector = dma(SECTOR, 512);
    struct blk_answer answer = blk_request(neighbour_ring, BLK_IN, 3, sector, SECTOR);
    dma_release(mark);
    return answer.status == 0 && answer.used_length == SECTOR + 1 && crc32(sector, SECTOR) == neighbour_crc;
}

static void start(void) {
    ring = blk_begin(&victim, POLLING, 0);
    header = dma(sizeof *header, 16);
    data = dma(SECTOR, 512);
    status = dma(16, 16);
    *header = (struct blk_header){BLK_IN, 0, 0};
    *status = 0xEE;
}

/* Put a descriptor into the table, as it is. */
static void put(unsigned index, uint64_t address, uint32_t length, uint16_t flags, uint16_t next) {
    ring->descriptors[index].address = address;
    ring->descriptors[index].length = length;
    ring->descriptors[index].flags = flags;
    ring->descriptors[index].next = next;
}

/* An ordinary read in descriptors 0 to 2, for one of them to be made bad. */
static void put_read(void) {
    put(0, (uint64_t)header, sizeof *header, NEXT, 1);
    put(1, (uint64_t)data, SECTOR, NEXT | WRITE, 2);
    put(2, (uint64_t)status, 1, WRITE, 0);
}

/* Kick, and wait until the device says something. */
static const char *kicked(void) {
    static char text[48];
    queue_kick(ring);
    if (!WHILE(!(virtio_status(&victim) & NEEDS_RESET) && ring->used->index == ring->seen))
        return "SILENCE";
    if (virtio_status(&victim) & NEEDS_RESET)
        return "needs reset";
    format_into(text, sizeof text, "answered, status %u", *status);
    return text;
}

static const char *published(void) {
    queue_publish(ring, 0);
    return kicked();
}

/* Tell the outcome, reset, and see whether all is well. */
void conclude(const char *name, const char *outcome) {
    bool reset = virtio_reset(&victim);
    struct queue *queue = blk_begin(&victim, POLLING, 0);
    bool well = reset && blk_request(queue, BLK_IN, 3, data, SECTOR).status == 0;
    report(name, "%s; %s; %s", outcome, well ? "recovered" : "NOT RECOVERED",
           neighbour_is_well() ? "neighbour well" : "NEIGHBOUR ILL");
}

static void bad_chains(void) {
#define TRY(name, ...)                                                                                       \
    do {                                                                                                     \
        size_t mark = dma_mark();                                                                            \
        start();                                                                                             \
        put_read();                                                                                          \
        __VA_ARGS__;                                                                                         \
        conclude(name, published());                                                                         \
        dma_release(mark);                                                                                   \
    } while (0)
    TRY("chain.loop", put(2, (uint64_t)status, 1, WRITE | NEXT, 1));
    TRY("chain.self", put(0, (uint64_t)header, sizeof *header, NEXT, 0));
    TRY("chain.next.out.of.range", put(1, (uint64_t)data, SECTOR, NEXT | WRITE, ring->size));
    TRY("chain.next.far", put(1, (uint64_t)data, SECTOR, NEXT | WRITE, 0xFFFF));
    TRY("chain.past.memory", put(1, (uint64_t)data, 0x7FFFFE00, NEXT | WRITE, 2));
    TRY("chain.longest", put(1, (uint64_t)data, 0xFFFFFFFF, NEXT | WRITE, 2));
    TRY("chain.no.memory", put(1, BEYOND_RAM, SECTOR, NEXT | WRITE, 2));
    TRY("chain.top.of.64.bits", put(1, ~0ul - 511, SECTOR, NEXT | WRITE, 2));
    TRY("chain.wraps", put(1, ~0ul, 0xFFFF, NEXT | WRITE, 2));
    TRY("chain.device.memory", put(1, INTERRUPT_CONTROLLER, SECTOR, NEXT | WRITE, 2));
    TRY("chain.header.nowhere", put(0, BEYOND_RAM, sizeof *header, NEXT, 1));
    TRY("chain.status.nowhere", put(2, BEYOND_RAM, 1, WRITE, 0));
    TRY("chain.writable.first", put(0, (uint64_t)header, sizeof *header, NEXT | WRITE, 1);
        put(2, (uint64_t)status, 1, 0, 0));
    TRY("chain.short.header", put(0, (uint64_t)header, 15, NEXT, 1));
    TRY("chain.no.status", put(0, (uint64_t)header, sizeof *header, 0, 0));
    TRY("chain.nothing", put(0, (uint64_t)header, 0, 0, 0));
    TRY("chain.unknown.flags", put(1, (uint64_t)data, SECTOR, NEXT | WRITE | 0xFFF8, 2));
    TRY("discard.short", header->type = BLK_DISCARD; put(1, (uint64_t)data, 8, NEXT, 2));
    TRY("zero.many.segments", header->type = BLK_WRITE_ZEROES; put(1, (uint64_t)data, 16 * 4096, NEXT, 2));
    TRY("indirect.empty", put(0, (uint64_t)data, 0, INDIRECT, 0));
    TRY("indirect.odd.length", put(0, (uint64_t)data, 17, INDIRECT, 0));
    TRY("indirect.huge", put(0, (uint64_t)data, 0xFFFFFFF0, INDIRECT, 0));
    TRY("indirect.nowhere", put(0, BEYOND_RAM, 48, INDIRECT, 0));
    TRY("indirect.and.next", put(0, (uint64_t)data, 48, INDIRECT | NEXT, 1));
    struct descriptor *table;
    TRY("indirect.nested", table = dma(64, 16);
        table[0] = (struct descriptor){(uint64_t)table, 64, INDIRECT, 0};
        put(0, (uint64_t)table, 64, INDIRECT, 0));
    TRY("indirect.loop", table = dma(64, 16); table[0] = (struct descriptor){(uint64_t)header, 16, NEXT, 1};
        table[1] = (struct descriptor){(uint64_t)status, 1, NEXT | WRITE, 1};
        put(0, (uint64_t)table, 64, INDIRECT, 0));
    TRY("indirect.next.out.of.range", table = dma(64, 16);
        table[0] = (struct descriptor){(uint64_t)header, 16, NEXT, 4};
        put(0, (uint64_t)table, 64, INDIRECT, 0));
#undef TRY
}

static void bad_rings(void) {
    start();
    put_read();
    ring->available->heads[0] = ring->size;
    ring->available->index = 1;
    conclude("ring.head.out.of.range", kicked());
    start();
    put_read();
    ring->available->index = 1000;
    conclude("ring.index.jumps", kicked());
    start();
    put_read();
    ring->available->index = 0xFFFF;
    conclude("ring.index.backwards", kicked());
    start();
    put_read();
    ring->used->index = 77; /* the device's own: it writes it and must not read it */
    queue_publish(ring, 0);
    queue_kick(ring);
    bool came = WHILE(ring->used->index == 77);
    conclude("ring.used.index.written", came && ring->used->index == 1 ? "not believed" : "BELIEVED");
    start();
    for (unsigned index = 0; index < ring->size; index++)
        ring->available->heads[index] = 0;
    put_read();
    ring->available->index = ring->size; /* one head, 256 times over */
    queue_kick(ring);
    WHILE(!(virtio_status(&victim) & NEEDS_RESET) && ring->used->index != ring->size);
    conclude("ring.head.repeated", virtio_status(&victim) & NEEDS_RESET ? "needs reset"
                                   : ring->used->index == ring->size    ? "each answered"
                                                                        : "SILENCE");
}

/* Rings at addresses that cannot be: begin as usual, then move them before DRIVER_OK. */
static void bad_places(void) {
    static const struct {
        const char *name;
        unsigned part; /* 0 descriptors, 1 available, 2 used */
        uint64_t add, instead;
    } places[] = {
        {"place.descriptors.unaligned", 0, 1, 0},
        {"place.available.unaligned", 1, 1, 0},
        {"place.used.unaligned", 2, 2, 0},
        {"place.descriptors.nowhere", 0, 0, BEYOND_RAM},
        {"place.available.nowhere", 1, 0, BEYOND_RAM},
        {"place.used.nowhere", 2, 0, BEYOND_RAM},
        {"place.descriptors.top", 0, 0, ~15ul},
        {"place.used.top", 2, 0, ~3ul},
        {"place.used.device.memory", 2, 0, INTERRUPT_CONTROLLER},
    };
    for (unsigned index = 0; index < sizeof places / sizeof *places; index++) {
        virtio_begin(&victim, BLK_WANTED, POLLING);
        ring = virtio_queue(&victim, 0, 0);
        virtio_reset(&victim);
        virtio_begin(&victim, BLK_WANTED, POLLING);
        uint64_t parts[] = {(uint64_t)ring->descriptors, (uint64_t)ring->available, (uint64_t)ring->used};
        parts[places[index].part] =
            places[index].instead ? places[index].instead : parts[places[index].part] + places[index].add;
        set16(victim.common, QUEUE_SELECT, 0);
        for (unsigned part = 0; part < 3; part++) {
            set32(victim.common, QUEUE_DESC + 8 * part, (uint32_t)parts[part]);
            set32(victim.common, QUEUE_DESC + 8 * part + 4, (uint32_t)(parts[part] >> 32));
        }
        set16(victim.common, QUEUE_ENABLE, 1);
        virtio_ready(&victim);
        queue_kick(ring);
        bool told = WHILE(!(virtio_status(&victim) & NEEDS_RESET));
        conclude(places[index].name, told ? "needs reset" : "SILENCE");
    }
}

static void bad_registers(void) {
    volatile uint8_t *common = victim.common;
    start();
    set16(common, QUEUE_SELECT, 0);
    set32(common, QUEUE_DESC, (uint32_t)BEYOND_RAM);
    set32(common, QUEUE_DEVICE, 0x1003);
    set16(common, QUEUE_SIZE, 8);
    struct blk_answer answer = blk_request(ring, BLK_IN, 0, data, SECTOR);
    bool stands =
        (set16(common, QUEUE_SELECT, 0), get32(common, QUEUE_DESC)) == (uint32_t)(uint64_t)ring->descriptors;
    conclude("live.queue.moved", answer.status == 0 && stands ? "ignored" : "NOT IGNORED");
    virtio_begin(&victim, BLK_WANTED, POLLING);
    static const uint16_t sizes[] = {0, 3, 255, 512, 0xFFFF};
    unsigned changed = 0;
    for (unsigned index = 0; index < sizeof sizes / sizeof *sizes; index++) {
        set16(common, QUEUE_SELECT, 0);
        set16(common, QUEUE_SIZE, sizes[index]);
        changed += get16(common, QUEUE_SIZE) != 256;
    }
    conclude("queue.size.impossible", changed ? "accepted" : "ignored");
    virtio_reset(&victim);
    virtio_set_status(&victim, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    uint8_t seen = virtio_status(&victim);
    conclude("status.without.features", seen & NEEDS_RESET ? "needs reset" : "accepted");
    virtio_set_status(&victim, 0x30);
    conclude("status.unknown.bits", "written");
    start();
    set16(victim.notify, 0, 0xFFFF);
    for (unsigned offset = 0; offset < 0x1000; offset += 252)
        set32(victim.notify, offset & ~3u, 0x12345678);
    conclude("notify.garbage", virtio_status(&victim) & NEEDS_RESET ? "needs reset" : "ignored");
    for (unsigned round = 0; round < 20; round++) {
        start();
        put_read();
        queue_publish(ring, 0);
        queue_kick(ring);
        virtio_reset(&victim);
    }
    conclude("reset.twenty.times", "done");
    start();
    for (unsigned offset = 0; offset < 64; offset++) {
        victim.config[offset] = 0xFF;
        (void)get8(victim.config, offset);
    }
    *(volatile uint64_t *)victim.config = ~0ul;
    set16(victim.config, 0xFFE, 0xFFFF);
    uint32_t capacity = virtio_config(&victim, 0, 4);
    conclude("config.written", capacity == 2048 ? "capacity stands" : "CAPACITY CHANGED");
}

/* Every offset of the common configuration with every width, in a shuffled order of values. */
static void register_storm(void) {
    uint32_t value = 12345;
    for (unsigned round = 0; round < 3; round++)
        for (unsigned offset = 0; offset < 64; offset++)
            for (unsigned width = 1; width <= 8; width *= 2) {
                volatile uint8_t *at = victim.common + offset;
                value = value * 1664525u + 1013904223u;
                if (offset + width > 64)
                    continue;
                if (width == 1)
                    *at = (uint8_t)(value >> 24);
                else if (width == 2)
                    *(volatile uint16_t *)at = (uint16_t)(value >> 16);
                else if (width == 4)
                    *(volatile uint32_t *)at = value;
                else
                    *(volatile uint64_t *)at = (uint64_t)value << 32 | ~value;
                if (width == 4)
                    (void)*(volatile uint32_t *)at;
            }
    conclude("registers.every.width", "written");
}

/* The legacy registers: rings nowhere, rings moved, and every width everywhere. Reset is by the modern ones.
 */
static void bad_legacy_registers(void) {
    struct virtio old;
    uint32_t value = 31415;
    if (!virtio_open(&old, victim.pci, LEGACY))
        return;
    virtio_begin(&old, BLK_WANTED, POLLING);
    out32(old.io + LEGACY_QUEUE_ADDRESS, BEYOND_RAM >> 12);
    virtio_ready(&old);
    out16(old.io + LEGACY_QUEUE_NOTIFY, 0);
    conclude("legacy.ring.nowhere", WHILE(!(virtio_status(&old) & NEEDS_RESET)) ? "needs reset" : "SILENCE");
    virtio_begin(&old, BLK_WANTED, POLLING);
    out32(old.io + LEGACY_QUEUE_ADDRESS, 0xFFFFFFFF);
    virtio_ready(&old);
    out16(old.io + LEGACY_QUEUE_NOTIFY, 0);
    conclude("legacy.ring.far", WHILE(!(virtio_status(&old) & NEEDS_RESET)) ? "needs reset" : "SILENCE");
    struct queue *queue = blk_begin(&old, POLLING, 0);
    out32(old.io + LEGACY_QUEUE_ADDRESS, BEYOND_RAM >> 12);
    struct blk_answer answer = blk_request(queue, BLK_IN, 0, data, SECTOR);
    conclude("legacy.ring.moved", answer.status == 0 ? "ignored" : "NOT IGNORED");
    blk_begin(&old, POLLING, 0);
    out16(old.io + LEGACY_QUEUE_NOTIFY, 99);
    out16(old.io + LEGACY_QUEUE_SELECT, 99);
    out32(old.io + LEGACY_QUEUE_ADDRESS, 1);
    conclude("legacy.queue.unknown", virtio_status(&old) & NEEDS_RESET ? "needs reset" : "ignored");
    for (unsigned offset = 0; offset < 128; offset++)
        for (unsigned width = 1; width <= 4; width *= 2) {
            value = value * 1664525u + 1013904223u;
            if (offset + width > 128)
                continue;
            uint16_t port = (uint16_t)(old.io + offset);
            if (width == 1)
                out8(port, (uint8_t)(value >> 24)), (void)in8(port);
            else if (width == 2)
                out16(port, (uint16_t)(value >> 16)), (void)in16(port);
            else
                out32(port, value), (void)in32(port);
        }
    conclude("legacy.registers.every.width", "written");
}

void hostile_section(void) {
    struct pci_function *first = pci_find("blk0"), *second = pci_find("blk1");
    scope("hostile");
    if (!first || !second || !virtio_open(&neighbour, second, MODERN) ||
        !virtio_open(&victim, first, MODERN)) {
        note("two disks are needed");
        return;
    }
    neighbour_ring = blk_begin(&neighbour, POLLING, 0);
    uint8_t *sector = dma(SECTOR, 512);
    blk_request(neighbour_ring, BLK_IN, 3, sector, SECTOR);
    neighbour_crc = crc32(sector, SECTOR);
    void (*const misdeeds[])(void) = {bad_chains,        bad_rings,      bad_places,
                                      bad_registers,     register_storm, bad_legacy_registers,
                                      bad_configuration, bad_msix};
    for (unsigned index = 0; index < sizeof misdeeds / sizeof *misdeeds; index++) {
        size_t mark = dma_mark();
        data = dma(SECTOR, 512);
        misdeeds[index]();
        dma_release(mark);
    }
    net_storm();
    rng_storm();
    scsi_storm();
}
