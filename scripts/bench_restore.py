"""How long it takes from `vmrun restore` in the shell to the guest's going on, beside QEMU's -incoming.

    .venv/bin/python scripts/bench_restore.py [--runs 10] [--mem 128,512,2048]

The guest is an ELF file of a few bytes, made here. It writes a number of its own to each page of its memory,
and then for ever a dot to its serial port, and back what it reads there. So the first byte of a restored
machine's output is one of its first instructions, and what comes back of a byte that is typed as soon as that
was seen is its first answer. For each size of memory both VMMs save that guest once, and go on from the file
again and again, in turns; the page cache is warm. The second table says where vmrun's time goes: each of its
rows is a program that does a little more than the one before.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 1 << 20
ENTRY = 0x100000
FIRST_PAGE = 0x200000
SERIAL = 0x3F8
PVH_ENTRY_NOTE = 18  # XEN_ELFNOTE_PHYS32_ENTRY
PT_LOAD, PT_NOTE = 1, 4
REQUEST = b"?"
SAVE_SECONDS = 600.0

VMRUN = Path(sys.executable).with_name("vmrun")

# Each phase adds to the one before; the last is `vmrun restore` to its guest's first byte.
EXIT = "import os; os._exit(0)"
LATE = "from vmrun.cli import late; late.delay('inspect')"
MODULES = (
    *("ctypes", "dataclasses", "fcntl", "json", "mmap", "pathlib", "queue", "selectors"),
    *("signal", "socket", "struct", "termios", "threading", "typing", "zlib"),
)
IMPORTS = (
    *("vmrun.cli.options", "vmrun.cli.snapshot", "vmrun.control.session", "vmrun.machine.control"),
    *("vmrun.machine.agent", "vmrun.machine.machine", "vmrun.machine.ports", "vmrun.snapshot.restore"),
)
OPEN = "from pathlib import Path; from vmrun.snapshot.restore import Snapshot; Snapshot(Path({!r})).config()"


def code(memory: int) -> bytes:
    """The guest: 32-bit in QEMU (PVH), 64-bit in vmrun; these instructions mean the same in both."""
    number = struct.pack("<I", 0x1E3779B1)
    fill = b"\x69\xc7" + number  # imul eax, edi, number
    fill += b"\x89\x07"  # mov [edi], eax
    fill += b"\x81\xc7" + struct.pack("<I", 4096)  # add edi, 4096
    fill += b"\x81\xff" + struct.pack("<I", memory)  # cmp edi, memory
    fill += b"\x72" + struct.pack("b", -len(fill) - 2)  # jb fill
    lsr, rbr = (b"\x66\xba" + struct.pack("<H", port) for port in (SERIAL + 5, SERIAL))  # mov dx, port
    answer = rbr + b"\xec\xee"  # in al, dx; out dx, al
    serve = lsr + b"\xec\xa8\x01"  # in al, dx; test al, 1
    serve += b"\x74" + struct.pack("b", len(answer))  # jz over the answer
    serve += answer
    serve += rbr + b"\xb0.\xee"  # mov al, '.'; out dx, al
    serve += b"\xeb" + struct.pack("b", -len(serve) - 2)  # jmp serve
    # mov edi, FIRST_PAGE; and the serial port's receive interrupt enabled, which tells vmrun that there is
    # somebody who listens: mov dx, port; mov al, 1; out dx, al.
    listen = b"\x66\xba" + struct.pack("<H", SERIAL + 1) + b"\xb0\x01\xee"
    return b"\xbf" + struct.pack("<I", FIRST_PAGE) + fill + listen + serve


def guest(memory: int) -> bytes:
    """An ELF kernel that both machines enter at ENTRY: QEMU by its PVH note, vmrun at its entry point."""
    program = code(memory)
    note = struct.pack("<III4sI", 4, 4, PVH_ENTRY_NOTE, b"Xen\0", ENTRY)
    start = 64 + 2 * 56
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 0, 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0),
    )
    segments = [(PT_LOAD, 5, start, ENTRY, program, 0x1000), (PT_NOTE, 4, start + len(program), 0, note, 4)]
    table = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, len(data), len(data), align)
        for kind, flags, offset, address, data, align in segments
    )
    return header + table + program + note


def fail(text: str) -> None:
    sys.exit(f"bench_restore: {text}")


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # both end at once, and vmrun leaves nothing behind
        process.communicate()


def read_until(process: subprocess.Popen[bytes], byte: bytes, said: bytes = b"") -> bytes:
    """What it has said, `said` included, when `byte` is in it."""
    assert process.stdout is not None and process.stderr is not None
    while byte not in said:
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            fail(f"{process.args!r} ends: {process.stderr.read().decode(errors='replace').strip()}")
        said += data
    return said


def restore(command: list[str]) -> tuple[float, float]:
    """Seconds from before the fork to the guest's first byte, and to its answer."""
    begin = time.perf_counter()
    with running(command) as process:
        assert process.stdin is not None
        said = read_until(process, b".")
        first = time.perf_counter() - begin
        process.stdin.write(REQUEST)
        read_until(process, REQUEST, said)
        return first, time.perf_counter() - begin


