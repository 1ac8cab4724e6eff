"""`vmrun ps`, `inspect`, `top`, `wait`, `stop`, `reset`, `pause` and `resume`: machines that run. User side,
a process of its own that talks to each machine's control socket.
"""

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Argument, Option
from vmrun.errors import EXIT_TIMEOUT, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmrun.control.client import Ending
    from vmrun.control.facts import Facts

Name = Annotated[str, Argument(metavar="NAME", help="The machine.")]
Names = Annotated[list[str] | None, Argument(metavar="NAME", help="The machines.")]
All = Annotated[bool, Option("--all", "-a", help="Every machine of yours that runs.")]

HEADINGS = ("NAME", "PID", "STATE", "VCPUS", "MEMORY", "IN USE", "CPU", "DISKS", "NICS", "UPTIME")
EXIT_SECONDS = 5.0  # how long the process of a machine that has ended may take to exit
LEFT_ALIGNED = 1, 3  # columns of text, counted from 1


def ps(as_json: Annotated[bool, Option("--json", help="Print JSON, for programs.")] = False) -> int:
    """List the machines that run."""
    from vmrun.control.facts import all_machines

    machines = all_machines()
    if as_json:
        import json

        json.dump([facts.as_json() for facts in machines], sys.stdout, indent=2)
        print()
    else:
        print(table(HEADINGS, [_row(facts) for facts in machines]))
    return 0


def inspect(name: Name) -> int:
    """Print all there is to know of a machine, as JSON."""
    import json

    from vmrun.control.client import MachineClient

    with MachineClient(name) as client:
        json.dump(client.inspect(), sys.stdout, indent=2)
    print()
    return 0


def top(
    interval: Annotated[
        str, Option("--interval", metavar="TIME", help="How often to look, as in 2s.")
    ] = "1s",
) -> int:
    """Watch the machines that run: q leaves. Prints once when the output is no terminal."""
    from vmrun.cli.top import watch
    from vmrun.units import parse_duration

    watch(parse_duration("--interval", interval))
    return 0


def wait(
    name: Name,
    timeout: Annotated[
        str | None, Option(metavar="TIME", help="Give up after this long, as in 90s: exit code 68.")
    ] = None,
) -> int:
    """Wait until a machine has ended, and exit with its code."""
    from vmrun.control.client import MachineClient, MachineGone, ending_of
    from vmrun.units import parse_duration

    seconds = parse_duration("--timeout", timeout) if timeout is not None else None
    try:
        client = MachineClient(name)
    except UserError:
        ending = ending_of(name)
        if ending is None:
            raise
        return _tell(ending)
    with client:
        try:
            return _tell(client.wait(seconds))
        except MachineGone:
            ending = ending_of(name)
            if ending is None:
                raise
            return _tell(ending)
        except TimeoutError:
            raise UserError(f"machine {name} has not ended within {seconds:g} s", EXIT_TIMEOUT) from None


def _tell(ending: "Ending") -> int:
    if ending.code:
        print(f"vmrun: {ending.reason}", file=sys.stderr)
    return ending.code


def stop(
    names: Names = None,
    force: Annotated[bool, Option("--force", "-f", help="At once, without asking the guest.")] = False,
    waits: Annotated[bool, Option("--wait", "-w", help="Return when it has ended.")] = False,
    everything: All = False,
) -> int:
    """Ask guests to shut down.

    A guest has 3 seconds to react and 120 to finish; then its machine is stopped.
    """
    import select

    from vmrun.control.client import MachineClient, MachineGone

    def one(name: str) -> None:
        with MachineClient(name) as client:
            if not waits:
                client.stop(force=force)
                return
            try:
                with _process(client.status().pid) as process:
                    client.stop_and_wait(force=force)
                    # It has said so: now the kernel takes its VM apart, which is milliseconds.
                    select.select([process], [], [], EXIT_SECONDS)
            except (MachineGone, ProcessLookupError):
                pass  # it has ended, if not as one would have it

    # All are asked before the first is waited for.
    chosen = _choose(names, everything)
    if not waits or len(chosen) == 1:
        return _each(chosen, one, everything)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(chosen) or 1) as pool:
        results = [pool.submit(_each, [name], one, everything) for name in chosen]
    return max((result.result() for result in results), default=0)


