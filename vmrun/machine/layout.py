"""The guest-physical map of a machine: where RAM, the PCI windows, ports and tables lie. VMM process; no
code, only facts.

RAM runs from 0 to at most PCI_HOLE_START and goes on at 4 GiB, as on a PC.
"""

# Guest-physical addresses.
BDA_START = 0x400  # BIOS data area: where the EBDA is (0x40E) and how much base memory there is (0x413)
BDA_END = 0x500
BOOT_GDT_START = 0x1000  # descriptors for the kernel's first instructions
BOOT_GDT_END = 0x1040
PVH_START_INFO_START = 0x2000  # hvm_start_info, its module list and its memory map
PVH_START_INFO_END = 0x3000
BOOT_STACK_START = 0x6000
BOOT_STACK_END = 0x7000  # RSP at the kernel's entry
ZERO_PAGE_START = 0x7000  # struct boot_params
ZERO_PAGE_END = 0x8000
SETUP_DATA_START = 0x8000  # struct setup_data: the kernel's random seed
SETUP_DATA_END = 0x9000
BOOT_PAGE_TABLES_START = 0x9000  # PML4, PDPT and four page directories: the first 4 GiB, identity-mapped
BOOT_PAGE_TABLES_END = 0xF000
CMDLINE_START = 0x20000
CMDLINE_END = 0x30000
EBDA_START = (
    0x9FC00  # extended BIOS data area: its first KiB is where kernels look for the MP floating pointer first
)
MP_FLOATING_POINTER_START = EBDA_START + 16  # behind the EBDA's own size byte
MP_FLOATING_POINTER_END = EBDA_START + 32
EBDA_END = 0xA0000
LOW_RAM_END = EBDA_START
ACPI_START = 0xE0000  # RSDP and the other ACPI tables, in the area that kernels scan for it
ACPI_END = 0xF0000
MP_TABLE_START = 0xF0000  # MP configuration table: 64 CPUs and 124 PCI interrupts do not fit into the EBDA
MP_TABLE_END = 0xF2000
HIGH_RAM_START = 0x100000
PCI_HOLE_START = 0xC0000000
PCI_MMIO_START = 0xC0000000  # memory BARs
PCI_MMIO_END = 0xE0000000
PCI_ECAM_START = 0xE0000000  # enhanced configuration access: bus 0 only, 1 MiB
PCI_ECAM_SIZE = 1 << 20
PCI_MMIO_HIGH_START = PCI_ECAM_START + PCI_ECAM_SIZE  # memory BARs that firmware placed
IOAPIC_ADDRESS = 0xFEC00000
PCI_MMIO_HIGH_END = IOAPIC_ADDRESS
LAPIC_ADDRESS = 0xFEE00000
KVM_IDENTITY_MAP = 0xFFFBC000  # one page for KVM's real-mode identity map (VMX without unrestricted guest)
KVM_TSS = 0xFFFBD000  # three pages, likewise
FIRMWARE_MAX_SIZE = 0x40000  # up to 4 GiB, and again up to 1 MiB; KVM's pages lie below
FOUR_GIB = 1 << 32

# I/O ports.
PCI_CONFIG_ADDRESS_PORT = 0xCF8
PCI_PIO_START = 0xC000  # I/O BARs
PCI_PIO_END = 0x10000
CMOS_PORT = 0x70
I8042_PORT = 0x60
SERIAL_PORT = 0x3F8
SERIAL_IRQ = 4
DEBUG_EXIT_PORT = 0x501  # a write of v ends the machine with code v
ACPI_PM_PORT = 0x600  # PM1a event (4 bytes), PM1a control (2 bytes at +4), PM timer (4 bytes at +8)
ACPI_RESET_PORT = ACPI_PM_PORT + 12  # the FADT's reset register: writing ACPI_RESET_VALUE resets the machine
ACPI_RESET_VALUE = 1
ACPI_SCI_IRQ = 9
BOOT_MARK_PORT = 0x80  # POST codes; the boot benchmark reads them as milestones

IOAPIC_PINS = 24
