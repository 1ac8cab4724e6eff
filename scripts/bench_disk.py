"""What a disk format costs over the bare system call: microseconds a request, one thread, from the page
cache.

Run from the repository: `python3 scripts/bench_disk.py [--directory DIR] [--mib SIZE]`. Guest memory is an
anonymous mapping; the best of several rounds is printed, since the host has other work too.
"""

import argparse
import mmap
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from devices.block.image import Image
from devices.block.open import open_image
from devices.block.qcow2_create import create_qcow2

BLOCK = 4096
ROUNDS = 5
REQUESTS = 20_000


def best(action: Callable[[int, list[memoryview]], object], offsets: list[int], view: memoryview) -> float:
    """Microseconds a request, of the fastest round."""
    fastest = float("inf")
    buffers = [view[:BLOCK]]
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for offset in offsets:
            action(offset, buffers)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest / len(offsets) * 1e6


def report(name: str, read: float, random_read: float, write: float, random_write: float) -> None:
    print(f"{name:34} {read:9.2f} {random_read:9.2f} {write:9.2f} {random_write:9.2f}")


def measure(name: str, image: Image, offsets: list[int], shuffled: list[int], view: memoryview) -> None:
    report(
        name,
        best(image.readv, offsets, view),
        best(image.readv, shuffled, view),
        best(image.writev, offsets, view),
        best(image.writev, shuffled, view),
    )


def fill(image: Image) -> None:
    data = memoryview(bytes(1 << 20))
    for offset in range(0, image.size, 1 << 20):
        image.writev(offset, [data])
    image.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="where the images go (default: a temporary directory)")
    parser.add_argument("--mib", type=int, default=256, help="size of the disks (default: 256)")
    arguments = parser.parse_args()
    size = arguments.mib << 20
    view = memoryview(mmap.mmap(-1, 1 << 20))
    rng = random.Random(1)
    offsets = [index * BLOCK % size for index in range(REQUESTS)]
    shuffled = [rng.randrange(size // BLOCK) * BLOCK for _ in range(REQUESTS)]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print(f"{BLOCK} bytes a request, microseconds {'read':>19} {'random':>9} {'write':>9} {'random':>9}")
        path = Path(directory) / "disk.raw"
        path.touch()
        os.truncate(path, size)
        image = open_image("raw", os.open(path, os.O_RDWR), False)
        fill(image)
        with path.open("r+b", buffering=0) as file:
            fd = file.fileno()
            report(
                "preadv, pwritev",
                best(lambda offset, buffers: os.preadv(fd, buffers, offset), offsets, view),
                best(lambda offset, buffers: os.preadv(fd, buffers, offset), shuffled, view),
                best(lambda offset, buffers: os.pwritev(fd, buffers, offset), offsets, view),
                best(lambda offset, buffers: os.pwritev(fd, buffers, offset), shuffled, view),
            )
        measure("raw", image, offsets, shuffled, view)
        image.close()
        path.unlink()
        for cluster_size in (4096, 65536, 2 << 20):
            path = Path(directory) / "disk.qcow2"
            with path.open("wb") as file:
                create_qcow2(file.fileno(), size, cluster_size)
            image = open_image("qcow2", os.open(path, os.O_RDWR), False)
            start = time.perf_counter()
            for offset in offsets[: min(REQUESTS, size // BLOCK)]:
                image.writev(offset, [view[:BLOCK]])
            image.flush()
            allocating = (time.perf_counter() - start) / min(REQUESTS, size // BLOCK) * 1e6
            fill(image)
            measure(f"qcow2, clusters of {cluster_size >> 10} KiB", image, offsets, shuffled, view)
            print(f"{'  first sequential write, and flush':34} {'':9} {'':9} {allocating:9.2f}")
            image.close()
            path.unlink()


if __name__ == "__main__":
    main()
