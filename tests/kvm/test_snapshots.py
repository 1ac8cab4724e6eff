"""Snapshots, restores and clones of bare-metal guests, by the real commands on the real KVM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devices.block.qcow2_create import create_qcow2
from devices.block.qcow2_header import Header
from tests.kvm.commands import good, refused, vmrun
from vmrun.control import runtime
from vmrun.control.client import MachineClient
from vmrun.errors import EXIT_USAGE
from vmrun.host.backing import MAX_BACKING_FILES
from vmrun.snapshot.restore import Snapshot

pytestmark = pytest.mark.usefixtures("base")

Kernel = Callable[[str], Path]

# Prints the alphabet for ever. A letter goes through the UART's scratch register, memory and a register on
# its
# way, so that what is lost or done twice shows.
COUNT = """
    again: mov ebx, 'A'
    next: mov r12d, ebx
    mov [0x200000], ebx
    mov dx, 0x3ff
    mov al, bl
    out dx, al
    xor eax, eax
    in al, dx
    cmp eax, r12d
    jne broken
    cmp eax, [0x200000]
    jne broken
    mov dx, 0x3f8
    out dx, al
    inc ebx
    cmp bl, 'Z'
    jbe next
    jmp again
    broken: mov dx, 0x501
    mov al, 99
    out dx, al
    hlt
"""
# Fills 32 MiB from 16 MiB on with what depends on the place, and then looks it through again and again.
MEMORY = """
    mov rdi, 0x1000000
    fill: mov rax, rdi
    imul rax, rax, 0x1e3779b1
    mov [rdi], rax
    add rdi, 4096
    cmp rdi, 0x3000000
    jb fill
    look: mov rdi, 0x1000000
    check: mov rax, rdi
    imul rax, rax, 0x1e3779b1
    cmp [rdi], rax
    jne broken
    cmp qword ptr [rdi + 8], 0
    jne broken
    add rdi, 4096
    cmp rdi, 0x3000000
    jb check
    mov dx, 0x3f8
    mov al, '.'
    out dx, al
    jmp look
    broken: mov dx, 0x501
    mov al, 99
    out dx, al
    hlt
