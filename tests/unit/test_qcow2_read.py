"""Images that qemu-img made, of every shape, are read right: compared with what QEMU itself reads."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from devices.block.image import Image
from devices.block.open import open_image
from devices.errors import ImageError

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None, reason="qemu-utils is not installed"
)


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def qemu_io(path: Path, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-d", "unmap", "-f", "qcow2", *arguments, str(path)], check=True, capture_output=True
    )


def raw_of(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def open_qcow2(path: Path, read_only: bool = True, backing: Image | None = None) -> Image:
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        return open_image("qcow2", fd, read_only, backing)
    except BaseException:
        os.close(fd)
        raise


def read(image: Image, offset: int, size: int) -> bytes:
    data = bytearray(b"\xee" * size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


def assert_reads(image: Image, expected: bytes, rng: random.Random) -> None:
    assert image.size == len(expected)
    assert read(image, 0, image.size) == expected
    for _ in range(50):
        offset = rng.randrange(image.size)
        size = rng.randrange(min(200_000, image.size - offset) + 1)
        cut = rng.randrange(size + 1)
        first, second = bytearray(cut), bytearray(size - cut)
        image.readv(offset, [memoryview(first), memoryview(second)])
        assert bytes(first + second) == expected[offset : offset + size]


def scribble(path: Path, size: int, cluster_size: int, version: int, rng: random.Random) -> None:
    """Every kind of cluster the version has, in random places.

    Compressed ones come first: they need empty clusters.
    """
    commands = []
    clusters = size // cluster_size
    for cluster in sorted(rng.sample(range(clusters), min(clusters, 12))):
        commands.append(f"write -c -P {rng.randrange(1, 255)} {cluster * cluster_size} {cluster_size}")
    for _ in range(16):
        offset = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 4096, cluster_size, 3 * cluster_size, 65536]), size - offset)
        kind = rng.choice(["write", "write", "write -z", "write -z -u", "discard"])
        if kind == "write":
            kind = f"write -P {rng.randrange(1, 255)}"
        elif version == 2:
            kind = "discard"
        commands.append(f"{kind} {offset} {length}")
    qemu_io(path, *commands)


SHAPES = [(1 << bits, 3, 16) for bits in range(9, 22)]
SHAPES += [(1 << bits, 2, 16) for bits in range(9, 22)]
SHAPES += [(4096, 3, 1 << order) for order in range(7) if order != 4]


@pytest.mark.parametrize(("cluster_size", "version", "refcount_bits"), SHAPES)
def test_every_shape(tmp_path: Path, cluster_size: int, version: int, refcount_bits: int) -> None:
    rng = random.Random(cluster_size + version)
    path = tmp_path / "disk.qcow2"
    size = max(2 << 20, 3 * cluster_size) + 512 * 3
    options = f"cluster_size={cluster_size},compat={'0.10' if version == 2 else '1.1'}"
    qemu_img("create", "-f", "qcow2", "-o", f"{options},refcount_bits={refcount_bits}", path, str(size))
    scribble(path, size, cluster_size, version, rng)
    image = open_qcow2(path)
    assert_reads(image, raw_of(path), rng)
    image.close()
    # The same through an image that is writable: its tables are checked more strictly.
    image = open_qcow2(path, read_only=False)
    assert_reads(image, raw_of(path), rng)
    image.close()


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_compressed(tmp_path: Path, cluster_size: int) -> None:
    rng = random.Random(7)
    source = tmp_path / "source"
    words = [rng.randbytes(8) for _ in range(50)]
    content = b"".join(rng.choice(words) for _ in range(300_000))
    content += rng.randbytes(100_000) + bytes(3 << 20)
    source.write_bytes(content[: len(content) // 512 * 512])
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster_size}", source, path)
    check = subprocess.run(["qemu-img", "check", "--output=json", path], check=True, capture_output=True)
    assert json.loads(check.stdout)["compressed-clusters"] > 0
    image = open_qcow2(path)
    assert_reads(image, source.read_bytes(), rng)
    image.close()


def test_preallocated(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "preallocation=metadata", path, "3M")
    qemu_io(path, "write -P 5 70000 1000")
    image = open_qcow2(path, read_only=False)
    assert_reads(image, raw_of(path), random.Random(1))
    image.close()


def test_backing_file_shorter_than_the_disk(tmp_path: Path) -> None:
    rng = random.Random(3)
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", base, "1000448")
    scribble(base, 1000448, 65536, 3, rng)
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=16k", "-b", base, "-F", "qcow2", path, "2M")
    scribble(path, 2 << 20, 16384, 3, rng)
    with pytest.raises(ImageError, match="needs its backing file"):
        open_qcow2(path)
    image = open_qcow2(path, backing=open_qcow2(base))
    assert image.header.backing_file == str(base)  # type: ignore[attr-defined]
    assert image.header.backing_format == "qcow2"  # type: ignore[attr-defined]
    assert_reads(image, raw_of(path), rng)
    image.close()


def test_snapshots_are_read_but_not_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "2M")
    qemu_io(path, "write -P 5 70000 100000")
    qemu_img("snapshot", "-c", "before", path)
    qemu_io(path, "write -P 6 100000 1000")
    image = open_qcow2(path)
    assert_reads(image, raw_of(path), random.Random(1))
    image.close()
    with pytest.raises(ImageError, match="1 internal snapshots"):
        open_qcow2(path, read_only=False)
    qemu_img("snapshot", "-d", "before", path)
    image = open_qcow2(path, read_only=False)
    image.writev(70000, [memoryview(b"z" * 100000)])
    image.close()
    subprocess.run(["qemu-img", "check", path], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("extended_l2=on", "extended L2"),
        ("data_file=FILE", "external data file"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, options: str, reason: str) -> None:
    path = tmp_path / "disk.qcow2"
    options = options.replace("FILE", str(tmp_path / "data"))
    qemu_img("create", "-f", "qcow2", "-o", options, path, "2M")
    with pytest.raises(ImageError, match=reason):
        open_qcow2(path)
