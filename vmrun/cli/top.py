"""The screen of `vmrun top`. User side, a process of its own."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from vmrun.cli.machines import duration, seconds, size, table
from vmrun.control.facts import Facts, all_machines

HEADINGS = ("NAME", "PID", "STATE", "VCPUS", "%CPU", "VMM", "WORKERS", "MEMORY", "IN USE", "UPTIME")


def watch(interval: float) -> None:
    """Show the machines every `interval` seconds until q is pressed; once, if stdout is no terminal."""
    before, then = _cpu(all_machines()), time.monotonic()
    if not sys.stdout.isatty():
        time.sleep(min(interval, 0.2))
        print(render(all_machines(), before, time.monotonic() - then))
        return

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with _keys() as keys, Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        wait = 0.2
        while not _pressed(keys, wait):
            now, machines = time.monotonic(), all_machines()
            text = render(machines, before, now - then)
            live.update(
                Text(f"{time.strftime('%X')}  {len(machines)} running  (q leaves)\n\n{text}"), refresh=True
            )
            before, then, wait = _cpu(machines), now, interval


def render(machines: list[Facts], before: dict[tuple[str, int], float], elapsed: float) -> str:
    """The table; `before` is the CPU time of each machine `elapsed` seconds ago."""
    rows = []
    for facts in machines:
        used = facts.cpu_total - before.get((facts.name, facts.pid), facts.cpu_total)
        vmm = facts.cpu_seconds.get("vmm", 0.0)
        status = facts.status
        rows.append(
            [
                facts.name,
                str(facts.pid),
                facts.state,
                str(status.vcpus) if status else "",
                f"{max(0.0, used) / elapsed * 100:.0f}" if elapsed > 0 else "",
                seconds(vmm),
                seconds(facts.cpu_total - vmm),
                size(status.memory) if status else "",
                size(status.memory_used) if status else "",
                duration(status.uptime) if status else "",
            ]
        )
    return table(HEADINGS, sorted(rows, key=lambda row: -float(row[4] or 0)))


def _cpu(machines: list[Facts]) -> dict[tuple[str, int], float]:
    return {(facts.name, facts.pid): facts.cpu_total for facts in machines}


@contextmanager
def _keys() -> Iterator[int]:
    """Single keys from the terminal on stdin: its descriptor, or -1 when there is none."""
    if not sys.stdin.isatty():
        yield -1
        return
    saved = termios.tcgetattr(0)
    tty.setcbreak(0)
    try:
        yield 0
    finally:
        termios.tcsetattr(0, termios.TCSANOW, saved)


def _pressed(keys: int, wait: float) -> bool:
    """Whether the user wants to leave, within `wait` seconds."""
    deadline = time.monotonic() + wait
    while True:
        left = max(0.0, deadline - time.monotonic())
        if keys < 0:
            time.sleep(left)
            return False
        if not select.select([keys], [], [], left)[0]:
            return False
        key = os.read(keys, 1)
        if key in (b"q", b"Q", b""):
            return True
