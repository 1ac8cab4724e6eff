"""Archives of images: what `docker save` and `podman save` write, and tars of OCI layouts.

The archive is never unpacked: its files are found once, and read where they are. Format: Docker image
specification 1.2, "Combined Image JSON + Filesystem Changeset Format" (manifest.json).
"""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from vmrun.image import oci
from vmrun.image.limits import MAX_JSON, Limits, refused, shown
from vmrun.image.stream import FileSlice, Reader
from vmrun.image.tar import Archive, Member
from vmrun.image.tree import MAX_SYMLINKS, components

MANIFEST = "manifest.json"
_HEX = frozenset(b"0123456789abcdef")


def looks_like(first_name: bytes) -> bool:
    """Whether an archive that begins with this file is one of images, and not of a root."""
    first = first_name.removeprefix(b"./").split(b"/")[0]
    if first.decode("latin-1") in ("blobs", MANIFEST, "repositories", oci.INDEX, oci.LAYOUT):
        return True
    digest = first.removesuffix(b".tar").removesuffix(b".json")
    return len(digest) == 64 and _HEX.issuperset(digest)


class ArchiveBlobs:
    """The files of an uncompressed archive, as `oci.Blobs`. The descriptor stays the caller's."""

    def __init__(self, fd: int, size: int, what: str, limits: Limits) -> None:
        self.what = what
        self._fd = fd
        self._limits = limits
        self._files: dict[bytes, tuple[int, int]] = {}
        self._links: dict[bytes, bytes] = {}
        self._metadata = 0
        source = FileSlice(fd, 0, size)
        count = 0
        try:
            for member in Archive(source, what):
                count += 1
                if count > limits.entries:
                    raise limits.over_entries(what)
                self._add(member, source.position)
        except EOFError:
            raise refused(f"{what}: the archive ends too early") from None

    def _add(self, member: Member, position: int) -> None:
        path = _normal(member.name)
        self._files.pop(path, None)
        self._links.pop(path, None)
        # A name takes its archive a few bytes when it is compressed: it counts as a layer's names do.
        self._metadata += len(path)
        if member.link is not None:
            self._links[path] = _normal(member.link)
        elif stat.S_ISLNK(member.mode):
            # Docker before 25 stored a layer that two images share once, and links to it.
            self._links[path] = _normal(posixpath.join(posixpath.dirname(path), member.target))
        elif stat.S_ISREG(member.mode):
            self._files[path] = (position, member.size)
        self._metadata += len(self._links.get(path, b""))
        if self._metadata > self._limits.metadata:
            raise self._limits.over_metadata(self.what)

    def __contains__(self, name: str) -> bool:
        return name.encode() in self._files

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Reader, int]]:
        # JSON may name a file with half a character: no archive has it, and that is all that is wrong.
        path = _normal(name.encode("utf-8", "surrogatepass"))
        for _ in range(MAX_SYMLINKS):
            if path not in self._links:
                break
            path = self._links[path]
        if path not in self._files:
            raise refused(f"{self.what}: {shown(name)} is missing")
        position, size = self._files[path]
        yield FileSlice(self._fd, position, size), size


def find(blobs: ArchiveBlobs, tag: str) -> oci.OciImage:
    """The image in an archive; `tag` chooses among several."""
    if MANIFEST not in blobs:
        if oci.INDEX in blobs:
            return oci.find(blobs, tag)
        raise refused(f"{blobs.what}: neither {MANIFEST} nor {oci.INDEX} in it: not made by docker save?")
    with blobs.open(MANIFEST) as (source, size):
        if size > MAX_JSON:
            raise refused(f"{blobs.what}: {MANIFEST} is larger than {MAX_JSON >> 20} MiB")
        data = b"".join(iter(lambda: source.read(MAX_JSON), b""))
    images = oci.parse_json(data, f"{blobs.what}: {MANIFEST}", list)
    fitting = [image for image in images if isinstance(image, dict) and (not tag or _has_tag(image, tag))]
    if not fitting:
        raise refused(f"{blobs.what}: no image in it" + (f" with the name {tag}" if tag else ""))
    if len(fitting) > 1:
        names = ", ".join(name for image in fitting for name in _tags(image))
        raise refused(
            f"{blobs.what}: {len(fitting)} images in it: choose one with docker:{blobs.what}:NAME"
            f" ({shown(names)})"
        )
    config, layers = fitting[0].get("Config"), fitting[0].get("Layers")
    layers = [] if layers is None else layers
    if not isinstance(config, str) or not isinstance(layers, list):
        raise refused(f"{blobs.what}: {MANIFEST} does not name a configuration and layers")
    key, run_config, diff_ids = oci.parse_config(blobs, config)
    if len(layers) != len(diff_ids) or not all(isinstance(layer, str) for layer in layers):
        raise refused(
            f"{blobs.what}: {len(layers)} layers in {MANIFEST}, {len(diff_ids)} in the configuration"
        )
    pairs = zip(layers, diff_ids, strict=True)
    return oci.OciImage(key, run_config, tuple(oci.Layer(name, None, diff_id) for name, diff_id in pairs))


def _has_tag(image: dict[str, object], tag: str) -> bool:
    # As everywhere with Docker, a name without a tag means its latest.
    return any(name in (tag, f"{tag}:latest") for name in _tags(image))


def _tags(image: dict[str, object]) -> list[str]:
    tags = image.get("RepoTags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _normal(name: bytes) -> bytes:
    return posixpath.normpath(b"/" + b"/".join(components(name))).lstrip(b"/")
