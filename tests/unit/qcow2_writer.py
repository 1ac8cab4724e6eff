"""A writer of qcow2 images that can be stopped anywhere: what it does is known from a seed, so that whoever
looks at the image later knows what may be in each sector.
"""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

from devices.block.image import Image
from devices.block.open import open_image

SECTOR = 512
Operation = tuple[str, int, int]  # what, first sector, sectors


def operations(seed: int, sectors: int, cluster_size: int) -> Iterator[Operation]:
    """The endless list of what one writer does.

    Zeroes and discards are whole clusters: their effect is known.
    """
    rng = random.Random(seed)
    cluster = cluster_size // SECTOR
    while True:
        what = rng.choice(["write"] * 7 + ["zero", "discard", "flush"])
        if what == "flush":
            yield what, 0, 0
            continue
        first = rng.randrange(sectors)
        count = min(rng.choice([1, 8, 8, rng.randrange(1, 4 * cluster + 1)]), sectors - first)
        if what != "write":
            first = first // cluster * cluster
            count = min(-(-count // cluster) * cluster, sectors - first)
        yield what, first, count


def tag(seed: int, number: int) -> bytes:
    """What operation `number` of writer `seed` fills a sector with."""
    return (seed << 32 | number + 1).to_bytes(8, "big") * (SECTOR // 8)


def content(seed: int, number: int, operation: Operation) -> bytes:
    """What a sector holds after it."""
    return tag(seed, number) if operation[0] == "write" else bytes(SECTOR)


def perform(image: Image, seed: int, number: int, operation: Operation) -> None:
    what, first, count = operation
    if what == "write":
        image.writev(first * SECTOR, [memoryview(tag(seed, number) * count)])
    elif what == "zero":
        image.write_zeroes(first * SECTOR, count * SECTOR, number % 2 == 0)
    elif what == "discard":
        image.discard(first * SECTOR, count * SECTOR)
    else:
        image.flush()


def read_sectors(image: Image) -> list[bytes]:
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    return [bytes(data[start : start + SECTOR]) for start in range(0, len(data), SECTOR)]


def sectors_of(path: Path) -> list[bytes]:
    image = open_image("qcow2", os.open(path, os.O_RDONLY), True)
    sectors = read_sectors(image)
    image.close()
    return sectors


def assert_at_most_leaks(path: Path) -> None:
    check = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True)
    assert check.returncode in (0, 3), check.stdout + check.stderr
