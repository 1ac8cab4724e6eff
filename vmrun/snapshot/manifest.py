"""The manifest of a snapshot: what is in its directory and what it needs around it, in a form that people can
read. VMM process.

A snapshot is a directory:

    manifest.json    this; written last
    state.json       processors, interrupt controllers, devices and rings
    memory           the guest's memory, sparse (vmrun.snapshot.memory_file, with its checksums beside it)
    diskN.qcow2      what a machine had written to a throw-away overlay

Other disks stay where they are: they are frozen, and the manifest tells their files from changed ones.
Formats are numbered, and another number is refused: a guess about a guest's state would be a guess about its
data.
"""

import errno
import json
import os
import stat
from dataclasses import asdict, dataclass, field, fields
from io import FileIO
from pathlib import Path
from typing import Any

from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.snapshot.sha256 import sha256

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MEMORY = "memory"
FINGERPRINT_BYTES = 1 << 20  # of a disk's file are looked at: a header and tables, of a qcow2 image
MAX_JSON = 64 << 20


@dataclass(frozen=True, slots=True)
class FrozenFile:
    """A file of a disk as it was: `path` is absolute, or relative to the snapshot's directory. `fingerprint`
    is the SHA-256 of its first MiB.
    """

    path: str
    format: str
    size: int
    mtime_ns: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`config` is vmrun.machine.config_json's, `cpu` vmrun.kvm.state's, `memory` that of memory_file here.

    `disks` has a list of files for each disk of the configuration, the topmost first; none for one that
    somebody else serves. `macs` are those the guest knows its cards by. `created` is seconds since the epoch.
    """

    name: str
    created: float
    vmrun: str
    config: dict[str, Any]
    cpu: dict[str, Any]
    memory: dict[str, Any]
    state_sha256: str
    disks: list[list[FrozenFile]]
    cdrom: FrozenFile | None = None
    macs: list[str] = field(default_factory=list)


def open_file(path: Path) -> int:
    """The descriptor of a file of a snapshot, or of a disk that it needs, for reading. OSError when it is not
    there, or is neither a file nor a block device.
    """
    # Whoever made the snapshot may have put a FIFO there, or named a device: the one must not make us wait,
    # and to open the other does something to many (`vmrun.host.disks`). So it is asked before and after.
    found = os.stat(path)
    if _is_file(found):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        if _is_file(os.fstat(fd)):
            return fd
        os.close(fd)
    raise OSError(errno.EINVAL, "Not a file", os.fspath(path))


def _is_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)


def freeze(path: Path, format: str, directory: Path) -> FrozenFile:
    """The facts of the file as it is now; one in `directory`, the snapshot's, gets a relative name."""
    path = path.absolute()
    with open(open_file(path), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        fingerprint = _fingerprint(file)
    stored = path.name if path.parent == directory.absolute() else os.fspath(path)
    return FrozenFile(stored, format, status.st_size, status.st_mtime_ns, fingerprint)


def check_frozen(frozen: FrozenFile, path: Path) -> None:
    """Refuse the file at `path` when it is not what it was. A copy may have another time; another size or
    beginning makes it another disk. UserError.
    """
    try:
        with open(open_file(path), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size != frozen.size:
                what = f"its file had {frozen.size} bytes and has {status.st_size}"
            elif status.st_mtime_ns == frozen.mtime_ns:
                return
            elif os.fspath(path) == frozen.path:
                what = "it was written to"
            elif _fingerprint(file) != frozen.fingerprint:
                what = "its beginning is another"
            else:
                return
    except OSError as error:
        text = (error.strerror or str(error)).lower()
        raise UserError(
            f"disk {path}, which the snapshot needs: {text}: if it was moved, give its new place with --disk",
            EXIT_IMAGE,
        ) from None
    raise UserError(
        f"disk {path} has changed since the snapshot was made ({what}): the guest's memory does not fit it "
        "any more, and to go on would destroy its file systems",
        EXIT_IMAGE,
    )


def _fingerprint(file: FileIO) -> str:
    digest = sha256()
    left = FINGERPRINT_BYTES
    while left and (piece := file.read(left)):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def write(manifest: Manifest, directory: Path) -> None:
    described = {"format": FORMAT, **asdict(manifest)}
    write_file(directory / MANIFEST, json.dumps(described, indent=2).encode() + b"\n")


def write_file(path: Path, data: bytes) -> None:
    """A new file, durably."""
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def read(directory: Path) -> Manifest:
    """UserError when `directory` is no snapshot, or none that this vmrun can restore."""
    described = _read_json(directory, directory / MANIFEST)
    found = described.pop("format", None)
    if found != FORMAT:
        by = described.get("vmrun")
        maker = f", by vmrun {by}" if isinstance(by, str) else ""
        raise UserError(
            f"{directory}: a snapshot of format {found!r}{maker}; this vmrun knows format {FORMAT} only: "
            "restore it with the vmrun that made it",
            EXIT_IMAGE,
        )
    try:
        return _parse(described)
    except (TypeError, ValueError) as error:
        raise UserError(f"{directory / MANIFEST}: damaged: {error}", EXIT_IMAGE) from None


def read_state(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """The state, when it is the one that the manifest knows. UserError otherwise."""
    return _read_json(directory, directory / STATE, manifest.state_sha256)


def _read_json(directory: Path, path: Path, checksum: str | None = None) -> dict[str, Any]:
    try:
        with open(open_file(path), "rb", buffering=0) as file:
            text = os.pread(file.fileno(), MAX_JSON + 1, 0)
    except OSError as error:
        what = (error.strerror or str(error)).lower()
        raise UserError(f"{directory} is no snapshot: {path.name}: {what}", EXIT_IMAGE) from None
    if checksum is not None and sha256(text).hexdigest() != checksum:
        raise UserError(f"{path}: damaged: its checksum is not the manifest's", EXIT_IMAGE)
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise UserError(f"{path}: damaged: not a JSON object", EXIT_IMAGE)
    return described


def _parse(described: dict[str, Any]) -> Manifest:
    known = {each.name for each in fields(Manifest)}
    if unknown := described.keys() - known:
        raise ValueError(f"{min(unknown)}: unknown")
    kinds: dict[str, tuple[type, ...]] = {
        "name": (str,),
        "created": (int, float),
        "vmrun": (str,),
        "config": (dict,),
        "cpu": (dict,),
        "memory": (dict,),
        "state_sha256": (str,),
        "disks": (list,),
        "macs": (list,),
    }
    for key, kind in kinds.items():
        if not isinstance(described.get(key), kind):
            raise ValueError(f"{key} is missing or not of its kind")
    disks = []
    for files in described["disks"]:
        if not isinstance(files, list):
            raise ValueError("disks has a list of files for each disk")
        disks.append([_frozen(file) for file in files])
    cdrom = described.get("cdrom")
    return Manifest(
        **{
            **described,
            "disks": disks,
            "macs": [_mac(mac) for mac in described["macs"]],
            "cdrom": None if cdrom is None else _frozen(cdrom),
        }
    )


def _frozen(value: object) -> FrozenFile:
    kinds = {"path": str, "format": str, "size": int, "mtime_ns": int, "fingerprint": str}
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise ValueError("a disk's file is not described as one")
    if any(type(value[key]) is not kind for key, kind in kinds.items()):
        raise ValueError("a disk's file has facts of the wrong kind")
    if b"\0" in os.fsencode(value["path"]):
        raise ValueError("a disk's file has a name that no file can have")
    return FrozenFile(**value)


def _mac(value: object) -> str:
    if not isinstance(value, str) or len(bytes.fromhex(value.replace(":", ""))) != 6:
        raise ValueError("a card's address is not six bytes")
    return value
