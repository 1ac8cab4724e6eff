"""A machine's configuration as JSON, and back: for `inspect`, snapshots and other processes. VMM process and
its clients.

Paths are strings, a MAC has its colons. What a file says is checked like what a user says.
"""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from vmrun.machine.config import DiskConfig, MachineConfig, Mount, NicConfig, VhostUserDisk

PATHS = ("path", "backing", "kernel", "initrd", "cdrom", "firmware", "rom", "host")
NOT_TOLD = ("overlay",)  # a descriptor, which means nothing elsewhere
TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "Path": (str,),
    "Path | None": (str, type(None)),
    "bytes | None": (str, type(None)),
    "tuple[Path, ...]": (list,),
    "tuple[str, ...]": (list,),
}


def describe_config(config: MachineConfig) -> dict[str, Any]:
    return _describe(config)


def _describe(part: MachineConfig | DiskConfig | VhostUserDisk | NicConfig | Mount) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for each in fields(part):
        if each.name in NOT_TOLD:
            continue
        value = getattr(part, each.name)
        if isinstance(value, tuple):
            value = [
                os.fspath(element) if isinstance(element, str | os.PathLike) else _describe(element)
                for element in value
            ]
        elif isinstance(value, bytes):
            value = value.hex(":")
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        described[each.name] = value
    return described


def parse_config(described: object) -> MachineConfig:
    """Raises ValueError for what is no configuration, and UserError for one that cannot be."""
    keys = _dict(described, "a configuration")
    disks = [_parse_disk(each) for each in _list(keys.pop("disks", []))]
    nics = [NicConfig(**_parse(NicConfig, _dict(each, "a nic"))) for each in _list(keys.pop("nics", []))]
    mounts = [Mount(**_parse(Mount, _dict(each, "a mount"))) for each in _list(keys.pop("mounts", []))]
    return MachineConfig(
        **_parse(MachineConfig, keys), disks=tuple(disks), nics=tuple(nics), mounts=tuple(mounts)
    )


def _parse_disk(described: object) -> DiskConfig | VhostUserDisk:
    keys = _dict(described, "a disk")
    if "format" in keys:
        return DiskConfig(**_parse(DiskConfig, keys))
    return VhostUserDisk(**_parse(VhostUserDisk, keys))


def _parse(kind: type, keys: dict[str, Any]) -> dict[str, Any]:
    known = {each.name: each for each in fields(kind) if each.name not in NOT_TOLD}
    parsed = {}
    for key, value in keys.items():
        if key not in known:
            raise ValueError(f"{key}: no such setting")
        kind_of = known[key].type
        name = kind_of.__name__ if isinstance(kind_of, type) else str(kind_of).replace("pathlib.", "")
        wanted = TYPES.get(name)
        if wanted is None or not isinstance(value, wanted) or (isinstance(value, bool) and wanted != (bool,)):
            raise ValueError(f"{key}: {value!r} is not of its kind")
        if isinstance(value, list):
            if not all(isinstance(each, str) for each in value):
                raise ValueError(f"{key}: not a list of strings")
            value = tuple(Path(each) for each in value) if key in PATHS else tuple(value)
        elif isinstance(value, str) and key in PATHS:
            value = Path(value)
        elif isinstance(value, str) and name.startswith("bytes"):
            value = bytes.fromhex(value.replace(":", ""))
        parsed[key] = value
    required = {each.name for each in known.values() if each.default is each.default_factory}
    if missing := required - parsed.keys():
        raise ValueError(f"{sorted(missing)[0]} is missing")
    return parsed


def _dict(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    return dict(value)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("disks, nics and mounts are lists")
    return value
