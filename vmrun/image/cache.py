"""The converted images: where they are, which are used, and how much of the host's disk they take.

They lie in the guest kit's cache, with its locks and its way of appearing whole: `image-<digest>` holds
`disk.raw` and `image.json`. Beside them, `image-sources.json` remembers which content a file had when it was
last hashed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmrun.errors import UserError
from vmrun.guestkit import cache
from vmrun.host.disks import FLOCK
from vmrun.image.config import Image, ImageConfig

VERSION = 1
"""Part of every key: one more whenever the same image would give another disk."""
PREFIX = "image-"
DISK = "disk.raw"
ABOUT = "image.json"
DEFAULT_LIMIT = 32 << 30
_SOURCES = "image-sources.json"
_MAX_SOURCES = 1000


@dataclass(frozen=True)
class CachedImage:
    digest: str
    image: Image
    spec: str
    """As it was named when it was converted."""
    used: int
    """Bytes of the host's disk."""
    last_used: float
    """Seconds since the epoch."""
    in_use: bool
    """Whether a machine has the disk open."""


def digest(*parts: object) -> str:
    """A key for what `parts` decide."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:32]


def find(key: str) -> Image | None:
    path = cache.find(PREFIX + key)
    return _load(path, touch=True) if path is not None else None


def find_or_make(key: str, make: Callable[[Path], None]) -> Image:
    """The image `key`; `make` fills an empty directory when there is none. Others are removed, the longest
    unused first, when all together are larger than `limit()`.
    """
    there = cache.find(PREFIX + key) is not None
    path = cache.find_or_make(PREFIX + key, make)
    image = _load(path, touch=True)
    if image is None:
        # A damaged disk of the host, or somebody edited it.
        remove(key)
        image = _load(cache.find_or_make(PREFIX + key, make), touch=True)
        if image is None:
            raise OSError(None, f"{path}: cannot be read back")
    if not there:
        shrink(keep=key)
    return image


def save(into: Path, spec: str, source: str, config: ImageConfig) -> None:
    """Write what is to be known of the image beside its disk."""
    about = {"version": VERSION, "spec": spec, "source": source, "config": config.as_json()}
    (into / ABOUT).touch(0o600)
    (into / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def images() -> list[CachedImage]:
    """All finished images, the last used first."""
    found = []
    for path in cache.directory().glob(f"{PREFIX}{'?' * 32}"):
        image = _load(path, touch=False)
        if image is None:
            continue
        try:
            about = json.loads((path / ABOUT).read_bytes())
            used = (path / DISK).stat().st_blocks * 512
            last_used = (path / ABOUT).stat().st_mtime
        except OSError:
            continue  # removed meanwhile
        spec = str(about.get("spec", ""))
        found.append(CachedImage(image.digest, image, spec, used, last_used, _in_use(image.disk)))
    return sorted(found, key=lambda cached: cached.last_used, reverse=True)


def remove(key: str) -> bool:
    """Remove an image; machines that have it open keep it until they end. False when there is none."""
    return cache.remove(PREFIX + key)


def limit() -> int:
    """Bytes that all images together may take: $VMRUN_IMAGE_CACHE, as in 20G, or 32 GiB."""
    chosen = os.environ.get("VMRUN_IMAGE_CACHE")
    if not chosen:
        return DEFAULT_LIMIT
    from vmrun.units import parse_size

    return parse_size("VMRUN_IMAGE_CACHE", chosen)


def shrink(keep: str = "") -> list[str]:
    """Remove what was not used for longest until the rest is within the limit; what is in use stays."""
    removed = []
    found = images()
    total = sum(cached.used for cached in found)
    for cached in reversed(found):
        if total <= limit():
            break
        if cached.digest != keep and not cached.in_use and remove(cached.digest):
            removed.append(cached.digest)
            total -= cached.used
    return removed


def known(identity: list[int | str]) -> str | None:
    """What `remember` was told about this identity."""
    value = _sources().get(_identity_key(identity))
    return value if isinstance(value, str) else None


def remember(identity: list[int | str], content: str) -> None:
    """So that a large archive is hashed once. Two at once lose one of the two, which costs time only."""
    sources = _sources()
    sources.pop(_identity_key(identity), None)
    sources[_identity_key(identity)] = content
    kept = dict(list(sources.items())[-_MAX_SOURCES:])
    root = cache.directory()
    root.mkdir(parents=True, exist_ok=True)
    for left_behind in root.glob(f"{_SOURCES}.?*"):
        try:
            # Nobody takes a minute to write a page: its writer was killed.
            if left_behind.stat().st_mtime < time.time() - 60:
                left_behind.unlink()
        except FileNotFoundError:
            continue
    with tempfile.NamedTemporaryFile("w", dir=root, prefix=f"{_SOURCES}.", delete=False) as file:
        try:
            json.dump(kept, file)
            file.flush()
            os.replace(file.name, root / _SOURCES)
        except BaseException:
            os.unlink(file.name)
            raise


def _identity_key(identity: list[int | str]) -> str:
    return digest(*identity)


def _sources() -> dict[str, Any]:
    try:
        values = json.loads((cache.directory() / _SOURCES).read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _load(path: Path, *, touch: bool) -> Image | None:
    """The image in a finished directory; None when it is damaged."""
    try:
        about = json.loads((path / ABOUT).read_bytes())
        config = ImageConfig.from_json(about["config"])
        source = str(about["source"])
        if not (path / DISK).is_file():
            return None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    if touch:
        try:
            os.utime(path / ABOUT)
        except OSError:
            pass  # another user's cache: it only grows older
    return Image(path / DISK, "raw", path.name.removeprefix(PREFIX), config, "ext4", source)


def _in_use(disk: Path) -> bool:
    """Whether some machine holds its lock of the disk (vmrun.host.disks)."""
    try:
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        query = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query)
        return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)
