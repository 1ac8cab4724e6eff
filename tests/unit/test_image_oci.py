"""OCI layouts and `docker save` archives that lie: no small file makes the host work, or remember, much."""

import bz2
import gzip
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.image_archives import File, Layout, image_config, named, tar
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.guestkit.progress import Silent
from vmrun.image import docker, oci
from vmrun.image.layers import Layers
from vmrun.image.limits import Limits
from vmrun.image.spool import Spool
from vmrun.image.stream import Reader

BASE = tar(("file", "etc/passwd", b"root:x:0:0::/:\n"))
SMALL = Limits(size=1 << 20)
HALF = "\ud800"  # of a character: JSON can have it, UTF-8 cannot


class Counting(oci.Directory):
    """Knows which files were opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.opened: list[str] = []

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Reader, int]]:
        self.opened.append(name)
        with super().open(name) as found:
            yield found


def refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert caught.value.code == EXIT_IMAGE
    assert len(str(caught.value).splitlines()) == 1


def merged(blobs: docker.ArchiveBlobs | oci.Directory, directory: Path) -> list[bytes]:
    """What is at the top of the image; `directory` is for its contents."""
    image = docker.find(blobs, "") if isinstance(blobs, docker.ArchiveBlobs) else oci.find(blobs, "")
    with Spool(directory, SMALL) as spool:
        layers = Layers(spool, SMALL)
        oci.merge(blobs, image, layers, SMALL, Silent())
        return list(layers.tree.root.children)


@contextmanager
def saved(
    directory: Path, *files: File, limits: Limits | None = None, **options: Any
) -> Iterator[docker.ArchiveBlobs]:
    with (directory / "saved").open("w+b") as file:
        file.write(tar(*files, **options))
        file.flush()
        yield docker.ArchiveBlobs(file.fileno(), file.tell(), "image test", limits or Limits())


def test_an_index_with_many_names_is_read_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    dense = layout.blob(b'{"manifests":[],"x":[' + b"[]," * 300_000 + b"[]]}", "index.v1+json")
    layout.index(*[dense] * 50)
    blobs = Counting(layout.path)
    tracemalloc.start()
    try:
        refused(lambda: oci.find(blobs, ""), "no image in it")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(blobs.opened) == 2
    assert peak < 60 << 20, "one takes 20 MiB"


def test_an_image_under_two_names_is_one(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    nested = layout.nested(layout.manifest([BASE]))
    path = layout.index(named(nested, "app"), named(nested, "app:latest"))
    image = oci.find(oci.Directory(path), "")
    assert [oci.find(oci.Directory(path), tag) for tag in ("app", "app:latest")] == [image, image]


def test_all_indexes_together_are_bounded(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    padded = [json.dumps({"manifests": [], "x": f"{n}" * (3 << 20)}).encode() for n in range(4)]
    layout.index(*[layout.blob(data, "index.v1+json") for data in padded])
    blobs = Counting(layout.path)
    refused(lambda: oci.find(blobs, ""), "more than 8 MiB of indexes")
    assert len(blobs.opened) == 1 + 3


@pytest.mark.parametrize("skipped", [True, False], ids=["unpacked", "packed"])
def test_all_layers_together_are_bounded(skipped: bool, tmp_path: Path) -> None:
    """Neither what comes out of the layers and is skipped, nor what goes in and gives nothing, is free."""
    many = bytes(20 << 20)
    if skipped:
        layer = tar(("file", ".wh..wh.aufs", many))
        packed = gzip.compress(layer, 1)
    else:
        layer = tar(("dir", "d", b""))
        packed = bz2.compress(layer) + many
    layout = Layout(tmp_path / "layout")
    about = layout.blob(image_config([layer] * 5), "config.v1+json")
    manifest = {"config": about, "layers": [layout.blob(packed)] * 5}
    path = layout.index(layout.blob(json.dumps(manifest).encode(), "manifest.v1+json"))
    refused(lambda: merged(oci.Directory(path), tmp_path), "layer [45]: .*--max-size")


def test_the_same_small_layer_often_is_no_attack(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    path = layout.index(layout.manifest([BASE, *[tar()] * 100]))
    assert merged(oci.Directory(path), tmp_path) == [b"etc"]


def test_half_characters_in_a_layout(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    path = layout.index({**layout.manifest([BASE]), "platform": {"os": HALF, "architecture": HALF}})
    refused(lambda: oci.find(oci.Directory(path), ""), "only for")
    both = [named(layout.manifest([BASE] * number), HALF) for number in (1, 2)]
    layout.index(*both)
    refused(lambda: oci.find(oci.Directory(path), ""), "choose one with")
    about = layout.manifest([BASE], HALF)
    del about["platform"]
    layout.index(about)
    refused(lambda: oci.find(oci.Directory(path), ""), "an image for")
    layout.index(layout.manifest([BASE], Cmd=[HALF]))
    refused(lambda: oci.find(oci.Directory(path), ""), "half a character in Cmd")


@pytest.mark.parametrize(
    "names", [{"Config": HALF}, {"Layers": [HALF]}, {"Config": "\0"}, {"Config": "x" * 9999}], ids=repr
)
def test_names_that_no_file_of_an_archive_has(names: dict[str, Any], tmp_path: Path) -> None:
    manifest = json.dumps([{"Config": "c.json", "Layers": ["l.tar"], **names}]).encode()
    files: list[File] = [
        ("file", "c.json", image_config([BASE])),
        ("file", "l.tar", BASE),
        ("file", "manifest.json", manifest),
    ]
    with saved(tmp_path, *files) as blobs:
        refused(lambda: merged(blobs, tmp_path), "is missing|a zero byte|a path of more than")


def test_names_of_an_archive_are_bytes(tmp_path: Path) -> None:
    manifest = json.dumps([{"Config": "c.json", "Layers": ["l.tar"]}]).encode()
    files: list[File] = [
        # As tarfile has a byte that is no UTF-8.
        ("file", "\udce9/l.tar", BASE),
        ("symlink", "\udce9/link", "l.tar"),
        ("symlink", "l.tar", "\udce9/link"),
        ("file", "c.json", image_config([BASE])),
        ("file", "manifest.json", manifest),
    ]
    with saved(tmp_path, *files, format=tarfile.GNU_FORMAT) as blobs:
        assert merged(blobs, tmp_path) == [b"etc"]


@pytest.mark.parametrize("kind", ["file", "symlink", "link"])
def test_names_of_an_archive_are_bounded(kind: str, tmp_path: Path) -> None:
    def read(length: int, metadata: int) -> None:
        long = "n" * length
        files: list[File] = [
            (kind, f"{number}{long}", b"") if kind == "file" else (kind, f"{number}", long)
            for number in range(10)
        ]
        with saved(tmp_path, *files, limits=Limits(metadata=metadata)):
            pass

    read(2000, 21_000)
    refused(lambda: read(2000, 19_000), "--max-metadata")
    refused(lambda: read(5000, 1 << 20), "a path of more than 4095 bytes")