@contextmanager
def _process(pid: int) -> "Iterator[int]":
    """A descriptor that becomes readable when process `pid` has ended. ProcessLookupError if it has."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def reset(name: Name) -> int:
    """Press a machine's reset button.

    The machine is made anew, with empty memory; returns when it runs.
    """
    from vmrun.control.client import MachineClient

    with MachineClient(name) as client:
        client.reset()
    return 0


def pause(names: Names = None, everything: All = False) -> int:
    """Stop the vCPUs of machines; returns when they stand still."""
    from vmrun.control.client import MachineClient

    def one(name: str) -> None:
        with MachineClient(name) as client:
            client.pause()

    return _each(_choose(names, everything), one, everything)


def resume(names: Names = None, everything: All = False) -> int:
    """Let paused machines go on."""
    from vmrun.control.client import MachineClient

    def one(name: str) -> None:
        with MachineClient(name) as client:
            client.resume()

    return _each(_choose(names, everything), one, everything)


def _choose(names: list[str] | None, everything: bool) -> list[str]:
    from vmrun.control import runtime

    if bool(names) == everything:
        raise UserError("give the names of machines, or --all, not both" if names else "which? NAME or --all")
    if everything:
        return list(runtime.running())
    chosen = list(dict.fromkeys(names or ()))
    for name in chosen:
        runtime.find(name)  # before anything is done to the others
    return chosen


def _each(names: list[str], action: "Callable[[str], None]", tolerant: bool) -> int:
    """Do `action` to each. With --all, a machine that ended by itself meanwhile is no error."""
    from vmrun.cli import one_line
    from vmrun.control import runtime

    code = 0
    for name in names:
        try:
            action(name)
        except UserError as error:
            if tolerant and name not in runtime.running():
                continue
            print(f"vmrun: {one_line(error)}", file=sys.stderr)
            code = code or error.code
    return code


def _row(facts: "Facts") -> list[str]:
    status = facts.status
    if status is None:
        return [facts.name, str(facts.pid), facts.state, "", "", "", seconds(facts.cpu_total), "", "", ""]
    return [
        facts.name,
        str(facts.pid),
        facts.state,
        str(status.vcpus),
        size(status.memory),
        size(status.memory_used),
        seconds(facts.cpu_total),
        str(status.disks),
        str(status.nics),
        duration(status.uptime),
    ]


def table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """Columns as wide as they must be: text to the left, numbers to the right."""
    widths = [max(len(row[index]) for row in [list(headings), *rows]) for index in range(len(headings))]
    lines = []
    for row in [list(headings), *rows]:
        cells = [
            cell.ljust(width) if index in LEFT_ALIGNED else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True), 1)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes for people: 128M, 1.5G."""
    number = count / (1 << 20)
    unit = "M"
    if number >= 1024:
        number, unit = number / 1024, "G"
    return f"{number:.1f}".removesuffix(".0") + unit


def seconds(count: float) -> str:
    """CPU time: 1.2s, 61:40, 2:05:00."""
    return f"{count:.1f}s" if count < 60 else duration(count)


def duration(count: float) -> str:
    """7s, 1:07, 2:01:07, 3d 02:01:07."""
    whole = int(count)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{whole % 60:02}"
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}" if minutes else f"{whole}s"


def resize(
    name: Annotated[str, Argument(metavar="NAME", help="The machine.")],
    disk: Annotated[str, Argument(metavar="DISK", help="Which disk: vda or 0 is the first.")],
    size: Annotated[str, Argument(metavar="SIZE", help="What it is to have, as in 20G; no less than now.")],
) -> int:
    """Make a disk of a running machine larger; the guest sees it grow."""
    from vmrun.control.client import MachineClient
    from vmrun.units import parse_size

    number = ord(disk[2]) - ord("a") if len(disk) == 3 and disk.startswith("vd") else -1
    if disk.isascii() and disk.isdecimal():
        number = int(disk)
    if not 0 <= number < 26:
        raise UserError(f"{disk}: which disk? vda or 0 is the first, vdb or 1 the second")
    with MachineClient(name) as machine:
        machine.resize(number, parse_size("SIZE", size))
    return 0
