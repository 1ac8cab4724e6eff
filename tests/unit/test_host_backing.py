"""Backing chains: what the VMM opens for a disk, what it refuses, and that a worker reads all of it."""

import os
import random
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from devices.block.qcow2_create import create_qcow2
from devices.block.qcow2_journal import JOURNAL_SIZE
from devices.virtio.device import VIRTIO_ID_BLOCK
from tests.unit.worker_session import Session
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.backing import MAX_BACKING_FILES
from vmrun.host.disks import Disks
from vmrun.machine.config import DiskConfig

MIB = 1 << 20
IN, OUT, FLUSH = 0, 1, 4

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


def qcow2(
    path: Path, backing: str | None = None, backing_format: str | None = "qcow2", size: int = MIB
) -> Path:
    with path.open("wb") as file:
        create_qcow2(
            file.fileno(),
            size,
            backing_file=backing,
            backing_format=backing_format if backing is not None else None,
        )
    return path


def config(path: Path, read_only: bool = False) -> DiskConfig:
    return DiskConfig(path, "qcow2" if path.suffix == ".qcow2" else "raw", read_only, backing=(Path("/"),))


def test_a_backing_file_elsewhere_must_be_allowed(tmp_path: Path) -> None:
    """The name may be a hostile image's, or that of a worker that a guest took over."""
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir()
    here.mkdir()
    base = qcow2(elsewhere / "base.qcow2")
    top = qcow2(here / "top.qcow2", str(base))
    (here / "link.qcow2").symlink_to(base)
    through_link = qcow2(here / "through.qcow2", "link.qcow2")
    above = qcow2(here / "above.qcow2", "../elsewhere/base.qcow2")
    for path in (top, through_link, above):
        assert f"backing={base.parent}" in refusal(DiskConfig(path, "qcow2"))
        with Disks([DiskConfig(path, "qcow2", backing=(elsewhere,))]) as disks:
            assert len(list(disks)) == 1


def refusal(*configs: DiskConfig) -> str:
    with pytest.raises(UserError) as caught:
        Disks(configs)
    assert caught.value.code == EXIT_IMAGE
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_chain_is_opened_read_only_and_handed_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(4096))
    qcow2(tmp_path / "a" / "middle.qcow2", "../base.raw", "raw")
    top = qcow2(tmp_path / "top.qcow2", "a/middle.qcow2")
    with Disks([config(top)]) as disks:
        (disk,) = disks
        assert disk.words == {"format": "qcow2", "read_only": "0", "backing": "qcow2,raw"}
        fds = disk.fds
        assert list(fds) == ["image", "backing0", "backing1", "journal"]
        for key, path in (("backing0", tmp_path / "a" / "middle.qcow2"), ("backing1", tmp_path / "base.raw")):
            assert os.path.samestat(os.fstat(fds[key]), path.stat())
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fds[key], b"x", 0)
        assert os.fstat(fds["journal"]).st_size == JOURNAL_SIZE
        with pytest.raises(PermissionError):
            os.ftruncate(fds["journal"], 0)
        assert "is in use" in refusal(config(tmp_path / "base.raw"))
        with Disks([config(tmp_path / "base.raw", read_only=True)]):
            pass
    with Disks([config(top, read_only=True)]) as disks:
        (disk,) = disks
        assert list(disk.fds) == ["image", "backing0", "backing1"]
        with Disks([config(top, read_only=True)]):
            pass


def test_a_relative_name_is_relative_to_the_directory_of_the_link(tmp_path: Path) -> None:
    """As qemu-img has it, which combines the two names and resolves nothing."""
    (tmp_path / "images").mkdir()
    qcow2(tmp_path / "images" / "base.qcow2")
    qcow2(tmp_path / "images" / "top.qcow2", "base.qcow2")
    link = tmp_path / "link.qcow2"
    link.symlink_to("images/top.qcow2")
    assert f"disk {tmp_path / 'base.qcow2'}: no such file" in refusal(config(link))
    qcow2(tmp_path / "base.qcow2")
    with Disks([config(link)]) as (disk):
        (only,) = disk
        assert os.path.samestat(os.fstat(only.fds["backing0"]), (tmp_path / "base.qcow2").stat())


def test_absolute_names(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "base.qcow2")
    with Disks([config(qcow2(tmp_path / "top.qcow2", str(base)))]) as disks:
        assert len(next(iter(disks)).backing) == 1


