"""Damaged and hostile images: an ImageError or right data, never another exception, a hang or much memory."""

import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest

from devices.block.image import Image
from devices.block.open import open_image
from devices.block.qcow2_create import create_qcow2
from devices.block.qcow2_header import Header
from devices.errors import ImageError

CLUSTER = 4096
SIZE = 8 << 20
# Where create_qcow2 puts things for these values, and what the guest wrote then takes.
REFCOUNT_TABLE = CLUSTER
REFCOUNT_BLOCK = 2 * CLUSTER
L1_TABLE = 3 * CLUSTER
COPIED = 1 << 63
COMPRESSED = 1 << 62


def open_qcow2(path: Path, read_only: bool = False) -> Image:
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        return open_image("qcow2", fd, read_only)
    except BaseException:
        os.close(fd)
        raise


def read(image: Image, offset: int, size: int) -> bytes:
    data = bytearray(b"\xee" * size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def u64_at(path: Path, offset: int) -> int:
    return int.from_bytes(path.read_bytes()[offset : offset + 8], "big")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk whose first 16 clusters are "a", with one L2 table."""
    path = tmp_path / "disk.qcow2"
    with path.open("wb") as file:
        create_qcow2(file.fileno(), SIZE, CLUSTER)
    image = open_qcow2(path)
    image.writev(0, [memoryview(b"a" * 16 * CLUSTER)])
    image.close()
    return path


def l2_table(path: Path) -> int:
    return u64_at(path, L1_TABLE) & ~COPIED


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (0, b"QFI\xfa", "not a qcow2"),
        (4, struct.pack(">I", 1), "version 1"),
        (4, struct.pack(">I", 4), "version 4"),
        (8, struct.pack(">QI", 4090, 100), "outside the first cluster"),
        (8, struct.pack(">QI", 200, 2000), "outside the first cluster"),
        (8, struct.pack(">QI", 1 << 60, 10), "outside the first cluster"),
        (8, struct.pack(">QI", 200, 4), "zero byte"),
        (20, struct.pack(">I", 8), "cluster_bits 8"),
        (20, struct.pack(">I", 22), "cluster_bits 22"),
        (20, struct.pack(">I", 0xFFFFFFFF), "cluster_bits"),
        (24, struct.pack(">Q", 1 << 63), "too large"),
        (24, struct.pack(">Q", 0xFFFFFFFFFFFFFFFF), "too large"),
        (24, struct.pack(">Q", 1 << 50), "too large"),
        (32, struct.pack(">I", 1), "encrypted"),
        (36, struct.pack(">I", 0xFFFFFFFF), "L1 table of"),
        (36, struct.pack(">I", 1 << 20), "outside the file"),
        (40, struct.pack(">Q", L1_TABLE + 8), "misaligned"),
        (40, struct.pack(">Q", 0), "misaligned"),
        (40, struct.pack(">Q", 1 << 40), "outside the file"),
        (40, struct.pack(">Q", REFCOUNT_TABLE), "overlaps"),
        (40, struct.pack(">Q", REFCOUNT_BLOCK), "overlaps"),
        (48, struct.pack(">Q", 0), "misaligned"),
        (48, struct.pack(">Q", 1 << 62), "outside the file"),
        (48, struct.pack(">Q", 0xFFFFFFFFFFFFF000), "outside the file"),
        (56, struct.pack(">I", 0), "no refcount table"),
        (56, struct.pack(">I", 1 << 31), "refcount table of"),
        (60, struct.pack(">I", 1), "internal snapshots"),
        (72, struct.pack(">Q", 1 << 1), "marked corrupt"),
        (72, struct.pack(">Q", 1 << 2), "external data file"),
        (72, struct.pack(">Q", 1 << 3), "contradict"),
        (72, struct.pack(">Q", 1 << 4), "extended L2"),
        (72, struct.pack(">Q", 1 << 5), "unknown"),
        (72, struct.pack(">Q", 1 << 63), "unknown"),
        (96, struct.pack(">I", 7), "refcount_order 7"),
        (100, struct.pack(">I", 100), "header_length"),
        (100, struct.pack(">I", 108), "header_length"),
        (100, struct.pack(">I", 8192), "header_length"),
        (104, struct.pack(">II", 1, 5000), "too long"),
        (REFCOUNT_TABLE, struct.pack(">Q", REFCOUNT_BLOCK + 512), "makes no sense"),
        (REFCOUNT_TABLE, struct.pack(">Q", REFCOUNT_BLOCK + 1), "makes no sense"),
        (REFCOUNT_TABLE, struct.pack(">Q", L1_TABLE), "overlaps"),
        (REFCOUNT_TABLE, struct.pack(">Q", 1 << 60), "outside the file"),
        (REFCOUNT_TABLE + 8, struct.pack(">Q", REFCOUNT_BLOCK), "overlaps"),
        (L1_TABLE, struct.pack(">Q", COPIED | 1 << 58 | 4 * CLUSTER), "makes no sense"),
        (L1_TABLE, struct.pack(">Q", COPIED | 512), "makes no sense"),
        (L1_TABLE, struct.pack(">Q", COPIED), "makes no sense"),
        (L1_TABLE, struct.pack(">Q", COPIED | 1 << 50), "outside the file"),
        (L1_TABLE, struct.pack(">Q", COPIED | REFCOUNT_TABLE), "overlaps"),
        (L1_TABLE, struct.pack(">Q", COPIED | L1_TABLE), "overlaps"),
    ],
)
def test_refused_when_opened(path: Path, offset: int, data: bytes, reason: str) -> None:
    patch(path, offset, data)
    before = path.read_bytes()
    with pytest.raises(ImageError, match=reason) as caught:
        open_qcow2(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_one_l2_table_for_two_l1_entries(path: Path) -> None:
    patch(path, L1_TABLE + 8, struct.pack(">Q", COPIED | l2_table(path)))
    with pytest.raises(ImageError, match="overlaps"):
        open_qcow2(path)


@pytest.mark.parametrize("length", [0, 3, 71, 100, 4096, 12288, 16384])
def test_cut_off(path: Path, length: int) -> None:
    os.truncate(path, length)
    with pytest.raises(ImageError):
        open_qcow2(path)


L2_ENTRIES = [
    (COPIED | 0, None),  # no offset: unallocated, as QEMU has it
    (COPIED | 1 << 56, "makes no sense"),
    (COPIED | 1 << 61 | 8 * CLUSTER, "makes no sense"),
    (COPIED | 8 * CLUSTER | 2, "makes no sense"),
    (COPIED | 8 * CLUSTER | 256, "makes no sense"),
    (COPIED | 8 * CLUSTER + 512, "makes no sense"),
    (COPIED | 1 << 40, "outside the file"),
    (COPIED | 0x00FFFFFFFFFFF000, "outside the file"),
    (COPIED | REFCOUNT_TABLE, "holds metadata"),
    (COPIED | REFCOUNT_BLOCK, "holds metadata"),
    (COPIED | L1_TABLE, "holds metadata"),
    (L1_TABLE, "holds metadata"),
    (COPIED | L1_TABLE | 1, "holds metadata"),
    (COMPRESSED, "holds metadata"),
    (COMPRESSED | L1_TABLE + 7, "holds metadata"),
    (COMPRESSED | 1 << 57, "outside the file"),
    (COMPRESSED | COPIED | 8 * CLUSTER, "to be written in place"),
]


@pytest.mark.parametrize(("entry", "reason"), L2_ENTRIES)
@pytest.mark.parametrize("request_kind", ["read", "write", "discard", "zero"])
def test_l2_entry(path: Path, entry: int, reason: str | None, request_kind: str) -> None:
    table = l2_table(path)
    patch(path, table + 8, struct.pack(">Q", entry))
    metadata = path.read_bytes()[: 4 * CLUSTER]
    image = open_qcow2(path)

    def request() -> None:
        if request_kind == "read":
            assert read(image, 0, 2 * CLUSTER) == b"a" * CLUSTER + bytes(CLUSTER)
        elif request_kind == "write":
            image.writev(0, [memoryview(b"b" * 2 * CLUSTER)])
        elif request_kind == "discard":
            image.discard(0, 2 * CLUSTER)
        else:
            image.write_zeroes(0, 2 * CLUSTER, True)

    if reason is None:
        request()
        image.close()
        return
    with pytest.raises(ImageError, match=reason):
        request()
    # Marked, read-only, and no table touched.
    assert path.read_bytes()[79] == 2
    assert image.read_only
    with pytest.raises(ImageError, match="damaged"):
        image.writev(4 * CLUSTER, [memoryview(b"c")])
    assert read(image, 3 * CLUSTER, CLUSTER) == b"a" * CLUSTER
    try:
        image.close()
    except ImageError as error:
        assert "last writes are lost" in str(error)
    patch(path, 79, b"\0")
    assert path.read_bytes()[: 4 * CLUSTER] == metadata


def test_read_only_images_are_not_marked(path: Path) -> None:
    patch(path, l2_table(path), struct.pack(">Q", COPIED | L1_TABLE))
    before = path.read_bytes()
    image = open_qcow2(path, read_only=True)
    with pytest.raises(ImageError, match="holds metadata"):
        read(image, 0, 512)
    image.close()
    assert path.read_bytes() == before


def test_corrupt_images_are_readable(path: Path) -> None:
    patch(path, 72, struct.pack(">Q", 2))
    image = open_qcow2(path, read_only=True)
    assert read(image, 0, CLUSTER) == b"a" * CLUSTER
    image.close()


@pytest.mark.parametrize("cluster", [0, 1, 2, 3, 20])
def test_metadata_without_a_refcount_is_not_handed_out(path: Path, cluster: int) -> None:
    """An image that says its own tables are free would have the guest write over them."""
    assert l2_table(path) == 20 * CLUSTER
    patch(path, REFCOUNT_BLOCK + 2 * cluster, b"\0\0")
    metadata = path.read_bytes()[: 4 * CLUSTER]
    image = open_qcow2(path)
    with pytest.raises(ImageError, match="holds metadata"):
        image.writev(1 << 20, [memoryview(b"x" * 64 * CLUSTER)])
    image.close()
    patch(path, 79, b"\0")
    assert path.read_bytes()[: 4 * CLUSTER] == metadata


def test_a_cluster_with_two_owners_is_copied_before_it_is_written(path: Path) -> None:
    data = u64_at(path, l2_table(path)) & ~COPIED
    patch(path, l2_table(path), struct.pack(">QQ", data, data))
    patch(path, REFCOUNT_BLOCK + 2 * (data // CLUSTER), struct.pack(">H", 2))
    image = open_qcow2(path)
    image.writev(100, [memoryview(b"b" * 100)])
    expected = b"a" * 100 + b"b" * 100 + b"a" * (2 * CLUSTER - 200)
    assert read(image, 0, 2 * CLUSTER) == expected
    image.close()
    count = path.read_bytes()[REFCOUNT_BLOCK + 2 * (data // CLUSTER) :][:2]
    assert count == b"\0\1"
    image = open_qcow2(path)
    assert read(image, 0, 2 * CLUSTER) == expected
    image.close()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_l2_table_that_may_have_two_owners(path: Path, count: int) -> None:
    table = l2_table(path)
    patch(path, L1_TABLE, struct.pack(">Q", table))
    patch(path, REFCOUNT_BLOCK + 2 * (table // CLUSTER), struct.pack(">H", count))
    image = open_qcow2(path)
    image.writev(0, [memoryview(b"b")])
    if count == 1:
        image.discard(0, CLUSTER)
    else:
        with pytest.raises(ImageError, match="has refcount"):
            image.discard(0, CLUSTER)
    image.close()
    assert u64_at(path, L1_TABLE) == table | (COPIED if count == 1 else 0)


def test_freeing_what_is_free_already(path: Path) -> None:
    data = u64_at(path, l2_table(path)) & ~COPIED
    patch(path, REFCOUNT_BLOCK + 2 * (data // CLUSTER), b"\0\0")
    image = open_qcow2(path)
    image.discard(0, CLUSTER)
    with pytest.raises(ImageError, match="not in use as data"):
        image.flush()
    image.close()
    assert path.read_bytes()[79] == 2


def add_compressed(path: Path, stream: bytes, sectors: int) -> None:
    """Let the first cluster of the disk be compressed, its stream at the end of the file."""
    end = path.stat().st_size
    patch(path, end, stream.ljust(CLUSTER, b"\0"))
    patch(path, REFCOUNT_BLOCK + 2 * (end // CLUSTER), struct.pack(">H", 1))
    shift = 70 - 12
    patch(path, l2_table(path), struct.pack(">Q", COMPRESSED | (sectors - 1) << shift | end))


def deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    return compressor.compress(data) + compressor.flush()


def test_compressed_stream_with_a_tail(path: Path) -> None:
    content = bytes(range(256)) * 16
    add_compressed(path, deflate(content) + b"rest", 8)
    image = open_qcow2(path, read_only=True)
    assert read(image, 0, 2 * CLUSTER) == content + b"a" * CLUSTER
    image.close()


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"\xff" * 500, "damaged"),
        (deflate(b"x" * 4095), "cut off"),
        (deflate(os.urandom(4096))[:900], "cut off"),
    ],
)
def test_compressed_stream_that_is_broken(path: Path, stream: bytes, reason: str) -> None:
    add_compressed(path, stream, 2)
    image = open_qcow2(path)
    with pytest.raises(ImageError, match=reason):
        read(image, 0, 512)
    assert read(image, CLUSTER, CLUSTER) == b"a" * CLUSTER
    # The guest can still put something else there.
    image.writev(0, [memoryview(b"n" * CLUSTER)])
    assert read(image, 0, CLUSTER) == b"n" * CLUSTER
    image.close()


def test_a_bomb_inflates_to_one_cluster(path: Path) -> None:
    add_compressed(path, deflate(bytes(3 << 20)), 8)
    image = open_qcow2(path, read_only=True)
    tracemalloc.start()
    try:
        assert read(image, 0, CLUSTER) == bytes(CLUSTER)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    image.close()


def test_sparse_giants_take_little_memory(path: Path) -> None:
    """The file is terabytes of nothing, and the tables point to its end."""
    giant = 1 << 39
    os.truncate(path, giant)
    patch(path, L1_TABLE + 8, struct.pack(">Q", COPIED | giant - CLUSTER))
    tracemalloc.start()
    try:
        image = open_qcow2(path)
        assert read(image, 0, CLUSTER) == b"a" * CLUSTER
        image.close()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [1 << 41, 1 << 43])
def test_more_clusters_than_we_map(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(ImageError, match="more than"):
        open_qcow2(path)


def overlay(path: Path, base: Path, size: int = SIZE) -> Image:
    """A new image over `base`, open for writing."""
    with path.open("wb") as file:
        create_qcow2(file.fileno(), size, CLUSTER, backing_file=str(base), backing_format="qcow2")
    return open_image("qcow2", os.open(path, os.O_RDWR), False, open_qcow2(base, read_only=True))


def test_a_corrupt_backing_file_is_not_the_fault_of_the_image(path: Path, tmp_path: Path) -> None:
    patch(path, l2_table(path), struct.pack(">Q", COPIED | REFCOUNT_TABLE))
    whole = path.read_bytes()
    image = overlay(tmp_path / "top.qcow2", path)
    for start in (0, 100):
        with pytest.raises(ImageError, match="in a backing file"):
            read(image, start, 512)
        # The rest of the cluster cannot be had either.
        with pytest.raises(ImageError, match="in a backing file"):
            image.writev(start, [memoryview(b"x" * 512)])
    image.writev(0, [memoryview(b"x" * CLUSTER)])
    assert read(image, 0, 2 * CLUSTER) == b"x" * CLUSTER + b"a" * CLUSTER
    image.close()
    fd = os.open(tmp_path / "top.qcow2", os.O_RDONLY)
    assert not Header(fd).incompatible_features
    os.close(fd)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("base_size", [512, CLUSTER + 512, 1 << 33])
def test_backing_files_of_every_size(path: Path, tmp_path: Path, base_size: int) -> None:
    """A header may claim any size: what the backing file has is seen up to the end of either."""
    patch(path, 24, struct.pack(">Q", base_size))
    image = overlay(tmp_path / "top.qcow2", path)
    seen = min(base_size, 16 * CLUSTER)
    assert read(image, 0, 17 * CLUSTER) == (b"a" * seen).ljust(17 * CLUSTER, b"\0")
    assert read(image, SIZE - 512, 512) == bytes(512)
    image.writev(512, [memoryview(b"x" * 512)])
    expected = bytearray((b"a" * seen).ljust(2 * CLUSTER, b"\0")[: 2 * CLUSTER])
    expected[512:1024] = b"x" * 512
    assert read(image, 0, 2 * CLUSTER) == expected
    with pytest.raises(ImageError, match="outside the disk"):
        read(image, SIZE, 512)
    image.close()


def test_flipped_bytes_in_a_chain(path: Path, tmp_path: Path) -> None:
    """Whatever is wrong below, the image above stays whole, and what lies below is never written."""
    rng = random.Random(4)
    whole = path.read_bytes()
    top = tmp_path / "top.qcow2"
    tables = [0, REFCOUNT_TABLE, L1_TABLE, l2_table(path)]
    opened = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.choice(tables) + rng.randrange(96)] = rng.choice([0, 1, 0x80, 0xFF])
        path.write_bytes(data)
        try:
            image = overlay(top, path)
        except ImageError:
            continue
        opened += 1
        for _ in range(6):
            offset = rng.randrange(16 * CLUSTER // 512) * 512
            try:
                read(image, offset, 2 * CLUSTER)
                image.writev(offset, [memoryview(b"w" * 1024)])
            except ImageError:
                pass
        image.close()
        assert path.read_bytes() == data
        read_only = os.open(top, os.O_RDONLY)
        assert not Header(read_only).incompatible_features
        os.close(read_only)
    assert opened > 20


def test_the_backing_name_is_told(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with path.open("wb") as file:
        create_qcow2(file.fileno(), SIZE, 512, 2, 16, "/images/b\udcffse", "raw")
    with path.open("rb") as file:
        header = Header(file.fileno())
    assert (header.backing_file, header.backing_format) == ("/images/b\udcffse", "raw")


def fuzz(path: Path, rounds: int, seed: int) -> None:
    """Flip bytes where the metadata are, then use the image as a guest would."""
    rng = random.Random(seed)
    image = open_qcow2(path)
    for cluster in range(16, 500, 9):
        image.writev(cluster * CLUSTER + 100, [memoryview(b"b" * 5000)])
    image.write_zeroes(40 * CLUSTER, 10 * CLUSTER, False)
    image.close()
    good = path.read_bytes()
    tables = [l2_table(path), *(u64_at(path, L1_TABLE + 8 * entry) & ~COPIED for entry in range(4))]
    interesting = [*range(112)] * 4 + [*range(REFCOUNT_TABLE, REFCOUNT_TABLE + 16)] * 4
    interesting += [*range(REFCOUNT_BLOCK, REFCOUNT_BLOCK + 200)] + [*range(L1_TABLE, L1_TABLE + 32)] * 4
    for table in tables:
        interesting += range(table, table + 1024)
    survived = 0
    for _ in range(rounds):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            position = rng.choice(interesting)
            bad[position] = rng.choice([bad[position] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255])
        path.write_bytes(bad)
        try:
            image = open_qcow2(path, read_only=rng.random() < 0.3)
        except ImageError as error:
            assert "\n" not in str(error)
            continue
        survived += 1
        try:
            for _ in range(12):
                offset = rng.randrange(max(1, min(image.size, SIZE)))
                size = min(rng.choice([512, 4096, 20000]), image.size - offset)
                kind = rng.choice(["read", "read", "write", "discard", "zero", "flush"])
                try:
                    if kind == "read":
                        read(image, offset, size)
                    elif image.read_only:
                        continue
                    elif kind == "write":
                        image.writev(offset, [memoryview(b"w" * size)])
                    elif kind == "discard":
                        image.discard(offset, size)
                    elif kind == "zero":
                        image.write_zeroes(offset, size, True)
                    else:
                        image.flush()
                except ImageError as error:
                    assert "\n" not in str(error)
        finally:
            try:
                image.close()
            except ImageError:
                pass
        assert path.stat().st_size < 64 << 20
    assert survived > rounds // 10


def test_flipped_bytes(path: Path) -> None:
    fuzz(path, 250, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_flipped_bytes_for_long(path: Path, seed: int) -> None:
    fuzz(path, 5000, seed)
