"""`vmrun run`: a command in a throw-away machine. User side; the machine is in a process of its own."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Argument, Option
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE, EXIT_VMM, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmrun.control.detach import Owned
    from vmrun.run.command import Command, Outcome
    from vmrun.run.sandbox import Sandbox
    from vmrun.run.spec import SharedDirectory

EXIT_INTERRUPTED = 130  # 128 + SIGINT
CONSOLE_LINES = 20  # are shown of a machine that ended unasked
DEFAULT_IMAGE = "kit"
LEAST_QUOTA = 1 << 20  # an overlay takes some of it before the guest has written anything


def run(
    command: Annotated[
        list[str] | None,
        Argument(metavar="-- COMMAND...", help="What to run; if not given, what the image says."),
    ] = None,
    image: Annotated[
        str,
        Option(metavar="IMAGE", help="A directory, disk, OCI layout or tar; kit is the guest kit's root."),
    ] = DEFAULT_IMAGE,
    kernel: Annotated[
        list[Path] | None,
        Option(
            "--kernel",
            metavar="FILE",
            help="A bzImage or vmlinux instead of the kit's. Repeated: a run with each.",
        ),
    ] = None,
    mem: Annotated[str, Option("--mem", metavar="SIZE", help="Memory, as in 512M or 2G.")] = "512M",
    cpus: Annotated[int, Option("--cpus", metavar="N", help="How many vCPUs.")] = 1,
    env: Annotated[
        list[str] | None,
        Option("--env", "-e", metavar="K=V", help="Set a variable; K alone passes yours on. Repeatable."),
    ] = None,
    workdir: Annotated[
        str | None, Option("--workdir", "-w", metavar="DIRECTORY", help="Where in the guest it runs.")
    ] = None,
    user: Annotated[
        str | None,
        Option("--user", "-u", metavar="USER[:GROUP]", help="Who it runs as. Default: the image's."),
    ] = None,
    copy_in: Annotated[
        list[str] | None, Option("--copy-in", metavar="HOST:GUEST", help="Copy before it runs. Repeatable.")
    ] = None,
    copy_out: Annotated[
        list[str] | None, Option("--copy-out", metavar="GUEST:HOST", help="Copy after it ran. Repeatable.")
    ] = None,
    disk: Annotated[
        list[str] | None,
        Option("--disk", metavar="PATH[,...]", help="A disk as for boot, from /dev/vdb on. Repeatable."),
    ] = None,
    mount: Annotated[
        list[str] | None,
        Option("--mount", metavar="HOST:GUEST[:ro]", help="Share a directory, live (virtiofsd). Repeatable."),
    ] = None,
    net: Annotated[
        str,
        Option(
            "--net", metavar="none|user|NIC", help="No network, one through passt, or a card as for boot."
        ),
    ] = "none",
    allow_host: Annotated[
        list[str] | None,
        Option("--allow-host", metavar="HOST[:PORT]", help="With --net user: only there. Repeatable."),
    ] = None,
    allow_private: Annotated[
        bool, Option("--allow-private", help="With --net user: private networks too.")
    ] = False,
    quota: Annotated[
        str, Option("--quota", metavar="SIZE", help="How much it may write to its root.")
    ] = "10G",
    timeout: Annotated[
        str | None, Option(metavar="TIME", help="End it after this long, as in 90s: exit code 68.")
    ] = None,
    terminal: Annotated[bool, Option("--terminal", "-t", help="Give it your terminal.")] = False,
    fresh: Annotated[bool, Option("--fresh", help="Boot a machine; use and make no template.")] = False,
    keep: Annotated[
        Path | None, Option("--keep", metavar="DIRECTORY", help="Save the machine there afterwards.")
    ] = None,
    json: Annotated[
        bool, Option("--json", help="Describe the run in JSON, as the last line on stderr.")
    ] = False,
    timeline: Annotated[
        Path | None, Option(metavar="FILE", help="Draw how long each phase took (SVG); a table on stderr.")
    ] = None,
) -> int:
    """Run a command in a throw-away machine, with its exit code.

    \b
      vmrun run -- uname -a
      vmrun run -t -- sh
      vmrun run --image debian.tar --copy-in src:/src -w /src -- make check

    The first run with an image, kernel and size boots a machine and saves it; later ones begin there. What
    the command writes is thrown away, but for --copy-out, --keep, --disk and --mount. Codes of vmrun's own:
    64 usage, 65 no KVM, 66 image, 67 guest panic, 68 timeout, 69 guest out of memory, 70 vmrun or host.
    """
    from vmrun import units
    from vmrun.cli import options
    from vmrun.run.phases import Phases

    phases = Phases(time.monotonic())
    if kernel is not None and len(kernel) > 1:
        from vmrun.run.matrix import run_each, without_kernels

        if keep is not None or timeline is not None:
            raise UserError("--keep and --timeline are for one run: give one --kernel")
        return run_each(kernel, units.parse_memory("--mem", mem), without_kernels(sys.argv[2:]))
    from vmrun.cli.progress import Lazy
    from vmrun.control import vmm
    from vmrun.run import report
    from vmrun.run.command import Command, Outcome
    from vmrun.run.sandbox import Sandbox

    made: list[Sandbox] = []

    def whole() -> Outcome:
        wanted = Command(
            tuple(command or ()),
            tuple(options.parse_environment(text) for text in env or ()),
            workdir,
            user,
            terminal,
        )
        seconds = units.parse_duration("--timeout", timeout) if timeout is not None else None
        ins = [_present(*options.parse_pair("--copy-in", text)) for text in copy_in or ()]
        outs = [options.parse_pair("--copy-out", text) for text in copy_out or ()]
        _check_places(keep, timeline, [host for _, host in outs])
        if keep is not None and mount:
            raise UserError("--keep: a machine with --mount cannot be saved: leave out one of the two")
        memory = units.parse_memory("--mem", mem)
        room = units.parse_size("--quota", quota)
        if room < LEAST_QUOTA:
            raise UserError(f"--quota {quota}: give at least {LEAST_QUOTA >> 20}M")
        disks = [options.parse_disk(text) for text in disk or ()]
        deadline = float("inf")

        def start(request: vmm.VmmRequest) -> "Owned":
            nonlocal deadline
            teller.close()  # a bar is drawn by a thread, and a process that forks may have no other
            if seconds is not None:
                deadline = time.monotonic() + seconds
            return vmm.fork(request)

        with Lazy() as teller:
            sandbox = Sandbox(
                image,
                kernel=kernel[0] if kernel else None,
                memory=memory,
                cpus=cpus,
                disks=disks,
                nics=options.parse_net(net, allow_host or (), allow_private),
                mounts=_directories(mount or []),
                quota=room,
                confined=keep is None,
                timeout=seconds,
                fresh=fresh,
                progress=teller,
                phases=phases,
                start=start,
            )
        made.append(sandbox)
        outcome = _use(sandbox, wanted, ins, outs, keep, deadline, seconds)
        return _hinted(outcome, wanted) if image == DEFAULT_IMAGE else outcome

    outcome = Outcome(EXIT_INTERRUPTED, "interrupted", own=True)
    try:
        outcome = _attempt(whole)
    finally:
        for sandbox in made:
            sandbox.keep_logs = outcome.own
            with phases.phase("end of the machine"):
                sandbox.close()
    if outcome.own or not outcome.started:
        _tell(outcome.reason)
    # What was refused at once has no phases, and perhaps no place for a picture either.
    if timeline is not None and phases.list:
        timeline.write_text(report.timeline(phases))
        print(report.table(phases), file=sys.stderr)
    if json:
        usage = {"cpu_seconds": made[0].cpu_seconds, "memory": made[0].peak_memory} if made else {}
        console = made[0].console_log if made and outcome.own else None
        print(report.describe(outcome, phases, usage, console), file=sys.stderr)
    return outcome.code


def _tell(text: str) -> None:
    """A line on stderr. The guest's agent may have chosen words in it."""
    from vmrun.cli import one_line

    print(f"vmrun: {one_line(UserError(text))}", file=sys.stderr)


