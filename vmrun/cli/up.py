"""`vmrun up` and `vmrun down`: the machines and bridges of a TOML file. User side; the machines are processes
of their own.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Argument, Option
from vmrun.errors import EXIT_VMM, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmrun.control.machine_entry import MachineEntry
    from vmrun.control.machine_file import MachineFile

File = Annotated[Path, Argument(metavar="FILE", help="The machine file; vm.toml if not given.")]
Names = Annotated[
    list[str] | None, Argument(metavar="NAME", help="Only these machines; also those with autostart = false.")
]


def up(
    file: File = Path("vm.toml"),
    names: Names = None,
    recreate: Annotated[
        bool, Option("--recreate", help="Stop machines that run with another configuration, and start them.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print what would run, as JSON.")] = False,
) -> int:
    """Start the machines of a TOML file.

    Those that run already are left alone.
    """
    from vmrun.control import machine_file

    def work() -> int:
        loaded = machine_file.load(file)
        chosen = loaded.choose(names or ())
        return _print_configuration(loaded, chosen) if dry_run else _up(loaded, chosen, names, recreate)

    return _all_problems(work)


def down(
    file: File = Path("vm.toml"),
    names: Names = None,
    force: Annotated[bool, Option("--force", "-f", help="At once, without asking the guests.")] = False,
) -> int:
    """Stop the machines of a TOML file.

    Returns when they have ended, and removes the bridges that were made for them.
    """

    def work() -> int:
        from vmrun.cli import one_line
        from vmrun.control import fleet, machine_file
        from vmrun.host.bridge import remove_bridge

        outline = machine_file.outline(file)
        code = 0
        with fleet.one_at_a_time(file, _waiting(file)):
            chosen = outline.choose(names or ())
            code = _stop(chosen[::-1], force=force)
            for bridge in outline.bridges if not names else ():
                try:
                    if remove_bridge(bridge):
                        print(f"bridge {bridge}: removed")
                except (UserError, OSError) as error:
                    print(f"vmrun: {one_line(error)}", file=sys.stderr)
                    code = max(code, _code(error))
        return code

    return _all_problems(work)


def _up(loaded: "MachineFile", chosen: list["MachineEntry"], names: list[str] | None, recreate: bool) -> int:
    from vmrun.cli import one_line
    from vmrun.control import fleet, preflight
    from vmrun.host.bridge import make_bridge

    document = loaded.document
    code = 0
    with fleet.one_at_a_time(document.path, _waiting(document.path)) as lock:
        missing, changed = [], []
        for machine in chosen:
            try:
                differences = fleet.differences(machine)
            except UserError as error:
                code = max(code, _tell(machine.name, error))
                continue
            if differences is None:
                missing.append(machine)
            elif not differences:
                print(f"{machine.name}: runs already")
            elif recreate:
                changed.append(machine)
            else:
                text = f"runs with another configuration ({', '.join(differences)}): --recreate restarts it"
                code = max(code, _tell(machine.name, UserError(text)))

        # All of it before anything is started or stopped.
        preflight.check_together(document, chosen)
        for machine in (*missing, *changed):
            preflight.check_files(document, machine, runs=machine in changed)
        document.check()

        needed = {nic.bridge for machine in chosen for nic in machine.config.nics}
        for bridge in loaded.bridges:
            if not names or bridge.name in needed:
                make_bridge(bridge.name, bridge.address)
        if changed:
            code = max(code, _stop([machine.name for machine in reversed(changed)], force=False))
        starting = [machine for machine in chosen if machine in missing or machine in changed]
        told = 0
        try:
            for machine, failure in fleet.start(starting, loaded.start, lock, one_line):
                told += 1
                if failure is None:
                    print(f"{machine.name}: started", flush=True)
                else:
                    code = max(code, _tell(machine.name, failure))
        except KeyboardInterrupt:
            left = [machine.name for machine in starting[told:]]
            text = f"; not started: {', '.join(left)}" if left else ""
            print(f"vmrun: interrupted: machines that run go on{text}", file=sys.stderr)
            raise
    return code


def _stop(names: list[str], *, force: bool) -> int:
    from vmrun.control import fleet

    code = 0
    for name, ran, error in fleet.stop(names, force=force):
        if error is not None:
            code = max(code, _tell(name, error))
        else:
            print(f"{name}: {'stopped' if ran else 'does not run'}", flush=True)
    return code


def _print_configuration(loaded: "MachineFile", chosen: list["MachineEntry"]) -> int:
    import json
    from dataclasses import asdict

    from vmrun.control import preflight
    from vmrun.machine.config_json import describe_config

    preflight.check_together(loaded.document, chosen)
    loaded.document.check()
    machines = {
        machine.name: describe_config(machine.config)
        | {"name": machine.name, "timeout": machine.timeout, "autostart": machine.autostart}
        for machine in chosen
    }
    bridges = {bridge.name: {"address": bridge.address} for bridge in loaded.bridges}
    found = {"machines": machines, "bridges": bridges, "start": asdict(loaded.start)}
    json.dump(found, sys.stdout, indent=2)
    print()
    return 0


def _all_problems(work: "Callable[[], int]") -> int:
    """What `work` returns. Of a file with problems each is a line of its own."""
    from vmrun.cli import one_line
    from vmrun.control.toml_document import DocumentError

    try:
        return work()
    except DocumentError as error:
        for line in error.lines:
            print(f"vmrun: {one_line(UserError(line))}", file=sys.stderr)
        return error.code


def _waiting(path: Path) -> "Callable[[], None]":
    return lambda: print(f"vmrun: {path}: waiting for another up or down of this file", file=sys.stderr)


def _tell(name: str, error: UserError) -> int:
    from vmrun.cli import one_line

    print(f"vmrun: {name}: {one_line(error)}", file=sys.stderr)
    return error.code


def _code(error: Exception) -> int:
    return error.code if isinstance(error, UserError) else EXIT_VMM
