"""The PCI bus: bus 0 with its host bridge, reached by configuration mechanism 1 and by ECAM. VMM process.

PCI Local Bus 3.0, section 3.2.2.3.2 (ports 0xCF8 and 0xCFC); PCI Express base, section 7.2.2 (ECAM). Slots
hold one function each. vCPU threads call in from all sides: `lock` serialises configuration accesses and the
movement of BARs (devices.pci.function says how it orders with the functions' locks); the main loop's thread
never takes it.
"""

import threading
from typing import Any

from devices.board import Board
from devices.bus import Bus
from devices.pci.bars import Bar, BarMap
from devices.pci.config import EXTENDED_CONFIG_SIZE
from devices.pci.function import BAR_COUNT, PciFunction
from devices.state import SavedState

CONFIG_ADDRESS = 0xCF8
CONFIG_PORTS = 8
CONFIG_ENABLE = 1 << 31
# What the address register keeps. Bits 27 to 24 are reserved by PCI; AMD made them bits 11 to 8 of the
# register number (BKDG family 10h, IoCfgAddr), and Linux uses that for extended registers on AMD.
# Were they ignored, it would find the ordinary registers there a second time.
ADDRESS_BITS = 0x8FFFFFFC
SLOTS = 32
ECAM_SIZE = SLOTS * 8 * EXTENDED_CONFIG_SIZE  # bus 0 only: 1 MiB

# The generic host bridge of QEMU's PCIe machines. Linux takes any function of class 0600 for proof that
# mechanism 1 works, and has no quirk for this id; a chipset's id (440FX, Q35) would make Linux and SeaBIOS
# poke at PAM, SMRAM and PCIEXBAR registers that we do not have.
HOST_BRIDGE_VENDOR = 0x1B36
HOST_BRIDGE_DEVICE = 0x0008
HOST_BRIDGE_CLASS = 0x060000


def _ones(size: int) -> int:
    return (1 << (8 * size)) - 1


