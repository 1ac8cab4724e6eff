"""What unit tests share: a board without KVM, and a PCI bus on it driven the way a guest drives it."""

import os
import select
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from devices.bus import Bus
from devices.pci.bus import PciBus
from devices.pci.function import PciFunction

MMIO_WINDOW = (0xC0000000, 0xE0000000)
PIO_WINDOW = (0xC000, 0x10000)
ECAM_BASE = 0xE0000000


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


class FakeLine:
    """An interrupt line that remembers."""

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.level = False

    def set_level(self, asserted: bool) -> None:
        self.level = asserted


class FakeVector:
    """An MSI vector over a real eventfd; `message` is what it is connected to."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.message: tuple[int, int] | None = None
        self.connects = 0

    def connect(self, address: int, data: int) -> None:
        self.message = (address, data)
        self.connects += 1

    def disconnect(self) -> None:
        self.message = None

    def pending(self) -> bool:
        return readable(self.fd)

    def take(self) -> int:
        """How often it was signalled since the last call."""
        return os.eventfd_read(self.fd) if readable(self.fd) else 0

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1


class FakeKick:
    def __init__(
        self, board: "FakeBoard", space: str, address: int, size: int, fd: int, value: int | None
    ) -> None:
        self.board = board
        self.space = space
        self.address = address
        self.size = size
        self.fd = fd
        self.value = value

    def close(self) -> None:
        self.board.kicks.remove(self)


class FakeBoard:
    """A `devices.board.Board` with buses, whose main loop runs when the test says so."""

    def __init__(self) -> None:
        self.pio = Bus("pio", 1 << 16)
        self.mmio = Bus("mmio", 1 << 52)
        self.lines: list[FakeLine] = []
        self.vectors: list[FakeVector] = []
        self.kicks: list[FakeKick] = []
        self.watched: dict[int, Callable[[], None]] = {}

    def irq_line(self, gsi: int) -> FakeLine:
        self.lines.append(FakeLine(gsi))
        return self.lines[-1]

    def msi_vector(self) -> FakeVector:
        self.vectors.append(FakeVector())
        return self.vectors[-1]

    def kick_on_write(
        self, space: str, address: int, size: int, fd: int, value: int | None = None
    ) -> FakeKick:
        for kick in self.kicks:
            known = (kick.space, kick.address, kick.value)
            assert known != (space, address, value), "two kicks at one address"
        self.kicks.append(FakeKick(self, space, address, size, fd, value))
        return self.kicks[-1]

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        del self.watched[fd]

    def run_main_loop(self) -> None:
        """One turn: call back for every watched fd that is readable."""
        for fd, callback in list(self.watched.items()):
            if readable(fd):
                callback()

    def guest_write(self, address: int, size: int, value: int) -> None:
        """A memory write by the guest: a kick catches it, or the bus gets it."""
        if not self._caught("mmio", address, size, value):
            self.mmio.write(address, size, value)

    def guest_out(self, port: int, size: int, value: int) -> None:
        """The same to a port."""
        if not self._caught("pio", port, size, value):
            self.pio.write(port, size, value)

    def _caught(self, space: str, address: int, size: int, value: int) -> bool:
        for kick in self.kicks:
            there = kick.space == space and kick.address == address and kick.size in (0, size)
            if there and kick.value in (None, value):
                os.eventfd_write(kick.fd, 1)
                return True
        return False


class FakeGuest:
    """A PCI bus on a fake board and the accesses a kernel makes to it."""

    def __init__(self) -> None:
        self.board = FakeBoard()
        self.pio = self.board.pio
        self.mmio = self.board.mmio
        self.bus = PciBus(
            self.board,
            self.pio,
            self.mmio,
            mmio_window=MMIO_WINDOW,
            pio_window=PIO_WINDOW,
            ecam_base=ECAM_BASE,
        )

    def plug(self, function: PciFunction, slot: int | None = None) -> int:
        return self.bus.plug(function, slot)

    def config_read(self, slot: int, offset: int, size: int) -> int:
        """By mechanism 1."""
        self.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | offset & ~3)
        return self.pio.read(0xCFC + (offset & 3), size)

    def config_write(self, slot: int, offset: int, size: int, value: int) -> None:
        self.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | offset & ~3)
        self.pio.write(0xCFC + (offset & 3), size, value)

    def capabilities(self, slot: int) -> list[tuple[int, int]]:
        """(id, offset) of each, in order."""
        found = []
        offset = self.config_read(slot, 0x34, 1)
        while offset:
            found.append((self.config_read(slot, offset, 1), offset))
            offset = self.config_read(slot, offset + 1, 1)
            assert len(found) < 48, "the capability list has a loop"
        return found

    def overlaps(self) -> bool:
        """Whether two ranges of a bus overlap."""
        for bus in (self.pio, self.mmio):
            ranges = bus._table[1]
            if any(lower[1] > upper[0] for lower, upper in pairwise(ranges)):
                return True
        return False

    def close(self) -> None:
        self.bus.close()
        assert not self.board.kicks
        assert not self.board.watched
        assert self.pio._table[1] == self.mmio._table[1] == []


@pytest.fixture
def guest() -> Iterator[Any]:
    guest = FakeGuest()
    yield guest
    guest.close()


@pytest.fixture(scope="session")
def fake_guest() -> type[FakeGuest]:
    """The class, for property-based tests that need a new one for each example."""
    return FakeGuest