def qemu_command(kernel: Path, memory: int, *more: str) -> list[str]:
    return [
        *("qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-m", str(memory // MIB), "-nodefaults"),
        *("-no-user-config", "-display", "none", "-serial", "stdio", "-kernel", str(kernel), *more),
    ]


def save_qemu(kernel: Path, memory: int, folder: Path) -> list[str]:
    """Save the guest's state; the command that goes on from it."""
    control, state = folder / f"qmp{memory}", folder / f"qemu{memory}"
    with running(qemu_command(kernel, memory, "-qmp", f"unix:{control},server=on,wait=off")) as process:
        read_until(process, b".")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(control))
            lines = sock.makefile("rwb")

            def ask(command: str, **arguments: Any) -> Any:
                lines.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                lines.flush()
                while "return" not in (answer := json.loads(lines.readline())):
                    if "error" in answer:
                        fail(f"qemu: {answer['error']['desc']}")
                return answer["return"]

            lines.readline()
            ask("qmp_capabilities")
            ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            ask("migrate", uri=f"exec:cat >{state}")
            deadline = time.monotonic() + SAVE_SECONDS
            while (status := ask("query-migrate")["status"]) != "completed":
                if status == "failed" or time.monotonic() > deadline:
                    fail(f"qemu: the migration to a file: {status}")
                # Its output is read on, so that the guest does not wait.
                assert process.stdout is not None
                os.set_blocking(process.stdout.fileno(), False)
                process.stdout.read(1 << 20)
                time.sleep(0.01)
    return qemu_command(kernel, memory, "-incoming", f"exec:cat {state}")


def save_vmrun(kernel: Path, memory: int, folder: Path) -> list[str]:
    name, directory = f"m{memory}", folder / f"vmrun{memory}"
    boot = ["boot", "-d", "--name", name, "--kernel", str(kernel), "--mem", f"{memory // MIB}M"]
    subprocess.run([VMRUN, *boot], check=True, capture_output=True)
    while b"." not in subprocess.run([VMRUN, "log", name], check=True, capture_output=True).stdout:
        time.sleep(0.1)
    subprocess.run([VMRUN, "snapshot", name, directory, "--stop"], check=True, capture_output=True)
    return [str(VMRUN), "restore", str(directory)]


def seconds(command: list[str]) -> float:
    """The wall time of one run, from before its fork to after its end is known."""
    begin = time.perf_counter()
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    took = time.perf_counter() - begin
    if run.returncode:
        fail(f"{command}: {run.stderr.decode(errors='replace').strip()}")
    return took


def milliseconds(value: float) -> str:
    return f"{value * 1000:.1f} ms"


def table(headings: list[str], rows: list[list[str]]) -> None:
    for row in [headings, ["---"] * len(headings), *rows]:
        print(f"| {' | '.join(row)} |")


def print_commands(times: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    rows = []
    for (name, memory), found in times.items():
        first, answers = zip(*found, strict=True)
        cells = [milliseconds(value) for value in (statistics.median(first), min(first), max(first))]
        rows.append([name, f"{memory // MIB} MiB", *cells, milliseconds(statistics.median(answers))])
    table(["command", "memory", "first instruction: median", "best", "worst", "first answer: median"], rows)


def print_phases(times: dict[str, list[float]]) -> None:
    before, rows = [0.0, 0.0], []
    for name, found in times.items():
        now = [statistics.median(found), min(found)]
        rows.append(
            [name, *(milliseconds(value - earlier) for value, earlier in zip(now, before, strict=True))]
        )
        before = now
    rows.append(["together", *map(milliseconds, before)])
    table(["phase", "by medians", "by the best"], rows)


def measure_phases(runs: int, command: list[str]) -> dict[str, list[float]]:
    programs = {
        "the interpreter": [sys.executable, "-I", "-S", "-c", EXIT],
        "site: finding vmrun": [sys.executable, "-c", EXIT],
        "Python's modules that vmrun imports": [
            sys.executable,
            "-c",
            f"{LATE}; import {', '.join(MODULES)}; {EXIT}",
        ],
        "vmrun's own modules": [
            sys.executable,
            "-c",
            f"{LATE}; import {', '.join((*MODULES, *IMPORTS))}; {EXIT}",
        ],
        "manifest, state, checksums": [
            *(sys.executable, "-c"),
            f"{LATE}; import {', '.join((*MODULES, *IMPORTS))}; {OPEN.format(command[-1])}; {EXIT}",
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in (*programs, "the machine, to its first byte")}
    for _ in range(runs):
        for name, program in programs.items():
            times[name].append(seconds(program))
        times["the machine, to its first byte"].append(restore(command)[0])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--mem", default="128,512,2048", help="MiB, separated by commas")
    options = parser.parse_args()
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        fail("/dev/kvm cannot be used: see `vmrun doctor`")
    # Users' Pythons keep byte code, and QEMU is not compiled anew for each run either.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as place:
        folder = Path(place)
        os.environ["VMRUN_RUNTIME"] = str(folder / "run")
        commands: dict[tuple[str, int], list[str]] = {}
        for memory in (int(text) * MIB for text in options.mem.split(",")):
            kernel = folder / f"guest{memory}.elf"
            kernel.write_bytes(guest(memory))
            if shutil.which("qemu-system-x86_64") is not None:
                commands["qemu -incoming exec:cat", memory] = save_qemu(kernel, memory, folder)
            commands["vmrun restore", memory] = save_vmrun(kernel, memory, folder)
        times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in commands}
        for turn in range(options.runs + 1):
            for key, command in commands.items():
                took = restore(command)
                if turn:  # the first finds cold caches
                    times[key].append(took)
        print_commands(times)
        print()
        print_phases(measure_phases(options.runs, next(c for c in commands.values() if c[1] == "restore")))


if __name__ == "__main__":
    main()
