"""An image survives whatever stops its writer: kill -9 at any moment, and power cuts between any two
barriers.

After each, `qemu-img check` finds at most leaks, what was flushed is there, and every other sector holds
something that was written to it.
"""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devices.block import transfer
from devices.block.open import open_image
from devices.block.qcow2_create import create_qcow2
from tests.unit.qcow2_writer import (
    SECTOR,
    assert_at_most_leaks,
    content,
    operations,
    perform,
    sectors_of,
    tag,
)

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")

ROOT = Path(__file__).parents[2]


def write_until_killed(path: str, seed: int, cluster_size: int) -> None:
    """The child's work: says after each flush how many operations are behind it."""
    image = open_image("qcow2", os.open(path, os.O_RDWR), False)
    for number, operation in enumerate(operations(seed, image.size // SECTOR, cluster_size)):
        perform(image, seed, number, operation)
        if operation[0] == "flush":
            os.write(1, b"%d\n" % (number + 1))


def assert_survived(
    path: Path, before: list[bytes], seed: int, cluster_size: int, flushed: int
) -> list[bytes]:
    """Check the file after `flushed` operations were flushed, and some of those up to the next flush."""
    assert_at_most_leaks(path)
    allowed = [{sector} for sector in before]
    for number, (what, first, count) in enumerate(operations(seed, len(before), cluster_size)):
        if what == "flush" and number >= flushed:
            break
        written = content(seed, number, (what, first, count))
        for sector in range(first, first + count):
            if number < flushed:
                allowed[sector] = {written}
            else:
                allowed[sector].add(written)
    after = sectors_of(path)
    wrong = [sector for sector in range(len(after)) if after[sector] not in allowed[sector]]
    assert not wrong, f"sectors {wrong[:10]} hold what nobody wrote there or lost what was flushed"
    return after


def kill_again_and_again(path: Path, cluster_size: int, version: int, rounds: int) -> None:
    with path.open("wb") as file:
        create_qcow2(file.fileno(), 2 << 20, cluster_size, version)
    sectors = sectors_of(path)
    rng = random.Random(cluster_size)
    script = (
        "import sys; from tests.unit.test_qcow2_crash import write_until_killed\n"
        "write_until_killed(sys.argv[1], *map(int, sys.argv[2:]))"
    )
    flushes = 0
    for seed in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", script, path, str(seed), str(cluster_size)],
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(rng.randrange(1, 12))]
        # Not waiting for anything: any moment from here on is a good one to die.
        os.sched_yield() if rng.random() < 0.3 else rng.randbytes(rng.randrange(1 << 20))
        child.kill()
        rest = child.stdout.read()
        child.stdout.close()
        child.wait()
        lines = (b"".join(lines) + rest).split(b"\n")
        assert len(lines) > 1, "the writer died of something else"
        flushes += len(lines) - 1
        sectors = assert_survived(path, sectors, seed, cluster_size, int(lines[-2]))
    assert flushes > rounds


SHAPES = [(512, 3), (4096, 2), (65536, 3)]


@pytest.mark.parametrize(("cluster_size", "version"), SHAPES)
def test_killed(tmp_path: Path, cluster_size: int, version: int) -> None:
    kill_again_and_again(tmp_path / "disk.qcow2", cluster_size, version, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("cluster_size", "version"), SHAPES)
def test_killed_hundreds_of_times(tmp_path: Path, cluster_size: int, version: int) -> None:
    kill_again_and_again(tmp_path / "disk.qcow2", cluster_size, version, 200)


class Recorder:
    """Every change of the file in order, with the barriers, to cut the power at any point of it later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, int, bytes]] = []
        pwritev, ftruncate, fdatasync = os.pwritev, os.ftruncate, os.fdatasync

        def record_write(fd: int, buffers: list[memoryview], offset: int) -> int:
            self.log.append(("write", offset, b"".join(buffers)))
            return pwritev(fd, buffers, offset)

        def record_truncate(fd: int, size: int) -> None:
            self.log.append(("truncate", size, b""))
            ftruncate(fd, size)

        def record_sync(fd: int) -> None:
            fdatasync(fd)
            self.log.append(("sync", 0, b""))

        def record_punch(fd: int, mode: int, offset: int, size: int) -> bool:
            self.log.append(("write", offset, bytes(size)))
            pwritev(fd, [memoryview(bytes(size))], offset)
            return True

        monkeypatch.setattr(os, "pwritev", record_write)
        monkeypatch.setattr(os, "ftruncate", record_truncate)
        monkeypatch.setattr(os, "fdatasync", record_sync)
        monkeypatch.setattr(transfer, "_try_fallocate", record_punch)


def apply(disk: bytearray, change: tuple[str, int, bytes], rng: random.Random | None) -> None:
    """Do one change; with `rng`, as a power cut may: not at all, or only some sectors of it."""
    what, offset, data = change
    fate = rng.random() if rng else 1.0
    if fate < 0.4 or what not in ("write", "truncate"):
        return
    end = offset + len(data)
    if len(disk) < end:
        disk.extend(bytes(end - len(disk)))
    if what == "truncate":
        return
    position = offset
    while position < end:
        step = min(SECTOR - position % SECTOR, end - position)
        if fate > 0.6 or (rng and rng.random() < 0.5):
            disk[position : position + step] = data[position - offset : position - offset + step]
        position += step


def cut_power_everywhere(
    path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], count: int, samples: int
) -> None:
    cluster_size, version, refcount_bits = shape
    with path.open("wb") as file:
        create_qcow2(file.fileno(), 4 << 20, cluster_size, version, refcount_bits)
    if refcount_bits == 64:
        # So many clusters that the refcount table must grow soon.
        image = open_image("qcow2", os.open(path, os.O_RDWR), False)
        image.writev(1 << 20, [memoryview(tag(99, 99) * (1900 << 10 >> 9))])
        image.close()
    start = path.read_bytes()
    before = sectors_of(path)
    seed = cluster_size
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        image = open_image("qcow2", os.open(path, os.O_RDWR), False)
        for number, operation in enumerate(operations(seed, len(before), cluster_size)):
            perform(image, seed, number, operation)
            if operation[0] == "flush":
                recorder.log.append(("flushed", number + 1, b""))
                if number >= count:
                    break
        image.close()
        log = recorder.log
    rng = random.Random(seed)
    moments = set(rng.sample(range(len(log)), min(samples, len(log))))
    # Where a table gets a new block, and the header a new table, is where one lost write does most harm.
    switches = {
        moment
        for moment, (what, offset, data) in enumerate(log)
        if what == "write" and (offset < 4 * cluster_size) and len(data) in (8, 12)
    }
    assert refcount_bits != 64 or any(offset == 48 for what, offset, _ in log if what == "write")
    switches = set(sorted(switches)[:: max(1, len(switches) // samples)])
    switches |= {moment for moment, (what, offset, _) in enumerate(log) if (what, offset) == ("write", 48)}
    # Everything up to `barrier` is on stable storage in `disk`.
    disk = bytearray(start)
    barrier = flushed = 0
    crashed = path.with_suffix(".crashed")
    for moment, change in enumerate(log):
        if change[0] == "sync":
            for earlier in log[barrier:moment]:
                apply(disk, earlier, None)
            barrier = moment
        elif change[0] == "flushed":
            flushed = change[1]
        fates = [None, rng, rng, rng, rng] if moment in switches else [rng] if moment in moments else []
        for fate in fates:
            after = bytearray(disk)
            for pending in log[barrier : moment + 1]:
                apply(after, pending, fate)
            crashed.write_bytes(after)
            assert_survived(crashed, before, seed, cluster_size, flushed)


POWER_SHAPES = [(512, 2, 16), (512, 3, 64), (1024, 3, 16), (16384, 3, 16)]


@pytest.mark.parametrize("shape", POWER_SHAPES)
def test_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    cut_power_everywhere(tmp_path / "disk.qcow2", monkeypatch, shape, 300, 8)


@pytest.mark.slow
@pytest.mark.parametrize("shape", POWER_SHAPES)
def test_power_cut_at_many_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    cut_power_everywhere(tmp_path / "disk.qcow2", monkeypatch, shape, 1000, 200)
