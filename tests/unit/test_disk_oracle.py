"""`vmrun disk` against qemu-img, both ways: each reads what the other makes, and both say the same."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from devices.block.open import open_image
from devices.block.qcow2 import Qcow2Image
from devices.block.qcow2_create import create_qcow2
from devices.errors import ImageError
from vmrun import cli
from vmrun.disk import convert

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")

MIB = 1 << 20


def qemu_img(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    fmt = "raw" if path.suffix == ".raw" else "qcow2"
    subprocess.run(["qemu-io", "-f", fmt, *words, str(path)], check=True, capture_output=True)


def vmrun(*arguments: str | Path) -> None:
    assert cli.run(["disk", *map(str, arguments)]) == 0


def vmrun_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    capsys.readouterr()
    vmrun(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def make_images(directory: Path) -> dict[str, Path]:
    """Images by qemu-img, of all that an image can have in it."""
    rng = random.Random(5)
    raw = directory / "odd.raw"
    raw.write_bytes(rng.randbytes(70_000) + bytes(300_000) + rng.randbytes(100_001))
    base = directory / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "5M")
    qemu_io(base, "write -P 17 0 1M", "write -P 18 1536k 100k", "write -z 2M 1M", "write -P 3 4M 1M")
    over = directory / "over.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base.qcow2", "-F", "qcow2", over)
    qemu_io(over, "write -P 33 512k 20k", "write -z 64k 64k", "write -P 4 2M 4k", "discard 4M 64k")
    top = directory / "top.qcow2"
    options = "compat=1.1,lazy_refcounts=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", over, "-F", "qcow2", top, "7M")
    qemu_io(top, "write -P 34 256k 64k", "write -P 35 6M 1k", "write -P 7 3M 64k", "write -z 3M 64k")
    on_raw = directory / "on_raw.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b", "odd.raw", "-F", "raw", on_raw)
    qemu_io(on_raw, "write -P 5 100k 1k")
    packed = directory / "packed.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", top, packed)
    zstd = directory / "zstd.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd,refcount_bits=1", top, zstd)
    full = directory / "full.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=full,refcount_bits=64", full, "1M")
    empty = directory / "empty.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", empty, f"{3 * MIB + 512}")
    return {path.stem: path for path in (raw, base, over, top, on_raw, packed, zstd, full, empty)}


NAMES = ("odd", "base", "over", "top", "on_raw", "packed", "zstd", "full", "empty")


def fmt(path: Path) -> str:
    return "raw" if path.suffix == ".raw" else "qcow2"


def assert_same(one: Path, other: Path) -> None:
    """To qemu-img, which takes disks of two sizes for the same if the rest is zeroes."""
    sizes = [
        json.loads(qemu_img("info", "-f", fmt(path), "--output=json", path))["virtual-size"]
        for path in (one, other)
    ]
    assert sizes[0] == sizes[1]
    qemu_img("compare", "-f", fmt(one), "-F", fmt(other), one, other)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("name", NAMES)
def test_info_agrees(name: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = images[name]
    theirs = json.loads(qemu_img("info", "-f", fmt(path), "--output=json", path))
    assert vmrun_json(capsys, "info", path) == theirs
    chain = json.loads(qemu_img("info", "--backing-chain", "-f", fmt(path), "--output=json", path))
    ours = vmrun_json(capsys, "info", "--chain", path)
    assert [os.path.realpath(image["filename"]) for image in ours] == [
        os.path.realpath(image["filename"]) for image in chain
    ]
    assert [image["virtual-size"] for image in ours] == [image["virtual-size"] for image in chain]


@pytest.mark.parametrize("name", NAMES)
def test_map_agrees(name: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = images[name]
    theirs = json.loads(qemu_img("map", "-f", fmt(path), "--output=json", path))
    ours = vmrun_json(capsys, "map", path)
    for run in ours:
        run.pop("filename", None)
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in NAMES if name != "odd"])
def test_check_agrees(name: str, images: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    theirs = json.loads(qemu_img("check", "-f", "qcow2", "--output=json", images[name]))
    assert vmrun_json(capsys, "check", images[name]) == theirs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "how",
    [
        ["--to", "raw"],
        ["--to", "qcow2"],
        ["--to", "qcow2", "--cluster-size", "512"],
        ["--to", "qcow2", "--cluster-size", "2M"],
        ["--to", "qcow2", "-c"],
        ["--to", "qcow2", "--compression", "zstd", "--cluster-size", "16K"],
    ],
    ids=" ".join,
)
def test_converted_images_are_the_same_to_qemu(
    name: str, how: list[str], images: dict[str, Path], tmp_path: Path
) -> None:
    source = images[name]
    made = tmp_path / f"made.{how[1]}"
    vmrun("convert", source, made, *how)
    assert os.listdir(tmp_path) == [made.name]
    assert_same(source, made)
    if how[1] == "qcow2":
        qemu_img("check", "-f", "qcow2", made)
    # And back, read by us.
    back = tmp_path / "back.raw"
    vmrun("convert", made, back)
    assert_same(source, back)


def test_a_converted_image_is_sparse(tmp_path: Path) -> None:
    source = tmp_path / "zeroes.raw"
    source.write_bytes(b"x" + bytes(8 * MIB - 1))
    for made in (tmp_path / "made.raw", tmp_path / "made.qcow2"):
        vmrun("convert", source, made)
        assert made.stat().st_blocks * 512 < MIB
        assert_same(source, made)


def test_compression_saves_space_and_the_image_stays_writable(tmp_path: Path) -> None:
    source = tmp_path / "text.raw"
    source.write_bytes(b"the same again and again; " * (4 * MIB // 26) + random.Random(1).randbytes(MIB))
    for compression in ("zlib", "zstd"):
        made = tmp_path / f"{compression}.qcow2"
        vmrun("convert", source, made, "--compression", compression)
        assert made.stat().st_size < 2 * MIB
        assert_same(source, made)
        qemu_io(made, "write -P 9 100k 300k")
        qemu_img("check", "-f", "qcow2", made)


@pytest.mark.parametrize("cluster_size", ["512", "64K", "2M"])
def test_created_images_are_clean_to_qemu(
    cluster_size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.qcow2"
    vmrun("create", "-s", "30M", "--cluster-size", cluster_size, path)
    qemu_img("check", "-f", "qcow2", path)
    qemu_io(path, "write -P 1 1M 2M")
    theirs = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", path))
    assert theirs["virtual-size"] == 30 * MIB
    assert vmrun_json(capsys, "info", path) == theirs


def test_an_overlay_takes_size_and_format_from_its_base(images: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    shutil.copy(images["base"], tmp_path / "sub" / "base.qcow2")
    over = tmp_path / "over.qcow2"
    vmrun("create", "-b", "sub/base.qcow2", over)
    info = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", over))
    assert info["virtual-size"] == 5 * MIB
    assert info["backing-filename"] == "sub/base.qcow2"
    assert info["backing-filename-format"] == "qcow2"
    assert_same(tmp_path / "sub" / "base.qcow2", over)
    larger = tmp_path / "larger.qcow2"
    vmrun("create", "-b", "over.qcow2", "-F", "qcow2", "--size", "6M", larger)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", over, larger)


@pytest.mark.parametrize("name", ["over", "top", "on_raw"])
def test_commit_gives_the_base_what_the_overlay_had(name: str, tmp_path: Path) -> None:
    images = make_images(tmp_path)
    over = images[name]
    before = tmp_path / "before.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", over, before)
    vmrun("commit", over)
    base = {"over": images["base"], "top": images["over"], "on_raw": images["odd"]}[name]
    for path in (over, base):
        if fmt(path) == "qcow2":
            qemu_img("check", "-f", "qcow2", path)
        assert_same(before, path)
    runs = json.loads(qemu_img("map", "-f", "qcow2", "--output=json", over))
    assert all(run["depth"] > 0 or not run["present"] for run in runs)


@pytest.mark.parametrize("name", NAMES)
def test_resize(name: str, tmp_path: Path) -> None:
    path = make_images(tmp_path)[name]
    before = tmp_path / "before.raw"
    qemu_img("convert", "-f", fmt(path), "-O", "raw", path, before)
    vmrun("resize", path, "8M")
    vmrun("resize", path, "+512K")
    with before.open("r+b") as file:
        file.truncate(8 * MIB + 512 * 1024)
    assert_same(before, path)
    if fmt(path) == "qcow2":
        qemu_img("check", "-f", "qcow2", path)


@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "version"),
    [(512, 16, 3), (512, 1, 3), (4096, 2, 3), (65536, 1, 3), (65536, 16, 2), (2 * MIB, 4, 3)],
)
def test_compressed_clusters_share_host_clusters(
    cluster_size: int, refcount_bits: int, version: int, tmp_path: Path
) -> None:
    """Streams of every length, some across two host clusters, as many in one as its refcount can count."""
    path = tmp_path / "x.qcow2"
    clusters = 64 if cluster_size < MIB else 16
    with path.open("wb") as file:
        create_qcow2(file.fileno(), clusters * cluster_size, cluster_size, version, refcount_bits)
    image = open_image("qcow2", os.open(path, os.O_RDWR), False)
    assert isinstance(image, Qcow2Image)
    compress = convert._compressor("zlib")
    rng = random.Random(cluster_size + refcount_bits)
    wanted = bytearray(clusters * cluster_size)
    order = list(range(clusters))
    rng.shuffle(order)
    for number in order:
        data = rng.randbytes(rng.randrange(cluster_size)).ljust(cluster_size, b"z")
        stream = compress(data)
        start = number * cluster_size
        if number % 8 == 0 or len(stream) >= cluster_size:
            image.writev(start, [memoryview(data)])
        else:
            image.write_compressed(start, stream)
        wanted[start : start + cluster_size] = data
    with pytest.raises(ImageError):
        image.write_compressed(0, b"x")
    for number in order[:8]:
        start = number * cluster_size
        image.writev(start, [memoryview(b"over it")])
        wanted[start : start + 7] = b"over it"
    image.close()
    raw = tmp_path / "wanted.raw"
    raw.write_bytes(wanted)
    qemu_img("check", "-f", "qcow2", path)
    assert_same(raw, path)
    vmrun("check", path)
