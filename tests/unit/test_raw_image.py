"""Raw images: whole and split transfers, the end of the file, holes, and host errors that must not be
forgotten.
"""

import errno
import os
from pathlib import Path

import pytest

from devices.block import transfer
from devices.block.image import Image
from devices.block.open import open_image
from devices.errors import ImageError


def open_raw(path: Path, read_only: bool = False) -> Image:
    return open_image("raw", os.open(path, os.O_RDONLY if read_only else os.O_RDWR), read_only)


def read(image: Image, offset: int, size: int) -> bytes:
    data = bytearray(b"\xee" * size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * 64)
    image = open_raw(path)
    assert image.size == 16384
    first, second = bytearray(100), bytearray(412)
    image.readv(512, [memoryview(first), memoryview(second)])
    assert bytes(first + second) == (bytes(range(256)) * 2)
    image.writev(1024, [memoryview(b"a" * 10), memoryview(b"b" * 502)])
    image.flush()
    image.close()
    image.close()
    assert path.read_bytes()[1024:1536] == b"a" * 10 + b"b" * 502


def test_more_buffers_than_one_system_call_takes(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(8192))
    image = open_raw(path)
    pattern = os.urandom(3000)
    image.writev(5, [memoryview(pattern[start : start + 1]) for start in range(3000)])
    data = bytearray(3000)
    view = memoryview(data)
    image.readv(5, [view[start : start + 1] for start in range(3000)])
    image.close()
    assert bytes(data) == pattern


def test_short_transfers_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    image = open_raw(path)
    preadv, pwritev = os.preadv, os.pwritev

    def short(buffers: list[memoryview]) -> list[memoryview]:
        return transfer.slice_buffers(buffers, 0, 7)

    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, short(buffers), offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, short(buffers), offset))
    pattern = os.urandom(2048)
    image.writev(512, [memoryview(pattern)[:5], memoryview(pattern)[5:]])
    data = bytearray(2048)
    image.readv(512, [memoryview(data)[:1000], memoryview(data)[1000:]])
    image.close()
    assert bytes(data) == pattern


def test_a_partial_last_sector_reads_as_zeroes_and_may_be_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 700)
    image = open_raw(path)
    assert image.size == 1024
    assert read(image, 512, 512) == b"x" * 188 + bytes(324)
    image.writev(512, [memoryview(b"y" * 512)])
    image.close()
    assert path.read_bytes() == b"x" * 512 + b"y" * 512


def test_an_image_cut_short_behind_our_back_is_an_error_not_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 8192)
    image = open_raw(path)
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="shorter"):
        read(image, 2048, 4096)
    image.close()


def test_requests_outside_the_disk_fail(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    image = open_raw(path)
    for offset, size in ((4096, 1), (-512, 512), (1 << 64, 512), (0, 4608)):
        with pytest.raises(ImageError):
            read(image, offset, size)
        with pytest.raises(ImageError):
            image.writev(offset, [memoryview(bytes(size))])
        with pytest.raises(ImageError):
            image.discard(offset, size)
        with pytest.raises(ImageError):
            image.write_zeroes(offset, size, True)
    image.close()
    assert path.stat().st_size == 4096


def test_read_only_refuses_every_change(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    image = open_raw(path, read_only=True)
    for change in (
        lambda: image.writev(0, [memoryview(b"x")]),
        lambda: image.discard(0, 512),
        lambda: image.write_zeroes(0, 512, False),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    image.flush()
    image.close()


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_read_as_zeroes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holes: bool, unmap: bool
) -> None:
    if not holes:
        monkeypatch.setattr(transfer, "_try_fallocate", lambda *_: False)
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * (3 << 20))
    image = open_raw(path)
    image.write_zeroes(512, (2 << 20) + 512, unmap)
    assert read(image, 0, 3 << 20) == b"x" * 512 + bytes((2 << 20) + 512) + b"x" * ((1 << 20) - 1024)
    image.close()
    assert path.stat().st_size == 3 << 20


def test_discard_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(1 << 20))
    image = open_raw(path)
    image.flush()
    before = path.stat().st_blocks
    image.discard(65536, 524288)
    image.close()
    assert path.stat().st_blocks <= before - 1000
    assert path.stat().st_size == 1 << 20


def test_a_failed_flush_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    image = open_raw(path)
    with monkeypatch.context() as patch:

        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "write-back failed")

        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="write-back failed"):
            image.flush()
    with pytest.raises(OSError, match="earlier flush"):
        image.flush()
    with pytest.raises(OSError, match="earlier flush"):
        image.close()


def test_formats_are_stated(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"QFI\xfb" + bytes(4092))
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(ImageError, match="unknown"):
        open_image("vmdk", fd, False)
    image = open_image("raw", fd, False)
    assert read(image, 0, 4) == b"QFI\xfb"
    with pytest.raises(ImageError, match="no backing file"):
        open_image("raw", fd, True, image)
    image.close()
