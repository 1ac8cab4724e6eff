"""`vmrun run` and `exec` in real guests, as short as it can be; test_run.py has the rest."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmrun import Sandbox
from vmrun.control import runtime
from vmrun.guestkit import kit

pytestmark = pytest.mark.usefixtures("base")

LOOK = "ls /root; date +%s; cat /sys/class/net/eth0/address; head -c 16 /dev/urandom | od -An -tx1"


def vmrun(*arguments: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vmrun", *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, timeout=280, check=False)


def test_a_command_in_a_throw_away_machine(base: Path) -> None:
    script = "cat; echo out; echo err >&2; exit 42"
    done = vmrun("run", "--", "sh", "-c", script, data=b"\0\xffin")
    assert done.returncode == 42, done.stderr
    assert done.stdout == b"\0\xffinout\n" and done.stderr.endswith(b"err\n")
    # From the template now, which is as good the second time.
    done = vmrun("run", "--json", "--", "sh", "-c", "kill -9 $$")
    assert done.returncode == 137
    report = json.loads(done.stderr.splitlines()[-1])
    assert (report["code"], report["own"]) == (137, False)
    assert not runtime.running() and not list((base / runtime.ENDED).glob("*/*"))


@pytest.mark.usefixtures("network_namespace")
@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_machine_is_visited_saved_cloned_and_stopped(tmp_path: Path, count: int) -> None:
    found = kit.find()
    assert found is not None
    disk = tmp_path / "disk.qcow2"
    shutil.copyfile(found.disk, disk)
    assert vmrun("boot", "--detach", "--name", "web", "--disk", disk, "--nic", "tap0").returncode == 0
    for _ in range(20):
        # It takes its time to boot; the agent is waited for ten seconds each time.
        if vmrun("exec", "web", "--", "touch", "/root/there").returncode == 0:
            break
    # What is left to itself prints to the console, and outlives who started it.
    script = "echo left at $(hostname); exec sleep 1000"
    assert vmrun("exec", "-d", "web", "--", "sh", "-c", script).returncode == 0
    while b"left at web" not in vmrun("log", "web").stdout:
        time.sleep(0.1)
    assert vmrun("exec", "web", "--", "pidof", "sleep").returncode == 0
    assert vmrun("exec", "-d", "web", "--", "no-such-program").returncode == 127
    assert vmrun("snapshot", "web", tmp_path / "saved").returncode == 0
    clones = [f"c-{number}" for number in range(1, count + 1)]
    done = vmrun("clone", tmp_path / "saved", "-n", str(count), "--name", "c")
    assert done.stdout.decode().split() == clones, done.stderr
    drawn, macs = set(), set()
    for name in (*clones, "web"):
        before = time.time()
        done = vmrun("exec", name, "--", "sh", "-c", LOOK)
        assert done.returncode == 0, done
        there, seconds, mac, random = done.stdout.decode().splitlines()
        assert there == "there"
        assert before - 1 <= int(seconds) <= time.time() + 1
        # One that was made up for a machine that asked for none is told by nobody but the guest.
        assert json.loads(vmrun("inspect", name).stdout)["config"]["nics"][0]["mac"] in (mac, None)
        drawn.add(random)
        macs.add(mac)
    assert len(drawn) == len(macs) == count + 1
    # Each holds only the pages that it touched.
    memory = [json.loads(vmrun("inspect", name).stdout) for name in clones]
    assert sum(each["memory_used"] for each in memory) < count * memory[0]["memory"] / 4
    done = vmrun("stop", "-w", "web")
    assert done.returncode == 0, done.stderr
    assert b"the guest reset the machine" in vmrun("log", "--vmm", "web").stdout
    assert vmrun("stop", "-f", "-w", *clones).returncode == 0
    subprocess.run(["qemu-img", "check", "-q", tmp_path / "disk.1.qcow2"], check=True)


@pytest.mark.slow
def test_nothing_of_an_image_runs_in_its_template(tmp_path: Path) -> None:
    """Its machine is not confined: it saves itself. What the image's programs did would be in every clone."""
    (tmp_path / "image/bin").mkdir(parents=True)
    shutil.copyfile("/bin/busybox", tmp_path / "image/bin/busybox")
    (tmp_path / "image/bin/busybox").chmod(0o755)
    for name in ("sh", "true"):
        path = tmp_path / "image/bin" / name
        path.write_text("#!/bin/busybox sh\n/bin/busybox touch /ran\n")
        path.chmod(0o755)
    done = vmrun("run", "--image", tmp_path / "image", "--", "/bin/busybox", "ls", "/")
    assert done.returncode == 0, done.stderr
    assert b"bin" in done.stdout.split() and b"ran" not in done.stdout.split()


@pytest.mark.parametrize("times", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_restored_agent_takes_what_comes_before_it_knows_of_the_host(times: int) -> None:
    """Linux hands out what a port's other side sends before it says that there is somebody; one in ten agents
    took the one for the other's end, and never answered.
    """
    for number in range(times):
        with Sandbox() as sandbox:
            time.sleep(number % 4 / 10)  # the first command comes with the greeting, or finds an idle agent
            assert sandbox.run(["true"], timeout=60).exit_code == 0
