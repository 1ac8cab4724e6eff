"""The guest kit's cache and door: whole or not at all, once, and clear words when something is missing."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vmrun.errors import EXIT_VMM, UserError
from vmrun.guestkit import cache, host, kernel, kit
from vmrun.guestkit.progress import Lines, Progress

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMRUN_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cache.directory() == Path("/elsewhere/vmrun")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.directory() == Path("/home/somebody/.cache/vmrun")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cache.directory() == Path("/var/cache/vmrun")


def test_made_once() -> None:
    made = []

    def make(into: Path) -> None:
        made.append(into)
        (into / "file").write_text("x")

    first = cache.find_or_make("thing", make)
    assert cache.find_or_make("thing", make) == first == cache.find("thing")
    assert len(made) == 1
    assert (first / "file").read_text() == "x"


def test_failure_leaves_nothing(cache_directory: Path) -> None:
    def make(into: Path) -> None:
        (into / "file").write_text("x")
        raise UserError("no")

    with pytest.raises(UserError):
        cache.find_or_make("thing", make)
    assert cache.find("thing") is None
    assert [path.name for path in cache_directory.iterdir()] == ["thing.lock"]


def test_two_builders_make_it_once() -> None:
    made = []
    begun, go_on = threading.Event(), threading.Event()

    def make(into: Path) -> None:
        made.append(into)
        begun.set()
        assert go_on.wait(10)

    threads = [threading.Thread(target=cache.find_or_make, args=("thing", make)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1


def test_killed_builder_leaves_nothing_in_use(cache_directory: Path) -> None:
    program = (
        "import sys, time\n"
        "from vmrun.guestkit import cache\n"
        "def make(into):\n"
        "    (into / 'half').write_text('x')\n"
        "    print('made', flush=True)\n"
        "    time.sleep(60)\n"
        "cache.find_or_make('thing', make)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"made\n"
        builder.send_signal(signal.SIGKILL)
    assert cache.find("thing") is None
    cache.find_or_make("other", lambda into: None)
    assert sorted(path.name for path in cache_directory.iterdir()) == ["other", "other.lock", "thing.lock"]
    cache.find_or_make("thing", lambda into: None)
    assert list((cache_directory / "thing").iterdir()) == []


@pytest.mark.parametrize("older", [False, True])
def test_nobody_else_can_lock_what_is_built(cache_directory: Path, older: bool) -> None:
    """A lock takes nothing but the right to read the file."""
    lock = cache_directory / "thing.lock"
    if older:
        cache_directory.mkdir()
        lock.touch(0o644)
        lock.chmod(0o644)
    cache.find_or_make("thing", lambda into: None)
    assert lock.stat().st_mode & 0o777 == 0o600
    lock.chmod(0o644)
    assert cache.remove("thing")
    assert lock.stat().st_mode & 0o777 == 0o600


def test_what_is_there_is_found_without_a_lock(
    cache_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another user's cache nobody may take one."""
    cache.find_or_make("thing", lambda into: None)
    real = os.open

    def others(path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if os.fspath(path).endswith(".lock"):
            raise PermissionError(path)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", others)
    assert cache.find_or_make("thing", lambda into: None) == cache_directory / "thing"


def test_builder_at_work_keeps_its_directory() -> None:
    def make(into: Path) -> None:
        (into / "file").write_text("x")
        cache.find_or_make("other", lambda into: None)

    assert (cache.find_or_make("thing", make) / "file").read_text() == "x"


def fake_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "linux-source-6.1.tar.xz").write_bytes(b"source")
    (sources / "linux-source-5.10.tar.xz").write_bytes(b"older")
    (sources / "linux-source-6.1.patch.xz").write_bytes(b"")
    monkeypatch.setattr(host, "SOURCES", sources)
    monkeypatch.setattr(host, "check", lambda: None)
    return sources


