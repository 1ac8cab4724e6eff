"""The guest kit: where it is, and building it when it is not there.

The kernel and the root are cached apart, each under a hash of what it is made from, so that a change of the
init program does not build a kernel. All of this runs in the VMM's command line, never in a worker.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vmrun.guestkit import cache, guest_agent, host, kernel, root
from vmrun.guestkit.progress import Progress, Silent


@dataclass(frozen=True)
class GuestKit:
    """The files of a finished kit. All of them are read-only templates; copy or overlay the disk to write."""

    kernel: Path
    """The uncompressed kernel: an ELF file with a 64-bit and a PVH entry."""
    system_map: Path
    """Its symbols, as `nm` prints them."""
    initramfs: Path
    """An uncompressed cpio archive whose /init ends in a shell on ttyS0."""
    disk: Path
    """A qcow2 image: one ext4 file system, no partition table."""

    default_cmdline = (
        # With `quiet`, messages cost formatting but no console output.
        "console=ttyS0 quiet"
        # A panic resets at once, which ends the machine.
        " panic=-1"
        # Write protection of kernel text and the timer check are for real machines, and are seconds here.
        " rodata=off no_timer_check"
        # Patching a kernel for one CPU, and 2 MiB for the variables of each CPU, cost more than they give.
        " noreplace-smp percpu_alloc=page"
        # Giving the initramfs' memory back means writing over it first.
        " retain_initrd"
    )
    """The kernel command line for an initramfs boot."""
    disk_cmdline = f"{default_cmdline} root=/dev/vda rootfstype=ext4 rw init=/bin/init"
    """The kernel command line when the first disk is a copy of `disk`."""


def find() -> GuestKit | None:
    """The kit that `build` would return, if it is there already. Reads a few small files; starts nothing."""
    kernel_name, root_name = _names()
    kernel_directory = cache.find(kernel_name) if kernel_name else _newest("kernel", _kernel_key())
    root_directory = cache.find(root_name) if root_name else _newest("root", _root_key())
    if kernel_directory is None or root_directory is None:
        return None
    return _kit(kernel_directory, root_directory)


def build(progress: Progress | None = None) -> GuestKit:
    """The kit, built first where it is not in the cache: minutes the first time, no time later.

    Raises UserError when Debian packages are missing or a step fails, and OSError when the cache cannot be
    written.
    """
    there = find()
    if there is not None:
        return there
    host.check()
    teller = Silent() if progress is None else progress
    kernel_name, root_name = _names()
    source = host.kernel_source()
    if kernel_name is None or root_name is None or source is None:
        raise FileNotFoundError("the packages of the guest kit went away while they were looked at")
    # The root takes seconds: its mistakes show before the minutes of the kernel.
    root_directory = cache.find_or_make(root_name, lambda into: root.build(into, teller))
    kernel_directory = cache.find_or_make(kernel_name, lambda into: kernel.build(into, source, teller))
    return _kit(kernel_directory, root_directory)


def _kit(kernel_directory: Path, root_directory: Path) -> GuestKit:
    return GuestKit(
        kernel=kernel_directory / "vmlinux",
        system_map=kernel_directory / "System.map",
        initramfs=root_directory / "initramfs.cpio",
        disk=root_directory / "disk.qcow2",
    )


def _names() -> tuple[str | None, str | None]:
    """The names in the cache: what it is, a hash of our inputs, a hash of Debian's; None without Debian's."""
    return (
        _name("kernel", _kernel_key(), host.kernel_source()),
        _name("root", _root_key(), host.BUSYBOX),
    )


def _name(kind: str, key: str, package_file: Path | None) -> str | None:
    if package_file is None or not package_file.exists():
        return None
    # dpkg gives a file the time of its package version, so this changes with the version and needs no dpkg.
    about = package_file.stat()
    identity = f"{package_file.name} {about.st_size} {int(about.st_mtime)}"
    return f"{kind}-{key}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _newest(kind: str, key: str) -> Path | None:
    """A kit outlives the packages it was built from: any version will do when they are gone."""
    found = [path for path in cache.directory().glob(f"{kind}-{key}-????????") if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _kernel_key() -> str:
    return _hash("\n".join(kernel.inputs()).encode())


def _root_key() -> str:
    here = Path(__file__).parent
    modules = [here / name for name in ("root.py", "tree.py", "cpio.py")]
    files = [root.INIT_SOURCE, root.TRUE_SOURCE, *root.SCRIPTS.values(), *modules]
    return _hash(*(path.read_bytes() for path in files), *guest_agent.inputs())


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
