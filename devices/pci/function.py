"""One PCI function: type 0 header, BARs, INTx pin. VMM process; PCI Local Bus 3.0, section 6.1 and 6.2.

Locks, outermost first: the PCI bus's (`PciBus.lock`), a function's (`PciFunction.lock`), what the function
keeps for itself. Configuration accesses take the first two; register accesses through a BAR take only the
function's, and nobody asks for the bus's lock while holding a function's. Therefore a configuration write may
touch a second function (its BAR gets the place that the first one left) without a deadlock.
"""

import threading
from collections.abc import Callable
from typing import Any

from devices.board import Board
from devices.bus import BusDevice
from devices.pci.bars import Bar, BarKind, BarMap
from devices.pci.config import (
    BAR0,
    CACHE_LINE_SIZE,
    CLASS_CODE,
    COMMAND,
    COMMAND_INTX_DISABLE,
    COMMAND_IO,
    COMMAND_MASTER,
    COMMAND_MEMORY,
    CONFIG_SIZE,
    DEVICE_ID,
    INTERRUPT_LINE,
    INTERRUPT_PIN,
    LATENCY_TIMER,
    REVISION_ID,
    STATUS,
    STATUS_CAPABILITIES,
    STATUS_ERRORS,
    STATUS_INTERRUPT,
    SUBSYSTEM_ID,
    SUBSYSTEM_VENDOR_ID,
    VENDOR_ID,
    ConfigSpace,
)
from devices.pci.intx import Intx, intx_gsi
from devices.state import SavedState

BAR_COUNT = 6


