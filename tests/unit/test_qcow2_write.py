"""Writing qcow2: whatever is done to an image, it reads like a bytearray, and QEMU finds it clean and the
same.
"""

import errno
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.block import qcow2_mapping, qcow2_refcounts, transfer
from devices.block.image import Image
from devices.block.open import open_image
from devices.block.qcow2 import Qcow2Image
from devices.block.qcow2_create import create_qcow2
from devices.errors import ImageError

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


def qemu_img(*arguments: str | Path) -> None:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def create(
    path: Path, size: int, cluster_size: int = 65536, version: int = 3, refcount_bits: int = 16
) -> None:
    with path.open("wb") as file:
        create_qcow2(file.fileno(), size, cluster_size, version, refcount_bits)


def open_qcow2(path: Path, backing: Image | None = None, read_only: bool = False) -> Qcow2Image:
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        image = open_image("qcow2", fd, read_only, backing)
    except BaseException:
        os.close(fd)
        raise
    assert isinstance(image, Qcow2Image)
    return image


def read(image: Image, offset: int, size: int) -> bytes:
    data = bytearray(b"\xee" * size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


class Model:
    """An image and the bytes it should have. A discard may zero or leave: the model takes that over."""

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path = path
        self.base = base
        self.image = self.open()
        self.bytes = bytearray(read(self.image, 0, self.image.size))

    def open(self) -> Qcow2Image:
        return open_qcow2(self.path, open_qcow2(self.base, read_only=True) if self.base else None)

    def step(self, operation: str, offset: int, size: int, seed: int) -> None:
        sectors = len(self.bytes) // 512
        offset = offset % sectors * 512
        size = min(size * 512, len(self.bytes) - offset)
        end = offset + size
        if operation == "write":
            data = memoryview(random.Random(seed).randbytes(size))
            cut = seed % (size + 1)
            self.image.writev(offset, [data[:cut], data[cut:]])
            self.bytes[offset:end] = data
        elif operation in ("zero", "unmap"):
            self.image.write_zeroes(offset, size, operation == "unmap")
            self.bytes[offset:end] = bytes(size)
        elif operation == "discard":
            self.image.discard(offset, size)
            after = read(self.image, offset, size)
            for start in range(0, size, 512):
                assert after[start : start + 512] in (
                    bytes(512),
                    self.bytes[offset + start : offset + start + 512],
                )
            self.bytes[offset:end] = after
        elif operation == "flush":
            self.image.flush()
        elif operation == "reopen":
            self.image.close()
            self.image = self.open()
        assert read(self.image, offset, size) == self.bytes[offset:end]

    def finish(self) -> None:
        assert read(self.image, 0, self.image.size) == self.bytes
        self.image.close()
        qemu_img("check", "-f", "qcow2", self.path)
        expected = self.path.with_suffix(".expected")
        expected.write_bytes(self.bytes)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", self.path, expected)


def scribble(model: Model, count: int, rng: random.Random) -> None:
    operations = ["write"] * 6 + ["zero", "unmap", "discard", "flush", "read", "reopen"]
    for _ in range(count):
        size = rng.choice([1, 8, 8, 8, rng.randrange(1, 400)])
        model.step(rng.choice(operations), rng.randrange(1 << 30), size, rng.randrange(1 << 30))


SHAPES = [
    (512, 2, 16),
    (512, 3, 1),
    (512, 3, 64),
    (1024, 3, 2),
    (2048, 3, 4),
    (4096, 3, 8),
    (8192, 2, 16),
    (16384, 3, 16),
    (65536, 2, 16),
    (65536, 3, 16),
    (1 << 20, 3, 32),
    (2 << 20, 3, 16),
]


@pytest.mark.parametrize(("cluster_size", "version", "refcount_bits"), SHAPES)
def test_scribble(tmp_path: Path, cluster_size: int, version: int, refcount_bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, (4 << 20) + 1536, cluster_size, version, refcount_bits)
    qemu_img("check", "-f", "qcow2", path)
    model = Model(path)
    scribble(model, 150, random.Random(cluster_size))
    model.finish()


@pytest.mark.slow
@pytest.mark.parametrize(("cluster_size", "version", "refcount_bits"), SHAPES)
def test_scribble_long(tmp_path: Path, cluster_size: int, version: int, refcount_bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, (40 << 20) + 1536, cluster_size, version, refcount_bits)
    model = Model(path)
    scribble(model, 5000, random.Random(cluster_size))
    model.finish()


@given(
    shape=st.sampled_from([(512, 2, 16), (512, 3, 2), (4096, 3, 16), (65536, 3, 16)]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(
                ["write", "write", "write", "zero", "unmap", "discard", "flush", "reopen", "read"]
            ),
            st.integers(0, 600),
            st.integers(0, 300),
            st.integers(0, 1 << 20),
        ),
        max_size=40,
    ),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence(
    tmp_path: Path, shape: tuple[int, int, int], steps: list[tuple[str, int, int, int]]
) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 600 * 512, *shape)
    model = Model(path)
    try:
        for step in steps:
            model.step(*step)
        model.finish()
    finally:
        model.image.close()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("tiny_caches", [False, True])
