"""Linux guests through the real `vmrun boot`: building their programs and initramfs, booting, reading what
they said.

A boot costs 10 s and more on a KVM without VMX or SVM, so one guest runs many checks and the tests look at
its transcript.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from vmrun.guestkit import cache, cpio, kit, tree

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(__file__).with_name("programs")
META_PACKAGE = "linux-image-cloud-amd64"
HARD_LIMIT = 60.0  # seconds that vmrun may take beyond its own --timeout

Build = Callable[[Sequence[Path], str], Path]
MakeInitramfs = Callable[[Mapping[str, Path | bytes]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.guest)


@dataclass(frozen=True)
class Boot:
    """How a `vmrun boot` ended: its exit code, the console's text, and what it said itself."""

    code: int
    console: str
    stderr: str


@pytest.fixture(scope="session")
def guest_kit() -> kit.GuestKit:
    found = kit.find()
    if found is None:
        pytest.skip("needs the guest kit: make guest")
    return found


@pytest.fixture(scope="session")
def static_program(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile C and assembly files to one static program."""

    def build(sources: Sequence[Path], name: str) -> Path:
        program = tmp_path_factory.mktemp("programs") / name
        # The checks push flags in inline assembly, which the red zone would not survive.
        options = ["-O2", "-Wall", "-Wextra", "-Werror", "-mno-red-zone", "-static"]
        subprocess.run(["gcc", *options, "-o", program, *sources, "-lm", "-lpthread"], check=True)
        return program

    return build


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> MakeInitramfs:
    """An initramfs of executable files, from where they go to what they are; the directories come by
    themselves.
    """

    def make(programs: Mapping[str, Path | bytes]) -> Path:
        entries = [tree.directory("dev"), tree.character_device("dev/console", 5, 1, 0o600)]
        known = {"dev"}
        for name, content in programs.items():
            parents = [str(parent) for parent in reversed(Path(name).parents) if str(parent) != "."]
            for parent in parents:
                if parent not in known:
                    known.add(parent)
                    entries.append(tree.directory(parent))
            data = content if isinstance(content, bytes) else content.read_bytes()
            entries.append(tree.file(name, data, 0o755))
        path = tmp_path_factory.mktemp("initramfs") / "initramfs.cpio"
        with path.open("wb") as archive:
            cpio.write(archive, entries)
        return path

    return make


def boot(*arguments: str | Path, timeout: float, until: str | None = None) -> Boot:
    """Run `vmrun boot` with `arguments` to its end, and check that it leaves nothing behind.

    `until` ends the machine early, when its console shows that text: then the code is that of SIGTERM.
    """
    processes, links = _descendants(), set(os.listdir("/sys/class/net"))
    command = [sys.executable, "-m", "vmrun", "boot", "--timeout", f"{timeout:g}s", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        console = b""
        if until is not None:
            while until.encode() not in console:
                piece = os.read(process.stdout.fileno(), 65536)
                if not piece:
                    break
                console += piece
            process.terminate()
        try:
            rest, stderr = process.communicate(timeout=timeout + HARD_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert _descendants() <= processes, "vmrun left a process behind"
    assert set(os.listdir("/sys/class/net")) == links, "vmrun left a network card behind"
    return Boot(
        process.returncode, (console + rest).decode(errors="replace"), stderr.decode(errors="replace")
    )


def _descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@dataclass(frozen=True)
class Transcript:
    """What the check guest (programs/init.c) said."""

    boot: Boot

    def result(self, check: str) -> str:
        """ "ok", or why not."""
        reason = ""
        for line in self.boot.console.splitlines():
            if line.startswith("why "):
                reason = line
            if line.startswith(f"check {check} "):
                return "ok" if line == f"check {check} ok" else f"{line} {reason}"
            if line.startswith("check "):
                reason = ""
        return (
            f"did not run; vmrun ended with {self.boot.code}: {self.boot.stderr}\n{self.boot.console[-2000:]}"
        )

    def lines(self, start: str) -> list[str]:
        return [line for line in self.boot.console.splitlines() if line.startswith(start)]


@pytest.fixture(scope="session")
def check_initramfs(static_program: Build, initramfs: MakeInitramfs) -> Path:
    """The initramfs whose init runs all checks, or those that CHECKS= on its command line names."""
    sources = sorted([*PROGRAMS.glob("*.c"), *PROGRAMS.glob("*.S")])
    return initramfs({"init": static_program(sources, "init")})


@pytest.fixture(scope="session")
def run_checks(guest_kit: kit.GuestKit, check_initramfs: Path) -> Callable[..., Transcript]:
    """Boot the check guest with `parameters` on its command line."""

    def run(parameters: str, *arguments: str, timeout: float) -> Transcript:
        return Transcript(
            boot("--initrd", check_initramfs, "--append", parameters, *arguments, timeout=timeout)
        )

    return run


def _image_package() -> str:
    depends = subprocess.run(
        ["apt-cache", "depends", META_PACKAGE], check=True, capture_output=True, text=True, env=_environment()
    ).stdout
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    assert found, depends
    return found[1]


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


@pytest.fixture(scope="session")
def cloud_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vmlinuz of Debian's package, which is downloaded to the cache once."""
    directory = cache.directory() / "debian"
    directory.mkdir(parents=True, exist_ok=True)
    package = _image_package()
    if not list(directory.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=directory, check=True, env=_environment())
    archive = max(directory.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
    unpacked = tmp_path_factory.mktemp("debian")
    subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    return kernel
