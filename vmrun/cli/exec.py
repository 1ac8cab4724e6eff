"""`vmrun exec`, `shell` and `cp`: into a machine that runs, through the agent in its guest. User side."""

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Argument, Option
from vmrun.errors import EXIT_TIMEOUT, EXIT_USAGE, EXIT_VMM, UserError

if TYPE_CHECKING:
    from vmrun.agent.session import AgentSession
    from vmrun.run.command import Command

ANSWER_SECONDS = 30.0  # a guest that is just booting, or one of many clones, takes its time
HINT_SECONDS = 3.0  # after which who waits is told what for
START_SECONDS = 60.0  # for a guest whose kernel is interpreted, on a busy host
COPY_LIMIT = 10 << 30  # bytes that a guest may put on the host with one cp


def exec(
    name: Annotated[str, Argument(metavar="NAME", help="The machine.")],
    command: Annotated[list[str], Argument(metavar="-- COMMAND...", help="What to run.")],
    env: Annotated[
        list[str] | None,
        Option("--env", "-e", metavar="K=V", help="Set a variable; K alone passes yours on. Repeatable."),
    ] = None,
    workdir: Annotated[
        str | None, Option("--workdir", "-w", metavar="DIRECTORY", help="Where in the guest it runs.")
    ] = None,
    user: Annotated[
        str | None, Option("--user", "-u", metavar="USER[:GROUP]", help="Who it runs as. Default: root.")
    ] = None,
    timeout: Annotated[
        str | None, Option(metavar="TIME", help="End it after this long, as in 90s: exit code 68.")
    ] = None,
    terminal: Annotated[bool, Option("--terminal", "-t", help="Give it your terminal.")] = False,
    detach: Annotated[
        bool,
        Option("--detach", "-d", help="Return once it runs, and let it run on; it prints to the console."),
    ] = False,
) -> int:
    """Run a command in a running machine, with its exit code.

    \b
      vmrun exec web -- uname -a
      vmrun exec -w /srv -u www-data web -- ls -l
      vmrun exec -d web -- httpd -f; vmrun log web

    The guest must have our agent, as machines of the guest kit have. What the command leaves running in the
    background ends with it, but for --detach.
    """
    from vmrun import units
    from vmrun.cli import options
    from vmrun.run import command as commands

    environment = tuple(options.parse_environment(text) for text in env or ())
    seconds = units.parse_duration("--timeout", timeout) if timeout is not None else None
    wanted = commands.Command(tuple(command), environment, workdir, user, terminal)
    if detach and (terminal or timeout is not None):
        raise UserError("--detach: leave out --terminal and --timeout: nobody stays to keep them")
    return _run(name, wanted, seconds, detach)


def shell(
    name: Annotated[str, Argument(metavar="NAME", help="The machine.")],
    user: Annotated[
        str | None, Option("--user", "-u", metavar="USER[:GROUP]", help="Who it runs as. Default: root.")
    ] = None,
) -> int:
    """Open a shell in a running machine, on this terminal. The guest must have our agent."""
    from vmrun.run import command as commands

    return _run(name, commands.Command(("/bin/sh", "-l"), user=user, tty=True), None)


