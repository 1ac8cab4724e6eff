/* The driver's side of virtio over PCI, in both register layouts; see virtio.c. */
#pragma once
#include "guest.h"

enum transport { MODERN, LEGACY };
enum signal { POLLING, INTX, MSIX };

#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8
#define NEEDS_RESET 64
#define FAILED 128

#define F_ANY_LAYOUT (1ul << 27)
#define F_INDIRECT (1ul << 28)
#define F_VERSION_1 (1ul << 32)

#define NEXT 1
#define WRITE 2
#define INDIRECT 4
#define NO_INTERRUPT 1
#define NO_VECTOR 0xFFFF

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct available_ring {
    uint16_t flags, index, heads[];
};

struct used_ring {
    uint16_t flags, index;
    struct {
        uint32_t head, length;
    } elements[];
};

struct buffer {
    void *at;
    uint32_t size;
};

struct virtio;

struct queue {
    struct virtio *device;
    uint16_t index, size;
    uint16_t next, seen; /* the next free descriptor, going round; used elements taken so far */
    volatile struct descriptor *descriptors;
    volatile struct available_ring *available;
    volatile struct used_ring *used;
    volatile uint16_t *notify;
};

struct virtio {
    const struct pci_function *pci;
    enum transport transport;
    enum signal signal;
    volatile uint8_t *common, *isr, *config;
    volatile uint8_t *notify;
    uint32_t notify_multiplier;
    uint16_t io;
    uint8_t bar;  /* that the registers are in */
    uint8_t msix; /* offset of the MSI-X capability */
    volatile uint32_t *msix_table, *msix_pending;
    uint64_t features; /* agreed on */
    struct queue queues[4];
};

/* struct virtio_pci_common_cfg, virtio 1.2 section 4.1.4.3, and the legacy registers, 4.1.4.8. */
enum {
    DEVICE_FEATURE_SELECT = 0,
    DEVICE_FEATURE = 4,
    DRIVER_FEATURE_SELECT = 8,
    DRIVER_FEATURE = 12,
    CONFIG_MSIX_VECTOR = 16,
    NUM_QUEUES = 18,
    DEVICE_STATUS = 20,
    CONFIG_GENERATION = 21,
    QUEUE_SELECT = 22,
    QUEUE_SIZE = 24,
    QUEUE_MSIX_VECTOR = 26,
    QUEUE_ENABLE = 28,
    QUEUE_NOTIFY_OFF = 30,
    QUEUE_DESC = 32,
    QUEUE_DRIVER = 40,
    QUEUE_DEVICE = 48
};
enum {
    LEGACY_DEVICE_FEATURES = 0,
    LEGACY_DRIVER_FEATURES = 4,
    LEGACY_QUEUE_ADDRESS = 8,
    LEGACY_QUEUE_SIZE = 12,
    LEGACY_QUEUE_SELECT = 14,
    LEGACY_QUEUE_NOTIFY = 16,
    LEGACY_STATUS = 18,
    LEGACY_ISR = 19,
    LEGACY_CONFIG_VECTOR = 20,
    LEGACY_QUEUE_VECTOR = 22
};

static inline uint8_t get8(volatile uint8_t *base, unsigned offset) {
    return base[offset];
}
static inline uint16_t get16(volatile uint8_t *base, unsigned offset) {
    return *(volatile uint16_t *)(base + offset);
}
static inline uint32_t get32(volatile uint8_t *base, unsigned offset) {
    return *(volatile uint32_t *)(base + offset);
}
static inline void set8(volatile uint8_t *base, unsigned offset, uint8_t value) {
    base[offset] = value;
}
static inline void set16(volatile uint8_t *base, unsigned offset, uint16_t value) {
    *(volatile uint16_t *)(base + offset) = value;
}
static inline void set32(volatile uint8_t *base, unsigned offset, uint32_t value) {
    *(volatile uint32_t *)(base + offset) = value;
}

bool virtio_open(struct virtio *device, const struct pci_function *pci, enum transport transport);
uint8_t virtio_status(struct virtio *device);
void virtio_set_status(struct virtio *device, uint8_t status);
uint8_t virtio_isr(struct virtio *device); /* read it, which clears it */
uint64_t virtio_offered(struct virtio *device);
uint32_t virtio_config(struct virtio *device, unsigned offset, unsigned size);
uint16_t virtio_queue_limit(struct virtio *device,
                            uint16_t queue); /* the size that the device offers, 0: none */
bool virtio_reset(struct virtio *device);
/* Reset, then agree on what of `wanted` is offered; interrupts as `signal` says. Then a virtio_queue for
   each, then virtio_ready. */
bool virtio_begin(struct virtio *device, uint64_t wanted, enum signal signal);
struct queue *virtio_queue(struct virtio *device, uint16_t index, uint16_t size); /* size 0: as offered */
void virtio_ready(struct virtio *device);
void virtio_end(struct virtio *device); /* reset, interrupts off */
void msix_entry(struct virtio *device, unsigned entry, bool masked);
void msix_control(struct virtio *device, uint16_t bits);

uint16_t queue_add(struct queue *queue, const struct buffer *buffers, unsigned readable, unsigned writable);
uint16_t queue_add_indirect(struct queue *queue, const struct buffer *buffers, unsigned readable,
                            unsigned writable);
void queue_publish(struct queue *queue, uint16_t head);
void queue_kick(struct queue *queue);
bool queue_take(struct queue *queue, uint32_t *head, uint32_t *length); /* without waiting */
bool queue_wait(struct queue *queue, uint32_t *head, uint32_t *length);
/* One request from beginning to end; the used length, or ~0u when none came. */
uint32_t queue_request(struct queue *queue, const struct buffer *buffers, unsigned readable,
                       unsigned writable);

void virtio_report_registers(struct virtio *device); /* what every device has in this layout, after a reset */
const char *transport_name(enum transport transport);
