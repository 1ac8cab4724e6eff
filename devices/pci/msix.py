"""MSI-X: the capability, and the BAR that holds the vector table and the pending bits. VMM process.

PCI Local Bus 3.0, section 6.8.2. A vector is a `devices.board.MsiVector`: it is connected while the function
enables MSI-X and neither the function nor the vector is masked; while disconnected, signals wait in it and
show as pending.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

from devices.board import MsiVector
from devices.pci.config import CAP_MSIX, ConfigSpace, MaskedBytes
from devices.state import SavedState

CONTROL_FUNCTION_MASK = 1 << 14
CONTROL_ENABLE = 1 << 15

ENTRY_SIZE = 16  # message address (8), message data (4), vector control (4)
ENTRY_DATA = 8
ENTRY_CONTROL = 12
ENTRY_MASKED = 1
MAX_VECTORS = 2048

# Message addresses that reach local APICs (Intel SDM 3A, 11.11.1). On hardware a message elsewhere is a plain
# memory write by the device; ours goes nowhere.
MSI_ADDRESS_PREFIX = 0xFEE


class MsiX:
    """The MSI-X state of one function, and the BusDevice of its table BAR: the table first, the PBA halfway.

    `lock` is the function's; it is held while `on_enable` is called after MSI-X was enabled or disabled.
    `enabled` and `fd` may be read without it. Owns the vectors.
    """

    def __init__(
        self,
        config: ConfigSpace,
        lock: threading.RLock,
        bar: int,
        vectors: list[MsiVector],
        on_enable: Callable[[], None],
    ) -> None:
        if not 1 <= len(vectors) <= MAX_VECTORS:
            raise ValueError(f"MSI-X has 1 to {MAX_VECTORS} vectors, not {len(vectors)}")
        self.enabled = False
        self.function_masked = False
        self.paused = False
        self.vectors = vectors
        self.pba_offset = max(0x800, 1 << (ENTRY_SIZE * len(vectors) - 1).bit_length())
        self.bar_size = 2 * self.pba_offset
        self.table = MaskedBytes(ENTRY_SIZE * len(vectors))
        for start in range(0, len(self.table.data), ENTRY_SIZE):
            self.table.define(start, 8, 0, writable=0xFFFFFFFF_FFFFFFFC)
            self.table.define(start + ENTRY_DATA, 4, 0, writable=0xFFFFFFFF)
            self.table.define(start + ENTRY_CONTROL, 4, ENTRY_MASKED, writable=ENTRY_MASKED)
        self._messages: list[tuple[int, int] | None] = [None] * len(
            vectors
        )  # what each vector is connected to
        self._lock = lock
        self._config = config
        self._on_enable = on_enable
        self._capability = config.add_capability(
            CAP_MSIX,
            (len(vectors) - 1).to_bytes(2, "little")
            + bar.to_bytes(4, "little")
            + (self.pba_offset | bar).to_bytes(4, "little"),
            writable=(CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_bytes(2, "little"),
        )
        config.on_write(self._capability + 2, 2, self._control_written)

    def fd(self, vector: int) -> int:
        """The eventfd that raises `vector`."""
        return self.vectors[vector].fd

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            if offset + size <= len(self.table.data):
                return self.table.read(offset, size)
            value = 0
            for byte in range(size):
                value |= self._read_byte(offset + byte) << (8 * byte)
            return value

    def _read_byte(self, offset: int) -> int:
        if offset < len(self.table.data):
            return self.table.data[offset]
        first = 8 * (offset - self.pba_offset)
        if first < 0:
            return 0
        pending = 0
        for bit, vector in enumerate(range(first, min(first + 8, len(self.vectors)))):
            if self._messages[vector] is None and self.vectors[vector].pending():
                pending |= 1 << bit
        return pending

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self.table.write(offset, size, value)
            for vector in range(offset // ENTRY_SIZE, (offset + size - 1) // ENTRY_SIZE + 1):
                if vector < len(self.vectors):
                    self._connect(vector)

    def pause(self) -> None:
        """Disconnect all vectors: what was signalled before has reached its local APIC when this returns,
        what is signalled from now on stays pending in the vectors, so that it can be saved.
        """
        with self._lock:
            self.paused = True
            self._connect_all()

    def unpause(self) -> None:
        """Deliver again, first what is pending."""
        with self._lock:
            self.paused = False
            self._connect_all()

    def save(self) -> dict[str, Any]:
        """Of a paused function: what is not pending was delivered."""
        with self._lock:
            return {
                "table": self.table.data.hex(),
                "pending": [vector.pending() for vector in self.vectors],
            }

    def load(self, state: dict[str, Any], name: str) -> None:
        """Paused, after configuration space was loaded; `on_enable` is not called. Raises ValueError for what
        `save` cannot have said.
        """
        saved = SavedState(f"{name}, MSI-X", state)
        table = saved.exactly("table", len(self.table.data))
        pending = saved.items("pending", len(self.vectors), len(self.vectors))
        if not all(isinstance(one, bool) for one in pending):
            raise saved.wrong("pending", "is not a list of true and false")
        with self._lock:
            try:
                self.table.load(table)
            except ValueError as error:
                raise saved.wrong("table", f"cannot be: {error}") from None
            self.paused = True
            self._take_control()
            self._connect_all()
            for vector, signalled in zip(self.vectors, pending, strict=True):
                if signalled:
                    os.eventfd_write(vector.fd, 1)

    def _take_control(self) -> None:
        control = self._config.get(self._capability + 2, 2)
        self.function_masked = bool(control & CONTROL_FUNCTION_MASK)
        self.enabled = bool(control & CONTROL_ENABLE)

    def _control_written(self) -> None:
        was_enabled = self.enabled
        self._take_control()
        self._connect_all()
        if self.enabled != was_enabled:
            self._on_enable()

    def _connect_all(self) -> None:
        for vector in range(len(self.vectors)):
            self._connect(vector)

    def _connect(self, vector: int) -> None:
        """Connect or disconnect a vector as the table and the control register say, and `paused`."""
        entry = vector * ENTRY_SIZE
        address = self.table.get(entry, 8)
        masked = self.function_masked or self.table.get(entry + ENTRY_CONTROL, 4) & ENTRY_MASKED
        message = None
        if self.enabled and not self.paused and not masked and address >> 20 == MSI_ADDRESS_PREFIX:
            message = (address, self.table.get(entry + ENTRY_DATA, 4))
        if message == self._messages[vector]:
            return
        self._messages[vector] = message
        if message is None:
            self.vectors[vector].disconnect()
        else:
            self.vectors[vector].connect(*message)

    def close(self) -> None:
        for vector in self.vectors:
            vector.close()
