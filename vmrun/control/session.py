"""A machine with a name: claims it, runs the machine with its control socket and console log, and starts it
again when it is reset. VMM process.
"""

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from vmrun.control import runtime
from vmrun.control.server import ControlServer
from vmrun.errors import EXIT_VMM, UserError
from vmrun.host.console import Console
from vmrun.host.console_hub import ConsoleHub
from vmrun.host.console_log import ConsoleLog
from vmrun.host.overlays import Overlays, named
from vmrun.machine.config import MachineConfig

if TYPE_CHECKING:
    from vmrun.machine.machine import Machine, Outcome, SavedMachine


class Starter(Protocol):
    """Whoever started a detached machine and waits until it runs. `owner_fd` reads as ended when the machine
    is to end too; -1: it goes on alone.
    """

    owner_fd: int

    def claimed(self, directory: runtime.RuntimeDirectory) -> None: ...
    def made(self) -> None: ...
    def running(self, name: str) -> bool: ...


def run(
    config: MachineConfig,
    *,
    name: str | None,
    timeout: float | None = None,
    console: Console | None = None,
    starter: Starter | None = None,
    saved: "SavedMachine | None" = None,
    confined: bool = False,
) -> "Outcome":
    """Run the machine as `name`, or as a name made up here, to its end. Raises UserError and OSError.

    The guest's console is `console`, if there is one, and whoever attaches. A machine with a `starter` is
    detached, and its logs outlive it. With `saved` it begins where that was, until it is reset. `confined`:
    its VMM gives up what it can (vmrun.machine.confine); whoever started it removes its runtime directory.
    """
    if confined:
        from vmrun.machine.confine import check_confinable

        check_confinable(config)
    directory = runtime.claim(name)
    ending = (EXIT_VMM, "vmrun failed")
    stack = ExitStack()
    server = None
    try:
        if starter is not None:
            starter.claimed(directory)
        log = stack.enter_context(ConsoleLog(directory.path / runtime.CONSOLE_LOG))
        hub = stack.enter_context(ConsoleHub(console, log))
        server = ControlServer(directory, hub)
        stack.callback(server.close)
        overlays = stack.enter_context(Overlays(config.disks))
        config = replace(config, name=directory.name, disks=overlays.disks)
        lives = _Lives(config, hub, server, starter, directory, overlays, confined)
        outcome = lives.run(timeout, saved)
        ending = (outcome.code, outcome.reason)
        return outcome
    except UserError as error:
        ending = (error.code, str(error))
        raise
    except Exception as error:
        ending = (EXIT_VMM, str(error) or type(error).__name__)
        raise
    finally:
        # The name is free before anybody is told that the machine has ended.
        with stack:
            code, reason = ending
            if server is not None:
                server.hub.flush()
            if confined:
                directory.abandon()
            kept = {"code": code, "reason": reason, "time": time.time()}
            directory.release(kept if starter is not None else None)
            if server is not None:
                server.finish(code, reason)


class _Lives:
    """The machine, from reset to reset."""

    def __init__(
        self,
        config: MachineConfig,
        hub: ConsoleHub,
        server: ControlServer,
        starter: Starter | None,
        directory: runtime.RuntimeDirectory,
        overlays: Overlays,
        confined: bool,
    ) -> None:
        self._config = config
        self._hub = hub
        self._server = server
        self._starter = starter
        self._told = False  # that the machine runs
        self._path = directory.path / runtime.CONFIG
        self._overlays = overlays
        self._confined = confined

    def run(self, timeout: float | None, saved: "SavedMachine | None") -> "Outcome":
        if saved is not None:
            saved.prepare()  # first: it goes on while the machine is imported

        from vmrun.machine.machine import run

        self._is_made_of(self._config)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                outcome = run(
                    self._config, console=self._hub, timeout=timeout, attend=self._attend, saved=saved
                )
            finally:
                self._server.leave()
            if not outcome.restart or self._confined:
                return outcome
            saved = None  # what was reset begins at its beginning
            if deadline is not None:
                timeout = max(0.001, deadline - time.monotonic())

    def _is_made_of(self, config: MachineConfig) -> None:
        """A snapshot gives a machine other disks, and a reset must find those."""
        from vmrun.machine.config_json import describe_config

        self._config = config
        self._overlays.take(config.disks)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(describe_config(config), indent=2))
        new.replace(self._path)

    def _attend(self, machine: "Machine") -> None:
        from vmrun.machine.control import MachineControl

        machine.on_config = self._is_made_of
        if machine.agent_ports:
            from vmrun.machine.ports import PortListener

            listener = PortListener(machine.loop, machine.agent_ports, self._path.with_name(runtime.AGENT))
            machine.stack.callback(listener.close)
            if not self._confined:  # it could not talk to it; its owner does
                machine.use_agent(listener)
        if not self._confined:
            machine.watch_halts()
        machine.adopt(replace(machine.config, disks=named(machine.config.disks, machine.config.name)))
        self._server.serve(machine.loop, MachineControl(machine, confined=self._confined))
        if self._starter is not None and self._starter.owner_fd >= 0:
            machine.loop.watch(
                self._starter.owner_fd, lambda: machine.end(EXIT_VMM, "whoever started the machine is gone")
            )
        starter, self._told = (None if self._told else self._starter), True
        if starter is not None:
            starter.made()

            def tell() -> None:
                if not starter.running(self._config.name):
                    machine.end(EXIT_VMM, "whoever started the machine was gone before it ran")

            machine.when_begun(tell)
        if self._confined:
            from vmrun.machine.confine import confine

            confine(machine)
