/*
 * A driver's side of virtio over PCI: modern (virtio 1.2, section 4.1.4) and legacy (4.1.4.8, 2.7.2)
 * registers, split rings (2.7), and interrupts by polling, by INTx or by MSI-X.
 *
 * A ring's descriptors are taken in order, going round, so requests may be many but must end in order of
 * need: the caller never has more descriptors out than the queue has.
 */
#include "virtio.h"

#define CAP_VENDOR 9
#define CAP_MSIX 0x11
#define COMMAND_ON 0x0007 /* I/O, memory, bus master; INTx not disabled */
#define PAGE 4096u

const char *transport_name(enum transport transport) {
    return transport == MODERN ? "modern" : "legacy";
}

bool virtio_open(struct virtio *device, const struct pci_function *pci, enum transport transport) {
    *device = (struct virtio){.pci = pci, .transport = transport};
    pci_write(pci, PCI_COMMAND, 2, COMMAND_ON);
    device->msix = pci_capability(pci, CAP_MSIX, 0);
    if (device->msix) {
        uint32_t table = pci_read(pci, device->msix + 4, 4), pending = pci_read(pci, device->msix + 8, 4);
        device->msix_table = (void *)(pci_bar(pci, table & 7) + (table & ~7u));
        device->msix_pending = (void *)(pci_bar(pci, pending & 7) + (pending & ~7u));
        pci_write(pci, device->msix + 2, 2, 0);
    }
    if (transport == LEGACY) {
        device->io = pci_bar_is_io(pci, 0) ? (uint16_t)pci_bar(pci, 0) : 0;
        return device->io;
    }
    for (uint8_t at = pci_capability(pci, CAP_VENDOR, 0); at; at = pci_capability(pci, CAP_VENDOR, at)) {
        uint8_t type = (uint8_t)pci_read(pci, at + 3, 1);
        volatile uint8_t *where =
            (void *)(pci_bar(pci, pci_read(pci, at + 4, 1) & 7) + pci_read(pci, at + 8, 4));
        if (type == 1) {
            device->common = where;
            device->bar = (uint8_t)pci_read(pci, at + 4, 1);
        } else if (type == 2) {
            device->notify = where;
            device->notify_multiplier = pci_read(pci, at + 16, 4);
        } else if (type == 3)
            device->isr = where;
        else if (type == 4)
            device->config = where;
    }
    return device->common && device->notify && device->isr;
}

uint8_t virtio_status(struct virtio *device) {
    return device->io ? in8(device->io + LEGACY_STATUS) : get8(device->common, DEVICE_STATUS);
}

void virtio_set_status(struct virtio *device, uint8_t status) {
    if (device->io)
        out8(device->io + LEGACY_STATUS, status);
    else
        set8(device->common, DEVICE_STATUS, status);
}

uint8_t virtio_isr(struct virtio *device) {
    return device->io ? in8(device->io + LEGACY_ISR) : *device->isr;
}

uint64_t virtio_offered(struct virtio *device) {
    if (device->io)
        return in32(device->io + LEGACY_DEVICE_FEATURES);
    set32(device->common, DEVICE_FEATURE_SELECT, 0);
    uint64_t low = get32(device->common, DEVICE_FEATURE);
    set32(device->common, DEVICE_FEATURE_SELECT, 1);
    return low | (uint64_t)get32(device->common, DEVICE_FEATURE) << 32;
}

uint32_t virtio_config(struct virtio *device, unsigned offset, unsigned size) {
    if (device->io) {
        uint16_t port = (uint16_t)(device->io + (device->signal == MSIX ? 24 : 20) + offset);
        return size == 1 ? in8(port) : size == 2 ? in16(port) : in32(port);
    }
    return size == 1   ? get8(device->config, offset)
           : size == 2 ? get16(device->config, offset)
                       : get32(device->config, offset);
}

static void select_queue(struct virtio *device, uint16_t queue) {
    if (device->io)
        out16(device->io + LEGACY_QUEUE_SELECT, queue);
    else
        set16(device->common, QUEUE_SELECT, queue);
}

uint16_t virtio_queue_limit(struct virtio *device, uint16_t queue) {
    select_queue(device, queue);
    return device->io ? in16(device->io + LEGACY_QUEUE_SIZE) : get16(device->common, QUEUE_SIZE);
}

bool virtio_reset(struct virtio *device) {
    virtio_set_status(device, 0);
    return WHILE(virtio_status(device) != 0);
}

void msix_entry(struct virtio *device, unsigned entry, bool masked) {
    volatile uint32_t *at = device->msix_table + 4 * entry;
    at[3] = 1;
    at[0] = MSI_ADDRESS;
    at[1] = 0;
    at[2] = MSIX_VECTOR + entry;
    at[3] = masked;
}

