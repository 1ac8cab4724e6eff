"""OCI images: finding the manifest for this machine, and checking what it names (OCI image-spec 1.1:
image-layout.md, image-index.md, manifest.md, config.md).

The blobs may be in a directory, or in an archive that `docker save` or `skopeo` made: `Blobs` says where.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vmrun.guestkit.progress import Progress
from vmrun.image.config import ImageConfig
from vmrun.image.layers import Layers
from vmrun.image.limits import MAX_INDEXES, MAX_JSON, Limits, refused, shown
from vmrun.image.stream import Decompressed, FileSlice, Hashed, Reader

INDEX = "index.json"
LAYOUT = "oci-layout"
PLATFORM = ("linux", "amd64")
_REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"
_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_MAX_NESTING = 4
_MAX_DESCRIPTORS = 1000
_MAX_LAYERS = 500


class Blobs(Protocol):
    """Where an image's files are. Names are checked before they come here: "blobs/sha256/<hex>"."""

    what: str
    """The image, for messages."""

    def open(self, name: str) -> AbstractContextManager[tuple[Reader, int]]:
        """The content of a file and its size; raises UserError when it is missing."""


@dataclass(frozen=True)
class Layer:
    name: str
    """In the Blobs."""
    digest: str | None
    """Of the layer as stored, where the format states one."""
    diff_id: str
    """Of the layer when decompressed."""


@dataclass(frozen=True)
class OciImage:
    """A checked manifest. `key` names the content of all layers: the configuration lists their digests."""

    key: str
    config: ImageConfig
    layers: tuple[Layer, ...]


class Directory:
    """The Blobs of an OCI layout directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.what = str(path)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Reader, int]]:
        # Neither a link to another file of the user's nor a pipe that never ends is a blob.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self.path / name, flags)
        except FileNotFoundError:
            raise refused(f"{self.what}: {name} is missing") from None
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                raise refused(f"{self.what}: {name} is not a regular file")
            yield FileSlice(fd, 0, about.st_size), about.st_size
        finally:
            os.close(fd)


def find(blobs: Blobs, tag: str) -> OciImage:
    """The image for this platform in an OCI layout; `tag` chooses among several."""
    candidates = _candidates(blobs, tag)
    if not candidates:
        raise refused(f"{blobs.what}: no image in it" + (f" with the name {tag}" if tag else ""))
    fitting = {}
    others = set()
    for descriptor in candidates:
        platform = descriptor.get("platform")
        if isinstance(platform, dict) and not _fits(platform):
            others.add(f"{platform.get('os')}/{platform.get('architecture')}")
        else:
            fitting[_digest(blobs, descriptor)] = descriptor
    if not fitting:
        there = shown(", ".join(sorted(others)))
        raise refused(f"{blobs.what}: no image for {'/'.join(PLATFORM)} in it, only for {there}")
    if len(fitting) > 1:
        names = ", ".join(sorted(name for each in fitting.values() for name in _names(each)))
        raise refused(
            f"{blobs.what}: {len(fitting)} images in it: choose one with oci:{blobs.what}:NAME"
            + (f" ({shown(names)})" if names else "")
        )
    return _image(blobs, *_blob(blobs, next(iter(fitting.values()))))


def parse_config(blobs: Blobs, name: str, digest: str | None = None) -> tuple[str, ImageConfig, list[str]]:
    """Of the configuration file `name`: its sha256, how to run the image, and the digests of its layers."""
    data = _read_small(blobs, name, digest)
    values = _parse(blobs, name, data)
    found = (values.get("os"), values.get("architecture"))
    if found != PLATFORM:
        there = shown(f"{found[0]}/{found[1]}")
        raise refused(f"{blobs.what}: an image for {there}; this host runs {'/'.join(PLATFORM)}")
    rootfs = values.get("rootfs")
    # An image without layers has null there, as Go writes an empty list.
    diff_ids = (rootfs.get("diff_ids") or []) if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(_is_digest(diff_id) for diff_id in diff_ids):
        raise refused(f"{blobs.what}: {name} does not say the digests of its layers")
    if len(diff_ids) > _MAX_LAYERS:
        raise refused(f"{blobs.what}: more than {_MAX_LAYERS} layers")
    config = values.get("config")
    return (
        hashlib.sha256(data).hexdigest(),
        ImageConfig.from_oci(config if isinstance(config, dict) else {}),
        diff_ids,
    )


def merge(blobs: Blobs, image: OciImage, layers: Layers, limits: Limits, progress: Progress) -> None:
    """Put all layers of the image on top of each other, and check their digests."""
    # All layers together: a manifest may name the same bomb five hundred times.
    before = 0
    for number, layer in enumerate(image.layers, 1):
        what = f"{blobs.what}: layer {number}"
        with blobs.open(layer.name) as (stored, size):
            progress.step(f"reading layer {number} of {len(image.layers)}", size >> 20)
            packed = Hashed(stored, _algorithm(layer.digest or layer.diff_id), progress)
            unpacked = Hashed(Decompressed(packed, what, limits, before), _algorithm(layer.diff_id))
            layers.add(unpacked, what)
            packed.read_rest()
        # What a decoder reads costs time too, when nothing comes out of it.
        before += max(packed.count, unpacked.count)
        if unpacked.hexdigest() != layer.diff_id.partition(":")[2]:
            raise refused(f"{what}: damaged: its content does not have the digest {layer.diff_id}")
        if layer.digest is not None and packed.hexdigest() != layer.digest.partition(":")[2]:
            raise refused(f"{what}: damaged: it does not have the digest {layer.digest}")


def _candidates(blobs: Blobs, tag: str) -> list[dict[str, Any]]:
    """All manifests that the layout's index leads to; the tag is that of the outermost descriptor."""
    found: list[dict[str, Any]] = []
    pending: list[tuple[str, str | None, int]] = [(INDEX, None, 0)]
    # One index may have several names. A hostile one has a thousand, so each is read once, and only when its
    # turn comes.
    seen: set[str] = set()
    looked_at = size = 0
    while pending:
        name, digest, depth = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        data = _read_small(blobs, name, digest)
        size += len(data)
        if size > MAX_INDEXES:
            raise refused(f"{blobs.what}: more than {MAX_INDEXES >> 20} MiB of indexes")
        manifests = _parse(blobs, name, data).get("manifests")
        if not isinstance(manifests, list) or not all(isinstance(each, dict) for each in manifests):
            raise refused(f"{blobs.what}: an index without a list of manifests")
        for descriptor in manifests:
            looked_at += 1
            if looked_at > _MAX_DESCRIPTORS or depth >= _MAX_NESTING:
                raise refused(f"{blobs.what}: too many manifests, or too deep in each other")
            if depth == 0 and tag and tag not in _names(descriptor):
                continue
            if "index" in str(descriptor.get("mediaType")) or "list" in str(descriptor.get("mediaType")):
                pending.append((*_blob(blobs, descriptor), depth + 1))
            else:
                found.append(descriptor)
    return found