def test_scribble_over_a_qemu_image(
    tmp_path: Path, version: int, tiny_caches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed clusters, and caches so small that every step evicts and commits.

    Then the host cannot punch holes either: what was freed has stale data when it is used again.
    """
    if tiny_caches:
        monkeypatch.setattr(transfer, "_try_fallocate", lambda *_: False)
        for module in (qcow2_mapping, qcow2_refcounts):
            monkeypatch.setattr(module, "CACHE_BYTES", 0)
        monkeypatch.setattr(qcow2_mapping, "PENDING_LIMIT", 2)
    rng = random.Random(5)
    source, path = tmp_path / "source", tmp_path / "disk.qcow2"
    words = [rng.randbytes(8) for _ in range(50)]
    source.write_bytes(b"".join(rng.choice(words) for _ in range(1 << 18)) + bytes(1 << 20))
    options = f"cluster_size=1024,compat={'0.10' if version == 2 else '1.1'}"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, source, path)
    model = Model(path)
    assert model.bytes == source.read_bytes()
    scribble(model, 200, rng)
    model.finish()


@pytest.mark.parametrize("version", [2, 3])
def test_scribble_over_a_backing_file(tmp_path: Path, version: int) -> None:
    rng = random.Random(6)
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    create(base, 1 << 20, 4096)
    model = Model(base)
    scribble(model, 80, rng)
    model.finish()
    before = base.read_bytes()
    with path.open("wb") as file:
        create_qcow2(file.fileno(), 2 << 20, 16384, version, 16, str(base), "qcow2")
    model = Model(path, base)
    scribble(model, 200, rng)
    model.finish()
    assert base.read_bytes() == before


@pytest.mark.parametrize(("order", "mebibytes"), [(2, 34), (3, 18), (4, 9), (5, 6), (6, 7)])
def test_refcount_table_grows(tmp_path: Path, order: int, mebibytes: int) -> None:
    path = tmp_path / "disk.qcow2"
    size = mebibytes << 20
    create(path, size, 512, 3, 1 << order)
    before = struct.unpack(">QI", path.read_bytes()[48:60])
    image = open_qcow2(path)
    data = memoryview(os.urandom(1 << 20))
    for offset in range(0, size, 1 << 20):
        image.writev(offset, [data])
    image.close()
    assert struct.unpack(">QI", path.read_bytes()[48:60])[1] > before[1]
    qemu_img("check", "-f", "qcow2", path)
    image = open_qcow2(path, read_only=True)
    for offset in range(0, size, 1 << 20):
        assert read(image, offset, 1 << 20) == data
    image.close()


@pytest.mark.parametrize("refcount_bits", [16, 64])
def test_l1_grows_within_the_disk(tmp_path: Path, refcount_bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 256 << 20, 512, 3, refcount_bits)
    with path.open("r+b") as file:
        # QEMU refuses such an image; the format does not.
        file.seek(36)
        file.write((1).to_bytes(4, "big"))
    image = open_qcow2(path)
    assert read(image, 100 << 20, 512) == bytes(512)
    image.writev(100, [memoryview(b"first")])
    image.writev((256 << 20) - 5, [memoryview(b"final")])
    image.close()
    image = open_qcow2(path)
    assert read(image, 100, 5) == b"first"
    assert read(image, (256 << 20) - 5, 5) == b"final"
    image.close()
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True)
    # The table was shortened in the header only: what we cut off is leaked.
    assert done.returncode in (0, 3), done.stdout


def test_rewriting_takes_no_space(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 16 << 20)
    image = open_qcow2(path)
    for _ in range(20):
        image.writev(0, [memoryview(os.urandom(1 << 20))])
        image.flush()
        image.discard(0, 1 << 20)
        image.flush()
    image.close()
    assert path.stat().st_size < 3 << 20
    assert path.stat().st_blocks * 512 < 1 << 20


def test_dirty_image_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4096", path, "64M")
    # abort() leaves the image as a crash does: dirty, with refcounts that were never written.
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 20M", "-c", "flush", "-c", "abort", str(path)],
        capture_output=True,
    )
    assert done.returncode
    assert path.read_bytes()[79] & 1
    assert subprocess.run(["qemu-img", "check", path], capture_output=True).returncode == 2
    image = open_qcow2(path, read_only=True)
    assert read(image, 0, 20 << 20) == b"\x09" * (20 << 20)
    image.close()
    assert path.read_bytes()[79] & 1
    image = open_qcow2(path)
    assert not path.read_bytes()[79] & 1
    image.writev(30 << 20, [memoryview(b"x" * 8192)])
    assert read(image, 0, 20 << 20) == b"\x09" * (20 << 20)
    image.close()
    qemu_img("check", "-f", "qcow2", path)


def test_autoclear_features_are_cleared_before_writing(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "bitmap0")
    assert path.read_bytes()[95] & 1
    open_qcow2(path, read_only=True).close()
    assert path.read_bytes()[95] & 1
    open_qcow2(path).close()
    assert not path.read_bytes()[95] & 1


def test_no_space_left_fails_the_request_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 8 << 20)
    image = open_qcow2(path)
    image.writev(0, [memoryview(b"a" * 100_000)])
    with monkeypatch.context() as patch:

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "pwritev", full)
        with pytest.raises(OSError, match="No space"):
            image.writev(1 << 20, [memoryview(b"b" * 1000)])
        with pytest.raises(OSError, match="No space"):
            image.flush()
    assert read(image, 1 << 20, 1000) == bytes(1000)
    image.writev(2 << 20, [memoryview(b"c" * 1000)])
    image.close()
    qemu_img("check", "-f", "qcow2", path)
    image = open_qcow2(path)
    assert read(image, 0, 100_000) == b"a" * 100_000
    assert read(image, 2 << 20, 1000) == b"c" * 1000
    image.close()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1 << 20, 1000), "cluster size"),
        ((1 << 20, 256), "cluster size"),
        ((1 << 20, 4 << 20), "cluster size"),
        ((1 << 20, 65536, 4), "version"),
        ((1 << 20, 65536, 3, 128), "refcount bits"),
        ((1 << 20, 65536, 2, 8), "refcount bits"),
        ((-1,), "cannot be"),
        ((1 << 50, 512), "cannot be"),
        ((1 << 20, 512, 3, 16, "x" * 500), "too long"),
    ],
)
def test_create_refuses(tmp_path: Path, arguments: tuple[Any, ...], reason: str) -> None:
    path = tmp_path / "disk.qcow2"
    with path.open("wb") as file, pytest.raises(ImageError, match=reason):
        create_qcow2(file.fileno(), *arguments)
    assert path.stat().st_size == 0


def test_sizes_of_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    for size in (0, 512, 1 << 30, 1 << 44):
        create(path, size)
        qemu_img("check", "-f", "qcow2", path)
        image = open_qcow2(path)
        assert image.size == size
        if size:
            image.writev(size - 512, [memoryview(b"e" * 512)])
        image.close()
        qemu_img("check", "-f", "qcow2", path)
