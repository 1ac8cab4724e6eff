"""QEMU's firmware configuration device: how firmware learns of the machine, at ports 0x510 and 0x511. VMM
process.

QEMU's docs/specs/fw_cfg.rst. A 16-bit write to the first port selects an item, each read of the second gives
its next byte, and zeroes behind its end. One item is a directory of named files, which are items too. Without
the DMA interface: firmware reads with string instructions, of which KVM makes one exit for a page.
"""

import struct
from collections.abc import Mapping
from typing import Any

from devices.state import SavedState

SELECT_PORT = 0x510
PORTS = 2
_SELECT, _DATA = 0, 1

# Items, by the numbers that the specification and QEMU's include/standard-headers/linux/qemu_fw_cfg.h give.
SIGNATURE = 0x00
ID = 0x01
NB_CPUS = 0x05
MAX_CPUS = 0x0F
FILE_DIRECTORY = 0x19
FIRST_FILE = 0x20

_ID_TRADITIONAL = 1 << 0  # these two ports; bit 1 would be the DMA interface
_FILE_ENTRY = struct.Struct(">IHH56s")
NAME_SIZE = 55  # without the zero byte


class FwCfg:
    """A `BusDevice` of two ports. `files` are what the directory names, `items` the other items by number.

    Read-only: what the guest writes as data vanishes, as in QEMU since 2.4.
    """

    __slots__ = ("_items", "_offset", "_selected")

    def __init__(self, files: Mapping[str, bytes], items: Mapping[int, bytes]) -> None:
        directory = bytearray(struct.pack(">I", len(files)))
        self._items = {SIGNATURE: b"QEMU", ID: struct.pack("<I", _ID_TRADITIONAL), **items}
        for number, (name, data) in enumerate(sorted(files.items()), FIRST_FILE):
            encoded = name.encode("ascii")
            if len(encoded) > NAME_SIZE:
                raise ValueError(f"fw_cfg file name {name!r} is longer than {NAME_SIZE} bytes")
            directory += _FILE_ENTRY.pack(len(data), number, 0, encoded)
            self._items[number] = data
        self._items[FILE_DIRECTORY] = bytes(directory)
        self._selected: int | None = None
        self._offset = 0

    def read(self, offset: int, size: int) -> int:
        if offset != _DATA or size != 1:
            return (1 << (8 * size)) - 1
        # Two vCPUs that read at once share one offset, as on hardware; either order is harmless.
        item, position = self._item(), self._offset
        if position >= len(item):
            return 0
        self._offset = position + 1
        return item[position]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _SELECT and size == 2:
            self._selected, self._offset = value & 0xFFFF, 0

    def _item(self) -> bytes:
        return b"" if self._selected is None else self._items.get(self._selected, b"")

    def save(self) -> dict[str, Any]:
        return {"selected": self._selected, "offset": self._offset}

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what `save` cannot have said. The items are this machine's own."""
        saved = SavedState("fw_cfg", state)
        selected = None if saved.absent("selected") else saved.number("selected", 0xFFFF)
        self._selected, self._offset = selected, saved.number("offset", 1 << 32)
