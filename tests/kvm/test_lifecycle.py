"""Machines with names, from start to end, by the real commands: bare-metal guests on the real KVM."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from devices.block.qcow2_create import create_qcow2
from tests.kvm.commands import good, refused, vmrun
from vmrun.control import runtime
from vmrun.control.client import Ending, MachineClient
from vmrun.errors import EXIT_IMAGE, EXIT_TIMEOUT, EXIT_USAGE, EXIT_VMM

pytestmark = pytest.mark.usefixtures("base")

Kernel = Callable[[str], Path]
STOPPED = 143

PRINT = "mov dx, 0x3f8; mov al, {}; out dx, al;"
SPIN = "spin: pause; jmp spin"
ECHO = """
    echo: mov dx, 0x3fd
    in al, dx
    test al, 1
    jz echo
    mov dx, 0x3f8
    in al, dx
    out dx, al
    jmp echo
"""
# Prints the alphabet again and again. Each letter goes through the UART's scratch register and back, so that
# an access that is lost or done twice shows.
COUNT = """
    again: mov bl, 'A'
    next: mov dx, 0x3ff
    mov al, bl
    out dx, al
    xor al, al
    in al, dx
    cmp al, bl
    jne broken
    mov dx, 0x3f8
    out dx, al
    inc bl
    cmp bl, 'Z'
    jbe next
    jmp again
    broken: mov dx, 0x501
    mov al, 99
    out dx, al
    hlt
