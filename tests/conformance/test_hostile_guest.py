"""A hostile guest against vmrun: each misdeed is answered as it should be, the device comes back after a
reset, and a second disk never notices.

Not compared with QEMU, whose answers are others: it reads zeroes from addresses without memory and carries
on, lets a device write to the interrupt controllers, takes unaligned rings and impossible sizes in silence,
and lets a BAR that covers another function's take its accesses.
"""

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.conformance.machines import Devices, parse, run_vmrun

WELL = "; recovered; neighbour well"

# The first pattern that fits a name says what its value is.
EXPECTED = (
    # Descriptors and rings of blk0.
    ("chain.unknown.flags", "answered, status 0" + WELL),
    ("chain.*", "needs reset" + WELL),
    ("discard.short", "answered, status 1" + WELL),
    ("zero.many.segments", "answered, status 1" + WELL),
    ("indirect.*", "needs reset" + WELL),
    # 256 entries with the same head, each of which is used before the next is taken: nothing in flight twice.
    ("ring.head.repeated", "each answered" + WELL),
    ("ring.used.index.written", "not believed" + WELL),
    ("ring.*", "needs reset" + WELL),
    ("place.*", "needs reset" + WELL),
    # Registers.
    ("live.queue.moved", "ignored" + WELL),
    ("queue.size.impossible", "ignored" + WELL),
    ("status.without.features", "needs reset" + WELL),
    ("status.unknown.bits", "written" + WELL),
    ("notify.garbage", "ignored" + WELL),
    ("reset.twenty.times", "done" + WELL),
    ("config.written", "capacity stands" + WELL),
    ("registers.every.width", "written" + WELL),
    ("legacy.ring.moved", "ignored" + WELL),
    ("legacy.ring.*", "needs reset" + WELL),
    ("legacy.queue.unknown", "ignored" + WELL),
    ("legacy.registers.every.width", "written" + WELL),
    # Configuration space and MSI-X.
    ("configuration.garbage", "restored" + WELL),
    ("bar.*", "withstood" + WELL),
    ("msix.garbage", "answered in silence" + WELL),
    ("msix.after.garbage", "interrupted" + WELL),
    # The other devices.
    ("net0.frames.every.size", "1601 of 1601 used, neighbour well"),
    ("net0.frames.large", "7 of 7 used"),
    ("net0.frame.*", "used 0"),
    ("net0.receive.no.room", "6 of 6 back unused"),
    ("net0.receive.readable", "back unused"),
    ("net0.receive.nowhere", "needs reset"),
    ("net0.*arp", "sent, used 0; answer used 54 from 192.0.2.1, header zero, 1 buffer"),
    ("net0.recovered.ping", "sent, used 0; answer used 118 number 1 checksum good *"),
    ("rng0.recovered", "64 bytes; neighbour well"),
    ("rng0.*", "needs reset"),
    ("scsi0.opcodes", "1280 of 1280 back, 1280 make sense"),
    ("scsi0.requests.short", "50 of 50 back"),
    ("scsi0.responses.short", "107 of 107 back"),
    ("scsi0.control.noise", "64 of 64 back"),
    ("scsi0.recovered.ready", "check condition, sense length 18: 70 6/29/00"),
    ("scsi0.recovered.load", "status 0 residual 0"),
    ("scsi0.recovered.read", "status 0 residual 0 crc *"),
    ("*.neighbour", "well"),
)


@pytest.mark.root
def test_every_misdeed(conformance_guest: Path, disks: Devices, tap: str, tmp_path: Path) -> None:
    lines = parse(run_vmrun(conformance_guest, "hostile", replace(disks, tap=tap), tmp_path))
    unused = dict(EXPECTED)
    complaints = []
    for full_name, value in lines.items():
        name = full_name.removeprefix("hostile.")
        pattern, expected = next((entry for entry in EXPECTED if fnmatchcase(name, entry[0])), (name, None))
        unused.pop(pattern, None)
        if expected is None or not fnmatchcase(value, expected):
            complaints.append(f"{name}: {value!r}, not {expected!r}")
    assert not complaints, "\n" + "\n".join(complaints)
    assert not unused, f"the guest did not try {', '.join(unused)}"
