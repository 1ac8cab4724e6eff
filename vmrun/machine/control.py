"""What the control socket may ask of a machine, done by `Machine`. VMM process, main loop."""

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmrun.errors import UserError
from vmrun.machine.config_json import describe_config
from vmrun.machine.saving import Saving

if TYPE_CHECKING:
    from vmrun.machine.machine import Machine
    from vmrun.machine.pause import Done
    from vmrun.machine.saving import Told

STOPPED = 128 + 15  # the exit code of a machine that was stopped without its guest's doing
BLOCK = 512  # what st_blocks counts, stat(2)


class MachineControl:
    """`vmrun.control.server.Controlled` for one life of a machine."""

    def __init__(self, machine: "Machine", *, confined: bool = False) -> None:
        self._machine = machine
        self._confined = confined
        self._stopping = False
        self._saving = Saving(machine)
        self._started = time.time()

    def status(self) -> dict[str, Any]:
        machine, config = self._machine, self._machine.config
        return {
            "name": config.name,
            "pid": os.getpid(),
            "state": self._state(),
            "vcpus": config.cpus,
            "memory": config.memory,
            # The pages of the memfd that anybody has touched.
            "memory_used": os.fstat(machine.ram.fd).st_blocks * BLOCK,
            "disks": len(config.disks) + (config.cdrom is not None),
            "nics": len(config.nics),
            "started": self._started,
            "workers": {name: each.worker.pid for name, each in machine.workers.items()},
        }

    def inspect(self) -> dict[str, Any]:
        machine = self._machine
        return {
            **self.status(),
            "config": describe_config(machine.config),
            "exits": [thread.exits for thread in machine.vcpus],
            "restarts": {name: each.restarts for name, each in machine.workers.items()},
        }

    def _state(self) -> str:
        if self._saving.busy:
            return "saving"
        pause = self._machine.pause
        # One that is held never was in the guest, though not all of its vCPUs may have said so yet.
        if pause.paused or (pause.pausing and self._machine.held):
            return "paused"
        return "stopping" if self._stopping else "running"

    def stop(self, force: bool) -> None:
        """Ask the guest to shut down, or end the machine at once."""
        self._stopping = True
        if force:
            self._machine.end(STOPPED, "stopped by force")
        else:
            self._machine.request_shutdown(STOPPED, "stopped")

    def reset(self) -> None:
        """End the machine, and have it started again with the memory and devices of a new one."""
        self._check_unconfined("reset")
        self._refuse_while_saving()
        self._machine.end(0, "reset", restart=True)

    def pause(self, done: "Done") -> None:
        if self._stopping:
            raise UserError(f"{self._machine.config.name} is being stopped")
        # It would be paused at once, and go on all the same when the snapshot is there.
        self._refuse_while_saving()
        self._machine.pause.pause(done)

    def resume(self) -> None:
        self._refuse_while_saving()
        self._machine.pause.resume()

    def _refuse_while_saving(self) -> None:
        if self._saving.busy:
            raise UserError(f"a snapshot of {self._machine.config.name} is being made: it goes on by itself")

    def resize(self, disk: int, size: int, done: "Done") -> None:
        """Let disk `disk` have `size` bytes, and tell `done`. It waits for the disk's worker: on a thread."""
        machine = self._machine
        if not 0 <= disk < len(machine.config.disks):
            raise UserError(f"{machine.config.name} has no disk {disk}: it has {len(machine.config.disks)}")

        def work() -> None:
            error = None
            try:
                machine.resize_disk(disk, size)
            except UserError as refusal:
                error = str(refusal)
            machine.loop.call_soon(lambda: done(error))

        threading.Thread(target=work, name="resize", daemon=True).start()

    def _check_unconfined(self, what: str) -> None:
        if self._confined:
            raise UserError(f"{self._machine.config.name} is confined, and so cannot be {what}")

    def snapshot(self, directory: Path, end: bool, done: "Told") -> None:
        """Write a snapshot, and tell `done` what came of it. The machine is paused for it, and goes on if it
        ran before, unless it is to `end`.
        """
        self._check_unconfined("saved")
        if self._stopping:
            raise UserError(f"{self._machine.config.name} is being stopped")
        self._saving.begin(directory, end=end, done=done)
