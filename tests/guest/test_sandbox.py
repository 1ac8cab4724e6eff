"""`vmrun.Sandbox` and `vmrun.AsyncSandbox` as programs use them, and images of other people's making."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.image_archives import Layout, tar
from vmrun import AsyncSandbox, CommandTimeout, Sandbox, SandboxEnded, UserError
from vmrun.control import runtime
from vmrun.guestkit import cache

pytestmark = [pytest.mark.slow, pytest.mark.by_hand]

REPOSITORY = Path(__file__).parents[2]
VMRUN = [sys.executable, "-m", "vmrun"]
MIRROR = "http://deb.debian.org/debian"


@pytest.fixture(scope="module", autouse=True)
def runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.getbasetemp() / "run"
        patch.setenv("VMRUN_RUNTIME", str(path))
        yield path


@pytest.fixture(scope="module")
def sandbox(runtime_directory: Path) -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


def test_a_result_has_it_all(sandbox: Sandbox) -> None:
    script = 'cat; echo "$A $PWD" >&2; exit 4'
    result = sandbox.run(["sh", "-c", script], input=b"in\0put", env={"A": "b"}, cwd="/tmp")
    assert (result.exit_code, result.stdout, result.stderr) == (4, b"in\0put", b"b /tmp\n")
    assert (result.signal, result.out_of_memory, result.cut) == (None, False, False)
    assert result.seconds > 0
    with pytest.raises(UserError, match="exit code 4: b /tmp"):
        result.check()
    killed = sandbox.run(["sh", "-c", "kill -9 $$"])
    assert (killed.exit_code, killed.signal) == (137, 9)
    missing = sandbox.run(["no-such-program"])
    assert missing.exit_code == 127
    assert b"no-such-program" in missing.stderr


def test_output_is_bounded(sandbox: Sandbox) -> None:
    result = sandbox.run(["sh", "-c", "head -c 300000 /dev/zero; printf x >&2"], limit=1000)
    assert (result.stdout, result.stderr, result.cut) == (bytes(1000), b"x", True)


def test_a_timeout_keeps_what_was_printed(sandbox: Sandbox) -> None:
    with pytest.raises(CommandTimeout) as caught:
        sandbox.run(["sh", "-c", "echo so far; echo and here >&2; sleep 1000"], timeout=15)
    result = caught.value.result
    assert (result.stdout, result.stderr, result.exit_code) == (b"so far\n", b"and here\n", 68)
    # The machine goes on, without the command.
    assert sandbox.run(["pidof", "sleep"]).exit_code == 1


def test_threads_share_a_sandbox(sandbox: Sandbox, tmp_path: Path) -> None:
    def use(number: int) -> bytes:
        (tmp_path / f"in{number}").write_bytes(os.urandom(10_000))
        sandbox.copy_in(tmp_path / f"in{number}", f"/tmp/thread{number}")
        said = sandbox.run(["sh", "-c", f"echo {number}; cat /tmp/thread{number}"]).check().stdout
        sandbox.copy_out(f"/tmp/thread{number}", tmp_path / f"out{number}")
        assert (tmp_path / f"out{number}").read_bytes() == (tmp_path / f"in{number}").read_bytes()
        return said

    with ThreadPoolExecutor(4) as pool:
        for number, said in enumerate(pool.map(use, range(4))):
            assert said == f"{number}\n".encode() + (tmp_path / f"in{number}").read_bytes()


def test_forks_go_their_own_ways(sandbox: Sandbox, runtime_directory: Path) -> None:
    sandbox.run(["sh", "-c", "echo before > /file"]).check()
    before = set(runtime.running())
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: sandbox.fork(), range(2))
    with one, other:
        assert len(set(runtime.running()) - before) == 2
        script = (
            "cat /file; echo $0 > /file; sync; cat /file; head -c 16 /dev/urandom | od -An -tx1; date +%s"
        )
        told = []
        for name, fork in (("one", one), ("other", other)):
            lines = fork.run(["sh", "-c", script, name]).check().stdout.decode().splitlines()
            assert lines[:2] == ["before", name]
            assert abs(int(lines[3]) - time.time()) < 60
            told.append(lines[2])
        assert told[0] != told[1]
        assert other.run(["cat", "/file"]).stdout == b"other\n"
    assert sandbox.run(["cat", "/file"]).stdout == b"before\n"
    assert set(runtime.running()) == before


def test_a_fork_outlives_its_parent() -> None:
    def scratches() -> set[Path]:
        return {*cache.directory().glob("*.scratch-*")}

    before = scratches()
    with Sandbox() as parent:
        parent.run(["sh", "-c", "echo kept > /file; sync"]).check()
        fork = parent.fork()
    with fork:
        # Not only from the cache of its memory.
        fork.run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"]).check()
        assert fork.run(["cat", "/file"]).check().stdout == b"kept\n"
        with fork.fork() as again:
            assert again.run(["cat", "/file"]).check().stdout == b"kept\n"
    assert scratches() <= before


def test_a_machine_that_ends_tells_what_it_said_last(sandbox: Sandbox) -> None:
    with sandbox.fork() as fork:
        failures: list[BaseException] = []

        def wait() -> None:
            try:
                fork.run(["sleep", "1000"])
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        with pytest.raises(SandboxEnded) as caught:
            fork.run(["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000"])
        for thread in threads:
            thread.join()
        # All who wait are told the same.
        for failure in (caught.value, *failures):
            assert isinstance(failure, SandboxEnded)
            assert failure.code == 67
            assert "sysrq triggered crash" in failure.console
        assert len(failures) == 2
        with pytest.raises(SandboxEnded):
            fork.copy_out("/etc/passwd", "/nowhere")


def test_a_closed_sandbox_says_so(sandbox: Sandbox, runtime_directory: Path) -> None:
    fork = sandbox.fork()
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            running.result()
        except BaseException as failure:
            failures.append(failure)

    running = fork.start(["sleep", "1000"])
    thread = threading.Thread(target=wait)
    thread.start()
    fork.close()
    fork.close()
    thread.join()
    assert [str(failure) for failure in failures] == ["the sandbox is closed"]
    with pytest.raises(UserError, match="the sandbox is closed"):
        fork.run(["true"])
    assert not (runtime_directory / runtime.ENDED / fork.name).exists()


def test_asyncio() -> None:
    async def main() -> None:
        async with AsyncSandbox() as sandbox:
            texts = ["one", "two", "three"]
            results = await asyncio.gather(*(sandbox.run(["echo", text]) for text in texts))
            assert [result.stdout.decode().strip() for result in results] == texts
            with pytest.raises(CommandTimeout):
                await sandbox.run(["sleep", "1000"], timeout=5)
            task = asyncio.create_task(sandbox.run(["sh", "-c", "touch /tmp/began; sleep 1000"]))
            while (await sandbox.run(["test", "-e", "/tmp/began"])).exit_code:
                pass
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not (await sandbox.run(["pidof", "sleep"])).exit_code:
                pass
            async with sandbox.fork() as fork:
                result = await fork.run(["test", "-e", "/tmp/began"])
                assert result.exit_code == 0
        with pytest.raises(RuntimeError):
            await sandbox.run(["true"])

    asyncio.run(main())


def test_the_pytest_plugin_with_a_machine(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.vmrun(memory='512M')\n"
        "def test_good(vm): assert vm.run(['echo', 'x']).stdout == b'x\\n'\n"
        "def test_bad(vm): vm.run(['sh', '-c', 'echo words > /dev/ttyS0; false']).check()\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:vmrun",
            "-p",
            "vmrun.pytest_plugin",
            "-p",
            "no:cacheprovider",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "vmrun console" in done.stdout and "\nwords" in done.stdout.replace("\r", "")


def busybox() -> bytes:
    found = shutil.which("busybox", path=f"{os.environ['PATH']}:/bin:/usr/bin")
    if found is None:
        pytest.skip("no busybox (Debian: busybox-static)")
    return Path(found).read_bytes()


def test_an_oci_image_runs_as_it_says(tmp_path: Path) -> None:
    base = tar(
        ("dir", "bin", b""),
        ("file", "bin/busybox", busybox()),
        *[("symlink", f"bin/{name}", "busybox") for name in ("sh", "id", "cat", "pwd", "echo", "head")],
        ("dir", "etc", b""),
        ("file", "etc/passwd", b"root:x:0:0::/:/bin/sh\nworker:x:1234:2345::/home/worker:/bin/sh\n"),
        ("file", "etc/gone", b"x"),
        mode=0o755,
    )
    script = b'echo "$(id -u):$(id -g) $PWD $GREETING $*"; [ ! -e /etc/gone ]\n'
    above = tar(
        ("dir", "work", b""),
        ("file", "work/start", b"#!/bin/sh\n" + script),
        ("file", "etc/.wh.gone", b""),
        mode=0o755,
    )
    layout = Layout(tmp_path / "image")
    image = layout.index(
        layout.manifest(
            [base, above],
            Env=["PATH=/bin", "GREETING=good day"],
            WorkingDir="/work",
            User="worker",
            Entrypoint=["/work/start"],
            Cmd=["one", "two"],
        )
    )
    command = [*VMRUN, "run", "--image", str(image)]
    own = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True)
    assert (own.returncode, own.stdout) == (0, b"1234:2345 /work good day one two\n"), own.stderr
    words = ["--env", "GREETING=hi", "--user", "0:7", "-w", "/etc", "--", "sh", "/work/start", "three"]
    ours = subprocess.run([*command, *words], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True)
    assert (ours.returncode, ours.stdout) == (0, b"0:7 /etc hi three\n"), ours.stderr


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tar of a Debian root with Python, and pytest as pip installs it."""
    directory = tmp_path_factory.mktemp("debian")
    root, made = directory / "root", directory / "debian.tar"
    debootstrap = shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin")
    if debootstrap is None:
        pytest.skip("no debootstrap")
    words = ["--variant=minbase", "--include=python3", "bookworm", str(root), MIRROR]
    subprocess.run([debootstrap, *words], check=True, capture_output=True)
    packages = root / "usr/local/lib/python3.11/dist-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    subprocess.run([*pip, "pytest>=8", "pytest-timeout"], check=True, capture_output=True)
    subprocess.run(["tar", "-C", root, "-cf", made, "."], check=True)
    shutil.rmtree(root)
    return made


# Of the project's own tests those that need no more than pytest, and little of a guest whose kernel is
# interpreted: here each file that Python opens takes its time.
OWN_TESTS = ("tests/unit/test_platform_i8042.py", "tests/unit/test_platform_acpi_pm.py")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_python_and_our_own_tests_in_a_debian_root(debian: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("devices", "vmrun", "tests/unit"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=unwanted)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(REPOSITORY / name, checkout / name)
    with Sandbox(debian, memory=1 << 30) as sandbox:
        script = "import platform, sys; print(platform.release(), sys.version_info[:2], 6 * 7)"
        result = sandbox.run(["python3", "-c", script], timeout=600).check()
        assert result.stdout.endswith(b"-vmrun (3, 11) 42\n")
    words = ["run", "--image", str(debian), "--mem", "1G", "--timeout", "1800s", "--workdir", "/checkout"]
    pytest_words = ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", *OWN_TESTS]
    done = subprocess.run(
        [*VMRUN, *words, "--copy-in", f"{checkout}:/checkout", "--", *pytest_words],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
