"""What `ps` and `top` show of a machine: its status, and what the host's kernel says of its processes. Any
process of the owner's.
"""

from dataclasses import asdict, dataclass
from typing import Any

from vmrun.control import runtime
from vmrun.control.client import MachineClient, MachineGone, Status
from vmrun.errors import UserError

STATUS_SECONDS = 2.0  # a machine that does not answer holds up the list so long


@dataclass(frozen=True, slots=True)
class Facts:
    """`status` is None for a VMM that does not answer. `cpu_seconds` is the CPU time of each process: the
    VMM's, with all vCPUs, as "vmm", and the workers' by their names.
    """

    name: str
    pid: int
    status: Status | None
    cpu_seconds: dict[str, float]

    @property
    def state(self) -> str:
        return self.status.state if self.status is not None else "unresponsive"

    @property
    def cpu_total(self) -> float:
        return sum(self.cpu_seconds.values())

    def as_json(self) -> dict[str, Any]:
        known: dict[str, Any] = {"name": self.name, "pid": self.pid}
        if self.status is not None:
            known |= asdict(self.status) | {"uptime": round(self.status.uptime, 3)}
        return known | {"state": self.state, "cpu_seconds": self.cpu_seconds}


def all_machines() -> list[Facts]:
    """The machines that run, by name."""
    found = []
    for name, pid in runtime.running().items():
        status = None
        try:
            with MachineClient(name, timeout=STATUS_SECONDS) as client:
                status = client.status()
        except MachineGone:
            continue
        except UserError:
            if name not in runtime.running():
                continue  # it ended while we asked
        processes = {"vmm": status.pid if status is not None else pid}
        if status is not None:
            processes |= status.workers
        found.append(Facts(name, processes["vmm"], status, cpu_seconds(processes)))
    return found


def cpu_seconds(processes: dict[str, int]) -> dict[str, float]:
    """User and system time of each process by name; those that are gone are left out."""
    import psutil

    used = {}
    for name, pid in processes.items():
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        used[name] = round(times.user + times.system, 2)
    return used
