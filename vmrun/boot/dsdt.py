"""The DSDT's contents: the soft-off state, the PCI host bridge, and the legacy devices a PC cannot
discover. VMM process.

Static names only, no methods: a guest kernel interprets AML, on some hosts with an interpreted CPU
underneath.
"""

from devices.pci.intx import intx_gsi
from vmrun.boot.aml import (
    Aml,
    bus_numbers,
    device,
    eisa_id,
    fixed_memory,
    integer,
    io_ports,
    io_window,
    isa_irq,
    memory_window,
    name,
    package,
    resources,
    scope,
)
from vmrun.machine.layout import (
    CMOS_PORT,
    PCI_CONFIG_ADDRESS_PORT,
    PCI_ECAM_SIZE,
    PCI_ECAM_START,
    PCI_MMIO_END,
    PCI_MMIO_HIGH_END,
    PCI_MMIO_HIGH_START,
    PCI_MMIO_START,
    PCI_PIO_END,
    PCI_PIO_START,
    SERIAL_IRQ,
    SERIAL_PORT,
)

SLEEP_TYPE_S5 = 5  # SLP_TYP that turns the machine off

_RTC_IRQ = 8
_PCI_SLOTS = range(32)
_PCI_PINS = range(1, 5)
_ANY_FUNCTION = 0xFFFF


def dsdt_body() -> Aml:
    off = package(integer(SLEEP_TYPE_S5), integer(SLEEP_TYPE_S5), integer(0), integer(0))
    return name("\\_S5", off) + scope("\\_SB", _pci_host_bridge(), _ecam(), _serial_port(), _clock())


def _pci_host_bridge() -> Aml:
    # ECAM covers bus 0 only, and there are no bridges: one bus.
    windows = resources(
        bus_numbers(0, 0),
        io_ports(PCI_CONFIG_ADDRESS_PORT, 8),
        io_window(PCI_PIO_START, PCI_PIO_END - 1),
        memory_window(PCI_MMIO_START, PCI_MMIO_END - 1),
        memory_window(PCI_MMIO_HIGH_START, PCI_MMIO_HIGH_END - 1),
    )
    routes = (
        package(
            integer(slot << 16 | _ANY_FUNCTION), integer(pin - 1), integer(0), integer(intx_gsi(slot, pin))
        )
        for slot in _PCI_SLOTS
        for pin in _PCI_PINS
    )
    return device(
        "PCI0",
        name("_HID", eisa_id("PNP0A08")),
        name("_CID", eisa_id("PNP0A03")),
        name("_UID", integer(0)),
        name("_BBN", integer(0)),
        name("_CRS", windows),
        name("_PRT", package(*routes)),
    )


def _ecam() -> Aml:
    """Kernels use the configuration window of MCFG only where a motherboard resource reserves it."""
    return device(
        "ECAM",
        name("_HID", eisa_id("PNP0C02")),
        name("_CRS", resources(fixed_memory(PCI_ECAM_START, PCI_ECAM_SIZE))),
    )


def _serial_port() -> Aml:
    return device(
        "COM1",
        name("_HID", eisa_id("PNP0501")),
        name("_UID", integer(1)),
        name("_CRS", resources(io_ports(SERIAL_PORT, 8), isa_irq(SERIAL_IRQ))),
    )


def _clock() -> Aml:
    return device(
        "RTC",
        name("_HID", eisa_id("PNP0B00")),
        name("_CRS", resources(io_ports(CMOS_PORT, 2), isa_irq(_RTC_IRQ))),
    )
