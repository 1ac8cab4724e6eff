"""`vmrun disk` when something is wrong: one line, the documented code, nothing half-made and nothing lost."""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devices.block.open import open_image
from devices.block.qcow2_header import INCOMPATIBLE_FIELD, Header
from tests.unit.qcow2_writer import assert_at_most_leaks
from vmrun import cli
from vmrun.disk.check import EXIT_LEAKS
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE
from vmrun.host import new_file as output
from vmrun.host.disks import OpenDisk
from vmrun.machine.config import DiskConfig

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
CLUSTER = 65536


def vmrun(*arguments: str | Path) -> int:
    return cli.run(["disk", *map(str, arguments)])


def write(path: Path, offset: int, data: bytes) -> None:
    image = open_image("qcow2", os.open(path, os.O_RDWR), False)
    image.writev(offset, [memoryview(data)])
    image.close()


def make(path: Path, size: str = "4M", *data: tuple[int, bytes]) -> Path:
    assert vmrun("create", "-s", size, path) == 0
    for offset, text in data:
        write(path, offset, text)
    return path


@contextmanager
def locked(path: Path, read_only: bool = False) -> Iterator[None]:
    disk = OpenDisk(DiskConfig(path, "qcow2", read_only=read_only))
    try:
        yield
    finally:
        disk.close()


def expect(code: int, text: str, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> None:
    capsys.readouterr()
    assert vmrun(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vmrun: ") and err.count("\n") == 1 and text in err, err


def test_what_users_get_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = make(tmp_path / "x.qcow2")
    (tmp_path / "x.raw").write_bytes(bytes(MIB))
    os.symlink("nowhere", tmp_path / "link.qcow2")
    for code, text, words in (
        (EXIT_IMAGE, "not overwritten", "create -s 1M x.qcow2"),
        (EXIT_IMAGE, "not overwritten", "create -s 1M link.qcow2"),
        (EXIT_IMAGE, "not overwritten", "convert x.qcow2 x.raw"),
        (EXIT_USAGE, "how large", "create new.qcow2"),
        (EXIT_USAGE, "suffix does not tell", "create -s 1M new"),
        (EXIT_USAGE, "give one of raw, qcow2", "create -s 1M --format vhd new"),
        (EXIT_USAGE, "whole sectors", "create -s 0.125K new.raw"),
        (EXIT_USAGE, "whole sectors", "create -s 0K new.raw"),
        (EXIT_USAGE, "has no clusters", "create -s 1M --cluster-size 4K new.raw"),
        (EXIT_USAGE, "has no backing file", "create -b x.qcow2 new.raw"),
        (EXIT_IMAGE, "cluster size 1000", "create -s 1M --cluster-size 1000 new.qcow2"),
        (EXIT_USAGE, "there is no --backing", "create -s 1M -F raw new.qcow2"),
        (EXIT_IMAGE, "no such file", "create -b none.qcow2 new.qcow2"),
        (EXIT_USAGE, "its directory", "create -s 1M none/new.qcow2"),
        (EXIT_IMAGE, "no such file", "info none.qcow2"),
        (EXIT_IMAGE, "not a qcow2 image", "info --format qcow2 x.raw"),
        (EXIT_USAGE, "suffix does not tell", "info none"),
        (EXIT_USAGE, "no tables", "check x.raw"),
        (EXIT_USAGE, "only leaks", "check x.qcow2 --repair all"),
        (EXIT_USAGE, "cannot be compressed", "convert -c x.qcow2 new.raw"),
        (EXIT_USAGE, "zlib, zstd", "convert --compression lzma x.qcow2 new.qcow2"),
        (EXIT_IMAGE, "no backing file", "commit x.qcow2"),
        (EXIT_IMAGE, "no backing file", "commit x.raw"),
        (EXIT_USAGE, "cut off", "resize x.qcow2 1M"),
        (EXIT_USAGE, "say the unit", "resize x.qcow2 1"),
        (EXIT_IMAGE, "is a directory", "map --format raw ."),
        (EXIT_IMAGE, "is a directory", "info ."),
    ):
        expect(code, text, capsys, *words.split())
    assert sorted(os.listdir(tmp_path)) == ["link.qcow2", "x.qcow2", "x.raw"]
    assert vmrun("check", image) == 0


def test_a_relative_base_counts_from_the_new_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "base.qcow2")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    expect(EXIT_IMAGE, "give ../base.qcow2", capsys, "create", "-b", "base.qcow2", "sub/x.qcow2")
    assert vmrun("create", "-b", "../base.qcow2", "sub/x.qcow2") == 0
    make(tmp_path / "a:b.qcow2")
    assert vmrun("create", "-b", "a:b.qcow2", "y.qcow2") == 0
    assert vmrun("info", "--chain", "y.qcow2") == 0


def test_an_image_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make(tmp_path / "base.qcow2")
    over = tmp_path / "over.qcow2"
    assert vmrun("create", "-b", base, over) == 0
    new = tmp_path / "new.qcow2"
    with locked(over):
        for words in (
            ["info", over],
            ["check", over],
            ["convert", over, new],
            ["commit", over],
            ["map", over],
            ["resize", over, "8M"],
            ["create", "-b", over, new],
        ):
            expect(EXIT_IMAGE, "is in use", capsys, *words)
    with locked(base, read_only=True):
        expect(EXIT_IMAGE, "is in use", capsys, "commit", over)
        assert vmrun("map", over) == 0
    with locked(over, read_only=True):
        expect(EXIT_IMAGE, "is in use", capsys, "commit", over)
        expect(EXIT_IMAGE, "is in use", capsys, "resize", over, "8M")
        assert vmrun("info", over) == 0
    assert not new.exists()


def test_a_base_that_is_the_overlay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make(tmp_path / "base.qcow2")
    over = tmp_path / "over.qcow2"
    assert vmrun("create", "-b", base, over) == 0
    os.unlink(base)
    os.link(over, base)
    expect(EXIT_IMAGE, "is itself", capsys, "commit", over)
    expect(EXIT_IMAGE, "is itself", capsys, "map", over)


def test_names_from_an_image_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "\x1b[2Jbase\n", path, "1M"],
        check=True,
    )
    capsys.readouterr()
    assert vmrun("info", path) == 0
    out, _ = capsys.readouterr()
    assert "\x1b" not in out and "\\x1b[2Jbase\\n" in out
    for words in (["map", path], ["info", "--chain", path], ["commit", path]):
        expect(EXIT_IMAGE, "not a plain path", capsys, *words)


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def peek(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(8), "big")


