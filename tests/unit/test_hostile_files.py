"""Files that somebody made to hurt whoever opens them: names, sizes and counts that make no sense."""

import gzip
import os
from pathlib import Path

import pytest

from tests.unit.boot_images import bzimage, cpio
from vmrun.boot.bzimage import extract_kernel, read_setup_header
from vmrun.boot.image import FileImage, MemoryImage
from vmrun.boot.initramfs import unpack
from vmrun.cli import one_line
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.disks import Disks
from vmrun.machine.config import DiskConfig

MIB = 1 << 20


class WatchedImage:
    """Says how much was read of the image at once."""

    name = "initramfs test"

    def __init__(self, image: FileImage) -> None:
        self._image = image
        self.size = image.size
        self.most = 0

    def read(self, offset: int, size: int) -> bytes:
        self.most = max(self.most, size)
        assert size <= 64 * MIB, "a hole of many TiB would be read into memory"
        return self._image.read(offset, size)

    def read_into(self, offset: int, view: memoryview) -> None:
        self._image.read_into(offset, view)


def test_a_compressed_initramfs_with_a_huge_hole_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(gzip.compress(os.urandom(100)))
    os.truncate(path, 1 << 40)
    with FileImage(path, "initramfs") as image:
        watched = WatchedImage(image)
        with pytest.raises(UserError, match="no cpio archive") as refused:
            unpack(watched, 2 * MIB)
    assert refused.value.code == EXIT_IMAGE
    assert watched.most >= MIB, "it was read at all"


def test_an_archive_that_does_not_compress_still_fits() -> None:
    archive = cpio({"noise": os.urandom(3 * MIB)})
    packed = gzip.compress(archive, 0)
    assert len(packed) > len(archive)
    assert unpack(MemoryImage("initramfs test", packed), len(archive)).size == len(archive)


def test_an_initramfs_of_a_million_archives() -> None:
    one = gzip.compress(cpio({}))
    assert unpack(MemoryImage("initramfs test", one * 64), MIB).size
    with pytest.raises(UserError, match="more than 64 compressed archives"):
        unpack(MemoryImage("initramfs test", one * 65), MIB)


def test_a_kernel_whose_payload_is_a_huge_hole(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(b"\x1f\x8b", payload_length=0xFFFF_0000))
    os.truncate(path, 1 << 33)
    with FileImage(path, "kernel") as image:
        header = read_setup_header(image)
        with pytest.raises(UserError, match="more than 512 MiB"):
            extract_kernel(image, header)


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_no_disk_is_not_opened(
    read_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a watchdog starts it: an image that calls it its backing file would restart the host."""
    path = tmp_path / "watchdog.raw"
    os.mkfifo(path)
    opened: list[object] = []
    real = os.open

    def watch(name: str, flags: int, mode: int = 0o777) -> int:
        opened.append(name)
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", watch)
    with pytest.raises(UserError, match="not a file and not a block device"):
        Disks([DiskConfig(path, "raw", read_only)])
    assert path not in opened


@pytest.mark.parametrize("name", ["/proc/self/mem", "/proc/self/environ", "/sys/kernel/notes"])
def test_the_kernels_files_are_no_disks(name: str) -> None:
    """As a backing file the first would give a worker the memory of the VMM."""
    with pytest.raises(UserError, match="the kernel's"):
        Disks([DiskConfig(Path(name), "raw", read_only=True)])


@pytest.mark.parametrize("hostile", ["\x1b]0;x\x07", "\x9b2J", "\u202e", "\x7f"])
def test_no_text_of_an_image_steers_the_terminal(hostile: str) -> None:
    line = one_line(UserError(f"disk x: its backing file a{hostile}b: no such file"))
    assert line.isprintable()
    assert line.startswith("disk x: its backing file a\\") and line.endswith("b: no such file")
    assert one_line(UserError("disk ä.qcow2: no such file")) == "disk ä.qcow2: no such file"
