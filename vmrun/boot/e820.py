"""The memory map that kernels are told, for boot_params and for PVH alike. VMM process.

Address range types are those of ACPI 6.2, section 15 (System Address Map Interfaces).
"""

from devices.memory import GuestMemory
from vmrun.machine.layout import (
    HIGH_RAM_START,
    KVM_IDENTITY_MAP,
    KVM_TSS,
    LOW_RAM_END,
    PCI_ECAM_SIZE,
    PCI_ECAM_START,
)

E820_RAM = 1
E820_RESERVED = 2

_KVM_TSS_END = KVM_TSS + 3 * 4096


def e820_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """(address, size, type) of each range, ascending.

    The EBDA and all above it up to 1 MiB are reserved: the MP and ACPI tables lie there. ECAM is reserved
    because Linux uses it only then.
    """
    ranges = [
        (LOW_RAM_END, HIGH_RAM_START - LOW_RAM_END, E820_RESERVED),
        (PCI_ECAM_START, PCI_ECAM_SIZE, E820_RESERVED),
        (KVM_IDENTITY_MAP, _KVM_TSS_END - KVM_IDENTITY_MAP, E820_RESERVED),
    ]
    for region in memory.regions:
        end = region.gpa + region.size
        if region.gpa < LOW_RAM_END:
            ranges.append((region.gpa, min(end, LOW_RAM_END) - region.gpa, E820_RAM))
        if end > HIGH_RAM_START:
            start = max(region.gpa, HIGH_RAM_START)
            ranges.append((start, end - start, E820_RAM))
    return sorted(ranges)
