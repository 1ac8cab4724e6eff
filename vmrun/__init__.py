"""vmrun: a microVM runner for Linux/KVM.

    from vmrun import Sandbox

    with Sandbox(image="debian.tar") as sandbox:
        print(sandbox.run(["uname", "-a"]).stdout)

What programs may rely on is in `__all__`; docs/python.md describes it. Nothing is imported before it is asked
for: every start of the command comes through here.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmrun.agent.files import Totals
    from vmrun.api import Machine
    from vmrun.errors import UserError
    from vmrun.machine.config import DiskConfig, MachineConfig, NicConfig
    from vmrun.run.async_sandbox import AsyncSandbox
    from vmrun.run.ending import SandboxEnded
    from vmrun.run.sandbox import CommandTimeout, Result, Running, Sandbox

__version__ = "0.1.0"

__all__ = [
    "AsyncSandbox",
    "CommandTimeout",
    "DiskConfig",
    "Machine",
    "MachineConfig",
    "NicConfig",
    "Result",
    "Running",
    "Sandbox",
    "SandboxEnded",
    "Totals",
    "UserError",
]

_HOMES = {
    "AsyncSandbox": "vmrun.run.async_sandbox",
    "CommandTimeout": "vmrun.run.sandbox",
    "DiskConfig": "vmrun.machine.config",
    "Machine": "vmrun.api",
    "MachineConfig": "vmrun.machine.config",
    "NicConfig": "vmrun.machine.config",
    "Result": "vmrun.run.sandbox",
    "Running": "vmrun.run.sandbox",
    "Sandbox": "vmrun.run.sandbox",
    "SandboxEnded": "vmrun.run.ending",
    "Totals": "vmrun.agent.files",
    "UserError": "vmrun.errors",
}


if not TYPE_CHECKING:  # or no name would be unknown to type checkers

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value: object = getattr(import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
