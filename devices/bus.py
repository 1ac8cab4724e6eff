"""PIO and MMIO address spaces: an access finds its device. VMM process; read by vCPU threads, changed by any
of them.

A device sees offsets into its range, never addresses. Ranges do not overlap. Lookups take no lock: the table
is an immutable snapshot that `insert` and `remove` replace as a whole.
"""

import threading
from bisect import bisect_right
from typing import Protocol


class BusDevice(Protocol):
    def read(self, offset: int, size: int) -> int:
        """The `size` bytes (1, 2, 4 or 8) at `offset`, as a little-endian number."""

    def write(self, offset: int, size: int, value: int) -> None: ...


class Bus:
    """One address space. Reads nobody claims give all ones, writes nobody claims vanish, as on a PC."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._lock = threading.Lock()
        self._table: tuple[list[int], list[tuple[int, int, BusDevice]]] = ([], [])

    def insert(self, base: int, size: int, device: BusDevice) -> None:
        """Give [base, base+size) to `device`. Raises ValueError when it is empty, out of the space, or
        taken.
        """
        if size <= 0 or base < 0 or base + size > self.size:
            raise ValueError(f"{self.name} range {base:#x}+{size:#x} is outside the address space")
        with self._lock:
            ranges = list(self._table[1])
            for start, end, _ in ranges:
                if base < end and start < base + size:
                    raise ValueError(
                        f"{self.name} range {base:#x}+{size:#x} overlaps {start:#x}-{end - 1:#x}"
                    )
            ranges.append((base, base + size, device))
            ranges.sort(key=lambda entry: entry[0])
            self._table = ([entry[0] for entry in ranges], ranges)

    def remove(self, base: int) -> None:
        """Take away the range that starts at `base`. Raises KeyError when there is none."""
        with self._lock:
            ranges = [entry for entry in self._table[1] if entry[0] != base]
            if len(ranges) == len(self._table[1]):
                raise KeyError(f"no {self.name} range starts at {base:#x}")
            self._table = ([entry[0] for entry in ranges], ranges)

    def _find(self, address: int, size: int) -> tuple[int, BusDevice] | None:
        starts, ranges = self._table
        index = bisect_right(starts, address) - 1
        if index < 0:
            return None
        start, end, device = ranges[index]
        if address + size > end:
            return None  # past the end, or straddling it: nobody's
        return address - start, device

    def read(self, address: int, size: int) -> int:
        found = self._find(address, size)
        if found is None:
            return (1 << (8 * size)) - 1
        offset, device = found
        return device.read(offset, size) & ((1 << (8 * size)) - 1)

    def write(self, address: int, size: int, value: int) -> None:
        found = self._find(address, size)
        if found is not None:
            offset, device = found
            device.write(offset, size, value)