void msix_control(struct virtio *device, uint16_t bits) {
    pci_write(device->pci, device->msix + 2, 2, bits);
}

static void set_up_interrupts(struct virtio *device, enum signal signal) {
    uint8_t line = (uint8_t)pci_read(device->pci, PCI_INTERRUPT_LINE, 1);
    device->signal = signal;
    if (device->msix)
        msix_control(device, signal == MSIX ? 0x8000 : 0);
    if (signal == MSIX) {
        for (unsigned entry = 0; entry <= (pci_read(device->pci, device->msix + 2, 2) & 0x7FF) && entry < 4;
             entry++)
            msix_entry(device, entry, false);
        if (device->io)
            out16(device->io + LEGACY_CONFIG_VECTOR, 0);
        else
            set16(device->common, CONFIG_MSIX_VECTOR, 0);
    }
    if (signal == INTX)
        intx_listen(device->io ? device->io + LEGACY_ISR : 0, device->isr);
    route_line(line, signal == INTX);
}

bool virtio_begin(struct virtio *device, uint64_t wanted, enum signal signal) {
    if (!virtio_reset(device))
        return false;
    set_up_interrupts(device, signal);
    virtio_set_status(device, ACKNOWLEDGE);
    virtio_set_status(device, ACKNOWLEDGE | DRIVER);
    device->features = virtio_offered(device) & wanted;
    if (device->io) {
        out32(device->io + LEGACY_DRIVER_FEATURES, (uint32_t)device->features);
        return true;
    }
    for (unsigned word = 0; word < 2; word++) {
        set32(device->common, DRIVER_FEATURE_SELECT, word);
        set32(device->common, DRIVER_FEATURE, (uint32_t)(device->features >> 32 * word));
    }
    virtio_set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    return virtio_status(device) & FEATURES_OK;
}

struct queue *virtio_queue(struct virtio *device, uint16_t index, uint16_t size) {
    struct queue *queue = &device->queues[index];
    uint16_t limit = virtio_queue_limit(device, index);
    if (!size || device->io)
        size = limit; /* a legacy driver takes the size that there is */
    *queue = (struct queue){.device = device, .index = index, .size = size};
    uint8_t *descriptors = dma(3 * PAGE + size * 26u, PAGE);
    uint8_t *available = descriptors + 16u * size;
    uint8_t *used = (uint8_t *)(((uint64_t)available + 6 + 2u * size + PAGE - 1) & -(uint64_t)PAGE);
    queue->descriptors = (void *)descriptors;
    queue->available = (void *)available;
    queue->used = (void *)used;
    queue->available->flags = device->signal == POLLING ? NO_INTERRUPT : 0;
    if (device->io) {
        if (device->signal == MSIX)
            out16(device->io + LEGACY_QUEUE_VECTOR, index + 1);
        out32(device->io + LEGACY_QUEUE_ADDRESS, (uint32_t)((uint64_t)descriptors / PAGE));
        return queue;
    }
    uint16_t notify = get16(device->common, QUEUE_NOTIFY_OFF);
    queue->notify = (void *)(device->notify + notify * device->notify_multiplier);
    set16(device->common, QUEUE_SIZE, size);
    if (device->signal == MSIX)
        set16(device->common, QUEUE_MSIX_VECTOR, index + 1);
    volatile uint8_t *const parts[] = {descriptors, available, used};
    for (unsigned part = 0; part < 3; part++) {
        set32(device->common, QUEUE_DESC + 8 * part, (uint32_t)(uint64_t)parts[part]);
        set32(device->common, QUEUE_DESC + 8 * part + 4, (uint32_t)((uint64_t)parts[part] >> 32));
    }
    set16(device->common, QUEUE_ENABLE, 1);
    return queue;
}

void virtio_ready(struct virtio *device) {
    virtio_set_status(device, virtio_status(device) | DRIVER_OK);
}

void virtio_end(struct virtio *device) {
    virtio_reset(device);
    route_line((uint8_t)pci_read(device->pci, PCI_INTERRUPT_LINE, 1), false);
    if (device->msix)
        msix_control(device, 0);
    device->signal = POLLING;
}

void queue_publish(struct queue *queue, uint16_t head) {
    uint16_t index = queue->available->index;
    queue->available->heads[index % queue->size] = head;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    queue->available->index = index + 1;
}

uint16_t queue_add(struct queue *queue, const struct buffer *buffers, unsigned readable, unsigned writable) {
    uint16_t head = queue->next;
    for (unsigned index = 0; index < readable + writable; index++) {
        volatile struct descriptor *descriptor = &queue->descriptors[queue->next];
        queue->next = (queue->next + 1) % queue->size;
        descriptor->address = (uint64_t)buffers[index].at;
        descriptor->length = buffers[index].size;
        descriptor->flags = (index >= readable ? WRITE : 0) | (index + 1 < readable + writable ? NEXT : 0);
        descriptor->next = queue->next;
    }
    queue_publish(queue, head);
    return head;
}

