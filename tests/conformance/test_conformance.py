"""One guest, two machines: what it sees in vmrun is what it sees in QEMU, but for the table of differences.

Each test runs some sections of the guest in both and compares the transcripts line by line.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance.differences import DIFFERENCES, compare
from tests.conformance.machines import Devices, parse, run_qemu, run_vmrun


class Both:
    """Runs the guest in both machines; a folder for each keeps what is left."""

    def __init__(self, guest: Path, folder: Path) -> None:
        self.guest = guest
        self.qemu_folder, self.vmrun_folder = folder / "qemu", folder / "vmrun"

    def compare(self, sections: str, devices: Devices) -> dict[str, str]:
        """vmrun's transcript, when there is nothing to complain of."""
        for folder in (self.qemu_folder, self.vmrun_folder):
            folder.mkdir()
        theirs = parse(run_qemu(self.guest, sections, devices, self.qemu_folder))
        ours = parse(run_vmrun(self.guest, sections, devices, self.vmrun_folder))
        complaints = compare(theirs, ours)
        assert not complaints, "\n" + "\n".join(complaints)
        return ours


@pytest.fixture
def both(conformance_guest: Path, oracle: None, tmp_path: Path) -> Both:
    return Both(conformance_guest, tmp_path)


@pytest.mark.root
def test_configuration_space(both: Both, disks: Devices, tap: str) -> None:
    ours = both.compare("pci", replace(disks, tap=tap))
    for device in ("blk0", "blk1", "net0", "rng0", "scsi0"):
        assert ours[f"{device}.pci.status"] == "0010"


def test_disks(both: Both, disks: Devices) -> None:
    """Every request of virtio-blk; afterwards the images are the same, too."""
    ours = both.compare("blk", disks)
    for transport in ("modern", "legacy"):
        assert ours[f"blk0.{transport}.write.back.data"] == "same"
    left = (both.vmrun_folder / "disk.raw").read_bytes()
    assert left != disks.disk.read_bytes()
    # Sectors 512 to 519 were discarded: either machine may have kept them.
    kept = slice(512 * 512), slice(520 * 512, None)
    expected = (both.qemu_folder / "disk.raw").read_bytes()
    assert [left[part] for part in kept] == [expected[part] for part in kept]


@pytest.mark.root
def test_network_card(both: Both, disks: Devices, tap: str) -> None:
    ours = both.compare("net", replace(disks, tap=tap))
    for transport in ("modern", "legacy"):
        assert ours[f"net0.{transport}.many"] == "48 answers, the last is number 48"


def test_entropy(both: Both, disks: Devices) -> None:
    ours = both.compare("rng", disks)
    assert ours["rng0.legacy.twice"] == "different"


def test_cdrom(both: Both, disks: Devices) -> None:
    ours = both.compare("scsi", disks)
    assert ours["scsi0.legacy.capacity.data"] == "last 000001ff size 0800"


def test_ecam_shows_what_the_ports_show(conformance_guest: Path, disks: Devices, tmp_path: Path) -> None:
    """Not in QEMU: its machine with a PVH entry and our slots has no ECAM."""
    lines = parse(run_vmrun(conformance_guest, "pci ecam=e0000000", disks, tmp_path))
    for device in ("blk0", "blk1", "rng0", "scsi0"):
        assert lines[f"{device}.pci.ecam"] == "agrees"
        assert lines[f"{device}.pci.ecam.extended"] == "00000000"


def test_kernel_mode_sees_the_same(conformance_guest: Path, disks: Devices, tmp_path: Path) -> None:
    """The accesses of a driver at CPL 0, which some KVMs interpret, have the results of those at CPL 3."""
    (tmp_path / "user").mkdir()
    (tmp_path / "kernel").mkdir()
    user = parse(run_vmrun(conformance_guest, "rng", disks, tmp_path / "user"))
    assert parse(run_vmrun(conformance_guest, "rng cpl0", disks, tmp_path / "kernel")) == user


def test_the_comparison_finds_what_is_not_allowed() -> None:
    difference = next(entry for entry in DIFFERENCES if entry.name == "rng*.queue0.size")
    assert not compare({"rng0.modern.queue0.size": "8"}, {"rng0.modern.queue0.size": "64"})
    assert compare({"rng0.modern.queue0.size": "8"}, {"rng0.modern.queue0.size": "32"}) == [
        "rng0.modern.queue0.size: QEMU '8', vmrun '32'",
        f"rng*.queue0.size: does not differ any more ({difference.reason})",
    ]
    assert compare({"blk0.x": "1"}, {}) == ["blk0.x: QEMU '1', vmrun None"]
    assert all(entry.reason for entry in DIFFERENCES)
