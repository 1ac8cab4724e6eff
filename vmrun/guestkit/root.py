"""Builds the guest's root directory, once as an initramfs and once as an ext4 disk.

No root rights and no mounts are needed: mke2fs fills the file system from a directory, and debugfs then gives
everything to root.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from vmrun.guestkit import cpio, guest_agent, host, tree
from vmrun.guestkit.progress import Progress

INIT_SOURCE = Path(__file__).with_name("init.c")
TRUE_SOURCE = Path(__file__).with_name("true.c")
SCRIPTS = {"demo": Path(__file__).with_name("demo.sh")}

_COMPILE = [
    "gcc", "-Wall", "-Werror", "-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector",
    "-fno-pie", "-no-pie", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    # One segment: the whole program is one page.
    "-Wl,-z,noseparate-code,--build-id=none,-s",
]  # fmt: skip

_DISK_BYTES = 1 << 30
# Each feature that is left out is guest kernel time saved at the mount or at each write. No journal: the disk
# is a template for throw-away machines, and who wants one can add it with `tune2fs -j`.
_FEATURES = "none,extent,filetype,sparse_super,large_file,flex_bg,ext_attr"
_MAKE_FILE_SYSTEM = [
    "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-N", "16384", "-I", "256", "-m", "0", "-O", _FEATURES,
    "-L", "vmrun", "-U", "766d7275-6e00-4000-8000-000000000001",
    "-E", "lazy_itable_init=0,root_owner=0:0,hash_seed=766d7275-6e00-4000-8000-000000000002",
]  # fmt: skip
_EPOCH = {"E2FSPROGS_FAKE_TIME": "1"}


def build(into: Path, progress: Progress) -> None:
    """Leave `initramfs.cpio` and `disk.qcow2` in `into`."""
    work = into / "work"
    work.mkdir()
    progress.step("building init")
    host.run([*_COMPILE, "-o", work / "init", INIT_SOURCE], work)
    init = (work / "init").read_bytes()
    for name, status in (("true", 0), ("false", 1)):
        host.run([*_COMPILE, f"-DSTATUS={status}", "-o", work / name, TRUE_SOURCE], work)
    ends = {name: (work / name).read_bytes() for name in ("true", "false")}
    progress.step("building the guest agent")
    guest_agent.compile_program(work / "vmrun-agent")
    agent = (work / "vmrun-agent").read_bytes()
    busybox = host.BUSYBOX.read_bytes()

    progress.step("writing the initramfs")
    with (into / "initramfs.cpio").open("wb") as archive:
        cpio.write(archive, tree.initramfs(init, busybox, agent))

    progress.step("writing the disk")
    applets: list[str] = []
    host.run([host.BUSYBOX, "--list"], work, on_line=applets.append)
    scripts = {name: path.read_bytes() for name, path in SCRIPTS.items()}
    entries = list(tree.disk(init, busybox, agent, applets, ends, scripts))
    staging = work / "root"
    _lay_out(staging, entries)
    raw = work / "disk.raw"
    with raw.open("wb") as image:
        image.truncate(_DISK_BYTES)
    host.run([*_MAKE_FILE_SYSTEM, "-d", staging, raw], work, _EPOCH)
    if os.geteuid() != 0:
        _give_to_root(raw, entries, work)
    host.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, into / "disk.qcow2"], work)
    # A template: machines get a copy or an overlay.
    (into / "disk.qcow2").chmod(0o444)
    shutil.rmtree(work)


def _lay_out(staging: Path, entries: Iterable[tree.Entry]) -> None:
    """Make the files, directories and links of a tree without devices in a directory."""
    entries = list(entries)
    staging.mkdir()
    for entry in entries:
        path = staging / entry.path
        if stat.S_ISDIR(entry.mode):
            path.mkdir()
        elif stat.S_ISLNK(entry.mode):
            path.symlink_to(os.fsdecode(entry.data))
        else:
            path.write_bytes(entry.data)
    for entry in reversed(entries):
        path = staging / entry.path
        if not stat.S_ISLNK(entry.mode):
            path.chmod(stat.S_IMODE(entry.mode))
        os.utime(path, (0, 0), follow_symlinks=False)
    staging.chmod(0o755)
    os.utime(staging, (0, 0))


def _give_to_root(raw: Path, entries: Iterable[tree.Entry], work: Path) -> None:
    commands = work / "owners"
    commands.write_text(
        "".join(f"sif /{entry.path} {field} 0\n" for entry in entries for field in ("uid", "gid"))
    )
    host.run(["debugfs", "-w", "-f", commands, raw], work, _EPOCH)