def cp(
    source: Annotated[str, Argument(metavar="FROM", help="A path here, or NAME:PATH in a machine.")],
    target: Annotated[str, Argument(metavar="TO", help="The other of the two.")],
    timeout: Annotated[
        str | None, Option(metavar="TIME", help="Give up after this long, as in 90s: exit code 68.")
    ] = None,
) -> int:
    """Copy files and directories into a running machine, or out of it.

    \b
      vmrun cp src web:/root/src
      vmrun cp web:/var/log/messages .

    The guest must have our agent.
    """
    from threading import Timer

    from vmrun import units
    from vmrun.agent.files import Limits, StreamError
    from vmrun.agent.protocol import AgentError, AgentGone

    seconds = units.parse_duration("--timeout", timeout) if timeout is not None else None
    there, here = _machine_path(source), _machine_path(target)
    if (there is None) == (here is None):
        raise UserError(f"cp {source} {target}: give one of the two as NAME:PATH, a path in a machine")
    if here is not None and not os.path.lexists(source):
        raise UserError(f"{source}: there is no such file or directory")
    name, path = there or here or ("", "")
    deadline = _deadline(seconds)
    with _session(name, seconds, deadline) as session:
        clock = Timer(deadline - time.monotonic(), session.interrupt)
        clock.daemon = True
        if seconds is not None:
            clock.start()
        try:
            limits = Limits(bytes=COPY_LIMIT)
            totals = session.copy_out(path, target, limits=limits) if there else session.copy_in(source, path)
        except AgentError as error:
            if time.monotonic() >= deadline:
                raise _timed_out(seconds) from None
            # A guest that refuses was asked for what is not there, or cannot be: its user's mistake.
            broken = isinstance(error, AgentGone | StreamError)
            raise UserError(str(error), EXIT_VMM if broken else EXIT_USAGE) from None
        finally:
            clock.cancel()
    for left_out in totals.left_out:
        print(f"vmrun: left out: {left_out}", file=sys.stderr)
    return 0


def _run(name: str, wanted: "Command", timeout: float | None, detach: bool = False) -> int:
    from functools import partial

    from vmrun.agent.process import Process
    from vmrun.agent.protocol import AgentError
    from vmrun.image.config import ImageConfig
    from vmrun.run import command
    from vmrun.run.phases import Phases

    deadline = _deadline(timeout)
    with _session(name, timeout, deadline) as session:
        execute = partial(session.exec, timeout=START_SECONDS)
        place = command.Place(execute, Process.wait, ImageConfig())
        try:
            outcome = (
                command.start(place, wanted)
                if detach
                else command.run(place, wanted, deadline, timeout, Phases())
            )
        except AgentError as error:
            raise UserError(f"{name}: {error}", EXIT_VMM) from None
    if outcome.own or not outcome.started:
        print(f"vmrun: {outcome.reason}", file=sys.stderr)
    return outcome.code


def _machine_path(text: str) -> tuple[str, str] | None:
    """NAME:PATH taken apart; None when it is a path here, which may begin with ./ to say so."""
    name, colon, path = text.partition(":")
    return (name, path or ".") if colon and name and "/" not in name else None


def _deadline(timeout: float | None) -> float:
    """Of time.monotonic."""
    return float("inf") if timeout is None else time.monotonic() + timeout


def _timed_out(timeout: float | None) -> UserError:
    return UserError(f"timed out after {timeout:g} s", EXIT_TIMEOUT)


def _session(name: str, timeout: float | None, deadline: float) -> "AgentSession":
    """With the agent of `name`, who answers before `deadline`, which is `timeout` seconds after the start, or
    soon if there is none.
    """
    from threading import Timer

    from vmrun.agent.protocol import AgentGone
    from vmrun.control import runtime
    from vmrun.control.client import MachineClient
    from vmrun.run.guest import open_session

    directory = runtime.find(name)
    with MachineClient(name) as machine:
        if machine.status().state == "paused":
            raise UserError(f"{name} is paused: vmrun resume {name}")
    waits = f"vmrun: waiting for the agent in the guest of {name} ..."
    hint = Timer(HINT_SECONDS, print, (waits,), {"file": sys.stderr})
    hint.daemon = True
    if sys.stderr.isatty():  # elsewhere stderr is the command's, byte for byte
        hint.start()
    try:
        return open_session(directory, ANSWER_SECONDS if timeout is None else deadline - time.monotonic())
    except (AgentGone, UserError) as error:
        if time.monotonic() >= deadline:
            raise _timed_out(timeout) from None
        raise UserError(
            f"{name}: {error}: is there one (docs/agent.md)? If it still boots, --timeout 5m waits longer",
            EXIT_VMM,
        ) from None
    finally:
        hint.cancel()