"""
ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def start(kernel: Path, *arguments: str | Path, name: str = "web") -> None:
    assert good("boot", "--detach", "--name", name, "--kernel", kernel, *arguments) == f"{name}\n"


def expect(sock: socket.socket, text: bytes) -> bytes:
    """Read until `text` has come."""
    sock.settimeout(30)
    data = b""
    while text not in data:
        piece = sock.recv(4096)
        assert piece, f"the end after {data!r}"
        data += piece
    return data


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_life(bare_kernel: Kernel, base: Path) -> None:
    start(bare_kernel(PRINT.format("'h'") + PRINT.format("'i'") + SPIN), "--mem", "64M", "--cpus", "2")
    line = good("ps").splitlines()[1].split()
    assert line[0] == "web" and line[2:5] == ["running", "2", "64M"]
    (facts,) = json.loads(good("ps", "--json"))
    assert facts["name"] == "web" and facts["memory"] == 64 << 20 and 0 < facts["memory_used"] < 64 << 20
    assert facts["cpu_seconds"]["vmm"] > 0 and facts["disks"] == 0
    assert os.getsid(facts["pid"]) != os.getsid(0)
    found = json.loads(good("inspect", "web"))
    assert found["config"]["cpus"] == 2 and found["config"]["kernel"].endswith("guest.elf")
    assert json.loads((base / "web" / "config.json").read_text()) == found["config"]
    assert "web" in good("top")
    eventually(lambda: good("log", "web") == "hi")
    assert good("stop", "-f", "-w", "web") == ""
    assert not psutil.pid_exists(facts["pid"]) or psutil.Process(facts["pid"]).status() == "zombie"
    assert len(good("ps").splitlines()) == 1
    # What is left says how it ended.
    assert good("log", "web") == "hi"
    assert "stopped by force" in good("log", "--vmm", "web")
    result = vmrun("wait", "web")
    assert (result.returncode, result.stderr) == (STOPPED, "vmrun: stopped by force\n")


def test_wrong_names(bare_kernel: Kernel) -> None:
    start(bare_kernel(SPIN))
    for command in ("inspect", "wait", "stop", "reset", "pause", "resume", "console", "log"):
        result = vmrun(command, "wbe")
        assert result.returncode == EXIT_USAGE
        assert result.stderr == "vmrun: there is no machine 'wbe': did you mean web?\n"
    assert "NAME or --all" in vmrun("stop").stderr
    assert "not both" in vmrun("stop", "web", "--all").stderr
    assert "a machine's name is" in vmrun("boot", "--name", "a/b").stderr


def test_made_up_names_and_all(bare_kernel: Kernel) -> None:
    kernel = bare_kernel(SPIN)
    names = {good("boot", "-d", "--kernel", kernel).strip() for _ in range(3)}
    assert len(names) == 3 and set(runtime.running()) == names
    good("pause", "--all")
    assert {facts["state"] for facts in json.loads(good("ps", "--json"))} == {"paused"}
    # No driver could be asked, so that they end at once; each is asked before the first is waited for.
    good("stop", "--all", "-w")
    assert runtime.running() == {}
    good("stop", "--all")


def test_a_detached_machine_fails_as_in_the_foreground(tmp_path: Path, base: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    for kernel in (tmp_path / "junk", tmp_path / "nothing"):
        foreground = vmrun("boot", "--name", "web", "--kernel", kernel)
        detached = vmrun("boot", "--name", "web", "--kernel", kernel, "--detach")
        assert (detached.returncode, detached.stderr) == (foreground.returncode, foreground.stderr)
        assert detached.returncode == EXIT_IMAGE and detached.stdout == ""
    assert runtime.running() == {}


def test_the_guests_own_end(bare_kernel: Kernel) -> None:
    start(bare_kernel(ECHO.replace("out dx, al", "mov dx, 0x501; out dx, al")))
    waiter = subprocess.Popen([sys.executable, "-m", "vmrun", "wait", "web"], stderr=subprocess.PIPE)
    with MachineClient("web") as client, client.console() as sock:
        sock.sendall(b"\x05")
        assert sock.recv(1) == b""
    _, said = waiter.communicate(timeout=30)
    assert waiter.returncode == 5 and b"debug exit" in said


def test_waiting_has_an_end(bare_kernel: Kernel) -> None:
    start(bare_kernel(SPIN))
    assert vmrun("wait", "web", "--timeout", "100ms").returncode == EXIT_TIMEOUT


def test_of_two_with_one_name_one_wins(bare_kernel: Kernel) -> None:
    kernel = bare_kernel(SPIN)
    command = [sys.executable, "-m", "vmrun", "boot", "-d", "--name", "web", "--kernel", str(kernel)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, EXIT_USAGE]
    assert b"a machine of that name runs already" in b"".join(errors)


def test_a_killed_vmm_leaves_nothing(bare_kernel: Kernel, tmp_path: Path, base: Path) -> None:
    kernel = bare_kernel(SPIN)
    disk = tmp_path / "disk.qcow2"
    with disk.open("wb+") as file:
        create_qcow2(file.fileno(), 1 << 20)
    start(kernel, "--disk", disk)
    (facts,) = json.loads(good("ps", "--json"))
    assert facts["workers"].keys() == {"blk0"} == facts["cpu_seconds"].keys() - {"vmm"}
    waiter = subprocess.Popen([sys.executable, "-m", "vmrun", "wait", "web"], stderr=subprocess.PIPE)
    with MachineClient("web") as client:
        waiting = client._send("wait")
        client.status()
        os.kill(facts["pid"], signal.SIGKILL)
        with pytest.raises(Exception, match="machine web died"):
            client._receive(waiting, 30)
    _, said = waiter.communicate(timeout=30)
    assert waiter.returncode in (EXIT_VMM, EXIT_USAGE) and said.count(b"\n") == 1
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in facts["workers"].values()))
    assert json.loads(good("ps", "--json")) == []
    assert {path.name for path in base.iterdir()} == {".lock", runtime.ENDED}
    # What it said and how it ended can still be asked for.
    assert good("log", "web") == ""
    assert refused("wait", "web", code=EXIT_VMM) == "vmrun: the machine's process was killed"
    start(kernel, "--disk", disk)


def test_a_stopped_vmm_is_seen_as_such(bare_kernel: Kernel) -> None:
    start(bare_kernel(SPIN))
    pid = runtime.running()["web"]
    os.kill(pid, signal.SIGSTOP)
    (facts,) = json.loads(good("ps", "--json"))
    assert facts["state"] == "unresponsive" and facts["pid"] == pid
    os.kill(pid, signal.SIGCONT)
    with MachineClient("web") as client:
        assert client.status().state == "running"


def test_reset_is_a_new_machine_under_the_same_name(bare_kernel: Kernel) -> None:
    """The guest prints F when its memory is fresh, and X when it is not."""
    start(
        bare_kernel(
            "mov al, 'F'; cmp dword ptr [0x200000], 0; je print; mov al, 'X';"
            "print: mov dword ptr [0x200000], 1; mov dx, 0x3f8; out dx, al;" + ECHO
        )
    )
    pid = runtime.running()["web"]
    with MachineClient("web") as client, client.console(replay=10) as sock:
        assert expect(sock, b"F") == b"F"
        good("pause", "web")
        good("reset", "web")
        assert expect(sock, b"F") == b"F"  # whoever is attached stays so
        sock.sendall(b"x")
        expect(sock, b"x")
    assert runtime.running() == {"web": pid}
    assert json.loads(good("ps", "--json"))[0]["state"] == "running"


def test_a_thousand_pauses_lose_nothing(bare_kernel: Kernel) -> None:
    start(bare_kernel(COUNT), "--cpus", "2")  # the second never starts, and must be paused all the same
    seen = bytearray()
    with MachineClient("web") as watcher, watcher.console(replay=1 << 20) as sock:

        def read() -> None:
            while data := sock.recv(65536):
                seen.extend(data)

        reader = threading.Thread(target=read)
        reader.start()
        with MachineClient("web") as client:
            for cycle in range(1000):
                client.pause()
                if cycle % 250 == 0:
                    # Nothing is printed any more; what was printed is on its way to us.
                    assert client.status().state == "paused"
                    before = client.inspect()["exits"]
                    assert client.inspect()["exits"] == before
                client.resume()
            assert client.stop_and_wait(force=True) == Ending(STOPPED, "stopped by force")
        reader.join()
    text = bytes(seen)
    assert len(text) > 100  # how far it comes between two pauses is the host's business
    assert text == (ALPHABET * (len(text) // 26 + 1))[: len(text)]


def test_stopping_a_paused_machine(bare_kernel: Kernel) -> None:
    start(bare_kernel(COUNT))
    good("pause", "web")
    good("pause", "web")
    good("stop", "-w", "web")
    assert runtime.running() == {}


def test_the_console_is_left_and_the_machine_runs_on(bare_kernel: Kernel) -> None:
    start(bare_kernel(PRINT.format("'>'") + ECHO))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vmrun", "console", "web"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    text = b""

    def until(words: bytes) -> None:
        nonlocal text
        while words not in text:
            assert select.select([master], [], [], 30)[0], text
            text += os.read(master, 4096)

    until(b">")
    os.write(master, b"hello")
    until(b"hello")
    os.write(master, b"\x01h")
    until(b"runs on")
    os.write(master, b"\x01\x01!")
    until(b"\x01!")
    os.write(master, b"\x01x")
    until(b"left the console of web")
    assert process.wait(30) == 0
    os.close(master)
    assert "web" in runtime.running()


def test_console_and_log_of_a_foreground_machine(bare_kernel: Kernel) -> None:
    command = [sys.executable, "-m", "vmrun", "boot", "--name", "web", "--kernel", bare_kernel(ECHO)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"one ")
        process.stdin.flush()
        assert process.stdout.read(4) == b"one "
        with MachineClient("web") as client, client.console(replay=100) as sock:
            assert expect(sock, b"one ") == b"one "
            sock.sendall(b"two ")
            assert expect(sock, b"two ") == b"two "
        assert process.stdout.read(4) == b"two "
        assert good("log", "web") == "one two "
        good("stop", "--force", "web")
        assert process.wait(30) == STOPPED
        assert b"stopped by force" in process.stderr.read()
    assert runtime.running() == {} and runtime.ended("web") is None


def test_following_the_log(bare_kernel: Kernel) -> None:
    start(bare_kernel(PRINT.format("'>'") + ECHO))
    command = [sys.executable, "-m", "vmrun", "log", "-f", "web"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b">"
        with MachineClient("web") as client, client.console() as sock:
            sock.sendall(b"abc")
            assert process.stdout.read(3) == b"abc"
        good("stop", "-f", "web")
        assert process.wait(30) == 0


def test_nobody_needs_to_watch_a_talkative_guest(bare_kernel: Kernel) -> None:
    """A client that reads nothing stops neither the guest nor other clients."""
    start(bare_kernel(COUNT))
    with MachineClient("web") as idle, idle.console() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with MachineClient("web") as client:
            before = client.inspect()["exits"][0]
            eventually(lambda: client.inspect()["exits"][0] > before + 2000)


def test_top_on_a_terminal(bare_kernel: Kernel) -> None:
    start(bare_kernel(SPIN))
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "vmrun", "top", "--interval", "200ms"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    text = b""
    while b"running" not in text or b"web" not in text:
        assert select.select([master], [], [], 30)[0], text
        text += os.read(master, 4096)
    os.write(master, b"q")
    try:
        while os.read(master, 4096):
            pass
    except OSError:
        pass  # it has ended, and the terminal with it
    assert process.wait(30) == 0
    os.close(master)


@pytest.mark.parametrize("command", [["console", "web"], ["log", "-f", "web"], ["wait", "web"]])
def test_a_killed_client_changes_nothing(bare_kernel: Kernel, command: list[str]) -> None:
    start(bare_kernel(COUNT))
    with MachineClient("web") as client:
        before = client.inspect()["clients"]
        process = subprocess.Popen(
            [sys.executable, "-m", "vmrun", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        eventually(lambda: client.inspect()["clients"] == before + 1)
        process.kill()
        process.wait()
        eventually(lambda: client.inspect()["clients"] == before)


def test_it_keeps_no_descriptor_of_whoever_started_it(bare_kernel: Kernel) -> None:
    """The other end of a pipe of theirs is ended while the machine runs on."""
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as theirs:
        try:
            command = [sys.executable, "-m", "vmrun", "boot", "-d", "--name", "web"]
            command += ["--kernel", str(bare_kernel(COUNT))]
            subprocess.run(command, pass_fds=(write_end,), check=True, timeout=60, stdout=subprocess.DEVNULL)
        finally:
            os.close(write_end)
        assert select.select([theirs], [], [], 30)[0] and theirs.read() == b""
    assert list(runtime.running()) == ["web"]


def test_a_guest_that_halts_for_good_has_ended(bare_kernel: Kernel) -> None:
    """With interrupts off; the second CPU never starts. It makes no exit by which that could be seen."""
    ended = vmrun(
        "boot", "--kernel", bare_kernel("cli; dead: hlt; jmp dead"), "--cpus", "2", "--timeout", "60s"
    )
    assert ended.returncode == 0, ended.stderr


def test_a_guest_that_waits_for_an_interrupt_has_not(bare_kernel: Kernel) -> None:
    """Nor has one that was paused: it is asked when it goes on."""
    start(bare_kernel("sti; idle: hlt; jmp idle"))
    with MachineClient("web") as client:
        before = client.inspect()["exits"]
        while client.inspect()["exits"] == before:
            assert client.status().state == "running"
        client.pause()
        assert client.status().state == "paused"
        client.resume()
        assert client.stop_and_wait(force=True).code == STOPPED
