"""The file of `vmrun up` and `vmrun down`: machines, templates, bridges and how to start them, in TOML. Any
process of the owner's.

docs/guide.md says what can be in it. The ideas are vm.conf(5)'s, OpenBSD; the names are the options' of
`vmrun boot`, and so are the checks. Everything wrong is told at once, with its line and key.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vmrun.control import machine_drafts, machine_entry
from vmrun.control.machine_entry import MachineEntry
from vmrun.control.toml_document import Document, hint
from vmrun.control.toml_lines import KeyPath
from vmrun.errors import UserError
from vmrun.host.tap import check_interface_name, parse_host_address

TOP_KEYS = ("machines", "templates", "bridges", "start")
MAX_DELAY = 86400.0


@dataclass(frozen=True, slots=True)
class BridgeEntry:
    """A bridge to make. `address` ("10.0.0.1/24") is the host's on it."""

    name: str
    address: str | None


@dataclass(frozen=True, slots=True)
class StartRule:
    """Machines are started `parallel` at a time, with `delay` seconds between."""

    parallel: int
    delay: float


@dataclass(frozen=True, slots=True)
class MachineFile:
    document: Document
    machines: tuple[MachineEntry, ...]
    bridges: tuple[BridgeEntry, ...]
    start: StartRule

    def choose(self, names: Iterable[str]) -> list[MachineEntry]:
        """The machines `names`, or those that start by themselves. The name of a table is all its
        instances'. In the order of the file.
        """
        wanted = set(names)
        check_chosen(wanted, {machine.name: machine.table for machine in self.machines})
        if not wanted:
            return [machine for machine in self.machines if machine.autostart]
        return [machine for machine in self.machines if {machine.name, machine.table} & wanted]


@dataclass(frozen=True, slots=True)
class Outline:
    """What there is to take down: the names of machines, each with its table's, and of bridges."""

    machines: dict[str, str]
    bridges: tuple[str, ...]

    def choose(self, names: Iterable[str]) -> list[str]:
        wanted = set(names)
        check_chosen(wanted, self.machines)
        return [name for name, table in self.machines.items() if not wanted or {name, table} & wanted]


def check_chosen(wanted: Iterable[str], machines: dict[str, str]) -> None:
    known = [*machines, *machines.values()]
    for name in wanted:
        if name not in known:
            raise UserError(f"there is no machine {name!r} in the file; {hint(name, dict.fromkeys(known))}")


def load(path: Path) -> MachineFile:
    """The whole file, checked except for what the host has to do with it. UserError (`DocumentError` when
    it is about the content).
    """
    document = Document(path)
    document.known((), document.data, TOP_KEYS)
    machines = [machine_entry.make(document, draft) for draft in machine_drafts.drafts(document)]
    if not document.data.get("machines"):
        document.problem((), "no machines: [machines.NAME] is one")
    loaded = MachineFile(
        document,
        tuple(machine for machine in machines if machine is not None),
        tuple(_bridges(document)),
        _start(document),
    )
    document.check()
    return loaded


def outline(path: Path) -> Outline:
    """What `down` needs of the file. Nothing else in it is looked at: a machine can be stopped when its disk
    is not there any more.
    """
    document = Document(path)
    found = Outline(machine_drafts.names(document), tuple(document.table(("bridges",))))
    document.check()
    return found


def _bridges(document: Document) -> Iterable[BridgeEntry]:
    for name in document.table(("bridges",)):
        where: KeyPath = ("bridges", name)
        address = document.table(where, ("address",)).get("address")
        document.attempt(where, lambda name=name: check_interface_name(name, ""))  # type: ignore[misc]
        if address is not None and document.typed((*where, "address"), address, str):
            document.attempt((*where, "address"), lambda text=address: parse_host_address(text))  # type: ignore[misc]
        yield BridgeEntry(name, address)


def _start(document: Document) -> StartRule:
    table = document.table(("start",), ("parallel", "delay"))
    parallel, delay = table.get("parallel", len(os.sched_getaffinity(0))), table.get("delay", 0)
    if document.typed(("start", "parallel"), parallel, int) and parallel < 1:
        document.problem(("start", "parallel"), "give how many machines start at a time, 1 or more")
    seconds = 0.0
    if document.typed(("start", "delay"), delay, str, int, float) and delay != 0:
        seconds = machine_entry.duration(document, ("start", "delay"), delay) or 0.0
        if seconds > MAX_DELAY:
            document.problem(("start", "delay"), "give a day at most")
    return StartRule(parallel, seconds)
