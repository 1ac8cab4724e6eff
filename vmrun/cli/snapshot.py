"""`vmrun snapshot`, `restore` and `clone`: a machine written to a directory, and machines made of it. User
side of the VMM process.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Argument, Option
from vmrun.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmrun.control.detach import Detached
    from vmrun.machine.config import NicConfig
    from vmrun.machine.machine import Outcome
    from vmrun.snapshot.restore import Snapshot

MAX_CLONES = 256


def snapshot(
    name: Annotated[str, Argument(metavar="NAME", help="The machine.")],
    directory: Annotated[Path, Argument(metavar="DIRECTORY", help="Where to; must not exist.")],
    stop: Annotated[bool, Option("--stop", help="End the machine then, as when a laptop is closed.")] = False,
) -> int:
    """Write all of a running machine to a directory.

    Memory, processors and devices go to the directory. Disks stay where they are and are frozen: the machine
    goes on with a new overlay beside each, and the image below must not be changed or the snapshot is lost.
    """
    from vmrun.control.client import MachineClient

    with MachineClient(name) as machine:
        saved = machine.snapshot(directory, end=stop)
    for frozen, goes_on in saved.disks.items():
        print(f"disk {frozen} belongs to the snapshot now; {name} goes on with {goes_on}", file=sys.stderr)
    print(f"{saved.directory} ({saved.memory / (1 << 20):.0f} MiB of memory, {saved.seconds:.2f} s)")
    return 0


def restore(
    directory: Annotated[Path, Argument(metavar="DIRECTORY", help="What `vmrun snapshot` wrote.")],
    name: Annotated[str | None, Option(metavar="NAME", help="What other commands call it.")] = None,
    disk: Annotated[
        list[Path] | None,
        Option(
            "--disk", metavar="PATH", help="Where a disk was moved to: all, in order, or none. Repeatable."
        ),
    ] = None,
    nic: Annotated[
        list[str] | None,
        Option("--nic", metavar="TAP[,...]", help="Another tap, as for boot; all or none. Repeatable."),
    ] = None,
    throw_away: Annotated[
        bool, Option("--throw-away", help="Forget at its end what the machine wrote to its disks.")
    ] = False,
    detach: Annotated[
        bool, Option("--detach", "-d", help="Return once it runs, print its name, and let it run on.")
    ] = False,
    paused: Annotated[bool, Option("--paused", help="Do not let it go on before `vmrun resume`.")] = False,
    prefetch: Annotated[
        bool, Option("--prefetch", help="Bring in all its memory, not only what it touches.")
    ] = False,
    verify: Annotated[bool, Option("--verify", help="First check all of the snapshot's memory.")] = False,
    timeout: Annotated[
        str | None, Option(metavar="TIME", help="Stop the machine after this long, as in 90s.")
    ] = None,
) -> int:
    """Start a machine where a snapshot left it.

    What the guest writes goes to a new overlay beside each of its disks' images; the snapshot stays as it is.
    """
    nics: tuple[NicConfig, ...] = ()
    seconds: float | None = None
    if nic or timeout is not None:
        from vmrun import units
        from vmrun.cli import options

        nics = tuple(options.parse_nic(text) for text in nic or ())
        seconds = units.parse_duration("--timeout", timeout) if timeout is not None else None

    def run(starter: "Detached | None" = None) -> "Outcome":
        from vmrun.control import session
        from vmrun.host.console import Console
        from vmrun.snapshot.restore import Snapshot

        with Snapshot(directory, hold=paused, prefetch=prefetch) as saved:
            config = saved.config(disks=tuple(disk or ()), nics=nics, throw_away=throw_away)
            with Console() if starter is None else nullcontext() as console:
                return session.run(
                    config, name=name, timeout=seconds, console=console, starter=starter, saved=saved
                )

    if verify:
        from vmrun.snapshot.restore import Snapshot

        # Here, where Ctrl-C ends it: it takes long.
        with Snapshot(directory) as saved:
            saved.memory.verify_all()
    if detach:
        # The fork comes first: it costs the more the more is imported.
        print(_start(run))
        return 0
    outcome = run()
    if outcome.code:
        print(f"vmrun: {outcome.reason}", file=sys.stderr)
    return outcome.code


def clone(
    directory: Annotated[Path, Argument(metavar="DIRECTORY", help="What `vmrun snapshot` wrote.")],
    count: Annotated[int, Option("--count", "-n", metavar="N", help="How many machines.")] = 1,
    name: Annotated[
        str | None, Option(metavar="NAME", help="They are called NAME-1 and so on; made up if not given.")
    ] = None,
    nic: Annotated[
        list[str] | None,
        Option(
            "--nic",
            metavar="TAP[,...]",
            help="As for boot, with {} for the clone's number, as in tap{}; all or none. Repeatable.",
        ),
    ] = None,
    keep: Annotated[
        bool, Option("--keep", help="Keep what each writes, in an overlay beside each disk's image.")
    ] = False,
    paused: Annotated[bool, Option("--paused", help="Do not let them go on before `vmrun resume`.")] = False,
    timeout: Annotated[
        str | None, Option(metavar="TIME", help="Stop each after this long, as in 90s.")
    ] = None,
) -> int:
    """Start many machines from one snapshot, in the background.

    Each has its own disks, which are thrown away at its end, its own taps (tap0 becomes tap0-1 and so on) and
    MACs, and holds only the memory that it touches. Prints their names.
    """
    from vmrun import units
    from vmrun.control import session
    from vmrun.host.overlays import close_overlays
    from vmrun.snapshot.restore import Snapshot

    if not 1 <= count <= MAX_CLONES:
        raise UserError(f"-n {count}: give 1 to {MAX_CLONES}")
    seconds = units.parse_duration("--timeout", timeout) if timeout is not None else None

    def start(saved: Snapshot, number: int) -> str:
        nics = _clone_nics(saved, nic or [], number)
        config = saved.config(nics=nics, throw_away=not keep)
        own = f"{name}-{number}" if name else None

        def run(starter: "Detached") -> "Outcome":
            return session.run(config, name=own, timeout=seconds, starter=starter, saved=saved)

        try:
            return _start(run)
        finally:
            close_overlays(config.disks)  # the machine's process has its own

    with Snapshot(directory, hold=paused) as saved:
        for number in range(1, count + 1):
            print(start(saved, number), flush=True)
    return 0


def _clone_nics(saved: "Snapshot", given: list[str], number: int) -> "tuple[NicConfig, ...]":
    """The cards of clone `number`: taps and MACs that nobody else has."""
    from dataclasses import replace

    from vmrun.cli import options
    from vmrun.host.tap import IFNAMSIZ, random_mac

    if given:
        nics = [options.parse_nic(text.replace("{}", str(number))) for text in given]
    else:
        suffix = f"-{number}"
        nics = [
            replace(nic, tap=nic.tap[: IFNAMSIZ - 1 - len(suffix)] + suffix, mac=None)
            for nic in saved.saved_config.nics
        ]
    return tuple(nic if nic.mac is not None else replace(nic, mac=random_mac()) for nic in nics)


def _start(run: "Callable[[Detached], Outcome]") -> str:
    from vmrun.cli import one_line
    from vmrun.control import detach

    def vmm(starter: "Detached") -> tuple[int, str]:
        outcome = run(starter)
        return outcome.code, outcome.reason

    return detach.start(vmm, one_line)
