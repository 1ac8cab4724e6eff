"""Copying files through the agent, and streams of files that a hostile guest might send."""

from __future__ import annotations

import io
import os
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.agent_guest import session
from vmrun.agent import files, protocol
from vmrun.agent.files import Limits, StreamEnd, StreamError, Totals
from vmrun.agent.protocol import AgentError


def make_tree(root: Path) -> None:
    (root / "dir" / "inner").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "dir" / "script").write_bytes(b"#!/bin/sh\n")
    (root / "dir" / "script").chmod(0o755)
    (root / "dir" / "inner" / "big").write_bytes(os.urandom(700_000) + protocol.MAGIC)
    (root / "dir" / "inner" / "n\xe4me \n").write_bytes(b"")
    (root / "dir" / "link").symlink_to("../dir/script")
    (root / "dir" / "good").symlink_to("../empty")
    (root / "secret").write_bytes(b"x")
    (root / "secret").chmod(0o600)
    for number in range(300):
        (root / "dir" / f"small{number}").write_bytes(str(number).encode())
    os.utime(root / "dir" / "script", ns=(10**18, 123456789 * 10**9 + 5))
    os.utime(root / "dir", ns=(10**18, 987654321 * 10**9))
    (root / "empty").chmod(0o700)


def look(root: Path) -> dict[str, tuple[int, int, bytes]]:
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        about = path.lstat()
        data = (
            path.readlink().name.encode()
            if path.is_symlink()
            else b""
            if path.is_dir()
            else path.read_bytes()
        )
        mtime = 0 if path.is_symlink() else about.st_mtime_ns
        found[str(path.relative_to(root))] = (about.st_mode, mtime, data)
    return found


def test_tree_goes_in_and_out_again(tmp_path: Path) -> None:
    source, inside, back = tmp_path / "source", tmp_path / "deep" / "inside", tmp_path / "back"
    make_tree(source)
    os.mkfifo(source / "fifo")
    with session() as guest:
        totals = guest.copy_in(str(source), str(inside))
        assert [text.partition(":")[0] for text in totals.left_out] == ["fifo"]
        os.mkfifo(inside / "fifo")
        os.utime(inside, ns=(1, source.stat().st_mtime_ns))
        (source / "fifo").unlink()
        (inside / "fifo").rename(tmp_path / "fifo")
        os.utime(source, ns=(1, 10**18))
        os.utime(inside, ns=(1, 10**18))
        assert look(source) == look(inside)
        back_totals = guest.copy_out(str(inside), str(back), special_bits=True)
        assert back_totals.left_out == []
        assert look(back) == look(source)
        assert back_totals.bytes == totals.bytes > 700_000
        # Again, over what is there.
        guest.copy_in(str(source), str(inside))
        assert look(source) == look(inside)


def test_files_and_where_they_go(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"data")
    (tmp_path / "there").mkdir()
    with session() as guest:
        guest.copy_in(str(source), str(tmp_path / "a" / "b"))
        assert (tmp_path / "a" / "b").read_bytes() == b"data"
        guest.copy_in(str(source), str(tmp_path / "there"))
        assert (tmp_path / "there" / "file").read_bytes() == b"data"
        guest.copy_in(str(source), str(tmp_path / "new") + "/")
        assert (tmp_path / "new" / "file").read_bytes() == b"data"
        guest.copy_out(str(source), str(tmp_path / "c" / "d"))
        assert (tmp_path / "c" / "d").read_bytes() == b"data"
        guest.copy_out(str(source), str(tmp_path / "c"))
        assert (tmp_path / "c" / "file").read_bytes() == b"data"


def test_reasons(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with session() as guest:
        with pytest.raises(AgentError, match=r"cannot open /no/such: No such file"):
            guest.copy_out("/no/such", str(tmp_path / "out"))
        with pytest.raises(AgentError, match=r"cannot open .*file: Not a directory"):
            guest.copy_in(str(tmp_path / "file"), str(tmp_path / "file" / "below"))
        with pytest.raises(FileNotFoundError):
            guest.copy_in(str(tmp_path / "missing"), "/tmp")
        with pytest.raises(AgentError):
            guest.copy_in("/dev/null", str(tmp_path / "null"))
        with pytest.raises(StreamError, match="more than 1000 bytes"):
            guest.copy_out("/bin/sh", str(tmp_path / "out"), limits=Limits(bytes=1000))
        guest.ping()


@pytest.mark.root
def test_owner_and_special_bits(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"")
    source.chmod(0o4755)
    with session() as guest:
        guest.copy_in(str(source), str(tmp_path / "one"), owner="nobody")
        guest.copy_in(str(source), str(tmp_path / "two"), special_bits=True)
        guest.copy_out(str(source), str(tmp_path / "three"))
    assert ((tmp_path / "one").stat().st_uid, (tmp_path / "one").stat().st_gid) == (65534, 65534)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "two").stat().st_mode) == 0o4755
    assert stat.S_IMODE((tmp_path / "three").stat().st_mode) == 0o755


def about(kind: bytes, name: bytes, mode: int = 0o644) -> bytes:
    return kind + struct.pack("<IQI", mode, 10**18, len(name)) + name