class PciFunction:
    """A function to plug into a `PciBus`. `class_code` has 24 bits; `interrupt_pin` 0 means no INTx."""

    def __init__(
        self,
        *,
        vendor_id: int,
        device_id: int,
        class_code: int,
        revision: int = 0,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        interrupt_pin: int = 0,
    ) -> None:
        self.lock = threading.RLock()
        self.bars: dict[int, Bar] = {}
        self.intx = Intx()
        self.interrupt_pin = interrupt_pin
        self._bar_map: BarMap | None = None

        config = self.config = ConfigSpace()
        config.define(VENDOR_ID, 2, vendor_id)
        config.define(DEVICE_ID, 2, device_id)
        commands = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE
        config.define(COMMAND, 2, 0, writable=commands)
        config.define(STATUS, 2, 0, clearable=STATUS_ERRORS)
        config.define(REVISION_ID, 1, revision)
        config.define(CLASS_CODE, 3, class_code)
        config.define(CACHE_LINE_SIZE, 1, 0, writable=0xFF)
        config.define(LATENCY_TIMER, 1, 0, writable=0xFF)
        config.define(SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor_id)
        config.define(SUBSYSTEM_ID, 2, subsystem_id)
        config.define(INTERRUPT_LINE, 1, 0, writable=0xFF)  # a note from firmware to drivers; we only keep it
        config.define(INTERRUPT_PIN, 1, interrupt_pin)
        config.on_write(COMMAND, 2, self._command_written)
        config.on_read(STATUS, 1, self._refresh_status)
        config.on_write(BAR0, 4 * BAR_COUNT, self._place_bars)

    def add_bar(
        self,
        index: int,
        kind: BarKind,
        size: int,
        device: BusDevice,
        on_map: Callable[[int], None] | None = None,
        on_unmap: Callable[[], None] | None = None,
    ) -> Bar:
        """Put `size` bytes served by `device` behind register `index` (0 to 5). Before plugging.

        `on_map` is told the bus address whenever the guest made the BAR visible, `on_unmap` before it goes
        away.
        """
        bar = Bar(index, kind, size, device, on_map, on_unmap)
        taken = {register for other in self.bars.values() for register in other.registers}
        if not taken.isdisjoint(bar.registers) or index < 0 or bar.registers.stop > BAR_COUNT:
            raise ValueError(f"BAR {index} does not exist or is taken")
        # Address bits below the size are read-only zeroes: that is how a guest learns the size, and why a BAR
        # is always naturally aligned.
        writable = (1 << (8 * bar.width)) - size
        self.config.define(BAR0 + 4 * index, bar.width, kind.value, writable=writable)
        self.bars[index] = bar
        return bar

    def plugged(self, slot: int, bar_map: BarMap, board: Board) -> None:
        """Do what firmware would: assign addresses and the interrupt line. Called by the bus, its lock held.

        Decoding stays off as after a reset: operating systems turn it on when a driver binds. Were it on
        already, Linux would switch it off and on again for each BAR it sizes, and each time the kicks would
        be registered anew, which takes the kernel milliseconds each (an RCU grace period).
        """
        with self.lock:
            self._bar_map = bar_map
            for bar in self.bars.values():
                address = bar_map.window(bar).allocate(bar.size)
                self.config.put(BAR0 + 4 * bar.index, bar.width, address | bar.kind.value)
            if self.interrupt_pin:
                gsi = intx_gsi(slot, self.interrupt_pin)
                self.config.put(INTERRUPT_LINE, 1, gsi)
                self.intx.connect(board.irq_line(gsi))

    def config_read(self, offset: int, size: int) -> int:
        with self.lock:
            return self.config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        with self.lock:
            self.config.write(offset, size, value)

    def bar_address(self, bar: Bar) -> int:
        """Where the guest's register says that `bar` is, whether it is decoded there or not."""
        return self.config.get(BAR0 + 4 * bar.index, bar.width) & ~(0x3 if bar.kind is BarKind.IO else 0xF)

    def _command_written(self) -> None:
        self.intx.set_disabled(bool(self.config.get(COMMAND, 2) & COMMAND_INTX_DISABLE))
        self._place_bars()

    def _refresh_status(self) -> None:
        # The pin changes under other locks than ours; so its bit is looked up when somebody reads it.
        status = self.config.get(STATUS, 1) & STATUS_CAPABILITIES
        self.config.put(STATUS, 1, status | (STATUS_INTERRUPT if self.intx.asserted else 0))

    def _place_bars(self) -> None:
        for bar in self.bars.values():
            self.place_bar(bar)

    def pause(self) -> None:
        """Hold still: no interrupt is on its way and no memory of the guest's is touched when this returns.
        The vCPUs are out of the guest. May wait for a worker.
        """

    def unpause(self) -> None:
        """Go on. May wait for a worker."""

    def save(self) -> dict[str, Any]:
        """What `load` needs, of a paused function."""
        with self.lock:
            config = bytearray(self.config.data[:CONFIG_SIZE])
            config[STATUS] &= ~STATUS_INTERRUPT  # looked up when it is read
            return {
                "vendor": self.config.get(VENDOR_ID, 2),
                "device": self.config.get(DEVICE_ID, 2),
                "bars": self._bar_sizes(),
                "config": config.hex(),
            }

    def load(self, state: dict[str, Any]) -> None:
        """Put a function that was just plugged into the paused state that `state` describes; its BARs are for
        `place_bar`. Raises ValueError when `state` is another kind of function's, or makes no sense.
        """
        saved = SavedState(self.description, state)
        saved.same("vendor", self.config.get(VENDOR_ID, 2), "vendor id")
        saved.same("device", self.config.get(DEVICE_ID, 2), "device id")
        saved.same("bars", self._bar_sizes(), "set of BARs")
        config = saved.exactly("config", CONFIG_SIZE)
        with self.lock:
            self._refresh_status()
            try:
                self.config.load(config)
            except ValueError as error:
                raise saved.wrong("config", f"is another function's: {error}") from None
            self.intx.set_disabled(bool(self.config.get(COMMAND, 2) & COMMAND_INTX_DISABLE))

    @property
    def description(self) -> str:
        """For messages."""
        return f"PCI function {self.config.get(VENDOR_ID, 2):04x}:{self.config.get(DEVICE_ID, 2):04x}"

    def _bar_sizes(self) -> list[list[int]]:
        return [[bar.index, bar.kind.value, bar.size] for bar in self.bars.values()]

    def place_bar(self, bar: Bar) -> None:
        """Map `bar` where the registers say that it is, or nowhere. The bus's lock is held."""
        if self._bar_map is not None:
            command = self.config.get(COMMAND, 2)
            decoded = command & (COMMAND_IO if bar.kind is BarKind.IO else COMMAND_MEMORY)
            self._bar_map.place(bar, self.bar_address(bar) if decoded else None)

    def close(self) -> None:
        """Take the BARs off the buses. The bus calls it, its lock held. Subclasses then release their own."""
        with self.lock:
            if self._bar_map is not None:
                for bar in self.bars.values():
                    self._bar_map.place(bar, None)