"""
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def start(kernel: Path, *arguments: str | Path, name: str = "web") -> None:
    memory = [] if "--mem" in arguments else ["--mem", "64M"]
    good("boot", "--detach", "--name", name, "--kernel", kernel, *memory, *arguments)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def printed(name: str) -> str:
    return good("log", name)


def is_alphabets(text: str) -> bool:
    start = ALPHABET.index(text[0])
    return text == (ALPHABET * (len(text) // 26 + 2))[start : start + len(text)]


def disk(tmp_path: Path, name: str = "x.qcow2") -> Path:
    path = tmp_path / name
    with open(path, "w+b") as file:
        create_qcow2(file.fileno(), 1 << 30)
    return path


def test_what_was_saved_goes_on(bare_kernel: Kernel, tmp_path: Path) -> None:
    start(bare_kernel(COUNT))
    eventually(lambda: len(printed("web")) > 100)
    assert str(tmp_path / "one") in good("snapshot", "web", tmp_path / "one", "--stop")
    before = printed("web")
    assert "saved to" in good("log", "web", "--vmm")
    good("restore", tmp_path / "one", "--detach", "--name", "again")
    eventually(lambda: len(printed("again")) > 100)
    assert is_alphabets(before + printed("again"))
    # Once more, of a machine that came from a snapshot; the first is still good.
    good("snapshot", "again", tmp_path / "two")
    for number, directory in enumerate((tmp_path / "two", tmp_path / "one")):
        good("restore", directory, "--detach", "--name", f"n{number}")
        eventually(lambda number=number: len(printed(f"n{number}")) > 100)
    assert is_alphabets(before + printed("n1"))
    eventually(lambda: len(printed("again")) > 2000)
    assert is_alphabets(printed("again")) and is_alphabets(printed("n0"))


def test_a_snapshot_of_a_paused_machine(bare_kernel: Kernel, tmp_path: Path) -> None:
    start(bare_kernel(COUNT), "--cpus", "2")
    good("pause", "web")
    good("snapshot", "web", tmp_path / "s")
    assert json.loads(good("inspect", "web"))["state"] == "paused"
    good("restore", tmp_path / "s", "--detach", "--paused", "--name", "held")
    assert json.loads(good("inspect", "held"))["state"] == "paused"
    assert printed("held") == ""
    good("resume", "held")
    eventually(lambda: len(printed("held")) > 100)
    # After a reset it is an ordinary machine, which begins at its beginning.
    good("reset", "held")
    good("stop", "-f", "-w", "held")


@pytest.mark.parametrize("options", [[], ["--prefetch"], ["--verify"]])
def test_memory_comes_when_it_is_touched(bare_kernel: Kernel, tmp_path: Path, options: list[str]) -> None:
    start(bare_kernel(MEMORY))
    eventually(lambda: printed("web"))
    good("snapshot", "web", tmp_path / "s", "--stop")
    assert (tmp_path / "s" / "memory").stat().st_blocks * 512 > 30 << 20
    good("restore", tmp_path / "s", "--detach", "--name", "m", *options)
    eventually(lambda: len(printed("m")) > 2)
    # A snapshot of what is there in part only is whole.
    good("restore", tmp_path / "s", "--detach", "--paused", "--name", "part")
    good("snapshot", "part", tmp_path / "t", "--stop")
    good("restore", tmp_path / "t", "--detach", "--name", "whole")
    eventually(lambda: len(printed("whole")) > 2)


def test_damaged_memory_is_never_used(bare_kernel: Kernel, tmp_path: Path) -> None:
    start(bare_kernel(MEMORY))
    eventually(lambda: printed("web"))
    good("snapshot", "web", tmp_path / "s", "--stop")
    with open(tmp_path / "s" / "memory", "r+b") as file:
        file.seek(0x2000000)
        file.write(b"\xff")
    assert "memory is damaged at offset 0x2000000" in refused("restore", tmp_path / "s", "--verify")
    assert "memory is damaged at offset 0x2000000" in refused("restore", tmp_path / "s", "--timeout", "60s")


def test_a_machine_goes_on_with_overlays(bare_kernel: Kernel, tmp_path: Path, base: Path) -> None:
    image, raw = disk(tmp_path), tmp_path / "y.raw"
    raw.write_bytes(bytes(1 << 20))
    start(bare_kernel(COUNT), "--disk", image, "--disk", raw)
    good("snapshot", "web", tmp_path / "s")
    files = [entry["path"] for entry in json.loads(good("inspect", "web"))["config"]["disks"]]
    assert files == [str(tmp_path / "x.1.qcow2"), str(tmp_path / "y.1.qcow2")]
    assert json.loads((base / "web" / "config.json").read_text())["disks"][0]["path"] == files[0]
    good("snapshot", "web", tmp_path / "t")
    good("restore", tmp_path / "s", "--detach", "--name", "a")
    good("restore", tmp_path / "t", "--detach", "--name", "b")
    names = {path.name for path in tmp_path.glob("*.qcow2")}
    assert names == {
        *("x.qcow2", "x.1.qcow2", "x.2.qcow2", "y.1.qcow2", "y.2.qcow2"),
        *("x.a.qcow2", "y.a.qcow2", "x.b.qcow2", "y.b.qcow2"),
    }
    good("reset", "web")
    for name in ("web", "a", "b"):
        eventually(lambda name=name: len(printed(name)) > 100)
        good("stop", "-f", "-w", name)
    for path in tmp_path.glob("*.qcow2"):
        subprocess.run(["qemu-img", "check", "-q", path], check=True)
    # What is frozen can be moved, and must not be changed.
    shutil.copy(image, tmp_path / "moved.qcow2")
    (tmp_path / "x.kept").write_bytes(image.read_bytes())
    with open(image, "r+b") as file:
        file.write(b"\0")
    assert "has changed since the snapshot" in refused("restore", tmp_path / "s")
    image.unlink()
    assert "no such file" in refused("restore", tmp_path / "s")
    good("restore", tmp_path / "s", "-d", "--name", "c", "--disk", tmp_path / "moved.qcow2", "--disk", raw)
    assert (tmp_path / "moved.c.qcow2").exists()


def test_a_disk_that_grew_stays_as_large(bare_kernel: Kernel, tmp_path: Path) -> None:
    start(bare_kernel(COUNT), "--disk", disk(tmp_path))
    with MachineClient("web") as machine:
        machine.resize(0, 3 << 30)
    good("snapshot", "web", tmp_path / "s")
    good("restore", tmp_path / "s", "--detach", "--name", "a")
    good("stop", "-f", "-w", "web")
    good("stop", "-f", "-w", "a")
    for name in ("x.1.qcow2", "x.a.qcow2"):
        with open(tmp_path / name, "rb") as file:
            assert Header(file.fileno()).size == 3 << 30


def test_clones(bare_kernel: Kernel, tmp_path: Path) -> None:
    start(bare_kernel(COUNT), "--disk", disk(tmp_path))
    good("snapshot", "web", tmp_path / "s")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert good("clone", tmp_path / "s", "-n", "3", "--name", "c").split() == ["c-1", "c-2", "c-3"]
    for number in (1, 2, 3):
        eventually(lambda number=number: len(printed(f"c-{number}")) > 100)
    # A clone can be saved: what it had thrown away otherwise goes with it; and go on, and be reset.
    good("snapshot", "c-2", tmp_path / "t")
    assert (tmp_path / "t" / "disk0.qcow2").exists()
    subprocess.run(["qemu-img", "check", "-q", tmp_path / "t" / "disk0.qcow2"], check=True)
    good("reset", "c-2")
    good("clone", tmp_path / "t", "--name", "d")
    good("snapshot", "d-1", tmp_path / "u", "--stop")
    good("clone", tmp_path / "u", "--name", "e")
    eventually(lambda: len(printed("e-1")) > 100)
    for name in ("c-1", "c-2", "c-3", "e-1"):
        good("stop", "-f", "-w", name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "t", "u"])
    assert "give 1 to" in refused("clone", tmp_path / "s", "-n", "0", code=EXIT_USAGE)


def test_refusals(bare_kernel: Kernel, tmp_path: Path) -> None:
    start(bare_kernel(COUNT))
    good("snapshot", "web", tmp_path / "s")
    assert "is there already" in refused("snapshot", "web", tmp_path / "s")
    assert "no such file" in refused("snapshot", "web", tmp_path / "nowhere" / "s")
    assert "is no snapshot" in refused("restore", tmp_path)
    assert "is no snapshot" in refused("restore", tmp_path / "nowhere")

    def change(name: str, edit: Callable[[Any], Any]) -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "s", tmp_path / "bad")
        path = tmp_path / "bad" / name
        if name.endswith(".json"):
            content = json.loads(path.read_text())
            edit(content)
            path.write_text(json.dumps(content))
        else:
            with open(path, "r+b") as file:
                edit(file)
        return tmp_path / "bad"

    def other(key: str, value: Any) -> Callable[[Any], None]:
        return lambda content: content.update({key: value})

    for name, edit, words in (
        ("manifest.json", other("format", 2), "format 2"),
        ("manifest.json", other("surprise", 2), "damaged"),
        ("manifest.json", other("config", {}), "damaged"),
        ("manifest.json", other("memory", {"size": 1}), "damaged"),
        ("manifest.json", lambda content: content["cpu"].update(vendor="CyrixInstead"), "CyrixInstead"),
        ("manifest.json", lambda content: content["config"].update(memory=1 << 30), "memory"),
        ("state.json", other("kvm", {}), "checksum"),
        ("memory", lambda file: file.truncate(1 << 20), "truncated"),
        ("memory.sums", lambda file: file.truncate(100), "checksum file"),
        ("memory.sums", lambda file: (file.seek(40), file.write(b"\7")), "checksum file"),
    ):
        assert words in refused("restore", change(name, edit))
    good("restore", tmp_path / "s", "-d", "--name", "fine")
    assert "0 disks" in refused("restore", tmp_path / "s", "--disk", "x", code=EXIT_USAGE)
    assert "0 network cards" in refused("restore", tmp_path / "s", "--nic", "tap7", code=EXIT_USAGE)
    eventually(lambda: len(printed("web")) > 2000)
    assert is_alphabets(printed("web"))


def test_a_snapshot_that_fails_changes_nothing(bare_kernel: Kernel, tmp_path: Path) -> None:
    image = disk(tmp_path)
    start(bare_kernel(COUNT), "--disk", image)
    # The name of the overlay is the last thing that can go wrong, but for the directory's own.
    (tmp_path / ".s.partial").write_text("in the way")
    assert "exists" in refused("snapshot", "web", tmp_path / "s", code=70)
    eventually(lambda: len(printed("web")) > 1000)
    assert is_alphabets(printed("web"))
    assert json.loads(good("inspect", "web"))["state"] == "running"
    assert json.loads(good("inspect", "web"))["config"]["disks"][0]["path"] == str(image)
    assert not list(tmp_path.glob("x.*.qcow2"))


def test_a_disk_with_too_many_files_below(bare_kernel: Kernel, tmp_path: Path) -> None:
    path = disk(tmp_path, "0.qcow2")
    for number in range(1, MAX_BACKING_FILES + 1):
        above = tmp_path / f"{number}.qcow2"
        arguments = ("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", path, above)
        subprocess.run(["qemu-img", *arguments], check=True)
        path = above
    start(bare_kernel(COUNT), "--disk", path)
    assert f"more than {MAX_BACKING_FILES} backing files" in refused("snapshot", "web", tmp_path / "s")
    eventually(lambda: len(printed("web")) > 1000)
    assert is_alphabets(printed("web"))


def test_a_killed_vmm_leaves_no_snapshot(bare_kernel: Kernel, tmp_path: Path) -> None:
    image = disk(tmp_path)
    start(bare_kernel(MEMORY), "--disk", image, "--mem", "1G")
    pid = json.loads(good("inspect", "web"))["pid"]
    client = subprocess.Popen(
        [sys.executable, "-m", "vmrun", "snapshot", "web", tmp_path / "s"], stderr=subprocess.PIPE, text=True
    )
    eventually((tmp_path / ".s.partial").exists)
    os.kill(pid, signal.SIGKILL)
    _, said = client.communicate(timeout=60)
    assert client.returncode != 0 and "its process is gone" in said
    assert not (tmp_path / "s").exists()
    start(bare_kernel(COUNT), "--disk", image, name="next")
    good("snapshot", "next", tmp_path / "s")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or "lock" in path.name]


def test_a_frozen_disk_is_not_written_to(bare_kernel: Kernel, tmp_path: Path) -> None:
    image = disk(tmp_path)
    start(bare_kernel(COUNT), "--disk", image)
    good("snapshot", "web", tmp_path / "s")
    good("stop", "-f", "-w", "web")
    kernel = bare_kernel("mov edx, 0x501; xor eax, eax; out dx, al; spin: jmp spin")
    assert "x.1.qcow2 lies on it" in refused("boot", "--kernel", kernel, "--disk", image)
    assert vmrun("boot", "--kernel", kernel, "--disk", f"{image},throwaway").returncode == 0
    good("restore", "-d", tmp_path / "s")


def test_a_killed_client_changes_nothing(bare_kernel: Kernel, tmp_path: Path) -> None:
    start(bare_kernel(COUNT), "--disk", disk(tmp_path))
    client = subprocess.Popen([sys.executable, "-m", "vmrun", "snapshot", "web", tmp_path / "s"])
    eventually((tmp_path / ".s.partial").exists)
    client.kill()
    client.wait()
    eventually((tmp_path / "s").exists)
    eventually(lambda: json.loads(good("inspect", "web"))["state"] == "running")
    good("restore", tmp_path / "s", "-d", "--name", "again")


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_from_process_to_process(bare_kernel: Kernel, tmp_path: Path, times: int) -> None:
    with_disk = times < MAX_BACKING_FILES
    start(bare_kernel(COUNT), *(("--disk", disk(tmp_path)) if with_disk else ()))
    name, text = "web", ""
    for cycle in range(times):
        with MachineClient(name) as machine:
            machine.snapshot(tmp_path / f"s{cycle}", end=True)
        # It has ended, and its disk is free, when the snapshot is there.
        assert name not in runtime.running()
        text += printed(name)
        name = f"m{cycle}"
        good("restore", tmp_path / f"s{cycle}", "--detach", "--name", name)
        shutil.rmtree(tmp_path / f"s{cycle - 1}", ignore_errors=True)
    eventually(lambda: printed(name))
    assert is_alphabets(text + printed(name))


def test_a_pager_that_no_machine_came_for_is_ended(bare_kernel: Kernel, tmp_path: Path) -> None:
    start(bare_kernel("spin: jmp spin"))
    good("snapshot", "web", tmp_path / "saved", "--stop")
    with Snapshot(tmp_path / "saved") as saved:
        saved.prepare()
        pager = saved._pager
        assert pager is not None and not pager.poll()
    assert pager.exit_code is not None and pager.pidfd == -1
