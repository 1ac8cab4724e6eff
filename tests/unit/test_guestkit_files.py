"""The guest kit's files: cpio archive, trees, init program and disk, read back by other programs."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from vmrun.guestkit import cpio, host, root, tree
from vmrun.guestkit.progress import Silent

INIT = b"\x7fELF init"
BUSYBOX = b"\x7fELF busybox" * 100
AGENT = b"\x7fELF agent" * 50


def archive_of(entries: list[tree.Entry]) -> bytes:
    out = io.BytesIO()
    cpio.write(out, entries)
    return out.getvalue()


def read_newc(archive: bytes) -> dict[str, tuple[int, bytes, int, int]]:
    """A reader of its own: path -> (mode, data, device major, device minor)."""
    found: dict[str, tuple[int, bytes, int, int]] = {}
    at = 0
    while True:
        header = archive[at : at + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * index : 14 + 8 * index], 16) for index in range(13)]
        mode, size, major, minor, name_size = fields[1], fields[6], fields[9], fields[10], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name[-1:] == b"\0"
        at += (110 + name_size + 3) & ~3
        data = archive[at : at + size]
        at += (size + 3) & ~3
        path = name[:-1].decode()
        if path == "TRAILER!!!":
            assert at == len(archive)
            return found
        assert path not in found
        assert fields[2] == fields[3] == 0, "owned by root"
        found[path] = (mode, data, major, minor)


def test_initramfs_holds_what_the_kernel_looks_for() -> None:
    found = read_newc(archive_of(list(tree.initramfs(INIT, BUSYBOX, AGENT))))
    assert found["init"] == (stat.S_IFREG | 0o755, INIT, 0, 0)
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", 5, 1)
    assert found["bin/sh"][1] == b"busybox"
    assert found["bin/busybox"][1] == BUSYBOX
    assert found["bin/vmrun-agent"][1] == AGENT
    for path in found:
        parent = path.rpartition("/")[0]
        assert not parent or stat.S_ISDIR(found[parent][0])


def test_parents_come_before_children() -> None:
    for entries in (
        list(tree.initramfs(INIT, BUSYBOX, AGENT)),
        list(tree.disk(INIT, BUSYBOX, AGENT, ["sh", "ls", "true"], {"true": b"t"}, {"x": b""})),
    ):
        seen = {""}
        for entry in entries:
            assert entry.path.rpartition("/")[0] in seen
            assert entry.path not in seen
            seen.add(entry.path)


def test_archive_is_the_same_each_time() -> None:
    first, second = (archive_of(list(tree.initramfs(INIT, BUSYBOX, AGENT))) for _ in range(2))
    assert first == second


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the cpio program")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    entries = [tree.directory("a"), tree.file("a/b", b"x" * 5000, 0o640), tree.link("c", "a/b")]
    subprocess.run(
        ["cpio", "-id", "--quiet"], cwd=tmp_path, input=archive_of(entries), check=True, capture_output=True
    )
    assert (tmp_path / "a/b").read_bytes() == b"x" * 5000
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o640
    assert os.readlink(tmp_path / "c") == "a/b"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("gcc", "mke2fs", "debugfs", "qemu-img"):
        if shutil.which(program, path=host._PATH) is None:
            pytest.skip(f"needs {program}")
    if not host._is_static_program(host.BUSYBOX):
        pytest.skip("needs busybox-static")
    into = tmp_path_factory.mktemp("root")
    root.build(into, Silent())
    return into


def test_build_leaves_only_its_two_files(built: Path) -> None:
    assert sorted(path.name for path in built.iterdir()) == ["disk.qcow2", "initramfs.cpio"]


def test_init_is_one_page(built: Path) -> None:
    init = read_newc((built / "initramfs.cpio").read_bytes())["init"][1]
    assert init.startswith(b"\x7fELF")
    assert len(init) <= 4096


def test_disk_is_a_clean_file_system_of_root(built: Path, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "check", "-q", built / "disk.qcow2"], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", built / "disk.qcow2", raw], check=True)
    environment = {**os.environ, "PATH": host._PATH}
    subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True, env=environment)

    def debugfs(command: str) -> str:
        done = subprocess.run(
            ["debugfs", "-R", command, raw], check=True, capture_output=True, text=True, env=environment
        )
        return done.stdout

    for path in ("/bin/init", "/bin/sh", "/etc/passwd", "/root"):
        assert "User:     0   Group:     0" in debugfs(f"stat {path}")
    assert 'Fast link dest: "busybox"' in debugfs("stat /bin/sh")
    assert debugfs("cat /etc/vmrun/demo").startswith("#!/bin/sh\n")
    assert "Mode:  0755" in debugfs("stat /etc/vmrun/demo")


def test_owners_are_root_without_root_rights(tmp_path: Path) -> None:
    if shutil.which("debugfs", path=host._PATH) is None:
        pytest.skip("needs debugfs")
    entries = [tree.directory("d"), tree.file("d/f", b"x"), tree.link("l", "d/f")]
    root._lay_out(tmp_path / "root", entries)
    for path in (tmp_path / "root/d/f", tmp_path / "root/d"):
        if os.geteuid() == 0:
            os.chown(path, 1234, 1234)
    raw = tmp_path / "raw"
    raw.write_bytes(b"")
    os.truncate(raw, 1 << 22)
    host.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "none,extent", "-d", tmp_path / "root", raw], tmp_path
    )
    root._give_to_root(raw, entries, tmp_path)
    for name in ("/d", "/d/f", "/l"):
        done = subprocess.run(
            ["debugfs", "-R", f"stat {name}", raw],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": host._PATH},
        )
        assert "User:     0   Group:     0" in done.stdout
