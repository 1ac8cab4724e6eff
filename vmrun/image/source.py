"""What kind of image a user names with `--image`: by a prefix, or by looking at what is there."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vmrun.errors import EXIT_USAGE, UserError
from vmrun.host.disks import SUFFIXES
from vmrun.image import docker
from vmrun.image.limits import Limits, refused
from vmrun.image.oci import INDEX, LAYOUT
from vmrun.image.stream import Decompressed, FileSlice
from vmrun.image.tar import Archive

KIT = "kit"
PREFIXES = ("dir", "oci", "docker", "tar", "raw", "qcow2")
_TAGGED = ("oci", "docker")


@dataclass(frozen=True)
class Source:
    """`kind` is "kit" or one of PREFIXES; `tag` chooses among the images of an archive."""

    kind: str
    path: Path
    tag: str = ""


def parse(spec: str | Path, limits: Limits) -> Source:
    """The source that `spec` names: [KIND:]PATH, oci:PATH:NAME, docker:PATH:NAME, or "kit".

    Disks are told by their suffix, never by content: a guest may have written what is in them. Raises
    UserError for what is none of these, and OSError for what is not there.
    """
    if spec == KIT:
        return Source(KIT, Path())
    if isinstance(spec, str):
        kind, colon, rest = spec.partition(":")
        if colon and kind in PREFIXES and rest:
            return _tagged(kind, rest) if kind in _TAGGED else Source(kind, Path(rest))
    path = Path(spec)
    if not str(spec):
        raise UserError("--image: give a directory, a disk, an archive, or kit", EXIT_USAGE)
    try:
        about = path.stat()
    except FileNotFoundError:
        raise refused(
            f"image {path}: there is no such file or directory "
            "(nothing is fetched: of a registry's image give what `docker save` writes)"
        ) from None
    if stat.S_ISDIR(about.st_mode):
        layout = (path / LAYOUT).is_file() and (path / INDEX).is_file()
        return Source("oci" if layout else "dir", path)
    if stat.S_ISBLK(about.st_mode):
        return Source("raw", path)
    if not stat.S_ISREG(about.st_mode):
        raise refused(f"image {path}: neither a file nor a directory")
    suffix = SUFFIXES.get(path.suffix.lower())
    if suffix in ("raw", "qcow2"):
        return Source(suffix, path)
    return Source(_archive_kind(path, limits), path)


def _tagged(kind: str, rest: str) -> Source:
    """A path and perhaps a name; either may have colons in it, so the shortest path that is there counts."""
    path, tag = rest, ""
    position = rest.find(":")
    while position >= 0 and not os.path.lexists(rest):
        if os.path.lexists(rest[:position]):
            path, tag = rest[:position], rest[position + 1 :]
            break
        position = rest.find(":", position + 1)
    if kind == "oci" and os.path.isfile(path):
        kind = "docker"  # a tar of a layout, which is read like the layouts that `docker save` writes
    return Source(kind, Path(path), tag)


def _archive_kind(path: Path, limits: Limits) -> str:
    """ "docker" or "tar", by its first entry with a name; `tar -C X .` begins with one that has none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        source = Decompressed(FileSlice(fd, 0, os.fstat(fd).st_size), f"image {path}", limits)
        members = iter(Archive(source, f"image {path}"))
        first = next((each for each in members if each.name.strip(b"./")), None)
    except UserError as error:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise refused(f"{error} (disks are told by their suffix, {suffixes}, or raw:{path})") from None
    finally:
        os.close(fd)
    return "docker" if first is not None and docker.looks_like(first.name) else "tar"