def tables(path: Path) -> tuple[int, int, int]:
    """Where the L1 table, the first refcount block and the first L2 table are."""
    with path.open("rb") as file:
        header = Header(file.fileno())
    block = peek(path, header.refcount_table_offset)
    return header.l1_table_offset, block, peek(path, header.l1_table_offset) & ~(1 << 63)


def damage(path: Path, kind: str) -> None:
    l1, block, l2 = tables(path)
    entry = peek(path, l2)
    first = (entry & 0xFFFFFFFFFFFE00) >> 16
    words = {
        "leak": (block + 2 * (first + 8), b"\0\1"),
        "count too high": (block + 2 * first, b"\0\2"),
        "count zero": (block + 2 * first, b"\0\0"),
        "copied flag missing": (l2, (entry & ~(1 << 63)).to_bytes(8, "big")),
        "two owners": (l2 + 8, entry.to_bytes(8, "big")),
        "outside the file": (l2 + 8, (1 << 63 | 1 << 40).to_bytes(8, "big")),
        "points at a table": (l2 + 8, (1 << 63 | l2).to_bytes(8, "big")),
        "unaligned": (l2 + 8, (entry | 0x1000).to_bytes(8, "big")),
        "reserved bits": (l2, (entry | 1 << 57).to_bytes(8, "big")),
        "unaligned L2 table": (l1, (1 << 63 | l2 | 0x200).to_bytes(8, "big")),
        "L2 table outside": (l1, (1 << 63 | 1 << 40).to_bytes(8, "big")),
    }
    poke(path, *words[kind])