uint16_t queue_add_indirect(struct queue *queue, const struct buffer *buffers, unsigned readable,
                            unsigned writable) {
    unsigned count = readable + writable;
    struct descriptor *table = dma(count * sizeof *table, 16);
    for (unsigned index = 0; index < count; index++)
        table[index] = (struct descriptor){(uint64_t)buffers[index].at, buffers[index].size,
                                           (index >= readable ? WRITE : 0) | (index + 1 < count ? NEXT : 0),
                                           (uint16_t)(index + 1)};
    uint16_t head = queue->next;
    queue->next = (queue->next + 1) % queue->size;
    queue->descriptors[head].address = (uint64_t)table;
    queue->descriptors[head].length = count * sizeof *table;
    queue->descriptors[head].flags = INDIRECT;
    queue_publish(queue, head);
    return head;
}

void queue_kick(struct queue *queue) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (queue->device->io)
        out16(queue->device->io + LEGACY_QUEUE_NOTIFY, queue->index);
    else
        *queue->notify = queue->index;
}

bool queue_take(struct queue *queue, uint32_t *head, uint32_t *length) {
    if (queue->used->index == queue->seen)
        return false;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    *head = queue->used->elements[queue->seen % queue->size].head;
    *length = queue->used->elements[queue->seen % queue->size].length;
    queue->seen++;
    return true;
}

bool queue_wait(struct queue *queue, uint32_t *head, uint32_t *length) {
    return WHILE(queue->used->index == queue->seen) && queue_take(queue, head, length);
}

uint32_t queue_request(struct queue *queue, const struct buffer *buffers, unsigned readable,
                       unsigned writable) {
    uint32_t head, length;
    uint16_t mine = queue_add(queue, buffers, readable, writable);
    queue_kick(queue);
    if (!queue_wait(queue, &head, &length))
        return ~0u;
    if (head != mine)
        note("used element for %u, not %u", head, mine);
    return head == mine ? length : ~0u;
}

static void report_features(struct virtio *device) {
    uint64_t features = virtio_offered(device);
    char name[16];
    for (unsigned bit = 0; bit < 64; bit++)
        if (features >> bit & 1) {
            format_into(name, sizeof name, "feature.%u", bit);
            report(name, "offered");
        }
}

static void report_legacy_registers(struct virtio *device) {
    report("isr", "%02x", virtio_isr(device));
    report("queue0.address", "%08x", (select_queue(device, 0), in32(device->io + LEGACY_QUEUE_ADDRESS)));
    out32(device->io + LEGACY_QUEUE_ADDRESS, 0x345);
    report("queue0.address.readback", "%08x", in32(device->io + LEGACY_QUEUE_ADDRESS));
    virtio_reset(device);
    report("queue0.address.after.reset", "%08x",
           (select_queue(device, 0), in32(device->io + LEGACY_QUEUE_ADDRESS)));
    msix_control(device, 0x8000);
    report("config.vector", "%04x", in16(device->io + LEGACY_CONFIG_VECTOR));
    report("queue0.vector", "%04x", in16(device->io + LEGACY_QUEUE_VECTOR));
    out16(device->io + LEGACY_QUEUE_VECTOR, 1);
    report("queue0.vector.valid", "%04x", in16(device->io + LEGACY_QUEUE_VECTOR));
    out16(device->io + LEGACY_QUEUE_VECTOR, 200);
    report("queue0.vector.invalid", "%04x", in16(device->io + LEGACY_QUEUE_VECTOR));
    msix_control(device, 0);
    report("features.by.bytes", "%s",
           in8(device->io + 1) == (virtio_offered(device) >> 8 & 0xFF) ? "agree" : "DISAGREE");
}

