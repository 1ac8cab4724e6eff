"""How long `vmrun boot` takes from the shell and back, beside QEMU's microvm with the same guest.

    .venv/bin/python scripts/bench_startup.py [--runs 20]

The guest is an ELF file of a few bytes, made here: at its entry it writes to the debug-exit port, and the
machine is over. So what is measured is the VMM alone: its start, a machine of 128 MiB, its end. The runs take
turns, so that whatever else the host does falls on all. The second table says where vmrun's time goes: each
of its rows is a program that does a little more than the one before.
"""

import argparse
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEBUG_EXIT_PORT = 0x501
ENTRY = 0x100000
# 32-bit in QEMU (PVH), 64-bit in vmrun: these mean the same in both. mov edx, port; xor eax, eax; out dx, al
CODE = b"\xba" + struct.pack("<I", DEBUG_EXIT_PORT) + b"\x31\xc0\xee\xf4\xeb\xfd"
PVH_ENTRY_NOTE = 18  # XEN_ELFNOTE_PHYS32_ENTRY
PT_LOAD, PT_NOTE = 1, 4

VMRUN = Path(sys.executable).with_name("vmrun")


def guest() -> bytes:
    """An ELF kernel that both machines enter at ENTRY: QEMU by its PVH note, vmrun at its entry point."""
    note = struct.pack("<III4sI", 4, 4, PVH_ENTRY_NOTE, b"Xen\0", ENTRY)
    start = 64 + 2 * 56
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 0, 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0),
    )
    segments = [(PT_LOAD, 5, start, ENTRY, CODE, 0x1000), (PT_NOTE, 4, start + len(CODE), 0, note, 4)]
    table = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, len(data), len(data), align)
        for kind, flags, offset, address, data, align in segments
    )
    return header + table + CODE + note


def commands(kernel: Path) -> dict[str, tuple[list[str], int]]:
    """What is run, by name, and the exit code it must have."""
    found: dict[str, tuple[list[str], int]] = {}
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is not None:
        line = [
            *(qemu, "-M", "microvm", "-accel", "kvm", "-m", "128", "-nodefaults"),
            *("-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *("-device", f"isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=1", "-kernel", str(kernel)),
        ]
        found["qemu -M microvm"] = (line, 1)  # isa-debug-exit makes 2n + 1 of n
    found["vmrun boot"] = ([str(VMRUN), "boot", "--kernel", str(kernel), "--mem", "128M"], 0)
    return found


# What each phase of a start adds to the one before; the last is `vmrun boot` itself. All end without taking
# the interpreter apart, as vmrun does.
EXIT = "import os; os._exit(0)"
LATE = "from vmrun.cli import late; late.delay('inspect')"
MODULES = (
    *("ctypes", "dataclasses", "fcntl", "json", "mmap", "pathlib", "selectors", "signal", "socket"),
    *("struct", "termios", "threading", "typing"),
)
IMPORTS = (
    *("vmrun.boot.loader", "vmrun.cli.options", "vmrun.control.session", "vmrun.machine.bootplan"),
    *("vmrun.machine.control", "vmrun.machine.machine", "vmrun.machine.ports"),
)
PHASES: dict[str, list[str]] = {
    "the interpreter": [sys.executable, "-I", "-S", "-c", EXIT],
    "site: finding vmrun": [sys.executable, "-c", EXIT],
    "Python's modules that vmrun imports": [
        sys.executable,
        "-c",
        f"{LATE}; import {', '.join(MODULES)}; {EXIT}",
    ],
    "vmrun's own modules": [sys.executable, "-c", f"{LATE}; import {', '.join(IMPORTS)}; {EXIT}"],
}


def seconds(command: list[str], code: int) -> float:
    """The wall time of one run, from before its fork to after its end is known."""
    begin = time.perf_counter()
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    took = time.perf_counter() - begin
    if run.returncode != code:
        said = run.stderr.decode(errors="replace").strip()
        sys.exit(f"bench_startup: {' '.join(command)} exits with {run.returncode}, not {code}: {said}")
    return took


def measure(runs: int, rows: dict[str, tuple[list[str], int]]) -> dict[str, list[float]]:
    """Seconds of each run of each row. The rows take turns."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(runs + 1):
        for name, (command, code) in rows.items():
            took = seconds(command, code)
            if turn:  # the first finds cold caches
                times[name].append(took)
    return times


def table(headings: list[str], rows: list[list[str]]) -> None:
    for row in [headings, ["---"] * len(headings), *rows]:
        print(f"| {' | '.join(row)} |")


def milliseconds(value: float) -> str:
    return f"{value * 1000:.1f} ms"


def print_commands(times: dict[str, list[float]]) -> None:
    qemu = next(iter(times.values()))
    rows = []
    for name, found in times.items():
        cells = [milliseconds(value) for value in (statistics.median(found), min(found), max(found))]
        ratios = [f"{of(found) / of(qemu):.2f}" for of in (statistics.median, min)]
        rows.append([name, *cells, *ratios])
    table(["command", "median", "best", "worst", "median to QEMU's", "best to QEMU's"], rows)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        sys.exit("bench_startup: /dev/kvm cannot be used: see `vmrun doctor`")
    # Users' Pythons keep byte code, and QEMU is not compiled anew for each run either.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VMRUN_RUNTIME"] = str(Path(folder) / "run")
        kernel = Path(folder) / "guest.elf"
        kernel.write_bytes(guest())
        compared = commands(kernel)
        if len(compared) == 1:
            print("bench_startup: no qemu-system-x86_64 here: nothing to compare with", file=sys.stderr)
        print_commands(measure(options.runs, compared))
        print()
        phases = {name: (command, 0) for name, command in PHASES.items()}
        phases["the machine: KVM, guest, clean-up"] = compared["vmrun boot"]
        print_phases(measure(options.runs, phases))


if __name__ == "__main__":
    main()