@pytest.mark.parametrize(
    "kind",
    [
        "leak",
        "count too high",
        "count zero",
        "copied flag missing",
        "two owners",
        "outside the file",
        "points at a table",
        "unaligned",
        "reserved bits",
        "unaligned L2 table",
        "L2 table outside",
    ],
)
def test_check_finds_what_qemu_finds(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "x.qcow2", "4M", (0, b"a" * CLUSTER), (MIB, b"b" * 4 * CLUSTER))
    # Leaks are looked for inside the file.
    os.truncate(path, path.stat().st_size + 16 * CLUSTER)
    damage(path, kind)
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", path], capture_output=True, text=True
    )
    theirs = json.loads(done.stdout)
    capsys.readouterr()
    code = vmrun("check", path, "--json")
    ours = json.loads(capsys.readouterr().out)
    assert bool(ours.get("corruptions")) == bool(theirs.get("corruptions"))
    assert bool(ours.get("leaks")) == bool(theirs.get("leaks"))
    if kind in ("leak", "count zero", "copied flag missing", "two owners", "outside the file"):
        assert ours.get("corruptions") == theirs.get("corruptions")
        assert ours.get("leaks") == theirs.get("leaks")
    assert code == {0: 0, 2: EXIT_IMAGE, 3: EXIT_LEAKS}[done.returncode]
    assert vmrun("check", path) == code
    if code == EXIT_IMAGE:
        assert vmrun("check", path, "--repair", "leaks") == EXIT_IMAGE
        return
    capsys.readouterr()
    assert vmrun("check", path, "--repair", "leaks") == 0
    assert "1 leaked clusters were given back" in capsys.readouterr().out
    subprocess.run(["qemu-img", "check", "-f", "qcow2", path], check=True)


def test_an_image_that_was_not_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "1M"], check=True
    )
    subprocess.run(
        ["qemu-io", "-f", "qcow2", path],
        input=b"write -P 7 0 200k\nflush\nabort\n",
        capture_output=True,
    )
    assert vmrun("check", path) == EXIT_IMAGE
    assert "was not closed" in capsys.readouterr().out
    assert vmrun("check", path, "--repair", "leaks") == 0
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    assert read_raw(path) == b"\7" * 200 * 1024 + bytes(MIB - 200 * 1024)


def test_a_bar_is_drawn_on_a_terminal_only(tmp_path: Path) -> None:
    source = make(tmp_path / "x.qcow2", "2M", (0, b"a" * 3 * CLUSTER))
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "vmrun", "disk", "convert", source, tmp_path / "new.qcow2"]
    try:
        subprocess.run(command, cwd=ROOT, stderr=slave, stdout=subprocess.DEVNULL, check=True)
        assert b"converting x.qcow2" in os.read(master, 65536)
    finally:
        os.close(slave)
        os.close(master)
    command[-1] = tmp_path / "again.qcow2"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert done.stderr == b""


