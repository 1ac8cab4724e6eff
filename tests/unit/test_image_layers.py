"""Merging layers: what containerd and Docker would leave in the root, with nothing of it on the host."""

import ctypes
import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.image_archives import HOSTILE, File, tar
from vmrun.errors import UserError
from vmrun.image.layers import Layers
from vmrun.image.limits import Limits
from vmrun.image.spool import Spool
from vmrun.image.tree import Inode, Tree


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool(tmp_path, Limits()) as spool:
        yield spool
    assert list(tmp_path.iterdir()) == []


def merged(spool: Spool, *layers: list[File], limits: Limits | None = None, whiteouts: bool = True) -> Tree:
    merging = Layers(spool, limits or Limits())
    for files in layers:
        merging.add(io.BytesIO(tar(*files)), "test", whiteouts=whiteouts)
    return merging.tree


def listing(tree: Tree, spool: Spool) -> dict[str, str]:
    """Every path and what is there."""
    found = {}

    def look(inode: Inode, path: str) -> None:
        for name, entry in inode.children.items():
            below = f"{path}/{name.decode()}".lstrip("/")
            found[below] = described(entry.inode, spool)
            look(entry.inode, below)

    look(tree.root, "")
    return found


def described(inode: Inode, spool: Spool) -> str:
    if inode.is_directory:
        return "dir"
    if inode.is_symlink:
        return "-> " + inode.target.decode()
    if stat.S_ISREG(inode.mode):
        return b"".join(os.pread(spool.fd, length, at) for _, at, length in inode.pieces).decode()
    return oct(stat.S_IFMT(inode.mode))


def file(name: str, text: str = "new") -> File:
    return ("file", name, text.encode())


