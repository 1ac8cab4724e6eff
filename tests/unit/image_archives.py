"""Archives of images as other programs would write them, and what is on a disk according to debugfs."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

File = tuple[str, str, bytes | str | tuple[int, int]]
"""A kind ("file", "dir", "symlink", "link", "block", "char", "fifo"), a name, and what it is of."""

KINDS = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "link": tarfile.LNKTYPE,
    "block": tarfile.BLKTYPE,
    "char": tarfile.CHRTYPE,
    "fifo": tarfile.FIFOTYPE,
}


def tar(*files: File, format: int = tarfile.PAX_FORMAT, **attributes: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for kind, name, what in files:
            info = tarfile.TarInfo(name)
            info.type = KINDS[kind]
            info.mode = 0o755 if kind == "dir" else 0o644
            info.mtime = 1_600_000_000
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            if isinstance(what, tuple):
                info.devmajor, info.devminor = what
            elif isinstance(what, str):
                info.linkname = what
            else:
                info.size = len(what)
            archive.addfile(info, io.BytesIO(what) if isinstance(what, bytes) else None)
    return out.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def image_config(layers: list[bytes], architecture: str = "amd64", **config: Any) -> bytes:
    return json.dumps(
        {
            "os": "linux",
            "architecture": architecture,
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        }
    ).encode()


class Layout:
    """An OCI layout directory in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, kind: str = "layer.v1.tar+gzip", **more: Any) -> dict[str, Any]:
        digest = sha256(data)
        (self.path / "blobs" / digest.replace(":", "/")).write_bytes(data)
        media_type = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}

    def manifest(self, layers: list[bytes], architecture: str = "amd64", **config: Any) -> dict[str, Any]:
        """An image of uncompressed `layers`, which are stored with gzip."""
        about = self.blob(image_config(layers, architecture, **config), "config.v1+json")
        packed = [self.blob(gzip.compress(layer, mtime=0)) for layer in layers]
        data = json.dumps({"schemaVersion": 2, "config": about, "layers": packed}).encode()
        return self.blob(data, "manifest.v1+json", platform={"os": "linux", "architecture": architecture})

    def nested(self, *manifests: dict[str, Any]) -> dict[str, Any]:
        return self.blob(json.dumps({"manifests": manifests}).encode(), "index.v1+json")

    def index(self, *manifests: dict[str, Any]) -> Path:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
        return self.path


def named(descriptor: dict[str, Any], name: str) -> dict[str, Any]:
    return {**descriptor, "annotations": {"org.opencontainers.image.ref.name": name}}


def docker_save(layers: list[bytes], *, old: bool = False, tag: str = "app:1", **config: Any) -> bytes:
    """What `docker save` writes: with layers in directories before Docker 25, as blobs since."""
    about = image_config(layers, **config)
    name = hashlib.sha256(about).hexdigest()
    names = []
    files: list[File] = []
    for layer in layers:
        digest = hashlib.sha256(layer).hexdigest()
        names.append(f"{digest}/layer.tar" if old else f"blobs/sha256/{digest}")
        files.append(("file", names[-1], layer))
    config_name = f"{name}.json" if old else f"blobs/sha256/{name}"
    manifest = [{"Config": config_name, "RepoTags": [tag], "Layers": names}]
    files.append(("file", config_name, about))
    files.append(("file", "manifest.json", json.dumps(manifest).encode()))
    return tar(*files)


def debugfs(disk: Path, command: str) -> bytes:
    run = subprocess.run(["debugfs", "-R", command, disk], capture_output=True, check=True)
    return run.stdout


def content(disk: Path, path: str) -> bytes:
    return debugfs(disk, f'cat "{path}"')


def names(disk: Path, path: str = "/") -> set[str]:
    """What is in a directory, but for what is in all."""
    rows = debugfs(disk, f'ls -p "{path}"').decode().splitlines()
    return {row.split("/")[5] for row in rows if row} - {".", "..", "lost+found"}


def facts(disk: Path, path: str) -> str:
    return " ".join(debugfs(disk, f'stat "{path}"').decode("utf-8", "replace").split())


def check(disk: Path) -> None:
    run = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


HOSTILE_NAMES = st.lists(
    st.sampled_from(["..", ".", "", "a", "b", ".wh.a", ".wh..wh..opq", ".wh.", "\n", '"', "é", "x" * 255]),
    min_size=1,
    max_size=5,
).map("/".join)
HOSTILE = st.one_of(
    st.tuples(st.just("file"), HOSTILE_NAMES, st.just(b"data")),
    st.tuples(st.sampled_from(["symlink", "link"]), HOSTILE_NAMES, HOSTILE_NAMES),
    st.tuples(st.sampled_from(["dir", "fifo"]), HOSTILE_NAMES, st.just(b"")),
    st.tuples(st.sampled_from(["block", "char"]), HOSTILE_NAMES, st.just((8, 0))),
)
"""A file of a hostile archive: names that lead out, up, and over each other."""
