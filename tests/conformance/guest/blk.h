/* Block requests, for blk.c and for hostile.c, which needs a healthy disk. */
#pragma once
#include "virtio.h"

#define BLK_IN 0
#define BLK_OUT 1
#define BLK_FLUSH 4
#define BLK_GET_ID 8
#define BLK_DISCARD 11
#define BLK_WRITE_ZEROES 13

struct blk_header {
    uint32_t type, reserved;
    uint64_t sector;
};

struct blk_answer {
    uint32_t used_length; /* ~0: the request never came back */
    uint8_t status;
};

/* FLUSH, DISCARD, WRITE_ZEROES and what the sizes need; no event index, no packed ring. */
#define BLK_WANTED                                                                                           \
    (F_VERSION_1 | F_INDIRECT | F_ANY_LAYOUT | 1ul << 1 | 1ul << 2 | 1ul << 5 | 1ul << 6 | 1ul << 9 |        \
     1ul << 10 | 1ul << 13 | 1ul << 14)

struct queue *blk_begin(struct virtio *device, enum signal signal, uint16_t size);
struct blk_answer blk_request(struct queue *queue, uint32_t type, uint64_t sector, void *data, uint32_t size);