class PciBus:
    """Bus 0. Windows are [start, end) of the address spaces, for BARs; `ecam_base` None means no ECAM.

    Owns the functions plugged into it.
    """

    def __init__(
        self,
        board: Board,
        pio: Bus,
        mmio: Bus,
        *,
        mmio_window: tuple[int, int],
        pio_window: tuple[int, int],
        ecam_base: int | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self.functions: dict[int, PciFunction] = {}
        self._board = board
        self._bar_map = BarMap(pio, mmio, pio_window, mmio_window)
        self._detach = [(pio, CONFIG_ADDRESS)]
        self.config_ports = ConfigPorts(self)
        pio.insert(CONFIG_ADDRESS, CONFIG_PORTS, self.config_ports)
        if ecam_base is not None:
            mmio.insert(ecam_base, ECAM_SIZE, Ecam(self))
            self._detach.append((mmio, ecam_base))
        host_bridge = PciFunction(
            vendor_id=HOST_BRIDGE_VENDOR, device_id=HOST_BRIDGE_DEVICE, class_code=HOST_BRIDGE_CLASS
        )
        self.plug(host_bridge, slot=0)

    def plug(self, function: PciFunction, slot: int | None = None) -> int:
        """Put `function` into `slot` (0 to 31), or the first free one, assign addresses; returns the slot.

        Raises ValueError when the slot is taken or a window is full.
        """
        with self.lock:
            if slot is None:
                slot = next((free for free in range(SLOTS) if free not in self.functions), SLOTS)
            if slot in self.functions or not 0 <= slot < SLOTS:
                raise ValueError(f"PCI slot {slot} is taken or does not exist")
            function.plugged(slot, self._bar_map, self._board)
            self.functions[slot] = function
            return slot

    def config_read(self, bus: int, devfn: int, offset: int, size: int) -> int:
        """Any width, any offset; all ones where there is no function."""
        with self.lock:
            function = self._function(bus, devfn)
            return _ones(size) if function is None else function.config_read(offset, size)

    def config_write(self, bus: int, devfn: int, offset: int, size: int, value: int) -> None:
        with self.lock:
            function = self._function(bus, devfn)
            if function is not None:
                function.config_write(offset, size, value)

    def _function(self, bus: int, devfn: int) -> PciFunction | None:
        return None if bus or devfn & 7 else self.functions.get(devfn >> 3)

    def pause(self) -> None:
        """Have every function hold still: see `PciFunction.pause`. The vCPUs are out of the guest; afterwards
        no device raises an interrupt until `unpause`. Waits for workers, at most as long as each of them may
        take.
        """
        for function in self.functions.values():
            function.pause()

    def unpause(self) -> None:
        """Let every function go on; before the vCPUs do."""
        for function in self.functions.values():
            function.unpause()

    def save(self) -> dict[str, Any]:
        """What `load` needs, paused. Raises OSError or ProtocolError when a worker that failed while it was
        pausing is not back yet.
        """
        with self.lock:
            slots = {function: slot for slot, function in self.functions.items()}
            where = {id(bar): slots[function] for function in slots for bar in function.bars.values()}
            return {
                "config_address": self.config_ports.address,
                "functions": {str(slot): function.save() for slot, function in self.functions.items()},
                "waiting": [[where[id(bar)], bar.index] for bar in self._bar_map.waiting()],
            }

    def load(self, state: dict[str, Any]) -> None:
        """Put the functions plugged here into the paused state that `state` describes: they go on with
        `unpause`, after the interrupt controllers were given their state, which this has changed. Raises
        ValueError when the functions saved are others, or the state makes no sense; the bus can only be
        closed then.
        """
        saved = SavedState("PCI bus", state)
        address = saved.bits("config_address", ADDRESS_BITS)
        functions = saved.mapping("functions")
        waiting = [self._waiting_bar(saved, item) for item in saved.items("waiting", SLOTS * BAR_COUNT)]
        with self.lock:
            for slot, function in self.functions.items():
                if str(slot) not in functions:
                    raise ValueError(f"PCI slot {slot} has {function.description}; it was saved empty")
            for name in functions:
                if name not in map(str, self.functions):
                    raise ValueError(f"PCI slot {name} is empty; it was saved with a function")
            for slot, function in self.functions.items():
                try:
                    function.load(functions[str(slot)])
                except ValueError as error:
                    raise ValueError(f"PCI slot {slot}: {error}") from None
            # Where two BARs want one place, it is the one's that had it.
            for function in self.functions.values():
                for bar in function.bars.values():
                    if (function, bar) not in waiting:
                        function.place_bar(bar)
            for function, bar in waiting:
                function.place_bar(bar)
            self.config_ports.address = address

    def _waiting_bar(self, saved: SavedState, item: object) -> tuple[PciFunction, Bar]:
        if isinstance(item, list) and len(item) == 2 and all(type(number) is int for number in item):
            function = self.functions.get(item[0])
            if function is not None and item[1] in function.bars:
                return function, function.bars[item[1]]
        raise saved.wrong("waiting", "names a BAR that does not exist")

    def close(self) -> None:
        """Close every function and leave the buses. vCPUs have stopped by then."""
        with self.lock:
            while self.functions:
                self.functions.popitem()[1].close()
            while self._detach:
                bus, base = self._detach.pop()
                bus.remove(base)


class ConfigPorts:
    """Ports 0xCF8 to 0xCFF. The host bridge claims dwords at 0xCF8 and anything within 0xCFC to 0xCFF.

    Other accesses go on to the ISA bus, where nobody answers.
    """

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus
        self.address = 0

    def read(self, offset: int, size: int) -> int:
        if offset == 0 and size == 4:
            return self.address
        with self._bus.lock:
            if offset < 4 or offset + size > CONFIG_PORTS or not self.address & CONFIG_ENABLE:
                return _ones(size)
            bus, devfn, register = self._target(offset)
            return self._bus.config_read(bus, devfn, register, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._bus.lock:
            if offset == 0 and size == 4:
                self.address = value & ADDRESS_BITS
            elif offset >= 4 and offset + size <= CONFIG_PORTS and self.address & CONFIG_ENABLE:
                bus, devfn, register = self._target(offset)
                self._bus.config_write(bus, devfn, register, size, value)

    def _target(self, offset: int) -> tuple[int, int, int]:
        register = self.address >> 16 & 0xF00 | self.address & 0xFC | offset & 3
        return self.address >> 16 & 0xFF, self.address >> 8 & 0xFF, register


class Ecam:
    """Memory-mapped configuration space: 4 KiB for each of the 256 functions of bus 0."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        return self._bus.config_read(0, offset >> 12, offset & (EXTENDED_CONFIG_SIZE - 1), size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._bus.config_write(0, offset >> 12, offset & (EXTENDED_CONFIG_SIZE - 1), size, value)
