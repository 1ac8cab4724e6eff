"""`vmrun up` and `vmrun down` for real: bare-metal guests, and bridges in a network namespace."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.block.qcow2_create import create_qcow2
from vmrun.control import runtime
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE
from vmrun.host.bridge import BridgePort
from vmrun.host.tap import Tap

ROOT = Path(__file__).parents[2]
INTERRUPTED = 130
COMMAND = [sys.executable, "-m", "vmrun"]

Result = subprocess.CompletedProcess[str]

pytestmark = pytest.mark.usefixtures("base")


@pytest.fixture(autouse=True)
def kernel(bare_kernel: Callable[[str], Path], tmp_path: Path) -> Path:
    """A guest that spins, as "vmlinux" beside the machine files."""
    return bare_kernel("spin: pause; jmp spin").rename(tmp_path / "vmlinux")


@pytest.fixture
def vmrun(tmp_path: Path) -> Callable[..., Result]:
    def do(*arguments: str, code: int = 0) -> Result:
        result = subprocess.run(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return do


Vmrun = Callable[..., Result]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a command and go on."""
    processes = []

    def do(*arguments: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, bufsize=1
        )
        processes.append(process)
        return process

    yield do
    for process in processes:
        process.kill()
        process.communicate()


Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], None]:
    def do(text: str) -> None:
        (tmp_path / "vm.toml").write_text(text)

    return do


def machines(*names: str, more: str = "") -> str:
    return "".join(f'[machines.{name}]\nkernel = "vmlinux"\nmem = "16M"\n' for name in names) + more


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def links() -> dict[str, Any]:
    return {link["ifname"]: link for link in json.loads(ip("-j", "link"))}


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_the_example(vmrun: Vmrun, tmp_path: Path, base: Path) -> None:
    """docs/examples/lab.toml, as it is."""
    shutil.copy(ROOT / "docs/examples/lab.toml", tmp_path)
    (tmp_path / "disks").mkdir()
    for name in ("router", "disks/server-1", "disks/server-2"):
        with (tmp_path / f"{name}.qcow2").open("wb+") as file:
            create_qcow2(file.fileno(), 1 << 20)

    up = vmrun("up", "lab.toml")
    assert up.stderr == ""
    assert up.stdout.splitlines() == ["router: started", "server-1: started", "server-2: started"]
    found = {name: json.loads((base / name / "config.json").read_text()) for name in runtime.running()}
    assert found.keys() == {"router", "server-1", "server-2"}
    assert found["server-2"]["disks"][0]["path"] == str(tmp_path / "disks/server-2.qcow2")
    assert found["server-2"]["memory"] == 128 << 20 and found["router"]["cpus"] == 2
    on_bridge = {name for name, link in links().items() if link.get("master") == "lab0"}
    assert on_bridge == {"lab-router", "lab-1", "lab-2"}
    assert "10.77.0.1/24" in ip("addr", "show", "lab0") and "100.64." in ip("addr", "show", "lab-up")

    assert vmrun("up", "lab.toml", "debug", "router").stdout.splitlines() == [
        "router: runs already",
        "debug: started",
    ]
    # The bridge is the file's, not of the machines on it.
    vmrun("down", "lab.toml", "server", "router", "-f")
    assert runtime.running().keys() == {"debug"}
    assert "lab0" in links() and "lab-1" not in links()
    assert vmrun("down", "lab.toml").stdout.splitlines() == [
        "debug: stopped",
        "server-2: does not run",
        "server-1: does not run",
        "router: does not run",
        "bridge lab0: removed",
    ]
    assert runtime.running() == {} and links().keys() == {"lo"}
    assert vmrun("down", "lab.toml").stdout.count("does not run") == 4


@pytest.mark.root
@pytest.mark.usefixtures("network_namespace")
def test_bridges(vmrun: Vmrun, write: Callable[[str], None]) -> None:
    nics = 'nics = ["t0,bridge=br0"]\n'
    write(machines("a", more=nics + '[bridges.br0]\naddress = "10.0.0.1/24"\n[bridges.br7]\n'))
    ip("link", "add", "br7", "type", "bridge")
    # One that a machine made becomes the file's; its last machine does not remove it any more.
    with Tap("t9") as tap, BridgePort("br0", tap.name):
        vmrun("up")
    assert {"br0", "t0", "br7"} <= links().keys()
    vmrun("stop", "-f", "-w", "a")
    assert "10.0.0.1/24" in ip("addr", "show", "br0")
    vmrun("up")
    with Tap("t9") as tap, BridgePort("br0", tap.name):
        assert "bridge" not in vmrun("down").stdout  # somebody is on it
    assert {"br0", "br7"} <= links().keys()
    assert "bridge br0: removed" in vmrun("down").stdout
    assert links().keys() == {"lo", "br7"}  # which others made
    # And an address that a bridge of others does not have is refused before anything starts.
    write(machines("a", more=nics + '[bridges.br7]\naddress = "10.0.0.1/24"\n'))
    assert "br7 is not vmrun's own" in vmrun("up", code=EXIT_USAGE).stderr
    assert runtime.running() == {}


