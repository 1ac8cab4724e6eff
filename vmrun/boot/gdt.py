"""The GDT a kernel starts with: flat code and data, and a TSS, at the selectors Linux's boot protocol
names. VMM process.
"""

import struct

from devices.memory import GuestMemory
from vmrun.boot.cpustate import Segment
from vmrun.machine.layout import BOOT_GDT_START

BOOT_CS = 0x10  # __BOOT_CS and __BOOT_DS of Documentation/x86/boot.rst
BOOT_DS = 0x18
BOOT_TSS = 0x20

_ENTRIES = 6  # a TSS descriptor takes two of them in long mode
GDT_LIMIT = _ENTRIES * 8 - 1


def write_gdt(memory: GuestMemory, *segments: Segment) -> None:
    """Put the descriptors of `segments` at their selectors; all other entries are null."""
    entries = [0] * _ENTRIES
    for segment in segments:
        entries[segment.selector >> 3] = segment.descriptor()
    memory.write(BOOT_GDT_START, struct.pack(f"<{_ENTRIES}Q", *entries))
