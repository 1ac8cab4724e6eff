"""Linux mounts an ISO from the virtio-scsi CD-ROM, reads it byte for byte, ejects it and loads it again."""

import errno
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from devices.scsi.sense import CHECK_CONDITION
from tests.guest.conftest import Boot, Build, MakeInitramfs, boot
from vmrun.errors import EXIT_IMAGE
from vmrun.guestkit import kit

IOCTLS = Path(__file__).with_name("cdrom_ioctls.c")
LONG_NAME = "A name of more than eight characters.text"
SCRIPT = f"""#!/bin/sh
mount -t iso9660 -o ro /dev/sr0 /tmp
ls -1 /tmp
cat "/tmp/deep/{LONG_NAME}"
md5sum /tmp/random.bin
umount /tmp
md5sum /dev/sr0
/cdrom_ioctls
"""
TIMEOUT = 240.0

# linux/cdrom.h
CDS_TRAY_OPEN = 2
CDS_DISC_OK = 4
CDS_DATA_1 = 101


@pytest.fixture(scope="module")
def iso(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("iso")
    tree, path = folder / "tree", folder / "x.iso"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / LONG_NAME).write_text("hello from the disc\n")
    (tree / "empty").touch()
    (tree / "random.bin").write_bytes(os.urandom((1 << 20) + 1))
    subprocess.run(["genisoimage", "-quiet", "-J", "-R", "-V", "VMRUN", "-o", path, tree], check=True)
    return path


@pytest.fixture(scope="module")
def booted(
    iso: Path,
    guest_kit: kit.GuestKit,
    static_program: Build,
    initramfs: MakeInitramfs,
    tmp_path_factory: pytest.TempPathFactory,
) -> Boot:
    """The one boot that all tests here look at: the kit's programs, and ours beside them."""
    ours = initramfs({"check.sh": SCRIPT.encode(), "cdrom_ioctls": static_program([IOCTLS], "cdrom_ioctls")})
    both = tmp_path_factory.mktemp("cdrom") / "initramfs.cpio"
    both.write_bytes(guest_kit.initramfs.read_bytes() + ours.read_bytes())
    return boot("--cdrom", iso, "--initrd", both, "--append", "vmrun.run=/check.sh", timeout=TIMEOUT)


def test_the_guest_ended_well(booted: Boot) -> None:
    assert booted.code == 0, booted.stderr + booted.console
    assert "vmrun guest: exit 0" in booted.console


def test_file_names_and_contents(booted: Boot, iso: Path) -> None:
    lines = booted.console.splitlines()
    assert {"deep", "empty", "random.bin", "hello from the disc"} <= set(lines)
    digest = hashlib.md5((iso.parent / "tree" / "random.bin").read_bytes()).hexdigest()
    assert f"{digest}  /tmp/random.bin" in lines


def test_the_whole_disc(booted: Boot, iso: Path) -> None:
    assert f"{hashlib.md5(iso.read_bytes()).hexdigest()}  /dev/sr0" in booted.console.splitlines()


@pytest.mark.parametrize(
    "line",
    [
        f"drive: {CDS_DISC_OK} error 0",
        f"disc: {CDS_DATA_1} error 0",
        "session: 0 error 0",
        "toc: 0 error 0",
        "tracks: 1 to 1",
        "entry: 0 error 0",
        "lock: 0 error 0",
        f"eject locked: {CHECK_CONDITION} error 0",  # Linux hands the SCSI status through
        "unlock: 0 error 0",
        "eject: 0 error 0",
        f"drive ejected: {CDS_TRAY_OPEN} error 0",
        f"open ejected: -1 error {errno.ENOMEDIUM}",
        "load: 0 error 0",
        f"drive loaded: {CDS_DISC_OK} error 0",
        "reset: 0 error 0",
        "read: 2048",
    ],
)
def test_drive_requests(booted: Boot, line: str) -> None:
    assert line in booted.console.splitlines()


def test_the_lead_out_is_the_end(booted: Boot, iso: Path) -> None:
    assert f"lead-out: {iso.stat().st_size // 2048}" in booted.console.splitlines()


def test_an_image_that_cannot_be(tmp_path: Path, guest_kit: kit.GuestKit) -> None:
    empty = tmp_path / "empty.iso"
    empty.touch()
    for path, text in ((empty, "the file is empty"), (tmp_path / "missing.iso", "no such file")):
        ended = boot("--cdrom", path, timeout=TIMEOUT)
        assert (ended.code, ended.console) == (EXIT_IMAGE, "")
        assert text in ended.stderr
