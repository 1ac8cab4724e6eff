"""A machine's process, for a program that owns the machine: what is asked of it, and the two ways to start
it. The owner's process, and the VMM's.

A command forks, which costs nothing. A program with threads may not (they would vanish with whatever they
have locked), and starts a fresh interpreter that is told the same as JSON.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmrun.control.detach import Detached, Owned, start_owned
from vmrun.errors import EXIT_VMM, UserError
from vmrun.machine.config import DiskConfig, MachineConfig

if TYPE_CHECKING:
    from vmrun.machine.config import Mount, NicConfig

# What the fresh interpreter executes; no file of the user's gets in between.
STUB = "import sys; sys.path[0:0] = {path!r}\nfrom vmrun.control.vmm import main; main()"


@dataclass(frozen=True, slots=True)
class VmmRequest:
    """A machine made of `config`, or of the snapshot in the directory `snapshot`. Of the latter it has the
    disks and cards, unless `disks` are where these were moved to, or `nics` are others; `mounts` go to the
    places that it has for them. `throw_away`: what it writes to its disks is forgotten; it may write `quota`
    bytes to the first, unless that is None. `hold`: it stays paused. `greet`: its guest is told who it is.
    `confined`: its VMM gives up what it can. It enters `cgroup` first. `timeout` is in seconds.
    """

    config: MachineConfig | None = None
    snapshot: Path | None = None
    disks: tuple[Path, ...] = ()
    nics: "tuple[NicConfig, ...]" = ()
    throw_away: bool = True
    quota: int | None = None
    hold: bool = False
    mounts: "tuple[Mount, ...]" = ()
    greet: bool = True
    confined: bool = False
    cgroup: Path | None = None
    name: str | None = None
    timeout: float | None = None

    def run(self, starter: Detached) -> tuple[int, str]:
        """In the machine's process: its exit code, and why. Raises as `session.run`."""
        from vmrun.control import session

        if self.cgroup is not None:
            (self.cgroup / "cgroup.procs").write_text("0")
        if self.snapshot is None:
            if self.config is None:
                raise UserError("neither a configuration nor a snapshot to start", EXIT_VMM)
            outcome = session.run(
                self.config,
                name=self.name,
                timeout=self.timeout,
                starter=starter,
                confined=self.confined,
            )
            return outcome.code, outcome.reason
        from vmrun.snapshot.restore import Snapshot

        with Snapshot(self.snapshot, hold=self.hold, greet=self.greet) as saved:
            config = saved.config(
                disks=self.disks, nics=self.nics, mounts=self.mounts, throw_away=self.throw_away
            )
            if self.quota is not None:
                first, *others = config.disks
                if isinstance(first, DiskConfig):
                    config = replace(config, disks=(replace(first, quota=self.quota), *others))
            outcome = session.run(
                config,
                name=self.name,
                timeout=self.timeout,
                starter=starter,
                saved=saved,
                confined=self.confined,
            )
        return outcome.code, outcome.reason

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        from vmrun.machine.config_json import describe_config

        carrier = describe_config(MachineConfig(nics=self.nics, mounts=self.mounts))
        return {
            "config": None if self.config is None else describe_config(self.config),
            "snapshot": None if self.snapshot is None else os.fspath(self.snapshot),
            "disks": [os.fspath(disk) for disk in self.disks],
            "nics": carrier["nics"],
            "mounts": carrier["mounts"],
            "throw_away": self.throw_away,
            "quota": self.quota,
            "hold": self.hold,
            "greet": self.greet,
            "confined": self.confined,
            "cgroup": None if self.cgroup is None else os.fspath(self.cgroup),
            "name": self.name,
            "timeout": self.timeout,
        }


def parse_request(described: dict[str, Any]) -> VmmRequest:
    """Of another process of ours, so nothing is checked."""
    from vmrun.machine.config_json import parse_config

    config, snapshot = described["config"], described["snapshot"]
    return VmmRequest(
        config=None if config is None else parse_config(config),
        snapshot=None if snapshot is None else Path(snapshot),
        disks=tuple(Path(disk) for disk in described["disks"]),
        nics=parse_config({"nics": described["nics"]}).nics,
        throw_away=described["throw_away"],
        quota=described["quota"],
        hold=described["hold"],
        mounts=parse_config({"mounts": described["mounts"]}).mounts,
        greet=described["greet"],
        confined=described["confined"],
        cgroup=None if described["cgroup"] is None else Path(described["cgroup"]),
        name=described["name"],
        timeout=described["timeout"],
    )


def fork(request: VmmRequest) -> Owned:
    """Start the machine from a process without threads; returns at once."""
    from vmrun.cli import one_line

    return start_owned(request.run, one_line)


def spawn(request: VmmRequest) -> Owned:
    """The same from any process, some 50 ms later."""
    import subprocess

    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    owned_end, owner_end = os.pipe2(os.O_CLOEXEC)
    stub = STUB.format(path=[each for each in sys.path if each])
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", stub, str(write_end), str(owned_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_end, owned_end),
            start_new_session=True,
        )
    except BaseException:
        os.close(read_end)
        os.close(owner_end)
        raise
    finally:
        os.close(write_end)
        os.close(owned_end)
    owned = Owned(process.pid, os.pidfd_open(process.pid), owner_end, os.fdopen(read_end, "rb"), process)
    if process.stdin is not None:
        try:
            with process.stdin:
                process.stdin.write(json.dumps(request.describe()).encode())
        except BrokenPipeError:
            pass  # it died; what it says, or not, is heard soon
    return owned


def main() -> None:
    """What the fresh interpreter does. Never returns."""
    from vmrun.cli import one_line

    starter = Detached(int(sys.argv[1]), int(sys.argv[2]))
    for fd in (int(sys.argv[1]), int(sys.argv[2])):
        os.set_inheritable(fd, False)
    code = EXIT_VMM
    try:
        try:
            code, reason = parse_request(json.load(sys.stdin)).run(starter)
        except Exception as error:
            code, reason = error.code if isinstance(error, UserError) else EXIT_VMM, one_line(error)
        starter.tell({"code": code, "reason": reason})
    finally:
        os._exit(code)