def _image(blobs: Blobs, name: str, digest: str) -> OciImage:
    manifest = _parse(blobs, name, _read_small(blobs, name, digest))
    config, layers = manifest.get("config"), manifest.get("layers")
    if not isinstance(config, dict) or not isinstance(layers, list):
        raise refused(f"{blobs.what}: a manifest without a configuration or layers")
    key, run_config, diff_ids = parse_config(blobs, *_blob(blobs, config))
    if len(layers) != len(diff_ids):
        raise refused(
            f"{blobs.what}: the manifest has {len(layers)} layers, the configuration {len(diff_ids)}"
        )
    found = []
    for layer, diff_id in zip(layers, diff_ids, strict=True):
        if not isinstance(layer, dict):
            raise refused(f"{blobs.what}: a manifest with damaged layers")
        name, digest = _blob(blobs, layer)
        found.append(Layer(name, digest, diff_id))
    return OciImage(key, run_config, tuple(found))


def _blob(blobs: Blobs, descriptor: Mapping[str, Any]) -> tuple[str, str]:
    """The file that a descriptor names, and its digest."""
    digest = _digest(blobs, descriptor)
    return f"blobs/{digest.replace(':', '/')}", digest


def _digest(blobs: Blobs, descriptor: Mapping[str, Any]) -> str:
    digest = descriptor.get("digest")
    if not _is_digest(digest):
        raise refused(f"{blobs.what}: a descriptor without a sha256 or sha512 digest")
    return str(digest)


def _is_digest(value: object) -> bool:
    # The whole of it: a digest becomes a part of a path.
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _algorithm(digest: str) -> str:
    return digest.partition(":")[0]


def _names(descriptor: Mapping[str, Any]) -> list[str]:
    annotations = descriptor.get("annotations")
    if not isinstance(annotations, dict):
        return []
    return [
        name for name in (annotations.get(_REF_NAME), annotations.get(_FULL_NAME)) if isinstance(name, str)
    ]


def _fits(platform: Mapping[str, Any]) -> bool:
    # amd64 has variants v1 to v4; above v1 needs a newer CPU, and is never the only choice.
    return (platform.get("os"), platform.get("architecture")) == PLATFORM and platform.get("variant") in (
        None,
        "",
        "v1",
    )


def _read_small(blobs: Blobs, name: str, digest: str | None) -> bytes:
    with blobs.open(name) as (source, size):
        if size > MAX_JSON:
            raise refused(f"{blobs.what}: {name} is larger than {MAX_JSON >> 20} MiB")
        data = b"".join(iter(lambda: source.read(MAX_JSON), b""))
    if digest is not None and hashlib.new(_algorithm(digest), data).hexdigest() != digest.partition(":")[2]:
        raise refused(f"{blobs.what}: {name} is damaged: it does not have its digest")
    return data


def _parse(blobs: Blobs, name: str, data: bytes) -> Any:
    return parse_json(data, f"{blobs.what}: {name}", dict)


def parse_json(data: bytes, what: str, kind: type) -> Any:
    """A JSON value of the given type."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise refused(f"{what} is not JSON") from None
    if not isinstance(values, kind):
        raise refused(f"{what} is not what it should be")
    return values
