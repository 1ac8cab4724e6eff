"""The disk: what was in the tree is on it, as e2fsprogs says, and the same tree gives the same disk."""

import hashlib
import io
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.image_archives import HOSTILE, File, check, content, debugfs, facts, names, tar
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.guestkit.progress import Silent
from vmrun.image import ext4
from vmrun.image.layers import Layers
from vmrun.image.limits import Limits
from vmrun.image.spool import Spool
from vmrun.image.tree import Entry, Inode, Tree, directory

pytestmark = pytest.mark.skipif(
    shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None, reason="no e2fsprogs"
)

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


@pytest.fixture(autouse=True)
def administrators_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool(tmp_path, Limits()) as spool:
        yield spool


def add(parent: Inode, name: bytes, inode: Inode) -> Inode:
    parent.children[name] = Entry(inode, 0)
    return inode


def regular(spool: Spool, data: bytes, mode: int = 0o644, **more: object) -> Inode:
    left = [data]

    def read(size: int) -> bytes:
        part, left[0] = left[0][:size], left[0][size:]
        return part

    inode = Inode(stat.S_IFREG | mode, size=len(data), **more)  # type: ignore[arg-type]
    if data:
        inode.pieces = [(0, spool.append(read, len(data), "test"), len(data))]
    return inode


def write(tree: Tree, spool: Spool, disk: Path, size: int | None = None) -> Path:
    ext4.write(tree, spool.fd, disk, size or ext4.default_size(tree), Silent())
    return disk


def test_every_type_and_attribute(tmp_path: Path, spool: Spool) -> None:
    tree = Tree(Limits())
    root = tree.root
    data = random.Random(1).randbytes(3_000_001)
    time = 1_700_000_000_123_456_789
    program = regular(spool, data, 0o4755, uid=70000, gid=5, mtime_ns=time)
    program.xattrs = {b"security.capability": CAPABILITY, b"user.long": b"y" * 2000}
    add(root, b"program", program)
    add(root, b"again", program)
    add(root, b"empty", regular(spool, b""))
    add(root, b"far", regular(spool, b"", mtime_ns=7_000_000_000 * 10**9))
    add(root, b"sda", Inode(stat.S_IFBLK | 0o660, device=(8, 1)))
    add(root, b"nvme", Inode(stat.S_IFBLK | 0o660, device=(259, 70000)))
    add(root, b"null", Inode(stat.S_IFCHR | 0o666, device=(1, 3)))
    add(root, b"pipe", Inode(stat.S_IFIFO | 0o600))
    for length in (1, 59, 60, 4095):
        add(root, b"link%d" % length, Inode(stat.S_IFLNK | 0o777, target=b"t" * length))
    sparse = regular(spool, b"hello")
    sparse.size = 1 << 40
    sparse.pieces = [(1 << 30, sparse.pieces[0][1], 5)]
    add(root, b"sparse", sparse)
    below = add(root, b"d", directory(0o1777))
    add(add(below, b"d", directory()), b"f", regular(spool, b"deep"))
    disk = write(tree, spool, tmp_path / "disk")

    check(disk)
    assert content(disk, "/program") == content(disk, "/again") == data
    assert content(disk, "/d/d/f") == b"deep"
    assert content(disk, "/empty") == b""
    program_facts = facts(disk, "/program")
    for fact in ("Mode: 04755", "User: 70000 Group: 5", "Links: 2", "mtime: 0x6553f100:1d6f3454"):
        assert fact in program_facts
    # debugfs 1.47.0 prints the first of these in hexadecimal.
    assert debugfs_xattr(disk, "/program", "security.capability") == CAPABILITY
    assert debugfs_xattr(disk, "/program", "user.long") == b"y" * 2000
    assert "Mode: 01777" in facts(disk, "/d")
    assert "major/minor number: 08:01" in facts(disk, "/sda")
    assert "number: 259:70000" in facts(disk, "/nvme")
    assert "number: 01:03" in facts(disk, "/null")
    assert "Type: FIFO" in facts(disk, "/pipe")
    for length in (1, 59, 60, 4095):
        assert f"Size: {length} " in facts(disk, f"/link{length}")
    assert 'Fast link dest: "' + "t" * 59 in facts(disk, "/link59")
    assert content(disk, "/link4095") == b"t" * 4095
    assert "Size: 1099511627776 " in facts(disk, "/sparse")
    assert "EXTENTS: (262144):" in facts(disk, "/sparse")


def debugfs_xattr(disk: Path, path: str, name: str) -> bytes:
    out = disk.with_name("xattr")
    debugfs(disk, f"ea_get -f {out} {path} {name}")
    return out.read_bytes()


def test_names_that_no_script_can_quote(tmp_path: Path, spool: Spool) -> None:
    tree = Tree(Limits())
    hostile = [b"new\nline", b'"', b"a b", b"\xff\xfe", b"x" * 255, b"<2>", b"-f", b"#", b"\x1b[31m"]
    for name in hostile:
        add(tree.root, name, regular(spool, name))
    disk = write(tree, spool, tmp_path / "disk")
    check(disk)
    # In the one block of the root, as they are.
    block = int(debugfs(disk, "blocks /").split()[0])
    with disk.open("rb") as file:
        file.seek(block * ext4.BLOCK)
        data = file.read(ext4.BLOCK)
    assert all(name in data for name in hostile)


