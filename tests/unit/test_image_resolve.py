"""`vmrun.image.resolve` from end to end: each kind of image, its cache, and images that lie."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.unit.image_archives import (
    Layout,
    check,
    content,
    docker_save,
    facts,
    image_config,
    named,
    names,
    sha256,
    tar,
)
from vmrun.cli import run
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.guestkit import cache as kit_cache
from vmrun.guestkit.progress import Silent
from vmrun.image import Limits, cache, resolve
from vmrun.image.source import Source, parse

pytestmark = pytest.mark.skipif(
    shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None, reason="no e2fsprogs"
)

REPOSITORY = Path(__file__).parents[2]
BASE = tar(("dir", "etc", b""), ("file", "etc/passwd", b"root:x:0:0::/:\n"), ("file", "gone", b"x"))
TOP = tar(("file", ".wh.gone", b""), ("file", "etc/new", b"text"), ("block", "sda", (8, 0)))
CONFIG: dict[str, Any] = {
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["true"],
    "Env": ["PATH=/bin", "EMPTY=", "bad"],
    "User": "daemon:5",
    "WorkingDir": "/srv",
}


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    monkeypatch.delenv("VMRUN_IMAGE_CACHE", raising=False)
    return tmp_path / "cache"


def finished(cache_directory: Path) -> set[str]:
    """What the cache holds but for locks and its note of hashes."""
    if not cache_directory.exists():
        return set()
    return {
        path.name
        for path in cache_directory.iterdir()
        if path.suffix != ".lock" and path.name != "image-sources.json"
    }


class Steps(Silent):
    def __init__(self) -> None:
        self.titles: list[str] = []

    def step(self, title: str, total: int | None = None) -> None:
        self.titles.append(title)


def check_app(image: Any, source: str) -> None:
    """That it is the image of BASE and TOP with CONFIG."""
    check(image.disk)
    assert (image.format, image.file_system, image.source) == ("raw", "ext4", source)
    assert names(image.disk) == {"etc", "sda"}
    assert content(image.disk, "/etc/new") == b"text"
    assert image.config.entrypoint == ("/bin/sh", "-c")
    assert image.config.cmd == ("true",)
    assert image.config.env == {"PATH": "/bin", "EMPTY": ""}
    assert (image.config.user, image.config.workdir) == ("daemon:5", "/srv")
    assert image.disk.stat().st_mode & 0o777 == 0o400
    assert image.disk.with_name("image.json").stat().st_mode & 0o777 == 0o600


def test_oci_layout(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    path = layout.index(layout.manifest([BASE, TOP], **CONFIG))
    steps = Steps()
    image = resolve(path, steps)
    check_app(image, "oci")
    assert "reading layer 2 of 2" in steps.titles
    again = Steps()
    assert resolve(str(path), again) == image
    assert again.titles == []


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_docker_save(old: bool, pack: Any, tmp_path: Path, cache_directory: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(pack(docker_save([BASE, TOP], old=old, **CONFIG)))
    image = resolve(path)
    check_app(image, "docker")
    steps = Steps()
    assert resolve(f"docker:{path}", steps) == image
    assert steps.titles == []
    assert finished(cache_directory) == {f"image-{image.digest}"}


def test_oci_and_docker_share_a_disk(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    first = resolve(layout.index(layout.manifest([BASE, TOP], **CONFIG)))
    (tmp_path / "saved.tar").write_bytes(docker_save([BASE, TOP], tag="host:5000/app:latest", **CONFIG))
    assert resolve(tmp_path / "saved.tar").disk == first.disk
    for name in ("host:5000/app", "host:5000/app:latest"):
        assert resolve(f"docker:{tmp_path}/saved.tar:{name}").disk == first.disk
    with pytest.raises(UserError, match="no image"):
        resolve(f"docker:{tmp_path}/saved.tar:other")


def test_layers_that_images_share_are_links_in_old_archives(tmp_path: Path) -> None:
    config = image_config([BASE])
    manifest = json.dumps([{"Config": "c.json", "RepoTags": None, "Layers": ["a/layer.tar"]}]).encode()
    for number, link in enumerate(
        (("symlink", "a/layer.tar", "../b/layer.tar"), ("link", "a/layer.tar", "b/layer.tar"))
    ):
        path = tmp_path / f"saved{number}"
        path.write_bytes(
            tar(
                link,
                ("file", "b/layer.tar", BASE),
                ("file", "c.json", config),
                ("file", "manifest.json", manifest),
            )
        )
        assert names(resolve(f"docker:{path}").disk) == {"etc", "gone"}


def test_tar_of_an_oci_layout(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.index(layout.manifest([BASE, TOP], **CONFIG))
    subprocess.run(["tar", "-C", layout.path, "-cf", tmp_path / "oci.tar", "."], check=True)
    check_app(resolve(f"docker:{tmp_path / 'oci.tar'}"), "docker")


def test_choosing_by_platform_and_name(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    arm = layout.manifest([TOP], "arm64")
    intel = layout.manifest([BASE])
    other = layout.manifest([TOP])
    nested = layout.nested(arm, intel)
    path = layout.index(named(nested, "app"), named(other, "other"))
    assert names(resolve(f"oci:{path}:app").disk) == {"etc", "gone"}
    assert "sda" in names(resolve(f"oci:{path}:other").disk)
    with pytest.raises(UserError, match="choose one with"):
        resolve(path)
    with pytest.raises(UserError, match="no image"):
        resolve(f"oci:{path}:third")
    layout.index(arm)
    with pytest.raises(UserError, match="only for linux/arm64"):
        resolve(path)
    # A platform that only the configuration tells.
    layout.index({key: value for key, value in arm.items() if key != "platform"})
    with pytest.raises(UserError, match="linux/arm64"):
        resolve(path)


def test_damage_and_lies_of_layouts(tmp_path: Path, cache_directory: Path) -> None:
    layout = Layout(tmp_path / "layout")
    good = layout.manifest([BASE])
    path = layout.index(good)
    blobs = layout.path / "blobs/sha256"
    layer = blobs / sha256(gzip.compress(BASE, mtime=0)).partition(":")[2]
    sound = layer.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            resolve(path)
        assert caught.value.code == EXIT_IMAGE
        assert finished(cache_directory) == set()

    layer.write_bytes(gzip.compress(TOP, mtime=0))
    refused("does not have the digest")
    # The right content, otherwise compressed: the layer's own digest is not what the manifest says.
    layer.write_bytes(gzip.compress(BASE, 1, mtime=5))
    refused("does not have the digest")
    layer.write_bytes(sound + b"\0" * 100)
    refused("does not have the digest")
    layer.unlink()
    refused("is missing")
    layer.symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        resolve(path)
    layer.unlink()
    os.mkfifo(layer)
    refused("not a regular file")
    layer.unlink()
    layer.write_bytes(sound)
    for manifests, match in (
        ([{**good, "digest": "sha256:../../../../etc/passwd"}], "digest"),
        ([{**good, "digest": "sha256:" + "0" * 64}], "missing"),
        ([{**good, "digest": "md5:" + "0" * 32}], "digest"),
        (["x"], "list of manifests"),
        ([], "no image"),
    ):
        layout.index(*manifests)  # type: ignore[arg-type]
        refused(match)
    for text in ("{", "[]", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (path / "index.json").write_text(text, encoding="latin-1")
        refused("index.json")
    endless = layout.nested()
    for _ in range(6):
        endless = layout.nested(endless)
    layout.index(endless)
    refused("too deep")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tar.zst", "tar.bz2"])
def test_root_tars(suffix: str, tmp_path: Path) -> None:
    import bz2
    import lzma

    packers: dict[str, Any] = {
        "tar": bytes, "tar.gz": gzip.compress, "tar.xz": lzma.compress, "tar.zst": zstandard.compress,
        "tar.bz2": bz2.compress,
    }  # fmt: skip
    path = tmp_path / f"root.{suffix}"
    path.write_bytes(packers[suffix](BASE))
    image = resolve(path)
    assert (image.source, image.config.entrypoint) == ("tar", ())
    assert names(image.disk) == {"etc", "gone"}
    # Another file of the same content is the same image; other content is another.
    copy = tmp_path / "copy.tar"
    copy.write_bytes(path.read_bytes())
    assert resolve(copy) == image
    copy.write_bytes(TOP)
    assert resolve(copy).digest != image.digest


def test_directory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d/f").write_text("text")
    (root / "d/f").chmod(0o4711)
    os.link(root / "d/f", root / "hard")
    (root / "link").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe")
    (root / "out").symlink_to(tmp_path)
    (root / "d" / "é\n").mkdir()
    with (root / "sparse").open("wb") as file:
        file.seek(10 << 20)
        file.write(b"end")
    image = resolve(root)
    check(image.disk)
    assert names(image.disk) == {"d", "hard", "link", "out", "pipe", "sparse"}
    assert content(image.disk, "/d/f") == content(image.disk, "/hard") == b"text"
    assert "Mode: 04711" in facts(image.disk, "/d/f")
    assert "User: 0 Group: 0" in facts(image.disk, "/d/f")
    assert "Links: 2" in facts(image.disk, "/hard")
    assert 'dest: "/etc/passwd"' in facts(image.disk, "/link")
    assert content(image.disk, "/sparse") == (root / "sparse").read_bytes()
    assert resolve(root) == image
    (tmp_path / "same").symlink_to(root)
    assert resolve(tmp_path / "same") == image
    (root / "d/f").chmod(0o700)
    assert resolve(root).digest != image.digest


def test_disks_are_used_as_they_are(tmp_path: Path, cache_directory: Path) -> None:
    raw = tmp_path / "x.raw"
    raw.write_bytes(bytes(1 << 20))
    image = resolve(raw)
    assert (image.disk, image.format, image.source, image.file_system) == (raw, "raw", "disk", "")
    with raw.open("r+b") as file:
        file.write(b"changed")
    os.utime(raw, ns=(1, 1))
    assert resolve(raw).digest != image.digest
    qcow2 = tmp_path / "x.qcow2"
    command = ["disk", "create", str(qcow2), "--backing", "x.raw", "--backing-format", "raw"]
    assert run(command) == 0
    over = resolve(qcow2)
    assert (over.format, over.backing) == ("qcow2", (raw,))
    os.utime(raw, ns=(2, 2))
    assert resolve(qcow2).digest != over.digest
    assert finished(cache_directory) == set()


def test_kinds_of_sources(tmp_path: Path) -> None:
    limits = Limits()
    (tmp_path / "a.tar").write_bytes(BASE)
    (tmp_path / "noise").write_bytes(b"noise" * 1000)
    assert parse("kit", limits).kind == "kit"
    assert parse(tmp_path / "a.tar", limits).kind == "tar"
    assert parse(f"docker:{tmp_path}/a.tar:host:5000/app:1", limits).tag == "host:5000/app:1"
    (tmp_path / "odd:name").write_bytes(BASE)
    assert parse(f"docker:{tmp_path}/odd:name", limits).tag == ""
    for spec in ("", "./missing", str(tmp_path / "noise"), "/dev/null"):
        with pytest.raises(UserError):
            parse(spec, limits)


def test_bombs_leave_nothing(tmp_path: Path, cache_directory: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", 9) as out:
        out.write(tar(("file", "zeros", bytes(100 << 20)), format=0))
    for limits, option in (
        (Limits(), "--max-ratio"),
        (Limits(size=1 << 20, ratio=2000), "--max-size"),
    ):
        with pytest.raises(UserError, match=option) as caught:
            resolve(path, limits=limits)
        assert caught.value.code == EXIT_IMAGE
        assert finished(cache_directory) == set()
    assert names(resolve(path, limits=Limits(ratio=2000)).disk) == {"zeros"}


def test_disk_size(tmp_path: Path) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(BASE)
    small, large = resolve(path, disk_size=100 << 20), resolve(path, disk_size=300 << 20)
    assert (small.disk.stat().st_size, large.disk.stat().st_size) == (100 << 20, 300 << 20)
    assert small.digest != large.digest
    with pytest.raises(UserError, match="--disk-size"):
        resolve(path, disk_size=1 << 20)


def test_two_at_once_convert_once(tmp_path: Path) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(tar(*[("file", f"f{number}", os.urandom(1000)) for number in range(500)]))
    steps = [Steps(), Steps()]
    found = []
    threads = [threading.Thread(target=lambda each=each: found.append(resolve(path, each))) for each in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert sum("writing the disk" in each.titles for each in steps) == 1


def test_kill_9_leaves_nothing_for_long(tmp_path: Path, cache_directory: Path) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(BASE)
    program = (
        "import os, signal, sys\n"
        "from vmrun.image import resolve\n"
        "from vmrun.guestkit.progress import Silent\n"
        "class Killing(Silent):\n"
        "    def step(self, title, total=None):\n"
        "        if title == 'writing the disk':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "resolve(sys.argv[1], Killing())\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, path], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    assert len(finished(cache_directory)) == 1
    image = resolve(path)
    assert finished(cache_directory) == {f"image-{image.digest}"}
    check(image.disk)


def test_nothing_outside_the_cache_is_touched(tmp_path: Path, cache_directory: Path) -> None:
    path = tmp_path / "hostile.tar"
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    path.write_bytes(
        tar(
            ("symlink", "up", str(tmp_path)),
            ("file", "up/victim", b"written"),
            ("file", f"{'../' * 20}{victim}", b"written"),
            ("file", str(victim), b"written"),
            ("symlink", "f", str(victim)),
            ("file", "f", b"written"),
            ("char", "dev/null", (1, 3)),
        )
    )
    before = sorted(tmp_path.iterdir())
    image = resolve(path)
    assert victim.read_text() == "untouched"
    assert sorted(tmp_path.iterdir()) == sorted([*before, cache_directory])
    assert {entry.name for entry in image.disk.parent.iterdir()} == {"disk.raw", "image.json"}
    assert content(image.disk, str(victim)) == b"written"


def test_cache_limit_removes_what_was_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number in range(3):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(tar(("file", "f", os.urandom(4 << 20))))
        found.append(resolve(path))
        os.utime(found[-1].disk.with_name("image.json"), (number, number))
    each = max(cached.used for cached in cache.images())
    assert [cached.digest for cached in cache.images()] == [image.digest for image in reversed(found)]
    monkeypatch.setenv("VMRUN_IMAGE_CACHE", f"{each * 3 // 1024}K")
    (tmp_path / "new.tar").write_bytes(tar(("file", "f", os.urandom(4 << 20))))
    new = resolve(tmp_path / "new.tar")
    assert {cached.digest for cached in cache.images()} == {found[1].digest, found[2].digest, new.digest}


def test_cache_keeps_what_a_machine_has_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmrun.host.disks import MachineDisk
    from vmrun.machine.config import DiskConfig

    path = tmp_path / "root.tar"
    path.write_bytes(BASE)
    image = resolve(path)
    disk = MachineDisk(DiskConfig(image.disk, image.format, read_only=True))
    try:
        (cached,) = cache.images()
        assert cached.in_use
        monkeypatch.setenv("VMRUN_IMAGE_CACHE", "1K")
        assert cache.shrink() == []
    finally:
        disk.close()
    assert cache.shrink() == [image.digest]


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(BASE)
    image = resolve(path)
    image.disk.with_name("image.json").write_text("{}")
    assert cache.images() == []
    assert resolve(path) == image
    (kit_cache.directory() / "image-sources.json").write_text("[")
    left_behind = kit_cache.directory() / "image-sources.json.abc"
    left_behind.touch()
    os.utime(left_behind, (1, 1))
    assert resolve(path) == image
    assert not left_behind.exists()


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "saved.tar").write_bytes(docker_save([BASE, TOP], **CONFIG))
    assert run(["image", "convert", str(tmp_path / "saved.tar")]) == 0
    disk = Path(capsys.readouterr().out.strip())
    assert disk.is_file()
    assert run(["image", "inspect", str(tmp_path / "saved.tar")]) == 0
    out = capsys.readouterr().out
    assert "/bin/sh -c" in out
    assert "PATH=/bin" in out
    assert run(["image", "inspect", "--json", str(tmp_path / "saved.tar")]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["user"] == "daemon:5"
    assert run(["image", "list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["disk"] == str(disk)
    assert run(["image", "list"]) == 0
    assert "saved.tar" in capsys.readouterr().out
    assert run(["image", "rm", "ffff"]) == EXIT_IMAGE
    assert run(["image", "rm"]) == 64
    assert run(["image", "rm", row["digest"][:8]]) == 0
    assert not disk.exists()
    arguments = ["image", "convert", str(tmp_path / "saved.tar"), "--max-entries", "2"]
    assert run(arguments) == EXIT_IMAGE
    assert "--max-entries" in capsys.readouterr().err


def test_an_ordinary_user_can(tmp_path: Path) -> None:
    """Owners, modes and devices of the archive are on the disk though nobody could give them to files."""
    if os.geteuid() != 0:
        pytest.skip("the other tests run as an ordinary user already")
    data = tar(("file", "su", b"x"), ("block", "sda", (8, 0)), mode=0o4755, uid=1234)
    # With all modules imported: the interpreter may lie where the other user may not read.
    (tmp_path / "root.tar").write_bytes(data)
    reference = resolve(tmp_path / "root.tar", disk_size=32 << 20).disk.read_bytes()
    # Not below pytest's directory, which is root's alone.
    with tempfile.TemporaryDirectory() as mine:
        path = Path(mine, "root.tar")
        path.write_bytes(data)
        os.chown(mine, 65534, 65534)
        os.chown(path, 65534, 65534)
        child = os.fork()
        if not child:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                os.environ["VMRUN_CACHE"] = f"{mine}/cache"
                resolve(path, disk_size=32 << 20)
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        (disk,) = Path(mine, "cache").glob("image-*/disk.raw")
        assert disk.stat().st_uid == 65534
        check(disk)
        for name, fact in (("su", "Mode: 04755"), ("su", "User: 1234"), ("sda", "number: 08:00")):
            assert fact in facts(disk, name)
        assert disk.read_bytes() == reference


def test_times_of_use_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(BASE)
    image = resolve(path)
    os.utime(image.disk.with_name("image.json"), (5, 5))
    before = time.time() - 60
    resolve(path)
    (cached,) = cache.images()
    assert cached.last_used > before


def test_directory_that_changes_meanwhile(tmp_path: Path, cache_directory: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "f").write_text("text")

    class Writing(Silent):
        def step(self, title: str, total: int | None = None) -> None:
            (root / "new").write_text("text")

    with pytest.raises(UserError, match="changed while it was read"):
        resolve(root, Writing())
    assert finished(cache_directory) == set()


def test_directory_keeps_attributes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "f").write_text("text")
    try:
        os.setxattr(root / "f", "user.mark", b"value")
    except OSError as error:
        pytest.skip(f"no extended attributes here: {error}")
    image = resolve(root)
    assert 'user.mark (5) = "value"' in facts(image.disk, "/f")


def test_a_tar_of_a_layout_that_begins_with_its_directory(tmp_path: Path) -> None:
    """As `tar -C layout -cf x.tar .` makes them; said to be OCI it is not taken for a directory."""
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as made:
        for name in ("./", "./oci-layout"):
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            made.addfile(entry)
    assert parse(archive, Limits()).kind == "docker"
    assert parse(f"oci:{archive}", Limits()) == Source("docker", archive)
    assert parse(f"oci:{archive}:name", Limits()) == Source("docker", archive, "name")