CASES: dict[str, tuple[list[list[File]], dict[str, str]]] = {
    "whiteout": ([[file("a/x"), file("a/y")], [file("a/.wh.x", "")]], {"a": "dir", "a/y": "new"}),
    "whiteout of a directory": ([[file("a/b/x")], [file("a/.wh.b", "")]], {"a": "dir"}),
    "whiteout of nothing": ([[file("a/.wh.x", "")]], {"a": "dir"}),
    "whiteout leaves its own layer": (
        [[file("a/x", "old")], [file("a/x"), file("a/.wh.x", "")]],
        {"a": "dir", "a/x": "new"},
    ),
    "whiteout of a directory that this layer fills": (
        [[file("a/old")], [file("a/new"), file(".wh.a", "")]],
        {"a": "dir", "a/new": "new"},
    ),
    "opaque": (
        [[file("a/old"), file("a/b/old")], [("dir", "a", b""), file("a/.wh..wh..opq", ""), file("a/new")]],
        {"a": "dir", "a/new": "new"},
    ),
    "opaque after the files": (
        [[file("a/old"), file("a/b/old")], [file("a/b/new"), file("a/.wh..wh..opq", "")]],
        {"a": "dir", "a/b": "dir", "a/b/new": "new"},
    ),
    "bookkeeping of aufs": ([[file(".wh..wh.plnk/x", ""), file(".wh..wh.aufs", "")]], {}),
    "file over directory": ([[file("a/x")], [file("a")]], {"a": "new"}),
    "directory over file": ([[file("a")], [("dir", "a", b""), file("a/x")]], {"a": "dir", "a/x": "new"}),
    "directory over link to a directory": (
        [[("dir", "b", b""), ("symlink", "a", "b")], [("dir", "a", b""), file("a/x")]],
        {"a": "dir", "a/x": "new", "b": "dir"},
    ),
    "directory keeps its children": ([[file("a/x")], [("dir", "a", b"")]], {"a": "dir", "a/x": "new"}),
    "parent is a link": (
        [[("dir", "b", b""), ("symlink", "a", "/b")], [file("a/x")]],
        {"a": "-> /b", "b": "dir", "b/x": "new"},
    ),
    "parent is an absolute link below": (
        [[("symlink", "a/b", "/c/d"), ("symlink", "a/e", "../c"), file("a/b/x"), file("a/e/y")]],
        {"a": "dir", "a/b": "-> /c/d", "a/e": "-> ../c", "c": "dir",
            "c/d": "dir", "c/d/x": "new", "c/y": "new"},
    ),
    "parent is a link out of the root": (
        [[("symlink", "a", "../../../etc"), file("a/passwd")]],
        {"a": "-> ../../../etc", "etc": "dir", "etc/passwd": "new"},
    ),
    "absolute and dotted names": (
        [[file("/x"), file("../../y"), file("./a/../z"), file("b/./w")]],
        {"x": "new", "y": "new", "z": "new", "b": "dir", "b/w": "new"},
    ),
    "the last of two": ([[file("x", "first"), file("x", "last")]], {"x": "last"}),
    "file over link": ([[("symlink", "x", "/etc/passwd"), file("x")]], {"x": "new"}),
    "hard link": ([[file("x"), ("link", "y", "x")]], {"x": "new", "y": "new"}),
    "hard link to a lower layer": ([[file("x")], [("link", "y", "/x")]], {"x": "new", "y": "new"}),
    "hard link whose target goes": ([[file("x")], [("link", "y", "x"), file(".wh.x", "")]], {"y": "new"}),
    "hard link to itself": ([[file("x"), ("link", "x", "./x")]], {"x": "new"}),
    "hard link to a symbolic link": (
        [[("symlink", "x", "t"), ("link", "y", "x")]],
        {"x": "-> t", "y": "-> t"},
    ),
    "devices": ([[("block", "sda", (8, 0)), ("char", "null", (1, 3)), ("fifo", "p", b"")]],
        {"sda": "0o60000", "null": "0o20000", "p": "0o10000"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_merging(case: str, spool: Spool) -> None:
    layers, expected = CASES[case]
    assert listing(merged(spool, *layers), spool) == expected


def test_hard_links_share_an_inode_until_one_is_replaced(spool: Spool) -> None:
    tree = merged(spool, [file("x"), ("link", "y", "x"), ("link", "z", "y")], [file("y", "other")])
    inodes = {name: entry.inode for name, entry in tree.root.children.items()}
    assert inodes[b"x"] is inodes[b"z"] is not inodes[b"y"]


def test_attributes_of_the_root_and_of_merged_directories(spool: Spool) -> None:
    merging = Layers(spool, Limits())
    merging.add(
        io.BytesIO(tar(("dir", "./", b""), ("dir", "a", b""), file("a/x"), mode=0o700, uid=5)), "test"
    )
    merging.add(io.BytesIO(tar(("dir", "a/", b""), mode=0o1777, gid=7)), "test")
    assert (merging.tree.root.mode, merging.tree.root.uid) == (0o40700, 5)
    a = merging.tree.root.children[b"a"].inode
    assert (a.mode, a.uid, a.gid, list(a.children)) == (0o41777, 0, 7, [b"x"])


def test_a_root_tar_has_no_whiteouts(spool: Spool) -> None:
    tree = merged(spool, [file("x"), file(".wh.x", "")], whiteouts=False)
    assert set(listing(tree, spool)) == {"x", ".wh.x"}


@pytest.mark.parametrize(
    "files",
    [
        [file("x"), file("x/y")],
        [("link", "y", "x")],
        [("dir", "d", b""), ("link", "y", "d")],
        [("symlink", "a", "b"), ("symlink", "b", "a"), file("a/x")],
        [file("n" * 256)],
        [file("/".join("d" * 300) + "/f")],
        [("symlink", "a", "t" * 5000)],
        [file("..")],
        [("link", "/", "x")],
    ],
    ids=str,
)
def test_refusals(files: list[File], spool: Spool) -> None:
    with pytest.raises(UserError):
        merged(spool, files)


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        (Limits(entries=3), "--max-entries"),
        (Limits(size=10), "--max-size"),
        (Limits(metadata=50), "--max-metadata"),
    ],
)
def test_limits_name_their_option(limits: Limits, option: str, tmp_path: Path) -> None:
    with Spool(tmp_path, limits) as spool, pytest.raises(UserError, match=option):
        merged(spool, [file(f"d{number}/some-name", "some text") for number in range(5)], limits=limits)


def test_attributes_count_for_the_memory_they_take(spool: Spool) -> None:
    """A name of a few bytes without a value is two objects and a place in a dictionary."""
    many = {f"SCHILY.xattr.user.{number:x}": "" for number in range(1000)}
    merging = Layers(spool, Limits(metadata=100_000))
    with pytest.raises(UserError, match="--max-metadata"):
        merging.add(io.BytesIO(tar(file("x"), pax_headers=many)), "test")


def test_links_that_lead_far_about_are_bounded(spool: Spool) -> None:
    winding: list[File] = [("dir", "a", b""), ("symlink", "l0", "a/../" * 700 + "a")]
    winding += [("symlink", f"l{n}", f"l{n - 1}/../" * 2 + "a") for n in range(1, 4)]
    limits = Limits(entries=1000)
    with pytest.raises(UserError, match="too far about"):
        merged(spool, winding + [file(f"l3/{n}") for n in range(900)], limits=limits)


def test_many_whiteouts_take_linear_time(spool: Spool) -> None:
    """One opaque mark after another over a large directory: each would walk it all."""
    lower = [file(f"d/{number}", "") for number in range(3000)]
    upper = [file(f"d/{number}", "") for number in range(3000)]
    tree = merged(spool, lower, [*upper, *[file("d/.wh..wh..opq", "")] * 3000])
    visits = 0

    class Counting(dict):  # type: ignore[type-arg]
        def items(self):  # type: ignore[no-untyped-def]
            nonlocal visits
            visits += 1
            return super().items()

    merging = Layers(spool, Limits())
    merging.tree = tree
    directory = tree.root.children[b"d"].inode
    directory.children = Counting(directory.children)
    merging.add(io.BytesIO(tar(*[file("d/.wh..wh..opq", "")] * 50)), "test")
    assert visits == 1


# The kernel's own idea of a path in a root (openat2(2), RESOLVE_IN_ROOT), for the comparison below.
_SYS_OPENAT2 = 437
_RESOLVE_IN_ROOT = 0x10


class OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


@contextmanager
def open_in_root(root: int, path: str) -> Iterator[int]:
    how = OpenHow(os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    libc = ctypes.CDLL(None, use_errno=True)
    name = path.encode() or b"."
    fd = libc.syscall(_SYS_OPENAT2, root, name, ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        raise OSError(ctypes.get_errno(), path)
    try:
        yield fd
    finally:
        os.close(fd)


NAMES = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map("/".join)
TARGETS = st.lists(st.sampled_from(["a", "b", "c", "..", ".", ""]), min_size=1, max_size=4).map("/".join)
FILES = st.one_of(
    st.tuples(st.just("file"), NAMES, st.sampled_from([b"1", b"2"])),
    st.tuples(st.just("dir"), NAMES, st.just(b"")),
    st.tuples(st.just("symlink"), NAMES, TARGETS.filter(bool)),
)


def unpack_really(files: list[File], root: Path) -> list[File]:
    """Unpack in the kernel's root, leaving out what has no parent there; return what was unpacked."""
    done: list[File] = []
    with _directory(root) as top:
        for kind, name, what in files:
            parent, _, last = name.rpartition("/")
            try:
                with open_in_root(top, parent) as fd:
                    _put(kind, last, what, fd)
            except OSError:
                continue
            done.append((kind, name, what))
    return done


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _put(kind: str, name: str, what: object, parent: int) -> None:
    there = None
    try:
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        pass
    if there is not None and stat.S_ISDIR(there.st_mode):
        if kind == "dir":
            return
        shutil.rmtree(name, dir_fd=parent)
    elif there is not None:
        os.unlink(name, dir_fd=parent)
    if kind == "dir":
        os.mkdir(name, dir_fd=parent)
    elif kind == "symlink":
        os.symlink(str(what), name, dir_fd=parent)
    else:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=parent)
        assert isinstance(what, bytes)
        os.write(fd, what)
        os.close(fd)


def on_the_host(root: Path) -> dict[str, str]:
    found = {}
    for where, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(where, name)
            if path.is_symlink():
                text = "-> " + os.readlink(path)
            else:
                text = "dir" if path.is_dir() else path.read_text()
            found[str(path.relative_to(root))] = text
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(files=st.lists(FILES, max_size=12), cut=st.integers(0, 12))
def test_paths_lead_where_the_kernel_says(
    files: list[File], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("root")
    unpacked = unpack_really(files, root)
    with Spool(root.parent, Limits()) as spool:
        tree = merged(spool, unpacked[:cut], unpacked[cut:])
        assert listing(tree, spool) == on_the_host(root)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.lists(HOSTILE, max_size=8), max_size=3))
def test_hostile_layers_are_merged_or_refused(
    layers: list[list[File]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    here = tmp_path_factory.mktemp("hostile")
    with Spool(here, Limits()) as spool:
        try:
            tree = merged(spool, *layers)
        except UserError:
            tree = None
        assert list(here.iterdir()) == []
        if tree is not None:
            for inode in tree.walk():
                assert not any(name in (b"", b".", b"..") or b"/" in name for name in inode.children)
