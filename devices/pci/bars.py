"""Base address registers: their kinds, and the map that moves them in and out of the buses. VMM process.

PCI Local Bus 3.0, section 6.2.5. A guest may put a BAR anywhere: over another one, over a device that is no
PCI function, over RAM, off the end of the address space. Only what lies in the PCI windows and is free gets
mapped; a BAR that finds its place taken waits for it and is mapped when the place becomes free.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from devices.bus import Bus, BusDevice


class BarKind(Enum):
    """What a BAR decodes. The value is the read-only low bits of the register (table 6.2.5.1)."""

    IO = 0x1
    MEMORY_32 = 0x0
    MEMORY_64_PREFETCHABLE = 0xC


@dataclass(slots=True, eq=False)
class Bar:
    """One BAR of a function; `size` is a power of two. The hooks are called with the bus lock held."""

    index: int
    kind: BarKind
    size: int
    device: BusDevice
    on_map: Callable[[int], None] | None = None
    on_unmap: Callable[[], None] | None = None
    wanted: int | None = None  # where the guest put it; None while decoding is off
    mapped: int | None = (
        None  # where it is; differs from `wanted` while that place is taken or outside the windows
    )

    def __post_init__(self) -> None:
        smallest = 4 if self.kind is BarKind.IO else 16
        if self.size < smallest or self.size & (self.size - 1):
            raise ValueError(f"a BAR of {self.size} bytes is impossible")

    @property
    def width(self) -> int:
        """Bytes of configuration space that the register takes."""
        return 8 if self.kind is BarKind.MEMORY_64_PREFETCHABLE else 4

    @property
    def registers(self) -> range:
        """The indices that the register takes: two when it is 64 bits wide."""
        return range(self.index, self.index + self.width // 4)


@dataclass(slots=True)
class Window:
    """The range [start, end) of a bus that BARs may occupy; below `free` it was given out at plug time."""

    bus: Bus
    start: int
    end: int
    free: int

    def allocate(self, size: int) -> int:
        """A naturally aligned range of `size` bytes, given out once. Raises ValueError when there is none."""
        address = (self.free + size - 1) & ~(size - 1)
        if address + size > self.end:
            raise ValueError(f"no room for a BAR of {size} bytes in the {self.bus.name} window")
        self.free = address + size
        return address


class BarMap:
    """All BARs of a PCI bus. The caller holds the PCI bus's lock around every call."""

    def __init__(
        self, pio: Bus, mmio: Bus, pio_window: tuple[int, int], mmio_window: tuple[int, int]
    ) -> None:
        self._io = Window(pio, *pio_window, free=pio_window[0])
        self._memory = Window(mmio, *mmio_window, free=mmio_window[0])
        self._waiting: list[Bar] = []  # in the order in which the guest placed them

    def window(self, bar: Bar) -> Window:
        return self._io if bar.kind is BarKind.IO else self._memory

    def place(self, bar: Bar, address: int | None) -> None:
        """Map `bar` at `address`, or nowhere (None). A place that is taken or outside is waited for."""
        if address == bar.wanted and (address is None or address == bar.mapped):
            return
        if bar in self._waiting:
            self._waiting.remove(bar)
        bar.wanted = address
        self._unmap(bar)
        if address is not None:
            self._waiting.append(bar)
        self._waiting = [waiting for waiting in self._waiting if not self._map(waiting)]

    def waiting(self) -> tuple[Bar, ...]:
        """The BARs whose place is taken or outside the windows, the longest waiting first."""
        return tuple(self._waiting)

    def _map(self, bar: Bar) -> bool:
        window = self.window(bar)
        address = bar.wanted
        if address is None or address < window.start or address + bar.size > window.end:
            return False
        try:
            window.bus.insert(address, bar.size, bar.device)
        except ValueError:
            return False  # taken
        bar.mapped = address
        if bar.on_map is not None:
            bar.on_map(address)
        return True

    def _unmap(self, bar: Bar) -> None:
        if bar.mapped is None:
            return
        if bar.on_unmap is not None:
            bar.on_unmap()
        self.window(bar).bus.remove(bar.mapped)
        bar.mapped = None
