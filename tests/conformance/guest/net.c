/*
 * virtio-net (virtio 1.2, section 5.1): talks ARP and ICMP echo to the host at the other end of the tap, with
 * the header sizes of both register layouts, and buffers cut in several ways.
 *
 * The guest is 192.0.2.2 and the host 192.0.2.1. Frames that are not an answer to ours are passed over.
 */
#include "virtio.h"

#define NET_WANTED (F_VERSION_1 | F_INDIRECT | 1ul << 3 | 1ul << 5 | 1ul << 16)
#define RECEIVE 0
#define TRANSMIT 1
#define SLOTS 64
#define SLOT_SIZE 2048u
#define ETHERNET 14
#define FRAME_OVERHEAD 42 /* Ethernet, IPv4, ICMP */
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_ARP 0x0806

enum cut { WHOLE, HEADER_APART, PIECES }; /* how the buffer of a frame is divided into descriptors */

static const uint8_t our_ip[4] = {192, 0, 2, 2}, host_ip[4] = {192, 0, 2, 1};
static uint8_t our_mac[6], host_mac[6];

struct card {
    struct virtio device;
    struct queue *receive, *transmit;
    unsigned header; /* size of the virtio_net_hdr */
    enum cut cut;
    uint8_t *slots;
    uint16_t slot_of_head[256];
    uint8_t *outgoing;
    uint32_t last_length; /* used length of the last frame received */
    uint16_t sequence;
};

