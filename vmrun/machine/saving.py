"""Has a snapshot made of a machine: pauses it, lets `vmrun.snapshot.save` write it, and has it go on. VMM
process, main loop.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmrun.errors import EXIT_VMM, UserError

if TYPE_CHECKING:
    from vmrun.machine.machine import Machine
    from vmrun.snapshot.save import Saved

Told = Callable[[dict[str, Any] | UserError], None]  # what the snapshot is, or why there is none


class Saving:
    """One at a time; `busy` while there is one."""

    def __init__(self, machine: "Machine") -> None:
        self.busy = False
        self._machine = machine

    def begin(self, directory: Path, *, end: bool, done: Told) -> None:
        """Start to write `directory`. The machine goes on afterwards if it ran before; or it is to `end`.
        UserError when there can be no snapshot.
        """
        from vmrun.snapshot import save

        machine = self._machine
        if self.busy:
            raise UserError(f"another snapshot of {machine.config.name} is being made")
        if not directory.is_absolute():
            raise UserError(f"{directory}: give the whole path of the snapshot")
        save.check(machine.config)
        self.busy = True
        # Whom it is paused for, or about to be, does not want it to go on.
        ran = not (machine.pause.paused or machine.pause.pausing)

        def write() -> None:
            """On the thread of a parked vCPU."""
            result: Saved | UserError
            try:
                result = save.save(machine, directory, go_on=not end)
                if not end:
                    self._adopt(result)
            except UserError as error:
                result = error
            except Exception as error:
                text = error.strerror if isinstance(error, OSError) else None
                result = UserError(f"{directory}: {text or error or type(error).__name__}", EXIT_VMM)
            machine.loop.call_soon(partial(self._finish, result, end, ran, done))

        def still(error: str | None) -> None:
            if error is None:
                machine.pause.do(write)
            else:
                self.busy = False
                done(UserError(error, EXIT_VMM))

        machine.pause.pause(still)

    def _adopt(self, result: "Saved") -> None:
        """From now on the machine has other disks: before anything can happen to it, such as a reset, which
        would go on with the frozen ones. On the parked vCPU's thread.
        """
        machine = self._machine
        try:
            machine.loop.ask(lambda: machine.adopt(result.config))
        except OSError:
            # The main loop has ended, and its thread waits for this one.
            machine.adopt(result.config)

    def _finish(self, result: "Saved | UserError", end: bool, ran: bool, done: Told) -> None:
        self.busy = False
        machine = self._machine
        if isinstance(result, UserError):
            if ran:
                machine.pause.resume()
            done(result)
            return
        if end:
            machine.end(0, f"saved to {result.directory}")
        elif ran:
            machine.pause.resume()
        done(
            {
                "directory": os.fspath(result.directory),
                "memory": result.memory_bytes,
                "seconds": result.seconds,
                "disks": result.frozen,
            }
        )
