"""Clusters compressed with zstd: as qemu-img makes them, damaged, and on a host without the library."""

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from devices.block import zstd
from devices.block.open import open_image
from devices.errors import ImageError

CLUSTER = 65536


def compress(data: bytes) -> bytes:
    library = ctypes.CDLL(zstd.LIBRARY)
    library.ZSTD_compress.restype = ctypes.c_size_t
    result = ctypes.create_string_buffer(len(data) + 1024)
    size = library.ZSTD_compress(result, ctypes.c_size_t(len(result)), data, ctypes.c_size_t(len(data)), 3)
    return result.raw[:size]


def skippable(size: int) -> bytes:
    return (0x184D2A50).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")
@pytest.mark.parametrize("cluster_size", ["512", "64k", "2M"])
def test_an_image_of_qemu(tmp_path: Path, cluster_size: str) -> None:
    rng = random.Random(1)
    data = b"".join(
        rng.choice([bytes(512), rng.randbytes(512), bytes([rng.randrange(256)]) * 512]) for _ in range(9000)
    )
    (tmp_path / "raw").write_bytes(data)
    path = tmp_path / "disk.qcow2"
    options = f"compression_type=zstd,cluster_size={cluster_size}"
    command = ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", options]
    subprocess.run([*command, tmp_path / "raw", path], check=True)
    image = open_image("qcow2", os.open(path, os.O_RDWR), False)
    found = bytearray(len(data))
    image.readv(0, [memoryview(found)])
    assert found == data
    image.writev(100 << 10, [memoryview(b"new" * 512)])
    image.readv(0, [memoryview(found)])
    assert found == data[: 100 << 10] + b"new" * 512 + data[(100 << 10) + 1536 :]
    image.close()
    subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_frames() -> None:
    data = bytes(range(256)) * 256
    assert zstd.decompress(compress(data) + b"what follows", CLUSTER) == data
    assert zstd.decompress(compress(data[:99]) + skippable(5) + compress(data[99:]), CLUSTER) == data
    assert zstd.decompress(compress(data[:99]), CLUSTER) == data[:99]
    assert zstd.decompress(b"", CLUSTER) == b""


@pytest.mark.parametrize(
    "stream",
    [
        b"\xff" * 500,
        b"\0" * 500,
        compress(os.urandom(CLUSTER))[:-1],
        compress(bytes(64 << 20)),
        compress(bytes(CLUSTER + 1)),
        compress(b"x" * 99) + b"garbage",
        b"\x50\x2a\x4d\x18\xf0\xff\xff\xff",
    ],
    ids=range(7),
)
def test_broken(stream: bytes) -> None:
    with pytest.raises(ValueError, match="zstd frame"):
        zstd.decompress(stream, CLUSTER)


def test_any_bytes() -> None:
    rng = random.Random(2)
    good = compress(rng.randbytes(3000) + bytes(3000) + bytes(range(256)) * 40)
    survived = 0
    for _ in range(3000):
        stream = bytearray(good)
        for _ in range(rng.choice([1, 2, 8])):
            stream[rng.randrange(len(stream) if rng.random() < 0.5 else 40)] = rng.randrange(256)
        try:
            survived += len(zstd.decompress(bytes(stream), CLUSTER)) <= CLUSTER
        except ValueError:
            pass
    assert survived


def test_a_host_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zstd, "LIBRARY", "libzstd-that-is-not-there.so.1")
    monkeypatch.setattr(zstd, "_loaded", [])
    with pytest.raises(ImageError, match="install libzstd"):
        zstd.load()