def text(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def file(name: bytes, data: bytes = b"x") -> bytes:
    return about(b"f", name) + text(data) + bytes(4)


def extract(stream: bytes, path: Path, limits: Limits | None = None) -> Totals:
    totals = Totals()
    files.extract(io.BytesIO(stream).read, str(path), "name", totals, limits or Limits())
    return totals


TOP = about(b"d", b"", 0o755)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc/passwd", b"../x", b"a\0b", b"x" * 256])
@pytest.mark.parametrize("kind", [b"d", b"f", b"l"])
def test_names_that_are_none(tmp_path: Path, name: bytes, kind: bytes) -> None:
    with pytest.raises(StreamError):
        extract(TOP + about(kind, name) + bytes(100), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"e",
        b"D",
        b"x",
        about(b"l", b"") + text(b"/etc"),
        about(b"d", b"name"),
        file(b"name"),
        TOP,
        TOP + b"e",
        TOP + b"DD",
        TOP + b"D" + TOP,
        TOP + b"D" + file(b""),
        TOP + about(b"f", b"a") + struct.pack("<I", 0xFFFFFFFE) + bytes(10),
        TOP + about(b"f", b"a") + struct.pack("<I", 0xFFFFFFFF),
        TOP + b"f" + struct.pack("<IQI", 0, 1 << 63, 1) + b"a",
        TOP + about(b"d", b"d") * 300,
    ],
)
def test_streams_that_are_wrong(tmp_path: Path, stream: bytes) -> None:
    with pytest.raises(StreamError):
        extract(stream, tmp_path / "out")


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    links = {
        b"up": b"../victim",
        b"absolute": b"/etc",
        b"winding": b"d/../../victim",
        b"empty": b"",
        b"fine": b"d/file",
    }
    stream = TOP + b"".join(about(b"l", name) + text(target) for name, target in links.items())
    stream += about(b"d", b"d", 0o755) + about(b"l", b"one-up") + text(b"../fine")
    stream += about(b"l", b"two-up") + text(b"../../victim") + b"DDe"
    totals = extract(stream, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["d", "fine", "one-up"]
    assert len(totals.left_out) == 5


def test_links_are_not_followed(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / "file").write_bytes(b"precious")
    out.mkdir()
    (out / "d").symlink_to(victim)
    (out / "f").symlink_to(victim / "file")
    with pytest.raises(OSError, match="d"):
        extract(TOP + about(b"d", b"d") + file(b"file") + b"DDe", out)
    extract(TOP + file(b"f", b"new") + b"De", out)
    assert (out / "f").read_bytes() == b"new"
    assert not (out / "f").is_symlink()
    assert (victim / "file").read_bytes() == b"precious"


@pytest.mark.parametrize(("umask", "directory", "inner"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_what_the_umask_forbids_stays_forbidden(
    tmp_path: Path, umask: int, directory: int, inner: int
) -> None:
    stream = about(b"d", b"", 0o777) + about(b"d", b"d", 0o777)
    stream += about(b"f", b"f", 0o666) + text(b"x") + bytes(4) + b"DDe"
    before = os.umask(umask)
    try:
        extract(stream, tmp_path / "out")
        extract(about(b"f", b"", 0o4666) + bytes(4) + b"e", tmp_path / "alone")
    finally:
        os.umask(before)
    made = [tmp_path / "out", tmp_path / "out" / "d", tmp_path / "out" / "d" / "f", tmp_path / "alone"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [directory, directory, inner, inner]


def test_only_so_much_is_remembered_of_what_is_left_out(tmp_path: Path) -> None:
    links = b"".join(about(b"l", b"\x1b\n%d" % number) + text(b"/etc") for number in range(250))
    totals = extract(TOP + links + b"De", tmp_path / "out")
    assert totals.left_out[0] == "??0: a link that leads out of the copied tree"
    assert len(totals.left_out) == 101 and totals.left_out[-1] == "... and 150 more"


def test_names_of_what_is_left_out_on_the_way_in_are_clean(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "\x1b]0;x\n")
    totals = Totals()
    fd = files.open_source(str(tmp_path))
    assert b"".join(files.entries(fd, totals))
    assert totals.left_out == ["?]0;x?: neither file, directory nor link"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_limits(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="more than 3 files"):
        extract(TOP + file(b"a") + file(b"b") + file(b"c") + b"De", tmp_path / "out", Limits(entries=3))
    with pytest.raises(StreamError, match="more than 5 bytes"):
        extract(TOP + file(b"a", b"123") + file(b"b", b"456") + b"De", tmp_path / "out", Limits(bytes=5))


part = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b"D", b"e", TOP, file(b""), bytes(4)]),
    st.builds(about, st.sampled_from([b"d", b"f", b"l"]), st.sampled_from([b"a", b"b", b"..", b"a/b"])),
    st.builds(text, st.sampled_from([b"..", b"/", b"a", b"../../x", b"data"])),
)


@settings(max_examples=150, deadline=None)
@given(stream=st.lists(part, max_size=12).map(lambda parts: TOP + b"".join(parts)))
def test_any_stream_stays_in_its_place(tmp_path_factory: pytest.TempPathFactory, stream: bytes) -> None:
    base = tmp_path_factory.mktemp("any")
    (base / "x").write_bytes(b"precious")
    try:
        extract(stream, base / "out")
    except (StreamError, StreamEnd, OSError):
        pass
    assert sorted(path.name for path in base.iterdir()) == ["out", "x"]
    assert (base / "x").read_bytes() == b"precious"
    top = (base / "out").resolve()
    for path in top.rglob("*"):
        if path.is_symlink():
            # Without its last part, which need not be there.
            assert os.path.normpath(path.parent / os.readlink(path)).startswith(str(top))
