"""What `resolve` returns: the disk, and what the image says about running it (OCI image-spec, config.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmrun.image.limits import refused


@dataclass(frozen=True)
class ImageConfig:
    """How the image wants to be run; all empty for what has no configuration.

    `user` is "name", "uid", "name:group" or "uid:gid", to be looked up in the image's own /etc/passwd; it and
    `workdir` are text of the image's author: check before use.
    """

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "env": dict(self.env)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ImageConfig:
        """The reverse of `as_json`; raises ValueError or UserError for anything else."""
        env = values.get("env", {})
        if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
            raise ValueError("env is no object of strings")
        return cls(
            strings("entrypoint", values.get("entrypoint")),
            strings("cmd", values.get("cmd")),
            env,
            string("user", values.get("user")),
            string("workdir", values.get("workdir")),
        )

    @classmethod
    def from_oci(cls, values: Mapping[str, Any]) -> ImageConfig:
        """From the "config" object of an OCI or Docker image configuration."""
        env: dict[str, str] = {}
        for setting in strings("Env", values.get("Env")):
            name, equals, value = setting.partition("=")
            if name and equals:
                env[name] = value
        return cls(
            strings("Entrypoint", values.get("Entrypoint")),
            strings("Cmd", values.get("Cmd")),
            env,
            string("User", values.get("User")),
            string("WorkingDir", values.get("WorkingDir")),
        )


@dataclass(frozen=True)
class Image:
    """A root to run. The disk is shared by all who use it: open it read-only, write to an overlay."""

    disk: Path
    format: str
    """"raw" or "qcow2"."""
    digest: str
    """Changes when what is on the disk does: hexadecimal, for use in keys."""
    config: ImageConfig
    file_system: str
    """What the disk holds without a partition table, for `rootfstype=`; "" when nobody looked."""
    source: str
    """What it was made from: "kit", "directory", "disk", "oci", "docker" or "tar"."""
    backing: tuple[Path, ...] = ()
    """Other files it depends on: none for what was converted."""


def strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise refused(f"image configuration: {name} is not a list of strings")
    return tuple(checked(name, part) for part in value)


def string(name: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise refused(f"image configuration: {name} is not a string")
    return checked(name, value)


def checked(name: str, text: str) -> str:
    """Neither an argument nor a variable of a program can hold a zero byte (execve(2))."""
    if "\0" in text:
        raise refused(f"image configuration: a zero byte in {name}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(f"image configuration: half a character in {name}") from None
    return text
