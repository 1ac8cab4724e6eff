/* The little that gcc expects of a C library, checksums and patterns, and a bump allocator for DMA memory. */
#include "guest.h"

#define DMA_SIZE (4u << 20)

static uint8_t dma_memory[DMA_SIZE] __attribute__((aligned(4096)));
static size_t dma_used;

void *memset(void *to, int byte, size_t count) {
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(byte) : "memory");
    return result;
}

void *memcpy(void *to, const void *from, size_t count) {
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return result;
}

int memcmp(const void *one, const void *other, size_t count) {
    const uint8_t *a = one, *b = other;
    for (; count; count--, a++, b++)
        if (*a != *b)
            return *a - *b;
    return 0;
}

size_t strlen(const char *text) {
    size_t size = 0;
    while (text[size])
        size++;
    return size;
}

bool starts_with(const char *text, const char *start) {
    while (*start)
        if (*text++ != *start++)
            return false;
    return true;
}

uint32_t crc32(const void *data, size_t size) {
    const uint8_t *at = data;
    uint32_t crc = ~0u;
    while (size--) {
        crc ^= *at++;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

void fill_pattern(void *data, size_t size, uint32_t seed) {
    uint8_t *at = data;
    for (; size; size--) {
        seed = seed * 1664525u + 1013904223u;
        *at++ = (uint8_t)(seed >> 24);
    }
}

void *dma(size_t size, size_t alignment) {
    size_t start = (dma_used + alignment - 1) & -alignment;
    if (start + size > DMA_SIZE) {
        note("out of DMA memory");
        guest_exit(98);
    }
    dma_used = start + size;
    return memset(dma_memory + start, 0, size);
}

size_t dma_mark(void) {
    return dma_used;
}

void dma_release(size_t mark) {
    dma_used = mark;
}
