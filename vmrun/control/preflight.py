"""What can be known to fail before any machine of a machine file is started: files that are not there or not
what they should be, and machines that want the same disk, tap or address. The process of `vmrun up`.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from vmrun.control.machine_entry import FILES, MachineEntry
from vmrun.control.toml_document import Document, key_text
from vmrun.control.toml_lines import KeyPath
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.disks import Disks
from vmrun.machine.config import DiskConfig, VhostUserDisk


def check_together(document: Document, machines: Iterable[MachineEntry]) -> None:
    """Problems of `machines` that are to run at the same time."""
    taken: dict[tuple[str, object], tuple[KeyPath, bool]] = {}

    def take(where: KeyPath, machine: MachineEntry, kind: str, thing: object, shared: bool = False) -> None:
        owner, others_share = taken.setdefault((kind, thing), (("machines", machine.name), shared))
        if owner != ("machines", machine.name) and not (shared and others_share):
            document.problem(where, f"{kind} {thing} is {key_text(owner)}'s too")

    for machine in machines:
        for index, disk in enumerate(machine.config.disks):
            if isinstance(disk, DiskConfig):
                where = (*machine.keys["disks"], index)
                take(where, machine, "disk", os.path.realpath(disk.path), disk.read_only or disk.throw_away)
        for index, nic in enumerate(machine.config.nics):
            where = (*machine.keys["nics"], index)
            if not nic.user:
                take(where, machine, "tap", nic.tap)
            if nic.mac is not None:
                take(where, machine, "mac", nic.mac.hex(":"))


def check_files(document: Document, machine: MachineEntry, *, runs: bool = False) -> None:
    """Problems of the files that `machine` is going to open. Its disks are opened, locked, and closed again;
    those of one that still runs are only looked at.
    """
    for key in FILES:
        path = getattr(machine.config, key)
        if path is not None:
            _check_readable(document, machine.keys[key], path)
    for index, disk in enumerate(machine.config.disks):
        where: KeyPath = (*machine.keys["disks"], index)
        if isinstance(disk, VhostUserDisk):
            if not disk.path.is_socket():
                document.problem(where, f"{disk.path}: no such socket", EXIT_IMAGE)
            continue
        if runs:
            _check_readable(document, where, disk.path)
            continue
        try:
            with Disks([disk]):
                pass
        except UserError as error:
            document.problem(where, str(error), error.code)
        except OSError as error:
            document.problem(where, f"disk {disk.path}: {error.strerror or error}", EXIT_IMAGE)
    for index, nic in enumerate(machine.config.nics):
        if nic.rom is not None:
            _check_readable(document, (*machine.keys["nics"], index, "rom"), nic.rom)


def _check_readable(document: Document, where: KeyPath, path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        document.problem(where, f"{path}: {(error.strerror or str(error)).lower()}", EXIT_IMAGE)
        return
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        document.problem(where, f"{path}: not a file", EXIT_IMAGE)
    elif not os.access(path, os.R_OK):
        document.problem(where, f"{path}: permission denied", EXIT_IMAGE)