@pytest.mark.parametrize(
    ("name", "backing_format", "reason"),
    [
        ("none.qcow2", "qcow2", "none.qcow2: no such file (a backing file of disk "),
        (".", "raw", "is a directory"),
        ("pipe", "raw", "not a file and not a block device"),
        ("/dev/zero", "raw", "not a file and not a block device"),
        ("base.qcow2", None, "qemu-img rebase -u -F raw|qcow2 -b base.qcow2 "),
        ("base.qcow2", "vmdk", "'vmdk': only raw and qcow2"),
        ("base.qcow2", "", "only raw and qcow2"),
        ("base.qcow2", "qcow2\n", "only raw and qcow2"),
        ("raw", "qcow2", "not a qcow2 image"),
        ("empty", "qcow2", "not a qcow2 image"),
        ("file:base.qcow2", "qcow2", "not a plain path"),
        ("nbd://localhost/x", "raw", "not a plain path"),
        ('json:{"driver":"raw","file":{"filename":"/etc/passwd"}}', "raw", "not a plain path"),
        ("a:b/c", "raw", "not a plain path"),
        ("top.qcow2", "qcow2", "is itself or an image above it"),
        ("top.qcow2", "raw", "is itself or an image above it"),
        ("loop.qcow2", "qcow2", "is itself or an image above it"),
        ("x" * 300, "qcow2", "file name too long"),
        ("new\nline", "qcow2", "not a plain path"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_refused(tmp_path: Path, name: str, backing_format: str | None, reason: str, read_only: bool) -> None:
    qcow2(tmp_path / "base.qcow2")
    qcow2(tmp_path / "loop.qcow2", "top.qcow2")
    (tmp_path / "raw").write_bytes(bytes(4096))
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    top = qcow2(tmp_path / "top.qcow2", name, backing_format)
    assert reason in refusal(config(top, read_only))


def test_a_colon_after_a_slash_is_no_protocol(tmp_path: Path) -> None:
    qcow2(tmp_path / "a:b.qcow2")
    with Disks([config(qcow2(tmp_path / "top.qcow2", "./a:b.qcow2"))]) as disks:
        assert len(disks) == 1


def chain(tmp_path: Path, length: int) -> Path:
    path = qcow2(tmp_path / "0.qcow2")
    for number in range(length):
        path = qcow2(tmp_path / f"{number + 1}.qcow2", f"{number}.qcow2")
    return path


def test_depth(tmp_path: Path) -> None:
    top = chain(tmp_path, MAX_BACKING_FILES)
    with Disks([config(top)]) as disks:
        assert len(next(iter(disks)).backing) == MAX_BACKING_FILES
    above = qcow2(tmp_path / "above.qcow2", top.name)
    assert f"more than {MAX_BACKING_FILES} backing files" in refusal(config(above))


def test_two_disks_over_one_base(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "base.qcow2")
    first = config(qcow2(tmp_path / "1.qcow2", "base.qcow2"))
    second = config(qcow2(tmp_path / "2.qcow2", "base.qcow2"))
    with Disks([first, second, config(base, read_only=True)]) as disks:
        assert len(disks) == 3
    assert "is one disk and a backing file of another" in refusal(config(base), first)
    assert "is one disk and a backing file of another" in refusal(first, config(base))


@needs_qemu
def test_a_base_is_shared_with_readers_in_qemu_and_with_no_writer(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "base.qcow2")
    ours, theirs = (config(qcow2(tmp_path / f"{number}.qcow2", "base.qcow2")) for number in (1, 2))

    def qemu(path: Path, command: str) -> bool:
        line = ["qemu-io", "-f", "qcow2", "-c", command]
        return not subprocess.run([*line, path], capture_output=True).returncode

    with Disks([ours]):
        assert qemu(theirs.path, "write 0 512")
        assert not qemu(base, "read 0 512")  # qemu-io opens it for writing
        assert not qemu(ours.path, "read 0 512")
        subprocess.run(["qemu-img", "info", base], check=True, stdout=subprocess.DEVNULL)
    assert qemu(base, "write 0 512")
    for path, busy in ((theirs.path, ""), (base, "base.qcow2: is in use by another vmrun (or QEMU)")):
        with subprocess.Popen(["qemu-io", "-f", "qcow2", path], stdin=PIPE, stdout=PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"read 0 512\n")
            process.stdin.flush()
            while b"read 512" not in process.stdout.readline():
                pass
            if busy:
                assert busy in refusal(ours)
            else:
                Disks([ours]).close()
                assert "is in use" in refusal(theirs)


def test_hostile_headers(tmp_path: Path) -> None:
    """Whatever a header says, parsing it here ends in a UserError or an open disk, without much ado."""
    base = qcow2(tmp_path / "base.qcow2")
    qcow2(tmp_path / "other.qcow2")
    top = qcow2(tmp_path / "top.qcow2", "base.qcow2")
    whole = {path: path.read_bytes() for path in (base, top)}
    rng = random.Random(5)
    opened = 0
    for _ in range(300):
        for path, good in whole.items():
            data = bytearray(good)
            for _ in range(rng.choice([0, 1, 1, 3])):
                position = rng.randrange(160)
                data[position] = rng.choice([0, 1, 0xFF, data[position] ^ 1 << rng.randrange(8)])
            path.write_bytes(data)
        try:
            Disks([config(top)]).close()
            opened += 1
        except UserError as error:
            assert error.code == EXIT_IMAGE and "\n" not in str(error)
    assert 0 < opened < 300


@contextmanager
def machine_disk(disk: DiskConfig) -> Iterator[Callable[..., bytes]]:
    """What a machine makes of it, without the machine: the disk's worker."""
    with Disks([disk]) as disks:
        (only,) = disks
        with Session("blk", VIRTIO_ID_BLOCK, 1, only.words, only.fds) as session:

            def request(kind: int, sector: int, readable: list[bytes], writable: list[int]) -> bytes:
                session.offer(0, [struct.pack("<IIQ", kind, 0, sector), *readable], [*writable, 1])
                ((_, _, data),) = session.collect(0)
                assert data[-1] == 0
                return data[:-1]

            yield request


@needs_qemu
def test_a_worker_reads_through_a_chain_of_qemu(tmp_path: Path) -> None:
    """Each image larger or smaller than the one below it, compressed or not, as qemu-img sees it."""
    rng = random.Random(1)
    data = b"".join(bytes([number]) * 4096 for number in range(96))
    (tmp_path / "base.raw").write_bytes(data)
    run = subprocess.run
    sizes = [600 << 10, 380 << 10, 500 << 10]
    path = tmp_path / "base.raw"
    for number, size in enumerate(sizes):
        below, path = path, tmp_path / f"{number}.qcow2"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", below.name, "-F", below.suffix[1:]]
        command += ["-o", "compression_type=zstd"] if number == 1 else []
        run([*command, path, str(size)], check=True)
        for write in range(3):
            if number == 1:
                what = f"write -c -P 201 {write * 65536} 65536"
            else:
                what = f"write -P {200 + number} {rng.randrange(size // 512 - 16) * 512} 8192"
            run(["qemu-io", "-f", "qcow2", "-c", what, path], check=True, stdout=subprocess.DEVNULL)
    run(["qemu-img", "convert", "-O", "raw", path, tmp_path / "expected"], check=True)
    expected = (tmp_path / "expected").read_bytes()
    assert len(set(expected[::512])) > 20
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir() if entry != path}
    with machine_disk(config(path)) as request:
        found = b"".join(request(IN, sector, [], [4096]) for sector in range(0, len(expected) // 512, 8))
        assert found == expected
        request(OUT, 3, [b"w" * 512], [])
        request(FLUSH, 0, [], [])
        assert request(IN, 0, [], [4096]) == expected[:1536] + b"w" * 512 + expected[2048:4096]
    assert {entry: entry.read_bytes() for entry in before} == before
    run(["qemu-img", "check", "-q", path], check=True)


def test_a_killed_worker_is_followed_by_one_that_knows_it_all(tmp_path: Path) -> None:
    qcow2(tmp_path / "base.qcow2")
    top = qcow2(tmp_path / "top.qcow2", "base.qcow2")
    with Disks([config(top)]) as disks:
        (disk,) = disks
        for life in range(3):
            with Session("blk", VIRTIO_ID_BLOCK, 1, disk.words, disk.fds) as session:
                for sector in range(life + 1):
                    kind, content, room = (
                        (IN, [], [512]) if sector < life else (OUT, [b"%d" % life * 512], [])
                    )
                    session.offer(0, [struct.pack("<IIQ", kind, 0, 200 * sector), *content], [*room, 1])
                    ((_, _, data),) = session.collect(0)
                    assert data == (b"%d" % sector * 512 if sector < life else b"") + b"\0"
                os.kill(session.worker.pid, 9)
                assert session.worker.wait(10)
        assert stat.S_ISREG(os.fstat(disk.fds["journal"]).st_mode)
        assert struct.unpack("2Q", os.pread(disk.fds["journal"], 16, 0))[1] == 3
