"""Many machines brought up and taken down together. The process of `vmrun up` and `vmrun down`.

A machine is known by its name alone: who started it does not matter, and nothing is written down.
"""

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from vmrun.control import detach, runtime, session
from vmrun.control.client import MachineClient, MachineGone
from vmrun.control.machine_entry import MachineEntry
from vmrun.control.machine_file import StartRule
from vmrun.errors import UserError
from vmrun.machine.config_json import describe_config

T = TypeVar("T")
Describe = Callable[[Exception], str]
MAX_ASKED = 64  # machines asked to stop at the same time


@contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], None]) -> Iterator[int]:
    """Hold the lock of the machine file `path`, so that a `down` does not overtake an `up`. `waiting` is
    called if another has it; gives the descriptor.

    The lock is on the file itself, and machines that are being started have it too until they have their
    names: after `kill -9` of an `up`, those that it had begun are seen by the next command.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems lock only what is open for writing. Then it goes without.
            if error.errno == errno.EWOULDBLOCK:
                waiting()
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def differences(machine: MachineEntry) -> list[str] | None:
    """The settings in which the running machine of that name is not as the file has it; None if none runs.
    Raises UserError for one that does not answer.
    """
    if machine.name not in runtime.running():
        return None
    try:
        with MachineClient(machine.name) as client:
            found = client.inspect()["config"]
    except MachineGone:
        return None
    wanted = json.loads(json.dumps(describe_config(machine.config)))
    # The name is the same, and what only one of two versions of vmrun knows cannot be compared.
    return [key for key in wanted if key in found and key != "name" and wanted[key] != found[key]]


class _Unwatched:
    """A `session.Starter` whose machine goes on when nobody hears that it runs. Lets go of the lock of
    `one_at_a_time` when the machine has its name.
    """

    def __init__(self, starter: detach.Detached, lock: int) -> None:
        self.owner_fd = -1
        self._starter = starter
        self._lock = lock

    def claimed(self, directory: runtime.RuntimeDirectory) -> None:
        os.close(self._lock)
        self._starter.claimed(directory)

    def made(self) -> None:
        self._starter.made()

    def running(self, name: str) -> bool:
        self._starter.running(name)
        return True


def start(
    machines: Iterable[MachineEntry], rule: StartRule, lock: int, describe: Describe
) -> Iterator[tuple[MachineEntry, UserError | None]]:
    """Start the machines, so many at a time as `rule` says; tells of each when it runs, or why it does not.

    On SIGINT those that have been begun are told before it raises KeyboardInterrupt; on a second one they
    come up without us. Main thread.
    """
    waiting = list(machines)
    asked = resting = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Not raised anywhere: what a machine says of itself would be lost half-way from its pipe to the user.
        nonlocal asked
        if asked or resting:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        while waiting and not asked:
            group, waiting = waiting[: rule.parallel], waiting[rule.parallel :]
            begun: list[tuple[MachineEntry, detach.Starting]] = []
            for machine in group:
                if not asked:
                    others = [starting for _, starting in begun]
                    begun.append((machine, detach.Starting(_vmm(machine, lock), describe, others)))
            for machine, starting in begun:
                yield machine, _failure(starting)
            resting = True  # first: what comes now interrupts the sleep, what came is seen
            if waiting and not asked:
                time.sleep(rule.delay)
            resting = False
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _vmm(machine: MachineEntry, lock: int) -> Callable[[detach.Detached], tuple[int, str]]:
    def vmm(starter: detach.Detached) -> tuple[int, str]:
        outcome = session.run(
            machine.config, name=machine.name, timeout=machine.timeout, starter=_Unwatched(starter, lock)
        )
        return outcome.code, outcome.reason

    return vmm


def _failure(starting: detach.Starting) -> UserError | None:
    try:
        starting.result()
    except UserError as error:
        return error
    return None


def stop(names: list[str], *, force: bool = False) -> Iterator[tuple[str, bool, UserError | None]]:
    """Stop the machines, side by side, and tell of each when it has ended: whether it ran, and what went
    wrong.
    """

    def one(name: str) -> tuple[str, bool, UserError | None]:
        try:
            with MachineClient(name) as client:
                client.stop_and_wait(force=force)
        except MachineGone:
            pass  # it has ended, if not as one would have it
        except UserError as error:
            return name, True, error
        return name, True, None

    running = runtime.running()
    with ThreadPoolExecutor(min(len(names), MAX_ASKED) or 1) as pool:
        asked = [(name, pool.submit(one, name) if name in running else None) for name in names]
        for name, result in asked:
            yield (name, False, None) if result is None else result.result()