def _attempt(whole: "Callable[[], Outcome]") -> "Outcome":
    from vmrun.agent.protocol import AgentError
    from vmrun.cli import one_line
    from vmrun.run.command import Outcome
    from vmrun.run.ending import SandboxEnded, printable

    try:
        return whole()
    except SandboxEnded as error:
        if error.console.strip():
            lines = printable(error.console).rstrip().splitlines()
            print("\n".join(lines[-CONSOLE_LINES:]), file=sys.stderr)
        return Outcome(error.code, str(error), own=True)
    except UserError as error:
        return Outcome(error.code, one_line(error), own=True)
    except (AgentError, OSError) as error:
        return Outcome(EXIT_VMM, str(error) if isinstance(error, AgentError) else one_line(error), own=True)


def _use(
    sandbox: "Sandbox",
    wanted: "Command",
    ins: list[tuple[str, str]],
    outs: list[tuple[str, str]],
    keep: Path | None,
    deadline: float,
    timeout: float | None,
) -> "Outcome":
    from vmrun.control.client import MachineClient
    from vmrun.run import command
    from vmrun.run.sandbox import CopyError

    phases = sandbox.phases
    for host, guest in ins:
        with phases.phase("copy in"):
            _tell_left_out(sandbox.copy_in(host, guest).left_out)
    place = command.Place(sandbox.exec, sandbox.wait, sandbox.image_config)
    outcome = command.run(place, wanted, deadline, timeout, phases)
    if outcome.stopped:
        return outcome
    for guest, host in outs:
        try:
            with phases.phase("copy out"):
                _tell_left_out(sandbox.copy_out(guest, host).left_out)
        except (CopyError, OSError) as error:
            if not outcome.code:
                raise
            # Why the command failed is why its file is not there.
            _tell(str(error))
    if keep is not None:
        with phases.phase("save"), MachineClient(sandbox.name) as machine:
            machine.snapshot(keep)
    return outcome