def test_another_configuration(vmrun: Vmrun, write: Callable[[str], None]) -> None:
    write(machines("a", "b"))
    vmrun("up")
    before = runtime.running()
    write(machines("a", "b").replace("16M", "32M", 1))
    result = vmrun("up", code=EXIT_USAGE)
    assert result.stdout == "b: runs already\n"
    assert result.stderr == "vmrun: a: runs with another configuration (memory): --recreate restarts it\n"
    assert runtime.running() == before
    assert vmrun("up", "--recreate").stdout.splitlines() == ["b: runs already", "a: stopped", "a: started"]
    assert runtime.running()["a"] != before["a"] and runtime.running()["b"] == before["b"]
    assert vmrun("up").stdout == "a: runs already\nb: runs already\n"


def test_one_failure_does_not_stop_the_others(
    vmrun: Vmrun, write: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    write(machines("a", "b", "c").replace("vmlinux", "junk", 1) + "[start]\nparallel = 2")
    result = vmrun("up", code=EXIT_IMAGE)
    assert result.stdout == "b: started\nc: started\n"
    assert result.stderr.startswith("vmrun: a: ") and result.stderr.count("\n") == 1
    assert runtime.running().keys() == {"b", "c"}


def test_nothing_starts_when_something_is_missing(vmrun: Vmrun, write: Callable[[str], None]) -> None:
    write(machines("a", "b", more='disks = ["no.raw"]\ninitrd = "no"\n'))
    result = vmrun("up", code=EXIT_IMAGE)
    assert result.stdout == "" and runtime.running() == {}
    assert [line.partition(": ")[2].split(": ")[:2] for line in result.stderr.splitlines()] == [
        ["vm.toml:7", "machines.b.disks[0]"],
        ["vm.toml:8", "machines.b.initrd"],
    ]
    vmrun("up", "vm.toml", "a")
    assert runtime.running().keys() == {"a"}


def test_the_time_limit_counts(vmrun: Vmrun, write: Callable[[str], None]) -> None:
    write(machines("a", more='timeout = "200ms"\n'))
    vmrun("up")
    vmrun("wait", "a", code=68)


@pytest.mark.parametrize("moment", ["claimed", "started"])
def test_a_killed_up(
    vmrun: Vmrun, begin: Begin, write: Callable[[str], None], base: Path, moment: str
) -> None:
    """What it had begun comes up without it, and the next command finds it."""
    write(machines("a", "b", "c", "d", more='[start]\nparallel = 2\ndelay = "60s"\n'))
    process = begin("up")
    if moment == "started":
        assert process.stdout is not None
        assert process.stdout.readline() == "a: started\n"
    else:
        eventually(lambda: any((base / name).exists() for name in "ab"))
    process.kill()
    process.wait()
    write(machines("a", "b", "c", "d"))
    told = vmrun("up").stdout
    assert runtime.running().keys() == {"a", "b", "c", "d"}
    assert "a: runs already" in told or "b: runs already" in told
    assert "c: started\nd: started\n" in told

    process = begin("up", "vm.toml", "a")
    process.kill()
    process.wait()
    assert vmrun("down").stdout.count(": stopped") == 4
    assert runtime.running() == {} and {path.name for path in base.iterdir()} <= {".lock", ".ended"}


def test_down_after_a_killed_up_leaves_nothing(
    vmrun: Vmrun, begin: Begin, write: Callable[[str], None], base: Path
) -> None:
    write(machines("a", "b", "c"))
    process = begin("up")
    eventually(lambda: base.exists() and any((base / name).exists() for name in "abc"))
    process.kill()
    process.wait()
    vmrun("down")
    assert runtime.running() == {}


def test_interrupted(begin: Begin, write: Callable[[str], None]) -> None:
    write(machines("a", "b", "c", more='[start]\nparallel = 1\ndelay = "60s"\n'))
    process = begin("up")
    assert process.stdout is not None
    assert process.stdout.readline() == "a: started\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert said == "vmrun: interrupted: machines that run go on; not started: b, c\n"
    assert runtime.running().keys() == {"a"}


def test_interrupted_while_machines_are_on_their_way(
    begin: Begin, write: Callable[[str], None], base: Path
) -> None:
    """Those are waited for, so that what is said is so."""
    write(machines("a", "b", "c", "d", more="[start]\nparallel = 3\n"))
    process = begin("up")
    eventually(lambda: (base / "c").exists())
    process.send_signal(signal.SIGINT)
    told, said = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert {f"{name}: started" for name in runtime.running()} == set(told.splitlines())
    assert {"a", "b", "c"} <= runtime.running().keys()
    assert "interrupted: machines that run go on" in said


def test_down_waits_for_an_up(vmrun: Vmrun, begin: Begin, write: Callable[[str], None]) -> None:
    write(machines("a", "b", more='[start]\nparallel = 1\ndelay = "3s"\n'))
    process = begin("up")
    assert process.stdout is not None
    assert process.stdout.readline() == "a: started\n"
    down = vmrun("down")
    assert down.stderr == "vmrun: vm.toml: waiting for another up or down of this file\n"
    assert down.stdout == "b: stopped\na: stopped\n"
    process.communicate(timeout=30)
    assert runtime.running() == {}


@pytest.mark.slow
def test_a_machine_that_does_not_answer(vmrun: Vmrun, write: Callable[[str], None]) -> None:
    write(machines("a", "b"))
    vmrun("up", "vm.toml", "a")
    pid = runtime.running()["a"]
    os.kill(pid, signal.SIGSTOP)
    try:
        result = vmrun("up", code=70)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (result.stdout, result.stderr) == (
        "b: started\n",
        "vmrun: a: machine a does not answer\n",
    )
