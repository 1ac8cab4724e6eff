"""Machines for Python programs: `from vmrun import Machine, MachineConfig, DiskConfig, NicConfig`.

    with Machine.boot(MachineConfig(disks=(DiskConfig(Path("x.qcow2"), "qcow2"),))) as machine:
        machine.pause()
        machine.snapshot(Path("saved"))
        machine.resume()
    with Machine.restore(Path("saved")) as machine:
        machine.wait(timeout=60)

A machine is a process of its own, and ends with its object, at the latest with this program. Each method
talks to it over its control socket (docs/control.md), as the commands of the same names do; they may be
called from any thread.
"""

from pathlib import Path
from socket import socket
from types import TracebackType
from typing import Any

from vmrun.control import vmm
from vmrun.control.client import Ending, MachineClient, Saved, Status
from vmrun.control.detach import Owned
from vmrun.errors import UserError
from vmrun.machine.config import MachineConfig, NicConfig

__all__ = ["Machine"]


class Machine:
    """A running machine of this program's: a context manager. Made by `boot` and `restore`.

    Methods raise UserError for what the machine refuses, with the exit code that the command would have.
    """

    def __init__(self, owned: Owned) -> None:
        self._owned = owned
        try:
            self.name = owned.wait_until_running()
        except BaseException:
            owned.close()
            raise
        self._ending: Ending | None = None

    @classmethod
    def boot(
        cls, config: MachineConfig | None = None, *, name: str | None = None, timeout: float | None = None
    ) -> "Machine":
        """Start a machine, which ends after `timeout` seconds. Returns when its first instruction is due.
        UserError and OSError when it cannot be."""
        return cls(vmm.spawn(vmm.VmmRequest(config=config or MachineConfig(), name=name, timeout=timeout)))

    @classmethod
    def restore(
        cls,
        directory: Path,
        *,
        name: str | None = None,
        disks: tuple[Path, ...] = (),
        nics: tuple[NicConfig, ...] = (),
        throw_away: bool = False,
        paused: bool = False,
        timeout: float | None = None,
    ) -> "Machine":
        """A machine that goes on where a snapshot left one. What it writes goes to overlays beside its disks,
        or is thrown away. `disks` are where those were moved to, `nics` other taps: all or none."""
        request = vmm.VmmRequest(
            snapshot=directory.absolute(),
            disks=disks,
            nics=nics,
            throw_away=throw_away,
            hold=paused,
            name=name,
            timeout=timeout,
        )
        return cls(vmm.spawn(request))

    @property
    def pid(self) -> int:
        """Of its VMM."""
        return self._owned.pid

    def status(self) -> Status:
        with self._client() as client:
            return client.status()

    def inspect(self) -> dict[str, Any]:
        """All there is to know, as JSON has it."""
        with self._client() as client:
            return client.inspect()

    def pause(self) -> None:
        """Returns when no vCPU and no device moves any more."""
        with self._client() as client:
            client.pause()

    def resume(self) -> None:
        with self._client() as client:
            client.resume()

    def snapshot(self, directory: Path, *, end: bool = False) -> Saved:
        """Write the machine to `directory`, which must not exist. It holds still meanwhile; then it goes on,
        or is to `end`."""
        with self._client() as client:
            return client.snapshot(directory, end=end)

    def reset(self) -> None:
        with self._client() as client:
            client.reset()

    def stop(self, *, force: bool = False, timeout: float | None = None) -> Ending:
        """Ask the guest to shut down, or with `force` end the machine at once; returns how it ended.
        TimeoutError after `timeout` seconds."""
        with self._client() as client:
            self._ending = client.stop_and_wait(force=force, timeout=timeout)
        return self._ending

    def wait(self, timeout: float | None = None) -> Ending:
        """How the machine ended, when it has. TimeoutError after `timeout` seconds."""
        if self._ending is None:
            try:
                with self._client() as client:
                    self._ending = client.wait(timeout)
            except UserError:
                # It had ended before it was asked.
                code, reason = self._owned.wait()
                self._ending = Ending(code, reason)
        return self._ending

    def console(self, *, replay: int = 0) -> socket:
        """The guest's serial console, as a socket: first the last `replay` bytes it has printed, then what it
        prints; and what it is to read. The caller's.
        """
        with self._client() as client:
            return client.console(replay=replay)

    def _client(self) -> MachineClient:
        return MachineClient(self.name)

    def close(self) -> None:
        """End the machine, if it runs, and wait for that."""
        self._owned.close()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