def fake_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    built: list[str] = []

    def build_kernel(into: Path, source: Path, progress: Progress) -> None:
        built.append(source.name)
        (into / "vmlinux").write_bytes(b"")
        (into / "System.map").write_bytes(b"")

    def build_root(into: Path, progress: Progress) -> None:
        built.append("root")
        (into / "initramfs.cpio").write_bytes(b"")
        (into / "disk.qcow2").write_bytes(b"")

    monkeypatch.setattr(kernel, "build", build_kernel)
    monkeypatch.setattr("vmrun.guestkit.root.build", build_root)
    return built


def test_kit_is_built_again_for_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = fake_inputs(tmp_path, monkeypatch)
    built = fake_builds(monkeypatch)
    assert kit.find() is None
    first = kit.build()
    assert built == ["root", "linux-source-6.1.tar.xz"]
    assert kit.build() == first == kit.find()
    assert all(path.exists() for path in (first.kernel, first.system_map, first.initramfs, first.disk))

    os.utime(sources / "linux-source-6.1.tar.xz", (0, 12345))
    assert kit.find() is None
    second = kit.build()
    assert built == ["root", "linux-source-6.1.tar.xz", "linux-source-6.1.tar.xz"]
    assert second.kernel != first.kernel
    assert second.disk == first.disk


def test_kit_outlives_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = fake_inputs(tmp_path, monkeypatch)
    fake_builds(monkeypatch)
    built = kit.build()
    (sources / "linux-source-6.1.tar.xz").unlink()
    (sources / "linux-source-5.10.tar.xz").unlink()
    monkeypatch.setattr(host, "BUSYBOX", tmp_path / "gone")
    assert kit.find() == built


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SOURCES", tmp_path)
    monkeypatch.setattr(host, "BUSYBOX", tmp_path / "busybox")
    monkeypatch.setattr(host, "_PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        kit.build()
    for package in ("linux-source", "busybox-static", "e2fsprogs", "qemu-utils", "bc", "gcc"):
        assert package in str(error.value).split()
    assert "\n" not in str(error.value)


def test_dynamic_busybox_is_not_taken() -> None:
    assert not host._is_static_program(Path("/bin/sh"))
    assert not host._is_static_program(Path(__file__))
    assert not host._is_static_program(Path("/nonexistent"))


def test_failing_program_is_named_and_logged(tmp_path: Path, cache_directory: Path) -> None:
    cache_directory.mkdir()
    with pytest.raises(UserError) as error:
        host.run(["sh", "-c", "echo why; exit 3"], tmp_path)
    assert error.value.code == EXIT_VMM
    assert "sh failed with status 3" in str(error.value)
    assert (cache_directory / "failed-build.log").read_text() == "why\n"


def test_dropped_option_is_an_error(tmp_path: Path) -> None:
    configuration = tmp_path / ".config"
    fragment = kernel.FRAGMENT.read_text()
    configuration.write_text(fragment)
    kernel._check_configuration(configuration)
    configuration.write_text(fragment.replace("CONFIG_EXT4_FS=y\n", ""))
    with pytest.raises(UserError, match="CONFIG_EXT4_FS=y"):
        kernel._check_configuration(configuration)


def test_ticks_are_set_or_missed(tmp_path: Path) -> None:
    choices = tmp_path / "Kconfig.hz"
    choices.write_text("config HZ\n\tint\n\tdefault 100 if HZ_100\n\tdefault 250 if HZ_250\n")
    kernel._set_ticks(choices)
    assert choices.read_text() == "config HZ\n\tint\n\tdefault 25 if HZ_100\n\tdefault 250 if HZ_250\n"
    with pytest.raises(UserError, match="no choice of 100 ticks"):
        kernel._set_ticks(choices)


def test_lines_tell_steps_and_share() -> None:
    out = io.StringIO()
    lines = Lines(out, every=0.0)
    lines.step("building", 4)
    lines.advance("one.o")
    assert out.getvalue() == "building ...\nbuilding: 25 % one.o\n"
