/* The transcript on the first serial port, and the way out: both are the same in QEMU and in vmrun. */
#include "guest.h"
#include <stdarg.h>

#define SERIAL 0x3F8
#define LINE_STATUS (SERIAL + 5)
#define TRANSMITTER_EMPTY 0x20
#define FIFO 16
#define DEBUG_EXIT 0x501

struct sink {
    char *at, *end;
};

static void put(struct sink *sink, char c) {
    if (sink->at < sink->end)
        *sink->at++ = c;
}

static void put_number(struct sink *sink, uint64_t value, unsigned base, unsigned width, char fill) {
    char digits[20];
    unsigned count = 0;
    do
        digits[count++] = "0123456789abcdef"[value % base];
    while (value /= base);
    while (width-- > count)
        put(sink, fill);
    while (count)
        put(sink, digits[--count]);
}

static void vformat(struct sink *sink, const char *format, va_list arguments) {
    for (; *format; format++) {
        if (*format != '%') {
            put(sink, *format);
            continue;
        }
        char fill = *++format == '0' ? '0' : ' ';
        unsigned width = 0;
        while (*format >= '0' && *format <= '9')
            width = 10 * width + (unsigned)(*format++ - '0');
        bool is_long = *format == 'l';
        format += is_long;
        if (*format == 's') {
            for (const char *text = va_arg(arguments, const char *); *text; text++)
                put(sink, *text);
        } else if (*format == 'u' || *format == 'x') {
            uint64_t value = is_long ? va_arg(arguments, uint64_t) : va_arg(arguments, uint32_t);
            put_number(sink, value, *format == 'u' ? 10 : 16, width, fill);
        } else {
            put(sink, *format);
        }
    }
}

static void transmit(const char *text, size_t size) {
    while (size) {
        size_t piece = size < FIFO ? size : FIFO;
        while (!(in8(LINE_STATUS) & TRANSMITTER_EMPTY))
            __builtin_ia32_pause();
        size -= piece;
        /* A string instruction is one exit for the whole FIFO. */
        __asm__ volatile("rep outsb" : "+S"(text), "+c"(piece) : "d"((uint16_t)SERIAL) : "memory");
    }
}

void format_into(char *to, size_t size, const char *format, ...) {
    struct sink sink = {to, to + size - 1};
    va_list arguments;
    va_start(arguments, format);
    vformat(&sink, format, arguments);
    va_end(arguments);
    *sink.at = 0;
}

void print(const char *format, ...) {
    char buffer[256];
    struct sink sink = {buffer, buffer + sizeof buffer};
    va_list arguments;
    va_start(arguments, format);
    vformat(&sink, format, arguments);
    va_end(arguments);
    transmit(buffer, (size_t)(sink.at - buffer));
}

static char prefix[64];

void scope(const char *format, ...) {
    struct sink sink = {prefix, prefix + sizeof prefix - 1};
    va_list arguments;
    va_start(arguments, format);
    vformat(&sink, format, arguments);
    va_end(arguments);
    *sink.at = 0;
}

static void print_line(const char *start, const char *name, const char *format, va_list arguments) {
    char buffer[256];
    struct sink sink = {buffer, buffer + sizeof buffer - 1};
    for (; *start; start++)
        put(&sink, *start);
    if (name) {
        put(&sink, '.');
        for (; *name; name++)
            put(&sink, *name);
        for (const char *sign = " = "; *sign; sign++)
            put(&sink, *sign);
    }
    vformat(&sink, format, arguments);
    *sink.at++ = '\n';
    transmit(buffer, (size_t)(sink.at - buffer));
}

void report(const char *name, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_line(prefix, name, format, arguments);
    va_end(arguments);
}

void note(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_line("# ", NULL, format, arguments);
    va_end(arguments);
}

void guest_exit(uint8_t code) {
    out8(DEBUG_EXIT, code);
    for (;;)
        __builtin_ia32_pause();
}
