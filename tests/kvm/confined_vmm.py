"""A VMM that confines itself, for tests to run as a process: `python confined_vmm.py JSON`.

The JSON has the machine's `name`, its `config` (keywords of MachineConfig) or the directory of a snapshot to
`restore`, and maybe `terminal` (the console is stdin and stdout), `complete` (it ends when all of the
snapshot's memory is in) and `fatal`: the name of a system call, or of one of `vmm_seccomp.IOCTLS`, that is
taken out of the table and kills instead. The last line on stderr says which layers could not be had and how
the machine ended.
"""

import json
import os
import sys
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).parent.parent.parent))

from devices.worker import seccomp
from vmrun.cli import options
from vmrun.control import runtime, session
from vmrun.host.console import Console
from vmrun.host.console_log import ConsoleLog
from vmrun.machine import confine, vmm_seccomp
from vmrun.machine.config import MachineConfig
from vmrun.machine.machine import Machine
from vmrun.snapshot.restore import Snapshot

LOG_LIMIT = 1000  # bytes: it begins anew soon
SYS_IOCTL = 16
HEADER = 6  # instructions, after which the accumulator has the call's number
SIZE = 8


def make_fatal(name: str) -> None:
    requests = {ioctl: request for ioctl, request, _ in vmm_seccomp.IOCTLS}
    if name in requests:
        block = (
            seccomp._instruction(seccomp.BPF_JMP_JEQ_K, SYS_IOCTL, 0, 4)
            + seccomp._instruction(seccomp.BPF_LD_W_ABS, seccomp.DATA_ARGS + 8)
            + seccomp._instruction(seccomp.BPF_JMP_JEQ_K, requests[name] & 0xFFFFFFFF, 0, 1)
            + seccomp._instruction(seccomp.BPF_RET_K, seccomp.SECCOMP_RET_KILL_PROCESS)
            + seccomp._instruction(seccomp.BPF_LD_W_ABS, seccomp.DATA_NR)
        )
        original = seccomp.assemble

        def assemble(*arguments: Any) -> bytes:
            program = original(*arguments)
            return program[: HEADER * SIZE] + block + program[HEADER * SIZE :]

        seccomp.assemble = assemble  # type: ignore[assignment]
        return
    table = vmm_seccomp.allowed
    (number,) = [entry.number for entry in table(os.getpid()) if entry.name == name]
    seccomp.FATAL += ((name, number),)  # type: ignore[assignment]
    vmm_seccomp.allowed = lambda pid: tuple(entry for entry in table(pid) if entry.name != name)


def complete(machine: Machine) -> None:
    """Have all of a snapshot's memory brought in."""
    assert machine.lazy is not None
    machine.lazy.complete()
    machine.end(0, "all memory is in")


def main() -> None:
    words = json.loads(sys.argv[1])
    if "fatal" in words:
        make_fatal(words["fatal"])
    session.ConsoleLog = partial(ConsoleLog, limit=LOG_LIMIT)  # type: ignore[attr-defined,assignment]
    refused: list[tuple[str, str]] = []
    attend = session._Lives._attend

    def attend_and_confine(self: session._Lives, machine: Machine) -> None:
        attend(self, machine)
        refused.extend(confine.confine(machine))
        if words.get("complete"):
            machine.loop.call_soon(threading.Thread(target=complete, args=(machine,)).start)

    session._Lives._attend = attend_and_confine  # type: ignore[method-assign]
    runtime.RuntimeDirectory.release = lambda self, outcome=None: self.abandon()  # type: ignore[method-assign]
    with ExitStack() as stack:
        saved = None
        if "restore" in words:
            saved = stack.enter_context(Snapshot(Path(words["restore"])))
            config = saved.config(throw_away=True)
        else:
            given = dict(words["config"])
            for key in ("kernel", "cdrom"):
                if key in given:
                    given[key] = Path(given[key])
            given["disks"] = tuple(options.parse_any_disk(text) for text in given.get("disks", ()))
            given["nics"] = tuple(options.parse_nic(text) for text in given.get("nics", ()))
            config = MachineConfig(**given)
        console = stack.enter_context(Console()) if words.get("terminal") else None
        outcome = session.run(config, name=words["name"], timeout=60, console=console, saved=saved)
    answer = {"refused": refused, "code": outcome.code, "reason": outcome.reason}
    print(json.dumps(answer), file=sys.stderr)


if __name__ == "__main__":
    main()