def test_directory_of_many_blocks(tmp_path: Path, spool: Spool) -> None:
    tree = Tree(Limits())
    many = add(tree.root, b"many", directory())
    one = regular(spool, b"x")
    for number in range(5000):
        add(many, b"n%d" % number * (1 + number % 40), one)
    for number in range(300):
        add(many, b"d%d" % number, directory())
    disk = write(tree, spool, tmp_path / "disk")
    check(disk)
    assert len(names(disk, "/many")) == 5300
    assert "Links: 302" in facts(disk, "/many")


def test_lost_and_found_of_the_tree(tmp_path: Path, spool: Spool) -> None:
    tree = Tree(Limits())
    add(add(tree.root, b"lost+found", directory(0o750)), b"#12", regular(spool, b"found"))
    disk = write(tree, spool, tmp_path / "disk")
    check(disk)
    assert "Inode: 11 " in facts(disk, "/lost+found")
    assert "Mode: 0750" in facts(disk, "/lost+found")
    tree.root.children[b"lost+found"] = Entry(regular(spool, b"x"), 0)
    with pytest.raises(UserError, match="lost"):
        write(tree, spool, tmp_path / "other")


def test_the_same_tree_gives_the_same_disk(tmp_path: Path) -> None:
    digests = set()
    for order in (1, -1):
        with Spool(tmp_path, Limits()) as spool:
            tree = Tree(Limits())
            for number in list(range(50))[::order]:
                add(
                    tree.root,
                    b"f%d" % number,
                    regular(spool, b"%d" % number * number, xattrs={b"user.a": b"b"}),
                )
            disk = write(tree, spool, tmp_path / f"disk{order}", 32 << 20)
            digests.add(hashlib.sha256(disk.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_sizes(tmp_path: Path, spool: Spool) -> None:
    tree = Tree(Limits())
    add(tree.root, b"data", regular(spool, random.Random(2).randbytes(40 << 20)))
    disk = write(tree, spool, tmp_path / "disk")
    # The room is a hole of the host's file.
    assert disk.stat().st_size > (40 << 20) + ext4.SPARE
    assert disk.stat().st_blocks * 512 < 60 << 20
    write(tree, spool, tmp_path / "small", 70 << 20)
    check(tmp_path / "small")
    for number, size in enumerate((1 << 20, 45 << 20, (56 << 20) + (12 << 10))):
        with pytest.raises(UserError, match="--disk-size") as caught:
            write(tree, spool, tmp_path / f"smaller{number}", size)
        assert caught.value.code == EXIT_IMAGE


def test_too_many_attributes_and_names(tmp_path: Path, spool: Spool) -> None:
    tree = Tree(Limits())
    add(tree.root, b"f", regular(spool, b"", xattrs={b"user.%d" % n: b"x" * 100 for n in range(40)}))
    with pytest.raises(UserError, match="attributes"):
        write(tree, spool, tmp_path / "disk")


def test_the_kernel_mounts_it(tmp_path: Path, spool: Spool) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    tree = Tree(Limits())
    add(tree.root, b"new\nline", regular(spool, b"text", 0o2711, uid=3, gid=70000, mtime_ns=5_000_000_007))
    add(tree.root, b"dev", Inode(stat.S_IFCHR | 0o600, device=(500, 300)))
    disk = write(tree, spool, tmp_path / "disk")
    (tmp_path / "mnt").mkdir()
    script = 'mount -o loop,ro "$0" mnt && cd mnt && stat -c "%n|%a|%u|%g|%Y|%t:%T|%s" * && cat new*'
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, disk], cwd=tmp_path, capture_output=True, text=True
    )
    if run.returncode and "loop" in run.stderr:
        pytest.skip(f"no loop devices: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    assert "dev|600|0|0|0|1f4:12c|0" in run.stdout
    assert "new\nline|2711|3|70000|5|0:0|4" in run.stdout
    assert run.stdout.endswith("text")


def test_missing_programs_are_named(tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext4.host, "_PATH", str(tmp_path))
    with pytest.raises(UserError, match="e2fsprogs"):
        write(Tree(Limits()), spool, tmp_path / "disk")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.lists(HOSTILE, min_size=5, max_size=30), min_size=1, max_size=3))
def test_hostile_archives_make_sound_file_systems(
    layers: list[list[File]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    here = tmp_path_factory.mktemp("hostile")
    with Spool(here, Limits()) as spool:
        merging = Layers(spool, Limits())
        for files in layers:
            for file in files:
                # Each an archive of its own, so that a refusal does not end it all.
                try:
                    merging.add(io.BytesIO(tar(file)), "test")
                except UserError:
                    pass
        disk = write(merging.tree, spool, here / "disk", 24 << 20)
    check(disk)
    assert [path.name for path in here.iterdir()] == ["disk"]
    disk.unlink()
