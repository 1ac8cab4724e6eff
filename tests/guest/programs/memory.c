/* Mappings: copies on write, rights, sharing, growth. */
#include "checks.h"
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 64 };

static uint8_t *anonymous(int flags) {
    uint8_t *pages = mmap(NULL, PAGE * PAGES, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
    REQUIRE(pages != MAP_FAILED);
    for (int index = 0; index < PAGE * PAGES; index += 512)
        REQUIRE(pages[index] == 0);
    return pages;
}

static void copy_on_write(void) {
    uint8_t *pages = anonymous(MAP_PRIVATE);
    int status;
    for (int index = 0; index < PAGES; index++)
        pages[index * PAGE] = index;
    pid_t child = fork();
    if (child == 0) {
        for (int index = 0; index < PAGES; index += 2)
            pages[index * PAGE] = 200;
        for (int index = 0; index < PAGES; index++)
            REQUIRE(pages[index * PAGE] == (index % 2 ? index : 200));
        _exit(0);
    }
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
    for (int index = 0; index < PAGES; index++)
        REQUIRE(pages[index * PAGE] == index);
}

static void shared_between_processes(void) {
    uint8_t *pages = anonymous(MAP_SHARED);
    int status;
    pid_t child = fork();
    if (child == 0) {
        for (int index = 0; index < PAGES; index++)
            pages[index * PAGE + 5] = index + 1;
        _exit(0);
    }
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
    for (int index = 0; index < PAGES; index++)
        REQUIRE(pages[index * PAGE + 5] == index + 1);
}

/* The kernel itself runs into a copy-on-write page and into a page without rights. */
static void kernel_writes_to_user_pages(void) {
    uint8_t *pages = anonymous(MAP_PRIVATE);
    int ends[2], status;
    memset(pages, 1, PAGE);
    REQUIRE(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        REQUIRE(write(ends[1], "abc", 3) == 3 && read(ends[0], pages, 3) == 3);
        REQUIRE(memcmp(pages, "abc\1", 4) == 0);
        _exit(0);
    }
    REQUIRE(waitpid(child, &status, 0) == child && status == 0 && pages[0] == 1);
    REQUIRE(write(ends[1], "abc", 3) == 3);
    mprotect(pages, PAGE, PROT_READ);
    REQUIRE(read(ends[0], pages, 3) == -1);
    void *volatile nowhere = (void *)8;
    REQUIRE(read(ends[0], nowhere, 3) == -1);
    REQUIRE(pages[0] == 1);
}

static void rights_and_holes(void) {
    uint8_t *pages = anonymous(MAP_PRIVATE);
    pages[0] = 9;
    REQUIRE(mprotect(pages, PAGE, PROT_NONE) == 0 && mprotect(pages, PAGE, PROT_READ) == 0 && pages[0] == 9);
    REQUIRE(madvise(pages, PAGE, MADV_DONTNEED) == 0 && pages[0] == 0);
    pages[PAGE] = 7;
    uint8_t *moved = mremap(pages + PAGE, PAGE, 8 * PAGE, MREMAP_MAYMOVE);
    REQUIRE(moved != MAP_FAILED && moved[0] == 7 && moved[8 * PAGE - 1] == 0);
    REQUIRE(munmap(moved, 8 * PAGE) == 0);
}

static void mapped_file(void) {
    int fd = open("/init", O_RDONLY);
    uint8_t head[64];
    REQUIRE(fd >= 0 && pread(fd, head, sizeof head, 0) == sizeof head);
    uint8_t *mapped = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    REQUIRE(mapped != MAP_FAILED && memcmp(mapped, head, sizeof head) == 0);
    mapped[0] = 0;
    uint8_t again;
    REQUIRE(pread(fd, &again, 1, 0) == 1 && again == 0x7F);
    fd = memfd_create("check", 0);
    REQUIRE(fd >= 0 && ftruncate(fd, 2 * PAGE) == 0);
    mapped = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    mapped[PAGE + 1] = 0x5A;
    REQUIRE(pread(fd, &again, 1, PAGE + 1) == 1 && again == 0x5A);
}

static long deep(int depth) {
    volatile char space[PAGE];
    space[PAGE - 1] = depth;
    return depth ? deep(depth - 1) + space[PAGE - 1] : 0;
}

static void growth(void) {
    REQUIRE(deep(100) == 5050);
    uint8_t *block = malloc(3 << 20);
    memset(block, 3, 3 << 20);
    block = realloc(block, 4 << 20);
    REQUIRE(block[(3 << 20) - 1] == 3);
    free(block);
    uint8_t *before = sbrk(100 * PAGE);
    before[99 * PAGE] = 1;
    REQUIRE(sbrk(-100 * PAGE) == before + 100 * PAGE);
}

static void random_bytes(void) {
    uint8_t first[32], second[32];
    REQUIRE(getrandom(first, sizeof first, 0) == sizeof first);
    REQUIRE(getrandom(second, sizeof second, 0) == sizeof second);
    REQUIRE(memcmp(first, second, sizeof first) != 0);
}

const struct check memory_checks[] = {
    {"copy_on_write", copy_on_write},
    {"shared_between_processes", shared_between_processes},
    {"kernel_writes_to_user_pages", kernel_writes_to_user_pages},
    {"rights_and_holes", rights_and_holes},
    {"mapped_file", mapped_file},
    {"growth", growth},
    {"random_bytes", random_bytes},
    {NULL, NULL},
};