def _present(host: str, guest: str) -> tuple[str, str]:
    if not os.path.lexists(host):
        raise UserError(f"--copy-in: {host}: there is no such file or directory")
    return host, guest


def _check_places(keep: Path | None, timeline: Path | None, copies: list[str]) -> None:
    """UserError where what is written after the command could not be. Whoever writes looks again: by then the
    place may have gone.
    """
    if keep is not None:
        if os.path.lexists(keep):
            raise UserError(
                f"--keep {keep}: is there already, and is not overwritten: remove it first", EXIT_IMAGE
            )
        _check_writable(f"--keep {keep}", os.fspath(keep.parent), EXIT_IMAGE)
    if timeline is not None:
        if os.path.isdir(timeline):
            raise UserError(f"--timeline {timeline}: is a directory: give a file")
        if not os.path.exists(timeline):
            _check_writable(f"--timeline {timeline}", os.fspath(timeline.parent))
        elif not os.access(timeline, os.W_OK):
            raise UserError(f"--timeline {timeline}: you may not write to it")
    for host in copies:
        place = host if os.path.isdir(host) else os.path.dirname(host) or "."
        while not os.path.lexists(place):  # directories on the way to a copy are made
            place = os.path.dirname(place) or "."
        _check_writable(f"--copy-out to {host}", place)


def _check_writable(what: str, directory: str, code: int = EXIT_USAGE) -> None:
    if not os.path.isdir(directory):
        raise UserError(f"{what}: there is no directory {directory}", code)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{what}: you may not write to {directory}", code)


def _hinted(outcome: "Outcome", wanted: "Command") -> "Outcome":
    """With a hint to who gave an image as docker takes it, and got it looked for as a program."""
    from dataclasses import replace

    from vmrun.agent.protocol import EXIT_NOT_FOUND

    if outcome.started or outcome.code != EXIT_NOT_FOUND or "/" in "".join(wanted.argv[:1]):
        return outcome
    return replace(outcome, reason=f"{outcome.reason}; images are given with --image")


def _tell_left_out(names: list[str]) -> None:
    for name in names:
        _tell(f"left out: {name}")


def _directories(texts: list[str]) -> "list[SharedDirectory]":
    from vmrun.cli.options import parse_mount
    from vmrun.run.spec import SharedDirectory

    wanted = [parse_mount(text) for text in texts]
    return [SharedDirectory(each.host, each.guest, each.read_only) for each in wanted]
