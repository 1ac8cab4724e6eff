"""Disks that grow under a guest: what is new reads as zeroes, and dying on the way leaves the old or the new
disk.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from devices.block.image import Image
from devices.block.open import open_image
from devices.block.qcow2_create import create_qcow2
from devices.errors import ImageError
from tests.unit.qcow2_writer import assert_at_most_leaks

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


def open_path(path: Path, backing: Path | None = None, journal: int | None = None) -> Image:
    fmt = "raw" if path.suffix == ".raw" else "qcow2"
    below = open_image("raw", os.open(backing, os.O_RDONLY), True) if backing else None
    return open_image(fmt, os.open(path, os.O_RDWR), False, below, journal)


def read(image: Image, offset: int, size: int) -> bytes:
    data = bytearray(b"\xee" * size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


def test_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"a" * 1000)
    image = open_path(path)
    image.grow(4096)
    assert image.size == path.stat().st_size == 4096
    assert read(image, 0, 4096) == b"a" * 1000 + bytes(3096)
    image.writev(3584, [memoryview(b"b" * 512)])
    image.grow(4096)
    # Somebody made the file longer already.
    os.truncate(path, 10000)
    image.grow(8192)
    assert read(image, 3584, 1024) == b"b" * 512 + bytes(512)
    image.close()
    assert path.stat().st_size == 10000


@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_only_larger_and_only_whole_sectors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"disk.{suffix}"
    with path.open("wb") as file:
        create_qcow2(file.fileno(), 65536) if suffix == "qcow2" else file.truncate(65536)
    image = open_path(path)
    for size in (0, 65024, 65537, -512):
        with pytest.raises(ImageError, match="cannot grow"):
            image.grow(size)
    if suffix == "qcow2":
        for size in (1 << 60, 1 << 64):
            with pytest.raises(ImageError, match="cannot have"):
                image.grow(size)
    assert image.size == 65536
    image.close()
    fmt = "raw" if suffix == "raw" else "qcow2"
    image = open_image(fmt, os.open(path, os.O_RDONLY), True)
    with pytest.raises(OSError, match="read-only"):
        image.grow(1 << 20)
    image.close()


@needs_qemu
@pytest.mark.parametrize(("cluster_size", "version"), [(512, 3), (4096, 2), (65536, 3)])
@pytest.mark.parametrize("backed", [False, True])
def test_qcow2(tmp_path: Path, cluster_size: int, version: int, backed: bool) -> None:
    """The backing file is longer than the disk was: its end must not show up."""
    before, after = 300 * 512, 6 << 20
    path = tmp_path / "disk.qcow2"
    base = tmp_path / "base.raw" if backed else None
    if base:
        base.write_bytes(b"b" * (1 << 20))
    with path.open("wb") as file:
        name, fmt = (str(base), "raw") if base else (None, None)
        create_qcow2(file.fileno(), before, cluster_size, version, 16, name, fmt)
    image = open_path(path, base)
    image.writev(before - 512, [memoryview(b"x" * 512)])
    image.grow(after)
    assert image.size == after
    old = (b"b" if backed else b"\0") * (before - 512) + b"x" * 512
    assert read(image, 0, before) == old
    assert read(image, before, after - before) == bytes(after - before)
    image.writev(after - 512, [memoryview(b"y" * 512)])
    image.close()
    raw = tmp_path / "as-qemu-sees-it"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    assert raw.read_bytes() == old + bytes(after - before - 512) + b"y" * 512
    assert_at_most_leaks(path)


@needs_qemu
def test_what_lies_past_the_old_end_is_hidden(tmp_path: Path) -> None:
    """Another program may have left something in the rest of the last cluster."""
    path = tmp_path / "disk.qcow2"
    with path.open("wb") as file:
        create_qcow2(file.fileno(), 1 << 20)
    image = open_path(path)
    image.writev(0, [memoryview(b"x" * 65536)])
    image.close()
    with path.open("r+b") as file:
        file.seek(24)
        file.write((1024).to_bytes(8, "big"))
    image = open_path(path)
    image.grow(65536 * 2)
    assert read(image, 0, 65536 * 2) == b"x" * 1024 + bytes(65536 * 2 - 1024)
    image.close()
    assert_at_most_leaks(path)


class Killed(BaseException):
    pass


@needs_qemu
def test_killed_while_growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every write: the next worker has the old disk or the new one, and all of the data."""
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.raw"
    before, after = 63 * 512, 4 << 20
    base.write_bytes(b"b" * (1 << 20))
    pwritev = os.pwritev
    sizes = set()
    for last in range(1, 1000):
        with path.open("wb") as file:
            create_qcow2(file.fileno(), before, 512, backing_file=str(base), backing_format="raw")
        journal = os.memfd_create("journal")
        os.ftruncate(journal, 4096)
        image = open_path(path, base, os.dup(journal))
        image.writev(1024, [memoryview(b"x" * 512)])
        writes = 0

        def write(fd: int, buffers: list[memoryview], offset: int, last: int = last) -> int:
            nonlocal writes
            writes += 1
            if writes == last:
                raise Killed
            return pwritev(fd, buffers, offset)

        finished = True
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", write)
            try:
                image.grow(after)
            except Killed:
                finished = False
                assert image.size == before
        os.close(image._file.fd)  # type: ignore[attr-defined]
        image._file.journal.close()  # type: ignore[attr-defined]
        image.backing.close()  # type: ignore[attr-defined]
        image = open_path(path, base, journal)
        sizes.add(image.size)
        assert image.size == (after if finished else before)
        assert read(image, 0, before) == b"b" * 1024 + b"x" * 512 + b"b" * (before - 1536)
        image.grow(after)
        assert read(image, before, after - before) == bytes(after - before)
        image.close()
        if last % 8 == 1 or finished:
            assert_at_most_leaks(path)
        if finished:
            break
    assert sizes == {before, after}