static void report_modern_registers(struct virtio *device) {
    volatile uint8_t *common = device->common;
    report("isr", "%02x", virtio_isr(device));
    report("queues", "%u", get16(common, NUM_QUEUES));
    report("config.vector", "%04x", get16(common, CONFIG_MSIX_VECTOR));
    set16(common, CONFIG_MSIX_VECTOR, 0);
    report("config.vector.valid", "%04x", get16(common, CONFIG_MSIX_VECTOR));
    set16(common, CONFIG_MSIX_VECTOR, 200);
    report("config.vector.invalid", "%04x", get16(common, CONFIG_MSIX_VECTOR));
    select_queue(device, 0);
    report("queue0.vector", "%04x", get16(common, QUEUE_MSIX_VECTOR));
    report("queue0.enable", "%u", get16(common, QUEUE_ENABLE));
    set32(common, QUEUE_DESC, 0x89ABC000);
    set32(common, QUEUE_DESC + 4, 0x1);
    report("queue0.descriptors", "%x%08x", get32(common, QUEUE_DESC + 4), get32(common, QUEUE_DESC));
    set16(common, QUEUE_SIZE, 16);
    report("queue0.size.set", "%u", get16(common, QUEUE_SIZE));
    select_queue(device, 99);
    report("queue99.enable", "%u", get16(common, QUEUE_ENABLE));
    set32(common, DEVICE_FEATURE_SELECT, 2);
    report("feature.word2", "%08x", get32(common, DEVICE_FEATURE));
    set32(common, DRIVER_FEATURE_SELECT, 1);
    set32(common, DRIVER_FEATURE, 1);
    report("driver.feature", "%08x", get32(common, DRIVER_FEATURE));
    virtio_reset(device);
    select_queue(device, 0);
    report("reset.queue0.size", "%u", get16(common, QUEUE_SIZE));
    report("reset.queue0.descriptors", "%08x", get32(common, QUEUE_DESC));
    report("reset.config.vector", "%04x", get16(common, CONFIG_MSIX_VECTOR));
    set32(common, DRIVER_FEATURE_SELECT, 1);
    report("reset.driver.feature", "%08x", get32(common, DRIVER_FEATURE));
    uint8_t generation = get8(common, CONFIG_GENERATION);
    report("generation", "%s", generation == get8(common, CONFIG_GENERATION) ? "stands" : "CHANGES");

    virtio_set_status(device, ACKNOWLEDGE | DRIVER);
    set32(common, DRIVER_FEATURE_SELECT, 0);
    set32(common, DRIVER_FEATURE, 0);
    set32(common, DRIVER_FEATURE_SELECT, 1);
    set32(common, DRIVER_FEATURE, 0);
    virtio_set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    report("features.without.version1", "status %02x", virtio_status(device));
    virtio_reset(device);
    virtio_set_status(device, ACKNOWLEDGE | DRIVER);
    set32(common, DRIVER_FEATURE_SELECT, 1);
    set32(common, DRIVER_FEATURE, 0x80000001);
    virtio_set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    report("features.not.offered", "status %02x", virtio_status(device));
    virtio_reset(device);
}

/* The offset of the vendor capability of this type, or 0. */
static uint8_t vendor_capability(const struct pci_function *pci, uint8_t type) {
    uint8_t at = pci_capability(pci, CAP_VENDOR, 0);
    while (at && pci_read(pci, at + 3, 1) != type)
        at = pci_capability(pci, CAP_VENDOR, at);
    return at;
}

/* The window onto the BARs in configuration space (4.1.4.9): the status register, there and back. */
static void report_window(struct virtio *device) {
    const struct pci_function *pci = device->pci;
    uint8_t common = vendor_capability(pci, 1), window = vendor_capability(pci, 5);
    if (!common || !window) {
        report("window", "none");
        return;
    }
    uint32_t offset = pci_read(pci, common + 8, 4);
    pci_write(pci, window + 4, 1, pci_read(pci, common + 4, 1));
    pci_write(pci, window + 8, 4, offset + DEVICE_STATUS);
    pci_write(pci, window + 12, 4, 1);
    pci_write(pci, window + 16, 1, ACKNOWLEDGE);
    report("window", "write arrived as %02x, read gives %02x", virtio_status(device),
           pci_read(pci, window + 16, 1));
    pci_write(pci, window + 8, 4, offset + NUM_QUEUES);
    pci_write(pci, window + 12, 4, 2);
    report("window.queues", "%u", pci_read(pci, window + 16, 2));
    pci_write(pci, window + 4, 1, 0);
    pci_write(pci, window + 8, 4, 0);
    pci_write(pci, window + 12, 4, 0);
    virtio_reset(device);
}

void virtio_report_registers(struct virtio *device) {
    report("reset", "%s", virtio_reset(device) ? "done" : "HANGS");
    virtio_set_status(device, ACKNOWLEDGE);
    report("status.acknowledge", "%02x", virtio_status(device));
    virtio_set_status(device, ACKNOWLEDGE | DRIVER);
    report("status.driver", "%02x", virtio_status(device));
    virtio_reset(device);
    report_features(device);
    for (uint16_t queue = 0; queue < 4; queue++) {
        char name[16];
        format_into(name, sizeof name, "queue%u.size", queue);
        report(name, "%u", virtio_queue_limit(device, queue));
    }
    if (device->io)
        report_legacy_registers(device);
    else {
        report_modern_registers(device);
        report_window(device);
    }
}