def test_a_corrupt_mark_is_reported(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2", "4M", (0, b"a"))
    poke(path, INCOMPATIBLE_FIELD, (2).to_bytes(8, "big"))
    assert vmrun("check", path) == EXIT_IMAGE
    assert vmrun("info", path) == 0
    assert vmrun("resize", path, "8M") == EXIT_IMAGE


def test_hostile_tables_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random damage to any byte of the metadata: every verb ends, and says one thing."""
    whole = make(tmp_path / "x.qcow2", "4M", (0, b"a" * CLUSTER), (MIB, b"b" * 4 * CLUSTER))
    l1, block, l2 = tables(whole)
    path = tmp_path / "hostile.qcow2"
    rng = random.Random(2)
    for number in range(60):
        shutil.copy(whole, path)
        for _ in range(rng.choice((1, 3))):
            start, size = rng.choice(((0, 112), (CLUSTER, 16), (block, 32), (l1, 16), (l2, 160)))
            poke(path, start + rng.randrange(size), bytes([rng.randrange(256)]))
        new = tmp_path / f"new{number}.raw"
        for words in (
            ["info", path],
            ["check", path],
            ["map", path],
            ["convert", path, new],
            ["resize", path, "+1M"],
        ):
            capsys.readouterr()
            code = vmrun(*words)
            _, err = capsys.readouterr()
            assert code in (0, EXIT_LEAKS, EXIT_IMAGE, EXIT_USAGE), (words, err)
            assert err.count("\n") <= 1, err
            assert code or words[0] != "convert" or new.exists()
            assert not code or not new.exists()
        if new.exists():
            new.unlink()


def test_an_interrupted_maker_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for unnamed in (True, False):
        if not unnamed:
            monkeypatch.setattr(os, "open", refuse_tmpfile)
        with pytest.raises(KeyboardInterrupt), output.new_file(tmp_path / "x.raw") as fd:
            os.write(fd, b"half")
            assert len(os.listdir(tmp_path)) == (0 if unnamed else 1)
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == []
        with output.new_file(tmp_path / "y.raw") as fd:
            os.write(fd, b"whole")
        assert os.listdir(tmp_path) == ["y.raw"]
        assert (tmp_path / "y.raw").read_bytes() == b"whole"
        with pytest.raises(Exception, match="there already"), output.new_file(tmp_path / "z.raw") as fd:
            (tmp_path / "z.raw").write_bytes(b"theirs")
        assert (tmp_path / "z.raw").read_bytes() == b"theirs"
        for path in tmp_path.iterdir():
            path.unlink()


real_open = os.open


def refuse_tmpfile(path: Any, flags: int, *more: Any, **named: Any) -> int:
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(95, "Operation not supported")
    return real_open(path, flags, *more, **named)


KILLED_AT = """
import os, sys
from vmrun import cli
left = int(sys.argv[1])
def counted(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return function(*arguments, **named)
    return call
for name in ("pwritev", "fdatasync", "ftruncate", "fsync", "link"):
    setattr(os, name, counted(getattr(os, name)))
from devices.block import transfer
transfer._fallocate = counted(transfer._fallocate)
sys.exit(cli.run(["disk", *sys.argv[2:]]))
"""


def run_until_killed(moment: int, *arguments: str | Path) -> bool:
    """Run the command up to its `moment`th change of a file. True when it was killed there."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(moment), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def read_raw(path: Path) -> bytes:
    raw = path.with_suffix(".contents")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data


def test_commit_survives_being_killed_anywhere(tmp_path: Path) -> None:
    """At each change of a file in turn: the overlay reads the same, and in the end the base does too."""
    rng = random.Random(3)
    whole = tmp_path / "whole"
    whole.mkdir()
    make(whole / "base.qcow2", "1M", (0, rng.randbytes(2 * CLUSTER)), (8 * CLUSTER, rng.randbytes(CLUSTER)))
    assert vmrun("create", "-b", "base.qcow2", "-s", "2M", whole / "over.qcow2") == 0
    subprocess.run(
        ["qemu-io", "-f", "qcow2", whole / "over.qcow2"],
        input=b"write -P 7 60k 10k\nwrite -P 8 1500k 100k\nwrite -z 512k 64k\n",
        check=True,
        capture_output=True,
    )
    wanted = read_raw(whole / "over.qcow2")
    killed = 0
    for moment in range(200):
        place = tmp_path / "place"
        shutil.copytree(whole, place)
        over, base = place / "over.qcow2", place / "base.qcow2"
        finished = not run_until_killed(moment, "commit", over)
        killed += not finished
        assert_at_most_leaks(over)
        assert_at_most_leaks(base)
        assert read_raw(over) == wanted, f"killed at change {moment}"
        assert vmrun("commit", over) == 0
        assert read_raw(base) == wanted, f"killed at change {moment}"
        shutil.rmtree(place)
        if finished:
            break
    assert killed > 10 and finished


def test_makers_that_are_killed_leave_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "x.qcow2", "2M", (0, b"a" * 3 * CLUSTER))
    path = tmp_path / "new.qcow2"
    for words in (["create", "-s", "4M", path], ["convert", "-c", source, path]):
        for moment in range(100):
            killed = run_until_killed(moment, *words)
            # Killed after it got its name, it is whole.
            if path.exists():
                subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
                assert vmrun("info", path) == 0
                path.unlink()
            assert os.listdir(tmp_path) == ["x.qcow2"]
            if not killed:
                break
        assert not killed and moment > 4


def test_resize_survives_being_killed_anywhere(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.qcow2", "4M", (0, b"a" * 3 * CLUSTER))
    wanted = read_raw(whole)
    path = tmp_path / "x.qcow2"
    for moment in range(100):
        shutil.copy(whole, path)
        killed = run_until_killed(moment, "resize", path, "2G")
        assert_at_most_leaks(path)
        with path.open("rb") as file:
            assert Header(file.fileno()).size in ((4 * MIB, 2048 * MIB) if killed else (2048 * MIB,))
        assert vmrun("resize", path, "3G") == 0
        image = open_image("qcow2", os.open(path, os.O_RDONLY), True)
        data = bytearray(5 * MIB)
        image.readv(0, [memoryview(data)])
        image.close()
        assert data == wanted + bytes(MIB)
        if not killed:
            break
    assert not killed and moment > 3