static void put16(uint8_t *at, uint16_t value) {
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static uint16_t take16(const uint8_t *at) {
    return (uint16_t)(at[0] << 8 | at[1]);
}

static uint16_t checksum(const uint8_t *data, unsigned size) {
    uint32_t sum = 0;
    for (unsigned index = 0; index < size; index++)
        sum += index & 1 ? data[index] : (uint32_t)data[index] << 8;
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return (uint16_t)~sum;
}

/* Divide header and frame at `at` into buffers; returns how many. */
static unsigned divide(const struct card *card, uint8_t *at, uint32_t size, enum cut cut,
                       struct buffer *buffers) {
    uint32_t first = cut == WHOLE ? size : card->header;
    unsigned count = 0;
    buffers[count++] = (struct buffer){at, first};
    if (cut == PIECES && size > first + 20) {
        buffers[count++] = (struct buffer){at + first, 20};
        first += 20;
    }
    if (size > first)
        buffers[count++] = (struct buffer){at + first, size - first};
    return count;
}

static void post(struct card *card, unsigned slot, uint32_t size) {
    struct buffer buffers[3];
    uint8_t *at = card->slots + slot * SLOT_SIZE;
    memset(at, 0xEE, card->header + ETHERNET);
    unsigned count = divide(card, at, size, card->cut, buffers);
    card->slot_of_head[queue_add(card->receive, buffers, 0, count)] = (uint16_t)slot;
}

static void begin(struct card *card, enum signal signal, enum cut cut, unsigned posted, uint32_t size) {
    virtio_begin(&card->device, NET_WANTED, signal);
    card->receive = virtio_queue(&card->device, RECEIVE, 0);
    card->transmit = virtio_queue(&card->device, TRANSMIT, 0);
    card->header = card->device.features & F_VERSION_1 ? 12 : 10;
    card->cut =
        cut == WHOLE && card->device.io ? HEADER_APART : cut; /* a legacy driver keeps the header apart */
    virtio_ready(&card->device);
    for (unsigned slot = 0; slot < posted; slot++)
        post(card, slot, size);
    queue_kick(card->receive);
}

/* Send what lies behind the header in card->outgoing. */
static uint32_t send(struct card *card, uint32_t frame_size, enum cut cut) {
    struct buffer buffers[3];
    memset(card->outgoing, 0, card->header);
    unsigned count = divide(card, card->outgoing, card->header + frame_size, cut, buffers);
    return queue_request(card->transmit, buffers, count, 0);
}

static uint8_t *outgoing_frame(struct card *card, uint16_t ethertype) {
    uint8_t *frame = card->outgoing + card->header;
    memcpy(frame, host_mac, 6);
    memcpy(frame + 6, our_mac, 6);
    put16(frame + 12, ethertype);
    return frame;
}

static uint32_t send_arp_request(struct card *card, enum cut cut) {
    static const uint8_t start[8] = {0, 1, 8, 0, 6, 4, 0, 1};
    memset(host_mac, 0xFF, 6);
    uint8_t *arp = outgoing_frame(card, ETHERTYPE_ARP) + ETHERNET;
    memcpy(arp, start, 8);
    memcpy(arp + 8, our_mac, 6);
    memcpy(arp + 14, our_ip, 4);
    memset(arp + 18, 0, 6);
    memcpy(arp + 24, host_ip, 4);
    return send(card, 42, cut);
}

static uint32_t send_echo_request(struct card *card, uint16_t payload, enum cut cut) {
    uint8_t *ip = outgoing_frame(card, ETHERTYPE_IPV4) + ETHERNET, *icmp = ip + 20;
    static const uint8_t start[12] = {0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0};
    memcpy(ip, start, 12);
    put16(ip + 2, 28 + payload);
    memcpy(ip + 12, our_ip, 4);
    memcpy(ip + 16, host_ip, 4);
    put16(ip + 10, checksum(ip, 20));
    memset(icmp, 0, 8);
    icmp[0] = 8;
    put16(icmp + 4, 0x766D);
    put16(icmp + 6, ++card->sequence);
    fill_pattern(icmp + 8, payload, card->sequence);
    put16(icmp + 2, checksum(icmp, 8u + payload));
    return send(card, FRAME_OVERHEAD + payload, cut);
}

static bool is_answer(const uint8_t *frame, uint16_t ethertype) {
    if (memcmp(frame, our_mac, 6) || take16(frame + 12) != ethertype)
        return false;
    return ethertype == ETHERTYPE_ARP ? frame[21] == 2 : frame[23] == 1 && frame[34] == 0;
}

/* The next answer of this kind, header first, or NULL. Its buffer is posted again unless `keep`. */
static uint8_t *await(struct card *card, uint16_t ethertype, bool keep, uint32_t size) {
    uint32_t head;
    while (queue_wait(card->receive, &head, &card->last_length)) {
        unsigned slot = card->slot_of_head[head & 255];
        uint8_t *at = card->slots + slot * SLOT_SIZE;
        bool found = is_answer(at + card->header, ethertype);
        if (found && keep)
            return at;
        static uint8_t copy[SLOT_SIZE];
        memcpy(copy, at, SLOT_SIZE);
        post(card, slot, size);
        queue_kick(card->receive);
        if (found)
            return copy;
    }
    return NULL;
}

static const char *header_text(const struct card *card, const uint8_t *header) {
    for (unsigned index = 0; index < 10; index++)
        if (header[index])
            return "header NOT ZERO";
    return card->header == 10               ? "header zero"
           : header[10] == 1 && !header[11] ? "header zero, 1 buffer"
                                            : "header zero, num_buffers not 1";
}

static void arp(struct card *card, const char *name, enum cut cut, uint32_t size) {
    uint32_t sent = send_arp_request(card, cut);
    const uint8_t *answer = await(card, ETHERTYPE_ARP, false, size);
    if (!answer) {
        report(name, "sent, used %u, NO ANSWER", sent);
        return;
    }
    const uint8_t *frame = answer + card->header;
    memcpy(host_mac, frame + 6, 6);
    report(name, "sent, used %u; answer used %u from %u.%u.%u.%u, %s", sent, card->last_length, frame[28],
           frame[29], frame[30], frame[31], header_text(card, answer));
}

static void ping(struct card *card, const char *name, uint16_t payload, enum cut cut, uint32_t size) {
    uint32_t sent = send_echo_request(card, payload, cut);
    const uint8_t *answer = await(card, ETHERTYPE_IPV4, false, size);
    if (!answer) {
        report(name, "sent, used %u, NO ANSWER", sent);
        return;
    }
    const uint8_t *icmp = answer + card->header + 34;
    report(name, "sent, used %u; answer used %u number %u checksum %s crc %08x", sent, card->last_length,
           take16(icmp + 6), checksum(icmp, 8u + payload) ? "BAD" : "good", crc32(icmp + 8, payload));
}

static void many(struct card *card) {
    begin(card, POLLING, WHOLE, SLOTS, SLOT_SIZE);
    unsigned answers = 0;
    card->sequence = 1000;
    for (unsigned index = 0; index < 48; index++)
        send_echo_request(card, (uint16_t)(index * 20), HEADER_APART);
    while (answers < 48 && await(card, ETHERTYPE_IPV4, false, SLOT_SIZE))
        answers++;
    report("many", "%u answers, the last is number %u", answers, card->sequence - 1000);
}

/* A frame that does not fit is dropped, and its buffer takes the next that does. */
static void small_buffers(struct card *card) {
    begin(card, POLLING, WHOLE, 4, card->header + 100);
    arp(card, "small.arp", HEADER_APART, card->header + 100);
    send_echo_request(card, 1000, HEADER_APART);
    ping(card, "small.ping", 20, HEADER_APART, card->header + 100);
}

static void odd_frames(struct card *card) {
    begin(card, POLLING, WHOLE, 16, SLOT_SIZE);
    arp(card, "odd.arp", HEADER_APART, SLOT_SIZE);
    report("odd.header.only", "used %u", send(card, 0, WHOLE));
    outgoing_frame(card, ETHERTYPE_IPV4);
    report("odd.runt", "used %u", send(card, 5, HEADER_APART));
    report("odd.ethernet.only", "used %u", send(card, ETHERNET, HEADER_APART));
    ping(card, "odd.then.ping", 64, HEADER_APART, SLOT_SIZE);
}

static void by_interrupt(struct card *card, enum signal signal) {
    volatile uint32_t *count = &interrupts[signal == INTX ? INTX_VECTOR : MSIX_VECTOR + 1 + RECEIVE];
    volatile uint32_t *sent = &interrupts[signal == INTX ? INTX_VECTOR : MSIX_VECTOR + 1 + TRANSMIT];
    begin(card, signal, WHOLE, 16, SLOT_SIZE);
    uint32_t before = *count, sent_before = *sent;
    arp(card, signal == INTX ? "intx.arp" : "msix.arp", HEADER_APART, SLOT_SIZE);
    bool received = WHILE(*count == before), told = WHILE(*sent == sent_before);
    report(signal == INTX ? "intx" : "msix", "%s, %s",
           received ? "receive interrupted" : "NO RECEIVE INTERRUPT",
           told ? "transmit interrupted" : "NO TRANSMIT INTERRUPT");
    if (signal == MSIX)
        report("msix.mac", "%02x:%02x", virtio_config(&card->device, 0, 1),
               virtio_config(&card->device, 5, 1));
    virtio_end(&card->device);
}

static struct card card;

static void by_transport(const struct pci_function *pci, enum transport transport) {
    memset(&card, 0, sizeof card);
    scope("%s.%s", pci->name, transport_name(transport));
    if (!virtio_open(&card.device, pci, transport)) {
        report("layout", "none");
        return;
    }
    virtio_report_registers(&card.device);
    for (unsigned index = 0; index < 6; index++)
        our_mac[index] = (uint8_t)virtio_config(&card.device, index, 1);
    report("config.mac", "%02x:%02x:%02x:%02x:%02x:%02x", our_mac[0], our_mac[1], our_mac[2], our_mac[3],
           our_mac[4], our_mac[5]);
    report("config.status", "%04x", virtio_config(&card.device, 6, 2));
    card.slots = dma(SLOTS * SLOT_SIZE, 4096);
    card.outgoing = dma(4096, 4096);
    begin(&card, POLLING, WHOLE, 16, SLOT_SIZE);
    arp(&card, "arp", HEADER_APART, SLOT_SIZE);
    ping(&card, "ping.empty", 0, HEADER_APART, SLOT_SIZE);
    ping(&card, "ping", 56, HEADER_APART, SLOT_SIZE);
    ping(&card, "ping.full", 1472, HEADER_APART, SLOT_SIZE);
    if (transport == MODERN)
        ping(&card, "ping.whole", 56, WHOLE, SLOT_SIZE);
    ping(&card, "ping.pieces", 300, PIECES, SLOT_SIZE);
    begin(&card, POLLING, PIECES, 16, SLOT_SIZE);
    ping(&card, "pieces.ping", 1000, PIECES, SLOT_SIZE);
    small_buffers(&card);
    odd_frames(&card);
    many(&card);
    by_interrupt(&card, INTX);
    by_interrupt(&card, MSIX);
}

void net_section(void) {
    for (unsigned index = 0; index < pci_function_count; index++)
        if (starts_with(pci_functions[index].name, "net"))
            for (enum transport transport = MODERN; transport <= LEGACY; transport++) {
                size_t mark = dma_mark();
                by_transport(&pci_functions[index], transport);
                dma_release(mark);
            }
}

/* Frames of every size, buffers of hardly any, and buffers the wrong way round; each comes back exactly once.
 */
void net_storm(void) {
    static const uint32_t large[] = {1601, 4096, 9014, 65535, 65536 + 18, 70000, 200000};
    static const uint32_t small[] = {1, 9, 11, 12, 13, 25};
    const struct pci_function *pci = pci_find("net0");
    uint32_t head, length;
    if (!pci)
        return;
    size_t mark = dma_mark();
    memset(&card, 0, sizeof card);
    scope("hostile.net0");
    virtio_open(&card.device, pci, MODERN);
    for (unsigned index = 0; index < 6; index++)
        our_mac[index] = (uint8_t)virtio_config(&card.device, index, 1);
    card.slots = dma(SLOTS * SLOT_SIZE, 4096);
    card.outgoing = dma(200012, 4096);
    begin(&card, POLLING, WHOLE, 16, SLOT_SIZE);
    unsigned back = 0;
    for (uint32_t size = 0; size <= 1600; size++) {
        outgoing_frame(&card, 0x88B5); /* local experimental: nobody answers */
        back += send(&card, size, (enum cut)(size % 3)) == 0;
    }
    report("frames.every.size", "%u of 1601 used, %s", back,
           neighbour_is_well() ? "neighbour well" : "NEIGHBOUR ILL");
    back = 0;
    for (unsigned index = 0; index < sizeof large / sizeof *large; index++)
        back += send(&card, large[index], WHOLE) == 0;
    report("frames.large", "%u of %u used", back, (unsigned)(sizeof large / sizeof *large));
    report("frame.shorter.than.header", "used %u",
           queue_request(card.transmit, &(struct buffer){card.outgoing, 5}, 1, 0));
    report("frame.writable", "used %u",
           queue_request(card.transmit, &(struct buffer){card.outgoing, 100}, 0, 1));
    arp(&card, "arp", HEADER_APART, SLOT_SIZE);
    begin(&card, POLLING, WHOLE, 0, 0);
    back = 0;
    for (unsigned index = 0; index < sizeof small / sizeof *small; index++) {
        queue_add(card.receive, &(struct buffer){card.slots, small[index]}, 0, 1);
        queue_kick(card.receive);
        back += queue_wait(card.receive, &head, &length) && length == 0;
    }
    report("receive.no.room", "%u of %u back unused", back, (unsigned)(sizeof small / sizeof *small));
    queue_add(card.receive, &(struct buffer){card.slots, 2048}, 1, 0);
    queue_kick(card.receive);
    report("receive.readable", "%s",
           queue_wait(card.receive, &head, &length) && length == 0 ? "back unused" : "NOT BACK");
    queue_add(card.receive, &(struct buffer){(void *)0xA0000000ul, 2048}, 0, 1);
    queue_kick(card.receive);
    report("receive.nowhere", "%s",
           WHILE(!(virtio_status(&card.device) & NEEDS_RESET)) ? "needs reset" : "SILENCE");
    begin(&card, POLLING, WHOLE, 16, SLOT_SIZE);
    arp(&card, "recovered.arp", HEADER_APART, SLOT_SIZE);
    ping(&card, "recovered.ping", 64, HEADER_APART, SLOT_SIZE);
    report("neighbour", "%s", neighbour_is_well() ? "well" : "ILL");
    virtio_end(&card.device);
    dma_release(mark);
}
