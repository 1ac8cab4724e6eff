/*
 * The conformance guest: drives the devices it finds and prints what they did, for a test that compares the
 * transcripts of two machines. The command line says which sections run: pci blk net rng scsi hostile; with
 * `cpl0` all of it runs in kernel mode, with `ecam=HEX` configuration space is read there as well.
 *
 * By hand: vmrun boot --kernel guest.elf --append "pci blk" --disk x.raw, where conftest.py says how guest.elf
 * is built. The guest ends with exit code 0; 97 to 99 are its own failures (no PVH, no memory, an exception).
 */
#include "guest.h"

#define START_INFO_MAGIC 0x336EC578

struct hvm_start_info {
    uint32_t magic, version, flags, module_count;
    uint64_t modules, cmdline, rsdp;
};

extern uint32_t start_info_address;
void enter_user(void (*function)(void));
static const char *command_line = "";

/* The text behind the word that starts with `name`, or NULL. */
static const char *find_option(const char *name) {
    for (const char *at = command_line; *at;) {
        if (starts_with(at, name))
            return at + strlen(name);
        while (*at && *at != ' ')
            at++;
        while (*at == ' ')
            at++;
    }
    return NULL;
}

bool option(const char *name) {
    const char *end = find_option(name);
    return end && (!*end || *end == ' ');
}

static uint32_t hex_option(const char *name) {
    uint32_t value = 0;
    for (const char *at = find_option(name); at && *at && *at != ' '; at++)
        value = value << 4 | (uint32_t)(*at <= '9' ? *at - '0' : (*at | 0x20) - 'a' + 10);
    return value;
}

static void sections(void) {
    uint16_t code;
    __asm__("mov %%cs, %0" : "=r"(code));
    note("transcript at CPL %u: %s", code & 3, command_line);
    ecam_base = hex_option("ecam=");
    pci_scan();
    if (option("pci"))
        pci_report();
    if (option("blk"))
        blk_section();
    if (option("net"))
        net_section();
    if (option("rng"))
        rng_section();
    if (option("scsi"))
        scsi_section();
    if (option("hostile"))
        hostile_section();
    note("end");
    guest_exit(0);
}

void kernel_main(void) {
    const struct hvm_start_info *info = (const void *)(uint64_t)start_info_address;
    if (info->magic != START_INFO_MAGIC)
        guest_exit(97);
    if (info->cmdline)
        command_line = (const char *)info->cmdline;
    cpu_setup();
    if (!option("cpl0"))
        enter_user(sections);
    __asm__ volatile("sti");
    sections();
}
